"""One index that many ask at once: a thread that encodes what waits together, and opens the index anew when it was rebuilt."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scipy import sparse

from anysplade.bm25 import BM25
from anysplade.encoding import encode
from anysplade.errors import AnyspladeError
from anysplade.index import Index, explain_score
from anysplade.records import Filter, Hit, TermMatch

logger = logging.getLogger(__name__)

BATCH = 32  # requests that are encoded together
WAITING = 256  # requests at most; more are turned away
PATIENCE = 0.005  # seconds at most for those to ask again that were answered together

Role = Literal["query", "document"]


class OverloadedError(AnyspladeError):
    """So many requests wait that another one is turned away."""


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
    """

    def __init__(self, folder: str | Path, beside: str | None = None) -> None:
        """Open an index and load its model.

        Args:
            beside: another index, or bm25, to compare with.

        Raises:
            DataError, ModelError: as ``Index.load`` does and loading its model.
        """
        self.folder = Path(folder).expanduser()
        self.beside = beside
        self.index = Index.load(self.folder)
        _ = self.index.encoder
        self.documents = len(self.index)  # nobody else writes while this process holds the index
        self.other: Index | None = None
        if beside not in (None, "bm25"):
            self.other = Index.load(str(beside))
            _ = self.other.encoder
        self._bm25: tuple[BM25, list[str]] | None = None
        self._stamp = self._made()
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue(WAITING)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="searcher")
        self._loop: asyncio.Task[None] | None = None
        self.on_batch: Callable[[int], None] = lambda size: None

    def start(self) -> None:
        self._loop = asyncio.create_task(self._serve())

    async def stop(self) -> None:
        """Answer what waits, then close the index."""
        while not self._jobs.empty():
            await asyncio.sleep(0.01)
        if self._loop is not None:
            self._loop.cancel()
        self._thread.shutdown()
        self.index.close()
        if self.other is not None:
            self.other.close()

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

        def work(_: sparse.csr_matrix) -> list[Hit]:
            if self.other is not None:
                return self.other.search(query, k, explain=True)
            if self._bm25 is None:
                documents = list(self.index.store)
                self._bm25 = BM25([d.document.full_text for d in documents]), [d.id for d in documents]
            found, scores = self._bm25[0].top([query], k)[0]
            hits = []
            for position, score in zip(found.tolist(), scores.tolist(), strict=True):
                document = self.index.store.find(self._bm25[1][position])
                if document is not None:
                    hits.append(Hit(document.id, score, document.document.title, document.document.text))
            return hits

        return await self._ask([], "query", work)

    async def call(self, work: Callable[[], Any]) -> Any:
        """Anything else that needs the model or the engine."""
        return await self._ask([], "query", lambda _: work())

    async def _ask(self, texts: Sequence[str], role: Role, work: Callable[[sparse.csr_matrix], Any]) -> Any:
        job = _Job(texts, role, work, asyncio.get_running_loop().create_future())
        try:
            self._jobs.put_nowait(job)
        except asyncio.QueueFull:
            raise OverloadedError(f"{WAITING} requests wait already; try again in a moment") from None
        return await job.done

    # ------------------------------------------------------------------------------------ the thread

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
            self.on_batch(len(wanted))
            last = len(batch)
            try:
                results = await loop.run_in_executor(self._thread, self._work, wanted)
            except Exception as failure:
                results = [(None, failure)] * len(wanted)
            for job, (value, error) in zip(wanted, results, strict=True):
                if job.done.cancelled():
                    continue
                if error is None:
                    job.done.set_result(value)
                else:
                    job.done.set_exception(error)

    def _work(self, jobs: Sequence[_Job]) -> list[tuple[Any, BaseException | None]]:
        self._reload()
        vectors: dict[int, sparse.csr_matrix] = {}
        results: list[tuple[Any, BaseException | None]] = []
        failed: BaseException | None = None
        try:
            roles: tuple[Role, ...] = ("query", "document")
            for role in roles:
                of = [job for job in jobs if job.role == role and job.texts]
                rows = encode(self.index.encoder, [text for job in of for text in job.texts], role) if of else None
                start = 0
                for job in of:
                    assert rows is not None
                    vectors[id(job)] = rows[start : start + len(job.texts)]
                    start += len(job.texts)
        except Exception as error:
            failed = error
        nothing = sparse.csr_matrix((0, 0))
        for job in jobs:
            try:
                if failed is not None and job.texts:
                    raise failed
                results.append((job.work(vectors.get(id(job), nothing)), None))
            except Exception as error:
                results.append((None, error))
        return results

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
            fresh = Index.load(self.folder)
            _ = fresh.encoder
        except Exception as error:  # whatever is wrong with it, the old one answers
            logger.warning("the index changed and cannot be opened yet: %s", error)
        else:
            self.index.close()
            self.index, self.documents, self._bm25 = fresh, len(fresh), None
            logger.info("%s: opened anew, %d documents", self.folder, self.documents)
        self._stamp = stamp
