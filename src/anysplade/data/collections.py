"""Collections and training pairs, from folders and files, and from the Python environment itself.

A *collection* is a corpus, queries and relevance judgements (qrels), kept on disk in BEIR's
layout: ``corpus.jsonl`` (``_id``, ``title``, ``text``), ``queries.jsonl`` (``_id``, ``text``) and
``qrels/SPLIT.tsv`` (``query-id``, ``corpus-id``, ``score``). ``training_data`` reads training pairs.
"""

import hashlib
import json
import logging
import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from anysplade._common.files import whole_folder
from anysplade.data import python_docs
from anysplade.data.sources import (
    CORPUS_FILES,
    PYTHON_DOCS,
    QUERY_FILES,
    Place,
    Row,
    find_file,
    hub_dataset,
    ir_dataset,
    ir_names,
    lines,
    resolve,
    rows,
    whole_characters,
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
        """Title and text as one, as BEIR's models read a document."""
        return f"{self.title} {self.text}".strip()


class Pair(NamedTuple):
    """A training example: a ``query``, the text of a ``positive`` document that answers it, and of hard negatives."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()  # documents that look relevant and are not
    scores: tuple[float, ...] | None = None  # of a teacher: for the positive and each negative, or the margin to each negative


@dataclass(frozen=True)
class Collection:
    """A test collection: a corpus, queries and relevance judgements. Every query has at least one judgement."""

    name: str  # in results
    corpus: dict[str, Document]  # by document id
    queries: dict[str, str]  # by query id
    qrels: dict[str, dict[str, int]]  # grades by query id and document id


# ------------------------------------------------------------------------------------- loading

NANO_BEIR = "nanobeir"  # thirteen collections at once

# The names a column may have; the first found is taken.
ID_NAMES = ("_id", "id", "doc_id", "docid", "docno", "pid", "passage_id", "query_id", "qid")
TEXT_NAMES = ("text", "contents", "content", "body", "passage", "abstract")
QUERY_NAMES = ("text", "query", "question", "contents", "body")


def is_collection(name: str) -> bool:
    """Whether a name is that of a collection rather than of a model or a run file."""
    path = Path(name).expanduser()
    if path.is_dir():
        return find_file(path, CORPUS_FILES) is not None or not any(
            (path / file).exists() for file in ("config.json", "modules.json", "model")
        )
    if path.suffix == ".zip" or name.lower() in (PYTHON_DOCS, NANO_BEIR):
        return True
    return not path.exists() and any(ir_dataset(known) is not None for known in (name, f"{name}/test"))


def collection_names(source: str) -> list[str]:
    """The collections that a name stands for: itself, or with ``"nanobeir"`` its thirteen."""
    if source.lower() != NANO_BEIR:
        return [source]
    return sorted(name for name in ir_names() if name.startswith("nano-beir/"))


def load_collection(source: str | Path, split: str = "test", progress: bool = False) -> Collection:
    """Load a collection from a ``source`` of any of these kinds.

    - a BEIR folder, or a zip of one: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/SPLIT.tsv``; files may be gzipped
    - a TREC folder: a corpus (``corpus`` or ``collection`` or ``docs``, ``.jsonl``, ``.tsv``, ``.csv`` or ``.parquet``),
      topics (``topics`` or ``queries``, likewise or TREC's ``<top>``) and qrels (``qrels*``, four columns)
    - an ir_datasets id (``msmarco-passage/trec-dl-2019/judged``; ``beir/scifact`` takes the split as its last part)
    - a dataset of the hub with the configs ``corpus``, ``queries`` and ``qrels`` or ``default``
    - ``"python-docs"``

    Only queries with a judgement are kept, as BEIR does; how many were left out is logged. In a BEIR folder every
    judged id must be known. Elsewhere judgements of documents that the corpus lacks stay, as trec_eval has it
    (no run can find them), and those of unknown queries are left out; both are warned of.

    Raises:
        DataError: a part is missing, a line is malformed, an id is a duplicate, or nothing that was judged is there.
    """
    found = resolve(source, "collection", split)
    if found.kind == "python-docs":
        if split != "test":
            raise DataError(f"python-docs has no split {split!r}; its only one is 'test'")
        return load_python_docs(progress=progress)[0]
    if found.kind == "ir_datasets":
        if not (found.at.has_queries() and found.at.has_qrels()):
            raise DataError(
                f"{found.name}: this ir_datasets id has no queries with judgements; name a subset that has, such as its /test"
            )
        return _checked(found.name, dict(_ir_corpus(found.at)), _ir_queries(found.at), _ir_qrels(found.at))
    if found.kind == "hub":
        return _hub_collection(str(found.at), split)
    if found.kind == "file":
        raise DataError(f"{found.at}: a collection is a folder or a zip with corpus.jsonl, queries.jsonl and qrels/")
    corpus, queries = read_corpus(found.at), read_queries(found.at)
    name = Path(found.name).expanduser().resolve().name.removesuffix(".zip")
    return _checked(name, corpus, queries, _read_qrels(found.at, split, queries, corpus))


def _checked(name: str, corpus: dict[str, Document], queries: dict[str, str], qrels: dict[str, dict[str, int]]) -> Collection:
    """Queries and judgements that belong together; what does not is counted."""
    unknown = [query_id for query_id in qrels if query_id not in queries]
    if unknown:
        logger.warning("%s: %d judged queries are not among the queries (such as %r); left out", name, len(unknown), unknown[0])
    qrels = {query_id: grades for query_id, grades in qrels.items() if query_id in queries}
    missing = [document_id for grades in qrels.values() for document_id in grades if document_id not in corpus]
    if not qrels:
        raise DataError(f"{name}: no judgement of any of its queries; the ids in queries and qrels must be the same")
    if len(missing) == sum(map(len, qrels.values())):
        raise DataError(f"{name}: none of the judged documents is in the corpus; the ids in corpus and qrels must be the same")
    if missing:
        logger.warning(
            "%s: %d judged documents are not in the corpus (such as %r); no run can find them", name, len(missing), missing[0]
        )
    judged = {query_id: text for query_id, text in queries.items() if query_id in qrels}
    if len(judged) < len(queries):
        logger.info("%s: %d of %d queries have no judgement and are not asked", name, len(queries) - len(judged), len(queries))
    return Collection(name, corpus, judged, qrels)


def read_corpus(source: str | Path | zipfile.Path, progress: bool = False) -> dict[str, Document]:
    """Read all documents of a ``source``, by id and in file order.

    Args:
        source: a file (JSONL, CSV, TSV, Parquet, gzipped or not), or any source of ``load_collection``.

    Raises:
        DataError: no such source, no document in it, a malformed row, or a duplicate id.
    """
    corpus = dict(iter_corpus(source, progress=progress))
    if not corpus:
        raise empty_corpus(source)
    return corpus


def empty_corpus(source: object) -> DataError:
    return DataError(f"{source}: the corpus is empty; each row needs _id and text")


def iter_corpus(source: str | Path | zipfile.Path, progress: bool = False) -> Iterator[tuple[str, Document]]:
    """Ids and documents one after the other: of a file (JSONL, CSV, TSV or Parquet) or of whatever holds a collection, as
    ``load_collection`` has it. Only the ids stay in memory, to find duplicates.

    Raises:
        DataError: no such file, or a malformed row, which is named.
    """
    found = resolve(source, "corpus")
    if found.kind == "python-docs":
        yield from load_python_docs(progress=progress)[0].corpus.items()
    elif found.kind == "ir_datasets":
        yield from _ir_corpus(found.at)
    elif found.kind == "hub":
        yield from _hub_corpus(str(found.at))
    else:
        file = _part(found.at, CORPUS_FILES, "corpus.jsonl") if found.kind == "folder" else found.at
        yield from _by_id(rows(file, ID_NAMES), file, TEXT_NAMES)


def read_queries(folder: Place) -> dict[str, str]:
    """Texts by id, of a folder that holds a collection."""
    file = _part(folder, QUERY_FILES, "queries.jsonl")
    text = ""
    if file.name.removesuffix(".gz").endswith((".trec", ".txt")):
        with lines(file) as numbered:
            text = "\n".join(line for _, line in numbered)
    sgml = text.lstrip().startswith("<")
    queries = dict(_topics(text, file) if sgml else _query_texts(rows(file, ID_NAMES), file))
    if not queries:
        raise DataError(f"{file}: no query in it; each row needs _id and text")
    return queries


def _query_texts(numbered: Iterable[Row], source: object) -> Iterator[tuple[str, str]]:
    return ((id_, document.text) for id_, document in _by_id(numbered, source, QUERY_NAMES))


def _part(folder: Place, names: Sequence[str], said: str) -> Place:
    path = find_file(folder, names)
    if path is None:
        raise DataError(f"{folder}: no {said} in it; a BEIR folder has corpus.jsonl, queries.jsonl and qrels/")
    return path


def _by_id(numbered: Iterable[Row], source: object, texts: Sequence[str]) -> Iterator[tuple[str, Document]]:
    """The documents, or queries, of rows.

    Args:
        texts: names that the column of texts may have.

    Raises:
        DataError: a row without id or text, or a duplicate id.
    """
    seen: dict[str, int] = {}
    for number, row in numbered:
        place = f"{source}:{number}"
        found = next((row[name] for name in ID_NAMES if row.get(name) is not None), None)
        if not isinstance(found, str | int) or isinstance(found, bool) or found == "":
            said = "" if found is None else f" (found: {json.dumps(found, default=str)[:40]}, neither a text nor a whole number)"
            raise DataError(f'{place}: no "_id"; each row needs _id and text{said}')
        id_ = str(found)
        if id_ in seen:
            raise DataError(f"{place}: duplicate id {id_[:80]!r}, first in line {seen[id_]}; ids must be unique")
        seen[id_] = number
        name = next((name for name in texts if name in row), "text")
        text, title, metadata = row.get(name), row.get("title"), row.get("metadata") or None
        if not isinstance(text, str):
            raise DataError(f'{place}: "{name}" is missing or not a text (the line has {", ".join(row) or "nothing"})')
        if not isinstance(title, str | None):
            raise DataError(f'{place}: "title" is {json.dumps(title, default=str)[:40]}, not a text; give a text or leave it out')
        if not isinstance(metadata, dict | None):
            raise DataError(f'{place}: "metadata" is not an object; give names and values')
        yield id_, Document(title or "", text, metadata)


def _topics(text: str, path: Place) -> Iterator[tuple[str, str]]:
    """Number and title of TREC topics, whose tags need not be closed."""
    for topic in re.findall(r"<top>(.*?)</top>", text, re.DOTALL | re.IGNORECASE):
        number = re.search(r"<num>\s*(?:Number:)?\s*([^\s<]+)", topic, re.IGNORECASE)
        title = re.search(r"<title>\s*(?:Topic:)?\s*(.*?)\s*(?:<|\Z)", topic, re.DOTALL | re.IGNORECASE)
        if not number or not title:
            raise DataError(f"{path}: a topic without <num> or <title>: {' '.join(topic.split())[:60]!r}")
        yield number[1], " ".join(title[1].split())


def _read_qrels(folder: Place, split: str, queries: dict[str, str], corpus: dict[str, Document]) -> dict[str, dict[str, int]]:
    """BEIR's three columns, whose ids must be known, or TREC's four, which may judge more than a corpus holds."""
    path, beir = find_qrels(folder, split)
    if path is None:
        inside = folder / "qrels"
        splits = sorted(p.name.removesuffix(".gz").removesuffix(".tsv") for p in inside.iterdir()) if inside.is_dir() else []
        raise DataError(f"{folder}: no qrels/{split}.tsv (splits found: {', '.join(splits) or 'none'}); choose one with `split`")
    qrels: dict[str, dict[str, int]] = {}
    with lines(path) as numbered:
        for number, line in numbered:
            parts = line.split("\t") if beir else line.split()
            if not line.strip() or (number == 1 and parts[-1].strip().lower() in ("score", "relevance", "rel")):
                continue
            if len(parts) != (3 if beir else 4):
                form = "query-id, corpus-id, score, with tabs between" if beir else "query, iteration, document, grade"
                raise DataError(f"{path}:{number}: {len(parts)} columns; a line is {form}")
            query_id, document_id = parts[0], parts[-2]
            for what, id_, known, file in (("query", query_id, queries, "queries"), ("document", document_id, corpus, "corpus")):
                if beir and id_ not in known:
                    raise DataError(
                        f"{path}:{number}: the {what} {id_[:80]!r} is not in {file}.jsonl; add it there or remove the line"
                    )
            _judge(qrels, query_id, document_id, parts[-1].strip(), f"{path}:{number}")
    if not qrels:
        raise DataError(f"{path}: no judgement in it; each line is query-id, corpus-id, score")
    return qrels


def find_qrels(folder: Place, split: str) -> tuple[Place | None, bool]:
    """The file of judgements of a split: BEIR's ``qrels/SPLIT.tsv``, or one of TREC's names; and whether it is BEIR's."""
    beir = find_file(folder / "qrels", [f"{split}.tsv"])
    trec = [f"qrels.{split}.txt", f"qrels.{split}.tsv", "qrels.txt", "qrels.tsv", "qrels.trec", "qrels"]
    return (beir, True) if beir else (find_file(folder, trec), False)


def _judge(qrels: dict[str, dict[str, int]], query_id: str, document_id: str, grade: Any, place: str) -> None:
    """Add a judgement; ``1.0`` is 1.

    Raises:
        DataError: the grade is no whole number, or another than before.
    """
    try:
        value = float(grade)
    except (TypeError, ValueError):
        value = math.nan
    if not value.is_integer():
        raise DataError(f"{place}: the score {str(grade)[:40]!r} is not a whole number")
    before = qrels.setdefault(query_id, {}).setdefault(document_id, int(value))
    if before != value:
        raise DataError(
            f"{place}: {document_id[:80]!r} is judged {value:g} for the query {query_id[:80]!r}, and {before} before; keep one"
        )


def _ir_corpus(dataset: Any) -> Iterator[tuple[str, Document]]:
    for document in dataset.docs_iter():
        titled = hasattr(document, "title") and hasattr(document, "text")
        yield document.doc_id, Document(document.title or "", document.text) if titled else Document("", document.default_text())


def _ir_queries(dataset: Any) -> dict[str, str]:
    return {query.query_id: query.default_text() for query in dataset.queries_iter()}


def _ir_qrels(dataset: Any) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for judged in dataset.qrels_iter():
        qrels.setdefault(judged.query_id, {})[judged.doc_id] = judged.relevance
    return qrels


def _hub_collection(name: str, split: str) -> Collection:
    """Configs corpus and queries, of one split each; judgements in the config qrels or default."""
    corpus, queries = dict(_hub_corpus(name)), dict(_query_texts(_hub_rows(name, "queries"), f"{name}:queries"))
    try:
        judged = hub_dataset(name, "qrels", split=None)
    except DataError:
        judged = hub_dataset(name, "default", split=None)
    found = judged[split] if split in judged else next(iter(judged.values())) if len(judged) == 1 else None
    if found is None:
        raise DataError(f"{name}: no split {split!r} (splits found: {', '.join(judged)}); choose one with `split`")
    qrels: dict[str, dict[str, int]] = {}
    for number, row in enumerate(found, 1):
        place = f"{name}, judgement {number}"
        if not {"query-id", "corpus-id"} <= row.keys():
            raise DataError(f"{place}: no query-id and corpus-id (found: {', '.join(row)}); its columns must have these names")
        _judge(qrels, str(row["query-id"]), str(row["corpus-id"]), row.get("score", 1), place)
    return _checked(name.rstrip("/").rpartition("/")[2], corpus, queries, qrels)


def _hub_rows(name: str, side: str) -> Iterator[Row]:
    return enumerate(next(iter(hub_dataset(name, side, split=None).values())), 1)


def _hub_corpus(name: str) -> Iterator[tuple[str, Document]]:
    return _by_id(_hub_rows(name, "corpus"), f"{name}:corpus", TEXT_NAMES)


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
    """Write a collection, and training pairs if there are any, as a BEIR folder.

    Args:
        folder: new or empty.
        pairs: written to ``pairs.jsonl``.
        split: the judgements are written to ``qrels/SPLIT.tsv``.

    Raises:
        OutputError: the folder exists and is not empty, or an id cannot stand in a TSV file.
    """
    with whole_folder(folder) as work:
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
                    if {"\t", "\n", "\r"} & set(joined) or joined != whole_characters(joined):
                        fault = "a tab, line break or lone surrogate cannot stand in qrels"
                        raise OutputError(f"ids {query_id!r}, {document_id!r}: {fault}; rename them")
                    file.write(f"{query_id}\t{document_id}\t{grade}\n")
        examples = [{key: value for key, value in pair._asdict().items() if value} for pair in pairs]
        if examples:
            _write_jsonl(work / "pairs.jsonl", examples)


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:  # a lone surrogate is escaped as in JSON
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def hash_texts(texts: Iterable[str]) -> str:
    """SHA-256 over texts in order, for the provenance of a result."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def data_hash(collection: Collection) -> str:
    """SHA-256 of everything that decides what an evaluation measures: documents, queries and judgements."""
    texts = (document.full_text for document in collection.corpus.values())
    return hash_texts([*collection.corpus, *texts, *collection.queries.values(), json.dumps(collection.qrels)])
