"""Fuse rankings of the same documents into one, by the names and formulas of ranx."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

Fusion = Literal["rrf", "wsum"]
Id = TypeVar("Id")

DEPTH = 1000  # of the rankings that a search fuses, as ``evaluate`` makes them by default

_K = 60  # of reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009)


def fuse(rankings: Sequence[Mapping[Id, float]], method: Fusion) -> dict[Id, float]:
    """The fused score of each document that is in one of the rankings, which map ids to scores, the best first; best first.

    rrf is the sum of 1 / (60 + rank). wsum is the mean of the scores, each ranking's scaled to [0, 1] by its lowest and highest;
    a document that a ranking lacks has 0 there. These are ranx's ``rrf``, and ``wsum`` with ``norm="min-max"`` and equal weights
    (Bassani and Romelli, CIKM 2022). Ties keep the order of first appearance.
    """
    fused: dict[Id, float] = {}
    for ranking in rankings:
        lowest, highest = min(ranking.values(), default=0.0), max(ranking.values(), default=0.0)
        for rank, (id_, score) in enumerate(ranking.items(), 1):
            if method == "rrf":
                value = 1 / (_K + rank)
            else:
                value = ((score - lowest) / (highest - lowest) if highest > lowest else 1.0) / len(rankings)
            fused[id_] = fused.get(id_, 0.0) + value
    return dict(sorted(fused.items(), key=lambda item: -item[1]))
