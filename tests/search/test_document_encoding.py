import multiprocessing
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder

from anysplade import AnyspladeError, Document, Index, ModelError, OptionError, OutputError, UsageError, load_collection
from anysplade._common.files import only_process
from anysplade._common.workers import count_gpus
from anysplade.model.encoder import open_encoder
from anysplade.model.encoding import encode, encode_counted
from anysplade.model.modules import cut_within, masked_lm
from anysplade.search import document_encoding
from anysplade.search.document_encoding import Options, encode_documents
from processes import preloaded_context
from tiny import counted_copy


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(document_encoding, "PART", 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of several workers has
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quick_workers(monkeypatch):
    """Workers that start at once; test_several_processes_give_the_same_bytes has those that users get."""
    context = preloaded_context()
    monkeypatch.setattr(document_encoding, "multiprocessing", SimpleNamespace(get_context=lambda _: context))


@pytest.fixture
def corpus(collection_folder):
    return load_collection(collection_folder).corpus


def options(model, **changes):
    return Options(str(model), "float32", None, None, "torch")._replace(**changes)  # in the workers too


def batches(corpus, chosen, **arguments):
    return list(encode_documents(corpus.items(), chosen, **arguments))


def rows(found):
    """Comparable with ==."""
    return [(d.id, d.content, d.terms.tobytes(), d.weights.tobytes()) for batch in found for d in batch]


def test_documents_with_their_vectors_in_order(backbone, corpus):
    found = batches(corpus, options(backbone))
    assert [len(batch) for batch in found] == [16, 16, 8]
    expected = encode(open_encoder(backbone), [document.full_text for document in corpus.values()], "document").toarray()
    for i, document in enumerate(document for batch in found for document in batch):
        assert (document.id, document.content) == list(corpus.items())[i]
        assert document.terms.dtype == np.int32
        dense = np.zeros(expected.shape[1], np.float32)
        dense[document.terms] = document.weights
        np.testing.assert_allclose(dense, expected[i], rtol=1e-4, atol=1e-4)


def test_several_processes_give_the_same_bytes(backbone, corpus):
    assert rows(batches(corpus, options(backbone), workers=2)) == rows(batches(corpus, options(backbone)))


def test_a_worker_that_dies_is_reported(backbone, corpus, tmp_path, monkeypatch, quick_workers):
    read = document_encoding._read_shard

    def kill_them(folder, number, part):
        if number == 2:
            for worker in multiprocessing.active_children():
                worker.kill()
        return read(folder, number, part)

    with monkeypatch.context() as patched:
        patched.setattr(document_encoding, "_read_shard", kill_them)
        with pytest.raises(AnyspladeError, match="fewer `workers`"):
            batches(corpus, options(backbone), workers=2, shards=tmp_path)
    assert len(rows(batches(corpus, options(backbone), workers=2, shards=tmp_path))) == 40


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_that_cannot_be_opened_is_reported_by_any_number_of_workers(workers, backbone, corpus, tmp_path, quick_workers):
    open_encoder(backbone).save_pretrained(str(tmp_path / "torn"))
    (weights,) = (tmp_path / "torn").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="torn: cannot be loaded"):
        batches(corpus, options(tmp_path / "torn"), workers=workers)


def test_a_document_that_the_model_cannot_encode_is_named(backbone, corpus, tmp_path):
    encoder = open_encoder(backbone)
    word = corpus["d37"].text.split()[0]  # of the third part
    with torch.no_grad():
        masked_lm(encoder).get_input_embeddings().weight[encoder.tokenizer.convert_tokens_to_ids(word)] = torch.nan
    encoder.save_pretrained(str(tmp_path / "diverged"))
    with pytest.raises(ModelError, match=r"NaN or infinity for document 'd\d+'; its training diverged"):
        batches(corpus, options(tmp_path / "diverged"))


def test_one_copy_in_bfloat16_a_process(backbone, corpus, monkeypatch):
    copies = []
    monkeypatch.setattr(SparseEncoder, "__deepcopy__", counted_copy(copies), raising=False)
    assert len(batches(corpus, options(backbone, precision="bfloat16"))) == 3
    assert len(copies) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_are_not_encoded_again(workers, backbone, corpus, tmp_path, monkeypatch, quick_workers):
    whole = rows(batches(corpus, options(backbone), workers=workers, shards=tmp_path))
    (tmp_path / "000001.npz").unlink()
    torn = tmp_path / "000002.npz"
    torn.write_bytes(torn.read_bytes()[:100])
    encoded, encode_parts = [], document_encoding.encode_parts

    def recorded(encoder, parts, *rest, **options):
        for part, *found in encode_parts(encoder, parts, *rest, **options):
            encoded.extend([] if part.known is not None else [part.tag[0].ids[0]])
            yield part, *found

    monkeypatch.setattr(document_encoding, "encode_parts", recorded)
    assert rows(batches(corpus, options(backbone), shards=tmp_path)) == whole
    assert encoded == ["d16", "d32"]
    encoded.clear()
    corpus["d20"] = Document("", "kabel")
    changed = rows(batches(corpus, options(backbone), shards=tmp_path))
    assert encoded == ["d16"]
    assert [a == b for a, b in zip(changed, whole, strict=True)].count(False) >= 1
    assert changed[:16] == whole[:16]
    assert changed[32:] == whole[32:]


