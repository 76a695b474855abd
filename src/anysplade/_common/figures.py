"""Figures as SVG, with the matplotlib settings that all figures share."""

import io
from collections.abc import Callable
from typing import Any

from anysplade._common.extras import extra


def draw(paint: Callable[[Any], None], width: float, height: float, settings: dict[str, Any] | None = None) -> str:
    """Draw a figure as SVG; the same data gives the same bytes.

    Args:
        paint: draws into a ``matplotlib.figure.Figure``.
        width, height: in inches.
        settings: more matplotlib settings.

    Raises:
        ExtraError: matplotlib is not installed.
    """
    with extra("evaluation"):
        import matplotlib
        from matplotlib.figure import Figure

    # A fixed salt for ids and no date, so that the same data gives the same file; text is written as text, not as paths.
    with matplotlib.rc_context({"svg.hashsalt": "anysplade", "svg.fonttype": "none"} | (settings or {})):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
