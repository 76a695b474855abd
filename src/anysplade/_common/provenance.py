"""The provenance of a result, so that it can be reproduced: versions, commit, hardware, command."""

import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anysplade import __version__
from anysplade.errors import without_credentials


def provenance() -> dict[str, Any]:
    """Versions, commit, hardware and command line (without credentials) of this process, as JSON data."""
    import torch

    libraries = ("torch", "transformers", "sentence-transformers", "numpy", "scipy")
    return {
        "versions": {"anysplade": __version__, "python": platform.python_version()} | {name: version(name) for name in libraries},
        "commit": _commit(),
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "command": without_credentials(" ".join(_quoted(argument) for argument in [_program(), *sys.argv[1:]])),
    }


def _program() -> str:
    return "anysplade" if Path(sys.argv[0]).name == "anysplade" else sys.argv[0]


def _quoted(argument: str) -> str:
    """An argument quoted for a shell; in NAME=VALUE only the value, so that a token with spaces is removed as a whole."""
    name, equals, value = argument.partition("=")
    return f"{name}={shlex.quote(value)}" if equals and re.fullmatch(r"[\w-]+", name) else shlex.quote(argument)


def _commit() -> str | None:
    """The commit of the running source tree; None if this file is not tracked by git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        tracked = subprocess.run([*command[:3], "ls-files", "--error-unmatch", __file__], capture_output=True, check=False)
        if tracked.returncode:
            return None
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
