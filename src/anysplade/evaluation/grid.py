"""Evaluate several models on several collections."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sentence_transformers import SparseEncoder

from anysplade._common.arguments import require
from anysplade._common.files import user_path
from anysplade._common.outputs import write_record
from anysplade._common.tables import Tabular
from anysplade.data.collections import Collection, collection_names, load_collection
from anysplade.data.names import PYTHON_DOCS
from anysplade.errors import OptionError
from anysplade.evaluation.comparisons import Comparison, compare_each
from anysplade.evaluation.deployed import model_of
from anysplade.evaluation.evaluations import Evaluation, curve, evaluate, write_evaluation
from anysplade.evaluation.fusion import evaluate_fused, evaluate_lexical, evaluate_reranked
from anysplade.evaluation.measures import METRICS, parse_metrics
from anysplade.evaluation.runs import as_name
from anysplade.evaluation.seeds import SeedComparison, compare_seeds, seed_groups
from anysplade.model.options import Precision, Runtime, checked_option, checked_passages
from anysplade.search.fusion import Fusion
from anysplade.search.hits import check_count
from anysplade.search.languages import language_name
from anysplade.search.lexical import check_weight
from anysplade.search.reranking import open_reranker

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, repr=False)
class Evaluations(Tabular):
    """The results of ``evaluate_all``."""

    evaluations: list[Evaluation]  # by collection, then by model, in the given order
    comparisons: list[Comparison]  # each model against the first one
    means: list[dict[str, Any]]  # over the sparse models as seeds of one model; over the collections per model
    curves: list[dict[str, Any]]  # effectiveness against cost by pruning, for each sparse model and collection
    seed_comparisons: list[SeedComparison] = field(default_factory=list)  # the mean of the seeds against the first model

    def to_dict(self) -> dict[str, Any]:
        """A single evaluation as it is; otherwise a list for each field."""
        rows = [evaluation.to_dict() for evaluation in self.evaluations]
        if len(rows) == 1:
            return rows[0] | ({"curve": self.curves[0]["points"]} if self.curves else {})
        compared = [comparison.to_dict() for comparison in self.comparisons]
        over_seeds = [comparison.to_dict() for comparison in self.seed_comparisons]
        result = {"evaluations": rows, "comparisons": compared, "means": self.means, "curves": self.curves}
        return result | {"seed_comparisons": over_seeds}

    def _rows(self) -> list[dict[str, Any]]:
        return [*(row for evaluation in self.evaluations for row in evaluation._rows()), *self.means]

    def _shown(self) -> "list[DataFrame]":
        import pandas

        return [self.to_pandas(), pandas.DataFrame([row for comparison in self.comparisons for row in comparison._rows()])]


def evaluate_all(
    models: str | Path | SparseEncoder | Sequence[str | Path | SparseEncoder],
    collections: str | Path | Collection | Sequence[str | Path | Collection],
    metrics: str | Sequence[str] = METRICS,
    *,
    index: str | Path | None = None,
    split: str = "test",
    seeds: bool = False,
    curves: bool = False,
    lexical: float | None = None,
    fuse: Fusion | None = None,
    rerank: str | None = None,
    rerank_depth: int = 100,
    runtime: Runtime = "auto",
    precision: Precision = "float32",
    max_length: int | None = None,
    passages: str | None = None,
    batch_tokens: int | None = None,
    language: str = "auto",
    output: str | Path | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Evaluations:
    """Evaluate every model on every collection and compare each model with the first one.

    Args:
        models: a list of what ``evaluate`` takes as a model, or a single one.
        collections: a list of collections or of what ``load_collection`` takes, or a single one. ``"nanobeir"`` stands for 13
            collections.
        metrics: names of ir-measures, a list or a single one. The first is the primary one: its comparisons are corrected
            together.
        index: folder of an index to evaluate as it is, with its precision, its pruning and its engine, against its exact model:
            both come before the other models, so that the difference is tested. Neither is a seed, and only the index is fused.
        seeds: the sparse models are one model trained with several seeds; their means and standard deviations are added,
            and, if the first model is none of them, a test of their mean against it over seeds and queries together. With
            ``lexical``, the models with BM25 added are such a group too.
        curves: add effectiveness against cost by pruning; see ``curve``.
        lexical: add each sparse model with BM25 added to its scores, times this weight, as in an index with ``lexical``; see
            ``evaluate_lexical``.
        fuse: add the fusion of the models' runs on each collection: "rrf", reciprocal rank fusion, or "wsum", the mean of the
            scores, each ranking's scaled to [0, 1]; see ``evaluate_fused``.
        rerank: a cross-encoder's folder or hub id; adds each model, and their fusion, re-ranked by it; see ``evaluate_reranked``.
        rerank_depth: documents per query that the cross-encoder reads, the first ones.
        output: a folder; several evaluations each get a subfolder.

    ``split``, ``runtime``, ``precision``, ``max_length``, ``passages``, ``batch_tokens``, ``language`` and ``cache`` are as in
    ``evaluate``. A collection named twice is evaluated once. Collections of the same name are told apart by the shortest part of
    their paths that differs.

    Raises:
        OptionError: there is no model or no collection, or a single model to fuse.
        AnyspladeError: as in ``evaluate``.
    """
    models, collections, metrics = _as_list(models), _as_list(collections), _as_list(metrics)
    lengths = [max_length] * len(models)
    deployed = int(index is not None)  # 1: the models begin with the exact one of an index, and then the index
    if index is not None:
        exact, length = model_of(index)
        models, lengths = [exact, index, *models], [length if max_length is None else max_length, max_length, *lengths]
    if not models or not collections:
        raise OptionError("name at least one model and one collection")
    parse_metrics(metrics)  # fail before the collections are read
    language_name(language)
    lexical = check_weight(lexical)
    if checked_passages(passages) is not None and lexical is not None:
        raise OptionError("`lexical` adds BM25's scores of whole documents; leave out `passages`, or give `fuse` and bm25")
    fuse, depth = checked_option("fuse", fuse, Fusion | None), check_count("rerank_depth", rerank_depth)
    if fuse is not None and len(models) - deployed < 2:
        raise OptionError("`fuse` needs two models or more; name another one, such as bm25")
    reranker = None if rerank is None else open_reranker(rerank, max_length)
    loaded = _load(collections, split, progress)
    single = len(models) * len(loaded) == 1 and rerank is None and lexical is None
    folder = None if output is None else user_path(output)
    places = [as_name(collection.name) for collection in loaded]
    if len({place.lower() for place in places}) < len(places):
        places = [f"{i}-{place}" for i, place in enumerate(places, 1)]
    evaluations, drawn = [], []
    named: list[Evaluation] = []  # without an index and its exact model
    for place, collection in zip(places, loaded, strict=True):
        for i, (model, length) in enumerate(zip(models, lengths, strict=True), 1):
            name = as_name(str(model) if isinstance(model, str | Path) else type(model).__name__)
            evaluation = evaluate(
                model,
                collection,
                metrics,
                output=folder if folder is None or single else folder / place / f"{i}-{name}",
                runtime=runtime,
                precision=precision,
                max_length=length,
                passages=passages,
                batch_tokens=batch_tokens,
                language=language,
                cache=cache,
                progress=progress,
            )
            if curves and evaluation.vectors is not None:
                points = curve(evaluation, collection)
                drawn.append({"model": evaluation.model, "collection": evaluation.collection, "points": points})
            evaluations.append(evaluation)
        rows = evaluations[-len(models) :]
        parts = list(rows)
        if lexical is not None:
            rows += [evaluate_lexical(row, collection, lexical, language) for row in parts if row.vectors is not None]
        named += [*parts[2 * deployed :], *rows[len(models) + deployed :]]
        if fuse is not None:
            rows.append(evaluate_fused(parts[deployed:], collection, fuse))
        if rerank is not None and reranker is not None:
            rows += [evaluate_reranked(row, collection, reranker, rerank, depth, progress) for row in rows]
        for i, made in enumerate(rows[len(models) :], len(models) + 1):
            if folder is not None:
                write_evaluation(folder / place / f"{i}-{as_name(made.model)}", made)
            evaluations.append(made)
    comparisons = compare_each(evaluations, {collection.name: collection for collection in loaded})
    means = _over_seeds(named) if seeds else []
    if len(loaded) > 1:
        each = len(evaluations) // len(loaded)
        means += [_over_collections(evaluations[i::each]) for i in range(each)]
    result = Evaluations(evaluations, comparisons, means, drawn, compare_seeds(named) if seeds else [])
    if folder is not None and (not single or curves):
        write_record(folder / "evaluations.json", result.to_dict())
    return result


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def _load(sources: Sequence[str | Path | Collection], split: str, progress: bool) -> list[Collection]:
    """Load every collection once and give each a distinct name."""
    found: dict[Path | str | int, str | Path | Collection] = {}  # sources by resolved path, id or identity
    for source in sources:
        for one in collection_names(source) if isinstance(source, str) else [source]:
            if isinstance(one, Collection):
                found.setdefault(id(one), one)
                continue
            require("collections", one, (str, Path), "give names, paths or what load_collection returned")
            path = user_path(one)
            found.setdefault(path.resolve() if path.exists() and one != PYTHON_DOCS else str(one), one)
    loaded = [one if isinstance(one, Collection) else load_collection(one, split, progress=progress) for one in found.values()]
    names = distinct_names([collection.name for collection in loaded], [key if isinstance(key, Path) else None for key in found])
    return [replace(collection, name=name) for collection, name in zip(loaded, names, strict=True)]


def distinct_names(names: Sequence[str], paths: Sequence[Path | None]) -> list[str]:
    """Replace names that occur twice by the shortest end of their path that no other has; a name without a path stays."""
    distinct = list(names)
    for length in range(1, max((len(path.parts) for path in paths if path is not None), default=0) + 1):
        count = Counter(distinct)
        distinct = [
            name if path is None or count[name] == 1 else "/".join(path.parts[-length:])
            for name, path in zip(distinct, paths, strict=True)
        ]
    return distinct


def _over_seeds(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Means and standard deviations over the sparse models, also with BM25 added, for each collection that has at least two."""
    rows = []
    for (collection, lexical), group in seed_groups(evaluations).items():
        if len(group) > 1:
            words = "" if lexical is None else f" + {lexical:g} bm25"
            row: dict[str, Any] = {"model": f"mean of {len(group)}{words}", "collection": collection}
            for name, column in _columns(group).items():
                if None in column:
                    continue
                row |= {name: float(np.mean(column)), f"{name} sd": float(np.std(column, ddof=1))}
            rows.append(row)
    return rows


def _over_collections(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Means of one model's evaluations."""
    columns = _columns(evaluations).items()
    means = {name: None if None in column else float(np.mean(column)) for name, column in columns}
    return {"model": evaluations[0].model, "collection": f"mean of {len(evaluations)}"} | means


def _columns(evaluations: Sequence[Evaluation]) -> dict[str, list[Any]]:
    """The metrics and costs of evaluations, by name."""
    rows = [row for evaluation in evaluations for row in evaluation._rows()]
    return {name: [row[name] for row in rows] for name in rows[0] if name not in ("model", "collection")}
