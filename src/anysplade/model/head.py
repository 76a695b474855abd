"""The MLM head of a masked language model: find it, measure it, rescale it.

SPLADE reads a text as ``max over tokens of log(1 + relu(logits))`` with ``logits = W h + b``, W and
b being the head's last projection, the *decoder*. Pretraining fixes neither the scale of the logits
nor, as softmax ignores a constant, their level; SPLADE depends on both. ``rescale_head`` applies
``logits' = logits / k - shift`` by changing W and b alone, so that the result is a stock checkpoint.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from scipy.special import logsumexp
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from anysplade import __version__
from anysplade._common.arguments import require
from anysplade._common.tables import Tabular
from anysplade.errors import ModelError, OptionError
from anysplade.model.options import BiasPolicy
from anysplade.model.probe import PROBE_DOCUMENTS, PROBE_QUERIES
from anysplade.model.saved import first_line, resolve_model

logger = logging.getLogger(__name__)

DEAD = -8192.0  # the bias of a term that is switched off: below any logit, and exact in half precision
RECORD = "anysplade"  # the key in a checkpoint's config.json that says what was done to its head
PERCENTILES = (0.1, 1, 5, 25, 50, 75, 95, 99, 99.9)

_BINS = 80  # of the logits' histogram
_SAMPLED_LOGITS = 2**24  # token logits kept for percentiles: 64 MB in float32
_LOGITS_A_BATCH = 2**26  # logits computed at a time: 256 MB in float32
_PROBE_LENGTH = 256
_PADDED_ROWS = 1024  # of an embedding table, beyond the tokenizer's tokens: 898 in mDeBERTa, 88 in ModernBERT


# ------------------------------------------------------------------------------------- finding


@dataclass(frozen=True)
class Head:
    """The last projection of a masked LM."""

    decoder: nn.Linear  # .weight: (vocabulary, width); some architectures bring a class of their own
    biases: tuple[Tensor, ...]  # the distinct tensors registered as its bias, (vocabulary,) or (1, vocabulary)

    @property
    def bias(self) -> Tensor | None:  # (vocabulary,)
        return self.biases[0].detach().reshape(-1) if self.biases else None


def find_head(model: PreTrainedModel) -> Head:
    """The decoder of a masked LM and its bias, wherever the architecture keeps it.

    Raises:
        ModelError: the model has no projection onto its vocabulary.
    """
    decoder = model.get_output_embeddings()
    weight = getattr(decoder, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ModelError(f"{type(model).__name__} has no projection onto its vocabulary; SPLADE needs a masked LM with an MLM head")
    name = next(n for n, module in model.named_modules() if module is decoder)
    parent = model.get_submodule(name.rpartition(".")[0])
    # nn.Linear's own bias; ESM keeps it beside the decoder; BART adds a buffer to the logits.
    candidates = (getattr(decoder, "bias", None), getattr(parent, "bias", None), getattr(model, "final_logits_bias", None))
    found = {id(b): b for b in candidates if isinstance(b, Tensor) and b.numel() == weight.shape[0]}
    return Head(decoder, tuple(found.values()))


@torch.no_grad()
def live_terms(model: PreTrainedModel) -> Tensor | None:
    """Ids of the terms that a text can have, ascending, (live,); None if it can have all.

    The others have the bias ``DEAD``, give or take what a training does to it: see ``fold_head``.
    """
    bias = find_head(model).bias
    if bias is None or not bool((off := _switched_off(bias)).any()):
        return None
    return (~off).nonzero()[:, 0]


def _switched_off(bias: Tensor) -> Tensor:
    """Which terms of a bias are switched off, (vocabulary,) or in its shape."""
    return (bias - DEAD).abs() <= abs(DEAD) / 100


def check_folding(model: PreTrainedModel, source: str) -> None:
    """Raise ModelError unless a head has as many live terms as its config says of a folded one; see ``fold_head``."""
    folding = (getattr(model.config, RECORD, None) or {}).get("folding")
    if folding is None:
        return
    live = live_terms(model)
    count = len(find_head(model).decoder.weight) if live is None else len(live)
    if count != folding["live"]:
        raise ModelError(
            f"{source}: its config says that a folded vocabulary has {folding['live']:,} terms left, and its head has {count:,}; "
            "take weights and config from the same model"
        )


def require_masked_lm(model: object) -> None:
    """Raise OptionError unless it is a model of transformers, as masked LMs are."""
    require("model", model, PreTrainedModel, "give a loaded masked LM, as AutoModelForMaskedLM.from_pretrained returns it")


def load_masked_lm(
    name: str | Path, dtype: torch.dtype | Literal["auto"] = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The masked LM and tokenizer at a folder or hub id, in evaluation mode.

    Args:
        dtype: of the weights; "auto" is what they are stored in.

    Raises:
        ModelError: not found, not a masked LM, weights or a tokenizer that are missing or do not go together.
    """
    source = resolve_model(name)
    check_masked_lm(source)
    try:
        model = AutoModelForMaskedLM.from_pretrained(source, dtype=dtype, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: cannot be loaded as a masked LM: {first_line(error)}") from error
    finish_loading(model, tokenizer, source)
    return model.eval(), tokenizer


def finish_loading(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """What every model goes through once it is loaded.

    Raises:
        ModelError: weights, config and tokenizer do not go together.
    """
    fit_tokenizer(tokenizer, model, source)
    check_folding(model, source)
    share_tied(model)


def check_masked_lm(source: str) -> None:
    """Refuse a checkpoint that is no masked LM with all of its weights. Reads names and shapes, not the weights.

    Raises:
        ModelError: there is no readable config, or it is of another kind of model or of one with code of its own; or weights
            are missing, which transformers would fill with random numbers, new at every load.
    """
    check_weights(masked_lm_class(source), source)


def masked_lm_class(source: str, folder: str = "") -> Any:
    """The class of transformers that a checkpoint has, or would have, with an MLM head.

    Args:
        folder: below the source, where the checkpoint lies in it.

    Raises:
        ModelError: there is no readable config, or its architecture has no such class, or code of its own.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, subfolder=folder)
    except (OSError, ValueError) as error:
        raise ModelError(has_remote_code(source) or f"{source}: its config.json cannot be read: {first_line(error)}") from error
    if type(config) not in AutoModelForMaskedLM._model_mapping:
        decoder = type(config) in AutoModelForCausalLM._model_mapping
        kind = "a decoder, which reads from left to right," if decoder else "no masked LM"
        raise ModelError(
            has_remote_code(source)
            or f"{source}: {config.model_type!r} is {kind} and can have no MLM head; use one such as BERT or ModernBERT"
        )
    return AutoModelForMaskedLM._model_mapping[type(config)]


def missing_weights(model_class: Any, source: str, folder: str = "") -> list[str]:
    """Names of the weights that a checkpoint lacks for a class of transformers; only names and shapes are read.

    Raises:
        ModelError: a weight has another shape than the config says, or the file cannot be read.
    """
    options = {"device_map": "meta", "output_loading_info": True, "trust_remote_code": False, "subfolder": folder}
    try:
        with missing_is_expected():
            _, info = model_class.from_pretrained(source, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{source}: its weights cannot be loaded: {first_line(error)}") from error
    return sorted(info["missing_keys"])


@contextmanager
def missing_is_expected() -> Iterator[None]:
    """A time in which transformers does not warn of weights that a checkpoint lacks."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def describe_encoder(source: str, folder: str = "") -> str:
    """Architecture and size of an encoder, read from its config, for a message."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, subfolder=folder)
    known = [(config.architectures or [config.model_type])[0]]
    if hasattr(config, "num_hidden_layers"):
        known.append(f"{config.num_hidden_layers} layers")
    if hasattr(config, "vocab_size"):
        known.append(f"vocabulary {config.vocab_size:,}")
    return ", ".join(known)


def give_head(source: str) -> str:
    """What helps an encoder without an MLM head, for a message."""
    return f"`anysplade head {source} --text CORPUS --out BACKBONE` gives it one"


def check_weights(model_class: Any, source: str, folder: str = "", head: str = "MLM head") -> None:
    """Refuse a checkpoint that lacks weights: transformers would fill them with random numbers, new at every load, and only warn.

    Args:
        model_class: of transformers.
        folder: below the source, where the checkpoint lies in it.
        head: what the class has beside its body.

    Raises:
        ModelError: weights are missing or of another shape than the config says; only names and shapes are read.
    """
    missing = missing_weights(model_class, source, folder)
    if not missing:
        return
    of_head = [key for key in missing if not key.startswith(f"{model_class.base_model_prefix}.")]
    if of_head:
        fix = give_head(source) if head == "MLM head" else "use a model that was saved with it"
        about = describe_encoder(source, folder)
        raise ModelError(f"{source}: an encoder ({about}) with no trained {head} ({of_head[0]} is missing); {fix}")
    raise ModelError(f"{source}: the checkpoint lacks weights ({missing[0]} is one of {len(missing)}); was it saved whole?")


def has_remote_code(source: str) -> str | None:
    """What to say of a checkpoint that brings its own code; None if it does not.

    What anysplade trains must load anywhere without such code, so it does not run any.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError):
        return None
    if "auto_map" not in config:
        return None
    return (
        f"{source}: this model brings code of its own (auto_map in its config.json), which anysplade does not run; "
        "use a backbone whose architecture is part of transformers"
    )


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, source: str) -> None:
    """Make a tokenizer cut texts to what the model can read and pad them; refuse one that is not the model's.

    Raises:
        ModelError: there are no tokenizer files, or they are of another vocabulary.
    """
    embeddings: Any = model.get_input_embeddings()
    rows, known = embeddings.weight.shape[0], len(tokenizer)
    if known <= len({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}):
        # transformers makes a tokenizer of special tokens alone where there are no files, and every word is unknown to it.
        raise ModelError(f"{source}: no tokenizer in it (only {known} special tokens); save the model's tokenizer there too")
    check_tokens(tokenizer, model, source)
    if known > rows or rows - known > _PADDED_ROWS:
        raise ModelError(
            f"{source}: its tokenizer has {known:,} tokens and the model {rows:,}: it is another model's; save the right one there"
        )
    positions = usable_positions(model)
    if positions is not None and positions < tokenizer.model_max_length:
        tokenizer.model_max_length = positions
    if tokenizer.pad_token_id is None:
        own = model.config.pad_token_id
        token = tokenizer.convert_ids_to_tokens(own) if own is not None and 0 <= own < known else None
        token = token or tokenizer.eos_token or tokenizer.sep_token or tokenizer.unk_token
        if token is None:
            raise ModelError(f"{source}: its tokenizer has no token to pad with; set pad_token in its tokenizer_config.json")
        tokenizer.pad_token = token
        logger.warning("%s: its tokenizer has no pad token, %s is used", source, token)


