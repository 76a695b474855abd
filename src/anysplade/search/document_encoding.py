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

from anysplade._common.cache import mark_used
from anysplade._common.extras import extra
from anysplade._common.files import write_atomic
from anysplade._common.hashing import DataHash
from anysplade._common.parts import DAMAGED, read_rows, write_rows
from anysplade._common.progress import bar, begin
from anysplade._common.row_file import RowFile
from anysplade._common.workers import count_gpus, devices_of_workers, take_device
from anysplade.data.corpus import Document
from anysplade.errors import OptionError, worker_died
from anysplade.model.encoder import open_encoder
from anysplade.model.encoding import Encoded, Part, count_known, encode_parts
from anysplade.model.modules import cut_within, is_splade
from anysplade.model.options import Precision, Runtime, checked_batch_tokens, checked_option
from anysplade.model.own_words import PieceCounts
from anysplade.model.pruning import prune
from anysplade.model.queries import Cut, log_cut
from anysplade.model.runtimes import for_inference
from anysplade.model.tokenizing import count_truncated, limits_of
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


class _Texts(NamedTuple):
    """A part of texts without ids."""

    start: int  # number of the first one
    texts: Sequence[str]

    @property
    def ids(self) -> list[str]:
        return [f"text {self.start + i + 1}" for i in range(len(self.texts))]


class _Rows(NamedTuple):
    """The vectors of a part."""

    matrix: sparse.csr_matrix  # (documents, vocabulary)
    cut: Cut  # how many documents were cut
    pieces: PieceCounts | None = None  # of texts without ids


def encode_documents(
    documents: Iterable[tuple[str, Document]],
    options: Options,
    *,
    workers: int | None = None,
    batch_tokens: int | None = None,
    ray: bool = False,
    encoder: Callable[[], SparseEncoder] | None = None,
    shards: Path | None = None,
    progress: bool = False,
) -> Iterator[list[EncodedDocument]]:
    """Encode documents in their order, and yield up to 1,024 at a time.

    The documents are read once. The model is opened only if there is a part to encode. At the end the number of documents that
    were cut is logged.

    Args:
        workers: number of processes, each with the model; up to ``2 * workers`` parts, or 16, are in memory. None for one per GPU
            if there are several and more than 16,000 documents, otherwise 1.
        batch_tokens: tokens per batch; see ``encode``.
        ray: encode on a Ray cluster instead (``pip install "anysplade[ray]"``), with ``workers`` actors, by default one per GPU;
            all documents are in memory.
        encoder: opens the encoder of a single process; ``options.open`` if None.
        shards: a folder that keeps the vectors of each part in a file, so that an interrupted call does not encode the part
            again unless its documents changed.

    Raises:
        OptionError: an option is invalid; see ``check_encoding``.
        ModelError: the model cannot be opened, or gives NaN or infinity.
        AnyspladeError: a worker died.
    """
    _, _, workers = check_encoding(options.top_k, options.max_length, workers)
    batch_tokens = checked_batch_tokens(batch_tokens)
    parts = _parts(documents)
    first = list(islice(parts, _COUNTED))
    count = sum(len(part.ids) for part in first)
    total = count if count < _COUNTED * PART else None  # of a large corpus, it is known at its end
    if workers is None and not ray:  # a cluster has its own number of GPUs
        workers = workers_for(count)
    if total is None:
        begin("encoding documents", progress)
    numbered = enumerate(chain(first, parts))
    jobs = ((part, None if shards is None else _read_shard(shards, number, part)) for number, part in numbered)
    cut, count = Cut(0), 0
    with bar("encoding documents", "document", total, progress) as shown:
        if ray:
            run = _on_ray(jobs, options, workers, batch_tokens)
        elif workers is not None and workers > 1:
            run = _in_processes(jobs, options, workers, batch_tokens)
        else:
            run = _here(jobs, encoder or options.open, options.top_k, batch_tokens, shown)
        for number, (part, rows, is_new) in enumerate(run):
            if shards is not None and is_new:
                write_atomic(shards / f"{number:06}.npz", _to_bytes(rows, part))
            mark_used(shards)
            cut, count = rows.cut._replace(texts=cut.texts + rows.cut.texts), count + len(part.ids)
            shown.update(len(part.ids) if ray or workers != 1 or not is_new else 0)  # else updated within the part
            spans = [slice(*rows.matrix.indptr[i : i + 2]) for i in range(len(part.ids))]
            yield [
                EncodedDocument(id_, document, rows.matrix.indices[span], rows.matrix.data[span])
                for id_, document, span in zip(*part, spans, strict=True)
            ]
    log_cut(cut, count, "documents")


