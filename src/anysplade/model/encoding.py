"""Encode texts into sparse vectors."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from scipy import sparse
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import batch_to_device, select_max_active_dims
from torch import Tensor
from transformers.tokenization_utils_base import LARGE_INTEGER

from anysplade._common.arguments import require, require_list
from anysplade._common.parts import encode_in_parts
from anysplade._common.progress import bar_within
from anysplade.data.text import replace_surrogates
from anysplade.errors import ModelError, OptionError
from anysplade.model.checkpoints import usable_positions
from anysplade.model.modules import reader, term_names
from anysplade.model.options import OPEN_ENCODER, Role
from anysplade.model.queries import Cut
from anysplade.model.runtimes import runtime_of

_CHUNK = 4096  # texts per part, within which they are sorted by length
_SHARD = 1024  # texts per part if each part is stored in a file
_TOKENS_PER_BATCH = 1024  # padding included
_WEIGHTS_PER_BATCH = 2**24  # texts x vocabulary: 64 MiB before the zeros are dropped
_TOKENIZING = threading.Lock()  # a call sets padding and truncation of the tokenizer, which other threads must not change meanwhile


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
    shown: Any = None,
) -> sparse.csr_matrix:
    """Sparse vectors of texts, in their order: float32, (texts, vocabulary).

    Texts of similar length go through the model together, as many as fit into a batch of tokens. Only the result and one batch are
    in memory, never a dense matrix of all texts. Lone surrogates, which JSON can hold and tokenizers reject, are encoded as U+FFFD.
    Several threads may share one encoder.

    Args:
        encoder: any sparse encoder; ``for_inference`` makes one for another runtime or precision.
        texts: without the prompt of their role, which the encoder adds.
        role: the texts are queries or documents.
        ids: ids of the texts, to name one in an error; None numbers them from 1.
        top_k: keep only this many of the largest weights per text: an approximation.
        cache: a folder where the vectors of these texts by this model are stored, in parts of 1,024 texts; stored ones are not
            encoded again.
        progress: show progress.
        what: label of the progress, such as "encoding queries with MODEL".
        shown: a ``bar`` to update, instead of showing one.

    Raises:
        ModelError: the model gives a vector with NaN or infinity.
        OptionError: the arguments are no encoder, no list of texts, or no role.
    """
    require("encoder", encoder, SparseEncoder, OPEN_ENCODER)
    texts = require_texts(texts)
    if role not in get_args(Role):
        raise OptionError(f"`role` is {role!r}; give {' or '.join(map(repr, get_args(Role)))}")
    width = encoder.get_embedding_dimension() or 0
    if runtime_of(encoder) == "torch":  # other runtimes have no dropout
        encoder.eval()

    def encode_part(start: int, part: Sequence[str]) -> sparse.csr_matrix:
        part = [replace_surrogates(text) for text in part]
        order, rows = [], []
        batches = list(_batches(_lengths(encoder, part, role), max(1, _WEIGHTS_PER_BATCH // max(1, width))))
        for batch, features in zip(batches, _tokenized(encoder, part, role, batches), strict=True):
            vectors = _vectors(encoder, features, role)
            finite = vectors.isfinite().all(dim=1)
            if not finite.all():
                bad = start + int(batch[int((~finite).nonzero()[0])])
                name = f"text {bad + 1}" if ids is None else repr(ids[bad][:80])
                raise ModelError(f"the model gives NaN or infinity for {role} {name}; its training diverged")
            rows.append(_csr(vectors))
            order += list(batch)
            shown.update(len(batch))
        return rows[0] if len(part) == 1 else sparse.vstack(rows, format="csr")[np.argsort(order)]

    with bar_within(shown, what or f"encoding {role} texts", "text", len(texts), progress) as shown:
        blocks = list(encode_in_parts(texts, _CHUNK if cache is None else _SHARD, encode_part, cache, ".npz", shown))
    if not blocks:
        return sparse.csr_matrix((0, width), dtype=np.float32)
    whole = blocks[0] if len(blocks) == 1 else sparse.vstack(blocks, format="csr")
    return whole if top_k is None else prune(whole, top_k)


def require_texts(texts: Iterable[str]) -> list[str]:
    """The texts as a list.

    Raises:
        OptionError: a single text, or an item that is no text.
    """
    return require_list("texts", texts, "text")


def prune(matrix: sparse.csr_matrix, k: int) -> sparse.csr_matrix:
    """Keep the k largest weights of each row; among equal ones, those with the lowest term ids."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))  # by row, the largest weight first
    rank = np.arange(len(rows)) - matrix.indptr[rows]
    keep = np.sort(order[rank < k])
    starts = np.concatenate([[0], np.cumsum(np.minimum(np.diff(matrix.indptr), k))])
    return sparse.csr_matrix((matrix.data[keep], matrix.indices[keep], starts), shape=matrix.shape)


