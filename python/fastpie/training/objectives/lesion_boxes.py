"""Where the lesion is, by saliency or by a segmentation model: boxes as in `fastpie.scores.boxes`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastpie.errors import FastpieError
from fastpie.scores.boxes import boxes_of_masks

__all__ = ["saliency_boxes", "segmentation_boxes"]

_SIDE = 64  # pixels: the scale at which Hou & Zhang look for objects
_SIGMA = 2.5  # pixels of the above: of the Gaussian in their published code
_TIMES_MEAN = 3.0  # their threshold


def saliency_boxes(images: Tensor) -> Tensor:  # [n, K, ...] -> fp32 [n, 4], of volumes [n, 6]
    """Boxes around what stands out of an image, by the spectral residual.

    Hou & Zhang, Saliency Detection: A Spectral Residual Approach, CVPR 2007,
    https://doi.org/10.1109/CVPR.2007.383267: the log amplitude spectrum (mean channel, at most 64
    pixels a side) minus its local mean, with the phase kept, gives a map of what is no repetition of
    the rest; it is squared, smoothed, and cut at three times its mean. A first guess: it knows nothing
    of lesions, and hairs, rulers and letters stand out too.
    """
    size = images.shape[2:]
    x = images.detach().float().mean(1, keepdim=True)
    scale = min(1.0, _SIDE / max(size))
    small = [max(1, round(s * scale)) for s in size]
    if list(size) != small:
        x = functional.interpolate(x, small, mode="area")
    x = x.squeeze(1)
    axes = list(range(1, x.ndim))
    spectrum = torch.fft.fftn(x, dim=axes)
    log_amplitude = spectrum.abs().clamp_min(torch.finfo(torch.float32).tiny).log()
    residual = log_amplitude - _local_mean(log_amplitude)
    unusual = torch.fft.ifftn(torch.polar(residual.exp(), spectrum.angle()), dim=axes).abs() ** 2
    saliency = _smooth(unusual, axes)
    # A flat image has no spectrum but rounding.
    flat = (x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True)) <= 1e-6
    mean = saliency.mean(axes, keepdim=True)
    return boxes_of_masks((saliency > _TIMES_MEAN * mean) & ~flat, size)


def segmentation_boxes(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Boxes around what a trained segmentation model finds: a function from images to boxes.

    Args:
        model: from images to logits [n, 1, ...] of a foreground, or [n, C, ...] with background 0. It
            is put into eval mode and onto the images' device, run without gradients, and is no part of the
            training.
    """
    model.eval()

    def boxes(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model.to(images.device)(images)
        if not isinstance(logits, Tensor) or logits.ndim != images.ndim:
            raise FastpieError("Expected the segmentation model to give logits [n, C, ...].")
        found = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1) > 0
        return boxes_of_masks(found, images.shape[2:])

    return boxes


def _local_mean(x: Tensor) -> Tensor:
    """Over three places along each axis of a spectrum, which is periodic."""
    for axis in range(1, x.ndim):
        x = (x.roll(1, axis) + x + x.roll(-1, axis)) / 3
    return x


def _smooth(x: Tensor, axes: list[int]) -> Tensor:
    """With a Gaussian, by its transfer function."""
    spectrum = torch.fft.fftn(x, dim=axes)
    for axis in axes:
        frequency = torch.fft.fftfreq(x.shape[axis], device=x.device)
        shape = [1] * x.ndim
        shape[axis] = -1
        spectrum = spectrum * (-2 * (torch.pi * _SIGMA * frequency) ** 2).exp().view(shape)
    smooth: Tensor = torch.fft.ifftn(spectrum, dim=axes).real
    return smooth