def check_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, source: str) -> None:
    """Raise ModelError where tokens were added to a tokenizer for which the model has no embeddings."""
    embeddings: Any = model.get_input_embeddings()
    rows, known = embeddings.weight.shape[0], 1 + max(tokenizer.get_vocab().values(), default=-1)
    if tokenizer.vocab_size <= rows < known:
        raise ModelError(
            f"{source}: tokens were added to its tokenizer: ids go up to {known - 1:,}, and the model has {rows:,} embeddings; "
            "call `model.resize_token_embeddings(len(tokenizer))` and save both"
        )


def usable_positions(model: PreTrainedModel) -> int | None:
    """Tokens that fit the model's table of positions; None if nothing limits them.

    RoBERTa and its kin number positions from ``padding_idx + 1``, so that 514 rows hold 512 tokens.
    """
    rows = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(rows, int) or rows < 1:
        return None
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    skipped = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return rows - max(skipped, default=0)


def check_length(model: PreTrainedModel, max_length: int) -> None:
    """Raise OptionError where a model has no positions for so many tokens."""
    positions = usable_positions(model)
    if positions is not None and max_length > positions:
        about = f"{model.name_or_path}: has positions for {positions} tokens"
        raise OptionError(f"{about}, and `max_length` is {max_length}; give at most {positions}")


