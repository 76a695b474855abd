"""Files and folders that are written atomically: complete or not at all."""

import errno
import functools
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from anysplade.errors import OutputError

logger = logging.getLogger(__name__)

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)  # codes of an OSError that mean: no permission
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder that is renamed to ``target`` when the block ends without an error.

    Raises:
        OutputError: ``target`` exists and is not an empty folder, or cannot be created.
    """
    target = Path(target).expanduser()
    require_empty(target)
    work = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    with _permitted(target):
        work.mkdir(parents=True)
    try:
        yield work
        with _permitted(target):
            if target.exists():
                target.rmdir()
            work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def require_empty(target: Path) -> None:
    """Raise OutputError unless ``target`` does not exist or is an empty folder."""
    with _permitted(target):
        if target.exists() and not target.is_dir():
            raise OutputError(f"{target}: is a file; give a new folder")
        if target.is_dir() and any(target.iterdir()):
            raise OutputError(f"{target}: the folder is not empty; give a new one, or remove it first")


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, unless they exist.

    Raises:
        OutputError: a folder cannot be created.
    """
    with _permitted(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_whole(target: str | Path, content: str | bytes) -> None:
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
    target = Path(target).expanduser()
    work = target.with_name(f".{target.name}.{os.getpid()}")
    with _permitted(target):
        if target.is_dir():
            raise OutputError(f"{target}: is a folder; name a file in it")
        if target.exists() and not target.is_file():  # it would be replaced: for root, /dev/null too
            raise OutputError(f"{target}: is a device or a pipe; name a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        opened = open(work, "wb")  # noqa: SIM115 - closed below, before it is renamed
    try:
        with opened:
            yield opened
        with _permitted(target):
            work.replace(target)
    except BaseException as error:
        work.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise OutputError(f"{target}: cannot be written: {error.strerror}; make room, or name another place") from error
        raise


def record_path(output: Path) -> Path:
    """Where the record of a file of data is: ``OUTPUT.json`` beside it."""
    return output.with_name(f"{output.name}.json")


def finished_record(output: Path, about: dict[str, Any], parts: Path | None = None) -> dict[str, Any] | None:
    """The record of a file of data that was made from the same data and options; None if it is still to be made.

    Args:
        about: options and hash of the data, as JSON has them; the record contains them.
        parts: a folder with unfinished work on the output, which has them in ``about.json``.

    Raises:
        OutputError: the output, or the unfinished work, was made in another way.
    """
    started = parts is not None and parts.exists()
    if not (output.exists() or started):
        return None
    known = parts / "about.json" if parts is not None and started else record_path(output)
    before = json.loads(known.read_text()) if known.is_file() else {}
    if {name: before.get(name) for name in about} != about:
        raise OutputError(f"{output}: exists and was not made from the same data and options; choose another `output`")
    return before if output.exists() and known == record_path(output) else None


@contextmanager
def _permitted(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write to a path into an OutputError.

    Raises:
        OutputError: for whatever reason: no permission or room, a file in the place of a folder, a name that is too long, ...
    """
    try:
        yield
    except OutputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: the path has a zero byte
        full = isinstance(error, OSError) and error.errno in _FULL
        why = error.strerror if isinstance(error, OSError) else error
        fix = "make room, or name another place" if full else "name another place, or make this one writable"
        raise OutputError(f"{path}: cannot be written: {why}; {fix}") from error


@functools.cache
def _warn_once(message: str) -> None:
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
        _warn_once(f"vectors are not kept ({error}); set ANYSPLADE_CACHE to a folder that can be written")
        return None
    return folder
