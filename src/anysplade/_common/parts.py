"""Items encoded in parts of a fixed size, each stored in its own file; a missing or damaged file is made again."""

import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from scipy import sparse

from anysplade._common.cache import mark_used
from anysplade._common.files import write_atomic

Item = TypeVar("Item")
Rows: TypeAlias = Any  # one row per item: a CSR matrix (stored as .npz) or a NumPy array (stored as .npy)

DAMAGED = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)  # raised if a stored part is missing or damaged


def encode_in_parts(
    items: Sequence[Item],
    size: int,  # items per part
    encode: Callable[[int, Sequence[Item]], Rows],  # of the position of a part's first item, and the part; it updates ``shown``
    folder: Path | None,  # stores each part under the position of its first item; None stores nothing
    suffix: str,  # .npz or .npy
    shown: Any,  # a ``progress.bar``
) -> Iterator[Rows]:
    """Encode items part by part, and yield the rows of each part; a part that is in the folder is not encoded again."""
    for start in range(0, len(items), size):
        mark_used(folder)
        part = items[start : start + size]
        path = None if folder is None else folder / f"{start:012}{suffix}"
        rows = None if path is None else read_rows(path)
        if rows is not None:
            shown.update(len(part))
        else:
            rows = encode(start, part)
            if path is not None:
                write_rows(path, rows)
        yield rows


def read_rows(path: Path) -> Rows | None:
    """The rows stored in a file, or None if it is missing or damaged."""
    try:
        return sparse.load_npz(path) if path.suffix == ".npz" else np.asarray(np.load(path))
    except DAMAGED:
        return None


def write_rows(path: Path, rows: Rows) -> None:
    """Store rows in a file, in the format of its suffix."""
    file = io.BytesIO()
    if path.suffix == ".npz":
        sparse.save_npz(file, rows, compressed=False)
    else:
        np.save(file, rows)
    write_atomic(path, file.getvalue())
