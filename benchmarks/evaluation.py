"""Time and peak memory of evaluating a large synthetic collection, compared with encoding and searching alone."""

import random
import time

from anysplade import Collection, Document, evaluate
from harness import finish, memory, parser


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--documents", type=int, default=100_000)
    arguments.add_argument("--queries", type=int, default=1000)
    arguments.add_argument("--depth", type=int, default=1000)
    arguments.add_argument("--model", default="bert-tiny")
    options = arguments.parse_args()
    generator = random.Random(0)
    words = [f"{a}{b}" for a in ("matrix", "graph", "solve", "array", "index", "sparse", "node") for b in range(300)]
    corpus = {f"d{i}": Document("", " ".join(generator.choices(words, k=12))) for i in range(options.documents)}
    queries = {f"q{i}": " ".join(generator.sample(corpus[f"d{i}"].text.split(), 4)) for i in range(options.queries)}
    collection = Collection("synthetic", corpus, queries, {f"q{i}": {f"d{i}": 1} for i in range(options.queries)})
    before = memory("VmHWM")
    start = time.perf_counter()
    found = evaluate(options.model, collection, depth=options.depth)
    seconds = time.perf_counter() - start
    bare = found.seconds["encoding"] + found.seconds["search"]
    finish(
        "evaluation",
        options,
        {
            "seconds": round(seconds, 1),
            "of_which": {name: round(value, 1) for name, value in found.seconds.items()},
            "over_encoding_and_search": round(seconds / bare, 3),
            "peak_memory_gib": round(memory("VmHWM") / 2**30, 2),
            "peak_memory_before_gib": round(before / 2**30, 2),
            "query_active_dims": found.query_active_dims,
            "document_active_dims": found.document_active_dims,
            "metrics": found.metrics,
        },
    )


if __name__ == "__main__":
    main()
