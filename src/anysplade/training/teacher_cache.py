"""A cache on disk for the vectors and scores of teachers, so that nothing is computed twice."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
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
from anysplade.training.teacher_keys import Place, SortedKeys
from anysplade.training.teachers import Rows, Teacher

logger = logging.getLogger(__name__)

SHARD = 1024  # texts, or pairs of texts, whose vectors or scores are written at once
_RECENT = 256  # shards whose keys are in memory
_INDEXED = 8192  # shards whose keys are sorted at once
_LOOKED_UP = 2**14  # texts, or pairs of texts, that are looked up at once
_OPEN = 64  # shards of sparse vectors that are kept in memory


class VectorCache:
    """A teacher's vectors of texts, or scores of pairs of texts, stored by the content of the texts.

    They are stored in shards: ``NAME.npy`` or ``NAME.npz`` with the rows, and ``NAME.keys.npy`` with the hash of each row's text. A
    shard is written whole, so a killed process loses one shard at most, and several processes can share a folder. A damaged
    shard is computed again. The keys of many shards are in a sorted file, see ``SortedKeys``; in memory are those of the latest.
    """

    def __init__(self, teacher: Teacher, folder: Path, progress: bool = False) -> None:
        """Open or create the teacher's part of the cache in ``folder``."""
        self.teacher = teacher
        self.folder = folder / teacher.key
        self.progress = progress
        self._recent: dict[bytes, Place] = {}  # of shards that are not in the sorted file
        self._recent_shards: list[str] = []
        make_folder(self.folder)
        mark_used(self.folder)
        self._sorted = SortedKeys(self.folder)
        self._index()
        self._shard = lru_cache(_OPEN)(self._read)

    def _index(self) -> None:
        """Find the keys of all undamaged shards; the sorted file is made anew if a shard in it is missing or has another size."""
        sizes = {file.name: file.stat().st_size for file in os.scandir(self.folder) if file.name.endswith((".npy", ".npz"))}
        changed = any(self._size(name, sizes) != size for name, size in self._sorted.sizes.items())
        if changed:
            logger.info("%s: shards are missing or damaged; their vectors are made again", self.folder)
        known = {} if changed else self._sorted.sizes
        names = sorted(name.removesuffix(".keys.npy") for name in sizes if name.endswith(".keys.npy"))
        names = [name for name in names if name not in known]
        if len(names) <= _RECENT and not changed:
            for name in names:
                if (keys := self._keys(name)) is not None:
                    self._remember(name, keys)
            return
        for start in range(0, max(1, len(names)), _INDEXED):
            part = {name: self._keys(name) for name in names[start : start + _INDEXED]}
            self._sorted.add({n: (k, self._size(n, sizes)) for n, k in part.items() if k is not None}, anew=changed and not start)

    @staticmethod
    def _size(name: str, sizes: dict[str, int]) -> int:
        return sizes.get(f"{name}.npz", sizes.get(f"{name}.npy", 0)) if f"{name}.keys.npy" in sizes else 0

    def _keys(self, name: str) -> np.ndarray | None:
        """The keys of a shard; None if it is damaged."""
        file = self.folder / f"{name}.keys.npy"
        try:
            keys = np.load(file)
            if len(keys) == self._length(name):
                return np.asarray(keys)
        except DAMAGED:
            logger.info("%s: is damaged; it is made again", file)
        return None

    def _remember(self, name: str, keys: np.ndarray) -> None:
        self._recent |= {key.tobytes(): (name, row) for row, key in enumerate(keys)}
        self._recent_shards.append(name)

    def _find(self, keys: Sequence[bytes]) -> list[Place | None]:
        """The places of keys; None for those that are missing."""
        found = [self._recent.get(key) for key in keys]
        missing = [i for i, place in enumerate(found) if place is None]
        for i, place in zip(missing, self._sorted.find([keys[i] for i in missing]), strict=True):
            found[i] = place
        return found

    def ensure_cached(self, texts: Sequence[str], role: Role) -> None:
        """Compute the vectors that are missing; one call with many texts is faster than many calls with a few."""
        if self.teacher.kind != "cross-encoder":
            self._compute(
                texts,
                lambda text: _hash(role, text),
                lambda part, shown: self.teacher.encode(part, role, shown=shown),
                f"encoding {role} texts",
            )

    def vectors(self, texts: Sequence[str], role: Role) -> Rows:
        """The vectors of texts in their order, (texts, width); missing ones are computed."""
        self.ensure_cached(texts, role)
        return self._rows([_hash(role, text) for text in texts])

    def mapped_vectors(self, texts: Sequence[str], role: Role) -> np.ndarray:
        """``vectors`` of a dense teacher in a temporary file, which is memory-mapped and has no name."""
        first = self.vectors(texts[:_LOOKED_UP], role)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            file.write(np.ascontiguousarray(first).tobytes())
            for start in range(_LOOKED_UP, len(texts), _LOOKED_UP):
                file.write(np.ascontiguousarray(self.vectors(texts[start : start + _LOOKED_UP], role)).tobytes())
            file.flush()
            return np.memmap(file, first.dtype, "r", shape=(len(texts), first.shape[1]))

    def scores(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """The scores of pairs of a query and a document, (pairs,), float32; missing ones are computed."""
        if self.teacher.kind == "cross-encoder":
            keys = [_hash(*pair) for pair in pairs]
            self._compute(
                pairs, lambda pair: _hash(*pair), lambda part, shown: self.teacher.rate(part, shown)[:, None], "scoring pairs"
            )
            return np.asarray(self._rows(keys))[:, 0]
        queries, documents = (list(dict.fromkeys(texts)) for texts in zip(*pairs, strict=True))
        places = [{text: i for i, text in enumerate(texts)} for texts in (queries, documents)]
        left = self.vectors(queries, "query")[[places[0][query] for query, _ in pairs]]
        right = self.vectors(documents, "document")[[places[1][document] for _, document in pairs]]
        if sparse.issparse(left):
            return np.asarray(left.multiply(right).sum(axis=1), dtype=np.float32).ravel()
        return np.einsum("pw,pw->p", left.astype(np.float32), right.astype(np.float32))

    def _compute(
        self, items: Sequence[Any], key_of: Callable[[Any], bytes], compute: Callable[[list[Any], Any], Rows], what: str
    ) -> None:
        """Compute what is missing, a shard at a time; in memory are the keys of one part of the items."""
        pending: dict[bytes, Any] = {}
        count = sum(len(self._missing(items[i : i + _LOOKED_UP], key_of)) for i in range(0, len(items), _LOOKED_UP))
        with bar(f"{what} with {self.teacher.name}", "text", count, self.progress and bool(count)) as shown:
            for start in range(0, len(items) if count else 0, _LOOKED_UP):
                for key, item in self._missing(items[start : start + _LOOKED_UP], key_of).items():
                    if key in self._recent:  # computed since ``_missing`` looked
                        continue
                    pending[key] = item
                    if len(pending) == SHARD:
                        self._write(pending, compute(list(pending.values()), shown))
                        pending = {}
            if pending:
                self._write(pending, compute(list(pending.values()), shown))

    def _missing(self, items: Sequence[Any], key_of: Callable[[Any], bytes]) -> dict[bytes, Any]:
        keys = [key_of(item) for item in items]
        return {key: item for key, item, place in zip(keys, items, self._find(keys), strict=True) if place is None}

    def _rows(self, keys: list[bytes]) -> Rows:
        """The rows of hashes in their order, read shard by shard."""
        by_shard: dict[str, list[tuple[int, int]]] = {}
        for i, place in enumerate(self._find(keys)):
            assert place is not None  # it was computed
            name, row = place
            by_shard.setdefault(name, []).append((i, row))
        order = [i for places in by_shard.values() for i, _ in places]
        blocks = [self._shard(name)[[row for _, row in places]] for name, places in by_shard.items()]
        stacked = sparse.vstack(blocks, format="csr") if sparse.issparse(blocks[0]) else np.concatenate(blocks)
        return stacked[np.argsort(order)]

    def _write(self, items: Iterable[bytes], rows: Rows) -> None:
        """Write the rows of items, whose keys are given, as a shard."""
        keys = np.frombuffer(b"".join(items), np.uint8).reshape(rows.shape[0], -1)
        name = hashlib.sha256(keys.tobytes()).hexdigest()[:32]
        write_rows(self.folder / f"{name}.{'npz' if sparse.issparse(rows) else 'npy'}", rows)
        write_rows(self.folder / f"{name}.keys.npy", keys)  # last: it marks the shard as whole
        self._remember(name, keys)
        if len(self._recent_shards) > _RECENT:
            sizes = {file.name: file.stat().st_size for file in os.scandir(self.folder)}
            shards = {name: (np.load(self.folder / f"{name}.keys.npy"), self._size(name, sizes)) for name in self._recent_shards}
            self._sorted.add(shards)
            self._recent, self._recent_shards = {}, []

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
