"""Tables and lines that several commands print."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from anysplade.search.hits import Hit, WordMatch

_SNIPPET = 160  # characters shown of a text
_NAME = 12  # characters of a name in the first column that stay on one line
_TERMS = 6  # words shown of a hit's explanation
_COSTS = {"query active dims": "query_active_dims", "document active dims": "document_active_dims", "FLOPS": "flops"}


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table with names on the left and numbers on the right.

    In a narrow terminal the headings wrap between words, and long names in the first column wrap anywhere.
    """
    drawn = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    cells = list(rows)
    for i, column in enumerate(columns):
        widest = max(cell_len(part) for part in (*column.split(), *(row[i] for row in cells)))
        drawn.add_column(column, justify="right" if i else "left", min_width=widest if i else min(widest, _NAME), overflow="fold")
    for row in cells:
        drawn.add_row(*map(Text, row))
    return drawn


def markdown(parts: Iterable[RenderableType]) -> str:
    """Tables and lines as Markdown."""
    blocks = []
    for part in parts:
        if isinstance(part, Table):
            columns = [[column.header, *column.cells] for column in part.columns]
            lines = [[str(cell).replace("|", r"\|") for cell in row] for row in zip(*columns, strict=True)]
            lines.insert(1, ["---", *["---:"] * (len(columns) - 1)])
            blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        elif str(part):
            blocks.append(str(part))
    return "\n\n".join(blocks) + "\n"


def snippet(text: str) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(text.split())
    return text[:_SNIPPET] + ("…" if len(text) > _SNIPPET else "")


def evaluation_table(rows: Iterable[Mapping[str, Any]], metrics: Sequence[str], names: Sequence[str] = ("model",)) -> Table:
    """A table with one row per result: the columns ``names``, effectiveness, cost and, where it is known, own words kept."""
    rows = list(rows)
    own = [_own_words(row) for row in rows]
    has_own = any(shown != "–" for shown in own)
    lines = [
        [
            *(_name(row.get(name)) for name in names),
            *(f"{row[metric]:.3f}" for metric in metrics),
            *("–" if row[cost] is None else f"{row[cost]:,.1f}" for cost in _COSTS.values()),
            *([shown] if has_own else []),
        ]
        for row, shown in zip(rows, own, strict=True)
    ]
    return table((*names, *metrics, *_COSTS, *(["own words"] if has_own else [])), lines)


def _own_words(row: Mapping[str, Any]) -> str:
    """Own words kept by queries and documents."""
    values = [row.get(f"{role}_own_words") for role in ("query", "document")]
    return "–" if values == [None, None] else " / ".join("–" if value is None else f"{value:.2f}" for value in values)


def _name(value: object) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def hit_lines(hits: Sequence["Hit"], words: Mapping[str, str]) -> list[RenderableType]:
    """Each hit with the words that contribute most to its score; ``words`` are those of ``query_words``."""
    from anysplade.search.hits import join_matches

    if not hits:
        return ["no document shares a term with the query"]
    lines: list[RenderableType] = []
    for rank, hit in enumerate(hits, 1):
        title = f"  {snippet(hit.title)}" if hit.title else ""
        score = f"{hit.score:.4f}" if hit.parts else f"{hit.score:.2f}"
        lines.append(Text.assemble(f"{rank:>2}. ", (hit.id, "bold"), f"  {score}{title}"))
        lines.append(Text(f"    {snippet(hit.text)}"))
        if hit.terms is not None:
            matches = join_matches(hit.terms, words)
            shown = [_product(match) for match in matches[:_TERMS]]
            if rest := matches[_TERMS:]:
                shown.append(f"+{len(rest)} more={sum(match.product for match in rest):.2f}")
            lines.append(Text(f"    {'  '.join(shown)}", style="dim"))
        if hit.parts:
            parts = (f"{name} rank {part.rank} ({part.score:.2f})" for name, part in hit.parts.items())
            lines.append(Text(f"    {'  '.join(parts)}", style="dim"))
    return lines


def _product(match: "WordMatch") -> str:
    """What a word adds to the score; for a single term also its two weights."""
    weights = [f" {term.query_weight:.2f}×{term.document_weight:.2f}" for term in match.terms]
    return f"{match.word}{weights[0] if len(weights) == 1 else ''}={match.product:.2f}"
