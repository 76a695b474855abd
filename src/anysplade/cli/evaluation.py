"""Commands that measure effectiveness and cost: evaluate, compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from anysplade._common.figures import draw
from anysplade._common.progress import counted
from anysplade.cli.app import Result, command, is_first_process
from anysplade.cli.library import options_of
from anysplade.cli.rendering import evaluation_table, markdown, snippet, table
from anysplade.errors import OptionError
from anysplade.search.fusion import Fusion

if TYPE_CHECKING:
    from anysplade.evaluation.comparisons import Comparison
    from anysplade.evaluation.grid import Evaluations
    from anysplade.evaluation.seeds import SeedComparison


@command
@options_of("evaluation.grid", "evaluate_all", without=("curves", "output"))
def evaluate(
    *names: str,
    metrics: list[str] | None = None,
    curve: bool = False,
    out: Path | None = None,
    cache: Path | None = None,
    **options: Any,
) -> Result:
    """Measure models on collections: effectiveness, cost and, for several models, the significance of the differences.

    Args:
        names: models and then collections. A model is the folder or hub id of a sparse encoder, a dense model or a masked LM as
            it is, bm25, bm25-unstemmed, a TREC run file, or the folder of an index; a collection is a BEIR folder or zip, a TREC
            folder, an ir_datasets id, a hub dataset, nanobeir or python-docs.
        metrics: names of ir-measures; nDCG@10 RR@10 R@100 R@1000 by default.
        split: the qrels to read.
        seeds: the sparse models differ only in their seed: show mean and standard deviation, and test the mean against the first
            model, such as bm25, over seeds and queries together.
        curve: prune documents and queries to their largest weights, and show the effect on effectiveness and cost.
        lexical: add each sparse model with BM25 added to its scores, times this weight, such as 3.
        fuse: add the models' rankings fused into one: rrf by their ranks, wsum by their scores.
        rerank: folder or hub id of a cross-encoder; adds each row re-ranked by it.
        rerank_depth: documents per query that it reads, the first ones.
        runtime: for encoding; auto is openvino where it is installed and can run the model and there are 100 texts or more, which
            is faster and as exact.
        precision: for encoding; bfloat16 and int8 (openvino) are faster and approximate; auto is bfloat16 on machines with support.
        max_length: tokens to cut a text to, up to the model's positions; the value saved with the model by default.
        passages: split documents into passages of this many tokens, such as 128, or 128:64 for one every 64 tokens: a document is
            ranked by its best passage, and nothing is cut; bm25 reads documents whole.
        batch_tokens: tokens that go through a sparse encoder together; by default 1,024 on a CPU, more on a GPU by its memory.
        out: a folder for TREC runs, values by query, figures, the JSON, and the tables as Markdown.
        language: of bm25's stemmer and stop words, by its English name or ISO 639-1 code; auto is that of most documents, none is
            neither.
        cache: a folder for vectors, which are then not computed twice; ANYSPLADE_CACHE or the user's cache folder by default.
    """
    from anysplade._common.files import write_atomic
    from anysplade.data.collections import is_collection

    collections = [name for i, name in enumerate(names) if i == len(names) - 1 or is_collection(name)]
    models = [name for name in names if name not in collections]
    if (not models and options.get("index") is None) or not collections:
        raise OptionError(f"{' '.join(names) or 'nothing'}: name at least one model and then a collection")
    found, shown = _evaluated(models, collections, metrics, cache, curves=curve, output=out, **options)
    parts = evaluations_parts(found, shown)
    if out is not None:
        if found.curves:
            write_atomic(out / "curve.svg", _curve_figure(found.curves, shown[0]))
        name = "evaluation" if len(found.evaluations) == 1 else "evaluations"
        write_atomic(out / f"{name}.md", markdown(parts))
    return Result(found.to_dict(), [*parts, *_detail_parts(found, shown)])


@command
def compare(
    *runs: str,
    collection: str,
    metrics: list[str] | None = None,
    split: str = "test",
    language: str = "auto",
    fuse: Fusion | None = None,
) -> Result:
    """Compare run files on a collection: each with the first one, with paired tests and the queries that changed most.

    Args:
        runs: two or more TREC run files, or anything else that evaluate takes as a model.
        collection: the collection of the runs.
        metrics: names of ir-measures; nDCG@10 RR@10 R@100 R@1000 by default.
        split: the qrels to read.
        language: of bm25, if that is among the models; see evaluate.
        fuse: compare the runs fused into one too: rrf by their ranks, wsum by their scores.
    """
    if len(runs) < 2:
        raise OptionError(f"{len(runs)} runs: name two or more; the others are compared with the first")
    found, shown = _evaluated(runs, [collection], metrics, split=split, language=language, fuse=fuse)
    return Result(found.to_dict(), [*evaluations_parts(found, shown), *_detail_parts(found, shown)])


def _evaluated(
    models: Sequence[str], collections: Sequence[str], metrics: Sequence[str] | None, cache: Path | None = None, **options: Any
) -> "tuple[Evaluations, list[str]]":
    """The evaluations, and the metrics that tables show: by default those that are not 1 for every ranking of all documents."""
    from anysplade._common.files import default_cache
    from anysplade.evaluation.grid import evaluate_all
    from anysplade.evaluation.measures import METRICS

    options |= {"cache": cache or default_cache(), "progress": is_first_process()}
    found = evaluate_all(models, collections, metrics or METRICS, **options)
    most = max(evaluation.documents for evaluation in found.evaluations)
    return found, list(metrics or (name for name in METRICS if not (name.startswith("R@") and int(name[2:]) >= most)))


def evaluations_parts(found: "Evaluations", metrics: Sequence[str]) -> list[RenderableType]:
    """One table of all results; below it notes and tests."""
    rows = [evaluation.to_dict() for evaluation in found.evaluations]
    several = len({row["collection"] for row in rows}) > 1
    names = ("model", "collection") if several else ("model",)
    parts: list[RenderableType] = [evaluation_table([*rows, *found.means], metrics, names)]
    for collection, count in {row["collection"]: row["self_matches"] for row in reversed(rows) if row["self_matches"]}.items():
        one, many = "is a document itself and not counted as its hit", "are documents themselves and not counted as their hits"
        parts.append(Text(f"{collection}: {counted(count, 'query')} {one if count == 1 else many}"))
    for name in dict.fromkeys(row["model"] for row in rows if row["kind"] == "dense"):
        parts.append(Text(f"{name} is dense: exact nearest neighbours, and all of its dimensions count as active"))
    parts += [Text(_passage_note(row)) for row in rows if row["passages"] is not None]
    parts += [Text(_cost_note(row)) for row in rows if row["kind"] in ("fusion", "reranked")]
    for row in rows:
        if row["kind"] == "index":
            parts.append(Text(_deployed(row)))
    if hidden := [name for name in found.evaluations[0].metrics if name not in metrics]:
        parts.append(Text(f"{', '.join(hidden)}: not shown, since it is 1 if a ranking has all documents; the JSON has it"))
    if compared := [comparison for comparison in found.comparisons if comparison.metric in metrics]:
        parts += ["", *_comparison_parts(compared, several)]
    parts += [Text(_seed_line(over)) for over in found.seed_comparisons if over.p_corrected is not None]
    return parts


def _seed_line(over: "SeedComparison") -> str:
    interval = "" if over.interval is None else f", 95 % {over.interval[0]:+.3f} to {over.interval[1]:+.3f}"
    words = "" if over.lexical is None else f" + {over.lexical:g} bm25"
    return (
        f"mean of {over.seeds} seeds{words} against {over.baseline} on {over.collection}, tested over seeds and queries: "
        f"{over.metric} {over.difference:+.3f}{interval}, p {over.p:.2g}, Holm {over.p_corrected:.2g}: {over.verdict}"
    )


def _cost_note(row: dict[str, Any]) -> str:
    """What searching costs if a row is made of others."""
    flops = " + ".join("–" if part["flops"] is None else f"{part['flops']:,.1f}" for part in row["cost"]["parts"])
    pairs = row["cost"].get("pairs_per_query")
    read = "" if pairs is None else f", and the cross-encoder's reading of {pairs:,.0f} pairs per query"
    return f"{row['model']} on {row['collection']}: FLOPS {flops}{read}"


def _passage_note(row: dict[str, Any]) -> str:
    """What the costs of a row count if documents are split."""
    cost = row["cost"]
    each = f"{cost['passages_per_document']:.2f} per document"
    counted = f"FLOPS count all of a document's, {cost['flops_per_passage']:,.2f} each, active dims are one's"
    return f"{row['model']} on {row['collection']}: best of the passages of {row['passages']} tokens, {each}; {counted}"


def _deployed(row: dict[str, Any]) -> str:
    """How an index differs from its exact model."""
    about = row["index"]
    pruned = "all weights" if about["top_k"] is None else f"the {about['top_k']} largest weights"
    precision = f"documents in {row['precision']} with {pruned}, queries in {about['query_precision']}, engine {about['engine']}"
    if about["lexical"] is not None:
        precision += f", BM25 times {about['lexical']:g} in each score"
    matching = f"{about['documents_in_collection']:,} of its {counted(about['documents'], 'document')} in {row['collection']}"
    return f"{row['model']} is an index: {precision}; {matching}"


def _detail_parts(found: "Evaluations", metrics: Sequence[str]) -> list[RenderableType]:
    """The queries that changed most, of each model on the first collection, and the tables of pruned vectors."""
    parts: list[RenderableType] = []
    several = len({evaluation.collection for evaluation in found.evaluations}) > 1
    for c in found.comparisons:
        first = found.comparisons[0]
        if c.changed and (c.collection, c.metric) == (first.collection, first.metric):
            parts.append(Text(f"\nchanged most in {c.metric}{_on(c, several)}, from {c.baseline} to {c.model}:"))
            parts += [Text(_changed_line(change, c)) for change in c.changed]
    for curve in found.curves:
        title = f"{curve['model']} pruned" + (f", {curve['collection']}" if several else "")
        points = [{title: _pruned(point)} | point for point in curve["points"]]
        parts += ["", evaluation_table(points, metrics, [title])]
    return parts


def _on(comparison: "Comparison", several: bool) -> str:
    return f" on {comparison.collection}" if several else ""


def _pruned(point: dict[str, Any]) -> str:
    sides = {"queries": point["query_top_k"], "documents": point["document_top_k"]}
    return " and ".join(f"{side} to {k}" for side, k in sides.items() if k is not None) or "not pruned"


def _comparison_parts(comparisons: "Sequence[Comparison]", several: bool) -> list[RenderableType]:
    """The table of the comparisons, with those in the first metric on top, and notes on how to read it."""
    primary = [c for c in comparisons if c.p_corrected is not None]
    others = [c for c in comparisons if c.p_corrected is None]
    rows = [
        [
            c.model,
            *((c.collection,) if several else ()),
            c.metric,
            f"{c.difference:+.3f}",
            "–" if c.interval is None else f"{c.interval[0]:+.3f} to {c.interval[1]:+.3f}",
            f"{c.p:.2g}",
            "–" if c.p_corrected is None else f"{c.p_corrected:.2g}",
            f"{c.wins} / {c.ties} / {c.losses}",
        ]
        for c in (*primary, *others)
    ]
    place = ("collection",) if several else ()
    columns = (f"against {comparisons[0].baseline}", *place, "metric", "difference", "95 %", "p", "p, Holm", "wins / ties / losses")
    metric = primary[0].metric
    corrected = f"corrected for {counted(len(primary), 'comparison')} in {metric}, the first metric"
    notes = [f"p: paired t-test over queries; p, Holm: {corrected}"]
    if others:
        notes.append("the other metrics are exploratory: their p is not corrected; to test one of them, name it first in --metrics")
    notes.append("95 %: bootstrap over queries")
    for c in primary:
        if not c.is_shown:
            notes.append(f"{c.verdict} between {c.model} and {c.baseline} in {metric}{_on(c, several)}")
    return [table(columns, rows), *map(Text, notes)]


def _changed_line(change: dict[str, Any], comparison: "Comparison") -> str:
    line = f"{change['before']:.3f} → {change['after']:.3f}  {snippet(change.get('query', change['query_id']))}"
    for side, model in (("before", comparison.baseline), ("after", comparison.model)):
        if f"rank_{side}" not in change:
            continue
        rank, terms = change[f"rank_{side}"], change.get(f"terms_{side}", {})
        line += f"\n    {model}: document {change['document_id']} {'not found' if rank is None else f'at rank {rank}'}"
        line += "".join(f"  {term} {product:.2f}" for term, product in terms.items())
    return line


def _curve_figure(curves: Sequence[dict[str, Any]], metric: str) -> str:
    """Effectiveness against FLOPS as SVG, with one line per model and pruned side."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for curve in curves:
            for pruned, kept_whole, style in (("documents", "query_top_k", "o-"), ("queries", "document_top_k", "s--")):
                points = sorted((p for p in curve["points"] if p[kept_whole] is None), key=lambda p: p["flops"])
                label = f"{curve['model']}, {curve['collection']}: {pruned} pruned"
                axes.plot([p["flops"] for p in points], [p[metric] for p in points], style, label=label)
        axes.set(xscale="log", xlabel="FLOPS (products per query and document)", ylabel=metric)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", frameon=False, fontsize="small")

    return draw(paint, 7, 4.2)
