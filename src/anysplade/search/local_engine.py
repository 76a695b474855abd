"""The engine of an index in a folder: a Qdrant Edge shard with the vectors and tags of the documents.

One point of it, the mark, has no vector and holds the number of changes that the shard contains.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anysplade._common.extras import extra
from anysplade.search.database import Found, Row
from anysplade.search.documents import read_metadata
from anysplade.search.filters import Tags, tag

with extra("search"):
    import qdrant_edge as edge

_VECTOR = "splade"
_MARK = 0  # the id of the mark; the ids of the others are positions, which begin at 1


def create(folder: Path) -> edge.EdgeShard:
    folder.mkdir(exist_ok=True)
    return edge.EdgeShard.create(str(folder), edge.EdgeConfig(sparse_vectors={_VECTOR: edge.EdgeSparseVectorParams()}))


def load(folder: Path) -> edge.EdgeShard:
    return edge.EdgeShard.load(str(folder))


def index_tags(shard: edge.EdgeShard) -> None:
    """Prepare a new shard for filters."""
    for field in Tags._fields:
        shard.update(edge.UpdateOperation.create_field_index(field, edge.PayloadSchemaType.Keyword))


def count_changes(shard: edge.EdgeShard) -> int | None:
    """The number of changes that the shard contains; None if an earlier version made it."""
    marks: Any = shard.retrieve([_MARK], True, False)
    return marks[0].payload["writes"] if marks else None


def apply(shard: edge.EdgeShard, rows: Sequence[Row], count: int) -> None:
    """Give a shard the documents as the database has them now; ``count`` is the number of changes that it contains then."""
    points = [edge.Point(_MARK, {}, {"writes": count})]
    for position, metadata, terms, weights in rows:
        if terms is not None and weights is not None:
            vector = edge.SparseVector(np.frombuffer(terms, np.int32).tolist(), np.frombuffer(weights, np.float32).tolist())
            vectors: Any = {_VECTOR: vector} if terms else {}
            points.append(edge.Point(position, vectors, tag(read_metadata(metadata))._asdict()))
    shard.update(edge.UpdateOperation.upsert_points(points))
    deleted: list[Any] = [position for position, _, terms, _ in rows if terms is None]
    if deleted:
        shard.update(edge.UpdateOperation.delete_points(deleted))


def search(shard: edge.EdgeShard, terms: np.ndarray, weights: np.ndarray, k: int, conditions: Sequence[Tags]) -> Found:
    """The k documents of the highest scores above 0, in float32; ``conditions`` are those of ``check_filter``."""
    query = edge.Query.Nearest(edge.SparseVector(terms.tolist(), weights.tolist()), using=_VECTOR)
    filter = _filter("values", [values for _, values in conditions]) if conditions else None
    return [(int(point.id), point.score) for point in shard.query(edge.QueryRequest(query=query, limit=k, filter=filter))]


def has(shard: edge.EdgeShard, kind: str, conditions: Sequence[Sequence[str]]) -> bool:
    return bool(shard.count(edge.CountRequest(filter=_filter(kind, conditions), exact=True)))


def names(shard: edge.EdgeShard, limit: int) -> list[str]:
    return [str(hit.value) for hit in shard.facet(edge.FacetRequest("names", limit, exact=True)).hits]


def _filter(kind: str, conditions: Sequence[Sequence[str]]) -> edge.Filter:
    """Points that have at least one of the tags of each condition."""
    return edge.Filter(must=[edge.FieldCondition(key=kind, match=edge.MatchAny(list(tags))) for tags in conditions])
