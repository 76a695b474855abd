"""Build, open and search an index, in a folder or on a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anysplade._common.arguments import require

if TYPE_CHECKING:
    from anysplade.model.options import Precision, Runtime
    from anysplade.search.index import Index
    from anysplade.search.remote import RemoteIndex


def open_index(
    place: str | Path, model: str | Path | None = None, *, runtime: Runtime = "auto", precision: Precision = "float32"
) -> Index | RemoteIndex:
    """Open the index at a ``place``, which is a folder or an address on a server.

    ``model``, ``runtime`` and ``precision`` are as in ``Index.load``.

    Raises:
        DataError: there is no index, or it is damaged.
        OptionError: the place is neither a folder nor a valid address.
    """
    from anysplade.search.index import Index
    from anysplade.search.remote import RemoteIndex

    require("place", place, (str, Path), "give an index's folder or address")
    if "://" in str(place):
        return RemoteIndex(str(place), model, runtime, precision)
    return Index.load(place, model, runtime=runtime, precision=precision)
