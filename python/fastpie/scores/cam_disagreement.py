"""Class activation maps of the dense and the pruned model, and how much they disagree.

Where both models look at different places, the sample is hard to localise: Attend Who is Weak, arXiv
2212.02675, takes the IoU of the two maps as the score of its weakly supervised setting.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpie.dual import DualModel
from fastpie.dual.modes import evaluating
from fastpie.dual.output import DualOutput
from fastpie.errors import FastpieError
from fastpie.scores.cam import CamLayers, hard_overlap, scaled_map, soft_overlap
from fastpie.scores.class_maps import class_maps, class_pairs, grad_cams, logits_of

__all__ = [
    "CamDisagreement",
    "DualMaps",
    "cam_disagreement",
    "dual_cams",
    "dual_grad_cams",
    "head_weights",
]


class DualMaps(NamedTuple):
    """Activation maps of dense and pruned model, one for each pair of a sample and one of its classes.

    Attributes:
        rows: int64 [P], the pair's sample.
        classes: int64 [P], its class.
        dense: [P, ...], as they come: of any sign and scale.
        pruned: [L, P, ...], of L levels; L is 1 without a ladder.
    """

    rows: Tensor
    classes: Tensor
    dense: Tensor
    pruned: Tensor


def dual_cams(
    dual: DualModel,
    out: DualOutput,
    layers: CamLayers,
    labels: Any = None,
    *,
    output: str | int | None = None,
) -> DualMaps:
    """Class activation maps of both models, from the features that a dual forward gave on its way.

    Each model's map is its own features times its own head's weights: masked ones in the pruned model
    if the head is pruned. Differentiable.

    Args:
        dual: with `features=layers.features`.
        out: of it, or of an engine compiled from it.
        layers: from `fastpie.scores.cam.cam_layers`.
        labels: which classes' maps: int64 [n], or [n, C] with 1 for each class of a sample. A sample
            without a known one, or all without labels: the class that the dense model is surest of.
        output: key or index of the logits in a dict or tuple output.

    Raises:
        FastpieError: without these features, or if shapes do not fit together.
    """
    if out.features is None or dual.feature_module != layers.features:
        raise FastpieError(
            f"Expected a dual model with features={layers.features!r}, but got "
            f"{dual.feature_module!r}."
        )
    pairs = class_pairs(logits_of(out.dense, output), labels)
    ladder = out.features.pruned if dual.is_ladder else [out.features.pruned]
    weights = head_weights(dual, layers)
    maps = [
        class_maps(features, weight, layers, pairs)
        for features, weight in zip([out.features.dense, *ladder], weights, strict=True)
    ]
    return DualMaps(*pairs, maps[0], torch.stack(maps[1:]))


def cam_disagreement(
    maps: DualMaps,
    samples: int,
    *,
    fraction: float | None = None,
) -> Tensor:  # [n]
    """`1 - IoU` of the dense and the pruned model's maps, mean over a sample's classes and the levels.

    Args:
        maps: from `dual_cams`; scaled here to a maximum of 1, what is negative left out.
        samples: n.
        fraction: of each map's maximum, above which its object is, for the IoU of these masks; None
            for the soft IoU of the maps themselves, which has a gradient.

    Returns:
        In [0, 1]; 0 where neither map has anything positive, and for a sample that is in no pair; NaN
        where a map has NaN.
    """
    dense = scaled_map(maps.dense)
    value = maps.dense.new_zeros(len(maps.rows))
    for pruned in maps.pruned:
        if fraction is None:
            overlap = soft_overlap(dense, scaled_map(pruned))
        else:
            overlap = hard_overlap(maps.dense, pruned, fraction)
        value = value + (1 - overlap) / len(maps.pruned)
    totals = value.new_zeros(samples).index_add(0, maps.rows, value)
    counts = value.new_zeros(samples).index_add(0, maps.rows, torch.ones_like(value))
    return totals / counts.clamp_min(1)


class CamDisagreement:
    """How differently dense and pruned model look at a sample: a score for `Attention`.

    Call it with a `DualOutput` and labels, it gives `1 - IoU` of the class activation maps, [n], in
    [0, 1] (see `cam_disagreement`). Without labels it takes the class that the dense model predicts.
    """

    def __init__(
        self,
        layers: CamLayers | str,
        dual: DualModel | None = None,
        *,
        fraction: float | None = None,
        output: str | int | None = None,
    ) -> None:
        """Say which layers to look at.

        Args:
            layers: from `fastpie.scores.cam.cam_layers`; for other heads than a linear layer on
                averaged features the name of a module, for Grad-CAM. That takes the images, too, and
                another forward and backward pass of both models.
            dual: the dual model that the outputs come from; or call `bind`, as `Attention` does.
            fraction: as for `cam_disagreement`.
            output: key or index of the logits in a dict or tuple output.
        """
        self.layers = layers
        self.fraction = fraction
        self.output = output
        self._dual = dual

    def bind(self, dual: DualModel) -> None:
        """Take the head's weights and masks, as they are at each call, from this dual model."""
        self._dual = dual

    def __call__(
        self, out: DualOutput, labels: Any = None, images: Any = None
    ) -> Tensor:  # fp32 [n]
        """The score of each sample.

        Args:
            out: of the dual model, with features unless for Grad-CAM.
            labels: see `dual_cams`.
            images: the model's input, for Grad-CAM.

        Raises:
            FastpieError: without a dual model, or for what is missing in `out`.
        """
        if self._dual is None:
            raise FastpieError("Expected a dual model for the CAM score: call bind(dual) first.")
        samples = len(logits_of(out.dense, self.output))
        if isinstance(self.layers, CamLayers):
            maps = dual_cams(self._dual, out, self.layers, labels, output=self.output)
        else:
            if images is None:
                raise FastpieError("Expected the images for Grad-CAM, but got none.")
            maps = dual_grad_cams(self._dual, images, self.layers, labels, output=self.output)
        return cam_disagreement(maps, samples, fraction=self.fraction).detach()


