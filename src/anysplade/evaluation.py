"""How good a model is on a collection, and at what cost."""

import difflib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
from scipy import sparse
from sentence_transformers import SparseEncoder

from anysplade.bm25 import BM25
from anysplade.datasets import Collection, hash_texts, load_collection
from anysplade.encoder import open_encoder
from anysplade.encoding import encode, resolve_precision
from anysplade.errors import MeasureError, OptionError
from anysplade.files import write_whole
from anysplade.index import Postings
from anysplade.options import Precision
from anysplade.provenance import provenance

METRICS = ("nDCG@10", "RR@10", "R@100")

Run = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Evaluation:
    """Effectiveness, and the cost it came at. JSON: the metrics stand beside the costs by their own names."""

    model: str
    collection: str
    metrics: dict[str, float]
    query_active_dims: float | None  # mean number of terms with a weight; None for BM25
    document_active_dims: float | None
    flops: float | None  # expected products a (query, document) pair: sum over terms of P(in query) P(in document)
    precision: Precision | None  # of encoding: "bfloat16" is an approximation; None for BM25
    queries: int
    documents: int
    data_hash: str
    seconds: dict[str, float]
    provenance: dict[str, Any]
    run: Run

    def to_dict(self) -> dict[str, Any]:
        """Everything but the run, which is a file of its own."""
        rest = {name: value for name, value in asdict(self).items() if name not in ("metrics", "run")}
        return {"model": rest.pop("model"), "collection": rest.pop("collection")} | self.metrics | rest


def evaluate(
    model: str | Path | SparseEncoder,
    collection: str | Path | Collection,
    metrics: Sequence[str] = METRICS,
    *,
    split: str = "test",
    output: str | Path | None = None,
    depth: int = 1000,
    precision: Precision = "float32",
    progress: bool = False,
) -> Evaluation:
    """Rank the collection's documents for its queries and measure the ranking.

    Scores are exact dot products; ties go to the document that comes first in the corpus.

    Args:
        model: a sparse encoder or its path, or ``"bm25"``.
        collection: a ``Collection``, a BEIR folder or ``"python-docs"``.
        metrics: names of ir-measures.
        depth: documents that a query's ranking holds.
        precision: of encoding; see ``anysplade.encoding.encode``.
        output: a folder for ``evaluation.json`` and the TREC run ``run.trec``.

    Raises:
        MeasureError: an unknown metric; the message has the nearest known one.
        ModelError, DataError: as ``open_encoder`` and ``load_collection`` do.
    """
    measures = parse_metrics(metrics)
    if not isinstance(collection, Collection):
        collection = load_collection(collection, split, progress=progress)
    ids = list(collection.corpus)
    texts = [document.full_text for document in collection.corpus.values()]
    seconds: dict[str, float] = {}
    costs: tuple[float | None, float | None, float | None] = (None, None, None)
    used: Precision | None = None
    start = time.perf_counter()
    if model == "bm25":
        run = _bm25_run(collection, ids, texts, depth)
        seconds["bm25"] = time.perf_counter() - start
    else:
        encoder = model if isinstance(model, SparseEncoder) else open_encoder(model)
        used = resolve_precision(precision, encoder.device)
        start = time.perf_counter()
        documents = encode(encoder, texts, "document", precision=used, progress=progress)
        queries = encode(encoder, list(collection.queries.values()), "query", precision=used, progress=progress)
        seconds["encoding"] = time.perf_counter() - start
        start = time.perf_counter()
        run = _run(queries, Postings.from_documents(documents), list(collection.queries), ids, depth)
        seconds["search"] = time.perf_counter() - start
        costs = cost(queries, documents)
    if not isinstance(model, str | Path):
        model = model.model_card_data.base_model or "a loaded SparseEncoder"
    values = ir_measures.calc_aggregate(measures.values(), collection.qrels, run)
    evaluation = Evaluation(
        model=str(model),
        collection=collection.name,
        metrics={name: float(values[measure]) for name, measure in measures.items()},
        query_active_dims=costs[0],
        document_active_dims=costs[1],
        flops=costs[2],
        precision=used,
        queries=len(collection.queries),
        documents=len(ids),
        data_hash=hash_texts([*ids, *texts, *collection.queries.values(), json.dumps(collection.qrels)]),
        seconds=seconds,
        provenance=provenance(),
        run=run,
    )
    if output is not None:
        folder = Path(output).expanduser()
        write_run(folder / "run.trec", run)
        write_whole(folder / "evaluation.json", json.dumps(evaluation.to_dict(), indent=2) + "\n")
    return evaluation


def cost(queries: sparse.csr_matrix, documents: sparse.csr_matrix) -> tuple[float, float, float]:
    """Mean active dims of queries and of documents, and FLOPS (Paria et al., arXiv 2004.05665)."""
    in_query = np.bincount(queries.indices, minlength=queries.shape[1]) / queries.shape[0]
    in_document = np.bincount(documents.indices, minlength=documents.shape[1]) / documents.shape[0]
    return queries.nnz / queries.shape[0], documents.nnz / documents.shape[0], float(in_query @ in_document)


def parse_metrics(names: Sequence[str]) -> dict[str, Any]:
    """ir-measures by the names they were asked for.

    Raises:
        MeasureError: a name that ir-measures does not know.
    """
    if not names:
        raise OptionError(f"no metric named; for example {' '.join(METRICS)}")
    measures = {}
    for name in names:
        try:
            measures[name] = ir_measures.parse_measure(name)
        except (NameError, ValueError, SyntaxError, TypeError, AttributeError, AssertionError):
            base, at, cutoff = name.partition("@")
            known = {alias.lower(): known.NAME for alias, known in ir_measures.measures.registry.items()}
            near = difflib.get_close_matches(base.lower(), known, n=1, cutoff=0.5)
            hint = (
                f"did you mean {known[near[0]]}{at}{cutoff or '10' if at else ''}?" if near else f"for example {', '.join(METRICS)}"
            )
            raise MeasureError(f"unknown metric {name!r}: {hint}") from None
    return measures


def write_run(path: str | Path, run: Run, tag: str = "anysplade") -> None:
    """Write a TREC run file: query, Q0, document, rank, score, tag."""
    lines = [
        f"{query_id} Q0 {document_id} {rank} {score:.9g} {tag}\n"
        for query_id, ranking in run.items()
        for rank, (document_id, score) in enumerate(ranking.items(), 1)
    ]
    write_whole(path, "".join(lines))


def _run(queries: sparse.csr_matrix, postings: Postings, query_ids: list[str], ids: list[str], depth: int) -> Run:
    run: Run = {}
    for i, query_id in enumerate(query_ids):
        row = slice(queries.indptr[i], queries.indptr[i + 1])
        found, scores = postings.top(queries.indices[row], queries.data[row], depth)
        run[query_id] = {ids[d]: float(score) for d, score in zip(found, scores, strict=True)}
    return run


def _bm25_run(collection: Collection, ids: list[str], texts: list[str], depth: int) -> Run:
    rankings = BM25(texts).top(list(collection.queries.values()), depth)
    return {
        query_id: {ids[d]: float(score) for d, score in zip(*ranking, strict=True)}
        for query_id, ranking in zip(collection.queries, rankings, strict=True)
    }
