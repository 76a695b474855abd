"""How memory, time and disk grow with the data: each size in a process of its own, and what one more document costs.

``index``: an index of synthetic vectors, terms drawn with Zipf's law, as another tool would have written them; then searches in
the process that holds it and in a second one. ``evaluate``: exact search of such vectors on one core and on all, and BM25 over
synthetic texts, as ``evaluate`` does both after encoding. ``mine`` and ``train``: the commands on a corpus of short lines and pairs
or triples of ids; one training step, of several processes.

    python benchmarks/scale.py index --documents 100000 200000 --work ../scale --out results/scale-index.json

Memory is anonymous (RssAnon, looked up every 50 ms): mapped files are not counted, as processes share them and the system can take
them back. ``peak_anonymous_bytes`` is that of the largest process, ``peak_anonymous_bytes_of_all`` the highest sum of a command and
the processes that it started. On a busy machine CPU seconds say more than seconds.

Data and finished measurements stay in ``--work``: run again after an interruption, a command continues.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from harness import finish, memory

VOCABULARY = 30_522
QUERY_TERMS = 25
QUERIES = 200  # timed searches of an index
DEPTH = 1000
BLOCK = 10_000  # documents that are drawn together
WORDS = [
    f"{a}{b}{c}"
    for a in "bdfklmnprst"
    for b in "aeiou"
    for c in ("ba", "del", "fin", "gor", "lum", "mat", "nis", "pol", "ra", "tek")
]
MEASURES = ("seconds", "cpu_seconds", "peak_anonymous_bytes", "peak_anonymous_bytes_of_all")

Row = dict[str, Any]


def index(options: argparse.Namespace, count: int) -> Iterator[Row]:
    vectors = options.work / f"vectors-{count}-{options.terms}-{options.seed}{options.form}"
    folder = options.work / f"index-{count}-{options.terms}-{options.seed}-{options.engine_limit}"
    if not vectors.exists():
        write_vectors(vectors, count, options.terms, options.seed)
    build = ("build", vectors, folder, options.engine_limit)
    row = {"part": "build", "documents": count, **part(*build), "vectors_bytes_per_document": vectors.stat().st_size / count}
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    for name in ("documents.sqlite", "engine", "postings"):
        size = sum((folder / path).stat().st_size for path in files if name in path.parts[0])
        row[f"{name}_bytes_per_document"] = size / count
    yield row
    yield {"part": "search", "documents": count, **part("search", folder)}
    with subprocess.Popen(own("search", folder, "hold"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        yield {"part": "search in a second process", "documents": count, **part("search", folder)}
        holder.communicate("\n")
    for after in options.kill:
        yield {"part": "killed build", "documents": count, **killed(after, "build", vectors, folder.with_name("killed"), build[-1])}
    if options.kill:
        resumed = part("build", vectors, folder.with_name("killed"), options.engine_limit)
        yield {"part": "resumed build", "documents": count, **resumed}


def evaluate(options: argparse.Namespace, count: int) -> Iterator[Row]:
    for name in ("vectors", "bm25"):
        yield {"part": name, "documents": count, **part(name, count, options.queries, options.terms, options.seed)}


def mine(options: argparse.Namespace, count: int) -> Iterator[Row]:
    data = short_lines(options.work, count, options.rows(count))
    arguments = [str(data / "pairs.tsv"), "--corpus", str(data / "corpus.jsonl")]
    yield {"part": "mine", "documents": count, "rows": options.rows(count), **command(options.work, "mine", *arguments)}


def train(options: argparse.Namespace, count: int) -> Iterator[Row]:
    data = short_lines(options.work, count, options.rows(count))
    arguments = ["bert-tiny", str(data / "triples.tsv"), "--steps", "1", "--batch-size", "16"]
    found = command(options.work, "train", *arguments, processes=options.processes)
    yield {"part": "train", "documents": count, "rows": options.rows(count), "processes": options.processes, **found}


# -------------------------------------------------------------------------------- a command, and what it takes


def command(work: Path, name: str, *arguments: str, processes: int = 1) -> Row:
    """A command of anysplade with an output and a cache of its own, which are removed before it."""
    output = work / f"{name}-output"
    subprocess.run(["rm", "-rf", *map(str, (output, f"{output}.jsonl", f"{output}.jsonl.json", work / "cache"))], check=True)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    out = f"{output}.jsonl" if name == "mine" else str(output)
    asked = [sys.executable, *start, "-m", "anysplade", name, *arguments, "--out", out]
    return measured(asked, {"ANYSPLADE_CACHE": str((work / "cache").resolve()), "OMP_NUM_THREADS": "1"})[1]


def own(*arguments: object) -> list[str]:
    """A part of this file, as a command."""
    return [sys.executable, __file__, "part", *map(str, arguments)]


def part(*arguments: object) -> Row:
    text, used = measured(own(*arguments), {})
    return used | json.loads(text.splitlines()[-1])


def measured(asked: Sequence[str], environment: dict[str, str]) -> tuple[str, Row]:
    """The output of a command, the seconds that it took, and the highest memory of its processes."""
    highest = highest_sum = 0
    start, before = time.perf_counter(), cpu_seconds()
    with subprocess.Popen(asked, env=os.environ | environment, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            sizes = [anonymous(pid) for pid in descendants(process.pid)]
            highest, highest_sum = max([highest, *sizes]), max(highest_sum, sum(sizes))
            time.sleep(0.05)
        text = process.stdout.read() if process.stdout else ""
    if process.returncode:
        sys.exit(f"ended with {process.returncode}: {' '.join(asked)}")
    values = time.perf_counter() - start, cpu_seconds() - before, highest, highest_sum
    return text, dict(zip(MEASURES, values, strict=True))


def killed(after: float, *arguments: object) -> Row:
    """End a part by SIGKILL after some seconds."""
    process = subprocess.Popen(own(*arguments), stdout=subprocess.DEVNULL)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    return {"killed_after_seconds": after, "was_running": process.wait() == -signal.SIGKILL}


def descendants(pid: int) -> list[int]:
    """A process and those that it started."""
    found = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [one for child in task.read_text().split() for one in descendants(int(child))]
    except OSError:  # it ended
        pass
    return found


def anonymous(pid: int | str = "self") -> int:
    try:
        return memory("RssAnon", pid)
    except (OSError, KeyError):  # it ended
        return 0


def cpu_seconds() -> float:
    """Of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ------------------------------------------------------------------------------------- parts, in processes of their own


