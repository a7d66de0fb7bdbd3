"""The CUDA kernel on the emulator and, with the same tests, on a GPU: against the fp64 twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastpie import _C
from fastpie.errors import FastpieError
from fastpie.ops import _native, masked_conv_nhwc, reference
from fastpie.ops.masked_conv_nhwc import masked_conv_nhwc_cuda

TILES = range(4)
HOPPER_TILES = range(4, 6)  # where the device is one
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "leaky_relu": lambda x: functional.leaky_relu(x, 0.1),
    "hardswish": functional.hardswish,
    "silu": functional.silu,
    "gelu": functional.gelu,
}


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.cuda_emulated),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and (reason := _native.cuda_unusable_reason()) is not None:
        pytest.skip(reason)
    return request.param


@dataclass
class Layer:
    """One launch, with random operands: sizes as torch's convolutions take them."""

    size: tuple[int, ...] = (9, 7)
    channels: int = 16  # of a group
    filters: int = 24
    kernel: tuple[int, ...] = (3, 3)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (1, 1)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    images: int = 2
    models: int = 2
    shared_input: bool = False
    masked: tuple[bool, bool] = (False, True)
    keep: float = 0.3
    scaled: bool = True
    residual: bool = True
    activation: str = "relu"
    dtype: torch.dtype = torch.bfloat16
    behind: tuple[int, ...] = ()  # more output pixels than even padding gives
    special: bool = False
    operands: dict[str, list[Tensor | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rank = len(self.kernel)
        self.stride, self.padding, self.dilation = (
            v[:rank] if len(v) >= rank else (*v, *v[:1])[:rank]
            for v in (self.stride, self.padding, self.dilation)
        )
        n = range(self.models)
        x = [
            torch.randn(self.images, self.groups * self.channels, *self.size).to(self.dtype)
            for _ in n
        ]
        if self.special:
            values = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=self.dtype)
            for t in x:
                hit = torch.rand(t.shape) < 0.01
                t[hit] = values[torch.randint(0, 3, (int(hit.sum()),))]
        if self.shared_input:
            x = x[:1] * self.models
        shape = (self.filters, *self.kernel, self.channels)
        depth = self.channels * torch.Size(self.kernel).numel()
        self.weight = (torch.randn(shape) / depth**0.5).to(self.dtype)
        masks = [
            torch.rand(self.filters, self.channels, *self.kernel) < self.keep
            if self.masked[m]
            else None
            for m in n
        ]
        of_output = (self.images, self.filters, *self.output_size())
        self.operands = {
            "inputs": list(x),
            "masks": [None if m is None else reference.pack_mask(m) for m in masks],
            "scales": [torch.rand(self.filters) + 0.5 if self.scaled else None for _ in n],
            "biases": [torch.randn(self.filters) if self.scaled else None for _ in n],
            "residuals": [
                torch.randn(of_output).to(self.dtype) if self.residual else None for _ in n
            ],
        }

    def output_size(self) -> tuple[int, ...]:
        behind = self.behind or (0,) * len(self.kernel)
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1 + more
            for n, k, s, p, d, more in zip(
                self.size,
                self.kernel,
                self.stride,
                self.padding,
                self.dilation,
                behind,
                strict=True,
            )
        )

    def run(self, device: str, tile: int = 0) -> list[Tensor]:
        """The kernel, on poisoned outputs; with the first tile where there is no such `tile`."""
        tile %= len(masked_conv_nhwc.tiles())
        placed = {
            name: [None if t is None else _channels_last(t.to(device), name) for t in tensors]
            for name, tensors in self.operands.items()
        }
        if self.shared_input:
            placed["inputs"] = placed["inputs"][:1] * self.models
        shape = (self.images, *self.output_size(), self.filters)
        outputs = [
            torch.full(shape, -777.0, dtype=self.dtype, device=device).movedim(-1, 1)
            for _ in range(self.models)
        ]
        masked_conv_nhwc_cuda(
            weight=self.weight.to(device),
            **placed,
            outputs=outputs,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            activation=(self.activation, 0.1),
            tile=tile,
        )
        return [y.cpu() for y in outputs]

    def expected(self) -> list[Tensor]:
        """The twin in fp64. Zeros behind the image stand for padding that is not even."""
        exact = {
            name: [t if t is None or name == "masks" else t.double() for t in tensors]
            for name, tensors in self.operands.items()
        }
        if self.behind:
            more = [s * n for s, n in zip(self.stride, self.behind, strict=True)]
            pad = [v for n in reversed(more) for v in (0, n)]
            exact["inputs"] = [functional.pad(t, pad) for t in exact["inputs"]]
            cut = (slice(None), slice(None), *(slice(0, n) for n in self.output_size()))
            bare = {**exact, "residuals": [None] * self.models}
            results = self._twin(bare, None)
            pairs = zip(results, exact["residuals"], strict=True)
            return [
                ACTIVATIONS[self.activation](y[cut] + (0 if r is None else r)) for y, r in pairs
            ]
        return self._twin(exact, ACTIVATIONS[self.activation])

    def _twin(
        self,
        operands: dict[str, list[Tensor | None]],
        activate: Callable[[Tensor], Tensor] | None,
    ) -> list[Tensor]:
        return reference.masked_conv_nhwc(
            weight=self.weight.double(),
            **operands,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            activate=activate,
        )

    def check(self, device: str, tile: int = 0) -> list[Tensor]:
        results = self.run(device, tile)
        for y, wanted in zip(results, self.expected(), strict=True):
            # One rounding to the output type, and sums of fp32, which tensor cores truncate.
            tolerance = 2**-8 if self.dtype is torch.bfloat16 else 2**-11
            torch.testing.assert_close(
                y.double(),
                wanted,
                rtol=1.01 * tolerance,
                atol=2e-5 if device == "cpu" else 2e-4,
                equal_nan=True,
            )
        return results


