"""Collections: a corpus, queries and relevance judgements (qrels), from folders, files, ir_datasets and the hub.

On disk a collection has BEIR's layout: ``corpus.jsonl`` (``_id``, ``title``, ``text``), ``queries.jsonl`` (``_id``,
``text``) and ``qrels/SPLIT.tsv`` (``query-id``, ``corpus-id``, ``score``).
"""

import functools
import html
import json
import logging
import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from anysplade._common.arguments import require
from anysplade._common.files import atomic_folder, user_path
from anysplade._common.hashing import DataHash
from anysplade._common.tables import Tabular
from anysplade.data import python_docs
from anysplade.data.names import COLLECTION, held
from anysplade.data.sources import (
    BM25_NAMES,
    CORPUS_FILES,
    NANO_BEIR,
    PYTHON_DOCS,
    QUERY_FILES,
    TOPIC_FORMS,
    Place,
    Row,
    column_name,
    find_file,
    hub_dataset,
    ir_names,
    is_built_in,
    lines,
    plain_name,
    replace_surrogates,
    resolve,
    rows,
    trec_columns,
)
from anysplade.errors import DataError, OutputError

logger = logging.getLogger(__name__)


class Document(NamedTuple):
    """A document of a corpus."""

    title: str  # empty without one
    text: str  # without the title
    metadata: dict[str, Any] | None = None  # for filters in search; stored unchanged

    @property
    def full_text(self) -> str:
        """The text that models encode: title, space, text, as in BEIR."""
        return f"{self.title} {self.text}".strip()


class Pair(NamedTuple):
    """A training example: a ``query``, the text of a ``positive`` document that answers it, and of hard negatives."""

    query: str  # its text
    positive: str  # the text of a document that answers it
    negatives: tuple[str, ...] = ()  # documents that look relevant and are not
    scores: tuple[float, ...] | None = None  # of a teacher: for the positive and each negative, or the margin to each negative


@dataclass(frozen=True, repr=False)
class Collection(Tabular):
    """A test collection: a corpus, queries and relevance judgements. Every query has at least one judgement."""

    name: str  # in results
    corpus: dict[str, Document]  # by document id
    queries: dict[str, str]  # by query id
    qrels: dict[str, dict[str, int]]  # grades by query id and document id

    def _rows(self) -> list[dict[str, Any]]:
        """How much of each there is."""
        judgements = sum(map(len, self.qrels.values()))
        counts = {"documents": len(self.corpus), "queries": len(self.queries), "judgements": judgements}
        return [{"collection": self.name} | counts]


# ------------------------------------------------------------------------------------- loading

# The names that a column can have, as ``column_name`` has them; the first that is there is used.
ID_NAMES = (
    *("_id", "id", "doc_id", "docid", "document_id", "docno", "doc_no", "pid", "passage_id", "corpus_id"),
    *("query_id", "queryid", "qid", "topic_id", "did", "doc", "uid", "pmid", "cord_uid", "paper_id", "article_id", "chunk_id"),
)
TEXT_NAMES = ("text", "contents", "content", "body", "passage", "abstract")
QUERY_NAMES = ("text", "query", "question", "contents", "body")


def is_collection(name: str) -> bool:
    """Whether a name stands for a collection, and not for a model or a run file."""
    is_built_in(name, *BM25_NAMES, PYTHON_DOCS)  # which warns of a folder of that name
    kind = held(name.lower() if name.lower() == NANO_BEIR else name)
    return kind == COLLECTION or (kind is None and user_path(name).is_dir())


def collection_names(source: str) -> list[str]:
    """The collections that a name stands for: the thirteen of ``"nanobeir"``, or the name itself."""
    if not is_built_in(source, source if source.lower() == NANO_BEIR else NANO_BEIR):
        return [source]
    return sorted(name for name in ir_names() if name.startswith("nano-beir/"))


