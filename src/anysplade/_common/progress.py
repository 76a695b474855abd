"""Work that shows itself: a bar where a person watches, a line in the log now and then where nobody does."""

import logging
import math
import sys
import time
from typing import Any, Self

from tqdm import tqdm

logger = logging.getLogger(__name__)

_FIRST, _EVERY, _SHARE = 5.0, 30.0, 0.1  # seconds until the first line and between lines, at least this share of the time so far
_MANY = 200  # units: fewer texts are encoded in a second or two, and need no line before they are


def bar(what: str, unit: str, total: int | None = None, show: bool = False, done: int = 0) -> "tqdm | _Lines":
    """The progress of one piece of work, as a context whose ``update(n)`` says that n more units are done.

    Args:
        what: in the words of a person, such as "encoding documents".
        unit: what is counted, in the singular.
        total: units in all; None if it is not known.
        show: whether anything is shown.
        done: units of them that were done before.
    """
    if show and not sys.stderr.isatty():
        return _Lines(what, unit, total, done)
    return tqdm(desc=what, unit=unit, total=total, initial=done, disable=not show, leave=False, file=sys.stderr)


def begin(what: str, show: bool, count: float = math.inf) -> None:
    """Say what begins, if it is on so many texts that it takes more than a second or two."""
    if show and count >= _MANY:
        logger.info("%s", what)


def duration(seconds: float) -> str:
    """A time as a person says it: "40 seconds", "17 minutes", "2.5 hours"."""
    for size, unit in ((3600, "hour"), (60, "minute"), (1, "second")):
        if seconds >= 1.5 * size or size == 1:
            count = f"{seconds / size:,.1f}".removesuffix(".0") if unit == "hour" else f"{max(1, round(seconds / size))}"
            break
    return f"{count} {unit}{'' if count == '1' else 's'}"


def counted(count: int, unit: str) -> str:
    """A number of things as a person says it: "1 seed", "1,240 queries"."""
    many = f"{unit[:-1]}ies" if unit.endswith("y") else f"{unit}es" if unit.endswith("ss") else f"{unit}s"
    return f"{count:,} {unit if count == 1 else many}"


class _Lines:
    """Progress in lines of the log."""

    def __init__(self, what: str, unit: str, total: int | None, done: int) -> None:
        self.what, self.unit, self.total = what, unit, total
        self.n = self._before = done
        self._start: float | None = None
        self._last = 0.0
        self._wait = _FIRST
        begin(f"{what}: {counted(total or 0, unit)}", True, (total or 0) - done)

    def update(self, n: int = 1) -> None:
        self.n += n
        now = time.monotonic()
        if self._start is None:  # what comes before the first units, such as opening a model, says nothing about the others
            self._start = self._last = now
            self._before = self.n
        if now - self._last < self._wait or self.n == self.total:
            return
        self._last, self._wait = now, max(_EVERY, _SHARE * (now - self._start))
        done = ("" if self.total is None else f"{self.n:,} of ") + counted(self.n if self.total is None else self.total, self.unit)
        left = (now - self._start) * ((self.total or 0) - self.n) / max(1, self.n - self._before)
        logger.info("%s: %s%s", self.what, done, f", about {duration(left)} left" if left > 0 else "")

    def set_postfix(self, **_: Any) -> None:
        """A bar's, which lines do without."""

    def close(self) -> None:
        """A bar's; a line needs no end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
