"""The options of a training run, without the libraries that carry it out."""

import re
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_type_hints

from anysplade._common.arguments import did_you_mean
from anysplade.errors import OptionError
from anysplade.model.options import BiasPolicy, Choice, Fold, Pooling, QueryEncoder, checked_option

Regularizer = Literal["flops", "df-flops", "l1"]
OnCollapse = Literal["warn", "stop", "recalibrate"]
TrainingPrecision = Literal["float32", "bfloat16"]

OBJECTIVES = ("contrastive", "margin-mse", "kl", "teacher")


def parse_objective(objective: str) -> dict[str, float]:
    """Weights by name: ``"kl + 0.05*margin-mse"`` is ``{"kl": 1.0, "margin-mse": 0.05}``.

    Raises:
        OptionError: an unknown or duplicate objective.
    """
    weights: dict[str, float] = {}
    for part in objective.replace(" ", "").split("+"):
        match = re.fullmatch(r"(?:(\d+\.?\d*(?:e-?\d+)?)\*)?([a-z-]+)", part)
        if not match or match[2] not in OBJECTIVES or match[2] in weights:
            raise OptionError(
                f"objective {objective!r}: {part!r} is none of {', '.join(OBJECTIVES)}; join several with +, weigh one as in "
                f'"kl + 0.05*margin-mse"{did_you_mean(part, OBJECTIVES)}'
            )
        weights[match[2]] = float(match[1] or 1)
    return weights


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the weights a run ends with.

    Args:
        backbone: a masked LM's folder or hub id.
        data: training examples; a JSONL file, a BEIR folder, an ir_datasets id, a hub dataset (``id`` or
            ``id:config``) or ``python-docs``.
        output: the run's folder.
        texts: where the ids in the data have their texts: a BEIR folder, an ir_datasets id or a hub dataset;
            None looks in the data's own place.
        negatives: hard negatives used of each example; all of them if None.
        teacher: a dense model of sentence-transformers, a sparse encoder or a cross-encoder: a folder or hub id. Dense
            and sparse ones score each query against all documents of the batch. Examples without negatives get two each.
        objective: contrastive (in-batch and hard negatives), margin-mse and kl (with scores in the data), teacher, or a
            weighted sum such as "kl + 0.05*margin-mse". auto: contrastive, and with a teacher "contrastive + teacher",
            where documents that the teacher prefers to the positive are no negatives.
        temperature: divides the model's scores in the contrastive softmax, and in that of the teacher objective.
        kl_temperature: divides the student's and the teacher's scores in kl.
        teacher_temperature: divides the teacher's scores; in kl, kl_temperature if None; in the teacher objective 0.05
            if they are cosines and else 1.
        k: divides the MLM head's logits before training; "auto" measures what the head wants.
        shift: is taken from them after that; "auto" likewise. k=1 and shift=0 leave the head alone.
        bias: whether k divides the decoder's bias too ("scale") or not ("keep").
        fold: makes a cased backbone uncased: a word has one dimension whatever its case and the space before it ("case"), and
            English words of one stem have one too ("stem"). The checkpoint stays stock.
        mute: punctuation and special tokens have no dimension.
        pooling: over a text's tokens.
        double_log: log(1 + log(1 + relu)) instead of log(1 + relu).
        query_encoder: mlm; or, for queries without a model at search time, a weight a token: its idf in the
            training documents, or that as a start and learned ("static").
        query_prompt: stands before every query, in training and after.
        document_prompt: stands before every document.
        steps: optimiser steps; if None, what ``epochs`` gives.
        epochs: passes over the data, each of as many whole batches as there are examples for.
        batch_size: queries a batch over all processes, each with its document; the others' documents are its
            negatives in the contrastive objective, where a batch has no text twice.
        mini_batch_size: texts that go through the model at once; batches of any size fit, at the price of a
            second forward pass (gradient caching).
        gradient_accumulation: batches a step; the last step of an epoch takes what is left.
        learning_rate: peak of AdamW's, from where it falls to 0 in a straight line.
        head_learning_rate: that of the decoder's weight and bias alone, where they are not tied; as the others' if None.
        warmup_ratio: share of the steps over which it rises from 0 to the peak.
        query_regularizer_weight: lambda of the queries' regularizer, reached after a third of the steps.
        document_regularizer_weight: lambda of the documents' regularizer, likewise.
        query_active_dims: wanted mean number of terms in a query; sets its lambda during training.
        document_active_dims: the same for documents.
        regularizer: FLOPS, FLOPS weighted by document frequency (arXiv 2505.15070), or L1.
        on_collapse: warn and go on, stop, or start again from a more strongly calibrated head.
        max_length: tokens a text is cut to in training, at most the model's positions (as many, if fewer than the default); none:
            the tokenizer's limit. The finished model reads what the backbone reads, up to 512 tokens, or this if it is more.
        seed: of everything random.
        checkpoint_steps: steps between checkpoints.
        dev: a collection that is evaluated at every checkpoint; the model of the best nDCG@10 is kept.
        dev_split: which qrels of it.
        patience: stop after so many checkpoints without a better one.
        precision: of the products in training; bfloat16 is faster where the machine has it.
        gradient_checkpointing: compute activations twice instead of keeping them.
        attention: the backbone's implementation, such as flash_attention_2, which also drops the padding.
        report_to: trackers that the trainer knows: tensorboard, wandb, trackio, ...
        fused: SPLADE pooling without the (batch, length, vocabulary) logits.
    """

    backbone: str
    data: str
    _: KW_ONLY
    output: str
    texts: str | None = None
    negatives: int | None = None
    teacher: str | None = None
    objective: str = "auto"
    temperature: float = 1.0
    kl_temperature: float = 2.0
    teacher_temperature: float | None = None
    k: Choice = "auto"
    shift: Choice = "auto"
    bias: BiasPolicy = "scale"
    fold: Fold = "none"
    mute: bool = False
    pooling: Pooling = "max"
    double_log: bool = False
    query_encoder: QueryEncoder = "mlm"
    query_prompt: str = ""
    document_prompt: str = ""
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 32
    mini_batch_size: int | None = None
    gradient_accumulation: int = 1
    learning_rate: float = 2e-5
    head_learning_rate: float | None = None
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
    dev: str | None = None
    dev_split: str = "dev"
    patience: int | None = None
    precision: TrainingPrecision = "float32"
    gradient_checkpointing: bool = False
    attention: str | None = None
    report_to: tuple[str, ...] = ()
    fused: bool = True

    def __post_init__(self) -> None:
        trackers = (self.report_to,) if isinstance(self.report_to, str) else tuple(self.report_to or ())
        object.__setattr__(self, "report_to", tuple(checked_option("report_to", name, str) for name in trackers))
        for name, kind in get_type_hints(TrainingConfig).items():
            if name not in ("_", "report_to"):
                object.__setattr__(self, name, checked_option(name, getattr(self, name), kind))
        for name, low in (
            ("negatives", 0),
            ("temperature", 1e-6),
            ("kl_temperature", 1e-6),
            ("teacher_temperature", 1e-6),
            ("steps", 1),
            ("batch_size", 2),
            ("mini_batch_size", 1),
            ("gradient_accumulation", 1),
            ("epochs", 0),
            ("learning_rate", 0),
            ("head_learning_rate", 0),
            ("query_regularizer_weight", 0),
            ("document_regularizer_weight", 0),
            ("query_active_dims", 1),
            ("document_active_dims", 1),
            ("checkpoint_steps", 1),
            ("patience", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value < float("inf"):
                raise OptionError(f"{name} is {value}: it must be a finite number of at least {low}")
        if self.seed >= 2**32:
            raise OptionError(f"seed is {self.seed}: it must be below 2**32")
        if not 0 <= self.warmup_ratio < 1:
            raise OptionError(f"warmup_ratio is {self.warmup_ratio}: it is a share of the steps, at least 0 and below 1")
        if self.objective == "auto":
            object.__setattr__(self, "objective", "contrastive" if self.teacher is None else "contrastive + teacher")
        weights = parse_objective(self.objective)
        if "teacher" in weights and self.teacher is None:
            raise OptionError(f"objective {self.objective!r} needs a teacher; name a model with `teacher`")
        if self.teacher is not None and ("teacher" not in weights or {"kl", "margin-mse"} & weights.keys()):
            raise OptionError(
                f"objective {self.objective!r} does not go with a teacher model: kl and margin-mse learn from scores in the data; "
                'take "teacher" or "contrastive + teacher"'
            )
        if self.patience is not None and self.dev is None:
            raise OptionError("patience needs a dev collection to judge by; name one with `dev`")
        if self.query_encoder != "mlm" and self.fold == "stem":
            raise OptionError(
                f'fold: queries of the {self.query_encoder} encoder have a weight a token, and tokens are not stems; take "case"'
            )
        if self.query_encoder != "mlm" and self.query_active_dims is not None:
            raise OptionError(f"query_active_dims: queries of the {self.query_encoder} encoder have a term a token; leave it out")