def load_collection(source: str | Path | zipfile.Path, split: str = "test", progress: bool = False) -> Collection:
    """Load a collection from a ``source``.

    A source is one of these:

    - a BEIR folder, or a zip of one: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/SPLIT.tsv``; files can be compressed with
      gzip, bzip2, xz or Zstandard
    - a TREC folder: a corpus (``corpus``, ``collection``, ``docs`` or ``msmarco-docs``; ``.jsonl``, ``.tsv``, ``.csv`` or
      ``.parquet``), topics (``topics`` or ``queries``, likewise or TREC's ``<top>`` or ``<topic>`` in ``.txt``, ``.trec`` or
      ``.xml``) and qrels (``qrels.txt``, ``qrels.SPLIT.txt``, ..., four columns)
    - an ir_datasets id (``msmarco-passage/trec-dl-2019/judged``; ``beir/scifact`` takes the split as its last part)
    - a hub dataset with the configs ``corpus``, ``queries`` and ``qrels`` or ``default``
    - ``"python-docs"``: docstrings of installed packages, see ``load_python_docs``

    Only queries with a judgement are kept, as in BEIR; the number of others is logged. Judgements of documents that are not in
    the corpus are kept and count against recall, as in trec_eval; those of unknown queries are left out; a warning has the
    number of both.

    Args:
        split: which qrels to read.
        progress: show a progress bar.

    Raises:
        DataError: a part is missing, a line is malformed, an id is a duplicate, or no document of the corpus is judged above 0
            for a query, so that every measure would be 0.
    """
    resolved = resolve(source, "collection", split)
    if resolved.kind == "python-docs":
        if split != "test":
            raise DataError(f"python-docs has no split {split!r}; its only one is 'test'")
        return load_python_docs(progress=progress)[0]
    if resolved.kind == "ir_datasets":
        if not (resolved.at.has_queries() and resolved.at.has_qrels()):
            raise DataError(
                f"{resolved.name}: this ir_datasets id has no queries with judgements; name a subset that has, such as its /test"
            )
        return _judged_collection(resolved.name, dict(_ir_corpus(resolved.at)), ir_queries(resolved.at), _ir_qrels(resolved.at))
    if resolved.kind == "hub":
        return _hub_collection(str(resolved.at), split)
    if resolved.kind == "file":
        raise DataError(f"{resolved.at}: a collection is a folder or a zip with corpus.jsonl, queries.jsonl and qrels/")
    corpus, queries = read_corpus(resolved.at), read_queries(resolved.at)
    name = user_path(resolved.name).resolve().name.removesuffix(".zip")
    return _judged_collection(name, corpus, queries, _read_qrels(resolved.at, split))


def _judged_collection(
    name: str, corpus: dict[str, Document], queries: dict[str, str], qrels: dict[str, dict[str, int]]
) -> Collection:
    """A collection without queries that have no judgement and without judgements of unknown queries."""
    unknown = [query_id for query_id in qrels if query_id not in queries]
    if unknown:
        logger.warning("%s: %d judged queries are not among the queries and left out, such as %r", name, len(unknown), unknown[0])
    qrels = {query_id: grades for query_id, grades in qrels.items() if query_id in queries}
    missing = [document_id for grades in qrels.values() for document_id in grades if document_id not in corpus]
    if not qrels:
        raise DataError(f"{name}: no query has a judgement; use the same ids in queries and qrels")
    if len(missing) == sum(map(len, qrels.values())):
        raise DataError(f"{name}: none of the judged documents is in the corpus; use the same ids in corpus and qrels")
    relevant = {query_id: [id_ for id_, grade in grades.items() if grade > 0] for query_id, grades in qrels.items()}
    if not any(id_ in corpus for ids in relevant.values() for id_ in ids):
        raise DataError(
            f"{name}: no document of the corpus is judged above 0, so every measure would be 0; give relevant documents a grade "
            "of 1 or more"
        )
    if none := [query_id for query_id, ids in relevant.items() if not ids]:
        logger.warning("%s: %d queries have no document judged above 0 and count as 0, such as %r", name, len(none), none[0])
    if missing:
        logger.warning("%s: %d judged documents are not in the corpus, such as %r", name, len(missing), missing[0])
    judged = {query_id: text for query_id, text in queries.items() if query_id in qrels}
    if len(judged) < len(queries):
        logger.info("%s: %d of %d queries have no judgement and are left out", name, len(queries) - len(judged), len(queries))
    return Collection(name, corpus, judged, qrels)


