"""Generated photographs of skin lesions with masks."""

from __future__ import annotations

import numpy as np

from benchmarks.quality.painting import smooth_noise

__all__ = ["CLASSES", "SIZE", "TONES", "paint"]

CLASSES = 6
SIZE = 32
FAINT = 0.25  # of the contrast
_TONES = np.array([[0.92, 0.78, 0.68], [0.75, 0.56, 0.44], [0.50, 0.35, 0.27]], np.float32)
TONES = len(_TONES)
_BROWN = np.array([0.35, 0.45, 0.45], np.float32)  # what a lesion takes from red, green and blue
_BLUE = np.array([0.45, 0.30, 0.05], np.float32)


def paint(
    rng: np.random.Generator,
    classes: np.ndarray,  # int64 [N]
    rare: np.ndarray,  # bool [N]: a ring
    faint: np.ndarray,  # bool [N]
    tone: np.ndarray | None = None,  # int64 [N], of the skin, light to dark; drawn if None
) -> tuple[np.ndarray, np.ndarray]:  # fp32 [N, 3, SIZE, SIZE] in [0, 1], bool [N, SIZE, SIZE]
    """Lesions whose pattern is their class, on skin of three tones with texture and hairs.

    0 plain, 1 dots, 2 network, 3 two-toned, 4 a blue veil, 5 stripes.
    """
    count = len(classes)
    color_of_skin = _TONES[rng.integers(0, len(_TONES), count) if tone is None else tone]
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j].astype(np.float32)
    center = rng.uniform(-0.3, 0.3, (2, count, 1, 1)).astype(np.float32)
    dy, dx = y[None] - center[0], x[None] - center[1]
    turn = rng.uniform(0, np.pi, (count, 1, 1)).astype(np.float32)
    u, v = dy * np.cos(turn) + dx * np.sin(turn), dx * np.cos(turn) - dy * np.sin(turn)
    radius = rng.uniform(0.25, 0.55, (count, 1, 1)).astype(np.float32)
    longer = rng.uniform(1, 1.4, (count, 1, 1)).astype(np.float32)
    distance = np.hypot(u / longer, v * longer) / radius + 0.12 * smooth_noise(rng, count, SIZE, 4)
    hole = np.where(rare[:, None, None], 0.55, 0)
    outline = np.maximum(distance - 1, hole - distance)
    masks = outline < 0
    inside = 1 / (1 + np.exp(np.clip(12 * outline, -30, 30)))

    phase = rng.uniform(0, 2 * np.pi, (2, count, 1, 1)).astype(np.float32)
    waves = rng.uniform(14, 18, (count, 1, 1)).astype(np.float32)
    first, second = np.sin(waves * u + phase[0]), np.sin(waves * v + phase[1])
    pattern = np.select(
        [(classes == c)[:, None, None] for c in range(CLASSES)],
        [
            np.ones_like(first),
            0.6 + 0.8 * (first * second > 0.35),
            0.6 + 0.6 * (np.maximum(first, second) > 0.75),
            np.where(u > 0.1 * second, 1.25, 0.65),
            np.ones_like(first),
            0.9 + 0.4 * first,
        ],
    )
    color = np.where((classes == 4)[:, None], _BLUE, _BROWN)
    strength = rng.uniform(0.7, 1.2, (count, 1, 1)) * np.where(faint, FAINT, 1)[:, None, None]
    depth = (strength * inside * pattern)[:, None] * color[:, :, None, None]
    texture = 0.03 * smooth_noise(rng, count, SIZE, 0.7) + 0.03 * smooth_noise(rng, count, SIZE, 4)
    images = color_of_skin[:, :, None, None] * (1 - depth) + texture[:, None]
    images *= rng.normal(1, 0.05, (count, 1, 1, 1))
    _hairs(rng, images)
    return np.clip(images, 0, 1).astype(np.float32), masks


def _hairs(rng: np.random.Generator, images: np.ndarray) -> None:
    """Dark lines across some of the images."""
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j].astype(np.float32)
    for image in images:
        for _ in range(rng.poisson(0.7)):
            angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.7, 0.7)
            line = np.abs(y * np.cos(angle) + x * np.sin(angle) + 0.2 * x**2 - offset)
            image *= 1 - 0.5 * (line < 0.04)
