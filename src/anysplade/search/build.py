"""Build an index in a folder from a corpus, continue an interrupted build, and update the index when the corpus changed."""

import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anysplade._common.files import beside, only_process, require_empty, user_path
from anysplade._common.progress import begin
from anysplade._common.provenance import provenance
from anysplade.data.corpus import Document, empty_corpus, iter_corpus
from anysplade.data.names import CORPUS_FILES
from anysplade.data.rows import find_file
from anysplade.errors import AnyspladeError, OutputError
from anysplade.model.encoder import open_encoder
from anysplade.model.runtimes import resolve_precision
from anysplade.search.database import BATCH
from anysplade.search.document_encoding import Options
from anysplade.search.index import Changes, Index, read_about, write_about
from anysplade.search.index_model import IndexModel, describe_model, describe_place, described_places
from anysplade.search.lexical import average_length, find_language
from anysplade.search.store import Store

_PLAIN = {"lexical": None, "with_bm25": False, "language": None}  # of an index of an earlier version, which does not say so
_LARGE = 10_000  # documents whose engine takes seconds to build

Corpus = str | Path | Mapping[str, Document]


def build_index(corpus: Corpus, output: Path, options: Options, lexical: dict[str, Any], **encoding: Any) -> Index:
    """``Index.build`` with checked arguments; ``lexical`` has those two by name, ``encoding`` is for ``encode_documents``."""
    wanted = describe_model(options.model, output) | {
        **(describe_corpus(corpus, output) if isinstance(corpus, str | Path) else {"corpus": "documents in memory"}),
        "precision": options.precision,
        "top_k": options.top_k,
        "max_length": options.max_length,
        **lexical,
    }
    with only_process(beside(output, "{}.parts")):  # not in the folder, where the store has its own lock
        about = _existing(output, wanted)
        wanted["precision"] = resolve_precision(options.precision) if about is None else about["precision"]
        wanted["language"] = lexical["language"] if about is None else about["language"]
        if about is None or not about["complete"]:
            return _build(corpus, output, wanted, options, **encoding)
        if not isinstance(corpus, str | Path):
            raise OutputError(f"{output}: the folder is not empty: it holds an index; load it, and add to it")
        return _update(corpus, output, wanted, options, **encoding)


def describe_corpus(corpus: str | Path, folder: Path | None = None) -> dict[str, str]:
    """The description of a corpus for an index; a call from another folder, or with both moved together, means the same."""
    path = user_path(corpus)
    return describe_place("corpus", path, folder) if path.exists() else {"corpus": str(corpus)}


def _is_same_corpus(about: dict[str, Any], wanted: dict[str, Any], folder: Path) -> bool:
    """Whether the recorded corpus, where it was or where it was relative to the index, is read from the same file."""
    places = described_places(about, "corpus", folder)
    return wanted["corpus"] in places or _file_of(wanted["corpus"]) in map(_file_of, places)


def _file_of(corpus: str) -> str:
    """The file that is read of a recorded corpus, or its name if it is no folder."""
    file = find_file(Path(corpus), CORPUS_FILES) if Path(corpus).is_absolute() else None
    return str(file or corpus)