def read_corpus(source: str | Path | zipfile.Path, progress: bool = False) -> dict[str, Document]:
    """Read all documents of a ``source``, by id and in file order.

    Args:
        source: a file (JSONL, CSV, TSV, Parquet, compressed or not), or any source of ``load_collection``.

    Raises:
        DataError: no such source, no document in it, a malformed row, or a duplicate id.
    """
    corpus = dict(iter_corpus(source, progress=progress))
    if not corpus:
        raise empty_corpus(source)
    return corpus


def empty_corpus(source: object) -> DataError:
    """The error for a corpus without documents."""
    return DataError(f"{source}: the corpus is empty; each row needs _id and text")


def iter_corpus(source: str | Path | zipfile.Path, progress: bool = False) -> Iterator[tuple[str, Document]]:
    """Read ids and documents one by one; only the ids stay in memory, to find duplicates.

    Args:
        source: a JSONL, CSV, TSV or Parquet file, or a source of ``load_collection``.

    Raises:
        DataError: there is no such source, a row is malformed, or an id is a duplicate; the message names the row.
    """
    resolved = resolve(source, "corpus")
    if resolved.kind == "python-docs":
        yield from load_python_docs(progress=progress)[0].corpus.items()
    elif resolved.kind == "ir_datasets":
        yield from _ir_corpus(resolved.at)
    elif resolved.kind == "hub":
        yield from _hub_corpus(str(resolved.at))
    else:
        file = _part(resolved.at, CORPUS_FILES, "corpus.jsonl") if resolved.kind == "folder" else resolved.at
        yield from _by_id(rows(file, ID_NAMES), file, TEXT_NAMES)


def read_texts(source: str | Path) -> Iterator[str]:
    """The texts of a corpus, with their titles, or the lines of a text file (``.txt``, also compressed), one by one.

    Raises:
        DataError: as ``iter_corpus`` does.
    """
    path = user_path(source)
    if plain_name(path).endswith(".txt") and path.is_file():
        with lines(path) as numbered:
            yield from (replace_surrogates(line) for _, line in numbered if line.strip())
    else:
        yield from (replace_surrogates(document.full_text) for _, document in iter_corpus(source) if document.full_text)


def load_queries(source: str | Path) -> dict[str, str]:
    """Queries by id, judged or not.

    Args:
        source: a file (JSONL, TSV, CSV, Parquet, TREC topics), a folder or zip with one, or an ir_datasets id.

    Raises:
        DataError: there are none, or a row is malformed.
    """
    resolved = resolve(source, "queries")
    if resolved.kind == "file":
        return _queries_in(resolved.at)
    if resolved.kind == "folder":
        return read_queries(resolved.at)
    if resolved.kind == "ir_datasets" and resolved.at.has_queries():
        return ir_queries(resolved.at)
    raise DataError(f"{source}: has no queries; give a file or folder of queries, or an ir_datasets id with some")


def read_queries(folder: Place) -> dict[str, str]:
    """The queries of a collection's folder: texts by id.

    Raises:
        DataError: there is no file of queries, it has no query, or a row is malformed.
    """
    return _queries_in(_part(folder, QUERY_FILES, "queries.jsonl"))


def _queries_in(file: Place) -> dict[str, str]:
    text = ""
    if plain_name(file).endswith(TOPIC_FORMS):
        with lines(file) as numbered:
            text = "\n".join(line for _, line in numbered)
    has_tags = text.lstrip().startswith("<")
    queries = dict(_query_texts(_topics(text, file) if has_tags else rows(file, ID_NAMES), file))
    if not queries:
        raise DataError(f"{file}: no query in it; each row needs _id and text")
    return queries


def _query_texts(numbered: Iterable[Row], source: object) -> Iterator[tuple[str, str]]:
    return ((id_, document.text) for id_, document in _by_id(numbered, source, QUERY_NAMES))


def _part(folder: Place, names: Sequence[str], usual: str) -> Place:
    path = find_file(folder, names)
    if path is None:
        raise DataError(
            f"{folder}: no {usual} in it; a BEIR folder has corpus.jsonl, queries.jsonl and qrels/, one of TREC's "
            "corpus.tsv, topics.txt or topics.xml, and qrels.txt"
        )
    return path


