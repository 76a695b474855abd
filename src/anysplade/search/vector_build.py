"""Build an index from files of vectors, or continue an interrupted build."""

import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from anysplade._common.files import beside, only_process, require_empty
from anysplade._common.progress import bar, begin
from anysplade._common.provenance import provenance
from anysplade.errors import AnyspladeError, DataError, OutputError
from anysplade.model.saved import resolve_model
from anysplade.search.database import BATCH
from anysplade.search.documents import EncodedDocument
from anysplade.search.index import Changes, Index, read_about, write_about
from anysplade.search.index_model import FORMAT, IndexModel, describe_model, describe_place
from anysplade.search.store import Store
from anysplade.search.vectors import Files, Vocabulary, find_vectors, read_vectors

_ANY = 2**31 - 1  # terms, before all vectors are read
_SAME = ("model_fingerprint", "vector_files")  # a place can have moved


def build_from_vectors(vectors: str | Path, output: Path, model: str | Path | None, progress: bool) -> Index:
    """``Index.from_vectors``."""
    files = find_vectors(vectors)
    about: dict[str, Any] = {"format": FORMAT, "model": None, "model_fingerprint": None}
    if model is not None:
        about |= describe_model(resolve_model(model), output)
    about |= {"corpus": f"vectors of {files.place.resolve()}", "vector_files": files.describe()}
    about |= {**describe_place("vectors", files.place, output), "precision": "float32", "top_k": None, "max_length": None}
    with only_process(beside(output, "{}.parts")):
        found = _existing(output, about)
        if found is None or not found["complete"]:
            _build(files, output, about, model, progress)
        index = Index.load(output, model)
        if found is None or not found["complete"]:
            index.changes = Changes(added=len(index))
        return index


def _existing(output: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The description of the index of these vectors in the folder, if any; something else is an OutputError."""
    if not (output / "index.json").is_file():
        names = {path.name.partition("-")[0] for path in output.iterdir()} if output.is_dir() else set()
        if not names <= {"documents.sqlite", "lock"}:  # of a build that was stopped at once
            require_empty(output)
        return None
    found = read_about(output)
    if any(found.get(name) != about[name] for name in _SAME):
        raise OutputError(f"{output}: the folder holds another index, of other vectors or another model; name another `output`")
    return found


def _build(files: Files, output: Path, about: dict[str, Any], model: str | Path | None, progress: bool) -> None:
    names = None if model is None else IndexModel(about, output, model).queries.term_names
    is_new = not (output / "index.json").is_file()
    if is_new:
        Store.create(output, engine=False)
        write_about(output, about | {"vocabulary": _ANY, "complete": False})  # after the store: a folder with it has one
    store = Store(output, _ANY if names is None else len(names))
    try:
        store.require_writable()
        _fill(store, files, Vocabulary(store.term_names() if names is None else names, names is not None), progress)
        count = len(store)
        if not count:
            raise DataError(f"{files.place}: no vectors there")
        begin(f"writing the postings of {count:,} documents", progress, count)
        store.choose_engine()
        store.optimize()
        width = max(store.count_terms(), len(store.term_names()), 1) if names is None else len(names)
    except AnyspladeError:
        if is_new and not len(store):
            store.close()
            shutil.rmtree(output, ignore_errors=True)
        raise
    finally:
        store.close()
    write_about(output, about | {"vocabulary": width, "complete": True, "provenance": provenance()})


def _fill(store: Store, files: Files, vocabulary: Vocabulary, progress: bool) -> None:
    """Add the documents that the store lacks: those after its last, because each transaction adds the next ones."""
    done = len(store)
    documents = read_vectors(files, vocabulary.number, max(0, done - 1))
    if done:
        _require_same(store, next(documents, None), done, files)
    with bar("indexing vectors", "document", None, progress, done) as shown:
        known = len(vocabulary.ids)
        while batch := list(islice(documents, BATCH)):
            _require_new(store, batch, files)
            if not vocabulary.fixed and len(vocabulary.ids) > known:  # before the documents: a name too many does no harm
                store.add_terms(list(islice(vocabulary.ids, known, None)))
                known = len(vocabulary.ids)
            store.put(batch)
            shown.update(len(batch))


def _require_same(store: Store, last: EncodedDocument | None, done: int, files: Files) -> None:
    id_ = store.ids([done])[0]
    if last is None or last.id != id_:
        raise OutputError(f"{store.folder}: was begun with other vectors than {files.place} has now; name another `output`")


def _require_new(store: Store, batch: list[EncodedDocument], files: Files) -> None:
    ids = [document.id for document in batch]
    twice = store.known(ids) or _repeated(ids)
    if twice:
        raise DataError(f"{files.place}: duplicate id {twice[0][:80]!r}; ids must be unique")


def _repeated(ids: list[str]) -> list[str]:
    return [id_ for id_, count in Counter(ids).items() if count > 1]
