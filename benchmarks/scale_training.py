"""Time and memory of training and mining by the size of the data: `python benchmarks/scale.py train --rows 1000000 --lines 220000`.

The data are in MS MARCO's form: triples of ids, and a corpus of short lines. Memory is anonymous: mapped files are not counted, as
processes share them and the system can take them back.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import finish, memory

WORDS = [
    f"{a}{b}{c}"
    for a in "bdfklmnprst"
    for b in "aeiou"
    for c in ("ba", "del", "fin", "gor", "lum", "mat", "nis", "pol", "ra", "tek")
]


def make_data(folder: Path, triples: int, lines: int) -> None:
    """A BEIR folder with ``lines`` documents of 15 words and a tenth as many queries, and ``triples.tsv`` with ids of both."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    for name, count, words in (("corpus", lines, 15), ("queries", lines // 10, 5)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for i in range(count):
                file.write(json.dumps({"_id": f"{i}", "text": f"{' '.join(draw.choices(WORDS, k=words))} {i}"}) + "\n")
    with open(folder / "triples.tsv", "w") as file:
        file.write("query_id\tpositive_id\tnegative_id\n")
        for _ in range(triples):
            file.write(f"{draw.randrange(lines // 10)}\t{draw.randrange(lines)}\t{draw.randrange(lines)}\n")


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and itself."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [one for child in task.read_text().split() for one in descendants(int(child))]
    return found


def run_and_watch(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds of a command, by the clock and of all its processes' CPU time, and the highest anonymous GB of one of them."""
    peak = 0
    start, before = time.perf_counter(), cpu_seconds()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:

        def watch() -> None:
            nonlocal peak
            while process.poll() is None:
                for pid in processes(process.pid):
                    peak = max(peak, anonymous(pid))
                time.sleep(0.1)

        watcher = threading.Thread(target=watch)
        watcher.start()
        lines = list(process.stdout or ())
    watcher.join()
    if process.returncode:
        sys.exit("".join(lines[-30:]))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "cpu_seconds": cpu_seconds() - before, "anonymous_gb_per_process": peak / 1e9}


def cpu_seconds() -> float:
    """Of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def processes(pid: int) -> list[int]:
    try:
        return descendants(pid)
    except OSError:  # one of them ended
        return []


def anonymous(pid: int) -> int:
    try:
        return memory("RssAnon", pid)
    except (OSError, KeyError):  # it ended
        return 0


def sized(options: argparse.Namespace) -> Iterator[tuple[int, int, Path, dict[str, str]]]:
    """For each size: rows, lines, a folder with the data, and the environment of the measured process."""
    for rows, lines in zip(options.rows, options.lines, strict=True):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            data = Path(folder) / "data"
            make_data(data, rows, lines)
            yield rows, lines, data, os.environ | {"ANYSPLADE_CACHE": f"{folder}/cache", "OMP_NUM_THREADS": "1"}


def train(options: argparse.Namespace) -> dict[str, Any]:
    """One training step, with several processes: time until it ends, and anonymous memory of the largest process."""
    found = []
    for rows, lines, data, environment in sized(options):
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes)]
        command = [sys.executable, *(start if options.processes > 1 else []), "-m", "anysplade", "train", "bert-tiny"]
        command += [str(data / "triples.tsv"), "--out", str(data.parent / "run"), "--steps", "1", "--batch-size", "16"]
        found.append({"triples": rows, "lines": lines} | run_and_watch(command, environment))
    return {"sizes": found} | slope(found, "triples")


def mine(options: argparse.Namespace) -> dict[str, Any]:
    """Hard negatives by BM25 for examples with ids, ``--rows`` of them: time and anonymous memory."""
    found = []
    for rows, lines, data, environment in sized(options):
        pairs = data / "pairs.tsv"
        with open(data / "triples.tsv") as triples, open(pairs, "w") as file:
            file.writelines("\t".join(line.rstrip("\n").split("\t")[:2]) + "\n" for line in triples)
        command = [sys.executable, "-m", "anysplade", "mine", str(pairs), "--out", str(data.parent / "mined.jsonl")]
        command += ["--corpus", str(data / "corpus.jsonl")]
        found.append({"examples": rows, "lines": lines} | run_and_watch(command, environment))
    return {"sizes": found} | slope(found, "examples")


def slope(found: list[dict[str, Any]], count: str) -> dict[str, dict[str, float]]:
    """What one more example costs, with its share of lines."""
    if len(found) < 2:
        return {}
    first, last = found[0], found[-1]
    measured = ("seconds", "cpu_seconds", "anonymous_gb_per_process")
    return {f"per_million_{count}": {name: 1e6 * (last[name] - first[name]) / (last[count] - first[count]) for name in measured}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for measured, rows in ((train, [1_000_000, 2_000_000]), (mine, [10_000, 20_000])):
        command = commands.add_parser(measured.__name__, help=measured.__doc__)
        command.set_defaults(measured=measured)
        command.add_argument("--rows", type=int, nargs="+", default=rows, help="examples, by size")
        command.add_argument("--lines", type=int, nargs="+", default=[220_000, 440_000], help="lines of the corpus, by size")
        command.add_argument("--processes", type=int, default=2 if measured is train else 1)
        command.add_argument("--folder", type=Path, help="for the data; the system's folder for temporary files by default")
        command.add_argument("--device", default="cpu", help="named in the result")
        command.add_argument("--out", type=Path, help="write the JSON here")
    options = parser.parse_args()
    measured = vars(options).pop("measured")
    finish(f"scale {options.command}", options, measured(options))


if __name__ == "__main__":
    main()
