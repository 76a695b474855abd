"""Searching with an exported model, without torch: a cold command, a server's start, and one query, beside the model itself.

Weights are random, since speed does not depend on them. ``--python`` names the interpreter of an environment without torch.
"""

import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch

from anysplade import Document, Index, export_onnx, for_inference
from anysplade.model.encoding import ModelQueries
from anysplade.model.onnx_queries import OnnxQueries
from backbones import GEOMETRIES, random_texts, save_backbone, sparse_encoder
from harness import alternate, finish, memory, parser, spread

PORT = 8731


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--geometry", default="minilm", choices=GEOMETRIES)
    arguments.add_argument("--python", default=sys.executable, help="interpreter of the environment that searches")
    arguments.add_argument("--queries", type=int, default=20, help="of ten words")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backbone = save_backbone(options.geometry, folder / "backbone")
        texts = random_texts([20] * 100, 5000)
        sparse_encoder(backbone, texts[:20], 150).save_pretrained(str(folder / "model"))
        with Index.build(
            folder / "model", {f"d{i}": Document("", text) for i, text in enumerate(texts)}, folder / "index"
        ) as index:
            encoder = index.encoder
        export_onnx(folder / "model", folder / "vector", "vector", quantize=True)
        command = [options.python, "-m", "anysplade", "search", str(folder / "index"), texts[0], "--json"]
        cold = {"exported": [*command, "--model", str(folder / "vector")], "model": command}
        if options.python != sys.executable:
            del cold["model"]  # needs torch
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in cold}
        for _ in range(options.rounds):
            for kind, words in cold.items():
                runs[kind].append(run_cold(words))
        result: dict[str, Any] = {
            "cold": {kind: {key: statistics.median(run[key] for run in found) for key in found[0]} for kind, found in runs.items()},
            "serve_seconds": [start_server(options.python, folder) for _ in range(options.rounds)],
        }
        queries = random_texts([10] * options.queries, 5000, seed=1)
        ways: dict[str, Any] = {
            "exported, float32": OnnxQueries(folder / "vector", threads=1),
            "exported, int8": OnnxQueries(folder / "vector", "int8", threads=1),
            "torch, float32": ModelQueries(encoder),
        }
        for runtime, precision in (("openvino", "float32"), ("openvino", "int8")):
            ways[f"{runtime}, {precision}"] = ModelQueries(for_inference(encoder, runtime, precision, folder))
        seconds = alternate(
            {kind: lambda way=way: [way.encode([query]) for query in queries] for kind, way in ways.items()}, options.rounds
        )
        result["query_ms"] = {
            kind: {bound: 1000 * value / len(queries) for bound, value in taken.items()} for kind, taken in seconds.items()
        }
    for kind, found in result["cold"].items():
        print(f"cold search, {kind:<20} {found['seconds']:.2f} s, {found['bytes'] / 2**20:.0f} MiB", file=sys.stderr)
    print(f"serve answers after {statistics.median(result['serve_seconds']):.2f} s", file=sys.stderr)
    for kind, taken in result["query_ms"].items():
        print(f"one query, {kind:<20} {spread(taken)} ms", file=sys.stderr)
    finish("cold-start", options, result)


def run_cold(command: list[str]) -> dict[str, float]:
    """Seconds and peak memory of a process."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.read(1)  # the answer begins; the process still lives
        peak = memory("VmHWM", process.pid)
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return {"seconds": time.perf_counter() - start, "bytes": peak}


def start_server(python: str, folder: Path) -> float:
    """Seconds until a server answers."""
    start = time.perf_counter()
    command = [python, "-m", "anysplade", "serve", str(folder / "index"), "--model", str(folder / "vector"), "--port", str(PORT)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health") as answer:
                    answer.read()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.01)
        taken = time.perf_counter() - start
        process.terminate()
    return taken


if __name__ == "__main__":
    main()
