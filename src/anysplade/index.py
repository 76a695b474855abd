"""An index on disk: postings and an id table; exact search, and why a document matched.

On disk: ``index.json`` (what it was built from), ``indptr.npy``, ``documents.npy`` and
``weights.npy`` (postings by term, memory-mapped when searched), ``corpus.jsonl`` and
``offsets.npy`` (where each document begins in it).
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from sentence_transformers import SparseEncoder

from anysplade.datasets import Document, hash_texts, read_corpus
from anysplade.encoder import fingerprint, open_encoder
from anysplade.encoding import encode, resolve_precision
from anysplade.errors import DataError, ModelError, OptionError
from anysplade.files import require_empty, whole_folder
from anysplade.head import resolve_model
from anysplade.options import Precision
from anysplade.provenance import provenance

_ARRAYS = {"indptr": np.int64, "documents": np.int32, "weights": np.float32}  # of the postings


@dataclass(frozen=True)
class TermMatch:
    """A term that query and document share; ``product`` is its part of the score."""

    term: str
    query_weight: float
    document_weight: float
    product: float


@dataclass(frozen=True)
class Hit:
    id: str
    score: float
    title: str
    text: str
    terms: list[TermMatch] | None = None  # with explain: largest product first; they sum to the score

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Postings:
    """Documents by term, as a CSC matrix: exact dot products, one term at a time."""

    indptr: np.ndarray  # (vocabulary + 1,)
    documents: np.ndarray  # (nonzeros,) rising within a term
    weights: np.ndarray  # (nonzeros,) float32
    count: int  # of documents

    @classmethod
    def from_documents(cls, matrix: sparse.csr_matrix) -> "Postings":
        columns = matrix.tocsc()
        columns.sort_indices()
        return cls(columns.indptr.astype(np.int64), columns.indices.astype(np.int32), columns.data, matrix.shape[0])

    def top(self, terms: np.ndarray, weights: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k documents of highest score above 0, and their scores in float64; ties by position.

        Time: one pass over the postings of the query's terms and two over the documents' scores.
        """
        scores = np.zeros(self.count)
        for term, weight in zip(terms, weights, strict=True):
            span = slice(self.indptr[term], self.indptr[term + 1])
            scores[self.documents[span]] += np.multiply(self.weights[span], weight, dtype=np.float64)
        if k < self.count:
            bound = np.partition(scores, self.count - k)[self.count - k]
            candidates = np.flatnonzero(scores >= max(bound, np.nextafter(0, 1)))
        else:
            candidates = np.flatnonzero(scores)
        best = candidates[np.argsort(-scores[candidates], kind="stable")][:k]
        return best, scores[best]

    def weight(self, term: int, document: int) -> float:
        start, end = self.indptr[term], self.indptr[term + 1]
        at = start + np.searchsorted(self.documents[start:end], document)
        return float(self.weights[at]) if at < end and self.documents[at] == document else 0.0


