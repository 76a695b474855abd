"""Documents with their vectors on disk: added, changed, searched, and safe from crashes.

``documents.sqlite`` is the source of truth: ids, texts, metadata and vectors, changed in transactions. ``engine`` is a
Qdrant Edge shard of the same vectors and the tags of the metadata, which searches them. A change is on the disk in the
database before the engine gets it. The database records which changes the engine may lack after a crash; they are applied
when the store is opened next. Both count the changes: an engine with a higher count (an older database was put back), or
with none (an earlier version made it), is made again. One process at a time holds the engine. Others, and a process that may
not write there, search the database exactly, which is slower.
"""

import contextlib
import json
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
from filelock import FileLock, Timeout
from scipy import sparse

from anysplade._common.extras import extra
from anysplade._common.files import READ_ONLY, make_folder, require_empty
from anysplade.data.corpus import Document
from anysplade.errors import AnyspladeError, DataError, OutputError
from anysplade.search.documents import (
    EncodedDocument,
    Filter,
    Tags,
    check_filter,
    check_vector,
    check_vectors,
    explain_filter,
    tag,
)
from anysplade.search.exact import Postings

with extra("search"):
    import qdrant_edge as edge

logger = logging.getLogger(__name__)

BATCH = 1024  # documents of a transaction
_FLUSH = 32 * BATCH  # changes after which the engine is made safe: it takes as long for one as for thousands
_ROOM = 2**27  # bytes to be left on the disk: the engine maps its files, and where one cannot grow, the system ends the process
_VECTOR = "splade"
_MARK = 0  # the engine's point that has its count of changes, and no vector; positions begin at 1
_WRITES = "CREATE TABLE IF NOT EXISTS writes (one INTEGER PRIMARY KEY CHECK (one = 1), count INTEGER NOT NULL)"
_SCHEMA = f"""
PRAGMA page_size = 32768;  -- a document takes about 1,500 bytes
CREATE TABLE ids (position INTEGER PRIMARY KEY AUTOINCREMENT, id NOT NULL UNIQUE);  -- narrow: every search reads it
CREATE TABLE contents (
    position INTEGER PRIMARY KEY, title NOT NULL, text NOT NULL, metadata TEXT, terms BLOB NOT NULL, weights BLOB NOT NULL
);
CREATE VIEW documents AS SELECT position, id, title, text, metadata, terms, weights FROM ids JOIN contents USING (position);
CREATE TABLE changed (position INTEGER PRIMARY KEY);  -- in the database, and possibly not yet in the engine
CREATE TABLE shards (number INTEGER PRIMARY KEY);  -- not used any more; earlier versions look for it
{_WRITES};
"""
_ALL_CHANGED = "INSERT OR REPLACE INTO changed SELECT position FROM ids"

Found = list[tuple[int, float]]  # positions and scores, best first
_Row = tuple[int, str | None, np.ndarray | None, np.ndarray | None]  # position, metadata, terms, weights; no terms: deleted


