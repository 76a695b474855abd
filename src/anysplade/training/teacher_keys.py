"""The sorted keys of a teacher's cached vectors: which shard and row has the vector of a text.

``sorted-keys-*.npy``, (3, texts), has the two halves of each key, sorted by the first, and its place: the shard's number times
2**32, plus the row. It is memory-mapped, so processes share it. ``shards.json`` names it, and the shards in it in the order of
their numbers, with their sizes. Only one process at a time replaces them; whoever has mapped an earlier file goes on with it.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from anysplade._common.files import write_atomic, writing

_BLOCK = 2**20  # keys that are copied at once

Place = tuple[str, int]  # shard and row


class SortedKeys:
    """Places by key, which is the hash of a text, 16 bytes."""

    def __init__(self, folder: Path) -> None:
        """Map the keys that are in the folder now; damaged ones count as none."""
        self._folder = folder
        self._load()

    def _load(self) -> None:
        self._keys = np.zeros((3, 0), np.uint64)
        self.sizes: dict[str, int] = {}  # bytes of each shard's rows
        self._file: str | None = None
        try:
            about = json.loads((self._folder / "shards.json").read_bytes())
            keys = np.load(self._folder / about["file"], mmap_mode="r")
            if keys.shape == (3, about["texts"]):
                self._keys, self.sizes, self._file = keys, about["sizes"], about["file"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self._names = list(self.sizes)

    def find(self, keys: Sequence[bytes]) -> list[Place | None]:
        """The places of keys; None for each that is not among them."""
        found: list[Place | None] = [None] * len(keys)
        known, second_known, known_places = self._keys
        if not len(known) or not keys:
            return found
        first, second = _halves(np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 16))
        at = np.searchsorted(known, first)
        left = np.arange(len(keys))
        while len(left):  # once, unless several keys have the same first half
            left = left[at[left] < len(known)]
            left = left[known[at[left]] == first[left]]
            same = second_known[at[left]] == second[left]
            for i, place in zip(left[same].tolist(), known_places[at[left[same]]].tolist(), strict=True):
                found[i] = (self._names[place >> 32], place & 0xFFFFFFFF)
            left = left[~same]
            at[left] += 1
        return found

    def add(self, shards: Mapping[str, tuple[np.ndarray, int]], anew: bool = False) -> None:
        """Add shards by name: their keys, (texts, 16) bytes, and the size of their rows; ``anew``: forget all others."""
        with writing(self._folder), FileLock(self._folder / "keys.lock"):
            self._load()  # another process may have added some
            if anew:
                self._keys, self.sizes = np.zeros((3, 0), np.uint64), {}
            new = {name: shard for name, shard in shards.items() if name not in self.sizes}
            if new:
                self._write(new)

    def _write(self, new: Mapping[str, tuple[np.ndarray, int]]) -> None:
        sizes = self.sizes | {name: size for name, (_, size) in new.items()}
        numbers = {name: i for i, name in enumerate(sizes)}
        columns = [
            np.stack([*_halves(keys), np.arange(len(keys), dtype=np.uint64) + np.uint64(numbers[name] << 32)])
            for name, (keys, _) in new.items()
        ]
        added = _sorted(np.concatenate(columns, axis=1))
        file, replaced = f"sorted-keys-{secrets.token_hex(8)}.npy", self._file
        _merge(self._keys, added, self._folder / file)
        about = {"file": file, "texts": self._keys.shape[1] + added.shape[1], "sizes": sizes}
        write_atomic(self._folder / "shards.json", json.dumps(about))
        self._load()
        if replaced is not None:
            (self._folder / replaced).unlink(missing_ok=True)


def _merge(known: np.ndarray, added: np.ndarray, path: Path) -> None:
    """Write two sorted arrays of keys as one, in blocks."""
    count = known.shape[1] + added.shape[1]
    fronts = np.searchsorted(known[0], added[0], "right")  # known keys in front of each added one
    with open(path, "wb") as file:
        header = {"descr": "<u8", "fortran_order": False, "shape": (3, count)}
        np.lib.format.write_array_header_1_0(file, header)
        begin = file.tell()
        written = used = 0
        for start in range(0, max(1, known.shape[1]), _BLOCK):
            end = min(start + _BLOCK, known.shape[1])
            until = added.shape[1] if end == known.shape[1] else int(np.searchsorted(fronts, end, "right"))
            part = _sorted(np.concatenate([known[:, start:end], added[:, used:until]], axis=1))
            for row in range(3):
                file.seek(begin + 8 * (row * count + written))
                file.write(part[row].tobytes())
            written, used = written + part.shape[1], until


def _sorted(keys: np.ndarray) -> np.ndarray:
    return keys[:, np.argsort(keys[0], kind="stable")]


def _halves(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.ascontiguousarray(keys).view("<u8")
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
