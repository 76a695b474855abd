"""The hash of collections, training examples and texts: equal hashes mean equal data."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any


class DataHash:
    """The SHA-256 of rows of data in their order, each as a line of JSON, so that the bounds of texts are hashed too."""

    def __init__(self, rows: Iterable[Any] = ()) -> None:
        """Hash rows of texts, numbers and tuples of them, or other data that JSON can represent."""
        self._digest = hashlib.sha256()
        for row in rows:
            self.add(row)

    def add(self, row: Any) -> None:
        self._digest.update(json.dumps(row).encode() + b"\n")

    def add_lines(self, lines: str) -> None:
        """Hash rows that are lines of JSON already, as ``json.dumps`` writes them, each with its line break."""
        self._digest.update(lines.encode())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
