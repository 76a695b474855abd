"""The tags of documents in the database of an index, by tag: a filter reads the documents that match, not the metadata of all."""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from anysplade.search.filters import Tags

SCHEMA = (
    "CREATE TABLE IF NOT EXISTS tags (number INTEGER PRIMARY KEY, kind TEXT NOT NULL, tag TEXT NOT NULL, UNIQUE (kind, tag))",
    "CREATE TABLE IF NOT EXISTS tagged (number INTEGER, position INTEGER, PRIMARY KEY (number, position)) WITHOUT ROWID",
)
_NUMBERS = "SELECT number FROM tags WHERE kind = ? AND tag IN (SELECT value FROM json_each(?))"

Kind = Literal["names", "values"]


def record(database: sqlite3.Connection, documents: Iterable[tuple[int, Tags]]) -> None:
    """Add the tags of documents at positions."""
    rows = _rows(documents)
    database.executemany("INSERT OR IGNORE INTO tags (kind, tag) VALUES (?, ?)", dict.fromkeys(row[:2] for row in rows))
    database.executemany("INSERT OR IGNORE INTO tagged SELECT number, ?3 FROM tags WHERE kind = ?1 AND tag = ?2", rows)


def forget(database: sqlite3.Connection, documents: Iterable[tuple[int, Tags]]) -> None:
    """Remove the tags of documents at positions."""
    query = "DELETE FROM tagged WHERE position = ?3 AND number = (SELECT number FROM tags WHERE kind = ?1 AND tag = ?2)"
    database.executemany(query, _rows(documents))


def clear(database: sqlite3.Connection) -> None:
    database.execute("DELETE FROM tagged")
    database.execute("DELETE FROM tags")


def positions(database: sqlite3.Connection, kind: Kind, conditions: Sequence[Sequence[str]]) -> np.ndarray:
    """The positions of the documents that have at least one of the tags of each condition, rising."""
    query = " INTERSECT ".join([f"SELECT position FROM tagged WHERE number IN ({_NUMBERS})"] * len(conditions))
    rows = database.execute(query, _parameters(kind, conditions))
    return np.unique(np.fromiter((row[0] for row in rows), np.int64))


def among(database: sqlite3.Connection, conditions: Sequence[Sequence[str]], candidates: Sequence[int]) -> set[int]:
    """Those of a few positions whose documents have at least one of the values of each condition."""
    found = set(candidates)
    query = f"SELECT position FROM json_each(?) CROSS JOIN tagged ON position = value WHERE number IN ({_NUMBERS})"
    for condition in conditions:
        rows = database.execute(query, (json.dumps(sorted(found)), "values", json.dumps(list(condition))))
        found = {row[0] for row in rows}
    return found


def has(database: sqlite3.Connection, kind: Kind, conditions: Sequence[Sequence[str]]) -> bool:
    """Whether some document has at least one of the tags of each condition."""
    if len(conditions) == 1:
        query = f"SELECT EXISTS (SELECT 1 FROM tagged WHERE number IN ({_NUMBERS}))"
        return bool(database.execute(query, _parameters(kind, conditions)).fetchone()[0])
    return bool(len(positions(database, kind, conditions)))


def names(database: sqlite3.Connection, limit: int) -> list[str]:
    """The names in the metadata of the documents, the most frequent first."""
    query = (
        "SELECT tag FROM tags JOIN tagged USING (number) WHERE kind = 'names' GROUP BY number "
        "ORDER BY count(*) DESC, min(position), number LIMIT ?"
    )
    return [row[0] for row in database.execute(query, (limit,))]


def _rows(documents: Iterable[tuple[int, Tags]]) -> list[tuple[str, str, int]]:
    return [
        (kind, value, position)
        for position, tags in documents
        for kind, values in zip(Tags._fields, tags, strict=True)
        for value in values
    ]


def _parameters(kind: Kind, conditions: Sequence[Sequence[str]]) -> list[str]:
    return [text for condition in conditions for text in (kind, json.dumps(list(condition)))]