# ------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Probe:
    """What a head's logits are on probe texts: enough to know any (k, shift) without another forward pass.

    A per-term affine map commutes with the max over tokens, so the pooled logits are kept raw.
    """

    token_logits: np.ndarray  # (sampled tokens, live terms) float32; special tokens included, padding not
    query_logits: np.ndarray  # (queries, live terms): max over each query's tokens
    document_logits: np.ndarray  # (documents, live terms)
    bias: np.ndarray | None  # (live terms,)

    def affine(self, k: float, shift: float, bias: BiasPolicy) -> "Probe":
        """The probe as it would be after ``rescale_head(k, shift, bias)``."""
        offset: Any = np.float32(-shift)
        if bias == "keep" and self.bias is not None:
            offset = offset + self.bias * np.float32(1 - 1 / k)
        token, query, document = (
            logits / np.float32(k) + offset for logits in (self.token_logits, self.query_logits, self.document_logits)
        )
        return Probe(token, query, document, None)


@dataclass(frozen=True, repr=False)
class ProbeReport(Tabular):
    """What SPLADE starts from, measured on probe texts before any training."""

    queries: int
    documents: int
    tokens: int  # sampled for the percentiles and the positive share
    logit_percentiles: dict[str, float]
    positive_share: float  # of all token logits
    query_active_dims: float
    document_active_dims: float
    flops: float  # expected products a (query, document) pair: sum over terms of P(in query) P(in document)
    score_mean: float  # over all (query, document) pairs of the probe
    score_std: float
    document_similarity: float  # mean cosine of two different documents
    start_loss: float | None  # cross-entropy of finding each query's document; None unless query i goes with document i
    chance: float  # that of guessing: log(documents)
    histogram: dict[str, list[float]]  # of the token logits: edges (bins + 1), shares (bins)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, repr=False)
