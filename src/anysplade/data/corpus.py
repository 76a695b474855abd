"""Documents, read from files, collections, ir_datasets and the hub."""

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from anysplade._common.files import user_path
from anysplade.data import python_docs
from anysplade.data.external import hub_dataset
from anysplade.data.names import CORPUS_FILES, Source, resolve
from anysplade.data.rows import Place, Row, column_name, find_file, lines, plain_name, rows
from anysplade.data.seen_ids import SeenIds
from anysplade.data.text import replace_surrogates, shown
from anysplade.errors import DataError

# Names that a column can have, as ``column_name`` returns them; the first one that a row has is used.
ID_NAMES = (
    *("_id", "id", "doc_id", "docid", "document_id", "docno", "doc_no", "pid", "passage_id", "corpus_id"),
    *("query_id", "queryid", "qid", "topic_id", "did", "doc", "uid", "pmid", "cord_uid", "paper_id", "article_id", "chunk_id"),
)
TEXT_NAMES = ("text", "contents", "content", "body", "passage", "abstract")


class Document(NamedTuple):
    """A document of a corpus."""

    title: str  # can be empty
    text: str  # without the title
    metadata: dict[str, Any] | None = None  # for filters in search; stored unchanged

    @property
    def full_text(self) -> str:
        """The text that models encode: title, space, text, as in BEIR."""
        return f"{self.title} {self.text}".strip()


def read_corpus(source: str | Path | Source, progress: bool = False) -> dict[str, Document]:
    """Read all documents of a ``source``, by id and in file order.

    Args:
        source: a file (JSONL, CSV, TSV, Parquet, compressed or not), or any source of ``load_collection``.

    Raises:
        DataError: there is no such source, it has no document, a row is malformed, or an id is a duplicate.
    """
    corpus = dict(iter_corpus(source, progress=progress))
    if not corpus:
        raise empty_corpus(source)
    return corpus


def checked_document(place: str, title: object, text: object, metadata: object) -> Document:
    """A document of these parts, which are checked; None is an empty title."""
    if not isinstance(text, str):
        raise DataError(f'{place}: "text" is {shown(text)}, not a string; give a string')
    if not isinstance(title, str | None):
        raise DataError(f'{place}: "title" is {shown(title)}, not a string; give a string or remove it')
    if not isinstance(metadata, dict | None):
        raise DataError(f'{place}: "metadata" is not an object; give names and values')
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:  # ValueError: NaN, infinity, or an object inside itself
        raise DataError(f'{place}: "metadata" has a value that JSON cannot hold ({error}); write it as a string or null') from None
    return Document(title or "", text, metadata)


def empty_corpus(source: object) -> DataError:
    """The error for a corpus without documents."""
    return DataError(f"{source}: the corpus is empty; each row needs _id and text")


def iter_corpus(
    source: str | Path | Source, progress: bool = False, *, remembered: int | None = None
) -> Iterator[tuple[str, Document]]:
    """Read the documents of any source of ``read_corpus`` one by one; the ids stay in a temporary file, to find duplicates.

    ``remembered`` is the number of ids that are kept, the first ones; all if None. Duplicates of others are not found.
    """
    resolved = resolve(source, "corpus")
    if resolved.kind == "python-docs":
        _, test = python_docs.split_entries(python_docs.read_docstrings(python_docs.PACKAGES, progress))
        yield from ((entry.name, Document("", entry.document)) for entry in test)
    elif resolved.kind == "ir_datasets":
        for document in resolved.at.docs_iter():
            titled = hasattr(document, "title") and hasattr(document, "text")
            content = Document(document.title or "", document.text) if titled else Document("", document.default_text())
            yield document.doc_id, content
    elif resolved.kind == "hub":
        yield from documents_by_id(hub_rows(resolved, "corpus"), f"{resolved.at}:corpus", TEXT_NAMES, remembered)
    else:
        file = source_file(resolved, CORPUS_FILES, "corpus.jsonl")
        yield from documents_by_id(rows(file, ID_NAMES), file, TEXT_NAMES, remembered)


def read_texts(source: str | Path) -> Iterator[str]:
    """Read the texts of a corpus, with their titles, or the lines of a text file (``.txt``, also compressed), one by one."""
    path = user_path(source)
    if plain_name(path).endswith(".txt") and path.is_file():
        with lines(path) as numbered:
            yield from (replace_surrogates(line) for _, line in numbered if line.strip())
    else:
        yield from (replace_surrogates(document.full_text) for _, document in iter_corpus(source) if document.full_text)


def hub_rows(source: Source, config: str) -> Iterator[Row]:
    """The rows in the first split of a hub dataset's config."""
    return enumerate(next(iter(hub_dataset(str(source.at), config, split=None).values())), 1)


def source_file(source: Source, names: Sequence[str], usual: str) -> Place:
    """The file that a source is, or the first of the named files in its folder; if none, the error names the ``usual`` one."""
    path: Place | None = source.at if source.kind == "file" else find_file(source.at, names)
    if path is None:
        raise DataError(
            f"{source.at}: no {usual} in it; a BEIR folder has corpus.jsonl, queries.jsonl and qrels/, a TREC folder "
            "corpus.tsv, topics.txt or topics.xml, and qrels.txt"
        )
    return path


def documents_by_id(
    numbered: Iterable[Row], source: object, text_names: Sequence[str], remembered: int | None = None
) -> Iterator[tuple[str, Document]]:
    """The ids and documents, or queries, in numbered rows; ids must be unique, and messages name the source of the rows."""
    seen = SeenIds()
    for count, (number, row) in enumerate(numbered):
        place = f"{source}:{number}"
        id_columns, text_column, title_column, metadata_column = _columns(tuple(row), tuple(text_names))
        value = next((row[column] for column in id_columns if row[column] is not None), None)
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            detail = "" if value is None else f" (found: {shown(value)}, not a string or whole number)"
            raise DataError(f'{place}: no "_id"; each row needs _id and text{detail}')
        id_ = str(value)
        if (remembered is None or count < remembered) and (earlier := seen.earlier(id_, number)) is not None:
            raise DataError(f"{place}: the id {id_[:80]!r} is a duplicate of line {earlier}; ids must be unique")
        text, title, metadata = row.get(text_column), row.get(title_column), row.get(metadata_column) or None
        if not isinstance(text, str):
            raise DataError(f'{place}: "{text_column}" is missing or not a string; columns of the row: {", ".join(row) or "none"}')
        yield id_, checked_document(place, title, text, metadata)


@functools.lru_cache(maxsize=64)
def _columns(given: tuple[str, ...], text_names: tuple[str, ...]) -> tuple[list[str], str, str, str]:
    """The columns that can have the id, by priority, and the columns of the text, the title and the metadata."""
    known = {column_name(name): name for name in reversed(given)} | {name: name for name in given}
    text = next((known[name] for name in text_names if name in known), "text")
    return [known[name] for name in ID_NAMES if name in known], text, known.get("title", "title"), known.get("metadata", "metadata")
