"""Compare evaluations: the difference in each metric, how certain it is, and the queries that made it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

import numpy as np

from anysplade._common.arguments import require
from anysplade._common.tables import Tabular
from anysplade.data.collections import Collection
from anysplade.data.stored_corpus import position_of
from anysplade.errors import DataError, OptionError
from anysplade.evaluation.evaluations import Evaluation
from anysplade.evaluation.measures import measure, parse_metrics
from anysplade.evaluation.runs import Run, require_match
from anysplade.evaluation.significance import TIE, Verdict, bootstrap_interval, holm, paired_p, verdict
from anysplade.search.hits import explain_score, join_matches

_CHANGED = 5  # number of queries shown per comparison
_TERMS = 5  # number of terms shown per query
_TEXT = 200  # characters of a document that are shown


@dataclass(frozen=True, repr=False)
class Comparison(Tabular):
    """A model compared with the first model, in one metric and on the same queries."""

    model: str  # the compared model
    baseline: str  # the first model
    collection: str  # its name
    metric: str  # a name of ir-measures
    difference: float  # of the means, model minus baseline
    interval: tuple[float, float] | None  # 95 %, bootstrap over queries; None if all differences are the same
    p: float  # paired t-test, two-sided; see ``paired_p``
    p_corrected: float | None  # by Holm, over all comparisons in the primary (first) metric; None for other, exploratory metrics
    wins: int  # number of queries for which the model is better
    ties: int  # equal
    losses: int  # worse
    changed: list[dict[str, Any]]  # the queries that changed most

    @property
    def verdict(self) -> Verdict:
        """Better, worse or no difference shown; only the primary metric, whose p is corrected, can show one."""
        return Verdict.NONE if self.p_corrected is None else verdict(self.difference, self.interval, self.p_corrected)

    @property
    def is_shown(self) -> bool:
        """Whether the verdict is better or worse: the corrected p is below 0.05, and the interval is without 0."""
        return self.verdict is not Verdict.NONE

    def _rows(self) -> list[dict[str, Any]]:
        low, high = self.interval or (None, None)
        values = {name: value for name, value in vars(self).items() if name not in ("interval", "changed")}
        return [values | {"95 % from": low, "95 % to": high}]


def compare(evaluations: Sequence[Evaluation], collections: Mapping[str, Collection] | None = None) -> list[Comparison]:
    """Compare every evaluation with the first one of its collection, in each metric.

    The first metric of an evaluation is the primary one: its comparisons of all models on all collections are corrected together
    (Holm). The other metrics are exploratory: their p is not corrected.

    Args:
        evaluations: what ``evaluate`` returned.
        collections: by name. With them, the queries that changed most have their texts and, for sparse models, the terms that
            made most of the score of a relevant document.

    Raises:
        OptionError: ``evaluations`` is not a list of evaluations, or no two are of the same collection.
        DataError: two evaluations of a collection have different queries or metrics, are of different collections with the same
            name, or their runs have no query in common.
    """
    require("evaluations", evaluations, (list, tuple), "give a list: [first, second]")
    for evaluation in evaluations:
        require("evaluations", evaluation, Evaluation, "give a list of what evaluate returned")
    require("collections", collections, (Mapping, NoneType), "give collections by name: {collection.name: collection}")
    if len({evaluation.collection for evaluation in evaluations}) == len(evaluations):
        raise OptionError("`evaluations`: no two are of the same collection; give two models evaluated on one collection")
    return compare_each(evaluations, collections)


def compare_each(evaluations: Sequence[Evaluation], collections: Mapping[str, Collection] | None = None) -> list[Comparison]:
    """``compare`` of checked arguments; empty if no two evaluations are of the same collection."""
    made: list[tuple[int | None, Comparison]] = []  # with the number of the evaluation if the metric is its primary one
    for i, other in enumerate(evaluations):
        base = next(first for first in evaluations if first.collection == other.collection)
        if base is other:
            continue
        both = f"{other.model} and {base.model}"
        known = {parsed: base.per_query[name] for name, parsed in parse_metrics(list(base.metrics)).items()}
        measures = parse_metrics(list(other.metrics))
        for metric, parsed in measures.items():
            if parsed not in known:
                raise DataError(f"{base.model}: evaluated without {metric}; give it the `metrics` of {other.model}")
            if known[parsed].keys() != other.per_query[metric].keys():
                raise DataError(f"{both}: evaluated on different queries of {other.collection}")
        if base.data_hash != other.data_hash:
            raise DataError(
                f"{both}: evaluated on different collections that are both called {other.collection}; "
                "load each with load_collection and give it a name of its own with dataclasses.replace"
            )
        ids, others = base.run.keys(), other.run.keys()
        require_match(both, "queries are in both runs", ids | others, ids & others)
        collection = (collections or {}).get(other.collection)
        first, *_ = measures.values()  # the primary one, which may have a second name
        for metric, parsed in measures.items():
            compared = _compare(base, other, metric, parsed, known[parsed], collection)
            made.append((i if parsed == first else None, compared))
    p_values = {i: compared.p for i, compared in made if i is not None}
    corrected: dict[int | None, float] = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return [replace(compared, p_corrected=corrected.get(i)) for i, compared in made]


def _compare(
    base: Evaluation, other: Evaluation, metric: str, parsed: Any, base_values: dict[str, float], collection: Collection | None
) -> Comparison:
    """Compare two evaluations in one metric, without the corrected p; ``base_values`` are those of ``base`` by query id."""
    ids = list(base_values)
    before = np.array([base_values[id_] for id_ in ids])
    after = np.array([other.per_query[metric][id_] for id_ in ids])
    difference = after - before
    changed = [
        {"query_id": ids[i], "before": before[i].item(), "after": after[i].item()}
        | ({} if collection is None else _explain(ids[i], parsed, after[i] > before[i], base, other, collection))
        for i in np.argsort(-np.abs(difference), kind="stable")[:_CHANGED]
        if abs(difference[i]) > TIE
    ]
    return Comparison(
        model=other.model,
        baseline=base.model,
        collection=other.collection,
        metric=metric,
        difference=float(difference.mean()),
        interval=bootstrap_interval(difference),
        p=paired_p(before, after),
        p_corrected=None,
        wins=int((difference > TIE).sum()),
        ties=int((np.abs(difference) <= TIE).sum()),
        losses=int((difference < -TIE).sum()),
        changed=changed,
    )


def _explain(query_id: str, parsed: Any, rose: bool, base: Evaluation, other: Evaluation, collection: Collection) -> dict[str, Any]:
    """The query, the document that changed its value most, and the rank and terms of that document in both evaluations."""
    explanation: dict[str, Any] = {"query": collection.queries[query_id]}
    grades = collection.qrels[query_id]
    judged = sorted((id_ for id_ in grades if id_ in collection.corpus), key=lambda id_: -grades[id_])
    if not judged:
        return explanation
    relevant = [id_ for id_ in judged if grades[id_] > 0] or judged[:1]
    before, after = (list(evaluation.run.get(query_id, {})) for evaluation in (base, other))
    document = _decisive(relevant, parsed, rose, grades, before, after)
    explanation |= {"document_id": document, "document": collection.corpus[document].full_text[:_TEXT]}
    for name, evaluation, ranking in (("before", base, before), ("after", other, after)):
        explanation[f"rank_{name}"] = ranking.index(document) + 1 if document in ranking else None
        if evaluation.vectors is not None and evaluation.terms is not None:
            explanation[f"terms_{name}"] = _main_terms(evaluation, collection, query_id, document)
    return explanation


def _decisive(
    ids: Sequence[str], parsed: Any, rose: bool, grades: dict[str, int], before: Sequence[str], after: Sequence[str]
) -> str:
    """The document that explains most of a query's change.

    Each of the candidate ``ids`` is moved alone from its old rank to its new one in the old ranking, and back in the new ranking.
    The two changes of the metric are added; the first one wins ties.
    """
    cutoff = parsed.params.get("cutoff")
    rankings = [ranking if cutoff is None else ranking[: cutoff + 1] for ranking in (before, after)]  # deeper ranks do not count
    moved: Run = {}
    for name, ranking, target in (("there", *rankings), ("back", *rankings[::-1])):
        rank = {id_: i for i, id_ in enumerate(target)}
        for id_ in ids:
            others = [other for other in ranking if other != id_]
            if id_ in rank:
                others.insert(rank[id_], id_)
            moved[f"{name} {id_}"] = dict.fromkeys(others, 0.0)
    values = measure({"": parsed}, dict.fromkeys(moved, grades), moved)[1][""]
    sign = 1 if rose else -1
    return max(ids, key=lambda id_: sign * (values[f"there {id_}"] - values[f"back {id_}"]))


def _main_terms(evaluation: Evaluation, collection: Collection, query_id: str, document_id: str) -> dict[str, float]:
    """The words that contribute most to a document's score, with their products; pieces of a word of the query are joined."""
    assert evaluation.vectors is not None
    assert evaluation.terms is not None
    query = evaluation.vectors[0][list(collection.queries).index(query_id)]
    place = position_of(collection.corpus, document_id)
    if evaluation.starts is None:
        document = evaluation.vectors[1][place]
    else:  # its best passage
        passages = evaluation.vectors[1][slice(*evaluation.starts[place : place + 2])]
        document = passages[int((passages @ query.T).toarray().argmax())]
    matches = explain_score(evaluation.terms, query, document.indices, document.data)
    found: dict[str, float] = {}
    for match in join_matches(matches, (evaluation.words or {}).get(query_id, {})):
        found[match.word] = found.get(match.word, 0.0) + match.product  # a word can have the name of another term
    best = sorted(found, key=lambda word: -found[word])[:_TERMS]
    return {word: round(found[word], 3) for word in best}
