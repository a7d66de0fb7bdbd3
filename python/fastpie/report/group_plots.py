"""The plots of samples, subgroups, pairs and comparisons of an analysis: `plot_x(table, ..., ax=None) -> (fig, ax)`.

The columns of the tables are in docs/design/analysis.md. Drawn as those of `fastpie.report.plots`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fastpie.report.drawing import (
    DENSE,
    GREY,
    MOST_ROWS,
    PRUNED,
    draw_forest,
    name_rows,
    new_axes,
    nothing,
    numbers,
    plain,
    ramp,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_comparisons", "plot_pairs", "plot_quadrants", "plot_subgroups"]

_MOST_POINTS = 1_500  # beyond, a point each makes the page heavy and the plot one blot
_MOST_NAMES = 30
_RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def plot_subgroups(subgroups: pa.Table, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Odds ratio of being among the hardest for each subgroup, on a logarithmic axis.

    Filled where q < .05, a cross for cells too small to tell. At most forty rows: the groups of one
    attribute, then those of two, the lowest p first; small cells if there is room.

    Args:
        subgroups: of an analysis.
        ax: to draw on; by default a new figure.
    """
    value, p = numbers(subgroups, "odds_ratio"), numbers(subgroups, "p")
    # An odds ratio of 0 or infinity (an empty cell) has no place on the axis; the table shows it.
    rows = np.flatnonzero(np.isfinite(value) & (value > 0))
    tiny = np.array([v is True for v in subgroups.column("small").to_pylist()], bool)
    pair = np.array(["," in str(v) for v in subgroups.column("attribute").to_pylist()], bool)
    order = np.lexsort((np.nan_to_num(p[rows], nan=1.0), pair[rows], tiny[rows]))
    rows = np.sort(rows[order][:MOST_ROWS])
    fig, ax = new_axes(ax, 1.1 + 0.23 * max(len(rows), 4))
    if not len(rows):
        return fig, nothing(ax, "subgroups")
    low, high, q = (numbers(subgroups, n)[rows] for n in ("low", "high", "q"))
    value = value[rows]
    small = tiny[rows]
    bounds = np.concatenate([value, low[low > 0], high[np.isfinite(high)]])
    ax.set_xscale("log")
    # Not wider than a hundredfold: an interval that cannot tell anything would crush the others.
    limits = (max(bounds.min() / 1.2, 0.01), min(bounds.max() * 1.2, 100.0))
    draw_forest(
        ax,
        value,
        np.maximum(np.nan_to_num(low, nan=0.0), 1e-9),
        np.minimum(np.nan_to_num(high, nan=1e9), 1e9),
        (q < 0.05) & ~small,
        small,
    )
    ax.set_xlim(*limits)
    names = [
        plain(f"{subgroups.column('attribute')[int(r)]}: {subgroups.column('value')[int(r)]}", 44)
        for r in rows
    ]
    name_rows(ax, names)
    ax.axvline(1, color=GREY, linewidth=0.8)
    ratios = _RATIOS if limits[1] / limits[0] < 300 else _RATIOS[::3]  # powers of ten alone
    ticks = [t for t in ratios if limits[0] <= t <= limits[1]]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlabel("odds ratio of being among the hardest (filled: q < .05, cross: small)")
    return fig, ax


