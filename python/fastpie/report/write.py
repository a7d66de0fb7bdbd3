"""`write_report`: a run and its analysis as one page that needs nothing beside itself."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fastpie._extras import load_extra
from fastpie._files import write_atomically
from fastpie.analysis import Analysis
from fastpie.dual import DualModel
from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult
from fastpie.report.choice import choose
from fastpie.report.classes import AccuracyCurve, accuracy_curve, class_column, class_rows
from fastpie.report.columns import Columns
from fastpie.report.figures import Plot, plots_of
from fastpie.report.gallery import Gallery
from fastpie.report.identities import FILE, Identities
from fastpie.report.records import records
from fastpie.report.summary import facts, lead, sentences, tiles
from fastpie.report.svg import inline_svg
from fastpie.report.tables import class_table, tables_of, without_identities

__all__ = ["write_report"]

_SCRIPTS = ("samples", "selection", "grid", "filters", "detail", "files", "start")
_MOST_BYTES = 20_000_000  # of the file
_PICTURES = 10_000_000  # characters of all pictures together, if the rest leaves so many
_SPARE = 1_500_000  # for the pictures that readers without JavaScript see once more
_MOST_SAMPLES = 5_000
_MOST_ERRORS = 50
_MOST_DATA = 5_000  # rows of a plot's data
_STATIC = 24  # samples shown to readers without JavaScript
# Characters of an id, a name or a message; a page is no place for a megabyte of one.
_MOST_TEXT = 300


def write_report(
    result: MiningResult,
    path: str | os.PathLike[str] | None = None,
    *,
    analysis: Analysis | None = None,
    dataset: Any = None,
    class_names: Sequence[str] | None = None,
    thumbnails: int = 1_000,
    dual: DualModel | None = None,
    heat_maps: int = 48,
    heat_module: str | None = None,
    heat_sparsity: float | None = None,
    show_ids: bool = False,
) -> Path:
    """Write `report.html`: summary, gallery of samples, plots, tables.

    The page holds all that it shows, fetches nothing and stays under 20 MB. It runs one script, its
    own, and shows texts of the run (ids, names, errors) as text, whatever they hold.

    Sample ids, paths, notes of the run and messages of errors are hidden: samples have random
    pseudonyms, and `report-ids.csv` in the run folder says which is whose. Of the manifest, sex, age
    in decades, view, site and split are shown. Pictures are shown as they are, with what is written
    in them.

    Args:
        result: a run of any task, with or without labels, finished or not.
        path: of the file; by default `report.html` in the run folder.
        analysis: of the run.
        dataset: the data set of the run, to show pictures: map-style, items as for
            `fastpie.mine`, samples found by id. A sample that cannot be read gets a placeholder.
        class_names: in index order; by default the data set's attribute `class_names`, else the
            index is the name.
        thumbnails: samples in the gallery at most, up to 5,000; 0 for none. The pictures become
            smaller as they become more.
        dual: the dual model of the run, for heat maps (Grad-CAM); needs `dataset`.
        heat_maps: of how many samples, the hardest first.
        heat_module: name of the module whose output they look at; see `fastpie.report.heatmaps`.
        heat_sparsity: level of the pruned model in them; by default the highest.
        show_ids: whether to show sample ids, paths, notes and the other columns of the manifest.

    Returns:
        The path of the file.

    Raises:
        FastpieError: for too few class names, numbers that do not fit, a file that cannot be written,
            or if Jinja2 or matplotlib (`fastpie[report]`) are not installed.
    """
    if not 0 <= thumbnails <= _MOST_SAMPLES:
        raise FastpieError(
            f"Expected `thumbnails` from 0 to {_MOST_SAMPLES}, but got {thumbnails}."
        )
    if heat_maps < 0:
        raise FastpieError(f"Expected `heat_maps` of at least 0, but got {heat_maps}.")
    path = result.path / "report.html" if path is None else Path(path)
    template = _template()
    identities = Identities(result, show_ids)
    columns = Columns.of(result, analysis)
    rows = class_rows(columns)
    name_of = _namer(class_names, dataset, max((row.index for row in rows), default=-1))
    chosen, sentence = choose(columns, thumbnails)
    data = records(result, columns, chosen, name_of, identities)
    gallery = Gallery(result, dataset, columns.rows(chosen), identities)
    if dual is not None and len(chosen):
        gallery.draw_heat_maps(dual, heat_maps, heat_module, heat_sparsity)
        data["classes"] |= {str(index): name_of(index) for index in sorted(gallery.classes)}
    content = _content(result, columns, rows, name_of, analysis, identities)
    content |= {
        "chosen": sentence,
        "shown": len(chosen),
        "privacy": _privacy(identities),
        "has_pictures": gallery.found,
    }
    data["tables"] = {plot["name"]: plot.pop("data") for plot in content["plots"]}
    content["data"] = _json(data)
    bare = template.render(**content, **_pictures(gallery, data, 0))
    budget = min(_PICTURES, _MOST_BYTES - len(_encoded(bare)) - _SPARE)
    page = _encoded(template.render(**content, **_pictures(gallery, data, budget)))
    if len(page) >= _MOST_BYTES:
        raise FastpieError(
            f"Expected a page under {_MOST_BYTES:,} bytes, but it has {len(page):,}: ask for fewer "
            "`thumbnails`."
        )
    try:
        write_atomically(path, page)
    except OSError as error:
        raise FastpieError(f"Expected to write the report to {path}, but: {error}.") from error
    return path


def _pictures(gallery: Gallery, data: dict[str, Any], budget: int) -> dict[str, Any]:
    """What the template needs of the pictures, in so many characters."""
    found = gallery.encode(budget) if budget > 0 else gallery.nothing()
    static = []
    for row, sample in enumerate(data["ids"][:_STATIC]):
        words = [sample]
        for name in ("label", "dense"):
            if data[name] is not None and data[name][row] is not None:
                words.append(f"{name} {data['classes'][str(data[name][row])]}")
        score = next(iter(data["scores"]), None)
        if score is not None and score["values"][row] is not None:
            words.append(f"{score['name'].lower()} {score['values'][row]:.3g}")
        static.append({"uri": found["small"][row], "words": ", ".join(words)})
    notes = [gallery.note, gallery.map_note]
    return {
        "pictures": _json(found),
        "static": static,
        "gallery_notes": [note for note in notes if note],
    }


def _content(
    result: MiningResult,
    columns: Columns,
    rows: list[Any],
    name_of: Callable[[int], str],
    analysis: Analysis | None,
    identities: Identities,
) -> dict[str, Any]:
    curve = accuracy_curve(columns)
    analysis, subgroup_note = _shown(analysis, identities)
    plots = [_drawn(plot) for plot in plots_of(columns, curve, analysis)]
    tables = [] if analysis is None else tables_of(analysis)
    findings = [] if analysis is None else analysis.sentences
    used = {plot["section"] for plot in plots} | {table.section for table in tables}
    sections = [("gallery", "Samples"), ("plots", "What pruning does"), ("classes", "Classes")]
    sections += [
        (name, title)
        for name, title in (
            ("subgroups", "Subgroups"),
            ("pairs", "Class pairs"),
            ("stability", "Stability"),
        )
        if name in used
    ]
    sections += [("errors", "Errors"), ("run", "The run")]
    title = Path(result.location).resolve().name
    task = result.record["config"]["task"]
    script = _script()
    digest = hashlib.sha256(script.encode()).digest()
    return {
        "title": title,
        "kicker": f"{task}, {'with' if result.record['labelled'] else 'without'} labels, sparsity "
        + ", ".join(f"{s:g}" for s in columns.sparsities),
        "lead": lead(columns, curve, findings),
        "tiles": tiles(result, columns, curve),
        "findings": findings[1:],
        "summary": sentences(result, columns, curve),
        "facts": facts(result, identities),
        "sections": sections,
        "plots": plots,
        "tables": tables,
        "class_table": class_table(rows, name_of, columns.sparsities[-1], analysis),
        "classes_by": "label" if columns.multilabels() is not None else class_column(columns),
        "multilabel": columns.multilabels() is not None,
        "accuracy_note": _accuracy_note(result, curve),
        "subgroup_note": subgroup_note,
        "errors": _errors(result, identities),
        "error_count": result.errors.num_rows,
        "style": _file("page.css"),
        "script": script,
        "script_hash": base64.b64encode(digest).decode(),
    }


def _shown(analysis: Analysis | None, identities: Identities) -> tuple[Analysis | None, str]:
    """The analysis without subgroups that can name somebody, and what to say of that."""
    if analysis is None or identities.shown or "subgroups" not in analysis.tables:
        return analysis, ""
    before = analysis.tables["subgroups"]
    after = without_identities(before)
    hidden = before.num_rows - after.num_rows
    note = f"Rows of attributes that can name somebody are hidden ({hidden:,})." if hidden else ""
    return dataclasses.replace(analysis, tables={**analysis.tables, "subgroups": after}), note


def _drawn(plot: Plot) -> dict[str, Any]:
    table = plot.data()
    cut = _MOST_DATA if table.num_rows > _MOST_DATA else 0
    rows = table.slice(0, _MOST_DATA).to_pylist()
    return {
        "name": plot.name,
        "section": plot.section,
        "title": plot.title,
        "caption": plot.caption,
        "svg": inline_svg(plot.draw, f"{plot.title}. {plot.caption}", plot.name),
        "cut": cut,
        "data": {
            "columns": table.column_names,
            "rows": [[_value(v) for v in row.values()] for row in rows],
        },
    }


def _value(value: Any) -> Any:
    """A cell as JSON has it."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else str(value)[:_MOST_TEXT]


