"""Evaluate rankings that are made of others: the fusion of several, a model's with BM25 added, and one that was re-ranked."""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import sparse

from anysplade._common.progress import bar
from anysplade._common.row_file import RowFile
from anysplade.data.collections import Collection
from anysplade.evaluation.costs import COSTS, mean_costs, search_cost
from anysplade.evaluation.evaluations import Evaluation
from anysplade.evaluation.measures import measure, parse_metrics
from anysplade.evaluation.rankings import Ranker
from anysplade.evaluation.runs import Run
from anysplade.search.bm25 import BM25
from anysplade.search.exact import top_rows
from anysplade.search.fusion import DEPTH, Fusion, fuse
from anysplade.search.lexical import PREFIX

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

_ROWS = 2**16  # documents whose vectors are joined at a time


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


def evaluate_lexical(part: Evaluation, collection: Collection, weight: float, language: str = "auto") -> Evaluation:
    """Evaluate a sparse model with BM25 added to its scores, times ``weight``, as in an index with ``lexical``.

    The stems are further terms of the vectors, which are the model's own vectors before them, and count in all costs.
    """
    assert part.vectors is not None
    assert part.terms is not None
    start = time.perf_counter()
    ranker = Ranker(collection, DEPTH, language=language)
    bm25, rows = BM25(ranker.texts["document"], language=language), RowFile()
    queries, documents = part.vectors
    width = documents.shape[1] + bm25.weights.shape[1]
    for first in range(0, documents.shape[0], _ROWS):
        span = slice(first, first + _ROWS)
        rows.append(sparse.hstack([documents[span], bm25.weights[span]], format="csr", dtype=np.float32))
    counts = bm25.query_counts(ranker.texts["query"])
    both = sparse.hstack([queries, weight * counts], format="csr", dtype=np.float32), rows.matrix(width)
    run = ranker.as_run(top_rows(both[1], both[0], ranker.hits))
    cost = search_cost(*both)
    made = _made_of([part], collection, f"{part.model} + {weight:g} bm25", "sparse", run, start, {})
    terms = [*part.terms, *(f"{PREFIX}{word}" for word in bm25.words)]
    about: dict[str, Any] = {
        "lexical": weight,
        "language": bm25.language,
        "precision": part.precision,
        "runtime": part.runtime,
        "cut": part.cut,
    }
    about |= mean_costs(cost)
    return replace(made, cost=cost, vectors=both, terms=terms, **about)


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
    kind: Literal["sparse", "fusion", "reranked"],
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
