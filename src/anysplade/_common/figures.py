"""Figures as SVG, with the matplotlib settings of all figures."""

import io
from collections.abc import Callable
from typing import Any

from anysplade._common.extras import extra

INK = "#010203"  # colour of text and axes with ON_A_PAGE; the page replaces it by the colour of its text
ON_A_PAGE: dict[str, Any] = {  # settings for a figure that uses a page's colours
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "savefig.transparent": True,
}  # fmt: skip


def draw(paint: Callable[[Any], None], width: float, height: float, settings: dict[str, Any] | None = None) -> str:
    """The figure that ``paint`` draws into a matplotlib Figure, as SVG; the same data gives the same bytes."""
    with extra("evaluation"):
        import matplotlib
        from matplotlib.figure import Figure

    # A fixed salt for the ids and no metadata give the same bytes for the same data; "none" keeps text as text.
    with matplotlib.rc_context({"svg.hashsalt": "anysplade", "svg.fonttype": "none"} | (settings or {})):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Type", "Format")))
    return out.getvalue()
