"""Commands that make vectors and search them: encode, index, search, serve, size, export."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import RenderableType

from anysplade._common.files import beside
from anysplade._common.progress import counted
from anysplade.cli.app import Json, Out, Result, command, is_first_process
from anysplade.errors import OptionError, OutputError, without_credentials
from anysplade.model.options import Precision, Role, Runtime, runtime_for


@command
def encode(
    model: str,
    /,
    *texts: str,
    role: Role = "document",
    k: int = 20,
    runtime: Runtime = "auto",
    precision: Precision = "float32",
    max_length: int | None = None,
    json: Json = False,
) -> Result:
    """Show the words that a sparse encoder gives to texts, with their weights.

    Args:
        model: a sparse encoder's folder or hub id.
        texts: one or more, each in quotation marks.
        role: whether the texts are queries or documents.
        k: how many words of each text are shown; the JSON has all.
        runtime: of encoding; see index.
        precision: of encoding; see index.
        max_length: tokens a text is cut to; see index.
    """
    from anysplade.cli import rendering as report
    from anysplade.model import encoder, encoding, runtimes, terms
    from anysplade.model.queries import log_cut

    if not texts:
        raise OptionError('no text given; for example: anysplade encode MODEL "how to invert a matrix"')
    opened = encoder.open_encoder(model, max_length=max_length)
    resolved = runtimes.resolve_precision(precision, opened.device)
    opened = runtimes.for_inference(opened, runtime_for(len(texts), runtime, precision), resolved)
    vectors = encoding.encode(opened, texts, role)
    log_cut(encoding.count_truncated(opened, texts, role), len(texts), f"{role} texts")
    found = [
        {"text": text, "active_dims": vector.nnz, "terms": [term._asdict() for term in terms.terms(vector, opened)]}
        for text, vector in zip(texts, vectors, strict=True)
    ]
    words = [terms.terms(vector, opened, text, k) for text, vector in zip(texts, vectors, strict=True)]
    about = {"model": model, "role": role, "precision": resolved, "vocabulary": vectors.shape[1]}
    return Result(about | {"texts": found}, report.encoded_lines(found, words))


@command
def index(
    model: str,
    corpus: str,
    /,
    *,
    out: Annotated[Path | None, Parameter(name="--out")] = None,
    to: str | None = None,
    runtime: Runtime = "auto",
    precision: Precision = "float32",
    top_k: int | None = None,
    max_length: int | None = None,
    workers: int = 1,
    ray: bool = False,
    json: Json = False,
) -> Result:
    """Encode a corpus and write an index; interrupted, or when the corpus changed, the same command brings it up to date.

    Args:
        model: a sparse encoder's folder or hub id.
        corpus: a file (JSONL, CSV, TSV, Parquet), or any collection that evaluate takes.
        out: the index's folder.
        to: a server instead: qdrant://host:6333/name or opensearch://host:9200/name.
        runtime: of encoding; auto is openvino where it is installed and can run the model, which is faster and as exact.
        precision: of encoding; bfloat16 and int8 (openvino) are faster and approximate; auto is bfloat16 where the machine has it.
        top_k: keep only the so many largest weights of each document: an approximation, recorded.
        max_length: tokens a text is cut to, up to the model's positions; what the model was saved with if not given.
        workers: processes that encode, each with the model.
        ray: encode on a Ray cluster, workers at once.
    """
    from anysplade._common.files import default_cache
    from anysplade.search.index import Index
    from anysplade.search.remote import RemoteIndex

    if (out is None) == (to is None):
        raise OptionError("say where the index goes: --out FOLDER or --to qdrant://host:6333/name")
    options: dict[str, Any] = {"runtime": runtime, "precision": precision, "top_k": top_k, "max_length": max_length}
    options |= {"workers": workers, "ray": ray, "progress": is_first_process()}
    if to is not None:
        work = default_cache()
        if work is None:
            raise OutputError(f"--to {without_credentials(to)}: the encoded corpus needs a folder; set ANYSPLADE_CACHE to one")
        sent = RemoteIndex.build(model, corpus, to, work, **options)
        found = {"documents": len(sent), "sent": sent.sent, "left_over": sent.left_over, "index": sent.address}
        lines: list[RenderableType] = [
            f"{counted(len(sent), 'document')} ({sent.sent:,} sent now), at {sent.address}",
            f'next: anysplade search {sent.address} "your query"',
        ]
        return Result(sent.about | found, lines)
    assert out is not None
    with Index.build(model, corpus, out, **options) as built:
        documents = counted(len(built), "document")
        found = built.describe() | built.changes._asdict() | {"index": str(out)}
    changed = "{added:,} added, {replaced:,} replaced, {deleted:,} deleted".format_map(found)
    return Result(
        found,
        [
            f"{documents} ({changed}), {found['document_active_dims']:.0f} active dims a document, in {out}",
            f'next: anysplade search {out} "your query"',
        ],
    )


@command
def search(
    index: str,
    query: str,
    /,
    *,
    k: int = 10,
    filter: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    exact: bool = False,
    model: str | None = None,
    runtime: Runtime = "auto",
    precision: Precision = "float32",
    json: Json = False,
) -> Result:
    """Search an index; each hit says which terms made its score.

    Args:
        index: an index's folder, or its address on a server.
        query: the text to search for.
        k: how many hits at most.
        filter: metadata that hits must have, as name=value (7 is "7", blanks and case do not matter); a name twice means any of its
            values.
        exact: search the vectors in memory, in float64, instead of the engine.
        model: where the index's model lies, if it was moved.
        runtime: of encoding the query; auto is torch, which is ready sooner.
        precision: of encoding the query; see index.
    """
    from anysplade.cli import rendering as report
    from anysplade.model.queries import log_cut
    from anysplade.search import open_index
    from anysplade.search.hits import query_words

    if filter is not None and not filter:
        raise OptionError("filter: give name=value after it, such as lang=en")
    wanted: dict[str, list[Any]] = {}
    for condition in filter or []:
        name, equals, value = condition.partition("=")
        if not name or not equals:
            raise OptionError(f"filter {condition!r}: give name=value, such as lang=en")
        wanted.setdefault(name, []).append(value)
    opened = open_index(index, model, runtime=runtime_for(1, runtime, precision), precision=precision)
    log_cut(opened.queries.count_truncated([query]), 1, "queries")
    hits = opened.search(query, k=k, explain=True, filter=wanted or None, exact=exact)
    found = {"query": query, "precision": opened.queries.precision, "hits": [hit.to_dict() for hit in hits]}
    note = None if hits else opened.explain_filter(wanted)
    lines: list[RenderableType] = [note] if note else report.hit_lines(hits, query_words(opened.queries, query))
    return Result(found | ({} if note is None else {"note": note}), lines)


@command
def serve(
    index: str,
    beside: str | None = None,
    /,
    *,
    model: str | None = None,
    runtime: Runtime = "auto",
    precision: Precision = "float32",
    host: str = "127.0.0.1",
    port: int = 8080,
    token: str | None = None,
    json: Json = False,
) -> Result:
    """Serve a search page and an HTTP API over an index, until stopped.

    Args:
        index: an index's folder.
        beside: another index's folder, or bm25, for the page that compares.
        model: where the index's model lies, if it was moved.
        runtime: of encoding queries; see index.
        precision: of encoding queries; see index.
        host: an address of this machine; one that others reach needs a token.
        port: 0 for any that is free.
        token: what every request must carry; ANYSPLADE_TOKEN, if that is set.
    """
    from anysplade.serving import app as server

    options: dict[str, Any] = {"model": model, "runtime": runtime, "precision": precision, "host": host, "port": port}
    served = server.serve(index, beside, token=token or os.environ.get("ANYSPLADE_TOKEN"), **options)
    return Result(served.to_dict(), [f"{counted(served.requests, 'request')} answered"])


@command
def size(
    model: str,
    /,
    *,
    documents: str,
    corpus: str | None = None,
    sample: int = 500,
    qps: float = 100.0,
    memory: float = 32.0,
    json: Json = False,
) -> Result:
    """Tell what an index will need: bytes, postings a query, queries a second a core, shards, hours of encoding.

    Args:
        model: a sparse encoder's folder or hub id.
        documents: how many, such as 100M.
        corpus: texts like those that will be indexed; a collection brings its queries too.
        sample: documents, and queries, that are encoded to measure.
        qps: queries a second wanted.
        memory: GiB of a machine, for postings.
    """
    from anysplade.cli import rendering as report
    from anysplade.search import sizing

    options: dict[str, Any] = {"corpus": corpus, "sample": sample, "qps": qps, "memory_gib": memory, "progress": is_first_process()}
    found = sizing.size(model, sizing.parse_count(documents), **options)
    return Result(found.to_dict(), report.size_lines(found))


@command
def export(
    index: str,
    /,
    *,
    format: Literal["anserini", "ciff"],
    out: Out,
    queries: str | None = None,
    quantization: int = 100,
    model: str | None = None,
    json: Json = False,
) -> Result:
    """Write an index's vectors for Lucene: Anserini's JSONL, or the Common Index File Format; and queries for them.

    Args:
        index: an index's folder.
        format: anserini (a folder of JSONL files) or ciff (one file).
        out: the folder or file to write.
        queries: a file or collection of queries, which are written to OUT.queries.tsv.
        quantization: weights are written as whole numbers, times this.
        model: where the index's model lies, if it was moved.
    """
    from anysplade.data.collections import load_queries
    from anysplade.search.engines import export as exporting
    from anysplade.search.index import Index

    asked = {} if queries is None else load_queries(queries)
    written = beside(out, "{}.queries.tsv")
    with Index.load(index, model) as opened:
        names = opened.queries.term_names
        if asked:  # first: they are few, and an error in them comes before the documents
            exporting.export_queries(list(asked), opened.queries.encode(list(asked.values())), names, written, quantization)
        write = exporting.export_anserini if format == "anserini" else exporting.export_ciff
        count = write(opened.store, names, out, quantization)
    found: dict[str, Any] = {"documents": count, "out": str(out), "format": format}
    lines: list[RenderableType] = [f"{counted(count, 'document')} in {out}"]
    if asked:
        found |= {"queries": len(asked), "queries_out": str(written)}
        lines.append(f"{counted(len(asked), 'query')} in {written}")
    return Result(found, lines)
