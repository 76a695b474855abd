"""How good a model is on a collection, and at what cost."""

import contextlib
import difflib
import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from sentence_transformers import SparseEncoder

from anysplade._common.extras import extra
from anysplade._common.files import write_whole
from anysplade._common.provenance import provenance
from anysplade.data.collections import Collection, hash_texts, load_collection
from anysplade.data.sources import lines, whole_characters
from anysplade.errors import DataError, MeasureError, OptionError, OutputError
from anysplade.evaluation.bm25 import BM25
from anysplade.model.encoder import fingerprint, open_encoder, term_names
from anysplade.model.encoding import count_cut, encode, in_precision, prune, resolve_precision, say_cut
from anysplade.model.head import resolve_model
from anysplade.model.options import Precision, Role
from anysplade.search.exact import Postings, highest

with extra("evaluation"):
    import ir_measures

logger = logging.getLogger(__name__)

METRICS = ("nDCG@10", "RR@10", "R@100", "R@1000")
RUN_FILES = (".trec", ".run", ".txt", ".res", ".gz")
CURVE_DOCUMENTS = (8, 16, 32, 64, 128, 256)  # terms kept of each document
CURVE_QUERIES = (4, 8, 16, 32)
_QUANTILE = 0.95

Run = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Evaluation:
    """Effectiveness, and the cost it came at. JSON: the metrics stand beside the costs by their own names."""

    model: str
    collection: str
    metrics: dict[str, float]
    query_active_dims: float | None  # mean number of terms with a weight; None for BM25 and for run files
    document_active_dims: float | None
    flops: float | None  # expected products a (query, document) pair: sum over terms of P(in query) P(in document)
    cost: dict[str, Any] | None  # the rest of it; see ``cost``
    precision: str | None  # of encoding: what is below float32 is an approximation; None for BM25 and for run files
    queries: int
    documents: int
    cut: dict[str, Any] | None  # by role: texts longer than max_length tokens, which the model did not read to their end
    self_matches: int  # queries that are documents of the corpus too and were not counted as their own hit
    data_hash: str
    seconds: dict[str, float]
    provenance: dict[str, Any]
    per_query: dict[str, dict[str, float]]  # by metric and query id
    run: Run
    vectors: tuple[sparse.csr_matrix, sparse.csr_matrix] | None  # of queries and documents, in their order
    terms: list[str] | None  # their names, by term id

    def to_dict(self) -> dict[str, Any]:
        """Everything but the run, the vectors and the values of each query, which are files of their own."""
        apart = ("metrics", "run", "per_query", "vectors", "terms")
        rest = {name: value for name, value in vars(self).items() if name not in apart}
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
    max_length: int | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Rank the collection's documents for its queries and measure the ranking.

    Scores are exact dot products; ties go to the document that comes first in the corpus, for every measure alike.
    A query that stands in the corpus itself, by id and text (ArguAna, Quora), is not its own hit, as BEIR has it.

    Args:
        model: a sparse encoder or its path or hub id, a masked LM (as it is, without training), ``"bm25"``, or a
            TREC run file.
        collection: a ``Collection``, or what ``load_collection`` takes.
        metrics: names of ir-measures.
        depth: documents that a query's ranking holds, at least 1.
        precision: of encoding; see ``anysplade.model.encoding.in_precision``.
        max_length: tokens a text is cut to; see ``open_encoder``. Not for an encoder that is loaded already.
        output: a folder for ``evaluation.json``, ``per_query.json`` and the TREC run ``run.trec``.
        cache: a folder where vectors are kept by the content of model and texts; what is there is not encoded
            again, and an interrupted evaluation goes on.

    Raises:
        MeasureError: an unknown metric; the message has the nearest known one.
        OutputError: an id that cannot stand in a run file.
        ModelError, DataError: as ``open_encoder`` and ``load_collection`` do.
    """
    measures = parse_metrics(metrics)
    if depth < 1:
        raise OptionError(f"depth is {depth}: a ranking holds at least 1 document")
    if not isinstance(collection, Collection):
        collection = load_collection(collection, split, progress=progress)
    if not collection.corpus or not collection.queries or not collection.qrels:
        raise DataError(f"{collection.name}: needs at least one document, one query and one judgement")
    if output is not None:
        _require_trec_ids(collection)
    ids = list(collection.corpus)
    texts = [document.full_text for document in collection.corpus.values()]
    questions = list(collection.queries.values())
    itself = _self_matches(collection)
    seconds: dict[str, float] = {}
    costs: dict[str, Any] | None = None
    vectors = terms = None
    cut: dict[str, Any] | None = None
    used: str | None = None
    start = time.perf_counter()
    if isinstance(model, str | Path) and is_run_file(model):
        run = read_run(model)
        if not run.keys() & collection.qrels.keys():
            raise DataError(f"{model}: no query of {collection.name} in it")
        itself = set()
    elif model == "bm25":
        bm25, everything = BM25(texts), np.arange(len(texts))
        rankings = [highest(bm25.score(query, everything), depth + bool(itself)) for query in questions]
        if not any(len(found) for found, _ in rankings):
            logger.warning("bm25: no query of %s has a word in common with a document, so every measure is 0", collection.name)
        run = _as_run(rankings, list(collection.queries), ids, itself, depth)
        seconds["bm25"] = time.perf_counter() - start
    else:
        encoder = model if isinstance(model, SparseEncoder) else open_encoder(model, max_length=max_length)
        asked = resolve_precision(precision, encoder.device)
        folders = _cache_folders(
            model,
            cache,
            f"{asked}, {max_length}" if max_length else asked,
            {"document": texts, "query": questions},
        )
        cached = any(folder is not None and folder.exists() for folder in folders.values())
        start = time.perf_counter()
        encoder = in_precision(encoder, asked)
        documents = encode(encoder, texts, "document", cache=folders["document"], progress=progress)
        queries = encode(encoder, questions, "query", cache=folders["query"], progress=progress)
        vectors = (queries, documents)
        terms = term_names(encoder)
        seconds["encoding"] = time.perf_counter() - start
        cut = {}
        role: Role
        for role, said, given in (("document", "documents", texts), ("query", "queries", questions)):
            count, limit = count_cut(encoder, given, role)
            say_cut(count, len(given), limit, said)
            cut[role] = {"count": count, "max_length": limit}
        start = time.perf_counter()
        rankings = Postings.from_documents(documents).top_rows(queries, depth + bool(itself))
        run = _as_run(rankings, list(collection.queries), ids, itself, depth)
        seconds["search"] = time.perf_counter() - start
        rate = None if cached else round((len(ids) + len(run)) / seconds["encoding"], 2)
        costs = cost(queries, documents) | {"texts_per_second": rate}
        used = str(encoder.dtype).removeprefix("torch.")  # that of the weights
    if not isinstance(model, str | Path):
        base = model.model_card_data.base_model
        model = "a loaded SparseEncoder" + (f", base model {base}" if base else "")
    values, per_query = measure(measures, collection.qrels, run)
    evaluation = Evaluation(
        model=str(model),
        collection=collection.name,
        metrics=values,
        query_active_dims=costs["query_active_dims"]["mean"] if costs else None,
        document_active_dims=costs["document_active_dims"]["mean"] if costs else None,
        flops=costs["flops"] if costs else None,
        cost=costs,
        precision=used,
        queries=len(collection.queries),
        documents=len(ids),
        cut=cut,
        self_matches=len(itself),
        data_hash=data_hash(collection),
        seconds=seconds,
        provenance=provenance(),
        per_query=per_query,
        run=run,
        vectors=vectors,
        terms=terms,
    )
    if output is not None:
        folder = Path(output).expanduser()
        write_run(folder / "run.trec", run)
        write_whole(folder / "per_query.json", json.dumps(per_query, indent=1) + "\n")
        write_whole(folder / "evaluation.json", json.dumps(evaluation.to_dict(), indent=2) + "\n")
    return evaluation


def data_hash(collection: Collection) -> str:
    """Of all that decides what is measured: documents, queries and judgements."""
    texts = (document.full_text for document in collection.corpus.values())
    return hash_texts([*collection.corpus, *texts, *collection.queries.values(), json.dumps(collection.qrels)])


def measure(
    measures: dict[str, Any], qrels: dict[str, dict[str, int]], run: Run
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Means over all judged queries, and the value of each; a query without a ranking counts as 0.

    A query's documents are ranked as they stand in the run. ir-measures' providers sort by score themselves, break
    ties by id in opposite directions, and some compare in float32. So they get scores that fall by 1 a rank. Some
    divide by the length of a ranking, so they do not get empty ones.
    """
    found: dict[str, dict[str, float]] = {name: dict.fromkeys(qrels, 0.0) for name in measures}
    names = {value: name for name, value in measures.items()}
    ranks = {
        id_: dict(zip(ranking, map(float, range(len(ranking), 0, -1)), strict=True)) for id_, ranking in run.items() if ranking
    }
    for value in ir_measures.iter_calc(list(measures.values()), qrels, ranks):
        found[names[value.measure]][value.query_id] = float(value.value)
    return {name: float(np.mean(list(values.values()))) for name, values in found.items()}, found


