"""Encode documents in this process, in several processes, or on a Ray cluster.

Documents are encoded in parts of 1,024. The vectors of a part depend only on its documents, the model and the options, not on the
process that computes them (given the same number of threads per process: sums of floats depend on how they are split).
"""

import io
import json
import math
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from sentence_transformers import SparseEncoder

from anysplade._common.extras import extra
from anysplade._common.files import write_atomic
from anysplade._common.hashing import DataHash
from anysplade._common.parts import DAMAGED
from anysplade._common.progress import bar, begin
from anysplade._common.workers import devices_of_workers, take_device
from anysplade.data.corpus import Document
from anysplade.errors import OptionError, worker_died
from anysplade.model.encoder import open_encoder
from anysplade.model.encoding import count_truncated, encode
from anysplade.model.modules import cut_within
from anysplade.model.options import Precision, Runtime, checked_option
from anysplade.model.queries import Cut, log_cut
from anysplade.model.runtimes import for_inference
from anysplade.search.documents import EncodedDocument

PART = 1024  # documents that are encoded together, and written to an index in one transaction
_COUNTED = 16  # parts that are read before the first one is encoded: a smaller corpus has an estimate of the time
_AHEAD = 2  # parts per worker that are prepared in advance


class Options(NamedTuple):
    """The options that change the vectors of documents."""

    model: str
    precision: Precision  # not "auto"
    top_k: int | None  # weights kept per document, an approximation; all if None
    max_length: int | None  # tokens read per document; the limit of the model if None
    runtime: Runtime = "auto"

    def open(self) -> SparseEncoder:
        """The encoder on this runtime, in this precision."""
        return for_inference(cut_within(open_encoder(self.model), self.max_length), self.runtime, self.precision)


class _Part(NamedTuple):
    """Documents that are encoded together."""

    ids: list[str]
    documents: list[Document]

    @property
    def texts(self) -> list[str]:
        return [document.full_text for document in self.documents]

    def hash(self) -> str:
        return DataHash(zip(self.ids, self.texts, strict=True)).hexdigest()


class _Rows(NamedTuple):
    """The vectors of a part."""

    matrix: sparse.csr_matrix  # (documents, vocabulary)
    cut: Cut  # how many documents were cut


def encode_documents(
    documents: Iterable[tuple[str, Document]],
    options: Options,
    *,
    workers: int = 1,
    ray: bool = False,
    encoder: Callable[[], SparseEncoder] | None = None,
    shards: Path | None = None,
    progress: bool = False,
) -> Iterator[list[EncodedDocument]]:
    """Encode documents in their order, and yield up to 1,024 at a time.

    The documents are read once. The model is opened only if there is a part to encode. At the end the number of documents that
    were cut is logged.

    Args:
        workers: number of processes, each with the model; up to ``2 * workers`` parts, or 16, are in memory.
        ray: encode on a Ray cluster instead (``pip install "anysplade[ray]"``), with ``workers`` actors; all documents are in
            memory.
        encoder: opens the encoder of a single process; ``options.open`` if None.
        shards: a folder that keeps the vectors of each part in a file, so that an interrupted call does not encode the part
            again unless its documents changed.

    Raises:
        OptionError: an option is invalid; see ``check_encoding``.
        ModelError: the model cannot be opened, or gives NaN or infinity.
        AnyspladeError: a worker died.
    """
    check_encoding(options.top_k, options.max_length, workers)
    parts = _parts(documents)
    first = list(islice(parts, _COUNTED))
    count = sum(len(part.ids) for part in first)
    total = count if count < _COUNTED * PART else None  # of a large corpus, it is known at its end
    if total is None:
        begin("encoding documents", progress)
    numbered = enumerate(chain(first, parts))
    jobs = ((part, None if shards is None else _read_shard(shards, number, part)) for number, part in numbered)
    cut, count = Cut(0), 0
    with bar("encoding documents", "document", total, progress) as shown:
        if ray:
            run = _on_ray(jobs, options, workers)
        else:
            run = _in_processes(jobs, options, workers) if workers > 1 else _here(jobs, options, encoder or options.open, shown)
        for number, (part, rows, is_new) in enumerate(run):
            if shards is not None and is_new:
                write_atomic(shards / f"{number:06}.npz", _to_bytes(rows, part))
            cut, count = rows.cut._replace(texts=cut.texts + rows.cut.texts), count + len(part.ids)
            shown.update(len(part.ids) if ray or workers > 1 or not is_new else 0)  # else updated within the part
            spans = [slice(*rows.matrix.indptr[i : i + 2]) for i in range(len(part.ids))]
            yield [
                EncodedDocument(id_, document, rows.matrix.indices[span], rows.matrix.data[span])
                for id_, document, span in zip(*part, spans, strict=True)
            ]
    log_cut(cut, count, "documents")


