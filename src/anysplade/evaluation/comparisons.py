"""Several models on several collections, and how sure a difference is: paired tests, intervals, the queries that made it."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats
from sentence_transformers import SparseEncoder

from anysplade._common.arguments import require
from anysplade._common.files import user_path, write_atomic
from anysplade._common.tables import Tabular
from anysplade.data.collections import Collection, collection_names, load_collection
from anysplade.data.names import PYTHON_DOCS
from anysplade.errors import DataError, OptionError
from anysplade.evaluation.evaluations import Evaluation, curve, evaluate
from anysplade.evaluation.measures import METRICS, measure, parse_metrics
from anysplade.evaluation.runs import Run, as_name, require_match
from anysplade.model.options import Precision, Runtime

if TYPE_CHECKING:
    from pandas import DataFrame

SURE = 0.05  # p, corrected, below which a difference counts
_RESAMPLES = 2000
_CHANGED = 5  # queries shown
_TERMS = 5  # of each
_SAME = 1e-9


@dataclass(frozen=True, repr=False)
class Comparison(Tabular):
    """One metric of a model against that of the first one, on the same queries."""

    model: str  # the one compared
    baseline: str  # the first model
    collection: str  # its name
    metric: str  # a name of ir-measures
    difference: float  # of the means, model minus baseline
    interval: tuple[float, float] | None  # 95 %, bootstrap over queries; None of differences that are all the same
    p: float  # paired t-test, two-sided; see ``paired_p``
    p_corrected: float | None  # of the primary metric, the first one: Holm over its comparisons; None of the others, exploratory
    wins: int  # queries on which the model is better
    ties: int  # equal
    losses: int  # worse
    changed: list[dict[str, Any]]  # the queries that changed most

    @property
    def is_shown(self) -> bool:
        """Whether a difference shows in the primary metric: its corrected p is below 0.05. In others none is tested."""
        return self.p_corrected is not None and self.p_corrected < SURE

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _rows(self) -> list[dict[str, Any]]:
        """All but the queries."""
        low, high = self.interval or (None, None)
        values = {name: value for name, value in vars(self).items() if name not in ("interval", "changed")}
        return [values | {"95 % from": low, "95 % to": high}]


@dataclass(frozen=True, repr=False)
class Evaluations(Tabular):
    """The results of ``evaluate_all``."""

    evaluations: list[Evaluation]  # collections in order, and within each the models
    comparisons: list[Comparison]  # each model against the first
    means: list[dict[str, Any]]  # over the sparse models, as seeds of one; over the collections of a model
    curves: list[dict[str, Any]]  # effectiveness against cost by pruning, for each sparse model and collection

    def to_dict(self) -> dict[str, Any]:
        """One evaluation by itself, or lists of all there is."""
        rows = [evaluation.to_dict() for evaluation in self.evaluations]
        if len(rows) == 1:
            return rows[0] | ({"curve": self.curves[0]["points"]} if self.curves else {})
        compared = [comparison.to_dict() for comparison in self.comparisons]
        return {"evaluations": rows, "comparisons": compared, "means": self.means, "curves": self.curves}

    def _rows(self) -> list[dict[str, Any]]:
        """One for each evaluation, then the means."""
        return [*(row for evaluation in self.evaluations for row in evaluation._rows()), *self.means]

    def _shown(self) -> "list[DataFrame]":
        """The comparisons too."""
        import pandas

        return [self.to_pandas(), pandas.DataFrame([row for comparison in self.comparisons for row in comparison._rows()])]


def evaluate_all(
    models: str | Path | SparseEncoder | Sequence[str | Path | SparseEncoder],
    collections: str | Path | Collection | Sequence[str | Path | Collection],
    metrics: str | Sequence[str] = METRICS,
    *,
    split: str = "test",
    seeds: bool = False,
    curves: bool = False,
    runtime: Runtime = "auto",
    precision: Precision = "float32",
    max_length: int | None = None,
    output: str | Path | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Evaluations:
    """Every model on every collection; the first model is the one that the others are compared with.

    Args:
        models: a list, or one alone, of what ``evaluate`` takes as a model.
        collections: a list, or one alone, of collections, or of what ``load_collection`` takes. ``"nanobeir"`` stands for
            thirteen.
        metrics: names of ir-measures, a list or one alone; the first is the primary one, whose comparisons are corrected together.
        seeds: the sparse models are one model trained with several seeds: their mean and standard deviation.
        curves: effectiveness against cost by pruning; see ``curve``.
        output: a folder; with several evaluations one for each in it.

    ``split``, ``runtime``, ``precision``, ``max_length`` and ``cache`` are as in ``evaluate``. A collection named twice is
    evaluated once. Collections of the same name are told apart by as much of their paths as it takes.

    Raises:
        OptionError: no model or no collection.
        AnyspladeError: as ``evaluate`` does.
    """
    models, collections, metrics = _listed(models), _listed(collections), _listed(metrics)
    if not models or not collections:
        raise OptionError("name at least one model and one collection")
    parse_metrics(metrics)  # a wrong one is an error before the collections are read
    loaded = _load(collections, split, progress)
    single = len(models) * len(loaded) == 1
    folder = None if output is None else user_path(output)
    places = [as_name(collection.name) for collection in loaded]
    if len({place.lower() for place in places}) < len(places):
        places = [f"{i}-{place}" for i, place in enumerate(places, 1)]
    evaluations, drawn = [], []
    for within, collection in zip(places, loaded, strict=True):
        for i, model in enumerate(models, 1):
            place = (
                folder
                if folder is None or single
                else folder / within / f"{i}-{as_name(str(model) if isinstance(model, str | Path) else type(model).__name__)}"
            )
            options: Any = {
                "output": place,
                "runtime": runtime,
                "precision": precision,
                "max_length": max_length,
                "cache": cache,
                "progress": progress,
            }
            found = evaluate(model, collection, metrics, **options)
            if curves and found.vectors is not None:
                points = curve(found, collection)
                drawn.append({"model": found.model, "collection": found.collection, "points": points})
            evaluations.append(found)
    comparisons = compare(evaluations, {collection.name: collection for collection in loaded})
    means = _over_seeds(evaluations, metrics) if seeds else []
    if len(loaded) > 1:
        means += [_over_collections(evaluations[i :: len(models)], metrics) for i in range(len(models))]
    result = Evaluations(evaluations, comparisons, means, drawn)
    if folder is not None and (not single or curves):
        write_atomic(folder / "evaluations.json", json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def _listed(given: Any) -> list[Any]:
    """A list of what is given, which may be one alone."""
    return list(given) if isinstance(given, list | tuple) else [given]


def _load(sources: Sequence[str | Path | Collection], split: str, progress: bool) -> list[Collection]:
    """Every collection once, under a name that no other has."""
    found: dict[Path | str | int, str | Path | Collection] = {}  # what was asked for, by its path, id or identity
    for source in sources:
        for one in collection_names(source) if isinstance(source, str) else [source]:
            if isinstance(one, Collection):
                found.setdefault(id(one), one)
                continue
            require("collections", one, (str, Path), "give names, paths or what load_collection returned")
            path = user_path(one)
            found.setdefault(path.resolve() if path.exists() and one != PYTHON_DOCS else str(one), one)
    loaded = [one if isinstance(one, Collection) else load_collection(one, split, progress=progress) for one in found.values()]
    names = distinct_names([collection.name for collection in loaded], [at if isinstance(at, Path) else None for at in found])
    return [replace(collection, name=name) for collection, name in zip(loaded, names, strict=True)]


def distinct_names(names: Sequence[str], paths: Sequence[Path | None]) -> list[str]:
    """The names, those that occur twice replaced by the shortest tail of their path that tells them apart.

    Args:
        paths: where each is, no two the same; None if the name is one of its own, such as an id.
    """
    made = list(names)
    for length in range(1, max((len(path.parts) for path in paths if path is not None), default=0) + 1):
        count = Counter(made)
        made = [
            name if path is None or count[name] == 1 else "/".join(path.parts[-length:])
            for name, path in zip(made, paths, strict=True)
        ]
    return made


_COSTS = ("query_active_dims", "document_active_dims", "flops")


def _over_seeds(evaluations: Sequence[Evaluation], metrics: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys(evaluation.collection for evaluation in evaluations):
        of = [e.to_dict() for e in evaluations if e.collection == name and e.vectors is not None]
        if len(of) > 1:
            row: dict[str, Any] = {"model": f"mean of {len(of)}", "collection": name}
            for key in (*metrics, *_COSTS):
                row[key] = float(np.mean([each[key] for each in of]))
                row[f"{key} sd"] = float(np.std([each[key] for each in of], ddof=1))
            rows.append(row)
    return rows


def _over_collections(evaluations: Sequence[Evaluation], metrics: Sequence[str]) -> dict[str, Any]:
    """Of one model's evaluations."""
    of = [evaluation.to_dict() for evaluation in evaluations]
    row: dict[str, Any] = {"model": of[0]["model"], "collection": f"mean of {len(of)}"}
    row |= {key: float(np.mean([each[key] for each in of])) for key in metrics}
    return row | {key: None if of[0][key] is None else float(np.mean([each[key] for each in of])) for key in _COSTS}


