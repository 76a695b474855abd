"""Collections and training pairs, from folders and files, and from the Python environment itself.

A *collection* is a corpus, queries and relevance judgements (qrels), kept on disk in BEIR's
layout: ``corpus.jsonl`` (``_id``, ``title``, ``text``), ``queries.jsonl`` (``_id``, ``text``) and
``qrels/SPLIT.tsv`` (``query-id``, ``corpus-id``, ``score``). ``training_data`` reads training pairs.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from anysplade import python_docs
from anysplade.errors import DataError, OutputError
from anysplade.files import whole_folder

PYTHON_DOCS = "python-docs"


class Document(NamedTuple):
    title: str
    text: str

    @property
    def full_text(self) -> str:
        """Title and text as one, as BEIR's models read a document."""
        return f"{self.title} {self.text}".strip()


class Pair(NamedTuple):
    """A training example."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    scores: tuple[float, ...] | None = None  # a teacher's: the positive's and each negative's, or the margin of each negative


@dataclass(frozen=True)
class Collection:
    """A corpus with the queries that were judged on it.

    ``qrels[query_id][document_id]`` is the grade; every query has at least one judgement.
    """

    name: str
    corpus: dict[str, Document]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


# ------------------------------------------------------------------------------------- loading


def load_collection(source: str | Path, split: str = "test", progress: bool = False) -> Collection:
    """A collection from a BEIR folder, or ``"python-docs"``.

    Only queries with a judgement in ``split`` are kept, as BEIR does.

    Raises:
        DataError: the folder lacks a file, a line is malformed, or an id is unknown or repeated.
    """
    if str(source) == PYTHON_DOCS:
        if split != "test":
            raise DataError(f"python-docs has no split {split!r}; its only one is 'test'")
        return load_python_docs(progress=progress)[0]
    folder = _existing(source, "collection")
    if not folder.is_dir():
        raise DataError(f"{folder}: a collection is a folder with corpus.jsonl, queries.jsonl and qrels/")
    corpus = read_corpus(folder)
    path = _within(folder, "queries.jsonl")
    texts = {id_: _text(row, path, number) for number, id_, row in rows_by_id(path)}
    qrels = _read_qrels(folder, split, texts, corpus)
    queries = {id_: text for id_, text in texts.items() if id_ in qrels}
    return Collection(folder.resolve().name, corpus, queries, qrels)


def read_corpus(source: str | Path, progress: bool = False) -> dict[str, Document]:
    """Documents by id, in file order: of a JSONL file, of a BEIR folder, or of ``"python-docs"``.

    Raises:
        DataError: no such file, no document in it, or a malformed line, which is named.
    """
    if str(source) == PYTHON_DOCS:
        return load_python_docs(progress=progress)[0].corpus
    path = _existing(source, "corpus")
    if path.is_dir():
        path = _within(path, "corpus.jsonl")
    corpus = {id_: Document(str(row.get("title") or ""), _text(row, path, number)) for number, id_, row in rows_by_id(path)}
    if not corpus:
        raise DataError(f"{path}: the corpus is empty; it needs one JSON object a line, with _id and text")
    return corpus


def load_python_docs(packages: Iterable[str] = python_docs.PACKAGES, progress: bool = False) -> tuple[Collection, list[Pair]]:
    """The docstrings of installed packages as a test collection and training pairs.

    A query is a docstring's summary line, its one relevant document the first 60 words of the rest;
    modules are either held out as a whole or trained on (``python_docs.split_entries`` has the
    rules). Summaries under eight words are not asked, but their documents stay in the corpus. The
    same environment gives the same texts in the same order.
    """
    train, test = python_docs.split_entries(python_docs.read_docstrings(packages, progress))
    corpus = {entry.name: Document("", entry.document) for entry in test}
    queries = {f"q:{entry.name}": entry.query for entry in test if entry.telling}
    qrels = {query_id: {query_id.removeprefix("q:"): 1} for query_id in queries}
    return Collection(PYTHON_DOCS, corpus, queries, qrels), [Pair(entry.query, entry.document) for entry in train]


# ------------------------------------------------------------------------------------- writing


def write_collection(folder: str | Path, collection: Collection, pairs: Iterable[Pair] = (), split: str = "test") -> None:
    """Write a collection, with training pairs if there are any, as a BEIR folder.

    Raises:
        OutputError: the folder exists and is not empty, or an id cannot stand in a TSV file.
    """
    with whole_folder(folder) as work:
        _write_jsonl(
            work / "corpus.jsonl",
            ({"_id": id_, "title": document.title, "text": document.text} for id_, document in collection.corpus.items()),
        )
        _write_jsonl(work / "queries.jsonl", ({"_id": id_, "text": text} for id_, text in collection.queries.items()))
        (work / "qrels").mkdir()
        with open(work / "qrels" / f"{split}.tsv", "w", encoding="utf-8") as file:
            file.write("query-id\tcorpus-id\tscore\n")
            for query_id, grades in collection.qrels.items():
                for document_id, grade in grades.items():
                    if {"\t", "\n", "\r"} & set(query_id + document_id):
                        raise OutputError(
                            f"ids {query_id!r}, {document_id!r}: a tab or line break cannot stand in qrels; rename them"
                        )
                    file.write(f"{query_id}\t{document_id}\t{grade}\n")
        rows = [{key: value for key, value in pair._asdict().items() if value} for pair in pairs]
        if rows:
            _write_jsonl(work / "pairs.jsonl", rows)


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def hash_texts(texts: Iterable[str]) -> str:
    """SHA-256 over texts in order, for the provenance of a result."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


