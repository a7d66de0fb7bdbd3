"""One way to measure: interleaved repeats, medians, ratios, one JSON schema (docs/design)."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastpie import _C
from fastpie.bench import interleave

__all__ = ["interleave", "machine_info", "merge_results", "row", "versions", "write_results"]

RESULTS = Path(__file__).parent / "results"


def row(
    case: dict[str, Any], timings: dict[str, dict[str, float]], provider: str, baseline: str
) -> dict[str, Any]:
    """One row of a results file: provider against baseline, both from the same rounds."""
    return {
        **case,
        "provider": provider,
        "seconds": timings[provider],
        "baseline": baseline,
        "baseline_seconds": timings[baseline],
        "ratio": round(timings[baseline]["p50"] / timings[provider]["p50"], 2),
    }


def machine_info() -> dict[str, Any]:
    """Processor, cores, instruction set, GPU and memory of this machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": _cpu_name(),
        "cores": torch.get_num_threads(),
        "isa": _C.cpu_capability(),
        "gpu": gpu,
        "ram_gib": round(memory),
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of fastpie, torch, Triton, CUDA and of `packages`."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("fastpie", "torch", "triton", *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    return found


def write_results(
    what: str,
    rows: Sequence[dict[str, Any]],
    *,
    packages: Sequence[str] = (),
    folder: Path | None = None,
) -> Path:
    """Write `<what>-<machine>.json` and say where."""
    path = _path(what, folder)
    _write(path, {"what": what, "machine": machine_info(), **_run(packages), "rows": list(rows)})
    return path


def merge_results(
    what: str,
    rows: Sequence[dict[str, Any]],
    same: Callable[[dict[str, Any]], Any],
    *,
    packages: Sequence[str] = (),
    folder: Path | None = None,
) -> Path:
    """Add rows to `<what>-<machine>.json`, each in place of an older one of the same case.

    The rows of a file so filled come from several runs: `runs` holds versions, commit, command and
    date of each, and a row's `run` is its place in that list. The file's own head is the last run.

    Args:
        what: is measured.
        rows: of this run.
        same: of a row, equal for rows of which one replaces the other.
        packages: whose versions to note.
        folder: by default $OUT, else the committed results.

    Returns:
        The file.
    """
    path = _path(what, folder)
    old = json.loads(path.read_text()) if path.exists() else {"rows": [], "runs": []}
    this = _run(packages)
    new = {json.dumps(same(row)) for row in rows}
    merged = [
        ({**row, "run": None}, old["runs"][row["run"]])
        for row in old["rows"]
        if json.dumps(same(row)) not in new
    ] + [({**row, "run": None}, this) for row in rows]
    runs: list[dict[str, Any]] = []
    for row, run in merged:
        if run not in runs:
            runs.append(run)
        row["run"] = runs.index(run)
    head = {"what": what, "machine": machine_info(), **this}
    _write(path, {**head, "runs": runs, "rows": [row for row, _ in merged]})
    return path


def _path(what: str, folder: Path | None) -> Path:
    machine = machine_info()
    label = machine["gpu"] or f"{machine['cpu']}-{machine['cores']}core-{machine['isa']}"
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    out = folder or Path(os.environ.get("OUT") or RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    return out / f"{what}-{slug}.json"


def _run(packages: Sequence[str]) -> dict[str, Any]:
    return {
        "versions": versions(*packages),
        "commit": _commit(),
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _module() -> str:
    """The benchmark that runs, as python -m takes it."""
    parts = Path(sys.argv[0]).with_suffix("").parts
    if "benchmarks" in parts:
        parts = parts[len(parts) - parts[::-1].index("benchmarks") :]
    return ".".join(("benchmarks", *parts)).removesuffix(".__main__")


def _write(path: Path, content: dict[str, Any]) -> None:
    """At once: an interrupted write leaves the old file."""
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(path)


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def _commit() -> str | None:
    """The commit measured, with a + where the tree had changes beside it."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if dirty else "")
