"""Reading rows of files (plain, compressed or in a zip archive), of ir_datasets and of hub datasets; names of sources."""

import bz2
import contextlib
import csv
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import lzma
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub.constants import HF_HOME

from anysplade._common.arguments import require
from anysplade._common.files import atomic_folder, user_path, warn_once
from anysplade.errors import DataError

logger = logging.getLogger(__name__)

Place = Path | zipfile.Path
Row = tuple[int, dict[str, Any]]  # row number, from 1, and columns

_SURROGATE = re.compile("[\ud800-\udfff]")

csv.field_size_limit(2**31 - 1)  # the default is 128 KiB, and documents are longer


def plain_name(path: Place) -> str:
    """A file's name in lower case, without the ending of a compression: ``corpus.jsonl`` of ``corpus.JSONL.gz``."""
    return re.sub(r"\.(gz|bz2|xz|zst)\Z", "", path.name.lower())


def _decompressed(file: Any) -> Any:
    """The bytes that a file holds, compressed or not; its first bytes tell, whatever its name."""
    start = file.peek(10)[:10]
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if re.match(rb"BZh[1-9]1AY&SY", start):
        return bz2.BZ2File(file)
    if start.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMAFile(file)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow  # here, since it takes a while

        return pyarrow.CompressedInputStream(file, "zstd")
    return file


@contextlib.contextmanager
def lines(path: Place) -> Iterator[Iterator[tuple[int, str]]]:
    """The lines of a UTF-8 file with their numbers, from 1; they end with \\n or \\r\\n, and nothing else ends one.

    The file may have a byte order mark, and may be compressed with gzip, bzip2, xz or Zstandard.

    Raises:
        DataError: the file is not UTF-8, or a compressed file is damaged.
    """
    number = 0

    def numbered(file: Iterator[str]) -> Iterator[tuple[int, str]]:
        nonlocal number
        for number, line in enumerate(file, 1):
            yield number, line.removesuffix("\n").removesuffix("\r")

    try:
        with path.open("rb") as raw, io.TextIOWrapper(_decompressed(raw), encoding="utf-8-sig", newline="\n") as file:
            yield numbered(file)
    except UnicodeDecodeError:
        raise DataError(f"{path}:{number + 1}: not UTF-8 text; convert the file to UTF-8") from None
    except (EOFError, OSError, lzma.LZMAError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not of the content
            raise
        raise DataError(f"{path}:{number + 1}: the compressed file is damaged or cut off; download it again") from None


def trec_columns(line: str) -> list[str]:
    """The columns of a line of TREC's files, which ASCII white space separates; ids can have any other."""
    return re.findall(r"[^ \t\r\f\v]+", line)


def rows(path: Place, ids: Collection[str] = ()) -> Iterator[Row]:
    """The rows of a JSONL, CSV, TSV or Parquet file; a row's number is that of its first line.

    Cells of CSV and TSV are strings, and the first line has the column names. TREC's TSV files have no such line, and
    quotation marks in them have no meaning.

    Args:
        ids: names that a column of ids can have, as ``column_name`` has them. A TSV whose first line has no name of a column is one
            of TREC's, with the columns id and text; id, title and text; or id, URL, title and text. Empty: every TSV has
            column names.

    Raises:
        DataError: a row cannot be read.
    """
    name = plain_name(path)
    if name.endswith(".parquet"):
        yield from _parquet_rows(path)
    elif name.endswith(".csv"):
        yield from _table_rows(path, ",")
    elif name.endswith(".tsv"):
        with lines(path) as numbered:
            first = next((line for _, line in numbered if line.strip()), "")
        names = [column_name(cell.strip(' "')) for cell in first.split("\t")]
        known = any(name in ids for name in names)
        has_header = not ids or known or (any(map(_COLUMN.fullmatch, names)) and not any(map(str.isdecimal, first)))
        yield from _table_rows(path, "\t") if has_header else _trec_rows(path)
    else:
        yield from _json_rows(path)


_COLUMN = re.compile(  # names of columns, of which one is enough: the text of a document is longer than that
    "texts?|titles?|abstract|body|passages?|contents?|documents?|sentences?|chunks?|quer(y|ies)|questions?|article|#?[a-z]*_?id"
)


def column_name(name: str) -> str:
    """A column's name as the lists of known names have it: ``doc_id`` of ``Doc-ID``."""
    return re.sub("[- ]", "_", name.strip().lower())


def _parquet_rows(path: Place) -> Iterator[Row]:
    if not isinstance(path, Path) or not path.name.lower().endswith(".parquet"):
        raise DataError(f"{path}: Parquet in a compressed file or an archive cannot be read; unpack it")
    with as_data_error(path), open(path, "rb") as file:
        from pyarrow import parquet  # here, since it takes a while

        batches = parquet.ParquetFile(file).iter_batches(1000)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


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
                    f"{path}:{number}: not a valid table ({error}); close each quotation mark, and double those inside a cell"
                ) from None
            if cells is None:
                return
            if not cells:
                continue
            if not names:
                names = [cell.strip() for cell in cells]
                if all(map(str.isdecimal, names)):
                    raise DataError(
                        f"{path}:{number}: only numbers, where columns must be named; if they are ids to train on, the names are "
                        "query_id, positive_id and negative_id, and `texts` names the collection that has their texts"
                    )
                if len(set(names)) < len(names):
                    raise DataError(f"{path}:{number}: two columns have the same name; give each column its own")
                continue
            if len(cells) != len(names):
                raise DataError(
                    f"{path}:{number}: {len(cells)} columns, but the first line has {len(names)}; give each row as many"
                )
            yield number, dict(zip(names, cells, strict=True))


