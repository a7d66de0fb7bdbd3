"""Localisation learnt from image labels alone, with the pruned model's class activation maps (CAM)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpie.dual import DualModel
from fastpie.dual.inputs import as_arguments, random_state
from fastpie.errors import FastpieError
from fastpie.pruning import Masks, prune
from fastpie.scores.cam import CamLayers
from fastpie.scores.cam_disagreement import DualMaps, cam_disagreement, head_weights
from fastpie.scores.class_maps import class_maps, class_pairs
from fastpie.training.objectives.objective import Criterion, Objective, TrainBatch, entry_of

__all__ = ["WeaklySupervised"]


class WeaklySupervised(Objective):
    """Image labels, and a dense model that is drawn to look where its pruned self looks.

    `loss_i = criterion_i + weight [i hard] (1 - softIoU(CAM_dense,i, stopgrad CAM_pruned,i))`: what
    `Consistency` does for logits, for maps (our reading of Attend Who is Weak, arXiv 2212.02675).
    Without attention every sample is taken. The maps are those of the labelled classes (see
    `dual_cams`), scaled to a maximum of 1. The pruned model runs without a graph, in training mode
    with batch statistics of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        layers: CamLayers,
        *,
        weight: float = 0.3,
        sparsity: float = 0.5,
        every: int = 5,
        method: str = "l1",
        seed: int = 0,
        output: str | int | None = None,
        **pruning: Any,
    ) -> None:
        """Join model, criterion and masks.

        Args:
            model: a classifier.
            criterion: loss of logits and labels, sample by sample.
            layers: from `fastpie.scores.cam.cam_layers`.
            weight: of the consistency, at least 0. Too much of it, and the maps agree about nothing: on
                small generated images 0.3 made them better and 1 worse than no consistency.
            sparsity: of the pruned model.
            every: epochs from one pruning to the next.
            method: see `fastpie.prune`. "random" is the control.
            seed: of "random"; each pruning draws anew from it.
            output: key or index of the logits in a dict or tuple output.
            pruning: other arguments of `fastpie.prune`: `scope`, `exclude`, ...

        Raises:
            FastpieError: for numbers out of range, a module that is not there or bad arguments of
                `fastpie.prune`.
        """
        super().__init__()
        if not weight >= 0 or every < 1:
            raise FastpieError(
                f"Expected `weight` of at least 0 and `every` of at least 1, but got {weight} and "
                f"{every}."
            )
        self.criterion = criterion
        self.layers = layers
        self.weight = weight
        self.every = every
        self.output = output
        self._pruning = {"method": method, **pruning}
        self._seed = seed
        self.dual = DualModel(
            model, self._choose_masks(model, sparsity, 0), features=layers.features
        )

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The classifier: one of the dual model's modules, so that the state holds it once."""
        return self.dual.model

    def begin_epoch(self, epoch: int) -> None:
        """Prune anew where it is time."""
        super().begin_epoch(epoch)
        if epoch % self.every == 0:
            self.dual.masks = self._choose_masks(self.model, self.dual.sparsities[0], epoch)

    def _choose_masks(self, model: nn.Module, sparsity: float, epoch: int) -> Masks:
        seed = self._seed + epoch if self._pruning["method"] == "random" else None
        return prune(model, float(sparsity), seed=seed, **self._pruning)

    def forward(self, batch: TrainBatch) -> Tensor:  # [n]
        """Criterion and consistency of each sample."""
        args = as_arguments(batch.images)
        restore = random_state(args)
        with self.dual.watch_features() as seen:
            out = self.model(*args)
            restore()  # the same dropout in both
            with torch.no_grad():
                self.dual.run_pruned(self.dual.pruned_state(0), args)
        assert seen is not None
        logits = entry_of(out, self.output)
        losses = self.criterion(logits, batch.labels)
        rows, classes = class_pairs(logits, batch.labels)
        if batch.hard is not None:
            wanted = batch.hard[rows]
            rows, classes = rows[wanted], classes[wanted]
        dense, pruned = (
            class_maps(features, weight, self.layers, (rows, classes))
            for features, weight in zip(seen, head_weights(self.dual, self.layers), strict=True)
        )
        maps = DualMaps(rows, classes, dense, pruned.detach()[None])
        return losses + self.weight * cam_disagreement(maps, len(losses))
