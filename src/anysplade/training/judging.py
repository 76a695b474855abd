"""Judge an adapted model against its original: one half of the queries decides, and the other half reports.

The decision has two answers, so a number of the queries that gave it is too good whenever it is "keep" (the winner's curse). The
queries that report decided nothing, so their difference is unbiased, and its interval holds. This halves the queries
that decide; ``benchmarks/adapt_verdict.py`` measures both sides of the exchange, and cross-fitting.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import numpy as np

from anysplade.data.collections import Collection
from anysplade.data.corpus import Document
from anysplade.data.names import PAIR_KINDS
from anysplade.data.stored_corpus import with_changes
from anysplade.data.text import stable_hash
from anysplade.errors import DataError
from anysplade.evaluation.comparisons import Comparison
from anysplade.evaluation.evaluations import Evaluation
from anysplade.evaluation.significance import Verdict, paired_t, verdict

METRIC = "nDCG@10"
CHEAPER_AND_NOT_WORSE = "cheaper and not worse"  # a verdict beside those of every comparison
MARGIN = 0.02  # share of the original's mean; a smaller loss than this counts as not worse
_CHEAPER = 0.95  # of the original's FLOPS, up to which the adapted model counts as cheaper
_COSTLIER = 1.05  # of the original's FLOPS, above which it counts as more expensive


@dataclass(frozen=True)
class Decision:
    """What the deciding queries say of the adapted model."""

    verdict: str  # "better", "cheaper and not worse", "no difference shown" or "worse"
    keep: bool  # whether the adapted model is kept
    queries: int  # number of deciding queries
    difference: float  # of the means, adapted minus original
    interval: tuple[float, float] | None  # 95 %, Student's t
    p: float  # paired t-test, two-sided
    not_worse: bool  # whether the non-inferiority bound is above the margin
    flops: tuple[float, float]  # of the original and the adapted model


def judge(evaluations: Sequence[Evaluation]) -> Decision:
    """``decide`` by evaluations of the original and of the adapted model on the deciding queries."""
    before, after = evaluations
    assert before.flops is not None  # both are sparse encoders
    assert after.flops is not None
    ids = list(before.per_query[METRIC])
    values = np.array([[evaluation.per_query[METRIC][id_] for id_ in ids] for evaluation in evaluations])  # (2, queries)
    return decide(values[0], values[1], (before.flops, after.flops))


def decide(before: np.ndarray, after: np.ndarray, flops: tuple[float, float]) -> Decision:
    """Whether the adapted model is kept: if it is better at no more cost, or cheaper and not worse.

    "Better" and "worse" are the verdicts of a paired t-test and its interval, two-sided at 5 %: without any effect a model is
    called better once in forty decisions. "Cheaper" is at most 0.95 times the FLOPS, and "no more cost" at most 1.05 times.

    Args:
        before: the metric of the original by query, (queries,).
        after: of the adapted model.
        flops: of the original and the adapted model.
    """
    found = paired_t(before, after)
    said, fine = verdict(*found), is_not_worse(before, after)
    if said is Verdict.NONE and fine and flops[1] <= _CHEAPER * flops[0]:
        return Decision(CHEAPER_AND_NOT_WORSE, True, len(before), *found, fine, flops)
    keep = said is Verdict.BETTER and flops[1] <= _COSTLIER * flops[0]
    return Decision(said.value, keep, len(before), *found, fine, flops)


def is_not_worse(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether the mean loss is less than 2 % of the original's mean: the low end of the 95 % interval lies above that.

    The interval is Student's t with one query more, which loses all that the original has on the average. Without it, queries of
    which none or few changed would have a narrow interval, although others like them may lose everything. Where none changes,
    the bound is about the rule of three (Hanley and Lippman-Hand, JAMA 249, 1983), 3 / n, so that 150 queries are needed.
    """
    usual = float(before.mean())
    interval = paired_t(np.append(before, usual), np.append(after, 0.0)).interval
    return interval is not None and interval[0] > -MARGIN * usual


