"""Results for a person: tables, lines and figures. Nothing is computed here."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from anysplade._common.figures import draw
from anysplade._common.progress import counted, duration
from anysplade.search.documents import join_matches

if TYPE_CHECKING:
    from anysplade.cli.demo import DemoResult
    from anysplade.data.document_pairs import MadePairs
    from anysplade.evaluation.comparisons import Comparison
    from anysplade.evaluation.grid import Evaluations
    from anysplade.model.calibration import Calibration
    from anysplade.model.head import HeadReport
    from anysplade.model.terms import Terms
    from anysplade.search.documents import Hit, WordMatch
    from anysplade.search.sizing import Size
    from anysplade.study.pipeline import StudyPlan
    from anysplade.study.results import StudyResult
    from anysplade.training.adaptation import Adaptation
    from anysplade.training.head_training import HeadTraining
    from anysplade.training.run import TrainingResult

_SNIPPET = 160  # characters of a hit's text
_NAME = 12  # characters of a row's name that stay together
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
    rows: list[list[str]] = []
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
        rows.append([label, *("–" if value is None else format(value, form) for value in values)])
    for percentile in first.logit_percentiles:
        values = [round(side.logit_percentiles[percentile], 2) + 0 for side in sides.values()]  # no -0.00
        rows.append([f"logits, percentile {percentile}", *(f"{value:.2f}" for value in values)])
    table = _table((f"on {texts}", *sides), rows)
    if suggested.explanation:
        return [about, table, Text(suggested.explanation, style="bold")]
    raw, calibrated = suggested.verdicts or ("", "")
    if len(sides) == 1:
        return [about, table, Text(f"calibrated already, so nothing changes: SPLADE training from it {calibrated}", style="bold")]
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
        f"the head of {report.architecture} stays as it is"
        if calibration.is_unchanged
        else f"{calibration.formula} (bias: {calibration.bias}), in the head of {report.architecture}",
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
        f"{counted(result.steps, 'step')} on {counted(result.pairs, 'pair')} in {duration(result.seconds)}{resumed}{loss}",
        f"model: {result.model}" + (f", which reads {result.max_seq_length:,} tokens of a text" if result.max_seq_length else ""),
        f"next: anysplade evaluate {result.model} COLLECTION",
    ]


def head_training_lines(result: "HeadTraining") -> list[RenderableType]:
    losses = ", ".join(f"{name} {first:.2f} → {last:.2f}" for name, (first, last) in result.losses.items())
    return [
        f"{result.architecture}: {counted(result.options['steps'], 'step')} on {counted(result.texts, 'text')} in "
        f"{duration(result.seconds)}; "
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
    pairs, documents = counted(sum(made.pairs.values()), "pair"), counted(made.documents, "document")
    lines = [f"{pairs} from {documents} ({kinds}), in {out}"]
    for part, found in made.left_out.items():
        if found:
            reasons = (f"{count:,} {reason.replace('_', ' ')}" for reason, count in found.items())
            lines.append(f"left out, {part}: {', '.join(reasons)}")
    for row in made.examples:
        lines += [f"{row['kind']}: {_snippet(row['query'])}", f"    {_snippet(row['positive'])}"]
    return [*map(Text, lines), f"next: anysplade train MODEL {out} --out RUN"]


def evaluation_table(
    rows: Sequence[dict[str, Any]], metrics: Sequence[str], names: Sequence[str] = ("model",)
) -> list[RenderableType]:
    """One row a result: effectiveness, and the cost beside it."""
    lines = [
        [
            *(_number(row.get(name)) for name in names),
            *(f"{row[metric]:.3f}" for metric in metrics),
            *("–" if row[name] is None else f"{row[name]:,.1f}" for name in ("query_active_dims", "document_active_dims", "flops")),
        ]
        for row in rows
    ]
    return [_table((*names, *metrics, "query active dims", "document active dims", "FLOPS"), lines)]


def evaluations_parts(found: "Evaluations", metrics: Sequence[str]) -> list[RenderableType]:
    """One table of all; below it means, tests and the queries that changed most."""
    rows = [evaluation.to_dict() for evaluation in found.evaluations]
    several = len({row["collection"] for row in rows}) > 1
    parts = evaluation_table([*rows, *found.means], metrics, ("model", "collection") if several else ("model",))
    for collection, count in {row["collection"]: row["self_matches"] for row in reversed(rows) if row["self_matches"]}.items():
        are = (
            "is a document itself and not counted as its hit"
            if count == 1
            else "are documents themselves and not counted as their hits"
        )
        parts.append(Text(f"{collection}: {counted(count, 'query')} {are}"))
    for name in dict.fromkeys(row["model"] for row in rows if row["kind"] == "dense"):
        parts.append(Text(f"{name} is dense: exact nearest neighbours, and all of its dimensions count as active"))
    if found.comparisons:
        parts += ["", *_comparison_parts(found.comparisons, several)]
        first = found.comparisons[0]
        for c in found.comparisons:
            if c.changed and (c.collection, c.metric) == (first.collection, first.metric):
                where = f" on {c.collection}" if several else ""
                parts.append(Text(f"\nchanged most in {c.metric}{where}, from {c.baseline} to {c.model}:"))
                parts += [Text(_changed_line(change, c)) for change in c.changed]
    for drawn in found.curves:
        title = f"{drawn['model']} pruned" + (f", {drawn['collection']}" if several else "")
        lines = []
        for point in drawn["points"]:
            sides = {"queries": point["query_top_k"], "documents": point["document_top_k"]}
            dims = (f"{point[name]:,.1f}" for name in ("query_active_dims", "document_active_dims", "flops"))
            label = " and ".join(f"{side} to {k}" for side, k in sides.items() if k is not None) or "not pruned"
            lines.append([label, *(f"{point[metric]:.3f}" for metric in metrics), *dims])
        parts += ["", _table((title, *metrics, "query active dims", "document active dims", "FLOPS"), lines)]
    return parts


def _comparison_parts(comparisons: "Sequence[Comparison]", several: bool) -> list[RenderableType]:
    """The table of the comparisons, those in the primary metric first, how to read its p, and where no difference shows.

    Args:
        several: there is more than one collection.
    """
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
    notes = [
        f"p: paired t-test over queries; p, Holm: corrected for {counted(len(primary), 'comparison')} in {metric}, the first metric"
    ]
    if others:
        notes.append("the other metrics are exploratory: their p is not corrected; to test one of them, name it first in --metrics")
    notes.append("95 %: bootstrap over queries")
    for c in primary:
        if not c.is_shown:
            where = f" on {c.collection}" if several else ""
            notes.append(f"no difference shows between {c.model} and {c.baseline} in {metric}{where}")
    return [_table(columns, rows), *map(Text, notes)]


def _changed_line(change: dict[str, Any], comparison: "Comparison") -> str:
    line = f"{change['before']:.3f} → {change['after']:.3f}  {_snippet(change.get('query', change['query_id']))}"
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
        table = _table(("word", "weight"), [[word.term, f"{word.weight:.3f}"] for word in shown])
        more = text["active_dims"] - sum(len(word.ids) for word in shown)
        parts += [
            Text(_snippet(text["text"]), style="bold"),
            table,
            counted(text["active_dims"], "active dim") + (f", {more:,} not shown" if more else ""),
            "",
        ]
    return parts[:-1]


def size_lines(found: "Size") -> list[RenderableType]:
    table = Table.grid(padding=(0, 2))
    for name, value in (
        (
            "measured on",
            f"{counted(found.sampled_documents, 'document')}, {counted(found.sampled_queries, 'query')}: {found.sampled_from}",
        ),
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
        (
            f"for {found.qps:g} queries/s",
            f"{counted(found.cores, 'core')}, {counted(found.shards, 'shard')} of {found.memory_gib:g} GiB",
        ),
        ("encoding", f"{duration(3600 * found.encoding_hours)} on one machine like this"),
    ):
        table.add_row(name, value)
    return [table, *(f"assumed: {assumption}" for assumption in found.assumptions)]


def hit_lines(hits: Sequence["Hit"], words: Mapping[str, str]) -> list[RenderableType]:
    """
    Args:
        words: of the query that its tokenizer split, by the term of each of their pieces; see ``query_words``.
    """
    if not hits:
        return ["no document shares a term with the query"]
    lines: list[RenderableType] = []
    for rank, hit in enumerate(hits, 1):
        title = f"  {_snippet(hit.title)}" if hit.title else ""
        lines.append(Text.assemble(f"{rank:>2}. ", (hit.id, "bold"), f"  {hit.score:.2f}{title}"))
        lines.append(Text(f"    {_snippet(hit.text)}"))
        if hit.terms is not None:
            matches = join_matches(hit.terms, words)
            shown = "  ".join(_product(match) for match in matches[:_TERMS])
            rest = matches[_TERMS:]
            lines.append(
                Text(f"    {shown}" + (f"  +{len(rest)} more={sum(m.product for m in rest):.2f}" if rest else ""), style="dim")
            )
    return lines


def _product(match: "WordMatch") -> str:
    """What a word adds to the score; of a term also the two weights."""
    weights = [f" {term.query_weight:.2f}×{term.document_weight:.2f}" for term in match.terms]
    return f"{match.word}{weights[0] if len(weights) == 1 else ''}={match.product:.2f}"


def _snippet(text: str) -> str:
    text = " ".join(text.split())
    return text[:_SNIPPET] + ("…" if len(text) > _SNIPPET else "")


def study_lines(result: "StudyResult") -> list[RenderableType]:
    """What each study that was made says, and where the report is."""
    parts: list[RenderableType] = []
    for name, study in result.studies.items():
        parts += [Text(name, style="bold"), *(Text(f"- {line}") for line in study.conclusions), ""]
    if result.failed:
        parts.append(f"{counted(len(result.failed), 'cell')} failed; the same command trains again what failed")
    return [*parts, f"report: {result.report}"]


def plan_lines(plan: "StudyPlan") -> list[RenderableType]:
    """What a study would train, and how long it takes, as far as that is known."""
    rows = [[row.study, row.backbone, row.head, str(row.seeds), str(row.done)] for row in plan.rows]
    left = plan.cells - plan.done
    line = f"{counted(plan.cells, 'training')}, {plan.done:,} of them done; {left:,} to run, {plan.workers} at a time"
    if left:
        line += (
            f", about {duration(plan.seconds)}"
            if plan.seconds is not None
            else "; the time is known once one of each backbone is done"
        )
    shared = ["rows of several studies share trainings"] if sum(row.seeds for row in plan.rows) > plan.cells else []
    return [_table(("study", "backbone", "head", "seeds", "done"), rows), line, *shared]


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
        parts += [Text(f"\n{query}", style="bold"), *hit_lines(hits, result.words[query])]
    parts.append(
        Text(
            f"\nmodel: {result.model}\nindex: {result.index}\nall done in {duration(result.seconds)}; next:\n\n"
            f'  {result.command} search {result.index} "sort an array in descending order"\n\n'
            f"  from sentence_transformers import SparseEncoder\n"
            f"  model = SparseEncoder({result.model!r})"
        )
    )
    return parts


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Names on the left, numbers on the right. In a narrow terminal headings break between words and long names in two."""
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    cells = list(rows)
    for i, column in enumerate(columns):
        widest = max(cell_len(part) for part in (*column.split(), *(row[i] for row in cells)))
        table.add_column(column, justify="right" if i else "left", min_width=widest if i else min(widest, _NAME), overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def _number(value: object) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
