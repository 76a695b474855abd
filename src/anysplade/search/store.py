"""The documents of an index on disk: a database, and an engine that searches the same vectors faster.

``documents.sqlite`` is the source of truth; ``engine`` can always be rebuilt from it. A change is committed to the database before
the engine gets it, and the database records the changes that the engine may lack after a crash; they are applied when the store is
opened next. Both count the changes. An engine with a higher count (an older database was restored) or without one (an earlier
version made it) is rebuilt. Only one process at a time holds the engine. Other processes, and those that may not write in the
folder, search the database, which is slower.
"""

import contextlib
import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from scipy import sparse

from anysplade._common.files import make_folder, require_empty
from anysplade.errors import AnyspladeError, OutputError
from anysplade.search import local_engine, tags
from anysplade.search.database import BATCH, DERIVED, WRITES, Database, Found, Row, is_refusal
from anysplade.search.documents import EncodedDocument, check_document, check_vector
from anysplade.search.filters import Filter, Tags, check_filter, explain_filter
from anysplade.search.lexical import Lexical
from anysplade.search.postings import remove_others, write_postings

logger = logging.getLogger(__name__)

MOST_IN_ENGINE = 500_000  # documents; each takes about 6.5 kB of the engine's memory, so that an index stays below 4 GB
_FLUSH = 32 * BATCH  # changes between flushes of the engine, which take as long for one change as for thousands
_FEW = 0.05  # of the documents; as many changes are read into memory by every other process
_FREE = 2**27  # bytes that must be free on the disk: if a file that the engine maps cannot grow, the system ends the process
_CHANGED_ROWS = "SELECT changed.position, metadata, terms, weights FROM changed LEFT JOIN contents USING (position)"
_ALL_CHANGED = "INSERT OR REPLACE INTO changed SELECT position FROM ids"
_SET_WRITES = "UPDATE derived SET writes = (SELECT coalesce(max(count), 0) FROM writes)"


