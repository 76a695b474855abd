"""Ids that were read, to find duplicates: the first ones in memory, the others in a temporary database."""

import sqlite3

from anysplade.errors import AnyspladeError

_IN_MEMORY = 2**17  # ids, which take about 20 MiB
_CACHE = 65_536  # KiB of the database in memory; the rest lies in the folder for temporary files


class SeenIds:
    """The row numbers of ids. Exact: the database has the ids themselves."""

    def __init__(self) -> None:
        self._first: dict[str, int] = {}
        self._others: sqlite3.Connection | None = None  # its file has no name, and the system removes it

    def earlier(self, id_: str, number: int) -> int | None:
        """The row in which an id was before; None if it is new, and it is recorded then.

        Raises:
            AnyspladeError: the folder for temporary files is full.
        """
        if (row := self._first.get(id_)) is not None:
            return row
        if len(self._first) < _IN_MEMORY:
            self._first[id_] = number
            return None
        key = id_.encode("utf-8", "surrogatepass")
        try:
            others = self._others = self._others or _open()
            if others.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, number)).rowcount:
                return None
            found: int = others.execute("SELECT number FROM seen WHERE id = ?", (key,)).fetchone()[0]
        except sqlite3.Error as error:
            raise AnyspladeError(f"the ids cannot be kept to find duplicates ({error}); make room in the folder TMPDIR") from error
        return found


def _open() -> sqlite3.Connection:
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # an iterator can be read by another thread
    for statement in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE}"):
        database.execute(f"PRAGMA {statement}")
    database.execute("CREATE TABLE seen (id BLOB PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID")
    database.execute("BEGIN")
    return database
