"""The demo's table as a committed result: quality, not speed. Run: `make bench`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import harness
from fastpie.demo import run_demo

SEEDS = 3


def main() -> None:
    """Run the demo and write its figures."""
    with tempfile.TemporaryDirectory() as folder:
        result = run_demo(Path(folder) / "demo", seeds=SEEDS)
    kept = ("samples", "wrong_labels", "seeds", "images_per_second", "accuracy", "found")
    path = harness.write_results(
        "demo", [{name: result[name] for name in kept}], packages=("numpy", "scikit-learn")
    )
    print(path)


if __name__ == "__main__":
    main()