class HeadReport(Tabular):
    """The MLM head of a masked LM: its shape and norms, and with a tokenizer what it does to probe texts."""

    model: str  # as it was named
    architecture: str  # class of transformers
    vocabulary: int  # rows of the decoder
    live: int  # of them that are not switched off: terms that a text can have
    width: int  # columns of the decoder
    tied: bool  # the decoder's weight is the input embeddings'
    bias: bool  # the decoder has one
    frobenius_norm: float  # of the decoder's weight
    mean_row_norm: float  # L2, over the live terms
    max_row_norm: float  # L2
    rescaled: dict[str, Any] | None  # what rescale_head recorded in the checkpoint
    folding: dict[str, Any] | None  # what fold_head recorded there
    probe: ProbeReport | None  # None without a tokenizer

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _rows(self) -> list[dict[str, Any]]:
        """The head and what it does to the probe texts."""
        return [super()._rows()[0] | ({} if self.probe is None else self.probe._rows()[0])]


def inspect_head(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    queries: Sequence[str] = PROBE_QUERIES,
    documents: Sequence[str] = PROBE_DOCUMENTS,
) -> HeadReport:
    """Measure the MLM head of a masked LM.

    Args:
        model: a folder or hub id, or a loaded masked LM.
        tokenizer: of a loaded model, which is probed only with it; otherwise ``probe`` is None.
        queries: probe texts, by default everyday ones.
        documents: likewise; document i answers query i.

    Raises:
        ModelError: not a masked LM, or no head.
    """
    if isinstance(model, PreTrainedModel):
        name = model.name_or_path or type(model).__name__
    else:
        name = str(model)
        model, tokenizer = load_masked_lm(model)
    return describe_head(model, None if tokenizer is None else measure_logits(model, tokenizer, queries, documents), name)


