"""Open sparse encoders: from a backbone, calibrated, or as they were saved."""

import logging
from collections.abc import Iterable, Iterator, Sequence
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
from anysplade.model.folding import fold_head, plan_folding
from anysplade.model.fused import fuse_pooling
from anysplade.model.head import (
    check_masked_lm,
    check_weights,
    describe_encoder,
    find_head,
    finish_loading,
    give_head,
    has_remote_code,
    load_masked_lm,
    masked_lm_class,
    rescale_head,
)
from anysplade.model.modules import cut_at, is_splade, masked_lm, splade_modules, transformer_modules
from anysplade.model.options import BiasPolicy, Choice, Fold, Pooling, QueryEncoder
from anysplade.model.probe import PROBE_DOCUMENTS, PROBE_QUERIES
from anysplade.model.saved import first_line, resolve_model, saved_json, saved_kind

logger = logging.getLogger(__name__)

# Tokens that a trained backbone reads, unless it was trained on more: 8,192 would make every index at least eight times as dear.
_LONGEST = 512


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

    With ``k=1, shift=0`` the head is untouched. What is a sparse encoder already stays as it is with ``"auto"``: a folder
    that was saved as a ``SparseEncoder``, or a masked LM whose head retrieves with few active terms (``is_sparse``).

    Args:
        path: a masked LM's folder or hub id, or a saved SparseEncoder.
        k: divides the logits; ``"auto"`` chooses it from the probe texts.
        shift: is taken from the logits after that; ``"auto"`` likewise.
        fused: pool without ever building the (batch, length, vocabulary) logits; same results.
        bias: whether k divides the decoder's bias too; see ``rescale_head``.
        queries: of the probe texts; a few dozen of the kind the model will meet.
        documents: likewise.
        max_length: tokens a text is cut to; the tokenizer's own limit if None.

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
    """``load_encoder``, and the calibration that was applied.

    Args:
        strength: that of ``calibrate``.
        pooling, double_log: over tokens, and log(1 + log(1 + relu)) as the activation.
        query_encoder: ``"idf"`` and ``"static"`` give queries one weight a token, fixed and learned, which
            begins as its inverse document frequency in ``idf_texts``.
        attention: transformers' name of an attention implementation.
        fold, mute: those of ``fold_head``, before the calibration.
    """
    source = resolve_model(path)
    if is_saved_encoder(source):
        k, shift = _auto_choices(source, k, shift)
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
    if max_length is not None:
        cut_at(encoder, max_length)
    if fused:
        fuse_pooling(encoder)
    return encoder, calibration


def open_encoder(path: str | Path, fused: bool = True, max_length: int | None = None) -> SparseEncoder:
    """Open a saved ``SparseEncoder`` of any kind, or a masked LM with SPLADE pooling as it is; nothing is calibrated.

    Args:
        path: a folder or hub id.
        fused: pool SPLADE models without building the (batch, length, vocabulary) logits; the vectors are the same.
        max_length: tokens a text is cut to; what was saved with it if None.

    Raises:
        OptionError: a length below 3, or above what the model has positions for.
        ModelError: not found, or neither of the two. (``SparseEncoder(name)`` itself silently
            builds an untrained autoencoder for a checkpoint that is not a masked LM.)
    """
    source = resolve_model(path)
    encoder = _load_saved(source) if is_saved_encoder(source) else _with_splade_pooling(source)
    if max_length is not None:
        cut_at(encoder, max_length)
    if fused and is_splade(encoder):
        fuse_pooling(encoder)
    return encoder