def _errors(result: MiningResult, identities: Identities) -> list[dict[str, str]]:
    return [
        {
            "sample": identities.of(row["sample_id"] or ""),
            "stage": row["stage"] or "",
            "error": identities.message(row["stage"] or "", row["error"]),
            "path": (row["path"] or "") if identities.shown else "",
        }
        for row in result.errors.slice(0, _MOST_ERRORS).to_pylist()
    ]


def _privacy(identities: Identities) -> str:
    """Keep which pseudonym is whose, and say what is hidden."""
    if identities.shown:
        return "Sample ids, paths and notes are shown as they are: share this page with care."
    known = f"{FILE} in the run folder says which is whose"
    if not identities.save():
        known = "which is whose is kept nowhere, as nothing can be written into the run folder"
    return (
        "Sample ids, paths, notes and messages of errors are hidden; samples have pseudonyms, and "
        f"{known}. Pictures are shown as they are, with what is written in them."
    )


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


def _json(value: Any) -> str:
    """JSON in ASCII that can end no element and begin no other."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda m: f"\\u{ord(m[0]):04x}", text)


def _encoded(page: str) -> bytes:
    # A lone surrogate, as in a file name that is not UTF-8, has no bytes of its own.
    return page.encode("utf-8", "backslashreplace")


def _script() -> str:
    # In one scope of its own; the parts follow one another as the page's readers would read them.
    parts = "\n".join(_file(f"{name}.js") for name in _SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}}})();'


def _file(name: str) -> str:
    return resources.files("fastpie.report").joinpath("page").joinpath(name).read_text("utf-8")


def _template() -> Any:
    jinja2 = load_extra("jinja2", "report", "a report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["short"] = _short
    return environment.from_string(_file("template.html.j2"))


def _short(text: Any, most: int = _MOST_TEXT) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= most else f"{text[:most]}…"