def cost(queries: sparse.csr_matrix, documents: sparse.csr_matrix) -> dict[str, Any]:
    """What searching costs, from the vectors alone.

    Active dims: mean, median and 95th percentile. FLOPS: Paria et al., arXiv 2004.05665. ``vocabulary_used``:
    terms of any document. ``postings_per_query``: (document, weight) pairs that a query reads on average.
    ``index_bytes``: of those postings as the index keeps them, without texts and ids.
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
    """Effectiveness against cost without training again: the largest weights of documents, and of queries, alone.

    Raises:
        OptionError: the evaluation is of BM25 or of a run file, which have no vectors.
    """
    if evaluation.vectors is None:
        raise OptionError(f"{evaluation.model}: has no vectors to prune; a curve needs a sparse encoder")
    measures = parse_metrics(list(evaluation.metrics))
    queries, documents = evaluation.vectors
    ids, itself = list(collection.corpus), _self_matches(collection)
    whole = Postings.from_documents(documents)
    rows = []

    def add(query_k: int | None, document_k: int | None) -> None:
        asked = queries if query_k is None else prune(queries, query_k)
        held = documents if document_k is None else prune(documents, document_k)
        postings = whole if document_k is None else Postings.from_documents(held)
        run = _as_run(postings.top_rows(asked, depth + bool(itself)), list(collection.queries), ids, itself, depth)
        costs = cost(asked, held)
        dims = {name: costs[name]["mean"] for name in ("query_active_dims", "document_active_dims")}
        values = measure(measures, collection.qrels, run)[0]
        rows.append({"query_top_k": query_k, "document_top_k": document_k} | values | dims | {"flops": costs["flops"]})

    add(None, None)
    for k in CURVE_DOCUMENTS:
        if k < np.diff(documents.indptr).max():
            add(None, k)
    for k in CURVE_QUERIES:
        if k < np.diff(queries.indptr).max():
            add(k, None)
    return rows


def parse_metrics(names: Sequence[str]) -> dict[str, Any]:
    """ir-measures by the names they were asked for.

    Raises:
        MeasureError: a name that ir-measures does not know, or that no installed library computes.
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
        if not ir_measures.DefaultPipeline.supports(measures[name]):
            raise MeasureError(f"metric {name!r}: no installed library computes it; for example {', '.join(METRICS)}")
    return measures


