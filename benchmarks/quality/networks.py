"""The networks that are trained: small enough for a core, each of a family of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["NETWORKS", "Classifier", "UNet", "build"]


class Classifier(nn.Module):
    """Stages, a mean over positions, and a linear head.

    `stages[i]` and `pool` are the modules whose outputs the scores look at.
    """

    def __init__(self, stages: list[nn.Module], width: int, classes: int) -> None:
        super().__init__()
        self.stages = nn.Sequential(*stages)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # [N, channels, H, W] -> [N, classes]
        return self.head(self.pool(self.stages(x)))


def cnn(channels: int, size: int, classes: int) -> Classifier:
    """Four plain convolutions with BatchNorm, 61,000 parameters."""
    stem = _conv(channels, 16, 3, 1)
    if size > 16:
        stem = _conv(channels, 16, 5, 2)
    stages: list[nn.Module] = [
        stem,
        nn.Sequential(_conv(16, 32, 3, 1), nn.MaxPool2d(2)),
        nn.Sequential(_conv(32, 64, 3, 1), nn.MaxPool2d(2)),
        _conv(64, 64, 3, 1),
    ]
    return Classifier(stages, 64, classes)


def resnet10(
    channels: int, size: int, classes: int, width: int = 16, blocks: int = 1
) -> Classifier:
    """ResNet-18 (He et al., arXiv 1512.03385) with half its blocks and a quarter of its width, 0.3 M parameters."""
    stem = _conv(channels, width, 5, 2) if size > 16 else _conv(channels, width, 3, 1)
    stages: list[nn.Module] = [stem]
    inputs = width
    for place, outputs in enumerate((width, 2 * width, 4 * width, 8 * width)):
        # Images of 8 pixels are halved twice only.
        stride = 1 if place == 0 or (size <= 16 and place == 3) else 2
        stages.append(
            nn.Sequential(
                _Block(inputs, outputs, stride),
                *(_Block(outputs, outputs, 1) for _ in range(blocks - 1)),
            )
        )
        inputs = outputs
    return Classifier(stages, inputs, classes)


def densenet(channels: int, size: int, classes: int) -> Classifier:
    """MONAI's DenseNet (Huang et al., arXiv 1608.06993) of three blocks and growth 12, 50,000 parameters."""
    from monai.networks.nets import DenseNet

    whole = DenseNet(
        spatial_dims=2, in_channels=channels, out_channels=classes,
        init_features=24, growth_rate=12, block_config=(3, 4, 4), bn_size=2,
    )  # fmt: skip
    parts = dict(whole.features.named_children())
    if size <= 16:  # its stem divides by 4
        parts["conv0"] = nn.Conv2d(channels, 24, 3, 1, 1, bias=False)
        parts["pool0"] = nn.Identity()
    stem = nn.Sequential(parts["conv0"], parts["norm0"], parts["relu0"], parts["pool0"])
    last = nn.Sequential(parts["denseblock3"], parts["norm5"], nn.ReLU())
    stages = [
        stem,
        nn.Sequential(parts["denseblock1"], parts["transition1"]),
        nn.Sequential(parts["denseblock2"], parts["transition2"]),
        last,
    ]
    return Classifier(stages, whole.class_layers.out.in_features, classes)


def resnet10_fine(channels: int, size: int, classes: int) -> Classifier:
    """`resnet10`, narrower, with maps of 8 x 8 at the end of 32 x 32 images: to localise by."""
    stages: list[nn.Module] = [_conv(channels, 12, 5, 2)]
    inputs = 12
    for outputs, stride in ((12, 1), (24, 2), (48, 1), (96, 1)):
        stages.append(_Block(inputs, outputs, stride))
        inputs = outputs
    return Classifier(stages, inputs, classes)


NETWORKS: dict[str, Callable[[int, int, int], Classifier]] = {
    "cnn": cnn,
    "resnet10": resnet10,
    "resnet10 fine": resnet10_fine,
    "densenet": densenet,
}


def build(name: str, channels: int, size: int, classes: int, seed: int) -> Classifier:
    """A fresh network with seeded weights."""
    torch.manual_seed(seed)
    return NETWORKS[name](channels, size, classes)


class UNet(nn.Module):
    """Three resolutions, BatchNorm, one logit a pixel (after Ronneberger et al., arXiv 1505.04597)."""

    def __init__(self, channels: int, width: int = 12) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [
                _conv(channels, width, 3, 1),
                _conv(width, 2 * width, 3, 2),
                _conv(2 * width, 4 * width, 3, 2),
            ]
        )
        self.up = nn.ModuleList([_conv(6 * width, 2 * width, 3, 1), _conv(3 * width, width, 3, 1)])
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:  # [N, channels, H, W] -> [N, 1, H, W]
        first = self.down[0](x)
        second = self.down[1](first)
        x = self.down[2](second)
        for block, skip in zip(self.up, (second, first), strict=True):
            x = block(torch.cat([functional.interpolate(x, scale_factor=2), skip], 1))
        return self.head(x)


class _Block(nn.Module):
    """Two convolutions and a skip."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs, 3, stride)
        self.second = _conv(outputs, outputs, 3, 1)[:2]
        self.skip = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else _conv(inputs, outputs, 1, stride)[:2]
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.second(self.first(x)) + self.skip(x))


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
