"""Files of sparse vectors that other software writes and reads: JSON lines of Anserini, SciPy's CSR matrices, Parquet.

JSON lines name terms by their tokens, the others by their ids. All are read one document at a time, and written likewise.
"""

import contextlib
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anysplade._common.files import beside, user_path
from anysplade.data.corpus import Document
from anysplade.data.external import as_data_error
from anysplade.data.rows import lines, plain_name, rows
from anysplade.errors import DataError, OptionError
from anysplade.search.documents import EncodedDocument

FORMATS = (".jsonl", ".json", ".npz", ".parquet")
_READ = 2**16  # numbers that are read of a member of an .npz file at a time
_FIELDS = 'a line is {"id": ..., "contents": ..., "vector": {"term": weight}}'

Number = Callable[[list[str], str], list[int]]  # the ids of terms of a document, which the text describes


class Files(NamedTuple):
    """The files of vectors at a place."""

    place: Path
    files: list[Path]  # in the order in which they are read

    def describe(self) -> list[list[Any]]:
        """Name and size of each file, which tell whether they are the same as before."""
        return [[path.name, path.stat().st_size] for path in self.files]


def find_vectors(place: str | Path) -> Files:
    """A file of vectors, or those of a folder by name; raises DataError if there is none."""
    path = user_path(place)
    found = sorted(file for file in path.iterdir() if _form(file)) if path.is_dir() else [path]
    if not found or not path.exists():
        raise DataError(f"{place}: no file of vectors there; give a file ({', '.join(FORMATS)}) or a folder of such files")
    if _form(found[0]) is None:
        raise DataError(f"{place}: unknown form of vectors; name it {', '.join(FORMATS)}, the first two also with .gz")
    return Files(path, found)


def read_vectors(files: Files, number: Number, skip: int = 0) -> Iterator[EncodedDocument]:
    """The documents of files of vectors, unchecked, after the first ``skip``; weights of 0 are left out, terms sorted.

    Raises:
        DataError: a file is damaged, or a line has no id or no vector.
    """
    for path in files.files:
        reader = {".npz": _read_matrix, ".parquet": _read_parquet}.get(_form(path) or "")
        for document in _read_json(path, number, skip) if reader is None else reader(path, skip):
            if skip:
                skip -= 1
            else:
                yield document


def _form(path: Path) -> str | None:
    name = plain_name(path) if path.suffix.lower() == ".gz" else path.name.lower()
    return next((form for form in FORMATS if name.endswith(form) and not name.startswith(".")), None)


def _document(id_: object, place: str, terms: Any, weights: Any, content: Document) -> EncodedDocument:
    if not isinstance(id_, str | int) or id_ == "":
        raise DataError(f"{place}: no id, or an empty one; give each document an id")
    terms, weights = np.asarray(terms), np.asarray(weights)
    if terms.shape == weights.shape and terms.dtype.kind in "iu":
        order = np.argsort(terms, kind="stable")
        order = order[weights[order] != 0]
        terms, weights = terms[order], weights[order]
    return EncodedDocument(str(id_), content, terms, weights)


# ---------------------------------------------------------------------------------------- JSON lines


def _read_json(path: Path, number: Number, skip: int) -> Iterator[Any]:
    if skip:  # without parsing
        with lines(path) as numbered:
            count = sum(1 for _, line in numbered if line.strip())
        if count <= skip:
            yield from range(count)
            return
    for row_number, row in rows(path):
        if skip:
            skip -= 1
            yield row_number
            continue
        place = f"{path}:{row_number}"
        vector = row.get("vector")
        if not isinstance(vector, dict):
            raise DataError(f'{place}: no "vector" with terms and weights; {_FIELDS}')
        weights = list(vector.values())
        if not all(type(weight) in (int, float) for weight in weights):
            raise DataError(f'{place}: a weight in "vector" is no number; {_FIELDS}')
        text = row.get("text", row.get("contents")) or ""
        if not isinstance(text, str):
            raise DataError(f'{place}: "contents" is not a text; {_FIELDS}')
        content = Document(row.get("title") or "", text, row.get("metadata"))
        terms = np.array(number(list(vector), place), np.int64)
        yield _document(row.get("id", row.get("_id")), place, terms, np.array(weights, np.float64), content)


# --------------------------------------------------------------------------------------------- .npz


def ids_file(path: Path) -> Path:
    """The file with the ids of a matrix, one in a line."""
    return beside(path, f"{path.stem}.ids.txt")


