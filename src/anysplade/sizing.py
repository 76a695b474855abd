"""What an index of N documents will need, from a sample's vectors and this machine's measured speed."""

import dataclasses
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

from anysplade.datasets import PYTHON_DOCS, Document, iter_corpus, load_python_docs, read_queries
from anysplade.encoder import open_encoder
from anysplade.encoding import encode
from anysplade.errors import DataError, ModelError, OptionError
from anysplade.postings import Postings
from anysplade.probe import PROBE_DOCUMENTS, PROBE_QUERIES
from anysplade.provenance import provenance
from anysplade.sources import ir_dataset, zip_folder

_POSTING = 8  # bytes: int32 id, float32 weight
_COPIES = 2  # of each vector beside its postings: in documents.sqlite and in the engine's storage
_POSITIONS = 2**31  # documents of a shard, whose positions are int32
# Of the measurement: more than a cache holds, few enough for seconds and about half a GB.
_POSTINGS = 20_000_000
_DOCUMENTS = (10_000, 4_000_000)  # fewer measure numpy's calls alone; more need memory for scores, and change little
_TIMED_QUERIES = 8
_STREAMED = 2**28  # bytes
_RUNS, _SECONDS = (3, 7), 2.0  # at least and at most so many; no further one after so long


@dataclass(frozen=True)
class Size:
    """Inputs, then what was measured, then what follows from both; ``assumptions`` says what neither covers."""

    model: str
    documents: int
    corpus: str | None
    sample: int
    seed: int
    qps: float  # wanted, queries a second
    memory_gib: float  # of a shard's machine
    # measured on the sample
    documents_from: str  # "corpus" or "probe texts"
    queries_from: str  # "given", "corpus" or "probe texts"
    corpus_documents: int | None
    sampled_documents: int
    sampled_queries: int
    document_active_dims: dict[str, float]  # mean, p95
    query_active_dims: dict[str, float]
    flops: float  # postings a query reads of each document; see ``size``
    flops_standard_error: float | None  # of the sampling; None for a single document or query
    vocabulary: int
    text_bytes: float  # UTF-8, mean
    id_bytes: float
    texts_per_second: float  # encoded, with the whole of this machine
    device: str
    # measured on this machine, one core
    measured_documents: int  # synthetic
    measured_postings: int  # of the terms that the timed queries have
    ns_per_posting: float  # selecting the best 10 included
    bandwidth_gb_per_second: float  # reading memory in order; 10^9 bytes
    floor_ns_per_posting: float  # 8 bytes at that bandwidth
    # derived
    postings: int
    postings_per_query: float
    index_bytes: dict[str, int]  # on disk: postings, offsets, vectors, texts, ids, total
    shards: int
    query_seconds: float  # on one core, all shards one after the other
    floor_query_seconds: float
    qps_per_core: float
    cores: int
    encoding_seconds: float  # on one machine like this one
    encoding_machine_hours: float
    assumptions: list[str]
    provenance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def size(
    model: str | Path,
    documents: int,
    *,
    corpus: str | Path | None = None,
    queries: Sequence[str] | None = None,
    sample: int = 500,
    seed: int = 0,
    qps: float = 100.0,
    memory_gib: float = 32.0,
    progress: bool = False,
) -> Size:
    """Measure a model on a sample of texts, and this machine, and reckon what an index needs.

    A query reads the postings of its terms: the sum over terms of [term in query] df(term). The mean over queries is
    documents × FLOPS, FLOPS = sum over terms of P(in query) P(in document) (Paria et al., arXiv 2004.05665). That is
    exact, not a model: expectation is linear, however the terms of a text hang together. The sample's FLOPS has that
    expectation as long as its queries and its documents are drawn independently from those to come.

    Args:
        model: a sparse encoder or a masked LM: folder or hub id.
        documents: of the index to come.
        corpus: what ``iter_corpus`` reads; of it a random ``sample`` is encoded. Probe texts if None.
        queries: of the kind to come, at most ``sample`` of them are encoded; if None, the corpus's, or else probe texts.
        qps: queries a second that are wanted.
        memory_gib: for the postings of one shard.

    Raises:
        OptionError: an impossible number, or no queries in ``queries``.
        ModelError: as ``open_encoder``, or queries and documents share no term.
        DataError: as ``iter_corpus``, or the corpus is empty.
    """
    if not isinstance(documents, int) or not 1 <= documents <= 10**15:
        raise OptionError(f"documents is {documents}: it must be a whole number from 1 to 10^15")
    if sample < 1:
        raise OptionError(f"sample is {sample}: at least 1 document must be encoded")
    for name, value in (("qps", qps), ("memory_gib", memory_gib)):
        if not 0 < value < math.inf:
            raise OptionError(f"{name} is {value}: it must be a finite number above 0")
    if queries is not None and (isinstance(queries, str) or not queries):
        raise OptionError("queries: give a list of at least one text, or leave it out")

    encoder = open_encoder(model)
    chooser = random.Random(seed)
    found, available, seen = _texts(corpus, sample, chooser, queries is None, progress)
    queries_from = "given" if queries is not None else "corpus" if available else "probe texts"
    asked = list(queries if queries is not None else available or PROBE_QUERIES)
    asked = chooser.sample(asked, min(sample, len(asked)))
    texts = [document.full_text for _, document in found]
    encode(encoder, texts[:1], "document")  # the first call loads and compiles
    start = time.perf_counter()
    rows = encode(encoder, texts, "document", progress=progress)
    texts_per_second = len(texts) / (time.perf_counter() - start)
    query_rows = encode(encoder, asked, "query", progress=progress)

    in_document, in_query = _share(rows), _share(query_rows)
    flops = float(in_query @ in_document)
    if flops == 0:
        raise ModelError(
            f"{model}: no term is in a sampled query and in a sampled document, so a search reads nothing; "
            "train the model, or take a larger sample"
        )
    speed = _time_search(query_rows, in_document, documents, seed)
    bandwidth = _time_stream()
    ns, floor = speed[0], _POSTING / bandwidth

    vocabulary, active = rows.shape[1], rows.nnz / rows.shape[0]
    id_bytes = _mean_bytes([id_ for id_, _ in found]) if corpus is not None else float(len(str(documents)))
    offsets = 8 * (vocabulary + 1)
    room = memory_gib * 2**30 - offsets
    if room < _POSTING * active:
        raise OptionError(f"memory_gib is {memory_gib}: the offsets of {vocabulary:,} terms and one document do not fit; give more")
    postings = round(active * documents)
    shards = max(math.ceil(_POSTING * postings / room), math.ceil(documents / _POSITIONS), 1)
    text_bytes = _mean_bytes([document.title + document.text for _, document in found])
    parts = {
        "postings": _POSTING * postings,
        "offsets": offsets * shards,
        "vectors": _COPIES * _POSTING * postings,
        "texts": round(text_bytes * documents),
        "ids": round((2 * id_bytes + 8) * documents),  # in the row, in the unique index, and the engine's number
    }
    query_seconds = ns * flops * documents / 1e9
    return Size(
        model=str(model),
        documents=documents,
        corpus=None if corpus is None else str(corpus),
        sample=sample,
        seed=seed,
        qps=qps,
        memory_gib=memory_gib,
        documents_from="probe texts" if corpus is None else "corpus",
        queries_from=queries_from,
        corpus_documents=None if corpus is None else seen,
        sampled_documents=len(texts),
        sampled_queries=len(asked),
        document_active_dims=_spread(rows),
        query_active_dims=_spread(query_rows),
        flops=flops,
        flops_standard_error=_standard_error(rows @ in_query, query_rows @ in_document),
        vocabulary=vocabulary,
        text_bytes=text_bytes,
        id_bytes=id_bytes,
        texts_per_second=texts_per_second,
        device=str(encoder.device),
        measured_documents=speed[1],
        measured_postings=speed[2],
        ns_per_posting=ns,
        bandwidth_gb_per_second=bandwidth,
        floor_ns_per_posting=floor,
        postings=postings,
        postings_per_query=flops * documents,
        index_bytes=parts | {"total": sum(parts.values())},
        shards=shards,
        query_seconds=query_seconds,
        floor_query_seconds=floor * flops * documents / 1e9,
        qps_per_core=1 / query_seconds,
        cores=math.ceil(qps * query_seconds),
        encoding_seconds=documents / texts_per_second,
        encoding_machine_hours=documents / texts_per_second / 3600,
        assumptions=[],
        provenance=provenance(),
    )
