"""A trial: one network trained on one set with one seed, and all that any score is made from.

Training is what takes time, so that a trial is kept in a file; scores are computed from it.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import KFold, StratifiedKFold
from torch import Tensor, nn

import fastpie
from benchmarks.quality.data import Planted, make
from benchmarks.quality.networks import Classifier
from benchmarks.quality.training import forward, train

__all__ = ["EARLY", "LADDER", "LEVELS", "Trial", "run_trial", "trial"]

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LADDER = (0.1, 0.3, 0.5, 0.7)
EPOCH_LEVEL = 0.5  # at which the pruned model is scored after each epoch
COMMITTEE = 6  # members of a committee of perturbed copies
NOISE = 0.3  # standard deviation of the noise on weights, of a layer's own
COMMITTEE_SPARSITY = 0.1
EARLY = 5  # epochs, of EL2N
EARLY_RUNS = 3
FOLDS = 5
CALIBRATION = 512  # images for BatchNorm statistics
VOG_EPOCHS = 5
SHIFT = {"digits": 0, "chest film": 1, "skin lesion": 1}  # pixels of augmentation
_SOURCES = (
    "data.py",
    "film.py",
    "skin.py",
    "painting.py",
    "networks.py",
    "training.py",
    "trials.py",
)

Trial = Mapping[str, np.ndarray]


def trial(folder: Path, data: str, network: str, seed: int, size: int | None = None) -> Trial:
    """The trial from `folder`, run now where it is not there for this code.

    Args:
        folder: for one file a trial.
        data: a name in `data.SETS`.
        network: a name in `networks.NETWORKS`.
        seed: of all.
        size: images for training, by default the set's own number.
    """
    path = folder / f"{data.replace(' ', '-')}-{network}-{seed}-{size or 'full'}-{_digest()}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.tmp")
        with part.open("wb") as file:
            np.savez(file, **run_trial(make(data, seed, size), network, seed, SHIFT[data]))
        part.replace(path)
    with np.load(path) as stored:
        return dict(stored)


def _digest() -> str:
    """Of the code that makes a trial, without its comments, layout and docstrings."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        tree = ast.parse((Path(__file__).parent / name).read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [  # type: ignore[attr-defined]
                    n for n in body
                    if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
                ]  # fmt: skip
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


