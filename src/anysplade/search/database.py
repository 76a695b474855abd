"""The documents of an index in SQLite, which can be read and searched without the engine."""

import contextlib
import logging
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from anysplade._common.files import READ_ONLY, make_folder, warn_once
from anysplade.data.corpus import Document
from anysplade.errors import DataError, OptionError
from anysplade.search import tags
from anysplade.search.documents import EncodedDocument, read_metadata
from anysplade.search.filters import Tagged, Tags, tag
from anysplade.search.lexical import STEMS, Lexical, QueryStems, stem_names
from anysplade.search.postings import Located, Vector, best_of, clear, collect, count_terms, read_postings
from anysplade.search.stored_rows import content_row, from_row, from_sqlite, to_sqlite

logger = logging.getLogger(__name__)

BATCH = 1024  # documents per transaction and values per query, whose number SQLite limits
WRITES = "CREATE TABLE IF NOT EXISTS writes (one INTEGER PRIMARY KEY CHECK (one = 1), count INTEGER NOT NULL)"
# What is made from the documents: missing, or made from fewer changes than ``writes`` counts, if an earlier version wrote.
DERIVED = (
    *tags.SCHEMA,
    "CREATE TABLE IF NOT EXISTS terms (id INTEGER PRIMARY KEY, term TEXT NOT NULL UNIQUE)",  # of vectors without a model
    "CREATE TABLE IF NOT EXISTS later (position INTEGER PRIMARY KEY)",  # changed after the postings were written
    "CREATE TABLE IF NOT EXISTS derived (one INTEGER PRIMARY KEY CHECK (one = 1), writes INTEGER NOT NULL, "
    "postings TEXT, engine INTEGER NOT NULL)",  # name of the folder with the postings; whether there is an engine
)
_SCHEMA = f"""
PRAGMA page_size = 32768;  -- a document takes about 1,500 bytes
CREATE TABLE ids (position INTEGER PRIMARY KEY AUTOINCREMENT, id NOT NULL UNIQUE);  -- narrow: every search reads it
CREATE TABLE contents (
    position INTEGER PRIMARY KEY, title NOT NULL, text NOT NULL, metadata TEXT, terms BLOB NOT NULL, weights BLOB NOT NULL
);
CREATE VIEW documents AS SELECT position, id, title, text, metadata, terms, weights FROM ids JOIN contents USING (position);
CREATE TABLE changed (position INTEGER PRIMARY KEY);  -- changes that the engine may lack
CREATE TABLE shards (number INTEGER PRIMARY KEY);  -- unused; earlier versions look for it
{STEMS};  -- empty unless the index has stems; earlier versions made none
{WRITES};
{";".join(DERIVED)};
"""
_WRITABLE, _READABLE, _IMMUTABLE = "mode=rw", "mode=ro", "mode=ro&immutable=1"

_DERIVED_NOW = "SELECT postings FROM derived WHERE writes = (SELECT coalesce(max(count), 0) FROM writes)"
_LIKELY = 1024  # best hits whose tags are looked up one by one, before all documents that a filter matches

Found = list[tuple[int, float]]  # positions and scores, best first
Row = tuple[int, str | None, bytes | None, bytes | None]  # position, metadata (JSON), terms, weights; no terms if deleted


