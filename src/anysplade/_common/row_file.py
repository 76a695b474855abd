"""Sparse matrices that grow row by row: in memory while they are small, then in files that are mapped into memory."""

import tempfile
from typing import IO

import numpy as np
from scipy import sparse

_IN_MEMORY = 2**24  # nonzeros, which take 128 MiB


class RowFile:
    """Rows of a sparse matrix, in the order in which they were appended.

    More rows than fit into 128 MiB lie in files without a name in the folder for temporary files (``TMPDIR``), which the system
    removes when the matrix is no longer used.
    """

    def __init__(self) -> None:
        self._blocks: list[sparse.csr_matrix] = []
        self._files: tuple[IO[bytes], IO[bytes], IO[bytes]] | None = None  # ends of rows, columns, values
        self._nonzeros = 0  # appended so far
        self._rows = 0

    def append(self, matrix: sparse.csr_matrix) -> None:
        self._rows += matrix.shape[0]
        self._nonzeros += matrix.nnz
        self._blocks.append(matrix)
        if self._files is not None or self._nonzeros > _IN_MEMORY:
            self._spill()

    def matrix(self, width: int) -> sparse.csr_matrix:
        """All rows, (rows, width), float32; nothing is appended afterwards. Values in files can be changed in place.

        ``width`` is at least that of the widest matrix.
        """
        if self._files is None:
            for block in self._blocks:
                block.resize(block.shape[0], width)
            if len(self._blocks) == 1:
                return self._blocks[0]
            return sparse.vstack(self._blocks, format="csr") if self._blocks else sparse.csr_matrix((0, width), dtype=np.float32)
        ends, columns, values = (np.asarray(np.memmap(file, kind, "r+")) for file, kind in zip(self._files, _KINDS, strict=True))
        whole = sparse.csr_matrix((self._rows, width), dtype=np.float32)
        # Not by the constructor, which would copy the columns into memory if there are more than 2**31 of them.
        whole.indptr = ends.astype(np.int32) if self._nonzeros < 2**31 else ends
        whole.indices, whole.data = columns, values
        return whole

    def _spill(self) -> None:
        if self._files is None:
            self._files = unnamed_file(), unnamed_file(), unnamed_file()
            self._files[0].write(np.zeros(1, _KINDS[0]).tobytes())
        start = self._nonzeros - sum(block.nnz for block in self._blocks)
        for block in self._blocks:
            parts = block.indptr[1:].astype(np.int64) + start, block.indices, block.data
            for file, kind, part in zip(self._files, _KINDS, parts, strict=True):
                file.write(np.ascontiguousarray(part, kind).data)
            start += block.nnz
        self._blocks = []
        for file in self._files:
            file.flush()


_KINDS = (np.int64, np.int32, np.float32)  # of the numbers in the files


def unnamed_file() -> IO[bytes]:
    """A file in the folder for temporary files, which the system removes when nothing uses it."""
    return tempfile.TemporaryFile()
