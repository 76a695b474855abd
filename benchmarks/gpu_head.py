"""The SPLADE head on a GPU: stock modules, plain and compiled, fused pooling with torch and with Triton, and the bare product.

``--tiles`` measures the kernels with other tiles.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor, nn

from anysplade.model.pooling import PoolOptions, _MaxPool
from harness import alternate, finish, parser, peak_extra_bytes
from pooling import set_active


class Case(NamedTuple):
    batch: int
    length: int
    width: int
    vocabulary: int
    active: float  # share of the pooled entries above zero


# At 128 tokens a gradient of all terms costs the kernels about a dense product; below 64 tokens it costs more, because their work
# grows with the entries and not with the tokens. The third pair of cases measures where dense products would be faster.
CASES = [
    Case(batch, length, 768, vocabulary, active)
    for batch, length, vocabulary in ((64, 128, 50_368), (16, 128, 250_002), (64, 32, 50_368))
    for active in (0.02, 1.0)
]


class Head:
    """Inputs of a case, and each way of computing it."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> None:
        torch.manual_seed(0)
        batch, length, width, vocabulary, active = case
        self.device = device
        self.hidden = torch.randn(batch, length, width, device=device, dtype=dtype)
        self.decoder = nn.Linear(width, vocabulary, device=device, dtype=dtype)
        self.mask = torch.ones(batch, length, dtype=torch.long, device=device)
        self.upstream = torch.randn(batch, vocabulary, device=device, dtype=dtype)
        set_active(self.decoder, self.hidden, self.mask, active)
        self.hidden.requires_grad_()
        self.kept: dict[str, Tensor] = {}
        pooling = SpladePooling("max").train()

        def stock() -> Tensor:
            return pooling({"token_embeddings": self.decoder(self.hidden), "attention_mask": self.mask})["sentence_embedding"]

        self.variants: dict[str, Callable[[], Tensor]] = {"stock": stock, "fused (torch)": lambda: self.fused(_MaxPool)}
        if device == "cuda":
            from anysplade.model.kernel_pooling import KernelMaxPool

            torch._dynamo.reset()  # otherwise the second case is compiled for any shape
            self.variants["compiled"] = torch.compile(stock, dynamic=False)
            self.variants["fused (Triton)"] = lambda: self.fused(KernelMaxPool)

    def fused(self, function: type[torch.autograd.Function]) -> Tensor:
        options = PoolOptions(1, self.hidden.dtype, True, None)
        return function.apply(self.hidden, self.decoder.weight, self.decoder.bias, self.mask, options)

    def forward(self, name: str) -> None:
        self.kept.pop(name, None)
        self.kept[name] = self.variants[name]()

    def backward(self, name: str) -> None:
        self.hidden.grad = self.decoder.weight.grad = self.decoder.bias.grad = None
        self.kept.pop(name).backward(self.upstream)

    def both(self, name: str) -> None:
        self.forward(name)
        self.backward(name)

    def product(self) -> Callable[[], Tensor]:
        weight, columns = self.decoder.weight.detach(), self.hidden.detach().flatten(0, 1).T
        out = weight.new_empty(len(weight), columns.shape[1])
        return lambda: torch.mm(weight, columns, out=out)


def measure_head(case: Case, rounds: int = 20, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> dict[str, Any]:
    """Seconds of forward and backward of each variant and of the bare product, peak memory of both, and the share of active terms.

    ``relative error`` is that of each fused variant's result and gradients against stock modules in float32.
    """
    head = Head(case, dtype, device)
    memory, errors = {}, compare(head)
    for name in head.variants:
        head.both(name)  # compiles
        head.hidden.grad = head.decoder.weight.grad = head.decoder.bias.grad = None
        memory[name] = peak_extra_bytes(lambda name=name: head.both(name), device)
    steps: dict[str, Callable[[], Any]] = {"bare product": head.product()}
    for name in head.variants:
        steps[f"{name} forward"] = lambda name=name: head.forward(name)
        steps[f"{name} backward"] = lambda name=name: head.backward(name)
    seconds = alternate(steps, rounds, device)
    with torch.no_grad():
        active = float((head.variants["fused (torch)"]() > 0).float().mean())
    return {"case": case._asdict(), "seconds": seconds, "peak_extra_bytes": memory, "relative error": errors, "active": active}


def compare(head: Head) -> dict[str, list[float]]:
    """Relative error of the result and of the gradients of hidden, weight and bias, on the first texts and terms."""
    texts, terms = 2, 4096
    inputs = (head.hidden[:texts], head.decoder.weight[:terms], head.decoder.bias[:terms])
    upstream = head.upstream[:texts, :terms]

    def results(function: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(kind).requires_grad_() for t in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(kind))]

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (hidden @ weight.T + bias).amax(dim=1).relu().log1p()

    exact = results(plain, torch.float32)
    functions: dict[str, Any] = {"fused (torch)": _MaxPool}
    if head.device == "cuda":
        from anysplade.model.kernel_pooling import KernelMaxPool

        functions["fused (Triton)"] = KernelMaxPool
    options = PoolOptions(1, head.hidden.dtype, True, None)
    errors = {}
    for name, function in functions.items():
        found = results(lambda *leaves, function=function: function.apply(*leaves, head.mask[:texts], options), head.hidden.dtype)
        errors[name] = [float((a.float() - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(found, exact, strict=True)]
    return errors


def measure_tiles(case: Case, rounds: int = 10) -> dict[str, Any]:
    """Seconds of the kernels' forward and backward pass with other tiles. A tile that does not fit on the GPU has its error."""
    from anysplade.model import kernel_pooling
    from anysplade.model.kernel_pooling import Tile

    forward = [
        Tile(128, t, w, n, s)
        for t, w, n, s in ((256, 64, 8, 3), (256, 64, 8, 4), (128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 8, 4))
    ]
    forward += [Tile(256, 128, 64, 8, 3), Tile(64, 256, 64, 8, 4)]
    backward = [
        Tile(e, 64, w, n, s) for e, w, n, s in ((64, 128, 4, 4), (64, 128, 4, 5), (64, 256, 8, 4), (32, 128, 4, 5), (64, 64, 4, 5))
    ]
    head, found = Head(case), {}
    for attribute, tiles in (("tile", forward), ("gradient_tile", backward)):
        for tile in tiles:
            name = f"{'backward' if attribute == 'gradient_tile' else 'forward'} {tuple(tile)}"
            with replaced(kernel_pooling, attribute, lambda tensor, tile=tile: tile):
                try:
                    head.both("fused (Triton)")
                except Exception as error:  # more shared memory than the GPU has
                    found[name] = str(error)[:100]
                    continue
                steps = {step: lambda step=step: getattr(head, step)("fused (Triton)") for step in ("forward", "backward")}
                found[name] = alternate(steps, rounds, "cuda")[name.split()[0]]
    return {"case": case._asdict(), "seconds": found}


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tiles", action="store_true", help="measure other tiles of the kernels instead")
    arguments.set_defaults(dtype="bfloat16", rounds=20)
    options = arguments.parse_args()
    results = []
    for case in CASES:
        if options.tiles:
            result = measure_tiles(case, options.rounds)
        else:
            result = measure_head(case, options.rounds, getattr(torch, options.dtype), options.device)
        rows = [
            f"{name:<28} " + (t if isinstance(t, str) else f"{1e3 * t['median']:8.3f} ms") for name, t in result["seconds"].items()
        ]
        print(case, *rows, sep="\n", file=sys.stderr)
        results.append(result)
    finish("gpu_head", options, {"cases": results})


if __name__ == "__main__":
    main()
