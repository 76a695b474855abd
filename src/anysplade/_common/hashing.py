"""The hash of data: one way for collections, training examples and texts, so that equal hashes mean equal data."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any


class DataHash:
    """The SHA-256 of rows of data in their order, each as a line of JSON: where texts begin and end is part of it."""

    def __init__(self, rows: Iterable[Any] = ()) -> None:
        """Rows are what JSON can hold, such as texts and tuples of texts and numbers; they are not kept."""
        self._digest = hashlib.sha256()
        for row in rows:
            self.add(row)

    def add(self, row: Any) -> None:
        """Continue with another row."""
        self._digest.update(json.dumps(row).encode() + b"\n")

    def hexdigest(self) -> str:
        """Of the rows until now."""
        return self._digest.hexdigest()