def plot_pairs(pairs: pa.Table, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """How differently two classes are forgotten against how different their frequencies are.

    Colour: how often they occur together (fourth root of the IoU). Of more than 1,500 pairs every
    n-th is drawn.

    Args:
        pairs: of an analysis.
        ax: to draw on; by default a new figure.
    """
    fig, ax = new_axes(ax)
    x, y, root = (numbers(pairs, n) for n in ("frequency_difference", "fcd", "iou_root"))
    rows = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if not len(rows):
        return fig, nothing(ax, "class pairs")
    rows = rows[:: -(-len(rows) // _MOST_POINTS)]
    together = np.isfinite(root[rows]).any() and float(np.nanmax(root[rows])) > 0
    points = ax.scatter(
        x[rows],
        y[rows],
        c=np.nan_to_num(root[rows]) if together else DENSE,
        cmap=ramp(("#009e73", 0.2), "#009e73") if together else None,
        s=16,
        linewidths=0,
    )
    if together:
        bar = fig.colorbar(points, ax=ax, label="co-occurrence, IoU$^{1/4}$")
        bar.outline.set_visible(False)
    ax.set(xlabel="difference of the log frequencies", ylabel="distance of the curves (FCD)")
    return fig, ax


def plot_comparisons(table: pa.Table, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Jaccard index of lists of samples, as a heat map; as bars where few pairs are compared.

    Args:
        table: rows of `stability` of one `what`, or `agreement`.
        ax: to draw on; by default a new figure.
    """
    first, second = table.column("a").to_pylist(), table.column("b").to_pylist()
    names = _in_order(first + second)[:_MOST_NAMES]
    value = numbers(table, "jaccard")
    matrix = np.full((len(names), len(names)), np.nan)
    for a, b, v in zip(first, second, value, strict=True):
        if a in names and b in names:
            matrix[names.index(a), names.index(b)] = matrix[names.index(b), names.index(a)] = v
    pairs = len(names) * (len(names) - 1) / 2
    if len(names) < 3 or len(set(zip(first, second, strict=True))) < 0.5 * pairs:
        return _bars(first, second, value, ax)
    fig, ax = new_axes(ax, 1.4 + 0.36 * len(names))
    np.fill_diagonal(matrix, np.where(np.isnan(matrix.diagonal()), 1.0, matrix.diagonal()))
    image = ax.pcolormesh(
        np.ma.masked_invalid(matrix),
        cmap=ramp((DENSE, 0.08), DENSE),
        vmin=0,
        vmax=1,
        edgecolors="none",
    )
    if len(names) <= 12:
        for (i, j), v in np.ndenumerate(matrix):
            if np.isfinite(v):
                color = "white" if v > 0.6 else None
                ax.text(
                    j + 0.5, i + 0.5, f"{v:.2f}", ha="center", va="center", fontsize=8, color=color
                )
    ticks = np.arange(len(names)) + 0.5
    long = max(len(str(name)) for name in names) > 5
    turn: dict[str, Any] = {"rotation": 35, "ha": "right"} if long else {}
    ax.set_xticks(ticks, [plain(n) for n in names], **turn)
    ax.set_yticks(ticks, [plain(n) for n in names])
    ax.invert_yaxis()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = fig.colorbar(image, ax=ax, label="Jaccard index")
    bar.outline.set_visible(False)
    return fig, ax


def plot_quadrants(samples: pa.Table, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Hardness against doubt in the label, the quadrant by colour and marker.

    Above 1,500 samples, the counts in hexagons.

    Args:
        samples: of an analysis.
        ax: to draw on; by default a new figure.
    """
    fig, ax = new_axes(ax)
    x, y = numbers(samples, "hard"), numbers(samples, "label_in_doubt")
    good = np.isfinite(x) & np.isfinite(y)
    if not good.any():
        return fig, nothing(ax, "quadrants")
    if good.sum() > _MOST_POINTS:
        bins = ax.hexbin(
            x[good],
            y[good],
            gridsize=(40, 22),
            mincnt=1,
            bins="log",
            linewidths=0,
            cmap=ramp((DENSE, 0.25), DENSE),
        )
        bar = fig.colorbar(bins, ax=ax, label="samples")
        bar.outline.set_visible(False)
    else:
        quadrants = np.array(samples.column("quadrant").to_pylist(), dtype=object)
        colors = {
            "typical": GREY,
            "hard": DENSE,
            "label in doubt": PRUNED,
            "hard, label in doubt": "#9a5aa5",
        }
        for marker, (name, color) in zip("osD^", colors.items(), strict=True):
            here = good & (quadrants == name)
            if here.any():
                style: dict[str, Any] = {"markersize": 4, "alpha": 0.8, "markeredgewidth": 0}
                ax.plot(x[here], y[here], marker, color=color, label=name, **style)
        ax.legend(frameon=False, fontsize=8.5)
    ax.set(xlabel="hard", ylabel="label in doubt")
    return fig, ax


def _in_order(names: list[Any]) -> list[Any]:
    """Each once: levels by their number, other names as they come."""
    once = list(dict.fromkeys(names))
    try:
        return sorted(once, key=float)
    except (TypeError, ValueError):
        return once


def _bars(
    first: list[Any], second: list[Any], value: np.ndarray, ax: Axes | None
) -> tuple[Figure, Axes]:
    rows = np.flatnonzero(np.isfinite(value))[:MOST_ROWS]
    fig, ax = new_axes(ax, 1.1 + 0.3 * max(len(rows), 3))
    if not len(rows):
        return fig, nothing(ax, "comparison")
    bars = ax.barh(np.arange(len(rows)), value[rows], height=0.6, color=DENSE)
    ax.bar_label(bars, fmt="%.2f", padding=3)
    name_rows(ax, [f"{plain(first[r])} / {plain(second[r])}" for r in rows])
    ax.set(xlim=(0, 1.1), xlabel="Jaccard index")
    return fig, ax