def encode_texts(
    encoder: SparseEncoder,
    texts: Sequence[str],
    options: Options,
    workers: int,
    *,
    batch_tokens: int | None = None,
    cache: Path | None = None,
    progress: bool = False,
    what: str = "encoding documents",
    pieces: PieceCounts | None = None,
) -> Encoded:
    """``encode_counted`` for documents, in several processes that each open the model of ``options``.

    Args:
        encoder: the same model, which counts the texts whose vectors are in the ``cache``.
        pieces: counts the texts' own pieces.
    """
    limits = limits_of(encoder, "document")

    def file(start: int) -> Path | None:
        return None if cache is None else cache / f"{start:012}.npz"

    def jobs() -> _Jobs:
        for start in range(0, len(texts), PART):
            part, kept = _Texts(start, texts[start : start + PART]), file(start)
            known = None if kept is None else read_rows(kept)
            if known is None:
                yield part, None
            else:
                yield part, _Rows(known, limits._replace(texts=count_known(encoder, part.texts, known, "document", pieces)))

    rows_of_texts, count = RowFile(), 0
    with bar(what, "text", len(texts), progress) as shown:
        for part, rows, is_new in _in_processes(jobs(), options, workers, batch_tokens):
            if is_new and (kept := file(part.start)) is not None:
                write_rows(kept, rows.matrix)
            mark_used(cache)
            if pieces is not None and rows.pieces is not None:
                pieces.merge(rows.pieces)
            rows_of_texts.append(rows.matrix)
            count += rows.cut.texts
            shown.update(len(part.texts))
    width = encoder.get_embedding_dimension() or 0
    return Encoded(rows_of_texts.matrix(width), limits._replace(texts=count))


def workers_for(documents: int) -> int:
    """One worker per GPU, if there are several and so many documents that they take longer than opening the model again."""
    return count_gpus() if documents >= _COUNTED * PART else 1


def check_encoding(top_k: Any, max_length: Any, workers: Any) -> tuple[int | None, int | None, int | None]:
    """The options of encoding as ints.

    Raises:
        OptionError: one is not a whole number of at least 1.
    """
    checked = {
        "top_k": checked_option("top_k", top_k, int | None),
        "max_length": checked_option("max_length", max_length, int | None),
        "workers": checked_option("workers", workers, int | None),
    }
    for name, value in checked.items():
        if value is not None and value < 1:
            raise OptionError(f"`{name}` is {value}: it is at least 1")
    return checked["top_k"], checked["max_length"], checked["workers"]


def _parts(documents: Iterable[tuple[str, Document]]) -> Iterator[_Part]:
    iterator = iter(documents)
    while chunk := list(islice(iterator, PART)):
        yield _Part([id_ for id_, _ in chunk], [document for _, document in chunk])


def _as_given(part: _Part | _Texts, rows: _Rows | None = None) -> Part:
    """A part for ``encode_parts``."""
    return Part((part, rows), part.texts, lambda i: repr(part.ids[i][:80]), None if rows is None else rows.matrix)


