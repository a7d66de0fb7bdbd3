"""`write_report`: a run as one page that needs nothing beside itself."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fastpie._extras import load_extra
from fastpie._files import write_atomically
from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult
from fastpie.report import plots
from fastpie.report.classes import AccuracyCurve, accuracy_curve, class_column, class_rows
from fastpie.report.columns import Columns
from fastpie.report.gallery import hardest
from fastpie.report.summary import facts, sentences
from fastpie.report.svg import inline_svg
from fastpie.report.thumbnails import Thumbnails

__all__ = ["write_report"]

_MOST_ROWS = 200  # of the class table
_MOST_ERRORS = 50
_MOST_TEXT = (
    300  # characters of an id, a name or a message; a page is no place for a megabyte of one
)


def write_report(
    result: MiningResult,
    path: str | os.PathLike[str] | None = None,
    *,
    dataset: Any = None,
    class_names: Sequence[str] | None = None,
    thumbnails: int = 12,
) -> Path:
    """Write `report.html`: summary, gallery of the hardest samples, plots, tables.

    The page holds all that it shows, runs no script, fetches nothing and stays under 20 MB. Texts
    of the run (ids, names, errors) are shown as text, whatever they hold.

    Args:
        result: a run of any task, with or without labels, finished or not.
        path: of the file; by default `report.html` in the run folder.
        dataset: the data set of the run, to show pictures: map-style, items as for
            `fastpie.mine`, samples found by id. A sample that cannot be read gets a placeholder.
        class_names: in index order; by default the data set's attribute `class_names`, else the
            index is the name.
        thumbnails: samples shown of each class, or four times as many of all where samples have no
            single class.

    Returns:
        The path of the file.

    Raises:
        FastpieError: for too few class names, a file that cannot be written, or if Jinja2 or
            matplotlib (`fastpie[report]`) are not installed.
    """
    if thumbnails < 0:
        raise FastpieError(f"Expected `thumbnails` of at least 0, but got {thumbnails}.")
    path = result.path / "report.html" if path is None else Path(path)
    page = _template().render(**_content(result, dataset, class_names, thumbnails))
    try:
        # A lone surrogate, as in a file name that is not UTF-8, has no bytes of its own.
        write_atomically(path, page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise FastpieError(f"Expected to write the report to {path}, but: {error}.") from error
    return path


def _content(
    result: MiningResult, dataset: Any, class_names: Sequence[str] | None, thumbnails: int
) -> dict[str, Any]:
    columns = Columns.of(result)
    rows = class_rows(columns)
    curve = accuracy_curve(columns)
    name_of = _namer(class_names, dataset, max((row.index for row in rows), default=-1))
    gallery = hardest(columns, name_of, thumbnails)
    pictures = Thumbnails(dataset, result, [card.sample_id for card in gallery.cards()])
    for card in gallery.cards():
        card.uri, card.missing = pictures.uri(card.sample_id)
    by = "label" if columns.multilabels() is not None else class_column(columns)
    shown = sorted(rows, key=lambda row: -(row.hardness or 0.0))[:_MOST_ROWS]
    return {
        "title": Path(result.location).resolve().name,
        "summary": sentences(result, columns, curve),
        "facts": facts(result),
        "gallery": gallery,
        "has_pictures": pictures.found,
        "pictures_note": pictures.note if gallery.classes else "",
        "plots": _plots(columns, curve),
        "accuracy_note": _accuracy_note(result, curve),
        "class_rows": shown,
        "class_count": len(rows),
        "classes_by": by,
        "multilabel": columns.multilabels() is not None,
        "name_of": name_of,
        "highest": f"{columns.sparsities[-1]:g}",
        "errors": result.errors.slice(0, _MOST_ERRORS).to_pylist(),
        "error_count": result.errors.num_rows,
    }


def _plots(columns: Columns, curve: AccuracyCurve) -> list[dict[str, str]]:
    """Name, SVG and caption of every plot that the run has data for."""
    drawn: list[dict[str, str]] = []

    def add(name: str, title: str, caption: str, draw: Callable[[], Any]) -> None:
        svg = inline_svg(draw, f"{title}. {caption}", name)
        drawn.append({"name": name, "title": title, "caption": caption, "svg": svg})

    hardness = columns.numbers("hardness")
    if hardness is not None:
        add(
            "hardness",
            "Hardness",
            "How many samples are how hard; counts on a logarithmic axis.",
            functools.partial(plots.plot_hardness, hardness),
        )
    for score, title in (
        ("js", "Disagreement (Jensen-Shannon)"),
        ("iou_soft", "Overlap (soft IoU; lower = harder)"),
        ("drift", "Drift"),
    ):
        levels = columns.at_levels(score)
        if levels:
            add(
                score,
                f"{title} by sparsity",
                f"Distribution of {score} between dense and pruned model at each sparsity.",
                functools.partial(plots.plot_levels, levels, name=score),
            )
            break
    dense = columns.numbers("margin_dense")
    pruned = columns.at_highest("margin_pruned")
    if dense is not None and pruned is not None:
        add(
            "margins",
            "Margin, dense against pruned",
            f"Pruned at sparsity {columns.sparsities[-1]:g}. Below the dotted diagonal, pruning "
            "costs margin; a margin below 0 is a wrong prediction where there are labels.",
            functools.partial(plots.plot_margins, dense, pruned),
        )
    if curve.overall or curve.agreement:
        values = ", ".join(
            f"{value:.1%} at {sparsity:g}"
            for sparsity, value in zip(
                curve.sparsities, curve.overall or curve.agreement, strict=True
            )
        )
        what = "Accuracy" if curve.overall else "Same prediction as the dense model"
        add(
            "accuracy",
            "Accuracy against sparsity" if curve.overall else "Agreement against sparsity",
            f"Sparsity 0 is the dense model. {what}: {values}.",
            functools.partial(plots.plot_accuracy, curve),
        )
    return drawn


def _accuracy_note(result: MiningResult, curve: AccuracyCurve) -> str:
    if curve.overall:
        return ""
    if not len(result):
        return "Accuracy is not available: no sample is scored."
    if not result.record["labelled"]:
        return "Accuracy is not available: the run has no labels."
    task = result.record["config"]["task"]
    return f"Accuracy is not available: the score table of a {task} run holds no predictions."


def _namer(class_names: Sequence[str] | None, dataset: Any, highest: int) -> Callable[[int], str]:
    if class_names is not None and len(class_names) <= highest:
        raise FastpieError(
            f"Expected a name for each class up to {highest}, but got {len(class_names)} names."
        )
    if class_names is None:
        class_names = getattr(dataset, "class_names", None) or []
    names = [str(name) for name in class_names]
    return lambda index: names[index] if index < len(names) else str(index)


def _template() -> Any:
    jinja2 = load_extra("jinja2", "report", "a report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["short"] = _short
    environment.filters["percent"] = lambda v: "–" if v is None else f"{v:.1%}"
    environment.filters["number"] = lambda v: "–" if v is None else f"{v:.3g}"
    text = resources.files("fastpie.report").joinpath("template.html.j2").read_text("utf-8")
    return environment.from_string(text)


def _short(text: Any) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"
