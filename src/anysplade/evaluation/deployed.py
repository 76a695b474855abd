"""Rank the documents of a collection with an index as it is: its precision, its pruning, its documents, its engine.

The engine is of the extra ``search``, which other evaluations do without, so ``search.index`` is imported where it is used.
"""

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from anysplade._common.files import user_path
from anysplade.data.collections import Collection
from anysplade.data.names import INDEX, held
from anysplade.errors import OptionError
from anysplade.evaluation.costs import counted_cost
from anysplade.evaluation.runs import require_share
from anysplade.model.options import runtime_for
from anysplade.search.batch import search_many
from anysplade.search.index_model import IndexModel

if TYPE_CHECKING:
    from anysplade.evaluation.rankings import Ranker
    from anysplade.search.index import Index

_BATCH = 1024  # ids that are looked up together


def is_index(model: Any) -> TypeGuard[str | Path]:
    return isinstance(model, str | Path) and held(model) == INDEX


def model_of(folder: str | Path) -> tuple[str, int | None]:
    """The model of an index, and the number of tokens at which the index cuts texts; None for the model's own."""
    from anysplade.search.index import read_about

    folder = user_path(folder)
    about = read_about(folder)
    return IndexModel(about, folder).source, about.get("max_length")


def rank_by_index(folder: str | Path, ranker: "Ranker") -> dict[str, Any]:
    """The fields of an ``Evaluation`` that follow from an index. Documents of the index count as irrelevant if they are not judged.

    Raises:
        DataError: the index has no document of the collection. If few match, a warning gives their share.
        OptionError: ``max_length`` is another one than that of the index, or ``passages`` is given.
    """
    from anysplade.search.index import Index, read_about

    collection = ranker.collection
    length = read_about(user_path(folder)).get("max_length")
    if ranker.max_length not in (None, length):
        made = "its model's own length" if length is None else length
        raise OptionError(f"{folder}: its documents were cut at {made}; leave out `max_length`, or build the index again with it")
    if ranker.passages is not None:
        raise OptionError(f"{folder}: an index of whole documents; leave out `passages`, or evaluate its model")
    runtime = runtime_for(len(collection.queries), ranker.runtime, ranker.precision)
    with Index.load(folder, runtime=runtime, precision=ranker.precision) as index:
        matching = _match(folder, index, collection)
        start = time.perf_counter()
        texts = {id_: text for id_, text in collection.queries.items() if text.strip()}  # an empty one finds nothing
        run: dict[str, dict[str, float]] = {query_id: {} for query_id in collection.queries}
        for query_id, found in search_many(index, texts, ranker.hits, progress=ranker.progress):
            itself = query_id if query_id in ranker.self_matches else None
            run[query_id] = dict(islice(((id_, score) for id_, score in found.items() if id_ != itself), ranker.depth))
        searching = time.perf_counter() - start
        about = index.about
        return {
            "kind": "index",
            "run": run,
            "seconds": {"encoding queries and search": searching},
            "cost": counted_cost(index.encode_queries(list(texts.values())), *index.store.counts()),
            "precision": about["precision"],
            "index": {
                "documents": len(index),
                "documents_in_collection": matching,
                "top_k": about["top_k"],
                "lexical": about.get("lexical"),
                "max_length": about.get("max_length"),
                "query_precision": index.queries.precision,
                "engine": "exact" if index.store.searches_exactly else "qdrant-edge",
                "model": about["model"],
            },
            "model_fingerprint": about["model_fingerprint"],
        }


def _match(folder: str | Path, index: "Index", collection: Collection) -> int:
    """The number of documents of the index that the collection has; warns if few match, in either direction."""
    documents, fix = collection.corpus, "name the collection that was indexed"
    found, name = sum(id_ in documents for id_ in _ids(index)), collection.name

    def missing() -> str | None:
        return next((id_ for id_ in _ids(index) if id_ not in documents), None)

    require_share(folder, f"documents of the index are in {name}", len(index), found, missing, fix)
    require_share(folder, f"documents of {name} are in the index", len(documents), found, lambda: _not_in(index, documents), fix)
    return found


def _ids(index: "Index") -> Iterator[str]:
    positions = index.store.positions()
    for start in range(0, len(positions), _BATCH):
        yield from index.store.ids(positions[start : start + _BATCH].tolist())


def _not_in(index: "Index", ids: Iterable[str]) -> str | None:
    """The first id that the index lacks."""
    iterator = iter(ids)
    while batch := list(islice(iterator, _BATCH)):
        known = set(index.store.known(batch))
        for id_ in batch:
            if id_ not in known:
                return id_
    return None