def build_part(vectors: str, folder: str, engine_limit: str) -> Row:
    from anysplade.search import store
    from anysplade.search.index import Index

    store.MOST_IN_ENGINE = int(engine_limit)
    before = anonymous()
    with Index.from_vectors(vectors, folder, progress=True) as built:
        return {"in_index": len(built), "has_engine": not built.store.searches_exactly, "anonymous_bytes_before": before}


def search_part(folder: str, mode: str = "") -> Row:
    from anysplade.search.index import Index

    found_index = Index.load(folder)
    random_numbers, times, own_times = np.random.default_rng(1), [], []
    for query in draw(random_numbers, QUERIES, QUERY_TERMS):
        kept = query.indices < found_index.about["vocabulary"]
        vector = sparse.csr_matrix(
            (query.data[kept], query.indices[kept], [0, kept.sum()]), shape=(1, found_index.about["vocabulary"])
        )
        start, spent = time.perf_counter(), time.process_time()
        found_index.search_vector(vector, 10)
        times.append(1000 * (time.perf_counter() - start))
        own_times.append(1000 * (time.process_time() - spent))
    found = {"has_engine": not found_index.store.searches_exactly, "anonymous_bytes": anonymous()}
    for name, values in (("ms", times), ("cpu_ms", own_times)):
        found |= {
            f"first_{name}": values[0],
            f"p50_{name}": float(np.median(values)),
            f"p95_{name}": float(np.percentile(values, 95)),
        }
    if mode == "hold":
        print("ready", flush=True)
        sys.stdin.readline()
    return found


