"""The published step of self-damaging contrastive learning, transcribed: baseline and reference.

From VITA-Group/SDCLR: `prune_conv2d` (models/resnet_prune.py), `batch_norm_multiple`
(models/resnet_prune_multibn.py), `nt_xent` (utils.py) and `train_prune` (prune/prune_simCLR.py), for
one process and for any network of plain layers instead of its ResNets.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["published_loss", "published_network", "published_step"]


class _PrunedConv(nn.Conv2d):
    prune_mask: Tensor  # as the weight
    prune_flag = False

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.prune_mask if self.prune_flag else self.weight
        return self._conv_forward(x, weight, self.bias)


class _TwoNorms(nn.Module):
    """A BatchNorm for each branch."""

    prune_flag = False

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.bn_list = nn.ModuleList([norm, copy.deepcopy(norm)])

    def forward(self, x: Tensor) -> Tensor:
        return self.bn_list[int(self.prune_flag)](x)


def published_network(
    backbone: nn.Module, head: nn.Module, masks: Mapping[str, Tensor], last: str = "fc"
) -> nn.Module:
    """A copy of a backbone, of the published layers, with the projection head as its last layer.

    Args:
        backbone: of `nn.Conv2d` and BatchNorm layers.
        head: the projection head.
        masks: of the backbone's convolutions.
        last: name of the layer that the head replaces.
    """
    network = copy.deepcopy(backbone)
    setattr(network, last, copy.deepcopy(head))
    for name, module in list(network.named_modules()):
        parent, _, own = name.rpartition(".")
        new: nn.Module
        if isinstance(module, nn.Conv2d):
            settings: dict[str, Any] = {
                key: getattr(module, key)
                for key in ("in_channels", "out_channels", "kernel_size", "stride", "padding")
            }
            new = conv = _PrunedConv(**settings, bias=module.bias is not None)
            conv.weight, conv.bias = module.weight, module.bias
            conv.prune_mask = masks[f"{name}.weight"].to(module.weight)
            conv.prune_mask = torch.empty_like(module.weight).copy_(conv.prune_mask)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            new = _TwoNorms(module)
        else:
            continue
        setattr(network.get_submodule(parent), own, new)
    return network


def _set_prune_flag(network: nn.Module, flag: bool) -> None:
    for module in network.modules():
        if isinstance(module, _PrunedConv | _TwoNorms):
            module.prune_flag = flag


def published_loss(x: Tensor, features2: Tensor, t: float) -> Tensor:
    """NT-Xent as published: the mean over both views of all samples."""
    n = len(x)
    out_1, out_2 = functional.normalize(x, dim=-1), functional.normalize(features2, dim=-1)
    out = torch.cat([out_1, out_2])
    neg = torch.exp(out @ out.t() / t)
    is_negative = ~torch.eye(n, dtype=torch.bool).repeat(2, 2)
    neg = neg.masked_select(is_negative).view(2 * n, -1)
    pos = torch.exp(torch.sum(out_1 * out_2, dim=-1) / t)
    pos = torch.cat([pos, pos])
    return (-torch.log(pos / (pos + neg.sum(dim=-1)))).mean()


def published_step(
    network: nn.Module,
    view_1: Tensor,
    view_2: Tensor,
    t: float,
    optimizer: torch.optim.Optimizer | None = None,
    forward: nn.Module | None = None,
) -> Tensor:
    """Three forward and two backward passes.

    Args:
        network: of `published_network`; its gradients are added to, unless an optimizer clears them.
        view_1: of the dense branch.
        view_2: of the pruned branch.
        t: temperature.
        optimizer: makes a step, or None.
        forward: `network` compiled, or None.

    Returns:
        The loss.
    """
    run = network if forward is None else forward
    network.train()
    if optimizer is not None:
        optimizer.zero_grad()
    with torch.no_grad():
        _set_prune_flag(network, True)
        features_2_no_grad = run(view_2).detach()
    _set_prune_flag(network, False)
    features_1 = run(view_1)
    loss = published_loss(features_1, features_2_no_grad, t)
    loss.backward()
    features_1_no_grad = features_1.detach()
    _set_prune_flag(network, True)
    features_2 = run(view_2)
    published_loss(features_1_no_grad, features_2, t).backward()
    if optimizer is not None:
        optimizer.step()
    return loss.detach()
