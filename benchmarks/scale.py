"""How memory, time and disk grow with the data, at two sizes or more; each size in a process of its own.

``index``: an index of synthetic vectors, terms drawn with Zipf's law, as another tool would have written them. Run again after an
interruption, it continues. Sizes at which an engine is built are chosen with ``--engine-limit``.

    python benchmarks/scale.py index --documents 100000 400000 --work /tmp/scale --out results/scale-index.json
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

VOCABULARY = 30_522
QUERY_TERMS = 25
QUERIES = 200
BLOCK = 10_000  # documents that are drawn together


def index(options: argparse.Namespace) -> dict[str, Any]:
    """Build, search in two processes, kill and resume."""
    results = []
    for count in options.documents:
        folder = options.work / f"{count}"
        folder.mkdir(parents=True, exist_ok=True)
        vectors = folder / f"vectors{options.form}"
        if not vectors.exists():
            write_vectors(vectors, count, options.terms, options.seed)
        arguments = [str(vectors), str(folder / "index"), str(options.engine_limit)]
        result = {"documents": count, "terms": options.terms, **measured("build", *arguments)}
        result["vectors_bytes_per_document"] = vectors.stat().st_size / count
        files = {path: path.stat().st_size for path in (folder / "index").rglob("*") if path.is_file()}
        for name in ("documents.sqlite", "engine", "postings"):
            size = sum(size for path, size in files.items() if name in path.relative_to(folder / "index").parts[0])
            result[f"{name}_bytes_per_document"] = size / count
        result["search"] = searches(folder / "index")
        results.append(result)
    found: dict[str, Any] = {"sizes": results}
    if len(results) > 1:
        first, last = results[0], results[-1]
        grown = last["documents"] - first["documents"]
        found["anonymous_bytes_per_document"] = (last["peak_anonymous_bytes"] - first["peak_anonymous_bytes"]) / grown
        found["peak_anonymous_bytes_at_10_million"] = round(
            last["peak_anonymous_bytes"] + found["anonymous_bytes_per_document"] * (10_000_000 - last["documents"])
        )
    if options.kill:
        found["killed"] = kill(options)
    return found


def kill(options: argparse.Namespace) -> list[dict[str, Any]]:
    """End a build of the smallest size by SIGKILL at three points; the next call continues and has all documents."""
    count = min(options.documents)
    vectors = options.work / f"{count}" / f"vectors{options.form}"
    arguments = [str(vectors), str(options.work / "killed"), str(options.engine_limit)]
    found = []
    for after in options.kill:
        process = subprocess.Popen([sys.executable, __file__, "part", "build", *arguments], stdout=subprocess.DEVNULL)
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        ended = process.wait()
        found.append({"killed_after_seconds": after, "was_running": ended == -signal.SIGKILL})
    found.append({"resumed": measured("build", *arguments)})
    return found


def searches(folder: Path) -> dict[str, Any]:
    """Milliseconds of a search in the process that holds the index, and in a second one."""
    first = subprocess.Popen(
        [sys.executable, __file__, "part", "search", str(folder), "hold"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    found = {"first": json.loads(first.stdout.readline()), "second": measured("search", str(folder), "go")}
    first.communicate("\n")
    return found


# ------------------------------------------------------------------------------------- parts, in processes of their own


def measured(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "part", *arguments], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def build_part(vectors: str, folder: str, engine_limit: str) -> dict[str, Any]:
    from anysplade.search import vector_build
    from anysplade.search.index import Index

    vector_build.LARGE = int(engine_limit)
    before, start = anonymous(), time.perf_counter()
    with Peak() as peak, Index.from_vectors(vectors, folder, progress=True) as built:
        count = len(built)
        seconds = time.perf_counter() - start
    return {
        "in_index": count,
        "seconds": seconds,
        "documents_per_second": count / seconds,
        "cpu_seconds": time.process_time(),
        "peak_anonymous_bytes": peak.highest,
        "anonymous_bytes_before": before,
        "has_engine": (Path(folder) / "engine").exists(),
    }


def search_part(folder: str, mode: str) -> dict[str, Any]:
    from anysplade.search.index import Index

    start = time.perf_counter()
    index = Index.load(folder)
    opened = time.perf_counter() - start
    width, random = index.about["vocabulary"], np.random.default_rng(1)
    times, own = [], []
    for _ in range(QUERIES):
        terms = np.unique(np.minimum(zipf(random, QUERY_TERMS), width - 1)).astype(np.int32)
        vector = sparse.csr_matrix((random.random(len(terms), np.float32) + 0.1, terms, [0, len(terms)]), shape=(1, width))
        start, spent = time.perf_counter(), time.process_time()
        index.search_vector(vector, 10)
        times.append(1000 * (time.perf_counter() - start))
        own.append(1000 * (time.process_time() - spent))
    found = {
        "open_seconds": opened,
        "first_ms": times[0],
        "p50_ms": float(np.median(times)),
        "p95_ms": float(np.percentile(times, 95)),
    }
    found |= {"cpu_p50_ms": float(np.median(own)), "cpu_p95_ms": float(np.percentile(own, 95))}  # the same on a busy machine
    found |= {"anonymous_bytes": anonymous(), "has_engine": index.store._engine is not None}
    if mode == "hold":
        print(json.dumps(found), flush=True)
        sys.stdin.readline()
    return found


class Peak:
    """The highest number of anonymous bytes of this process during a block, looked up ten times a second."""

    highest = 0

    def __enter__(self) -> "Peak":
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.1):
            self.highest = max(self.highest, anonymous())


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


# ---------------------------------------------------------------------------------------------- synthetic vectors


def zipf(random: np.random.Generator, size: int) -> np.ndarray:
    """Terms whose number of occurrences falls as 1 / (rank + 30), ids from 0: no term is in nearly all documents."""
    low, high = np.log(30), np.log(30 + VOCABULARY)
    return (np.exp(low + (high - low) * random.random(size)) - 30).astype(np.int32)


def draw(count: int, terms: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Terms, rising, and weights of each document."""
    for start in range(0, count, BLOCK):
        random = np.random.default_rng((seed, start))
        size = min(BLOCK, count - start)
        drawn = np.sort(zipf(random, size * terms * 3 // 2).reshape(size, -1), axis=1)
        weights = np.round(random.lognormal(-0.5, 0.7, drawn.shape), 3).astype(np.float32) + np.float32(0.001)
        new = np.diff(drawn, axis=1, prepend=-1) > 0
        for row in range(size):
            kept = np.flatnonzero(new[row])
            if len(kept) > terms:
                kept = np.sort(random.permutation(kept)[:terms])
            yield drawn[row, kept], weights[row, kept]


def write_vectors(path: Path, count: int, terms: int, seed: int) -> None:
    from anysplade import export_vectors
    from anysplade.data.corpus import Document
    from anysplade.search.documents import EncodedDocument

    names = [f"t{term}" for term in range(VOCABULARY)]
    documents = (
        EncodedDocument(f"doc{number}", Document("", "", {"part": str(number % 10)}), *vector)
        for number, vector in enumerate(draw(count, terms, seed))
    )
    export_vectors(documents, names, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    indexing = commands.add_parser("index", help="an index of synthetic vectors")
    indexing.add_argument("--documents", type=int, nargs="+", default=[100_000, 400_000])
    indexing.add_argument("--terms", type=int, default=120, help="active dims of a document")
    indexing.add_argument("--form", default=".jsonl", help="of the vectors: .jsonl, .jsonl.gz, .npz or .parquet")
    indexing.add_argument("--engine-limit", type=int, default=1_000_000, help="documents above which there is no engine")
    indexing.add_argument(
        "--kill", type=float, nargs="*", default=[], help="seconds after which a build is killed, one after another"
    )
    indexing.add_argument("--work", type=Path, required=True, help="folder for vectors and indexes, which are kept")
    indexing.add_argument("--seed", type=int, default=0)
    indexing.add_argument("--out", type=Path, help="write the JSON here")
    indexing.set_defaults(run=index)
    part = commands.add_parser("part", help="one measurement, in a process of its own")
    part.add_argument("name", choices=["build", "search"])
    part.add_argument("arguments", nargs="+")
    options = parser.parse_args()
    if options.command == "part":
        print(json.dumps({"build": build_part, "search": search_part}[options.name](*options.arguments)))
        return
    from anysplade._common.provenance import provenance

    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items() if key != "run"}
    text = json.dumps({"settings": settings, **options.run(options), "cores": os.cpu_count(), "provenance": provenance()}, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
