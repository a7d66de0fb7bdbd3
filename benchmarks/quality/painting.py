"""What the generated images are painted with."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

__all__ = ["corrupt", "smooth_noise"]


def smooth_noise(
    rng: np.random.Generator, count: int, size: int, scale: float
) -> np.ndarray:  # fp32 [count, size, size]
    """Gaussian noise of standard deviation 1, blurred over `scale` pixels."""
    noise = rng.standard_normal((count, size, size), dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, (0, scale, scale), mode="wrap")
    result: np.ndarray = noise / noise.std(axis=(1, 2), keepdims=True)
    return result


def corrupt(
    rng: np.random.Generator,
    image: np.ndarray,  # [H, W] or [channels, H, W]
    *,
    low: float,
    high: float,
    blur: float,
) -> np.ndarray:
    """Blur, expose wrongly, cover or blank an image, one of the four.

    Args:
        rng: says which, and where.
        image: values of about [low, high].
        low: the value of black.
        high: the value of white.
        blur: in pixels, standard deviation.
    """
    middle, span = (low + high) / 2, high - low
    size = image.shape[-1]
    way = rng.integers(4)
    if way == 0:
        spread = (0,) * (image.ndim - 2) + (blur, blur)
        result = ndimage.gaussian_filter(image, spread)
    elif way == 1:
        factor, shift = rng.uniform(1.5, 2.5), rng.choice((-0.5, 0.5)) * span
        result = np.clip((image - middle) * factor + middle + shift, low, high)
    elif way == 2:
        result = image.copy()
        top, left = rng.integers(0, size // 2 + 1, 2)
        result[..., top : top + size // 2, left : left + size // 2] = low
    else:
        level = rng.uniform(low, high)
        result = level + 0.05 * span * rng.standard_normal(image.shape)
    return result.astype(np.float32)
