import numpy as np
import pytest

from anysplade import Collection, DataError, Document
from anysplade.training.judging import decide, halves, held_out, is_not_worse

NOISE = np.resize([0.01, -0.01], 400)


@pytest.mark.parametrize(
    "shift, flops, verdict, keep",
    [
        (0.01, (2.0, 2.0), "better", True),
        (0.01, (2.0, 2.1), "better", True),  # a twentieth more is the same cost
        (0.01, (2.0, 2.11), "better", False),
        (0.01, (2.0, 1.0), "better", True),
        (0.0001, (2.0, 2.0), "no difference shown", False),  # higher, without evidence
        (0.0001, (2.0, 1.91), "no difference shown", False),  # hardly cheaper
        (0.0001, (2.0, 1.9), "cheaper and not worse", True),
        (-0.0001, (2.0, 1.9), "cheaper and not worse", True),
        (-0.003, (2.0, 1.0), "worse", False),  # less than the margin, but shown
        (-0.1, (2.0, 1.0), "worse", False),
    ],
)
def test_what_is_kept(shift, flops, verdict, keep):
    found = decide(np.full(400, 0.5), 0.5 + NOISE + shift, flops)
    assert (found.verdict, found.keep, found.queries) == (verdict, keep, 400)
    assert found.difference == pytest.approx(shift)


def test_not_worse_by_hand():
    """The margin is 0.01. With the added query the loss is shift - 0.5 / 401, and two standard errors of it are about 0.05 / 20."""
    before = np.full(400, 0.5)
    assert is_not_worse(before, 0.5 + NOISE - 0.005)
    assert not is_not_worse(before, 0.5 + NOISE - 0.0065)
    assert not is_not_worse(np.zeros(400), np.zeros(400))  # 2 % of nothing


@pytest.mark.parametrize("queries, shown", [(1, False), (20, False), (100, False), (200, True)])
def test_queries_without_a_change_show_little(queries, shown):
    """Rule of three: nothing in n queries leaves room for a share of 3 / n."""
    same = np.full(queries, 0.5)
    assert is_not_worse(same, same) == shown


@pytest.mark.parametrize("queries", [10, 40, 250])
def test_without_an_effect_nearly_every_model_is_refused(queries):
    """Random changes of random queries, some of which stay as they were: "better" in at most one of twenty decisions."""
    generator = np.random.default_rng(queries)
    better = 0
    for _ in range(200):
        before, after = generator.choice([0, 0.3, 0.4, 0.6, 1.0], (2, queries))
        stays = generator.random(queries) < 0.4
        found = decide(before, np.where(stays, before, after), (1.0, 1.0))
        assert found.keep == (found.verdict == "better")
        better += found.keep
    assert better <= 10


def test_halves():
    ids = [f"q{i}" for i in range(101)]
    collection = Collection("c", {"d": Document("", "text")}, dict.fromkeys(ids, "text"), {id_: {"d": 1} for id_ in ids})
    deciding, reporting = halves(collection, {id_: "title" if i < 41 else "sentence" for i, id_ in enumerate(ids)})
    assert (len(deciding.queries), len(reporting.queries)) == (51, 50)
    assert deciding.queries.keys() | reporting.queries.keys() == set(ids)
    assert sum(id_ in ids[:41] for id_ in reporting.queries) in (20, 21)  # half of each kind
    assert [half.qrels.keys() for half in (deciding, reporting)] == [half.queries.keys() for half in (deciding, reporting)]
    again = Collection("c", collection.corpus, dict(reversed(collection.queries.items())), collection.qrels)
    assert halves(again, {})[0].queries == halves(collection, {})[0].queries  # whatever the order
    with pytest.raises(DataError, match="c: one query cannot both decide and report"):
        halves(Collection("c", {}, {"q": "text"}, {}), {})


def test_held_out_queries_are_of_all_kinds():
    kinds = ("title", "heading", "sentence")
    rows = [
        {"query": f"{kind} {i}", "positive": f"rest {i}", "kind": kind, "document_id": f"d{i}"}
        for i in range(14)
        for kind in (kinds if i < 9 else kinds[2:])
    ]
    documents = {f"d{i}": Document("title", "text") for i in range(14)}
    collection, of_kind = held_out(rows, documents, {f"d{i}" for i in range(12)})
    assert collection.name == "12 held-out pairs (4 title, 4 heading, 4 sentence)"
    assert len(collection.queries) == 12  # one of each document
    assert sorted(of_kind.values()) == sorted(kinds * 4)
    for id_, query in collection.queries.items():
        (document_id,) = collection.qrels[id_]
        number = document_id.removeprefix("d")
        assert query == f"{of_kind[id_]} {number}"
        assert collection.corpus[document_id] == Document("", f"rest {number}")  # without the query
    assert collection.corpus["d13"] == documents["d13"]