class _Closed:
    """In the place of a closed connection: any use but closing it again is an error with the fix."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def close(self) -> None: ...

    def __getattr__(self, name: str) -> Any:
        raise OptionError(f"{self.folder}: the index is closed; Index.load(folder) opens it")


class Database(Tagged):
    """The documents in ``documents.sqlite``. A position is the number of a document, which it keeps and no other ever gets."""

    def __init__(self, folder: Path, vocabulary: int, lexical: Lexical | None = None) -> None:
        """Open the database in a folder; one that is damaged, or that this process may not read, is a DataError.

        With ``lexical``, documents get their stems as further terms.
        """
        self.folder = folder
        self.vocabulary = vocabulary
        self.lexical = lexical
        self._counted: tuple[tuple[Any, ...], int] | None = None  # version of the database, number of documents
        self.read_only = False
        self._lock = threading.RLock()  # also while reading: the connection would see another thread's open transaction
        self._mapped: tuple[str, Located] | None = None  # name of the postings in files, and these
        self._later: tuple[tuple[Any, ...], Located, np.ndarray] | None = None  # version; vectors that the files lack; what changed
        self._matching: tuple[tuple[Any, ...], np.ndarray] | None = None  # version and conditions; the positions that match
        self._state: tuple[int, ...] | None = None  # of the files if opened as immutable: SQLite then looks for no changes
        self._connect()

    @staticmethod
    def create(folder: Path, engine: bool = True) -> None:
        """Create an empty database, in place of one that an interrupted call left there; without an engine, searches are exact."""
        make_folder(folder)
        for path in folder.glob("documents.sqlite*"):
            path.unlink()
        for name in ("engine", "postings"):
            shutil.rmtree(folder / name, ignore_errors=True)
        with contextlib.closing(sqlite3.connect(folder / "documents.sqlite")) as database, database:
            database.executescript(_SCHEMA)
            database.execute("INSERT INTO derived VALUES (1, 0, NULL, ?)", (engine,))

    def _connect(self) -> None:
        """Open the database for writing, else for reading, else without the files that SQLite creates even for reading."""
        path = (self.folder / "documents.sqlite").absolute()
        for mode in (_WRITABLE, _READABLE, _IMMUTABLE):
            state = None
            try:
                if mode == _IMMUTABLE:
                    state = self._file_state()
                    if state[-1]:
                        raise DataError(
                            f"{self.folder}: read-only here, and its last changes are still in documents.sqlite-wal; "
                            "open it once where it can be written"
                        )
                database = sqlite3.connect(f"{path.as_uri()}?{mode}", uri=True, check_same_thread=False, isolation_level=None)
                if mode == _WRITABLE:
                    database.execute("PRAGMA journal_mode = WAL")
                    database.execute("PRAGMA synchronous = FULL")  # fsync per transaction: the engine must never be ahead on disk
                    database.execute("PRAGMA wal_autocheckpoint = 4096")  # pages (128 MiB), so that busy pages are copied rarely
                database.execute("PRAGMA cache_size = -65536")  # KiB: enough for the ids of millions of documents
                database.execute("SELECT count(*) FROM changed")
            except FileNotFoundError as error:
                raise DataError(f"{self.folder}: the index is damaged (documents.sqlite is missing); build it again") from error
            except (OSError, sqlite3.Error) as error:
                if not is_refusal(error, sqlite3.SQLITE_CANTOPEN):
                    raise DataError(f"{self.folder}: the index is damaged (documents.sqlite: {error}); build it again") from error
                if mode == _IMMUTABLE:
                    raise DataError(
                        f"{self.folder}: cannot be read here (documents.sqlite: {error}); change its permissions, or copy it"
                    ) from error
            else:
                self._database, self._state = database, state
                # A second connection for passes over all documents: they see one state, and do not block the first connection.
                reading = _READABLE if mode == _WRITABLE else mode
                self._passes = sqlite3.connect(f"{path.as_uri()}?{reading}", uri=True, check_same_thread=False)
                if mode != _WRITABLE:
                    self._become_read_only()
                return

    def _file_state(self) -> tuple[int, int, int]:
        """Time and size of the database file, and the size of its log; a process that writes changes them."""
        status = (self.folder / "documents.sqlite").stat()
        try:
            waiting = (self.folder / "documents.sqlite-wal").stat().st_size
        except FileNotFoundError:
            waiting = 0
        return status.st_mtime_ns, status.st_size, waiting

    def _become_read_only(self) -> None:
        if not self.read_only:
            logger.info("%s: read-only here; searched exactly, which is slower", self.folder)
        self.read_only = True

    def close(self) -> None:
        self._database.close()
        self._passes.close()
        closed: Any = _Closed(self.folder)
        self._database, self._passes, self._state = closed, closed, None

    @property
    def closed(self) -> bool:
        return isinstance(self._database, _Closed)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """A block that sees one state of the database: a document that a search in it finds is not deleted before it is fetched."""
        with self._lock:
            if self._state is not None and self._state != self._file_state():
                self._database.close()
                self._connect()
            if self._database.in_transaction:  # of an enclosing block
                yield
                return
            self._begin()
            try:
                yield
            finally:
                self._database.execute("COMMIT")

    def _begin(self) -> None:
        """Begin a transaction that reads, with the postings of the state that it sees."""
        while True:
            self._database.execute("BEGIN")
            name = self._derived()
            if name is None:
                self._mapped = None
            elif self._mapped is None or self._mapped[0] != name:
                try:
                    self._mapped = name, read_postings(self.folder / "postings" / name)
                except (OSError, ValueError) as error:
                    self._mapped = None
                    self._database.execute("COMMIT")
                    if self._derived() != name:  # replaced meanwhile
                        continue
                    warn_once(f"{self.folder}: its postings cannot be used ({error}); a search reads all vectors into memory")
                    self._database.execute("BEGIN")
            return

    def _derived(self) -> str | None:
        """The name of the current postings; None if there are none."""
        row = self._derived_row()
        return None if row is None else row[0]

    def _derived_row(self) -> tuple[str | None] | None:
        """None if the tags and postings of the database do not belong to its documents, because an earlier version wrote it."""
        try:
            found: tuple[str | None] | None = self._database.execute(_DERIVED_NOW).fetchone()
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                raise
            return None
        return found

    # ------------------------------------------------------------------------------------- read

    def __len__(self) -> int:
        return int(self._one("SELECT count(*) FROM ids"))

    @property
    def postings(self) -> int:
        """Number of weights above 0 in all documents."""
        with self.reading():
            if self._mapped is not None and not self._one("SELECT EXISTS (SELECT 1 FROM later)"):
                return int(self._mapped[1].postings.indptr[-1])
            return int(self._one("SELECT coalesce(sum(length(terms)), 0) / 4 FROM contents"))

    @property
    def lexical_postings(self) -> int:
        """Those of ``postings`` that are stems."""
        return 0 if self.lexical is None else int(self._one("SELECT coalesce(sum(df), 0) FROM stems"))

    @property
    def width(self) -> int:
        """The number of terms: the model's, and the stems."""
        with self._lock:
            return self.vocabulary if self.lexical is None else self.lexical.width(self._database)

    def stem_names(self) -> list[str]:
        """The names of the terms after the model's."""
        with self._lock:
            return [] if self.lexical is None else stem_names(self._database)

    def require_stems(self) -> Lexical:
        """The lexical part of the index; raises OptionError if it has none."""
        if self.lexical is None:
            raise OptionError(f"{self.folder}: has no stems for BM25; build another index with `with_bm25`")
        return self.lexical

    def query_stems(self, text: str, with_words: bool = False) -> QueryStems:
        """The lexical side of a query, with its words if asked for; raises OptionError if the index has no stems."""
        lexical = self.require_stems()
        with self.reading():
            version = self._version()
            if self._counted is None or self._counted[0] != version:
                self._counted = version, len(self)  # a pass over all ids
            return lexical.query(self._database, text, self._counted[1], with_words)

    @property
    def edited(self) -> bool:
        """Whether documents were changed with ``manual``."""
        return bool(self._one("PRAGMA user_version"))

    def _one(self, query: str) -> Any:
        with self._lock:
            return self._database.execute(query).fetchone()[0]

    def _among(self, query: str, values: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """Rows of a query that ends in the name of a column, where the column has one of the values."""
        for start in range(0, len(values), BATCH):
            part = values[start : start + BATCH]
            with self._lock:
                rows = self._database.execute(f"{query} IN ({','.join('?' * len(part))})", part).fetchall()
            yield from rows

    def compare(self, documents: Iterable[tuple[str, Document]]) -> Iterator[tuple[str, Document, int | None, bool]]:
        """Yield id, document, position (None if the id is new), and whether the stored document is the same."""
        query = "SELECT id, position, title, text, metadata FROM documents WHERE id"
        iterator = iter(documents)
        while batch := list(islice(iterator, BATCH)):
            stored = {row[0]: row[1:] for row in self._among(query, [to_sqlite(id_) for id_, _ in batch])}
            for id_, document in batch:
                position, *content = stored.get(to_sqlite(id_), (None,))
                yield id_, document, position, tuple(content) == content_row(document)

    def positions(self) -> np.ndarray:
        """The positions of all documents, rising, (documents,)."""
        with self._lock:
            return np.fromiter((row[0] for row in self._database.execute("SELECT position FROM ids ORDER BY position")), np.int64)

    def ids(self, positions: Sequence[int]) -> list[str]:
        """The ids at these positions, in their order."""
        rows = dict(self._among("SELECT position, id FROM ids WHERE position", positions))
        return [from_sqlite(rows[position]) for position in positions]

    def known(self, ids: Sequence[str]) -> list[str]:
        """Those of these ids that the index has."""
        return [from_sqlite(row[0]) for row in self._among("SELECT id FROM ids WHERE id", [to_sqlite(id_) for id_ in ids])]

    def term_names(self) -> list[str]:
        """The names of terms by id, of an index whose vectors came without a model."""
        with self._lock:
            return [row[0] for row in self._database.execute("SELECT term FROM terms ORDER BY id")]

    def count_terms(self) -> int:
        """The largest term id in the postings, plus 1."""
        with self.reading():
            return 0 if self._mapped is None else len(self._mapped[1].postings.indptr) - 1

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """The number of documents that have each term, (width,), and the number of terms of each document, (documents,)."""
        with self.reading():
            lengths = self._database.execute("SELECT length(terms) / 4 FROM contents ORDER BY position")
            active = np.fromiter((row[0] for row in lengths), np.int64)
            if self._mapped is not None and not self._one("SELECT EXISTS (SELECT 1 FROM later)"):
                frequency = np.diff(self._mapped[1].postings.indptr)
            else:
                frequency = count_terms(self._vectors())
            return np.pad(frequency, (0, self.width - len(frequency))), active

    def documents(self, positions: Sequence[int]) -> list[EncodedDocument]:
        """The documents at these positions, in their order."""
        rows = {row[0]: row for row in self._among("SELECT * FROM documents WHERE position", positions)}
        return [from_row(rows[position]) for position in positions]

    def find(self, id_: str) -> EncodedDocument | None:
        """The document with this id."""
        return next(map(from_row, self._among("SELECT * FROM documents WHERE id", [to_sqlite(id_)])), None)

    def __iter__(self) -> Iterator[EncodedDocument]:
        """All documents in the order in which they were added, without changes made meanwhile."""
        return map(from_row, self._passes.execute("SELECT * FROM documents ORDER BY position"))

    # ----------------------------------------------------------------------------------- search

    def search_exactly(self, terms: np.ndarray, weights: np.ndarray, k: int, conditions: Sequence[Tags]) -> Found:
        """The k documents of the highest scores above 0 in float64, best first; in a block of ``reading``.

        The postings are mapped from their files, and the vectors that changed after these were written are kept in memory.
        """
        later, changed = self._changes()
        parts = [later] if self._mapped is None else [self._mapped[1], later]
        scored = [(part.positions, part.postings.scores(terms, weights)) for part in parts if part.postings.count]
        if self._mapped is not None and len(changed):
            clear(*scored[0], changed)
        if not conditions:
            return best_of(scored, k)
        likely = max(_LIKELY, 4 * k)
        hits = best_of(scored, likely)
        if self._derived_row() is not None:
            matching = tags.among(self._database, [values for _, values in conditions], [position for position, _ in hits])
            kept = [hit for hit in hits if hit[0] in matching]
            if len(kept) >= k or len(hits) < likely:
                return kept[:k]
        wanted = self._having("values", [values for _, values in conditions])
        for positions, scores in scored:
            clear(positions, scores, wanted, keep=True)
        return best_of(scored, k)

    def _changes(self) -> tuple[Located, np.ndarray]:
        """The vectors that the postings in files lack, and the positions of what changed or was deleted since, rising."""
        version = (*self._version(), self._mapped and self._mapped[0])
        if self._later is None or self._later[0] != version:
            source = "contents" if self._mapped is None else "later JOIN contents USING (position)"
            found = collect(self._database.execute(f"SELECT position, terms, weights FROM {source} ORDER BY position"))
            changed = [] if self._mapped is None else self._database.execute("SELECT position FROM later ORDER BY position")
            self._later = version, found, np.fromiter((row[0] for row in changed), np.int64)
        return self._later[1:]

    def _version(self) -> tuple[Any, ...]:
        """Changes with the content of the database."""
        return int(self._one("PRAGMA data_version")), self._database.total_changes, self._state

    def _vectors(self) -> Iterator[Vector]:
        return self._database.execute("SELECT position, terms, weights FROM contents ORDER BY position")

    def _having(self, kind: Literal["names", "values"], conditions: Sequence[Sequence[str]]) -> np.ndarray:
        """The positions of the documents that have at least one of the tags of each condition, rising; the last ones are kept."""
        version = (*self._version(), kind, *(tuple(condition) for condition in conditions))
        if self._matching is None or self._matching[0] != version:
            if self._derived_row() is not None:
                found = tags.positions(self._database, kind, conditions)
            else:
                found = np.array([at for at, held in self._tagged() if _has_all(getattr(held, kind), conditions)], np.int64)
            self._matching = version, found
        return self._matching[1]

    def has(self, kind: Literal["names", "values"], *conditions: Sequence[str]) -> bool:
        with self.reading():
            if self._derived_row() is not None:
                return tags.has(self._database, kind, conditions)
            return bool(len(self._having(kind, conditions)))

    def names(self, limit: int) -> list[str]:
        with self.reading():
            if self._derived_row() is not None:
                return tags.names(self._database, limit)
            counts = Counter(name for _, held in self._tagged() for name in held.names)
            return [name for name, _ in counts.most_common(limit)]

    def _tagged(self) -> Iterator[tuple[int, Tags]]:
        return _tags_of(self._database.execute("SELECT position, metadata FROM contents WHERE metadata NOT NULL ORDER BY position"))

    # ---------------------------------------------------------------------------- write, in a transaction

    def _insert(self, documents: Iterable[EncodedDocument]) -> list[int]:
        """Add or replace documents, of those with the same id the last, and return their positions."""
        latest = {to_sqlite(document.id): document for document in documents}
        self._database.executemany("INSERT OR IGNORE INTO ids (id) VALUES (?)", [(id_,) for id_ in latest])
        positions = dict(self._among("SELECT id, position FROM ids WHERE id", list(latest)))
        written = list(latest.values())
        if self.lexical is not None:
            self._forget_stems(list(positions.values()))
            written = self.lexical.append(self._database, written)
        self._forget_tags(list(positions.values()))
        rows = (
            (positions[id_], *content_row(content), terms.tobytes(), weights.tobytes())
            for id_, (_, content, terms, weights) in zip(latest, written, strict=True)
        )
        self._database.executemany("INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?, ?, ?)", rows)
        held = ((positions[id_], document.content.metadata) for id_, document in latest.items())
        tags.record(self._database, [(position, tag(metadata)) for position, metadata in held if metadata is not None])
        return list(positions.values())

    def _remove(self, ids: Iterable[str]) -> list[int]:
        """Delete the documents with these ids that exist, and return their positions."""
        positions = []
        for id_ in ids:
            row = self._database.execute("DELETE FROM ids WHERE id = ? RETURNING position", (to_sqlite(id_),)).fetchone()
            if row is not None:
                positions += row
        self._forget_stems(positions)
        self._forget_tags(positions)
        self._database.executemany("DELETE FROM contents WHERE position = ?", [(position,) for position in positions])
        return positions

    def _forget_stems(self, positions: Sequence[int]) -> None:
        """Take the documents at these positions, some of which may be new, out of the frequencies of their stems."""
        if self.lexical is not None:
            for start in range(0, len(positions), BATCH):
                stored = self._among("SELECT terms FROM contents WHERE position", positions[start : start + BATCH])
                self.lexical.subtract(self._database, [terms for (terms,) in stored])

    def _forget_tags(self, positions: Sequence[int]) -> None:
        """Remove the tags of the documents at these positions, some of which may be new."""
        stored = self._among("SELECT position, metadata FROM contents WHERE metadata NOT NULL AND position", positions)
        tags.forget(self._database, _tags_of(stored))


def is_refusal(error: BaseException, *codes: int) -> bool:
    """Whether the system does not let this process write, while nothing is damaged; ``codes`` of SQLite mean that too."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary code, without SQLite's extension
        return code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, *codes)
    return isinstance(error, OSError) and error.errno in READ_ONLY


def _tags_of(rows: Iterable[tuple[int, str | None]]) -> Iterator[tuple[int, Tags]]:
    return ((position, tag(read_metadata(metadata))) for position, metadata in rows)


def _has_all(tags: Iterable[str], conditions: Sequence[Sequence[str]]) -> bool:
    held = set(tags)
    return all(not held.isdisjoint(condition) for condition in conditions)