def _by_id(numbered: Iterable[Row], source: object, texts: Sequence[str]) -> Iterator[tuple[str, Document]]:
    """The documents, or queries, of rows, with their ids.

    Args:
        texts: names that the column of texts can have.

    Raises:
        DataError: a row without id or text, or a duplicate id.
    """
    seen: dict[str, int] = {}
    for number, row in numbered:
        place = f"{source}:{number}"
        ids, name, title_name, metadata_name = _columns(tuple(row), tuple(texts))
        value = next((row[id_name] for id_name in ids if row[id_name] is not None), None)
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            detail = "" if value is None else f" (found: {json.dumps(value, default=str)[:40]}, not a string or whole number)"
            raise DataError(f'{place}: no "_id"; each row needs _id and text{detail}')
        id_ = str(value)
        if id_ in seen:
            raise DataError(f"{place}: the id {id_[:80]!r} is a duplicate of line {seen[id_]}; ids must be unique")
        seen[id_] = number
        text, title, metadata = row.get(name), row.get(title_name), row.get(metadata_name) or None
        if not isinstance(text, str):
            raise DataError(f'{place}: "{name}" is missing or not a string; columns of the row: {", ".join(row) or "none"}')
        if not isinstance(title, str | None):
            raise DataError(f'{place}: "title" is {json.dumps(title, default=str)[:40]}, not a string; give a string or remove it')
        if not isinstance(metadata, dict | None):
            raise DataError(f'{place}: "metadata" is not an object; give names and values')
        yield id_, Document(title or "", text, metadata)


@functools.lru_cache(maxsize=64)
def _columns(given: tuple[str, ...], texts: tuple[str, ...]) -> tuple[list[str], str, str, str]:
    """The columns that can have the id, the first one first, and those of the text, the title and the metadata."""
    known = {column_name(name): name for name in reversed(given)} | {name: name for name in given}
    text = next((known[name] for name in texts if name in known), "text")
    return [known[name] for name in ID_NAMES if name in known], text, known.get("title", "title"), known.get("metadata", "metadata")


