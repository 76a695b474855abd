"""Results for a person: tables, lines and figures. Nothing is computed here."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from anysplade._common.figures import draw

if TYPE_CHECKING:
    from anysplade.cli.demo import DemoResult
    from anysplade.data.document_pairs import MadePairs
    from anysplade.evaluation.comparisons import Comparison, Evaluations
    from anysplade.model.calibration import Calibration
    from anysplade.model.head import HeadReport
    from anysplade.model.terms import Terms
    from anysplade.search.documents import Hit
    from anysplade.search.sizing import Size
    from anysplade.study.results import StudyResult
    from anysplade.training.adaptation import Adaptation
    from anysplade.training.heads import HeadTraining
    from anysplade.training.run import TrainingResult

_SNIPPET = 160  # characters of a hit's text
_TERMS = 6  # shown of a hit's explanation


def head_tables(report: "HeadReport", suggested: "Calibration", texts: str) -> list[RenderableType]:
    """The head, and what it does to the probe texts.

    Args:
        texts: what these are.
    """
    tied = "tied to the input embeddings" if report.tied else "not tied"
    about = (
        f"{report.architecture}: vocabulary {report.vocabulary:,}, width {report.width}, decoder {tied}, "
        f"{'with' if report.bias else 'without'} bias\n"
        f"decoder norm {report.frobenius_norm:.1f}; row norm {report.mean_row_norm:.3f}, at most {report.max_row_norm:.3f}"
    )
    if report.rescaled:
        about += f"\nrescaled before: k={report.rescaled['k']:g}, shift={report.rescaled['shift']:g}"
    if report.folding:
        about += f"\n{_folded(report)}"
    sides = suggested.sides
    first = next(iter(sides.values()))
    table = _table(f"on {texts}", *sides)
    for label, name, form in (
        ("token logits above zero", "positive_share", ".2%"),
        ("query active dims", "query_active_dims", ",.0f"),
        ("document active dims", "document_active_dims", ",.0f"),
        ("FLOPS", "flops", ",.1f"),
        ("score, mean", "score_mean", ",.1f"),
        ("score, standard deviation", "score_std", ",.1f"),
        ("cosine between documents", "document_similarity", ".2f"),
        (f"loss (guessing: {first.chance:.2f})", "start_loss", ",.2f"),
    ):
        values = [getattr(side, name) for side in sides.values()]
        table.add_row(label, *("–" if value is None else format(value, form) for value in values))
    for percentile in first.logit_percentiles:
        table.add_row(f"logits, percentile {percentile}", *(f"{side.logit_percentiles[percentile]:.2f}" for side in sides.values()))
    if suggested.explanation:
        return [about, table, Text(suggested.explanation, style="bold")]
    raw, calibrated = suggested.verdicts or ("", "")
    verdict = f"SPLADE training from the raw head {raw}; from k={suggested.k:g}, shift={suggested.shift:g} it {calibrated}"
    return [about, table, Text(verdict, style="bold")]


def _folded(report: "HeadReport") -> str:
    """What ``fold_head`` recorded."""
    assert report.folding is not None
    done = report.folding
    muted = f", {done['muted']:,} of punctuation and special tokens muted" if done["mute"] else ""
    return f"{done['folded']:,} terms folded into others by {done['by']}{muted}: {done['live']:,} of {report.vocabulary:,} are left"


def rescaled_lines(report: "HeadReport", calibration: "Calibration", out: Path) -> list[RenderableType]:
    tied = "tied, the size unchanged" if report.tied else "not tied"
    return [
        *([_folded(report)] if report.folding else []),
        f"{calibration.formula} (bias: {calibration.bias}), in the head of {report.architecture}",
        f"decoder {tied}",
        f"written to {out}; load it with AutoModelForMaskedLM.from_pretrained({str(out)!r})",
    ]


def training_lines(result: "TrainingResult") -> list[RenderableType]:
    means = [
        f"{part['mean']:.3g} over steps {part['from_step']}-{part['to_step']}" for part in (result.ranking_loss or {}).values()
    ]
    loss = f"; ranking loss {', '.join(dict.fromkeys(means))}" if means else ""
    resumed = f", resumed at step {result.resumed_from}" if result.resumed_from else ""
    return [
        f"k={result.calibration['k']:g}, shift={result.calibration['shift']:g}; "
        f"{result.steps} steps on {result.pairs:,} pairs in {result.seconds:.0f} s{resumed}{loss}",
        f"model: {result.model}" + (f", which reads {result.max_seq_length:,} tokens of a text" if result.max_seq_length else ""),
        f"next: anysplade evaluate {result.model} COLLECTION",
    ]


def head_training_lines(result: "HeadTraining") -> list[RenderableType]:
    losses = ", ".join(f"{name} {first:.2f} → {last:.2f}" for name, (first, last) in result.losses.items())
    return [
        f"{result.architecture}: {result.options['steps']} steps on {result.texts:,} texts in {result.seconds:.0f} s; "
        f"loss: {losses}",
        f"model: {result.model}",
        f"next: anysplade train {result.model} DATA --out RUN",
    ]


def adaptation_lines(result: "Adaptation", corpus: str) -> list[RenderableType]:
    rows = [{"model": name} | costs for name, costs in (("original", result.before), ("adapted", result.after))]
    metrics = [name for name in result.before if not name.endswith(("dims", "flops"))]
    return [
        *evaluation_table(rows, metrics),
        f"judged by {result.judged_by}: {result.reason}",
        f"kept: the {result.kept} model, in {result.model}",
        f"next: anysplade index {result.model} {corpus} --out INDEX",
    ]


def made_pairs_lines(made: "MadePairs", out: Path) -> list[RenderableType]:
    """How many pairs of each kind, what was left out and why, and three of the pairs."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in made.pairs.items())
    lines = [f"{sum(made.pairs.values()):,} pairs from {made.documents:,} documents ({kinds}), in {out}"]
    for part, counted in made.left_out.items():
        if counted:
            reasons = (f"{count:,} {reason.replace('_', ' ')}" for reason, count in counted.items())
            lines.append(f"left out, {part}: {', '.join(reasons)}")
    for row in made.examples:
        query, positive = (" ".join(row[name].split()) for name in ("query", "positive"))
        lines += [f"{row['kind']}: {query[:_SNIPPET]}", f"    {positive[:_SNIPPET]}{'…' if len(positive) > _SNIPPET else ''}"]
    return [*map(Text, lines), f"next: anysplade train MODEL {out} --out RUN"]