class Store:
    """One folder; a position is a document's number, kept for life and never given again."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        """Open a folder that ``create`` made.

        Raises:
            DataError: damaged, or not to be read here.
            AnyspladeError: the disk is full, and the engine lacks something.
        """
        self.folder = folder
        self.vocabulary = vocabulary
        self.read_only = False
        self._lock = threading.RLock()  # also of reads: another thread's transaction would be seen on this connection
        self._exact: tuple[tuple[Any, ...], Postings, np.ndarray] | None = None  # the database's version, postings, positions
        self._engine: Any = None
        self._unsafe = 0  # changes that the engine has, perhaps not on disk
        self._claim = FileLock(folder / "lock", timeout=0, thread_local=False)  # another thread can release it
        self._stamp: tuple[Any, ...] | None = None  # of the files, where SQLite does not look whether another process changed them
        self._connect()
        with _explained(self.folder):
            self._open_engine()

    def _connect(self) -> None:
        """Open the database to write, or else to read, or else without the files that SQLite creates even for reading."""
        path = (self.folder / "documents.sqlite").absolute()
        for mode in ("mode=rw", "mode=ro", "mode=ro&immutable=1"):
            frozen = "immutable" in mode
            try:
                if frozen and self._files()[-1]:  # it would not be read, and what it holds be missing
                    raise DataError(
                        f"{self.folder}: read-only here, and its last changes are still in documents.sqlite-wal; "
                        "open it once where it can be written"
                    )
                stamp = self._files() if frozen else None
                database = sqlite3.connect(f"{path.as_uri()}?{mode}", uri=True, check_same_thread=False, isolation_level=None)
                if mode == "mode=rw":
                    database.execute("PRAGMA journal_mode = WAL")
                    database.execute("PRAGMA synchronous = FULL")  # an fsync a transaction: the engine must not outlive what it got
                    database.execute("PRAGMA wal_autocheckpoint = 4096")  # 128 MiB: pages that change often are moved less often
                database.execute("PRAGMA cache_size = -65536")  # 64 MiB: the ids of millions of documents
                database.execute("SELECT count(*) FROM changed")
            except FileNotFoundError as error:
                raise DataError(f"{self.folder}: the index is damaged (documents.sqlite is missing); build it again") from error
            except (OSError, sqlite3.Error) as error:
                if not _is_refusal(error, sqlite3.SQLITE_CANTOPEN):
                    raise DataError(f"{self.folder}: the index is damaged (documents.sqlite: {error}); build it again") from error
                if frozen:
                    raise DataError(
                        f"{self.folder}: cannot be read here (documents.sqlite: {error}); allow it, or copy it"
                    ) from error
            else:
                self._database, self._stamp = database, stamp
                # For passes over all documents: they see one state, and the other connection does not wait for them.
                reading = mode.replace("rw", "ro")
                self._passes = sqlite3.connect(f"{path.as_uri()}?{reading}", uri=True, check_same_thread=False)
                if mode != "mode=rw":
                    self._become_read_only()
                return

    def _files(self) -> tuple[int, int, int]:
        """What changes when a process writes: the file, and how much is in the log beside it."""
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

    @staticmethod
    def create(folder: Path) -> None:
        """An empty store, in place of what an interrupted call left there."""
        make_folder(folder)
        for path in folder.glob("documents.sqlite*"):
            path.unlink()
        shutil.rmtree(folder / "engine", ignore_errors=True)
        with contextlib.closing(sqlite3.connect(folder / "documents.sqlite")) as database:
            database.executescript(_SCHEMA)

    def close(self) -> None:
        """Release the engine, so that another process can open it."""
        with self._lock:
            if self._engine is not None:
                try:
                    self._flush()
                except Exception as error:  # nothing is lost: the database records it, and the next opening repairs it
                    logger.warning("%s: the engine was not closed in order: %s", self.folder, str(error).splitlines()[0])
                self._close_engine()
            self._database.close()
            self._passes.close()

    def __len__(self) -> int:
        return int(self._one("SELECT count(*) FROM ids"))

    @property
    def postings(self) -> int:
        """Weights above 0 of all documents."""
        return int(self._one("SELECT coalesce(sum(length(terms)), 0) / 4 FROM contents"))

    @property
    def edited(self) -> bool:
        """Whether documents were changed ``manual``."""
        return bool(self._one("PRAGMA user_version"))

    def _one(self, query: str) -> Any:
        with self._lock:
            return self._database.execute(query).fetchone()[0]

    # -------------------------------------------------------------------------------------- change

    def put(self, documents: Iterable[EncodedDocument], manual: bool = False) -> None:
        """Add documents, or replace those whose id is there, a transaction for each ``BATCH`` of them.

        Args:
            manual: note that the store is no longer what its corpus says.

        Raises:
            DataError: a vector that cannot be indexed; its transaction stays out.
            OutputError: another process holds the store, or it is read-only.
            AnyspladeError: the disk is full.
        """
        iterator = iter(documents)
        while batch := list(islice(iterator, BATCH)):
            check_vectors(batch, self.vocabulary)
            with self._writing(manual) as (cursor, rows):
                rows += _put(cursor, batch)

    def delete(self, ids: Iterable[str], manual: bool = False) -> int:
        """Remove documents; how many of them there were.

        Args:
            manual: as ``put`` has it.

        Raises:
            OutputError: another process holds the store, or it is read-only.
            AnyspladeError: the disk is full.
        """
        with self._writing(manual) as (cursor, rows):
            for id_ in ids:
                row = cursor.execute("DELETE FROM ids WHERE id = ? RETURNING position", (_to_sqlite(id_),)).fetchone()
                if row is not None:
                    cursor.execute("DELETE FROM contents WHERE position = ?", row)
                    rows.append((row[0], None, None, None))
        return len(rows)

    def require_writable(self) -> None:
        """Raise OutputError if another process holds the store, or it is read-only."""
        with self._lock:
            if self._engine is None:
                self._open_engine()  # the other process may be gone
            if self.read_only:
                raise _read_only(self.folder)
            if self._engine is None:
                raise OutputError(f"{self.folder}: another process holds this index; close it (a server, a search), then try again")

    def rebuild(self) -> None:
        """Rebuild the engine from the database.

        Raises:
            OutputError: another process holds the store, or it is read-only.
            AnyspladeError: the disk is full.
        """
        with self._lock, self._writing():  # which refuses where another process holds it
            self._database.execute(_ALL_CHANGED)
        with self._lock, _explained(self.folder):
            self._engine.close()
            self._engine = None
            shutil.rmtree(self.folder / "engine")
            self._open_engine()
        self.optimize()

    def optimize(self) -> None:
        """Let the engine reorganize what was added: searches are faster afterwards, with the same results."""
        with self._lock, _explained(self.folder):
            if self._engine is not None:
                engine = sum(path.stat().st_size for path in (self.folder / "engine").rglob("*"))
                self._require_room(_ROOM + engine)  # it is written anew beside the old
                self._engine.optimize()
                self._flush()

    def snapshot(self, folder: Path) -> None:
        """A consistent copy, also while the store is written to; its engine is made when it is first opened.

        Raises:
            OutputError: the folder is not empty.
            AnyspladeError: the disk is full.
        """
        require_empty(folder)
        make_folder(folder)
        try:
            with contextlib.closing(sqlite3.connect(folder / "documents.sqlite")) as copy, self._lock, _explained(folder):
                self._database.backup(copy)
        except BaseException:
            shutil.rmtree(folder)
            raise

    # -------------------------------------------------------------------------------------- search

    def search(self, terms: np.ndarray, weights: np.ndarray, k: int, wanted: Filter | None = None, exact: bool = False) -> Found:
        """The k documents of the highest scores above 0; ties in the order in which they were added.

        Args:
            terms, weights: the query's vector, (active dims,) each.
            exact: from the database in float64, instead of the engine's float32.

        Raises:
            DataError: an invalid vector; see ``check_vector``.
            OptionError: an invalid filter, or one with a name that no document has.
        """
        terms, weights = check_vector("the query", terms, weights, self.vocabulary)
        conditions = check_filter(wanted)
        with self.reading():
            found: Found = []
            if len(terms) and (self._engine is None or exact):
                found = self._search_exactly(terms, weights, k, conditions)
            elif len(terms):
                vector = edge.SparseVector(terms.tolist(), weights.tolist())
                filter = edge.Filter(must=[_any_of("values", values) for _, values in conditions]) if conditions else None
                request = edge.QueryRequest(query=edge.Query.Nearest(vector, using=_VECTOR), limit=k, filter=filter)
                found = [(int(point.id), point.score) for point in self._engine.query(request)]
            if not found:
                explain_filter(self, wanted)
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """A time in which no thread and no process changes what is read here, so that what a search finds can be fetched."""
        with self._lock:
            if self._stamp is not None and self._stamp != self._files():
                self._database.close()
                self._connect()
            if self._database.in_transaction:  # of a call around this one
                yield
                return
            self._database.execute("BEGIN")
            try:
                yield
            finally:
                self._database.execute("COMMIT")

    def _search_exactly(self, terms: np.ndarray, weights: np.ndarray, k: int, wanted: list[Tags]) -> Found:
        version = (int(self._one("PRAGMA data_version")), self._database.total_changes, self._stamp)
        exact = self._exact
        if exact is None or exact[0] != version:
            rows = self._database.execute("SELECT position, terms, weights FROM contents ORDER BY position").fetchall()
            indptr = np.concatenate([[0], np.cumsum([len(row[1]) // 4 for row in rows])]).astype(np.int64)
            columns = np.frombuffer(b"".join(row[1] for row in rows), np.int32)
            data = np.frombuffer(b"".join(row[2] for row in rows), np.float32)
            matrix = sparse.csr_matrix((data, columns, indptr), shape=(len(rows), self.vocabulary))
            exact = self._exact = version, Postings.from_documents(matrix), np.array([row[0] for row in rows], np.int64)
        _, postings, positions = exact
        if not postings.count:
            return []
        found, scores = postings.top(terms, weights, postings.count if wanted else k)
        hits = [(int(positions[d]), float(s)) for d, s in zip(found, scores, strict=True)]
        if wanted:
            allowed = {
                position
                for position, tags in self._tagged()
                if all(not set(values).isdisjoint(tags.values) for _, values in wanted)
            }
            hits = [hit for hit in hits if hit[0] in allowed]
        return hits[:k]

    def _tagged(self) -> Iterator[tuple[int, Tags]]:
        rows = self._database.execute("SELECT position, metadata FROM contents WHERE metadata NOT NULL")
        return ((position, _tags(metadata)) for position, metadata in rows)

    def has(self, kind: Literal["names", "values"], *conditions: Sequence[str]) -> bool:
        """Whether a document has, for each condition, one of its tags."""
        with self.reading():
            if self._engine is None:
                documents = (set(getattr(held, kind)) for _, held in self._tagged())
                return any(all(not has.isdisjoint(tags) for tags in conditions) for has in documents)
            filter = edge.Filter(must=[_any_of(kind, tags) for tags in conditions])
            return bool(self._engine.count(edge.CountRequest(filter=filter, exact=True)))

    def names(self, limit: int) -> list[str]:
        """Names of metadata that documents have, the most frequent first."""
        with self.reading():
            if self._engine is None:
                counts = Counter(name for _, tags in self._tagged() for name in tags.names)
                return [name for name, _ in counts.most_common(limit)]
            return [hit.value for hit in self._engine.facet(edge.FacetRequest("names", limit, exact=True)).hits]

    def compare(self, documents: Iterable[tuple[str, Document]]) -> Iterator[tuple[str, Document, int | None, bool]]:
        """The same ids and documents, with the position if the id is there, and whether title, text and metadata there
        are the same."""
        query = "SELECT id, position, title, text, metadata FROM documents WHERE id"
        iterator = iter(documents)
        while batch := list(islice(iterator, BATCH)):
            with self._lock:
                held = {row[0]: row[1:] for row in _among(self._database, query, [_to_sqlite(id_) for id_, _ in batch])}
            for id_, document in batch:
                position, *content = held.get(_to_sqlite(id_), (None,))
                yield id_, document, position, tuple(content) == _stored(document)

    def positions(self) -> np.ndarray:
        """Of all documents, rising."""
        with self._lock:
            return np.fromiter((row[0] for row in self._database.execute("SELECT position FROM ids ORDER BY position")), np.int64)

    def ids(self, positions: Sequence[int]) -> list[str]:
        """Ids by position, in the order asked for."""
        with self._lock:
            rows = dict(_among(self._database, "SELECT position, id FROM ids WHERE position", positions))
        return [_from_sqlite(rows[position]) for position in positions]

    def documents(self, positions: Sequence[int]) -> list[EncodedDocument]:
        """Documents by position, in the order asked for."""
        with self._lock:
            rows = {row[0]: row[1:] for row in _among(self._database, "SELECT * FROM documents WHERE position", positions)}
        return [_encoded(*rows[position]) for position in positions]

    def find(self, id_: str) -> EncodedDocument | None:
        """A document by its id."""
        with self._lock:
            row = self._database.execute("SELECT * FROM documents WHERE id = ?", (_to_sqlite(id_),)).fetchone()
        return None if row is None else _encoded(*row[1:])

    def items(self) -> Iterator[tuple[int, EncodedDocument]]:
        """Every document with its position, in the order in which they were added; not what is written meanwhile."""
        for row in self._passes.execute("SELECT * FROM documents ORDER BY position"):
            yield row[0], _encoded(*row[1:])

    def __iter__(self) -> Iterator[EncodedDocument]:
        """Every document, in the order in which they were added."""
        return (document for _, document in self.items())

    # ---------------------------------------------------------------------------- database and engine

    @contextlib.contextmanager
    def _writing(self, manual: bool = False) -> Iterator[tuple[sqlite3.Cursor, list[_Row]]]:
        """Change the database in one transaction, and then the engine: it gets the rows that are put into the list."""
        with self._lock, _explained(self.folder):
            self.require_writable()
            self._require_room(_ROOM)
            cursor = self._database.cursor()
            cursor.execute("BEGIN IMMEDIATE")
            rows: list[_Row] = []
            try:
                cursor.execute("INSERT INTO writes VALUES (1, 1) ON CONFLICT (one) DO UPDATE SET count = count + 1")
                yield cursor, rows
                if manual and rows:  # where nothing was deleted, nothing was changed
                    cursor.execute("PRAGMA user_version = 1")
                positions = json.dumps([row[0] for row in rows])
                cursor.execute("INSERT OR REPLACE INTO changed SELECT value FROM json_each(?)", (positions,))
                cursor.execute("COMMIT")
                self._apply(rows)
                self._unsafe += len(rows)
                if self._unsafe >= _FLUSH:
                    self._flush()
            except BaseException:  # an interruption too, and the engine's panics
                if self._database.in_transaction:
                    cursor.execute("ROLLBACK")
                else:  # it may lack recorded changes; the next write opens it again, which applies them
                    self._close_engine()
                raise

    def _open_engine(self) -> None:
        """Have the engine, up to date; none while another process holds it, or where it cannot be written."""
        place = self.folder / "engine"
        if self.read_only:
            return
        try:
            if not self._claim.is_locked:
                # Before the engine is touched: it looks at its own lock only after it has changed files of the holder's.
                self._claim.acquire()
            self._database.execute(_WRITES)
            if place.is_dir() and any(place.iterdir()) and not self._load_engine(place):
                shutil.rmtree(place)  # the database has everything, so nothing is lost
            if self._engine is None:
                self._database.execute(_ALL_CHANGED)  # first: a crash must not leave an engine that looks complete
                place.mkdir(exist_ok=True)
                parameters = {_VECTOR: edge.EdgeSparseVectorParams()}
                self._engine = edge.EdgeShard.create(str(place), edge.EdgeConfig(sparse_vectors=parameters))
                for field in Tags._fields:
                    self._engine.update(edge.UpdateOperation.create_field_index(field, edge.PayloadSchemaType.Keyword))
                self._apply([])
            self._catch_up()
        except Timeout:
            logger.info("%s: another process holds the engine; this one searches exactly, which is slower", self.folder)
        except BaseException as error:
            self._close_engine()
            if not _is_refusal(error):
                raise
            self._become_read_only()

    def _load_engine(self, place: Path) -> bool:
        """Whether there is an engine that the database can bring up to date."""
        try:
            self._engine = edge.EdgeShard.load(str(place))
            marks = self._engine.retrieve([_MARK], True, False)
        except Exception as error:
            logger.warning("%s: the engine is damaged (%s); made again", self.folder, str(error).splitlines()[0])
        else:
            if marks and marks[0].payload["writes"] <= self._writes():
                return True
            why = "has changes that the database lacks" if marks else "was made by an earlier version"
            logger.warning("%s: the engine %s; made again", self.folder, why)
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
        return False

    def _writes(self) -> int:
        """Transactions that changed documents."""
        return int(self._one("SELECT coalesce(max(count), 0) FROM writes"))

    def _require_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise AnyspladeError(
                f"{self.folder}: the disk has {free >> 20:,} MiB left, this takes {needed >> 20:,}: make room, then try again"
            )

    def _close_engine(self) -> None:
        engine, self._engine = self._engine, None
        self._unsafe = 0
        try:
            if engine is not None:
                engine.close()
        finally:
            self._claim.release()

    def _catch_up(self) -> None:
        """Apply to the engine the changes recorded in the database: those lost in a crash, or everything for a new engine."""
        query = """SELECT changed.position, metadata, terms, weights FROM changed LEFT JOIN contents USING (position)
                   WHERE changed.position > ? ORDER BY changed.position LIMIT ?"""
        last = -1
        while rows := self._database.execute(query, (last, BATCH)).fetchall():
            self._require_room(_ROOM)
            self._apply([(row[0], row[1], _array(row[2], np.int32), _array(row[3], np.float32)) for row in rows])
            last = rows[-1][0]
        self._flush()

    def _apply(self, rows: Sequence[_Row]) -> None:
        """Positions with metadata, terms and weights into the engine; without terms, out of it."""
        gone: list[Any] = [row[0] for row in rows if row[2] is None]
        points = [
            edge.Point(
                position,
                {_VECTOR: edge.SparseVector(terms.tolist(), weights.tolist())} if len(terms) else {},
                _tags(metadata)._asdict(),
            )
            for position, metadata, terms, weights in rows
            if terms is not None and weights is not None
        ]
        self._engine.update(edge.UpdateOperation.upsert_points([edge.Point(_MARK, {}, {"writes": self._writes()}), *points]))
        if gone:
            self._engine.update(edge.UpdateOperation.delete_points(gone))

    def _flush(self) -> None:
        """Flush the engine to disk; until then the database records what the engine may lack."""
        self._engine.flush()
        self._database.execute("DELETE FROM changed")
        self._unsafe = 0


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Raise errors of SQLite and of the engine as errors of one line."""
    try:
        yield
    except Exception as error:
        if _is_refusal(error):
            raise _read_only(folder) from error
        if isinstance(error, sqlite3.Error) or type(error) is Exception:  # the engine's have no class of their own
            message = str(error).splitlines()[0]
            raise AnyspladeError(
                f"{folder}: cannot be written ({message}); no earlier content is lost: fix the cause (a full disk?), then try again"
            ) from error
        raise


