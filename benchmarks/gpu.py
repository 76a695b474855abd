"""One check for a machine with a GPU, in under four minutes: is everything right there, and how fast is it?

Vectors and gradients are compared with the CPU's, then the head, a training step, encoding and one query are measured beside
sentence-transformers at its best batch size. Prints a table, and writes results/gpu-CARD.json. ``--small`` takes sizes that a CPU
can run in seconds, to test this script.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SparseEncoder

import pooling
import training
from anysplade.model.encoding import encode
from anysplade.model.fused import unfuse_pooling
from anysplade.model.pooling import splade_pool
from backbones import GEOMETRIES, random_texts, save_backbone, sparse_encoder
from harness import alternate, finish, parser, summary, synchronize

Row = tuple[str, str, str, str]  # what is measured, ours, the peer's, the ratio


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--small", action="store_true", help="sizes for a CPU")
    arguments.set_defaults(dtype="bfloat16")
    options = arguments.parse_args()
    started = time.perf_counter()
    card = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    if options.out is None:
        options.out = Path("results") / f"gpu-{card.lower().replace(' ', '-')}.json"
    dtype = getattr(torch, options.dtype)
    result: dict[str, Any] = {"card": card}
    rows: list[Row] = []
    for part in (correctness, head, step, encoding):
        result[part.__name__] = {}
        for row, record in part(options, dtype):
            rows.append(row)
            result[part.__name__][row[0]] = record
            print(
                "  ".join(f"{cell:<{width}}" for cell, width in zip(row, (64, 22, 26, 8), strict=True)), file=sys.stderr, flush=True
            )
    result["seconds"] = time.perf_counter() - started
    print(f"{card}: {result['seconds']:.0f} s", file=sys.stderr)
    finish("gpu", options, result)


def correctness(options: Any, dtype: torch.dtype) -> Iterator[tuple[Row, Any]]:
    """Vectors and gradients of the head against the CPU's in float64, and again on the device: bit-equal."""
    batch, length, width, vocabulary = (4, 9, 32, 500) if options.small else (16, 128, 768, 50_368)
    torch.manual_seed(0)
    hidden, weight = torch.randn(batch, length, width), torch.randn(vocabulary, width) / width**0.5
    mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).long()
    for active in (0.02, 1.0):
        bias = pooling.max_logits(hidden, weight, None, mask).flatten()[:: max(1, batch * vocabulary // 2**20)]
        shift = torch.full((vocabulary,), 1e-3 - bias.quantile(1 - active).item())
        upstream = torch.randn(batch, vocabulary)
        for kind in (torch.float32, dtype):
            # Rounded first, so that only the arithmetic differs.
            given = [tensor.to(kind) for tensor in (hidden, weight, shift, upstream)]
            expected = run_head("cpu", [tensor.double() for tensor in given], mask)
            got, again = (run_head(options.device, given, mask) for _ in range(2))
            errors = [
                float((ours.double().cpu() - right).norm() / right.norm().clamp(min=1e-30))
                for ours, right in zip(got, expected, strict=True)
            ]
            same = all(torch.equal(first, second) for first, second in zip(got, again, strict=True))
            name = f"head, {str(kind).removeprefix('torch.')}, {active:.0%} active: relative error, vectors and gradients"
            yield (
                (name, f"{errors[0]:.1e}, {max(errors[1:]):.1e}", "bit-equal on repeat" if same else "DIFFERS ON REPEAT", ""),
                [*errors, same],
            )


def run_head(device: str, given: list[torch.Tensor], mask: torch.Tensor) -> list[torch.Tensor]:
    """The vectors, and the gradients of hidden states, weight and bias."""
    *inputs, upstream = (tensor.to(device, copy=True) for tensor in given)
    out = splade_pool(*(tensor.requires_grad_() for tensor in inputs), mask.to(device))
    out.backward(upstream)
    return [out.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


def head(options: Any, dtype: torch.dtype) -> Iterator[tuple[Row, Any]]:
    sizes = [(64, 128, 768, 50_368), (16, 128, 768, 250_002)] if not options.small else [(2, 8, 32, 500)]
    for shape in sizes:
        for active in (0.02, 1.0) if shape == sizes[0] else (0.02,):
            record = pooling.measure(shape, active, dtype, options.device, options.rounds)
            seconds = record["seconds"]
            both = {
                name: seconds[f"{name} forward"]["median"] + seconds[f"{name} backward"]["median"]
                for name in record["peak_extra_bytes"]
            }
            for peer in (name for name in both if name != "fused"):
                title = f"head {shape[0]} x {shape[1]} x {shape[3]:,}, {active:.0%} active, against {peer}"
                yield (
                    (title, f"{1000 * both['fused']:.2f} ms", f"{1000 * both[peer]:.2f} ms", f"{both[peer] / both['fused']:.2f}"),
                    record,
                )
            product = seconds["bare product"]["median"]
            forward = seconds["fused forward"]["median"]
            title = f"head {shape[0]} x {shape[1]} x {shape[3]:,}, {active:.0%} active, forward against the product"
            yield (title, f"{1000 * forward:.2f} ms", f"{1000 * product:.2f} ms", f"{product / forward:.2f}"), record["ratios"]


def step(options: Any, dtype: torch.dtype) -> Iterator[tuple[Row, Any]]:
    geometries, shape = (("bert-base", "ettin-17m"), (64, 128)) if not options.small else (("bert-tiny",), (2, 8))
    for geometry in geometries:
        for active in (0.02, 1.0):
            record = training.measure(geometry, shape, active, dtype, options.device, options.rounds)
            ours, theirs = (1000 * record["seconds"][name]["median"] for name in ("fused", "stock"))
            title = f"training step, {geometry}, batch {shape[0]} + {shape[0]}, {active:.0%} active"
            yield (title, f"{ours:.1f} ms", f"{theirs:.1f} ms", f"{theirs / ours:.2f}"), record


def encoding(options: Any, dtype: torch.dtype) -> Iterator[tuple[Row, Any]]:
    """Texts of 128 tokens with 150 active dims, and one query of 12 tokens; random weights, since speed does not depend on them."""
    geometries, count = (("bert-base", "minilm", "bert-tiny"), 16_384) if not options.small else (("bert-tiny",), 32)
    for geometry in geometries:
        with tempfile.TemporaryDirectory() as folder:
            backbone = save_backbone(geometry, Path(folder) / "backbone")
            vocabulary = GEOMETRIES[geometry][1].vocab_size
            texts = random_texts([126] * count, vocabulary)
            ours, theirs = (sparse_encoder(backbone, texts[:20], 150, options.device).to(options.device, dtype) for _ in range(2))
            unfuse_pooling(theirs)
        peers = {size: stock(theirs, texts[: count // 4], size) for size in ((128, 512, 1024) if not options.small else (8,))}
        trial = alternate({str(size): run for size, run in peers.items()}, 1, options.device)
        best = min(peers, key=lambda size: trial[str(size)]["median"])
        variants = {"anysplade": partial(encode, ours, texts, "document"), "stock": stock(theirs, texts, best)}
        seconds = alternate(variants, max(1, options.rounds // 2), options.device)
        rate = {name: count / taken["median"] for name, taken in seconds.items()}
        title = f"encoding, {geometry}, 128 tokens (peer: batch {best})"
        ratio = rate["anysplade"] / rate["stock"]
        yield (title, f"{rate['anysplade']:,.0f} texts/s", f"{rate['stock']:,.0f} texts/s", f"{ratio:.2f}"), seconds
        queries = random_texts([10] * 23, vocabulary, seed=1)
        one = {
            "anysplade": latencies(lambda query, model=ours: encode(model, [query], "query"), queries, options.device),
            "stock": latencies(
                lambda query, model=theirs: model.encode_query([query], show_progress_bar=False), queries, options.device
            ),
        }
        mine, peer = (1000 * one[name]["median"] for name in ("anysplade", "stock"))
        yield (f"one query, {geometry}", f"{mine:.2f} ms", f"{peer:.2f} ms", f"{peer / mine:.2f}"), one


def stock(model: SparseEncoder, texts: list[str], batch_size: int) -> Callable[[], Any]:
    return lambda: model.encode_document(texts, batch_size=batch_size, show_progress_bar=False, save_to_cpu=True)


def latencies(run: Callable[[str], Any], queries: list[str], device: str) -> dict[str, float]:
    """Seconds per query; the first three warm up."""
    times = []
    for query in queries:
        start = time.perf_counter()
        run(query)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return summary(times[3:])


if __name__ == "__main__":
    main()
