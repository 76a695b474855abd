"""What libraries and other parts of anysplade log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_least(level: int, *loggers: str) -> Iterator[None]:
    """A time in which some loggers log only records of a level or higher."""
    before = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    try:
        for logger in before:
            logger.setLevel(level)
        yield
    finally:
        for logger, own in before.items():
            logger.setLevel(own)
