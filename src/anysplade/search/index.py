"""An index in a folder: documents encoded by a model, and searched by text.

The modules that encode documents import torch, which takes seconds, so they are imported where they are used.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from anysplade._common.arguments import near, require, require_list
from anysplade._common.files import user_path
from anysplade._common.outputs import write_record
from anysplade.data.corpus import Document
from anysplade.data.names import held
from anysplade.errors import DataError, OptionError
from anysplade.model.options import Precision, Runtime, checked_batch_tokens, checked_option
from anysplade.model.saved import resolve_model
from anysplade.search.documents import EncodedDocument, check_documents
from anysplade.search.filters import Filter, explain_filter
from anysplade.search.fusion import DEPTH, Fusion
from anysplade.search.fusion import fuse as fuse_rankings
from anysplade.search.hits import Hit, Hits, Part, check_count, check_query, explain_score
from anysplade.search.index_model import FORMAT, IndexModel, WithModel
from anysplade.search.lexical import Lexical, check_lexical
from anysplade.search.rescoring import Rescorer, Rescoring, check_depth
from anysplade.search.store import Store
from anysplade.search.vectors import OwnTerms


class Changes(NamedTuple):
    """Numbers of documents that a call of ``Index.build`` changed."""

    added: int = 0
    replaced: int = 0
    deleted: int = 0


class Query(NamedTuple):
    """What a search compares with documents."""

    vector: sparse.csr_matrix  # (1, terms): of the model, then of the stems
    words: dict[int, str]  # the words of the query by the terms that are stems


_Ranked = tuple[int, float, dict[str, Part] | None]  # position, score, and its parts


class Index(WithModel, Rescoring):
    """Documents encoded by a model, on disk. Build one with ``Index.build``, open it with ``Index.load``.

    ``store`` holds the documents and their vectors, and searches by vector. ``about`` describes how the index was made, and
    ``changes`` counts what ``build`` changed. ``encoder`` is the model, and ``queries`` encodes queries; both are opened on first
    use, and raise ModelError if the model is missing or is not the one that built the index.
    """

    def __init__(self, folder: Path, model: IndexModel) -> None:
        self.folder = folder
        self.about = dict(model.about)
        self.changes = Changes()
        lexical = None
        if self.about.get("with_bm25"):
            lexical = Lexical(self.about["vocabulary"], self.about["average_length"], self.about["language"])
        self.store = Store(folder, self.about["vocabulary"], lexical)
        self._model = model
        if self.about["model"] is None:
            names = self.store.term_names() or [f"[term:{term}]" for term in range(self.about["vocabulary"])]
            model.queries = OwnTerms(folder, names)

    @classmethod
    def build(
        cls,
        model: str | Path,
        corpus: str | Path | Mapping[str, Document],
        output: str | Path,
        *,
        runtime: Runtime = "auto",
        precision: Precision = "float32",
        top_k: int | None = None,
        max_length: int | None = None,
        workers: int | None = None,
        batch_tokens: int | None = None,
        ray: bool = False,
        lexical: float | None = None,
        with_bm25: bool = False,
        language: str = "auto",
        progress: bool = False,
    ) -> "Index":
        """Encode a corpus and index it. After an interruption, the same call continues.

        After the corpus changed, the same call adds, replaces and deletes the documents that differ, and encodes no others. A
        corpus that cannot be read to its end changes nothing. The index refers to the model and does not copy it. An unfinished
        index cannot be opened; an index whose update was interrupted can, with some of the changes.

        Args:
            model: a sparse encoder's folder or hub id.
            corpus: a source of ``read_corpus``, or documents by id.
            output: the folder of the index.
            runtime: how documents are encoded; see ``for_inference``.
            precision: of the encoding; see ``for_inference``. All but float32 are approximations, and recorded. "auto" is the
                precision of the index if there is one, else bfloat16 if the machine has bfloat16 products.
            top_k: keep only this many weights of each document, the largest: an approximation, and recorded.
            max_length: tokens that are read of a document or query; see ``open_encoder``. The number of documents that are cut
                is logged.
            workers: number of processes that encode, each with its own model; one per GPU by default, if there are several and
                many documents.
            batch_tokens: tokens that go through the model together; by default 1,024 on a CPU, more on a GPU by its free memory.
            ray: encode on a Ray cluster instead, with this number of workers.
            lexical: add BM25 to the scores, times this weight, such as 3: it gives back the words of a text that the model forgot.
                The stems of a document are further terms of its vector, weighted with the corpus's average length at the first
                build, so that later documents do not change stored weights.
            with_bm25: also keep the stems that BM25 needs; searches use them if they fuse both rankings.
            language: of the stemmer and the stop words of BM25, by its English name or ISO 639-1 code; auto is that of most
                documents, none is neither.

        Raises:
            OutputError: the folder is not empty, or holds an index that was made with other options or changed by ``add`` or
                ``delete``; or another process builds it.
            ModelError, DataError: the model or the corpus cannot be read; see ``open_encoder`` and ``read_corpus``.
        """
        from anysplade.search.build import build_index
        from anysplade.search.document_encoding import Options, check_encoding

        if not isinstance(corpus, str | Path):
            corpus = check_documents(corpus)
        top_k, max_length, workers = check_encoding(top_k, max_length, workers)
        stems = check_lexical(lexical, with_bm25, language)
        options = Options(resolve_model(model), precision, top_k, max_length, runtime)
        encoding: dict[str, Any] = {"workers": workers, "batch_tokens": checked_batch_tokens(batch_tokens)}
        encoding |= {"ray": ray, "progress": progress}
        return build_index(corpus, user_path(output), options, stems, **encoding)

    @classmethod
    def from_vectors(
        cls, vectors: str | Path, output: str | Path, model: str | Path | None = None, *, progress: bool = False
    ) -> "Index":
        """Index documents by vectors that other software computed. After an interruption, the same call continues.

        Memory is bounded, whatever the number of documents. An index of more than 500,000 documents has no engine: searches
        are exact, from files that are mapped.

        Args:
            vectors: a file, or a folder of files, whose names end in .jsonl or .json (Anserini's JSON vectors: a line has an id,
                contents and a vector of terms with weights; also with .gz), .npz (a CSR matrix of scipy.sparse.save_npz, with its
                ids, one a line, in NAME.ids.txt beside it) or .parquet (columns id, indices and values).
            output: the folder of the index.
            model: the encoder of the vectors, a folder or hub id, which encodes queries. Without it, queries are given as vectors,
                to ``search_vector``, and the names of terms in the files are numbered in their order.

        Raises:
            OutputError: the folder is not empty, or holds an index of other vectors or of another model.
            DataError: the vectors cannot be read, an id is a duplicate, or a vector is malformed.
            ModelError: there is no such model.
        """
        from anysplade.search.vector_build import build_from_vectors

        return build_from_vectors(vectors, user_path(output), model, progress)

    @classmethod
    def load(
        cls, folder: str | Path, model: str | Path | None = None, *, runtime: Runtime = "auto", precision: Precision = "float32"
    ) -> "Index":
        """Open the index in a ``folder``.

        Args:
            model: the path or hub id of the index's model, if it moved; by default where it was, or was relative to the index.
            runtime: how texts are encoded; see ``for_inference``.
            precision: of the encoding of queries; see ``for_inference``. All but float32 are approximations.

        Raises:
            DataError: there is no index, or it is unfinished, damaged or of another format.
        """
        require("folder", folder, (str, Path), "give an index's folder")
        folder = user_path(folder)
        about = read_about(folder)
        if about.get("format") != FORMAT:
            raise DataError(f"{folder}: an index of format {about.get('format')}, this version reads {FORMAT}; build it again")
        if not about["complete"]:
            raise DataError(f"{folder}: an unfinished index; build it again in the same way, and it continues")
        return cls(folder, IndexModel(about, folder, model, runtime, precision))

    def close(self) -> None:
        """Release the engine, so that another process can write to the index."""
        self.store.close()

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.store)

    def __repr__(self) -> str:
        if self.store.closed:
            return f"Index({str(self.folder)!r}: closed)"
        return f"Index({str(self.folder)!r}: {len(self):,} documents, model {self.about['model']!r})"

    def describe(self) -> dict[str, Any]:
        """``about`` with the current number of documents, their mean active dims, and their mean stems; reads all documents."""
        count, stems = len(self), self.store.lexical_postings
        dims = {"document_active_dims": (self.store.postings - stems) / max(1, count)}
        if self.store.lexical is not None:
            dims["document_lexical_dims"] = stems / max(1, count)
        return self.about | {"documents": count} | dims

    def add(self, documents: Mapping[str, Document], progress: bool = False) -> None:
        """Encode ``documents`` by id as the index was encoded, and add them or replace those with the same id.

        After that, ``build`` no longer updates the index from its corpus.

        Raises:
            OutputError: another process holds the index, or it is read-only.
            OptionError: ``documents`` does not map ids to ``Document``, or the index is closed.
            DataError: a document is malformed, such as metadata that JSON cannot hold; nothing is added.
            ModelError: the model is missing, was changed, or gives a vector that cannot be indexed.
        """
        documents = check_documents(documents)
        self.store.require_writable()  # before hours of encoding
        for batch in self._encode(documents.items(), progress=progress):
            self.store.put(batch, manual=True)

    def delete(self, ids: Iterable[str]) -> int:
        """Delete the documents with these ``ids``, and return how many there were.

        After that, ``build`` no longer updates the index from its corpus.

        Raises:
            OutputError: another process holds the index, or it is read-only.
            OptionError: ``ids`` is not a list of texts, or the index is closed.
        """
        return self.store.delete(require_list("ids", ids, "id"), manual=True)

    def snapshot(self, folder: str | Path) -> None:
        """Copy the index to a new ``folder``, consistently even during writes. Opening the copy builds its engine.

        Raises:
            OutputError: the folder is not empty.
        """
        folder = user_path(folder)
        self.store.snapshot(folder)
        about = dict(self.about)
        for name in ("model_beside", "corpus_beside"):
            if name in about:
                about[name] = os.path.relpath(self.folder.resolve() / about[name], folder.resolve())
        write_about(folder, about)

    def search(
        self,
        query: str,
        k: int = 10,
        explain: bool = False,
        filter: Filter | None = None,
        exact: bool = False,
        *,
        fuse: Fusion | None = None,
        rerank: str | Path | None = None,
        rerank_depth: int = 100,
    ) -> Hits:
        """Find the ``k`` documents with the highest scores above 0 for a ``query``; ties keep the order of addition.

        Args:
            explain: return the terms that query and document share; their products sum to the score.
            filter: metadata that hits must have: ``{"lang": "en"}``, or a list for any of several values. Numbers and bools equal
                their texts; case and surrounding blanks do not matter.
            exact: search all vectors in float64, not the engine, which computes in float32.
            fuse: fuse the first 1,000 hits of the model with those of BM25: rrf adds up 1 / (60 + rank), wsum averages the scores,
                each ranking's scaled from 0 to 1; needs an index with BM25.
            rerank: folder or hub id of a cross-encoder, which gives the first hits new scores and ranks them by these.
            rerank_depth: number of hits that the cross-encoder scores.

        Raises:
            OptionError: the query is empty, k is below 1 or above ``rerank_depth``, no document has a name of the filter, or the
                index has no stems to fuse with.
            ModelError: the model of the index is missing or was changed, or ``rerank`` is no cross-encoder.
        """
        check_query(query)
        k = check_count("k", k)
        self.check_fusion(fuse)  # before the model is opened
        options: dict[str, Any] = {"fuse": fuse, "rerank": rerank, "rerank_depth": rerank_depth}
        return self.search_vector(self.queries.encode([query]), k, explain, filter, exact, text=query, **options)

    def search_vector(
        self,
        vector: sparse.csr_matrix,
        k: int = 10,
        explain: bool = False,
        filter: Filter | None = None,
        exact: bool = False,
        *,
        text: str | None = None,
        fuse: Fusion | None = None,
        rerank: "str | Path | Rescorer | None" = None,
        rerank_depth: int = 100,
    ) -> Hits:
        """``search`` with the ``vector`` of a query, (1, vocabulary).

        ``k``, ``explain``, ``filter``, ``exact``, ``fuse``, ``rerank`` and ``rerank_depth`` are the same.

        Args:
            text: of the query, for all that is not the model's: BM25 and the cross-encoder. Without it, the score is the model's.

        Raises:
            OptionError: as in ``search``, or ``fuse`` or ``rerank`` has no text.
        """
        k = check_count("k", k)
        depth = k if rerank is None else check_depth(k, rerank_depth)
        if text is None and not fuse is rerank is None:
            raise OptionError("`fuse` and `rerank` read the query's text; give it as `text`")
        self.check_fusion(fuse)
        with self.store.reading():  # without it, a document could be deleted between the search and its fetching
            query = self.complete(vector, text, fuse, explain)
            found = self._rank(query, depth, fuse, filter, exact)
            documents = self.store.documents([position for position, _, _ in found])
            hits = Hits(note=None if found else explain_filter(self.store, filter))
        for (_, score, parts), (id_, content, terms, weights) in zip(found, documents, strict=True):
            matches = explain_score(self.queries.term_names, query.vector, terms, weights, query.words) if explain else None
            if matches is not None and fuse is None:
                score = sum(match.product for match in matches)
            hits.append(Hit(id_, score, content.title, content.text, content.metadata, matches, parts))
        if rerank is None or text is None:
            return hits
        return self._open_rescorer(rerank).rescore(text, hits, k)

    def check_fusion(self, fuse: Fusion | None) -> None:
        """Raise OptionError if ``fuse`` is unknown, or the index has no stems to fuse with."""
        if checked_option("`fuse`", fuse, Fusion | None) is not None:
            self.store.require_stems()

    def complete(self, vector: sparse.csr_matrix, text: str | None, fuse: Fusion | None = None, explain: bool = False) -> Query:
        """The query of a ``vector``, (1, vocabulary), with the stems of its ``text`` if they count; with ``fuse`` they do.

        With ``explain`` it has the words of the stems.
        """
        weight = 1.0 if fuse is not None else self.about.get("lexical")
        if weight is None or text is None:
            return Query(vector, {})
        terms, weights, words = self.store.query_stems(text, explain)
        indices = np.concatenate([vector.indices, terms])
        data = np.concatenate([vector.data, weights * np.float32(weight)])
        return Query(sparse.csr_matrix((data, indices, [0, len(indices)]), shape=(1, self.store.width)), words)

    def encode_queries(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """The vectors of queries as a search compares them with documents: (texts, terms), stems included if scores have BM25."""
        rows = [self.complete(vector, text).vector for vector, text in zip(self.queries.encode(texts), texts, strict=True)]
        return sparse.vstack(rows, format="csr") if rows else sparse.csr_matrix((0, self.store.width), dtype=np.float32)

    @property
    def term_names(self) -> list[str]:
        """The name of each term of the documents by id: those of the model, then ``stem:retriev`` for stems."""
        return [*self.queries.term_names, *self.store.stem_names()]

    def _rank(self, query: Query, k: int, fuse: Fusion | None, filter: Filter | None, exact: bool) -> list[_Ranked]:
        terms, weights = query.vector.indices, query.vector.data
        if fuse is None:
            return [(*found, None) for found in self.store.search(terms, weights, k, filter, exact)]
        stems = int(np.searchsorted(terms, self.about["vocabulary"]))
        rankings = {
            name: dict(self.store.search(terms[part], weights[part], DEPTH, filter, exact))
            for name, part in (("model", slice(stems)), ("bm25", slice(stems, None)))
        }
        parts: dict[int, dict[str, Part]] = {}  # by position
        for name, ranking in rankings.items():
            for rank, (position, score) in enumerate(ranking.items(), 1):
                parts.setdefault(position, {})[name] = Part(rank, score)
        fused = fuse_rankings(list(rankings.values()), fuse)
        return [(position, score, parts[position]) for position, score in islice(fused.items(), k)]

    def rank(self, vectors: sparse.csr_matrix, k: int, filter: Filter | None = None, exact: bool = False) -> list[dict[str, float]]:
        """The scores by document id, the best first, that ``search_vector`` finds for each of several queries.

        Args:
            vectors: what ``encode_queries`` returns, (queries, terms).
            k: the largest number of hits per query.
            filter: as in ``search``.
            exact: as in ``search``.

        Raises:
            OptionError: no document has a name of the filter.
        """
        with self.store.reading():
            found = self.store.search_rows(vectors, k, filter, exact)
            return [dict(zip(self.store.ids([hit[0] for hit in hits]), (hit[1] for hit in hits), strict=True)) for hits in found]

    def _encode(self, documents: Iterable[tuple[str, Document]], **encoding: Any) -> Iterator[list[EncodedDocument]]:
        """Encode documents as those in the index were."""
        from anysplade.search.document_encoding import Options, encode_documents

        precision, top_k, max_length = self.about["precision"], self.about["top_k"], self.about.get("max_length")
        options = Options(self._model.source, precision, top_k, max_length, self._model.runtime)
        return encode_documents(documents, options, encoder=lambda: self._model.documents, **encoding)

    def _write(self, about: dict[str, Any]) -> None:
        self.about = about
        write_about(self.folder, about)


def read_about(folder: Path) -> dict[str, Any]:
    """The description of the index in a folder.

    Raises:
        DataError: there is none, or it is damaged or cannot be read.
    """
    try:
        return dict(json.loads((folder / "index.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        kind, build = held(folder), "build one first: anysplade index MODEL CORPUS --out INDEX"
        hint = near(folder) or (f", but {kind}; {build}" if kind else f"; {build}")
        raise DataError(f"{folder}: no index there (index.json is missing){hint}") from None
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be read here (index.json: {error.strerror}); change its permissions, or copy it"
        ) from error
    except ValueError as error:
        raise DataError(f"{folder}: the index is damaged (index.json: {error}); build it again") from error


def write_about(folder: Path, about: dict[str, Any]) -> None:
    write_record(folder / "index.json", about)