def _existing(output: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The description of the index in the folder, if any; something else, or an index with other options, is an OutputError."""
    if not (output / "index.json").is_file():
        if output.exists() and not output.is_dir():
            require_empty(output)
        names = [path.name for path in output.iterdir()] if output.is_dir() else []
        if not all(name in ("shards", "engine") or name.startswith("documents.sqlite") for name in names):  # of a stopped build
            raise OutputError(f"{output}: the folder is not empty; name another `output`, or remove it first")
        return None
    about = _PLAIN | read_about(output)
    same = {"model_beside", "corpus_beside"}
    if _is_same_corpus(about, wanted, output):
        same.add("corpus")
    same |= {name for name in ("precision", "language") if wanted[name] == "auto"}
    if wanted["model_fingerprint"] is not None and wanted["model_fingerprint"] == about.get("model_fingerprint"):
        same.add("model")  # it may have been moved
    elif about.get("model") != wanted["model"]:
        same.add("model_fingerprint")  # another model is enough to say
    changes = {
        name: f"{name} ({about.get(name, 'none')}, not {wanted[name]})"
        for name in wanted
        if name not in same and about.get(name) != wanted[name]
    }
    for name, following in (("lexical", "with_bm25"), ("with_bm25", "language"), ("lexical", "language")):
        if name in changes:
            changes.pop(following, None)  # one difference is enough to say
    if "model_fingerprint" in changes:
        changes["model_fingerprint"] = f"model (what {wanted['model']} holds changed)"
    if changes:
        shown = ", ".join(changes.values())
        raise OutputError(f"{output}: the folder is not empty: it holds an index with another {shown}; name another `output`")
    return about


def _build(corpus: Corpus, output: Path, wanted: dict[str, Any], options: Options, **encoding: Any) -> Index:
    """Build an index, or continue an unfinished one."""
    is_new = not output.exists() or not any(output.iterdir())
    index = None
    try:
        index = _begin(corpus, output, wanted, options, encoding["progress"])
        _make_equal(index, corpus, **encoding)
    except AnyspladeError:
        if is_new and not (index and len(index)):  # encoded documents are kept: they can have taken hours
            if index is not None:
                index.close()
            shutil.rmtree(output, ignore_errors=True)
        raise
    index._write(index.about | {"complete": True, "provenance": provenance()})
    index.changes = Changes(added=len(index))
    shutil.rmtree(output / "shards", ignore_errors=True)  # of a build that an earlier version began
    return index


def _begin(corpus: Corpus, output: Path, wanted: dict[str, Any], options: Options, progress: bool) -> Index:
    """The unfinished index in the folder, or a new one."""
    if (output / "index.json").exists():
        return Index(output, IndexModel(read_about(output), output, options.model, options.runtime))
    encoder = open_encoder(options.model, max_length=options.max_length)
    about = wanted | {"vocabulary": encoder.get_embedding_dimension(), "complete": False}
    if wanted["with_bm25"]:
        begin("counting the words of the documents", progress)
        about["language"] = find_language(_texts(corpus, progress), wanted["language"])
        about["average_length"] = average_length(_texts(corpus, progress), about["language"])
    Store.create(output, engine=False)
    write_about(output, about)  # after the store: a folder with a description has one
    model = IndexModel(about, output, options.model, options.runtime)
    model.source, model.encoder = options.model, encoder
    return Index(output, model)


def _update(corpus: str | Path, output: Path, wanted: dict[str, Any], options: Options, **encoding: Any) -> Index:
    """Bring a complete index up to date."""
    index = Index.load(output, options.model, runtime=options.runtime)
    if index.store.edited:
        raise OutputError(
            f"{output}: add or delete changed this index since it was built, and an update from {corpus} would undo "
            "that; continue with add and delete, or build a new index in another `output`"
        )
    differences = _Differences(index, corpus, encoding["progress"])
    deque(differences, maxlen=0)  # reads the whole corpus, since one that cannot be read to its end must change nothing
    index.changes = differences.changes
    about = index.about | wanted
    if any(index.changes):
        index.store.require_writable()  # before hours of encoding
        _make_equal(index, corpus, **encoding)
        about["updated"] = index.changes._asdict() | {"provenance": provenance()}
    if about != _PLAIN | index.about or any(index.changes):
        index._write(about)
    return index


def _make_equal(index: Index, corpus: Corpus, **encoding: Any) -> None:
    """Add, replace and delete documents until the index has those of the corpus, which is read once."""
    differences = _Differences(index, corpus, encoding["progress"])
    for batch in index._encode(differences, **encoding):
        index.store.put(batch)
    gone = differences.gone
    for start in range(0, len(gone), BATCH):
        index.store.delete(index.store.ids(gone[start : start + BATCH]))
    begin(f"indexing the vectors of {len(index):,} documents", encoding["progress"] and len(index) >= _LARGE)
    index.store.choose_engine()
    index.store.optimize()


def _documents(corpus: Corpus, progress: bool) -> Iterable[tuple[str, Document]]:
    return iter_corpus(corpus, progress=progress) if isinstance(corpus, str | Path) else corpus.items()


def _texts(corpus: Corpus, progress: bool) -> Iterator[str]:
    return (document.full_text for _, document in _documents(corpus, progress))


class _Differences:
    """The documents of a corpus that an index lacks or has in another version; afterwards also what would change."""

    def __init__(self, index: Index, corpus: Corpus, progress: bool) -> None:
        self.index, self.corpus, self.progress = index, corpus, progress
        self.changes = Changes()
        self.gone: list[int] = []  # positions of the documents that are not in the corpus

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        corpus = self.corpus
        documents = _documents(corpus, self.progress)
        known = self.index.store.positions()
        kept = np.zeros(len(known), bool)
        count = added = replaced = 0
        for id_, document, position, same in self.index.store.compare(documents):
            count += 1
            if position is None:
                added += 1
            else:
                replaced += not same
                kept[np.searchsorted(known, position)] = True
            if not same:
                yield id_, document
        if not count and isinstance(corpus, str | Path):
            raise empty_corpus(corpus)
        self.gone = known[~kept].tolist()
        self.changes = Changes(added, replaced, len(self.gone))
