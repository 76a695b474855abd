"""The command line: one command is one library call, one module a group of commands."""

import os

# Libraries read these when they are imported, and some are imported below: other libraries' bars; ours decide for themselves.
for _name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# ruff: noqa: E402

from anysplade.cli import evaluation, heads, search, study, training  # noqa: F401  (importing them registers their commands)
from anysplade.cli.app import app, main, run

__all__ = ["app", "main", "run"]
