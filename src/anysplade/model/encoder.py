"""Open sparse encoders: from a backbone, calibrated, or as they were saved."""

import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from anysplade.errors import ModelError, OptionError
from anysplade.model.calibration import Calibration, calibrate
from anysplade.model.checkpoints import (
    check_weights,
    describe_encoder,
    finish_loading,
    head_advice,
    load_masked_lm,
    masked_lm_class,
    remote_code_message,
)
from anysplade.model.folding import fold_head, plan_folding
from anysplade.model.fused import fuse_pooling
from anysplade.model.head import find_head
from anysplade.model.modules import cut_at, is_splade, masked_lm, splade_modules, transformer_modules
from anysplade.model.options import BiasPolicy, Choice, Fold, Pooling, QueryEncoder
from anysplade.model.probe import PROBE_DOCUMENTS, PROBE_QUERIES
from anysplade.model.rescaling import rescale_head
from anysplade.model.saved import first_line, resolve_model, saved_json, saved_kind

logger = logging.getLogger(__name__)


def load_encoder(
    path: str | Path,
    k: Choice = "auto",
    shift: Choice = "auto",
    fused: bool = True,
    *,
    bias: BiasPolicy = "scale",
    queries: Sequence[str] = PROBE_QUERIES,
    documents: Sequence[str] = PROBE_DOCUMENTS,
    max_length: int | None = None,
) -> SparseEncoder:
    """A stock ``SparseEncoder`` (max pooling, dot product) on a backbone whose head is calibrated.

    With ``k=1, shift=0`` the head is not changed. ``"auto"`` does not change what is a sparse encoder already: a folder that was
    saved as a ``SparseEncoder``, or a masked LM whose head retrieves with few active terms (``is_sparse``).

    Args:
        path: a masked LM's folder or hub id, or a saved SparseEncoder.
        k: divides the logits; ``"auto"`` chooses it from the probe texts.
        shift: is subtracted from the divided logits; ``"auto"`` chooses it from the probe texts.
        fused: pool without building the (batch, length, vocabulary) logits; the results are the same.
        bias: whether k divides the decoder's bias too; see ``rescale_head``.
        queries: probe texts; a few dozen of the kind the model will meet.
        documents: probe texts; document i answers query i.
        max_length: tokens per text, the rest is cut; the tokenizer's own limit if None.

    Raises:
        ModelError: not found, not a masked LM, or a head that cannot do what is asked.
        OptionError: an impossible k or shift, or a length that ``open_encoder`` refuses.
    """
    return build_encoder(path, k, shift, fused, bias=bias, queries=queries, documents=documents, max_length=max_length)[0]


def build_encoder(
    path: str | Path,
    k: Choice = "auto",
    shift: Choice = "auto",
    fused: bool = True,
    *,
    bias: BiasPolicy = "scale",
    queries: Sequence[str] = PROBE_QUERIES,
    documents: Sequence[str] = PROBE_DOCUMENTS,
    max_length: int | None = None,
    strength: int = 0,
    pooling: Pooling = "max",
    double_log: bool = False,
    query_encoder: QueryEncoder = "mlm",
    idf_texts: Iterable[str] = (),
    attention: str | None = None,
    fold: Fold = "none",
    mute: bool = False,
) -> tuple[SparseEncoder, Calibration]:
    """``load_encoder`` with more options of ``TrainingConfig``; also returns the calibration, which comes after the folding.

    ``strength`` is as in ``calibrate``. Weights of tokens in queries start as the inverse document frequencies in ``idf_texts``.
    """
    source = resolve_model(path)
    if is_saved_encoder(source):
        if "auto" in (k, shift):
            logger.info("%s: a sparse encoder already, so its head stays as it is; numbers for k and shift change it", source)
        k, shift = (1.0 if k == "auto" else k), (0.0 if shift == "auto" else shift)
        encoder = _load_saved(source, attention)
        if (pooling, double_log, query_encoder) != ("max", False, "mlm"):
            raise OptionError(f"{source}: a sparse encoder already, whose pooling and query encoder stay as they are")
        check_foldable(source, fold, mute)
    else:
        encoder = _with_splade_pooling(source, pooling, double_log, attention)
        transformer = splade_modules(encoder)[0]
        transformer.processor = fold_head(masked_lm(encoder), transformer.tokenizer, fold, mute)
        if query_encoder != "mlm":
            encoder = _with_static_queries(encoder, idf_texts, frozen=query_encoder == "idf")
    model = masked_lm(encoder)
    tokenizer = splade_modules(encoder)[0].tokenizer
    calibration = calibrate(model, tokenizer, queries, documents, k=k, shift=shift, bias=bias, strength=strength)
    rescale_head(model, calibration.k, calibration.shift, bias)
    return _finished(encoder, fused, max_length), calibration


