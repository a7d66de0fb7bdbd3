"""One way to measure: interleaved repeats, medians, ratios, one JSON schema (docs/design)."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastpie import _C

__all__ = ["interleave", "machine_info", "row", "versions", "write_results"]

RESULTS = Path(__file__).parent / "results"


def interleave(
    providers: dict[str, Callable[[], Any]],
    *,
    repeats: int = 15,
    seconds: float = 10.0,
    warm_up: int = 2,
) -> dict[str, dict[str, float]]:
    """Time each provider `repeats` times in turn, so that a noisy moment hits all alike.

    Args:
        providers: by name, what to call.
        repeats: rounds.
        seconds: stop after this long once five rounds are done.
        warm_up: rounds that do not count.

    Returns:
        For each provider p20, p50 and p80 in seconds and the number of repeats.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    begin = time.perf_counter()
    for round_ in range(warm_up + repeats):
        if round_ >= warm_up + 5 and time.perf_counter() - begin > seconds:
            break
        for name, call in providers.items():
            start = time.perf_counter()
            call()
            if round_ >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {
        name: {
            **{f"p{q}": float(np.percentile(values, q)) for q in (20, 50, 80)},
            "repeats": len(values),
        }
        for name, values in times.items()
    }


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
    machine = machine_info()
    label = machine["gpu"] or f"{machine['cpu']}-{machine['cores']}core-{machine['isa']}"
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    out = folder or Path(os.environ.get("OUT") or RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{what}-{slug}.json"
    content = {
        "what": what,
        "machine": machine,
        "versions": versions(*packages),
        "commit": _commit(),
        "command": " ".join(
            ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
        ),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "rows": list(rows),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


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
