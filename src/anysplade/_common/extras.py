"""Optional libraries, which are installed with an extra of the package, such as ``anysplade[search]``."""

from collections.abc import Iterator
from contextlib import contextmanager

from anysplade.errors import ExtraError


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import the libraries of an extra: ``with extra("search"): import qdrant_edge``.

    Raises:
        ExtraError: a library is not installed; the message has the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "anysplade").startswith("anysplade"):
            raise
        raise ExtraError(f'{error.name} is not installed: pip install "anysplade[{name}]"') from error
