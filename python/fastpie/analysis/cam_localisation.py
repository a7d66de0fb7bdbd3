"""Objects found by a classifier that was trained on image labels alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastpie.analysis.localisation import CAM_FRACTION, boxes_of_masks, masks_of_maps
from fastpie.dual.features import watched
from fastpie.dual.inputs import as_arguments
from fastpie.dual.modes import evaluating
from fastpie.errors import FastpieError
from fastpie.scores.cam import CamLayers, resized_map, scaled_map
from fastpie.scores.class_maps import (
    class_maps,
    class_pairs,
    grad_cams,
    logits_of,
)

__all__ = ["Localisation", "localise"]


@dataclass(frozen=True, eq=False)
class Localisation:
    """Where a classifier sees its class in each of n images.

    Attributes:
        classes: int64 [n].
        logits: fp32 [n], of that class: what detections are ranked by.
        maps: fp32 [n, *size] in [0, 1], 1 at the highest place; zero throughout where nothing speaks
            for the class.
        masks: bool [n, *size].
        boxes: fp64 [n, 2 D] in pixels of `size` (see `fastpie.scores.boxes`); NaN for an empty mask.
    """

    classes: np.ndarray
    logits: np.ndarray
    maps: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray


def localise(
    model: nn.Module,
    images: Any,
    layers: CamLayers | str,
    classes: Any = None,
    *,
    size: tuple[int, ...] | None = None,
    fraction: float = CAM_FRACTION,
    largest: bool = True,
    output: str | int | None = None,
) -> Localisation:
    """Activation map, mask and box of a class in each image.

    The map is interpolated linearly to the size of the image; the mask is where it is above a
    fraction of its maximum, the largest connected component of that; the box lies around it (Zhou et
    al., CVPR 2016, arXiv 1512.04150).

    Args:
        model: a classifier; run in eval mode and left as it was.
        images: its input; a tuple is spread over its positional arguments.
        layers: from `fastpie.scores.cam.cam_layers`, for CAM; or the name of a module, for Grad-CAM.
        classes: int64 [n]; below 0, or without it, the class that the model is surest of.
        size: of the maps; by default that of the first input, [n, channels, *size].
        fraction: as for `masks_of_maps`.
        largest: likewise.
        output: key or index of the logits in a dict or tuple output.

    Raises:
        FastpieError: if the layers are not the model's, or shapes do not fit together.
    """
    args = as_arguments(images)
    size = tuple(args[0].shape[2:] if size is None else size)

    def pairs(logits: Tensor) -> tuple[Tensor, Tensor]:
        if classes is not None and tuple(np.shape(classes)) != (len(logits),):
            raise FastpieError(
                f"Expected `classes` [{len(logits)}], but got {list(np.shape(classes))}."
            )
        return class_pairs(logits, classes)

    with evaluating(model):
        if isinstance(layers, CamLayers):
            with torch.no_grad(), watched(model, layers.features) as seen:
                logits = logits_of(model(*args), output)
                head = None if layers.head is None else model.get_submodule(layers.head).weight
                assert head is None or isinstance(head, Tensor)
                chosen = pairs(logits)
                maps = class_maps(seen[0], head, layers, chosen)
        else:
            found: list[Tensor] = []

            def note(logits: Tensor) -> tuple[Tensor, Tensor]:
                found.append(logits.detach())
                return pairs(logits)

            chosen, maps = grad_cams(
                lambda args: model(*args), model, images, layers, note, output=output
            )
            logits = found[0]
    # What speaks against the class goes before the interpolation; the maximum is 1 after it.
    scaled = scaled_map(resized_map(scaled_map(maps).float(), size))
    masks = masks_of_maps(scaled, fraction=fraction, largest=largest)
    return Localisation(
        chosen[1].cpu().numpy(),
        logits[chosen].float().cpu().numpy(),
        scaled.cpu().numpy(),
        masks,
        boxes_of_masks(masks),
    )
