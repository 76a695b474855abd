"""Texts to sparse rows."""

import contextlib
import io
import threading
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from scipy import sparse
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
from sentence_transformers.util import batch_to_device, select_max_active_dims
from torch import Tensor
from transformers.tokenization_utils_base import LARGE_INTEGER

from anysplade._common.arguments import require
from anysplade._common.files import write_atomic
from anysplade._common.progress import bar
from anysplade.data.text import replace_surrogates
from anysplade.errors import ModelError, OptionError
from anysplade.model.head import usable_positions
from anysplade.model.modules import reader, term_names
from anysplade.model.options import OPEN_ENCODER, Role
from anysplade.model.queries import Cut
from anysplade.model.runtimes import runtime_of

_CHUNK = 4096  # texts that are sorted by length among themselves
_SHARD = 1024  # the same, where each such part is a file
_TOKENS_A_BATCH = 1024  # padding included
_WEIGHTS_A_BATCH = 2**24  # texts x vocabulary: 64 MiB before the zeros are dropped
_TOKENIZING = threading.Lock()  # a call sets how a tokenizer pads and cuts; another thread's call must not change it meanwhile


def encode(
    encoder: SparseEncoder,
    texts: Sequence[str],
    role: Role,
    *,
    ids: Sequence[str] | None = None,
    top_k: int | None = None,
    cache: Path | None = None,
    progress: bool = False,
    what: str | None = None,
) -> sparse.csr_matrix:
    """Sparse vectors of texts, in their order: float32, (texts, vocabulary).

    Texts of like length go through the model together, as many as fit a budget of tokens. The
    memory is that of the result and of one batch, never a dense matrix of all texts. A lone surrogate, which
    JSON can hold and no tokenizer takes, is encoded as U+FFFD.

    Several threads may encode with one encoder.

    Args:
        encoder: any sparse encoder; ``for_inference`` makes one that encodes on another runtime or in another precision.
        texts: without the prompt of their role, which the encoder adds.
        role: the texts are queries or documents.
        ids: the texts' ids, to name one in an error; its number from 1 if None.
        top_k: keep only the so many largest weights of each text: an approximation.
        cache: a folder for these texts' vectors by this model: what lies in it is not encoded again, and what
            is encoded is kept there, in parts of 1,024 texts.
        progress: show it.
        what: the words for that, such as "encoding queries with MODEL".

    Raises:
        ModelError: the model gives a vector with NaN or infinity.
        OptionError: what is given is no encoder, no list of texts, or no role.
    """
    require("encoder", encoder, SparseEncoder, OPEN_ENCODER)
    texts = require_texts(texts)
    if role not in get_args(Role):
        raise OptionError(f"`role` is {role!r}; give {' or '.join(map(repr, get_args(Role)))}")
    width = encoder.get_embedding_dimension() or 0
    if runtime_of(encoder) == "torch":  # what runs elsewhere has no dropout
        encoder.eval()
    blocks = []
    size = _CHUNK if cache is None else _SHARD
    with bar(what or f"encoding {role} texts", "text", len(texts), progress) as shown:
        for start in range(0, len(texts), size):
            chunk = [replace_surrogates(text) for text in texts[start : start + size]]  # tokenizers take no others
            kept = cache and cache / f"{start:012}.npz"
            block = kept and _read_block(kept)
            if block is not None:
                blocks.append(block)
                shown.update(len(chunk))
                continue
            order, rows = [], []
            most = max(1, _WEIGHTS_A_BATCH // max(1, width))
            batches = list(_batches(_lengths(encoder, chunk, role), most))
            for batch, features in zip(batches, _tokenized(encoder, chunk, role, batches), strict=True):
                vectors = _vectors(encoder, features, role)
                finite = vectors.isfinite().all(dim=1)
                if not finite.all():
                    bad = start + int(batch[int((~finite).nonzero()[0])])
                    name = f"text {bad + 1}" if ids is None else repr(ids[bad][:80])
                    raise ModelError(f"the model gives NaN or infinity for {role} {name}; its training diverged")
                rows.append(_csr(vectors))
                order += list(batch)
                shown.update(len(batch))
            blocks.append(rows[0] if len(chunk) == 1 else sparse.vstack(rows, format="csr")[np.argsort(order)])
            if kept:
                _write_block(kept, blocks[-1])
    if not blocks:
        return sparse.csr_matrix((0, width), dtype=np.float32)
    whole = blocks[0] if len(blocks) == 1 else sparse.vstack(blocks, format="csr")
    return whole if top_k is None else prune(whole, top_k)


def require_texts(texts: Iterable[str]) -> list[str]:
    """The texts as a list.

    Raises:
        OptionError: one text instead of a list, or an item that is no text.
    """
    if isinstance(texts, str | bytes):
        raise OptionError(f"`texts` is one {type(texts).__name__}, of which each letter would be a text; give a list: [text]")
    listed = list(texts)
    for number, text in enumerate(listed, 1):
        if not isinstance(text, str):
            raise OptionError(f"`texts`: item {number} is a {type(text).__name__}; each must be a str")
    return listed


def count_truncated(encoder: SparseEncoder, texts: Sequence[str], role: Role) -> Cut:
    """How many of the texts are longer than what the model reads of them.

    Time: that of tokenizing, a hundredth of encoding.
    """
    module = reader(encoder, role)
    limit = None if module is None else _limit(module)
    if module is None or limit is None:
        return Cut(0)
    tokenizer: Any = module.tokenizer
    options = {"add_special_tokens": isinstance(module, Transformer), "verbose": False, "return_attention_mask": False}
    prompt, count = _prompt(encoder, role) or "", 0
    for start in range(0, len(texts), _CHUNK):
        chunk = [prompt + replace_surrogates(text) for text in texts[start : start + _CHUNK]]
        with _TOKENIZING:
            count += sum(len(ids) > limit for ids in tokenizer(chunk, **options)["input_ids"])
    # A static embedding's limit was saved with its tokenizer, and no option changes it.
    return Cut(count, limit, usable_positions(module.model) if isinstance(module, Transformer) else limit)


def _limit(module: Transformer | SparseStaticEmbedding) -> int | None:
    """How many tokens of a text a module reads; None if nothing limits them."""
    if isinstance(module, Transformer):
        return module.max_seq_length
    tokenizer: Any = module.tokenizer
    limit: int = tokenizer.model_max_length  # not the module's max_seq_length, which is that of the time when it was made
    return limit if limit < LARGE_INTEGER else None


def _read_block(path: Path) -> sparse.csr_matrix | None:
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):  # absent or damaged: made again
        return sparse.load_npz(path)
    return None


