"""The options of a training run, without the libraries that carry it out."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from anysplade.errors import OptionError

Choice = float | Literal["auto"]  # of k and of shift
BiasPolicy = Literal["scale", "keep"]
Regularizer = Literal["flops", "df-flops", "l1"]
OnCollapse = Literal["warn", "stop", "recalibrate"]
Precision = Literal["float32", "bfloat16", "auto"]  # of encoding


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the weights a run ends with.

    Args:
        backbone: a masked LM's folder or hub id.
        data: training pairs; a BEIR folder, a JSONL file or ``python-docs``.
        output: the folder for the model, its checkpoints and its record.
        k: divides the MLM head's logits before training; "auto" measures what the head wants.
        shift: is taken from them after that; "auto" likewise. k=1 and shift=0 leave the head alone.
        bias: whether k divides the decoder's bias too ("scale") or not ("keep").
        steps: optimiser steps; if None, what ``epochs`` gives.
        epochs: passes over the data.
        batch_size: queries a step, each with its document; the others' documents are its negatives.
        learning_rate: peak of AdamW's, from where it falls to 0 in a straight line.
        warmup_ratio: share of the steps over which it rises from 0 to the peak.
        query_regularizer_weight: lambda of the queries' regularizer, reached after a third of the steps.
        document_regularizer_weight: lambda of the documents' regularizer, likewise.
        query_active_dims: wanted mean number of terms in a query; sets its lambda during training.
        document_active_dims: the same for documents.
        regularizer: FLOPS, FLOPS weighted by document frequency (arXiv 2505.15070), or L1.
        on_collapse: warn and go on, stop, or start again from a more strongly calibrated head.
        max_length: tokens a text is cut to; the tokenizer's limit if None.
        seed: of everything random.
        checkpoint_steps: steps between checkpoints.
        fused: SPLADE pooling without the (batch, length, vocabulary) logits.
    """

    backbone: str
    data: str
    _: KW_ONLY
    output: Annotated[str, Parameter(name="--out")]
    k: Choice = "auto"
    shift: Choice = "auto"
    bias: BiasPolicy = "scale"
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 32
    learning_rate: float = 2e-5
    warmup_ratio: float = 0.1
    query_regularizer_weight: float = 1e-3
    document_regularizer_weight: float = 1e-3
    query_active_dims: float | None = None
    document_active_dims: float | None = None
    regularizer: Regularizer = "flops"
    on_collapse: OnCollapse = "warn"
    max_length: int | None = 256
    seed: int = 0
    checkpoint_steps: int = 500
    fused: bool = True

    def __post_init__(self) -> None:
        for name, low in (
            ("steps", 1),
            ("batch_size", 2),
            ("epochs", 0),
            ("learning_rate", 0),
            ("query_regularizer_weight", 0),
            ("document_regularizer_weight", 0),
            ("query_active_dims", 1),
            ("document_active_dims", 1),
            ("checkpoint_steps", 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value < float("inf"):
                raise OptionError(f"{name} is {value}: it must be a finite number of at least {low}")
