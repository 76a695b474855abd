"""The command line: each command is one library call, and each module a group of commands."""

import os

# Libraries read these variables when they are imported, so they are set before the imports below. Our own bars ignore them.
for _name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# ruff: noqa: E402

from anysplade.cli import cache, evaluation, heads, search, study, training  # noqa: F401  (importing them registers their commands)
from anysplade.cli.app import app, main, run

__all__ = ["app", "main", "run"]
