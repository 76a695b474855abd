"""Encode texts into sparse vectors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from scipy import sparse
from sentence_transformers import SparseEncoder
from sentence_transformers.util import select_max_active_dims
from torch import Tensor

from anysplade._common.arguments import require, require_list
from anysplade._common.cache import mark_used
from anysplade._common.parts import read_rows, write_rows
from anysplade._common.progress import bar_within
from anysplade._common.row_file import RowFile
from anysplade.data.stored_corpus import StoredTexts
from anysplade.data.text import replace_surrogates
from anysplade.errors import ModelError, OptionError
from anysplade.model.batches import Budget, Rows, batch_budget, make_batches, sparse_rows, to_device
from anysplade.model.modules import term_names
from anysplade.model.options import OPEN_ENCODER, Role, checked_batch_tokens
from anysplade.model.own_words import PieceCounts
from anysplade.model.pruning import prune
from anysplade.model.queries import Cut
from anysplade.model.runtimes import runtime_of
from anysplade.model.tokenizing import TOKENIZING, TextReader, Tokens, count_truncated, limits_of

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")

_CHUNK = 4096  # texts per part, within which they are sorted by length
_SHARD = 1024  # texts per part if each part is stored in a file


class Encoded(NamedTuple):
    """Sparse vectors of texts."""

    matrix: sparse.csr_matrix  # float32, (texts, vocabulary); a large one is mapped from files
    cut: Cut  # how many texts are longer than what the model reads


def encode(
    encoder: SparseEncoder,
    texts: Sequence[str],
    role: Role,
    *,
    ids: Sequence[str] | None = None,
    top_k: int | None = None,
    batch_tokens: int | None = None,
    cache: Path | None = None,
    progress: bool = False,
    what: str | None = None,
    shown: Any = None,
) -> sparse.csr_matrix:
    """Sparse vectors of texts, in their order: float32, (texts, vocabulary).

    Texts of similar length go through the model together, as many as fit into a batch of tokens. Only the result and a few batches
    are in memory, never a dense matrix of all texts. Lone surrogates, which JSON can hold and tokenizers reject, are encoded as
    U+FFFD. Several threads may share one encoder.

    Args:
        encoder: any sparse encoder; ``for_inference`` makes one for another runtime or precision.
        texts: without the prompt of their role, which the encoder adds.
        role: the texts are queries or documents.
        ids: ids of the texts, to name one in an error; None numbers them from 1.
        top_k: keep only this many of the largest weights per text: an approximation.
        batch_tokens: tokens per batch, padding included; by default 1,024 on a CPU, and up to 65,536 on a GPU with enough memory.
        cache: a folder where the vectors of these texts by this model are stored, in parts of 1,024 texts; stored ones are not
            encoded again.
        progress: show progress.
        what: label of the progress, such as "encoding queries with MODEL".
        shown: a ``bar`` to update, instead of showing one.

    Raises:
        ModelError: the model gives a vector with NaN or infinity.
        OptionError: the arguments are no encoder, no list of texts, no role, or no number of tokens.
    """
    options = {"ids": ids, "batch_tokens": batch_tokens, "cache": cache, "progress": progress, "what": what, "shown": shown}
    matrix = _encode(encoder, texts, role, False, **options).matrix
    return matrix if top_k is None else prune(matrix, top_k)


def encode_counted(encoder: SparseEncoder, texts: Sequence[str], role: Role, **options: Any) -> Encoded:
    """``encode`` without ``top_k``, and ``count_truncated`` for the same texts, which are tokenized only once.

    The option ``pieces``, ``PieceCounts`` or None, also counts the texts' own pieces.
    """
    return _encode(encoder, texts, role, True, **options)


def _encode(
    encoder: SparseEncoder,
    texts: Sequence[str],
    role: Role,
    is_counted: bool,
    *,
    ids: Sequence[str] | None = None,
    batch_tokens: int | None = None,
    cache: Path | None = None,
    progress: bool = False,
    what: str | None = None,
    shown: Any = None,
    pieces: PieceCounts | None = None,
) -> Encoded:
    require("encoder", encoder, SparseEncoder, OPEN_ENCODER)
    texts = texts if isinstance(texts, StoredTexts) else require_texts(texts)
    if role not in get_args(Role):
        raise OptionError(f"`role` is {role!r}; give {' or '.join(map(repr, get_args(Role)))}")
    size = _CHUNK if cache is None else _SHARD

    def name(start: int, position: int) -> str:
        return f"text {start + position + 1}" if ids is None else repr(ids[start + position][:80])

    def part(start: int) -> Part:
        file = None if cache is None else cache / f"{start:012}.npz"
        return Part(file, texts[start : start + size], partial(name, start), None if file is None else read_rows(file))

    blocks: RowFile | list[sparse.csr_matrix] = RowFile() if is_counted else []
    cut = 0
    with bar_within(shown, what or f"encoding {role} texts", "text", len(texts), progress) as shown:
        parts = map(part, range(0, len(texts), size))
        encoded = encode_parts(encoder, parts, role, batch_tokens=batch_tokens, shown=shown, pieces=pieces)
        for (file, given, _, known), matrix, longer in encoded:
            if known is not None:
                shown.update(len(given))
            elif file is not None:
                write_rows(file, matrix)
            mark_used(cache)
            blocks.append(matrix)
            if is_counted:
                cut += count_known(encoder, given, matrix, role, None if known is None else pieces) if longer is None else longer
    width = encoder.get_embedding_dimension() or 0
    if isinstance(blocks, RowFile):
        whole = blocks.matrix(width)
    elif not blocks:
        whole = sparse.csr_matrix((0, width), dtype=np.float32)
    else:
        whole = blocks[0] if len(blocks) == 1 else sparse.vstack(blocks, format="csr")
    return Encoded(whole, limits_of(encoder, role)._replace(texts=cut) if is_counted else Cut(cut))


def count_known(
    encoder: SparseEncoder, texts: Sequence[str], matrix: sparse.csr_matrix, role: Role, pieces: PieceCounts | None
) -> int:
    """How many texts are longer than what the model reads; ``pieces`` counts their own pieces in the same pass."""
    tokens = None
    if pieces is not None:
        tokens = TextReader(encoder, role).read([replace_surrogates(text) for text in texts])
        pieces.add_tokens(matrix, tokens)
    return count_truncated(encoder, texts, role).texts if tokens is None or tokens.cut is None else tokens.cut


class Part(NamedTuple):
    """Texts that are encoded together."""

    tag: Any  # the caller's
    texts: Sequence[str]
    name: Callable[[int], str]  # of the text at a position, for an error
    known: sparse.csr_matrix | None = None  # their vectors, if there are any


def encode_parts(
    encoder: SparseEncoder,
    parts: Iterable[Part],
    role: Role,
    *,
    batch_tokens: int | None = None,
    shown: Any = None,
    pieces: PieceCounts | None = None,
) -> Iterator[tuple[Part, sparse.csr_matrix, int | None]]:
    """Encode part by part; a part's texts are tokenized while the model works on the part before.

    Args:
        parts: one more is read than is yielded.
        shown: a ``bar`` to update with the texts that are encoded.
        pieces: counts the own pieces of the texts that are encoded.

    Yields:
        Each part in its order, its vectors, and how many of its texts are longer than what the model reads; None if that was not
        counted, because the vectors are known or the encoder has its own tokenization.

    Raises:
        ModelError: the model gives a vector with NaN or infinity.
    """
    checked_batch_tokens(batch_tokens)
    budget = cache(partial(batch_budget, encoder, batch_tokens))
    if runtime_of(encoder) == "torch":  # other runtimes have no dropout
        encoder.eval()
    texts = TextReader(encoder, role)

    def read(part: Part) -> Tokens | None:
        return None if part.known is not None else texts.read([replace_surrogates(text) for text in part.texts])

    done: list[Rows] = []
    order: list[int] = []
    for (part, tokens, batch), rows in sparse_rows(_launched(encoder, ahead(parts, read), role, budget)):
        if rows is None:
            assert part.known is not None
            yield part, part.known, None
            continue
        if not rows.finite.all():
            name = part.name(int(batch[int(rows.finite.argmin())]))
            raise ModelError(f"the model gives NaN or infinity for {role} {name}; its training diverged")
        done.append(rows)
        order += batch.tolist()
        if shown is not None:
            shown.update(len(batch))
        if len(order) == len(part.texts):
            matrix = _in_order([rows.matrix for rows in done], order)
            if pieces is not None:
                pieces.add_tokens(matrix, tokens)
            yield part, matrix, tokens.cut
            done, order = [], []


def ahead(items: Iterable[Item], prepare: Callable[[Item], Prepared]) -> Iterator[tuple[Item, Prepared]]:
    """Items with what is prepared for them; a thread prepares the next one while the caller works on this one."""
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="preparing") as thread:
        for item in iterator:
            prepared = prepare(item)  # the first one: nothing else can be done meanwhile
            for following in iterator:
                waiting = thread.submit(prepare, following)
                yield item, prepared
                item, prepared = following, waiting.result()
            yield item, prepared


def require_texts(texts: Iterable[str]) -> list[str]:
    """The texts as a list.

    Raises:
        OptionError: a single text, or an item that is no text.
    """
    return require_list("texts", texts, "text")


def _launched(
    encoder: SparseEncoder, parts: Iterable[tuple[Part, Tokens | None]], role: Role, budget: Callable[[], Budget]
) -> Iterator[tuple[tuple[Part, Any, Any], Tensor | None]]:
    """Each part's tokens and the positions of its batches, with the dense vectors of the batch; None for vectors that are known."""
    for part, tokens in parts:
        if tokens is None:
            yield (part, None, None), None
            continue
        # A single query needs no budget, which asks the GPU for its free memory.
        batches = make_batches(tokens.lengths, budget()) if len(part.texts) > 1 else [np.zeros(1, np.int64)]
        for batch, features in ahead(batches, partial(_inputs, tokens, encoder.device)):
            yield (part, tokens, batch), _vectors(encoder, features, role)


def _inputs(tokens: Tokens, device: torch.device, batch: np.ndarray) -> dict[str, Any]:
    return to_device(tokens.batch(batch), device)


def _in_order(matrices: list[sparse.csr_matrix], order: list[int]) -> sparse.csr_matrix:
    return matrices[0] if len(order) == 1 else sparse.vstack(matrices, format="csr")[np.argsort(order)]


@torch.inference_mode()
def _vectors(encoder: SparseEncoder, features: dict[str, Any], role: Role) -> Tensor:
    most = encoder.max_active_dims
    options = {} if most is None else {"max_active_dims": most}
    vectors: Tensor = encoder(features, task=role, **options)["sentence_embedding"]
    return vectors if most is None else select_max_active_dims(vectors, max_active_dims=most)


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
        with TOKENIZING:
            found = read(replace_surrogates(text), return_offsets_mapping=True, truncation=True, add_special_tokens=special_tokens)
        return [(token, *span) for token, span in zip(found["input_ids"], found["offset_mapping"], strict=True)]

    @property
    def term_names(self) -> list[str]:
        return term_names(self.encoder)
