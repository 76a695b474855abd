"""One optimiser step of SPLADE training with random weights and ids: fused pooling, fused with the monitor, and stock modules."""

import sys
import tempfile
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
from sentence_transformers.sparse_encoder.modules import SpladePooling

from anysplade.model.fused import fuse_pooling, hidden_states
from anysplade.training.monitoring import Monitor
from anysplade.training.observers import ObservedLoss
from backbones import GEOMETRIES, save_backbone
from harness import alternate, finish, memory, parser, peak_extra_bytes, ratio, spread
from pooling import set_active


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--geometry", default="ettin-17m", choices=GEOMETRIES)
    arguments.add_argument("--batch", type=int, default=16, help="queries per step; each has one document of the same length")
    arguments.add_argument("--length", type=int, default=128)
    arguments.add_argument("--active", type=float, help="share of the terms above zero; that of the random head by default")
    arguments.add_argument("--gradient-checkpointing", action="store_true")
    arguments.add_argument("--only-fused", action="store_true", help="leave the stock modules out if they do not fit")
    options = arguments.parse_args()
    result = measure(
        options.geometry,
        (options.batch, options.length),
        options.active,
        getattr(torch, options.dtype),
        options.device,
        options.rounds,
        stock=not options.only_fused,
        checkpointing=options.gradient_checkpointing,
    )
    for name, size in result["peak_extra_bytes"].items():
        more = f"{size / 2**20:,.0f} MiB above weights and optimiser state"
        print(f"{name:<16} {spread(result['seconds'][name])} s per step   {more}", file=sys.stderr)
    print(result["ratios"], file=sys.stderr)
    result["process_peak_bytes"] = memory("VmHWM")
    print(f"peak memory of the process: {result['process_peak_bytes'] / 2**30:.2f} GiB", file=sys.stderr)
    finish("training", options, result)


def measure(
    geometry: str,
    shape: tuple[int, int],
    active: float | None,
    dtype: torch.dtype,
    device: str,
    rounds: int,
    stock: bool = True,
    checkpointing: bool = False,
) -> dict[str, Any]:
    """Seconds and peak memory of a step on a (batch, length) of queries and one of documents."""
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(geometry, folder)
        transformer = Transformer(folder, transformer_task="fill-mask")
    model = transformer.to(device=device, dtype=dtype).train().model
    if checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device == "cuda")
    torch.manual_seed(0)
    vocabulary = model.config.vocab_size

    def features() -> dict[str, torch.Tensor]:
        ids = torch.randint(5, vocabulary, shape, device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    batch = [features(), features()]
    if active is not None:
        with torch.no_grad():
            hidden = hidden_states(model, **batch[0])
        set_active(model.get_output_embeddings(), hidden, batch[0]["attention_mask"], active)

    monitor = Monitor(vocabulary)
    state = SimpleNamespace(global_step=0, max_steps=1, stateful_callbacks={})
    monitor.on_train_begin(None, state, None)

    def make_loss(fused: bool) -> SpladeLoss:
        """The loss of an encoder of its own, which shares the weights."""
        encoder = SparseEncoder(modules=[transformer, SpladePooling("max")], similarity_fn_name="dot", device=device)
        if fused and not fuse_pooling(encoder):
            raise SystemExit("the pooling is not fused")
        ranking = SparseMultipleNegativesRankingLoss(encoder)
        loss = SpladeLoss(encoder, ranking, document_regularizer_weight=1e-3, query_regularizer_weight=1e-3)
        loss.loss = ObservedLoss(ranking, monitor.see)
        return loss

    def step(loss: SpladeLoss, monitored: bool = False) -> None:
        if monitored:
            monitor.on_step_begin(None, state, None)
        optimizer.zero_grad()
        losses = loss([dict(columns) for columns in batch], None)
        sum(losses.values()).backward() if isinstance(losses, dict) else losses.backward()
        optimizer.step()
        if monitored:
            state.global_step += 1
            monitor.on_step_end(None, state, SimpleNamespace())

    fused = make_loss(True)
    variants = {"fused": lambda: step(fused), "fused, monitored": lambda: step(fused, True)}
    if stock:
        variants["stock"] = partial(step, make_loss(False))
    times = alternate(variants, rounds, device)
    optimizer.zero_grad()
    extra = {name: peak_extra_bytes(variant, device) for name, variant in variants.items() if not optimizer.zero_grad()}
    ratios = {"monitored / not": ratio(times, "fused, monitored", "fused")}
    if stock:
        ratios |= {"stock / fused": ratio(times, "stock", "fused"), "fused / stock, peak memory": extra["fused"] / extra["stock"]}
    return {"seconds": times, "peak_extra_bytes": extra, "ratios": ratios}


if __name__ == "__main__":
    main()
