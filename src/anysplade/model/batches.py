"""The batches that go through a model: how many tokens and texts each has, and the sparse rows that come out of it."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from scipy import sparse
from sentence_transformers import SparseEncoder
from torch import Tensor

from anysplade.model.fused import is_fused
from anysplade.model.hardware import free_memory
from anysplade.model.modules import transformer_modules
from anysplade.model.options import checked_batch_tokens

Tag = TypeVar("Tag")

_TOKENS = 1024  # a CPU works as fast with more; on a GPU, a batch must take longer than launching it
_GPU_TOKENS = 65_536
_WEIGHTS = 2**24  # texts x vocabulary: 64 MiB before the zeros are dropped
_GPU_WEIGHTS = 2**26
_COPIES = 8  # of the dense weights at a time: three batches on their way, their transposes, and the positions of their entries
_SHARE = 0.5  # of the free memory: the estimate leaves out what a model keeps for itself
_LONGEST = 512  # tokens of a text, for the estimate


class Budget(NamedTuple):
    """The most that a batch holds; a single text is always a batch."""

    tokens: int  # padding included
    texts: int


def batch_budget(encoder: SparseEncoder, batch_tokens: int | None = None) -> Budget:
    """The size of batches for an encoder where it is: as asked, or by the type of device and its free memory.

    On a GPU it is halved until a batch takes at most half of the free memory, so that it is the same in every call on one machine
    that is used for nothing else: the vectors of a text differ by the order of float additions between batches of different sizes.

    Raises:
        OptionError: ``batch_tokens`` is not a whole number of at least 1.
    """
    asked = checked_batch_tokens(batch_tokens)
    vocabulary = max(1, encoder.get_embedding_dimension() or 0)
    free = free_memory(encoder.device)
    if free is None:
        return Budget(asked or _TOKENS, max(1, _WEIGHTS // vocabulary))
    size, free = (encoder.dtype or torch.float32).itemsize, int(_SHARE * free)
    weights = min(_GPU_WEIGHTS, free // (2 * _COPIES * size))
    tokens, per_token = _GPU_TOKENS, _bytes_per_token(encoder, vocabulary, size)
    while tokens > _TOKENS and tokens * per_token > free // 2:
        tokens //= 2
    return Budget(asked or tokens, max(1, weights // vocabulary))


def _bytes_per_token(encoder: SparseEncoder, vocabulary: int, size: int) -> int:
    """An upper estimate of the memory of a token in a batch, while the largest layer works."""
    most = 0
    for module in transformer_modules(encoder):
        config: Any = module.model.config
        width = getattr(config, "hidden_size", None) or 768
        inner = getattr(config, "intermediate_size", None) or 4 * width
        attention = _LONGEST * size  # the mask of a (query, key) pair
        if getattr(config, "_attn_implementation", None) == "eager":
            attention += 2 * _LONGEST * size * (getattr(config, "num_attention_heads", None) or 12)
        logits = 0 if is_fused(encoder) else 3 * vocabulary * size
        most = max(most, 8 * width * size + 3 * inner * size + attention + logits)
    return most


def make_batches(lengths: np.ndarray, budget: Budget) -> Iterator[np.ndarray]:
    """Positions of the texts in each batch, the longest texts first."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, min(budget.texts, budget.tokens // max(1, int(lengths[order[start]]))))
        yield order[start : start + size]
        start += size


def to_device(features: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Inputs on the encoder's device. A copy from pinned memory does not wait for the model."""
    tensors = {name: value for name, value in features.items() if isinstance(value, Tensor)}
    if device.type == "cuda":
        return features | {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
    return features | {name: tensor.to(device) for name, tensor in tensors.items()}


# --------------------------------------------------------------------------------------- rows


class Rows(NamedTuple):
    """The rows of a batch."""

    matrix: sparse.csr_matrix  # float32, (texts, vocabulary)
    finite: np.ndarray  # (texts,) whether there is neither NaN nor infinity


class _Copied(NamedTuple):
    """The entries of a batch on the host, or on their way there."""

    entries: tuple[Tensor, ...]  # weights, terms, starts and finite
    shape: tuple[int, ...]
    arrived: Any  # an event; None if they are there


def sparse_rows(batches: Iterable[tuple[Tag, Tensor | None]], behind: int | None = None) -> Iterator[tuple[Tag, Rows | None]]:
    """The rows of dense vectors, batch by batch in their order; None for None.

    On a GPU, the entries of a batch are asked for after the next batch was launched, on another stream, and read after those of the
    next one were asked for. So the host waits once per batch, for its entries to be counted, while the GPU works on the next one.

    Args:
        batches: tags, and vectors, (texts, vocabulary), on any device.
        behind: batches between launching and asking, and between asking and reading; None for 1 on a GPU, otherwise 0.
    """
    launched: deque[tuple[Tag, Tensor | None, Any]] = deque()
    asked: deque[tuple[Tag, _Copied | None]] = deque()
    stream: Any = None

    def ask() -> None:
        tag, vectors, ready = launched.popleft()
        asked.append((tag, None if vectors is None else _entries(vectors, stream, ready)))

    def read() -> tuple[Tag, Rows | None]:
        tag, copied = asked.popleft()
        return tag, None if copied is None else _read(copied)

    for tag, vectors in batches:
        ready = None
        if vectors is not None and vectors.is_cuda:
            stream = stream or torch.cuda.Stream(vectors.device, priority=-1)
            ready = torch.cuda.current_stream(vectors.device).record_event()
        launched.append((tag, vectors, ready))
        late = behind if behind is not None else int(stream is not None)
        if len(launched) > late:
            ask()
        if len(asked) > late:
            yield read()
    while launched:
        ask()
    while asked:
        yield read()


@torch.inference_mode()
def _entries(vectors: Tensor, stream: Any, ready: Any) -> _Copied:
    """Find the entries of dense vectors and begin to copy them to the host; ``ready`` is the event after which they are there."""
    with nullcontext() if ready is None else torch.cuda.stream(stream):
        if ready is not None:
            stream.wait_event(ready)
            vectors.record_stream(stream)
        finite = vectors.isfinite().all(dim=1)
        row, term = vectors.nonzero(as_tuple=True)  # the wait: their number is known on the host after it
        starts = torch.searchsorted(row, torch.arange(len(vectors) + 1, device=row.device))
        found = (vectors[row, term].float(), term.int(), starts, finite)
        if ready is None:
            return _Copied(tuple(part.cpu() for part in found), tuple(vectors.shape), None)
        host = tuple(torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True) for part in found)
        return _Copied(host, tuple(vectors.shape), stream.record_event())


def _read(copied: _Copied) -> Rows:
    if copied.arrived is None:
        weights, terms, starts, finite = (part.numpy() for part in copied.entries)
    else:
        copied.arrived.synchronize()
        weights, terms, starts, finite = (part.numpy().copy() for part in copied.entries)  # pinned memory is scarce
    return Rows(sparse.csr_matrix((weights, terms, starts), shape=copied.shape), finite)
