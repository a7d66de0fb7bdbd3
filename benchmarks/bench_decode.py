"""Decoding and the cache against a plain DataLoader with Pillow, on films of 1024 x 1024.

Batches as mine() reads them: decoded integers between the processes, normalised once a batch. The
plain data set does what most code does: Pillow, RGB, resize, fp32, normalise, in the workers. Run:
`python -m benchmarks.bench_decode`.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import harness
from fastpie.data import ManifestDataset, Preprocessing

PREPROCESSING = Preprocessing(
    size=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
CACHED_PASSES = 16  # over the cache in one measurement: one is over before the workers have begun
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


class RawDataset(Dataset[Tensor]):
    """The images that mine() reads of a ManifestDataset."""

    def __init__(self, data: ManifestDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.data.raw(index)[0]
        return image


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
    (folder / "data.csv").write_text("path\n" + "".join(f"{p.name}\n" for p in paths))
    return paths


def seconds_an_image(
    data: Dataset[Tensor], workers: int, batch: int, passes: int, normalize: Callable[..., Tensor]
) -> float:
    """Of a pass through a DataLoader, worker start included."""
    order = list(range(len(data))) * passes  # type: ignore[arg-type]
    begin = time.perf_counter()
    for images in DataLoader(data, batch_size=batch, sampler=order, num_workers=workers):
        normalize(images)
    return (time.perf_counter() - begin) / len(order)


def rows_of(kind: str, count: int, workers: int, batch: int, repeats: int) -> list[dict[str, Any]]:
    """First pass and cache against the plain loader."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_films(folder, kind, count)
        plain = PillowDataset(paths)
        kept = ManifestDataset(
            folder / "data.csv", preprocessing=PREPROCESSING, cache=folder / "kept"
        )
        for index in range(count):
            off = (kept[index][0] - plain[index]).abs().max()
            if off > 1e-4:
                raise SystemExit(f"{paths[index].name} differs by {off}: the loaders are not alike")

        def first_pass() -> float:
            shutil.rmtree(folder / "new", ignore_errors=True)
            data = ManifestDataset(
                folder / "data.csv", preprocessing=PREPROCESSING, cache=folder / "new"
            )
            return seconds_an_image(RawDataset(data), workers, batch, 1, data.normalize)

        providers = {
            PLAIN: lambda: seconds_an_image(plain, workers, batch, 1, lambda x: x),
            "ManifestDataset, first pass": first_pass,
            "ManifestDataset, from the cache": lambda: seconds_an_image(
                RawDataset(kept), workers, batch, CACHED_PASSES, kept.normalize
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
    parser.add_argument("--images", type=int, default=64, help="files of each format")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows = [
        row
        for kind in ("16-bit PNG", "8-bit JPEG")
        for row in rows_of(kind, options.images, options.workers, options.batch, options.repeats)
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
