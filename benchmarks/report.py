"""`make bench-report`: the tables of the documents and the plots in docs/ from the committed results.

A block lies between `<!-- NAME:begin -->` and `<!-- NAME:end -->`: `benchmarks` (what
is fast by itself), `benchmarks:dual` (whole networks), `benchmarks:mining` (long runs), `benchmarks:training`, `quality`,
`learning`, `demo` in the README; `goals`, `layers` in docs/design/cpu-engine.md; `comparison`, `level-rule`,
`segmentation` in docs/design/quality.md; `training-cost`, `learning` in docs/design/training.md.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.goals import goals_table, layers_table
from benchmarks.harness import RESULTS
from benchmarks.quality.learning_table import control_table, headline_table, learning_table
from benchmarks.quality.table import (
    comparison_table,
    level_table,
    quality_table,
    segmentation_table,
)
from benchmarks.training_cost import TRAINING, training_cost_table

ROOT = RESULTS.parent.parent


def load() -> list[dict[str, Any]]:
    """Every row of every results file, with its file's head."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        runs = content.get("runs")  # of a file that several runs filled
        for row in content["rows"]:
            head = {**content, **runs[row["run"]]} if runs else content
            rows.append({**row, "file": path.name, "head": head})
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


# What a dual forward is put against in the README, by the names of bench_dual, and as a column. The
# baseline of all levels of a ladder ("11 torch.compile passes") is looked up as "two".
DUAL_COLUMNS = {
    ("fastpie-dual", "two torch.compile passes"): "two torch.compile passes",
    ("fastpie-dual", "one eager channels_last pass"): "one eager pass",
    ("fastpie-dual", "two OpenVINO passes"): "two OpenVINO passes",
    ("fastpie-dual", "two ONNX Runtime passes"): "two ONNX Runtime passes",
    ("fastpie-dual", "two DeepSparse passes, not scored"): "two DeepSparse passes",
    ("fastpie-pruned", "one DeepSparse pruned pass"): "pruned alone: DeepSparse",
}
_READING = (
    "A column says how many times faster the dual forward is (above 1: faster), scoring included but "
    "for DeepSparse's two passes; the last one is about the pruned model's pass alone. On a ladder "
    'the "two" passes are one for each model.'
)
_CASE = ("network", "precision", "kind", "scope", "batch", "size", "sparsity")


