"""Two-stage learning of long tails: a metric loss for the features, then a balanced head.

After https://arxiv.org/abs/2207.06975, of which the abstract says: stage 1 trains the feature extractor
by cross-entropy and a metric loss (triplet or prototype), stage 2 retrains the classifier head with
class-rebalanced sampling, the features frozen. What it leaves open is an option here. Stage 2 alone is
the classifier re-training of Kang et al., https://arxiv.org/abs/1910.09217.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastpie._checks import number
from fastpie.dual.features import features_of, watched
from fastpie.dual.inputs import as_arguments
from fastpie.errors import FastpieError
from fastpie.training.objectives.metric_losses import SampleMetricLoss, metric_loss_named
from fastpie.training.objectives.objective import Criterion, Supervised, TrainBatch, entry_of

__all__ = ["HeadRetraining", "MetricLearning", "class_balanced_draw_weights"]


class MetricLearning(Supervised):
    """Stage 1: `criterion + weight * metric loss` of the embedding.

    The metric loss's own parameters (prototypes) are among `objective.parameters()`.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        metric_loss: str | nn.Module = "triplet",
        *,
        weight: float = 1.0,
        features: str = "penultimate",
        classes: int | None = None,
        embedding_size: int | None = None,
        output: str | int | None = None,
        **options: Any,
    ) -> None:
        """Join a model, a criterion and a metric loss.

        Args:
            model: a classifier.
            criterion: its loss, sample by sample.
            metric_loss: "triplet", "prototype", the name of a class of
                `pytorch_metric_learning.losses`, or a loss of that library.
            weight: of the metric loss, at least 0.
            features: the embedding, as in `fastpie.DualModel`; maps are averaged over positions.
            classes: for losses with parameters of classes; by default as many as the last linear
                layer gives.
            embedding_size: likewise; by default what goes into that layer, for "penultimate".
            output: key or index of the logits in a dict or tuple output.
            options: of the metric loss, where it is given by name.

        Raises:
            FastpieError: without pytorch-metric-learning, or for names, sizes or options that do not
                fit.
        """
        super().__init__(model, criterion, output=output)
        self.weight = number("weight", weight, 0)
        self.features = features_of(model, features)
        if isinstance(metric_loss, str):
            linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
            if features == "penultimate" and linear:
                classes = linear[-1].out_features if classes is None else classes
                if embedding_size is None:
                    embedding_size = linear[-1].in_features
            metric_loss = metric_loss_named(metric_loss, classes, embedding_size, **options)
        elif options:
            raise FastpieError(f"Expected no options of a loss that is made, but got {options}.")
        self.metric_loss = SampleMetricLoss(metric_loss)

    def forward(self, batch: TrainBatch) -> Tensor:  # [n]
        """The sum of both losses of each sample."""
        with watched(self.model, self.features) as seen:
            logits = entry_of(self.model(*as_arguments(batch.images)), self.output)
        losses = self.criterion(logits, batch.labels)
        labels = batch.labels
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
            raise FastpieError("Expected class indices [n] as labels of a metric loss.")
        if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].ndim < 2:
            raise FastpieError(
                f"Expected the features {self.features!r} to be one tensor [n, D, ...] of a forward."
            )
        embedding = seen[0].flatten(2).mean(2) if seen[0].ndim > 2 else seen[0]
        metric: Tensor = self.weight * self.metric_loss(embedding, labels)
        return losses + metric


class HeadRetraining(Supervised):
    """Stage 2: the criterion, with everything but the classifier head frozen.

    Frozen is: no parameter asks for a gradient, and BatchNorm and dropout are in eval mode, in
    training too. Draw the samples by `class_balanced_draw_weights`. `release` gives the parameters
    back as they were.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        *,
        head: str | None = None,
        reset: bool = True,
        output: str | int | None = None,
    ) -> None:
        """Freeze the features.

        Args:
            model: a trained classifier.
            criterion: its loss, sample by sample.
            head: name of the module to train; by default the last `nn.Linear`.
            reset: whether the head starts anew (`reset_parameters` of its modules).
            output: key or index of the logits in a dict or tuple output.

        Raises:
            FastpieError: if there is no such module, or it has no parameters.
        """
        super().__init__(model, criterion, output=output)
        modules = dict(model.named_modules())
        if head is None:
            linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
            head = linear[-1] if linear else ""
        if not head or head not in modules:
            raise FastpieError(
                f"Expected `head` to name a module of {type(model).__name__}, but got {head!r}."
            )
        self.head = head
        trained = {id(parameter) for parameter in modules[head].parameters()}
        if not trained:
            raise FastpieError(f"Expected a head with parameters, but {head!r} has none.")
        self._before = [(p, p.requires_grad) for p in model.parameters()]
        for parameter, _ in self._before:
            parameter.requires_grad_(id(parameter) in trained)
        if reset:
            for module in modules[head].modules():
                getattr(module, "reset_parameters", lambda: None)()
        self.train(self.training)

    def train(self, mode: bool = True) -> HeadRetraining:
        """Put the head alone into training mode."""
        super().train(mode)
        self.model.eval()
        self.model.get_submodule(self.head).train(mode)
        return self

    def release(self) -> None:
        """Let the parameters ask for gradients as before stage 2."""
        for parameter, asked in self._before:
            parameter.requires_grad_(asked)


def class_balanced_draw_weights(labels: Any) -> Tensor:  # fp64 [N]
    """Weights to draw samples by so that every class comes as often: `1 / n_c`.

    For `torch.utils.data.WeightedRandomSampler`. With multilabel labels a sample has the weight of its
    rarest class, those without any being a class of their own.

    Args:
        labels: of all training samples, as `ManifestDataset.labels` has them: integers [N] (below 0:
            unknown, never drawn), or [N, C] of 0, 1 and NaN (unknown).

    Raises:
        FastpieError: for labels of another form, or if all are unknown.
    """
    table = torch.as_tensor(np.asarray(labels) if not isinstance(labels, Tensor) else labels)
    table = table.detach().cpu()
    if table.ndim == 1 and not table.is_floating_point() and table.dtype is not torch.bool:
        known = table >= 0
        classes = table.long().clamp_min(0)
        weights = 1 / torch.bincount(classes[known], minlength=1).double()
        weights = weights[classes].where(known, 0)
    elif table.ndim == 2:
        positive = table == 1
        weights = (positive / positive.sum(0).clamp_min(1).double()).amax(1)
        none = ~positive.any(1) & (table == 0).any(1)
        weights = weights.where(~none, 1 / none.sum().clamp_min(1).double())
    else:
        raise FastpieError(
            f"Expected labels [N] of integers or [N, C], but got {table.dtype} {list(table.shape)}."
        )
    if not weights.any():
        raise FastpieError("Expected samples with a known label, but there are none.")
    return weights
