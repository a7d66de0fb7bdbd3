"""Images with planted truth: which labels are wrong, which images are corrupted, rare or faint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.quality import film, skin
from benchmarks.quality.painting import corrupt

__all__ = ["KINDS", "SETS", "Planted", "make"]

# What can be planted in an image, and in how many of them; no image carries two.
FRACTIONS = {"wrong label": 0.10, "corrupted": 0.03, "rare kind": 0.03, "faint": 0.04}
KINDS = tuple(FRACTIONS)


@dataclass(frozen=True)
class Planted:
    """A training set with planted truth, and a clean test set.

    Attributes:
        images: fp32 [N, channels, H, W].
        labels: as the user has them: int64 [N], or fp32 [N, C] of 1 and 0.
        kind: int64 [N], an index into `KINDS`, -1 for nothing planted.
        test_images: fp32 [M, channels, H, W].
        test_labels: all right.
        classes: C.
        multilabel: whether an image has several labels.
        masks: bool [N, H, W] of lesions, or None.
        test_masks: bool [M, H, W], or None.
    """

    images: np.ndarray
    labels: np.ndarray
    kind: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: int
    multilabel: bool
    masks: np.ndarray | None = None
    test_masks: np.ndarray | None = None

    def has(self, kind: str) -> np.ndarray:  # bool [N]
        """Which images have `kind` planted in them."""
        planted: np.ndarray = self.kind == KINDS.index(kind)
        return planted


def digits(seed: int, size: int | None = None) -> Planted:
    """scikit-learn's handwritten digits, 8 x 8.

    Rare kind: a 2, 4 or 7 lying on its side. Faint: two fifths of another class's image over it. Labels of both are
    right.

    Args:
        seed: of the split and of all that is planted.
        size: images for training, by default 1,500; the remaining ones are the test set.
    """
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(seed)
    source = load_digits()
    order = rng.permutation(len(source.target))
    pixels = (source.images[order] / 8 - 1).astype(np.float32)
    truth = source.target[order].astype(np.int64)
    n = size or 1500
    kind = _plant(rng, n, {"rare kind": np.isin(truth[:n], (2, 4, 7))})
    images = pixels[:n].copy()
    rare = kind == KINDS.index("rare kind")
    images[rare] = np.rot90(images[rare], axes=(1, 2))
    for i in np.flatnonzero(kind == KINDS.index("faint")):
        other = rng.choice(np.flatnonzero(truth[:n] != truth[i]))
        images[i] = 0.6 * pixels[i] + 0.4 * pixels[other]
    for i in np.flatnonzero(kind == KINDS.index("corrupted")):
        images[i] = corrupt(rng, images[i], low=-1.0, high=1.0, blur=1.2)
    labels = truth[:n].copy()
    wrong = kind == KINDS.index("wrong label")
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, wrong.sum())) % 10
    return Planted(
        images[:, None], labels, kind, pixels[n:, None], truth[n:], classes=10, multilabel=False
    )


def chest_film(seed: int, size: int | None = None) -> Planted:
    """Generated films of 20 findings that go together, the commonest 100 times as common as the rarest.

    Rare kind: the commonest finding with another look. Faint: findings at a third of their contrast.
    Wrong label: a finding taken from the labels or put there.
    """
    rng = np.random.default_rng([seed, 1])
    n, m = size or 1500, (size or 1500) // 3
    world = film.World(rng)
    truth = world.findings(rng, n + m)
    kind = _plant(rng, n, {"rare kind": truth[:n, world.commonest] > 0, "faint": truth[:n].any(1)})
    look = np.concatenate([kind, np.full(m, -1)])
    images = world.paint(rng, truth, look == KINDS.index("rare kind"), look == KINDS.index("faint"))
    for i in np.flatnonzero(kind == KINDS.index("corrupted")):
        images[i] = corrupt(rng, images[i], low=0.0, high=1.0, blur=3.0)
    labels = truth[:n].copy()
    for i in np.flatnonzero(kind == KINDS.index("wrong label")):
        labels[i] = world.mislabel(rng, labels[i])
    images = (images[:, None] - 0.5) * 4
    return Planted(
        images[:n], labels, kind, images[n:], truth[n:], classes=film.CLASSES, multilabel=True
    )


def skin_lesion(seed: int, size: int | None = None) -> Planted:
    """Generated photographs of six classes of skin lesions with masks.

    Rare kind: a ring, in two of the classes. Faint: a lesion hardly darker than the skin.
    """
    rng = np.random.default_rng([seed, 2])
    n, m = size or 1500, (size or 1500) // 3
    truth = rng.integers(0, skin.CLASSES, n + m)
    kind = _plant(rng, n, {"rare kind": np.isin(truth[:n], (0, 3))})
    look = np.concatenate([kind, np.full(m, -1)])
    images, masks = skin.paint(
        rng, truth, look == KINDS.index("rare kind"), look == KINDS.index("faint")
    )
    for i in np.flatnonzero(kind == KINDS.index("corrupted")):
        images[i] = corrupt(rng, images[i], low=0.0, high=1.0, blur=3.0)
    labels = truth[:n].copy()
    wrong = kind == KINDS.index("wrong label")
    labels[wrong] = (labels[wrong] + rng.integers(1, skin.CLASSES, wrong.sum())) % skin.CLASSES
    images = (images - 0.5) * 4
    return Planted(
        images[:n], labels, kind, images[n:], truth[n:],
        classes=skin.CLASSES, multilabel=False, masks=masks[:n], test_masks=masks[n:],
    )  # fmt: skip


SETS: dict[str, Callable[..., Planted]] = {
    "digits": digits,
    "chest film": chest_film,
    "skin lesion": skin_lesion,
}


def make(name: str, seed: int, size: int | None = None) -> Planted:
    """The set of a name; the same for the same seed."""
    return SETS[name](seed, size)


def _plant(
    rng: np.random.Generator, n: int, eligible: dict[str, np.ndarray]
) -> np.ndarray:  # int64 [n]
    """Choose which image carries what, each kind among those eligible for it."""
    kind = np.full(n, -1, dtype=np.int64)
    order: Sequence[str] = sorted(KINDS, key=lambda name: name not in eligible)  # choosy ones first
    for name in order:
        free = np.flatnonzero((kind < 0) & eligible.get(name, np.ones(n, dtype=bool)))
        count = min(round(FRACTIONS[name] * n), len(free))
        kind[rng.choice(free, count, replace=False)] = KINDS.index(name)
    return kind