def _trec_rows(path: Place) -> Iterator[Row]:
    with lines(path) as numbered:
        for number, line in numbered:
            parts = line.split("\t")
            if not line.strip():
                continue
            if not 2 <= len(parts) <= 4:
                raise DataError(f"{path}:{number}: {len(parts)} columns; a line is an id and a text, separated by a tab")
            yield number, dict(zip(("_id", *("url", "title", "text")[-len(parts) + 1 :]), parts, strict=True))


def _json_rows(path: Place) -> Iterator[Row]:
    """Line numbers and objects, without blank lines; lone surrogates, which JSON can hold and UTF-8 cannot, become U+FFFD."""
    with_surrogates: list[int] = []
    with lines(path) as numbered:
        for number, line in numbered:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno})") from None
            except (ValueError, RecursionError):  # a number of thousands of digits, or brackets nested thousands deep
                raise DataError(f"{path}:{number}: JSON that cannot be read: a number too long, or nested too deep") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: not a JSON object; each line must be one")
            if "\\u" in line:
                content = json.dumps(row, ensure_ascii=False)
                if content != (whole := replace_surrogates(content)):
                    row = json.loads(whole)
                    with_surrogates.append(number)
            yield number, row
    if with_surrogates:
        logger.warning(
            "%s:%d: a lone surrogate (half a character) is read as U+FFFD; rows with one: %d",
            path,
            with_surrogates[0],
            len(with_surrogates),
        )


