"""Losses of pytorch-metric-learning, sample by sample."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastpie._extras import load_extra
from fastpie.errors import FastpieError

__all__ = ["SampleMetricLoss", "metric_loss_named"]

_PURPOSE = "metric losses"


class SampleMetricLoss(nn.Module):
    """A loss of pytorch-metric-learning as losses [n] whose mean is what the library gives.

    A pair's or a triplet's loss is its anchor's (its first member's), so a sample's weight counts where
    it is the anchor. That takes the library's own averages: `MeanReducer` and `AvgNonZeroReducer`,
    which are the defaults of all its losses. What has another reducer, or is of the batch as a whole
    (a regulariser, AP, ProxyAnchor's losses of proxies), is shared by all samples alike: the mean and
    its gradient are the same, a weight then is one of the whole.

    Labels below 0 are unknown: such samples are neither anchor nor other, and lose nothing. Pairs are
    those of the process's own batch.
    """

    def __init__(self, loss: nn.Module) -> None:
        """Take a copy of a loss (`BaseMetricLossFunction`), with its reducer."""
        super().__init__()
        base = load_extra("pytorch_metric_learning.losses", "train", _PURPOSE)
        reducers = load_extra("pytorch_metric_learning.reducers", "train", _PURPOSE)
        if not isinstance(loss, base.BaseMetricLossFunction):
            raise FastpieError(
                f"Expected a loss of pytorch-metric-learning, but got {type(loss).__name__}."
            )
        self.loss = copy.deepcopy(loss)
        self.reducer = self.loss.reducer
        self.loss.reducer = reducers.DoNothingReducer()
        self._of_proxies = isinstance(loss, base.ProxyAnchorLoss)

    def forward(
        self,
        embeddings: Tensor,  # [n, D]
        labels: Tensor,  # integers [n]
    ) -> Tensor:  # [n]
        """The losses, fp32 (fp64 for fp64 embeddings)."""
        if embeddings.dtype is not torch.float64:
            embeddings = embeddings.float()
        known = labels >= 0
        rows = known.nonzero().squeeze(1)
        losses = embeddings.new_zeros(len(embeddings))
        if not len(rows):
            # Nothing to learn, but in DDP every parameter must belong to the loss.
            return losses + sum(p.sum() * 0 for p in self.parameters())
        with torch.autocast(embeddings.device.type, enabled=False):
            some, classes = embeddings[rows], labels[rows].long()
            for name, part in self.loss(some, classes).items():
                losses = losses.index_add(0, rows, self._of_samples(name, part, some, classes))
        # The mean over all of the batch stays that of the known ones.
        return losses * (len(losses) / len(rows))

    def _of_samples(
        self, name: str, part: dict[str, Any], embeddings: Tensor, labels: Tensor
    ) -> Tensor:  # [n]
        reducers = load_extra("pytorch_metric_learning.reducers", "train", _PURPOSE)
        reducer = self.reducer
        if isinstance(reducer, reducers.MultipleReducers):
            reducer = dict(reducer.reducers).get(name, reducer.default_reducer)
        losses, anchors = part["losses"], part["indices"]
        if isinstance(anchors, tuple | list):
            anchors = anchors[0]
        counted = None
        if isinstance(losses, Tensor) and isinstance(anchors, Tensor) and not self._of_proxies:
            losses = losses.flatten()  # some are [n, 1]
            if type(reducer) is reducers.MeanReducer:
                counted = torch.ones_like(losses, dtype=torch.bool)
            elif type(reducer) is reducers.AvgNonZeroReducer:
                counted = losses > 0
        if counted is None:
            whole = reducer({name: part}, embeddings, labels)
            return torch.as_tensor(whole).to(embeddings).reshape(()).expand(len(embeddings))
        share = losses.where(counted, 0) * (len(embeddings) / counted.sum().clamp_min(1))
        sums = embeddings.new_zeros(len(embeddings))
        return sums.index_add(0, anchors.to(sums.device), share.to(sums))


def metric_loss_named(
    name: str, classes: int | None = None, embedding_size: int | None = None, **options: Any
) -> nn.Module:
    """A loss of pytorch-metric-learning.

    Args:
        name: "triplet": `TripletMarginLoss`, of all triplets in the batch. "prototype":
            `NormalizedSoftmaxLoss` (Zhai & Wu, https://arxiv.org/abs/1811.12649), cross-entropy of the
            cosines to one learnt prototype of each class, which are parameters to be optimised. Or the
            name of a class of `pytorch_metric_learning.losses`.
        classes: how many, for losses that have parameters of classes.
        embedding_size: likewise.
        options: of the loss, such as `margin`.

    Raises:
        FastpieError: for an unknown loss or option, or sizes that are needed.
    """
    library = load_extra("pytorch_metric_learning.losses", "train", _PURPOSE)
    names = {"triplet": "TripletMarginLoss", "prototype": "NormalizedSoftmaxLoss"}
    made = getattr(library, names.get(name, name), None)
    if not isinstance(made, type) or not issubclass(made, nn.Module):
        raise FastpieError(
            "Expected `metric_loss` to be 'triplet', 'prototype' or a class of "
            f"pytorch_metric_learning.losses, but got {name!r}."
        )
    takes = made.__init__.__code__.co_varnames[1 : made.__init__.__code__.co_argcount]
    if "num_classes" in takes:
        if classes is None or embedding_size is None:
            raise FastpieError(
                f"Expected `classes` and `embedding_size` for the metric loss {name!r}, but got "
                f"{classes} and {embedding_size}."
            )
        options = {"num_classes": classes, "embedding_size": embedding_size, **options}
    try:
        loss: nn.Module = made(**options)
    except TypeError as error:
        raise FastpieError(f"Expected options of the metric loss {name!r}, but {error}.") from error
    return loss
