"""Random samples of rows that are read one by one, in memory for the sample alone."""

import random
from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def reservoir(items: Iterable[Item], count: int, draw: random.Random) -> list[Item]:
    """Up to ``count`` of the items, each with the same probability (algorithm R of Vitter, doi 10.1145/3147.3165)."""
    kept: list[Item] = []
    for seen, item in enumerate(items):
        if seen < count:
            kept.append(item)
        elif (place := draw.randrange(seen + 1)) < count:
            kept[place] = item
    return kept