def _rows(encoder: SparseEncoder, part: _Part | _Texts, matrix: sparse.csr_matrix, longer: int | None, top_k: int | None) -> _Rows:
    if longer is None:
        cut = count_truncated(encoder, part.texts, "document")
    else:
        cut = limits_of(encoder, "document")._replace(texts=longer)
    return _Rows(matrix if top_k is None else prune(matrix, top_k), cut)


def _encode(encoder: SparseEncoder, part: _Part | _Texts, top_k: int | None, batch_tokens: int | None) -> _Rows:
    pieces = PieceCounts(encoder.get_embedding_dimension() or 0) if isinstance(part, _Texts) and is_splade(encoder) else None
    ((_, matrix, longer),) = encode_parts(encoder, [_as_given(part)], "document", batch_tokens=batch_tokens, pieces=pieces)
    return _rows(encoder, part, matrix, longer, top_k)._replace(pieces=pieces)


# ------------------------------------------------------------------------------ where parts are encoded

_Jobs = Iterator[tuple[Any, _Rows | None]]  # parts, and their vectors if an earlier call kept them
_Run = Iterator[tuple[Any, _Rows, bool]]  # the parts in the same order, and whether the vectors are new


def _here(jobs: _Jobs, open_: Callable[[], SparseEncoder], top_k: int | None, batch_tokens: int | None, shown: Any) -> _Run:
    for first, rows in jobs:
        if rows is None:
            break
        yield first, rows, False
    else:
        return
    encoder = open_()
    parts = (_as_given(part, rows) for part, rows in chain([(first, rows)], jobs))
    for given, matrix, longer in encode_parts(encoder, parts, "document", batch_tokens=batch_tokens, shown=shown):
        part, rows = given.tag
        yield part, rows or _rows(encoder, part, matrix, longer, top_k), rows is None


def _in_processes(jobs: _Jobs, options: Options, workers: int, batch_tokens: int | None) -> _Run:
    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")  # a forked process cannot use torch's threads
    waiting: deque[tuple[Any, Future[_Rows] | _Rows]] = deque()

    def oldest() -> tuple[Any, _Rows, bool]:
        part, rows = waiting.popleft()
        return (part, rows.result(), True) if isinstance(rows, Future) else (part, rows, False)

    with ProcessPoolExecutor(workers, context, _start_worker, (devices_of_workers(context, workers), threads)) as pool:
        try:
            for part, rows in jobs:
                waiting.append((part, rows or pool.submit(_work, part, options, batch_tokens)))
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


def _work(part: _Part | _Texts, options: Options, batch_tokens: int | None) -> _Rows:
    return _encode(_opened(options), part, options.top_k, batch_tokens)


def _on_ray(jobs: _Jobs, options: Options, workers: int | None, batch_tokens: int | None) -> _Run:
    with extra("ray"):
        import ray.data
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    found = list(jobs)
    missing = [{"part": json.dumps(part)} for part, rows in found if rows is None]
    encoded: Iterator[Any] = iter(())
    if missing:
        if not ray.is_initialized():
            ray.init()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        workers = workers or max(1, int(sum(node.get("GPU", 0) for node in nodes)))
        cores, gpus = _share(nodes, workers)
        actor: Any = _RayActor
        dataset = ray.data.from_items(missing, override_num_blocks=len(missing))
        asked: dict[str, Any] = {"concurrency": workers, "num_cpus": cores} | ({"num_gpus": gpus} if gpus else {})
        encoded = iter(dataset.map(actor, fn_constructor_args=(options, cores, batch_tokens), **asked).iter_rows())
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
    def __init__(self, options: Options, threads: int, batch_tokens: int | None) -> None:
        torch.set_num_threads(threads)
        self.encoder, self.options = options.open(), (options.top_k, batch_tokens)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        ids, documents = json.loads(row["part"])
        part = _Part(ids, [Document(*document) for document in documents])
        return {"shard": _to_bytes(_encode(self.encoder, part, *self.options), part)}


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
