"""An index in a folder: a corpus encoded by a model, searched by text, and why a document matched."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from sentence_transformers import SparseEncoder
from tqdm import tqdm

from anysplade.datasets import Document
from anysplade.encoder import fingerprint, open_encoder, term_names
from anysplade.encoding import encode, prune
from anysplade.errors import AnyspladeError, DataError, ModelError, OptionError, OutputError
from anysplade.files import write_whole
from anysplade.head import resolve_model
from anysplade.options import Precision
from anysplade.provenance import provenance
from anysplade.records import Filter, Hit, TermMatch
from anysplade.shards import as_encoded, encode_corpus, read_documents
from anysplade.store import BATCH, Store

FORMAT = 3


class Index:
    """Documents encoded by a model, on disk. Build one with ``Index.build``, open it with ``Index.load``.

    ``store`` has the documents and their vectors, and searches by vector.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder = folder
        self.about = about
        self.store = Store(folder, about["vocabulary"])
        self._encoder: SparseEncoder | None = None

    @classmethod
    def build(
        cls,
        model: str | Path,
        corpus: str | Path | Mapping[str, Document],
        output: str | Path,
        *,
        precision: Precision = "float32",
        top_k: int | None = None,
        workers: int = 1,
        ray: bool = False,
        progress: bool = False,
    ) -> "Index":
        """Encode a corpus and index it. Interrupted and called again with the same arguments, it goes on.

        The model is referred to, not copied. An unfinished index cannot be opened.

        Args:
            corpus: what ``iter_corpus`` reads, or documents by id.
            precision: of encoding; see ``anysplade.encoding.encode``.
            top_k, workers, ray: see ``anysplade.shards.encode_corpus``.

        Raises:
            OutputError: the folder is not empty, or holds an index made in another way.
            ModelError, DataError: as ``open_encoder`` and ``iter_corpus`` do.
        """
        output = Path(output).expanduser()
        source = resolve_model(model)
        asked = describe_model(source) | {
            "corpus": str(corpus) if isinstance(corpus, str | Path) else "documents in memory",
            "precision": precision,
            "top_k": top_k,
        }
        about = _claim(output, asked)
        if about is not None and about["complete"]:
            if not isinstance(corpus, str | Path):
                raise OutputError(f"{output}: the folder is not empty: it holds an index; load it, and add to it")
            return cls.load(output)
        new = not output.exists() or not any(output.iterdir())
        try:
            if isinstance(corpus, str | Path):
                options: dict[str, Any] = {"precision": precision, "top_k": top_k, "workers": workers, "ray": ray}
                manifest = encode_corpus(source, corpus, output / "shards", progress=progress, **options)
                index = cls._begin(output, asked | {"vocabulary": manifest["vocabulary"]})
                index._take_in(manifest, corpus, progress)
            else:
                encoder = open_encoder(source)
                index = cls._begin(output, asked | {"vocabulary": encoder.get_embedding_dimension()})
                index._encoder = encoder
                index.add(corpus, progress=progress)
        except AnyspladeError:
            if new and not any((output / "shards").glob("*.npz")):  # what was encoded is kept; it can have taken hours
                shutil.rmtree(output, ignore_errors=True)
            raise
        index.store.optimize()
        index.about |= {
            "complete": True,
            "documents": len(index),
            "document_active_dims": index.store.postings / max(1, len(index)),
            "provenance": provenance(),
        }
        write_whole(output / "index.json", json.dumps(index.about, indent=2) + "\n")
        shutil.rmtree(output / "shards", ignore_errors=True)
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

    @classmethod
    def load(cls, folder: str | Path) -> "Index":
        """Open an index.

        Raises:
            DataError: no index there, an unfinished one, a damaged one, or one of another format.
        """
        folder = Path(folder).expanduser()
        if not (folder / "index.json").is_file():
            raise DataError(
                f"{folder}: no index there (index.json is missing); build one with: anysplade index MODEL CORPUS --out {folder}"
            )
        try:
            about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{folder}: the index is damaged (index.json: {error}); build it again") from error
        if about.get("format") != FORMAT:
            raise DataError(f"{folder}: an index of format {about.get('format')}, this version reads {FORMAT}; build it again")
        if not about["complete"]:
            raise DataError(f"{folder}: an index whose making was interrupted; run the same index command again, it goes on")
        return cls(folder, about)

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
            self._encoder = open_same_model(self.about["model"], self.about["model_fingerprint"], str(self.folder))
        return self._encoder

    def add(self, documents: Mapping[str, Document], progress: bool = False) -> None:
        """Add documents, or replace those whose id is there already.

        Raises:
            OutputError: another process holds the index.
            ModelError: the model is gone, was changed, or gives a vector that cannot be indexed.
        """
        ids = list(documents)
        for start in range(0, len(ids), BATCH):
            part = {id_: documents[id_] for id_ in ids[start : start + BATCH]}
            texts = [document.full_text for document in part.values()]
            rows = encode(self.encoder, texts, "document", precision=self.about["precision"], progress=progress)
            if self.about["top_k"] is not None:
                rows = prune(rows, self.about["top_k"])
            self.store.put(as_encoded(list(part), list(part.values()), rows))

    def delete(self, ids: Iterable[str]) -> int:
        """Remove documents; how many of them there were.

        Raises:
            OutputError: another process holds the index.
        """
        return self.store.delete(ids)

    def snapshot(self, folder: str | Path) -> None:
        """A consistent copy, also while the index is written to; its engine is made when it is first opened.

        Raises:
            OutputError: the folder is not empty.
        """
        folder = Path(folder).expanduser()
        self.store.snapshot(folder)
        write_whole(folder / "index.json", json.dumps(self.about, indent=2) + "\n")

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


def open_same_model(name: str, known: str | None, where: str) -> SparseEncoder:
    """The model that something was made with.

    Raises:
        ModelError: it is gone, or is another one by now.
    """
    encoder = open_encoder(name)
    if fingerprint(resolve_model(name)) != known:
        raise ModelError(f"{name}: the model changed since {where} was built; build the index again")
    return encoder


def describe_model(source: str) -> dict[str, Any]:
    """What an index says of its model."""
    place = str(Path(source).resolve()) if Path(source).is_dir() else source
    return {"format": FORMAT, "model": place, "model_fingerprint": fingerprint(source)}


def _claim(output: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier call left in the folder, if it was for the same index."""
    if not (output / "index.json").is_file():
        inside = {path.name for path in output.iterdir()} if output.is_dir() else set()
        unfinished = {name for name in inside if name in ("shards", "engine") or name.startswith("documents.sqlite")}
        if output.is_file() or inside - unfinished or (inside and "shards" not in inside):
            raise OutputError(f"{output}: the folder is not empty; name a new one with --out, or remove it first")
        return None
    about = json.loads((output / "index.json").read_text(encoding="utf-8"))
    different = [name for name in asked if about.get(name) != asked[name]]
    if different:
        raise OutputError(
            f"{output}: the folder is not empty: it holds an index with another {', '.join(different)}; name a new one with --out"
        )
    return about
