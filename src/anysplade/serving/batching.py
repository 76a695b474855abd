"""Search one index for many concurrent clients: requests that wait are encoded together.

One thread uses the model and the engine. A second thread reads the whole index for some pages, so that searches do not wait for it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from scipy import sparse

from anysplade._common.extras import extra
from anysplade._common.files import user_path
from anysplade._common.outputs import read_record
from anysplade.data.names import is_built_in
from anysplade.errors import AnyspladeError
from anysplade.model.options import Precision, Role, Runtime
from anysplade.search.documents import EncodedDocument
from anysplade.search.filters import Filter
from anysplade.search.fusion import Fusion
from anysplade.search.hits import Hit, Hits, TermMatch, explain_score
from anysplade.search.index import Index
from anysplade.search.rescoring import Rescorer, check_depth
from anysplade.search.vectors import OwnTerms

if TYPE_CHECKING:
    from anysplade.search.bm25 import BM25

logger = logging.getLogger(__name__)

MAX_BATCH = 32  # requests encoded together
MAX_WAITING = 256  # requests; more are refused
GATHER_SECONDS = 0.005  # the longest time that a request waits for others to join its batch

T = TypeVar("T")
_Result = tuple[Any, Exception | None]


class OverloadedError(AnyspladeError):
    """Too many requests are waiting to accept another one."""


class StoppedError(AnyspladeError):
    """The searcher was not started, was stopped, or failed as a whole."""

    def __init__(self) -> None:
        super().__init__("the index cannot be searched any more; start the server again")


@dataclass
class _Job:
    texts: Sequence[str]
    role: Role
    work: Callable[[sparse.csr_matrix], Any]  # called with the vectors
    future: "asyncio.Future[Any]"
    vectors: sparse.csr_matrix = field(default_factory=lambda: sparse.csr_matrix((0, 0)))  # (texts, vocabulary)


def _checked_language(language: str) -> str:
    from anysplade.search.languages import language_name  # only the comparison needs bm25s

    return language_name(language)


class Searcher:
    """Searches an index for many concurrent clients; for use on one event loop, between ``start`` and ``stop``.

    While the thread works, requests queue up, and it encodes them together next: the higher the load, the larger the batches.
    Clients that were answered together send their next requests one after the other. The first of these waits a few milliseconds
    for the rest, so that they are encoded together again. An index to compare with uses the same thread.
    """

    def __init__(
        self,
        folder: str | Path,
        beside: str | None = None,
        model: str | Path | None = None,
        *,
        runtime: Runtime = "auto",
        precision: Precision = "float32",
        language: str = "auto",
        fuse: Fusion | None = None,
        rerank: str | Path | None = None,
        rerank_depth: int = 100,
    ) -> None:
        """Open an index as ``Index.load`` does, and load its model if its queries need the model.

        Args:
            beside: another index, or bm25, to compare with.
            language: of BM25's stemmer and stop words; see ``evaluate``.
            model: of the first index, if it moved, and of the other one if it was built with the same.
            fuse, rerank, rerank_depth: of every search; see ``Index.search``.
        """
        self.folder = user_path(folder)
        self.beside = beside
        self._model = model
        self._language = language if beside is None or not is_built_in(beside, "bm25") else _checked_language(language)
        self._options: dict[str, Any] = {"runtime": runtime, "precision": precision}
        self.index = self._open(self.folder, model)
        self.index.check_fusion(fuse)
        self._fuse, self._depth = fuse, check_depth(1, rerank_depth)
        self._rescorer = None if rerank is None else Rescorer(str(rerank))
        self.documents = len(self.index)  # constant: no other process can write while this one has the index open
        self.other = None if beside is None or is_built_in(beside, "bm25") else self._open_other(user_path(beside))
        self._version = self._read_version()
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._futures: set[asyncio.Future[Any]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="searcher")
        self._second_thread = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._cache: dict[str, tuple[Index, asyncio.Task[Any]]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop: asyncio.Task[None] | None = None
        self._stopping = False
        self.on_batch: Callable[[int], None] = lambda size: None

    def start(self) -> None:
        """Accept requests."""
        self._loop = asyncio.create_task(self._run_batches())
        self._loop.add_done_callback(self._fail_waiting)

    async def stop(self) -> None:
        """Finish the running and the waiting requests, refuse later ones, then close the index.

        A pass over the whole index is abandoned, unless BM25 is being built, which cannot be interrupted.
        """
        self._stopping = True
        if self._loop is not None:
            pending: list[asyncio.Future[Any]] = [asyncio.gather(*self._futures, return_exceptions=True), self._loop]
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            self._loop.cancel()
            await asyncio.gather(self._loop, *self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._thread.shutdown()
        self._second_thread.shutdown()
        self.index.close()
        if self.other is not None:
            self.other.close()

    def _fail_waiting(self, loop: "asyncio.Task[None]") -> None:
        if not loop.cancelled() and loop.exception() is not None:
            logger.error("the index cannot be searched any more: %r", loop.exception())
        for future in list(self._futures):
            if not future.done():
                future.set_exception(StoppedError())

    @property
    def running(self) -> bool:
        """Whether requests are accepted."""
        return self._loop is not None and not self._loop.done() and not self._stopping

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return self._jobs.qsize()

    def check(self, k: int, fuse: Fusion | None = None) -> None:
        """Raise OptionError if a search with these options is impossible."""
        self.index.check_fusion(fuse or self._fuse)
        check_depth(k if self._rescorer is not None else 1, self._depth)

    async def search(self, query: str, k: int, explain: bool, filter: Filter | None = None, fuse: Fusion | None = None) -> Hits:
        """See ``Index.search``; without ``fuse`` it is that of the server."""
        return await self._submit([query], "query", lambda vector: self._search(query, vector, k, explain, filter, fuse))

    async def search_and_encode(self, query: str, k: int) -> tuple[list[Hit], sparse.csr_matrix]:
        """Hits with their terms, and the vector of the query, (1, vocabulary)."""
        return await self._submit([query], "query", lambda vector: (self._search(query, vector, k, explain=True), vector))

    def _search(
        self,
        query: str,
        vector: sparse.csr_matrix,
        k: int,
        explain: bool,
        filter: Filter | None = None,
        fuse: Fusion | None = None,
    ) -> Hits:
        """Search for a query with its vector, (1, vocabulary), on the thread that uses the model and the engine."""
        options: dict[str, Any] = {"fuse": fuse or self._fuse, "rerank": self._rescorer, "rerank_depth": self._depth}
        return self.index.search_vector(vector, k, explain, filter, text=query, **options)

    async def encode(self, texts: Sequence[str], role: Role) -> sparse.csr_matrix:
        """Vectors of texts, (texts, vocabulary)."""
        return await self._submit(texts, role, lambda vectors: vectors)

    async def explain(self, query: str, id_: str) -> list[TermMatch] | None:
        """The terms that add up to the score of a document, before fusion; None if there is no such document."""

        def work(vector: sparse.csr_matrix) -> list[TermMatch] | None:
            document = self.index.store.find(id_)
            if document is None:
                return None
            whole = self.index.complete(vector, query, explain=True)
            return explain_score(self.index.queries.term_names, whole.vector, document.terms, document.weights, whole.words)

        return await self._submit([query], "query", work)

    async def search_beside(self, query: str, k: int) -> list[Hit]:
        """Hits of the other index, or of BM25 over the texts of this index."""
        if self.other is not None:
            return await self.run(partial(self.other.search, query, k, explain=True))
        bm25, ids = await self.cached("bm25", self._build_bm25)

        def work() -> list[Hit]:
            positions, scores = bm25.top([query], k)[0]
            documents = [self.index.store.find(ids[position]) for position in positions.tolist()]
            return [
                Hit(document.id, score, document.content.title, document.content.text)
                for document, score in zip(documents, scores.tolist(), strict=True)
                if document is not None
            ]

        return await self.run(work)

    async def _build_bm25(self, index: Index) -> "tuple[BM25, list[str]]":
        from anysplade.search.bm25 import BM25  # only the comparison needs bm25s

        def work() -> tuple[BM25, list[str]]:
            texts = {document.id: document.content.full_text for document in self.read_documents(index)}
            return BM25(list(texts.values()), language=self._language), list(texts)

        return await self.run_second(work)

    async def run(self, work: Callable[[], T]) -> T:
        """Call any other function that needs the model or the engine, on the thread that uses them."""
        return await self._submit([], "query", lambda _: work())

    async def cached(self, name: str, compute: Callable[[Index], Coroutine[Any, Any, T]]) -> T:
        """A slow result about the index, computed once for all clients, and again after a failure or a rebuild of the index."""
        while True:
            index = await self.run(lambda: self.index)  # the new one, if it was rebuilt
            entry = self._cache.get(name)
            if entry is None or entry[0] is not index or _failed(entry[1]):
                entry = self._cache[name] = index, asyncio.create_task(compute(index))
                self._tasks.add(entry[1])
                entry[1].add_done_callback(self._tasks.discard)
            try:
                return await asyncio.shield(entry[1])  # a client that disconnects must not cancel it for the others
            except Exception:
                if self.index is index or not self.running:
                    raise  # otherwise the index was replaced and closed during the computation: repeat it for the new one

    async def run_second(self, work: Callable[[], T]) -> T:
        """Call a function on the second thread; it must not use the model or the engine."""
        if not self.running:
            raise StoppedError
        value, error = await asyncio.get_running_loop().run_in_executor(self._second_thread, _try, work)
        if error is not None:
            raise error
        return value

    def read_documents(self, index: Index) -> Iterator[EncodedDocument]:
        """All documents of an index, for functions on the second thread; a StoppedError if it stops, or the index is replaced."""
        for document in index.store:
            if self._stopping or index is not self.index:
                raise StoppedError
            yield document

    async def _submit(self, texts: Sequence[str], role: Role, work: Callable[[sparse.csr_matrix], Any]) -> Any:
        if not self.running:
            raise StoppedError
        if self._jobs.qsize() >= MAX_WAITING:
            raise OverloadedError(f"{MAX_WAITING} requests are already waiting; try again in a moment")
        job = _Job(texts, role, work, asyncio.get_running_loop().create_future())
        self._futures.add(job.future)
        job.future.add_done_callback(self._futures.discard)
        self._jobs.put_nowait(job)
        return await job.future

    async def _run_batches(self) -> None:
        loop = asyncio.get_running_loop()
        size = 1
        while True:
            batch = [await self._jobs.get()]
            deadline = loop.time() + GATHER_SECONDS
            while 1 + self._jobs.qsize() < size and loop.time() < deadline:
                await asyncio.sleep(GATHER_SECONDS / 10)
            while len(batch) < MAX_BATCH and not self._jobs.empty():
                batch.append(self._jobs.get_nowait())
            size = len(batch)
            jobs = [job for job in batch if not job.future.cancelled()]  # the clients of the others have disconnected
            results, failure = await loop.run_in_executor(self._thread, _try, partial(self._run_batch, jobs))
            if failure is not None:
                results = [(None, failure)] * len(jobs)
            for job, (value, error) in zip(jobs, results, strict=True):
                if error is not None and not job.future.done():
                    job.future.set_exception(error)
                elif not job.future.done():
                    job.future.set_result(value)

    def _run_batch(self, jobs: Sequence[_Job]) -> list[_Result]:
        self.on_batch(len(jobs))
        self._reload()
        failures = {}  # of one role, which may need a model that is not there, leaves the other alone
        for role in get_args(Role):
            _, failures[role] = _try(partial(self._encode, role, [job for job in jobs if job.role == role and job.texts]))
        return [
            (None, failures[job.role]) if failures[job.role] is not None and job.texts else _try(partial(job.work, job.vectors))
            for job in jobs
        ]

    def _encode(self, role: Role, jobs: Sequence[_Job]) -> None:
        if not jobs:
            return
        texts = list(chain.from_iterable(job.texts for job in jobs))
        rows = self.index.queries.encode(texts) if role == "query" else self._encode_documents(texts)
        ends = accumulate(len(job.texts) for job in jobs)
        for job, end in zip(jobs, ends, strict=True):
            job.vectors = rows[end - len(job.texts) : end]

    def _encode_documents(self, texts: list[str]) -> sparse.csr_matrix:
        with extra("train"):
            from anysplade.model.encoding import encode

        return encode(self.index.encoder, texts, "document")

    def _open(self, folder: Path, model: str | Path | None = None) -> Index:
        index = Index.load(folder, model, **self._options)
        if isinstance(index.queries, OwnTerms):  # else this loads the model, if queries need one
            index.close()
            raise index.queries.refusal()
        return index

    def _open_other(self, folder: Path) -> Index:
        """The index to compare with; ``model`` is that of the first one, and of this one if both have the same."""
        known = read_record(folder / "index.json") or {}
        same = known.get("model_fingerprint") == self.index.about["model_fingerprint"]
        return self._open(folder, self._model if same else None)

    def _read_version(self) -> tuple[int, int] | None:
        try:
            status = (self.folder / "index.json").stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _reload(self) -> None:
        """Open the index again if it was rebuilt; until the new one is complete, the old one stays in use."""
        version = self._read_version()
        if version is None or version == self._version:
            return
        try:
            index = self._open(self.folder, self._model)
        except Exception as error:  # any failure: the old index can still be searched
            logger.warning("the index changed and cannot be opened yet: %s", error)
        else:
            self._second_thread.submit(self.index.close)  # queued behind a pass that still reads it
            self.index, self.documents = index, len(index)
            self._cache.clear()
            logger.info("%s: opened the rebuilt index, %d documents", self.folder, self.documents)
        self._version = version


def _failed(task: "asyncio.Task[Any]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _try(work: Callable[[], Any]) -> _Result:
    """The value that a function returns, or the error that it raises.

    Two kinds of errors must not reach the future of an executor: panics of the engine, which are not Exceptions, would end the
    loop; and asyncio does not pass on StopIteration, so that the client would wait forever.
    """
    try:
        return work(), None
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            return None, error
        return None, AnyspladeError(f"failed: {error!r}")