def vectors_part(count: str, queries: str, terms: str, seed: str) -> Row:
    from anysplade._common.row_file import RowFile
    from anysplade.evaluation.costs import search_cost
    from anysplade.search.exact import count_cores, top_rows

    before, rows = anonymous(), RowFile()
    for block in blocks(int(count), int(terms), int(seed)):
        rows.append(block)
    corpus, asked = rows.matrix(VOCABULARY), draw(np.random.default_rng(1), int(queries), QUERY_TERMS)
    cost = search_cost(asked, corpus)
    found: Row = {"anonymous_bytes_before": before, "mapped": isinstance(corpus.data.base, np.memmap), "flops": cost["flops"]}
    postings = cost["postings_per_query"] * int(queries)
    for workers in sorted({1, count_cores()}):
        start = time.perf_counter(), time.process_time()
        top_rows(corpus, asked, DEPTH, workers=workers)
        found[f"search_seconds_on_{workers}"] = time.perf_counter() - start[0]
        found[f"cpu_nanoseconds_per_posting_on_{workers}"] = 1e9 * (time.process_time() - start[1]) / postings
    return found


def bm25_part(count: str, queries: str, _: str, seed: str) -> Row:
    from anysplade.search.bm25 import BM25

    def texts(size: int, words: int) -> Iterator[str]:
        for block in blocks(size, words, int(seed)):
            yield from (" ".join(f"w{i:x}" for i in found) for found in np.split(block.indices, block.indptr[1:-1]))

    before, asked, start = anonymous(), list(texts(int(queries), 6)), time.process_time()
    built = BM25(texts(int(count), 30))
    building = time.process_time() - start
    built.top(asked, DEPTH)
    seconds = {"cpu_seconds_of_building": building, "cpu_seconds_of_search": time.process_time() - start - building}
    return {"anonymous_bytes_before": before, **seconds}


PARTS: dict[str, Callable[..., Row]] = {"build": build_part, "search": search_part, "vectors": vectors_part, "bm25": bm25_part}


# ------------------------------------------------------------------------------------------------ synthetic data


