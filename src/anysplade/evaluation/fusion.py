"""Evaluate rankings that are made of others: the fusion of several, and one that a cross-encoder re-ranked."""

import time
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from anysplade._common.progress import bar
from anysplade.data.collections import Collection
from anysplade.evaluation.costs import COSTS, mean_costs
from anysplade.evaluation.evaluations import Evaluation
from anysplade.evaluation.measures import measure, parse_metrics
from anysplade.evaluation.runs import Run
from anysplade.search.fusion import Fusion, fuse

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder


def evaluate_fused(parts: Sequence[Evaluation], collection: Collection, method: Fusion) -> Evaluation:
    """Evaluate the fusion of the runs of several models on one collection; a ranking is as long as the longest that it is made of.

    It has no active dims and no FLOPS of its own: a search costs what the parts cost together, which ``cost`` gives by part.
    """
    start = time.perf_counter()
    run: Run = {}
    for query_id in dict.fromkeys(id_ for part in parts for id_ in part.run):
        rankings = [part.run.get(query_id, {}) for part in parts]
        run[query_id] = dict(islice(fuse(rankings, method).items(), max(map(len, rankings))))
    name = f"{method} of {' and '.join(part.model for part in parts)}"
    return _made_of(parts, collection, name, "fusion", run, start, {})


def evaluate_reranked(
    part: Evaluation, collection: Collection, reranker: "CrossEncoder", name: str, depth: int, progress: bool = False
) -> Evaluation:
    """Evaluate a model's run after a cross-encoder re-ranked the first ``depth`` documents of each query.

    Later documents keep their order below these, with scores that only say so. The costs are as for a fusion; ``cost`` has the
    number of pairs that the cross-encoder reads for a query too.
    """
    from anysplade.search.reranking import rerank

    start, pairs = time.perf_counter(), 0
    run: Run = {}
    with bar(f"re-ranking {part.model} with {name}", "query", len(part.run), progress) as shown:
        for query_id, ranking in part.run.items():
            first = [id_ for id_ in islice(ranking, depth) if id_ in collection.corpus]
            hits = [(id_, collection.corpus[id_].full_text) for id_ in first]
            scores = dict(rerank(reranker, collection.queries[query_id], hits, depth)) if query_id in collection.queries else {}
            rest, lowest = (id_ for id_ in ranking if id_ not in scores), min(scores.values(), default=0.0)
            run[query_id] = scores | {id_: lowest - rank for rank, id_ in enumerate(rest, 1)}
            pairs += len(scores)
            shown.update(1)
    cost = {"pairs_per_query": pairs / max(1, len(part.run))}
    return _made_of([part], collection, f"{part.model} re-ranked by {name}", "reranked", run, start, cost)


def _costs(part: Evaluation) -> list[dict[str, Any]]:
    """The costs of a model, or of the models that a ranking is made of."""
    if part.kind in ("fusion", "reranked") and part.cost is not None:
        return list(part.cost["parts"])
    return [{"model": part.model} | {name: getattr(part, name) for name in COSTS}]


def _made_of(
    parts: Sequence[Evaluation],
    collection: Collection,
    name: str,
    kind: Literal["fusion", "reranked"],
    run: Run,
    start: float,
    cost: dict[str, Any],
) -> Evaluation:
    """The evaluation of a run that was made of others', from the time ``start`` on."""
    seconds: dict[str, float] = {kind: time.perf_counter() - start}
    first = parts[0]
    values, per_query = measure(parse_metrics(list(first.metrics)), collection.qrels, run)
    costs = [cost for part in parts for cost in _costs(part)]
    return Evaluation(
        model=name,
        collection=first.collection,
        kind=kind,
        metrics=values,
        cost={"parts": costs} | cost,
        queries=first.queries,
        documents=first.documents,
        self_matches=max(part.self_matches for part in parts),
        data_hash=first.data_hash,
        seconds=seconds,
        provenance=first.provenance,
        per_query=per_query,
        run=run,
        **mean_costs(None),
    )
