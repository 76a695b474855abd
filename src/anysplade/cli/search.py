"""Commands that make vectors and search them: encode, index, search, serve, size, export."""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from anysplade._common.extras import extra
from anysplade._common.files import beside
from anysplade._common.progress import counted, duration
from anysplade.cli.app import Result, command, is_first_process
from anysplade.cli.library import options_of
from anysplade.cli.rendering import hit_lines, snippet, table
from anysplade.errors import OptionError, OutputError, without_credentials
from anysplade.model.options import Form, Precision, Role, Runtime, runtime_for

if TYPE_CHECKING:
    from anysplade.search.index import Index
    from anysplade.search.sizing import Size

logger = logging.getLogger(__name__)


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
) -> Result:
    """Show the words that a sparse encoder gives to texts, with their weights.

    Args:
        model: folder or hub id of a sparse encoder.
        texts: one or more, each in quotation marks.
        role: whether the texts are queries or documents.
        k: number of words to show per text; the JSON has all.
        runtime: for encoding; see index.
        precision: for encoding; see index.
        max_length: tokens to cut a text to; see index.
    """
    from anysplade.model import encoder, encoding, runtimes
    from anysplade.model.queries import log_cut
    from anysplade.model.terms import terms

    if len(texts) > 1 and all(text.isascii() and " " not in text for text in texts):
        logger.info("%d texts of one word each; put a text of several words in quotation marks", len(texts))
    if not texts:
        raise OptionError('no text given; for example: anysplade encode MODEL "how to invert a matrix"')
    opened = encoder.open_encoder(model, max_length=max_length)
    resolved = runtimes.resolve_precision(precision, opened.device)
    opened = runtimes.for_inference(opened, runtime_for(len(texts), runtime, precision), resolved)
    vectors, cut = encoding.encode_counted(opened, texts, role)
    log_cut(cut, len(texts), f"{role} texts")
    found: list[dict[str, Any]] = []
    lines: list[RenderableType] = []
    for text, vector in zip(texts, vectors, strict=True):
        found.append({"text": text, "active_dims": vector.nnz, "terms": [term._asdict() for term in terms(vector, opened)]})
        words = terms(vector, opened, text, k)
        more = vector.nnz - sum(len(word.ids) for word in words)
        lines += [
            *([""] if lines else []),
            Text(snippet(text), style="bold"),
            table(("word", "weight"), [[word.term, f"{word.weight:.3f}"] for word in words]),
            counted(vector.nnz, "active dim") + (f", {more:,} not shown" if more else ""),
        ]
    about = {"model": model, "role": role, "precision": resolved, "vocabulary": vectors.shape[1]}
    return Result(about | {"texts": found}, lines)


@command
@options_of("search.index", "Index.build")
def index(
    model: str | None = None,
    corpus: str | None = None,
    /,
    *,
    out: Path | None = None,
    to: str | None = None,
    vectors: str | None = None,
    **options: Any,
) -> Result:
    """Encode a corpus and write an index; after an interruption or a change of the corpus, the same command updates it.

    Args:
        model: folder or hub id of a sparse encoder.
        corpus: a file (JSONL, CSV, TSV, Parquet), or any collection that evaluate takes.
        vectors: instead of a corpus: a file or folder of vectors that other software wrote (Anserini's JSONL, .npz, .parquet); the
            model is optional then, and only encodes queries.
        out: folder of the index.
        to: a server instead of a folder: qdrant://host:6333/name or opensearch://host:9200/name.
        runtime: for encoding; auto is openvino where it is installed and can run the model, which is faster and as exact.
        precision: for encoding; bfloat16 and int8 (openvino) are faster and approximate; auto is bfloat16 on machines with support.
        max_length: tokens to cut a text to, up to the model's positions; the value saved with the model by default.
    """
    from anysplade._common.files import default_cache
    from anysplade.search.index import Index
    from anysplade.search.remote import RemoteIndex

    if (out is None) == (to is None):
        raise OptionError("say where the index goes: --out FOLDER or --to qdrant://host:6333/name")
    if vectors is not None:
        return _index_vectors(vectors, model, corpus, out, options)
    if model is None or corpus is None:
        raise OptionError(f"index needs {'MODEL' if model is None else 'CORPUS'}; give MODEL CORPUS, or --vectors FILE")
    options["progress"] = is_first_process()
    if to is not None:
        work = default_cache()
        if work is None:
            raise OutputError(f"--to {without_credentials(to)}: the encoded corpus needs a folder; set ANYSPLADE_CACHE to one")
        sent = RemoteIndex.build(model, corpus, to, work, **options)
        found = sent.about | {"documents": len(sent), "sent": sent.sent, "left_over": sent.left_over, "index": sent.address}
        line, target = f"{counted(len(sent), 'document')} ({sent.sent:,} sent now), at {sent.address}", sent.address
    else:
        assert out is not None
        with Index.build(model, corpus, out, **options) as built:
            found, line = _describe_built(built, out)
        target = str(out)
    return Result(found, [line, f'next: anysplade search {target} "your query"'])


