"""One optimiser step of SPLADE training with random weights and ids: fused pooling, fused with the monitor, and stock modules."""

import sys
import tempfile
from types import SimpleNamespace

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
from sentence_transformers.sparse_encoder.modules import SpladePooling

from anysplade.model.fused import fuse_pooling, unfuse_pooling
from anysplade.training.monitoring import Monitor
from anysplade.training.observers import ObservedLoss
from backbones import GEOMETRIES, save_backbone
from harness import alternate, finish, memory, parser, peak_extra_bytes, ratio, spread


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--geometry", default="ettin-17m", choices=GEOMETRIES)
    arguments.add_argument("--batch", type=int, default=16, help="queries per step; each has one document of the same length")
    arguments.add_argument("--length", type=int, default=128)
    arguments.add_argument("--gradient-checkpointing", action="store_true")
    arguments.add_argument("--only-fused", action="store_true", help="leave the stock modules out if they do not fit")
    options = arguments.parse_args()
    dtype, device = getattr(torch, options.dtype), options.device

    with tempfile.TemporaryDirectory() as folder:
        save_backbone(options.geometry, folder)
        transformer = Transformer(folder, transformer_task="fill-mask")
    encoder = SparseEncoder(modules=[transformer, SpladePooling("max")], similarity_fn_name="dot", device=device).to(dtype).train()
    if options.gradient_checkpointing:
        transformer.model.activation_checkpointing_enable()
    ranking = SparseMultipleNegativesRankingLoss(encoder)
    loss = SpladeLoss(encoder, ranking, document_regularizer_weight=1e-3, query_regularizer_weight=1e-3)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-6)
    torch.manual_seed(0)
    vocabulary = transformer.model.config.vocab_size

    def features() -> dict[str, torch.Tensor]:
        ids = torch.randint(5, vocabulary, (options.batch, options.length), device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    batch = [features(), features()]

    monitor = Monitor(vocabulary)
    loss.loss = ObservedLoss(ranking, monitor.see)
    state = SimpleNamespace(global_step=0, max_steps=1, stateful_callbacks={})
    monitor.on_train_begin(None, state, None)

    def step(fused: bool, monitored: bool = False) -> None:
        if monitored:
            monitor.on_step_begin(None, state, None)
        (fuse_pooling if fused else unfuse_pooling)(encoder)
        optimizer.zero_grad()
        losses = loss([dict(columns) for columns in batch], None)
        sum(losses.values()).backward() if isinstance(losses, dict) else losses.backward()
        optimizer.step()
        if monitored:
            monitor.on_step_end(None, state, SimpleNamespace())

    variants = {"fused": lambda: step(True), "fused, monitored": lambda: step(True, True)}
    if not options.only_fused:
        variants["stock"] = lambda: step(False)
    times = alternate(variants, options.rounds, device)
    optimizer.zero_grad()
    extra = {name: peak_extra_bytes(variant, device) for name, variant in variants.items() if not optimizer.zero_grad()}
    for name, size in extra.items():
        more = f"{size / 2**20:,.0f} MiB above weights and optimiser state"
        print(f"{name:<16} {spread(times[name])} s per step   {more}", file=sys.stderr)
    ratios = {"monitored / not": ratio(times, "fused, monitored", "fused")}
    if "stock" in variants:
        ratios |= {"stock / fused": ratio(times, "stock", "fused"), "fused / stock, peak memory": extra["fused"] / extra["stock"]}
    print(ratios, file=sys.stderr)
    peak = memory("VmHWM")
    print(f"peak memory of the process: {peak / 2**30:.2f} GiB", file=sys.stderr)
    finish("training", options, {"seconds": times, "peak_extra_bytes": extra, "ratios": ratios, "process_peak_bytes": peak})


if __name__ == "__main__":
    main()
