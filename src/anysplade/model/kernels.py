# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803 (constants of compilation are written in capitals)
"""Triton kernels of max pooling; ``kernel_pooling`` launches them.

``largest_logits`` multiplies hidden states and decoder and keeps the largest logit of each (text, term): no logit is written to
memory. In the backward pass each active (text, term) is an entry, whose gradient goes to one token and to one row of the decoder.
``count_entries``, ``list_by_token`` and ``list_by_term`` list the entries by block of tokens and by block of terms, always in the
same order; ``sum_entries`` computes the gradients of a block from its list. The work is proportional to the number of entries, the
host does not wait for that number, and every sum has a fixed order.
"""

import triton
import triton.language as tl


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, as exact as its logarithm: the quotient undoes the rounding of 1 + x."""
    added = (1.0 + x) - 1.0
    log = tl.log(1.0 + x)
    return tl.where((added == 0.0) | (x == float("inf")), tl.where(added == 0.0, x, log), log * (x / added))


@triton.jit
def larger(a, b):
    """The maximum, NaN if one of them is NaN, as in torch."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["texts", "length", "padded", "group"])
def largest_logits(
    hidden,  # (texts, length, width)
    weight,  # (vocabulary, width)
    bias,  # (vocabulary,) or None
    source,  # (texts, padded): the token that stands at each position; -1 in a text without tokens
    live,  # (terms,): ids of the terms that are computed; None for all
    pooled,  # (texts, terms)
    chosen,  # (texts, terms): the token with the largest logit; None if it is not needed
    texts,
    length,
    padded,  # a multiple of BLOCK_TOKENS
    terms,
    width,
    group,  # tiles of texts that share a tile of terms while it is in the cache
    LOGS: tl.constexpr,
    PRECISION: tl.constexpr,
    TEXTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_TERMS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
):
    """One tile of TEXTS texts and BLOCK_TERMS terms: a product for each block of tokens, and the maximum over all of them."""
    text_tiles, term_tiles = tl.cdiv(texts, TEXTS), tl.cdiv(terms, BLOCK_TERMS)
    of_group = group * term_tiles
    first_tile = tl.program_id(0) // of_group * group
    in_group = min(group, text_tiles - first_tile)
    inner = tl.program_id(0) % of_group
    text = (first_tile + inner % in_group) * TEXTS + tl.arange(0, TEXTS)
    term = inner // in_group * BLOCK_TERMS + tl.arange(0, BLOCK_TERMS)
    kept_term = tl.minimum(term, terms - 1)
    if live is not None:
        kept_term = tl.load(live + kept_term)
    kept_text = tl.minimum(text, texts - 1).to(tl.int64)
    from_width = tl.arange(0, BLOCK_WIDTH)
    weight_tile = weight + kept_term.to(tl.int64)[:, None] * width + from_width[None, :]

    best = tl.full((BLOCK_TERMS, TEXTS), -float("inf"), tl.float32)
    position = tl.zeros((BLOCK_TERMS, TEXTS), tl.int32)
    for start in range(0, padded, BLOCK_TOKENS):
        here = start + tl.arange(0, BLOCK_TOKENS)
        token = tl.load(source + kept_text[:, None] * padded + here[None, :])  # (TEXTS, BLOCK_TOKENS)
        if start == 0 or tl.max(token) >= start:  # otherwise all of it is padding
            row = tl.reshape(kept_text[:, None] * length + tl.maximum(token, 0), (TEXTS * BLOCK_TOKENS,))
            hidden_tile = hidden + row[None, :] * width + from_width[:, None]
            logits = tl.zeros((BLOCK_TERMS, TEXTS * BLOCK_TOKENS), tl.float32)
            for done in range(0, width, BLOCK_WIDTH):
                if EVEN_WIDTH:
                    left, right = tl.load(weight_tile + done), tl.load(hidden_tile + done)
                else:
                    inside = done + from_width < width
                    left = tl.load(weight_tile + done, mask=inside[None, :], other=0.0)
                    right = tl.load(hidden_tile + done, mask=inside[:, None], other=0.0)
                logits = tl.dot(left, right, logits, input_precision=PRECISION)
            logits = tl.reshape(logits, (BLOCK_TERMS, TEXTS, BLOCK_TOKENS))
            largest = tl.reduce(logits, 2, larger)
            if chosen is not None:  # the lowest of several tokens with the maximum; any token for NaN
                ties = tl.where(logits == largest[:, :, None], here[None, None, :], padded)
                position = tl.where((largest > best) | (largest != largest), tl.min(ties, axis=2), position)
            best = larger(best, largest)

    inside = (text[None, :] < texts) & (term[:, None] < terms)
    out = kept_text[None, :] * terms + term[:, None]
    if bias is not None:
        best += tl.load(bias + kept_term).to(tl.float32)[:, None]
    if LOGS > 0:
        empty = tl.load(source + kept_text * padded) < 0
        best = tl.where((best < 0.0) | empty[None, :], 0.0, best)  # NaN stays
    for _ in tl.static_range(LOGS):
        best = _log1p(best)
    tl.store(pooled + out, best.to(pooled.dtype.element_ty), mask=inside)
    if chosen is not None:
        position = tl.minimum(position, padded - 1)
        token = tl.load(source + kept_text[None, :] * padded + position)
        tl.store(chosen + out, tl.maximum(token, 0), mask=inside)