def _index_vectors(vectors: str, model: str | None, corpus: str | None, out: Path | None, options: dict[str, Any]) -> Result:
    from anysplade.search.index import Index

    if corpus is not None or out is None:
        raise OptionError(f"`vectors` goes with --out FOLDER and no {'corpus' if corpus is not None else 'server'}")
    odd = [name for name, value in options.items() if value not in (None, False, "auto", "float32")]
    if odd:
        raise OptionError(f"`{odd[0]}` has no meaning for `vectors`, which are not encoded; leave it out")
    with Index.from_vectors(vectors, out, model, progress=is_first_process()) as built:
        found, line = _describe_built(built, out)
    following = f'anysplade search {out} "your query"' if model else "search in Python by vector: Index.load(folder).search_vector"
    return Result(found, [line, f"next: {following}"])


def _describe_built(built: "Index", out: Path) -> tuple[dict[str, Any], str]:
    found = built.describe() | built.changes._asdict() | {"index": str(out)}
    changed = "{added:,} added, {replaced:,} replaced, {deleted:,} deleted".format_map(found)
    documents = f"{counted(len(built), 'document')} ({changed})"
    dims = f"{found['document_active_dims']:.0f} active dims"
    if "document_lexical_dims" in found:
        dims += f" and {found['document_lexical_dims']:.0f} stems"
    return found, f"{documents}, {dims} per document, in {out}"


@command
@options_of("search.index", "Index.search")
def search(
    index: str,
    query: str | None = None,
    /,
    *,
    queries: str | None = None,
    out: Path | None = None,
    k: int | None = None,
    filter: list[str] | None = None,
    exact: bool = False,
    model: str | None = None,
    runtime: Runtime = "auto",
    precision: Precision = "float32",
    **options: Any,
) -> Result:
    """Search an index; each hit shows which terms its score comes from. With --queries, write a TREC run file for many queries.

    Args:
        index: folder of an index, or its address on a server.
        query: the text to search for.
        queries: a file or collection of queries, to search for instead of one: JSONL, TSV, TREC topics, ...
        out: with queries, the run file to write.
        k: largest number of hits; 10 by default, 1,000 with queries.
        filter: metadata that hits must have, as name=value (7 is "7", blanks and case do not matter); a repeated name means any of
            its values.
        exact: search the vectors in memory, in float64, instead of the engine.
        model: folder of the index's model, if it was moved, or of its export to ONNX, which needs no torch.
        runtime: for encoding the query; auto is torch, which starts faster.
        precision: for encoding the query; see index.
    """
    from anysplade.model.queries import log_cut
    from anysplade.search import open_index
    from anysplade.search.hits import check_query, query_words

    if (query is None) == (queries is None):
        raise OptionError('search for one text, anysplade search INDEX "a text", or for many: --queries FILE --out RUN')
    if (queries is None) != (out is None):
        raise OptionError("`queries` and `output` go together: --queries FILE --out RUN")
    if filter is not None and not filter:
        raise OptionError("filter: give name=value after it, such as lang=en")
    wanted: dict[str, list[Any]] = {}
    for condition in filter or []:
        name, equals, value = condition.partition("=")
        if not name or not equals:
            raise OptionError(f"filter {condition!r}: give name=value, such as lang=en")
        wanted.setdefault(name, []).append(value)
    if queries is not None:
        assert out is not None  # checked above
        return _search_many(index, queries, out, k, model, runtime, precision, filter=wanted or None, exact=exact, **options)
    assert query is not None  # checked above
    opened = open_index(index, model, runtime=runtime_for(1, runtime, precision), precision=precision)
    check_query(query)
    log_cut(opened.queries.count_truncated([query]), 1, "queries")
    hits = opened.search(query, k=10 if k is None else k, explain=True, filter=wanted or None, exact=exact, **options)
    about = {"query": query, "precision": opened.queries.precision} | ({"fuse": options["fuse"]} if options["fuse"] else {})
    about |= {name: options[name] for name in ("rerank", "rerank_depth") if options["rerank"]}
    found = about | {"hits": [hit.to_dict() for hit in hits]}
    if hits.note:
        return Result(found | {"note": hits.note}, [hits.note])
    return Result(found, hit_lines(hits, query_words(opened.queries, query)))


