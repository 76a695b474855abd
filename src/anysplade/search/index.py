"""An index in a folder: a corpus encoded by a model, searched by text, and why a document matched.

What encodes documents is imported where it is used: with torch it takes seconds, and queries by token need none of it.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import sparse

from anysplade._common.arguments import near, require
from anysplade._common.files import beside, only_process, require_empty, user_path, write_atomic
from anysplade._common.progress import begin
from anysplade._common.provenance import provenance
from anysplade.data.corpus import Document, empty_corpus, iter_corpus
from anysplade.data.names import held
from anysplade.errors import AnyspladeError, DataError, OutputError
from anysplade.model.options import Precision, Runtime
from anysplade.model.queries import Queries
from anysplade.model.saved import resolve_model
from anysplade.search.documents import (
    EncodedDocument,
    Filter,
    Hit,
    Hits,
    TermMatch,
    check_documents,
    check_encoding,
    check_hits,
    check_query,
    explain_filter,
)
from anysplade.search.index_model import FORMAT, IndexModel, describe_model
from anysplade.search.store import BATCH, Store

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder


class Changes(NamedTuple):
    """Documents that a call of ``Index.build`` changed."""

    added: int = 0
    replaced: int = 0
    deleted: int = 0


class Index:
    """Documents encoded by a model, on disk. Build one with ``Index.build``, open it with ``Index.load``.

    ``store`` has the documents and their vectors, and searches by vector. ``about`` says how they were made, and
    ``changes`` what ``build`` did.
    """

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        model: str | Path | None = None,
        runtime: Runtime = "auto",
        precision: Precision = "float32",
    ) -> None:
        self.folder = folder
        self.about = about
        self.changes = Changes()
        self.store = Store(folder, about["vocabulary"])
        self._runtime: Runtime = runtime
        self._model = IndexModel(about, folder, model, runtime, precision)

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
        workers: int = 1,
        ray: bool = False,
        progress: bool = False,
    ) -> "Index":
        """Encode a corpus and index it. After an interruption, call it again with the same arguments: it continues.

        Called again after the corpus changed, it adds, replaces and deletes the documents that differ, and encodes no others.
        A corpus that cannot be read to its end changes nothing. The index refers to the model and does not copy it. An
        unfinished index cannot be opened; one whose update was interrupted can, with a part of the changes.

        Args:
            model: a sparse encoder's folder or hub id.
            corpus: a source of ``read_corpus``, or documents by id.
            output: the folder of the index.
            runtime: of encoding; see ``for_inference``.
            precision: of encoding documents; see there too. All but float32 are approximations, recorded. "auto" is the
                precision of the index if there is one, else bfloat16 where the machine has bfloat16 products.
            top_k: keep only the ``top_k`` largest weights of each document: an approximation, recorded.
            max_length: tokens to which documents and queries are cut; see ``open_encoder``. The number of cut documents is logged.
            workers: processes that encode, each with the model.
            ray: encode on a Ray cluster with ``workers`` actors instead.

        Raises:
            OutputError: the folder is not empty, or holds an index made in another way, or one that ``add`` or
                ``delete`` changed since; or another process builds it.
            ModelError, DataError: as ``open_encoder`` and ``iter_corpus`` do.
        """
        from anysplade.model.runtimes import resolve_precision
        from anysplade.search.build import corpus_name

        output = user_path(output)
        if not isinstance(corpus, str | Path):
            check_documents(corpus)
        top_k, max_length, workers = check_encoding(top_k, max_length, workers)
        source = resolve_model(model)
        on_disk = isinstance(corpus, str | Path)
        wanted = describe_model(source, output) | {
            "corpus": corpus_name(corpus) if isinstance(corpus, str | Path) else "documents in memory",
            "precision": precision,
            "top_k": top_k,
            "max_length": max_length,
        }
        # Beside the folder: in it, the lock is that of the index's engine.
        with only_process(beside(output, "{}.parts")):
            about = _claim(output, wanted)
            wanted["precision"] = resolve_precision(precision) if about is None else about["precision"]
            encoding: dict[str, Any] = {"workers": workers, "ray": ray, "progress": progress}

            def documents() -> Iterable[tuple[str, Document]]:
                return iter_corpus(corpus, progress=progress) if isinstance(corpus, str | Path) else corpus.items()

            if about is not None and about["complete"]:
                if not on_disk:
                    raise OutputError(f"{output}: the folder is not empty: it holds an index; load it, and add to it")
                index = cls.load(output, source, runtime=runtime)
                if index.store.edited:
                    raise OutputError(
                        f"{output}: add or delete changed this index since it was built, and an update from {corpus} would undo "
                        "that; continue with add and delete, or build a new index in another `output`"
                    )
                # A corpus that cannot be read to its end must change nothing, so it is read once before the first change.
                index.changes, _ = index._differences(documents, corpus, lambda differing: deque(differing, maxlen=0))
                if any(index.changes):
                    index.store.require_writable()  # before hours of encoding
                    index._update(documents, corpus, **encoding)
                    index.about["updated"] = index.changes._asdict() | {"provenance": provenance()}
                if index.about | wanted != index.about or any(index.changes):
                    index._write(index.about | wanted)
                return index
            is_new = not output.exists() or not any(output.iterdir())
            started: Index | None = None
            try:
                index = started = cls._begin(output, wanted, source, runtime)
                index._update(documents, corpus, **encoding)
            except AnyspladeError:
                if is_new and not (started and len(started)):  # what was encoded is kept: it can have taken hours
                    if started is not None:
                        started.close()
                    shutil.rmtree(output, ignore_errors=True)
                raise
            index._write(index.about | {"complete": True, "provenance": provenance()})
            index.changes = Changes(added=len(index))
            shutil.rmtree(output / "shards", ignore_errors=True)  # of a build that an earlier version began
            return index

    @classmethod
    def _begin(cls, output: Path, about: dict[str, Any], source: str, runtime: Runtime) -> "Index":
        """An empty index, or the unfinished one. The description is written last: what has one is complete."""
        if (output / "index.json").exists():
            return cls(output, _read_about(output), source, runtime)
        from anysplade.model.encoder import open_encoder

        encoder = open_encoder(source, max_length=about["max_length"])
        about = about | {"vocabulary": encoder.get_embedding_dimension(), "complete": False}
        Store.create(output)
        write_atomic(output / "index.json", json.dumps(about, indent=2) + "\n")
        index = cls(output, about, source, runtime)
        index._model.source, index._model.encoder = source, encoder
        return index

    def _differences(
        self,
        documents: Callable[[], Iterable[tuple[str, Document]]],
        corpus: object,
        differing: Callable[[Iterator[tuple[str, Document]]], object],
    ) -> tuple[Changes, list[int]]:
        """Compare these documents with the index's, in one pass.

        Args:
            differing: takes those that are new or were changed, while they are read.

        Returns:
            What would have to change, and the positions of documents that are not among these.
        """
        known = self.store.positions()
        kept = np.zeros(len(known), bool)
        count = added = replaced = 0

        def pairs() -> Iterator[tuple[str, Document]]:
            nonlocal count, added, replaced
            for id_, document, position, same in self.store.compare(documents()):
                count += 1
                if position is None:
                    added += 1
                else:
                    replaced += not same
                    kept[np.searchsorted(known, position)] = True
                if not same:
                    yield id_, document

        differing(pairs())
        if not count and isinstance(corpus, str | Path):
            raise empty_corpus(corpus)
        gone: list[int] = known[~kept].tolist()
        return Changes(added, replaced, len(gone)), gone

    def _update(self, documents: Callable[[], Iterable[tuple[str, Document]]], corpus: object, **encoding: Any) -> None:
        """Have exactly these documents. They are read once, and each goes from the encoder into the store."""

        def put(differing: Iterator[tuple[str, Document]]) -> None:
            for batch in self._encode(differing, **encoding):
                self.store.put(batch)

        _, gone = self._differences(documents, corpus, put)
        for start in range(0, len(gone), BATCH):
            self.store.delete(self.store.ids(gone[start : start + BATCH]))
        begin(f"building the engine for {len(self):,} documents", encoding["progress"] and len(self) >= 10_000)
        self.store.optimize()

    def _encode(self, documents: Iterable[tuple[str, Document]], **encoding: Any) -> Iterator[list[EncodedDocument]]:
        """Documents with their vectors, encoded as those of the index were."""
        from anysplade.search.build import Options, encode_documents

        precision, top_k, max_length = self.about["precision"], self.about["top_k"], self.about.get("max_length")
        options = Options(self._model.source, precision, top_k, max_length, self._runtime)
        return encode_documents(documents, options, encoder=lambda: self._model.documents, **encoding)

    def _write(self, about: dict[str, Any]) -> None:
        self.about = about
        write_atomic(self.folder / "index.json", json.dumps(about, indent=2) + "\n")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: str | Path | None = None,
        *,
        runtime: Runtime = "auto",
        precision: Precision = "float32",
    ) -> "Index":
        """Open the index in a ``folder``.

        Args:
            model: the place of the model that the index was built with, if it moved; by default it is looked for in its old
                place, and where it lay relative to the index.
            runtime: of encoding; see ``for_inference``.
            precision: of encoding queries; see there too. All but float32 are approximations.

        Raises:
            DataError: no index there, an unfinished one, a damaged one, or one of another format.
        """
        require("folder", folder, (str, Path), "give an index's folder")
        folder = user_path(folder)
        about = _read_about(folder)
        if about.get("format") != FORMAT:
            raise DataError(f"{folder}: an index of format {about.get('format')}, this version reads {FORMAT}; build it again")
        if not about["complete"]:
            raise DataError(f"{folder}: an unfinished index; build it again in the same way, and it continues")
        return cls(folder, about, model, runtime, precision)

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
        return f"Index({str(self.folder)!r}: {len(self):,} documents, model {self.about['model']!r})"

    @property
    def encoder(self) -> "SparseEncoder":
        """The model the index was built with, loaded on first use.

        Raises:
            ModelError: it is gone, or is not the one the index was built with.
        """
        return self._model.encoder

    @property
    def queries(self) -> Queries:
        """What encodes queries, opened on first use: the model, or its table of weights alone where queries have a weight a token.

        Raises:
            ModelError: the model is gone, or is not the one the index was built with.
        """
        return self._model.queries

    def describe(self) -> dict[str, Any]:
        """``about``, and what the documents are now: how many, and their active dims; reads all of them."""
        count = len(self)
        return self.about | {"documents": count, "document_active_dims": self.store.postings / max(1, count)}

    def add(self, documents: Mapping[str, Document], progress: bool = False) -> None:
        """Add documents, or replace those whose id is there already, encoded as the index was.

        ``build`` no longer updates the index from its corpus then.

        Raises:
            OutputError: another process holds the index, or it is read-only.
            OptionError: what is given is no mapping of ids to ``Document``.
            ModelError: the model is gone, was changed, or gives a vector that cannot be indexed.
        """
        check_documents(documents)
        for batch in self._encode(documents.items(), progress=progress):
            self.store.put(batch, manual=True)

    def delete(self, ids: Iterable[str]) -> int:
        """Remove the documents with these ``ids``, and return how many there were. ``build`` no longer updates the index then.

        Raises:
            OutputError: another process holds the index, or it is read-only.
        """
        return self.store.delete(ids, manual=True)

    def snapshot(self, folder: str | Path) -> None:
        """Copy the index to a new ``folder``, consistently even while it is written to. The engine is built at the first opening.

        Raises:
            OutputError: the folder is not empty.
        """
        folder = user_path(folder)
        self.store.snapshot(folder)
        about = dict(self.about)
        if "model_beside" in about:
            about["model_beside"] = os.path.relpath(self.folder.resolve() / about["model_beside"], folder.resolve())
        write_atomic(folder / "index.json", json.dumps(about, indent=2) + "\n")

    def search(self, query: str, k: int = 10, explain: bool = False, filter: Filter | None = None, exact: bool = False) -> Hits:
        """Find the ``k`` documents of the highest score above 0 for a ``query``; ties keep the order in which they were added.

        Args:
            explain: return the terms that query and document share; their products sum to the score.
            filter: metadata that hits must have: ``{"lang": "en"}``, or a list for any of several values. Numbers and truth values
                are the same as their texts; neither blanks around a text nor its case matter.
            exact: search the vectors in memory, in float64, instead of the engine, in float32.

        Raises:
            OptionError: k is below 1, or no document has a name of the filter.
            ModelError: the index's model is gone or was changed.
        """
        check_query(query)
        return self.search_vector(self.queries.encode([query]), check_hits(k), explain, filter, exact)

    def search_vector(
        self, vector: sparse.csr_matrix, k: int = 10, explain: bool = False, filter: Filter | None = None, exact: bool = False
    ) -> Hits:
        """``search`` with the ``vector`` of a query, (1, vocabulary), in place of its text; the other arguments are the same:
        ``k``, ``explain``, ``filter``, ``exact``.

        Raises:
            OptionError: k is below 1, or no document has a name of the filter.
        """
        k = check_hits(k)
        with self.store.reading():  # or a document that was found could be gone when it is fetched
            found = self.store.search(vector.indices, vector.data, k, filter, exact)
            documents = self.store.documents([position for position, _ in found])
        hits = Hits()
        for (_, score), (id_, content, terms, weights) in zip(found, documents, strict=True):
            matches = explain_score(self.queries.term_names, vector, terms, weights) if explain else None
            score = score if matches is None else sum(match.product for match in matches)
            hits.append(Hit(id_, score, content.title, content.text, content.metadata, matches))
        return hits

    def explain_filter(self, filter: Filter | None) -> str | None:
        """Why a search with a ``filter`` found nothing, in one line; None without a filter.

        Raises:
            OptionError: no document has a name of the filter.
        """
        return explain_filter(self.store, filter)


def explain_score(names: Sequence[str], query: sparse.csr_matrix, terms: np.ndarray, weights: np.ndarray) -> list[TermMatch]:
    """The terms, with their names, that a query (one row) and a document share, the largest product first."""
    shared, in_query, in_document = np.intersect1d(query.indices, terms, assume_unique=True, return_indices=True)
    pairs = zip([names[term] for term in shared], query.data[in_query].tolist(), weights[in_document].tolist(), strict=True)
    matches = [TermMatch(name, ours, theirs, ours * theirs) for name, ours, theirs in pairs]
    return sorted(matches, key=lambda match: -match.product)


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder}: {_no_index(folder)}") from None
    except OSError as error:
        raise DataError(f"{folder}: cannot be read here (index.json: {error.strerror}); allow it, or copy it") from error
    except ValueError as error:
        raise DataError(f"{folder}: the index is damaged (index.json: {error}); build it again") from error
    return dict(about)


def _no_index(folder: Path) -> str:
    """What a folder holds instead, and how to come to an index."""
    kind, build = held(folder), "build one first: anysplade index MODEL CORPUS --out INDEX"
    hint = near(folder)
    return f"no index there (index.json is missing){hint}" + ("" if hint else f", but {kind}; {build}" if kind else f"; {build}")


def _claim(output: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier call left in the folder, if it was for the same index."""
    if not (output / "index.json").is_file():
        inside = {path.name for path in output.iterdir()} if output.is_dir() else set()
        unfinished = {name for name in inside if name in ("shards", "engine") or name.startswith("documents.sqlite")}
        if output.exists() and not output.is_dir():
            require_empty(output)
        if inside - unfinished:
            raise OutputError(f"{output}: the folder is not empty; name another `output`, or remove it first")
        return None
    about = _read_about(output)
    same = {name for name in asked if about.get(name) == asked[name]}
    if asked["precision"] == "auto":
        same.add("precision")
    if asked["model_fingerprint"] is not None and "model_fingerprint" in same:
        same |= {"model", "model_beside"}  # it was moved
    different = [name for name in asked if name not in same and name != "model_beside"]
    if different:
        raise OutputError(
            f"{output}: the folder is not empty: it holds an index with another {', '.join(different)}; name another `output`"
        )
    return about
