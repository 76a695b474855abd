"""Documents per second and milliseconds per query: our runtimes, and sentence-transformers' backends at their best batch size.

All run in one process, with the same number of threads, in turns. Weights are random, since speed does not depend on them, and the
level of the head is shifted so that a text has as many active dims as with a trained model. sentence-transformers' OpenVINO backend
is included if optimum-intel is installed.
"""

import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SparseEncoder

from anysplade.model.encoding import encode
from anysplade.model.options import Precision, Role, Runtime
from anysplade.model.runtimes import for_inference
from backbones import GEOMETRIES, random_texts, save_backbone, sparse_encoder
from harness import alternate, finish, parser, peak_extra_bytes, peaks

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
HINTS = {"float32": "f32", "bfloat16": "bf16"}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--geometry", default="ettin-17m", choices=GEOMETRIES)
    arguments.add_argument("--texts", type=int, default=128)
    arguments.add_argument("--tokens", type=int, default=128, help="after which a text is cut")
    arguments.add_argument("--queries", type=int, default=20)
    arguments.add_argument("--query-tokens", type=int, default=12, help="including two special ones")
    arguments.add_argument("--active-dims", type=int, default=150, help="per text, as with a trained model")
    arguments.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 32], help="tried by sentence-transformers")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--memory-texts", type=int, default=0, help="also measure the peak memory of encoding this many texts")
    arguments.add_argument("--exact-texts", type=int, default=0, help="also compare the weights of this many texts")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    generator = random.Random(0)
    # Lengths as in real collections: half of the passages are shorter than 90 tokens.
    count = max(options.texts, options.exact_texts)
    lengths = [max(3, min(options.tokens - 2, round(generator.lognormvariate(4.5, 0.7)))) for _ in range(count)]

    with tempfile.TemporaryDirectory() as folder:
        backbone = save_backbone(options.geometry, Path(folder) / "backbone")
        vocabulary = GEOMETRIES[options.geometry][1].vocab_size
        everything = random_texts(lengths, vocabulary)
        encoder = sparse_encoder(backbone, everything[:20], options.active_dims)
        path = f"{folder}/encoder"
        encoder.save_pretrained(path)
        texts = everything[: options.texts]
        queries = random_texts([options.query_tokens - 2] * options.queries, vocabulary, seed=1)

        ours: dict[str, SparseEncoder] = {}
        runtimes: list[tuple[Runtime, Precision]] = [(r, p) for p in PRECISIONS for r in ("torch", "openvino")]
        for runtime, precision in [*runtimes, ("openvino", "int8")]:
            ours[f"anysplade, {runtime}, {precision}"] = for_inference(encoder, runtime, precision, Path(folder))
        theirs: dict[str, SparseEncoder] = {}
        for precision in PRECISIONS:
            stock = SparseEncoder(path, device=options.device)
            theirs[f"sentence-transformers, torch, {precision}"] = stock.bfloat16() if precision == "bfloat16" else stock
            if find_spec("optimum") is not None:
                config = {"INFERENCE_NUM_THREADS": options.threads, "INFERENCE_PRECISION_HINT": HINTS[precision]}
                with contextlib.suppress(ValueError):  # optimum-intel does not know ModernBERT
                    theirs[f"sentence-transformers, openvino, {precision}"] = SparseEncoder(
                        path, device="cpu", backend="openvino", model_kwargs={"ov_config": config}
                    )

    def encoding(model: SparseEncoder, role: Role, given: list[str]) -> Callable[[], Any]:
        return lambda: encode(model, given, role)

    def stock_encoding(model: SparseEncoder, given: list[str], batch_size: int) -> Callable[[], Any]:
        return lambda: model.encode_document(given, batch_size=batch_size, show_progress_bar=False)

    batch_size = {}
    for name, model in theirs.items():
        tried = {size: alternate({name: stock_encoding(model, texts, size)}, 1)[name]["median"] for size in options.batch_sizes}
        batch_size[name] = min(tried, key=lambda size: tried[size])
    documents = {name: encoding(model, "document", texts) for name, model in ours.items()}
    documents |= {name: stock_encoding(model, texts, batch_size[name]) for name, model in theirs.items()}
    times = alternate(documents, options.rounds, options.device)
    rates = {name: len(texts) / t["median"] for name, t in times.items()}

    def one_query(name: str, query: str) -> None:
        if name in ours:
            encode(ours[name], [query], "query")
        else:
            theirs[name].encode_query([query], show_progress_bar=False)

    latencies: dict[str, list[float]] = {name: [] for name in documents}
    for turn, query in enumerate([*queries[:3], *queries]):
        for name in latencies:
            start = time.perf_counter()
            one_query(name, query)
            if turn >= 3:  # the first ones warm up
                latencies[name].append(1000 * (time.perf_counter() - start))
    query_ms = {name: statistics.median(values) for name, values in latencies.items()}

    machine = peaks()
    comparison = {}
    for precision in (*PRECISIONS, "int8"):
        mine = [name for name in ours if name.endswith(precision)]
        rivals = [name for name in theirs if name.endswith("bfloat16" if precision == "int8" else precision)]
        best, rival = (max(names, key=lambda name: rates[name]) for names in (mine, rivals))
        quick, quick_rival = (min(names, key=lambda name: query_ms[name]) for names in (mine, rivals))
        comparison[precision] = {
            "documents": {"ours": best, "best": rival, "ratio": rates[best] / rates[rival]},
            "query": {"ours": quick, "best": quick_rival, "ratio": query_ms[quick] / query_ms[quick_rival]},
        }
    exact = {}
    if options.exact_texts:
        plain = theirs["sentence-transformers, torch, float32"]
        expected = plain.encode_document(everything[: options.exact_texts], batch_size=1, convert_to_sparse_tensor=False).numpy()
        for name, model in ours.items():
            got = encode(model, everything[: options.exact_texts], "document").toarray()
            other = np.maximum(got, expected)[(got > 0) != (expected > 0)]
            exact[name] = {
                "largest_difference": float(np.abs(got - expected).max()),
                "terms_that_differ": len(other),
                "largest_weight_of_these": float(other.max(initial=0)),
            }
    memory = {}
    if options.memory_texts:
        many = (texts * (options.memory_texts // len(texts) + 1))[: options.memory_texts]
        for name in (n for n in documents if n.endswith("float32")):
            function = (
                encoding(ours[name], "document", many) if name in ours else stock_encoding(theirs[name], many, batch_size[name])
            )
            memory[name] = peak_extra_bytes(function, options.device)
    for name, rate in rates.items():
        size = f", batch {batch_size[name]}" if name in batch_size else ""
        low, high = (len(texts) / times[name][bound] for bound in ("highest", "lowest"))
        print(f"{name + size:<50} {rate:8.1f} texts/s ({low:.1f} to {high:.1f}) {query_ms[name]:7.2f} ms/query", file=sys.stderr)
    for part in (machine, comparison, exact, memory):
        for key, value in part.items():
            print(key, value, file=sys.stderr)
    finish(
        "encoding",
        options,
        {
            "peaks": machine,
            "seconds": times,
            "texts_per_second": rates,
            "batch_sizes": batch_size,
            "query_ms": query_ms,
            "comparison": comparison,
            "exact": exact,
            "peak_extra_bytes": memory,
            "tokens": sum(lengths[: options.texts]) + 2 * len(texts),
            "document_active_dims": encode(encoder, texts, "document").nnz / len(texts),
        },
    )


if __name__ == "__main__":
    main()
