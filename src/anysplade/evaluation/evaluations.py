"""Evaluate a model on a collection: how effective it is and what searching with it costs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import sparse
from sentence_transformers import SentenceTransformer, SparseEncoder

from anysplade._common.files import require_folder, user_path, write_atomic
from anysplade._common.outputs import write_record
from anysplade._common.provenance import provenance
from anysplade._common.tables import Tabular
from anysplade.data.collections import Collection, data_hash, load_collection
from anysplade.data.names import BM25_NAMES, is_built_in
from anysplade.errors import DataError, OptionError
from anysplade.evaluation.costs import COSTS, OWN_WORDS, mean_costs, search_cost
from anysplade.evaluation.deployed import is_index, rank_by_index
from anysplade.evaluation.measures import METRICS, measure, parse_metrics
from anysplade.evaluation.rankings import Ranker
from anysplade.evaluation.runs import Run, check_run, read_run, require_trec_ids, write_run
from anysplade.model.dense import is_dense
from anysplade.model.options import Precision, Runtime, checked_batch_tokens, checked_option, checked_passages
from anysplade.model.pruning import prune
from anysplade.model.saved import fingerprint, resolve_model
from anysplade.search.exact import top_rows
from anysplade.search.languages import language_name

_CURVE_DOCUMENTS = (8, 16, 32, 64, 128, 256)  # terms kept per document
_CURVE_QUERIES = (4, 8, 16, 32)  # terms kept per query


@dataclass(frozen=True, repr=False, kw_only=True)
class Evaluation(Tabular):
    """Effectiveness of a model on a collection, and the cost of searching. In JSON, each metric is a key of its own."""

    model: str  # as the caller named it
    collection: str  # its name
    kind: Literal["sparse", "dense", "bm25", "run", "fusion", "reranked", "index"]  # of model
    metrics: dict[str, float]  # mean over the judged queries, by name
    query_active_dims: float | None  # mean number of terms per query, all dimensions of a dense model; None for the other kinds
    document_active_dims: float | None  # the same for documents
    flops: float | None  # expected products per (query, document) pair: sum over terms of P(in query) P(in document)
    query_own_words: float | None = None  # share of the queries' own word pieces that are active in their vectors, by idf
    document_own_words: float | None = None  # the same for documents; both None for models whose terms are not their tokens
    passages: str | None = None  # tokens of the passages of documents, whose best one gives a document its score
    cost: dict[str, Any] | None = None  # all costs; see ``search_cost``
    lexical: float | None = None  # weight of BM25, whose stems are further terms of the vectors
    precision: str | None = None  # of encoding; anything below float32 is an approximation; None for BM25 and run files
    runtime: str | None = None  # torch or openvino; None for BM25 and run files
    language: str | None = None  # of BM25's stemmer and stop words, "none" for neither; None for other models
    queries: int  # number of judged queries
    documents: int  # number of documents in the corpus
    cut: dict[str, Any] | None = None  # by role: the number of texts that are longer than max_length tokens and were cut
    index: dict[str, Any] | None = None  # of an index: its documents, those in the collection, top_k, lengths, engine and model
    self_matches: int  # queries that are also documents; such a document is left out of its own query's ranking
    data_hash: str  # SHA-256 of the collection
    seconds: dict[str, float]  # by stage
    provenance: dict[str, Any]  # versions, commit, hardware, command
    per_query: dict[str, dict[str, float]]  # value by metric and query id
    model_fingerprint: str | None = None  # of a sparse model's files; None for loaded ones
    run: Run  # score by query id and document id, the best document first
    vectors: tuple[sparse.csr_matrix, sparse.csr_matrix] | None = None  # of queries, documents or passages; mapped if large
    starts: np.ndarray | None = None  # with passages, (documents + 1,): the row of the first passage of each, and their number
    terms: list[str] | None = None  # name of each column of the vectors
    words: dict[str, dict[str, str]] | None = None  # the words of the queries that the tokenizer split, by query id and term

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as JSON, without the run, the vectors, their terms and words, and the values per query."""
        left_out = ("metrics", "run", "per_query", "vectors", "starts", "terms", "words")
        rest = {name: value for name, value in vars(self).items() if name not in left_out}
        return {"model": rest.pop("model"), "collection": rest.pop("collection")} | self.metrics | rest

    def _rows(self) -> list[dict[str, Any]]:
        costs = {name: getattr(self, name) for name in COSTS}
        own = {name: getattr(self, name) for name in OWN_WORDS}
        return [{"model": self.model, "collection": self.collection} | self.metrics | costs | own]


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
    passages: str | None = None,
    batch_tokens: int | None = None,
    language: str = "auto",
    cache: str | Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Rank a collection's documents for each of its queries and measure the rankings.

    Scores are exact dot products. If scores are equal, the document that comes first in the corpus is ranked first, for every
    measure. A query that is also a document, with the same id and text (ArguAna, Quora), does not get that document, as in BEIR.
    FLOPS are the expected products per query and document (arXiv 2004.05665).

    Args:
        model: a sparse encoder or its folder or hub id, a masked LM (used without training), a dense model of
            sentence-transformers (exact nearest neighbours), ``"bm25"``, ``"bm25-unstemmed"`` (without stemming), a TREC
            run file, or the folder of an index, which is searched as it is: with its precision, its ``top_k`` and its engine.
        collection: a ``Collection``, or anything that ``load_collection`` takes.
        metrics: names of measures in the syntax of ir-measures; a list or a single name.
        split: which relevance judgements to load.
        output: a folder for ``evaluation.json``, ``per_query.json`` and the TREC run ``run.trec``.
        depth: documents in each ranking, at least 1.
        runtime: for encoding; see ``for_inference``. "auto" keeps a loaded encoder as it is, and is "torch" for fewer than 100
            texts.
        precision: of encoding; see ``for_inference``. All but float32 are approximations.
        max_length: tokens after which a text is cut; see ``open_encoder``. It has no effect on a loaded encoder.
        passages: split documents into passages of this many tokens, such as 128, or 128:64 for one every 64 tokens: a document's
            score is that of its best passage, and nothing is cut. For sparse and dense models; BM25 reads documents whole.
        batch_tokens: tokens per batch of a sparse encoder; see ``encode``.
        language: of BM25's stemmer and stop words, as an English name or an ISO 639-1 code; ``"auto"`` is the language of most
            documents, told by their words and scripts, ``"none"`` is no stemmer and no stop words.
        cache: a folder that keeps vectors by the content of model and texts: nothing is encoded twice, and an interrupted
            evaluation resumes.
        progress: show progress bars.

    Raises:
        MeasureError: a metric is unknown; the message suggests the nearest known one.
        OptionError: an option is impossible.
        OutputError: ``output`` is given, and a run file cannot hold one of the ids.
        DataError: a run file has no query or no document of the collection, or an index no document of it. If few match, a
            warning gives their share.
        ModelError, DataError: as in ``open_encoder`` and ``load_collection``.
    """
    if isinstance(model, list | tuple):
        raise OptionError(f"`model` is a {type(model).__name__}; give one model, or several to anysplade.evaluate_all")
    measures, language = parse_metrics(metrics), language_name(language)
    window = checked_passages(passages)
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
    batch_tokens = checked_batch_tokens(batch_tokens)
    ranker = Ranker(collection, depth, runtime, precision, max_length, batch_tokens, cache, progress, language, window)
    if is_built_in(model, *BM25_NAMES):
        ranked = ranker.by_bm25(str(model))
    elif isinstance(model, str | Path) and user_path(model).is_file():
        ranked = {"kind": "run", "run": read_run(model), "seconds": {}}
        check_run(model, ranked["run"], collection)
    elif is_index(model):
        ranked = rank_by_index(model, ranker)
    elif isinstance(model, SparseEncoder) or not (isinstance(model, SentenceTransformer) or is_dense(resolve_model(model))):
        ranked = ranker.by_sparse(model)
    else:
        ranked = ranker.by_dense(model)
    if ranked["kind"] == "sparse" and isinstance(model, str | Path):
        ranked["model_fingerprint"] = fingerprint(resolve_model(model))
    if not isinstance(model, str | Path):
        base = model.model_card_data.base_model
        model = f"a loaded {type(model).__name__}" + (f", base model {base}" if base else "")
    values, per_query = measure(measures, collection.qrels, ranked["run"])
    evaluation = Evaluation(
        model=str(model),
        collection=collection.name,
        metrics=values,
        queries=len(collection.queries),
        documents=len(collection.corpus),
        self_matches=0 if ranked["kind"] == "run" else len(ranker.self_matches),
        data_hash=data_hash(collection),
        provenance=provenance(),
        per_query=per_query,
        **mean_costs(ranked.get("cost")),
        **ranked,
    )
    if output is not None:
        write_evaluation(user_path(output), evaluation)
    return evaluation


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write the run, the values by query and the JSON of an evaluation."""
    write_run(folder / "run.trec", evaluation.run, evaluation.model)
    write_atomic(folder / "per_query.json", json.dumps(evaluation.per_query, indent=1) + "\n")
    write_record(folder / "evaluation.json", evaluation.to_dict())


