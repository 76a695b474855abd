"""Forward and backward pass of the SPLADE head: fused, sentence-transformers' modules, and the bare matrix product."""

import sys
from typing import Any

import torch
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import nn

from anysplade.model.pooling import max_logits, splade_pool
from harness import alternate, finish, parser, peak_extra_bytes, ratio, spread


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--length", type=int, default=128)
    arguments.add_argument("--width", type=int, default=768)
    arguments.add_argument("--vocabulary", type=int, default=50_368)
    arguments.add_argument("--active", type=float, default=1.0, help="share of the pooled entries above zero")
    arguments.add_argument("--only-fused", action="store_true", help="leave the stock modules out if they do not fit")
    options = arguments.parse_args()
    shape = (options.batch, options.length, options.width, options.vocabulary)
    result = measure(shape, options.active, getattr(torch, options.dtype), options.device, options.rounds, not options.only_fused)
    rows = [f"{name:<18} {spread(taken)} s" for name, taken in result["seconds"].items()]
    rows += [f"{name:<18} {size / 2**20:8.0f} MiB at most, without the inputs" for name, size in result["peak_extra_bytes"].items()]
    rows += [f"{name:<36} {value:.2f}" for name, value in result["ratios"].items()]
    print("\n".join(rows), file=sys.stderr)
    finish("pooling", options, result)


def measure(
    shape: tuple[int, int, int, int], active: float, dtype: torch.dtype, device: str, rounds: int, stock: bool = True
) -> dict[str, Any]:
    """Seconds and peak memory of the head for a (batch, length, width, vocabulary), with a share of pooled entries above zero."""
    batch, length, width, vocabulary = shape
    torch.manual_seed(0)
    hidden = torch.randn(batch, length, width, device=device, dtype=dtype)
    decoder = nn.Linear(width, vocabulary, device=device, dtype=dtype)
    mask = torch.ones(batch, length, dtype=torch.long, device=device)
    upstream = torch.randn(batch, vocabulary, device=device, dtype=dtype)
    set_active(decoder, hidden, mask, active)
    modules = SpladePooling("max").train()

    def forward_stock() -> torch.Tensor:
        return modules({"token_embeddings": decoder(hidden), "attention_mask": mask})["sentence_embedding"]

    def forward_fused() -> torch.Tensor:
        return splade_pool(hidden, decoder.weight, decoder.bias, mask)

    columns = hidden.reshape(-1, width).T.contiguous()
    out = torch.empty(vocabulary, columns.shape[1], device=device, dtype=dtype)
    variants = {"fused": forward_fused}
    if stock:
        variants["stock"] = forward_stock
        if device == "cuda":
            variants["compiled"] = torch.compile(forward_stock)
    kept: dict[str, torch.Tensor] = {}

    def run_forward(name: str) -> None:
        kept.pop(name, None)
        kept[name] = variants[name]()

    def run_backward(name: str) -> None:
        hidden.grad = decoder.weight.grad = decoder.bias.grad = None
        kept.pop(name).backward(upstream)

    hidden.requires_grad_()
    steps = {"bare product": lambda: torch.mm(decoder.weight.detach(), columns.detach(), out=out)}
    for name in variants:
        steps[f"{name} forward"] = lambda name=name: run_forward(name)
        steps[f"{name} backward"] = lambda name=name: run_backward(name)
    times = alternate(steps, rounds, device)

    memory: dict[str, int] = {}
    for name in variants:

        def both(name: str = name) -> None:
            run_forward(name)
            run_backward(name)

        hidden.grad = decoder.weight.grad = decoder.bias.grad = None
        memory[name] = peak_extra_bytes(both, device)
    with torch.no_grad():
        share = float((forward_fused() > 0).float().mean())
    ratios = {
        "forward / product": ratio(times, "fused forward", "bare product"),
        "backward / product": ratio(times, "fused backward", "bare product"),
    }
    for name in variants:
        if name != "fused":
            both_ways = [times[f"{n} forward"]["median"] + times[f"{n} backward"]["median"] for n in (name, "fused")]
            ratios[f"{name} / fused, forward + backward"] = both_ways[0] / both_ways[1]
            ratios[f"fused / {name}, peak memory"] = memory["fused"] / memory[name]
    return {"seconds": times, "peak_extra_bytes": memory, "ratios": ratios, "active": share}


@torch.no_grad()
def set_active(decoder: nn.Linear, hidden: torch.Tensor, mask: torch.Tensor, share: float) -> None:
    """Set the decoder's bias so that a share of the pooled entries is above zero."""
    maxima = max_logits(hidden.float(), decoder.weight.float(), None, mask).flatten()
    level = maxima[:: max(1, maxima.numel() // 2**20)].quantile(1 - share).item()
    decoder.bias.fill_(10.0 if share == 1 else -level)


if __name__ == "__main__":
    main()
