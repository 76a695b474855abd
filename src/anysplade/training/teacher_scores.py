"""A teacher's scores of training batches, prepared before the training."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
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
from anysplade.training.mining_data import Documents
from anysplade.training.teacher_cache import SHARD, VectorCache, open_vector_cache
from anysplade.training.teachers import Rows, open_teacher


class BatchTeacher:
    """A teacher's scores of the documents in a batch; examples are named by their numbers in the training data.

    A dense teacher's folder has the vectors of all texts in ``vectors.npy``, a sparse one's in ``vectors.data``,
    ``vectors.indices`` and ``vectors.indptr``, the parts of a CSR matrix. ``rows.npy``, (examples, 2 + negatives), has the row of
    each example's query, positive and negatives. A cross-encoder's folder has ``scores.npy``, (examples, 1 + negatives). All
    files are memory-mapped.
    """

    def __init__(self, folder: Path) -> None:
        """Open what ``prepare_teacher`` wrote."""
        about = json.loads((folder / "teacher.json").read_text(encoding="utf-8"))
        self.temperature: float = about["temperature"]
        self._numbers = np.load(folder / ("scores.npy" if about["kind"] == "cross-encoder" else "rows.npy"), mmap_mode="r")
        self._vectors: np.ndarray | _SparseRows | None = None
        if about["kind"] == "dense":
            self._vectors = np.load(folder / "vectors.npy", mmap_mode="r")
        elif about["kind"] == "sparse":
            self._vectors = _SparseRows(folder, about["width"])

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
    if known is None or "vectors.npz" in known["files"] or not is_whole(folder, known["files"]):  # .npz: of an older version
        shutil.rmtree(folder, ignore_errors=True)
        teacher = open_teacher(name, max_length=max_length, precision=precision)
        cache = open_vector_cache(teacher, folder.with_name("teachers"), progress)
        with atomic_folder(folder) as work:
            about = {"name": name, "kind": teacher.kind, "temperature": teacher.temperature, "precision": precision}
            if teacher.kind == "cross-encoder":
                _write_scores(pairs, work, cache)
            else:
                about["width"] = _write_vectors(pairs, work, cache)
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


def _write_vectors(pairs: Sequence[Pair], folder: Path, cache: VectorCache) -> int:
    """Write ``rows.npy``, and the vectors, a row per distinct query, then one per distinct document; return their width."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        queries = Documents((pair.query for pair in pairs), Path(scratch), "queries")
        documents = Documents((text for pair in pairs for text in (pair.positive, *pair.negatives)), Path(scratch), "documents")
        rows = _mapped(folder / "rows.npy", np.int64, (len(pairs), 2 + len(pairs[0].negatives)))
        for i, pair in enumerate(pairs):
            rows[i] = [queries.number(pair.query), *map(documents.number, (pair.positive, *pair.negatives))]
        rows[:, 1:] += len(queries.texts)
        blocks = chain(_vectors(queries.texts, "query", cache), _vectors(documents.texts, "document", cache))
        if cache.teacher.kind == "sparse":
            return _SparseRows.write(blocks, folder)
        start, dense = 0, np.zeros((0, 0))
        for block in blocks:
            if not start:
                shape = len(queries.texts) + len(documents.texts), block.shape[1]
                dense = _mapped(folder / "vectors.npy", np.float16, shape)
            dense[start : start + len(block)] = block
            start += len(block)
        return int(dense.shape[1])


def _vectors(texts: Sequence[str], role: Role, cache: VectorCache) -> Iterator[Rows]:
    """The vectors of texts, block by block."""
    for start in range(0, len(texts), 16 * SHARD):
        yield cache.vectors(texts[start : start + 16 * SHARD], role)


class _SparseRows:
    """The rows of a CSR matrix in memory-mapped files; rows are read when they are asked for."""

    def __init__(self, folder: Path, width: int) -> None:
        self._width = width
        kinds = {"data": "<f4", "indices": "<i4", "indptr": "<i8"}
        files = {name: folder / f"vectors.{name}" for name in kinds}
        self._data, self._indices, self._indptr = (
            np.memmap(file, kinds[name], "r") if file.stat().st_size else np.zeros(0, kinds[name]) for name, file in files.items()
        )

    @staticmethod
    def write(blocks: Iterable[sparse.csr_matrix], folder: Path) -> int:
        """Write blocks of rows, one after the other, and return their width."""
        end = width = 0
        with ExitStack() as opened:
            data, indices, indptr = (
                opened.enter_context(open(folder / f"vectors.{name}", "wb")) for name in ("data", "indices", "indptr")
            )
            indptr.write(np.zeros(1, "<i8").tobytes())
            for block in blocks:
                data.write(block.data.astype("<f4").tobytes())
                indices.write(block.indices.astype("<i4").tobytes())
                indptr.write((end + block.indptr[1:].astype("<i8")).tobytes())
                end, width = end + block.nnz, block.shape[1]
        return width

    def __getitem__(self, rows: np.ndarray) -> sparse.csr_matrix:
        starts = self._indptr[rows]
        lengths = self._indptr[rows + 1] - starts
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(starts - indptr[:-1], lengths) + np.arange(indptr[-1])
        return sparse.csr_matrix((self._data[places], self._indices[places], indptr), shape=(len(rows), self._width))


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A new memory-mapped array. Its room on disk is reserved: on a full disk, writing to the map would kill the process."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