def check_encoding(top_k: Any, max_length: Any, workers: Any) -> tuple[int | None, int | None, int]:
    """The options of encoding as ints.

    Raises:
        OptionError: one is not a whole number of at least 1.
    """
    checked = {
        "top_k": checked_option("top_k", top_k, int | None),
        "max_length": checked_option("max_length", max_length, int | None),
        "workers": checked_option("workers", workers, int),
    }
    for name, value in checked.items():
        if value is not None and value < 1:
            raise OptionError(f"`{name}` is {value}: it is at least 1")
    return checked["top_k"], checked["max_length"], checked["workers"]


def _parts(documents: Iterable[tuple[str, Document]]) -> Iterator[_Part]:
    iterator = iter(documents)
    while chunk := list(islice(iterator, PART)):
        yield _Part([id_ for id_, _ in chunk], [document for _, document in chunk])


def _encode(encoder: SparseEncoder, part: _Part, top_k: int | None, shown: Any = None) -> _Rows:
    matrix = encode(encoder, part.texts, "document", ids=part.ids, top_k=top_k, shown=shown)
    return _Rows(matrix, count_truncated(encoder, part.texts, "document"))


# ------------------------------------------------------------------------------ where parts are encoded

_Jobs = Iterator[tuple[_Part, _Rows | None]]  # parts, and their vectors if an earlier call kept them
_Run = Iterator[tuple[_Part, _Rows, bool]]  # the parts in the same order, and whether the vectors are new


def _here(jobs: _Jobs, options: Options, open_: Callable[[], SparseEncoder], shown: Any) -> _Run:
    opened = cache(open_)
    for part, rows in jobs:
        yield part, rows or _encode(opened(), part, options.top_k, shown), rows is None


def _in_processes(jobs: _Jobs, options: Options, workers: int) -> _Run:
    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")  # a forked process cannot use torch's threads
    waiting: deque[tuple[_Part, Future[_Rows] | _Rows]] = deque()

    def oldest() -> tuple[_Part, _Rows, bool]:
        part, rows = waiting.popleft()
        return (part, rows.result(), True) if isinstance(rows, Future) else (part, rows, False)

    with ProcessPoolExecutor(workers, context, _start_worker, (devices_of_workers(context, workers), threads)) as pool:
        try:
            for part, rows in jobs:
                waiting.append((part, rows or pool.submit(_work, part, options)))
                while len(waiting) > _AHEAD * workers:
                    yield oldest()
            while waiting:
                yield oldest()
        except BrokenProcessPool as error:
            raise worker_died(options.model) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker(devices: Any, threads: int) -> None:
    take_device(devices)
    torch.set_num_threads(threads)


_opened = cache(Options.open)  # the encoder of a worker process; not opened in _start_worker, whose errors the pool hides


def _work(part: _Part, options: Options) -> _Rows:
    return _encode(_opened(options), part, options.top_k)


