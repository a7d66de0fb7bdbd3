"""What a run was and found, in sentences."""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from fastpie.mining.result import MiningResult
from fastpie.report.classes import AccuracyCurve
from fastpie.report.columns import Columns
from fastpie.report.identities import Identities

__all__ = ["facts", "lead", "sentences", "tiles"]

_STAGES = {
    "read": "could not be read",
    "image": "had an image of another form",
    "collate": "did not fit into a batch",
    "label": "had an unusable label",
    "score": "gave outputs that are not finite",
}


def sentences(result: MiningResult, columns: Columns, curve: AccuracyCurve) -> list[str]:
    """The summary, most important first."""
    record = result.record
    failed = result.errors.num_rows
    said = [f"{_count(len(columns), 'sample')} scored, {failed:,} left out."]
    if failed:
        stages = Counter(result.errors.column("stage").to_pylist())
        parts = [f"{n:,} {_STAGES.get(stage, stage)}" for stage, n in stages.most_common()]
        said[0] = said[0][:-1] + f": {_joined(parts)}."
    planned = _planned(record)
    if planned is not None and planned > len(columns) + failed:
        said.append(
            f"The run is not finished: it has {planned:,} samples, of which "
            f"{planned - len(columns) - failed:,} are still to be scored."
        )
    levels = _joined([f"{s:g}" for s in columns.sparsities])
    what = "levels of one nested ladder of sparsities" if columns.is_ladder else "sparsity"
    said.append(
        f"Task: {record['config']['task']}, {'with' if record['labelled'] else 'without'} labels. "
        f"The dense model is compared with its pruned self at the {what} {levels}."
    )
    formula = record.get("hardness", "not recorded")
    said.append(f"Hardness (higher = harder) is {formula}.")
    hardness = columns.numbers("hardness")
    finite = np.array([]) if hardness is None else hardness[np.isfinite(hardness)]
    if len(finite):
        half, most = np.quantile(finite, [0.5, 0.95])
        said.append(
            f"Half of the samples have a hardness below {half:.3g}, the hardest 5% at least "
            f"{most:.3g}, the hardest {finite.max():.3g}."
        )
    flips = columns.numbers("flip")
    if flips is not None and len(flips):
        where = " at one level or more" if columns.is_ladder else ""
        said.append(f"Pruning changes the prediction of {flips.mean():.1%} of the samples{where}.")
    if curve.overall:
        said.append(
            f"Accuracy is {curve.overall[0]:.1%} dense and {curve.overall[-1]:.1%} at sparsity "
            f"{curve.sparsities[-1]:g}; balanced over the classes, {curve.balanced[0]:.1%} and "
            f"{curve.balanced[-1]:.1%}."
        )
    return said


def lead(columns: Columns, curve: AccuracyCurve, findings: list[str]) -> str:
    """The one sentence that stands on top."""
    if findings:
        return findings[0]
    flips = columns.numbers("flip")
    if flips is not None and len(flips):
        said = f"Pruning changes the prediction of {flips.mean():.1%} of {len(flips):,} samples"
        if curve.overall:
            said += (
                f" and takes accuracy from {curve.overall[0]:.1%} to {curve.overall[-1]:.1%} at "
                f"sparsity {curve.sparsities[-1]:g}"
            )
        return said + "."
    return f"{_count(len(columns), 'sample')}, hardest first."


def tiles(
    result: MiningResult, columns: Columns, curve: AccuracyCurve
) -> list[tuple[str, str, str]]:
    """Name, value and remark of the figures that matter most."""
    failed = result.errors.num_rows
    found = [
        ("samples", f"{len(columns):,}", f"{failed:,} left out" if failed else "none left out")
    ]
    highest = f"at sparsity {columns.sparsities[-1]:g}"
    if curve.overall:
        found.append(("accuracy, dense", f"{curve.overall[0]:.1%}", ""))
        found.append(("accuracy, pruned", f"{curve.overall[-1]:.1%}", highest))
    flips = columns.numbers("flip")
    if flips is not None and len(flips):
        where = "at one level or more" if columns.is_ladder else highest
        found.append(("predictions changed", f"{flips.mean():.1%}", where))
    pie = columns.flag("pie")
    if pie is not None:
        found.append(("PIEs", f"{pie.sum():,}", f"{pie.mean():.1%} of the samples"))
    quadrant = columns.codes("quadrant")
    if quadrant is not None:
        doubtful = [i for i, name in enumerate(quadrant[1]) if "label in doubt" in name]
        count = int(np.isin(quadrant[0], doubtful).sum())
        found.append(("labels in doubt", f"{count:,}", "by their quadrant"))
    copies = sum(i is not None for i in columns.texts("duplicate_of"))
    bad = [columns.flag(name) for name in ("dark", "bright", "blurred", "blank")]
    spoilt = (
        int(np.any([b for b in bad if b is not None], axis=0).sum())
        if any(b is not None for b in bad)
        else 0
    )
    if copies or spoilt:
        found.append(("poor images", f"{spoilt:,}", f"{copies:,} duplicates"))
    hardness = columns.numbers("hardness")
    finite = np.array([]) if hardness is None else hardness[np.isfinite(hardness)]
    if len(found) < 6 and len(finite):
        most = np.quantile(finite, 0.95)
        found.append(("hardest 5 %", f"{most:.3g}", "hardness at least"))
    return found


def facts(result: MiningResult, identities: Identities) -> list[tuple[str, str]]:
    """Name and value of what someone needs who makes the run again; no path unless ids are shown."""
    record = result.record
    config = record["config"]
    fingerprints = record.get("fingerprints", {})
    rows = [
        ("run", result.location if identities.shown else Path(result.location).resolve().name),
        ("started", _time(record.get("created", ""))),
        ("versions", ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items())),
        *((f"fingerprint of the {name}", str(value)) for name, value in fingerprints.items()),
        ("device", f"{config.get('device')}, {config.get('precision')}"),
        ("batch size", str(config.get("batch_size"))),
        ("BatchNorm recalibrated", "yes" if config.get("recalibrate") else "no"),
    ]
    note = record.get("note") or {}
    if note and not identities.shown:
        rows.append(("note", "hidden, as it can hold names and paths"))
        note = {}
    for name, value in note.items():
        rows.append((str(name), value if isinstance(value, str) else json.dumps(value)))
    return rows


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _joined(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _planned(record: dict[str, Any]) -> int | None:
    """How many samples the run has, done or not: the fingerprint of its data begins with it."""
    number = str(record.get("fingerprints", {}).get("data", "")).split(" ")[0]
    return int(number) if number.isdigit() else None


def _time(stamp: str) -> str:
    try:
        return datetime.fromisoformat(stamp).strftime("%d %B %Y, %H:%M %Z")
    except ValueError:
        return stamp
