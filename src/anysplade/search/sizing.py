"""What an index of many documents will need, from a sample of texts and this machine's speed.

The method, and how far it can be off, stand in docs/sizing.md.
"""

import logging
import random
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from anysplade.data.collections import Collection, is_collection, load_collection
from anysplade.data.corpus import read_corpus
from anysplade.errors import DataError, OptionError
from anysplade.model.encoder import open_encoder
from anysplade.model.encoding import encode
from anysplade.model.probe import PROBE_DOCUMENTS, PROBE_QUERIES
from anysplade.search.exact import Postings

logger = logging.getLogger(__name__)

_POSTING = 8  # bytes: a document id and a float32 weight
_POSTINGS = 20_000_000  # measured over: more than a cache holds
_STREAM = 2**25  # float64 numbers whose sum measures the bandwidth of memory
_SECONDS = 2.0  # of measuring

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@dataclass(frozen=True)
class Size:
    """Asked, measured and derived."""

    model: str
    documents: int
    qps: float  # wanted
    memory_gib: float  # for the postings of a shard
    sampled_from: str
    sampled_documents: int
    sampled_queries: int
    document_active_dims: float  # measured, mean
    query_active_dims: float
    flops: float  # measured: sum over terms of P(in query) P(in document)
    texts_per_second: float  # measured: encoding on this machine
    ns_per_posting: float  # measured: exact search on one core, over more postings than a cache holds
    floor_ns_per_posting: float  # measured: reading their bytes, at this machine's bandwidth
    postings: float  # of all documents
    postings_per_query: float  # FLOPS times documents
    index_bytes: float  # postings and their table
    text_bytes: float  # texts and ids
    disk_bytes: float  # of an index here: postings, the copies of the vectors in the engine and the database, texts and ids
    seconds_per_query: float  # on one core
    qps_per_core: float
    cores: int  # for the wanted QPS
    shards: int  # of the given memory
    encoding_hours: float  # on one machine like this
    assumptions: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def size(
    model: str | Path,
    documents: int,
    *,
    corpus: str | Path | None = None,
    sample: int = 500,
    seed: int = 0,
    qps: float = 100.0,
    memory_gib: float = 32.0,
    progress: bool = False,
) -> Size:
    """Size an index of ``documents`` documents.

    Args:
        corpus: texts like those that will be indexed; of a collection its queries are used too. Everyday texts if None.
        sample: documents, and queries, that are encoded.
        qps: queries a second wanted.
        memory_gib: of a machine, for postings.

    Raises:
        OptionError: a number that is not above 0.
        ModelError, DataError: as ``open_encoder`` and ``read_corpus`` do.
    """
    if documents < 1 or sample < 1 or not 0 < qps < float("inf") or not 0 < memory_gib < float("inf"):
        raise OptionError(f"documents {documents}, sample {sample}, qps {qps}, memory {memory_gib} GiB: all must be above 0")
    encoder = open_encoder(model)
    texts, ids, questions, source = _sample(corpus, sample, seed)
    start = time.perf_counter()
    rows = encode(encoder, texts, "document", progress=progress)
    texts_per_second = len(texts) / (time.perf_counter() - start)
    queries = encode(encoder, questions, "query", progress=progress)
    in_document = np.bincount(rows.indices, minlength=rows.shape[1]) / rows.shape[0]
    in_query = np.bincount(queries.indices, minlength=queries.shape[1]) / queries.shape[0]
    flops = float(in_query @ in_document)
    if not flops:
        raise DataError(f"{model}: the sampled queries and documents share no term; the model collapsed, or take a larger `sample`")
    measured, floor = _speed(rows, queries)
    postings = documents * rows.nnz / rows.shape[0]
    index_bytes = _POSTING * postings + 8 * (rows.shape[1] + 1)
    per_query = flops * documents
    seconds = per_query * measured * 1e-9
    stored = np.mean(
        [
            len(text.encode("utf-8", "surrogatepass")) + len(id_.encode("utf-8", "surrogatepass"))
            for text, id_ in zip(texts, ids, strict=True)
        ]
    )
    return Size(
        model=str(model),
        documents=documents,
        qps=qps,
        memory_gib=memory_gib,
        sampled_from=source,
        sampled_documents=len(texts),
        sampled_queries=len(questions),
        document_active_dims=rows.nnz / rows.shape[0],
        query_active_dims=queries.nnz / queries.shape[0],
        flops=flops,
        texts_per_second=texts_per_second,
        ns_per_posting=measured,
        floor_ns_per_posting=floor,
        postings=postings,
        postings_per_query=per_query,
        index_bytes=index_bytes,
        text_bytes=float(stored * documents),
        disk_bytes=float(3 * _POSTING * postings + stored * documents),
        seconds_per_query=seconds,
        qps_per_core=1 / seconds,
        cores=int(np.ceil(qps * seconds)),
        shards=int(np.ceil(index_bytes / (memory_gib * 2**30))),
        encoding_hours=documents / texts_per_second / 3600,
        assumptions=[
            f"texts and queries are like those sampled ({source})",
            "a query reads all postings of its terms, whose length grows with the documents",
            "a core of the server is like one of this machine, and its postings are in memory",
            "an engine may be faster (it skips postings that cannot matter) or slower (filters, fetching of texts)",
        ],
    )