def _channels_last(t: Tensor, name: str) -> Tensor:
    if name in ("inputs", "residuals"):
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    return t


def test_lists_the_tiles(device: str) -> None:
    tiles = _C.masked_conv_nhwc_tiles()
    has_hopper_tiles = device == "cpu" or torch.cuda.get_device_capability() == (9, 0)
    assert len(tiles) == len(TILES) + has_hopper_tiles * len(HOPPER_TILES)
    assert len(tiles) == len(set(masked_conv_nhwc.tiles()))
    for i, (filters, pixels, depth, warps, stages, *shared) in enumerate(tiles):
        assert warps <= 8
        for inputs, found in enumerate(shared, 1):  # and what the results pass through
            assert found >= 2 * stages * (filters + inputs * pixels) * depth
            assert 4 * filters * pixels <= found <= (227 if i in HOPPER_TILES else 99) * 1024


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("models", ["one", "two", "shared"])
@pytest.mark.parametrize("tile", [*TILES, *HOPPER_TILES])
def test_tiles(device: str, tile: int, models: str, dtype: torch.dtype) -> None:
    # More filters and pixels than a tile, and a depth that is no multiple of its steps.
    layer = Layer(
        size=(12, 13),
        channels=24,
        filters=136,
        models=1 if models == "one" else 2,
        shared_input=models == "shared",
        masked=(models == "one", True),
        images=1,
        dtype=dtype,
    )
    layer.check(device, tile)


LAYERS: dict[str, Callable[[], Layer]] = {
    "1x1": partial(Layer, kernel=(1, 1), padding=(0, 0), channels=64),
    "32 channels": partial(Layer, channels=32, masked=(True, True)),
    "40 channels": partial(Layer, channels=40, masked=(True, False)),
    "8 channels": partial(Layer, channels=8, filters=8),
    "one word and a half": partial(Layer, channels=48, filters=20, kernel=(1, 3), padding=(0, 1)),
    "stem": partial(
        Layer, size=(17, 19), channels=3, filters=64, kernel=(7, 7), stride=(2, 2), padding=(3, 3)
    ),
    "odd channels": partial(Layer, channels=33, filters=7, masked=(True, True)),
    "odd and one model": partial(Layer, channels=5, filters=9, models=1, masked=(True, True)),
    "shared and odd": partial(Layer, channels=12, filters=30, shared_input=True),
    "stride": partial(Layer, size=(14, 11), stride=(2, 3)),
    "dilation": partial(Layer, size=(14, 11), dilation=(2, 3), padding=(2, 0)),
    "groups": partial(Layer, groups=3, channels=16, filters=48),
    "odd groups": partial(Layer, groups=4, channels=6, filters=20, shared_input=True),
    "uneven padding": partial(Layer, size=(8, 8), stride=(2, 2), padding=(0, 0), behind=(1, 1)),
    "1d": partial(Layer, size=(41,), kernel=(5,), padding=(2,), stride=(2,)),
    "3d": partial(
        Layer, size=(4, 6, 5), kernel=(3, 2, 3), padding=(1, 0, 1), stride=(1, 2, 1), channels=8
    ),
    "linear": partial(Layer, size=(), kernel=(), images=37, channels=72, filters=10),
    "odd linear": partial(Layer, size=(), kernel=(), images=3, channels=50, filters=9),
    "nothing else": partial(Layer, scaled=False, residual=False, activation="none"),
    "one pixel": partial(Layer, size=(1, 1), images=1),
    "depthwise": partial(Layer, groups=24, channels=1, filters=24, size=(9, 9)),
    "wide depthwise": partial(
        Layer,
        groups=72,
        channels=1,
        filters=72,
        kernel=(5, 5),
        padding=(2, 2),
        stride=(2, 2),
        shared_input=True,
    ),
    "large depthwise": partial(
        Layer, groups=8, channels=1, filters=8, kernel=(9, 9), padding=(4, 4)
    ),
    "odd depthwise": partial(
        Layer, groups=13, channels=1, filters=13, models=1, masked=(True, True)
    ),
    "depthwise, two filters each": partial(Layer, groups=12, channels=1, filters=24),
    "one channel": partial(Layer, channels=1, filters=10, masked=(True, True)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(device: str, name: str) -> None:
    layer = LAYERS[name]()
    for tile in (1, 3, 5) if layer.channels % 8 == 0 and layer.channels > 1 else (0,):
        layer.check(device, tile)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device: str, activation: str) -> None:
    Layer(activation=activation, dtype=torch.float16, size=(5, 5), special=True).check(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 6, 16])