def _is_refusal(error: BaseException, *codes: int) -> bool:
    """Whether the system refuses this process to write or read, and nothing is damaged.

    Args:
        codes: of SQLite, that mean so here too.
    """
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without what SQLite's extended codes add
        return code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, *codes)
    return isinstance(error, OSError) and error.errno in READ_ONLY


def _read_only(folder: Path) -> OutputError:
    return OutputError(f"{folder}: the index is read-only here; allow writing to its folder, or change a copy of it")


# ------------------------------------------------------------------------------------------- rows


def _among(database: sqlite3.Connection | sqlite3.Cursor, query: str, values: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Rows of a query that ends in the name of a column, whose value is to be one of these."""
    for start in range(0, len(values), BATCH):  # SQLite takes so many marks and no more
        part = values[start : start + BATCH]
        yield from database.execute(f"{query} IN ({','.join('?' * len(part))})", part)


def _put(cursor: sqlite3.Cursor, documents: Sequence[EncodedDocument]) -> list[_Row]:
    """Write to the database, and return the rows for the engine."""
    latest = {_to_sqlite(document.id): document for document in documents}  # the last of duplicates
    known = {id_: position for position, id_ in _among(cursor, "SELECT position, id FROM ids WHERE id", list(latest))}
    new = [id_ for id_ in latest if id_ not in known]
    (last,) = cursor.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence").fetchone()  # the highest ever given
    known |= {id_: last + i for i, id_ in enumerate(new, 1)}
    cursor.executemany("INSERT INTO ids VALUES (?, ?)", [(known[id_], id_) for id_ in new])
    rows: list[_Row] = []
    contents = []
    for id_, (_, content, terms, weights) in latest.items():
        stored = _stored(content)
        row = known[id_], stored[2], np.asarray(terms, np.int32), np.asarray(weights, np.float32)
        rows.append(row)
        contents.append((row[0], *stored, row[2].tobytes(), row[3].tobytes()))
    cursor.executemany("INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?, ?, ?)", contents)
    return rows


def _stored(document: Document) -> tuple[str | bytes, str | bytes, str | None]:
    """Title, text and metadata as SQLite has them."""
    metadata = None if document.metadata is None else json.dumps(document.metadata)
    return _to_sqlite(document.title), _to_sqlite(document.text), metadata


def _array(stored: bytes | None, kind: type[np.generic]) -> np.ndarray | None:
    return None if stored is None else np.frombuffer(stored, kind)


def _encoded(id_: Any, title: Any, text: Any, metadata: str | None, terms: bytes, weights: bytes) -> EncodedDocument:
    content = Document(_from_sqlite(title), _from_sqlite(text), None if metadata is None else json.loads(metadata))
    return EncodedDocument(_from_sqlite(id_), content, np.frombuffer(terms, np.int32), np.frombuffer(weights, np.float32))


def _to_sqlite(text: str) -> str | bytes:
    """Text for SQLite, which is UTF-8: a lone surrogate, which JSON can hold, goes in as bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def _from_sqlite(value: str | bytes) -> str:
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else value


def _tags(metadata: str | None) -> Tags:
    return tag(None if metadata is None else json.loads(metadata))


def _any_of(kind: str, tags: Sequence[str]) -> Any:
    return edge.FieldCondition(key=kind, match=edge.MatchAny(list(tags)))