def evaluation_table(
    rows: Sequence[dict[str, Any]], metrics: Sequence[str], names: Sequence[str] = ("model",)
) -> list[RenderableType]:
    """One row a result: effectiveness, and the cost beside it."""
    table = _table(*names, *metrics, "query active dims", "document active dims", "FLOPS")
    for row in rows:
        table.add_row(
            *(_number(row.get(name)) for name in names),
            *(f"{row[metric]:.3f}" for metric in metrics),
            *("–" if row[name] is None else f"{row[name]:,.1f}" for name in ("query_active_dims", "document_active_dims", "flops")),
        )
    return [table]


def evaluations_parts(found: "Evaluations", metrics: Sequence[str]) -> list[RenderableType]:
    """One table of all; below it means, tests and the queries that changed most."""
    rows = [evaluation.to_dict() for evaluation in found.evaluations]
    several = len({row["collection"] for row in rows}) > 1
    parts = evaluation_table([*rows, *found.means], metrics, ("model", "collection") if several else ("model",))
    for collection, count in {row["collection"]: row["self_matches"] for row in reversed(rows) if row["self_matches"]}.items():
        parts.append(Text(f"{collection}: {count} queries are documents themselves and not counted as their hits"))
    if found.comparisons:
        table = _table(
            "against the first", *(("collection",) if several else ()), "metric", "difference", "95 %", "p", "wins / ties / losses"
        )
        for c in found.comparisons:
            place = (c.collection,) if several else ()
            span = "–" if c.interval is None else f"{c.interval[0]:+.3f} to {c.interval[1]:+.3f}"
            table.add_row(
                c.model,
                *place,
                c.metric,
                f"{c.difference:+.3f}",
                span,
                f"{c.p_corrected:.2g}",
                f"{c.wins} / {c.ties} / {c.losses}",
            )
        parts += ["", table, "p: paired t-test, corrected for all of these by Holm; 95 %: bootstrap over queries"]
        first = found.comparisons[0]
        for c in found.comparisons:
            if c.changed and (c.collection, c.metric) == (first.collection, first.metric):
                where = f" on {c.collection}" if several else ""
                parts.append(Text(f"\nchanged most in {c.metric}{where}, from {c.baseline} to {c.model}:"))
                parts += [Text(_changed_line(change, c)) for change in c.changed]
    for drawn in found.curves:
        title = f"{drawn['model']} pruned" + (f", {drawn['collection']}" if several else "")
        table = _table(title, *metrics, "query active dims", "document active dims", "FLOPS")
        for point in drawn["points"]:
            sides = {"queries": point["query_top_k"], "documents": point["document_top_k"]}
            dims = (f"{point[name]:,.1f}" for name in ("query_active_dims", "document_active_dims", "flops"))
            label = " and ".join(f"{side} to {k}" for side, k in sides.items() if k is not None) or "not pruned"
            table.add_row(label, *(f"{point[metric]:.3f}" for metric in metrics), *dims)
        parts += ["", table]
    return parts


