"""Files and folders that are written completely or not at all."""

import errno
import functools
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from anysplade.errors import AnyspladeError, OutputError

logger = logging.getLogger(__name__)

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)  # error codes for missing permission
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TAKEN = (errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)
_TORCH_CANNOT_WRITE = re.compile(r"PytorchStreamWriter failed|unexpected pos \d+ vs|iostream error")


def user_path(name: str | Path) -> Path:
    """A path given by the user: ~ and ~user are home folders, unless a file or folder with exactly that name exists."""
    path = Path(name)
    if not path.name:  # "." and "", which have no parent to write a sibling to
        return path.absolute()
    if not str(path).startswith("~") or path.exists():
        return path
    try:
        return path.expanduser()
    except RuntimeError:  # no such user or no home folder; using the path gives the error
        return path


def beside(path: Path, name: str) -> Path:
    """A path in the same folder as ``path``; ``{}`` in its name is replaced by the path's own name."""
    if not path.name:
        raise OutputError(f"{path}: is the root of a file system; name a file or folder in it")
    return path.with_name(name.format(path.name))


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder that is renamed to ``target``, which is new or empty, when the block ends without an error."""
    target = user_path(target)
    require_empty(target)
    work = beside(target, f".{{}}-{secrets.token_hex(4)}")
    with writing(target), _without_empty(target.parent):
        try:
            work.mkdir(parents=True)
            yield work
            if target.exists():
                target.rmdir()
            work.rename(target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


@contextmanager
def _without_empty(folder: Path) -> Iterator[None]:
    """At the end, remove the folder and its parents if the block created them and left them empty."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    finally:
        for place in missing:
            with suppress(OSError):  # it is not empty
                place.rmdir()


def require_folder(folder: Path) -> None:
    """Raise OutputError unless a folder can be written to, to find out before the work; nothing is left there."""
    with _without_empty(folder):
        make_folder(folder)
        with writing(folder):
            tempfile.TemporaryFile(dir=folder).close()


def require_empty(target: Path) -> None:
    """Raise OutputError unless ``target`` does not exist or is an empty folder."""
    with writing(target):
        if target.exists() and not target.is_dir():
            raise OutputError(f"{target}: is a file; give a new folder")
        if target.is_dir() and any(target.iterdir()):
            raise OutputError(f"{target}: the folder is not empty; give a new one, or remove it first")


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, unless they exist."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_atomic(target: str | Path, content: str | bytes) -> None:
    """Write a file of text or bytes under a temporary name and rename it to ``target``."""
    with whole_file(target) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def whole_file(target: str | Path) -> Iterator[BinaryIO]:
    """A file with a temporary name that is renamed to ``target`` when the block ends without an error."""
    target = user_path(target)
    with writing(target), _without_empty(target.parent):
        if target.is_dir():
            raise OutputError(f"{target}: is a folder; name a file in it")
        work = target.with_name(f".{target.name}.{os.getpid()}")
        if target.exists() and not target.is_file():  # else it is replaced, even /dev/null if the user is root
            raise OutputError(f"{target}: is a device or a pipe; name a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(work, "wb") as opened:
                yield opened
                opened.flush()
                os.fsync(opened.fileno())  # else a power failure can leave the new name without the content
            work.replace(target)
        except BaseException:
            work.unlink(missing_ok=True)
            raise


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Lock a folder for this process; the system releases the lock when the process ends, however it ends.

    A folder that this process may not write to is not locked; the first write to it raises the error.
    """
    lock = FileLock(folder / "lock", timeout=0)
    with _without_empty(folder):
        try:
            with suppress(OutputError), writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire()
        except Timeout:
            raise OutputError(f"{folder}: another process works there now; wait for it, or choose another `output`") from None
        try:
            yield
        finally:
            if lock.is_locked:
                (folder / "lock").unlink(missing_ok=True)  # before the release, while no other process can have it
                lock.release()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors on writing a path, from any library, into an OutputError.

    Errors about other files, such as one that may not be read, are not changed.
    """
    if str(path).startswith("~"):  # ``user_path`` found no such user
        raise OutputError(f"{path}: no home folder of that name here; write the path in full, or ./{path} for one here")
    try:
        yield
    except AnyspladeError:
        raise
    except Exception as error:
        code = _error_code(error)
        named = getattr(error, "filename", None)
        named = named if isinstance(named, str | os.PathLike) else None  # None for libraries in Rust and for networks
        known = code in (*READ_ONLY, *_FULL, *_TAKEN) or "null byte" in str(error)
        ours = named is not None and _is_part(Path(named), path)
        elsewhere = named is not None and os.path.isfile(named)  # noqa: PTH113 - it never raises
        if not ours and (elsewhere or not known):
            raise
        why = os.strerror(code) if code else error
        fix = "make room, or name another place" if code in _FULL else "name another place, or make this one writable"
        raise OutputError(f"{path}: cannot be written: {why}; {fix}") from error


def _is_part(named: Path, path: Path) -> bool:
    """Whether a path named by an error is the output, a part of it (also under its temporary name), or a parent folder."""
    return named in path.parents or any(
        one == path or (one.parent == path.parent and one.name.startswith(f".{path.name}")) for one in (named, *named.parents)
    )


def _error_code(error: Exception) -> int | None:
    """The system's code of an error; libraries in Rust give it in the text, and torch, which gives none, usually lacks room."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else errno.ENOSPC if _TORCH_CANNOT_WRITE.search(str(error)) else None


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, unless the process has logged it before."""
    logger.warning(message)


def cache_folder() -> Path:
    """``ANYSPLADE_CACHE``, or the user's cache folder; it need not exist. Raises RuntimeError if the user has no home folder."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ANYSPLADE_CACHE") or Path(user) / "anysplade")


def default_cache() -> Path | None:
    """The folder that keeps vectors between calls of commands; None, with a warning, if it cannot be written."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        warn_once(f"vectors are not kept ({error}); set ANYSPLADE_CACHE to a folder that can be written")
        return None
    return folder
