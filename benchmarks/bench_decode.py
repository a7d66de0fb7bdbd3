"""Decoding and the cache against a plain DataLoader with Pillow, on films of 1024 x 1024.

Ours is read as mine() reads it, by its own workers: decoded integers between the processes,
normalised once a batch. The plain data set does what most code does, in as many workers of a
DataLoader: Pillow, RGB, resize, fp32, normalise. Run: `python -m benchmarks.bench_decode`.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import harness
from fastpie.data import ManifestDataset, Preprocessing
from fastpie.mining.plan import Plan
from fastpie.mining.reading import Kind, Reader

PREPROCESSING = Preprocessing(
    size=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
CACHED_PASSES = 8  # over the cache in one measurement: one is over before the workers have begun
PLAIN = "DataLoader with Pillow"


class PillowDataset(Dataset[Tensor]):
    """Today's usual loader."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.mean, self.std = (
            torch.tensor(v).view(3, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std)
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            if image.mode.startswith("I"):
                grey = Image.fromarray(np.asarray(image, dtype=np.float32) / 65535)
                values = np.asarray(grey.resize((224, 224), Image.Resampling.BILINEAR))
                x = torch.from_numpy(np.repeat(values[None], 3, axis=0))
            else:
                rgb = image.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
                x = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).to(torch.float32) / 255
        return (x - self.mean) / self.std


def film(generator: np.random.Generator) -> np.ndarray:  # [1024, 1024], in [0, 1]
    """What compresses like a chest film: soft shadows, ribs, fine grain."""
    y, x = np.mgrid[0:1024, 0:1024] / 512 - 1
    lungs = sum(
        np.exp(-(((x - side) / 0.3) ** 2) - ((y + 0.05) / 0.6) ** 2) for side in (-0.45, 0.45)
    )
    ribs = 0.06 * np.sin(26 * (y + 0.4 * x**2) + generator.uniform(0, 6)) * (lungs > 0.25)
    grain = generator.normal(0, 0.004, x.shape)
    return np.clip(0.85 - 0.55 * lungs + ribs + 0.1 * generator.uniform() + grain, 0, 1)


def write_films(folder: Path, kind: str, count: int) -> list[Path]:
    """16-bit PNG or 8-bit JPEG files."""
    generator = np.random.default_rng(0)
    paths = []
    for index in range(count):
        values = film(generator)
        if kind == "16-bit PNG":
            paths.append(folder / f"{index:04d}.png")
            Image.fromarray((values * 65535).astype(np.uint16)).save(paths[-1])
        else:
            paths.append(folder / f"{index:04d}.jpg")
            Image.fromarray((values * 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def write_manifest(folder: Path, paths: list[Path], count: int) -> Path:
    """Every film again and again, under another id, until there are enough samples."""
    rows = [f"{index:06d},{paths[index % len(paths)].name}" for index in range(count)]
    (folder / "data.csv").write_text("sample_id,path\n" + "\n".join(rows))
    return folder / "data.csv"


def plain_seconds(data: PillowDataset, workers: int, batch: int) -> float:
    """For an image, in a pass through a DataLoader; worker start included."""
    begin = time.perf_counter()
    for _ in DataLoader(data, batch_size=batch, num_workers=workers):
        pass
    return (time.perf_counter() - begin) / len(data)


def mined_seconds(data: ManifestDataset, workers: int, batch: int, passes: int) -> float:
    """For an image, in passes as mine() makes them; worker start included."""
    reader = Reader(data, batch_size=batch, num_workers=workers)
    plan = Plan.cut(data.sample_ids, batch)
    order = [plan.positions(b) for b in range(plan.batches)] * passes
    like = Kind([[3, 224, 224]], None)
    begin = time.perf_counter()
    for read in reader.read(plan, order, like=like):
        if read.problems:
            raise SystemExit(f"not read: {read.problems[0]}")
        reader.normalize(read.images)
    return (time.perf_counter() - begin) / len(data) / passes


def rows_of(
    kind: str, films: int, count: int, workers: int, batch: int, repeats: int
) -> list[dict[str, Any]]:
    """First pass and cache against the plain loader."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_films(folder, kind, films)
        manifest = write_manifest(folder, paths, count)
        plain = PillowDataset([paths[index % films] for index in range(count)])

        def opened(cache: str) -> ManifestDataset:
            return ManifestDataset(manifest, preprocessing=PREPROCESSING, cache=folder / cache)

        def first_pass() -> float:
            shutil.rmtree(folder / "new", ignore_errors=True)
            return mined_seconds(opened("new"), workers, batch, 1)

        kept = opened("kept")
        mined_seconds(kept, workers, batch, 1)
        for index in range(films):
            off = (kept[index][0] - plain[index]).abs().max()
            if off > 1e-4:
                raise SystemExit(f"{paths[index].name} differs by {off}: the loaders are not alike")
        providers = {
            PLAIN: lambda: plain_seconds(plain, workers, batch),
            "ManifestDataset, first pass": first_pass,
            # Its better setting: to hand an image over costs more than to read it.
            "ManifestDataset, from the cache, no workers": lambda: mined_seconds(
                kept, 0, batch, CACHED_PASSES
            ),
        }
        timings = harness.interleave(
            providers, repeats=repeats, seconds=40, warm_up=1, timed=lambda call: call()
        )
    case = {
        "format": f"{kind}, 1024 x 1024",
        "size": [3, 224, 224],
        "images": count,
        "workers": workers,
        "batch": batch,
        "precision": "fp32",
        "task": "decode, seconds an image",
    }
    return [harness.row(case, timings, p, PLAIN) for p in providers if p != PLAIN]


def main() -> None:
    """Measure, write the JSON, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--films", type=int, default=32, help="files of each format")
    parser.add_argument("--images", type=int, default=256, help="samples, which share the files")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="by default that of mine()")
    parser.add_argument("--repeats", type=int, default=5)
    o = parser.parse_args()
    rows = [
        row
        for kind in ("16-bit PNG", "8-bit JPEG")
        for row in rows_of(kind, o.films, o.images, o.workers, o.batch, o.repeats)
    ]
    path = harness.write_results("decode", rows, packages=("pillow", "numpy", "xxhash"))
    for r in rows:
        print(
            f"{r['format']}: {r['provider']} {r['seconds']['p50'] * 1e3:.2f} ms an image, "
            f"{r['ratio']}x {r['baseline']}"
        )
    print(path)


if __name__ == "__main__":
    main()