def _changed_line(change: dict[str, Any], comparison: "Comparison") -> str:
    line = f"{change['before']:.3f} → {change['after']:.3f}  {change.get('query', change['query_id'])[:_SNIPPET]}"
    for side, model in (("before", comparison.baseline), ("after", comparison.model)):
        if f"rank_{side}" not in change:
            continue
        rank, terms = change[f"rank_{side}"], change.get(f"terms_{side}", {})
        line += f"\n    {model}: document {change['document_id']} {'not found' if rank is None else f'at rank {rank}'}"
        line += "".join(f"  {term} {product:.2f}" for term, product in terms.items())
    return line


def curve_figure(curves: Sequence[dict[str, Any]], metric: str) -> str:
    """Effectiveness against FLOPS, a line for each model and for what was pruned, as SVG."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for drawn in curves:
            for side, style in (("document", "o-"), ("query", "s--")):
                points = [p for p in drawn["points"] if p["document_top_k" if side == "query" else "query_top_k"] is None]
                points = sorted(points, key=lambda p: p["flops"])
                label = f"{drawn['model']}, {drawn['collection']}: {'queries' if side == 'query' else 'documents'} pruned"
                axes.plot([p["flops"] for p in points], [p[metric] for p in points], style, label=label)
        axes.set(xscale="log", xlabel="FLOPS (products a query and document)", ylabel=metric)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", frameon=False, fontsize="small")

    return draw(paint, 7, 4.2)


def encoded_lines(texts: Sequence[dict[str, Any]], words: Sequence["Terms"]) -> list[RenderableType]:
    """Each text's words with their weights, and how many more terms it has."""
    parts: list[RenderableType] = []
    for text, shown in zip(texts, words, strict=True):
        table = _table("word", "weight")
        for word in shown:
            table.add_row(Text(word.term), f"{word.weight:.3f}")
        more = text["active_dims"] - sum(len(word.ids) for word in shown)
        parts += [
            Text(" ".join(text["text"].split())[:_SNIPPET], style="bold"),
            table,
            f"{text['active_dims']:,} active dims" + (f", {more:,} not shown" if more else ""),
            "",
        ]
    return parts[:-1]


