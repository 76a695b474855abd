"""Measure time in turns, peak memory and the machine; print the result as JSON."""

import argparse
import ctypes
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anysplade._common.provenance import provenance
from anysplade.model.hardware import native_bfloat16


def alternate(variants: dict[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Seconds of each variant: one round to warm up, then ``rounds`` rounds in which every variant runs once."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, variant in variants.items():
            synchronize(device)
            start = time.perf_counter()
            variant()
            synchronize(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def spread(values: dict[str, float], digits: int = 3) -> str:
    """A summary in words."""
    return f"{values['median']:.{digits}f} ({values['lowest']:.{digits}f} to {values['highest']:.{digits}f})"


def ratio(times: dict[str, dict[str, float]], slow: str, fast: str) -> float:
    return times[slow]["median"] / times[fast]["median"]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_extra_bytes(function: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes by which memory rises during ``function``: on a GPU, those of the allocator; otherwise of the process (Linux)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # return freed memory to the system, so that new memory is counted
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = memory("VmRSS")
    function()
    return memory("VmHWM") - before


def bandwidth() -> float:
    """Bytes per second that one core reads, from the sum of an array that is larger than the caches."""
    array = np.ones(2**26)
    return array.nbytes / alternate({"sum": array.sum}, 5)["sum"]["lowest"]


def peaks() -> dict[str, float]:
    """Upper bounds of this machine with the current torch threads: matrix products and reading memory."""
    tokens, width, rows = 1024, 768, 3072
    pairs = {
        str(kind).removeprefix("torch."): (torch.ones(tokens, width).to(kind), torch.ones(rows, width).to(kind))
        for kind in (torch.float32, torch.bfloat16, torch.int8)
    }
    products: dict[str, Callable[[], Any]] = {
        name: partial(torch._int_mm if name == "int8" else torch.mm, left, right.T) for name, (left, right) in pairs.items()
    }
    times = alternate(products, 9)
    found = {f"{name}_gops": 2e-9 * tokens * width * rows / taken["lowest"] for name, taken in times.items()}
    return found | {"read_gb_per_second": bandwidth() / 1e9}


def memory(field: str, pid: int | str = "self") -> int:
    """Bytes of a process by a field of its status, such as VmRSS (resident) or VmHWM (peak)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def parser(description: str | None) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5, help="measured runs of each variant, in turns")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments.add_argument("--out", type=Path, help="write the JSON here")
    return arguments


def finish(name: str, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print the result as JSON with the machine, and write it to ``--out``."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    record = {
        "benchmark": name,
        "settings": settings,
        **result,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu": getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name"),
        "native_bfloat16": native_bfloat16(options.device),
        "sentence-transformers": version("sentence-transformers"),
        "provenance": provenance(),
    }
    text = json.dumps(record, indent=2)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
