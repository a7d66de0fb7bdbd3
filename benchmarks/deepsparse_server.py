"""DeepSparse 1.8 as a worker. Runs under a Python 3.11 of its own: see the Makefile's `peers`."""

from __future__ import annotations

import os

os.environ["NM_DISABLE_ANALYTICS"] = "True"  # before the import, which would send them

import time
from pathlib import Path
from typing import Any

import numpy as np
from deepsparse import Engine, __version__

from benchmarks.worker import Provider, serve


def open_deepsparse(spec: dict[str, Any]) -> Provider:
    """Both models on all cores, one request at a time (the scheduler for the lowest latency)."""
    x = np.load(Path(spec["folder"]) / "x.npy")
    engines: dict[str, Engine] = {}

    def one(name: str) -> np.ndarray:
        return engines[name].run([x], val_inp=False)[0]

    start = time.perf_counter()
    for name in ("dense", "pruned"):
        engines[name] = Engine(
            str(Path(spec["folder"]) / f"{name}.onnx"),
            batch_size=len(x),
            num_cores=spec["threads"],
        )
        one(name)
    seconds = time.perf_counter() - start

    def two() -> None:
        one("dense")
        one("pruned")

    return Provider(
        modes={
            "one DeepSparse pruned pass": lambda: one("pruned"),
            "two DeepSparse passes, not scored": two,
        },
        outputs=lambda: {name: one(name) for name in engines},
        compile_seconds=seconds,
        setting=f"version {__version__}, {spec['threads']} cores, {engines['dense'].cpu_avx_type}",
    )


if __name__ == "__main__":
    serve(open_deepsparse)
