"""A teacher's scores of training batches, prepared before the training."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from anysplade._common.files import atomic_folder, write_atomic
from anysplade._common.outputs import digests, is_whole, read_record
from anysplade.data.collections import Pair
from anysplade.errors import DataError
from anysplade.model.options import Role
from anysplade.training.teacher_cache import SHARD, VectorCache, open_vector_cache
from anysplade.training.teachers import Rows, Teacher, open_teacher


class BatchTeacher:
    """A teacher's scores of the documents in a batch; examples are named by their numbers in the training data.

    A dense or sparse teacher's folder has the vectors of all texts in ``vectors.npy`` or ``vectors.npz``, and in ``rows.npy``,
    (examples, 2 + negatives), the row of each example's query, positive and negatives. A cross-encoder's folder has
    ``scores.npy``, (examples, 1 + negatives). All files are memory-mapped except sparse vectors.
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
    def write(teacher: Teacher, pairs: Sequence[Pair], folder: Path, cache: VectorCache) -> None:
        """Compute the vectors or scores that a training needs; all examples have the same number of negatives.

        Raises:
            DataError: the teacher is a cross-encoder, and the examples have no negatives.
            ModelError: a score is NaN or infinite.
        """
        with atomic_folder(folder) as work:
            if teacher.kind == "cross-encoder":
                if not pairs[0].negatives:
                    raise DataError(
                        f"{teacher.name}: a cross-encoder ranks an example's own documents, and there are no negatives; give some"
                    )
                scores = _mapped(work / "scores.npy", np.float32, (len(pairs), 1 + len(pairs[0].negatives)))
                for start, part in _parts(pairs, SHARD):
                    texts = [(pair.query, text) for pair in part for text in (pair.positive, *pair.negatives)]
                    scores[start : start + len(part)] = cache.scores(texts).reshape(len(part), -1)
            else:
                _write_vectors(pairs, work, cache)
            about = {"name": teacher.name, "kind": teacher.kind, "temperature": teacher.temperature, "precision": teacher.precision}
            write_atomic(work / "teacher.json", json.dumps(about | {"files": digests(work)}, indent=2) + "\n")

    def scores(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Score each query against each document of a batch.

        Args:
            queries: numbers of the examples whose queries are scored, (queries,).
            documents: numbers of the examples whose documents are scored, (examples,).

        Returns:
            (queries, examples x (1 + negatives)), float32, NaN where the teacher has no score. The columns are all positives,
            then all first negatives, and so on.
        """
        if self._vectors is None:
            own = self._numbers[queries]  # (queries, 1 + negatives)
            same = queries[:, None] == documents[None, :]
            return np.concatenate([np.where(same, own[:, [column]], np.nan) for column in range(own.shape[1])], axis=1)
        query_vectors = self._vectors[self._numbers[queries, 0]]
        document_vectors = self._vectors[self._numbers[documents, 1:].T.ravel()]
        if sparse.issparse(query_vectors):
            return np.asarray((query_vectors @ document_vectors.T).toarray(), dtype=np.float32)
        return query_vectors.astype(np.float32) @ document_vectors.astype(np.float32).T


def _write_vectors(pairs: Sequence[Pair], folder: Path, cache: VectorCache) -> None:
    """Write ``rows.npy``, and the vectors with one row per distinct text and role."""
    numbers: dict[tuple[Role, str], int] = {}
    rows = _mapped(folder / "rows.npy", np.int64, (len(pairs), 2 + len(pairs[0].negatives)))
    for start, part in _parts(pairs, SHARD):  # before the vectors, to know how many there are
        for i, pair in enumerate(part, start):
            documents: list[tuple[Role, str]] = [("document", text) for text in (pair.positive, *pair.negatives)]
            rows[i] = [numbers.setdefault(text, len(numbers)) for text in [("query", pair.query), *documents]]
    blocks: list[sparse.csr_matrix] = []
    order: list[int] = []
    dense: Any = None
    roles: tuple[Role, ...] = ("query", "document")
    for role in roles:
        texts = [(number, text) for (text_role, text), number in numbers.items() if text_role == role]
        for _, block in _parts(texts, 16 * SHARD):
            vectors = cache.vectors([text for _, text in block], role)
            places = [number for number, _ in block]
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
    """A new memory-mapped array. Its room on disk is reserved: on a full disk, writing to the map would kill the process."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _parts(items: Sequence[Any], size: int) -> Iterator[tuple[int, Sequence[Any]]]:
    for start in range(0, len(items), size):
        yield start, items[start : start + size]


def prepare_teacher(
    name: str, pairs: Sequence[Pair], folder: Path, *, max_length: int | None, precision: str, progress: bool = False
) -> BatchTeacher:
    """Open a run's teacher in ``folder``; its scores of the examples are computed unless they are stored there undamaged."""
    known = read_record(folder / "teacher.json", "files")
    if known is None or not is_whole(folder, known["files"]):
        shutil.rmtree(folder, ignore_errors=True)
        teacher = open_teacher(name, max_length=max_length, precision=precision)
        BatchTeacher.write(teacher, pairs, folder, open_vector_cache(teacher, folder.with_name("teachers"), progress))
    return BatchTeacher(folder)