def parse_count(text: str) -> int:
    """``100M``, ``2.5B``, ``1e8``, ``100,000`` as a number.

    Raises:
        OptionError: none of these, or below 1.
    """
    match = re.fullmatch(r"(\d[\d,_]*(?:\.\d+)?(?:e\d{1,2})?)([kmb]?)", text.strip().lower())
    count = float(re.sub("[,_]", "", match[1])) * _SUFFIXES[match[2]] if match else 0.0
    if not 1 <= count < 1e15:
        raise OptionError(f"{text!r} is no number of documents; such as 250000, 100M or 2.5B")
    return round(count)


def _sample(corpus: str | Path | None, sample: int, seed: int) -> tuple[list[str], list[str], list[str], str]:
    """Texts, ids, queries, and where they are from."""
    if corpus is None:
        texts = list(PROBE_DOCUMENTS)[:sample]
        return texts, [f"document-{i}" for i in range(len(texts))], list(PROBE_QUERIES)[:sample], "everyday texts"
    generator = random.Random(seed)
    collection: Collection | None = None
    if is_collection(str(corpus)):
        try:
            collection = load_collection(corpus)
        except DataError as error:  # a corpus alone, or a collection with a mistake in it
            logger.warning("no queries in it, so everyday ones are used: %s", error)
    documents = read_corpus(corpus) if collection is None else collection.corpus
    ids = generator.sample(list(documents), min(sample, len(documents)))
    questions = list(PROBE_QUERIES) if collection is None else list(collection.queries.values())
    asked = generator.sample(questions, min(sample, len(questions)))
    source = f"{corpus}, {'everyday' if collection is None else 'its'} queries"
    return [documents[id_].full_text for id_ in ids], ids, asked, source


def _speed(rows: sparse.csr_matrix, queries: sparse.csr_matrix) -> tuple[float, float]:
    """Nanoseconds a posting: of exact search over copies of the sample, and of reading 8 bytes from memory."""
    copies = max(1, _POSTINGS // rows.nnz)
    postings = Postings.from_documents(sparse.vstack([rows] * copies, format="csr"))
    times: list[float] = []
    deadline = time.perf_counter() + _SECONDS
    while len(times) < 3 or time.perf_counter() < deadline:
        row = len(times) % queries.shape[0]
        span = slice(queries.indptr[row], queries.indptr[row + 1])
        terms = queries.indices[span]
        read = int((postings.indptr[terms + 1] - postings.indptr[terms]).sum())
        start = time.perf_counter()
        postings.top(terms, queries.data[span], 10)
        times.append((time.perf_counter() - start) / max(1, read))
    stream = np.ones(_STREAM)
    passes = []
    for _ in range(3):
        start = time.perf_counter()
        stream.sum()
        passes.append(time.perf_counter() - start)
    return 1e9 * float(np.median(times)), 1e9 * _POSTING * min(passes) / stream.nbytes
