"""Search an index for many queries: encoded in batches, and searched by several threads."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from anysplade._common.arguments import require
from anysplade._common.progress import bar
from anysplade.errors import OptionError
from anysplade.model.queries import log_cut
from anysplade.search.filters import Filter
from anysplade.search.hits import check_count, check_query

if TYPE_CHECKING:
    from anysplade.search.index import Index
    from anysplade.search.remote import RemoteIndex

_BATCH = 256  # queries that are encoded and searched together, whose rankings are in memory


def search_many(
    index: "Index | RemoteIndex",
    queries: Mapping[str, str],
    k: int = 1000,
    *,
    filter: Filter | None = None,
    exact: bool = False,
    progress: bool = False,
    **rescored: Any,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Search an ``index`` for each of several ``queries`` by id, such as those of ``load_queries``.

    Yields the id of each query, in their order, and the scores of its at most ``k`` hits by document id, the best first: those of
    ``Index.search``. Scores can differ in their last digits, because a model computes them for several queries together.
    Only the rankings of 256 queries are in memory at a time.

    Args:
        k: the largest number of hits per query.
        filter: as in ``Index.search``.
        exact: as in ``Index.search``.
        progress: show progress.
        rescored: ``fuse``, ``rerank`` and ``rerank_depth`` as in ``Index.search``; the queries are then searched one by one.

    Raises:
        OptionError: there is no query, one is empty, k is below 1, or no document has a name of the filter.
        ModelError: as in ``Index.search``.
    """
    require("queries", queries, Mapping, "give texts by id: {id: text}")
    k = check_count("k", k)
    if not queries:
        raise OptionError("`queries` is empty; give at least one query")
    for id_, text in queries.items():
        try:
            check_query(text)
        except OptionError as error:
            raise OptionError(f"query {id_!r}: {error}") from None
    if rescored.get("fuse") or rescored.get("rerank"):
        return _rescored(index, queries, k, {"filter": filter, "exact": exact} | rescored, progress)
    return _search(index, queries, k, filter, exact, progress)


def _rescored(
    index: "Index | RemoteIndex", queries: Mapping[str, str], k: int, options: dict[str, Any], progress: bool
) -> Iterator[tuple[str, dict[str, float]]]:
    with bar("searching", "query", len(queries), progress) as shown:
        for id_, text in queries.items():
            yield id_, {hit.id: hit.score for hit in index.search(text, k, **options)}
            shown.update(1)


def _search(
    index: "Index | RemoteIndex", queries: Mapping[str, str], k: int, filter: Filter | None, exact: bool, progress: bool
) -> Iterator[tuple[str, dict[str, float]]]:
    log_cut(index.queries.count_truncated(list(queries.values())), len(queries), "queries")
    left = iter(queries.items())
    with bar("searching", "query", len(queries), progress) as shown:
        while batch := list(islice(left, _BATCH)):
            vectors = index.encode_queries([text for _, text in batch])
            for (id_, _), ranking in zip(batch, index.rank(vectors, k, filter, exact), strict=True):
                yield id_, ranking
                shown.update(1)
