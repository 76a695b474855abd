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
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

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
    with as_data_error(path):
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


# --------------------------------------------------------------------------------- what a name stands for

PYTHON_DOCS = "python-docs"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

# Files of a folder that holds a collection: BEIR's names first, then those of TREC collections.
_FORMS = (".jsonl", ".tsv", ".csv", ".parquet")
CORPUS_FILES = tuple(f"{name}{form}" for name in ("corpus", "collection", "docs") for form in _FORMS)
QUERY_FILES = (*(f"{name}{form}" for name in ("queries", "topics") for form in _FORMS), "topics.trec", "topics.txt")


class Source(NamedTuple):
    """What a name stands for.

    ``at`` is the file; the folder, in a zip archive too; the dataset's folder or id on the hub; the dataset of
    ir_datasets; None for the docstrings of the Python environment.
    """

    kind: Literal["file", "folder", "hub", "ir_datasets", "python-docs"]
    name: str
    at: Any = None
    config: str | None = None  # of a dataset of the hub


def resolve(name: str | Path | zipfile.Path, wanted: str, split: str = "test") -> Source:
    """The one place that decides what the name of a corpus, a collection, training data or texts stands for.

    In this order: ``"python-docs"``; a file or folder that exists, where a folder with a README and without a corpus is a
    dataset of the hub's layout and a zip archive is the folder in it; an id of ir_datasets, also without its last part,
    the split; an id of the hub, ``org/name`` or ``org/name:config``.

    Args:
        wanted: what the name should stand for, for the error.

    Raises:
        DataError: it stands for nothing, or the zip archive is damaged.
    """
    text = str(name)
    if isinstance(name, zipfile.Path):
        return Source("folder", text, name)
    if text == PYTHON_DOCS:
        return Source("python-docs", text)
    path = Path(text).expanduser()
    if path.is_file():
        return Source("folder", text, _zip_folder(path)) if path.suffix == ".zip" else Source("file", text, path)
    if path.is_dir():
        is_hub = (path / "README.md").is_file() and find_file(path, CORPUS_FILES) is None
        return Source("hub" if is_hub else "folder", text, path)
    known = [dataset for id_ in (text, f"{text}/{split}") if (dataset := ir_dataset(id_)) is not None]
    if known:
        judged = (dataset for dataset in known if wanted in ("corpus", "texts") or _is_judged(dataset))
        return Source("ir_datasets", text, next(judged, known[0]))
    hub_name, _, config = text.partition(":")
    if config and Path(hub_name).expanduser().is_dir():
        return Source("hub", text, Path(hub_name).expanduser(), config)
    if _HUB_ID.fullmatch(hub_name):
        return Source("hub", text, hub_name, config or None)
    missing = "" if _has_ir_datasets() else '; ir_datasets ids need: pip install "anysplade[evaluation]"'
    forms = "a BEIR folder or zip" if wanted == "collection" else "a file, a BEIR folder or zip"
    raise DataError(
        f"{text or 'an empty name'}: no such {wanted}; give {forms}, an ir_datasets id, a hub dataset or {PYTHON_DOCS!r}{missing}"
    )


def _is_judged(dataset: Any) -> bool:
    return dataset.has_queries() and (dataset.has_qrels() or dataset.has_docpairs())


def find_file(folder: Place, names: Sequence[str]) -> Place | None:
    """The first file of these names in a folder, gzipped or not."""
    candidates = (folder / f"{name}{suffix}" for name in names for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _zip_folder(path: Path) -> zipfile.Path:
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
    if not _has_ir_datasets():
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
    return list(_ir_datasets()[0].registry) if _has_ir_datasets() else []


def _has_ir_datasets() -> bool:
    return importlib.util.find_spec("ir_datasets") is not None  # of the extra "evaluation"


def hub_dataset(name: str, config: str | None, split: str | None = "train", streaming: bool = False) -> Any:
    """A dataset of the hub, or of a folder laid out like one.

    Raises:
        DataError: whatever the datasets library has against it.
    """
    with as_data_error(f"{name}:{config}" if config else name):
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
def as_data_error(source: str | Path) -> Iterator[None]:
    """Raise any error of the datasets library as a DataError of one line that names the source."""
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
