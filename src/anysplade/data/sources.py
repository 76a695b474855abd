"""Rows of files, plain, gzipped and in zip archives; ir_datasets; datasets of the hub: read, with faults in one line."""

import contextlib
import csv
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

import datasets
from huggingface_hub.constants import HF_HOME

from anysplade.errors import DataError

logger = logging.getLogger(__name__)

Place = Path | zipfile.Path
Row = tuple[int, dict[str, Any]]  # its number, from 1, and its columns

_SURROGATE = re.compile("[\ud800-\udfff]")

csv.field_size_limit(2**31 - 1)  # the default is 128 KiB, and documents are longer


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


def rows(path: Place, ids: Collection[str] = ()) -> Iterator[Row]:
    """The rows of a JSONL file or, by its name, of a CSV, TSV or Parquet table. The number is that of a row's first line.

    Cells of CSV and TSV are texts, and the first line names the columns. TREC's TSV files have no such line: given the
    names that a column of ids may have, a TSV without any of them at its top is id and text or id, title and text,
    and quotation marks in it mean nothing.

    Raises:
        DataError: a row that cannot be read.
    """
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from _parquet_rows(path)
    elif name.endswith(".csv"):
        yield from _table_rows(path, ",")
    elif name.endswith(".tsv"):
        with lines(path) as numbered:
            first = next((line for _, line in numbered if line.strip()), "")
        named = not ids or any(cell.strip(' "').lower() in ids for cell in first.split("\t"))
        yield from _table_rows(path, "\t") if named else _trec_rows(path)
    else:
        yield from _json_rows(path)


def _parquet_rows(path: Place) -> Iterator[Row]:
    if not isinstance(path, Path):
        raise DataError(f"{path}: Parquet in a zip archive cannot be read; unpack the archive")
    with one_line(path):
        yield from enumerate(datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True), 1)


def _table_rows(path: Place, delimiter: str) -> Iterator[Row]:
    with lines(path) as numbered:
        reader = csv.reader((f"{line}\n" for _, line in numbered), delimiter=delimiter, strict=True)
        names: list[str] = []
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(
                    f"{path}:{number}: not a valid table ({error}); close each quotation mark, double those inside"
                ) from None
            if cells is None:
                return
            if not cells:
                continue
            if not names:
                names = [cell.strip() for cell in cells]
                if len(set(names)) < len(names):
                    raise DataError(f"{path}:{number}: two columns have the same name; the first line must name each column")
                continue
            if len(cells) != len(names):
                raise DataError(
                    f"{path}:{number}: {len(cells)} columns, and the first line names {len(names)}; give each row as many"
                )
            yield number, dict(zip(names, cells, strict=True))


def _trec_rows(path: Place) -> Iterator[Row]:
    with lines(path) as numbered:
        for number, line in numbered:
            parts = line.split("\t")
            if not line.strip():
                continue
            if not 2 <= len(parts) <= 3:
                raise DataError(f"{path}:{number}: {len(parts)} columns; a line is an id and a text, with a tab between")
            yield number, dict(zip(("_id", "title", "text") if len(parts) == 3 else ("_id", "text"), parts, strict=True))


def _json_rows(path: Place) -> Iterator[Row]:
    """Line numbers and objects; blank lines are passed over.

    JSON can hold half a character, a lone surrogate, which no tokenizer and no file of UTF-8 takes; it becomes U+FFFD.
    """
    halved: list[int] = []
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
            if "\\u" in line:
                content = json.dumps(row, ensure_ascii=False)
                if content != (whole := whole_characters(content)):
                    row = json.loads(whole)
                    halved.append(number)
            yield number, row
    if halved:
        logger.warning(
            "%s:%d: half a character in it (a lone surrogate), read as U+FFFD; there are %d such rows", path, halved[0], len(halved)
        )


def whole_characters(text: str) -> str:
    """The text with U+FFFD for each lone surrogate."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


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
    if importlib.util.find_spec("ir_datasets") is None:  # of the extra "evaluation"
        return None
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
    return list(_ir_datasets()[0].registry) if importlib.util.find_spec("ir_datasets") else []


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def hub_dataset(name: str, config: str | None, split: str | None = "train", streaming: bool = False) -> Any:
    """A dataset of the hub, or of a folder laid out like one.

    Raises:
        DataError: whatever the datasets library has against it.
    """
    with one_line(f"{name}:{config}" if config else name):
        cache = _folder_cache(Path(name)) if Path(name).is_dir() else None
        return datasets.load_dataset(name, config, split=split, streaming=streaming, cache_dir=cache)


def _folder_cache(folder: Path) -> str:
    """Where the rows of a folder are kept, by its path and files.

    The datasets library tells folders apart by their last name alone: another one, or changed files, gave the old rows.
    """
    files = [(str(path), path.stat()) for path in sorted(folder.resolve().rglob("*")) if path.is_file()]
    key = json.dumps([(path, stat.st_size, stat.st_mtime_ns) for path, stat in files])
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "folders" / hashlib.sha256(key.encode()).hexdigest()[:32])


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


def is_utf8(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)
