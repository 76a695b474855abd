"""Files and folders that are written atomically: complete or not at all."""

import errno
import functools
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from anysplade.errors import AnyspladeError, OutputError

logger = logging.getLogger(__name__)

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)  # codes of an OSError that mean: no permission
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TORCH_CANNOT_WRITE = re.compile(r"PytorchStreamWriter failed|unexpected pos \d+ vs|iostream error")
_TAKEN = (errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)


def user_path(name: str | Path) -> Path:
    """A path as a person gives it: ~ and ~user are home folders, unless there is a file or folder of that very name."""
    path = Path(name)
    if not path.name:  # "." and "": beside them nothing could be written
        return path.absolute()
    if not str(path).startswith("~") or path.exists():
        return path
    try:
        return path.expanduser()
    except RuntimeError:  # no such user, or no home folder: what needs the path says that it is not there
        return path


def beside(path: Path, name: str) -> Path:
    """A path in the same folder, whose name has the path's own for ``{}``.

    Raises:
        OutputError: the path is the root of a file system.
    """
    if not path.name:
        raise OutputError(f"{path}: is the root of a file system; name a file or folder in it")
    return path.with_name(name.format(path.name))


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder that is renamed to ``target`` when the block ends without an error.

    Raises:
        OutputError: ``target`` exists and is not an empty folder, or cannot be written, also for want of room.
    """
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
    """Remove at the end what this block made of a folder and of the folders around it and left empty."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    finally:
        for place in missing:
            with suppress(OSError):  # it is not empty
                place.rmdir()


def require_folder(folder: Path) -> None:
    """Raise OutputError unless a folder can be written to, before the work whose results it gets; nothing is left there."""
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
    """Create a folder and its parents, unless they exist.

    Raises:
        OutputError: a folder cannot be created.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_atomic(target: str | Path, content: str | bytes) -> None:
    """Write a file of text or bytes under a temporary name and rename it to ``target``.

    Raises:
        OutputError: ``target`` is a folder, or cannot be written, also for want of room.
    """
    with whole_file(target) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def whole_file(target: str | Path) -> Iterator[BinaryIO]:
    """A file with a temporary name that is renamed to ``target`` when the block ends without an error.

    Raises:
        OutputError: ``target`` is a folder or a device, or cannot be written, also for want of room.
    """
    target = user_path(target)
    with writing(target), _without_empty(target.parent):
        if target.is_dir():
            raise OutputError(f"{target}: is a folder; name a file in it")
        work = target.with_name(f".{target.name}.{os.getpid()}")
        if target.exists() and not target.is_file():  # it would be replaced: for root, /dev/null too
            raise OutputError(f"{target}: is a device or a pipe; name a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(work, "wb") as opened:
                yield opened
                opened.flush()
                os.fsync(opened.fileno())  # else a power cut can leave the new name without the content
            work.replace(target)
        except BaseException:
            work.unlink(missing_ok=True)
            raise


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Keep a folder for this process; the system lets it go when the process ends, however it ends.

    What was made for this, folders around it too, is removed if nothing was written to it. Where this process may not write
    there is nothing to keep, and the first thing that is written says so.

    Raises:
        OutputError: another process keeps it.
    """
    lock = FileLock(folder / "lock", timeout=0)
    with _without_empty(folder):
        taken = False
        with suppress(OutputError), writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                taken = True
        if taken:
            raise OutputError(f"{folder}: another process works there now; wait for it, or choose another `output`")
        try:
            yield
        finally:
            if lock.is_locked:
                (folder / "lock").unlink(missing_ok=True)  # while it is held: no other process has it
                lock.release()


# --------------------------------------------------------------------------------- records and damage


def digests(folder: Path, without: Sequence[str] = ()) -> dict[str, str]:
    """SHA-256 of each file of a folder, by its path in it.

    Args:
        without: names of files that are left out.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in without)
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged_file(folder: Path, known: Mapping[str, str]) -> str | None:
    """The first file that is missing or is not as its digest says; None if there is none."""
    return next((name for name, digest in known.items() if not _is_whole(folder / name, digest)), None)


def _is_whole(path: Path, digest: str) -> bool:
    return path.is_file() and file_digest(path) == digest


def read_record(path: Path, *needed: str) -> dict[str, Any] | None:
    """A JSON object of ours with the names that it needs; None if there is no such file, or, with a warning, if it is damaged."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    if isinstance(found, dict) and found.keys() >= set(needed):
        return found
    logger.warning("%s: is damaged, and is not used", path)
    return None


def record_path(output: Path) -> Path:
    """Where the record of a file of data is: ``OUTPUT.json`` beside it."""
    return beside(output, "{}.json")


def finished_record(output: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a file of data that was made from the same data and options; None if there is no such file.

    Args:
        about: options and hash of the data, as JSON stores them; the record contains them.

    Raises:
        OutputError: the output was made in another way, or was changed or damaged.
    """
    if not output.exists():
        return None
    before = read_record(record_path(output)) or {}
    if {name: before.get(name) for name in about} != about:
        raise OutputError(
            f"{output}: exists and was not made from the same data and options, or by an older version; choose another `output`"
        )
    if before.get("sha256", digest := file_digest(output)) != digest:
        raise OutputError(f"{output}: is not as it was written; remove it, and the same again makes it anew")
    return before


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write, by whatever library it comes, into an OutputError about a path.

    A file elsewhere that may not be read is another error.

    Raises:
        OutputError: for whatever reason: no permission or room, a file in the place of a folder, a name that is too long, ...
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
        named = named if isinstance(named, str | os.PathLike) else None  # None: of a library in Rust, or of a network
        known = code in (*READ_ONLY, *_FULL, *_TAKEN) or "null byte" in str(error)
        ours = named is not None and _is_part(Path(named), path)
        elsewhere = named is not None and os.path.isfile(named)  # noqa: PTH113 - it never raises
        if not ours and (elsewhere or not known):
            raise
        why = os.strerror(code) if code else error
        fix = "make room, or name another place" if code in _FULL else "name another place, or make this one writable"
        raise OutputError(f"{path}: cannot be written: {why}; {fix}") from error


def _is_part(named: Path, path: Path) -> bool:
    """Whether a path that an error names is the output itself, a part of it under its temporary name too, or a folder around it."""
    return named in path.parents or any(
        one == path or (one.parent == path.parent and one.name.startswith(f".{path.name}")) for one in (named, *named.parents)
    )


def _error_code(error: Exception) -> int | None:
    """The system's code of an error, which libraries in Rust give in the text; torch gives none, and lacks room as a rule."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else errno.ENOSPC if _TORCH_CANNOT_WRITE.search(str(error)) else None


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning that the process has not logged before."""
    logger.warning(message)


def default_cache() -> Path | None:
    """The folder where the command line keeps vectors: ``$ANYSPLADE_CACHE``, or ``anysplade`` in the user's cache folder.

    None, with a warning, if it cannot be written: a result needs no cache.
    """
    try:
        user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(os.environ.get("ANYSPLADE_CACHE") or Path(user) / "anysplade")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        warn_once(f"vectors are not kept ({error}); set ANYSPLADE_CACHE to a folder that can be written")
        return None
    return folder
