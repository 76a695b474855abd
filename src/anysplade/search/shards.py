"""A corpus encoded on disk: shards of sparse rows with the documents' ids, made in parallel and resumed.

A shard holds 1,024 documents: ``indptr`` (documents + 1,) int64, ``terms`` int32 and ``weights`` float32 or
float16 of all rows, and ``ids``, UTF-8 bytes of a JSON list. The same documents give the same bytes, whoever
makes them (with as many threads a process: sums of floats depend on how they are cut). ``manifest.json`` is written
last and names every shard with its SHA-256.
"""

import contextlib
import hashlib
import io
import json
import multiprocessing
import zipfile
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from sentence_transformers import SparseEncoder
from tqdm import tqdm

from anysplade._common.extras import extra
from anysplade._common.files import write_whole
from anysplade._common.provenance import provenance
from anysplade._common.workers import devices_of_workers, take_device
from anysplade.data.collections import Document, empty_corpus, hash_texts, iter_corpus
from anysplade.errors import DataError, OptionError, OutputError, worker_died
from anysplade.model.encoder import fingerprint, open_encoder
from anysplade.model.encoding import count_cut, encode, in_precision, resolve_precision, say_cut
from anysplade.model.head import resolve_model
from anysplade.model.options import Precision, WeightType
from anysplade.search.documents import Encoded

_SIZE = 1024  # documents of a shard
_AHEAD = 2  # shards that wait for each worker


class Part(NamedTuple):
    """The documents of one shard."""

    number: int
    ids: list[str]
    documents: list[Document]

    @property
    def texts(self) -> list[str]:
        return [document.full_text for document in self.documents]


class Options(NamedTuple):
    """What decides the bytes of a shard besides its documents."""

    model: str
    precision: Precision
    weight_type: WeightType
    top_k: int | None  # weights kept of each document; an approximation
    max_length: int | None  # tokens a document is cut to; the model's own if None


