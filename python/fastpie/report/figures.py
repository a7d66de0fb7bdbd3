"""The plots that a run and its analysis have data for: drawing, words and data of each."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from fastpie._extras import load_extra
from fastpie._files import atomic_path
from fastpie.analysis import Analysis
from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult
from fastpie.report import class_plots, group_plots, plots
from fastpie.report.classes import AccuracyCurve, accuracy_curve
from fastpie.report.columns import Columns
from fastpie.report.drawing import numbers, quiet

__all__ = ["Plot", "plots_of", "write_plots"]

_DPI = 160
_METRICS = {"ap": "average precision", "auroc": "AUROC"}
_STABILITY = {
    "level": "Do the levels agree?",
    "model": "Do the models agree?",
    "definition": "Do the definitions agree?",
    "control": "Against masks that remove at random",
}
_FIRST = "=+-@\t\r"  # of a cell that a spreadsheet would compute


class Plot(NamedTuple):
    """One plot.

    Attributes:
        name: of the plot and its files.
        section: of the page.
        title: of the plot.
        caption: how to read it.
        draw: draws it.
        data: what it shows.
    """

    name: str
    section: str
    title: str
    caption: str
    draw: Callable[[], tuple[Any, Any]]
    data: Callable[[], pa.Table]


def plots_of(
    columns: Columns, curve: AccuracyCurve, analysis: Analysis | None = None
) -> list[Plot]:
    """The plots of a run and, where there is one, of its analysis.

    Args:
        columns: of the run and its analysis.
        curve: of the run.
        analysis: of the run.
    """
    found = [*_of_run(columns, curve)]
    if analysis is not None:
        found += _of_analysis(analysis)
    return found


def write_plots(
    result: MiningResult,
    analysis: Analysis | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write every plot as SVG and PNG, and its data as CSV.

    Args:
        result: the run.
        analysis: of the run; without one, the plots of the scores alone.
        folder: by default `plots` in the run folder; made if it is not there.

    Returns:
        The files.

    Raises:
        FastpieError: if a file cannot be written, or without matplotlib.
    """
    columns = Columns.of(result, analysis)
    folder = result.path / "plots" if folder is None else Path(folder)
    written = []
    matplotlib = load_extra("matplotlib", "report", "a plot")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for plot in plots_of(columns, accuracy_curve(columns), analysis):
            with matplotlib.rc_context({"svg.hashsalt": plot.name}), quiet():
                figure, _ = plot.draw()
                for kind in ("svg", "png"):
                    with atomic_path(folder / f"{plot.name}.{kind}") as path:
                        metadata = {"Date": None} if kind == "svg" else None
                        figure.savefig(path, format=kind, dpi=_DPI, metadata=metadata)
                    written.append(folder / f"{plot.name}.{kind}")
            with atomic_path(folder / f"{plot.name}.csv") as path:
                pa_csv.write_csv(_guarded(plot.data()), path)
            written.append(folder / f"{plot.name}.csv")
    except OSError as error:
        raise FastpieError(f"Expected to write plots to {folder}, but: {error}.") from error
    return written


def _of_run(columns: Columns, curve: AccuracyCurve) -> list[Plot]:
    found = []
    hardness = columns.numbers("hardness")
    if hardness is not None:
        found.append(
            Plot(
                "hardness",
                "overview",
                "Hardness",
                "How many samples are how hard; counts on a logarithmic axis.",
                functools.partial(plots.plot_hardness, hardness),
                functools.partial(_histogram, {0.0: hardness}, by_level=False),
            )
        )
    for score, title in (
        ("js", "Disagreement (Jensen-Shannon)"),
        ("iou_soft", "Overlap (soft IoU; lower = harder)"),
        ("drift", "Drift"),
    ):
        levels = columns.at_levels(score)
        if levels:
            found.append(
                Plot(
                    score,
                    "overview",
                    f"{title} by sparsity",
                    f"Distribution of {score} between dense and pruned model at each sparsity.",
                    functools.partial(plots.plot_levels, levels, name=score),
                    functools.partial(_histogram, levels),
                )
            )
            break
    dense, pruned = columns.numbers("margin_dense"), columns.at_highest("margin_pruned")
    if dense is not None and pruned is not None:
        draw = functools.partial(plots.plot_margins, dense, pruned)
        found.append(
            Plot(
                "margins",
                "overview",
                "Margin, dense against pruned",
                f"Pruned at sparsity {columns.sparsities[-1]:g}. Below the dotted diagonal, pruning "
                "costs margin; a margin below 0 is a wrong prediction where there are labels.",
                draw,
                functools.partial(_hexagons, draw),
            )
        )
    if curve.overall or curve.agreement:
        values = ", ".join(
            f"{value:.1%} at {sparsity:g}"
            for sparsity, value in zip(
                curve.sparsities, curve.overall or curve.agreement, strict=True
            )
        )
        what = "Accuracy" if curve.overall else "Same prediction as the dense model"
        found.append(
            Plot(
                "accuracy",
                "overview",
                "Accuracy against sparsity" if curve.overall else "Agreement against sparsity",
                f"Sparsity 0 is the dense model. {what}: {values}.",
                functools.partial(plots.plot_accuracy, curve),
                functools.partial(_curve_table, curve),
            )
        )
    return found


