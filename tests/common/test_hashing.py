import json
from dataclasses import replace
from itertools import combinations

import pytest

from anysplade import Collection, Document, Pair
from anysplade._common.hashing import DataHash
from anysplade.data.collections import data_hash
from anysplade.data.stored_pairs import StoredPairs

TEXT = "a\nb"
COLLECTION = Collection(
    "docs",
    {"d1": Document("", "one"), "d2": Document("t", "two")},
    {"q1": "first", "q2": "second"},
    {"q1": {"d1": 1}, "q2": {"d2": 2, "d1": 0}},
)
PAIR = Pair("q", "p", ("n", "m"), (2.0, 1.0))


@pytest.mark.parametrize(
    "rows, others",
    [
        ([("a", "bc")], [("ab", "c")]),
        ([("a", "b")], [("a",), ("b",)]),
        (["a", "b"], [TEXT]),
        ([("a\0", "b")], [("a", "\0b")]),
        ([("a", None)], [("a", "null")]),
        (["a", "b"], ["b", "a"]),
        ([""], []),
        (["\ud800"], ["\ufffd"]),
    ],
)
def test_rows_that_differ_hash_apart(rows, others):
    assert DataHash(rows).hexdigest() != DataHash(others).hexdigest()


def test_rows_one_by_one_hash_as_all_of_them():
    digest = DataHash()
    for row in ("a", ("b", 1.5)):
        digest.add(row)
    assert digest.hexdigest() == DataHash(["a", ("b", 1.5)]).hexdigest()


COLLECTIONS = {
    "as it is": COLLECTION,
    "texts of two queries exchanged": replace(COLLECTION, queries={"q1": "second", "q2": "first"}),
    "ids of two queries exchanged": replace(COLLECTION, queries={"q2": "first", "q1": "second"}, qrels=COLLECTION.qrels),
    "another id of a query": replace(
        COLLECTION, queries={"q1": "first", "q3": "second"}, qrels={"q1": {"d1": 1}, "q3": {"d2": 2, "d1": 0}}
    ),
    "documents in another order": replace(COLLECTION, corpus=dict(reversed(COLLECTION.corpus.items()))),
    "another id of a document": replace(COLLECTION, corpus={"d1": Document("", "one"), "d3": Document("t", "two")}),
    "a title that is text": replace(COLLECTION, corpus={"d1": Document("", "one"), "d2": Document("", "t two")}),
    "another grade": replace(COLLECTION, qrels={"q1": {"d1": 1}, "q2": {"d2": 1, "d1": 0}}),
    "a judgement less": replace(COLLECTION, qrels={"q1": {"d1": 1}, "q2": {"d2": 2}}),
    "judgements exchanged": replace(COLLECTION, qrels={"q2": {"d1": 1}, "q1": {"d2": 2, "d1": 0}}),
}


def test_collections_that_differ_hash_apart():
    same = {frozenset(("texts of two queries exchanged", "ids of two queries exchanged"))}  # one collection, said in two ways
    for one, other in combinations(COLLECTIONS, 2):
        equal = data_hash(COLLECTIONS[one]) == data_hash(COLLECTIONS[other])
        assert equal == (frozenset((one, other)) in same), (one, other)


def test_the_order_of_queries_and_judgements_is_no_content():
    """Neither decides a number, and other forms of a collection list them otherwise."""
    qrels = {query_id: dict(reversed(grades.items())) for query_id, grades in reversed(COLLECTION.qrels.items())}
    turned = replace(COLLECTION, name="other", queries=dict(reversed(COLLECTION.queries.items())), qrels=qrels)
    assert data_hash(turned) == data_hash(COLLECTION)


@pytest.mark.parametrize(
    "changed",
    [
        [PAIR, PAIR],
        [PAIR._replace(scores=(1.0, 2.0))],
        [PAIR._replace(scores=None)],
        [PAIR._replace(negatives=("m", "n"))],
        [PAIR._replace(query="p", positive="q")],
    ],
)
def test_training_examples_that_differ_hash_apart(changed, tmp_path):
    hashes = [StoredPairs.write(pairs, tmp_path / name).data_hash for name, pairs in (("one", [PAIR]), ("other", changed))]
    assert hashes[0] == DataHash([PAIR]).hexdigest()
    assert hashes[0] != hashes[1]
    assert json.loads((tmp_path / "one" / "examples.json").read_text()) == {"data_hash": hashes[0]}