def encode_corpus(
    model: str | Path,
    corpus: str | Path,
    folder: str | Path,
    *,
    precision: Precision = "float32",
    weight_type: WeightType = "float32",
    top_k: int | None = None,
    max_length: int | None = None,
    workers: int = 1,
    ray: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Encode a corpus into shards; interrupted, it goes on after the shards that are there.

    Args:
        corpus: what ``iter_corpus`` reads; one shard of it is in memory for each worker.
        weight_type: of the stored weights; float16 halves their bytes and rounds them to three digits.
        top_k: keep only the so many largest weights of each document: an approximation, recorded.
        max_length: tokens a document is cut to; see ``open_encoder``.
        workers: processes, each with the model.
        ray: spread the shards over a Ray cluster instead (``pip install "anysplade[ray]"``), ``workers`` at once; the
            folder must be one that all its machines see.

    Returns:
        The manifest.

    Raises:
        OutputError: the folder holds shards that were made in another way.
        DataError, ModelError, OptionError: as the parts raise them.
        AnyspladeError: a worker died.
    """
    folder = Path(folder).expanduser()
    source = resolve_model(model)
    options = Options(source, resolve_precision(precision), weight_type, top_k, max_length)
    run = _runner(options, workers, ray)
    about = {"format": 1, **options._asdict(), "model_fingerprint": fingerprint(source)}
    about |= {"corpus": corpus_name(corpus), "shard_size": _SIZE}
    known = _read_json(folder / "about.json")
    if known is None and folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder}: holds something that is no encoded corpus; choose another folder")
    if known is not None and known != about:
        different = [name for name in about if known.get(name) != about[name]]
        raise OutputError(f"{folder}: holds shards made with another {', '.join(different)}; choose another folder or remove it")
    write_whole(folder / "about.json", json.dumps(about, indent=2) + "\n")

    shards: list[dict[str, Any]] = []
    parts = _parts(iter_corpus(corpus, progress=progress))
    with tqdm(desc="encoding documents", unit="document", disable=not progress, leave=False) as bar:
        for shard in run(parts, folder):
            shards.append(shard)
            bar.update(shard["documents"])
    if not shards:
        raise empty_corpus(corpus)
    shards.sort(key=lambda shard: shard["number"])
    _say_cut(shards)
    manifest = about | {
        "documents": sum(shard["documents"] for shard in shards),
        "postings": sum(shard["postings"] for shard in shards),
        "cut": sum(shard["cut"] for shard in shards),
        "vocabulary": shards[0]["vocabulary"],
        "shards": shards,
    }
    earlier = _read_json(folder / "manifest.json")
    if earlier is not None and earlier == manifest | {"provenance": earlier.get("provenance")}:
        return earlier  # nothing was made now, and so the provenance is that of the call which did
    manifest["provenance"] = provenance()
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return manifest


def encode_documents(
    documents: Iterable[tuple[str, Document]],
    model: str,
    folder: Path,
    *,
    precision: Precision,
    top_k: int | None,
    max_length: int | None,
    workers: int,
    ray: bool,
    progress: bool,
) -> Iterator[Iterator[Encoded]]:
    """Documents with their vectors, some thousand at a time and in their order; the model is opened for the first of them.

    Args:
        folder: for the shards under way; what an earlier call left there is used where it is of the same documents, in the
            same order and made with the same options.

    Raises:
        ModelError, OptionError, AnyspladeError: as ``encode_corpus`` does.
    """
    options = Options(model, resolve_precision(precision), "float32", top_k, max_length)
    under_way: dict[int, Part] = {}
    made: dict[int, dict[str, Any]] = {}  # Ray's come in any order
    shards: list[dict[str, Any]] = []

    def parts() -> Iterator[Part]:
        for part in _parts(documents):
            under_way[part.number] = part
            yield part

    with tqdm(desc="encoding documents", unit="document", disable=not progress, leave=False) as bar:
        number = 0
        for shard in _runner(options, workers, ray)(parts(), folder):
            made[shard["number"]] = shard
            shards.append(shard)
            while number in made:
                ids, rows = read_shard(folder / made.pop(number)["file"])
                yield as_encoded(ids, under_way.pop(number).documents, rows)
                bar.update(len(ids))
                number += 1
    _say_cut(shards)


def _say_cut(shards: Sequence[dict[str, Any]]) -> None:
    if shards:
        cut, documents = (sum(shard[name] for shard in shards) for name in ("cut", "documents"))
        say_cut(cut, documents, shards[0]["max_length"], "documents")


def corpus_name(corpus: str | Path) -> str:
    """A corpus as it is recorded: the absolute path of one on disk, which is the same wherever the next call is made."""
    path = Path(corpus).expanduser()
    return str(path.resolve()) if path.exists() else str(corpus)


def read_shard(path: Path) -> tuple[list[str], sparse.csr_matrix]:
    """Ids and rows; float16 weights come as float32.

    Raises:
        DataError: damaged.
    """
    try:
        with np.load(path) as arrays:
            ids = json.loads(arrays["ids"].tobytes())
            shape = (len(ids), int(arrays["vocabulary"]))
            rows = sparse.csr_matrix((arrays["weights"].astype(np.float32), arrays["terms"], arrays["indptr"]), shape=shape)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: the shard is damaged ({error}); remove it and encode again".replace("\n", " ")) from error
    return ids, rows


def read_documents(
    folder: Path, manifest: dict[str, Any], corpus: str | Path, mend: str, passed_over: Container[int] = ()
) -> Iterator[tuple[int, Iterator[Encoded]]]:
    """Numbers of shards, and their vectors with the corpus's texts.

    Args:
        mend: what to do if the corpus is not the one that was encoded.

    Raises:
        DataError: a damaged shard, or another corpus than that which was encoded.
    """
    texts = iter_corpus(corpus)
    for shard in manifest["shards"]:
        documents = list(islice(texts, shard["documents"]))
        if shard["number"] in passed_over:
            continue
        ids, rows = read_shard(folder / shard["file"])
        if ids != [id_ for id_, _ in documents]:
            raise DataError(f"{corpus}: changed while it was indexed; {mend}")
        yield shard["number"], as_encoded(ids, [document for _, document in documents], rows)


def as_encoded(ids: Sequence[str], documents: Sequence[Document], rows: sparse.csr_matrix) -> Iterator[Encoded]:
    for i, (id_, document) in enumerate(zip(ids, documents, strict=True)):
        row = slice(rows.indptr[i], rows.indptr[i + 1])
        yield Encoded(id_, document, rows.indices[row], rows.data[row])


# ------------------------------------------------------------------------------------ one shard


def _make(encoder: SparseEncoder, part: Part, options: Options, folder: Path) -> dict[str, Any]:
    """Encode one shard and write it; what ``manifest.json`` says of it."""
    rows = encode(encoder, part.texts, "document", ids=part.ids, top_k=options.top_k)
    cut, max_length = count_cut(encoder, part.texts, "document")
    file = io.BytesIO()
    np.savez(
        file,
        allow_pickle=False,
        indptr=rows.indptr.astype(np.int64),
        terms=rows.indices.astype(np.int32),
        weights=rows.data.astype(options.weight_type),
        ids=np.frombuffer(json.dumps(part.ids).encode(), np.uint8),
        vocabulary=np.int64(rows.shape[1]),
    )
    content = file.getvalue()
    shard = {
        "number": part.number,
        "file": f"{part.number:06}.npz",
        "documents": len(part.ids),
        "postings": int(rows.nnz),
        "vocabulary": rows.shape[1],
        "cut": cut,
        "max_length": max_length,
        "data_hash": _hash(part),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_whole(folder / shard["file"], content)
    write_whole(folder / f"{part.number:06}.json", json.dumps(shard) + "\n")  # last: it says that the shard is whole
    return shard


def _kept(part: Part, folder: Path) -> dict[str, Any] | None:
    """The shard's description if it is there, of these documents, and whole."""
    shard = _read_json(folder / f"{part.number:06}.json")
    return shard if shard is not None and shard["data_hash"] == _hash(part) and (folder / shard["file"]).is_file() else None


def _hash(part: Part) -> str:
    return hash_texts([*part.ids, *part.texts])


def _read_json(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def _parts(documents: Iterable[tuple[str, Document]]) -> Iterator[Part]:
    iterator = iter(documents)
    number = 0
    while chunk := list(islice(iterator, _SIZE)):
        yield Part(number, [id_ for id_, _ in chunk], [document for _, document in chunk])
        number += 1


# ------------------------------------------------------------------------------ who makes them

_worker: dict[str, Any] = {}  # of a worker process: its encoder


def _runner(options: Options, workers: int, ray: bool) -> Callable[[Iterator[Part], Path], Iterator[dict[str, Any]]]:
    if workers < 1 or (options.top_k is not None and options.top_k < 1):
        raise OptionError(f"workers {workers}, top k {options.top_k}: both are at least 1")
    run = _run_on_ray if ray else _run
    return lambda parts, folder: run(parts, options, folder, workers)


def _open(options: Options) -> SparseEncoder:
    return in_precision(open_encoder(options.model, max_length=options.max_length), options.precision)


def _start_worker(devices: Any, threads: int) -> None:
    take_device(devices)
    torch.set_num_threads(threads)


def _work(part: Part, options: Options, folder: Path) -> dict[str, Any]:
    if "encoder" not in _worker:  # opened here: an error of the initializer would end the pool without saying what it was
        _worker["encoder"] = _open(options)
    return _make(_worker["encoder"], part, options, folder)


def _run(parts: Iterator[Part], options: Options, folder: Path, workers: int) -> Iterator[dict[str, Any]]:
    """Shards in order, made in this process or in several; a bounded number of them is under way."""
    if workers == 1:
        encoder = None
        for part in parts:
            shard = _kept(part, folder)
            if shard is None:
                encoder = encoder or _open(options)
                shard = _make(encoder, part, options, folder)
            yield shard
        return
    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")  # forked processes and the threads of torch do not go together
    with ProcessPoolExecutor(workers, context, _start_worker, (devices_of_workers(context, workers), threads)) as pool:
        waiting: deque[Future[dict[str, Any]] | dict[str, Any]] = deque()
        try:
            for part in parts:
                waiting.append(_kept(part, folder) or pool.submit(_work, part, options, folder))
                while len(waiting) > _AHEAD * workers:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        except BrokenProcessPool as error:
            raise worker_died(folder) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _result(made: Future[dict[str, Any]] | dict[str, Any]) -> dict[str, Any]:
    return made if isinstance(made, dict) else made.result()


def _run_on_ray(parts: Iterator[Part], options: Options, folder: Path, workers: int) -> Iterator[dict[str, Any]]:
    """The same on Ray Data: a row is a shard; each actor loads the model once."""
    with extra("ray"):
        import ray.data
    missing = []
    for part in parts:
        shard = _kept(part, folder)
        if shard is not None:
            yield shard
        else:
            missing.append({"number": part.number, "part": json.dumps(part)})
    if missing:
        rows = ray.data.from_items(missing, override_num_blocks=len(missing))
        worker: Any = _RayWorker
        made = rows.map(worker, fn_constructor_args=(options, str(folder.resolve())), concurrency=workers)
        for row in made.iter_rows():
            yield json.loads(row["shard"])


class _RayWorker:
    def __init__(self, options: Options, folder: str) -> None:
        self.encoder = _open(options)
        self.options, self.folder = options, Path(folder)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number, ids, documents = json.loads(row["part"])
        part = Part(number, ids, [Document(*document) for document in documents])
        return {"shard": json.dumps(_make(self.encoder, part, self.options, self.folder))}