# ------------------------------------------------------------------------------------- run files


def is_run_file(name: str | Path) -> bool:
    path = Path(name).expanduser()
    return path.suffix in RUN_FILES and path.is_file()


def read_run(path: str | Path) -> Run:
    """A TREC run file, gzipped or not: query, Q0, document, rank, score, tag.

    Documents are ordered by score; those of equal score by the rank column, and then as they stand in the file.

    Raises:
        DataError: a line that is none; it is named.
    """
    path = Path(path).expanduser()
    read: dict[str, dict[str, tuple[float, float]]] = {}  # -score and rank
    with lines(path) as numbered:
        for number, line in numbered:
            parts = line.split()
            if not parts:
                continue
            if len(parts) != 6:
                raise DataError(f"{path}:{number}: {len(parts)} columns; a run has query, Q0, document, rank, score, tag")
            ranking = read.setdefault(parts[0], {})
            if parts[2] in ranking:
                raise DataError(f"{path}:{number}: the document {parts[2]!r} stands twice in the ranking of {parts[0]!r}")
            rank, score = (_number(path, number, what, text) for what, text in (("rank", parts[3]), ("score", parts[4])))
            ranking[parts[2]] = (-score, rank)
    if not read:
        raise DataError(f"{path}: an empty run; each line is query, Q0, document, rank, score, tag")
    return {
        query_id: {id_: -negative for id_, (negative, _) in sorted(ranking.items(), key=lambda item: item[1])}
        for query_id, ranking in read.items()
    }


