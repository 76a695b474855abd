"""BM25's search for many queries, in several processes that share one index."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise

import numpy as np

from anysplade.errors import OptionError

Found = tuple[np.ndarray, np.ndarray]  # positions of documents and their scores, the best first

_top: Callable[[list[str]], list[Found]]  # of a worker


@contextmanager
def bm25_search(documents: Sequence[str], depth: int, workers: int) -> Iterator[Callable[[list[str]], list[Found]]]:
    """The ``depth`` best documents for each of several queries; what is found does not depend on the number of ``workers``."""
    from anysplade.search.bm25 import BM25

    bm25 = BM25(documents)

    def top(queries: list[str]) -> list[Found]:
        return bm25.top(queries, depth)

    if workers == 1:
        yield top
        return
    with multiprocessing.get_context("fork").Pool(workers, _begin, (top,)) as pool:  # a fork shares the index instead of copying it

        def search(queries: list[str]) -> list[Found]:
            limits = [i * len(queries) // workers for i in range(workers + 1)]
            parts = [queries[start:end] for start, end in pairwise(limits)]
            return list(chain.from_iterable(pool.map(_search, parts, 1)))

        yield search


def check_workers(workers: int) -> None:
    """Raise OptionError unless BM25 can search in as many processes here."""
    if workers < 1:
        raise OptionError(f"`workers` is {workers}: it is at least 1")
    if workers > 1 and "fork" not in multiprocessing.get_all_start_methods():
        raise OptionError(f"`workers` is {workers}: this system cannot copy a process; leave it at 1")


def _begin(top: Callable[[list[str]], list[Found]]) -> None:
    global _top
    _top = top
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others


def _search(queries: list[str]) -> list[Found]:
    return _top(queries)
