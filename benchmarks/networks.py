"""The networks of the benchmarks: standard architectures with seeded weights, and their masks.

Definitions come from MONAI where it gives the standard architecture (multiply-adds equal
torchvision's, `tests/benchmarks/test_networks.py` holds them to it), else they are here: torchvision
cannot be imported beside a CPU-only torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastpie

__all__ = [
    "NETWORKS",
    "Layer",
    "build",
    "layers_of",
    "masks_for",
    "multiply_adds",
    "multiply_adds_by_layer",
    "task_of",
]

_SEED = 7

# Weights are normal; their standard deviation is 0.05 at 256 inputs and falls with their fourth root.
# With the usual initialisations (a square root, some of them uniform) a global threshold at .9
# empties whole layers of these networks, which training does not do, and what follows an empty
# layer is a constant. An assumption; behind BatchNorm the scale changes nothing else.
_WEIGHT_STD, _AT_FAN_IN, _FAN_IN_POWER = 0.05, 256, -0.25

# Standard deviation of the log of the factors by which `trained-like` scales each filter and each
# input channel: an assumption, no fit. At sparsity .9 over each layer, 95 % of the rows of ResNet-50
# then have densities of 0 to .38, median .07; with independent weights .07 to .14, median .10.
_TRAINED_SPREAD = 0.5


class _InvertedResidual(nn.Module):
    """Expand, depthwise, project (Sandler et al., arXiv 1801.04381, section 3.3)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        layers = [_conv_bn(inputs, hidden, 1)] if expand != 1 else []
        layers.append(_conv_bn(hidden, hidden, 3, stride=stride, groups=hidden))
        layers.append(_conv_bn(hidden, outputs, 1)[:2])
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1 (arXiv 1801.04381, table 2)."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        blocks: list[nn.Module] = [_conv_bn(3, 32, 3, stride=2)]
        channels = 32
        for expand, outputs, repeats, stride in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
            (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ):  # fmt: skip
            for index in range(repeats):
                step = stride if index == 0 else 1
                blocks.append(_InvertedResidual(channels, outputs, step, expand))
                channels = outputs
        blocks.append(_conv_bn(channels, 1280, 1))
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class TinyCNN(nn.Module):
    """Not a benchmark: what the tests of the harness run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn(3, 16, 3)
        self.body = _conv_bn(16, 16, 3)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((x + self.body(x)).mean((2, 3)))


def _conv_bn(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


def _monai(name: str, **keywords: Any) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        from monai.networks import nets

        return getattr(nets, name)(**keywords)

    return factory


@dataclass(frozen=True)
class _Network:
    factory: Callable[[], nn.Module]
    size: tuple[int, ...]
    task: str = "multiclass"


# MONAI's ResNet has another stem and biased shortcuts unless told: these are the standard ones.
_RESNET = {"conv1_t_stride": 2, "bias_downsample": False}
_RESNET_2D = {"spatial_dims": 2, "n_input_channels": 3, "num_classes": 1000, **_RESNET}
_RESNET_3D = {"spatial_dims": 3, "n_input_channels": 1, "num_classes": 2, **_RESNET}

NETWORKS: dict[str, _Network] = {
    "resnet18": _Network(_monai("resnet18", **_RESNET_2D), (3, 224, 224)),
    "resnet50": _Network(_monai("resnet50", **_RESNET_2D), (3, 224, 224)),
    "densenet121": _Network(
        _monai("DenseNet121", spatial_dims=2, in_channels=3, out_channels=1000), (3, 224, 224)
    ),
    "efficientnet_b0": _Network(
        _monai("EfficientNetBN", model_name="efficientnet-b0", pretrained=False), (3, 224, 224)
    ),
    "mobilenet_v2": _Network(MobileNetV2, (3, 224, 224)),
    "resnet18_3d": _Network(_monai("resnet18", **_RESNET_3D), (1, 96, 96, 96)),
    "unet": _Network(
        _monai("BasicUNet", spatial_dims=2, in_channels=1, out_channels=2, norm="batch"),
        (1, 256, 256),
        "segmentation",
    ),
    "tiny": _Network(TinyCNN, (3, 32, 32)),
}


def build(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network in eval mode with seeded weights, and the size of one example.

    BatchNorm has running statistics taken from two batches of noise, so that activations keep their
    scale through the network, and weights below and biases above those of an initialisation, as
    training leaves them: at 1 and 0 a random network of this depth amplifies rounding (bf16 was off
    by .2 of the largest logit on ResNet-50, so by .02).

    Args:
        name: one of NETWORKS.

    Returns:
        The network and [channels, ...] of an input; the same bits each time.
    """
    if name not in NETWORKS:
        raise ValueError(f"Expected one of {sorted(NETWORKS)}, but got {name!r}.")
    network = NETWORKS[name]
    state = torch.get_rng_state()
    torch.manual_seed(_SEED)
    try:
        model = network.factory()
        _draw_weights(model)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for module in norms:
            nn.init.uniform_(module.weight, 0.2, 0.8)
            nn.init.normal_(module.bias, mean=0.3, std=0.3)
        momenta = [module.momentum for module in norms]
        for module in norms:
            module.momentum = None  # the mean over the batches seen
        model.train()
        with torch.no_grad():
            for _ in range(2):
                model(torch.randn(2, *network.size))
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
    finally:
        torch.set_rng_state(state)
    return model.eval(), network.size