@triton.jit
def _through(gradient, result, LOGS: tl.constexpr):
    """Gradient of the largest logits, given that of the result: with y = log1p(x), dy/dx = exp(-y)."""
    gradient, result = gradient.to(tl.float32), result.to(tl.float32)
    if LOGS > 0:
        slope = tl.exp(-result)
        if LOGS > 1:
            slope *= tl.exp(1.0 - tl.exp(result))
        gradient *= slope * (result > 0.0).to(tl.float32)  # a product, so that NaN stays
    return gradient


@triton.jit
def _segment(gradient, result, chosen, live, text, terms, step_text, step_term, LOGS: tl.constexpr, SEGMENT: tl.constexpr):
    """Terms, gradients of the largest logits and tokens of one segment of a text."""
    term = tl.program_id(1) * SEGMENT + tl.arange(0, SEGMENT)
    inside = term < terms
    column = tl.load(live + term, mask=inside, other=0) if live is not None else term
    upstream = tl.load(gradient + text * step_text + column.to(tl.int64) * step_term, mask=inside, other=0.0)
    value = _through(upstream, tl.load(result + text * terms + term, mask=inside, other=0.0), LOGS)
    return column, value, tl.load(chosen + text * terms + term, mask=inside, other=0)


@triton.jit(do_not_specialize=["blocks"])
def count_entries(
    gradient,  # (texts, vocabulary), with its steps
    result,  # (texts, terms)
    chosen,  # (texts, terms)
    live,  # (terms,) or None
    counts,  # (texts, blocks, segments)
    terms,
    blocks,
    step_text,
    step_term,
    LOGS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The entries of one segment of a text's terms, for each block of its tokens."""
    text = tl.program_id(0).to(tl.int64)
    _, value, token = _segment(gradient, result, chosen, live, text, terms, step_text, step_term, LOGS, SEGMENT)
    block = tl.where(value != 0.0, token // BLOCK, blocks)
    for number in range(blocks):
        count = tl.sum((block == number).to(tl.int32))
        tl.store(counts + (text * blocks + number) * tl.num_programs(1) + tl.program_id(1), count)


@triton.jit(do_not_specialize=["blocks"])
def list_by_token(
    gradient,
    result,
    chosen,
    live,
    starts,  # (texts, blocks, segments): where the entries of each go
    rows,  # (entries,): term
    slots,  # (entries,): token within its block
    values,  # (entries,)
    terms,
    blocks,
    step_text,
    step_term,
    LOGS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """List the entries that ``count_entries`` counted, by token block, then by term."""
    text = tl.program_id(0).to(tl.int64)
    term, value, token = _segment(gradient, result, chosen, live, text, terms, step_text, step_term, LOGS, SEGMENT)
    block = tl.where(value != 0.0, token // BLOCK, blocks)
    for number in range(blocks):
        here = block == number
        start = tl.load(starts + (text * blocks + number) * tl.num_programs(1) + tl.program_id(1))
        place = start + tl.cumsum(here.to(tl.int32), 0) - 1
        tl.store(rows + place, term, mask=here)
        tl.store(slots + place, token - number * BLOCK, mask=here)
        tl.store(values + place, value, mask=here)


@triton.jit(do_not_specialize=["texts", "length"])
def list_by_term(
    gradient,
    result,
    chosen,
    live,
    rows,  # (term blocks, texts x BLOCK): row of the token among all tokens
    slots,  # (term blocks, texts x BLOCK): term within its block
    values,
    ends,  # (term blocks,): where each list ends; it starts at a multiple of texts x BLOCK
    to_bias,  # (vocabulary,) or None
    texts,
    length,
    terms,
    step_text,
    step_term,
    LOGS: tl.constexpr,
    TEXTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """List the entries of one block of terms by text, then by term, and sum the gradient of its bias."""
    slot = tl.arange(0, BLOCK)
    term = tl.program_id(0) * BLOCK + slot
    live_term = tl.load(live + term, mask=term < terms, other=0) if live is not None else term
    place = tl.program_id(0).to(tl.int64) * texts * BLOCK
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, texts, TEXTS):
        text = (start + tl.arange(0, TEXTS)).to(tl.int64)[:, None]
        inside = (text < texts) & (term < terms)[None, :]
        at = text * terms + term[None, :]
        upstream = tl.load(gradient + text * step_text + live_term.to(tl.int64)[None, :] * step_term, mask=inside, other=0.0)
        value = _through(upstream, tl.load(result + at, mask=inside, other=0.0), LOGS)  # (TEXTS, BLOCK)
        row = text * length + tl.load(chosen + at, mask=inside, other=0)
        total += tl.sum(value, axis=0)
        flat = tl.reshape(value, (TEXTS * BLOCK,))
        here = flat != 0.0
        order = tl.cumsum(here.to(tl.int32), 0) - 1
        tl.store(rows + place + order, tl.reshape(row, (TEXTS * BLOCK,)), mask=here)
        tl.store(slots + place + order, tl.arange(0, TEXTS * BLOCK) % BLOCK, mask=here)
        tl.store(values + place + order, flat, mask=here)
        place += tl.sum(here.to(tl.int32))
    tl.store(ends + tl.program_id(0), place)
    if to_bias is not None:
        tl.store(to_bias + live_term, total, mask=term < terms)


@triton.jit(do_not_specialize=["height"])
def sum_entries(
    out,  # (..., width)
    dense,  # (..., width)
    rows,  # row of ``dense`` of each entry
    slots,  # row within the block of each entry
    values,
    starts,  # (blocks,): where the list of each block starts and ends
    ends,
    live,  # (height,): the rows of ``out``, or None
    height,  # of the sequences of rows that are split into blocks
    width,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    """Rows of ``out``: the sum over the entries of value times row of ``dense``, as a product with a matrix of a one per entry."""
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    blocks = tl.cdiv(height, BLOCK)
    sequence, number = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    slot = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK_WIDTH), tl.float32)
    start, end = tl.load(starts + tl.program_id(0)), tl.load(ends + tl.program_id(0))
    for done in range(0, (end - start).to(tl.int32), BLOCK_ENTRIES):
        entry = start + done + tl.arange(0, BLOCK_ENTRIES)
        listed = entry < end
        row = tl.load(rows + entry, mask=listed, other=0).to(tl.int64)
        place = tl.load(slots + entry, mask=listed, other=0)
        value = tl.load(values + entry, mask=listed, other=0.0)
        right = tl.load(dense + row[:, None] * width + column[None, :], mask=listed[:, None] & (column < width)[None, :], other=0.0)
        left = tl.where(place[None, :] == slot[:, None], value[None, :], 0.0).to(right.dtype)  # (BLOCK, BLOCK_ENTRIES)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    local = number * BLOCK + slot
    inside = (local < height)[:, None] & (column < width)[None, :]
    row = sequence.to(tl.int64) * height + local
    if live is not None:
        row = tl.load(live + local, mask=local < height, other=0)
    tl.store(out + row.to(tl.int64)[:, None] * width + column[None, :], total.to(out.dtype.element_ty), mask=inside)
