"""Texts per second of two versions of anysplade, in turns: this checkout, and another one named by ``--before``.

Each version has a process of its own with one model, and both get the same texts: short ones of 8 to 16 words, and ones that are
cut at ``--tokens``. The texts that are cut are counted, as ``index`` does. Rows of both are compared. Times are medians over
``--rounds``; ``--cpu-time`` counts the time of the processor instead, for a machine that has other work. For example, against the
version before:

    git worktree add ../before main
    python benchmarks/encoding_versions.py --before ../before/src --geometry minilm --runtime openvino
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anysplade import load_encoder
from anysplade.model import encoding
from anysplade.model.runtimes import for_inference
from backbones import GEOMETRIES, random_texts, save_backbone
from harness import finish, parser, synchronize

KINDS = ("short", "long")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--before", type=Path, required=True, help="the src folder of the other version")
    arguments.add_argument("--geometry", default="minilm", choices=GEOMETRIES)
    arguments.add_argument("--model", help="a saved encoder, instead of random weights")
    arguments.add_argument("--texts", type=int, default=128, help="of each kind; four times as many short ones")
    arguments.add_argument("--tokens", type=int, default=128)
    arguments.add_argument("--active-dims", type=int, default=150, help="of a long text, with random weights")
    arguments.add_argument("--runtime", default="torch", choices=["torch", "openvino"])
    arguments.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "int8"])
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--cpu-time", action="store_true")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or _random_encoder(options, Path(folder))
        size = load_encoder(model, k=1, shift=0).get_embedding_dimension() or 0
        generator = random.Random(0)
        texts = {
            "short": random_texts([generator.randint(8, 16) for _ in range(4 * options.texts)], size),
            "long": random_texts([options.tokens] * options.texts, size, seed=1),
        }
        job = {name: str(getattr(options, name)) for name in ("runtime", "precision", "threads", "device", "tokens", "cpu_time")}
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job | {"model": str(model), "texts": texts}))
        versions = {"before": _start(file, options.before.resolve()), "now": _start(file, Path(__file__).parents[1] / "src")}
        times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in versions} for kind in KINDS}
        for turn in range(options.rounds + 1):
            for kind in KINDS:
                for name in sorted(versions, reverse=bool(turn % 2)):
                    seconds = float(_ask(versions[name], kind))
                    if turn:
                        times[kind][name].append(seconds)
        saved = {
            name: [np.load(_ask(process, f"save {kind} {folder}/{name}-{kind}.npy")) for kind in KINDS]
            for name, process in versions.items()
        }
        for process in versions.values():
            process.communicate("\n")
    rates = {kind: {name: len(texts[kind]) / statistics.median(values) for name, values in times[kind].items()} for kind in KINDS}
    differences = [float(np.abs(a - b).max()) for a, b in zip(saved["before"], saved["now"], strict=True)]
    for kind, found in rates.items():
        print(
            f"{kind:<6} {found['before']:8.1f} before {found['now']:8.1f} now, {found['now'] / found['before']:.2f} times",
            file=sys.stderr,
        )
    result = {"texts_per_second": rates, "seconds": times, "largest_difference": dict(zip(KINDS, differences, strict=True))}
    finish("encoding_versions", options, result)


def _random_encoder(options: Any, folder: Path) -> str:
    backbone = save_backbone(options.geometry, folder / "backbone")
    raw = load_encoder(backbone, k=1, shift=0)
    texts = random_texts([options.tokens - 2] * 16, raw.get_embedding_dimension() or 0, seed=2)
    pooled = torch.expm1(raw.encode(texts, convert_to_sparse_tensor=False)).flatten()
    encoder = load_encoder(backbone, k=1, shift=pooled.topk(len(texts) * options.active_dims).values[-1].item())
    encoder.save_pretrained(str(folder / "encoder"))
    return str(folder / "encoder")


def _start(job: Path, source: Path) -> "subprocess.Popen[str]":
    path = os.pathsep.join([str(source), str(Path(__file__).parent)])
    command = [sys.executable, __file__, "--work", str(job)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )


def _ask(process: "subprocess.Popen[str]", line: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    answer = process.stdout.readline().strip()
    if not answer:
        raise SystemExit("a version failed; its message is above")
    return answer


def _encode(encoder: Any, texts: list[str]) -> None:
    if hasattr(encoding, "encode_counted"):
        encoding.encode_counted(encoder, texts, "document")
    else:  # an earlier version
        encoding.encode(encoder, texts, "document")
        encoding.count_truncated(encoder, texts, "document")


def work(job: dict[str, Any]) -> None:
    """Encode the texts of the kind that each line of the standard input names, and print the seconds."""
    torch.set_num_threads(int(job["threads"]))
    clock = time.process_time if job["cpu_time"] == "True" else time.perf_counter
    encoder = load_encoder(job["model"], k=1, shift=0, max_length=int(job["tokens"])).to(job["device"])
    encoder = for_inference(encoder, job["runtime"], job["precision"])
    for line in sys.stdin:
        words = line.split()
        if not words:
            return
        if words[0] == "save":
            np.save(words[2], encoding.encode(encoder, job["texts"][words[1]][:32], "document").toarray())
            print(words[2], flush=True)
            continue
        synchronize(job["device"])
        start = clock()
        _encode(encoder, job["texts"][words[0]])
        synchronize(job["device"])
        print(clock() - start, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(Path(sys.argv[2]).read_text()))
    else:
        main()