# -------------------------------------------------------------------------------- reading lines


def _existing(source: str | Path, what: str) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"{source}: no such {what}; give a BEIR folder, a JSONL file, or {PYTHON_DOCS!r}")
    return path


def _within(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise DataError(f"{folder}: no {name} in it; a BEIR folder has corpus.jsonl, queries.jsonl and qrels/")
    return path


def json_lines(path: Path, opened: Callable[..., Any] = open) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers, from 1, and objects; blank lines are passed over."""
    number = 0
    try:
        with opened(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number}: not a JSON object; each line must be one")
                yield number, row
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}:{number + 1}: not UTF-8 text; convert the file to UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path}:{number + 1}: the compressed file is damaged or cut off; fetch it again") from None


def rows_by_id(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    seen: dict[str, int] = {}
    for number, row in json_lines(path):
        id_ = row.get("_id")
        if not isinstance(id_, str | int) or isinstance(id_, bool) or id_ == "":
            raise DataError(f'{path}:{number}: no "_id"; each line needs _id and text')
        id_ = str(id_)
        if id_ in seen:
            raise DataError(f"{path}:{number}: the id {id_!r} stands already in line {seen[id_]}; ids must be unique")
        seen[id_] = number
        yield number, id_, row


def _text(row: dict[str, Any], path: Path, number: int, key: str = "text") -> str:
    value = row.get(key)
    if not isinstance(value, str):
        found = ", ".join(row) or "nothing"
        raise DataError(f'{path}:{number}: "{key}" is missing or no text (the line has {found})')
    return value


def _read_qrels(folder: Path, split: str, queries: dict[str, str], corpus: dict[str, Document]) -> dict[str, dict[str, int]]:
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        found = ", ".join(sorted(p.stem for p in (folder / "qrels").glob("*.tsv"))) or "none"
        raise DataError(f"{folder}: no qrels/{split}.tsv (splits found: {found}); choose one with --split")
    qrels: dict[str, dict[str, int]] = {}
    with open(path, encoding="utf-8-sig", newline=None) as file:
        for number, line in enumerate(file, 1):
            parts = line.rstrip("\n").split("\t")
            if not line.strip() or (number == 1 and parts[-1].strip() == "score"):
                continue
            if len(parts) != 3:
                raise DataError(f"{path}:{number}: {len(parts)} columns; a line is query-id, corpus-id, score, with tabs between")
            query_id, document_id, grade = parts
            if query_id not in queries:
                raise DataError(f"{path}:{number}: the query {query_id!r} is not in queries.jsonl; add it there or remove the line")
            if document_id not in corpus:
                raise DataError(
                    f"{path}:{number}: the document {document_id!r} is not in corpus.jsonl; add it there or remove the line"
                )
            try:
                qrels.setdefault(query_id, {})[document_id] = int(grade)
            except ValueError:
                raise DataError(f"{path}:{number}: the score {grade!r} is not a whole number") from None
    if not qrels:
        raise DataError(f"{path}: no judgement in it; each line is query-id, corpus-id, score")
    return qrels