def _write_block(path: Path, block: sparse.csr_matrix) -> None:
    file = io.BytesIO()
    sparse.save_npz(file, block, compressed=False)
    write_atomic(path, file.getvalue())


def prune(matrix: sparse.csr_matrix, k: int) -> sparse.csr_matrix:
    """The k largest weights of each row; of equal ones those of the lowest term ids."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))  # rows together, the largest first
    rank = np.arange(len(rows)) - matrix.indptr[rows]
    keep = np.sort(order[rank < k])
    starts = np.concatenate([[0], np.cumsum(np.minimum(np.diff(matrix.indptr), k))])
    return sparse.csr_matrix((matrix.data[keep], matrix.indices[keep], starts), shape=matrix.shape)


def _preprocess(encoder: SparseEncoder, texts: Sequence[str], role: Role) -> dict[str, Any]:
    """What the model reads of texts, their prompt included, as ``encode_query`` and ``encode_document`` have it."""
    with _TOKENIZING:
        return encoder.preprocess(list(texts), prompt=_prompt(encoder, role), task=role)


def _prompt(encoder: SparseEncoder, role: Role) -> str | None:
    prompts = encoder.prompts or {}
    names = ("query",) if role == "query" else ("document", "passage", "corpus")
    named = next((name for name in names if name in prompts), encoder.default_prompt_name)
    return None if named is None else prompts.get(named)


def _tokenized(encoder: SparseEncoder, texts: Sequence[str], role: Role, batches: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
    """Each batch on the encoder's device; the next one is made ready while the model works on this one."""
    device = encoder.device

    def ready(batch: np.ndarray) -> dict[str, Any]:
        features = _preprocess(encoder, [texts[i] for i in batch], role)
        if device.type != "cuda":
            return batch_to_device(features, device)
        tensors = {name: value for name, value in features.items() if isinstance(value, Tensor)}
        # From pinned memory the copy does not wait for the model.
        return features | {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}

    if len(batches) == 1:
        yield ready(batches[0])
        return
    with ThreadPoolExecutor(1, thread_name_prefix="tokenizing") as thread:
        following = thread.submit(ready, batches[0])
        for batch in batches[1:]:
            features = following.result()
            following = thread.submit(ready, batch)
            yield features
        yield following.result()


@torch.inference_mode()
def _vectors(encoder: SparseEncoder, features: dict[str, Any], role: Role) -> Tensor:
    most = encoder.max_active_dims
    options = {} if most is None else {"max_active_dims": most}
    vectors: Tensor = encoder(features, task=role, **options)["sentence_embedding"]
    return vectors if most is None else select_max_active_dims(vectors, max_active_dims=most)


def _lengths(encoder: SparseEncoder, texts: list[str], role: Role) -> np.ndarray:
    """Tokens of each text, as the model will read it; 1 where the model does not read tokens in order, or there is one text."""
    if len(texts) == 1:
        return np.ones(1, np.int64)
    mask = _preprocess(encoder, texts, role).get("attention_mask")
    return np.ones(len(texts), np.int64) if mask is None else mask.sum(dim=1).cpu().numpy()


def _batches(lengths: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Positions of the texts of each batch, the longest first."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, min(most, _TOKENS_A_BATCH // max(1, int(lengths[order[start]]))))
        yield order[start : start + size]
        start += size


def _csr(vectors: Tensor) -> sparse.csr_matrix:
    row, term = vectors.nonzero(as_tuple=True)
    starts = torch.searchsorted(row, torch.arange(len(vectors) + 1, device=row.device))
    parts = (vectors[row, term].float(), term.int(), starts)
    return sparse.csr_matrix(tuple(part.cpu().numpy() for part in parts), shape=vectors.shape)


class ModelQueries:
    """Encodes queries by the model; see ``Queries`` of ``model.queries``."""

    def __init__(self, encoder: SparseEncoder, precision: str = "float32") -> None:
        self.encoder = encoder
        self.precision = precision

    def encode(self, texts: Sequence[str]) -> sparse.csr_matrix:
        return encode(self.encoder, texts, "query")

    def count_truncated(self, texts: Sequence[str]) -> Cut:
        return count_truncated(self.encoder, texts, "query")

    def tokens(self, text: str, special_tokens: bool = False) -> list[tuple[int, int, int]]:
        read: Any = self.encoder.tokenizer
        with _TOKENIZING:
            found = read(replace_surrogates(text), return_offsets_mapping=True, truncation=True, add_special_tokens=special_tokens)
        return [(token, *span) for token, span in zip(found["input_ids"], found["offset_mapping"], strict=True)]

    @property
    def term_names(self) -> list[str]:
        return term_names(self.encoder)