def size_lines(found: "Size") -> list[RenderableType]:
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("measured on", f"{found.sampled_documents} documents, {found.sampled_queries} queries: {found.sampled_from}"),
        (
            "active dims",
            f"{found.query_active_dims:.1f} a query, {found.document_active_dims:.1f} a document; FLOPS {found.flops:.2f}",
        ),
        (
            "this machine",
            f"{found.texts_per_second:,.0f} texts/s encoded; {found.ns_per_posting:.2f} ns a posting "
            f"({found.floor_ns_per_posting:.2f} at its bandwidth)",
        ),
        ("documents", f"{found.documents:,}"),
        ("postings", f"{found.postings:.3g}, of which a query reads {found.postings_per_query:.3g}"),
        ("in memory", f"{found.index_bytes / 2**30:,.1f} GiB of postings"),
        ("on disk", f"{found.disk_bytes / 2**30:,.1f} GiB: postings, two copies of the vectors, texts and ids"),
        ("a query on a core", f"{1000 * found.seconds_per_query:,.1f} ms; {found.qps_per_core:,.2f} queries/s"),
        (f"for {found.qps:g} queries/s", f"{found.cores:,} cores, {found.shards:,} shards of {found.memory_gib:g} GiB"),
        ("encoding", f"{found.encoding_hours:,.1f} hours on one machine like this"),
    ):
        table.add_row(name, value)
    return [table, *(f"assumed: {assumption}" for assumption in found.assumptions)]


def hit_lines(hits: Sequence["Hit"]) -> list[RenderableType]:
    if not hits:
        return ["no document shares a term with the query"]
    lines: list[RenderableType] = []
    for rank, hit in enumerate(hits, 1):
        text = " ".join(f"{hit.title} {hit.text}".split())
        lines.append(Text.assemble(f"{rank:>2}. ", (hit.id, "bold"), f"  {hit.score:.2f}"))
        lines.append(Text(f"    {text[:_SNIPPET]}{'…' if len(text) > _SNIPPET else ''}"))
        if hit.terms is not None:
            shown = "  ".join(f"{t.term} {t.query_weight:.2f}×{t.document_weight:.2f}={t.product:.2f}" for t in hit.terms[:_TERMS])
            rest = hit.terms[_TERMS:]
            lines.append(
                Text(f"    {shown}" + (f"  +{len(rest)} more={sum(t.product for t in rest):.2f}" if rest else ""), style="dim")
            )
    return lines


def study_lines(result: "StudyResult") -> list[RenderableType]:
    """What each study that was made says, and where the report is."""
    parts: list[RenderableType] = []
    for name, study in result.studies.items():
        parts += [Text(name, style="bold"), *(Text(f"- {line}") for line in study.conclusions), ""]
    if result.failed:
        parts.append(f"{len(result.failed)} cells failed; the same command tries them again")
    return [*parts, f"report: {result.report}"]


def demo_parts(result: "DemoResult") -> list[RenderableType]:
    collection, runs = result.collection, result.settings["runs"]
    parts: list[RenderableType] = [
        f"Docstrings of {', '.join(collection['packages'])}: {collection['training_pairs']:,} training pairs; "
        f"{collection['queries']:,} held-out queries over {collection['documents']:,} documents.",
        "Trained on {batch_size} pairs a step, texts cut to {max_length} tokens: ".format(**result.settings)
        + "; ".join(f"{name} {run['steps']} steps, learning rate {run['learning_rate']:g}" for name, run in runs.items()),
        *evaluation_table(result.rows, ["RR@10", "nDCG@10"], ["backbone", "calibration", "k", "shift"]),
    ]
    named = [
        f"{row['backbone']} {row['calibration']}: {f['name']} at step {f['step']}" for row in result.rows for f in row["findings"]
    ]
    if named:
        parts.append("\nWhat the monitor named while training: " + "; ".join(named) + ".")
    for query, hits in result.searches:
        parts += [Text(f"\n{query}", style="bold"), *hit_lines(hits)]
    parts.append(
        Text(
            f"\nmodel: {result.model}\nindex: {result.index}\nall done in {result.seconds:.0f} s; next:\n\n"
            f'  {result.command} search {result.index} "sort an array in descending order"\n\n'
            f"  from sentence_transformers import SparseEncoder\n"
            f"  model = SparseEncoder({result.model!r})"
        )
    )
    return parts


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    for i, column in enumerate(columns):
        widest = max(len(word) for word in column.split())  # headings break between words, never inside one
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0, min_width=widest)
    return table


def _number(value: object) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
