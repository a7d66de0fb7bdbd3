"""Small networks that several suites run: one for each thing that can go wrong in a dual forward.

`SMALL` is cheap enough for every test; `MONAI` holds the networks that users have, at small sizes
and with random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["MONAI", "SMALL", "Network", "masked_copy", "random_masks"]


class PlainCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, groups=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv2(functional.relu(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class ResidualCNN(nn.Module):
    """A stem, one residual block and a head, with BatchNorm: conv -> bn -> add, as in ResNet."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(6, momentum=momentum)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6, momentum=momentum)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6, momentum=momentum)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn0(self.stem(x)))
        y = functional.relu(self.bn1(self.conv1(x)))
        x = functional.relu(x + self.bn2(self.conv2(y)))
        return self.fc(x.mean((2, 3)))


class TiedWeights(nn.Module):
    """Two layers that hold the same parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class ReusedModule(nn.Module):
    """One layer and one BatchNorm called three times, and known by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.alias = self.conv
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv, self.alias, self.conv):
            x = functional.relu(self.bn(layer(x)))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Reads the weights of its layers without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Transformer(nn.Module):
    """Takes the fused path of nn.TransformerEncoderLayer in eval mode without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


class ControlFlow(nn.Module):
    """The path depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.low = nn.Linear(6, 3)
        self.high = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(x.shape[0] % 2 + 1):
            x = torch.tanh(x)
        return self.high(x) if x.sum().item() > 0 else self.low(x)


class SeveralInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 4, 3)
        self.table = nn.Linear(2, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
        both = [self.image(image).relu().mean((2, 3)), self.table(table) * scale]
        return self.head(torch.cat(both, 1))


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.body(x).relu()
        return {"logits": self.head(x), "aux": {"embedding": x}}


class TupleOutput(DictOutput):
    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:  # type: ignore[override]
        x = self.body(x).relu()
        return self.head(x), [x, x.sum(1)]


class DropoutNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 32)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(functional.dropout(self.body(x).relu(), 0.3, self.training)))


def _conv_1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 5, 3, padding=1),
        nn.BatchNorm1d(5),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


def _conv_3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


@dataclass(frozen=True)
class Network:
    """A network, how to build it, and the shapes of its inputs without the batch."""

    name: str
    factory: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]

    def build(self) -> nn.Module:
        """Eval mode, seeded weights, BatchNorm with statistics and affine weights of its own."""
        generator_state = torch.get_rng_state()
        torch.manual_seed(7)
        model = self.factory()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
        torch.set_rng_state(generator_state)
        return model.eval()

    def inputs(self, batch: int = 4) -> tuple[Tensor, ...]:
        return tuple(torch.randn(batch, *shape) for shape in self.shapes)


SMALL = [
    Network("plain", PlainCNN, ((3, 9, 9),)),
    Network("residual", ResidualCNN, ((3, 8, 8),)),
    Network("tied", TiedWeights, ((6,),)),
    Network("reused", ReusedModule, ((4, 6, 6),)),
    Network("attention", Attention, ((7, 5),)),
    Network("transformer", Transformer, ((7, 5),)),
    Network("control_flow", ControlFlow, ((6,),)),
    Network("several_inputs", SeveralInputs, ((3, 6, 6), (2,))),
    Network("dict_output", DictOutput, ((6,),)),
    Network("tuple_output", TupleOutput, ((6,),)),
    Network("dropout", DropoutNetwork, ((6,),)),
    Network("conv_1d", _conv_1d, ((3, 12),)),
    Network("conv_3d", _conv_3d, ((2, 5, 5, 5),)),
]


def _monai(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from monai.networks import nets

        return getattr(nets, name)(**kwargs)

    return build


_DENSENET = {"in_channels": 3, "out_channels": 4, "init_features": 16, "growth_rate": 8}
_RESNET_3D = {"spatial_dims": 3, "n_input_channels": 1, "num_classes": 4, "widen_factor": 0.25}
MONAI = [
    Network(
        "resnet18_2d",
        _monai("resnet18", spatial_dims=2, n_input_channels=3, num_classes=4, widen_factor=0.25),
        ((3, 32, 32),),
    ),
    Network("resnet10_3d", _monai("resnet10", **_RESNET_3D), ((1, 16, 16, 16),)),
    Network("densenet121", _monai("DenseNet121", spatial_dims=2, **_DENSENET), ((3, 32, 32),)),
    Network(
        "efficientnet_b0",
        _monai("EfficientNetBN", model_name="efficientnet-b0", pretrained=False, num_classes=4),
        ((3, 32, 32),),
    ),
    Network(
        "unet",
        _monai(
            "UNet",
            spatial_dims=2,
            in_channels=1,
            out_channels=3,
            channels=(4, 8, 16),
            strides=(2, 2),
            num_res_units=1,
            norm="batch",
        ),
        ((1, 16, 16),),
    ),
    Network(
        "vit",
        _monai(
            "ViT",
            in_channels=1,
            img_size=(16, 16),
            patch_size=(8, 8),
            hidden_size=24,
            mlp_dim=48,
            num_layers=2,
            num_heads=4,
            num_classes=4,
            spatial_dims=2,
            classification=True,
            post_activation="",
        ),
        ((1, 16, 16),),
    ),
]


def random_masks(model: nn.Module, sparsity: float = 0.5) -> dict[str, Tensor]:
    """Bool masks of every convolution and linear weight, drawn from torch's generator."""
    masks: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear) and id(weight) not in seen:
            seen.add(id(weight))
            masks[f"{name}.weight"] = torch.rand(weight.shape) >= sparsity
    return masks


def masked_copy(model: nn.Module, masks: Any) -> nn.Module:
    """What the pruned model must equal: a deep copy whose removed weights are zero."""
    pruned = copy.deepcopy(model)
    parameters = dict(pruned.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in masks:
            parameters[name].mul_(masks[name])
    return pruned