def _topics(text: str, path: Place) -> Iterator[Row]:
    """Numbers and queries of TREC topics, in SGML, whose tags are often not closed, or in XML."""
    text = re.sub(r"<!\[CDATA\[(.*?)\]\]>", lambda found: html.escape(found[1]), text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    if "<!ENTITY" in text:
        raise DataError(f"{path}: declares entities of its own, which are not read; write their text in the topics")
    begun, ended = (len(re.findall(rf"<{end}(?:top|topic)\b", text, re.IGNORECASE)) for end in ("", "/"))
    if begun > ended:
        raise DataError(f"{path}: {begun} topics begin and {ended} end; the file is cut off, or an end tag is missing")
    for topic in re.finditer(r"<(top|topic)\b([^>]*)>(.*?)</\1\s*>", text, re.DOTALL | re.IGNORECASE):
        _, attributes, content = topic.groups()
        number = re.search(r"\b(?:number|num|id)\s*=\s*[\"']?\s*([^\s\"'>]+)", attributes, re.IGNORECASE) or re.search(
            r"<(?:num|number|id|identifier)\b[^>]*>\s*(?:Number:)?\s*([^\s<]+)", content, re.IGNORECASE
        )
        tags = (rf"<{tag}\b[^>]*>(?:(.*?)</{tag}\s*>|([^<]*))" for tag in ("query", "title"))
        parts = filter(None, (re.search(tag, content, re.DOTALL | re.IGNORECASE) for tag in tags))
        query = next((part[1] or part[2] or "" for part in parts), None if "<" in content else content)
        if not number or query is None:
            raise DataError(
                f"{path}: a topic without a number, or a <title> or <query>; add both: {' '.join(topic[0].split())[:60]!r}"
            )
        plain = html.unescape(re.sub("<[^>]*>", " ", query))
        row = {"_id": html.unescape(number[1]), "text": " ".join(plain.split()).removeprefix("Topic:").lstrip()}
        yield text.count("\n", 0, topic.start()) + 1, row


def _read_qrels(folder: Place, split: str) -> dict[str, dict[str, int]]:
    """Judgements with BEIR's three columns or TREC's four."""
    path, beir = find_qrels(folder, split)
    if path is None:
        files = (folder / "qrels").iterdir() if (folder / "qrels").is_dir() else ()
        splits = sorted(plain_name(file).removesuffix(".tsv") for file in files)
        raise DataError(f"{folder}: no qrels/{split}.tsv (splits found: {', '.join(splits) or 'none'}); choose one with `split`")
    qrels: dict[str, dict[str, int]] = {}
    with lines(path) as numbered:
        for number, line in numbered:
            parts = line.split("\t") if beir else trec_columns(line)
            if not line.strip() or (number == 1 and parts[-1].strip().lower() in ("score", "relevance", "rel")):
                continue
            if len(parts) != (3 if beir else 4):
                form = "query-id, corpus-id, score, separated by tabs" if beir else "query, iteration, document, grade"
                raise DataError(f"{path}:{number}: {len(parts)} columns; a line is {form}")
            _judge(qrels, parts[0], parts[-2], parts[-1].strip(), f"{path}:{number}")
    if not qrels:
        raise DataError(f"{path}: no judgement in it; each line is query-id, corpus-id, score")
    return qrels


def find_qrels(folder: Place, split: str) -> tuple[Place | None, bool]:
    """The file of a split's judgements (BEIR's ``qrels/SPLIT.tsv`` or one of TREC's names), and whether it is BEIR's."""
    beir = find_file(folder / "qrels", [f"{split}.tsv"])
    trec = [f"qrels.{split}.txt", f"qrels.{split}.tsv", "qrels.txt", "qrels.tsv", "qrels.trec", "qrels"]
    return (beir, True) if beir else (find_file(folder, trec), False)


def _judge(qrels: dict[str, dict[str, int]], query_id: str, document_id: str, grade: Any, place: str) -> None:
    """Add a judgement to ``qrels``; ``1.0`` is 1.

    Raises:
        DataError: the grade is not a whole number, or contradicts an earlier one.
    """
    try:
        value = float(grade)
    except (TypeError, ValueError):
        value = math.nan
    if not value.is_integer():
        raise DataError(f"{place}: the score {str(grade)[:40]!r} is not a whole number; give 0, 1 or another")
    before = qrels.setdefault(query_id, {}).setdefault(document_id, int(value))
    if before != value:
        raise DataError(
            f"{place}: {document_id[:80]!r} has the grade {value:g} for the query {query_id[:80]!r}, and {before} before; keep one"
        )


def _ir_corpus(dataset: Any) -> Iterator[tuple[str, Document]]:
    for document in dataset.docs_iter():
        titled = hasattr(document, "title") and hasattr(document, "text")
        yield document.doc_id, Document(document.title or "", document.text) if titled else Document("", document.default_text())


def ir_queries(dataset: Any) -> dict[str, str]:
    """The queries of an ir_datasets dataset: texts by id."""
    return {query.query_id: query.default_text() for query in dataset.queries_iter()}


def _ir_qrels(dataset: Any) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for judged in dataset.qrels_iter():
        qrels.setdefault(judged.query_id, {})[judged.doc_id] = judged.relevance
    return qrels


def _hub_collection(name: str, split: str) -> Collection:
    """A collection of the hub: configs corpus and queries, with one split each, and judgements in the config qrels or default."""
    corpus, queries = dict(_hub_corpus(name)), dict(_query_texts(_hub_rows(name, "queries"), f"{name}:queries"))
    try:
        judged = hub_dataset(name, "qrels", split=None)
    except DataError:
        judged = hub_dataset(name, "default", split=None)
    judgements = judged[split] if split in judged else next(iter(judged.values())) if len(judged) == 1 else None
    if judgements is None:
        raise DataError(f"{name}: no split {split!r} (splits found: {', '.join(judged)}); choose one with `split`")
    qrels: dict[str, dict[str, int]] = {}
    for number, row in enumerate(judgements, 1):
        place = f"{name}, judgement {number}"
        if not {"query-id", "corpus-id"} <= row.keys():
            raise DataError(f"{place}: no query-id and corpus-id (columns: {', '.join(row)}); name its columns so")
        _judge(qrels, str(row["query-id"]), str(row["corpus-id"]), row.get("score", 1), place)
    return _judged_collection(name.rstrip("/").rpartition("/")[2], corpus, queries, qrels)


def _hub_rows(name: str, config: str) -> Iterator[Row]:
    return enumerate(next(iter(hub_dataset(name, config, split=None).values())), 1)


def _hub_corpus(name: str) -> Iterator[tuple[str, Document]]:
    return _by_id(_hub_rows(name, "corpus"), f"{name}:corpus", TEXT_NAMES)


def load_python_docs(packages: Iterable[str] = python_docs.PACKAGES, progress: bool = False) -> tuple[Collection, list[Pair]]:
    """The docstrings of installed packages as a test collection and training pairs.

    A query is the summary line of a docstring; its one relevant document is the first 60 words of the rest. Each module is
    in one split (``python_docs.split_entries`` has the rules). Summaries of less than eight words are no test queries, but
    their documents are in the corpus. The same environment gives the same texts in the same order.

    Raises:
        DataError: a package is not installed.
    """
    train, test = python_docs.split_entries(python_docs.read_docstrings(packages, progress))
    corpus = {entry.name: Document("", entry.document) for entry in test}
    queries = {f"q:{entry.name}": entry.query for entry in test if entry.is_test_query}
    qrels = {query_id: {query_id.removeprefix("q:"): 1} for query_id in queries}
    return Collection(PYTHON_DOCS, corpus, queries, qrels), [Pair(entry.query, entry.document) for entry in train]


# ------------------------------------------------------------------------------------- writing


def write_collection(folder: str | Path, collection: Collection, pairs: Iterable[Pair] = (), split: str = "test") -> None:
    """Write a collection, and training pairs if there are any, as a BEIR folder.

    Args:
        folder: new or empty.
        pairs: written to ``pairs.jsonl``.
        split: the judgements are written to ``qrels/SPLIT.tsv``.

    Raises:
        OptionError: no folder or no collection.
        OutputError: the folder exists and is not empty, or an id contains a tab, a line break or a lone surrogate, which
            TSV files cannot contain.
    """
    require("folder", folder, (str, Path), "the folder comes first")
    require("collection", collection, Collection, "give an anysplade.Collection")
    with atomic_folder(folder) as work:
        _write_jsonl(
            work / "corpus.jsonl",
            (
                {"_id": id_} | {name: value for name, value in document._asdict().items() if value is not None}
                for id_, document in collection.corpus.items()
            ),
        )
        _write_jsonl(work / "queries.jsonl", ({"_id": id_, "text": text} for id_, text in collection.queries.items()))
        (work / "qrels").mkdir()
        with open(work / "qrels" / f"{split}.tsv", "w", encoding="utf-8") as file:
            file.write("query-id\tcorpus-id\tscore\n")
            for query_id, grades in collection.qrels.items():
                for document_id, grade in grades.items():
                    joined = query_id + document_id
                    if {"\t", "\n", "\r"} & set(joined) or joined != replace_surrogates(joined):
                        reason = "qrels cannot contain a tab, line break or lone surrogate"
                        raise OutputError(f"ids {query_id!r}, {document_id!r}: {reason}; rename them")
                    file.write(f"{query_id}\t{document_id}\t{grade}\n")
        examples = [{key: value for key, value in pair._asdict().items() if value} for pair in pairs]
        if examples:
            _write_jsonl(work / "pairs.jsonl", examples)


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:  # writes a lone surrogate as a JSON escape
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def data_hash(collection: Collection) -> str:
    """SHA-256 of everything that decides what an evaluation measures: ids and texts of documents and queries, and judgements.

    Documents count in their order, which decides between equal scores; queries and judgements are sorted.
    """
    documents = ((id_, document.title, document.text) for id_, document in collection.corpus.items())
    judgements = ((id_, sorted(grades.items())) for id_, grades in sorted(collection.qrels.items()))
    return DataHash(chain(documents, ["queries"], sorted(collection.queries.items()), ["judgements"], judgements)).hexdigest()