def curve(evaluation: Evaluation, collection: Collection, depth: int = 1000) -> list[dict[str, Any]]:
    """Effectiveness and cost of the full vectors, and of documents, or queries, that keep only their largest weights."""
    if evaluation.vectors is None:
        raise OptionError(f"{evaluation.model}: has no vectors to prune; a curve needs a sparse encoder")
    measures = parse_metrics(list(evaluation.metrics))
    queries, documents = evaluation.vectors
    ranker = Ranker(collection, depth)

    def row(query_k: int | None, document_k: int | None) -> dict[str, Any]:
        kept_queries = queries if query_k is None else prune(queries, query_k)
        kept_documents = documents if document_k is None else prune(documents, document_k)
        run = ranker.as_run(top_rows(kept_documents, kept_queries, ranker.hits, groups=evaluation.starts))
        values = measure(measures, collection.qrels, run)[0]
        costs = mean_costs(search_cost(kept_queries, kept_documents, None if evaluation.starts is None else len(collection.corpus)))
        return {"query_top_k": query_k, "document_top_k": document_k} | values | costs

    longest_query, longest_document = (int(np.diff(matrix.indptr).max()) for matrix in (queries, documents))
    return [
        row(None, None),
        *(row(None, k) for k in _CURVE_DOCUMENTS if k < longest_document),
        *(row(k, None) for k in _CURVE_QUERIES if k < longest_query),
    ]