def test_texts_in_several_processes(backbone, corpus, tmp_path, monkeypatch, quick_workers):
    """The same vectors and count as in this process; parts in the cache are not encoded again."""
    encoder = cut_within(open_encoder(backbone), 8)
    texts = [document.full_text for document in corpus.values()]
    texts[3] = ""
    expected = encode_counted(encoder, texts, "document")
    assert 0 < expected.cut.texts < 40
    chosen = options(backbone, max_length=8)
    got = document_encoding.encode_texts(encoder, texts, chosen, 2, cache=tmp_path / "cache")
    assert got.cut == expected.cut
    np.testing.assert_allclose(got.matrix.toarray(), expected.matrix.toarray(), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(document_encoding, "_work", None)
    again = document_encoding.encode_texts(encoder, texts, chosen, 2, cache=tmp_path / "cache")
    assert (again.matrix != got.matrix).nnz == 0
    assert again.cut == expected.cut


def test_one_worker_per_gpu_for_many_documents(backbone, corpus, monkeypatch):
    assert count_gpus() == max(1, torch.cuda.device_count())
    monkeypatch.setattr(document_encoding, "count_gpus", lambda: 4)
    monkeypatch.setattr(document_encoding, "_COUNTED", 2)
    assert [document_encoding.workers_for(count) for count in (31, 32)] == [1, 4]
    used = []
    monkeypatch.setattr(
        document_encoding, "_in_processes", lambda jobs, options, workers, tokens: used.append((workers, tokens)) or ()
    )
    batches(corpus, options(backbone), batch_tokens=99)
    batches(corpus, options(backbone), workers=3)
    assert len(batches(corpus, options(backbone), workers=1)) == 3
    batches(dict(list(corpus.items())[:31]), options(backbone))
    assert used == [(4, 99), (3, None)]


def test_only_the_largest_weights(backbone, corpus):
    assert all(len(document.terms) == 5 for batch in batches(corpus, options(backbone, top_k=5)) for document in batch)


def test_the_model_is_not_opened_for_nothing(tmp_path):
    assert batches({}, options(tmp_path / "nowhere")) == []


def test_faults(backbone, corpus, tmp_path):
    for wrong in ({"workers": 0}, {"workers": -1}):
        with pytest.raises(OptionError, match="workers"):
            batches(corpus, options(backbone), **wrong)
    with pytest.raises(OptionError, match="`top_k` is 0: it is at least 1"):
        batches(corpus, options(backbone, top_k=0))
    with pytest.raises(ModelError):
        batches(corpus, options(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "nodes, workers, share",
    [
        ([{"CPU": 2}], 2, (1, 0)),
        ([{"CPU": 8}], 2, (4, 0)),
        ([{"CPU": 2}], 5, (1, 0)),
        ([{"CPU": 3}, {"CPU": 3}], 3, (1, 0)),  # of two cores each only two would fit
        ([{"CPU": 16, "GPU": 2}], 2, (8, 1)),
        ([{"CPU": 16, "GPU": 2}], 3, (5, 0.5)),
        ([{"CPU": 64}, {"CPU": 8, "GPU": 4}], 4, (2, 1)),
        ([{"CPU": 8, "GPU": 1}, {"CPU": 2, "GPU": 1}], 2, (2, 1)),
        ([{"CPU": 4, "GPU": 8}], 2, (2, 1)),
    ],
)
def test_what_an_actor_asks_of_a_cluster(nodes, workers, share):
    assert document_encoding._share(nodes, workers) == share


@pytest.mark.slow  # half a minute, and Ray is large: CI does without
def test_ray_gives_the_same_bytes(backbone, corpus, tmp_path):
    ray = pytest.importorskip("ray", reason='pip install "anysplade[ray]"')
    ray.init(num_cpus=2, include_dashboard=False, ignore_reinit_error=True)
    try:
        expected = rows(batches(corpus, options(backbone)))
        batches(dict(list(corpus.items())[:16]), options(backbone), shards=tmp_path)  # an interrupted call's first part
        assert rows(batches(corpus, options(backbone), workers=2, ray=True, shards=tmp_path)) == expected
    finally:
        ray.shutdown()


def test_two_builds_of_one_index(backbone, collection_folder, tmp_path):
    """The second is refused at once and harms nothing; a build that fails leaves nothing behind."""
    output = tmp_path / "deep" / "index"
    with only_process(tmp_path / "deep" / "index.parts"), pytest.raises(OutputError, match="another process works there now"):
        Index.build(backbone, collection_folder, output)
    for corpus in ({}, tmp_path / "nowhere.jsonl"):
        with pytest.raises(UsageError):
            Index.build(backbone, corpus, output, top_k=0)
        assert list(tmp_path.iterdir()) == []
    Index.build(backbone, collection_folder, output).close()
    assert [path.name for path in output.parent.iterdir()] == ["index"]


@pytest.mark.parametrize("counted, end", [(16, "of 40 documents, about 1 second left"), (1, "documents")])
def test_progress_has_an_estimate_if_the_corpus_is_not_too_large_to_count(counted, end, backbone, corpus, monkeypatch, caplog):
    caplog.set_level("INFO", "anysplade")
    monkeypatch.setattr(document_encoding, "_COUNTED", counted)
    monkeypatch.setattr("anysplade._common.progress._MANY", 1)
    for wait in ("_FIRST_WAIT", "_WAIT"):
        monkeypatch.setattr(f"anysplade._common.progress.{wait}", 0.0)
    batches(corpus, options(backbone), progress=True)
    assert caplog.messages[0].startswith("encoding documents")
    assert any(re.fullmatch(rf"encoding documents: \d+ {end}", line) for line in caplog.messages[1:])