def test_nan_and_infinities(device: str, channels: int, dtype: torch.dtype) -> None:
    groups = 16 if channels == 1 else 1
    filters = 16 if channels == 1 else 10
    layer = Layer(
        groups=groups,
        channels=channels,
        filters=filters,
        special=True,
        dtype=dtype,
        kernel=(1, 1),
        padding=(0, 0),
    )
    for tile in (1, 5):
        results = layer.check(device, tile)
        assert any(y.isnan().any() for y in results)


@pytest.mark.parametrize("channels", [1, 5, 40])
@pytest.mark.parametrize("shared", [False, True])
def test_equal_models_have_equal_bits(device: str, shared: bool, channels: int) -> None:
    groups = 24 if channels == 1 else 1
    layer = Layer(channels=channels, groups=groups, keep=2.0, shared_input=shared)
    layer.operands = {name: [t[-1], t[-1]] for name, t in layer.operands.items()}
    layer.operands["masks"][0] = None  # nothing is masked, in either way of saying so
    for tile in [*TILES, *HOPPER_TILES] if channels == 40 else [0]:
        dense, pruned = layer.run(device, tile)
        assert torch.equal(dense, pruned)


@pytest.mark.parametrize("channels", [1, 5, 40])
def test_nothing_kept_leaves_bias_and_residual(device: str, channels: int) -> None:
    groups = 24 if channels == 1 else 1
    layer = Layer(channels=channels, groups=groups, keep=-1.0, activation="none")
    pruned = layer.check(device, 1)[1]
    bias, residual = layer.operands["biases"][1], layer.operands["residuals"][1]
    wanted = (bias.view(-1, 1, 1) + residual.float()).to(layer.dtype)
    assert torch.equal(pruned, wanted)


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_threads(device: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPIE_EMULATOR_SEED", str(seed))
    for channels in (5, 96):
        Layer(channels=channels, filters=70, size=(9, 9)).check(device, seed)


def test_inputs_off_alignment(device: str) -> None:
    """A tensor that begins in the middle of 16 bytes is read element by element."""
    layer = Layer(channels=16, filters=16, models=1, masked=(True, True))
    wanted = layer.run(device)[0]
    weight = torch.empty(layer.weight.numel() + 1, dtype=layer.dtype)
    weight[1:] = layer.weight.flatten()
    layer.weight = weight[1:].view(layer.weight.shape)
    if device == "cuda":
        weight = weight.cuda()
        layer.weight = weight[1:].view(layer.weight.shape)
    torch.testing.assert_close(layer.run(device)[0], wanted, rtol=0.01, atol=1e-3)


def test_empty(device: str) -> None:
    for y in Layer(images=0).run(device):
        assert y.shape[0] == 0


def test_refuses_what_does_not_fit(device: str) -> None:
    def refused(match: str, **changes: object) -> None:
        layer = Layer(models=1, size=(5, 5))
        arguments: dict[str, object] = {
            "inputs": [_channels_last(layer.operands["inputs"][0].to(device), "inputs")],
            "weight": layer.weight.to(device),
            "masks": [None],
            "scales": [None],
            "biases": [None],
            "residuals": [None],
            "outputs": [torch.empty(2, 5, 5, 24, dtype=layer.dtype, device=device).movedim(-1, 1)],
            "stride": (1, 1),
            "padding": (1, 1),
            "dilation": (1, 1),
            "groups": 1,
        }
        masked_conv_nhwc_cuda(**arguments)
        with pytest.raises(FastpieError, match=match):
            masked_conv_nhwc_cuda(**{**arguments, **changes})

    half = {"dtype": torch.bfloat16, "device": device}
    refused("channels-last", inputs=[torch.zeros(2, 16, 5, 5, **half)])
    refused("inputs.0.* to be .*\\[2, 16, 5, 5\\]", inputs=[torch.zeros(2, 17, 5, 5, **half)])
    refused("dimensions", inputs=[torch.zeros(2, 16, **half)])
    refused("one entry for each of 1 or 2 models", masks=[])
    refused("masks.0.*int32 \\[24, 9, 1\\]", masks=[torch.zeros(24, 9, 2, device=device)])
    refused("bfloat16 or float16", weight=torch.zeros(24, 3, 3, 16, device=device))
    refused("biases.0", biases=[torch.zeros(24, **half)])
    refused("groups", groups=5)
    refused("at least 1", stride=(1, 0))
    refused("strides", stride=(1,))
    refused("activation", activation=("tanh", 0.0))
    refused("tile", tile=99)
