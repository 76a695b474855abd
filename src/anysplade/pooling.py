"""SPLADE pooling fused with the vocabulary projection.

``max over tokens of log1p(relu(W h + b))`` without the (batch, length, vocabulary) logits: the
projection runs in tiles of the vocabulary, and of each tile only the maximum over the tokens is
kept, since the activation is monotone. Backward, each (sequence, term) touches the one token that
held its maximum, so both gradients are sparse products with at most batch x vocabulary entries
instead of dense ones with batch x length x vocabulary. Exact: outputs and gradients are those of
the unfused modules up to the order of float additions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

_TILE_BYTES = 4 * 2**20  # of logits at a time: about a core's share of the cache


def splade_max_pool(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, double_log: bool = False) -> Tensor:
    """SPLADE vectors from the hidden states before the decoder.

    Args:
        hidden: (batch, length, width).
        weight: (vocabulary, width).
        bias: (vocabulary,) or None.
        mask: (batch, length), nonzero where there is a token. A row without tokens pools to zeros.
        double_log: log1p twice, the activation of arXiv 2504.14839.

    Returns:
        (batch, vocabulary), at least 0. Where tokens tie for the maximum, one of them gets the gradient.
    """
    inputs = (hidden, weight, bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return _MaxPool.apply(*inputs, mask, double_log, keep)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, double_log: bool, keep: bool
    ) -> Tensor:
        batch, length, width = hidden.shape
        vocabulary = weight.shape[0]
        # Padding takes the place of its row's first token, which leaves every maximum as it is and
        # saves a pass over the logits to mask them.
        mask = mask.bool()
        position = torch.arange(length, device=hidden.device).expand(batch, length)
        source = torch.where(mask, position, mask.int().argmax(dim=1, keepdim=True))  # (batch, length)
        tokens = hidden.gather(1, source.unsqueeze(-1).expand(-1, -1, width)).reshape(-1, width)
        columns = tokens.T  # (width, batch x length)

        pooled = hidden.new_empty(vocabulary, batch)
        chosen = torch.empty(vocabulary if keep else 0, batch, dtype=torch.int32, device=hidden.device)
        tile = max(64, _TILE_BYTES // (4 * max(1, batch * length)))
        # One buffer for all tiles: fresh memory costs as much as the product itself.
        buffer = torch.mm(weight[:tile].to(columns.dtype), columns)
        for start in range(0, vocabulary, tile):
            end = min(vocabulary, start + tile)
            logits = torch.mm(weight[start:end].to(columns.dtype), columns, out=buffer[: end - start]) if start else buffer[:end]
            logits = logits.view(end - start, batch, length)  # tokens last: fast to reduce
            if keep:
                values, index = logits.max(dim=2)
                chosen[start:end] = index
            else:
                values = logits.amax(dim=2)
            pooled[start:end] = values
        if bias is not None:
            pooled += bias.to(pooled.dtype).unsqueeze(1)
        pooled.relu_().masked_fill_(~mask.any(dim=1), 0).log1p_()
        if double_log:
            pooled.log1p_()
        result = pooled.T.contiguous()  # (batch, vocabulary)
        if keep:
            ctx.save_for_backward(tokens, weight, bias, source, chosen, result)
            ctx.double_log = double_log
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, bias, source, chosen, result = ctx.saved_tensors
        batch, length = source.shape
        slope = torch.exp(-result)  # of log1p(x) at x, written with y = log1p(x): 1 / (1 + x) = exp(-y)
        if ctx.double_log:
            slope = slope * torch.exp(-torch.expm1(result))
        through = (gradient * slope * (result > 0)).T  # (vocabulary, batch)
        term, row = through.nonzero(as_tuple=True)  # sorted by term
        token = source[row, chosen[term, row].long()] + row * length
        values = through[term, row].to(tokens.dtype)
        to_hidden = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            order = token.argsort(stable=True)
            to_hidden = _sums(token[order], term[order], values[order], weight.to(tokens.dtype), len(tokens))
            to_hidden = to_hidden.view(batch, length, -1)
        if ctx.needs_input_grad[1]:
            to_weight = _sums(term, token, values, tokens, len(weight)).to(weight.dtype)
        if bias is not None and ctx.needs_input_grad[2]:
            to_bias = through.sum(dim=1).to(bias.dtype)
        return to_hidden, to_weight, to_bias, None, None, None


def _sums(rows: Tensor, columns: Tensor, values: Tensor, dense: Tensor, count: int) -> Tensor:
    """A sparse matrix of ``count`` rows, its entries sorted by row, times a dense one: (count, width).

    Each row is summed by itself and in order, so the result is the same every time, on a GPU too;
    half-precision products are summed in float32.
    """
    starts = torch.searchsorted(rows, torch.arange(count + 1, device=rows.device))
    return embedding_bag(columns, dense, starts, mode="sum", per_sample_weights=values, include_last_offset=True)
