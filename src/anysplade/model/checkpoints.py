"""Load a masked LM and its tokenizer; reject checkpoints that are incomplete, of another kind, or do not match their tokenizer."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
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

from anysplade.errors import ModelError, OptionError
from anysplade.model.head import RECORD, find_head, live_terms, share_tied
from anysplade.model.saved import first_line, resolve_model

logger = logging.getLogger(__name__)

_PADDED_ROWS = 1024  # rows that an embedding table may have beyond the tokenizer's tokens: mDeBERTa has 898, ModernBERT 88


def load_masked_lm(
    name: str | Path, dtype: torch.dtype | Literal["auto"] = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the masked LM and tokenizer of a folder or hub id, in evaluation mode; ``dtype`` "auto" is that of the file.

    Raises ModelError if it is not found or no masked LM, or if weights or tokenizer are missing or do not match.
    """
    source = resolve_model(name)
    check_weights(masked_lm_class(source), source)
    try:
        model = AutoModelForMaskedLM.from_pretrained(source, dtype=dtype, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: cannot be loaded as a masked LM: {first_line(error)}") from error
    finish_loading(model, tokenizer, source)
    return model.eval(), tokenizer


def finish_loading(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Prepare a loaded model and its tokenizer; raises ModelError if weights, config and tokenizer do not match."""
    fit_tokenizer(tokenizer, model, source)
    _check_folding(model, source)
    share_tied(model)


def _check_folding(model: PreTrainedModel, source: str) -> None:
    """Raise ModelError unless the head has as many live terms as ``fold_head`` recorded in the config."""
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


# ------------------------------------------------------------------------------------ before loading


def masked_lm_class(source: str, folder: str = "") -> Any:
    """The masked LM class of transformers for a checkpoint's architecture, whether or not the checkpoint has an MLM head.

    Raises ModelError if the config is not readable, or its architecture has no such class or brings its own code. ``folder`` is the
    checkpoint's folder inside the source.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, subfolder=folder)
    except (OSError, ValueError) as error:
        raise ModelError(remote_code_message(source) or f"{source}: its config.json cannot be read: {first_line(error)}") from error
    if type(config) not in AutoModelForMaskedLM._model_mapping:
        is_decoder = type(config) in AutoModelForCausalLM._model_mapping
        kind = "a decoder, which reads from left to right," if is_decoder else "no masked LM"
        raise ModelError(
            remote_code_message(source)
            or f"{source}: {config.model_type!r} is {kind} and can have no MLM head; use one such as BERT or ModernBERT"
        )
    return AutoModelForMaskedLM._model_mapping[type(config)]


def check_weights(model_class: Any, source: str, folder: str = "", head: str = "MLM head") -> None:
    """Raise ModelError if a checkpoint lacks weights for a class of transformers, or has weights of other shapes.

    transformers would only warn, and fill them with new random numbers at every load. ``head`` names the part of the class outside
    its body, for the message.
    """
    missing = missing_weights(model_class, source, folder)
    if not missing:
        return
    of_head = [key for key in missing if not key.startswith(f"{model_class.base_model_prefix}.")]
    if not of_head:
        raise ModelError(f"{source}: the checkpoint lacks weights ({missing[0]} is one of {len(missing)}); was it saved whole?")
    fix = head_advice(source) if head == "MLM head" else "use a model that was saved with it"
    about = describe_encoder(source, folder)
    raise ModelError(f"{source}: an encoder ({about}) with no trained {head} ({of_head[0]} is missing); {fix}")


def missing_weights(model_class: Any, source: str, folder: str = "") -> list[str]:
    """Names of the weights that a checkpoint lacks for a class of transformers; reads names and shapes, not the weights.

    Raises ModelError if a weight has another shape than the config says, or if the file cannot be read.
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
    """Silence the warning of transformers about weights that a checkpoint lacks."""
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


def head_advice(source: str) -> str:
    """How to add an MLM head to an encoder, for a message."""
    return f"`anysplade head {source} --text CORPUS --out BACKBONE` gives it one"


def remote_code_message(source: str) -> str | None:
    """Why a checkpoint that brings its own code is rejected; None if it has no such code.

    Models trained by anysplade must load everywhere without such code, so it is never run.
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


# ------------------------------------------------------------------------------------ tokenizer and length


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, source: str) -> None:
    """Set truncation and padding of a tokenizer; raises ModelError if its files are missing or do not match the vocabulary."""
    embeddings: Any = model.get_input_embeddings()
    rows, known = embeddings.weight.shape[0], len(tokenizer)
    if known <= len({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}):
        # Without files, transformers makes a tokenizer of special tokens alone, in which every word is unknown.
        raise ModelError(f"{source}: no tokenizer in it (only {known} special tokens); save the model's tokenizer there too")
    check_tokens(tokenizer, model, source)
    if known > rows or rows - known > _PADDED_ROWS:
        raise ModelError(
            f"{source}: its tokenizer has {known:,} tokens and the model {rows:,}: the tokenizer does not match the model; "
            "save the right one there"
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
    """Raise ModelError if the tokenizer has added tokens without embeddings in the model."""
    embeddings: Any = model.get_input_embeddings()
    rows, known = embeddings.weight.shape[0], 1 + max(tokenizer.get_vocab().values(), default=-1)
    if tokenizer.vocab_size <= rows < known:
        raise ModelError(
            f"{source}: tokens were added to its tokenizer: ids go up to {known - 1:,}, and the model has {rows:,} embeddings; "
            "call `model.resize_token_embeddings(len(tokenizer))` and save both"
        )


def usable_positions(model: PreTrainedModel) -> int | None:
    """Number of tokens that the model's table of positions can hold; None if the model has no such limit.

    RoBERTa and related models number positions from ``padding_idx + 1``, so that 514 rows hold 512 tokens.
    """
    rows = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(rows, int) or rows < 1:
        return None
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    skipped = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return rows - max(skipped, default=0)


def check_length(model: PreTrainedModel, max_length: int) -> None:
    """Raise OptionError if ``max_length`` exceeds the model's positions."""
    positions = usable_positions(model)
    if positions is not None and max_length > positions:
        about = f"{model.name_or_path}: has positions for {positions} tokens"
        raise OptionError(f"{about}, and `max_length` is {max_length}; give at most {positions}")
