"""One training, and what is looked at while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.quality.networks import Classifier, build

__all__ = ["BATCH", "EPOCHS", "forward", "loss_of", "train"]

BATCH = 64
EPOCHS = 16
LEARNING_RATE = 0.003


def train(
    network: str,
    images: Tensor,  # [N, channels, H, W]
    labels: Tensor,  # int64 [N], or fp32 [N, C]
    *,
    classes: int,
    seed: int,
    epochs: int = EPOCHS,
    stop: int | None = None,
    shift: int = 0,
    after_epoch: Callable[[int, Classifier], None] | None = None,
) -> Classifier:
    """Train a fresh network; it comes back in eval mode.

    Args:
        network: a name in `networks.NETWORKS`.
        images: of the training set.
        labels: theirs.
        classes: C.
        seed: of weights and batches.
        epochs: that the learning rate is planned for.
        stop: end after so many of them.
        shift: augment by moving each batch by up to so many pixels.
        after_epoch: called after each epoch, from 0, with the network in eval mode.
    """
    model = build(network, images.shape[1], images.shape[-1], classes, seed)
    model.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    steps = math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * steps
    )
    for epoch in range(stop or epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for batch in order.tensor_split(steps):
            x = images[batch].contiguous(memory_format=torch.channels_last)
            if shift:
                moves = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
                x = torch.roll(x, moves, (2, 3))
            loss = loss_of(model(x), labels[batch]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        if after_epoch is not None:
            after_epoch(epoch, model)
    return model.eval()


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:  # [N]
    """Cross-entropy, or the binary one summed over the classes."""
    if labels.ndim == 1:
        return functional.cross_entropy(logits, labels, reduction="none")
    return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1)


@torch.inference_mode()
def forward(model: nn.Module, images: Tensor, batch: int = 250) -> Tensor:
    """The outputs for all images."""
    parts = [
        model(part.contiguous(memory_format=torch.channels_last)) for part in images.split(batch)
    ]
    return torch.cat(parts)