def _read_matrix(path: Path, skip: int) -> Iterator[EncodedDocument]:
    ids = next((file for file in (ids_file(path), path.with_suffix(".ids"), path.with_suffix(".txt")) if file.is_file()), None)
    if ids is None:
        raise DataError(f"{path}: its ids are missing; write them, one a line, into {ids_file(path).name} beside it")
    with _as_matrix(path), zipfile.ZipFile(path) as archive, lines(ids) as numbered, contextlib.ExitStack() as opened:
        if bytes(np.atleast_1d(np.lib.format.read_array(archive.open("format.npy")))[0]) != b"csr":
            raise DataError(f"{path}: not a CSR matrix; save matrix.tocsr() with scipy.sparse.save_npz")
        shape = np.lib.format.read_array(archive.open("shape.npy"))
        indptr = np.lib.format.read_array(archive.open("indptr.npy"))
        indices, data = (_Array(opened.enter_context(archive.open(f"{name}.npy"))) for name in ("indices", "data"))
        row = 0
        for row, (_, id_) in enumerate(numbered, 1):
            if row > shape[0]:
                break
            span = int(indptr[row] - indptr[row - 1])
            terms, weights = indices.take(span), data.take(span)
            yield _document(id_, f"{ids}:{row}", terms, weights, Document("", ""))
        if row != shape[0]:
            raise DataError(f"{ids}: not as many ids as {path.name} has rows ({shape[0]:,}); write one id for each row")


@contextlib.contextmanager
def _as_matrix(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, zipfile.BadZipFile, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a whole matrix of scipy.sparse.save_npz ({error}); write it again") from error


class _Array:
    """The numbers of an array in an .npz file, in their order."""

    def __init__(self, file: Any) -> None:
        major, _ = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        _, _, self._dtype = read(file)
        self._file, self._rest = file, np.zeros(0, self._dtype)

    def take(self, count: int) -> np.ndarray:
        if count > len(self._rest):
            size = max(_READ, count - len(self._rest)) * self._dtype.itemsize
            self._rest = np.concatenate([self._rest, np.frombuffer(self._file.read(size), self._dtype)])
            if count > len(self._rest):
                raise EOFError("it ends early")
        found, self._rest = self._rest[:count], self._rest[count:]
        return found


# ------------------------------------------------------------------------------------------ Parquet


def _read_parquet(path: Path, skip: int) -> Iterator[Any]:
    with as_data_error(path), open(path, "rb") as file:
        from pyarrow import parquet  # here because it is slow to import

        opened, row = parquet.ParquetFile(file), 0
        names = opened.schema_arrow.names
        if not {"id", "indices", "values"} <= set(names):
            raise DataError(f"{path}: its columns are {', '.join(names)}; give id, indices and values")
        wanted = [name for name in ("id", "indices", "values", "title", "text", "contents", "metadata") if name in names]
        for batch in opened.iter_batches(1024, columns=wanted):
            if row + batch.num_rows <= skip:
                row += batch.num_rows
                yield from range(batch.num_rows)
                continue
            yield from _rows_of(batch, path, row)
            row += batch.num_rows


def _rows_of(batch: Any, path: Path, before: int) -> Iterator[EncodedDocument]:
    columns = {name: batch.column(name).to_pylist() for name in batch.schema.names if name not in ("indices", "values")}
    indices, values = batch.column("indices"), batch.column("values")
    for row in range(batch.num_rows):
        place = f"{path}: row {before + row + 1}"
        terms, weights = indices[row].values, values[row].values
        if terms is None or weights is None:
            raise DataError(f"{place}: no indices or no values; give lists, empty ones for no terms")
        cells = {name: column[row] for name, column in columns.items()}
        metadata = cells.get("metadata")
        text = cells.get("text") or cells.get("contents") or ""
        content = Document(cells.get("title") or "", text, json.loads(metadata) if isinstance(metadata, str) else metadata)
        terms, weights = terms.to_numpy(zero_copy_only=False), weights.to_numpy(zero_copy_only=False)
        yield _document(cells["id"], place, terms, weights, content)


# ------------------------------------------------------------------------------------- terms by name


class Vocabulary:
    """The ids of terms by name: those of a model, or given in the order in which the names appear."""

    def __init__(self, names: Sequence[str], fixed: bool) -> None:
        """Take the known names by id; ``fixed`` is whether another name is an error."""
        self.ids = {name: id_ for id_, name in enumerate(names)}
        self.fixed = fixed

    def number(self, terms: list[str], place: str) -> list[int]:
        """The ids of terms; raises DataError if the model has none of this name."""
        if not self.fixed:
            return [self.ids.setdefault(term, len(self.ids)) for term in terms]
        try:
            return [self.ids[term] for term in terms]
        except KeyError as error:
            raise DataError(
                f"{place}: the model has no term {str(error.args[0])[:80]!r}; name the model that made the vectors, or leave it out"
            ) from None


class OwnTerms:
    """In the place of a query encoder, for an index without a model: it knows the names of terms."""

    precision = "float32"

    def __init__(self, place: Path, term_names: list[str]) -> None:
        self.place = place
        self.term_names = term_names

    def refusal(self) -> OptionError:
        """The error of whatever reads a text."""
        return OptionError(
            f"{self.place}: has no model to encode queries, as it was built from vectors alone; build it again with its model "
            "(anysplade index MODEL --vectors ...), or search in Python by vector: index.search_vector"
        )

    def encode(self, texts: Sequence[str]) -> Any:
        raise self.refusal()

    def count_truncated(self, texts: Sequence[str]) -> Any:
        raise self.refusal()

    def tokens(self, text: str, special_tokens: bool = False) -> Any:
        raise self.refusal()