def _draw_weights(model: nn.Module) -> None:
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
                continue
            fan_in = module.weight[0].numel()
            std = _WEIGHT_STD * (fan_in / _AT_FAN_IN) ** _FAN_IN_POWER
            nn.init.normal_(module.weight, std=std)


def task_of(name: str) -> str:
    """The task that `fastpie.disagreement` scores a network's outputs as."""
    return NETWORKS[name].task


def masks_for(
    model: nn.Module,
    sparsity: float | Sequence[float],
    scope: str = "layer",
    kind: str = "magnitude",
) -> fastpie.Masks:
    """Masks of a benchmark, by `fastpie.prune`; the same bits each time.

    Depthwise layers are left alone, as sparse MobileNets do (Elsen et al., arXiv 1911.09723): they
    hold 1 to 4 % of the weights, and of nine weights one in ten is none in a third of the filters.

    Args:
        model: of `build`.
        sparsity: a number, or a list for a ladder.
        scope: "layer" or "global".
        kind: "magnitude" and "random", or "trained-like": what magnitude pruning of trained weights
            leaves. There filters and input channels differ in scale, and so in density, while the
            weights of `build` are independent and give rows of nearly equal density. The weights
            are multiplied, for the choice of the masks only, by one log-normal factor for each
            filter and one for each input channel.
    """
    depthwise = [name for name, module in model.named_modules() if getattr(module, "groups", 1) > 1]
    chosen: dict[str, Any] = {"scope": scope, "exclude": depthwise}
    if kind == "magnitude":
        return fastpie.prune(model, sparsity, **chosen)
    if kind == "random":
        return fastpie.prune(model, sparsity, method="random", seed=_SEED, **chosen)
    if kind != "trained-like":
        raise ValueError(f"Expected magnitude, random or trained-like, but got {kind!r}.")
    scaled = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for parameter in scaled.parameters():
            for axis in (0, 1) if parameter.ndim > 1 else ():
                shape = [1] * parameter.ndim
                shape[axis] = parameter.shape[axis]
                noise = torch.randn(shape, generator=generator)
                parameter.mul_(torch.exp(_TRAINED_SPREAD * noise))
    return fastpie.prune(scaled, sparsity, **chosen)


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer as a network calls it.

    Attributes:
        input: [channels, ...] of its input without the batch.
        weight: shape of its weight.
        stride, padding, dilation, groups: of a convolution; None of a linear layer.
        count: how many layers of the network are like it.
    """

    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...] | None
    padding: tuple[int, ...] | None
    dilation: tuple[int, ...] | None
    groups: int | None
    count: int

    def __str__(self) -> str:
        if self.stride is None:
            return f"linear-{self.weight[1]}to{self.weight[0]}"
        kernel = "x".join(map(str, self.weight[2:]))
        inputs = self.weight[1] * (self.groups or 1)
        step = f"-s{self.stride[0]}" if max(self.stride) > 1 else ""
        depth = f"-g{self.groups}" if self.groups != 1 else ""
        side = "x".join(map(str, self.input[1:]))
        return f"{kernel}-{inputs}to{self.weight[0]}{step}{depth}-at-{side}"


def layers_of(name: str) -> list[Layer]:
    """The distinct convolution and linear layers of a network, in the order of their first call."""
    network = NETWORKS[name]
    with torch.device("meta"):
        model = network.factory().eval()
    counts: dict[Layer, int] = {}

    def record(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        is_conv = not isinstance(module, nn.Linear)
        layer = Layer(
            input=tuple(args[0].shape[1:]),
            weight=tuple(module.weight.shape),
            stride=tuple(module.stride) if is_conv else None,
            padding=tuple(module.padding) if is_conv else None,
            dilation=tuple(module.dilation) if is_conv else None,
            groups=module.groups if is_conv else None,
            count=1,
        )
        counts[layer] = counts.get(layer, 0) + 1

    _run_watched(model, torch.empty(1, *network.size, device="meta"), record)
    return [Layer(**{**vars(layer), "count": count}) for layer, count in counts.items()]


def multiply_adds(name: str) -> int:
    """Multiply-adds of convolutions and linear layers for one example."""
    return sum(multiply_adds_by_layer(name).values())


def multiply_adds_by_layer(name: str) -> dict[str, int]:
    """Multiply-adds of each convolution and linear layer for one example, by module name."""
    network = NETWORKS[name]
    with torch.device("meta"):
        model = network.factory().eval()
    names = {module: path for path, module in model.named_modules()}
    found: dict[str, int] = {}

    def count(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        pixels = args[0] if transposed else output
        path = names[module]
        found[path] = found.get(path, 0) + pixels.numel() * module.weight[0].numel()

    _run_watched(model, torch.empty(1, *network.size, device="meta"), count)
    return found


def _run_watched(model: nn.Module, x: Tensor, watch: Callable[..., None]) -> None:
    """Run once; `watch(module, args, output)` after each convolution and linear layer."""
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            module.register_forward_hook(watch)
    with torch.no_grad():
        model(x)
