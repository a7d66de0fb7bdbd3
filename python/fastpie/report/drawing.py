"""What the plots share: axes of their own, colours, texts that cannot be taken for mathematics."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpie._extras import load_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLORS",
    "DENSE",
    "GREY",
    "MOST_ROWS",
    "PRUNED",
    "draw_forest",
    "name_rows",
    "new_axes",
    "nothing",
    "numbers",
    "plain",
    "quiet",
    "ramp",
    "spread",
    "strongest",
    "unique",
    "where",
]

DENSE = "#2a83c6"
PRUNED = "#d9622b"
GREY = "#808890"
# Okabe and Ito, https://jfly.uni-koeln.de/color/: told apart by readers with any common colour vision.
# Black, which a dark ground swallows, and yellow, which a light one does, are left out; the blue is
# lighter for the same reason.
COLORS = ("#2a83c6", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
_SIZE = (6.4, 3.7)  # inches
_MOST_CHARACTERS = 28
MOST_ROWS = 40  # of a forest plot


def new_axes(ax: Axes | None, height: float | None = None) -> tuple[Figure, Axes]:
    """The axes given, with their figure, or new ones.

    Args:
        ax: to draw on, or None.
        height: of a new figure, inches.
    """
    if ax is not None:
        return ax.get_figure(root=True), ax  # type: ignore[return-value]
    figure = load_extra("matplotlib.figure", "report", "a plot").Figure(
        figsize=(_SIZE[0], _SIZE[1] if height is None else height), layout="constrained"
    )
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def nothing(ax: Axes, what: str) -> Axes:
    """Say in the axes that there is nothing to draw."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, f"no {what} to draw", ha="center", va="center", transform=ax.transAxes)
    return ax


def numbers(table: pa.Table, name: str) -> np.ndarray:  # fp64 [N]
    """A column with null as NaN; NaN throughout where the table does not have it."""
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan)
    return np.asarray(table.column(name).cast(pa.float64()).to_numpy(), dtype=np.float64)


def plain(text: Any, most: int = _MOST_CHARACTERS) -> str:
    """A short text on one line, in which matplotlib finds no formula."""
    words = " ".join(str(text).split())
    words = "".join(c for c in words if c.isprintable())
    if len(words) > most:
        words = words[: most - 1] + "…"
    return words.replace("$", r"\$")


def spread(places: np.ndarray, gap: float) -> np.ndarray:
    """Places moved as little as needed to stand at least `gap` apart, in their order."""
    order = np.argsort(places, kind="stable")
    groups: list[tuple[float, int]] = []  # mean of the bottoms of a group of labels, its size
    for place in places[order]:
        groups.append((float(place), 1))
        # Labels that would overlap become one block around the mean of where they want to be.
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * groups[-2][1]:
            (above, m), (below, n) = groups.pop(), groups.pop()
            groups.append(((below * n + (above - gap * n) * m) / (n + m), n + m))
    moved = np.empty(len(places))
    moved[order] = [start + gap * i for start, count in groups for i in range(count)]
    return moved


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of letters that matplotlib's font lacks: who looks at the SVG may have them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def ramp(*colors: str | tuple[str, float]) -> Any:
    """A colour map through some colours, each with an opacity if it is a pair."""
    module = load_extra("matplotlib.colors", "report", "a plot")
    stops = [module.to_rgba(*c) if isinstance(c, tuple) else module.to_rgba(c) for c in colors]
    return module.LinearSegmentedColormap.from_list("fastpie", stops)


def draw_forest(
    ax: Axes,
    value: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    filled: np.ndarray,
    crossed: np.ndarray | None = None,
) -> None:
    """Values with their intervals, one below the other: filled, hollow, or a cross."""
    y = np.arange(len(value))
    crossed = np.zeros(len(value), bool) if crossed is None else crossed
    known = np.isfinite(low) & np.isfinite(high)
    ax.hlines(y[known], low[known], high[known], color=GREY, linewidth=1.5)
    for chosen, marker, face in (
        (filled, "s", PRUNED),
        (~filled & ~crossed, "s", "none"),
        (crossed, "x", PRUNED),
    ):
        ax.plot(value[chosen], y[chosen], marker, color=PRUNED, markerfacecolor=face)


def name_rows(ax: Axes, names: list[str]) -> None:
    """Names of rows that run from the top; a few do not fill the height."""
    ax.set_yticks(np.arange(len(names)), names, fontsize=8.5)
    ax.set_ylim(max(len(names), 3) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def strongest(value: np.ndarray) -> np.ndarray:
    """Rows of the values furthest from 0, at most forty."""
    rows = np.flatnonzero(np.isfinite(value))
    return rows[np.argsort(-np.abs(value[rows]), kind="stable")][:MOST_ROWS]


def unique(table: pa.Table, name: str) -> list[Any]:
    """Values of a column, in the order in which they come."""
    values: list[Any] = pc.unique(table.column(name)).to_pylist()
    return values


def where(table: pa.Table, name: str, value: Any) -> pa.Table:
    """Rows with a value in a column."""
    return table.filter(
        pc.equal(table.column(name), pa.scalar(value, table.schema.field(name).type))
    )
