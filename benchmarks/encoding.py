"""Texts a second of a corpus of mixed lengths: ours, and sentence-transformers' ``encode`` at its best batch size."""

import random
import sys
import tempfile
from pathlib import Path

import torch
from sentence_transformers import SparseEncoder

from anysplade import load_encoder
from anysplade.model.encoding import encode, in_precision
from backbones import GEOMETRIES, random_texts, save_backbone
from harness import alternate, finish, parser, peak_extra_bytes


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--geometry", default="ettin-17m", choices=GEOMETRIES)
    arguments.add_argument("--texts", type=int, default=200)
    arguments.add_argument("--active-dims", type=int, default=150, help="of a text, as a trained model has them")
    arguments.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="tried by sentence-transformers")
    options = arguments.parse_args()
    generator = random.Random(0)
    # Passages as collections have them: half of them shorter than 90 tokens, a few up to the limit.
    lengths = [max(3, min(510, round(generator.lognormvariate(4.5, 0.7)))) for _ in range(options.texts)]

    with tempfile.TemporaryDirectory() as folder:
        backbone = save_backbone(options.geometry, Path(folder) / "backbone")
        raw = load_encoder(backbone, k=1, shift=0)
        texts = random_texts(lengths, raw.get_embedding_dimension() or 0)
        pooled = torch.expm1(raw.encode(texts[:20], convert_to_sparse_tensor=False)).flatten()
        shift = pooled.topk(20 * options.active_dims).values[-1].item()
        encoder = load_encoder(backbone, k=1, shift=shift)
        encoder.save_pretrained(f"{folder}/encoder")
        stock = SparseEncoder(f"{folder}/encoder", device=options.device)
    encoder.to(options.device)
    half = options.dtype == "bfloat16"
    chosen = in_precision(encoder, options.dtype)
    if half:
        stock.bfloat16()

    def ours() -> None:
        encode(chosen, texts, "document")

    def theirs(batch_size: int) -> None:
        stock.encode_document(texts, batch_size=batch_size, show_progress_bar=False)

    variants = {"anysplade": ours}
    for size in options.batch_sizes:
        variants[f"sentence-transformers, batch {size}"] = lambda size=size: theirs(size)
    times = alternate(variants, options.rounds, options.device)
    best = min((name for name in times if name != "anysplade"), key=lambda name: times[name]["median"])
    memory = {name: peak_extra_bytes(variants[name], options.device) for name in ("anysplade", best)}
    active = encode(encoder, texts, "document").nnz / len(texts)
    result = {
        "seconds": times,
        "texts_per_second": {name: len(texts) / t["median"] for name, t in times.items()},
        "best": best,
        "ratio": times[best]["median"] / times["anysplade"]["median"],
        "peak_extra_bytes": memory,
        "tokens": sum(lengths) + 2 * len(texts),
        "document_active_dims": active,
    }
    for name, rate in result["texts_per_second"].items():
        print(
            f"{name:<36} {rate:8.1f} texts/s   {len(texts) / times[name]['highest']:.1f} to "
            f"{len(texts) / times[name]['lowest']:.1f}",
            file=sys.stderr,
        )
    print(f"ratio to its best: {result['ratio']:.2f}; peak memory {memory}", file=sys.stderr)
    finish("encoding", options, result)


if __name__ == "__main__":
    main()
