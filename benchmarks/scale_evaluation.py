"""How memory and time grow with the data, at two sizes; each size in a process of its own.

``evaluate``: exact search of synthetic vectors, terms drawn with Zipf's law, as ``evaluate`` does it after encoding, with one
thread and with all, and BM25 over synthetic texts read from a file.

    python benchmarks/scale.py evaluate --documents 100000 200000 --queries 7000
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from harness import finish, memory

VOCABULARY = 30_522
QUERY_TERMS = 25
DEPTH = 1000
BLOCK = 10_000  # documents that are drawn together


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Peak anonymous memory and seconds of both rankings, and the growth of the memory per document."""
    found: dict[str, Any] = {}
    for part in ("vectors", "bm25"):
        rows = []
        for documents in options.documents:
            arguments = [part, str(documents), str(options.queries), str(options.terms)]
            done = subprocess.run([sys.executable, __file__, "part", *arguments], stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"documents": documents, **json.loads(done.stdout)})
        found[part] = {"sizes": rows}
        if len(rows) > 1:
            grown = rows[-1]["documents"] - rows[0]["documents"]
            found[part]["anonymous_bytes_per_document"] = (rows[-1]["peak_anonymous"] - rows[0]["peak_anonymous"]) / grown
    return found


def vectors_part(documents: int, queries: int, terms: int) -> dict[str, Any]:
    from anysplade._common.row_file import RowFile
    from anysplade.evaluation.costs import search_cost
    from anysplade.search.exact import count_cores, top_rows

    random = np.random.default_rng(0)
    before = memory("RssAnon")

    def encoded() -> sparse.csr_matrix:
        rows = RowFile()
        for start in range(0, documents, BLOCK):
            rows.append(draw(random, min(BLOCK, documents - start), terms))
        return rows.matrix(VOCABULARY)

    corpus, peak, _ = watched(encoded)
    asked = draw(random, queries, QUERY_TERMS)
    found: dict[str, Any] = {"before": before, "mapped": isinstance(corpus.data.base, np.memmap)}
    cost = search_cost(asked, corpus)
    for workers in sorted({1, count_cores()}):
        _, searching, seconds = watched(lambda workers=workers: top_rows(corpus, asked, DEPTH, workers=workers))
        peak = max(peak, searching)
        found[f"seconds_on_{workers}"] = round(seconds, 2)
    postings = cost["postings_per_query"] * queries
    found["nanoseconds_per_posting_on_1"] = round(1e9 * found["seconds_on_1"] / postings, 3)
    return found | {"peak_anonymous": peak, "flops": cost["flops"]}


def bm25_part(documents: int, queries: int, terms: int) -> dict[str, Any]:
    from anysplade.search.bm25 import BM25

    random = np.random.default_rng(0)

    def texts(count: int, words: int) -> Iterator[str]:
        for start in range(0, count, BLOCK):
            rows = draw(random, min(BLOCK, count - start), words)
            yield from (" ".join(f"w{i:x}" for i in part) for part in np.split(rows.indices, rows.indptr[1:-1]))

    before, asked = memory("RssAnon"), list(texts(queries, 6))
    index, building, built = watched(lambda: BM25(texts(documents, 30)))
    _, searching, seconds = watched(lambda: index.top(asked, DEPTH))
    times = {"seconds_of_building": round(built, 2), "seconds_of_search": round(seconds, 2)}
    return {"before": before, "peak_anonymous": max(building, searching), **times}


def draw(random: np.random.Generator, rows: int, terms: int) -> sparse.csr_matrix:
    """Vectors of about this many terms, drawn with Zipf's law (exponent 0.8)."""
    shares = 1 / np.arange(1, VOCABULARY + 1) ** 0.8
    columns = np.searchsorted(np.cumsum(shares / shares.sum()), random.random(rows * terms))
    values = random.random(rows * terms, np.float32) + np.float32(0.1)
    parts = values, columns.clip(max=VOCABULARY - 1), np.arange(0, rows * terms + 1, terms)
    matrix = sparse.csr_matrix(parts, shape=(rows, VOCABULARY))
    matrix.sum_duplicates()
    return matrix


def watched(work: Callable[[], Any]) -> tuple[Any, int, float]:
    """The result, the highest anonymous memory seen every 10 ms, in bytes, and the seconds."""
    seen, done = [memory("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            seen.append(memory("RssAnon"))

    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return result, max(seen), time.perf_counter() - start


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = arguments.add_subparsers(dest="command", required=True)
    command = commands.add_parser("evaluate", help="exact search and BM25")
    command.add_argument("--documents", type=int, nargs="+", default=[100_000, 200_000])
    command.add_argument("--queries", type=int, default=7000)
    command.add_argument("--terms", type=int, default=120, help="per document")
    command.add_argument("--out", type=Path, help="write the JSON here")
    part = commands.add_parser("part", help="one size, in this process")
    part.add_argument("which", choices=["vectors", "bm25"])
    part.add_argument("numbers", type=int, nargs=3)
    options = arguments.parse_args()
    if options.command == "part":
        print(json.dumps({"vectors": vectors_part, "bm25": bm25_part}[options.which](*options.numbers)))
    else:
        finish("scale evaluate", options, evaluate(options))


if __name__ == "__main__":
    main()