def compare(evaluations: Sequence[Evaluation], collections: dict[str, Collection] | None = None) -> list[Comparison]:
    """Every evaluation against the first one of its collection, each metric.

    The first metric of an evaluation is the primary one: its comparisons, of all models on all collections, are corrected
    together (Holm). The others are exploratory: their p is not corrected.

    Args:
        collections: by name; with them the queries that changed most come with their texts and, for two
            sparse models, with the terms that made the score of a relevant document.

    Raises:
        OptionError: no list of evaluations.
        DataError: two evaluations of a collection are of different queries or metrics, of different collections of one name,
            or of runs without a query in common.
    """
    require("evaluations", evaluations, (list, tuple), "give a list: [first, second]")
    for evaluation in evaluations:
        require("evaluations", evaluation, Evaluation, "give a list of what evaluate returned")
    made: list[Comparison] = []
    primary: list[int | None] = []  # the evaluation, of each one made in its first measure, which may have two names
    for i, other in enumerate(evaluations):
        base = next(first for first in evaluations if first.collection == other.collection)
        if base is other or any(base is evaluations[j] for j in range(i, len(evaluations))):
            continue
        known = {one: base.per_query[name] for name, one in parse_metrics(list(base.metrics)).items()}
        measures = parse_metrics(list(other.metrics))
        for metric, one in measures.items():
            if one not in known:
                raise DataError(f"{base.model}: evaluated without {metric}; give it the `metrics` of {other.model}")
            if known[one].keys() != other.per_query[metric].keys():
                raise DataError(f"{other.model} and {base.model}: evaluated on different queries of {other.collection}")
        if base.data_hash != other.data_hash:
            raise DataError(
                f"{other.model} and {base.model}: evaluated on different collections that are both called {other.collection}; "
                "load each with load_collection and give it a name of its own with dataclasses.replace"
            )
        either, both = base.run.keys() | other.run.keys(), base.run.keys() & other.run.keys()
        require_match(f"{other.model} and {base.model}", "query", "queries of either are in both", "in common", either, both)
        for metric, one in measures.items():
            made.append(_compare(base, other, metric, one, known[one], (collections or {}).get(other.collection)))
            primary.append(i if one == next(iter(measures.values())) else None)
    p_values = {i: comparison.p for i, comparison in zip(primary, made, strict=True) if i is not None}
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return [
        comparison if i is None else replace(comparison, p_corrected=corrected[i])
        for i, comparison in zip(primary, made, strict=True)
    ]