def run_trial(data: Planted, network: str, seed: int, shift: int) -> dict[str, np.ndarray]:
    """Train, and keep the outputs that the scores need.

    Returns:
        dense [N, C], test [M, C]: outputs of the trained model.
        pruned, pruned_test [L, N, C] at `LEVELS`; raw, raw_test: without recalibration; random: of
            random masks at `LADDER`, recalibrated.
        noise, noise_recalibrated, random_committee, moved [K, N, C]: copies with noise on the weights, with
            random masks of 10 %, and the dense model on moved images.
        features, features_pruned [N, D]: means and standard deviations over the positions, of each
            stage, one stage behind the other; `widths` says how many columns each has.
        epochs, epochs_pruned, epochs_noise [E, N, C]: after each epoch; early
            [runs, N, C]: after `EARLY` epochs of further runs.
        folds [N, C]: by the model that did not see the image.
        vog [N]: variance of gradients.
    """
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    test = torch.from_numpy(data.test_images)
    calibration = images[:CALIBRATION]
    logs: dict[str, list[np.ndarray]] = {}
    gradients: list[np.ndarray] = []

    def record(epoch: int, model: Classifier) -> None:
        copies = {
            "epochs": model,
            "epochs_pruned": pruned_copies(model, [EPOCH_LEVEL], calibration)[0],
            "epochs_noise": noisy_copy(model, seed=epoch, calibration=calibration),
        }
        for name, net in copies.items():
            logs.setdefault(name, []).append(forward(net, images).numpy())
        if epoch % 3 == 2 and len(gradients) < VOG_EPOCHS:
            gradients.append(_input_gradients(model, images, labels))

    def start(run: int, **how: Any) -> Classifier:
        own = 1000 * seed + run
        return train(network, images, labels, classes=data.classes, seed=own, shift=shift, **how)

    model = start(0, after_epoch=record)
    kept = {name: np.stack(values) for name, values in logs.items()}
    early = [kept["epochs"][EARLY - 1]]
    early += [forward(start(run, stop=EARLY), images).numpy() for run in range(1, EARLY_RUNS)]
    kept["early"] = np.stack(early)
    kept["vog"] = _vog(gradients)
    kept["folds"] = _out_of_sample(data, network, seed, shift)

    kept["dense"], kept["test"] = forward(model, images).numpy(), forward(model, test).numpy()
    pruned = pruned_copies(model, LEVELS, calibration)
    raw = pruned_copies(model, LEVELS, None)
    groups = {
        "pruned": pruned,
        "raw": raw,
        "random": pruned_copies(model, LADDER, calibration, method="random", seed=seed),
        "noise": [noisy_copy(model, seed=k) for k in range(COMMITTEE)],
        "noise_recalibrated": [
            noisy_copy(model, seed=k, calibration=calibration) for k in range(COMMITTEE)
        ],
        "random_committee": [
            pruned_copies(model, [COMMITTEE_SPARSITY], calibration, method="random", seed=k)[0]
            for k in range(COMMITTEE)
        ],
    }
    for name, members in groups.items():
        kept[name] = np.stack([forward(member, images).numpy() for member in members])
    for name, members in (("pruned_test", pruned), ("raw_test", raw)):
        kept[name] = np.stack([forward(member, test).numpy() for member in members])
    moved = [torch.roll(images, move, (2, 3)) for move in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    kept["moved"] = np.stack([forward(model, m).numpy() for m in moved])
    kept["features"], kept["widths"] = features_of(model, images)
    kept["features_pruned"], _ = features_of(pruned[LEVELS.index(EPOCH_LEVEL)], images)
    return kept


def pruned_copies(
    model: Classifier,
    levels: Sequence[float],
    calibration: Tensor | None,  # [N, ...]: recalibrate with these
    **how: Any,
) -> list[Classifier]:
    """The pruned models of a ladder as networks of their own."""
    masks = fastpie.prune(model, list(levels), **how)
    dual = fastpie.DualModel(model, masks)
    if calibration is not None:
        dual.recalibrate(calibration.split(256))
    copies = []
    for level in range(len(dual.sparsities)):
        pruned = copy.deepcopy(model)
        pruned.load_state_dict(dual.pruned_state(level), strict=False)
        copies.append(pruned)
    return copies


def noisy_copy(model: Classifier, *, seed: int, calibration: Tensor | None = None) -> Classifier:
    """A copy with Gaussian noise on its convolutions and linear layers, recalibrated if asked."""
    noisy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    norms = []
    with torch.no_grad():
        for module in noisy.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                w = module.weight
                w += NOISE * w.std() * torch.randn(w.shape, generator=generator)
            if isinstance(module, nn.BatchNorm2d):
                norms.append(module)
        if calibration is not None:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain mean over the batches
            noisy.train()
            for batch in calibration.split(256):
                noisy(batch.contiguous(memory_format=torch.channels_last))
    return noisy.eval()


def features_of(model: Classifier, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations over the positions of each stage's output, and their widths."""
    parts: list[list[Tensor]] = [[] for _ in model.stages]
    with torch.inference_mode():
        for x in images.split(250):
            x = x.contiguous(memory_format=torch.channels_last)
            for place, stage in enumerate(model.stages):
                x = stage(x)
                flat = x.flatten(2)
                parts[place].append(torch.cat([flat.mean(2), flat.std(2, correction=0)], 1))
    stages = [torch.cat(part).numpy() for part in parts]
    return np.concatenate(stages, axis=1), np.array([s.shape[1] for s in stages])


def _out_of_sample(data: Planted, network: str, seed: int, shift: int) -> np.ndarray:  # [N, C]
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    kind = KFold if data.multilabel else StratifiedKFold
    folds = kind(FOLDS, shuffle=True, random_state=seed)
    outputs = np.empty((len(images), data.classes), np.float32)
    for fold, (seen, unseen) in enumerate(folds.split(data.images, data.labels)):
        model = train(
            network, images[seen], labels[seen],
            classes=data.classes, seed=1000 * seed + 100 + fold, shift=shift,
        )  # fmt: skip
        outputs[unseen] = forward(model, images[unseen]).numpy()
    return outputs


def _input_gradients(model: Classifier, images: Tensor, labels: Tensor) -> np.ndarray:
    """Of the label's logit (of several: their sum, those not given negative) by pixel, mean over channels."""
    parts = []
    for x, y in zip(images.split(250), labels.split(250), strict=True):
        x = x.clone().requires_grad_()
        z = model(x)
        chosen = z.gather(1, y[:, None]) if y.ndim == 1 else (2 * y - 1) * z
        parts.append(torch.autograd.grad(chosen.sum(), x)[0].mean(1).flatten(1))
    return torch.cat(parts).numpy()


def _vog(gradients: list[np.ndarray]) -> np.ndarray:  # [N]
    """Mean over pixels of the standard deviation over checkpoints (arXiv 2008.11600, eq. 3)."""
    result: np.ndarray = np.stack(gradients).std(0).mean(1)
    return result
