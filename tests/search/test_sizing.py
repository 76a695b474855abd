import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse

from anysplade import DataError, ModelError, OptionError, load_collection
from anysplade.model.encoder import open_encoder
from anysplade.model.encoding import encode
from anysplade.search import sizing
from anysplade.search.sizing import parse_count, size


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(sizing, "_POSTINGS", 100_000)
    monkeypatch.setattr(sizing, "_STREAM", 2**16)
    monkeypatch.setattr(sizing, "_SECONDS", 0.01)


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves on by a quarter of a second whenever it is read: whatever is timed takes that long."""
    monkeypatch.setattr(sizing, "time", SimpleNamespace(perf_counter=itertools.count(1.0, 0.25).__next__))


def test_figures_by_hand(backbone, collection_folder, clock):
    found = size(backbone, 40, corpus=collection_folder, qps=1e6, memory_gib=1e-5)
    collection = load_collection(collection_folder)
    encoder = open_encoder(backbone)
    documents = encode(encoder, [d.full_text for d in collection.corpus.values()], "document").toarray() > 0
    queries = encode(encoder, list(collection.queries.values()), "query").toarray() > 0
    assert found.sampled_documents == 40
    assert found.postings == pytest.approx(documents.sum())
    assert found.postings_per_query == pytest.approx(np.mean([documents[:, query].sum() for query in queries]))
    assert found.index_bytes == pytest.approx(8 * documents.sum() + 8 * 150)
    assert found.text_bytes == sum(len(d.full_text) + len(id_) for id_, d in collection.corpus.items())
    assert found.seconds_per_query == pytest.approx(found.postings_per_query * found.ns_per_posting * 1e-9)
    assert found.qps_per_core == pytest.approx(1 / found.seconds_per_query)
    assert found.document_active_dims == pytest.approx(documents.sum(axis=1).mean())
    assert found.query_active_dims == pytest.approx(queries.sum(axis=1).mean())
    assert found.flops == pytest.approx(found.postings_per_query / 40)
    assert found.disk_bytes == pytest.approx(3 * 8 * documents.sum() + found.text_bytes)
    assert found.cores == math.ceil(1_000_000 * found.seconds_per_query) > 1
    assert found.shards == math.ceil(found.index_bytes / 10_737.41824) > 1  # 2³⁰ bytes are a GiB
    assert found.texts_per_second == 40 / 0.25
    assert found.encoding_hours == pytest.approx(0.25 / 3600)
    assert found.ns_per_posting > 0
    assert found.floor_ns_per_posting > 0
    assert "its queries" in found.sampled_from


def test_the_time_a_posting_by_hand(clock, monkeypatch):
    monkeypatch.setattr(sizing, "_SECONDS", 0.0)
    monkeypatch.setattr(sizing, "_POSTINGS", 11)  # of which two copies of the five below fit
    rows = sparse.csr_matrix(np.array([[1, 0, 2], [1, 1, 1]], np.float32))
    queries = sparse.csr_matrix(np.array([[1, 0, 1], [0, 1, 0]], np.float32))
    # Three searches: of the first query, the second and the first, which read 2 x 4, 2 x 1 and 2 x 4 postings.
    assert sizing._speed(rows, queries) == pytest.approx((1e9 * 0.25 / 8, 1e9 * 0.25 / 2**16))


def test_bytes_of_texts(backbone, tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "ä", "text": "kabel ö"}\n{"_id": "b", "text": "kabel"}\n')
    assert size(backbone, 2, corpus=tmp_path / "corpus.jsonl").text_bytes == 2 + 8 + 1 + 5  # in UTF-8


def test_ten_times_the_documents(backbone, collection_folder):
    small, large = (size(backbone, n, corpus=collection_folder, qps=1e6, memory_gib=1e-3) for n in (10**6, 10**7))
    assert large.postings_per_query == pytest.approx(10 * small.postings_per_query)
    assert large.text_bytes == pytest.approx(10 * small.text_bytes)
    assert large.shards == pytest.approx(10 * small.shards, rel=0.01)
    assert small.cores >= 1
    assert small.to_dict()["documents"] == 10**6


def test_without_a_corpus_and_with_one_file(backbone, collection_folder):
    assert size("bert-tiny", 1000).sampled_from == "everyday texts"
    found = size(backbone, 1000, corpus=collection_folder / "corpus.jsonl", sample=7)
    assert found.sampled_documents == 7
    assert "everyday queries" in found.sampled_from


@pytest.mark.parametrize(
    "text, count",
    [("1", 1), ("100M", 10**8), ("2.5B", 2_500_000_000), ("1e8", 10**8), ("100,000", 10**5), ("10k", 10**4), (" 3m ", 3 * 10**6)],
)
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "0", "-5", "many", "1e99", "10T", "nan", "1.2.3"])
def test_what_is_no_count(text):
    with pytest.raises(OptionError, match="no number of documents"):
        parse_count(text)


@pytest.mark.parametrize(
    "options",
    [{"documents": 0}, {"sample": 0}, {"qps": 0}, {"qps": float("nan")}, {"memory_gib": -1}, {"memory_gib": float("inf")}],
)
def test_impossible_options(options, backbone):
    with pytest.raises(OptionError, match="must be above 0"):
        size(backbone, **{"documents": 10} | options)


def test_faults(backbone, tmp_path):
    with pytest.raises(ModelError):
        size(tmp_path / "nowhere", 10)
    with pytest.raises(DataError):
        size(backbone, 10, corpus=tmp_path / "nowhere.jsonl")
