"""Encode documents into sparse rows: in this process, in several, or on a Ray cluster.

Documents are encoded in parts of 1,024. The rows of a part depend on its documents, the model and the options alone,
not on who computes them (with as many threads a process: sums of floats depend on how they are split).
"""

import io
import json
import math
import multiprocessing
import zipfile
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
from anysplade._common.files import user_path, write_atomic
from anysplade._common.hashing import DataHash
from anysplade._common.progress import bar, begin
from anysplade._common.workers import devices_of_workers, take_device
from anysplade.data.corpus import Document
from anysplade.errors import worker_died
from anysplade.model.encoder import open_encoder
from anysplade.model.encoding import count_truncated, encode
from anysplade.model.modules import cut_within
from anysplade.model.options import Precision, Runtime
from anysplade.model.queries import Cut, log_cut
from anysplade.model.runtimes import for_inference
from anysplade.search.documents import EncodedDocument, check_encoding

PART = 1024  # documents that are encoded together, and written to an index in one transaction
_AHEAD = 2  # parts that wait for each worker


class Part(NamedTuple):
    """Documents that are encoded together."""

    ids: list[str]
    documents: list[Document]

    @property
    def texts(self) -> list[str]:
        return [document.full_text for document in self.documents]


class Options(NamedTuple):
    """What decides the rows of a part besides its documents."""

    model: str
    precision: Precision  # not "auto"
    top_k: int | None  # weights kept of each document, an approximation; all if None
    max_length: int | None  # tokens a document is cut to; the model's own limit if None
    runtime: Runtime = "auto"

    def open(self) -> SparseEncoder:
        """The encoder on this runtime, in this precision."""
        return for_inference(cut_within(open_encoder(self.model), self.max_length), self.runtime, self.precision)


class _Rows(NamedTuple):
    matrix: sparse.csr_matrix  # (documents, vocabulary)
    cut: Cut  # of the documents


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
    """Documents with their vectors, up to 1,024 at a time, in their order.

    The documents are read once, and the model is opened for the first part that has to be encoded. At the end the
    number of documents that were cut is logged.

    Args:
        workers: processes, each with the model; ``2 * workers`` parts are in memory.
        ray: encode on a Ray cluster instead (``pip install "anysplade[ray]"``), ``workers`` actors with the model each;
            all documents are in memory.
        encoder: opens the encoder for a single process; ``options.open`` if None.
        shards: a folder that keeps the rows of each part, so that an interrupted call does not encode it again: one
            file a part, which counts while it holds the same documents.

    Raises:
        OptionError: as ``check_encoding`` does.
        ModelError: as ``open_encoder`` and ``encode`` raise it.
        AnyspladeError: a worker died.
    """
    check_encoding(options.top_k, options.max_length, workers)
    run = _on_ray if ray else _in_processes if workers > 1 else _here

    def kept(number: int, part: Part) -> _Rows | None:
        return None if shards is None else _read_shard(shards, number, part)

    cut, count = Cut(0), 0
    parts = _parts(documents)
    first = next(parts, None)
    begin("encoding documents", progress, 0 if first is None else len(first.ids))
    parts = chain([first] if first else [], parts)
    with bar("encoding documents", "document", show=progress) as shown:
        for number, (part, rows, is_new) in enumerate(run(parts, options, kept, workers, encoder or options.open)):
            if shards is not None and is_new:
                write_atomic(shards / f"{number:06}.npz", _to_bytes(rows, part))
            cut, count = rows.cut._replace(texts=cut.texts + rows.cut.texts), count + len(part.ids)
            shown.update(len(part.ids))
            yield _with_vectors(part, rows.matrix)
    log_cut(cut, count, "documents")


def corpus_name(corpus: str | Path) -> str:
    """A corpus as it is recorded: the absolute path of one on disk, which is the same wherever the next call is made."""
    path = user_path(corpus)
    return str(path.resolve()) if path.exists() else str(corpus)


def _parts(documents: Iterable[tuple[str, Document]]) -> Iterator[Part]:
    iterator = iter(documents)
    while chunk := list(islice(iterator, PART)):
        yield Part([id_ for id_, _ in chunk], [document for _, document in chunk])


def _encode(encoder: SparseEncoder, part: Part, top_k: int | None) -> _Rows:
    matrix = encode(encoder, part.texts, "document", ids=part.ids, top_k=top_k)
    return _Rows(matrix, count_truncated(encoder, part.texts, "document"))


def _with_vectors(part: Part, matrix: sparse.csr_matrix) -> list[EncodedDocument]:
    spans = [slice(*matrix.indptr[i : i + 2]) for i in range(len(part.ids))]
    return [
        EncodedDocument(id_, document, matrix.indices[span], matrix.data[span])
        for id_, document, span in zip(*part, spans, strict=True)
    ]


