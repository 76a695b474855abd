"""Models that teach: dense models of sentence-transformers, sparse encoders, and cross-encoders.

Dense and sparse ones have a vector for each text, computed once and kept by content, so that a batch's scores are a matrix
product. A cross-encoder reads each query with each document, and so it scores an example's own documents only.
"""

import hashlib
import io
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from scipy import sparse
from sentence_transformers import CrossEncoder, SparseEncoder
from torch import Tensor, nn

from anysplade._common.files import atomic_folder, damaged_file, default_cache, digests, make_folder, read_record, write_atomic
from anysplade._common.progress import bar
from anysplade.data.collections import Pair
from anysplade.data.text import replace_surrogates
from anysplade.errors import DataError, ModelError
from anysplade.model.calibration import is_sparse
from anysplade.model.dense import cut_reading, encode_dense, open_dense
from anysplade.model.encoder import build_encoder, is_saved_encoder, open_encoder
from anysplade.model.encoding import encode
from anysplade.model.head import check_weights
from anysplade.model.modules import cut_within
from anysplade.model.options import Role
from anysplade.model.saved import fingerprint, first_line, resolve_model, saved_json, saved_kind

logger = logging.getLogger(__name__)

Kind = Literal["dense", "sparse", "cross-encoder"]
Rows: TypeAlias = Any  # vectors, one a row: a numpy array or a scipy CSR matrix

_SHARD = 1024  # texts, or pairs of texts, whose vectors or scores are written at once
_OPEN = 64  # shards of sparse vectors in memory