def draw(random_numbers: np.random.Generator, count: int, terms: int) -> sparse.csr_matrix:
    """Vectors of at most ``terms`` terms, whose occurrences fall as 1 / (rank + 30): no term is in nearly all documents."""
    low, high = np.log(30), np.log(30 + VOCABULARY)
    drawn = np.exp(low + (high - low) * random_numbers.random((count, terms * 3 // 2))) - 30
    columns = np.sort(drawn.astype(np.int32).clip(max=VOCABULARY - 1), axis=1)
    order = np.where(np.diff(columns, axis=1, prepend=-1) > 0, random_numbers.random(columns.shape), 2.0)  # 2 for a repeated term
    kept = np.zeros(columns.shape, bool)
    np.put_along_axis(kept, np.argpartition(order, terms, axis=1)[:, :terms], True, axis=1)
    kept &= order < 2
    weights = np.round(random_numbers.lognormal(-0.5, 0.7, int(kept.sum())), 3).astype(np.float32) + np.float32(0.001)
    indptr = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
    return sparse.csr_matrix((weights, columns[kept], indptr), shape=(count, VOCABULARY))


def blocks(count: int, terms: int, seed: int) -> Iterator[sparse.csr_matrix]:
    for start in range(0, count, BLOCK):
        yield draw(np.random.default_rng((seed, start)), min(BLOCK, count - start), terms)


def write_vectors(path: Path, count: int, terms: int, seed: int) -> None:
    from anysplade import export_vectors
    from anysplade.data.corpus import Document
    from anysplade.search.documents import EncodedDocument

    rows = (row for block in blocks(count, terms, seed) for row in block)
    documents = (
        EncodedDocument(f"doc{number}", Document("", "", {"part": str(number % 10)}), row.indices, row.data)
        for number, row in enumerate(rows)
    )
    export_vectors(documents, [f"t{term}" for term in range(VOCABULARY)], path)


def short_lines(work: Path, count: int, rows: int) -> Path:
    """A BEIR folder of ``count`` documents of 15 words, a tenth as many queries, and ``triples.tsv`` and ``pairs.tsv`` of ids."""
    folder, chosen = work / f"lines-{count}-{rows}", random.Random(0)
    if (folder / "pairs.tsv").exists():  # the last file
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, size, words in (("corpus", count, 15), ("queries", count // 10, 5)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for i in range(size):
                file.write(json.dumps({"_id": f"{i}", "text": f"{' '.join(chosen.choices(WORDS, k=words))} {i}"}) + "\n")
    triples = [(chosen.randrange(count // 10), chosen.randrange(count), chosen.randrange(count)) for _ in range(rows)]
    for name, columns in (("triples", ("query_id", "positive_id", "negative_id")), ("pairs", ("query_id", "positive_id"))):
        lines = ("\t".join(map(str, values[: len(columns)])) for values in (columns, *triples))
        (folder / f"{name}.part").write_text("\n".join(lines) + "\n")
        (folder / f"{name}.part").rename(folder / f"{name}.tsv")
    return folder


# ----------------------------------------------------------------------------------------------------- the whole


def kept_rows(options: argparse.Namespace, measure: Callable[..., Iterator[Row]], settings: Row) -> list[Row]:
    """The rows of all sizes; those of a size that an earlier call measured with these settings are read."""
    rows = []
    for count in options.documents:
        key = hashlib.sha256(json.dumps([settings, count]).encode()).hexdigest()[:12]
        file = options.work / f"measured-{measure.__name__}-{count}-{key}.json"
        if not file.exists():
            found = list(measure(options, count))
            file.write_text(json.dumps(found))
        rows += json.loads(file.read_text())
    return rows


def slopes(rows: Sequence[Row]) -> dict[str, Row]:
    """What one more document costs, by part: the difference of the largest and the smallest size, by that of their documents."""
    found = {}
    for name in dict.fromkeys(row["part"] for row in rows):
        first, *_, last = sized = sorted((row for row in rows if row["part"] == name), key=lambda row: row["documents"])
        if len(sized) > 1 and last["documents"] > first["documents"] and MEASURES[0] in first:
            grown = last["documents"] - first["documents"]
            found[name] = {measure: (last[measure] - first[measure]) / grown for measure in MEASURES}
    return found


def show(rows: Sequence[Row], found: dict[str, Row]) -> None:
    print(f"{'part':28}{'documents':>12}{'CPU s':>10}{'MB, largest':>13}{'MB, all':>10}", file=sys.stderr)
    for row in rows:
        if MEASURES[0] in row:
            sizes = f"{row[MEASURES[2]] / 1e6:13.0f}{row[MEASURES[3]] / 1e6:10.0f}"
            print(f"{row['part']:28}{row['documents']:12,}{row['cpu_seconds']:10.1f}{sizes}", file=sys.stderr)
    for name, slope in found.items():
        memory_each = f"{slope[MEASURES[2]]:.0f} B in the largest process, {slope[MEASURES[3]]:.0f} B in all"
        each = f"{1e6 * slope['cpu_seconds']:.0f} µs, {memory_each}"
        print(f"{name}: one more document costs {each}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for measure in (index, evaluate, mine, train):
        given = commands.add_parser(measure.__name__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        given.set_defaults(measure=measure)
        given.add_argument("--documents", type=int, nargs="+", default=[20_000, 40_000], help="sizes")
        given.add_argument("--work", type=Path, required=True, help="folder for data and measurements, which are kept")
        given.add_argument("--seed", type=int, default=0)
        given.add_argument("--out", type=Path, help="write the JSON here")
        if measure in (index, evaluate):
            given.add_argument("--terms", type=int, default=120, help="active dims of a document, at most")
        if measure is index:
            given.add_argument("--form", default=".jsonl", help="of the vectors: .jsonl, .jsonl.gz, .npz or .parquet")
            given.add_argument("--engine-limit", type=int, default=500_000, help="documents above which there is no engine")
            given.add_argument("--kill", type=float, nargs="*", default=[], help="seconds after which builds are killed, in turn")
        elif measure is evaluate:
            given.add_argument("--queries", type=int, default=1000)
        else:
            given.add_argument("--rows-per-document", type=float, default=0.1 if measure is mine else 4, help="pairs or triples")
        if measure is train:
            given.add_argument("--processes", type=int, default=2)
    single = commands.add_parser("part", help="one measurement, in this process")
    single.add_argument("name", choices=PARTS)
    single.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    if options.command == "part":
        print(json.dumps(PARTS[options.name](*options.arguments)))
        return
    settings = {name: value for name, value in vars(options).items() if name not in ("measure", "documents", "work", "out")}
    options.rows = lambda count: round(count * options.rows_per_document)
    options.work.mkdir(parents=True, exist_ok=True)
    rows = kept_rows(options, options.measure, settings)
    found = slopes(rows)
    show(rows, found)
    shown = argparse.Namespace(documents=options.documents, **settings, out=options.out, device="cpu")
    finish(f"scale {options.command}", shown, {"sizes": rows, "per_document": found})


if __name__ == "__main__":
    main()
