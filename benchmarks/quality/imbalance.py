"""Training sets with imbalance that labels show and imbalance that they do not, and tests that tell.

Each set has a long tail of classes, wrong labels, and *groups* inside the classes that no label names: a rare kind,
a rare tone of skin. The test sets hold every class and every group in number, so that what a training
does for the common, for rare classes and for rare groups can be told apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.quality import film, skin

__all__ = ["SETS", "Imbalanced", "make"]

WRONG = 0.05  # of the labels
COMMON = "common"


@dataclass(frozen=True)
class Imbalanced:
    """A training set, and a clean test set of all groups.

    Attributes:
        images: fp32 [N, channels, H, W].
        labels: int64 [N], or fp32 [N, C] of 1 and 0; some wrong.
        masks: bool [N, H, W] of lesions, some wrong, or None.
        group: int64 [N], an index into `groups`; known to the controls alone.
        wrong: bool [N], whether the label (or mask) is wrong; likewise.
        test_images: fp32 [M, channels, H, W].
        test_labels: all right.
        test_masks: likewise.
        test_group: int64 [M].
        groups: names; the first is the common one.
        task: "multiclass", "multilabel" or "segmentation": what is trained.
        classes: C.
    """

    images: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None
    group: np.ndarray
    wrong: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    test_masks: np.ndarray | None
    test_group: np.ndarray
    groups: tuple[str, ...]
    task: str
    classes: int

    @property
    def counts(self) -> np.ndarray:  # [C]
        """Training samples of each class, by the labels as they are."""
        if self.labels.ndim == 2:
            return self.labels.sum(0)
        return np.bincount(self.labels, minlength=self.classes)


def digits(seed: int) -> Imbalanced:
    """scikit-learn's digits, the commonest class 50 times as common as the rarest.

    Which class is how common differs from seed to seed. Group: an eighth of the four commonest classes
    lies on its side; of the test images of these classes each is there both ways.
    """
    from sklearn.datasets import load_digits

    rng = np.random.default_rng([seed, 10])
    source = load_digits()
    order = rng.permutation(len(source.target))
    pixels = (source.images[order] / 8 - 1).astype(np.float32)
    truth = source.target[order].astype(np.int64)
    rank = rng.permutation(10)  # of each class, 0 is the commonest
    train, test = [], []
    for c in range(10):
        of_class = np.flatnonzero(truth == c)
        test.append(of_class[:50])
        train.append(of_class[50 : 50 + round(124 * 50 ** (-rank[c] / 9))])
    seen, unseen = np.concatenate(train), np.concatenate(test)
    head = np.flatnonzero(rank < 4)
    lying = _some(rng, len(seen), 1 / 30, np.isin(truth[seen], head))
    images = pixels[seen].copy()
    images[lying] = np.rot90(images[lying], axes=(1, 2))
    again = unseen[np.isin(truth[unseen], head)]
    test_images = np.concatenate([pixels[unseen], np.rot90(pixels[again], axes=(1, 2))])
    wrong = _some(rng, len(seen), WRONG, ~lying)
    return Imbalanced(
        images=images[:, None],
        labels=_flipped(rng, truth[seen], wrong, 10),
        masks=None,
        group=lying.astype(np.int64),
        wrong=wrong,
        test_images=test_images[:, None],
        test_labels=np.concatenate([truth[unseen], truth[again]]),
        test_masks=None,
        test_group=np.repeat([0, 1], [len(unseen), len(again)]),
        groups=(COMMON, "on its side"),
        task="multiclass",
        classes=10,
    )


def chest_film(seed: int) -> Imbalanced:
    """Generated films of 20 findings, the commonest 100 times as common as the rarest.

    Group: in a twelfth of the films with the commonest finding it has another look; half of those in the test.
    """
    rng = np.random.default_rng([seed, 11])
    n, m = 1500, 1500
    world = film.World(rng)
    truth = world.findings(rng, n + m)
    has = truth[:, world.commonest] > 0
    rare = np.concatenate([_some(rng, n, 1 / 40, has[:n]), _some(rng, m, 1 / 2, has[n:])])
    images = (world.paint(rng, truth, rare, np.zeros(n + m, bool))[:, None] - 0.5) * 4
    wrong = _some(rng, n, WRONG, ~rare[:n])
    labels = truth[:n].copy()
    for i in np.flatnonzero(wrong):
        labels[i] = world.mislabel(rng, labels[i])
    group = rare.astype(np.int64)
    return Imbalanced(
        images=images[:n], labels=labels, masks=None, group=group[:n], wrong=wrong,
        test_images=images[n:], test_labels=truth[n:], test_masks=None, test_group=group[n:],
        groups=(COMMON, "another look"), task="multilabel", classes=film.CLASSES,
    )  # fmt: skip


def skin_classes(seed: int) -> Imbalanced:
    """Photographs of six classes of lesions, the commonest 20 times as common as the rarest, with masks.

    Groups: 4 % are ring-shaped and 4 % are on dark skin; the test has as many of each as of the common.
    """
    rng = np.random.default_rng([seed, 12])
    rank = rng.permutation(skin.CLASSES)
    counts = np.round(500 * 20.0 ** (-rank / (skin.CLASSES - 1))).astype(int)
    seen = rng.permutation(np.repeat(np.arange(skin.CLASSES), counts))
    return _skin(rng, seen, "multiclass")


def skin_masks(seed: int) -> Imbalanced:
    """The same groups for segmentation: classes are equally common there, masks are the labels.

    A wrong mask is another image's.
    """
    rng = np.random.default_rng([seed, 13])
    return _skin(rng, rng.integers(0, skin.CLASSES, 1000), "segmentation")


def _skin(rng: np.random.Generator, seen: np.ndarray, task: str) -> Imbalanced:
    n, each = len(seen), 300
    truth = np.concatenate([seen, rng.integers(0, skin.CLASSES, 3 * each)])
    group = np.concatenate([np.zeros(n, np.int64), np.repeat([0, 1, 2], each)])
    for place in (1, 2):
        group[:n][_some(rng, n, 0.04, group[:n] == 0)] = place
    dark = skin.TONES - 1
    tone = np.where(group == 2, dark, rng.integers(0, dark, len(truth)))
    images, masks = skin.paint(rng, truth, group == 1, np.zeros(len(truth), bool), tone)
    wrong = _some(rng, n, WRONG, group[:n] == 0)
    labels, given = truth[:n], masks[:n].copy()
    if task == "segmentation":
        places = np.flatnonzero(wrong)
        given[places] = given[np.roll(places, 1)]
    else:
        labels = _flipped(rng, labels, wrong, skin.CLASSES)
    images = (images - 0.5) * 4
    return Imbalanced(
        images=images[:n], labels=labels, masks=given, group=group[:n], wrong=wrong,
        test_images=images[n:], test_labels=truth[n:], test_masks=masks[n:], test_group=group[n:],
        groups=(COMMON, "ring", "dark skin"), task=task, classes=skin.CLASSES,
    )  # fmt: skip


SETS: dict[str, Callable[[int], Imbalanced]] = {
    "digits": digits,
    "chest film": chest_film,
    "skin, classes": skin_classes,
    "skin, masks": skin_masks,
}


def make(name: str, seed: int) -> Imbalanced:
    """The set of a name; the same for the same seed."""
    return SETS[name](seed)


def _some(
    rng: np.random.Generator, count: int, fraction: float, eligible: np.ndarray
) -> np.ndarray:  # bool [count]
    """A fraction of those eligible, at least one."""
    places = np.flatnonzero(eligible)
    chosen = np.zeros(count, bool)
    chosen[rng.choice(places, max(1, round(fraction * len(places))), replace=False)] = True
    return chosen


def _flipped(
    rng: np.random.Generator, labels: np.ndarray, wrong: np.ndarray, classes: int
) -> np.ndarray:
    """Labels, those that are wrong any other class."""
    flipped = labels.copy()
    flipped[wrong] = (flipped[wrong] + rng.integers(1, classes, wrong.sum())) % classes
    return flipped
