"""Training examples in a memory-mapped file, for more of them than fit into memory."""

import json
import shutil
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter

from anysplade._common.files import write_atomic, writing
from anysplade._common.hashing import DataHash
from anysplade.data.collections import Pair
from anysplade.data.mapped_texts import MappedTexts
from anysplade.data.numbered_pairs import NumberedPairs

_BATCH = 2**16  # numbers that are written at once


class MixedFormsError(Exception):
    """Some examples are numbers of mapped texts and others are texts."""


class StoredPairs(Sequence[Pair]):
    """Examples in memory-mapped Arrow files, with random access; ``data_hash`` is the SHA-256 of them in their order.

    ``examples.arrow`` has their texts. If the data have ids, it has the numbers of texts, which are in files beside it.
    """

    def __init__(self, folder: Path) -> None:
        """Open the examples that ``write`` wrote to a folder."""
        self._folder = folder
        self._stored = datasets.Dataset.from_file(str(folder / "examples.arrow"))
        self.data_hash: str = json.loads((folder / "examples.json").read_bytes())["data_hash"]
        self._texts = _TextsOfNumbers(folder) if (folder / "documents.ends").exists() else None
        self.dataset: datasets.Dataset = self._with_texts(self._stored)
        self._negatives = [name for name in self.dataset.column_names if name.startswith("negative_")]

    @classmethod
    def write(cls, pairs: Iterable[Pair] | Iterable[Sequence[Pair]], folder: Path) -> "StoredPairs":
        """Write examples with equal numbers of negatives and scores to ``folder``; the columns are in the trainer's order.

        The examples can come in parts, of which all or none are ``NumberedPairs``.

        Raises:
            MixedFormsError: some parts are ``NumberedPairs``.
        """
        parts = ([item] if isinstance(item, Pair) else item for item in pairs)
        try:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                first = next(parts, [])
                write_parts = _write_numbers if isinstance(first, NumberedPairs) else _write_texts
                data_hash, count = write_parts(chain([first], parts), folder)
                _write_label(count, folder / "numbers.arrow")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        write_atomic(folder / "examples.json", json.dumps({"data_hash": data_hash}) + "\n")
        return cls(folder)

    def numbered(self) -> datasets.Dataset:
        """The examples with their numbers as the column "label", in the place of scores."""
        stored = self._stored.remove_columns([name for name in self._stored.column_names if name == "label"])
        numbers = datasets.Dataset.from_file(str(self._folder / "numbers.arrow"))
        return self._with_texts(datasets.concatenate_datasets([stored, numbers], axis=1))

    def _with_texts(self, stored: datasets.Dataset) -> datasets.Dataset:
        return stored if self._texts is None else stored.with_transform(self._texts)

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        row = self.dataset[i]
        negatives = tuple(row[name] for name in self._negatives)
        return Pair(row["query"], row["positive"], negatives, tuple(row.get("label") or ()) or None)


class _TextsOfNumbers:
    """A transform of datasets from numbers to texts; pickled, it is the path of the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._queries, self._documents = (MappedTexts(folder, name) for name in ("queries", "documents"))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._folder,)

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for name, numbers in batch.items():
            texts = self._queries if name == "query" else self._documents
            found[name] = numbers if name == "label" else texts.many(np.array(numbers, np.int64))
        return found


def _write_texts(parts: Iterable[Sequence[Pair]], folder: Path) -> tuple[str, int]:
    """Write the texts of examples, and return their hash and number."""
    digest = DataHash()
    writer = None
    count = 0
    with open(folder / "examples.arrow", "wb") as file:  # given a path, the writer would read :: in it as a chain of file systems
        for part in parts:
            if isinstance(part, NumberedPairs):
                raise MixedFormsError
            for pair in part:
                digest.add(pair)
                row: dict[str, Any] = {"query": pair.query, "positive": pair.positive}
                row |= {f"negative_{i}": text for i, text in enumerate(pair.negatives, 1)}
                if pair.scores is not None:
                    row["label"] = list(pair.scores)
                if writer is None:
                    numbers, text = datasets.List(datasets.Value("float32")), datasets.Value("string")
                    features = datasets.Features({name: numbers if name == "label" else text for name in row})
                    writer = ArrowWriter(stream=file, features=features)
                writer.write(row)
                count += 1
        if writer is not None:
            writer.finalize()
    return digest.hexdigest(), count


def _write_numbers(parts: Iterable[Sequence[Pair]], folder: Path) -> tuple[str, int]:
    """Write the numbers and the mapped texts of examples, and return the hash of their texts and their number."""
    digest = DataHash()
    writer = None
    count = 0
    with open(folder / "examples.arrow", "wb") as file:
        for part in parts:
            if not isinstance(part, NumberedPairs):
                raise MixedFormsError
            digest.add_lines(part.lines())
            names = ["query", "positive", *(f"negative_{i}" for i in range(1, part.numbers.shape[1] - 1))]
            batch = pa.record_batch([pa.array(np.ascontiguousarray(column)) for column in part.numbers.T], names)
            if writer is None:
                writer = pa.ipc.new_stream(file, batch.schema)
                for texts in (part.queries, part.documents):
                    texts.copy(folder)
            writer.write_batch(batch)
            count += len(part)
        if writer is not None:
            writer.close()
    return digest.hexdigest(), count


def _write_label(count: int, path: Path) -> None:
    """Write the numbers of the examples, as the column "label"."""
    with open(path, "wb") as file, pa.ipc.new_stream(file, pa.schema({"label": pa.int64()})) as writer:
        for start in range(0, count, _BATCH):
            writer.write_batch(pa.record_batch([pa.array(np.arange(start, min(start + _BATCH, count)))], ["label"]))
