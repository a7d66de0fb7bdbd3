"""The plots of levels and classes of an analysis: `plot_x(table, ..., ax=None) -> (fig, ax)`.

The columns of the tables are in docs/design/analysis.md. Drawn as those of `fastpie.report.plots`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fastpie.report.drawing import (
    COLORS,
    DENSE,
    GREY,
    PRUNED,
    draw_forest,
    name_rows,
    new_axes,
    nothing,
    numbers,
    plain,
    spread,
    strongest,
    unique,
    where,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "plot_classes",
    "plot_counts",
    "plot_curves",
    "plot_frequency",
    "plot_impact",
    "plot_metrics",
]

_MOST_CURVES = 12  # named; more cannot be told apart
_MOST_CLASSES = 30
_FIRST_DROP = -0.2  # PruneCXR: the first drop is where a class has lost a fifth
_LINES = ("-", "--", "-.", ":")
_MARKERS = "os^Dv*"
_NAMES = {
    "map": "mean average precision",
    "mauroc": "mean AUROC",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
}


def plot_metrics(levels: pa.Table, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Every metric against sparsity, with its interval; filled where the drop is significant.

    Args:
        levels: of an analysis.
        ax: to draw on; by default a new figure.
    """
    fig, ax = new_axes(ax)
    drawn = False
    for number, metric in enumerate(unique(levels, "metric")):
        rows = where(levels, "metric", metric)
        x, y, low, high = (numbers(rows, n) for n in ("sparsity", "value", "low", "high"))
        if not np.isfinite(y).any():
            continue
        drawn = True
        color = COLORS[number % len(COLORS)]
        ax.plot(x, y, _LINES[number % 4], color=color, label=_NAMES.get(str(metric), plain(metric)))
        if np.isfinite(low).any():
            ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        significant = np.array([v is True for v in rows.column("significant").to_pylist()])
        for chosen, face in ((significant, color), (~significant, "none")):
            ax.plot(x[chosen], y[chosen], _MARKERS[number % 6], color=color, markerfacecolor=face)
    if not drawn:
        return fig, nothing(ax, "metrics")
    ax.set(xlabel="sparsity", ylabel="median over models")
    ax.grid(axis="y", alpha=0.25)
    ax.legend(frameon=False)
    return fig, ax


def plot_curves(
    curves: pa.Table, *, metric: str | None = None, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Forgettability of each class: its relative change against sparsity.

    Twelve classes are named, those that lose most and least; the others are grey.

    Args:
        curves: of an analysis.
        metric: which of the metrics; by default the first.
        ax: to draw on; by default a new figure.
    """
    fig, ax = new_axes(ax, 4.4)
    if curves.num_rows and metric is None:
        metric = curves.column("metric")[0].as_py()
    curves = where(curves, "metric", metric)
    lines = {}
    for name in unique(curves, "class"):
        rows = where(curves, "class", name).sort_by("sparsity")
        x, y = numbers(rows, "sparsity"), numbers(rows, "change")
        if np.isfinite(y).any():
            lines[name] = (np.concatenate([[0.0], x]), np.concatenate([[0.0], y]))
    if not lines:
        return fig, nothing(ax, "curves")
    ends = {name: float(y[np.isfinite(y)][-1]) for name, (_, y) in lines.items()}
    order = sorted(ends, key=lambda name: ends[name])
    named = order
    if len(order) > _MOST_CURVES:
        named = order[: _MOST_CURVES - 4] + order[-4:]
    highest = max(float(x[-1]) for x, _ in lines.values())
    for name in order:
        if name not in named:
            ax.plot(*lines[name], color=GREY, alpha=0.3, linewidth=0.8)
    values = np.concatenate([y[np.isfinite(y)] for _, y in lines.values()])
    span = max(float(values.max() - values.min()), 0.05)
    heights = spread(np.array([ends[name] for name in named]), span / 17)
    for number, (name, height) in enumerate(zip(named, heights, strict=True)):
        color, style = COLORS[number % len(COLORS)], _LINES[number // len(COLORS) % 4]
        ax.plot(*lines[name], style, color=color, linewidth=1.6)
        ax.annotate(
            plain(name),
            (highest, ends[name]),
            xytext=(highest + 0.03, height),
            textcoords="data",
            va="center",
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 1.2, "shrinkA": 1},
            annotation_clip=False,
        )
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.axhline(_FIRST_DROP, color=GREY, linestyle=":", linewidth=1.2)
    ax.annotate(
        "first drop", (0, _FIRST_DROP), xytext=(2, 2), textcoords="offset points", fontsize=8.5
    )
    ax.set(xlim=(0, highest * 1.02), xlabel="sparsity")
    ax.set_ylabel(f"relative change of {_short(metric)}")
    # The names stand right of the axes, where the layout leaves them room.
    return fig, ax


def plot_classes(classes: pa.Table, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Dense and pruned metric of each class as two points on one line, the largest loss on top.

    Average precision if the table has it, else AUROC, else recall; at most thirty classes.

    Args:
        classes: of an analysis.
        ax: to draw on; by default a new figure.
    """
    for metric in ("ap", "auroc", "recall"):
        dense, pruned = numbers(classes, metric), numbers(classes, f"{metric}_pruned")
        if np.isfinite(dense - pruned).any():
            break
    rows = np.flatnonzero(np.isfinite(dense - pruned))
    rows = rows[np.argsort((pruned - dense)[rows], kind="stable")][:_MOST_CLASSES]
    fig, ax = new_axes(ax, 1.1 + 0.23 * max(len(rows), 4))
    if not len(rows):
        return fig, nothing(ax, "classes")
    y = np.arange(len(rows))
    ax.hlines(y, dense[rows], pruned[rows], color=GREY, linewidth=2)
    ax.plot(dense[rows], y, "o", color=DENSE, label="dense")
    ax.plot(pruned[rows], y, "s", color=PRUNED, label="pruned")
    name_rows(ax, [plain(n) for n in classes.column("class").take(pa.array(rows)).to_pylist()])
    ax.set_xlabel({"ap": "average precision", "auroc": "AUROC"}.get(metric, metric))
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)
    return fig, ax