def open_masked_lm(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """The masked LM and tokenizer of a checkpoint or of a saved SPLADE encoder, and whether it was the latter.

    Raises:
        ModelError: neither of the two.
    """
    source = resolve_model(path)
    if not is_saved_encoder(source):
        return *load_masked_lm(source), False
    encoder = _load_saved(source)
    return masked_lm(encoder), splade_modules(encoder)[0].tokenizer, True


def is_saved_encoder(source: str) -> bool:
    """Whether a folder or hub id was saved as a ``SparseEncoder`` of sentence-transformers.

    Raises:
        ModelError: it was saved as another of its models, such as a dense one.
    """
    kind = saved_kind(source)
    if kind is None:
        return False
    if kind != "SparseEncoder":
        # SparseEncoder(name) takes it too, and puts an untrained autoencoder on top.
        if kind == "SentenceTransformer":
            folder = encoder_folder(source)
            masked_lm_class(source, folder)  # a decoder can be given no head
            raise ModelError(
                f"{source}: was saved as a SentenceTransformer, a dense embedding model ({describe_encoder(source, folder)}); "
                f"it has no MLM head; {give_head(source)}"
            )
        raise ModelError(f"{source}: was saved as a {kind}; it has no MLM head, so give a masked LM or a SparseEncoder")
    return True


def encoder_folder(source: str) -> str:
    """Where below a model's folder or hub id the transformer of a dense model of sentence-transformers lies; "" for itself.

    Raises:
        ModelError: it has none, or several.
    """
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
    """Refuse what cannot be folded, as far as can be known without reading weights.

    Raises:
        OptionError, ModelError: a sparse encoder, or as ``fold_head`` does.
    """
    if fold == "none" and not mute:
        return
    if is_saved_encoder(source):
        raise OptionError(f"{source}: a sparse encoder already, whose terms mean what it learned; fold the backbone instead")
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    plan_folding(tokenizer, len(tokenizer), fold, mute)


def _auto_choices(source: str, k: Choice, shift: Choice) -> tuple[Choice, Choice]:
    """What "auto" means for the head of a saved SparseEncoder: no change."""
    if "auto" in (k, shift):
        logger.info("%s: a sparse encoder already, so its head stays as it is; numbers for k and shift change it", source)
    return (1.0 if k == "auto" else k), (0.0 if shift == "auto" else shift)


def _load_saved(source: str, attention: str | None = None) -> SparseEncoder:
    """A saved SparseEncoder of any kind in float32, its weights and tokenizer checked.

    Half-precision weights do not train, and make another result on each kind of processor.
    """
    try:
        encoder = SparseEncoder(source, model_kwargs={"attn_implementation": attention} if attention else None)
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise ModelError(
            has_remote_code(source) or f"{source}: cannot be loaded as a SparseEncoder: {first_line(error)}"
        ) from error
    for module, folder in zip(transformer_modules(encoder), _transformer_folders(source), strict=True):
        model: Any = module.model
        tokenizer: Any = module.tokenizer
        if getattr(model, "peft_config", None) is None:  # an adapter's folder has no weights but its own
            check_weights(type(model), source, folder)
        finish_loading(model, tokenizer, source)
    return encoder.float()


def _transformer_folders(source: str) -> list[str]:
    """Where a saved encoder has its transformers: sub-folders, or "" for its own."""
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
    check_masked_lm(source)
    # float32 whatever the checkpoint is stored in: half-precision weights do not train.
    options = {"dtype": torch.float32} | ({"attn_implementation": attention} if attention else {})
    try:
        transformer = Transformer(source, transformer_task="fill-mask", model_kwargs=options)
    except (ImportError, ValueError) as error:
        if attention:
            raise OptionError(f"attention {attention!r}: {str(error).splitlines()[0]}") from error
        raise
    finish_loading(transformer.model, transformer.tokenizer, source)
    activation: Literal["relu", "log1p_relu"] = "log1p_relu" if double_log else "relu"
    vocabulary = len(find_head(transformer.model).decoder.weight)  # left out, it would be known after the first text only
    modules = [transformer, SpladePooling(pooling, activation_function=activation, embedding_dimension=vocabulary)]
    return SparseEncoder(modules=modules, similarity_fn_name="dot")


def _with_static_queries(encoder: SparseEncoder, texts: Iterable[str], frozen: bool) -> SparseEncoder:
    """Documents through the MLM, queries as a bag of tokens with a weight each (Geng et al., arXiv 2411.04403)."""
    tokenizer: Any = encoder.tokenizer
    rows = len(find_head(masked_lm(encoder)).decoder.weight)
    if rows != len(tokenizer):  # a stock SparseStaticEmbedding has a weight for each token, no more and no fewer
        raise OptionError(
            f"the head has {rows:,} rows and the tokenizer {len(tokenizer):,} tokens, so that queries by token and documents would "
            "not go together; train with `query_encoder=mlm`, or give head and tokenizer the same size"
        )
    frequency = np.zeros(len(tokenizer))
    count = 0
    for batch in _batched(texts, 1024):
        for ids in tokenizer(list(batch), add_special_tokens=False, truncation=True)["input_ids"]:
            frequency[np.unique(np.array(ids, np.int64))] += 1  # of no tokens too
            count += 1
    idf = np.log1p((count - frequency + 0.5) / (frequency + 0.5))
    idf[tokenizer.all_special_ids] = 0
    queries = SparseStaticEmbedding(tokenizer, torch.tensor(idf, dtype=torch.float32), frozen=frozen)
    documents: list[Any] = list(encoder.children())
    router = Router.for_query_document(query_modules=[queries], document_modules=documents)
    return SparseEncoder(modules=[router], similarity_fn_name="dot")


def _batched(items: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    iterator = iter(items)
    while batch := tuple(islice(iterator, size)):
        yield batch
