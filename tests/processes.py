"""Processes of their own: two of one training, which are ended when they take too long; the command; one without privileges."""

import ctypes
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

SECONDS = 250  # a run takes about ten, and much longer on a machine that others use; pytest ends a test after 300
_DROP_CAPABILITY = 24  # of prctl
_OVERRIDE_PERMISSIONS = (1, 2, 3)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER


def drop_privileges() -> None:
    """For ``preexec_fn``: the permissions of files bind the process even as root."""
    library = ctypes.CDLL(None)
    for capability in _OVERRIDE_PERMISSIONS if os.getuid() == 0 else ():
        library.prctl(_DROP_CAPABILITY, capability, 0, 0, 0)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """A time in which no file can have more bytes: to the libraries, a full disk.

    The signal of that limit ends a process in which LLVM, which compiles kernels, has taken the signal from Python.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def run_python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, **options)


def run_command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "anysplade", *arguments, **options)


_COMMANDS = """
import json, sys
from anysplade.cli import main
for arguments in json.loads(sys.argv[1]):
    code = main(arguments)
    for stream in (sys.stdout, sys.stderr):
        print(f"\\0{code}\\0", file=stream, end="", flush=True)
"""


def run_commands(*commands: Sequence[object], **options: Any) -> list[subprocess.CompletedProcess[str]]:
    """Run commands one after the other in one process: most of the time of a short one is its imports."""
    arguments = [list(map(str, command)) for command in commands]
    done = run_python("-c", _COMMANDS, json.dumps(arguments), **options)
    assert done.returncode == 0, done.stderr
    said = [re.findall(r"(.*?)\0(\d+)\0", text, re.DOTALL) for text in (done.stdout, done.stderr)]
    return [
        subprocess.CompletedProcess(given, int(code), out, err)
        for given, (out, code), (err, _) in zip(arguments, *said, strict=True)
    ]


def preloaded_context() -> ForkServerContext:
    """Processes from one that has loaded the libraries, so that a start takes no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["anysplade.search.index"])
    return context


def run_on_two_processes(script: str, *arguments: object) -> None:
    """Start ``script`` twice, as ranks 0 and 1 of 2, over the loopback device; both must end well.

    What waits for the other process forever would block a whole test run, so both are killed in time.
    """
    folder = Path(__file__).parent
    shared = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(folder / script), *map(str, arguments)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=SECONDS)[0] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGABRT)  # faulthandler prints where each stands
        raise AssertionError("\n".join(f"took over {SECONDS} s:\n{p.communicate()[0][-3000:]}" for p in processes)) from None
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-3000:] for text in said)