def _number(path: Path, line: int, what: str, text: str) -> float:
    with contextlib.suppress(ValueError):
        if not math.isnan(value := float(text)):
            return value
    raise DataError(f"{path}:{line}: the {what} {text[:40]!r} is no number")


def write_run(path: str | Path, run: Run, tag: str = "anysplade") -> None:
    """Write a TREC run file; scores to the last digit and ranks for those that tie, so that it measures the same."""
    rows = [
        f"{query_id} Q0 {document_id} {rank} {score!r} {tag}\n"
        for query_id, ranking in run.items()
        for rank, (document_id, score) in enumerate(ranking.items(), 1)
    ]
    write_whole(path, "".join(rows))


def _require_trec_ids(collection: Collection) -> None:
    for what, ids in (("query", collection.queries), ("document", collection.corpus)):
        for id_ in ids:
            if id_.split() != [id_] or id_ != whole_characters(id_):
                fault = "white space" if id_.split() != [id_] else "a lone surrogate"
                raise OutputError(f"{what} id {id_[:80]!r}: {fault} cannot stand in a run file; rename it, or leave --out away")


# ----------------------------------------------------------------------------------------- parts


def _self_matches(collection: Collection) -> set[str]:
    """Queries that are documents themselves, by id and text."""
    return {
        id_
        for id_, text in collection.queries.items()
        if id_ in collection.corpus and text.strip() in (collection.corpus[id_].text.strip(), collection.corpus[id_].full_text)
    }


def _as_run(
    rankings: Sequence[tuple[np.ndarray, np.ndarray]], query_ids: list[str], ids: list[str], itself: set[str], depth: int
) -> Run:
    run: Run = {}
    for query_id, (found, scores) in zip(query_ids, rankings, strict=True):
        ranking = {ids[d]: s for d, s in zip(found.tolist(), scores.tolist(), strict=True)}
        if query_id in itself:
            ranking.pop(query_id, None)
        while len(ranking) > depth:
            ranking.popitem()
        run[query_id] = ranking
    return run


def default_cache() -> Path | None:
    """Where the command keeps vectors: ``$ANYSPLADE_CACHE``, or ``anysplade`` in the user's cache folder.

    None, and a warning, if that cannot be written: a result needs no cache.
    """
    try:
        user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(os.environ.get("ANYSPLADE_CACHE") or Path(user) / "anysplade")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home at all
        logger.warning("vectors are not kept (%s); set ANYSPLADE_CACHE to a folder that can be written", error)
        return None
    return folder


def _cache_folders(
    model: str | Path | SparseEncoder, cache: str | Path | None, precision: str, texts: dict[str, list[str]]
) -> dict[str, Path | None]:
    """A folder for the vectors of each role, named after all that decides them."""
    known = None if cache is None or isinstance(model, SparseEncoder) else fingerprint(resolve_model(model))
    if cache is None or known is None:
        return dict.fromkeys(texts)
    folder = Path(cache).expanduser() / "vectors"
    keys = {role: json.dumps([known, role, precision, hash_texts(parts)]) for role, parts in texts.items()}
    return {role: folder / hashlib.sha256(key.encode()).hexdigest()[:32] for role, key in keys.items()}