def count_truncated(encoder: SparseEncoder | SentenceTransformer, texts: Sequence[str], role: Role) -> Cut:
    """Count the texts that are longer than what the model reads of them. Tokenizing takes a hundredth of the time of encoding."""
    module: Any = reader(encoder, role)
    if module is None:
        return Cut(0)
    if is_transformer := isinstance(module, Transformer):
        limit, maximum = module.max_seq_length, usable_positions(module.model)
    else:  # a static embedding reads up to the limit of its tokenizer; its own max_seq_length may be outdated
        limit = maximum = module.tokenizer.model_max_length
    if limit is None or limit >= LARGE_INTEGER:
        return Cut(0)
    options = {"add_special_tokens": is_transformer, "verbose": False, "return_attention_mask": False}
    prompt, count = prompt_of(encoder, role) or "", 0
    for start in range(0, len(texts), _CHUNK):
        chunk = [prompt + replace_surrogates(text) for text in texts[start : start + _CHUNK]]
        with _TOKENIZING:
            count += sum(len(ids) > limit for ids in module.tokenizer(chunk, **options)["input_ids"])
    return Cut(count, limit, maximum)


# --------------------------------------------------------------------------------- batches


def prompt_of(encoder: SparseEncoder | SentenceTransformer, role: Role) -> str | None:
    """The prompt that the encoder adds for a role, chosen as ``encode_query`` and ``encode_document`` do."""
    prompts = encoder.prompts or {}
    names = ("query",) if role == "query" else ("document", "passage", "corpus")
    named = next((name for name in names if name in prompts), encoder.default_prompt_name)
    return None if named is None else prompts.get(named)


def _preprocess(encoder: SparseEncoder, texts: Sequence[str], role: Role) -> dict[str, Any]:
    """The model's inputs for texts, with the prompt of their role."""
    with _TOKENIZING:
        return encoder.preprocess(list(texts), prompt=prompt_of(encoder, role), task=role)


def _lengths(encoder: SparseEncoder, texts: list[str], role: Role) -> np.ndarray:
    """Number of tokens that the model reads of each text; 1 for a single text, or if the model does not read tokens in order."""
    if len(texts) == 1:
        return np.ones(1, np.int64)
    mask = _preprocess(encoder, texts, role).get("attention_mask")
    return np.ones(len(texts), np.int64) if mask is None else mask.sum(dim=1).cpu().numpy()


def _batches(lengths: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Positions of the texts in each batch of at most ``most`` texts, the longest texts first."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, min(most, _TOKENS_PER_BATCH // max(1, int(lengths[order[start]]))))
        yield order[start : start + size]
        start += size


def _tokenized(encoder: SparseEncoder, texts: Sequence[str], role: Role, batches: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
    """The inputs of each batch on the encoder's device; a thread prepares the next batch while the model works on this one."""
    device = encoder.device

    def prepare(batch: np.ndarray) -> dict[str, Any]:
        features = _preprocess(encoder, [texts[i] for i in batch], role)
        if device.type != "cuda":
            return batch_to_device(features, device)
        tensors = {name: value for name, value in features.items() if isinstance(value, Tensor)}
        # A copy from pinned memory does not wait for the model.
        return features | {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}

    if len(batches) == 1:
        yield prepare(batches[0])
        return
    with ThreadPoolExecutor(1, thread_name_prefix="tokenizing") as thread:
        following = thread.submit(prepare, batches[0])
        for batch in batches[1:]:
            features = following.result()
            following = thread.submit(prepare, batch)
            yield features
        yield following.result()


@torch.inference_mode()
def _vectors(encoder: SparseEncoder, features: dict[str, Any], role: Role) -> Tensor:
    most = encoder.max_active_dims
    options = {} if most is None else {"max_active_dims": most}
    vectors: Tensor = encoder(features, task=role, **options)["sentence_embedding"]
    return vectors if most is None else select_max_active_dims(vectors, max_active_dims=most)


def _csr(vectors: Tensor) -> sparse.csr_matrix:
    row, term = vectors.nonzero(as_tuple=True)
    starts = torch.searchsorted(row, torch.arange(len(vectors) + 1, device=row.device))
    parts = (vectors[row, term].float(), term.int(), starts)
    return sparse.csr_matrix(tuple(part.cpu().numpy() for part in parts), shape=vectors.shape)


class ModelQueries:
    """Encodes queries with the model; implements ``model.queries.Queries``."""

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
