"""An index in a folder: a corpus encoded by a model, searched by text, and why a document matched."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from sentence_transformers import SparseEncoder
from tqdm import tqdm

from anysplade._common.files import write_whole
from anysplade._common.provenance import provenance
from anysplade.data.collections import Document, empty_corpus, iter_corpus
from anysplade.errors import AnyspladeError, DataError, ModelError, OptionError, OutputError
from anysplade.model.encoder import fingerprint, open_encoder, term_names
from anysplade.model.encoding import count_cut, encode, in_precision, resolve_precision, say_cut
from anysplade.model.head import resolve_model
from anysplade.model.options import Precision
from anysplade.search.documents import Encoded, Filter, Hit, TermMatch
from anysplade.search.shards import as_encoded, corpus_name, encode_corpus, encode_documents, read_documents
from anysplade.search.store import BATCH, Store

FORMAT = 3


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

    def __init__(self, folder: Path, about: dict[str, Any], model: str | Path | None = None) -> None:
        self.folder = folder
        self.about = about
        self.changes = Changes()
        self.store = Store(folder, about["vocabulary"])
        self._model = model
        self._encoder: SparseEncoder | None = None
        self._document_encoder: SparseEncoder | None = None

    @classmethod
    def build(
        cls,
        model: str | Path,
        corpus: str | Path | Mapping[str, Document],
        output: str | Path,
        *,
        precision: Precision = "float32",
        top_k: int | None = None,
        max_length: int | None = None,
        workers: int = 1,
        ray: bool = False,
        progress: bool = False,
    ) -> "Index":
        """Encode a corpus and index it. Interrupted and called again with the same arguments, it goes on.

        Called again when the corpus changed, it adds, replaces and deletes what differs, and encodes nothing else; a
        corpus that cannot be read to its end changes nothing. The model is referred to, not copied. An unfinished index
        cannot be opened; one whose update was interrupted can, and has a part of the changes until the next call.

        Args:
            corpus: what ``iter_corpus`` reads, or documents by id.
            precision: of encoding; see ``anysplade.model.encoding.in_precision``. "auto" is that of the index if there is one.
            max_length: tokens a text is cut to, queries too; see ``open_encoder``. How many documents are cut is logged.
            top_k: see ``anysplade.search.shards.encode_corpus``.
            workers: likewise; documents in memory are encoded by this process.
            ray: likewise.

        Raises:
            OutputError: the folder is not empty, or holds an index made in another way, or one that ``add`` or
                ``delete`` changed since.
            ModelError, DataError: as ``open_encoder`` and ``iter_corpus`` do.
        """
        output = Path(output).expanduser()
        source = resolve_model(model)
        on_disk = isinstance(corpus, str | Path)
        asked = describe_model(source, output) | {
            "corpus": corpus_name(corpus) if isinstance(corpus, str | Path) else "documents in memory",
            "precision": precision,
            "top_k": top_k,
            "max_length": max_length,
        }
        about = _claim(output, asked)
        asked["precision"] = used = resolve_precision(precision) if about is None else about["precision"]
        options: dict[str, Any] = {"precision": used, "top_k": top_k, "max_length": max_length}
        options |= {"workers": workers, "ray": ray, "progress": progress}

        def documents() -> Iterable[tuple[str, Document]]:
            return iter_corpus(corpus) if isinstance(corpus, str | Path) else corpus.items()

        def made(changed: Iterable[tuple[str, Document]]) -> Iterator[Iterable[Encoded]]:
            return encode_documents(changed, source, output / "update", **options)

        if about is not None and about["complete"]:
            if not on_disk:
                raise OutputError(f"{output}: the folder is not empty: it holds an index; load it, and add to it")
            index = cls.load(output, source)
            if index.store.edited:
                raise OutputError(
                    f"{output}: add or delete changed this index since it was built, and an update from {corpus} would undo that; "
                    "go on with add and delete, or build a new one with another --out"
                )
            index.changes = index._update(documents, made, corpus)
            moved = index.about | asked != index.about
            if any(index.changes):
                index.about["updated"] = index.changes._asdict() | {"provenance": provenance()}
            if any(index.changes) or moved:
                index._write(index.about | asked)
        else:
            new = not output.exists() or not any(output.iterdir())
            try:
                if isinstance(corpus, str | Path):
                    manifest = encode_corpus(source, corpus, output / "shards", **options)
                    index = cls._begin(output, asked | {"vocabulary": manifest["vocabulary"]})
                    index._take_in(manifest, corpus, progress)
                else:
                    encoder = open_encoder(source, max_length=max_length)
                    index = cls._begin(output, asked | {"vocabulary": encoder.get_embedding_dimension()})
                    index._encoder = encoder
                if about is not None or not on_disk:  # what an interrupted call took in need not be what the corpus is now
                    index._update(documents, made if on_disk else lambda changed: index._encoded(changed, progress), corpus)
            except AnyspladeError:
                if new and not any((output / "shards").glob("*.npz")):  # what was encoded is kept; it can have taken hours
                    shutil.rmtree(output, ignore_errors=True)
                raise
            index.store.optimize()
            index._write(index.about | {"complete": True, "provenance": provenance()})
            index.changes = Changes(added=len(index))
        for name in ("shards", "update"):
            shutil.rmtree(output / name, ignore_errors=True)
        return index

    @classmethod
    def _begin(cls, output: Path, about: dict[str, Any]) -> "Index":
        """An empty index, or the unfinished one; the description is written last, so that what has one has all."""
        about = about | {"complete": False}
        if not (output / "index.json").exists():
            Store.create(output)
            write_whole(output / "index.json", json.dumps(about, indent=2) + "\n")
        return cls(output, about)

    def _take_in(self, manifest: dict[str, Any], corpus: str | Path, progress: bool) -> None:
        """The shards' vectors with the corpus's texts, a transaction each; those that are in are passed over."""
        shards = read_documents(
            self.folder / "shards", manifest, corpus, f"remove {self.folder} and start again", self.store.shards
        )
        for number, documents in tqdm(shards, desc="indexing", unit="shard", disable=not progress, leave=False):
            self.store.put(documents, number)

    def _update(
        self,
        documents: Callable[[], Iterable[tuple[str, Document]]],
        made: Callable[[Iterable[tuple[str, Document]]], Iterator[Iterable[Encoded]]],
        corpus: str | Path | Mapping[str, Document],
    ) -> Changes:
        """Have exactly these documents: read once to compare, and again to change if any differ.

        Args:
            made: encodes those that differ.
        """
        known = self.store.positions()
        kept = np.zeros(len(known), bool)
        count = added = replaced = 0
        for _, _, position, same in self.store.compare(documents()):
            count += 1
            if position is None:
                added += 1
            else:
                replaced += not same
                kept[np.searchsorted(known, position)] = True
        if not count and isinstance(corpus, str | Path):
            raise empty_corpus(corpus)
        gone = known[~kept].tolist()
        if added or replaced or gone:
            self.store.require_writable()  # before hours of encoding
        if added or replaced:
            for batch in made((id_, document) for id_, document, _, same in self.store.compare(documents()) if not same):
                self.store.put(batch)
        for start in range(0, len(gone), BATCH):
            self.store.delete(self.store.ids(gone[start : start + BATCH]))
        if added or replaced or gone:
            self.store.optimize()
        return Changes(added, replaced, len(gone))

    def _encoded(self, documents: Iterable[tuple[str, Document]], progress: bool) -> Iterator[Iterator[Encoded]]:
        """Documents with their vectors, made as those of the index were."""
        iterator, cut, count, limit = iter(documents), 0, 0, None
        while part := list(islice(iterator, BATCH)):
            if self._document_encoder is None:
                self._document_encoder = in_precision(self.encoder, self.about["precision"])
            ids, contents = [id_ for id_, _ in part], [document for _, document in part]
            texts = [document.full_text for document in contents]
            rows = encode(self._document_encoder, texts, "document", ids=ids, top_k=self.about["top_k"], progress=progress)
            some, limit = count_cut(self._document_encoder, texts, "document")
            cut, count = cut + some, count + len(part)
            yield as_encoded(ids, contents, rows)
        say_cut(cut, count, limit, "documents")

    def _write(self, about: dict[str, Any]) -> None:
        self.about = about
        write_whole(self.folder / "index.json", json.dumps(about, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path, model: str | Path | None = None) -> "Index":
        """Open an index.

        Args:
            model: where the model lies that the index was built with, if not where it lay then, nor where it lay as
                seen from the index.

        Raises:
            DataError: no index there, an unfinished one, a damaged one, or one of another format.
        """
        folder = Path(folder).expanduser()
        about = _read_about(folder)
        if about.get("format") != FORMAT:
            raise DataError(f"{folder}: an index of format {about.get('format')}, this version reads {FORMAT}; build it again")
        if not about["complete"]:
            raise DataError(f"{folder}: an index whose making was interrupted; run the same index command again, it goes on")
        return cls(folder, about, model)

    def close(self) -> None:
        """Let go of the engine, so that another process can have it."""
        self.store.close()

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.store)

    @property
    def encoder(self) -> SparseEncoder:
        """The model the index was built with, loaded on first use.

        Raises:
            ModelError: it is gone, or is not the one the index was built with.
        """
        if self._encoder is None:
            self._encoder = open_same_model(self.about, self.folder, self._model)
        return self._encoder

    def describe(self) -> dict[str, Any]:
        """``about``, and what the documents are now: how many, and their active dims; reads all of them."""
        count = len(self)
        return self.about | {"documents": count, "document_active_dims": self.store.postings / max(1, count)}

    def add(self, documents: Mapping[str, Document], progress: bool = False) -> None:
        """Add documents, or replace those whose id is there already, encoded as the index was.

        ``build`` no longer updates the index from its corpus then.

        Raises:
            OutputError: another process holds the index, or it is read-only.
            ModelError: the model is gone, was changed, or gives a vector that cannot be indexed.
        """
        for batch in self._encoded(documents.items(), progress):
            self.store.put(batch, by_hand=True)

    def delete(self, ids: Iterable[str]) -> int:
        """Remove documents; how many of them there were. ``build`` no longer updates the index from its corpus then.

        Raises:
            OutputError: another process holds the index, or it is read-only.
        """
        return self.store.delete(ids, by_hand=True)

    def snapshot(self, folder: str | Path) -> None:
        """A consistent copy, also while the index is written to; its engine is made when it is first opened.

        Raises:
            OutputError: the folder is not empty.
        """
        folder = Path(folder).expanduser()
        self.store.snapshot(folder)
        about = dict(self.about)
        if "model_beside" in about:
            about["model_beside"] = os.path.relpath(self.folder.resolve() / about["model_beside"], folder.resolve())
        write_whole(folder / "index.json", json.dumps(about, indent=2) + "\n")

    def search(
        self, query: str, k: int = 10, explain: bool = False, filter: Filter | None = None, exact: bool = False
    ) -> list[Hit]:
        """The k best documents for a query: scores above 0, best first, ties in the order in which they were added.

        Args:
            explain: with the terms that query and document share, whose products sum to the score.
            filter: metadata that hits must have: ``{"lang": "en"}``, or a list for any of several values.
            exact: search the vectors in memory, in float64, instead of the engine, in float32.

        Raises:
            OptionError: k is below 1.
            ModelError: the index's model is gone or was changed.
        """
        return self.search_vector(encode(self.encoder, [query], "query"), k, explain, filter, exact)

    def search_vector(
        self, vector: sparse.csr_matrix, k: int = 10, explain: bool = False, filter: Filter | None = None, exact: bool = False
    ) -> list[Hit]:
        """``search`` for a query that was encoded before: one row, (1, vocabulary)."""
        if k < 1:
            raise OptionError(f"k is {k}: ask for at least 1 hit")
        found = self.store.search(vector.indices, vector.data, k, filter, exact)
        documents = self.store.documents([position for position, _ in found])
        hits = []
        for (_, score), (id_, content, terms, weights) in zip(found, documents, strict=True):
            matches = explain_score(self.encoder, vector, terms, weights) if explain else None
            score = score if matches is None else sum(match.product for match in matches)
            hits.append(Hit(id_, score, content.title, content.text, content.metadata, matches))
        return hits


def explain_score(encoder: SparseEncoder, query: sparse.csr_matrix, terms: np.ndarray, weights: np.ndarray) -> list[TermMatch]:
    """The terms that a query (one row) and a document share, the largest product first."""
    shared, in_query, in_document = np.intersect1d(query.indices, terms, assume_unique=True, return_indices=True)
    names = term_names(encoder)
    pairs = zip([names[term] for term in shared], query.data[in_query].tolist(), weights[in_document].tolist(), strict=True)
    matches = [TermMatch(name, ours, theirs, ours * theirs) for name, ours, theirs in pairs]
    return sorted(matches, key=lambda match: -match.product)


def open_same_model(about: Mapping[str, Any], where: str | Path, model: str | Path | None = None) -> SparseEncoder:
    """The model that an index was built with: ``model``, or else where it lay then, or as it lay from the index's folder.

    Args:
        about: what ``describe_model`` said.
        where: the index's folder or address.

    Raises:
        ModelError: it is gone, or is another one by now.
    """
    places = [about["model"]] if model is None else [str(model)]
    if model is None and "model_beside" in about:
        places.append(str((Path(where).resolve() / about["model_beside"]).resolve()))
    changed, missing = [], []
    for place in dict.fromkeys(places):
        try:
            source = resolve_model(place)
        except ModelError as error:
            missing.append(str(error))
            continue
        if fingerprint(source) == about["model_fingerprint"]:
            return open_encoder(source, max_length=about.get("max_length"))
        changed.append(source)
    if changed:
        raise ModelError(
            f"{', '.join(changed)}: the model changed since {where} was built; build the index again, or name that model with "
            "--model"
        )
    raise ModelError(f"{where}: its model is not there; name it with --model ({'; '.join(missing)})")


def describe_model(source: str, folder: Path | None = None) -> dict[str, Any]:
    """What an index says of its model.

    Args:
        folder: the index's, from where a model in a folder is found too when both were moved together.
    """
    known = {"format": FORMAT, "model": source, "model_fingerprint": fingerprint(source)}
    if not Path(source).is_dir():
        return known
    place = str(Path(source).resolve())
    return known | {"model": place} | ({} if folder is None else {"model_beside": os.path.relpath(place, folder.resolve())})


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{folder}: no index there (index.json is missing); build one with: anysplade index MODEL CORPUS --out {folder}"
        ) from None
    except OSError as error:
        raise DataError(f"{folder}: cannot be read here (index.json: {error.strerror}); allow it, or copy it") from error
    except ValueError as error:
        raise DataError(f"{folder}: the index is damaged (index.json: {error}); build it again") from error
    return dict(about)


def _claim(output: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier call left in the folder, if it was for the same index."""
    if not (output / "index.json").is_file():
        inside = {path.name for path in output.iterdir()} if output.is_dir() else set()
        unfinished = {name for name in inside if name in ("shards", "engine") or name.startswith("documents.sqlite")}
        if output.is_file() or inside - unfinished or (inside and "shards" not in inside):
            raise OutputError(f"{output}: the folder is not empty; name a new one with --out, or remove it first")
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
            f"{output}: the folder is not empty: it holds an index with another {', '.join(different)}; name a new one with --out"
        )
    return about
