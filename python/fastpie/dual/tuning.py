"""Timing of kernels for the planner, remembered on disk.

A time belongs to what computes (on the CPU a processor, an instruction set and a number of threads),
the version of torch, the kernels, and a key that describes the work. The file is ``plans.json`` in the folder that
FASTPIE_CACHE_DIR names, by default ``fastpie`` under XDG_CACHE_HOME or ``~/.cache``. A file that
cannot be read or written costs time and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch

import fastpie
from fastpie import _C
from fastpie._files import write_atomically

__all__ = ["Tuner", "cache_file", "cpu_scope", "kernels_digest"]

_REPEATS = 3
_SECONDS = 0.02  # of repeats of one kernel, unless it takes longer
_AGREE = 1.1
_MOST_IF_NOISY = 12
_MOST_REPEATS = 1000


def cache_file() -> Path:
    """Where times are kept."""
    folder = os.environ.get("FASTPIE_CACHE_DIR")
    if folder:
        return Path(folder) / "plans.json"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastpie" / "plans.json"


@functools.cache
def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    lines = dict(
        re.findall(
            r"^(vendor_id|cpu family|model|model name|stepping)\s*:\s*(.+)$", text, re.MULTILINE
        )
    )
    return " ".join(lines.values()) or platform.machine()


@functools.cache
def kernels_digest(*, triton: bool = False) -> str:
    """Digest of the native module, and of the Triton kernels: other kernels have other times."""
    digest = hashlib.sha256(Path(_C.__file__).read_bytes())
    if triton:
        for path in sorted((Path(fastpie.__file__).parent / "triton_kernels").glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cpu_scope() -> str:
    """What a time on the CPU depends on besides the work."""
    return " | ".join(
        (
            _processor(),
            _C.cpu_capability(),
            f"{torch.get_num_threads()} threads",
            f"torch {torch.__version__}",
            f"kernels {kernels_digest()}",
        )
    )


class Tuner:
    """Measures each piece of work once, here or in an earlier process.

    Attributes:
        measured: pieces of work timed by this object, those from the file left out.
    """

    def __init__(
        self, scope: str | None = None, measure: Callable[[Callable[[], Any]], float] | None = None
    ) -> None:
        """Read the times of what computes.

        Args:
            scope: what computes; by default this CPU.
            measure: seconds of a call; by default by the clock of the CPU.
        """
        self.measured = 0
        self._scope = cpu_scope() if scope is None else scope
        self._measure = _time if measure is None else measure
        self._known: dict[str, Any] = _read().get(self._scope, {})
        self._new: dict[str, Any] = {}

    def seconds(self, key: Hashable, work: Callable[[], Callable[[], Any]]) -> float:
        """Seconds of a piece of work.

        Args:
            key: describes the work: kernel, shape, density, precision.
            work: prepares it, only if it must be timed, and returns what to time.
        """
        name = repr(key)
        if name not in self._known:
            self._known[name] = self._new[name] = self._measure(work())
            self.measured += 1
        return float(self._known[name])

    def save(self) -> None:
        """Add the new times to the file."""
        if not self._new:
            return
        path = cache_file()
        with _saving:
            content = _read()
            content.setdefault(self._scope, {}).update(self._new)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(content, indent=0).encode())
            except OSError:
                return
        self._new = {}


_saving = threading.Lock()


def _read() -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        return {}
    return content


def _time(call: Callable[[], Any]) -> float:
    """The least of some repeats, since noise only adds; more of them until the two best agree."""
    call()
    times: list[float] = []
    begin = time.perf_counter()
    for repeat in range(1, _MOST_REPEATS + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if repeat < _REPEATS:
            continue
        best, second = sorted(times)[:2]
        long_enough = time.perf_counter() - begin > _SECONDS
        if long_enough and (second < _AGREE * best or repeat >= _MOST_IF_NOISY):
            break
    return min(times)
