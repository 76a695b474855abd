"""A cache on disk for the vectors and scores of teachers, so that nothing is computed twice."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from scipy import sparse

from anysplade._common.cache import mark_used
from anysplade._common.files import default_cache, make_folder
from anysplade._common.parts import DAMAGED, write_rows
from anysplade._common.progress import bar
from anysplade.errors import DataError
from anysplade.model.options import Role
from anysplade.training.teachers import Rows, Teacher

logger = logging.getLogger(__name__)

SHARD = 1024  # texts, or pairs of texts, whose vectors or scores are written at once
_OPEN = 64  # shards of sparse vectors that are kept in memory


class VectorCache:
    """A teacher's vectors of texts, or scores of pairs of texts, stored by the content of the texts.

    They are stored in shards: ``NAME.npy`` or ``NAME.npz`` with the rows, and ``NAME.keys.npy`` with the hash of each row's text. A
    shard is written whole, so a killed process loses one shard at most, and several processes can share a folder. A damaged
    shard is computed again.
    """

    def __init__(self, teacher: Teacher, folder: Path, progress: bool = False) -> None:
        """Open or create the teacher's part of the cache in ``folder``."""
        self.teacher = teacher
        self.folder = folder / teacher.key
        self.progress = progress
        self._places: dict[bytes, tuple[str, int]] = {}  # shard and row, by the hash of a text
        make_folder(self.folder)
        mark_used(self.folder)
        for file in sorted(self.folder.glob("*.keys.npy")):
            name = file.name.removesuffix(".keys.npy")
            try:
                keys = np.load(file)
                if len(keys) == self._length(name):
                    self._add(name, keys)
            except DAMAGED:
                logger.info("%s: is damaged; it is made again", file)
        self._shard = lru_cache(_OPEN)(self._read)

    def ensure_cached(self, texts: Sequence[str], role: Role) -> None:
        """Compute the vectors that are missing; one call with many texts is faster than many calls with a few."""
        if self.teacher.kind != "cross-encoder":
            keys = [_hash(role, text) for text in texts]
            self._compute(keys, texts, lambda part, shown: self.teacher.encode(part, role, shown=shown), f"encoding {role} texts")

    def vectors(self, texts: Sequence[str], role: Role) -> Rows:
        """The vectors of texts in their order, (texts, width); missing ones are computed."""
        self.ensure_cached(texts, role)
        return self._rows([_hash(role, text) for text in texts])

    def scores(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """The scores of pairs of a query and a document, (pairs,), float32; missing ones are computed."""
        if self.teacher.kind == "cross-encoder":
            keys = [_hash(*pair) for pair in pairs]
            self._compute(keys, pairs, lambda part, shown: self.teacher.rate(part, shown)[:, None], "scoring pairs")
            return np.asarray(self._rows(keys))[:, 0]
        queries, documents = (list(dict.fromkeys(texts)) for texts in zip(*pairs, strict=True))
        places = [{text: i for i, text in enumerate(texts)} for texts in (queries, documents)]
        left = self.vectors(queries, "query")[[places[0][query] for query, _ in pairs]]
        right = self.vectors(documents, "document")[[places[1][document] for _, document in pairs]]
        if sparse.issparse(left):
            return np.asarray(left.multiply(right).sum(axis=1), dtype=np.float32).ravel()
        return np.einsum("pw,pw->p", left.astype(np.float32), right.astype(np.float32))

    def _compute(self, keys: list[bytes], items: Sequence[Any], compute: Callable[[list[Any], Any], Rows], what: str) -> None:
        missing = list({key: item for key, item in zip(keys, items, strict=True) if key not in self._places}.items())
        with bar(f"{what} with {self.teacher.name}", "text", len(missing), self.progress and bool(missing)) as shown:
            for start in range(0, len(missing), SHARD):
                part = missing[start : start + SHARD]
                rows = compute([item for _, item in part], shown)
                self._write(np.frombuffer(b"".join(key for key, _ in part), np.uint8).reshape(len(part), -1), rows)

    def _rows(self, keys: list[bytes]) -> Rows:
        """The rows of hashes in their order, read shard by shard."""
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
        write_rows(self.folder / f"{name}.{'npz' if sparse.issparse(rows) else 'npy'}", rows)
        write_rows(self.folder / f"{name}.keys.npy", keys)  # last: it marks the shard as whole
        self._add(name, keys)

    def _add(self, name: str, keys: np.ndarray) -> None:
        self._places |= {key.tobytes(): (name, row) for row, key in enumerate(keys)}

    def _length(self, name: str) -> int:
        """The number of rows in a shard, without loading sparse ones: a cache may have many gigabytes."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            return len(self._read(name))
        with np.load(path) as file:
            return int(file["shape"][0])

    def _read(self, name: str) -> Any:
        path = self.folder / f"{name}.npz"
        try:
            return sparse.load_npz(path) if path.exists() else np.load(self.folder / f"{name}.npy", mmap_mode="r")
        except BadZipFile as error:  # damage that ``_length`` cannot see
            raise DataError(f"{path}: is damaged ({error}); remove it, and it is made again") from error


def _hash(*parts: str) -> bytes:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


def open_vector_cache(teacher: Teacher, fallback: Path, progress: bool = False) -> VectorCache:
    """Open a teacher's vectors in the user's cache folder, or in ``fallback`` if there is none."""
    cache = default_cache()
    return VectorCache(teacher, fallback if cache is None else cache / "teachers", progress)
