"""Estimate the needs of a large index from a sample of texts and the speed of this machine.

docs/sizing.md describes the method and its error.
"""

import logging
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from anysplade._common.tables import Tabular
from anysplade.data.collections import is_collection, load_collection
from anysplade.data.corpus import empty_corpus, iter_corpus
from anysplade.data.sampling import reservoir
from anysplade.errors import DataError, OptionError
from anysplade.model.encoder import open_encoder
from anysplade.model.encoding import encode
from anysplade.model.probe import PROBE_DOCUMENTS, PROBE_QUERIES
from anysplade.search.exact import Postings

logger = logging.getLogger(__name__)

_POSTING = 8  # bytes: a document number and a float32 weight
_COPIES = 3  # of the vectors on disk: postings, the engine and the database
_POSTINGS = 20_000_000  # searched to measure the speed: more than fit in a cache
_STREAM = 2**25  # float64 numbers that are summed to measure the memory bandwidth
_SECONDS = 2.0  # of measuring the speed

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@dataclass(frozen=True, repr=False)
class Size(Tabular):
    """What was asked, measured and derived."""

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
    ns_per_posting: float  # measured: exact search on one core, over more postings than fit in a cache
    floor_ns_per_posting: float  # measured: reading 8 bytes at the memory bandwidth of this machine
    postings: float  # of all documents
    postings_per_query: float  # FLOPS times documents
    index_bytes: float  # postings and their table
    text_bytes: float  # texts and ids
    disk_bytes: float  # of an index in a folder: postings, the vectors in the engine and in the database, texts and ids
    seconds_per_query: float  # on one core
    qps_per_core: float
    cores: int  # for the wanted QPS
    shards: int  # of the given memory
    encoding_hours: float  # on one machine like this
    assumptions: list[str]


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
    """Size an index of a number of documents.

    Args:
        corpus: texts similar to those to index; a collection also provides queries. Everyday texts if None.
        sample: number of documents, and of queries, to encode for the measurement.
        qps: queries per second to plan for.
        memory_gib: of a machine, for postings.
    """
    if documents < 1 or sample < 1 or not 0 < qps < np.inf or not 0 < memory_gib < np.inf:
        raise OptionError(f"documents {documents}, sample {sample}, qps {qps}, memory {memory_gib} GiB: all must be above 0")
    encoder = open_encoder(model)
    sampled, questions, source = _sample(corpus, sample, seed)
    start = time.perf_counter()
    rows = encode(encoder, list(sampled.values()), "document", progress=progress)
    texts_per_second = len(sampled) / (time.perf_counter() - start)
    queries = encode(encoder, questions, "query", progress=progress)
    in_document = np.bincount(rows.indices, minlength=rows.shape[1]) / rows.shape[0]
    in_query = np.bincount(queries.indices, minlength=queries.shape[1]) / queries.shape[0]
    flops = float(in_query @ in_document)
    if not flops:
        raise DataError(f"{model}: the sampled queries and documents share no term; the model collapsed, or take a larger `sample`")
    ns_per_posting, floor_ns_per_posting = _speed(rows, queries)
    postings = documents * rows.nnz / rows.shape[0]
    index_bytes = _POSTING * postings + 8 * (rows.shape[1] + 1)
    stored = sum(len((id_ + text).encode("utf-8", "surrogatepass")) for id_, text in sampled.items())
    text_bytes = documents * stored / len(sampled)
    seconds = flops * documents * ns_per_posting * 1e-9
    return Size(
        model=str(model),
        documents=documents,
        qps=qps,
        memory_gib=memory_gib,
        sampled_from=source,
        sampled_documents=len(sampled),
        sampled_queries=len(questions),
        document_active_dims=rows.nnz / rows.shape[0],
        query_active_dims=queries.nnz / queries.shape[0],
        flops=flops,
        texts_per_second=texts_per_second,
        ns_per_posting=ns_per_posting,
        floor_ns_per_posting=floor_ns_per_posting,
        postings=postings,
        postings_per_query=flops * documents,
        index_bytes=index_bytes,
        text_bytes=text_bytes,
        disk_bytes=_COPIES * _POSTING * postings + text_bytes,
        seconds_per_query=seconds,
        qps_per_core=1 / seconds,
        cores=int(np.ceil(qps * seconds)),
        shards=int(np.ceil(index_bytes / (memory_gib * 2**30))),
        encoding_hours=documents / texts_per_second / 3600,
        assumptions=[
            f"texts and queries are like those sampled ({source})",
            "a query reads all postings of its terms, whose number grows with the documents",
            "a core of the server is like one of this machine, and its postings are in memory",
            "an engine may be faster (it skips postings that cannot matter) or slower (filters, fetching of texts)",
        ],
    )


def parse_count(text: str) -> int:
    """The number of documents in a text such as ``100M``, ``2.5B``, ``1e8`` or ``100,000``; raises OptionError for another text."""
    match = re.fullmatch(r"(\d[\d,_]*(?:\.\d+)?(?:e\d{1,2})?)([kmb]?)", text.strip().lower())
    count = float(re.sub("[,_]", "", match[1])) * _SUFFIXES[match[2]] if match else 0.0
    if not 1 <= count < 1e15:
        raise OptionError(f"{text!r} is no number of documents; such as 250000, 100M or 2.5B")
    return round(count)


def _sample(corpus: str | Path | None, sample: int, seed: int) -> tuple[dict[str, str], list[str], str]:
    """Texts of documents by id, queries, and a description of their source."""
    if corpus is None:
        texts = {f"document-{i}": text for i, text in enumerate(PROBE_DOCUMENTS[:sample])}
        return texts, list(PROBE_QUERIES)[:sample], "everyday texts"
    generator = random.Random(seed)
    queries: dict[str, str] | None = None
    if is_collection(str(corpus)):
        try:
            queries = load_collection(corpus).queries
        except DataError as error:  # a corpus without queries, or a collection with a mistake in it
            logger.warning("no queries in it, so everyday ones are used: %s", error)
    documents = reservoir(iter_corpus(corpus), sample, generator)
    if not documents:
        raise empty_corpus(corpus)
    asked = reservoir(PROBE_QUERIES if queries is None else queries.values(), sample, generator)
    source = f"{corpus}, {'everyday' if queries is None else 'its'} queries"
    return {id_: document.full_text for id_, document in documents}, asked, source


def _speed(rows: sparse.csr_matrix, queries: sparse.csr_matrix) -> tuple[float, float]:
    """Nanoseconds per posting, of exact search over copies of the sample and of reading 8 bytes from memory."""
    copies = max(1, _POSTINGS // rows.nnz)
    postings = Postings.from_documents(sparse.vstack([rows] * copies, format="csr"))
    times: list[float] = []
    deadline = time.perf_counter() + _SECONDS
    while len(times) < 3 or time.perf_counter() < deadline:
        query = queries[len(times) % queries.shape[0]]
        read = int((postings.indptr[query.indices + 1] - postings.indptr[query.indices]).sum())
        start = time.perf_counter()
        postings.top(query.indices, query.data, 10)
        times.append((time.perf_counter() - start) / max(1, read))
    stream = np.ones(_STREAM)
    passes = []
    for _ in range(3):
        start = time.perf_counter()
        stream.sum()
        passes.append(time.perf_counter() - start)
    return 1e9 * float(np.median(times)), 1e9 * _POSTING * min(passes) / stream.nbytes
