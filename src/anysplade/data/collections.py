"""Collections: a corpus, queries and relevance judgements (qrels), loaded by name and written as folders.

On disk a collection has BEIR's layout: ``corpus.jsonl`` (``_id``, ``title``, ``text``), ``queries.jsonl`` (``_id``,
``text``) and ``qrels/SPLIT.tsv`` (``query-id``, ``corpus-id``, ``score``).
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from anysplade._common.arguments import require
from anysplade._common.files import atomic_folder, user_path
from anysplade._common.hashing import DataHash
from anysplade._common.tables import Tabular
from anysplade.data import python_docs
from anysplade.data.corpus import Document
from anysplade.data.external import ir_names
from anysplade.data.names import BM25_NAMES, COLLECTION, NANO_BEIR, PYTHON_DOCS, QUERY_FILES, Source, held, is_built_in, resolve
from anysplade.data.qrels import Qrels, read_qrels
from anysplade.data.queries import load_queries
from anysplade.data.rows import find_file
from anysplade.data.stored_corpus import open_corpus
from anysplade.data.text import replace_surrogates
from anysplade.errors import DataError, OutputError

logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """A training example: a ``query``, the text of a ``positive`` document that answers it, and of hard negatives."""

    query: str  # its text
    positive: str  # the text of a document that answers it
    negatives: tuple[str, ...] = ()  # documents that look relevant and are not
    scores: tuple[float, ...] | None = None  # of a teacher: for the positive and each negative, or the margin to each negative


@dataclass(frozen=True, repr=False)
class Collection(Tabular):
    """A test collection: a corpus, queries and relevance judgements. Every query has at least one judgement."""

    name: str  # shown in results
    corpus: Mapping[str, Document]  # by document id; a large corpus that was loaded stays in files
    queries: dict[str, str]  # by query id
    qrels: dict[str, dict[str, int]]  # grades by query id and document id

    def _rows(self) -> list[dict[str, Any]]:
        judgements = sum(map(len, self.qrels.values()))
        counts = {"documents": len(self.corpus), "queries": len(self.queries), "judgements": judgements}
        return [{"collection": self.name} | counts]


def is_collection(name: str) -> bool:
    """Whether a name stands for a collection, and not for a model or a run file."""
    is_built_in(name, *BM25_NAMES, PYTHON_DOCS)  # warns if a folder has that name
    kind = held(name)
    return kind == COLLECTION or (kind is None and user_path(name).is_dir())


def collection_names(source: str) -> list[str]:
    """The names of the collections that a name stands for: thirteen for ``"nanobeir"``, else the name itself."""
    if source.lower() != NANO_BEIR:
        return [source]
    is_built_in(source, source)  # warns if a folder has that name
    return sorted(name for name in ir_names() if name.startswith("nano-beir/"))


def load_collection(source: str | Path | Source, split: str = "test", progress: bool = False) -> Collection:
    """Load a collection from a ``source``.

    A source is one of these:

    - a BEIR folder, or a zip of one: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/SPLIT.tsv``; files can be compressed with
      gzip, bzip2, xz or Zstandard
    - a TREC folder: a corpus (``corpus``, ``collection``, ``docs`` or ``msmarco-docs``; ``.jsonl``, ``.tsv``, ``.csv`` or
      ``.parquet``), topics (``topics`` or ``queries``, in the same formats or with TREC's ``<top>`` or ``<topic>`` in ``.txt``,
      ``.trec`` or ``.xml``) and qrels (``qrels.txt``, ``qrels.SPLIT.txt``, ..., four columns)
    - an ir_datasets id (``msmarco-passage/trec-dl-2019/judged``; ``beir/scifact`` gets the split as its last part)
    - a hub dataset with the configs ``corpus``, ``queries`` and ``qrels`` or ``default``
    - ``"python-docs"``: docstrings of installed packages, see ``load_python_docs``

    Only queries with a judgement are kept, as in BEIR; the number of others is logged. Judgements of documents that are not in
    the corpus are kept and count against recall, as in trec_eval; judgements of unknown queries are left out. A warning
    gives the number of both.

    Args:
        split: the qrels to read.
        progress: show a progress bar.

    Raises:
        DataError: a part is missing, a line is malformed, an id is a duplicate, or no document of the corpus is judged above 0
            for a query, so that every measure would be 0.
    """
    resolved = resolve(source, "collection", split)
    name, at = resolved.name, resolved.at
    if resolved.kind == "file":
        hint = f"; name its folder: {at.parent}" if find_file(at.parent, QUERY_FILES) is not None else ""
        raise DataError(f"{at}: a collection is a folder or a zip with corpus.jsonl, queries.jsonl and qrels/{hint}")
    if resolved.kind == "python-docs":
        if split != "test":
            raise DataError(f"python-docs has no split {split!r}; its only one is 'test'")
        return load_python_docs(progress=progress)[0]
    if resolved.kind != "ir_datasets":
        name = user_path(at if resolved.kind == "hub" else name).resolve().name.removesuffix(".zip")
    elif not (at.has_queries() and at.has_qrels()):
        raise DataError(f"{name}: this ir_datasets id has no queries with judgements; name a subset that has, such as its /test")
    return _judged_collection(name, open_corpus(resolved), load_queries(resolved), read_qrels(resolved, split))


def _judged_collection(name: str, corpus: Mapping[str, Document], queries: dict[str, str], qrels: Qrels) -> Collection:
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


def load_python_docs(packages: Iterable[str] = python_docs.PACKAGES, progress: bool = False) -> tuple[Collection, list[Pair]]:
    """Load the docstrings of installed packages as a test collection and training pairs.

    A query is the summary line of a docstring; its one relevant document is the first 60 words of the rest. Each module is
    in one split (``python_docs.split_entries`` has the rules). Summaries of fewer than eight words are not test queries, but
    their documents are in the corpus. The same environment gives the same texts in the same order.

    Raises:
        DataError: a package is not installed.
    """
    train, test = python_docs.split_entries(python_docs.read_docstrings(packages, progress))
    corpus = {entry.name: Document("", entry.document) for entry in test}
    queries = {f"q:{entry.name}": entry.query for entry in test if entry.is_test_query}
    qrels = {query_id: {query_id.removeprefix("q:"): 1} for query_id in queries}
    return Collection(PYTHON_DOCS, corpus, queries, qrels), [Pair(entry.query, entry.document) for entry in train]


def write_collection(folder: str | Path, collection: Collection, pairs: Iterable[Pair] = (), split: str = "test") -> None:
    """Write a collection, and training pairs if there are any, as a BEIR folder.

    Args:
        folder: new or empty.
        pairs: written to ``pairs.jsonl``.
        split: the judgements are written to ``qrels/SPLIT.tsv``.

    Raises:
        OptionError: an argument is not a folder or not a collection.
        OutputError: the folder exists and is not empty, or an id contains a tab, a line break or a lone surrogate, which
            TSV files cannot contain.
    """
    require("folder", folder, (str, Path), "the folder comes first")
    require("collection", collection, Collection, "give an anysplade.Collection")
    with atomic_folder(folder) as work:
        documents = (
            {"_id": id_} | {name: value for name, value in document._asdict().items() if value is not None}
            for id_, document in collection.corpus.items()
        )
        _write_jsonl(work / "corpus.jsonl", documents)
        _write_jsonl(work / "queries.jsonl", ({"_id": id_, "text": text} for id_, text in collection.queries.items()))
        (work / "qrels").mkdir()
        with open(work / "qrels" / f"{split}.tsv", "w", encoding="utf-8") as file:
            file.write("query-id\tcorpus-id\tscore\n")
            for query_id, grades in collection.qrels.items():
                for document_id, grade in grades.items():
                    ids = query_id + document_id
                    if {"\t", "\n", "\r"} & set(ids) or ids != replace_surrogates(ids):
                        reason = "qrels cannot contain a tab, line break or lone surrogate"
                        raise OutputError(f"ids {query_id!r}, {document_id!r}: {reason}; rename them")
                    file.write(f"{query_id}\t{document_id}\t{grade}\n")
        examples = [{name: value for name, value in pair._asdict().items() if value} for pair in pairs]
        if examples:
            _write_jsonl(work / "pairs.jsonl", examples)


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:  # writes a lone surrogate as a JSON escape
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def data_hash(collection: Collection) -> str:
    """SHA-256 of everything that determines what an evaluation measures: ids, texts and judgements.

    Documents are hashed in their order, which decides between equal scores; queries and judgements are sorted.
    """
    documents = ((id_, document.title, document.text) for id_, document in collection.corpus.items())
    judgements = ((id_, sorted(grades.items())) for id_, grades in sorted(collection.qrels.items()))
    return DataHash(chain(documents, ["queries"], sorted(collection.queries.items()), ["judgements"], judgements)).hexdigest()