def _search_many(
    index: str, source: str, out: Path, k: int | None, model: str | None, runtime: Runtime, precision: Precision, **options: Any
) -> Result:
    """Write the run of many queries."""
    from anysplade._common.files import require_folder, user_path
    from anysplade.data.queries import load_queries
    from anysplade.evaluation.runs import require_trec_id, write_rankings
    from anysplade.search import open_index
    from anysplade.search.batch import search_many

    require_folder(user_path(out).parent)
    queries = load_queries(source)
    for id_ in queries:
        require_trec_id("query", id_)
    opened = open_index(index, model, runtime=runtime_for(len(queries), runtime, precision), precision=precision)
    k = (options["rerank_depth"] if options["rerank"] else 1000) if k is None else k
    rankings = search_many(opened, queries, k, **options, progress=is_first_process())
    counts: list[int] = []  # hits of each query

    def counting() -> Iterator[tuple[str, dict[str, float]]]:
        for id_, ranking in rankings:
            counts.append(len(ranking))
            yield id_, ranking

    start = time.perf_counter()
    write_rankings(out, counting(), str(opened.about["model"]))
    seconds = time.perf_counter() - start
    found = {
        "queries": len(queries),
        "k": k,
        "precision": opened.queries.precision,
        "exact": options["exact"],
        "fuse": options["fuse"],
    }
    found |= {
        "rerank": options["rerank"],
        "hits": sum(counts),
        "without_hits": counts.count(0),
        "seconds": seconds,
        "out": str(out),
    }
    none = f", {counts.count(0):,} without a hit" if not all(counts) else ""
    return Result(found, [f"{counted(len(queries), 'query')}{none}, {counted(sum(counts), 'hit')} in {out}"])


@command
@options_of("serving.app", "serve")
def serve(index: str, beside: str | None = None, /, *, token: str | None = None, **options: Any) -> Result:
    """Serve a search page and an HTTP API over an index, until stopped.

    Args:
        index: folder of an index.
        beside: folder of another index, or bm25, for the page that compares.
        model: folder of the index's model, if it was moved, or of its export to ONNX, which needs no torch.
        runtime: for encoding queries; see index.
        precision: for encoding queries; see index.
        host: address to listen on; any other than loopback needs a token.
        port: 0 is any free port.
        token: secret that every request must carry; ANYSPLADE_TOKEN by default, if that is set.
    """
    from anysplade.serving import app as server

    served = server.serve(index, beside, token=token or os.environ.get("ANYSPLADE_TOKEN"), **options)
    return Result(served.to_dict(), [f"{counted(served.requests, 'request')} answered"])


@command
@options_of("search.sizing", "size", without=("seed", "memory_gib"))
def size(model: str, /, *, documents: str, memory: float = 32.0, **options: Any) -> Result:
    """Estimate what an index will need: bytes, postings per query, queries per second and core, shards, hours of encoding.

    Args:
        model: folder or hub id of a sparse encoder.
        documents: number of documents, such as 100M.
        memory: GiB per machine for postings.
    """
    from anysplade.search import sizing

    found = sizing.size(model, sizing.parse_count(documents), memory_gib=memory, **options, progress=is_first_process())
    return Result(found.to_dict(), _size_lines(found))


