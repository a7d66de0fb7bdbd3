"""`fastpie demo`: the main job end to end on real images.

scikit-learn's handwritten digits, made long-tailed and with a tenth of the labels wrong. The truth is
kept aside and used only to say how many of the wrong labels each score finds.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from fastpie._files import write_atomically
from fastpie.analysis import analyze, label_in_doubt
from fastpie.data import ManifestDataset, Preprocessing
from fastpie.dual import DualModel, stage_features
from fastpie.errors import FastpieError
from fastpie.mining import DEFAULT_LADDER, mine
from fastpie.mining.restore import dual_of_run
from fastpie.pruning import prune
from fastpie.report import write_report
from fastpie.training import hardness_weights

__all__ = ["run_demo", "small_resnet"]

CLASSES = 10
TAIL = (7, 8, 9)  # the three rarest classes
IMBALANCE = 20  # the commonest class has 20 times the images of the rarest
WRONG_LABELS = 0.10
TEST_PER_CLASS = 50
EPOCHS = 30
GUARD = 0.05  # hardest fraction that the guarded run leaves out as doubtful
PREPROCESSING = Preprocessing(channels=1)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a skip (He et al., arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:  # [N, inputs, H, W] -> [N, outputs, H', W']
        """Residual and skip, summed."""
        residual = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(residual + self.skip(x))


def small_resnet() -> nn.Module:
    """A residual network of 77,000 parameters for 8 x 8 grey images and 10 classes."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        ResidualBlock(16, 16, 1),
        ResidualBlock(16, 32, 2),
        ResidualBlock(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


@dataclass(frozen=True)
class DemoData:
    """A long-tailed training set with wrong labels, a balanced test set, and the truth.

    Attributes:
        train: as a user has it: files and labels, some of them wrong.
        wrong: sample ids of the wrong labels.
        images: of the training set, fp32 [N, 1, 8, 8], in the order of `train`.
        labels: int64 [N], some wrong.
        test_images: fp32 [M, 1, 8, 8].
        test_labels: int64 [M], all right.
    """

    train: ManifestDataset
    wrong: set[str]
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def make_data(folder: Path, seed: int) -> DemoData:
    """Write the images as PNG files with a manifest each for training and test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FastpieError(
            "Expected scikit-learn, whose digits the demo uses; pip install 'fastpie[demo]'."
        ) from error
    digits = load_digits()
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(digits.target))
    train, test = [], []
    for c in range(CLASSES):
        of_class = order[digits.target[order] == c]
        test += list(of_class[:TEST_PER_CLASS])
        available = len(of_class) - TEST_PER_CLASS
        kept = round(available * IMBALANCE ** (-c / (CLASSES - 1)))
        train += list(of_class[TEST_PER_CLASS : TEST_PER_CLASS + kept])
    wrong = set(generator.permutation(train)[: int(WRONG_LABELS * len(train))].tolist())
    labels = {
        i: int((digits.target[i] + generator.integers(1, CLASSES)) % CLASSES)
        if i in wrong
        else int(digits.target[i])
        for i in (*train, *test)
    }
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in labels:
        pixels = np.round(digits.images[i] * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"digit-{i:04d}.png")
    for name, members in (("train", train), ("test", test)):
        rows = [f"images/digit-{i:04d}.png,{labels[i]},digit-{i:04d}\n" for i in sorted(members)]
        (folder / f"{name}.csv").write_text("path,label,sample_id\n" + "".join(rows))
    sets = {
        name: ManifestDataset(folder / f"{name}.csv", labels="label", preprocessing=PREPROCESSING)
        for name in ("train", "test")
    }
    tensors = {}
    for name, data in sets.items():
        items = [data[i] for i in range(len(data))]
        tensors[name] = (
            torch.stack([image for image, _, _ in items]),
            torch.tensor([label for _, label, _ in items]),
        )
    return DemoData(
        sets["train"], {f"digit-{i:04d}" for i in wrong}, *tensors["train"], *tensors["test"]
    )


def train(
    images: Tensor,  # [N, 1, 8, 8]
    labels: Tensor,  # [N]
    *,
    seed: int,
    weights: Tensor | None = None,  # [N]
) -> nn.Module:
    """Train a fresh network, each sample's loss times its weight where weights are given."""
    torch.manual_seed(seed)
    model = small_resnet()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(
            images, labels, torch.ones(len(labels)) if weights is None else weights
        ),
        batch_size=64,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )
    optimizer = torch.optim.SGD(
        model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.05, total_steps=EPOCHS * len(loader)
    )
    for _ in range(EPOCHS):
        for x, y, w in loader:
            down, right = torch.randint(-1, 2, (2,)).tolist()
            x = torch.roll(x, (down, right), (2, 3))  # a shift by one pixel; the border is empty
            loss = (functional.cross_entropy(model(x), y, reduction="none") * w).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def run_demo(out: Path, *, seeds: int = 3, progress: bool | None = None) -> dict[str, Any]:
    """Train, prune, mine, report and train again, and say what came of it.

    Args:
        out: folder for everything; an earlier demo in it is replaced.
        seeds: repetitions; the report and the tables that stay are the first one's.
        progress: whether to show bars.

    Returns:
        `accuracy` (rows of plain and attended training), `found` (precision for the wrong labels),
        `images_per_second`, `samples`, `report`, `table`.

    Raises:
        FastpieError: if `out` holds something that is not an earlier demo.
    """
    _clear(out)
    accuracies: dict[str, list[tuple[float, float]]] = {}
    found: dict[str, list[tuple[float, float]]] = {}
    speeds = []
    for seed in range(seeds):
        folder = out if seed == 0 else out / "repeats" / str(seed)
        data = make_data(folder, seed)
        plain = train(data.images, data.labels, seed=seed)
        if seed == 0:
            write_atomically(folder / "model.safetensors", save(plain.state_dict()))

        runs = {}
        for method in ("l1", "random"):
            masks = prune(plain, DEFAULT_LADDER, method=method, seed=seed)
            run = folder / ("run" if method == "l1" else "run-random-masks")
            features = stage_features(plain, data.images[:1]) if method == "l1" else None
            start = time.perf_counter()
            runs[method] = mine(
                DualModel(plain, masks, features=features),
                data.train,
                run,
                keep_logits=True,
                keep_features="dense" if features else False,
                progress=progress,
            )
            if method == "l1":
                speeds.append(len(data.train) / (time.perf_counter() - start))
        if seed == 0:
            analysis = analyze(runs["l1"], control=runs["random"], dataset=data.train)
            analysis.save(folder / "run" / "analysis")
            dual = dual_of_run(runs["l1"], plain)
            report = write_report(runs["l1"], analysis=analysis, dataset=data.train, dual=dual)

        doubt = label_in_doubt(runs["l1"]).samples.sort_by([("label_in_doubt", "descending")])
        found.setdefault(DOUBT, []).append(_precisions(doubt["sample_id"].to_pylist(), data.wrong))
        for name, (run_name, column) in SCORES.items():
            ids = runs[run_name].select(1.0, by=column)
            found.setdefault(name, []).append(_precisions(ids, data.wrong))
        trained = {"plain": plain}
        for name, doubtful in (
            ("attended", 0.0),
            (f"attended, hardest {GUARD:.0%} left out", GUARD),
        ):
            by_id = hardness_weights(runs["l1"], doubtful=doubtful)
            weights = torch.tensor([by_id[i] for i in data.train.sample_ids])
            trained[name] = train(data.images, data.labels, seed=seed, weights=weights)
        for name, model in trained.items():
            accuracies.setdefault(name, []).append(_accuracy(model, data))
    result = {
        "samples": len(data.train),
        "wrong_labels": len(data.wrong),
        "seeds": seeds,
        "accuracy": [
            {"training": name, "overall": _mean(rows, 0), "tail_classes": _mean(rows, 1)}
            for name, rows in accuracies.items()
        ],
        "found": [
            {
                "score": name,
                "precision_at_5_percent": _mean(rows, 0),
                "precision_at_10_percent": _mean(rows, 1),
            }
            for name, rows in found.items()
        ],
        "images_per_second": round(float(np.median(speeds)), 1),
        "report": str(report),
        "table": str(out / "run" / "scores"),
    }
    write_atomically(out / "demo.json", (json.dumps(result, indent=2) + "\n").encode())
    return result


