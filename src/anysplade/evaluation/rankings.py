"""Rank the documents of a collection with BM25, a sparse encoder or a dense model."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer, SparseEncoder

from anysplade._common.files import user_path
from anysplade._common.hashing import DataHash
from anysplade._common.progress import begin
from anysplade.data.collections import Collection
from anysplade.data.stored_corpus import full_texts, ids_at
from anysplade.errors import OptionError
from anysplade.evaluation.costs import dense_cost, search_cost
from anysplade.evaluation.runs import Run
from anysplade.model.dense import encode_dense, open_dense
from anysplade.model.encoder import open_encoder
from anysplade.model.encoding import Encoded, ModelQueries, encode_counted
from anysplade.model.modules import cut_at, cut_within, is_splade, term_names, transformer_lengths
from anysplade.model.options import Precision, Role, Runtime, Window, runtime_for
from anysplade.model.own_words import PieceCounts, counts_as_own, lucene_idf
from anysplade.model.passages import Passages, Splitter
from anysplade.model.queries import Cut, log_cut
from anysplade.model.runtimes import for_inference, resolve_precision, runtime_of
from anysplade.model.saved import fingerprint, resolve_model
from anysplade.model.tokenizing import count_truncated
from anysplade.search.bm25 import BM25
from anysplade.search.document_encoding import Options, encode_texts, workers_for
from anysplade.search.exact import nearest, top_rows
from anysplade.search.hits import query_words

logger = logging.getLogger(__name__)

_PLURALS: dict[Role, str] = {"document": "documents", "query": "queries"}


@dataclass(frozen=True)
class Ranker:
    """Ranks the documents of a collection for each of its queries; the options are those of ``evaluate``.

    The methods for the kinds of models return the fields of an ``Evaluation`` that follow from the model.
    """

    collection: Collection
    depth: int
    runtime: Runtime = "auto"
    precision: Precision = "float32"
    max_length: int | None = None
    batch_tokens: int | None = None
    cache: str | Path | None = None
    progress: bool = False
    language: str = "auto"
    passages: Window | None = None  # of a sparse or dense model

    @cached_property
    def self_matches(self) -> set[str]:
        """Ids of queries that are also documents, with the same id and text."""
        corpus = self.collection.corpus
        return {
            id_
            for id_, text in self.collection.queries.items()
            if id_ in corpus and text.strip() in (corpus[id_].text.strip(), corpus[id_].full_text)
        }

    @cached_property
    def texts(self) -> dict[Role, Sequence[str]]:
        return {
            "document": full_texts(self.collection.corpus),
            "query": list(self.collection.queries.values()),
        }

    def texts_for(self, encoder: SparseEncoder | SentenceTransformer, model: Any) -> dict[Role, Sequence[str]]:
        """The texts that a model encodes by role: those of documents are whole, or ``Passages``."""
        if self.passages is None:
            return self.texts
        begin("splitting the documents", self.progress)
        split = Passages(self.collection.corpus, Splitter(encoder, self.passages, _name(model)))
        return {"document": split, "query": self.texts["query"]}

    @property
    def hits(self) -> int:
        """Number of documents to search for: one more than the depth if a query may find itself."""
        return self.depth + bool(self.self_matches)

    def as_run(self, rankings: Sequence[tuple[np.ndarray, np.ndarray]]) -> Run:
        """Make a run of positions and scores per query, at the depth and without self-matches."""
        ids = ids_at(self.collection.corpus, np.unique(np.concatenate([positions for positions, _ in rankings])))
        run: Run = {}
        for query_id, (positions, scores) in zip(self.collection.queries, rankings, strict=True):
            itself = query_id if query_id in self.self_matches else None
            found = ((ids[d], s) for d, s in zip(positions.tolist(), scores.tolist(), strict=True) if ids[d] != itself)
            run[query_id] = dict(islice(found, self.depth))
        return run

    def by_bm25(self, name: str) -> dict[str, Any]:
        start = time.perf_counter()
        bm25 = BM25(self.texts["document"], name == "bm25", self.language)
        rankings = bm25.top(self.texts["query"], self.hits)
        if not any(len(documents) for documents, _ in rankings):
            logger.warning("bm25: no query of %s has a word in common with a document, so every measure is 0", self.collection.name)
        seconds = {"bm25": time.perf_counter() - start}
        return {"kind": "bm25", "run": self.as_run(rankings), "seconds": seconds, "language": bm25.language}

    def by_sparse(self, model: str | Path | SparseEncoder) -> dict[str, Any]:
        """Rank by exact dot products of sparse vectors."""
        encoder = model if isinstance(model, SparseEncoder) else open_encoder(model)
        own = transformer_lengths(encoder)
        if encoder is not model and self.max_length is not None:
            cut_at(encoder, self.max_length)
        length = self.max_length if transformer_lengths(encoder) != own else None
        precision = resolve_precision(self.precision, encoder.device)
        texts = self.texts_for(encoder, model)
        counted_pieces = {role: counts_as_own(encoder, role) for role in _PLURALS}
        # A loaded model may be in training; converting it for each evaluation would cost more than it saves.
        count = 0 if encoder is model else sum(map(len, texts.values()))
        start = time.perf_counter()
        runtime = runtime_for(count, self.runtime, precision)
        begin(f"making {_name(model)} ready for OpenVINO", self.progress and runtime == "openvino")
        encoder = for_inference(encoder, runtime, precision)
        used = runtime_of(encoder)
        preparing = time.perf_counter() - start
        key = precision if precision == "float32" or used == "torch" else f"{precision} on {used}"
        workers = 1 if isinstance(model, SparseEncoder) or used != "torch" else workers_for(len(texts["document"]))
        options = Options(str(model), precision, None, self.max_length, "torch")
        pieces = {role: PieceCounts(len(counted)) for role, counted in counted_pieces.items() if counted is not None}

        def encode_role(texts: Sequence[str], role: Role, **given: Any) -> Encoded:
            given["pieces"] = pieces.get(role)
            if role == "document" and workers > 1:
                return encode_texts(encoder, texts, options, workers, batch_tokens=self.batch_tokens, **given)
            return encode_counted(encoder, texts, role, batch_tokens=self.batch_tokens, **given)

        encoded, encoding, rate = self._encode(encode_role, model, key, length, texts)
        queries, documents = encoded["query"].matrix, encoded["document"].matrix
        cut = self._cut({role: counted for role, (_, counted) in encoded.items()}, model, texts)
        start = time.perf_counter()
        split = _split(texts)
        run = self.as_run(top_rows(documents, queries, self.hits, groups=split.get("starts")))
        return {
            "kind": "sparse",
            "run": run,
            "seconds": {"preparing": preparing, "encoding": encoding, "search": time.perf_counter() - start},
            "cost": search_cost(queries, documents, self._count) | {"texts_per_second": rate},
            "cut": cut,
            "precision": precision if used == "openvino" else str(encoder.dtype).removeprefix("torch."),  # of the weights
            "runtime": used,
            **_own_words(pieces, counted_pieces),
            "vectors": (queries, documents),
            "terms": term_names(encoder),
            "words": self._words(encoder),
            **split,
        }

    def by_dense(self, model: str | Path | SentenceTransformer) -> dict[str, Any]:
        """Rank by exact dot products of dense vectors."""
        if self.precision == "int8" or self.runtime == "openvino":
            raise OptionError(f"{model}: a dense model is evaluated on torch, in float32 or bfloat16")
        encoder = model if isinstance(model, SentenceTransformer) else open_dense(resolve_model(model))
        own = transformer_lengths(encoder)
        if encoder is not model:
            cut_within(encoder, self.max_length, lengthen=False)
        length = self.max_length if transformer_lengths(encoder) != own else None
        precision = resolve_precision(self.precision, encoder.device)
        encode_role = partial(encode_dense, encoder, precision=precision)
        texts = self.texts_for(encoder, model)
        vectors, encoding, rate = self._encode(encode_role, model, f"dense {precision}", length, texts)
        counts = {role: count_truncated(encoder, some, role) for role, some in texts.items()}
        if own:  # a dense model is never read further than it was saved for
            counts = {role: counted._replace(maximum=max(own)) for role, counted in counts.items()}
        cut = self._cut(counts, model, texts)
        start = time.perf_counter()
        split, (count, width) = _split(texts), vectors["document"].shape
        run = self.as_run(nearest(vectors["query"], vectors["document"], self.hits, split.get("starts")))
        return {
            "kind": "dense",
            "run": run,
            "seconds": {"encoding": encoding, "search": time.perf_counter() - start},
            "cost": dense_cost(count, width, self._count) | {"texts_per_second": rate},
            "cut": cut,
            "precision": precision,
            "runtime": "torch",
            **split,
        }

    @property
    def _count(self) -> int | None:
        """The number of documents if their passages have the vectors."""
        return None if self.passages is None else len(self.collection.corpus)

    def _words(self, encoder: SparseEncoder) -> dict[str, dict[str, str]] | None:
        """The words that the tokenizer split, by query id and the name of each of their terms; None if terms are not tokens."""
        if not (is_splade(encoder) and encoder.tokenizer.is_fast):
            return None
        queries = ModelQueries(encoder)
        return {id_: words for id_, text in self.collection.queries.items() if (words := query_words(queries, text))}

    def _cut(self, counts: dict[Role, Cut], model: Any, texts: dict[Role, Sequence[str]]) -> dict[str, Any]:
        """Log the texts that were cut, by role."""
        cut: dict[str, Any] = {}
        for role, plural in _PLURALS.items():
            what = "passages" if isinstance(texts[role], Passages) else plural
            log_cut(counts[role], len(texts[role]), what, f"{_name(model)} on {self.collection.name}")
            cut[role] = {"count": counts[role].texts, "max_length": counts[role].limit}
        return cut

    def _encode(
        self,
        encode_role: Callable[..., Any],
        model: Any,
        precision: str,
        max_length: int | None,
        texts: dict[Role, Sequence[str]],
    ) -> tuple[dict[Role, Any], float, float | None]:
        """What ``encode_role`` gives by role, the seconds, and the texts per second: None if some vectors were in the cache.

        ``max_length`` is None if it is the model's own, so that both have the same vectors in the cache.
        """
        folders: dict[Role, Path] = {}
        if self.cache is not None and isinstance(model, str | Path):
            folders = vector_folders(model, self.cache, precision, max_length, texts)
        cached = any(folder.exists() for folder in folders.values())
        start = time.perf_counter()
        vectors = {}
        for role, plural in _PLURALS.items():
            shown = {"progress": self.progress, "what": f"encoding {plural} with {_name(model)}"}
            vectors[role] = encode_role(texts[role], role, cache=folders.get(role), **shown)
        seconds = time.perf_counter() - start
        return vectors, seconds, None if cached else round(sum(map(len, texts.values())) / seconds, 2)


def _split(texts: dict[Role, Sequence[str]]) -> dict[str, Any]:
    """The first passage of each document, if documents are split."""
    passages = texts["document"]
    return {"starts": passages.starts, "passages": str(passages.window)} if isinstance(passages, Passages) else {}


def _own_words(pieces: dict[Role, PieceCounts], counted: dict[Role, np.ndarray | None]) -> dict[str, float | None]:
    """Own words kept by queries and documents; none if terms are not tokens."""
    if "document" not in pieces:
        return {}
    idf = lucene_idf(pieces["document"].own, pieces["document"].texts)
    return {f"{role}_own_words": found.share(idf * counted[role]) for role, found in pieces.items()}


def _name(model: Any) -> str:
    return str(model) if isinstance(model, str | Path) else "the loaded model"


def vector_folders(
    model: str | Path, cache: str | Path, precision: str, max_length: int | None, texts: Mapping[Role, Sequence[str]]
) -> dict[Role, Path]:
    """Cache folders of vectors by role, named after everything that determines the vectors; none if the model has no hash."""
    known = fingerprint(resolve_model(model))
    if known is None:
        return {}
    keys = {role: json.dumps([known, precision, max_length, role, DataHash(parts).hexdigest()]) for role, parts in texts.items()}
    return {role: user_path(cache) / "vectors" / hashlib.sha256(key.encode()).hexdigest()[:32] for role, key in keys.items()}
