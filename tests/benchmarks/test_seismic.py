import numpy as np
import pytest

from anysplade import DataError, Document, OptionError
from anysplade.search.documents import EncodedDocument
from anysplade.search.store import Store

pytest.importorskip("seismic", reason="pyseismic-lsr has wheels for Linux on x86-64 and a few versions of Python only")

from benchmarks.seismic import SeismicEngine

VOCABULARY = 250_002


def vector(generator, size):
    terms = np.sort(generator.choice(300, size, replace=False) * 833).astype(np.int32)
    return terms, (generator.random(size) + 0.1).astype(np.float32)


@pytest.fixture
def store(tmp_path):
    Store.create(tmp_path / "store")
    store = Store(tmp_path / "store", VOCABULARY)
    generator = np.random.default_rng(0)
    store.put(EncodedDocument(f"d{i}", Document("", ""), *vector(generator, 30)) for i in range(2000))
    store.put([EncodedDocument("empty", Document("", ""), np.zeros(0, np.int32), np.zeros(0, np.float32))])
    yield store
    store.close()


def test_it_says_how_much_it_finds(store):
    generator = np.random.default_rng(1)
    queries = [vector(generator, 12) for _ in range(30)]
    engine = SeismicEngine(store, queries)
    answer = engine.search(*queries[0], 10)
    assert answer.approximate
    assert 0.5 < answer.recall <= 1
    exact = dict(store.search(*queries[0], 3000, exact=True))
    for position, score in answer.found:  # what it finds has the score that it should have
        assert score == pytest.approx(exact[position], rel=5e-3)
    little = SeismicEngine(store, queries, postings=5, query_cut=2)
    assert little.recall < engine.recall


def test_faults(store, tmp_path):
    with pytest.raises(OptionError, match="0 queries"):
        SeismicEngine(store, [])
    query = vector(np.random.default_rng(1), 5)
    engine = SeismicEngine(store, [query])
    with pytest.raises(DataError, match="rising and each once"):
        engine.search(np.array([1, 1]), np.array([1.0, 1.0]), 10)
    assert engine.search(np.zeros(0, np.int32), np.zeros(0, np.float32), 10).found == []
    Store.create(tmp_path / "nothing")
    with pytest.raises(OptionError, match="0 documents"):
        SeismicEngine(Store(tmp_path / "nothing", VOCABULARY), [query])
