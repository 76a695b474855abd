"""Progress of long work: a bar in a terminal, occasional log lines elsewhere."""

import logging
import math
import sys
import time
from contextlib import nullcontext
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

_FIRST_WAIT = 5.0  # seconds until the first log line
_WAIT, _WAIT_SHARE = 30.0, 0.1  # seconds between log lines, and at least this share of the time so far
_MANY = 200  # texts; fewer are encoded in a second or two, and need no log line


def bar(what: str, unit: str, total: int | None = None, show: bool = False, done: int = 0) -> tqdm:
    """A context that shows the progress of a task; ``update(n)`` adds n units, whose name is in the singular, to those done."""
    if show and not sys.stderr.isatty():
        return _Lines(what, unit, total, done)
    return tqdm(desc=what, unit=unit, total=total, initial=done, disable=not show, leave=False, file=sys.stderr)


def bar_within(shown: Any, what: str, unit: str, total: int | None = None, show: bool = False) -> Any:
    """The ``bar`` of the caller, ``shown``, which stays open; a new one if that is None."""
    return bar(what, unit, total, show) if shown is None else nullcontext(shown)


def begin(what: str, show: bool, count: float = math.inf) -> None:
    """Log that a task begins, unless it has so few texts that it takes only a second or two."""
    if show and count >= _MANY:
        logger.info("%s", what)


def duration(seconds: float) -> str:
    """A time for a message: "40 seconds", "17 minutes", "2.5 hours"."""
    if seconds >= 5400:
        count, unit = f"{seconds / 3600:,.1f}".removesuffix(".0"), "hour"
    elif seconds >= 90:
        count, unit = str(round(seconds / 60)), "minute"
    else:
        count, unit = str(max(1, round(seconds))), "second"
    return f"{count} {unit}{'' if count == '1' else 's'}"


def counted(count: int, unit: str) -> str:
    """A number of things for a message: "1 seed", "1,240 queries"."""
    plural = f"{unit[:-1]}ies" if unit.endswith("y") else f"{unit}es" if unit.endswith("ss") else f"{unit}s"
    return f"{count:,} {unit if count == 1 else plural}"


class _Lines(tqdm):
    """A bar that is not drawn; it logs its progress instead."""

    n: int
    total: int | None

    def __init__(self, what: str, unit: str, total: int | None, done: int) -> None:
        super().__init__(disable=True)
        self.what, self.unit, self.total = what, unit, total
        self.n = self._before = done
        self._start: float | None = None
        self._last = 0.0
        self._wait = _FIRST_WAIT
        begin(f"{what}: {counted(total or 0, unit)}", True, (total or 0) - done)

    def update(self, n: int = 1) -> None:  # type: ignore[override]  # counts whole units
        self.n += n
        now = time.monotonic()
        if self._start is None:  # the time until the first units is no estimate: it includes opening a model
            self._start = self._last = now
            self._before = self.n
        if now - self._last < self._wait or self.n == self.total:
            return
        self._last, self._wait = now, max(_WAIT, _WAIT_SHARE * (now - self._start))
        done = ("" if self.total is None else f"{self.n:,} of ") + counted(self.n if self.total is None else self.total, self.unit)
        left = (now - self._start) * ((self.total or 0) - self.n) / max(1, self.n - self._before)
        logger.info("%s: %s%s", self.what, done, f", about {duration(left)} left" if left > 0 else "")