def replace_surrogates(text: str) -> str:
    """Replace each lone surrogate by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


# ---------------------------------------------------------------------------------------- resolving names

PYTHON_DOCS = "python-docs"
NANO_BEIR = "nanobeir"  # stands for thirteen collections
BM25_NAMES = ("bm25", "bm25-unstemmed")
BACKBONES = ("bert-tiny", "modernbert-tiny")  # bundled
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

# File names in the folder of a collection: BEIR's first, then those of TREC collections.
FORMS = (".jsonl", ".tsv", ".csv", ".parquet")
CORPUS_FILES = tuple(f"{name}{form}" for name in ("corpus", "collection", "docs", "msmarco-docs") for form in FORMS)
TOPIC_FORMS = (".trec", ".txt", ".xml")  # what is in them tells whether it is TREC's topics
QUERY_FILES = tuple(f"{name}{form}" for name in ("queries", "topics") for form in (*FORMS, *TOPIC_FORMS))


class Source(NamedTuple):
    """The result of ``resolve``.

    ``at`` is the path of a file; the path of a folder, also inside a zip archive; the folder or hub id of a dataset; the
    dataset object of ir_datasets; or None for python-docs.
    """

    kind: Literal["file", "folder", "hub", "ir_datasets", "python-docs"]
    name: str
    at: Any = None
    config: str | None = None  # of a hub dataset


def resolve(name: str | Path | zipfile.Path, wanted: str, split: str = "test") -> Source:
    """Find the source that the name of a corpus, a collection, training data or texts stands for.

    Tried in this order: ``"python-docs"``, unless it is a Path; an existing file or folder, where a folder with a README and
    without a corpus is a hub dataset and a zip archive is the folder in it; an ir_datasets id, also without its last part, the
    split; a hub id, ``org/name`` or ``org/name:config``.

    Args:
        wanted: "corpus", "collection", "training data" or "texts".
        split: the last part of an ir_datasets id that has no such part.

    Raises:
        DataError: the name stands for nothing, or for something else, such as a model; or the zip archive is damaged.
        OptionError: it is no name.
    """
    from anysplade.data.names import DATA, held, near  # here, since it imports this module

    require(wanted.replace(" ", "_"), name, (str, Path, zipfile.Path), "give a path or a name")
    text = str(name)
    forms = "a BEIR folder or zip" if wanted == "collection" else "a file, a BEIR folder or zip"
    fix = f"give {forms}, an ir_datasets id, a hub dataset or {PYTHON_DOCS!r}"
    if isinstance(name, zipfile.Path):
        return Source("folder", text, name)
    if isinstance(name, str) and is_built_in(name, PYTHON_DOCS):
        return Source("python-docs", text)
    if text == NANO_BEIR:
        raise DataError(f"{text}: stands for thirteen collections, which only evaluate takes; name one, such as nano-beir/scifact")
    path = user_path(text)
    if path.exists() and (kind := held(path)) not in (None, *DATA) and find_file(path, ["pairs.jsonl"]) is None:
        raise DataError(f"{text}: {kind}, not {'' if wanted in ('training data', 'texts') else 'a '}{wanted}; {fix}")
    if path.is_file():
        return Source("folder", text, _zip_folder(path)) if path.suffix.lower() == ".zip" else Source("file", text, path)
    if path.is_dir():
        is_hub = (path / "README.md").is_file() and find_file(path, CORPUS_FILES) is None
        return Source("hub" if is_hub else "folder", text, path)
    known = [dataset for id_ in (text, f"{text}/{split}") if (dataset := ir_dataset(id_)) is not None]
    if known:
        judged = (dataset for dataset in known if wanted in ("corpus", "texts") or _is_judged(dataset))
        return Source("ir_datasets", text, next(judged, known[0]))
    hub_name, _, config = text.partition(":")
    if config and user_path(hub_name).is_dir():
        return Source("hub", text, user_path(hub_name), config)
    is_hub_id = _HUB_ID.fullmatch(hub_name)
    is_certain = is_hub_id and not plain_name(path).endswith((".json", *FORMS))
    hint = "" if is_certain else near(text, PYTHON_DOCS, NANO_BEIR, *ir_names())  # of thousands of names, which takes a while
    if is_hub_id and not hint:
        return Source("hub", text, hub_name, config or None)
    missing = "" if _has_ir_datasets() else '; ir_datasets ids need: pip install "anysplade[evaluation]"'
    raise DataError(f"{text or 'an empty name'}: no such {wanted}; {fix}{missing}{hint}")


def _is_judged(dataset: Any) -> bool:
    return dataset.has_queries() and (dataset.has_qrels() or dataset.has_docpairs())


def is_built_in(name: object, *built_in: str) -> bool:
    """Whether a name is one of these, which stand for no file or folder; a warning if there is one of that name too."""
    if name not in built_in:
        return False
    if Path(str(name)).exists():
        warn_once(f"{name}: taken for what is built in by this name, not for the file or folder here; name that one ./{name}")
    return True


def find_file(folder: Place, names: Sequence[str]) -> Place | None:
    """The first of these files that is in a folder, compressed or not and in any case; None if there is none."""
    if not folder.is_dir():
        return None
    files = sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.name.swapcase(), reverse=True)
    found = {plain_name(path): path for path in files}  # of several the last: in lower case, and not compressed
    return next((found[name.lower()] for name in names if name.lower() in found), None)


def _zip_folder(path: Path) -> zipfile.Path:
    """The folder in a zip archive: its root, or the only folder at its root.

    Raises:
        DataError: the file is not a zip archive, or is damaged.
    """
    try:
        root = zipfile.Path(zipfile.ZipFile(path))
    except zipfile.BadZipFile:
        raise DataError(f"{path}: not a zip archive, or a damaged one; download it again") from None
    inside = [entry for entry in root.iterdir() if not entry.name.startswith(("_", "."))]  # such as __MACOSX
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else root


@functools.cache
def _ir_datasets() -> tuple[Any, str]:
    """The library, and the reason why it has no data folder (empty if it has one).

    Importing it creates that folder. Where this fails, it is imported with a temporary folder, so that its ids are known
    and other names are still resolved.
    """
    try:
        home = Path(os.environ.get("IR_DATASETS_HOME", Path.home() / ".ir_datasets"))
        home.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        reason = str(error)
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
    return ir_datasets, reason


def ir_dataset(name: str) -> Any:
    """An ir_datasets dataset; None if ir_datasets is not installed or has no such id.

    Raises:
        DataError: there is such an id, but the data folder cannot be created.
    """
    if not _has_ir_datasets():
        return None
    library, reason = _ir_datasets()
    with contextlib.suppress(KeyError):
        dataset = library.load(name)
        if reason:
            raise DataError(f"{name}: ir_datasets has no data folder ({reason}); set IR_DATASETS_HOME to one that can be written")
        return dataset
    return None


def ir_names() -> list[str]:
    """All ids of ir_datasets; empty if it is not installed."""
    return list(_ir_datasets()[0].registry) if _has_ir_datasets() else []


def _has_ir_datasets() -> bool:
    return importlib.util.find_spec("ir_datasets") is not None  # of the extra "evaluation"


def hub_dataset(name: str, config: str | None, split: str | None = "train", streaming: bool = False) -> Any:
    """A dataset of the hub, or of a folder with the same layout; by split if ``split`` is None.

    Raises:
        DataError: the datasets library cannot load it.
    """
    with as_data_error(f"{name}:{config}" if config else name):
        import datasets

        cache = None
        if Path(name).is_dir():
            folder = Path(name).resolve()
            cache = _folder_cache(folder)
            if re.search(r"[*?[]|::", str(folder)):  # the library takes them for a pattern, or a chain of file systems
                name = f"{cache}/files"
                if not Path(name).exists():
                    with atomic_folder(name) as links:
                        shutil.copytree(folder, links, copy_function=os.symlink, dirs_exist_ok=True)
        return datasets.load_dataset(name, config, split=split, streaming=streaming, cache_dir=cache)


def _folder_cache(folder: Path) -> str:
    """The cache folder for the rows of a dataset folder, by its path and files.

    The datasets library caches by the folder's last name alone, so another folder of that name or changed files would get
    the old rows.
    """
    import datasets

    files = [(str(path), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    key = json.dumps([(path, stat.st_size, stat.st_mtime_ns) for path, stat in files])
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "folders" / hashlib.sha256(key.encode()).hexdigest()[:32])


@contextlib.contextmanager
def as_data_error(source: str | Path) -> Iterator[None]:
    """Turn any exception of the datasets library into a one-line DataError that names the source."""
    from anysplade.data.names import near  # here, since it imports this module

    try:
        yield
    except (DataError, GeneratorExit, KeyboardInterrupt):
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        hint = near(str(source).partition(":")[0], *ir_names())
        raise DataError(f"{source}: cannot be read: {reason}{hub_advice(cause)}{hint}") from error


def hub_advice(error: BaseException) -> str:
    """The fix to append to the message of a hub error, if the hub's cache folder cannot be written; else empty."""
    path = error.filename if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) else None
    return "; set HF_HOME to a folder that can be written" if path and str(path).startswith(HF_HOME) else ""


def is_utf8(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: it has no lone surrogate."""
    return text.isascii() or not _SURROGATE.search(text)