def _size_lines(found: "Size") -> list[RenderableType]:
    sampled = f"{counted(found.sampled_documents, 'document')}, {counted(found.sampled_queries, 'query')}"
    posting = f"{found.ns_per_posting:.2f} ns per posting ({found.floor_ns_per_posting:.2f} at its bandwidth)"
    shards = f"{counted(found.shards, 'shard')} of {found.memory_gib:g} GiB"
    dims = f"{found.query_active_dims:.1f} per query, {found.document_active_dims:.1f} per document"
    drawn = Table.grid(padding=(0, 2))
    for name, value in {
        "measured on": f"{sampled}: {found.sampled_from}",
        "active dims": f"{dims}; FLOPS {found.flops:.2f}",
        "this machine": f"{found.texts_per_second:,.0f} texts/s encoded; {posting}",
        "documents": f"{found.documents:,}",
        "postings": f"{found.postings:.3g}; a query reads {found.postings_per_query:.3g} of them",
        "in memory": f"{found.index_bytes / 2**30:,.1f} GiB of postings",
        "on disk": f"{found.disk_bytes / 2**30:,.1f} GiB: postings, two copies of the vectors, texts and ids",
        "a query on a core": f"{1000 * found.seconds_per_query:,.1f} ms; {found.qps_per_core:,.2f} queries/s",
        f"for {found.qps:g} queries/s": f"{counted(found.cores, 'core')}, {shards}",
        "encoding": f"{duration(3600 * found.encoding_hours)} on one machine like this",
    }.items():
        drawn.add_row(name, value)
    return [drawn, *(f"assumed: {assumption}" for assumption in found.assumptions)]


@command
def export(
    source: str,
    /,
    *,
    to: Literal["onnx", "checkpoint", "lucene", "ciff", "vectors"],
    out: Path,
    form: Form | None = None,
    quantize: bool = False,
    queries: str | None = None,
    quantization: int = 100,
    model: str | None = None,
) -> Result:
    """Write a model or an index for other software.

    Args:
        source: of onnx and checkpoint, folder or hub id of a sparse encoder; of the others, folder of an index.
        to: onnx (FastEmbed, Vespa, OpenSearch, transformers.js, and searching without torch), checkpoint (vLLM and
            text-embeddings-inference), lucene (JSONL that Anserini and Pyserini index), ciff (one file, the Common Index File
            Format) or vectors (unrounded, which index --vectors reads).
        out: the folder or file to write; of vectors, .jsonl, .jsonl.gz, .npz or .parquet, or a folder.
        form: of onnx: what the network gives: logits (the default), which most software pools itself, vector (OpenSearch) or terms
            (Anserini).
        quantize: of onnx: also write a network whose products are in int8, which is approximate.
        queries: of lucene and ciff: a file or collection of queries, which are written to OUT.queries.tsv.
        quantization: of lucene and ciff: weights are multiplied by this and written as whole numbers.
        model: of an index: folder of its model, if it was moved.
    """
    of_model = to in ("onnx", "checkpoint")
    given = ({} if to == "onnx" else {"form": form, "quantize": quantize}) | (
        {"queries": queries, "model": model} if of_model else {}
    )
    if to == "vectors":
        given |= {"queries": queries, "quantization": quantization != 100}
    odd = [name for name, value in given.items() if value]
    if odd:
        raise OptionError(f"`{odd[0]}` has no meaning for `to={to}`; leave it out")
    if of_model:
        with extra("onnx" if to == "onnx" else "train"):
            from anysplade.model import export as exporting_models

        if to == "checkpoint":
            exporting_models.export_checkpoint(source, out)
            return Result({"out": str(out), "to": to}, [f"a checkpoint with all tensors of its head in {out}"])
        about = exporting_models.export_onnx(source, out, form or "logits", quantize)
        line = f"{about['form']} of {source} in {out}; they differ from torch's by at most {about['largest_difference']:.1e}"
        return Result(about | {"out": str(out), "to": to}, [line])
    from anysplade.data.queries import load_queries
    from anysplade.search.engines import export as exporting
    from anysplade.search.index import Index

    asked = {} if queries is None else load_queries(queries)
    written = beside(out, "{}.queries.tsv")
    with Index.load(source, model) as opened:
        names = opened.term_names
        if asked:  # first, because queries are few and an error in them should come early
            exporting.export_queries(list(asked), opened.encode_queries(list(asked.values())), names, written, quantization)
        if to == "vectors":
            count = exporting.export_vectors(opened.store, names, out)
        else:
            write = exporting.export_anserini if to == "lucene" else exporting.export_ciff
            count = write(opened.store, names, out, quantization)
    found: dict[str, Any] = {"documents": count, "out": str(out), "to": to}
    lines: list[RenderableType] = [f"{counted(count, 'document')} in {out}"]
    if asked:
        found |= {"queries": len(asked), "queries_out": str(written)}
        lines.append(f"{counted(len(asked), 'query')} in {written}")
    return Result(found, lines)
