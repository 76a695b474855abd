"""Evaluate a model on a collection: its effectiveness, and what that costs."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import sparse
from sentence_transformers import SentenceTransformer, SparseEncoder

from anysplade._common.files import require_folder, user_path, write_atomic
from anysplade._common.hashing import DataHash
from anysplade._common.progress import begin
from anysplade._common.provenance import provenance
from anysplade._common.tables import Tabular
from anysplade.data.collections import Collection, data_hash, load_collection
from anysplade.data.names import BM25_NAMES, is_built_in
from anysplade.errors import DataError, OptionError
from anysplade.evaluation.measures import METRICS, measure, parse_metrics
from anysplade.evaluation.runs import Run, check_run, read_run, require_trec_ids, write_run
from anysplade.model.dense import encode_dense, is_dense, open_dense
from anysplade.model.encoder import open_encoder
from anysplade.model.encoding import count_truncated, encode, prune
from anysplade.model.modules import term_names
from anysplade.model.options import Precision, Role, Runtime, checked_option, runtime_for
from anysplade.model.queries import log_cut
from anysplade.model.runtimes import for_inference, resolve_precision, runtime_of
from anysplade.model.saved import fingerprint, resolve_model
from anysplade.search.bm25 import BM25
from anysplade.search.exact import Postings, highest, nearest

logger = logging.getLogger(__name__)

Kind = Literal["sparse", "dense", "bm25", "run"]

_CURVE_DOCUMENTS = (8, 16, 32, 64, 128, 256)  # terms kept of each document
_CURVE_QUERIES = (4, 8, 16, 32)
_QUANTILE = 0.95


@dataclass(frozen=True, repr=False)
class Evaluation(Tabular):
    """The effectiveness of a model on a collection, and its cost. In JSON each metric has its own name, beside the costs."""

    model: str  # as it was named
    collection: str  # its name
    kind: Kind  # of model
    metrics: dict[str, float]  # mean over the judged queries, by name
    query_active_dims: float | None  # mean number of terms with a weight above 0, all of a dense model; None for BM25 and run files
    document_active_dims: float | None  # the same of documents
    flops: float | None  # expected products per (query, document) pair: sum over terms of P(in query) P(in document)
    cost: dict[str, Any] | None  # the other costs; see ``cost``
    precision: str | None  # of encoding; anything below float32 is an approximation; None for BM25 and for run files
    runtime: str | None  # that encoded, torch or openvino; likewise
    queries: int  # judged ones
    documents: int  # in the corpus
    cut: dict[str, Any] | None  # by role: how many texts are longer than max_length tokens, of which the model reads no more
    self_matches: int  # queries that are documents of the corpus too; such a document is left out of that query's ranking
    data_hash: str  # SHA-256 of the collection
    seconds: dict[str, float]  # by stage
    provenance: dict[str, Any]  # versions, commit, hardware, command
    per_query: dict[str, dict[str, float]]  # value by metric and query id
    run: Run  # scores by query id and document id, the best first
    vectors: tuple[sparse.csr_matrix, sparse.csr_matrix] | None  # (queries, vocabulary) and (documents, vocabulary), in order
    terms: list[str] | None  # the name of each column of the vectors

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without the run, the vectors, their terms and the values of each query."""
        apart = ("metrics", "run", "per_query", "vectors", "terms")
        rest = {name: value for name, value in vars(self).items() if name not in apart}
        return {"model": rest.pop("model"), "collection": rest.pop("collection")} | self.metrics | rest

    def _rows(self) -> list[dict[str, Any]]:
        """Effectiveness, and the cost beside it."""
        costs = {name: getattr(self, name) for name in ("query_active_dims", "document_active_dims", "flops")}
        return [{"model": self.model, "collection": self.collection} | self.metrics | costs]


