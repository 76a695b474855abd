"""Reading rows from JSONL, CSV, TSV and Parquet files, which can be compressed or inside a zip archive."""

import bz2
import contextlib
import csv
import gzip
import io
import json
import logging
import lzma
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from anysplade.data.external import as_data_error
from anysplade.data.text import replace_surrogates
from anysplade.errors import DataError

logger = logging.getLogger(__name__)

Place = Path | zipfile.Path
Row = tuple[int, dict[str, Any]]  # row number, counted from 1, and values by column name

TABLE_FORMATS = (".jsonl", ".tsv", ".csv", ".parquet")

# One of these in the first line of a TSV file makes that line a header: the text of a document is longer.
_COLUMN = re.compile(
    "texts?|titles?|abstract|body|passages?|contents?|documents?|sentences?|chunks?|quer(y|ies)|questions?|article|#?[a-z]*_?id"
)

csv.field_size_limit(2**31 - 1)  # characters; the default of 128 KiB is shorter than many documents


def plain_name(path: Place) -> str:
    """A file's name in lower case and without the suffix of a compression: ``corpus.jsonl`` for ``corpus.JSONL.gz``."""
    return re.sub(r"\.(gz|bz2|xz|zst)\Z", "", path.name.lower())


def find_file(folder: Place, names: Sequence[str]) -> Place | None:
    """The first of the named files that the folder contains, compressed or not and in any case; None if it has none."""
    if not folder.is_dir():
        return None
    files = sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.name.swapcase(), reverse=True)
    found = {plain_name(path): path for path in files}  # the last of several wins: lower case and uncompressed
    return next((found[name.lower()] for name in names if name.lower() in found), None)


def _decompressed(file: Any) -> Any:
    """The file's content, decompressed if it begins like a compressed file; its name does not matter."""
    start = file.peek(10)[:10]
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if re.match(rb"BZh[1-9]1AY&SY", start):
        return bz2.BZ2File(file)
    if start.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMAFile(file)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow  # here because it is slow to import

        return pyarrow.CompressedInputStream(file, "zstd")
    return file


@contextlib.contextmanager
def lines(path: Place) -> Iterator[Iterator[tuple[int, str]]]:
    """The lines of a UTF-8 file with their numbers, counted from 1; only \\n and \\r\\n end a line.

    The file can start with a byte order mark and can be compressed with gzip, bzip2, xz or Zstandard.
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
        if isinstance(error, OSError) and error.errno is not None:  # an error of the system, not of the content
            raise
        raise DataError(f"{path}:{number + 1}: the compressed file is damaged or cut off; download it again") from None


def trec_columns(line: str) -> list[str]:
    """The columns of a line in a TREC file; only ASCII white space separates them, because ids can contain any other."""
    return re.findall(r"[^ \t\r\f\v]+", line)


def column_name(name: str) -> str:
    """A column's name in the form of the lists of known names: ``doc_id`` for ``Doc-ID``."""
    return re.sub("[- ]", "_", name.strip().lower())


def rows(path: Place, ids: Collection[str] = ()) -> Iterator[Row]:
    """Read the rows of a JSONL, CSV, TSV or Parquet file; a row's number is the number of its first line.

    Cells of CSV and TSV files are strings, and the first line has the column names. TSV files of TREC collections have no
    such line, and quotation marks have no meaning in them.

    Args:
        ids: names that a column of ids can have, as ``column_name`` returns them. A TSV file whose first line has no name of a
            column is read as TREC's, with the columns id and text; id, title and text; or id, URL, title and text. If empty,
            every TSV file has column names.
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


def _parquet_rows(path: Place) -> Iterator[Row]:
    if not isinstance(path, Path) or not path.name.lower().endswith(".parquet"):
        raise DataError(f"{path}: Parquet in a compressed file or an archive cannot be read; unpack it")
    with as_data_error(path), open(path, "rb") as file:
        from pyarrow import parquet  # here because it is slow to import

        batches = parquet.ParquetFile(file).iter_batches(1000)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _table_rows(path: Place, delimiter: str) -> Iterator[Row]:
    with lines(path) as numbered:
        reader = csv.reader((f"{line}\n" for _, line in numbered), delimiter=delimiter, strict=True)
        columns: list[str] = []
        following = 1  # line where the next row begins
        try:
            for cells in reader:
                number, following = following, reader.line_num + 1
                if not cells:
                    continue
                if not columns:
                    columns = _header(cells, f"{path}:{number}")
                    continue
                if len(cells) != len(columns):
                    shape = f"{len(cells)} columns, but the first line has {len(columns)}"
                    raise DataError(f"{path}:{number}: {shape}; give each row the same number")
                yield number, dict(zip(columns, cells, strict=True))
        except csv.Error as error:
            fix = "close each quotation mark, and double those inside a cell"
            raise DataError(f"{path}:{following}: not a valid table ({error}); {fix}") from None


def _header(cells: Sequence[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if all(map(str.isdecimal, names)):
        raise DataError(
            f"{place}: only numbers, where columns must be named; if they are ids to train on, the names are query_id, "
            "positive_id and negative_id, and `texts` names the collection that has their texts"
        )
    if len(set(names)) < len(names):
        raise DataError(f"{place}: two columns have the same name; give each column its own")
    return names


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
    """Line numbers and objects, without blank lines; lone surrogates, which JSON can contain and UTF-8 cannot, become U+FFFD."""
    with_surrogates: list[int] = []  # line numbers
    with lines(path) as numbered:
        for number, line in numbered:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno})") from None
            except (ValueError, RecursionError):  # a number of thousands of digits, or thousands of nested brackets
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
        message = "%s:%d: a lone surrogate (half a character) is read as U+FFFD; rows with one: %d"
        logger.warning(message, path, with_surrogates[0], len(with_surrogates))
