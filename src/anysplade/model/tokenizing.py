"""Tokenize texts once: the lengths, the padded batches and the number of texts that are cut come from the same pass.

``sentence-transformers`` tokenizes and pads in one call, per batch. ``TextReader`` calls the tokenizer alone, for many texts, and
pads batches itself. It does so only if the encoder reads texts in the stock way, and if its inputs for a few texts equal those of
``encoder.preprocess``; otherwise that is called for each batch.
"""

import threading
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SparseStaticEmbedding
from torch import Tensor
from transformers.tokenization_utils_base import LARGE_INTEGER

from anysplade.data.text import replace_surrogates
from anysplade.model.checkpoints import usable_positions
from anysplade.model.modules import reader
from anysplade.model.options import Role
from anysplade.model.queries import Cut

_TEXTS = 512  # per call of the tokenizer, which returns about 100 bytes per token
_PROBE = 100  # characters of the text that is read in both ways
_PADDED = {"input_ids": "pad_token_id", "token_type_ids": "pad_token_type_id"}  # inputs, and their values for padding

TOKENIZING = threading.Lock()  # a call sets padding and truncation of the tokenizer, which other threads must not change meanwhile


class Tokens(Protocol):
    """Texts as an encoder reads them."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that are read of each text, (texts,)."""

    @property
    def cut(self) -> int | None:
        """Number of texts that are longer; None if not known."""

    def batch(self, positions: np.ndarray) -> dict[str, Any]:
        """The model's inputs for some of the texts, on the CPU."""

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all tokens, (tokens,), one text after the other, and how many each text has, (texts,)."""


class TextReader:
    """Reads the texts of a role for an encoder; made anew for each call, because limits and prompts can change."""

    def __init__(self, encoder: SparseEncoder, role: Role) -> None:
        self._encoder, self._role = encoder, role
        self._module: Any = reader(encoder, role)
        self._stock = _is_stock(encoder, self._module, role)
        self._extras: dict[str, Any] | None = None  # what the model needs besides tokens

    def read(self, texts: Sequence[str]) -> Tokens:
        """Tokenize texts without lone surrogates."""
        if len(texts) > 1 and self._stock:  # a single text has neither padding nor an order
            if self._extras is None:
                self._probe(texts[0][:_PROBE])
            if self._extras is not None:
                return self._tokenize(texts, self._extras)
        return _Preprocessed(self._encoder, self._role, texts)

    def _probe(self, text: str) -> None:
        """Compare the inputs for a few texts with the encoder's own."""
        texts = [text, "", "a"]
        given = _preprocess(self._encoder, self._role, texts)
        found = self._tokenize(texts, {}).batch(np.arange(len(texts)))
        extras = {name: value for name, value in given.items() if name not in found}
        self._stock = not any(isinstance(value, Tensor) for value in extras.values()) and all(
            name in given and _same(value, given[name]) for name, value in found.items()
        )
        self._extras = extras if self._stock else None

    def _tokenize(self, texts: Sequence[str], extras: dict[str, Any]) -> "_Tokenized":
        module, tokenizer = self._module, self._module.tokenizer
        options: dict[str, Any] = {"truncation": True, "return_attention_mask": False, "verbose": False}
        options["add_special_tokens"] = isinstance(module, Transformer)
        prompt = prompt_of(self._encoder, self._role) or ""
        parts: list[dict[str, np.ndarray]] = []
        lengths: list[int] = []
        cut = 0
        for start in range(0, len(texts), _TEXTS):
            part = [prompt + text for text in texts[start : start + _TEXTS]]
            found: Any
            with TOKENIZING:
                if tokenizer.is_fast:
                    found = tokenizer(part, **options)
                    cut += sum(bool(encoding.overflowing) for encoding in found.encodings)
                else:  # one by one, since they do not return the overflow of several texts
                    singles = [tokenizer(text, return_overflowing_tokens=True, **options) for text in part]
                    cut += sum("num_truncated_tokens" in single for single in singles)
                    found = {name: [single[name] for single in singles] for name in _PADDED if name in singles[0]}
            lengths += map(len, found["input_ids"])
            flat = {name: np.fromiter(chain.from_iterable(found[name]), np.int32) for name in _PADDED if name in found}
            parts.append(flat)
        values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return _Tokenized(module, values, np.array(lengths, np.int64), cut, extras)