def halves(collection: Collection, kinds: Mapping[str, str]) -> tuple[Collection, Collection]:
    """The collection with the deciding half of the queries and with the reporting half, by the hash of their ids.

    Every second query of a kind reports; ``kinds``, by query id, may be empty.

    Raises:
        DataError: there is only one query.
    """
    if len(collection.queries) < 2:
        raise DataError(f"{collection.name}: one query cannot both decide and report; name a collection with more in `judged`")
    ordered = sorted(collection.queries, key=lambda id_: (kinds.get(id_, ""), stable_hash(id_), id_))
    deciding, reporting = (
        replace(
            collection,
            queries={id_: text for id_, text in collection.queries.items() if id_ in half},
            qrels={id_: grades for id_, grades in collection.qrels.items() if id_ in half},
        )
        for half in (set(ordered[::2]), set(ordered[1::2]))
    )
    return deciding, reporting


def held_out(
    rows: Iterable[Mapping[str, str]], documents: Mapping[str, Document], held: set[str]
) -> tuple[Collection, dict[str, str]]:
    """A collection of one made query for each held-out document, and the kinds of the queries by their ids.

    One query each, since several of a document would not be independent. A document gives, of the kinds of pairs that it has, the
    one that is rarest so far. In the collection it lacks the part that its query was made from.

    Args:
        rows: of ``make_pairs``.
        documents: all of the corpus, by id.
        held: ids of the held-out documents.
    """
    found: dict[str, dict[str, Mapping[str, str]]] = {}  # a row by document and kind
    for row in rows:
        if row["document_id"] in held:
            found.setdefault(row["document_id"], {}).setdefault(row["kind"], row)
    counts: Counter[str] = Counter()
    chosen: dict[str, Mapping[str, str]] = {}
    for id_ in sorted(found, key=lambda id_: (len(found[id_]), stable_hash(id_), id_)):  # those without a choice first
        kind = min(found[id_], key=lambda kind: (counts[kind], PAIR_KINDS.index(kind)))
        counts[kind] += 1
        chosen[f"{kind} of {id_}"] = found[id_][kind]
    listed = ", ".join(f"{counts[kind]} {kind}" for kind in PAIR_KINDS if counts[kind])
    collection = Collection(
        f"{len(chosen)} held-out pairs ({listed})",
        with_changes(documents, {row["document_id"]: Document("", row["positive"]) for row in chosen.values()}),
        {id_: row["query"] for id_, row in chosen.items()},
        {id_: {row["document_id"]: 1} for id_, row in chosen.items()},
    )
    return collection, {id_: row["kind"] for id_, row in chosen.items()}


def by_kind(evaluations: Sequence[Evaluation], kinds: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Number of queries and mean metric, before and after, of each kind of query."""
    before, after = (evaluation.per_query[METRIC] for evaluation in evaluations)
    ids = {kind: [id_ for id_ in before if kinds.get(id_) == kind] for kind in dict.fromkeys(kinds.values())}
    return {
        kind: {"queries": len(of), "before": mean(before[id_] for id_ in of), "after": mean(after[id_] for id_ in of)}
        for kind, of in sorted(ids.items())
        if of
    }


def reason(decision: Decision, reported: Comparison, evaluations: Sequence[Evaluation]) -> str:
    """The verdict in one sentence, with the numbers of the queries that decided and of those that report."""
    before, after = evaluations
    costs = " but more expensive" if decision.verdict == Verdict.BETTER and not decision.keep else ""
    decided = f"decided on {decision.queries} queries ({size_of(decision.difference, decision.interval, decision.p)})"
    return (
        f"{decision.verdict}{costs}, {decided}; on the other {before.queries}, which decided nothing: {METRIC} "
        f"{before.metrics[METRIC]:.3f} → {after.metrics[METRIC]:.3f} "
        f"({size_of(reported.difference, reported.interval, reported.p)}: {reported.verdict}), "
        f"FLOPS {before.flops:.2f} → {after.flops:.2f}"
    )


def size_of(difference: float, interval: tuple[float, float] | None, p: float) -> str:
    """A tested difference in words."""
    ends = "" if interval is None else f", 95 % {interval[0]:+.3f} to {interval[1]:+.3f}"
    return f"{difference:+.3f}{ends}, p {p:.2g}"
