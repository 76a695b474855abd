"""Cross-encoders, which read a query and a document together: they teach, and re-rank what another model found."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from torch import nn

from anysplade._common.progress import bar_within
from anysplade.data.text import replace_surrogates
from anysplade.errors import ModelError
from anysplade.model.checkpoints import check_weights
from anysplade.model.dense import cut_reading, in_batches
from anysplade.model.saved import first_line


def open_cross_encoder(source: str, max_length: int | None = None) -> CrossEncoder:
    """Open a cross-encoder with one output in float32; raises ModelError for any other model. See ``cut_reading``."""
    try:
        model = CrossEncoder(source)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"{source}: cannot be loaded as a cross-encoder model: {first_line(error)}") from error
    check_weights(type(model.model), str(model.model.name_or_path), head="classification head")
    if model.num_labels != 1:
        raise ModelError(f"{source}: gives {model.num_labels} outputs per pair; give a cross-encoder with one")
    cut_reading(model, max_length, source)
    return model.eval().float()


def rate_pairs(
    model: CrossEncoder,
    pairs: Sequence[tuple[str, str]],
    *,
    precision: str = "float32",
    batch_size: int = 32,
    name: str = "the cross-encoder",
    shown: Any = None,
) -> np.ndarray:
    """The raw logits of pairs of a query and a document, (pairs,), float32; ``shown`` is a ``bar`` to update.

    Raises ModelError, which starts with the name, for NaN or infinity.
    """
    clean = [(replace_surrogates(query), replace_surrogates(document)) for query, document in pairs]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        # Identity keeps the logits: after a sigmoid, margins and differences between good documents would vanish.
        predict = partial(model.predict, batch_size=batch_size, activation_fn=nn.Identity(), show_progress_bar=False)
        lengths = [len(query) + len(document) for query, document in clean]
        with bar_within(shown, "scoring pairs", "pair") as shown:
            scores = in_batches(clean, lengths, batch_size, predict, shown).reshape(len(pairs))
    finite = np.isfinite(scores)
    if not finite.all():
        raise ModelError(f"{name}: gives NaN or infinity for the query {pairs[int(finite.argmin())][0][:60]!r}")
    return scores
