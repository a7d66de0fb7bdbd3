"""The published analyses of a whole study: 30 models at 20 levels, 20,000 samples, 20 classes.

`python -m benchmarks.bench_analysis`: seconds and peak memory of everything that `analyze_predictions`
computes, in a process of its own, and of pandas' row-wise Spearman correlation, which is the ranking of the
published script alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np

from benchmarks.harness import write_results

SEED = 0


def study(models: int, levels: int, samples: int, classes: int) -> tuple[np.ndarray, ...]:
    """Sigmoid outputs whose noise grows with the level, fp32; labels with a long tail."""
    generator = np.random.default_rng(SEED)
    frequency = np.geomspace(0.3, 0.003, classes)
    labels = (generator.random((samples, classes)) < frequency).astype(np.float32)
    signal = 3 * labels - 1.5 + generator.normal(size=(samples, classes)).astype(np.float32)
    outputs = np.empty((levels, models, samples, classes), np.float32)
    for level in range(levels):
        for model in range(models):
            noise = generator.standard_normal((samples, classes), np.float32)
            outputs[level, model] = 1 / (1 + np.exp(-(signal + (0.2 + 2 * level / levels) * noise)))
    return outputs[0], outputs[1:].swapaxes(0, 1), labels


def measured(models: int, levels: int, samples: int, classes: int) -> dict[str, float]:
    """Seconds of the analysis and of making its input, and the peak of this process in GiB."""
    from fastpie.analysis import Predictions, analyze_predictions

    start = time.perf_counter()
    dense, pruned, labels = study(models, levels, samples, classes)
    sparsities = [round((k + 1) / levels, 6) for k in range(levels - 1)]
    predictions = Predictions.of_arrays(dense, pruned, sparsities, task="multilabel", labels=labels)
    made = time.perf_counter()
    analysis = analyze_predictions(predictions, compat=None, sparsity=sparsities[-2])
    done = time.perf_counter()
    assert {"levels", "curves", "classes", "links", "pairs", "regression", "counts"} < set(
        analysis.tables
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": done - made, "input_seconds": made - start, "peak_gib": peak}


def pandas_seconds(levels: int, samples: int, classes: int) -> float:
    """The published ranking of every level by pandas, the means over the models being there."""
    import pandas as pd

    dense, pruned, _ = study(1, levels, samples, classes)
    first = pd.DataFrame(dense[0])
    start = time.perf_counter()
    for level in range(levels - 1):
        first.corrwith(pd.DataFrame(pruned[0, level]), axis=1, method="spearman")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=30)
    parser.add_argument("--levels", type=int, default=20, help="The dense model included.")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-pandas", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = (options.models, options.levels, options.samples, options.classes)
    if options.child:
        print(json.dumps(measured(*size)))
        return
    command = [sys.executable, "-m", "benchmarks.bench_analysis", "--child"]
    for name, value in zip(("models", "levels", "samples", "classes"), size, strict=True):
        command += [f"--{name}", str(value)]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(options.repeats)
    ]
    seconds = sorted(run["seconds"] for run in runs)
    row = {
        "task": "multilabel",
        "models": options.models,
        "levels": options.levels,
        "size": [options.samples, options.classes],
        "provider": "fastpie.analysis, everything",
        "seconds": {
            "p20": seconds[0],
            "p50": seconds[len(seconds) // 2],
            "p80": seconds[-1],
            "repeats": len(seconds),
        },
        "peak_gib": round(max(run["peak_gib"] for run in runs), 2),
    }
    if not options.no_pandas:
        theirs = pandas_seconds(options.levels, options.samples, options.classes)
        row["baseline"] = "pandas corrwith(axis=1) of every level, the published ranking alone"
        row["baseline_seconds"] = {"p50": theirs, "repeats": 1}
        row["ratio"] = round(theirs / row["seconds"]["p50"], 2)
    print(json.dumps(row, indent=1))
    print(write_results("analysis", [row], packages=("numpy", "scipy", "pandas", "pyarrow")))


if __name__ == "__main__":
    main()