class Index:
    """A corpus encoded by a model, on disk. Build one with ``Index.build``, open it with ``Index.load``."""

    def __init__(self, folder: Path, about: dict[str, Any], postings: Postings, encoder: SparseEncoder | None = None) -> None:
        self.folder = folder
        self.about = about
        self.postings = postings
        self._encoder = encoder

    @classmethod
    def build(
        cls,
        model: str | Path,
        corpus: str | Path | dict[str, Document],
        output: str | Path,
        *,
        precision: Precision = "float32",
        progress: bool = False,
    ) -> "Index":
        """Encode a corpus (JSONL file, BEIR folder, ``"python-docs"``, or documents by id) and write its index.

        The folder appears when all is written. The model is referred to, not copied. ``precision``
        is that of encoding; see ``anysplade.encoding.encode``.

        Raises:
            OutputError: the output folder is not empty.
            ModelError, DataError: as ``open_encoder`` and ``read_corpus`` do.
        """
        output = Path(output).expanduser()
        require_empty(output)
        name = str(corpus) if isinstance(corpus, str | Path) else "documents in memory"
        documents = corpus if isinstance(corpus, dict) else read_corpus(corpus, progress=progress)
        encoder = open_encoder(model)
        used = resolve_precision(precision, encoder.device)
        texts = [document.full_text for document in documents.values()]
        postings = Postings.from_documents(encode(encoder, texts, "document", precision=used, progress=progress))
        source = resolve_model(model)
        about = {
            "format": 1,
            "model": str(Path(source).resolve()) if Path(source).is_dir() else source,
            "model_fingerprint": fingerprint(source),
            "corpus": name,
            "data_hash": hash_texts([*documents, *texts]),
            "documents": len(documents),
            "vocabulary": len(postings.indptr) - 1,
            "precision": used,
            "document_active_dims": len(postings.documents) / len(documents),
            "provenance": provenance(),
        }
        with whole_folder(output) as folder:
            for array, type_ in _ARRAYS.items():
                np.save(folder / f"{array}.npy", getattr(postings, array).astype(type_, copy=False))
            offsets = np.zeros(len(documents), np.int64)
            with open(folder / "corpus.jsonl", "wb") as file:
                for i, (id_, document) in enumerate(documents.items()):
                    offsets[i] = file.tell()
                    file.write(json.dumps({"_id": id_} | document._asdict()).encode() + b"\n")
            np.save(folder / "offsets.npy", offsets)
            (folder / "index.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        return cls(output, about, postings, encoder)

    @classmethod
    def load(cls, folder: str | Path) -> "Index":
        """Open an index; its postings stay on disk, memory-mapped.

        Raises:
            DataError: no index there, or a damaged one.
        """
        folder = Path(folder).expanduser()
        if not (folder / "index.json").is_file():
            raise DataError(
                f"{folder}: no index there (index.json is missing); build one with: anysplade index MODEL CORPUS --out {folder}"
            )
        try:
            about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: the index is damaged ({error}); build it again".replace("\n", " ")) from error
        return cls(folder, about, Postings(**arrays, count=about["documents"]))

    def __len__(self) -> int:
        return self.postings.count

    def document(self, position: int) -> tuple[str, Document]:
        """Id and content of the document at a position of the corpus."""
        with open(self.folder / "corpus.jsonl", "rb") as file:
            file.seek(self._offsets[position])
            row = json.loads(file.readline())
        return row["_id"], Document(row["title"], row["text"])

    @cached_property
    def _offsets(self) -> np.ndarray:
        return np.load(self.folder / "offsets.npy", mmap_mode="r")

    @property
    def encoder(self) -> SparseEncoder:
        """The model the index was built with, loaded on first use.

        Raises:
            ModelError: it is gone, or is not the one the index was built with.
        """
        if self._encoder is None:
            name = self.about["model"]
            encoder = open_encoder(name)
            if fingerprint(resolve_model(name)) != self.about["model_fingerprint"]:
                raise ModelError(f"{name}: the model changed since {self.folder} was built; build the index again")
            self._encoder = encoder
        return self._encoder

    def search(self, query: str, k: int = 10, explain: bool = False) -> list[Hit]:
        """The k best documents for a query: exact scores above 0, best first, ties in corpus order.

        Raises:
            OptionError: k is below 1.
            ModelError: the index's model is gone or was changed.
        """
        if k < 1:
            raise OptionError(f"k is {k}: ask for at least 1 hit")
        vector = encode(self.encoder, [query], "query")
        found, scores = self.postings.top(vector.indices, vector.data, k)
        hits = []
        for document, score in zip(found.tolist(), scores.tolist(), strict=True):
            id_, content = self.document(document)
            terms = self._explain(vector, document) if explain else None
            hits.append(Hit(id_, score, content.title, content.text, terms))
        return hits

    def _explain(self, vector: sparse.csr_matrix, document: int) -> list[TermMatch]:
        names = self.encoder.tokenizer.convert_ids_to_tokens(vector.indices.tolist())
        matches = []
        for name, term, query_weight in zip(names, vector.indices, vector.data.tolist(), strict=True):
            weight = self.postings.weight(term, document)
            if weight:
                matches.append(TermMatch(name, query_weight, weight, query_weight * weight))
        return sorted(matches, key=lambda match: -match.product)
