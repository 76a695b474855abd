"""The provenance of a result: versions, commit, hardware and command, so that it can be reproduced."""

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
    """Versions, commit, hardware and command line, without credentials, of this process."""
    import torch

    program = "anysplade" if Path(sys.argv[0]).name == "anysplade" else sys.argv[0]
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
        "command": without_credentials(" ".join(map(_quoted, [program, *sys.argv[1:]]))),
    }


def _quoted(argument: str) -> str:
    """Quote an argument for a shell; only the value in NAME=VALUE, so that a token with spaces is removed completely."""
    name, equals, value = argument.partition("=")
    return f"{name}={shlex.quote(value)}" if equals and re.fullmatch(r"[\w-]+", name) else shlex.quote(argument)


def _commit() -> str | None:
    """The commit of the running source tree; None if git does not track this file."""
    git = ["git", "-C", str(Path(__file__).parent)]
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
