"""Generated chest films: 20 findings with a long tail and co-occurrence."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import norm

from benchmarks.quality.painting import smooth_noise

__all__ = ["CLASSES", "SIZE", "World"]

CLASSES = 20
SIZE = 32
HEAD, RATIO = (
    0.30,
    100,
)  # prevalence of the commonest finding, and how many times the rarest's it is
FACTORS = 3  # of the latent cause that findings share
FAINT = 0.33  # of the contrast


class World:
    """What is the same in all films of one seed: which sign is how common, which go together."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.prevalence = HEAD * RATIO ** (-rng.permutation(CLASSES) / (CLASSES - 1))
        self.commonest = int(self.prevalence.argmax())
        loading = rng.normal(0, 0.5, (CLASSES, FACTORS))
        self.loading = loading / np.sqrt(1 + (loading**2).sum(1, keepdims=True))

    def findings(self, rng: np.random.Generator, count: int) -> np.ndarray:  # fp32 [count, C]
        """True labels: a probit model whose latent variables share three factors."""
        own = np.sqrt(1 - (self.loading**2).sum(1))
        latent = rng.standard_normal((count, FACTORS)) @ self.loading.T
        latent += own * rng.standard_normal((count, CLASSES))
        labels: np.ndarray = (latent < norm.ppf(self.prevalence)).astype(np.float32)
        return labels

    def mislabel(self, rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
        """One finding taken away or, as often where there is one, put there."""
        changed = labels.copy()
        present = np.flatnonzero(labels)
        if len(present) and rng.random() < 0.5:
            changed[rng.choice(present)] = 0
        else:
            chance = self.prevalence * (1 - labels)
            changed[rng.choice(CLASSES, p=chance / chance.sum())] = 1
        return changed

    def paint(
        self,
        rng: np.random.Generator,
        labels: np.ndarray,  # [N, C]
        rare: np.ndarray,  # bool [N]: the commonest finding has another look
        faint: np.ndarray,  # bool [N]
    ) -> np.ndarray:  # fp32 [N, SIZE, SIZE] in [0, 1]
        """Films with their findings."""
        images = _bodies(rng, len(labels))
        for i, c in zip(*np.nonzero(labels), strict=True):
            sign = _SIGNS[c] if not (rare[i] and c == self.commonest) else _star
            half = rng.uniform(3.5, 5.0)
            side = rng.choice((-1, 1))
            center = (SIZE * rng.uniform(0.25, 0.75), SIZE * (0.5 + side * rng.uniform(0.14, 0.30)))
            contrast = rng.uniform(0.4, 0.7) * (FAINT if faint[i] else 1)
            _draw(images[i], sign, center, half, contrast, rng)
        clipped: np.ndarray = np.clip(images, 0, 1)
        return clipped


def _bodies(rng: np.random.Generator, count: int) -> np.ndarray:
    """Two dark lungs, a spine and ribs on texture, each a little different."""
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j].astype(np.float32)
    shift = rng.normal(0, 0.04, (2, count, 1, 1)).astype(np.float32)
    width = rng.uniform(0.26, 0.36, (count, 1, 1)).astype(np.float32)
    y, x = y[None] + shift[0], x[None] + shift[1]
    lungs = np.zeros((count, SIZE, SIZE), np.float32)
    for side in (-0.43, 0.43):
        inside = ((x - side) / width) ** 2 + (y / 0.75) ** 2
        lungs += 1 / (1 + np.exp(np.clip(12 * (inside - 1), -30, 30)))
    ribs = np.sin(18 * (y + 0.35 * x**2) + rng.uniform(0, 6.3, (count, 1, 1)))
    spine = np.exp(-((x / 0.1) ** 2))
    texture = 0.05 * smooth_noise(rng, count, SIZE, 0.8) + 0.04 * smooth_noise(rng, count, SIZE, 4)
    exposure = rng.normal(0, 0.04, (count, 1, 1))
    body = 0.6 - 0.3 * lungs + 0.04 * lungs * ribs + 0.15 * spine + texture + exposure
    result: np.ndarray = body.astype(np.float32)
    return result


Sign = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of y and x, the sign's box being [-1, 1]


def _draw(
    image: np.ndarray,  # [SIZE, SIZE], changed
    sign: Sign,
    center: tuple[float, float],
    half: float,
    contrast: float,
    rng: np.random.Generator,
) -> None:
    top, left = (max(0, int(c - 1.5 * half)) for c in center)
    bottom, right = (min(SIZE, int(c + 1.5 * half) + 2) for c in center)
    y, x = np.mgrid[top:bottom, left:right]
    y, x = (y - center[0]) / half, (x - center[1]) / half
    turn = rng.normal(0, 0.12)
    y, x = y * np.cos(turn) + x * np.sin(turn), x * np.cos(turn) - y * np.sin(turn)
    image[top:bottom, left:right] += (contrast * sign(y, x)).astype(np.float32)


def _edge(distance: np.ndarray) -> np.ndarray:
    """1 inside (below 0), 0 outside, with a soft border."""
    soft: np.ndarray = 1 / (1 + np.exp(np.clip(10 * distance, -30, 30)))
    return soft


def _disc(radius: float, sign: float) -> Sign:
    return lambda y, x: sign * _edge(np.hypot(y, x) - radius)


def _ring(radius: float, thick: float, sign: float) -> Sign:
    return lambda y, x: sign * _edge(np.abs(np.hypot(y, x) - radius) - thick)


def _bar(angle: float, sign: float) -> Sign:
    def bar(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        along = y * np.cos(angle) + x * np.sin(angle)
        across = x * np.cos(angle) - y * np.sin(angle)
        return sign * _edge(np.maximum(np.abs(along) - 1.1, np.abs(across) - 0.15))

    return bar


def _grating(angle: float, waves: float) -> Sign:
    return lambda y, x: (
        np.sin(waves * np.pi * (y * np.cos(angle) + x * np.sin(angle))) * _edge(np.hypot(y, x) - 1)
    )


def _cross(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.maximum(_bar(0, 1)(y, x), _bar(np.pi / 2, 1)(y, x))


def _pair(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return _disc(0.35, 1)(y, x - 0.7) + _disc(0.35, 1)(y, x + 0.7)


def _wedge(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return _edge(np.maximum(np.abs(x) * 1.6 - (y + 1) / 1.4, y - 0.8))


def _square(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return _edge(np.abs(np.maximum(np.abs(y), np.abs(x)) - 0.8) - 0.15)


def _star(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The other look of the commonest finding: rays, alternately bright and dark."""
    return np.sin(4 * np.arctan2(y, x)) * _edge(np.hypot(y, x) - 1.1)


_SIGNS: tuple[Sign, ...] = (
    _disc(0.45, 1), _disc(0.45, -1), _disc(1.0, 1), _disc(1.0, -1),
    _ring(0.8, 0.15, 1), _ring(0.8, 0.15, -1),
    _bar(0, 1), _bar(np.pi / 4, 1), _bar(np.pi / 2, 1), _bar(-np.pi / 4, 1),
    _bar(0, -1), _bar(np.pi / 2, -1),
    _grating(0, 2.5), _grating(np.pi / 2, 2.5), _grating(np.pi / 4, 2.5), _grating(-np.pi / 4, 2.5),
    _cross, _pair, _wedge, _square,
)  # fmt: skip
