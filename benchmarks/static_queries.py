"""Milliseconds per query of 12 words whose tokens have fixed weights: the lookup, and sentence-transformers' ``encode_query``.

Queries are encoded one at a time; the times include tokenizing.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from sentence_transformers import SparseEncoder

from anysplade.model.encoder import build_encoder
from anysplade.model.encoding import encode
from anysplade.model.queries import StaticQueries
from backbones import GEOMETRIES, random_texts, save_backbone
from harness import alternate, finish, parser, ratio, spread


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--geometry", default="bert-base", choices=GEOMETRIES)
    arguments.add_argument("--queries", type=int, default=200)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        backbone = save_backbone(options.geometry, Path(folder) / "backbone")
        encoder, _ = build_encoder(backbone, 1, 0, query_encoder="idf", idf_texts=["w5 w6"])
        texts = random_texts([12] * options.queries, encoder.get_embedding_dimension() or 0)
        model = f"{folder}/model"
        encoder.save_pretrained(model)
        start = time.perf_counter()
        queries = StaticQueries.open(model)
        opened = {"lookup": time.perf_counter() - start}
        start = time.perf_counter()
        stock = SparseEncoder(model, device=options.device)
        opened["encode_query"] = time.perf_counter() - start
    assert queries is not None

    def lookup() -> None:
        for text in texts:
            queries.encode([text])

    def encode_query() -> None:
        for text in texts:
            stock.encode_query([text], show_progress_bar=False)

    expected = encode(stock, texts, "query")
    for name in ("data", "indices", "indptr"):
        assert np.array_equal(getattr(queries.encode(texts), name), getattr(expected, name)), name
    times = alternate({"lookup": lookup, "encode_query": encode_query}, options.rounds, options.device)
    milliseconds = {
        name: {key: 1000 * seconds / options.queries for key, seconds in found.items()} for name, found in times.items()
    }
    for name, found in milliseconds.items():
        print(f"{name:<14} {spread(found)} ms per query; opened in {opened[name]:.2f} s", file=sys.stderr)
    result = {
        "milliseconds_a_query": milliseconds,
        "ratio": ratio(times, "encode_query", "lookup"),
        "seconds_to_open": opened,
        "vocabulary": expected.shape[1],
    }
    finish("static_queries", options, result)


if __name__ == "__main__":
    main()
