"""A corpus in files that are mapped into memory, for corpora that are too large to be held in it."""

import hashlib
import json
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from itertools import chain, islice
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import overload

import numpy as np

from anysplade._common.row_file import unnamed_file
from anysplade.data.corpus import Document, empty_corpus, iter_corpus
from anysplade.data.names import Source
from anysplade.errors import DataError

_IN_MEMORY = 2**17  # documents


class DuplicateError(DataError):
    """Two documents have the same id."""


class _Strings:
    """Texts in files without a name in the folder for temporary files, which the system removes when nothing uses them."""

    def __init__(self) -> None:
        self._file, self._end_file = unnamed_file(), unnamed_file()
        self._end_file.write(np.zeros(1, np.int64).tobytes())
        self._end = 0

    def append(self, text: str) -> None:
        self._end += self._file.write(text.encode("utf-8", "surrogatepass"))
        self._end_file.write(self._end.to_bytes(8, "little"))

    def close(self) -> None:
        """Nothing is appended afterwards; texts can be read from now on."""
        self._file.write(b"\0")  # an empty file cannot be mapped
        self._file.flush()
        self._end_file.flush()
        self._bytes = memoryview(mmap(self._file.fileno(), 0, access=ACCESS_READ))
        self._ends = np.asarray(np.memmap(self._end_file, "<i8", "r"))

    def __getitem__(self, position: int) -> str:
        start, end = self._ends[position : position + 2].tolist()
        return str(self._bytes[start:end], "utf-8", "surrogatepass")


class StoredCorpus(Mapping[str, Document]):
    """Documents by id, in their order: in files, but for 16 bytes per document while it is made."""

    def __init__(self, documents: Iterable[tuple[str, Document]]) -> None:
        """Raises DuplicateError if an id is a duplicate."""
        self._ids, self._rows = _Strings(), _Strings()
        hashes = unnamed_file()
        self._count = 0
        for id_, document in documents:
            self._ids.append(id_)
            self._rows.append(json.dumps(document))
            hashes.write(_hash(id_))
            self._count += 1
        self._ids.close()
        self._rows.close()
        hashes.flush()
        self._hashes, self._order = _sorted(np.memmap(hashes, "<u8", "r"))
        for place in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]).tolist():
            id_ = self._ids[int(self._order[place])]
            if sum(1 for _ in self._places(id_)) > 1:
                raise DuplicateError(f"the id {id_[:80]!r} is a duplicate; ids must be unique")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return map(self._ids.__getitem__, range(self._count))

    def __contains__(self, id_: object) -> bool:
        return isinstance(id_, str) and next(self._places(id_), None) is not None

    def __getitem__(self, id_: str) -> Document:
        return self.at(self.position(id_))

    def position(self, id_: str) -> int:
        """The position of a document; KeyError if there is none with this id."""
        place = next(self._places(id_), None)
        if place is None:
            raise KeyError(id_)
        return place

    def id_at(self, position: int) -> str:
        return self._ids[position]

    def at(self, position: int) -> Document:
        return Document(*json.loads(self._rows[position]))

    def items(self) -> ItemsView[str, Document]:
        return _Items(self)

    def values(self) -> ValuesView[Document]:
        return _Values(self)

    def _places(self, id_: str) -> Iterator[int]:
        """The positions at which an id is."""
        hashed = np.frombuffer(_hash(id_), "<u8")[0]
        start = int(np.searchsorted(self._hashes, hashed))
        while start < self._count and self._hashes[start] == hashed:
            place = int(self._order[start])
            if self._ids[place] == id_:
                yield place
            start += 1


class _Items(ItemsView[str, Document]):
    """Read in their order, without looking each id up."""

    _mapping: StoredCorpus

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        return ((self._mapping.id_at(i), self._mapping.at(i)) for i in range(len(self._mapping)))


class _Values(ValuesView[Document]):
    """Read in their order, without looking each id up."""

    _mapping: StoredCorpus

    def __iter__(self) -> Iterator[Document]:
        return map(self._mapping.at, range(len(self._mapping)))


class StoredTexts(Sequence[str]):
    """The texts of a stored corpus that models encode, read when they are used."""

    def __init__(self, corpus: StoredCorpus) -> None:
        self._corpus = corpus

    def __len__(self) -> int:
        return len(self._corpus)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        places = range(len(self))[place]
        return self._corpus.at(places).full_text if isinstance(places, int) else [self._corpus.at(i).full_text for i in places]


def open_corpus(source: str | Path | Source, progress: bool = False) -> Mapping[str, Document]:
    """``read_corpus``, but a corpus of more than 131,072 documents stays in files."""
    documents = iter_corpus(source, progress=progress, remembered=_IN_MEMORY)
    first = list(islice(documents, _IN_MEMORY))
    if not first:
        raise empty_corpus(source)
    if len(first) < _IN_MEMORY:
        return dict(first)
    try:
        return StoredCorpus(chain(first, documents))
    except DuplicateError:
        for _ in iter_corpus(source):  # which names the places of the duplicate
            pass
        raise


def with_changes(corpus: Mapping[str, Document], changed: Mapping[str, Document]) -> Mapping[str, Document]:
    """A corpus with other documents in the place of some of its own; one in files stays in files."""
    documents = ((id_, changed.get(id_, document)) for id_, document in corpus.items())
    return StoredCorpus(documents) if isinstance(corpus, StoredCorpus) else dict(documents)


def full_texts(corpus: Mapping[str, Document]) -> Sequence[str]:
    """The texts of documents that models encode, in their order."""
    return StoredTexts(corpus) if isinstance(corpus, StoredCorpus) else [document.full_text for document in corpus.values()]


def ids_at(corpus: Mapping[str, Document], positions: np.ndarray) -> dict[int, str]:
    """The ids of the documents at some positions."""
    if isinstance(corpus, StoredCorpus):
        return {position: corpus.id_at(position) for position in positions.tolist()}
    ids = list(corpus)
    return {position: ids[position] for position in positions.tolist()}


def position_of(corpus: Mapping[str, Document], id_: str) -> int:
    """The position of a document in a corpus that has it."""
    return corpus.position(id_) if isinstance(corpus, StoredCorpus) else list(corpus).index(id_)


def _hash(id_: str) -> bytes:
    return hashlib.blake2b(id_.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _sorted(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hashes in their order and the position of each, mapped from files."""
    order = np.argsort(hashes, kind="stable")
    return _mapped(hashes[order]), _mapped(order)


def _mapped(array: np.ndarray) -> np.ndarray:
    file = unnamed_file()
    file.write(np.ascontiguousarray(array).data)
    file.flush()
    return np.asarray(np.memmap(file, array.dtype, "r"))