def plot_frequency(
    classes: pa.Table, links: pa.Table | None = None, *, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """First drop of each class against its frequency (in training, if known, else in the test).

    Args:
        classes: of an analysis. A class that never drops is drawn hollow at the right of the scale.
        links: of an analysis, for the correlation in the corner.
        ax: to draw on; by default a new figure.
    """
    fig, ax = new_axes(ax)
    training = np.isfinite(numbers(classes, "n_train")).any()
    n, drop = numbers(classes, "n_train" if training else "n"), numbers(classes, "first_drop")
    known = n > 0
    dropped, never = known & np.isfinite(drop), known & ~np.isfinite(drop)
    if not dropped.any():
        return fig, nothing(ax, "first drops")
    names = classes.column("class").to_pylist()
    ax.plot(n[dropped], drop[dropped], "o", color=DENSE)
    ax.plot(n[never], np.ones(never.sum()), "o", color=DENSE, markerfacecolor="none")
    for row in _legible(np.log(n[dropped]), drop[dropped]):
        ax.annotate(
            plain(names[np.flatnonzero(dropped)[row]]),
            (n[dropped][row], drop[dropped][row]),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=8,
        )
    said = _correlation(links)
    if said:
        ax.text(0.02, 0.98, said, transform=ax.transAxes, va="top", fontsize=8.5)
    ax.set_xscale("log")
    ax.set(
        xlabel="samples of the class" + (" in training" if training else ""),
        ylabel="sparsity of the first drop",
    )
    ax.set_ylim(0, 1.18)
    return fig, ax


def plot_impact(classes: pa.Table, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """What pruning does to each class beyond what it does to all; filled where significant.

    Args:
        classes: of an analysis; at most forty rows, the strongest.
        ax: to draw on; by default a new figure.
    """
    value, low, high, q = (numbers(classes, f"impact{n}") for n in ("", "_low", "_high", "_q"))
    rows = strongest(value)
    rows = rows[np.argsort(value[rows], kind="stable")]
    fig, ax = new_axes(ax, 1.1 + 0.23 * max(len(rows), 4))
    if not len(rows):
        return fig, nothing(ax, "class impact")
    names = [plain(n) for n in classes.column("class").take(pa.array(rows)).to_pylist()]
    draw_forest(ax, value[rows], low[rows], high[rows], q[rows] < 0.05)
    name_rows(ax, names)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set_xlabel("change of the normalised recall (filled: q < .05)")
    return fig, ax


def plot_counts(counts: pa.Table, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """How much more often samples with so many labels are PIEs than the others are.

    Args:
        counts: of an analysis.
        ax: to draw on; by default a new figure.
    """
    fig, ax = new_axes(ax)
    value, low, high = (numbers(counts, n) for n in ("pie_ratio", "low", "high"))
    rows = np.flatnonzero(np.isfinite(value))
    if not len(rows):
        return fig, nothing(ax, "PIE ratios")
    _intervals(ax, rows, value[rows], low[rows], high[rows])
    labels = counts.column("labels").to_pylist()
    ax.set_xticks(np.arange(len(labels)), [plain(label) for label in labels])
    ax.axhline(1, color=GREY, linewidth=0.8)
    ax.set(xlabel="labels of a sample", ylabel="ratio of PIEs")
    ax.set_ylim(bottom=0)
    return fig, ax


def _intervals(
    ax: Axes, x: np.ndarray, value: np.ndarray, low: np.ndarray, high: np.ndarray
) -> None:
    known = np.isfinite(low) & np.isfinite(high)
    ax.vlines(x[known], low[known], high[known], color=GREY, linewidth=1.5)
    ax.plot(x, value, "s", color=PRUNED)


def _legible(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Points whose names do not run into one another: a name takes a quarter by a twentieth."""
    width = max(float(np.ptp(x)), 1e-9) / 4
    kept: list[int] = []
    for row in range(len(x)):
        if all(abs(x[row] - x[k]) > width or abs(y[row] - y[k]) > 0.05 for k in kept):
            kept.append(row)
    return kept


def _correlation(links: pa.Table | None) -> str:
    """The links from frequency to the first drop, in a line each."""
    said = []
    for row in [] if links is None else links.to_pylist():
        if "first" in f"{row['x']} {row['y']}" and row["value"] is not None:
            between = ""
            if row["low"] is not None and row["high"] is not None:
                between = f" ({row['low']:.2f} to {row['high']:.2f})"
            said.append(f"{plain(row['method']).capitalize()} {row['value']:.2f}{between}")
    return "\n".join(said[:2])


def _short(metric: Any) -> str:
    return {"ap": "average precision", "auroc": "AUROC"}.get(str(metric), plain(metric))