def _on_ray(jobs: _Jobs, options: Options, workers: int) -> _Run:
    with extra("ray"):
        import ray.data
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    found = list(jobs)
    missing = [{"part": json.dumps(part)} for part, rows in found if rows is None]
    encoded: Iterator[Any] = iter(())
    if missing:
        if not ray.is_initialized():
            ray.init()
        cores, gpus = _share([node["Resources"] for node in ray.nodes() if node["Alive"]], workers)
        actor: Any = _RayActor
        dataset = ray.data.from_items(missing, override_num_blocks=len(missing))
        asked = {"concurrency": workers, "num_cpus": cores} | ({"num_gpus": gpus} if gpus else {})
        encoded = iter(dataset.map(actor, fn_constructor_args=(options, cores), **asked).iter_rows())
    for part, rows in found:
        if rows is not None:
            yield part, rows, False
        elif new := _from_bytes(next(encoded)["shard"]):
            yield part, new, True


def _share(nodes: Sequence[Mapping[str, float]], workers: int) -> tuple[int, float]:
    """Cores and GPUs (or a fraction of one) per actor. By default Ray gives an actor one core, and hides the GPUs from it.

    Args:
        nodes: the resources of each node, as Ray lists them; nodes without a GPU are not used if others have one.
    """
    nodes = [node for node in nodes if node.get("GPU")] or nodes
    gpus = sum(node.get("GPU", 0) for node in nodes)
    actors_per_gpu = math.ceil(workers / gpus) if gpus else 0

    def places(cores: int) -> float:
        return sum(min(node.get("CPU", 0) // cores, node["GPU"] * actors_per_gpu if gpus else math.inf) for node in nodes)

    most = int(sum(node.get("CPU", 0) for node in nodes)) // workers
    cores = next((cores for cores in range(most, 1, -1) if places(cores) >= workers), 1)
    return cores, 1 / actors_per_gpu if gpus else 0


class _RayActor:
    def __init__(self, options: Options, threads: int) -> None:
        torch.set_num_threads(threads)
        self.encoder, self.top_k = options.open(), options.top_k

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        ids, documents = json.loads(row["part"])
        part = _Part(ids, [Document(*document) for document in documents])
        return {"shard": _to_bytes(_encode(self.encoder, part, self.top_k), part)}


# ---------------------------------------------------------------------------------------- shards


def _to_bytes(rows: _Rows, part: _Part) -> bytes:
    """The vectors of a part as a NumPy archive, with a hash of its documents."""
    file = io.BytesIO()
    matrix = rows.matrix
    np.savez(
        file,
        allow_pickle=False,
        indptr=matrix.indptr.astype(np.int64),
        terms=matrix.indices.astype(np.int32),
        weights=matrix.data,
        about=np.array([matrix.shape[1], *(-1 if number is None else number for number in rows.cut)], np.int64),
        data_hash=np.frombuffer(part.hash().encode(), np.uint8),
    )
    return file.getvalue()


def _from_bytes(content: bytes, data_hash: str | None = None) -> _Rows | None:
    """The vectors in an archive; None if they belong to documents with another hash.

    Raises:
        OSError, ValueError, KeyError, BadZipFile: the archive is damaged.
    """
    with np.load(io.BytesIO(content)) as arrays:
        if data_hash is not None and arrays["data_hash"].tobytes().decode() != data_hash:
            return None
        vocabulary, count, *limits = arrays["about"].tolist()
        shape = (len(arrays["indptr"]) - 1, vocabulary)
        matrix = sparse.csr_matrix((arrays["weights"], arrays["terms"], arrays["indptr"]), shape=shape)
    return _Rows(matrix, Cut(count, *(None if number < 0 else number for number in limits)))


def _read_shard(folder: Path, number: int, part: _Part) -> _Rows | None:
    """The vectors that an earlier call kept; None if it kept none for these documents, or the file is damaged."""
    try:
        return _from_bytes((folder / f"{number:06}.npz").read_bytes(), part.hash())
    except DAMAGED:
        return None
