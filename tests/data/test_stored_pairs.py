import json
import pickle

import pytest

from anysplade import DataError, Pair, load_pairs
from anysplade._common.hashing import DataHash
from anysplade.data.numbered_pairs import NumberedPairs
from anysplade.data.pairs import read_parts
from anysplade.data.stored_pairs import MixedFormsError, StoredPairs
from anysplade.training.mining_data import store_examples


def test_examples_on_disk_are_the_examples(tmp_path):
    pairs = [Pair(f"q{i}", f"p{i}", (f"n{i}", f"m{i}"), (2.0, 1.0, i + 0.5)) for i in range(3000)]
    stored = StoredPairs.write(iter(pairs), tmp_path / "a::[b]" / "data")
    assert list(stored) == pairs
    assert stored[5:8] == pairs[5:8]
    assert stored.dataset.column_names == ["query", "positive", "negative_1", "negative_2", "label"]
    assert StoredPairs(tmp_path / "a::[b]" / "data").data_hash == stored.data_hash
    assert StoredPairs.write(iter(pairs[:-1]), tmp_path / "other").data_hash != stored.data_hash


@pytest.fixture
def folder_of_ids(tmp_path):
    """A BEIR folder with texts by id, one of them with a lone surrogate, and triples of ids."""
    folder = tmp_path / "beir"
    folder.mkdir()
    documents = [{"_id": f"d{i}", "title": "T" * (i % 2), "text": f'text "{i}" é'} for i in range(40)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents) + '{"_id": "blank", "text": " "}\n')
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": str(i), "text": f"query {i} \ud800"}) + "\n" for i in range(9))
    )
    rows = [f"{i % 9}\td{i % 40}\td{(i * 7 + 1) % 40}" for i in range(100)]
    (folder / "triples.tsv").write_text("query_id\tpositive_id\tnegative_id\n" + "\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("negatives", [None, 0, 1])
def test_examples_of_ids_are_stored_as_numbers_and_read_as_texts(negatives, folder_of_ids, tmp_path, monkeypatch):
    monkeypatch.setattr("anysplade.data.pairs._NUMBERED", 32)
    pairs = load_pairs(folder_of_ids / "triples.tsv", negatives=negatives)
    assert pairs[1] == Pair("query 1 \ufffd", 'T text "1" é', () if negatives == 0 else ('text "8" é',))
    parts = list(read_parts(folder_of_ids / "triples.tsv", negatives=negatives))
    assert all(isinstance(part, NumberedPairs) for part in parts)
    stored = StoredPairs.write(iter(parts), tmp_path / "numbers")
    as_texts = StoredPairs.write(iter(pairs), tmp_path / "texts")
    for found in (stored, pickle.loads(pickle.dumps(StoredPairs(tmp_path / "numbers").dataset))):
        assert list(found) == (pairs if found is stored else list(as_texts.dataset))
    assert stored.data_hash == as_texts.data_hash == DataHash(pairs).hexdigest()
    assert stored.numbered()[5] == as_texts.numbered()[5] == as_texts.dataset[5] | {"label": 5}
    assert list(stored.dataset.iter(30)) == list(as_texts.dataset.iter(30))


@pytest.mark.parametrize(
    "row, message",
    [
        ("9\td1\td2", "the query '9' is not in"),
        ("1\tnone\td2", "'none' is not in"),
        ("1\td1\tblank", "has an empty text"),
        ("1\td1", "columns"),
    ],
)
def test_a_wrong_row_among_many_has_its_line_in_the_message(row, message, folder_of_ids):
    with open(folder_of_ids / "triples.tsv", "a") as file:
        file.write(row + "\n")
    with pytest.raises(DataError, match=f"triples.tsv:102: .*{message}"):
        load_pairs(folder_of_ids / "triples.tsv")


def test_lists_of_ids_among_ids_are_read_as_texts(folder_of_ids, tmp_path):
    rows = [{"query_id": i % 9, "positive_id": f"d{i}"} for i in range(30)] + [{"query_id": "1", "positive_id": ["d1", "d2"]}]
    (folder_of_ids / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(MixedFormsError):
        StoredPairs.write(read_parts(folder_of_ids / "some.jsonl"), tmp_path / "stored")
    assert not (tmp_path / "stored").exists()
    pairs = load_pairs(folder_of_ids / "some.jsonl")
    assert len(pairs) == 32
    assert list(store_examples(str(folder_of_ids / "some.jsonl"), None, tmp_path, False)) == pairs