def dual_cases(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The comparisons of the dual forward, case by case, in a stable order."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "ratio" in row:
            cases.setdefault(json.dumps([row["file"], *(row[key] for key in _CASE)]), []).append(
                row
            )
    return sorted(cases.values(), key=lambda case: _order(case[0]))


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    levels = row["sparsity"] if isinstance(row["sparsity"], list) else [row["sparsity"]]
    return (
        row["file"], row["network"], row["precision"] != "fp32", row["kind"] != "magnitude",
        row["scope"] != "layer", len(levels), levels, row["size"], row["batch"],
    )  # fmt: skip


def dual_ratio(case: list[dict[str, Any]], provider: str, baseline: str) -> float | None:
    """How many times faster `provider` was than `baseline` in a case, if that was measured."""
    for row in case:
        if (row["provider"], row["baseline"]) in (
            (provider, baseline),
            (provider, baseline.replace("two", f"{_models(row)}", 1)),
        ):
            return float(row["ratio"])
    return None


def dual_table(rows: list[dict[str, Any]]) -> str:
    """One line a case: the time of the dual forward, and its speed over each baseline."""
    cases = dual_cases(rows)
    columns = {
        pair: title
        for pair, title in DUAL_COLUMNS.items()
        if any(dual_ratio(case, *pair) is not None for case in cases)
    }
    lines = [
        f"| network | sparsity | batch | dual forward | {' | '.join(columns.values())} |",
        "|---" * (4 + len(columns)) + "|",
    ]
    for case in cases:
        ours = next((r for r in case if r["provider"] == "fastpie-dual"), None)
        if ours is None:
            continue
        ratios = [dual_ratio(case, *pair) for pair in columns]
        shown = [
            "" if r is None else f"**{r:.2f}x**" if n == 0 else f"{r:.2f}x"
            for n, r in enumerate(ratios)
        ]
        lines.append(
            f"| {_dual_name(ours)} | {_sparsity(ours)} | {ours['batch']} "
            f"| {_time(ours['seconds']['p50'])} | {' | '.join(shown)} |"
        )
    lines += ["", _READING]
    for source in sorted({_source(row, command=False) for case in cases for row in case}):
        lines += ["", source]
    return "\n".join(lines)


def _models(row: dict[str, Any]) -> int:
    return 1 + (len(row["sparsity"]) if isinstance(row["sparsity"], list) else 1)


def _dual_name(row: dict[str, Any]) -> str:
    marks = [row["precision"]]
    if row["kind"] != "magnitude":
        marks.append(row["kind"])
    if row["scope"] != "layer":
        marks.append(row["scope"])
    return f"{row['network']}, {', '.join(marks)}"


def _sparsity(row: dict[str, Any]) -> str:
    levels = row["sparsity"]
    if isinstance(levels, list):
        return f"{len(levels)} levels, {levels[0]:g} to {levels[-1]:g}"
    return f"{levels:g}"


def plot_dual(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the time per image of every provider that runs both models.

    One panel for each network and precision: layer-wise magnitude masks at .9, or the sparsity
    nearest to it, and batch 16, or the largest measured.
    """
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in dual_cases(rows):
        row = case[0]
        plain = row["kind"] == "magnitude" and row["scope"] == "layer"
        if isinstance(row["sparsity"], list) or not plain:
            continue
        key = (row["network"], row["precision"])
        if key not in panels or _interest(row) > _interest(panels[key][0]):
            panels[key] = case
    if not panels:
        return
    # Squeezed side by side the names of the providers would not fit: one below the other.
    heights = [1.2 + len(_times(case)) for case in panels.values()]
    figure = Figure(figsize=(9, 0.24 * sum(heights) + 0.5), layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, case in zip(grid, panels.values(), strict=True):
        times = _times(case)
        names = sorted(times, key=lambda name: times[name])
        colors = ["#d55e00" if name == "fastpie-dual" else "#0072b2" for name in names]
        bars = axes.barh(range(len(names)), [times[n] for n in names], color=colors, height=0.7)
        axes.bar_label(bars, [f"{times[name]:.3g}" for name in names], padding=4, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.spines[["top", "right"]].set_visible(False)
        row = case[0]
        axes.set_title(
            f"{_dual_name(row)}, {_sparsity(row)} removed, batch {row['batch']}",
            fontsize=9,
            loc="left",
        )
    grid[-1].set_xlabel("milliseconds an image: both models, but where it says one")
    figure.savefig(path, metadata={"Date": None})


def _interest(row: dict[str, Any]) -> tuple[float, bool, int]:
    return (-abs(row["sparsity"] - 0.9), row["batch"] == 16, row["batch"])


def _times(case: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds an image of each provider that runs both models, and of one eager pass."""
    times = {}
    for row in case:
        if row["provider"] == "fastpie-dual":
            for name, seconds in (
                ("fastpie-dual", row["seconds"]),
                (row["baseline"], row["baseline_seconds"]),
            ):
                times[name] = 1e3 * seconds["p50"] / row["batch"]
    return times


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


# What a run of any length is made of, by the files that hold it.
MINING = ("decode", "mining", "select")


def mining_table(rows: list[dict[str, Any]]) -> str:
    """One line a measurement: its time and peak of memory, and those of what it is put against."""
    lines = [
        "| what | how | time | peak | against | its time | its peak | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = row.get("images") or row.get("samples") or row["size"][0]
        what = row["format"] if "format" in row else f"{row['task']}, {size:,}"
        against = ["", "", "", ""]
        if "ratio" in row:
            seconds, peak = _time(row["baseline_seconds"]["p50"]), _mib(row, "baseline_peak_mib")
            against = [row["baseline"], seconds, peak, f"**{row['ratio']:g}x**"]
        cells = [
            what,
            row["provider"],
            _time(row["seconds"]["p50"]),
            _mib(row, "peak_mib"),
            *against,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for source in sorted({_source(row) for row in rows}):
        lines += ["", source]
    return "\n".join(lines)


def _mib(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:,.0f} MiB" if key in row else ""


def _source(row: dict[str, Any], *, command: bool = True) -> str:
    head = row["head"]
    machine, versions = head["machine"], head["versions"]
    how = f"`{head['command']}`" if command else "the commands are in the file"
    return (
        f"`benchmarks/results/{row['file']}`: {machine['gpu'] or machine['cpu']}, "
        f"{machine['cores']} threads, {machine['isa']}; torch {versions['torch']}; commit "
        f"{head['commit']}, {head['date']}; {how}."
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


def fill(path: Path, blocks: dict[str, str]) -> None:
    """Rewrite what is between the markers of a document."""
    text = path.read_text()
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin not in text:
            raise ValueError(f"Expected {path.name} to have a block {begin}, but it has none.")
        text = re.sub(
            f"{begin}.*{end}", lambda _, b=f"{begin}\n{block}\n{end}": b, text, flags=re.DOTALL
        )
    path.write_text(text)


def main() -> None:
    """Rewrite what is between the markers of the documents, and the plots."""
    rows = load()
    dual = [row for row in rows if row["head"]["what"] == "dual-forward"]
    mining = [row for row in rows if row["head"]["what"] in MINING]
    quality = [row for row in rows if row["head"]["what"] == "quality"]
    segmentation = [row for row in rows if row["head"]["what"] == "quality-segmentation"]
    training = [row for row in rows if row["head"]["what"] in TRAINING]
    learning = [row for row in rows if row["head"]["what"] == "quality-learning"]
    apart = [*dual, *mining, *training]
    speed = [row for row in rows if "ratio" in row and row not in apart]
    blocks = {"benchmarks": table(speed), "benchmarks:mining": mining_table(mining)}
    if training:
        sources = sorted({_source(row) for row in training})
        whole = "\n\n".join([training_cost_table(training), *sources])
        fill(ROOT / "docs" / "design" / "training.md", {"training-cost": whole})
        networks = [row for row in training if not row["network"].startswith("conv")]
        blocks["benchmarks:training"] = "\n\n".join([training_cost_table(networks), *sources])
    if learning:
        source = _source(learning[0])
        tables = f"{learning_table(learning)}\n\n{control_table(learning)}\n\n{source}"
        fill(ROOT / "docs" / "design" / "training.md", {"learning": tables})
        blocks["learning"] = f"{headline_table(learning)}\n\n{source}"
    if dual:
        blocks["benchmarks:dual"] = dual_table(dual)
        plot_dual(dual, ROOT / "docs" / "dual.svg")
        tables = {"goals": goals_table(dual), "layers": layers_table(dual)}
        fill(ROOT / "docs" / "design" / "cpu-engine.md", tables)
    if quality and segmentation:
        blocks["quality"] = f"{quality_table(quality)}\n\n{_source(quality[0])}"
        sources = [_source(quality[0]), _source(segmentation[0])]
        tables = {
            "comparison": f"{comparison_table(quality)}\n\n{sources[0]}",
            "level-rule": f"{level_table(quality)}\n\n{sources[0]}",
            "segmentation": f"{segmentation_table(segmentation)}\n\n{sources[1]}",
        }
        fill(ROOT / "docs" / "design" / "quality.md", tables)
    for row in rows:
        if row["head"]["what"] == "demo":
            blocks["demo"] = demo_table(row)
    fill(ROOT / "README.md", blocks)
    plot(speed, ROOT / "docs" / "benchmarks.svg")
    print(f"{len(rows)} rows")


if __name__ == "__main__":
    main()