DOUBT = "fastpie label in doubt (probe in early features)"

# The columns that look for the wrong labels too: (run, column).
SCORES = {
    "fastpie hardness (pruned loss, mean over the ladder)": ("l1", "hardness"),
    "fastpie pruned margin, mean over the ladder": ("l1", "margin_pruned"),
    "js (dense against pruned, no label used)": ("l1", "js"),
    "control: final loss of the dense model": ("l1", "loss_dense"),
    "control: hardness with random masks": ("random", "hardness"),
}


def _precisions(ids: list[str], wrong: set[str]) -> tuple[float, float]:
    """Of the first 5 and 10 %, how many have a wrong label."""

    def precision(count: int) -> float:
        return sum(i in wrong for i in ids[:count]) / count

    return precision(int(0.05 * len(ids))), precision(int(0.10 * len(ids)))


@torch.no_grad()
def _accuracy(model: nn.Module, data: DemoData) -> tuple[float, float]:
    right = model(data.test_images).argmax(1) == data.test_labels
    tail = torch.isin(data.test_labels, torch.tensor(TAIL))
    return right.float().mean().item(), right[tail].float().mean().item()


def _mean(rows: list[tuple[float, float]], column: int) -> float:
    return round(float(np.mean([row[column] for row in rows])), 4)


def _clear(out: Path) -> None:
    """Remove an earlier demo, and nothing else."""
    mark = out / ".fastpie-demo"
    if out.exists() and any(out.iterdir()):
        if not mark.is_file():
            raise FastpieError(
                f"Expected an empty folder or an earlier demo at {out}, but it holds other files."
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()  # first, so that an interrupted demo is still one