def _of_analysis(analysis: Analysis) -> list[Plot]:
    tables = {name: table for name, table in analysis.tables.items() if table.num_rows}
    found: list[Plot] = []

    def add(
        name: str, table: str, section: str, title: str, caption: str, draw: Any, **options: Any
    ) -> None:
        if table in tables:
            data = options.pop("data", tables[table])
            found.append(
                Plot(
                    name,
                    section,
                    title,
                    caption,
                    functools.partial(draw, data, **options),
                    lambda: data,
                )
            )

    if {"hard", "label_in_doubt", "quadrant"} <= set(analysis.samples.column_names) and (
        np.isfinite(numbers(analysis.samples, "label_in_doubt")).any()
    ):
        data = analysis.samples.select(["hard", "label_in_doubt", "quadrant"])
        counts = ", ".join(f"{n:,} {name}" for name, n in _counts(data["quadrant"]))
        found.append(
            Plot(
                "quadrants",
                "overview",
                "Hard, or wrongly labelled?",
                f"Hardness against doubt in the label. Samples by quadrant: {counts}.",
                functools.partial(group_plots.plot_quadrants, data),
                lambda: data,
            )
        )
    add(
        "levels",
        "levels",
        "overview",
        "Metrics against sparsity",
        "Median over the models with its 95 % interval. Filled marks: significantly below the dense "
        "model after Benjamini-Hochberg.",
        class_plots.plot_metrics,
    )
    if "curves" in tables:
        for metric in pc.unique(tables["curves"]["metric"]).to_pylist():
            rows = tables["curves"].filter(pc.equal(tables["curves"]["metric"], metric))
            if not np.isfinite(numbers(rows, "change")).any():
                continue
            add(
                _file_name("curves", metric),
                "curves",
                "classes",
                f"How classes are forgotten: {_METRICS.get(metric, metric)}",
                f"Change of the {_METRICS.get(metric, metric)} of each class, relative to the dense "
                "model. Of more than twelve classes, those that lose most and least are named.",
                class_plots.plot_curves,
                data=rows,
                metric=metric,
            )
    if "classes" in tables:
        classes = tables["classes"]
        if any(
            np.isfinite(numbers(classes, m) - numbers(classes, f"{m}_pruned")).any()
            for m in ("ap", "auroc", "recall")
        ):
            add(
                "classes",
                "classes",
                "classes",
                "What each class loses",
                "Circle: dense. Square: pruned. The largest loss on top, at most thirty classes.",
                class_plots.plot_classes,
            )
        if np.isfinite(numbers(classes, "impact")).any():
            add(
                "impact",
                "classes",
                "classes",
                "Class impact",
                "Change of a class's recall relative to the overall accuracy, with its 95 % interval: "
                "below 0, pruning hits the class harder than the others.",
                class_plots.plot_impact,
            )
        if np.isfinite(numbers(classes, "first_drop")).any():
            add(
                "frequency",
                "classes",
                "classes",
                "Are rare classes forgotten first?",
                "Lowest sparsity at which a class has lost a fifth, against its frequency. Hollow: "
                "never.",
                class_plots.plot_frequency,
                links=tables.get("links"),
            )
    add(
        "counts",
        "counts",
        "classes",
        "PIEs by number of labels",
        "How much more often samples with so many labels are PIEs than samples are on average, with "
        "its 95 % interval.",
        class_plots.plot_counts,
    )
    add(
        "subgroups",
        "subgroups",
        "subgroups",
        "Who is among the hardest",
        "Odds ratio of being among the hardest samples, with its 95 % interval; above 1, more often "
        "than the others. Filled: q < .05 after Benjamini-Hochberg. Cross: a cell too small to tell.",
        group_plots.plot_subgroups,
    )
    add(
        "pairs",
        "pairs",
        "pairs",
        "Pairs of classes",
        "Each point is a pair of classes: distance of their curves against difference of their "
        "frequencies; the colour says how often both occur together.",
        group_plots.plot_pairs,
    )
    if "stability" in tables:
        for what in pc.unique(tables["stability"]["what"]).to_pylist():
            rows = tables["stability"].filter(pc.equal(tables["stability"]["what"], what))
            add(
                _file_name("stability", what),
                "stability",
                "stability",
                _STABILITY.get(what, f"Stability by {what}"),
                "Jaccard index of the hardest samples by one and by the other: 1 is the same set, 0 no "
                "sample in common.",
                group_plots.plot_comparisons,
                data=rows,
            )
    add(
        "agreement",
        "agreement",
        "stability",
        "Agreement on labels in doubt",
        "Jaccard index of lists of samples whose label is in doubt, by different methods.",
        group_plots.plot_comparisons,
    )
    return found


