"""The model that an index was built with: described, found again, and opened for queries and for documents.

What runs models is imported where it is used: it takes seconds, and queries by token need none of it.
"""

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anysplade.errors import ModelError
from anysplade.model.options import Precision, Runtime
from anysplade.model.queries import Queries, StaticQueries
from anysplade.model.saved import fingerprint, resolve_model

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder

FORMAT = 3


def describe_model(source: str, folder: Path | None = None) -> dict[str, Any]:
    """What an index says of its model.

    Args:
        folder: the index's, from where a model in a folder is found too when both were moved together.
    """
    known = {"format": FORMAT, "model": source, "model_fingerprint": fingerprint(source)}
    if not Path(source).is_dir():
        return known
    place = str(Path(source).resolve())
    return known | {"model": place} | ({} if folder is None else {"model_beside": os.path.relpath(place, folder.resolve())})


class IndexModel:
    """The model of one index. Each part is opened on first use and kept; a build sets ``source`` and ``encoder``, which it has."""

    def __init__(
        self,
        about: Mapping[str, Any],
        where: str | Path,
        place: str | Path | None = None,
        runtime: Runtime = "auto",
        precision: Precision = "float32",
    ) -> None:
        """Open nothing yet.

        Args:
            about: what the index says of itself; see ``describe_model``.
            where: the index's folder or address.
            place: the model's, if it moved.
            runtime: of encoding; see ``for_inference``.
            precision: of encoding queries. That of documents is the index's.
        """
        self._about, self._where, self._place = about, where, place
        self._runtime: Runtime = runtime
        self._precision: Precision = precision

    @cached_property
    def source(self) -> str:
        """Where the model is: where it was named, or where it lay then, or as it lay from the index's folder.

        Raises:
            ModelError: it is gone, or is another one by now.
        """
        places = [self._about["model"]] if self._place is None else [str(self._place)]
        if self._place is None and "model_beside" in self._about:
            places.append(str((Path(self._where).resolve() / self._about["model_beside"]).resolve()))
        changed, missing = [], []
        for place in dict.fromkeys(places):
            try:
                source = resolve_model(place)
            except ModelError as error:
                missing.append(str(error))
                continue
            if fingerprint(source) == self._about["model_fingerprint"]:
                return source
            changed.append(source)
        if changed:
            raise ModelError(
                f"{', '.join(changed)}: the model changed since {self._where} was built; build the index again, or name the "
                "place of the old model with `model`"
            )
        raise ModelError(f"{self._where}: its model is not there; name it with `model` ({'; '.join(missing)})")

    @cached_property
    def encoder(self) -> "SparseEncoder":
        """The whole model as it was saved; it reads texts up to the index's length."""
        from anysplade.model.encoder import open_encoder
        from anysplade.model.modules import cut_within

        return cut_within(open_encoder(self.source), self._about.get("max_length"))  # earlier versions recorded any length

    @cached_property
    def queries(self) -> Queries:
        """What encodes queries: the model, or its table of weights alone where queries have a weight a token."""
        static = StaticQueries.open(self.source)
        if static is not None:
            return static
        from anysplade.model.encoding import ModelQueries
        from anysplade.model.runtimes import for_inference, resolve_precision

        precision = resolve_precision(self._precision, self.encoder.device)
        return ModelQueries(for_inference(self.encoder, self._runtime, precision), precision)

    @cached_property
    def documents(self) -> "SparseEncoder":
        """What encodes documents as the index's were."""
        from anysplade.model.runtimes import for_inference

        return for_inference(self.encoder, self._runtime, self._about.get("precision", "float32"))
