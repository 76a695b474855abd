"""The options of a training run; imports no training library."""

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

_LOWEST: dict[str, float] = {  # allowed values of the numbers
    **dict.fromkeys(("negatives", "epochs", "learning_rate", "head_learning_rate", "seed"), 0),
    **dict.fromkeys(("query_regularizer_weight", "document_regularizer_weight", "own_words"), 0),
    **dict.fromkeys(("temperature", "kl_temperature", "teacher_temperature"), 1e-6),
    **dict.fromkeys(("steps", "mini_batch_size", "gradient_accumulation", "checkpoint_steps", "patience"), 1),
    **dict.fromkeys(("query_active_dims", "document_active_dims"), 1),
    "batch_size": 2,
}


def parse_objective(objective: str) -> dict[str, float]:
    """The weight of each part: ``"kl + 0.05*margin-mse"`` is ``{"kl": 1.0, "margin-mse": 0.05}``.

    Raises:
        OptionError: a part is unknown or repeated.
    """
    weights: dict[str, float] = {}
    for part in objective.replace(" ", "").split("+"):
        match = re.fullmatch(r"(?:(\d+\.?\d*(?:e-?\d+)?)\*)?([a-z-]+)", part)
        if not match or match[2] not in OBJECTIVES or match[2] in weights:
            raise OptionError(
                f"objective {objective!r}: {part!r} is none of {', '.join(OBJECTIVES)}; join several with +, with weights as in "
                f'"kl + 0.05*margin-mse"{did_you_mean(part, OBJECTIVES)}'
            )
        weights[match[2]] = float(match[1] or 1)
    return weights


@dataclass(frozen=True)
class TrainingConfig:
    """All options of a training run; together they determine the trained weights.

    Args:
        backbone: folder or hub id of a masked LM.
        data: training examples; a JSONL file, a BEIR folder, an ir_datasets id, a hub dataset (``id`` or ``id:config``) or
            ``python-docs``.
        output: folder of the run.
        texts: source of the texts if the data have ids: a BEIR folder, an ir_datasets id or a hub dataset; if None, the data's
            own place.
        negatives: hard negatives used per example; all if None.
        teacher: folder or hub id of a dense model of sentence-transformers, a sparse encoder or a cross-encoder. Dense and sparse
            teachers score each query against all documents of the batch. Examples without negatives get two each.
        objective: contrastive (in-batch and hard negatives), margin-mse and kl (with scores in the data), teacher, or a weighted
            sum such as "kl + 0.05*margin-mse". auto: contrastive, or with a teacher "contrastive + teacher", in which documents
            that the teacher prefers to the positive are not used as negatives.
        temperature: divisor of the model's scores in the contrastive and teacher objectives.
        kl_temperature: divisor of the model's and the teacher's scores in kl.
        teacher_temperature: divisor of the teacher's scores. If None: kl_temperature in kl; in the teacher objective, 0.05 for
            cosines and 1 for other scores.
        k: divisor of the MLM head's logits, applied before training; "auto" measures it.
        shift: subtracted from the logits after that; "auto" measures it. k=1 and shift=0 leave the head unchanged.
        bias: whether k divides the decoder's bias too ("scale") or not ("keep").
        fold: makes a cased backbone uncased: a word has one dimension whatever its case and the space before it ("case"), and
            English words with the same stem share one too ("stem"). The checkpoint stays stock.
        mute: give punctuation and special tokens no dimension.
        pooling: over the tokens of a text.
        double_log: log(1 + log(1 + relu)) instead of log(1 + relu).
        query_encoder: mlm; or, for queries without a model at search time, one weight per token: its idf in the training
            documents, or that as the start of a learned weight ("static").
        query_prompt: text put before every query, in training and later.
        document_prompt: text put before every document.
        steps: optimizer steps; if None, ``epochs`` decides.
        epochs: passes over the data, each with as many whole batches as the examples fill.
        batch_size: queries per batch over all processes, each with its document; in the contrastive objective the others'
            documents are negatives, and no text is twice in a batch.
        mini_batch_size: texts that pass through the model at once. Batches of any size then fit in memory, at the cost of a second
            forward pass (gradient caching).
        gradient_accumulation: batches per step; the last step of an epoch takes the rest.
        learning_rate: peak rate of AdamW, which then falls linearly to 0.
        head_learning_rate: rate of the decoder's weight and bias, if they are not tied; if None, the same as for the others.
        warmup_ratio: share of the steps in which the rate rises from 0 to its peak.
        query_regularizer_weight: lambda of the queries' regularizer, reached after a third of the steps.
        document_regularizer_weight: the same for documents.
        query_active_dims: target for the mean number of terms in a query; sets the lambda during training.
        document_active_dims: the same for documents.
        own_words: weight of a loss that asks each text's own word pieces to stay active, in proportion to their idf in the training
            documents. Short trainings forget words that are in the text; 0 is off.
        regularizer: FLOPS, FLOPS weighted by document frequency (arXiv 2505.15070), or L1.
        on_collapse: warn and continue, stop, or restart with a stronger calibration of the head.
        max_length: tokens per text in training, at most the model's positions; the default is lowered to them. None: the
            tokenizer's limit. The finished model reads what the backbone reads, up to 512 tokens, or this if it is more.
        seed: seed of all random numbers.
        checkpoint_steps: steps between checkpoints.
        dev: collection that is evaluated at every checkpoint; the model with the best nDCG@10 is kept.
        dev_split: judgements of the collection to use.
        patience: checkpoints without improvement after which the training stops.
        precision: of the matrix products in training: float32 (TF32 on NVIDIA's GPUs since 2020), or bfloat16, which is faster
            where the hardware supports it.
        gradient_checkpointing: compute activations twice instead of storing them.
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
    own_words: float = 0.0
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
        for name, low in _LOWEST.items():
            value = getattr(self, name)
            if value is not None and not low <= value < float("inf"):
                raise OptionError(f"{name} is {value}: it must be a finite number of at least {low}")
        if self.seed >= 2**32:
            raise OptionError(f"seed is {self.seed}: it must be below 2**32")
        if not 0 <= self.warmup_ratio < 1:
            raise OptionError(f"warmup_ratio is {self.warmup_ratio}: it must be at least 0 and below 1")
        if self.objective == "auto":
            object.__setattr__(self, "objective", "contrastive" if self.teacher is None else "contrastive + teacher")
        weights = parse_objective(self.objective)
        if "teacher" in weights and self.teacher is None:
            raise OptionError(f"objective {self.objective!r} needs a teacher; name a model with `teacher`")
        if self.teacher is not None and ("teacher" not in weights or {"kl", "margin-mse"} & weights.keys()):
            raise OptionError(
                f"objective {self.objective!r} does not go with a teacher model: kl and margin-mse learn from scores in the data; "
                'use "teacher" or "contrastive + teacher"'
            )
        if self.patience is not None and self.dev is None:
            raise OptionError("patience needs a dev collection; name one with `dev`")
        if self.query_encoder != "mlm" and self.fold == "stem":
            raise OptionError(
                f'fold: queries of the {self.query_encoder} encoder have one weight per token, and tokens are not stems; use "case"'
            )
        if self.query_encoder != "mlm" and self.query_active_dims is not None:
            raise OptionError(
                f"query_active_dims: queries of the {self.query_encoder} encoder have one term per token; leave it out"
            )