def evaluate(
    model: str | Path | SparseEncoder | SentenceTransformer,
    collection: str | Path | Collection,
    metrics: str | Sequence[str] = METRICS,
    *,
    split: str = "test",
    output: str | Path | None = None,
    depth: int = 1000,
    runtime: Runtime = "auto",
    precision: Precision = "float32",
    max_length: int | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Rank a collection's documents for each of its queries, and measure the rankings.

    Scores are exact dot products; the document that comes first in the corpus wins ties, for every measure. A query that
    is also a document, by id and text (ArguAna, Quora), does not get that document, as in BEIR. FLOPS are those of arXiv
    2004.05665: the expected products of a query and a document.

    Args:
        model: a sparse encoder or its folder or hub id, a masked LM (used without training), a dense model of
            sentence-transformers (exact nearest neighbours), ``"bm25"``, the same without stemming (``"bm25-unstemmed"``), or a
            TREC run file.
        collection: a ``Collection``, or what ``load_collection`` takes.
        metrics: names of measures, as ir-measures has them; one alone may stand without a list.
        split: which relevance judgements to load.
        output: a folder for ``evaluation.json``, ``per_query.json`` and the TREC run ``run.trec``.
        depth: documents in each ranking, at least 1.
        runtime: of encoding; see ``for_inference``. "auto" leaves an encoder that is loaded already as it is, and is
            "torch" for fewer than 100 texts.
        precision: of encoding; see there too. All but float32 are approximations.
        max_length: tokens a text is cut to; see ``open_encoder``. It has no effect on an encoder that is already loaded.
        cache: a folder that keeps vectors by the content of model and texts: nothing is encoded twice, and an interrupted
            evaluation resumes.
        progress: show progress bars.

    Raises:
        MeasureError: an unknown metric; the message suggests the nearest known one.
        OptionError: an impossible option.
        OutputError: ``output`` is given and a run file cannot hold one of the ids.
        DataError: a run file has no query or no document of the collection; where few match, their share is a warning.
        ModelError, DataError: as ``open_encoder`` and ``load_collection`` raise them.
    """
    measures = parse_metrics(metrics)
    depth, max_length = checked_option("depth", depth, int), checked_option("max_length", max_length, int | None)
    if depth < 1:
        raise OptionError(f"`depth` is {depth}: a ranking has at least 1 document")
    if output is not None:
        require_folder(user_path(output))
    if not isinstance(collection, Collection):
        collection = load_collection(collection, split, progress=progress)
    if not collection.corpus or not collection.queries or not collection.qrels:
        raise DataError(f"{collection.name}: needs at least one document, one query and one judgement")
    if output is not None:
        require_trec_ids(collection)
    self_matches = _self_matches(collection)
    options = _Options(depth, self_matches, runtime, precision, max_length, cache, progress)
    if is_built_in(model, *BM25_NAMES):
        ranked = _by_bm25(str(model), collection, options)
    elif isinstance(model, str | Path) and user_path(model).is_file():
        ranked = _Ranked("run", read_run(model))
        check_run(model, ranked.run, collection)
        self_matches = set()
    elif isinstance(model, SparseEncoder) or not (isinstance(model, SentenceTransformer) or is_dense(resolve_model(model))):
        ranked = _by_sparse(model, collection, options)
    else:
        ranked = _by_dense(model, collection, options)
    if not isinstance(model, str | Path):
        base = model.model_card_data.base_model
        model = f"a loaded {type(model).__name__}" + (f", base model {base}" if base else "")
    values, per_query = measure(measures, collection.qrels, ranked.run)
    costs = ranked.cost
    evaluation = Evaluation(
        model=str(model),
        collection=collection.name,
        kind=ranked.kind,
        metrics=values,
        query_active_dims=costs["query_active_dims"]["mean"] if costs else None,
        document_active_dims=costs["document_active_dims"]["mean"] if costs else None,
        flops=costs["flops"] if costs else None,
        cost=costs,
        precision=ranked.precision,
        runtime=ranked.runtime,
        queries=len(collection.queries),
        documents=len(collection.corpus),
        cut=ranked.cut,
        self_matches=len(self_matches),
        data_hash=data_hash(collection),
        seconds=ranked.seconds,
        provenance=provenance(),
        per_query=per_query,
        run=ranked.run,
        vectors=ranked.vectors,
        terms=ranked.terms,
    )
    if output is not None:
        folder = user_path(output)
        write_run(folder / "run.trec", ranked.run, str(model))
        write_atomic(folder / "per_query.json", json.dumps(per_query, indent=1) + "\n")
        write_atomic(folder / "evaluation.json", json.dumps(evaluation.to_dict(), indent=2) + "\n")
    return evaluation


class _Options(NamedTuple):
    """Of encoding and searching."""

    depth: int  # documents in a ranking
    self_matches: set[str]  # queries whose own document is left out
    runtime: Runtime = "auto"
    precision: Precision = "float32"
    max_length: int | None = None
    cache: str | Path | None = None
    progress: bool = False

    @property
    def found(self) -> int:
        """How many documents to search for, so that enough are left."""
        return self.depth + bool(self.self_matches)


@dataclass
class _Ranked:
    """What a model makes of a collection."""

    kind: Kind
    run: Run
    seconds: dict[str, float] = field(default_factory=dict)
    cost: dict[str, Any] | None = None
    cut: dict[str, Any] | None = None
    precision: str | None = None
    runtime: str | None = None
    vectors: tuple[sparse.csr_matrix, sparse.csr_matrix] | None = None
    terms: list[str] | None = None


def _by_bm25(name: str, collection: Collection, options: _Options) -> _Ranked:
    start = time.perf_counter()
    texts = _texts(collection)["document"]
    bm25, everything = BM25(texts, stemmed=name == "bm25"), np.arange(len(texts))
    rankings = [highest(bm25.score(query, everything), options.found) for query in collection.queries.values()]
    if not any(len(documents) for documents, _ in rankings):
        logger.warning("bm25: no query of %s has a word in common with a document, so every measure is 0", collection.name)
    return _Ranked("bm25", _as_run(rankings, collection, options), {"bm25": time.perf_counter() - start})


def _by_sparse(model: str | Path | SparseEncoder, collection: Collection, options: _Options) -> _Ranked:
    texts = _texts(collection)
    encoder = model if isinstance(model, SparseEncoder) else open_encoder(model, max_length=options.max_length)
    precision = resolve_precision(options.precision, encoder.device)
    # A model that is loaded may be in training: to convert it at each evaluation would cost more than it saves.
    count = 0 if encoder is model else sum(map(len, texts.values()))
    start = time.perf_counter()
    runtime = runtime_for(count, options.runtime, precision)
    name = "the loaded model" if encoder is model else str(model)
    begin(f"making {name} ready for OpenVINO", options.progress and runtime == "openvino")
    encoder = for_inference(encoder, runtime, precision)
    used = runtime_of(encoder)
    seconds = {"preparing": time.perf_counter() - start}
    key = precision if precision == "float32" or used == "torch" else f"{precision} on {used}"
    folders, cached = _cache_folders(model, options, key, texts)
    start = time.perf_counter()
    vectors = _both_roles(partial(encode, encoder), texts, folders, options, name)
    queries, documents = vectors["query"], vectors["document"]
    seconds["encoding"] = time.perf_counter() - start
    cut: dict[str, Any] = {}
    for role, plural in _ROLES.items():
        counted = count_truncated(encoder, texts[role], role)
        log_cut(counted, len(texts[role]), plural)
        cut[role] = {"count": counted.texts, "max_length": counted.limit}
    start = time.perf_counter()
    run = _as_run(Postings.from_documents(documents).top_rows(queries, options.found), collection, options)
    seconds["search"] = time.perf_counter() - start
    return _Ranked(
        "sparse",
        run,
        seconds,
        cost(queries, documents) | {"texts_per_second": _rate(collection, seconds["encoding"], cached)},
        cut,
        precision if used == "openvino" else str(encoder.dtype).removeprefix("torch."),  # what the weights are
        used,
        (queries, documents),
        term_names(encoder),
    )


def _by_dense(model: str | Path | SentenceTransformer, collection: Collection, options: _Options) -> _Ranked:
    """Exact nearest neighbours."""
    if options.precision == "int8" or options.runtime == "openvino":
        raise OptionError(f"{model}: a dense model is evaluated on torch, in float32 or bfloat16")
    texts = _texts(collection)
    encoder = model if isinstance(model, SentenceTransformer) else open_dense(resolve_model(model), options.max_length)
    precision = resolve_precision(options.precision, encoder.device)
    folders, cached = _cache_folders(model, options, f"dense {precision}", texts)
    start = time.perf_counter()
    name = model if isinstance(model, str | Path) else "the loaded model"
    vectors = _both_roles(partial(encode_dense, encoder, precision=precision), texts, folders, options, name)
    seconds = {"encoding": time.perf_counter() - start}
    start = time.perf_counter()
    run = _as_run(nearest(vectors["query"], vectors["document"], options.found), collection, options)
    seconds["search"] = time.perf_counter() - start
    return _Ranked(
        "dense",
        run,
        seconds,
        dense_cost(*vectors["document"].shape) | {"texts_per_second": _rate(collection, seconds["encoding"], cached)},
        precision=precision,
        runtime="torch",
    )


_ROLES: dict[Role, str] = {"document": "documents", "query": "queries"}


def _texts(collection: Collection) -> dict[Role, list[str]]:
    return {
        "document": [document.full_text for document in collection.corpus.values()],
        "query": list(collection.queries.values()),
    }


def _both_roles(
    encode: Callable[..., Any],
    texts: dict[Role, list[str]],
    folders: dict[Role, Path | None],
    options: _Options,
    name: str | Path,
) -> dict[Role, Any]:
    """By role the vectors of a model, which ``encode`` makes."""
    return {
        role: encode(texts[role], role, cache=folders[role], progress=options.progress, what=f"encoding {plural} with {name}")
        for role, plural in _ROLES.items()
    }


def _rate(collection: Collection, seconds: float, cached: bool) -> float | None:
    """Texts encoded a second; None if not all were."""
    return None if cached else round((len(collection.corpus) + len(collection.queries)) / seconds, 2)


def dense_cost(documents: int, width: int) -> dict[str, Any]:
    """What exact search with dense vectors costs, in the terms of ``cost``: every dimension of every vector counts."""
    every = {"mean": float(width), "median": float(width), "p95": float(width)}
    return {
        "query_active_dims": every,
        "document_active_dims": every,
        "flops": float(width),
        "dimensions": width,
        "index_bytes": 4 * documents * width,
    }


def cost(queries: sparse.csr_matrix, documents: sparse.csr_matrix) -> dict[str, Any]:
    """What searching costs, computed from the vectors alone.

    Args:
        queries, documents: (queries, vocabulary) and (documents, vocabulary), neither without rows.

    Returns:
        ``query_active_dims`` and ``document_active_dims``: mean, median and 95th percentile.
        ``flops``: expected products per (query, document) pair (Paria et al., arXiv 2004.05665).
        ``vocabulary_used``: terms that occur in any document.
        ``postings_per_query``: mean number of (document, weight) pairs that a query reads.
        ``index_bytes``: size of all postings as the index stores them, without texts and ids.
    """
    query_frequency = np.bincount(queries.indices, minlength=queries.shape[1])
    document_frequency = np.bincount(documents.indices, minlength=documents.shape[1])

    def spread(matrix: sparse.csr_matrix) -> dict[str, float]:
        active = np.diff(matrix.indptr)
        return {
            "mean": float(active.mean()),
            "median": float(np.median(active)),
            "p95": float(np.quantile(active, _QUANTILE)),
        }

    products = float(query_frequency @ document_frequency)
    return {
        "query_active_dims": spread(queries),
        "document_active_dims": spread(documents),
        "flops": products / (queries.shape[0] * documents.shape[0]),
        "vocabulary_used": int((document_frequency > 0).sum()),
        "postings_per_query": products / queries.shape[0],
        "index_bytes": 8 * documents.nnz + 8 * (documents.shape[1] + 1),
    }


def curve(evaluation: Evaluation, collection: Collection, depth: int = 1000) -> list[dict[str, Any]]:
    """Effectiveness against cost when documents, or queries, keep only their largest weights; nothing is trained again.

    Returns:
        One row for the full vectors, then one for each number of weights kept.

    Raises:
        OptionError: the evaluation is of BM25 or of a run file, which have no vectors.
    """
    if evaluation.vectors is None:
        raise OptionError(f"{evaluation.model}: has no vectors to prune; a curve needs a sparse encoder")
    measures = parse_metrics(list(evaluation.metrics))
    queries, documents = evaluation.vectors
    options = _Options(depth, _self_matches(collection))
    postings = Postings.from_documents(documents)

    def row(query_k: int | None, document_k: int | None) -> dict[str, Any]:
        some_queries = queries if query_k is None else prune(queries, query_k)
        some_documents = documents if document_k is None else prune(documents, document_k)
        searched = postings if document_k is None else Postings.from_documents(some_documents)
        run = _as_run(searched.top_rows(some_queries, options.found), collection, options)
        costs = cost(some_queries, some_documents)
        dims = {name: costs[name]["mean"] for name in ("query_active_dims", "document_active_dims")}
        values = measure(measures, collection.qrels, run)[0]
        return {"query_top_k": query_k, "document_top_k": document_k} | values | dims | {"flops": costs["flops"]}

    most_query_terms, most_document_terms = (int(np.diff(matrix.indptr).max()) for matrix in (queries, documents))
    return [
        row(None, None),
        *(row(None, k) for k in _CURVE_DOCUMENTS if k < most_document_terms),
        *(row(k, None) for k in _CURVE_QUERIES if k < most_query_terms),
    ]


def _self_matches(collection: Collection) -> set[str]:
    """Ids of queries that are also documents, by id and text."""
    return {
        id_
        for id_, text in collection.queries.items()
        if id_ in collection.corpus and text.strip() in (collection.corpus[id_].text.strip(), collection.corpus[id_].full_text)
    }


def _as_run(rankings: Sequence[tuple[np.ndarray, np.ndarray]], collection: Collection, options: _Options) -> Run:
    """Positions and scores, one pair of arrays per query, as a run without what the options leave out."""
    ids = list(collection.corpus)
    run: Run = {}
    for query_id, (positions, scores) in zip(collection.queries, rankings, strict=True):
        ranking = {ids[d]: s for d, s in zip(positions.tolist(), scores.tolist(), strict=True)}
        if query_id in options.self_matches:
            ranking.pop(query_id, None)
        while len(ranking) > options.depth:
            ranking.popitem()
        run[query_id] = ranking
    return run


def _cache_folders(
    model: str | Path | SparseEncoder | SentenceTransformer, options: _Options, precision: str, texts: dict[Role, list[str]]
) -> tuple[dict[Role, Path | None], bool]:
    """By role a folder for the vectors, named after everything that determines them, None where nothing is kept; and whether
    there is one already."""
    known = None if options.cache is None or not isinstance(model, str | Path) else fingerprint(resolve_model(model))
    if options.cache is None or known is None:
        return dict.fromkeys(texts), False
    folder = user_path(options.cache) / "vectors"
    about = [known, precision, options.max_length]
    keys = {role: json.dumps([*about, role, DataHash(parts).hexdigest()]) for role, parts in texts.items()}
    folders = {role: folder / hashlib.sha256(key.encode()).hexdigest()[:32] for role, key in keys.items()}
    return dict(folders), any(place.exists() for place in folders.values())