def _file_name(*parts: str) -> str:
    return "-".join(re.sub(r"[^a-z0-9]+", "-", str(part).lower()).strip("-") for part in parts)


def _counts(column: pa.ChunkedArray) -> list[tuple[str, int]]:
    counts = pc.value_counts(column.combine_chunks())
    rows = [(c["values"], c["counts"]) for c in counts.to_pylist() if c["values"] is not None]
    return sorted(rows, key=lambda row: -row[1])


def _histogram(levels: dict[float, np.ndarray], by_level: bool = True) -> pa.Table:
    """Counts between the edges of a histogram, of each level."""
    finite = {s: v[np.isfinite(v)] for s, v in levels.items()}
    values = np.concatenate(list(finite.values()))
    rows: list[dict[str, Any]] = []
    if len(values):
        edges = plots.bins(values)
        for sparsity, of_level in finite.items():
            counts, _ = np.histogram(of_level, edges)
            rows += [
                {"sparsity": sparsity, "from": a, "to": b, "samples": int(n)}
                for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
            ]
    schema = {"sparsity": pa.float64(), "from": pa.float64(), "to": pa.float64()}
    table = pa.Table.from_pylist(rows, pa.schema([*schema.items(), ("samples", pa.int64())]))
    return table if by_level else table.drop_columns(["sparsity"])


def _hexagons(draw: Callable[[], tuple[Any, Any]]) -> pa.Table:
    _, ax = draw()
    hexagons = [c for c in ax.collections if hasattr(c, "get_offsets")]
    if not hexagons:
        return pa.table({"margin_dense": [], "margin_pruned": [], "samples": []})
    places, counts = hexagons[0].get_offsets(), hexagons[0].get_array()
    return pa.table(
        {
            "margin_dense": np.asarray(places[:, 0], dtype=np.float64),
            "margin_pruned": np.asarray(places[:, 1], dtype=np.float64),
            "samples": np.asarray(counts, dtype=np.int64),
        }
    )


def _curve_table(curve: AccuracyCurve) -> pa.Table:
    none: Sequence[float | None] = [None] * len(curve.sparsities)
    return pa.table(
        {
            "sparsity": pa.array(curve.sparsities, pa.float64()),
            "accuracy": pa.array(curve.overall or none, pa.float64()),
            "balanced_accuracy": pa.array(curve.balanced or none, pa.float64()),
            "agreement": pa.array(curve.agreement or none, pa.float64()),
        }
    )


def _guarded(table: pa.Table) -> pa.Table:
    """Texts that a spreadsheet would take for a formula begin with an apostrophe."""
    for number, field in enumerate(table.schema):
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            texts = [
                f"'{t}" if t is not None and t[:1] in _FIRST and t else t
                for t in table.column(number).to_pylist()
            ]
            table = table.set_column(number, field.name, pa.array(texts, pa.string()))
    return table
