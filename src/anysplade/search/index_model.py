"""The model that an index was built with: how the index describes it, finds it again, and opens it.

The modules that run models take seconds to import, so they are imported where they are used.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anysplade._common.extras import extra
from anysplade.errors import ExtraError, ModelError, OptionError
from anysplade.model.onnx_queries import OnnxQueries, exported
from anysplade.model.options import Precision, Runtime
from anysplade.model.queries import Queries, StaticQueries
from anysplade.model.saved import fingerprint, resolve_model

if TYPE_CHECKING:
    from scipy import sparse
    from sentence_transformers import SparseEncoder

FORMAT = 3  # of an index in a folder


def describe_model(source: str, folder: Path | None = None) -> dict[str, Any]:
    """The description of a model for an index; a relative path from its folder finds the model if both are moved together."""
    known = {"format": FORMAT, "model": source, "model_fingerprint": fingerprint(source)}
    return known | (describe_place("model", Path(source), folder) if Path(source).is_dir() else {})


def describe_place(name: str, path: Path, folder: Path | None) -> dict[str, str]:
    """Where a model or corpus is: absolute, and relative to the folder of an index."""
    place = str(path.resolve())
    return {name: place} | ({} if folder is None else {f"{name}_beside": os.path.relpath(place, folder.resolve())})


def described_places(about: Mapping[str, Any], name: str, folder: str | Path) -> list[str]:
    """Where a model or corpus of a description can be: where it was, and where it was relative to the index."""
    beside = about.get(f"{name}_beside")
    return [place for place in (about.get(name), beside and os.path.normpath(Path(folder).resolve() / beside)) if place]


@dataclass
class IndexModel:
    """The model of an index. Each part is opened on first use; a build sets ``source`` and ``encoder`` itself."""

    about: Mapping[str, Any]  # the description of the index, which contains that of the model
    index: str | Path  # folder or address of the index
    moved: str | Path | None = None  # path or hub id of the model, if it is another one than in the description
    runtime: Runtime = "auto"
    precision: Precision = "float32"  # for queries; documents have the precision of the index

    @cached_property
    def source(self) -> str:
        """Folder or hub id of the model: as given, or where it was during the build, or where it was relative to the index."""
        if self.about["model"] is None:
            raise ModelError(f"{self.index}: was built from vectors without a model; build it again with the model of the vectors")
        elsewhere = self.moved is not None and exported(self.moved) is None
        places = [str(self.moved)] if elsewhere else described_places(self.about, "model", self.index)
        changed, missing = [], []
        for place in dict.fromkeys(places):
            try:
                source = resolve_model(place)
            except ModelError as error:
                missing.append(str(error))
                continue
            if fingerprint(source) == self.about["model_fingerprint"]:
                return source
            changed.append(source)
        if changed and elsewhere and self.about["model"] not in (changed[0], str(Path(changed[0]).resolve())):
            raise ModelError(
                f"{changed[0]}: not the model of {self.index}, which was built with {self.about['model']}; give the place of that "
                "one as `model`, or leave `model` out if it is still there"
            )
        if changed:
            raise ModelError(
                f"{', '.join(changed)}: the model changed since {self.index} was built; build the index again, or name the "
                "place of the old model with `model`"
            )
        raise ModelError(f"{self.index}: its model is not there; name it with `model` ({'; '.join(missing)})")

    @cached_property
    def encoder(self) -> "SparseEncoder":
        """The whole model as it was saved; it reads texts up to the ``max_length`` of the index."""
        with extra("train"):
            from anysplade.model.encoder import open_encoder
            from anysplade.model.modules import cut_within

        return cut_within(open_encoder(self.source), self.about.get("max_length"))  # earlier versions recorded any length

    @cached_property
    def queries(self) -> Queries:
        """See ``WithModel.queries``."""
        if self.moved is not None and (about := exported(self.moved)) is not None:
            if about["model_fingerprint"] != self.about["model_fingerprint"]:
                raise ModelError(f"{self.moved}: exported from another model than that of {self.index}; export that one")
            if self.runtime == "openvino":
                raise OptionError(f"runtime is openvino: {self.moved} is an exported model, which onnxruntime runs; leave it out")
            return OnnxQueries(self.moved, self.precision, self.about.get("max_length"))
        static = StaticQueries.open(self.source)
        if static is not None:
            return static
        try:
            with extra("train"):
                from anysplade.model.encoding import ModelQueries
                from anysplade.model.runtimes import for_inference, resolve_precision
        except ExtraError as error:
            raise ExtraError(f"{self.index}: {error}, or give its model, exported to ONNX, as `model`") from error
        precision = resolve_precision(self.precision, self.encoder.device)
        return ModelQueries(for_inference(self.encoder, self.runtime, precision), precision)

    @cached_property
    def documents(self) -> "SparseEncoder":
        """The encoder for documents, in the precision of the index."""
        from anysplade.model.runtimes import for_inference

        return for_inference(self.encoder, self.runtime, self.about.get("precision", "float32"))


class WithModel:
    """The part of an index that opens its model, on first use."""

    _model: IndexModel

    @property
    def encoder(self) -> "SparseEncoder":
        """The model; raises ModelError if it is missing, or is not the one that built the index."""
        return self._model.encoder

    @property
    def queries(self) -> Queries:
        """Encodes queries, with the model, or with its table of weights alone if each token has a fixed weight in queries."""
        return self._model.queries

    def encode_queries(self, texts: Sequence[str]) -> "sparse.csr_matrix":
        """The vectors of queries as a search compares them with documents, (texts, terms)."""
        return self.queries.encode(texts)
