"""Texts in a memory-mapped file, found by their number or by their id; the pages are shared by all processes that open it."""

import mmap
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from anysplade.data.text import replace_surrogates

_BLOCK = 2**16  # texts whose offsets are written at once


class MappedTexts(Sequence[str]):
    """Texts by number. ``NAME.texts`` has them in UTF-8, one after the other, and ``NAME.ends`` has the end of each."""

    def __init__(self, folder: Path, name: str) -> None:
        """Open what ``write`` wrote."""
        self.folder, self.name = folder, name
        self.kept: object = None  # whatever removes the folder when it is forgotten
        ends = folder / f"{name}.ends"
        self._ends: np.ndarray = np.memmap(ends, "<i8", "r") if ends.stat().st_size else np.zeros(0, "<i8")
        with open(folder / f"{name}.texts", "rb") as file:
            self._bytes: Any = b"" if file.seek(0, 2) == 0 else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @classmethod
    def write(cls, texts: Iterable[str], folder: Path, name: str) -> "MappedTexts":
        """Write texts one by one; a lone surrogate becomes U+FFFD."""
        with open(folder / f"{name}.texts", "wb") as file, open(folder / f"{name}.ends", "wb") as ends:
            _write(texts, file, ends)
        return cls(folder, name)

    def copy(self, folder: Path) -> None:
        """Copy the files to another folder."""
        for suffix in ("texts", "ends"):
            shutil.copyfile(self.folder / f"{self.name}.{suffix}", folder / f"{self.name}.{suffix}")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: Any) -> Any:
        numbers = range(*i.indices(len(self))) if isinstance(i, slice) else [range(len(self))[i]]
        found = self.many(np.array(numbers, np.int64))
        return found if isinstance(i, slice) else found[0]

    def many(self, numbers: np.ndarray) -> list[str]:
        """The texts of some numbers, (texts,), in their order."""
        ends = self._ends[numbers].tolist()
        starts = np.where(numbers > 0, self._ends[numbers - 1], 0).tolist()
        content = self._bytes
        return [content[start:end].decode() for start, end in zip(starts, ends, strict=True)]


def _write(texts: Iterable[str], file: BinaryIO, ends: BinaryIO) -> None:
    end = 0
    block: list[int] = []
    for text in texts:
        end += file.write(replace_surrogates(text).encode())
        block.append(end)
        if len(block) == _BLOCK:
            ends.write(np.array(block, "<i8").tobytes())
            block.clear()
    ends.write(np.array(block, "<i8").tobytes())


class TextsById:
    """Mapped texts by id. In memory are 13 bytes per text: a hash of the id, the text's number, and whether the text is blank.

    An id that is not among them is taken for another with a probability of 2**-64 times the number of texts.
    """

    def __init__(self, texts_by_id: Iterable[tuple[str, str]], folder: tempfile.TemporaryDirectory[str], name: str) -> None:
        """Write texts, which have distinct ids, to a temporary folder, which lasts as long as they."""
        hashes, blank = bytearray(), bytearray()
        block: list[int] = []

        def texts() -> Iterable[str]:
            for id_, text in texts_by_id:
                block.append(hash(id_))
                blank.append(not text.strip())
                if len(block) == _BLOCK:
                    hashes.extend(np.array(block, np.int64).tobytes())
                    block.clear()
                yield text

        self.texts = MappedTexts.write(texts(), Path(folder.name), name)
        self.texts.kept = folder
        hashes.extend(np.array(block, np.int64).tobytes())
        self._blank = np.frombuffer(blank, np.bool_)
        found = np.frombuffer(hashes, np.int64)
        order = np.argsort(found, kind="stable")
        self._hashes = found[order]
        self._numbers = order.astype(np.int32 if len(order) < 2**31 else np.int64)

    def __getitem__(self, id_: str) -> str:
        number = int(self._find([id_])[0])
        if number < 0:
            raise KeyError(id_)
        return str(self.texts[number])

    def numbers(self, ids: Sequence[str]) -> np.ndarray:
        """The numbers of the texts of ids, (ids,); -1 for an id that is unknown or whose text is blank."""
        found = self._find(ids)
        if len(self._blank):
            found[(found >= 0) & self._blank[found]] = -1
        return found

    def _find(self, ids: Sequence[str]) -> np.ndarray:
        if not len(self._hashes):
            return np.full(len(ids), -1, np.int64)
        wanted = np.fromiter(map(hash, ids), np.int64, len(ids))
        places = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        return np.where(self._hashes[places] == wanted, self._numbers[places], -1).astype(np.int64)
