"""Choosing and drawing at scale: 100 million rows of scores, seconds and peak memory.

The hardest 5 % of a run that lies on disk, by `MiningResult.select`, by DuckDB and by NumPy on the
whole columns; and 100 million draws with replacement of 100 million weighted samples, as
`HardnessSampler` makes them, against NumPy's way (cumulative sum and binary search;
`torch.multinomial` takes 2^24 at most). Each in a process of its own, so that the peak is its own,
imports of torch and pyarrow included. Run: `python -m benchmarks.bench_select`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import fastpie
from benchmarks import harness
from fastpie.training.sampling.draws import BLOCK, WeightedDraws

FRACTION = 0.05
OURS = "fastpie select"
OURS_DRAWS = "fastpie alias table"


def write_run(folder: Path, rows: int, part_rows: int) -> None:
    """A run folder with the ids of a data set of X-rays and four scores."""
    (folder / "scores").mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, first in enumerate(range(0, rows, part_rows)):
        count = min(part_rows, rows - first)
        number = pa.array(np.arange(first, first + count)).cast(pa.string())
        columns = {
            "sample_id": pc.binary_join_element_wise(pc.utf8_lpad(number, 9, "0"), "_000.png", ""),
            "label": random.integers(0, 14, count),
        }
        for score in ("hardness", "js", "margin_dense", "loss_dense"):
            columns[score] = random.standard_exponential(count, dtype=np.float32)
        pq.write_table(pa.table(columns), folder / "scores" / f"part-{part:06d}.parquet")
    (folder / "run.json").write_text(json.dumps({"format": "fastpie-run-2", "config": {}}))


# ---------------------------------------------------------------------------- the hardest


def select_fastpie(folder: Path) -> list[str]:
    return fastpie.MiningResult(folder).select(FRACTION)


def select_duckdb(folder: Path) -> list[str]:
    import duckdb

    scores = str(folder / "scores" / "*.parquet")
    count = duckdb.sql("select count(*) from read_parquet(?)", params=[scores]).fetchall()[0][0]
    chosen = duckdb.sql(
        "select sample_id from read_parquet(?) order by hardness desc nulls last, sample_id limit ?",
        params=[scores, int(FRACTION * count)],
    )
    return chosen.to_arrow_table().column("sample_id").to_pylist()


def select_numpy(folder: Path) -> list[str]:
    table = pq.read_table(folder / "scores", columns=["sample_id", "hardness"])
    order = np.argsort(-table.column("hardness").to_numpy(), kind="stable")
    chosen = order[: int(FRACTION * len(order))]
    ids = table.column("sample_id").cast(pa.large_string())
    return ids.take(pa.array(chosen)).to_pylist()


SELECTIONS: dict[str, Callable[[Path], list[str]]] = {
    OURS: select_fastpie,
    "DuckDB, order by and limit": select_duckdb,
    "pyarrow table, NumPy argsort": select_numpy,
}


def measure_selection(name: str, folder: Path) -> dict[str, Any]:
    begin = time.perf_counter()
    ids = SELECTIONS[name](folder)
    seconds = time.perf_counter() - begin
    peak = peak_mib()  # before the ids are joined
    return {
        "seconds": seconds,
        "peak_mib": peak,
        "ids": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
    }


# ---------------------------------------------------------------------------- draws


def draw_fastpie(weights: np.ndarray) -> tuple[float, int]:
    draws = WeightedDraws(weights)
    built = time.perf_counter()
    key = np.array([1, 2], np.uint64)
    total = 0
    for block in range(-(-len(weights) // BLOCK)):
        total += int(draws.block(key, block, min(BLOCK, len(weights) - block * BLOCK)).sum())
    return built, total


def draw_numpy(weights: np.ndarray) -> tuple[float, int]:
    edges = np.cumsum(weights)
    built = time.perf_counter()
    random = np.random.default_rng(1)
    total = 0
    for first in range(0, len(weights), BLOCK):
        uniform = random.random(min(BLOCK, len(weights) - first)) * edges[-1]
        order = np.argsort(uniform)  # sorted, the search meets what is in the cache: far faster
        drawn = np.empty_like(order)
        drawn[order] = np.searchsorted(edges, uniform[order], side="right")
        total += int(drawn.sum())
    return built, total


DRAWS: dict[str, Callable[[np.ndarray], tuple[float, int]]] = {
    OURS_DRAWS: draw_fastpie,
    "NumPy, cumulative sum and binary search": draw_numpy,
}


def measure_draws(name: str, rows: int) -> dict[str, Any]:
    """Weights of soft ranks in random order, as the sampler makes them; as many draws as samples."""
    weights = np.random.default_rng(0).permutation(1 + 4 * np.linspace(0, 1, rows))
    want = float(np.average(np.arange(rows), weights=weights))
    begin = time.perf_counter()
    built, total = DRAWS[name](weights)
    seconds = time.perf_counter() - begin
    if abs(total / rows - want) > 5 * rows / np.sqrt(12 * rows):
        raise RuntimeError(f"{name} does not draw by the weights: mean {total / rows}, not {want}")
    return {"seconds": seconds, "build_seconds": built - begin, "peak_mib": peak_mib()}


# ---------------------------------------------------------------------------- processes


def peak_mib() -> float:
    """Of this process; ru_maxrss would be that of the process it was forked from, if that is more."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) / 2**10, 1)


