import json
import logging

import numpy as np
import pytest

from anysplade import DataError, Document, evaluate, load_collection
from anysplade._common import row_file
from anysplade.data import seen_ids, stored_corpus
from anysplade.data.collections import data_hash
from anysplade.data.stored_corpus import StoredCorpus, StoredTexts, full_texts, ids_at, position_of, with_changes

CORPUS = {
    "a": Document("title", "text"),
    "\ud800": Document("", "half a character \udc00", {"year": 1999, "tags": ["x"]}),
    "ü": Document("", ""),
}


def test_a_stored_corpus_is_the_same_as_one_in_memory():
    stored = StoredCorpus(CORPUS.items())
    assert stored == CORPUS
    assert list(stored) == list(CORPUS)
    assert list(stored.items()) == list(CORPUS.items())
    assert list(stored.values()) == list(CORPUS.values())
    assert len(stored) == 3
    assert "b" not in stored
    assert 1 not in stored
    with pytest.raises(KeyError):
        stored["b"]
    texts = full_texts(stored)
    assert isinstance(texts, StoredTexts)
    assert list(texts) == texts[:] == full_texts(CORPUS)
    assert texts[-1] == ""
    for corpus in (stored, CORPUS):
        assert ids_at(corpus, np.array([2, 0])) == {2: "ü", 0: "a"}
        assert position_of(corpus, "ü") == 2


def test_ids_with_the_same_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(stored_corpus, "_hash", lambda id_: bytes(8))
    stored = StoredCorpus(CORPUS.items())
    assert stored == CORPUS
    assert "b" not in stored
    with pytest.raises(DataError, match="the id 'a' is a duplicate"):
        StoredCorpus([*CORPUS.items(), ("a", Document("", ""))])


def test_duplicates_beyond_those_in_memory_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(stored_corpus, "_IN_MEMORY", 2)
    rows = [{"_id": id_, "text": "x"} for id_ in "abcdc"]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"corpus.jsonl:5: the id 'c' is a duplicate of line 3; ids must be unique"):
        stored_corpus.open_corpus(tmp_path / "corpus.jsonl")


@pytest.mark.parametrize("model", ["bm25", "sparse", "dense"])
def test_an_evaluation_in_files_is_the_same(model, teachers, collection_folder, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    model = teachers.get(model, model)
    whole = evaluate(model, collection_folder)
    monkeypatch.setattr(stored_corpus, "_IN_MEMORY", 10)
    monkeypatch.setattr(row_file, "_IN_MEMORY", 10)
    collection = load_collection(collection_folder)
    assert isinstance(collection.corpus, StoredCorpus)
    assert data_hash(collection) == whole.data_hash
    stored = evaluate(model, collection, output=tmp_path)
    assert stored.run == whole.run
    assert [list(ranking) for ranking in stored.run.values()] == [list(ranking) for ranking in whole.run.values()]
    timings = ("seconds", "provenance")
    one, other = ({k: v for k, v in found.to_dict().items() if k not in timings} for found in (stored, whole))
    for found in (one, other):
        (found["cost"] or {}).pop("texts_per_second", None)
    assert one == other
    if whole.vectors is not None:
        assert isinstance(stored.vectors[1].data.base, np.memmap)
        assert (stored.vectors[1] != whole.vectors[1]).nnz == 0


@pytest.mark.parametrize("kept", [0, 2, 10])
def test_ids_that_were_seen(kept, monkeypatch):
    monkeypatch.setattr(seen_ids, "_IN_MEMORY", kept)
    seen = seen_ids.SeenIds()
    ids = ["a", "b", "\ud800", "7", "", "é"]
    assert [seen.earlier(id_, number) for number, id_ in enumerate(ids, 1)] == [None] * len(ids)
    assert [seen.earlier(id_, 100) for id_ in ids] == [1, 2, 3, 4, 5, 6]


def test_changes_keep_a_corpus_in_files():
    stored = with_changes(StoredCorpus(CORPUS.items()), {"a": Document("", "new")})
    assert isinstance(stored, StoredCorpus)
    assert stored == with_changes(CORPUS, {"a": Document("", "new")}) == {**CORPUS, "a": Document("", "new")}