def dual_grad_cams(
    dual: DualModel,
    images: Any,
    module: str,
    labels: Any = None,
    *,
    output: str | int | None = None,
) -> DualMaps:
    """Grad-CAM of both models at a module, in eval mode, for classifiers with any head.

    Args:
        dual: a classifier and its pruned self; left as it was.
        images: the model's input; a tuple is spread over its positional arguments.
        module: name of the module whose output [n, K, ...] is looked at.
        labels: as for `dual_cams`.
        output: key or index of the logits in a dict or tuple output.

    Raises:
        FastpieError: if there is no such module, or the logits do not depend on its output.
    """
    pairs: list[tuple[Tensor, Tensor]] = []  # the dense model's

    def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
        if not pairs:
            pairs.append(class_pairs(logits, labels))
        return pairs[0]

    maps = []
    with evaluating(dual), torch.inference_mode(False):
        for state in ({}, *(dual.pruned_state(level) for level in range(len(dual.sparsities)))):
            run = partial(dual.run_pruned, state)
            maps.append(grad_cams(run, dual.model, images, module, choose, output=output)[1])
    return DualMaps(*pairs[0], maps[0], torch.stack(maps[1:]))


def head_weights(dual: DualModel, layers: CamLayers) -> list[Tensor | None]:
    """Those in force in the dense model and at each level."""
    if layers.head is None:
        return [None] * (1 + len(dual.sparsities))
    weight = dual.model.get_submodule(layers.head).weight
    assert isinstance(weight, Tensor)
    parameters = dict(dual.model.named_parameters(remove_duplicate=False))
    codes = next((c for name, c in dual.levels() if parameters[name] is weight), None)
    if codes is None:  # the head is not pruned
        return [weight] * (1 + len(dual.sparsities))
    return [weight, *(weight * (codes > level) for level in range(len(dual.sparsities)))]
