"""`make bench-report`: README's table and docs/benchmarks.svg from the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.harness import RESULTS

ROOT = RESULTS.parent.parent


def load() -> list[dict[str, Any]]:
    """Every row of every results file, with its file's head."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        rows += [{**row, "file": path.name, "head": content} for row in content["rows"]]
    return rows


def demo_table(row: dict[str, Any]) -> str:
    """What `make demo` printed, as Markdown."""
    lines = ["| training | accuracy, overall | accuracy, three rarest classes |", "|---|---|---|"]
    for r in row["accuracy"]:
        lines.append(f"| {r['training']} | {r['overall']:.3f} | {r['tail_classes']:.3f} |")
    lines += [
        "",
        "| wrong labels found by | precision at 5 % | precision at 10 % |",
        "|---|---|---|",
    ]
    for r in row["found"]:
        five, ten = r["precision_at_5_percent"], r["precision_at_10_percent"]
        lines.append(f"| {r['score']} | {five:.3f} | {ten:.3f} |")
    lines += [
        "",
        f"{row['samples']} training images, {row['wrong_labels']} wrong labels, mean of {row['seeds']} "
        f"repetitions; mining {row['images_per_second']:.0f} images/s, start-up included. "
        + _source(row),
    ]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, one line a row, and the machines below it."""
    lines = [
        "| what | size | provider | time | against | its time | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {_name(row)} | {_size(row)} "
            f"| {row['provider']} | {_time(row['seconds']['p50'])} | {row['baseline']} "
            f"| {_time(row['baseline_seconds']['p50'])} | **{row['ratio']:g}x** |"
        )
    for source in sorted({_source(row) for row in rows}):
        lines += ["", source]
    return "\n".join(lines)


def _source(row: dict[str, Any]) -> str:
    head = row["head"]
    machine, versions = head["machine"], head["versions"]
    return (
        f"`benchmarks/results/{row['file']}`: {machine['gpu'] or machine['cpu']}, "
        f"{machine['cores']} threads, {machine['isa']}; torch {versions['torch']}; commit "
        f"{head['commit']}, {head['date']}; `{head['command']}`."
    )


def _name(row: dict[str, Any]) -> str:
    names = (row["head"]["what"], row.get("task"), row.get("network"), row.get("precision"))
    return ", ".join(name for name in names if name)


def _size(row: dict[str, Any]) -> str:
    return str([row["rows"], row["classes"]] if "classes" in row else row.get("size", ""))


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Horizontal bars of the ratios, logarithmic."""
    figure = Figure(figsize=(9, 0.32 * len(rows) + 1), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{_name(row)} {_size(row)} / {row['baseline']}" for row in rows]
    axes.barh(range(len(rows)), [r["ratio"] for r in rows], color="#0072b2")
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times faster than the baseline")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Rewrite what is between the markers of the README, and the plot."""
    rows = load()
    speed = [row for row in rows if "ratio" in row]
    blocks = {"benchmarks": table(speed)}
    for row in rows:
        if row["head"]["what"] == "demo":
            blocks["demo"] = demo_table(row)
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        text = re.sub(
            f"{begin}.*{end}", lambda _, b=f"{begin}\n{block}\n{end}": b, text, flags=re.DOTALL
        )
    readme.write_text(text)
    plot(speed, ROOT / "docs" / "benchmarks.svg")
    print(f"{len(rows)} rows")


if __name__ == "__main__":
    main()
