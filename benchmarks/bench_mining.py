"""What mine() costs beside decoding and the forward, and how fast a long run is taken up again.

- Added: ResNet-18 at .9 on JPEG files, read in the same process so that nothing hides behind anything,
  parts of seven batches (some seconds; a run's own are 10 s): batches by mine(), set-up excluded,
  against the same batches decoded, normalised and run through the same engine and nothing else; and
  the share of mine()'s time that is none of waiting for data, copying and computing.
- Resume: a run of ten million samples of which one part is not done, in a fresh process: seconds from
  the call of mine() to the first image that is read, and the peak memory, imports included.

Run: `python -m benchmarks.bench_mining`.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import fastpie
from benchmarks import harness
from benchmarks.bench_decode import film
from benchmarks.bench_select import peak_mib
from benchmarks.networks import build
from fastpie.bench import interleave
from fastpie.data import ManifestDataset, Preprocessing
from fastpie.data.texts import Texts

BATCH, PART_BATCHES, PARTS = 16, 7, 4
MINE, BARE = "fastpie mine()", "decode and forward alone"


# ---------------------------------------------------------------------------- what mine() adds


def write_films(folder: Path, count: int) -> None:
    random = np.random.default_rng(0)
    films = [film(random)[::2, ::2] for _ in range(16)]
    for i in range(count):
        pixels = np.roll(films[i % 16], i, axis=1)
        image = Image.fromarray((pixels * 255).astype(np.uint8))
        image.save(folder / f"{i:05d}.jpg", quality=95)
    rows = "".join(f"{i:05d}.jpg,{i % 14}\n" for i in range(count))
    (folder / "films.csv").write_text("path,label\n" + rows)


def measure_added(folder: Path, repeats: int) -> dict[str, Any]:
    count = BATCH * PART_BATCHES * PARTS
    write_films(folder, count)
    preprocessing = Preprocessing(size=(224, 224), mean=(0.5,), std=(0.25,), channels=3)
    data = ManifestDataset(folder / "films.csv", labels="label", preprocessing=preprocessing)
    network, _ = build("resnet18")
    dual = fastpie.DualModel(network, fastpie.prune(network, 0.9))
    options: dict[str, Any] = {"batch_size": BATCH, "progress": False}
    template = folder / "template"
    fastpie.mine(dual, data, template, limit=1, **options)
    record = json.loads((template / "run.json").read_text())
    record["batches_per_part"] = PART_BATCHES
    (template / "run.json").write_text(json.dumps(record))

    def batch(number: int) -> Tensor:
        first = number * BATCH
        return data.normalize(torch.stack([data.raw(i)[0] for i in range(first, first + BATCH)]))

    engine = dual.compile(batch(0), plan=json.loads((template / "plan.json").read_text()))

    def bare() -> float:
        begin = time.perf_counter()
        for number in range(PART_BATCHES, PART_BATCHES * PARTS):
            engine(batch(number))
        return time.perf_counter() - begin

    outside: list[float] = []  # share of the time that is none of waiting, copying and computing

    def mined() -> float:
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(template, run)
        result = fastpie.mine(dual, data, run, log="csv", **options)
        with (run / "log" / "rank-0.csv").open() as file:
            lines = csv.DictReader(file)
            first = next(lines)  # the end of the part that the template has begun
            inside = sum(float(r[s]) for r in lines for s in ("wait", "copy", "forward"))
        assert result.telemetry is not None
        seconds = float(result.telemetry["seconds"]) - float(first["seconds"])
        outside.append(1 - inside / seconds)
        return seconds

    timings = interleave(
        {MINE: mined, BARE: bare},
        repeats=repeats,
        seconds=1e9,
        warm_up=1,
        timed=lambda call: call(),
    )
    case = {"task": "mine() beside decode and forward", "network": "resnet18", "batch": BATCH,
            "sparsity": 0.9, "size": [3, 224, 224], "samples": BATCH * PART_BATCHES * (PARTS - 1)}  # fmt: skip
    row = harness.row(case, timings, MINE, BARE)
    row["added"] = round(timings[MINE]["p50"] / timings[BARE]["p50"] - 1, 4)
    row["outside_stages"] = round(float(np.median(outside[1:])), 4)
    return row


# ---------------------------------------------------------------------------- taking up


class Numbered(Dataset[Any]):
    """Ten million images that are made when they are read."""

    def __init__(self, count: int) -> None:
        numbers = pc.utf8_lpad(pa.array(np.arange(count)).cast(pa.string()), 9, "0")
        self.sample_ids = Texts(pc.binary_join_element_wise(numbers, "_000.png", ""))
        self.first_read = 0.0

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> Any:
        self.first_read = self.first_read or time.perf_counter()
        return torch.full((1, 8, 8), index % 7 / 7), index % 3


def tiny() -> fastpie.DualModel:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)).eval()
    return fastpie.DualModel(network, fastpie.prune(network, [0.1, 0.3, 0.5, 0.7]))


def write_long_run(folder: Path, count: int, part_batches: int) -> None:
    """A run of which the last part is not done, with the columns of a real one."""
    data = Numbered(count)
    fastpie.mine(tiny(), data, folder, limit=1, progress=False)
    record = json.loads((folder / "run.json").read_text())
    record["batches_per_part"] = part_batches
    (folder / "run.json").write_text(json.dumps(record))
    rows = pq.read_table(folder / "scores" / "part-000000.parquet")
    size = part_batches * record["config"]["batch_size"]
    columns = rows.take(pa.array(np.arange(size) % len(rows))).drop_columns(["sample_id"])
    for part, first in enumerate(range(0, count - size, size)):
        table = columns.add_column(0, "sample_id", data.sample_ids.array[first : first + size])
        pq.write_table(table, folder / "scores" / f"part-{part:06d}.parquet")


def measure_resume(folder: Path, count: int) -> dict[str, Any]:
    data = Numbered(count)
    dual = tiny()
    warnings.simplefilter("error")  # a part that is not taken for done would say so
    begin = time.perf_counter()
    fastpie.mine(dual, data, folder, limit=1, progress=False)
    return {"seconds": data.first_read - begin, "peak_mib": peak_mib()}


def resumes(folder: Path, count: int, repeats: int) -> dict[str, Any]:
    part_batches = 47  # of 64: what a GPU or two cores score in 10 s at 300 images/s
    write_long_run(folder, count, part_batches)
    last = max((folder / "scores").iterdir())
    answers = []
    for _ in range(repeats):
        command = [sys.executable, "-m", "benchmarks.bench_mining", "--child", str(folder)]
        command += ["--samples", str(count)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        answers.append(json.loads(answer.splitlines()[-1]))
        print(f"resume: {answers[-1]}", file=sys.stderr)
        for path in (folder / "scores").iterdir():  # the batch just scored
            if path.name > last.name:
                path.unlink()
    seconds = [a["seconds"] for a in answers]
    return {
        "task": "resume to the first image read",
        "size": [count],
        "parts": len(list((folder / "scores").iterdir())) + 1,
        "provider": MINE,
        "seconds": {
            **{f"p{q}": float(np.percentile(seconds, q)) for q in (20, 50, 80)},
            "repeats": len(seconds),
        },
        "peak_mib": max(a["peak_mib"] for a in answers),
    }


def main() -> None:
    """Measure, write the JSON, print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000_000, help="of the long run")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where the runs are for the time being")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure_resume(options.child, options.samples)))
        return
    with tempfile.TemporaryDirectory(prefix="fastpie-bench-", dir=options.folder) as name:
        films, run = Path(name, "films"), Path(name, "run")
        films.mkdir()
        rows = [measure_added(films, options.repeats)]
        print(
            f"{MINE} adds {rows[0]['added']:.2%}; {rows[0]['outside_stages']:.2%}", file=sys.stderr
        )
        rows.append(resumes(run, options.samples, min(3, options.repeats)))
    path = harness.write_results("mining", rows, packages=("numpy", "pillow", "pyarrow"))
    print(json.dumps(rows, indent=1))
    print(path)


if __name__ == "__main__":
    main()