# --------------------------------------------------------------------------------- who encodes

_Run = Iterator[tuple[Part, _Rows, bool]]  # in the order of the parts; whether the rows were encoded now
_Kept = Callable[[int, Part], _Rows | None]


def _here(parts: Iterator[Part], options: Options, kept: _Kept, workers: int, open_: Callable[[], SparseEncoder]) -> _Run:
    opened = cache(open_)
    for number, part in enumerate(parts):
        rows = kept(number, part)
        yield part, rows or _encode(opened(), part, options.top_k), rows is None


def _in_processes(parts: Iterator[Part], options: Options, kept: _Kept, workers: int, _: Any) -> _Run:
    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")  # a forked process cannot use torch's threads
    waiting: deque[tuple[Part, Future[_Rows] | _Rows]] = deque()

    def oldest() -> tuple[Part, _Rows, bool]:
        part, rows = waiting.popleft()
        return (part, rows.result(), True) if isinstance(rows, Future) else (part, rows, False)

    with ProcessPoolExecutor(workers, context, _start_worker, (devices_of_workers(context, workers), threads)) as pool:
        try:
            for number, part in enumerate(parts):
                waiting.append((part, kept(number, part) or pool.submit(_work, part, options)))
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


_opened = cache(Options.open)  # of a worker process; opened by its first part, since a pool hides an initializer's error


def _work(part: Part, options: Options) -> _Rows:
    return _encode(_opened(options), part, options.top_k)


def _on_ray(parts: Iterator[Part], options: Options, kept: _Kept, workers: int, _: Any) -> _Run:
    with extra("ray"):
        import ray.data
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    found = [(part, kept(number, part)) for number, part in enumerate(parts)]
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
    """Cores, and GPUs or a part of one, for each actor. Ray hides the GPUs that were not asked for, and gives one core.

    Args:
        nodes: their resources as Ray has them; those without a GPU are left out if others have one.
    """
    nodes = [node for node in nodes if node.get("GPU")] or nodes
    gpus = sum(node.get("GPU", 0) for node in nodes)
    actors_a_gpu = math.ceil(workers / gpus) if gpus else 0

    def places(cores: int) -> float:
        return sum(min(node.get("CPU", 0) // cores, node["GPU"] * actors_a_gpu if gpus else math.inf) for node in nodes)

    most = int(sum(node.get("CPU", 0) for node in nodes)) // workers
    cores = next((cores for cores in range(most, 1, -1) if places(cores) >= workers), 1)
    return cores, 1 / actors_a_gpu if gpus else 0


class _RayActor:
    def __init__(self, options: Options, threads: int) -> None:
        torch.set_num_threads(threads)
        self.encoder, self.top_k = options.open(), options.top_k

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        ids, documents = json.loads(row["part"])
        part = Part(ids, [Document(*document) for document in documents])
        return {"shard": _to_bytes(_encode(self.encoder, part, self.top_k), part)}


# ---------------------------------------------------------------------------------------- shards


def _to_bytes(rows: _Rows, part: Part) -> bytes:
    """A part's rows as a NumPy archive, with a hash of its documents."""
    file = io.BytesIO()
    matrix = rows.matrix
    np.savez(
        file,
        allow_pickle=False,
        indptr=matrix.indptr.astype(np.int64),
        terms=matrix.indices.astype(np.int32),
        weights=matrix.data,
        about=np.array([matrix.shape[1], *(-1 if number is None else number for number in rows.cut)], np.int64),
        data_hash=np.frombuffer(_hash(part).encode(), np.uint8),
    )
    return file.getvalue()


def _from_bytes(content: bytes, data_hash: str | None = None) -> _Rows | None:
    """The rows; None if they are of other documents than the hash says.

    Raises:
        OSError, ValueError, KeyError, BadZipFile: a damaged archive.
    """
    with np.load(io.BytesIO(content)) as arrays:
        if data_hash is not None and arrays["data_hash"].tobytes().decode() != data_hash:
            return None
        vocabulary, count, *limits = arrays["about"].tolist()
        shape = (len(arrays["indptr"]) - 1, vocabulary)
        matrix = sparse.csr_matrix((arrays["weights"], arrays["terms"], arrays["indptr"]), shape=shape)
    return _Rows(matrix, Cut(count, *(None if number < 0 else number for number in limits)))


def _read_shard(folder: Path, number: int, part: Part) -> _Rows | None:
    """The rows that an earlier call left; None if there are none of these documents, or the file is damaged."""
    try:
        return _from_bytes((folder / f"{number:06}.npz").read_bytes(), _hash(part))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _hash(part: Part) -> str:
    return DataHash(zip(part.ids, part.texts, strict=True)).hexdigest()
