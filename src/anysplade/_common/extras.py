"""Imports of optional libraries, which extras of the package install, such as ``anysplade[search]``."""

from collections.abc import Iterator
from contextlib import contextmanager

from anysplade.errors import ExtraError

_TRAIN = {"accelerate", "datasets", "pandas", "sentence_transformers", "sklearn", "torch", "transformers"}


def missing_library(error: ModuleNotFoundError) -> ModuleNotFoundError | ExtraError:
    """The ExtraError for a library of ``anysplade[train]``, which many modules import at their top; for others the error itself."""
    if error.name not in _TRAIN:
        return error
    return ExtraError(f'{error.name} is not installed: pip install "anysplade[train]"')


@contextmanager
def extra(name: str) -> Iterator[None]:
    """A context for importing the libraries of an extra; if one is missing, the ExtraError gives the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "anysplade").startswith("anysplade"):
            raise
        raise ExtraError(f'{error.name} is not installed: pip install "anysplade[{name}]"') from error