class Store(Database):
    """The documents in one folder, made by ``create``.

    Methods that write raise OutputError if another process holds the store or it is read-only, and AnyspladeError if the disk
    is full.
    """

    def __init__(self, folder: Path, vocabulary: int, lexical: Lexical | None = None) -> None:
        """Open a store, and bring its engine up to date."""
        super().__init__(folder, vocabulary, lexical)
        self._engine: Any = None  # a shard of Qdrant Edge, if this process holds it
        self._unflushed = 0  # changes in the engine that may not be on disk
        self._inode = folder.stat().st_ino  # shows whether another folder took its place
        self._claim = FileLock(folder / "lock", timeout=0, thread_local=False)  # another thread can release it
        with _explained(folder):
            self._open_engine()

    def close(self) -> None:
        """Release the engine, so that another process can open it."""
        with self._lock:
            if self._engine is not None:
                try:
                    if self._is_in_place():
                        self._flush()
                except Exception as error:  # nothing is lost: the changes are recorded, and the next opening applies them
                    logger.warning("%s: the engine could not be flushed: %s", self.folder, str(error).splitlines()[0])
                self._close_engine()
            super().close()

    def _is_in_place(self) -> bool:
        """Whether the folder is still the one that was opened; the engine would write to files of another one, or to none."""
        with contextlib.suppress(OSError):
            return self.folder.stat().st_ino == self._inode
        return False

    # ----------------------------------------------------------------------------------- change

    def put(self, documents: Iterable[EncodedDocument], manual: bool = False) -> None:
        """Add documents, or replace those with the same id, in transactions of ``BATCH``; one with an invalid document is not made.

        The vectors are the model's; the store appends the stems of the texts if it has stems. ``manual`` records that the store
        differs from its corpus.
        """
        iterator = iter(documents)
        while batch := [check_document(document, self.vocabulary) for document in islice(iterator, BATCH)]:
            with self._writing(manual) as positions:
                positions += self._insert(batch)

    def delete(self, ids: Iterable[str], manual: bool = False) -> int:
        """Delete documents, and return the number of those that existed. ``manual`` is as in ``put``."""
        with self._writing(manual) as positions:
            positions += self._remove(ids)
        return len(positions)

    def add_terms(self, names: Sequence[str]) -> None:
        """Add names of terms, whose ids follow those of the names before."""
        with self._lock, _explained(self.folder):
            self.require_writable()
            first = int(self._one("SELECT count(*) FROM terms"))
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("INSERT INTO terms VALUES (?, ?)", enumerate(names, first))
            self._database.execute("COMMIT")

    def require_writable(self) -> None:
        """Raise the errors of writing."""
        with self._lock:
            if not self._holds:
                self._open_engine()  # the process that held it may have ended
            if self.read_only:
                raise _read_only(self.folder)
            if not self._holds:
                raise OutputError(f"{self.folder}: another process holds this index; close it (a server, a search), then try again")

    def rebuild(self) -> None:
        """Rebuild the engine from the database."""
        with self._lock:
            with self._writing():
                self._database.execute(_ALL_CHANGED)
                self._database.execute("UPDATE derived SET postings = NULL")
            with _explained(self.folder):
                if self._engine is not None:
                    self._engine.close()
                    self._engine = None
                    shutil.rmtree(self.folder / "engine")
                self._open_engine()
        self.optimize()

    def choose_engine(self) -> None:
        """Give the store an engine if it has few enough documents for one; otherwise remove it."""
        with self._lock:
            self.require_writable()
            wanted = len(self) <= MOST_IN_ENGINE
            if wanted == (self._engine is not None):
                return
            with _explained(self.folder):
                self._database.execute("UPDATE derived SET engine = ?", (wanted,))  # before its files, which are then not opened
                if self._engine is not None:
                    self._engine.close()
                    self._engine = None
                    logger.info("%s: has no engine above %d documents; searched exactly", self.folder, MOST_IN_ENGINE)
                shutil.rmtree(self.folder / "engine", ignore_errors=True)  # one that was left there lacks changes
                if wanted:
                    self._open_engine()

    def optimize(self) -> None:
        """Write the postings, and let the engine reorganize the added vectors: searches are faster and give the same results."""
        with self._lock, _explained(self.folder):
            if self._holds:
                self._write_postings()
            if self._engine is not None:
                size = sum(path.stat().st_size for path in (self.folder / "engine").rglob("*"))
                self._require_free(_FREE + size)  # the engine writes a new copy before it deletes the old one
                self._engine.optimize()
                self._flush()

    def snapshot(self, folder: Path) -> None:
        """Copy the database in one consistent state, even during writes; opening the copy builds its engine."""
        require_empty(folder)
        make_folder(folder)
        try:
            with contextlib.closing(sqlite3.connect(folder / "documents.sqlite")) as copy, self._lock, _explained(folder):
                self._database.backup(copy)
        except BaseException:
            shutil.rmtree(folder)
            raise

    # ----------------------------------------------------------------------------------- search

    def search(self, terms: np.ndarray, weights: np.ndarray, k: int, filter: Filter | None = None, exact: bool = False) -> Found:
        """The k documents of the highest scores above 0; ties in the order in which the documents were added.

        Args:
            terms, weights: the vector of the query, (active dims,) each.
            exact: search the database in float64, not the engine in float32.
        """
        terms, weights = check_vector("the query", terms, weights, self.width)
        conditions = check_filter(filter)
        with self.reading():
            found: Found = []
            if len(terms) and (self._engine is None or exact):
                found = self.search_exactly(terms, weights, k, conditions)
            elif len(terms):
                found = self._search_engine(terms, weights, k, conditions)
            if not found:
                explain_filter(self, filter)
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))

    def search_rows(self, queries: sparse.csr_matrix, k: int, filter: Filter | None = None, exact: bool = False) -> list[Found]:
        """``search`` for each row of a matrix, (queries, vocabulary), in threads: the engine releases Python's lock."""
        with self.reading():
            if exact or self.searches_exactly:
                return [self.search(row.indices, row.data, k, filter, exact) for row in queries]
            conditions = check_filter(filter)
            rows = [check_vector("the query", row.indices, row.data, queries.shape[1]) for row in queries]
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                found = list(threads.map(lambda row: self._search_engine(row[0], row[1], k, conditions), rows))
            if not all(found):
                explain_filter(self, filter)
        return found

    @property
    def searches_exactly(self) -> bool:
        """Whether searches read the database, in float64, because another process holds the engine or the folder is read-only."""
        return self._engine is None

    def _search_engine(self, terms: np.ndarray, weights: np.ndarray, k: int, conditions: Sequence[Tags]) -> Found:
        found = local_engine.search(self._engine, terms, weights, k, conditions) if len(terms) else []
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))

    def has(self, kind: Literal["names", "values"], *conditions: Sequence[str]) -> bool:
        with self.reading():
            return super().has(kind, *conditions) if self._engine is None else local_engine.has(self._engine, kind, conditions)

    def names(self, limit: int) -> list[str]:
        with self.reading():
            return super().names(limit) if self._engine is None else local_engine.names(self._engine, limit)

    # ---------------------------------------------------------------------- database and engine

    @contextlib.contextmanager
    def _writing(self, manual: bool = False) -> Iterator[list[int]]:
        """A transaction of the database, after which the engine gets the documents whose positions were put into the list."""
        with self._lock, _explained(self.folder):
            self.require_writable()
            self._require_free(_FREE)
            self._database.execute("BEGIN IMMEDIATE")
            positions: list[int] = []
            try:
                self._database.execute("INSERT INTO writes VALUES (1, 1) ON CONFLICT (one) DO UPDATE SET count = count + 1")
                yield positions
                if manual and positions:
                    self._database.execute("PRAGMA user_version = 1")
                self._database.execute(_SET_WRITES)
                for table in ("changed",) * (self._engine is not None) + ("later",) * (self._derived() is not None):
                    query = f"INSERT OR REPLACE INTO {table} SELECT value FROM json_each(?)"
                    self._database.execute(query, (json.dumps(positions),))
                self._database.execute("COMMIT")
                if self._engine is not None:
                    self._apply(list(self._among(f"{_CHANGED_ROWS} WHERE changed.position", positions)))
                    self._unflushed += len(positions)
                    if self._unflushed >= _FLUSH:
                        self._flush()
            except BaseException:  # interruptions and panics of the engine too
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                else:  # the engine may lack recorded changes; the next write opens it again, which applies them
                    self._close_engine()
                raise

    def _open_engine(self) -> None:
        """Open the engine and bring it up to date, unless another process holds it or it cannot be written."""
        if self.read_only:
            return
        folder = self.folder / "engine"
        try:
            if not self._claim.is_locked:
                self._claim.acquire()  # before the engine's own lock, which it checks only after it has changed files
            self._derive()
            if (name := self._derived()) is not None and not (self.folder / "postings" / name).is_dir():  # as in a snapshot
                self._write_postings()
            if not self._one("SELECT engine FROM derived"):
                return
            if folder.is_dir() and any(folder.iterdir()) and not self._load_engine(folder):
                shutil.rmtree(folder)
            if self._engine is None:
                self._database.execute(_ALL_CHANGED)  # first: a crash must not leave an engine that seems complete
                self._engine = local_engine.create(folder)
                local_engine.index_tags(self._engine)
                self._apply([])
            self._catch_up()
        except Timeout:
            logger.info("%s: another process holds the engine; this one searches exactly, which is slower", self.folder)
        except BaseException as error:
            self._close_engine()
            if not is_refusal(error):
                raise
            self._become_read_only()

    @property
    def _holds(self) -> bool:
        """Whether this process is the one that may write."""
        return self._claim.is_locked

    def _derive(self) -> None:
        """Make the tables that an earlier version has not made or kept up to date, from the documents."""
        for statement in (WRITES, *DERIVED):
            self._database.execute(statement)
        if self._derived_row() is not None:
            return
        self._database.execute("BEGIN IMMEDIATE")
        try:
            self._database.execute("INSERT INTO derived VALUES (1, 0, NULL, 1) ON CONFLICT (one) DO UPDATE SET postings = NULL")
            self._database.execute(_SET_WRITES)
            self._database.execute("DELETE FROM later")
            tags.clear(self._database)
            documents = self._tagged()
            while batch := list(islice(documents, BATCH)):
                tags.record(self._database, batch)
            self._database.execute("COMMIT")
        except BaseException:
            self._database.execute("ROLLBACK")
            raise

    def _write_postings(self) -> None:
        """Write the postings of all documents, unless those in the files lack only a few changes."""
        folder, before = self.folder / "postings", self._derived()
        if before is not None and (folder / before).is_dir():
            later = int(self._one("SELECT count(*) FROM later"))
            if later == 0 or later < _FEW * len(self):
                return
        name = write_postings(folder, self._vectors, lambda size: self._require_free(_FREE + size), f"{self._count_changes():08}")
        self._database.execute("BEGIN IMMEDIATE")
        self._database.execute("UPDATE derived SET postings = ?", (name,))
        self._database.execute("DELETE FROM later")
        self._database.execute("COMMIT")
        remove_others(folder, name)

    def _load_engine(self, folder: Path) -> bool:
        """Load the engine, and return whether the database can bring it up to date; if not, close it."""
        try:
            self._engine = local_engine.load(folder)
            count = local_engine.count_changes(self._engine)
        except Exception as error:
            problem = f"is damaged ({str(error).splitlines()[0]})"
        else:
            if count is not None and count <= self._count_changes():
                return True
            problem = "was made by an earlier version" if count is None else "has changes that the database lacks"
        logger.warning("%s: the engine %s; made again", self.folder, problem)
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
        return False

    def _catch_up(self) -> None:
        """Apply the recorded changes to the engine: those lost in a crash, or all documents if the engine is new."""
        query = f"{_CHANGED_ROWS} WHERE changed.position > ? ORDER BY changed.position LIMIT ?"
        last = -1
        while rows := self._database.execute(query, (last, BATCH)).fetchall():
            self._require_free(_FREE)
            self._apply(rows)
            last = rows[-1][0]
        self._flush()

    def _apply(self, rows: Sequence[Row]) -> None:
        local_engine.apply(self._engine, rows, self._count_changes())

    def _count_changes(self) -> int:
        """The number of transactions that changed documents."""
        return int(self._one("SELECT coalesce(max(count), 0) FROM writes"))

    def _flush(self) -> None:
        """Write the engine to disk, and forget the changes that it might have lacked."""
        self._engine.flush()
        self._database.execute("DELETE FROM changed")
        self._unflushed = 0

    def _close_engine(self) -> None:
        engine, self._engine = self._engine, None
        self._unflushed = 0
        try:
            if engine is not None:
                engine.close()
        finally:
            self._claim.release()

    def _require_free(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise AnyspladeError(
                f"{self.folder}: the disk has {free >> 20:,} MiB left, this takes {needed >> 20:,}: make room, then try again"
            )


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the engine into errors of one line."""
    try:
        yield
    except Exception as error:
        if is_refusal(error):
            raise _read_only(folder) from error
        if isinstance(error, sqlite3.Error) or type(error) is Exception:  # the engine raises Exception itself
            message = str(error).splitlines()[0]
            raise AnyspladeError(
                f"{folder}: cannot be written ({message}); no earlier content is lost: fix the cause (a full disk?), then try again"
            ) from error
        raise


def _read_only(folder: Path) -> OutputError:
    return OutputError(f"{folder}: the index is read-only here; allow writing to its folder, or change a copy of it")
