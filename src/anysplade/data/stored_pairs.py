"""Training examples in a memory-mapped file, for more of them than fit into memory."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter

from anysplade._common.files import write_atomic, writing
from anysplade._common.hashing import DataHash
from anysplade.data.collections import Pair


class StoredPairs(Sequence[Pair]):
    """Examples in a memory-mapped Arrow file, with random access; ``data_hash`` is the SHA-256 of them in their order."""

    def __init__(self, folder: Path) -> None:
        """Open the examples that ``write`` wrote to a folder."""
        self.dataset: datasets.Dataset = datasets.Dataset.from_file(str(folder / "examples.arrow"))
        self.data_hash: str = json.loads((folder / "examples.json").read_bytes())["data_hash"]
        self._negatives = [name for name in self.dataset.column_names if name.startswith("negative_")]

    @classmethod
    def write(cls, pairs: Iterable[Pair], folder: Path) -> "StoredPairs":
        """Write examples with equal numbers of negatives and scores to ``folder``; the columns are in the trainer's order."""
        try:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                data_hash = _write_arrow(pairs, folder / "examples.arrow")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        write_atomic(folder / "examples.json", json.dumps({"data_hash": data_hash}) + "\n")
        return cls(folder)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        row = self.dataset[i]
        negatives = tuple(row[name] for name in self._negatives)
        return Pair(row["query"], row["positive"], negatives, tuple(row.get("label") or ()) or None)


def _write_arrow(pairs: Iterable[Pair], path: Path) -> str:
    """Write examples and return their hash."""
    digest = DataHash()
    writer = None
    with open(path, "wb") as file:  # given a path, the writer would read :: in it as a chain of file systems
        for pair in pairs:
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
        if writer is not None:
            writer.finalize()
    return digest.hexdigest()
