"""One provider in a process of its own: opened, run and asked over stdin and stdout, JSON lines.

Its own process gives each provider its own thread pools, caches and peak memory, and lets one run
under another Python. So this file imports no torch and no fastpie (DeepSparse's Python has neither).
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Provider", "serve"]


class Provider(NamedTuple):
    """What a worker can run.

    Attributes:
        modes: by name, one run of what is to be timed.
        outputs: "dense" and "pruned", as arrays, to be held against the reference.
        compile_seconds: from models in memory to their first outputs; None where nothing compiles.
        setting: what was chosen, for the record.
        measured: modes that tell their seconds themselves.
        report: of the fastpie engine.
    """

    modes: dict[str, Callable[[], Any]]
    outputs: Callable[[], dict[str, np.ndarray]]
    compile_seconds: float | None
    setting: str = ""
    measured: dict[str, Callable[[], float]] = {}  # noqa: RUF012 - never changed
    report: Callable[[], Any] = lambda: None


class _Server:
    def __init__(self, opener: Callable[[dict[str, Any]], Provider]) -> None:
        self.opener = opener
        self.provider: Provider | None = None
        self.peak_of_opening: float | None = None

    def open(self, **spec: Any) -> dict[str, Any]:
        """Build the provider; its first outputs go to the file `spec["outputs"]`."""
        self.provider = self.opener(spec)
        np.savez(spec["outputs"], **self.provider.outputs())
        gc.collect()
        self.peak_of_opening = _peak_mib()
        _reset_peak()
        return {
            "setting": self.provider.setting,
            "compile_seconds": self.provider.compile_seconds,
            "modes": [*self.provider.modes, *self.provider.measured],
        }

    def run(self, mode: str, passes: int, settle: bool) -> dict[str, Any]:
        """Seconds of one pass: mean of `passes` in a row, with `settle` after one that is not timed."""
        assert self.provider is not None
        if mode in self.provider.measured:
            return {"seconds": self.provider.measured[mode]()}
        call = self.provider.modes[mode]
        if settle:
            call()
        start = time.perf_counter()
        for _ in range(passes):
            call()
        return {"seconds": (time.perf_counter() - start) / passes}

    def memory(self) -> dict[str, Any]:
        """Peak resident memory in MiB: while it was opened, and since."""
        return {"opening": self.peak_of_opening, "running": _peak_mib()}

    def report(self) -> dict[str, Any]:
        """engine.report()."""
        assert self.provider is not None
        return {"report": self.provider.report()}


def serve(opener: Callable[[dict[str, Any]], Provider]) -> None:
    """Answer requests {"op": name, ...} until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    server = _Server(opener)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(server, request.pop("op"))(**request)
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer, default=str), file=answers, flush=True)


def _peak_mib() -> float | None:
    """VmHWM; ru_maxrss would hold the parent's peak too, which it keeps across vfork and exec."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not allowed here: "running" then holds the peak of opening too
        return
