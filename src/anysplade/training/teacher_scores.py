"""A teacher's scores of training batches, prepared before the training."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from anysplade._common.files import atomic_folder
from anysplade._common.outputs import digests, is_whole, read_record, write_record
from anysplade.data.collections import Pair
from anysplade.errors import DataError
from anysplade.model.options import Role
from anysplade.training.teacher_cache import SHARD, VectorCache, open_vector_cache
from anysplade.training.teachers import Rows, open_teacher


class BatchTeacher:
    """A teacher's scores of the documents in a batch; examples are named by their numbers in the training data.

    A dense or sparse teacher's folder has the vectors of all texts in ``vectors.npy`` or ``vectors.npz``, and in ``rows.npy``,
    (examples, 2 + negatives), the row of each example's query, positive and negatives. A cross-encoder's folder has
    ``scores.npy``, (examples, 1 + negatives). All files are memory-mapped except sparse vectors.
    """

    def __init__(self, folder: Path) -> None:
        """Open what ``prepare_teacher`` wrote."""
        about = json.loads((folder / "teacher.json").read_text(encoding="utf-8"))
        self.temperature: float = about["temperature"]
        self._numbers = np.load(folder / ("scores.npy" if about["kind"] == "cross-encoder" else "rows.npy"), mmap_mode="r")
        self._vectors: Rows | None = None
        if about["kind"] == "dense":
            self._vectors = np.load(folder / "vectors.npy", mmap_mode="r")
        elif about["kind"] == "sparse":
            self._vectors = sparse.load_npz(folder / "vectors.npz")

    def scores(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Score the queries of some examples against the documents of some, given by their numbers, (queries,) and (examples,).

        The scores are (queries, examples x (1 + negatives)), float32, NaN where the teacher has none. The columns are all
        positives, then all first negatives, and so on.
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


def prepare_teacher(
    name: str, pairs: Sequence[Pair], folder: Path, *, max_length: int | None, precision: str, progress: bool = False
) -> BatchTeacher:
    """Open a run's teacher in ``folder``; its scores of the examples are computed unless they are stored there undamaged."""
    known = read_record(folder / "teacher.json", "files")
    if known is None or not is_whole(folder, known["files"]):
        shutil.rmtree(folder, ignore_errors=True)
        teacher = open_teacher(name, max_length=max_length, precision=precision)
        cache = open_vector_cache(teacher, folder.with_name("teachers"), progress)
        with atomic_folder(folder) as work:
            (_write_scores if teacher.kind == "cross-encoder" else _write_vectors)(pairs, work, cache)
            about = {"name": name, "kind": teacher.kind, "temperature": teacher.temperature, "precision": precision}
            write_record(work / "teacher.json", about | {"files": digests(work)})
    return BatchTeacher(folder)


def _write_scores(pairs: Sequence[Pair], folder: Path, cache: VectorCache) -> None:
    """Write a cross-encoder's ``scores.npy``."""
    if not pairs[0].negatives:
        raise DataError(
            f"{cache.teacher.name}: a cross-encoder ranks an example's own documents, and there are no negatives; give some"
        )
    scores = _mapped(folder / "scores.npy", np.float32, (len(pairs), 1 + len(pairs[0].negatives)))
    for start in range(0, len(pairs), SHARD):
        part = pairs[start : start + SHARD]
        texts = [(pair.query, text) for pair in part for text in (pair.positive, *pair.negatives)]
        scores[start : start + len(part)] = cache.scores(texts).reshape(len(part), -1)


def _write_vectors(pairs: Sequence[Pair], folder: Path, cache: VectorCache) -> None:
    """Write ``rows.npy``, and the vectors with one row per distinct query, and then one per distinct document."""
    queries: dict[str, int] = {}
    documents: dict[str, int] = {}
    rows = _mapped(folder / "rows.npy", np.int64, (len(pairs), 2 + len(pairs[0].negatives)))
    for i, pair in enumerate(pairs):
        texts = (pair.positive, *pair.negatives)
        rows[i] = [queries.setdefault(pair.query, len(queries)), *(documents.setdefault(text, len(documents)) for text in texts)]
    rows[:, 1:] += len(queries)
    blocks = chain(_vectors(queries, "query", cache), _vectors(documents, "document", cache))
    if cache.teacher.kind == "sparse":
        sparse.save_npz(folder / "vectors.npz", sparse.vstack(list(blocks), format="csr"), compressed=False)
        return
    start, dense = 0, np.zeros((0, 0))
    for block in blocks:
        if not start:
            dense = _mapped(folder / "vectors.npy", np.float16, (len(queries) + len(documents), block.shape[1]))
        dense[start : start + len(block)] = block
        start += len(block)


def _vectors(texts: Iterable[str], role: Role, cache: VectorCache) -> Iterator[Rows]:
    """The vectors of texts, block by block."""
    listed = list(texts)
    for start in range(0, len(listed), 16 * SHARD):
        yield cache.vectors(listed[start : start + 16 * SHARD], role)


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A new memory-mapped array. Its room on disk is reserved: on a full disk, writing to the map would kill the process."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
