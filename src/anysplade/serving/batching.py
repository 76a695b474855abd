"""One index that many ask at once: a thread that encodes what waits together, and opens the index anew when it was rebuilt.

Another thread reads the whole index where something needs that, so that searches do not wait for it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from scipy import sparse

from anysplade.errors import AnyspladeError
from anysplade.evaluation.bm25 import BM25
from anysplade.model.encoding import encode
from anysplade.model.options import Role
from anysplade.search.documents import EncodedDocument, Filter, Hit, TermMatch
from anysplade.search.index import Index, explain_score

logger = logging.getLogger(__name__)

BATCH = 32  # requests that are encoded together
WAITING = 256  # requests at most; more are turned away
PATIENCE = 0.005  # seconds at most for those to ask again that were answered together

T = TypeVar("T")
_Outcome = tuple[Any, Exception | None]


class OverloadedError(AnyspladeError):
    """So many requests wait that another one is turned away."""


class StoppedError(AnyspladeError):
    """The searcher was not started, was stopped, or failed as a whole."""

    def __init__(self) -> None:
        super().__init__("the index is not being searched any more; start the server again")


@dataclass
class _Job:
    texts: Sequence[str]
    role: Role
    work: Callable[[sparse.csr_matrix], Any]  # with the texts' vectors
    done: "asyncio.Future[Any]"


class Searcher:
    """Answers from an index; to be used on one event loop, between ``start`` and ``stop``.

    Model and engine are touched by one thread alone. While it works, requests gather, and it encodes them
    together next: the busier, the larger the batches. Clients that were answered together ask again one after the
    other; the first of them waits for the rest, for a moment, so that they are encoded together again.

    The other index shares that thread: a comparison costs two searches.
    """

    def __init__(self, folder: str | Path, beside: str | None = None, model: str | Path | None = None) -> None:
        """Open an index and load its model.

        Args:
            beside: another index, or bm25, to compare with.
            model: as ``Index.load`` has it, of the first index.

        Raises:
            DataError, ModelError: as ``Index.load`` does and loading its model.
        """
        self.folder = Path(folder).expanduser()
        self.beside = beside
        self._model = model
        self.index = Index.load(self.folder, model)
        _ = self.index.encoder
        self.documents = len(self.index)  # nobody else writes while this process holds the index
        self.other: Index | None = None
        if beside not in (None, "bm25"):
            self.other = Index.load(str(beside))
            _ = self.other.encoder
        self._stamp = self._made()
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._unanswered: set[asyncio.Future[Any]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="searcher")
        self._second = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._once: dict[str, tuple[Index, asyncio.Task[Any]]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop: asyncio.Task[None] | None = None
        self._stopping = False
        self.on_batch: Callable[[int], None] = lambda size: None

    def start(self) -> None:
        self._loop = asyncio.create_task(self._serve())
        self._loop.add_done_callback(self._ended)

    async def stop(self) -> None:
        """Answer what is under way and what waits, refuse what comes later, then close the index.

        A pass over the whole index is given up, unless it is building BM25, which cannot be interrupted.
        """
        self._stopping = True
        if self._loop is not None:
            first: list[asyncio.Future[Any]] = [asyncio.gather(*self._unanswered, return_exceptions=True), self._loop]
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            self._loop.cancel()
            await asyncio.gather(self._loop, *self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._thread.shutdown()
        self._second.shutdown()
        self.index.close()
        if self.other is not None:
            self.other.close()

    def _ended(self, loop: "asyncio.Task[None]") -> None:
        """However the loop ended: nobody waits for it."""
        if not loop.cancelled() and loop.exception() is not None:
            logger.error("the index cannot be searched any more: %r", loop.exception())
        for future in list(self._unanswered):
            if not future.done():
                future.set_exception(StoppedError())

    @property
    def running(self) -> bool:
        return self._loop is not None and not self._loop.done() and not self._stopping

    @property
    def waiting(self) -> int:
        return self._jobs.qsize()

    # ---------------------------------------------------------------------------------- requests

    async def search(self, query: str, k: int, explain: bool, wanted: Filter | None = None) -> list[Hit]:
        return await self._ask([query], "query", lambda vector: self.index.search_vector(vector, k, explain, wanted))

    async def search_and_encode(self, query: str, k: int) -> tuple[list[Hit], sparse.csr_matrix]:
        """Hits with their terms, and the query's vector."""
        return await self._ask([query], "query", lambda vector: (self.index.search_vector(vector, k, True), vector))

    async def encode(self, texts: Sequence[str], role: Role) -> sparse.csr_matrix:
        return await self._ask(texts, role, lambda vectors: vectors)

    async def explain(self, query: str, id_: str) -> list[TermMatch] | None:
        """The terms that make a document's score; None if there is no such document."""

        def work(vector: sparse.csr_matrix) -> list[TermMatch] | None:
            document = self.index.store.find(id_)
            return None if document is None else explain_score(self.index.encoder, vector, document.terms, document.weights)

        return await self._ask([query], "query", work)

    async def search_beside(self, query: str, k: int) -> list[Hit]:
        """Hits of the other index, or of BM25 over this index's texts."""
        if self.other is not None:
            other = self.other
            return await self.call(lambda: other.search(query, k, explain=True))
        bm25, ids = await self.once("bm25", self._index_texts)

        def work() -> list[Hit]:
            found, scores = bm25.top([query], k)[0]
            hits = []
            for position, score in zip(found.tolist(), scores.tolist(), strict=True):
                document = self.index.store.find(ids[position])
                if document is not None:
                    hits.append(Hit(document.id, score, document.content.title, document.content.text))
            return hits

        return await self.call(work)

    async def _index_texts(self, index: Index) -> tuple[BM25, list[str]]:
        def work() -> tuple[BM25, list[str]]:
            texts, ids = [], []
            for document in self.every_document(index):
                texts.append(document.content.full_text)
                ids.append(document.id)
            return BM25(texts), ids

        return await self.aside(work)

    async def call(self, work: Callable[[], T]) -> T:
        """Anything else that needs the model or the engine."""
        return cast(T, await self._ask([], "query", lambda _: work()))

    # ------------------------------------------------------------------------------- what takes long

    async def once(self, name: str, make: Callable[[Index], Coroutine[Any, Any, T]]) -> T:
        """What takes long to find out about an index: made once, for all who ask meanwhile and afterwards."""
        while True:
            index = await self.call(lambda: self.index)  # opened anew if it was rebuilt
            known = self._once.get(name)
            if known is None or known[0] is not index or _failed(known[1]):
                known = self._once[name] = index, asyncio.create_task(make(index))
                self._tasks.add(known[1])
                known[1].add_done_callback(self._tasks.discard)
            try:
                return cast(T, await asyncio.shield(known[1]))  # a client that goes away ends it for nobody else
            except Exception:
                if self.index is index or not self.running:
                    raise  # otherwise the index was closed meanwhile, and there is a new one

    async def aside(self, work: Callable[[], T]) -> T:
        """Work on the second thread, which must not touch the model or the engine; one at a time."""
        if not self.running:
            raise StoppedError
        found, error = await asyncio.get_running_loop().run_in_executor(self._second, _outcome, work)
        if error is not None:
            raise error
        return cast(T, found)

    def every_document(self, index: Index) -> Iterator[EncodedDocument]:
        """For work on the second thread.

        Raises:
            StoppedError: the searcher is being stopped, or has another index by now.
        """
        for document in index.store:
            if self._stopping or index is not self.index:
                raise StoppedError
            yield document

    # ------------------------------------------------------------------------------------ the thread

    async def _ask(self, texts: Sequence[str], role: Role, work: Callable[[sparse.csr_matrix], Any]) -> Any:
        if not self.running:
            raise StoppedError
        if self._jobs.qsize() >= WAITING:
            raise OverloadedError(f"{WAITING} requests wait already; try again in a moment")
        job = _Job(texts, role, work, asyncio.get_running_loop().create_future())
        self._unanswered.add(job.done)
        job.done.add_done_callback(self._unanswered.discard)
        self._jobs.put_nowait(job)
        return await job.done

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        last = 1
        while True:
            batch = [await self._jobs.get()]
            patient = loop.time() + PATIENCE
            while 1 + self._jobs.qsize() < last and loop.time() < patient:
                await asyncio.sleep(PATIENCE / 10)
            while len(batch) < BATCH and not self._jobs.empty():
                batch.append(self._jobs.get_nowait())
            wanted = [job for job in batch if not job.done.cancelled()]  # the others' clients are gone
            last = len(batch)
            results, failure = await loop.run_in_executor(self._thread, _outcome, partial(self._work, wanted))
            if failure is not None:
                results = [(None, failure)] * len(wanted)
            for job, (value, error) in zip(wanted, results, strict=True):
                if job.done.done():
                    continue
                if error is None:
                    job.done.set_result(value)
                else:
                    job.done.set_exception(error)

    def _work(self, jobs: Sequence[_Job]) -> list[_Outcome]:
        self.on_batch(len(jobs))
        self._reload()
        vectors, failed = _outcome(partial(self._encode, jobs))
        nothing = sparse.csr_matrix((0, 0))
        return [
            (None, failed)
            if failed is not None and job.texts
            else _outcome(partial(job.work, (vectors or {}).get(id(job), nothing)))
            for job in jobs
        ]

    def _encode(self, jobs: Sequence[_Job]) -> dict[int, sparse.csr_matrix]:
        """Vectors of the texts of each job that has any, by its identity."""
        vectors: dict[int, sparse.csr_matrix] = {}
        roles: tuple[Role, ...] = ("query", "document")
        for role in roles:
            of = [job for job in jobs if job.role == role and job.texts]
            if not of:
                continue
            rows = encode(self.index.encoder, [text for job in of for text in job.texts], role)
            start = 0
            for job in of:
                vectors[id(job)] = rows[start : start + len(job.texts)]
                start += len(job.texts)
        return vectors

    def _made(self) -> tuple[int, int] | None:
        try:
            status = (self.folder / "index.json").stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _reload(self) -> None:
        """Take the index that lies in the folder now; until it is whole, the old one answers."""
        stamp = self._made()
        if stamp is None or stamp == self._stamp:
            return
        try:
            fresh = Index.load(self.folder, self._model)
            _ = fresh.encoder
        except Exception as error:  # whatever is wrong with it, the old one answers
            logger.warning("the index changed and cannot be opened yet: %s", error)
        else:
            self._second.submit(self.index.close)  # after what is under way there
            self.index, self.documents = fresh, len(fresh)
            self._once.clear()
            logger.info("%s: opened anew, %d documents", self.folder, self.documents)
        self._stamp = stamp


def _failed(task: "asyncio.Task[Any]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _outcome(work: Callable[[], Any]) -> _Outcome:
    """What it returned, or raised.

    An executor's future must raise neither the engine's panics, which are no Exceptions and would end the loop, nor
    StopIteration, which asyncio does not pass on, so that whoever waits for it would wait forever.
    """
    try:
        return work(), None
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            return None, error
        return None, AnyspladeError(f"failed: {error!r}")