@dataclass(frozen=True)
class Teacher:
    """A model that teaches, loaded."""

    name: str  # as it was given
    kind: Kind
    model: Any  # SentenceTransformer, SparseEncoder or CrossEncoder
    cosine: bool  # its scores are cosines; else dot products or logits
    precision: str  # of the products: float32 or bfloat16
    batch_size: int  # texts, or pairs of texts, a forward pass
    key: str  # SHA-256 of all that decides its scores

    @property
    def temperature(self) -> float:
        """What its scores are divided by unless something else is asked for: cosines lie close together."""
        return 0.05 if self.cosine else 1.0

    def encode(self, texts: Sequence[str], role: Role, progress: bool = False) -> Rows:
        """Vectors whose dot products are the scores: (texts, width), float16 of a dense model, float32 of a sparse one.

        Raises:
            ModelError: NaN, infinity or what float16 cannot hold in a vector.
        """
        if self.kind == "sparse":
            rows: sparse.csr_matrix = encode(self.model, texts, role, progress=progress)
            if self.cosine:
                norms = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())
                rows = sparse.diags_array(1 / np.maximum(norms, 1e-12)).tocsr() @ rows
            return sparse.csr_matrix(rows, dtype=np.float32)
        options: dict[str, Any] = {"precision": self.precision, "batch_size": self.batch_size, "progress": progress}
        options["what"] = f"encoding {role} texts with {self.name}"
        with np.errstate(over="ignore"):
            vectors = encode_dense(self.model, texts, role, **options).astype(np.float16)
        whole = np.isfinite(vectors).all(axis=1)
        if not whole.all():
            bad = texts[int(whole.argmin())]
            raise ModelError(f"{self.name}: gives a number above 65,504 for the {role} {bad[:60]!r}")
        return vectors

    def rate(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """A cross-encoder's raw logits for pairs of a query and a document, (pairs,), float32.

        Raises:
            ModelError: NaN or infinity among them.
        """
        whole = [(replace_surrogates(query), replace_surrogates(document)) for query, document in pairs]
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            # Logits: a sigmoid would leave MarginMSE nothing to match and KL nothing to tell apart.
            scores = self.model.predict(whole, batch_size=self.batch_size, activation_fn=nn.Identity(), show_progress_bar=False)
        scores = np.asarray(scores, dtype=np.float32).reshape(len(pairs))
        if not np.isfinite(scores).all():
            raise ModelError(
                f"{self.name}: gives NaN or infinity for the query {pairs[int((~np.isfinite(scores)).argmax())][0][:60]!r}"
            )
        return scores


def teacher_kind(source: str) -> Kind:
    """What kind of teacher a model's folder or hub id holds, read from its configuration.

    Raises:
        ModelError: none of the three.
    """
    kinds: dict[str | None, Kind] = {"SentenceTransformer": "dense", "SparseEncoder": "sparse", "CrossEncoder": "cross-encoder"}
    saved = saved_kind(source)
    if saved in kinds:
        return kinds[saved]
    architectures = (saved_json(source, "config.json") or {}).get("architectures") or [""]
    if architectures[0].endswith("ForSequenceClassification"):
        return "cross-encoder"
    if architectures[0].endswith("ForMaskedLM"):
        return "sparse"
    raise ModelError(
        f"{source}: cannot teach ({architectures[0] or 'no architecture in its config.json'}); give a dense model of "
        "sentence-transformers, a sparse encoder or a cross-encoder"
    )


def open_teacher(name: str, *, max_length: int | None = None, precision: str = "float32", batch_size: int = 32) -> Teacher:
    """Load a teacher.

    Args:
        name: a folder or hub id.
        max_length: tokens that a text is cut to, or what the model reads if that is less or ``max_length`` is None.
        precision: of its products, float32 or bfloat16.
        batch_size: texts, or pairs of texts, a forward pass.

    Raises:
        ModelError: not found, no teacher, or a model that scores in a way that is no dot product.
    """
    source = resolve_model(name)
    kind = teacher_kind(source)
    model: Any
    cosine = False
    if kind == "sparse":
        model = open_sparse(source, max_length)
        cosine = model.similarity_fn_name == "cosine"
    elif kind == "dense":
        model = open_dense(source, max_length)
        cosine = model.similarity_fn_name == "cosine"
    else:
        try:
            model = CrossEncoder(source)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise ModelError(f"{source}: cannot be loaded as a {kind} model: {first_line(error)}") from error
        check_weights(type(model.model), str(model.model.name_or_path), head="classification head")
        if model.num_labels != 1:
            raise ModelError(f"{source}: gives {model.num_labels} outputs a pair; a teacher gives one")
        cut_reading(model, max_length, source)
        model.eval().float()
    about = [fingerprint(source) or source, kind, max_length, precision, cosine]
    return Teacher(name, kind, model, cosine, precision, batch_size, hashlib.sha256(json.dumps(about).encode()).hexdigest())


def open_sparse(source: str, max_length: int | None = None) -> SparseEncoder:
    """A sparse encoder as it was saved, or the masked LM of a published SPLADE with its pooling.

    Raises:
        ModelError: a masked LM that was not trained to retrieve.
    """
    if is_saved_encoder(source):
        return cut_within(open_encoder(source), max_length)
    encoder, calibration = build_encoder(source)
    if not is_sparse(calibration):
        raise ModelError(f"{source}: a masked LM that was not trained to retrieve; give a dense model, a SPLADE or a cross-encoder")
    return cut_within(encoder, max_length)


# ---------------------------------------------------------------------------- vectors, kept by content


class VectorCache:
    """A teacher's vectors of texts, or scores of pairs of texts, on disk: nothing is computed twice.

    They lie in shards that are written whole, each with its texts' hashes, so that a process that was killed has lost one
    shard at most and several can use one folder. A shard that is damaged is made again.
    """

    def __init__(self, teacher: Teacher, folder: Path, progress: bool = False) -> None:
        """Open what the folder holds of this teacher's; a new one is made."""
        self.teacher = teacher
        self.folder = folder / teacher.key
        self.progress = progress
        self._places: dict[bytes, tuple[str, int]] = {}  # shard and row, by the hash of a text
        make_folder(self.folder)
        for file in sorted(self.folder.glob("*.keys.npy")):
            name = file.name.removesuffix(".keys.npy")
            try:
                keys = np.load(file)
                if len(keys) == self._length(name):
                    self._add(name, keys)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                logger.info("%s: is damaged; it is made again", file)
        self._shard = lru_cache(_OPEN)(self._read)

    def ensure_cached(self, texts: Sequence[str], role: Role) -> None:
        """Compute the vectors that are not known yet; many at once take less time than a few again and again."""
        if self.teacher.kind != "cross-encoder":
            keys = [_hash(role, text) for text in texts]
            self._learn(keys, texts, lambda part: self.teacher.encode(part, role), f"encoding {role} texts")

    def vectors(self, texts: Sequence[str], role: Role) -> Rows:
        """(texts, width), in their order; computed where they are not known yet."""
        return self._of(
            [_hash(role, text) for text in texts], texts, lambda part: self.teacher.encode(part, role), f"encoding {role} texts"
        )

    def scores(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Of pairs of a query and a document: (pairs,), float32."""
        if self.teacher.kind == "cross-encoder":
            found = self._of(
                [_hash(*pair) for pair in pairs], pairs, lambda part: self.teacher.rate(part)[:, None], "scoring pairs"
            )
            return np.asarray(found)[:, 0]
        queries, documents = (list(dict.fromkeys(texts)) for texts in zip(*pairs, strict=True))
        places = [{text: i for i, text in enumerate(texts)} for texts in (queries, documents)]
        left = self.vectors(queries, "query")[[places[0][query] for query, _ in pairs]]
        right = self.vectors(documents, "document")[[places[1][document] for _, document in pairs]]
        if sparse.issparse(left):
            return np.asarray(left.multiply(right).sum(axis=1), dtype=np.float32).ravel()
        return np.einsum("pw,pw->p", left.astype(np.float32), right.astype(np.float32))

    def _learn(self, keys: list[bytes], items: Sequence[Any], compute: Any, what: str) -> None:
        missing = list({key: item for key, item in zip(keys, items, strict=True) if key not in self._places}.items())
        with bar(f"{what} with {self.teacher.name}", "text", len(missing), self.progress and bool(missing)) as shown:
            for start in range(0, len(missing), _SHARD):
                part = missing[start : start + _SHARD]
                rows = compute([item for _, item in part])
                self._write(np.frombuffer(b"".join(key for key, _ in part), np.uint8).reshape(len(part), -1), rows)
                shown.update(len(part))

    def _of(self, keys: list[bytes], items: Sequence[Any], compute: Any, what: str) -> Rows:
        self._learn(keys, items, compute, what)
        by_shard: dict[str, list[tuple[int, int]]] = {}
        for i, key in enumerate(keys):
            name, row = self._places[key]
            by_shard.setdefault(name, []).append((i, row))
        order = [i for places in by_shard.values() for i, _ in places]
        blocks = [self._shard(name)[[row for _, row in places]] for name, places in by_shard.items()]
        stacked = sparse.vstack(blocks, format="csr") if sparse.issparse(blocks[0]) else np.concatenate(blocks)
        return stacked[np.argsort(order)]

    def _write(self, keys: np.ndarray, rows: Rows) -> None:
        name = hashlib.sha256(keys.tobytes()).hexdigest()[:32]
        file = io.BytesIO()
        if sparse.issparse(rows):
            sparse.save_npz(file, rows, compressed=False)
        else:
            np.save(file, rows)
        write_atomic(self.folder / f"{name}.{'npz' if sparse.issparse(rows) else 'npy'}", file.getvalue())
        listed = io.BytesIO()
        np.save(listed, keys)
        write_atomic(self.folder / f"{name}.keys.npy", listed.getvalue())  # last: it says that the shard is whole
        self._add(name, keys)

    def _add(self, name: str, keys: np.ndarray) -> None:
        self._places |= {key.tobytes(): (name, row) for row, key in enumerate(keys)}

    def _length(self, name: str) -> int:
        """Of a shard, without its numbers: a cache may hold many gigabytes. A torn file is an error."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            return len(self._read(name))
        with np.load(path) as file:
            return int(file["shape"][0])

    def _read(self, name: str) -> Any:
        path = self.folder / f"{name}.npz"
        try:
            return sparse.load_npz(path) if path.exists() else np.load(self.folder / f"{name}.npy", mmap_mode="r")
        except zipfile.BadZipFile as error:  # what opening it did not see
            raise DataError(f"{path}: is damaged ({error}); remove it, and it is made again") from error


def _hash(*parts: str) -> bytes:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


def kept_vectors(teacher: Teacher, beside: Path, progress: bool = False) -> VectorCache:
    """What a teacher computed before: in the user's cache, or ``beside`` if there is none."""
    cache = default_cache()
    return VectorCache(teacher, beside if cache is None else cache / "teachers", progress)


# ------------------------------------------------------------------------------- the scores of a batch


class BatchTeacher:
    """A teacher's scores of the documents of a batch, of examples known by their numbers.

    A folder holds ``rows.npy``, (examples, 2 + negatives): where each example's query, positive and negatives have their
    vectors in ``vectors.npy`` or ``vectors.npz``; or, of a cross-encoder, ``scores.npy``, (examples, 1 + negatives). The
    files are memory-mapped, but for sparse vectors.
    """

    def __init__(self, folder: Path) -> None:
        """Open what ``write`` wrote."""
        about = json.loads((folder / "teacher.json").read_text(encoding="utf-8"))
        self.temperature: float = about["temperature"]
        self._numbers = np.load(folder / ("scores.npy" if about["kind"] == "cross-encoder" else "rows.npy"), mmap_mode="r")
        self._vectors: Rows | None = None
        if about["kind"] == "dense":
            self._vectors = np.load(folder / "vectors.npy", mmap_mode="r")
        elif about["kind"] == "sparse":
            self._vectors = sparse.load_npz(folder / "vectors.npz")

    @staticmethod
    def write(teacher: Teacher, pairs: Sequence[Pair], folder: Path, kept: VectorCache) -> None:
        """Compute what a run needs of its teacher.

        Args:
            pairs: examples with equal numbers of negatives.

        Raises:
            DataError: a cross-encoder, and the examples have no negatives.
            ModelError: NaN or infinity in a score.
        """
        with atomic_folder(folder) as work:
            if teacher.kind == "cross-encoder":
                if not pairs[0].negatives:
                    raise DataError(
                        f"{teacher.name}: a cross-encoder ranks an example's own documents, and there are no negatives; give some"
                    )
                shape = (len(pairs), 1 + len(pairs[0].negatives))
                scores = _mapped(work / "scores.npy", np.float32, shape)
                for start, part in _parts(pairs):
                    read = [(pair.query, text) for pair in part for text in (pair.positive, *pair.negatives)]
                    scores[start : start + len(part)] = kept.scores(read).reshape(len(part), -1)
            else:
                _write_vectors(pairs, work, kept)
            about = {"name": teacher.name, "kind": teacher.kind, "temperature": teacher.temperature, "precision": teacher.precision}
            write_atomic(work / "teacher.json", json.dumps(about | {"files": digests(work)}, indent=2) + "\n")

    def scores(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Of each query and each document of a batch; NaN where the teacher has none.

        Args:
            queries: numbers of the examples whose queries are scored, (queries,).
            documents: numbers of the examples whose documents they are scored against, (examples,).

        Returns:
            (queries, examples x (1 + negatives)), float32: all positives, then all first negatives, and so on.
        """
        if self._vectors is None:
            own = self._numbers[queries]  # (queries, 1 + negatives)
            same = queries[:, None] == documents[None, :]
            return np.concatenate([np.where(same, own[:, [column]], np.nan) for column in range(own.shape[1])], axis=1)
        of_queries = self._vectors[self._numbers[queries, 0]]
        of_documents = self._vectors[self._numbers[documents, 1:].T.ravel()]
        if sparse.issparse(of_queries):
            return np.asarray((of_queries @ of_documents.T).toarray(), dtype=np.float32)
        return of_queries.astype(np.float32) @ of_documents.astype(np.float32).T


def _write_vectors(pairs: Sequence[Pair], folder: Path, kept: VectorCache) -> None:
    """``rows.npy`` and the vectors: each text of each role once."""
    numbers: dict[bytes, int] = {}
    columns = 2 + len(pairs[0].negatives)
    rows = _mapped(folder / "rows.npy", np.int64, (len(pairs), columns))
    texts: dict[Role, list[tuple[int, str]]] = {"query": [], "document": []}

    def number(role: Role, text: str) -> int:
        key = _hash(role, text)
        if key not in numbers:
            numbers[key] = len(numbers)
            texts[role].append((numbers[key], text))
        return numbers[key]

    blocks: list[sparse.csr_matrix] = []
    order: list[int] = []
    dense: Any = None
    for start, part in _parts(pairs):  # first, to know how many there are
        for i, pair in enumerate(part, start):
            rows[i] = [number("query", pair.query), *(number("document", text) for text in (pair.positive, *pair.negatives))]
    for role, listed in texts.items():
        for start in range(0, len(listed), 16 * _SHARD):
            part_of = listed[start : start + 16 * _SHARD]
            vectors = kept.vectors([text for _, text in part_of], role)
            places = [place for place, _ in part_of]
            if sparse.issparse(vectors):
                blocks.append(vectors)
                order += places
                continue
            if dense is None:
                dense = _mapped(folder / "vectors.npy", np.float16, (len(numbers), vectors.shape[1]))
            dense[places] = vectors
    if blocks:
        sparse.save_npz(folder / "vectors.npz", sparse.vstack(blocks, format="csr")[np.argsort(order)], compressed=False)


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A new array on disk that has its room already: where a mapped file cannot grow, the system ends the process."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):  # macOS has none
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _parts(pairs: Sequence[Pair]) -> Iterator[tuple[int, Sequence[Pair]]]:
    for start in range(0, len(pairs), _SHARD):
        yield start, pairs[start : start + _SHARD]


def prepare_teacher(
    name: str, pairs: Sequence[Pair], folder: Path, *, max_length: int | None, precision: str, progress: bool = False
) -> BatchTeacher:
    """A run's teacher: all it has to say of the examples, in ``folder``; made there unless it is there already, and whole."""
    known = read_record(folder / "teacher.json", "files")
    damaged = None if known is None else damaged_file(folder, known["files"])
    if damaged is not None:
        logger.warning("%s: is missing or damaged; it is made again", folder / damaged)
    if known is None or damaged is not None:
        shutil.rmtree(folder, ignore_errors=True)
        teacher = open_teacher(name, max_length=max_length, precision=precision)
        BatchTeacher.write(teacher, pairs, folder, kept_vectors(teacher, folder.with_name("teachers"), progress))
    return BatchTeacher(folder)


def batch_scores(teacher: BatchTeacher, numbers: Tensor, everywhere: Tensor) -> Tensor:
    """``BatchTeacher.scores`` of this process's examples against those of all processes, on the device of their numbers."""
    scores = teacher.scores(numbers.cpu().numpy(), everywhere.cpu().numpy())
    return torch.from_numpy(np.ascontiguousarray(scores)).to(numbers.device)
