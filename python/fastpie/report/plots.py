"""The plots of a run, each from arrays: `plot_x(..., ax=None) -> (fig, ax)`.

They are drawn on a `matplotlib.figure.Figure` of their own, so that the user's backend and open
figures stay as they are. Colours are told apart by readers with any common colour vision, on a light
and on a dark ground; what colour tells is told by marker, line or position too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fastpie.report.classes import AccuracyCurve
from fastpie.report.drawing import DENSE, GREY, PRUNED, new_axes, nothing, ramp

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bins", "plot_accuracy", "plot_hardness", "plot_levels", "plot_margins"]

_MOST_BINS = 50
_MOST_LEVELS = 8  # more lines cannot be told apart


def plot_hardness(
    hardness: np.ndarray,  # [N]
    *,
    fraction: float = 0.05,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Histogram of hardness, counts on a logarithmic axis, with the border of the hardest samples.

    Args:
        hardness: values that are not finite are left out.
        fraction: of the samples that lies to the right of the border.
        ax: to draw on; by default a new figure.
    """
    fig, ax = new_axes(ax)
    values = _finite(hardness)
    if not len(values):
        return fig, nothing(ax, "hardness")
    ax.hist(values, bins=bins(values), color=DENSE, log=True)
    count = int(fraction * len(values))
    if count:
        border = float(np.sort(values)[-count])
        ax.axvline(border, color=PRUNED, linestyle="--", linewidth=1.5)
        right = border > (values.min() + values.max()) / 2
        ax.annotate(
            f"hardest {fraction:.0%}",
            (border, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(-5 if right else 5, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
        )
    ax.set(xlabel="hardness", ylabel="samples")
    return fig, ax


def plot_levels(
    scores: Mapping[float, np.ndarray],  # sparsity: [N]
    *,
    name: str = "js",
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Distribution of a score at each level, as outlines; at most eight levels are drawn.

    Args:
        scores: values that are not finite are left out.
        name: of the score.
        ax: to draw on; by default a new figure.
    """
    fig, ax = new_axes(ax)
    levels = sorted(s for s, values in scores.items() if len(_finite(values)))
    if not levels:
        return fig, nothing(ax, name)
    if len(levels) > _MOST_LEVELS:
        picks = np.linspace(0, len(levels) - 1, _MOST_LEVELS).round().astype(int)
        levels = [levels[i] for i in picks]
    edges = bins(np.concatenate([_finite(scores[s]) for s in levels]))
    colors = ramp(DENSE, PRUNED)
    styles = ("-", "--", "-.", ":")
    for number, sparsity in enumerate(levels):
        color = colors(number / max(len(levels) - 1, 1))
        counts, _ = np.histogram(_finite(scores[sparsity]), edges)
        # A line ends where its last sample is, and does not fall to a zero that has no logarithm.
        ax.stairs(
            np.where(counts > 0, counts, np.nan),
            edges,
            baseline=None,
            color=color,
            linewidth=1.8,
            linestyle=styles[number % len(styles)],
            label=f"{sparsity:g}",
        )
    ax.set_yscale("log")
    ax.set(xlabel=name, ylabel="samples")
    ax.legend(title="sparsity", frameon=False)
    return fig, ax


def plot_margins(
    dense: np.ndarray,  # [N]
    pruned: np.ndarray,  # [N]
    *,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """How many samples have which margin in the dense and in the pruned model.

    Samples below the diagonal have lost margin; with labels those in the lower right quadrant are
    right in the dense and wrong in the pruned model.

    Args:
        dense: margin in the dense model; pairs with a value that is not finite are left out.
        pruned: margin in the pruned model.
        ax: to draw on; by default a new figure.
    """
    fig, ax = new_axes(ax)
    both = np.isfinite(dense) & np.isfinite(pruned)
    x, y = dense[both], pruned[both]
    if not len(x):
        return fig, nothing(ax, "margin")
    bins = ax.hexbin(
        x, y, gridsize=(44, 22), mincnt=1, bins="log", linewidths=0, cmap=ramp((DENSE, 0.25), DENSE)
    )
    bar = fig.colorbar(bins, ax=ax, label="samples")
    bar.outline.set_visible(False)
    ax.axline((0, 0), slope=1, color=GREY, linestyle=":", linewidth=1.2)
    for line in (ax.axhline, ax.axvline):
        line(0, color=GREY, linewidth=0.8)
    ax.set(xlabel="margin in the dense model", ylabel="margin in the pruned model")
    return fig, ax


def plot_accuracy(curve: AccuracyCurve, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Accuracy against sparsity, as far as the run can tell it.

    Args:
        curve: from `fastpie.report.classes.accuracy_curve`.
        ax: to draw on; by default a new figure.
    """
    fig, ax = new_axes(ax)
    lines = [
        ("accuracy", curve.overall, DENSE, "o", "-"),
        ("balanced accuracy", curve.balanced, PRUNED, "s", "--"),
        ("predicts as the dense model", curve.agreement, GREY, "^", ":"),
    ]
    drawn = [line for line in lines if line[1]]
    if not drawn:
        return fig, nothing(ax, "accuracy")
    lowest = min(min(values) for _, values, *_ in drawn)
    floor = max(0.0, np.floor(10 * lowest - 1) / 10)  # what pruning costs is seen above it
    for label, values, color, marker, style in drawn:
        ax.plot(curve.sparsities, values, style, color=color, marker=marker, label=label)
    ax.set(xlabel="sparsity", ylabel="fraction of samples")
    ax.set(xlim=(-0.02, 1.0), ylim=(floor - 0.01, 1.02))
    ax.grid(axis="y", alpha=0.25)
    ax.legend(frameon=False)
    return fig, ax


def _finite(values: np.ndarray) -> np.ndarray:
    finite: np.ndarray = values[np.isfinite(values)]
    return finite


def bins(values: np.ndarray) -> list[float]:
    """Edges of a histogram of finite values, at least one of them."""
    low, high = float(values.min()), float(values.max())
    # Bins narrower than the floats between the ends cannot be cut: equal values, or nearly.
    if high - low <= 1e-9 * max(1.0, abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    count = int(np.clip(2 * np.sqrt(len(values)), 10, _MOST_BINS))
    return [float(edge) for edge in np.linspace(low, high, count + 1)]