def describe_head(model: PreTrainedModel, probe: Probe | None, name: str) -> HeadReport:
    """The report of a loaded masked LM whose logits were measured before."""
    head, live = find_head(model), live_terms(model)
    weight = head.decoder.weight.detach().float()  # (vocabulary, width)
    rows = (weight if live is None else weight[live]).norm(dim=1)
    record = getattr(model.config, RECORD, None) or {}
    return HeadReport(
        model=name,
        architecture=type(model).__name__,
        vocabulary=weight.shape[0],
        live=len(rows),
        width=weight.shape[1],
        tied=head.decoder.weight is model.get_input_embeddings().weight,
        bias=bool(head.biases),
        frobenius_norm=float(weight.norm()),
        mean_row_norm=float(rows.mean()),
        max_row_norm=float(rows.max()),
        rescaled={name: value for name, value in record.items() if name != "folding"} or None,
        folding=record.get("folding"),
        probe=None if probe is None else summarize_probe(probe),
    )


@torch.inference_mode()
def measure_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, queries: Sequence[str], documents: Sequence[str]
) -> Probe:
    """Run the probe texts through the model.

    Time: one forward pass over the texts. Memory: about 64 MB of sampled token logits, and the
    pooled logits, (texts x vocabulary) in float32.

    Raises:
        OptionError: there are no texts to probe with.
    """
    if not queries or not documents:
        raise OptionError("calibration needs probe texts: at least one query and one document")
    head, live = find_head(model), live_terms(model)
    vocabulary = head.decoder.weight.shape[0]  # of which the live terms alone are kept
    limit = min(_PROBE_LENGTH, tokenizer.model_max_length)
    encoded = [
        [ids[:limit] for ids in tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]]
        for texts in (queries, documents)
    ]
    tokens = sum(len(ids) for texts in encoded for ids in texts)
    stride = max(1, math.ceil(tokens * vocabulary / _SAMPLED_LOGITS))
    was_training = model.training
    model.eval()
    sampled: list[np.ndarray] = []
    pooled: list[np.ndarray] = []
    seen = 0
    for texts in encoded:
        rows = np.empty((len(texts), vocabulary if live is None else len(live)), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        while order:
            longest = len(texts[order[-1]])
            batch = [order.pop() for _ in range(min(len(order), max(1, _LOGITS_A_BATCH // (longest * vocabulary))))]
            padded = tokenizer.pad({"input_ids": [texts[i] for i in batch]}, return_tensors="pt").to(model.device)
            logits = model(**padded).logits.float()  # (batch, length, vocabulary)
            logits = logits if live is None else logits[..., live]
            mask = padded["attention_mask"].bool()
            rows[batch] = logits.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(dim=1).cpu().numpy()
            flat = logits[mask]
            # Every stride-th logit of the whole stream, across batches: the same sample whatever the batch size.
            sampled.append(flat[(-seen) % stride :: stride].cpu().numpy())
            seen += len(flat)
        pooled.append(rows)
    model.train(was_training)
    bias = None if head.bias is None else (head.bias if live is None else head.bias[live]).float().cpu().numpy()
    return Probe(np.concatenate(sampled), pooled[0], pooled[1], bias)


def summarize_probe(probe: Probe) -> ProbeReport:
    queries, documents = (np.log1p(np.maximum(z, 0)) for z in (probe.query_logits, probe.document_logits))
    scores = queries @ documents.T  # (queries, documents)
    levels = np.percentile(probe.token_logits, PERCENTILES)
    counts, edges = np.histogram(probe.token_logits, _BINS)
    unit = documents / np.maximum(np.linalg.norm(documents, axis=1, keepdims=True), 1e-12)
    n = len(documents)
    start_loss = None
    if scores.shape[0] == n:
        exact = scores.astype(np.float64)
        start_loss = float((logsumexp(exact, axis=1) - exact.diagonal()).mean())
    return ProbeReport(
        queries=len(queries),
        documents=n,
        tokens=len(probe.token_logits),
        logit_percentiles={f"{p:g}": float(v) for p, v in zip(PERCENTILES, levels, strict=True)},
        positive_share=float((probe.token_logits > 0).mean()),
        query_active_dims=float((queries > 0).sum(axis=1).mean()),
        document_active_dims=float((documents > 0).sum(axis=1).mean()),
        flops=float(((queries > 0).mean(axis=0) * (documents > 0).mean(axis=0)).sum()),
        score_mean=float(scores.mean()),
        score_std=float(scores.std()),
        document_similarity=float((np.square(unit.sum(axis=0)).sum() - (documents.any(axis=1)).sum()) / max(1, n * (n - 1))),
        start_loss=start_loss,
        chance=math.log(n),
        histogram={"edges": edges.tolist(), "shares": (counts / counts.sum()).tolist()},
    )


# ------------------------------------------------------------------------------------ rescaling


@dataclass(frozen=True)
class Rescaling:
    """What was done to a head; lies under ``anysplade`` in the checkpoint's config.json."""

    k: float
    shift: float
    bias: BiasPolicy
    source: str
    version: str


def rescale_head(model: PreTrainedModel, k: float = 8.0, shift: float = 0.0, bias: BiasPolicy = "scale") -> PreTrainedModel:
    """Make the logits ``logits / k - shift``, in place; the encoder stays as it is.

    With k ≠ 1 everything that is tied is untied first: the input embeddings keep their scale, the
    decoder gets weights of its own (the checkpoint grows by vocabulary x width numbers) and
    ``tie_word_embeddings`` is switched off. With k = 1 only the bias changes, and ties and size stay.

    Args:
        model: a masked LM of transformers.
        k: divides the decoder's weight, as in arXiv 2606.18811; finite and above 0.
        shift: is taken from every logit, by way of the bias.
        bias: ``"scale"`` divides the bias by k too, so the formula holds; with ``"keep"`` it is
            ``W h / k + b - shift``.

    Returns:
        The same model. Its config records what was done.

    Raises:
        OptionError: k is not a positive finite number, shift is not finite, or bias is no policy.
        ModelError: there is no head, no bias to shift, or the logits are not ``W h + b``: then the
            model is left as it was.
    """
    require_masked_lm(model)
    check_rescaling(k, shift, bias)
    if k == 1 and shift == 0:
        return model
    share_tied(model)
    head = find_head(model)
    if shift != 0 and not head.biases:
        raise ModelError(f"{type(model).__name__}: the MLM head has no bias, so it cannot be shifted; use `shift=0` and k alone")
    earlier = dict(getattr(model.config, RECORD, None) or {})
    folding = {name: earlier.pop(name) for name in ("folding",) if name in earlier}
    if earlier:
        logger.warning(
            "this head was rescaled before (k=%g, shift=%g); k=%g and shift=%g come on top",
            earlier["k"],
            earlier["shift"],
            k,
            shift,
        )
    before = check_logits(model)
    offset = 0.0 if head.bias is None or bias == "scale" else head.bias.float() * (1 - 1 / k)
    undo = _apply(model, k, shift, bias)
    after, wanted = check_logits(model), before / k + offset - shift
    if (live := live_terms(model)) is not None:
        before, after, wanted = before[..., live], after[..., live], wanted[..., live]
    tolerance = 64 * torch.finfo(head.decoder.weight.dtype).eps * max(1.0, float(before.abs().max()) / min(1.0, k), abs(shift))
    if not torch.allclose(after, wanted, rtol=0, atol=tolerance):
        undo()
        raise ModelError(
            f"{type(model).__name__}: its logits are not one projection of its hidden states; k and shift cannot be folded into it"
        )
    record = asdict(Rescaling(float(k), float(shift), bias, str(model.name_or_path or type(model).__name__), __version__))
    setattr(model.config, RECORD, record | folding | ({"earlier": earlier} if earlier else {}))
    return model


def check_rescaling(k: float, shift: float, bias: str) -> None:
    """Raise OptionError unless the three are usable."""
    if not (math.isfinite(k) and k > 0):
        raise OptionError(f"k is {k:g}: the head is divided by it, so it must be a finite number above 0")
    if not math.isfinite(shift):
        raise OptionError(f"shift is {shift:g}: it must be a finite number")
    if bias not in ("scale", "keep"):
        raise OptionError(f"bias is {bias!r}: it must be 'scale' (divided by k, the default) or 'keep'")


def untie_head(model: PreTrainedModel) -> Callable[[], None]:
    """Give the decoder a weight of its own, in place; returns what ties it again. What else is tied stays so: ``share_tied``."""
    decoder, tie = find_head(model).decoder, model.config.tie_word_embeddings
    tied = decoder.weight
    decoder.weight = nn.Parameter(tied.detach().clone(), requires_grad=tied.requires_grad)

    def switch(tie: bool) -> None:
        model.config.tie_word_embeddings = tie
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)

    def undo() -> None:
        decoder.weight = tied
        switch(tie)

    switch(False)
    share_tied(model)
    return undo


@torch.no_grad()
def share_tied(model: PreTrainedModel) -> None:
    """Make all names of one tensor hold it, in memory and in whatever is saved, with ``tie_word_embeddings`` off too.

    A bias has two names in most heads, such as ``cls.predictions.bias`` and ``cls.predictions.decoder.bias``. The flag governs
    every tie: with it off, transformers loads them as two tensors, of which training changes the one that makes the logits, and
    servers read the one or the other. The decoder's weight alone is meant to be apart then. Where the two differ already, the
    logits are right.
    """
    decoder, tie = model.get_output_embeddings(), getattr(model.config, "tie_word_embeddings", False)
    weight: Any = getattr(decoder, "weight", None)
    bias: Any = getattr(decoder, "bias", None)
    model.config.tie_word_embeddings = True  # else there are no names
    names = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.config.tie_word_embeddings = tie
    known = dict(model.named_parameters(remove_duplicate=False))  # without those that an adapter has renamed
    for name, other in names.items():
        pair = [known[key] for key in (name, other) if key in known]
        if len(pair) < 2 or any(tensor is weight for tensor in pair):
            continue
        if any(tensor is bias for tensor in pair):
            for tensor in pair:
                tensor.copy_(bias)
        if torch.equal(*pair):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, known[other])
    if _write_every_name not in model._state_dict_hooks.values():
        model.register_state_dict_post_hook(_write_every_name)


def _write_every_name(model: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook of ``state_dict``: transformers writes one name of a tensor and, with the flag off, reads it for no other."""
    if model.config.tie_word_embeddings:
        return
    seen = set()
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if tensor in seen:
            state[prefix + name] = tensor.detach().clone()
        seen.add(tensor)


def formula(k: float, shift: float) -> str:
    """``logits / k - shift`` in numbers."""
    return f"logits / {k:g} {'+' if shift < 0 else '-'} {abs(shift):g}"


def _apply(model: PreTrainedModel, k: float, shift: float, bias: BiasPolicy) -> Callable[[], None]:
    """Change weight and bias; return what puts everything back."""
    tie_again = untie_head(model) if k != 1 else lambda: None
    head = find_head(model)
    changed = [(t, t.detach().clone()) for t in (head.decoder.weight, *head.biases)]
    with torch.no_grad():
        head.decoder.weight /= k
        for tensor in head.biases:
            off = _switched_off(tensor)
            if bias == "scale":
                tensor /= k
            tensor -= shift
            tensor[off] = DEAD

    def undo() -> None:
        with torch.no_grad():
            for tensor, old in changed:
                tensor.copy_(old)
        tie_again()

    return undo


@torch.no_grad()
def check_logits(model: PreTrainedModel) -> Tensor:
    """Logits of sixteen fixed tokens: (2, 8, vocabulary)."""
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    ids = (torch.arange(16, device=model.device).reshape(2, 8) * 7919 + vocabulary // 3) % vocabulary
    was_training = model.training
    try:
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    finally:
        model.train(was_training)
