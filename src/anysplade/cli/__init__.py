"""The command line: one command is one library call, one module a group of commands."""

from anysplade.cli import evaluation, heads, search, study, training  # noqa: F401  (importing them registers their commands)
from anysplade.cli.app import app, main, run

__all__ = ["app", "main", "run"]
