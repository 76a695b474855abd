"""The folder that keeps what is costly to make: what is in it, which of it is in use, and how to make room."""

import contextlib
import os
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anysplade._common.files import cache_folder, writing
from anysplade._common.tables import Tabular
from anysplade.errors import OptionError

try:
    import fcntl
except ImportError:  # Windows: only the time of the last use protects an entry
    fcntl = None  # type: ignore[assignment]

LIMIT = "ANYSPLADE_CACHE_LIMIT"  # the environment variable with the size that commands keep the cache below

KINDS = {
    "vectors": "vectors of evaluated collections",
    "teachers": "vectors and scores of teachers",
    "openvino": "models converted for OpenVINO",
    "shards": "documents encoded for servers",
    "fingerprints": "hashes of the files of models",
}
_ENTRY = re.compile(r"[0-9a-f]{32,64}")  # names of entries; anything else in the folder is not ours
_REMOVED = ".removed-"  # before the name of an entry that is being removed
_RECENT = 3600.0  # seconds after its last use in which an entry counts as in use where locks do not tell
_UNITS = {"": 1, "B": 1} | {f"{prefix}{unit}": base**power for unit, base in (("B", 1000), ("iB", 1024))
                            for power, prefix in enumerate("KMGT", 1)}  # fmt: skip

_in_use: dict[Path, int] = {}  # folders that this process uses, and the descriptor that holds the lock of each


@dataclass(frozen=True, repr=False)
class CacheEntry(Tabular):
    """A folder in the cache, which is removed as a whole."""

    kind: str  # one of ``KINDS``
    path: str  # of the folder
    bytes: int  # size of its files
    last_use: float  # seconds since 1970
    in_use: bool  # by a process that runs now


def mark_used(folder: Path | None) -> None:
    """Record that this process uses a folder of the cache, so that no other process removes it; harmless for other folders."""
    if folder is None or folder in _in_use:
        return
    with contextlib.suppress(OSError):  # it does not exist yet, or is not writable
        os.utime(folder)
    if fcntl is not None:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released when the process ends, however it ends
            except OSError:
                os.close(descriptor)
            else:
                _in_use[folder] = descriptor


def release() -> None:
    """Declare that this process uses nothing in the cache any more."""
    while _in_use:
        os.close(_in_use.popitem()[1])


def cache_entries(folder: str | Path | None = None) -> list[CacheEntry]:
    """What the cache holds, the least recently used first; files and folders that anysplade did not make are left out.

    Args:
        folder: the cache; by default ``ANYSPLADE_CACHE`` or the user's cache folder.
    """
    root = cache_folder() if folder is None else Path(folder)
    found = []
    for kind in KINDS:
        place = root / kind
        folders = [place] if kind == "fingerprints" else sorted(place.glob("*"))
        found += [_entry(kind, one) for one in folders if one.is_dir() and (kind == one.name or _is_entry(one.name))]
    return sorted(found, key=lambda entry: (entry.last_use, entry.path))


def prune_cache(limit: int, folder: str | Path | None = None) -> list[CacheEntry]:
    """Remove the least recently used entries of the cache until it has at most ``limit`` bytes, and return those removed.

    What a running process uses stays. An entry is renamed before it is removed, so an interrupted call leaves no half of one under
    its name; the next call removes the rest.

    Args:
        limit: bytes, at least 0; 0 removes all that is not in use.
        folder: the cache; by default ``ANYSPLADE_CACHE`` or the user's cache folder.

    Raises:
        OptionError: the limit is negative.
        OutputError: the cache cannot be written.
    """
    if limit < 0:
        raise OptionError(f"`limit` is {limit}: a cache has at least 0 bytes")
    root = cache_folder() if folder is None else Path(folder)
    for place in (root, *(root / kind for kind in KINDS)):
        for rest in place.glob(f"{_REMOVED}*"):
            shutil.rmtree(rest, ignore_errors=True)
    entries = cache_entries(root)
    size, removed = sum(entry.bytes for entry in entries), []
    for entry in entries:
        if size <= limit:
            break
        if not entry.in_use and _remove(Path(entry.path)):
            size -= entry.bytes
            removed.append(entry)
    return removed


def parse_size(text: str) -> int:
    """The bytes in a text such as ``20GB``, ``500 MB`` or ``1.5GiB``; raises OptionError for another text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", text.strip().lower())
    factor = {unit.lower(): factor for unit, factor in _UNITS.items()}.get(match[2]) if match else None
    if match is None or factor is None:
        raise OptionError(f"{text!r} is no size; such as 20GB, 500MB or 1.5GiB")
    return round(float(match[1]) * factor)


def size_limit() -> int | None:
    """The size in ``ANYSPLADE_CACHE_LIMIT``; None without one."""
    text = os.environ.get(LIMIT)
    try:
        return parse_size(text) if text else None
    except OptionError as error:
        raise OptionError(f"{LIMIT}: {error}") from None


def _is_entry(name: str) -> bool:
    return _ENTRY.fullmatch(name) is not None


def _entry(kind: str, folder: Path) -> CacheEntry:
    size, last = 0, 0.0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):  # removed meanwhile
            status = path.stat()
            last = max(last, status.st_mtime)
            size += status.st_size if path.is_file() else 0
    return CacheEntry(kind, str(folder), size, last, _is_used(folder, last))


def _is_used(folder: Path, last_use: float) -> bool:
    if fcntl is None:
        return time.time() - last_use < _RECENT
    with _exclusive(folder) as free:
        return not free


@contextlib.contextmanager
def _exclusive(folder: Path) -> Any:
    """Hold a folder for this process alone; gives whether that was possible."""
    if fcntl is None:
        yield True
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> bool:
    """Remove an entry unless a process began to use it."""
    with _exclusive(folder) as free:
        if not free:
            return False
        gone = folder.with_name(f"{_REMOVED}{folder.name}-{secrets.token_hex(4)}")
        with writing(folder):
            folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
    return True
