"""`make bench-report`: README's table and docs/benchmarks.svg from the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.harness import RESULTS

ROOT = RESULTS.parent.parent
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def load() -> list[dict[str, Any]]:
    """Every row of every results file, with its file's head."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        rows += [{**row, "file": path.name, "head": content} for row in content["rows"]]
    return rows


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
    for name in sorted({row["file"] for row in rows}):
        head = next(row["head"] for row in rows if row["file"] == name)
        machine, versions = head["machine"], head["versions"]
        lines.append("")
        lines.append(
            f"`benchmarks/results/{name}`: {machine['gpu'] or machine['cpu']}, {machine['cores']} "
            f"threads, {machine['isa']}; torch {versions['torch']}; commit {head['commit']}, "
            f"{head['date']}; `{head['command']}`."
        )
    return "\n".join(lines)


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
    readme = ROOT / "README.md"
    text = readme.read_text()
    block = f"{BEGIN}\n{table(rows)}\n{END}"
    readme.write_text(
        re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: block, text, flags=re.DOTALL)
    )
    plot(rows, ROOT / "docs" / "benchmarks.svg")
    print(f"{len(rows)} rows")


if __name__ == "__main__":
    main()