def _compare(
    base: Evaluation, other: Evaluation, metric: str, one: Any, of_base: dict[str, float], collection: Collection | None
) -> Comparison:
    """
    Args:
        metric, one: the measure and its name in ``other``.
        of_base: the values of the measure in ``base``, by query id.
    """
    ids = list(of_base)
    before = np.array([of_base[id_] for id_ in ids])
    after = np.array([other.per_query[metric][id_] for id_ in ids])
    difference = after - before
    p = paired_p(before, after)
    order = np.argsort(-np.abs(difference), kind="stable")[:_CHANGED]
    changed = [
        {"query_id": ids[i], "before": before[i].item(), "after": after[i].item()}
        | ({} if collection is None else _why(ids[i], one, after[i] > before[i], base, other, collection))
        for i in order
        if abs(difference[i]) > _SAME
    ]
    return Comparison(
        model=other.model,
        baseline=base.model,
        collection=other.collection,
        metric=metric,
        difference=float(difference.mean()),
        interval=interval(difference),
        p=p,
        p_corrected=None,
        wins=int((difference > _SAME).sum()),
        ties=int((np.abs(difference) <= _SAME).sum()),
        losses=int((difference < -_SAME).sum()),
        changed=changed,
    )


def paired_p(before: np.ndarray, after: np.ndarray) -> float:
    """Of a paired t-test over queries, two-sided.

    Differences that are all the same have no deviation, which that test needs. Their p is that of a sign-flip test: how often
    so many coins show one side, 2 / 2^n, which is 1 of a single query. Without any difference it is 1.
    """
    difference = after - before
    if np.abs(difference).max(initial=0.0) < _SAME:
        return 1.0
    p = 2.0 ** (1 - len(difference)) if np.ptp(difference) < _SAME else float(stats.ttest_rel(after, before).pvalue)
    return max(p, float(np.finfo(float).tiny))  # smaller ones are rounded to 0, which no test gives