def open_encoder(path: str | Path, fused: bool = True, max_length: int | None = None) -> SparseEncoder:
    """Open a saved ``SparseEncoder`` of any kind, or a masked LM with SPLADE pooling; nothing is calibrated.

    Args:
        path: a folder or hub id.
        fused: pool SPLADE models without building the (batch, length, vocabulary) logits; the vectors are the same.
        max_length: tokens per text, the rest is cut; the saved length if None.

    Raises:
        OptionError: a length below 3, or above what the model has positions for.
        ModelError: not found, or neither of the two. (``SparseEncoder(name)`` itself silently builds an untrained autoencoder for a
            checkpoint that is not a masked LM.)
    """
    source = resolve_model(path)
    encoder = _load_saved(source) if is_saved_encoder(source) else _with_splade_pooling(source)
    return _finished(encoder, fused and is_splade(encoder), max_length)


def _finished(encoder: SparseEncoder, fused: bool, max_length: int | None) -> SparseEncoder:
    if max_length is not None:
        cut_at(encoder, max_length)
    if fused:
        fuse_pooling(encoder)
    return encoder


def open_masked_lm(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """The masked LM and tokenizer of a checkpoint or of a saved SPLADE encoder, and whether it was a saved encoder."""
    source = resolve_model(path)
    if not is_saved_encoder(source):
        return *load_masked_lm(source), False
    encoder = _load_saved(source)
    return masked_lm(encoder), splade_modules(encoder)[0].tokenizer, True


def is_saved_encoder(source: str) -> bool:
    """Whether a folder or hub id was saved as a ``SparseEncoder``; raises ModelError for other models of sentence-transformers."""
    kind = saved_kind(source)
    if kind is None or kind == "SparseEncoder":
        return kind is not None
    # SparseEncoder(name) would accept it, and put an untrained autoencoder on top.
    if kind != "SentenceTransformer":
        raise ModelError(f"{source}: was saved as a {kind}; it has no MLM head, so give a masked LM or a SparseEncoder")
    folder = encoder_folder(source)
    masked_lm_class(source, folder)  # raises for a decoder, which can be given no head
    raise ModelError(
        f"{source}: was saved as a SentenceTransformer, a dense embedding model ({describe_encoder(source, folder)}); "
        f"it has no MLM head; {head_advice(source)}"
    )


def encoder_folder(source: str) -> str:
    """The folder of the transformer in a model of sentence-transformers, which must have exactly one; "" for other models."""
    modules = saved_json(source, "modules.json")
    if modules is None:
        return ""
    folders = _transformer_folders(source)
    if len(folders) != 1:
        kinds = ", ".join(entry["type"].rpartition(".")[2] for entry in modules)
        about = f"was saved as a SentenceTransformer with {len(folders)} transformers in it ({kinds})"
        raise ModelError(f"{source}: {about}; give a model with one")
    return folders[0]


def check_foldable(source: str, fold: Fold, mute: bool) -> None:
    """Raise the errors of ``fold_head`` that can be found without reading weights."""
    if fold == "none" and not mute:
        return
    if is_saved_encoder(source):
        raise OptionError(f"{source}: a sparse encoder already, whose terms mean what it learned; fold the backbone instead")
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    plan_folding(tokenizer, len(tokenizer), fold, mute)


def _load_saved(source: str, attention: str | None = None) -> SparseEncoder:
    """Load a saved SparseEncoder of any kind in float32, and check its weights and tokenizer.

    Half-precision weights do not train, and give different results on different kinds of processors.
    """
    try:
        encoder = SparseEncoder(source, model_kwargs={"attn_implementation": attention} if attention else None)
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        message = remote_code_message(source) or f"{source}: cannot be loaded as a SparseEncoder: {first_line(error)}"
        raise ModelError(message) from error
    for module, folder in zip(transformer_modules(encoder), _transformer_folders(source), strict=True):
        tokenizer: Any = module.tokenizer
        if getattr(module.model, "peft_config", None) is None:  # an adapter's folder has only the adapter's weights
            check_weights(type(module.model), source, folder)
        finish_loading(module.model, tokenizer, source)
    return encoder.float()


def _transformer_folders(source: str) -> list[str]:
    """The folders of the transformers inside a saved encoder; "" for the encoder's own folder."""
    folders = []
    for entry in saved_json(source, "modules.json"):
        if entry["type"].endswith(".Router"):
            inside = saved_json(source, str(Path(entry["path"], "router_config.json")))["types"]
            folders += [str(Path(entry["path"], name)) for name, kind in inside.items() if kind.endswith("Transformer")]
        elif entry["type"].endswith("Transformer"):
            folders.append(entry["path"])
    return folders


def _with_splade_pooling(
    source: str, pooling: Pooling = "max", double_log: bool = False, attention: str | None = None
) -> SparseEncoder:
    check_weights(masked_lm_class(source), source)
    options = {"dtype": torch.float32} | ({"attn_implementation": attention} if attention else {})
    try:
        transformer = Transformer(source, transformer_task="fill-mask", model_kwargs=options)
    except (ImportError, ValueError) as error:
        if attention:
            raise OptionError(f"attention {attention!r}: {first_line(error)}") from error
        raise
    finish_loading(transformer.model, transformer.tokenizer, source)
    activation: Literal["relu", "log1p_relu"] = "log1p_relu" if double_log else "relu"
    vocabulary = len(find_head(transformer.model).decoder.weight)  # otherwise known only after the first text
    modules = [transformer, SpladePooling(pooling, activation_function=activation, embedding_dimension=vocabulary)]
    return SparseEncoder(modules=modules, similarity_fn_name="dot")


def _with_static_queries(encoder: SparseEncoder, texts: Iterable[str], frozen: bool) -> SparseEncoder:
    """Documents through the MLM, queries as a bag of tokens with one weight each (Geng et al., arXiv 2411.04403)."""
    tokenizer: Any = encoder.tokenizer
    rows = len(find_head(masked_lm(encoder)).decoder.weight)
    if rows != len(tokenizer):  # a stock SparseStaticEmbedding has exactly one weight per token
        raise OptionError(
            f"the head has {rows:,} rows and the tokenizer {len(tokenizer):,} tokens, so that queries by token and documents would "
            "not go together; train with `query_encoder=mlm`, or give head and tokenizer the same size"
        )
    frequency = np.zeros(len(tokenizer))
    count = 0
    remaining = iter(texts)
    while batch := list(islice(remaining, 1024)):
        for ids in tokenizer(batch, add_special_tokens=False, truncation=True)["input_ids"]:
            frequency[np.unique(np.array(ids, np.int64))] += 1  # typed, because a text may have no tokens
            count += 1
    idf = np.log1p((count - frequency + 0.5) / (frequency + 0.5))
    idf[tokenizer.all_special_ids] = 0
    queries = SparseStaticEmbedding(tokenizer, torch.tensor(idf, dtype=torch.float32), frozen=frozen)
    documents: list[Any] = list(encoder.children())
    router = Router.for_query_document(query_modules=[queries], document_modules=documents)
    return SparseEncoder(modules=[router], similarity_fn_name="dot")
