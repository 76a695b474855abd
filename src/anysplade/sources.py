"""Files plain, gzipped and in zip archives; ir_datasets; datasets of the hub: opened, with faults in one line."""

import contextlib
import functools
import gzip
import io
import json
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import datasets
from huggingface_hub.constants import HF_HOME

from anysplade.errors import DataError

Place = Path | zipfile.Path


def open_text(path: Place) -> TextIO:
    """A text file, whatever its line ends and with or without a byte order mark; gzipped if its name ends so."""
    if path.name.endswith(".gz"):
        return io.TextIOWrapper(gzip.GzipFile(fileobj=path.open("rb")), encoding="utf-8-sig")
    return io.TextIOWrapper(path.open("rb"), encoding="utf-8-sig")


@contextlib.contextmanager
def lines(path: Place) -> Iterator[Iterator[tuple[int, str]]]:
    """Numbered lines, from 1.

    Raises:
        DataError: not UTF-8, or a compressed file that is cut off.
    """
    number = 0

    def numbered(file: TextIO) -> Iterator[tuple[int, str]]:
        nonlocal number
        for number, line in enumerate(file, 1):
            yield number, line.rstrip("\n")

    try:
        with open_text(path) as file:
            yield numbered(file)
    except UnicodeDecodeError:
        raise DataError(f"{path}:{number + 1}: not UTF-8 text; convert the file to UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error):
        raise DataError(f"{path}:{number + 1}: the compressed file is damaged or cut off; fetch it again") from None


def json_lines(path: Place) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers, from 1, and objects; blank lines are passed over."""
    with lines(path) as numbered:
        for number, line in numbered:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno})") from None
            except (ValueError, RecursionError):  # a number of thousands of digits, brackets thousands deep
                raise DataError(f"{path}:{number}: JSON that cannot be read: a number too long, or nested too deep") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: not a JSON object; each line must be one")
            yield number, row


def zip_folder(path: Path) -> zipfile.Path:
    """The folder in a zip archive: its root, or the one folder at its root.

    Raises:
        DataError: no zip archive, or a damaged one.
    """
    try:
        root = zipfile.Path(zipfile.ZipFile(path))
    except zipfile.BadZipFile:
        raise DataError(f"{path}: no zip archive, or a damaged one; fetch it again") from None
    inside = [entry for entry in root.iterdir() if not entry.name.startswith(("_", "."))]  # such as __MACOSX
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else root


@functools.cache
def _ir_datasets() -> tuple[Any, str]:
    """The library, and why it has no folder for data, if so.

    Importing it makes that folder. Where that fails, it is imported with one that is gone afterwards, so that it
    still knows its ids: names of other things are then resolved as ever.
    """
    try:
        home = Path(os.environ.get("IR_DATASETS_HOME", Path.home() / ".ir_datasets"))
        home.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home at all
        fault = str(error)
    else:
        import ir_datasets

        return ir_datasets, ""
    before = {name: os.environ.get(name) for name in ("HOME", "IR_DATASETS_HOME")}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(dict.fromkeys(before, folder))
        try:
            import ir_datasets
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                os.environ.update({name: value} if value is not None else {})
    return ir_datasets, fault


def ir_dataset(name: str) -> Any:
    """An ir_datasets dataset, or None if it knows no such id.

    Raises:
        DataError: it knows the id, but its folder for data cannot be made.
    """
    library, fault = _ir_datasets()
    with contextlib.suppress(KeyError):
        found = library.load(name)
        if fault:
            raise DataError(
                f"{name}: ir_datasets has no folder for data ({fault}); set IR_DATASETS_HOME to one that can be written"
            )
        return found
    return None


def ir_names() -> list[str]:
    """The ids that ir_datasets knows."""
    return list(_ir_datasets()[0].registry)


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def hub_dataset(name: str, config: str | None, split: str | None = "train", streaming: bool = False) -> Any:
    """A dataset of the hub, or of a folder laid out like one.

    Raises:
        DataError: whatever the datasets library has against it.
    """
    with one_line(f"{name}:{config}" if config else name):
        return datasets.load_dataset(name, config, split=split, streaming=streaming)


@contextlib.contextmanager
def one_line(source: str | Path) -> Iterator[None]:
    """What the datasets library raises, of any kind, as one line that names the source."""
    try:
        yield
    except (DataError, GeneratorExit, KeyboardInterrupt):
        raise
    except Exception as error:
        cause = error.__cause__ or error
        said = str(cause).strip().splitlines()
        raise DataError(f"{source}: cannot be read: {said[0] if said else type(error).__name__}{hub_advice(cause)}") from error


def hub_advice(error: BaseException) -> str:
    """What to do about an error of the hub's libraries, if it is that their folder cannot be written."""
    place = error.filename if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) else None
    return "; set HF_HOME to a folder that can be written" if place and str(place).startswith(HF_HOME) else ""