class _Tokenized(NamedTuple):
    """Tokens without padding."""

    module: Any
    values: dict[str, np.ndarray]  # (tokens,) by input: one text after the other
    lengths: np.ndarray
    cut: int
    extras: dict[str, Any]

    def batch(self, positions: np.ndarray) -> dict[str, Any]:
        lengths = self.lengths[positions]
        first = np.cumsum(self.lengths)[positions] - lengths
        behind = np.repeat(first - np.cumsum(lengths) + lengths, lengths)
        taken = np.arange(len(behind)) + behind  # of each token, in the order of the batch
        if getattr(self.module, "can_flatten_inputs", False):
            return self._flat(taken, lengths)
        tokenizer, width = self.module.tokenizer, int(lengths.max(initial=0))
        is_left = tokenizer.padding_side == "left"
        mask = np.arange(width) >= (width - lengths if is_left else lengths)[:, None]
        mask = mask if is_left else ~mask
        features: dict[str, Any] = {}
        for name, values in self.values.items():
            padded = np.full(mask.shape, getattr(tokenizer, _PADDED[name]) or 0, np.int64)
            padded[mask] = values[taken]
            features[name] = torch.from_numpy(padded)
        if "attention_mask" in tokenizer.model_input_names:
            features["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return features | self.extras

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        return self.values["input_ids"], self.lengths

    def _flat(self, taken: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
        """One row without padding, for flash attention."""
        ends = np.cumsum(lengths)[:-1]
        split = {name: np.split(values[taken], ends) for name, values in self.values.items()}
        texts = [{name: rows[i].tolist() for name, rows in split.items()} for i in range(len(lengths))]
        features: dict[str, Any] = dict(self.module.data_collator(texts))
        features.pop("labels", None)
        if offset := getattr(self.module, "_flatten_position_offset", 0):
            features["position_ids"] = features["position_ids"] + offset
        return features | self.extras


class _Preprocessed:
    """Texts that ``encoder.preprocess`` reads, once for their lengths and once for each batch."""

    cut: int | None = None

    def __init__(self, encoder: SparseEncoder, role: Role, texts: Sequence[str]) -> None:
        self._encoder, self._role, self._texts = encoder, role, texts
        self.lengths = np.ones(len(texts), np.int64)  # of a single text, and if the model does not read tokens in order
        if len(texts) > 1:
            features = _preprocess(encoder, role, texts)
            mask, ends = features.get("attention_mask"), features.get("cu_seq_lens_q")
            if mask is not None:
                self.lengths = mask.sum(dim=1).cpu().numpy()
            elif ends is not None:
                self.lengths = ends.diff().cpu().numpy().astype(np.int64)

    def batch(self, positions: np.ndarray) -> dict[str, Any]:
        return _preprocess(self._encoder, self._role, [self._texts[i] for i in positions])

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        features = self.batch(np.arange(len(self._texts)))
        ids, mask, ends = (features.get(name) for name in ("input_ids", "attention_mask", "cu_seq_lens_q"))
        assert ids is not None  # asked of encoders whose terms are tokens
        if ends is not None:  # one row without padding
            return ids[0].numpy(), ends.diff().numpy().astype(np.int64)
        mask = torch.ones_like(ids) if mask is None else mask
        return ids[mask.bool()].numpy(), mask.sum(dim=1).numpy()


def count_truncated(encoder: SparseEncoder | SentenceTransformer, texts: Sequence[str], role: Role) -> Cut:
    """Count the texts that are longer than what the model reads of them; ``encode_counted`` counts while it encodes."""
    limits = limits_of(encoder, role)
    if limits.limit is None:
        return limits
    module: Any = reader(encoder, role)
    options = {"add_special_tokens": isinstance(module, Transformer), "verbose": False, "return_attention_mask": False}
    prompt, count = prompt_of(encoder, role) or "", 0
    for start in range(0, len(texts), _TEXTS):
        part = [prompt + replace_surrogates(text) for text in texts[start : start + _TEXTS]]
        with TOKENIZING:
            count += sum(len(ids) > limits.limit for ids in module.tokenizer(part, **options)["input_ids"])
    return limits._replace(texts=count)


def limits_of(encoder: SparseEncoder | SentenceTransformer, role: Role) -> Cut:
    """How many tokens the encoder reads of a text, as the ``Cut`` of no texts."""
    module: Any = reader(encoder, role)
    if isinstance(module, Transformer):
        limit, maximum = module.max_seq_length, usable_positions(module.model)
    else:  # a static embedding reads up to the limit of its tokenizer; its own max_seq_length may be outdated
        limit = maximum = None if module is None else module.tokenizer.model_max_length
    return Cut(0) if limit is None or limit >= LARGE_INTEGER else Cut(0, limit, maximum)


def prompt_of(encoder: SparseEncoder | SentenceTransformer, role: Role) -> str | None:
    """The prompt that the encoder adds for a role, chosen as ``encode_query`` and ``encode_document`` do."""
    prompts = encoder.prompts or {}
    names = ("query",) if role == "query" else ("document", "passage", "corpus")
    named = next((name for name in names if name in prompts), encoder.default_prompt_name)
    return None if named is None else prompts.get(named)


def _preprocess(encoder: SparseEncoder, role: Role, texts: Sequence[str]) -> dict[str, Any]:
    """The model's inputs for texts, with the prompt of their role."""
    with TOKENIZING:
        return dict(encoder.preprocess(list(texts), prompt=prompt_of(encoder, role), task=role))


def _is_stock(encoder: SparseEncoder, module: Any, role: Role) -> bool:
    """Whether the classes are those of sentence-transformers, with nothing that changes how texts are truncated."""
    if type(encoder).preprocess is not SparseEncoder.preprocess:
        return False
    if isinstance(encoder[0], Router) and type(encoder[0]) is not Router:
        return False
    if getattr(module, "tokenizer", None) is None:
        return False
    if type(module) is SparseStaticEmbedding:
        return True
    own = ("processing_kwargs", f"{role}_length", "query_expansion")
    return type(module) in (Transformer, MLMTransformer) and not any(getattr(module, name, None) for name in own)


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(type(one) is type(other) and one == other)
    return one.dtype == other.dtype and torch.equal(one, other)