def interval(values: np.ndarray) -> tuple[float, float] | None:
    """95 % bootstrap interval of the mean (percentiles, 2,000 resamples, seed 0).

    None of values that are all the same, as a single one is: they do not tell how far they spread. (0, 0) if all are 0.
    """
    if np.ptp(values) < _SAME:
        return None if np.abs(values).max() > _SAME else (0.0, 0.0)
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(0), batch=100
    ).confidence_interval
    return float(found.low), float(found.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p of rank i of m times (m - i), never falling. NaN stays NaN and is none of the m."""
    corrected = [math.nan] * len(p_values)
    ranked = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    highest = 0.0
    for rank, i in enumerate(ranked):
        highest = max(highest, min(1.0, p_values[i] * (len(ranked) - rank)))
        corrected[i] = highest
    return corrected


def _why(query_id: str, one: Any, rose: bool, base: Evaluation, other: Evaluation, collection: Collection) -> dict[str, Any]:
    """The query, the document that changed its value most, and the document's rank and terms under both."""
    shown: dict[str, Any] = {"query": collection.queries[query_id]}
    grades = collection.qrels[query_id]
    judged = sorted((id_ for id_ in grades if id_ in collection.corpus), key=lambda id_: -grades[id_])
    if not judged:
        return shown
    relevant = [id_ for id_ in judged if grades[id_] > 0] or judged[:1]
    document = _decisive(relevant, one, rose, grades, *(list(e.run.get(query_id, {})) for e in (base, other)))
    shown |= {"document_id": document, "document": collection.corpus[document].full_text[:200]}
    for name, evaluation in (("before", base), ("after", other)):
        ranking = list(evaluation.run.get(query_id, {}))
        shown[f"rank_{name}"] = ranking.index(document) + 1 if document in ranking else None
        if evaluation.vectors is not None and evaluation.terms is not None:
            shown[f"terms_{name}"] = _products(evaluation, collection, query_id, document)
    return shown


def _decisive(ids: Sequence[str], one: Any, rose: bool, grades: dict[str, int], before: Sequence[str], after: Sequence[str]) -> str:
    """The document whose move alone, there and back, changes the measure most in the direction in which it changed.

    Args:
        ids: of the documents to choose from; the first one wins ties.
        one: the measure.
        before, after: ids of the query's documents in their order.
    """
    seen = slice(None if one.params.get("cutoff") is None else one.params["cutoff"] + 1)  # what lies deeper counts for nothing
    rankings = [before[seen], after[seen]]
    moved: Run = {}
    for name, (ranking, target) in zip(("there", "back"), (rankings, rankings[::-1]), strict=True):
        rank = {id_: i for i, id_ in enumerate(target)}
        for id_ in ids:
            others = [other for other in ranking if other != id_]
            at = rank.get(id_)
            moved[f"{name} {id_}"] = dict.fromkeys(others if at is None else [*others[:at], id_, *others[at:]], 0.0)
    values = measure({"": one}, dict.fromkeys(moved, grades), moved)[1][""]
    return max(ids, key=lambda id_: (values[f"there {id_}"] - values[f"back {id_}"]) * (1 if rose else -1))


def _products(evaluation: Evaluation, collection: Collection, query_id: str, document_id: str) -> dict[str, float]:
    """The terms that make most of a document's score."""
    assert evaluation.vectors is not None
    assert evaluation.terms is not None
    query = evaluation.vectors[0][list(collection.queries).index(query_id)]
    document = evaluation.vectors[1][list(collection.corpus).index(document_id)]
    products = query.multiply(document).tocoo()
    best = np.argsort(-products.data, kind="stable")[:_TERMS]
    return {evaluation.terms[products.col[i]]: round(float(products.data[i]), 3) for i in best}
