"""Plots as SVG inside a page: its font and its text colour, no address, no id twice."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastpie._extras import load_extra
from fastpie.report.drawing import quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["inline_svg"]

_INK = "#010203"  # stands for the page's own text colour, light or dark
_STYLE = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "grid.color": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.fonttype": "none",
}


def inline_svg(draw: Callable[[], tuple[Figure, Axes]], alt: str, name: str) -> str:
    """Draw a plot in the page's colours.

    Args:
        draw: makes the plot.
        alt: what the plot shows, for readers who do not see it.
        name: of the plot; keeps the ids of several plots apart.

    Returns:
        An svg element.
    """
    matplotlib = load_extra("matplotlib", "report", "a plot")
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), quiet():
        fig, _ = draw()
        fig.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # without XML declaration and document type
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None  # matplotlib always writes one
    body = re.sub(
        r' id="[A-Za-z]+[A-Za-z0-9.]*_\d+"', "", body
    )  # axes_1 and the like, in every plot
    body = body.replace(_INK, "currentColor")
    return f'<svg {box[0]} role="img" aria-label="{html.escape(alt)}">{body.strip()}'
