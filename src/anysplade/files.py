"""Files and folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anysplade.errors import OutputError


@contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """A folder to write into that becomes ``target`` when the block ends without an error.

    Raises:
        OutputError: ``target`` exists and is not an empty folder.
    """
    target = Path(target).expanduser()
    require_empty(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        work.chmod(0o777 & ~_umask())
        yield work
        if target.exists():
            target.rmdir()
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def require_empty(target: Path) -> None:
    """Raise OutputError unless ``target`` does not exist or is an empty folder."""
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; name a new folder with --out")
    if target.is_dir() and any(target.iterdir()):
        raise OutputError(f"{target}: the folder is not empty; name a new one with --out, or remove it first")


def write_whole(target: str | Path, content: str | bytes) -> None:
    """Write a file, of text or bytes, beside its place and move it there.

    Raises:
        OutputError: ``target`` is a folder.
    """
    target = Path(target).expanduser()
    if target.is_dir():
        raise OutputError(f"{target}: is a folder; name a file in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        work.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        work.replace(target)
    finally:
        work.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