def in_child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bench_select", "--child", *arguments]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(json.loads(answer.splitlines()[-1]))


def rows_of(
    case: dict[str, Any], ours: str, measured: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Ours against each other one, with the peak memory of both and what else was measured."""
    timings = {
        name: {
            **{
                f"p{q}": float(np.percentile([a["seconds"] for a in all_], q)) for q in (20, 50, 80)
            },
            "repeats": len(all_),
        }
        for name, all_ in measured.items()
    }

    def largest(name: str, what: str) -> float:
        return max(answer[what] for answer in measured[name])

    rows = []
    for other in measured:
        if other == ours:
            continue
        row = harness.row(case, timings, ours, other)
        row["peak_mib"] = largest(ours, "peak_mib")
        row["baseline_peak_mib"] = largest(other, "peak_mib")
        if "build_seconds" in measured[ours][0]:
            row["build_seconds"] = largest(ours, "build_seconds")
            row["baseline_build_seconds"] = largest(other, "build_seconds")
        rows.append(row)
    return rows


def interleaved(
    names: list[str], repeats: int, measure: Callable[[str], dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            measured[name].append(measure(name))
            print(f"{name}: {measured[name][-1]}", file=sys.stderr)
    return measured


def main() -> None:
    """Measure, write the JSON, print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--part-rows", type=int, default=100_000, help="rows of a part of the run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the run is written for the time being")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, given = options.child
        found = (
            measure_selection(name, Path(given))
            if name in SELECTIONS
            else measure_draws(name, int(given))
        )
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(prefix="fastpie-bench-", dir=options.folder) as name:
        free, needed = shutil.disk_usage(name).free, 50 * options.rows
        if free < needed:
            raise SystemExit(
                f"Expected {needed / 2**30:.0f} GiB free in {Path(name).parent}, but there are "
                f"{free / 2**30:.0f}: choose another place with --folder."
            )
        run = Path(name, "run")
        write_run(run, options.rows, options.part_rows)
        selected = interleaved(
            list(SELECTIONS), options.repeats, lambda name: in_child(name, str(run))
        )
    if len({answer["ids"] for answers in selected.values() for answer in answers}) > 1:
        raise RuntimeError("The ways of choosing the hardest do not agree.")
    drawn = interleaved(
        list(DRAWS), options.repeats, lambda name: in_child(name, str(options.rows))
    )
    case = {"size": [options.rows], "part_rows": options.part_rows, "fraction": FRACTION}
    rows = rows_of({"task": "the hardest 5 % of a run", **case}, OURS, selected)
    rows += rows_of({"task": "weighted draws", "size": [options.rows]}, OURS_DRAWS, drawn)
    path = harness.write_results("select", rows, packages=("duckdb", "numpy", "pyarrow"))
    for r in rows:
        print(
            f"{r['task']}: {r['provider']} {r['seconds']['p50']:.1f} s, {r['peak_mib']:.0f} MiB; "
            f"{r['baseline']} {r['baseline_seconds']['p50']:.1f} s, {r['baseline_peak_mib']:.0f} MiB"
        )
    print(path)


if __name__ == "__main__":
    main()
