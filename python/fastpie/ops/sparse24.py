"""Kept weights for sparse tensor cores: two of four columns, the rest spilled, nothing lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpie import _C
from fastpie.errors import FastpieError
from fastpie.ops import _native, reference
from fastpie.ops.packing import ACTIVATIONS
from fastpie.ops.positions import dtype_code

__all__ = ["Sparse24", "pack_sparse24", "sparse24_conv_cuda"]

_STEP = 32  # columns of one instruction

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@dataclass(frozen=True)
class Sparse24:
    """A masked weight in the layout that `mma.sp` reads; csrc/include/fastpie/sparse24.h has it.

    About .56 of the memory of a dense weight of 16 bits, times the growth of the columns, and as
    much again for `order`.

    Attributes:
        values: [steps, rows / 16, 32, 8] of the weight's dtype.
        metadata: int32 [steps, rows / 32, 32], two bits for each value.
        copies: int32 [extra columns, 2], which column goes to which extra one of the tile.
        step_begin: int64 [tiles + 1], the steps of each tile.
        copy_begin: int64 [tiles + 1], the copies of each tile.
        order: int32 [steps, rows / 16, 32, 8], where in the weight each value lies, or -1.
        counts: int64 [tiles, 4] on the CPU: steps, overfull groups, spilled weights, extra columns.
        shape: [filters, *kernel, channels] of the weight.
        rows: filters of a tile.
        kept: weights that the mask keeps.
    """

    values: Tensor
    metadata: Tensor
    copies: Tensor
    step_begin: Tensor
    copy_begin: Tensor
    order: Tensor
    counts: Tensor
    shape: torch.Size
    rows: int
    kept: int

    @property
    def filters(self) -> int:
        """Rows of the weight."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Taps times channels."""
        return self.shape[1:].numel()

    def to(self, device: torch.device | str) -> Sparse24:
        """The same on another device."""
        names = ("values", "metadata", "copies", "step_begin", "copy_begin", "order")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in names})

    def refilled(self, weight: Tensor) -> Sparse24:
        """The same mask with other values: `weight` as `pack_sparse24` takes it."""
        if weight.shape != self.shape or weight.dtype is not self.values.dtype:
            raise FastpieError(
                f"Expected `weight` to be {self.values.dtype} of shape {list(self.shape)}, but got "
                f"{weight.dtype} {list(weight.shape)}."
            )
        return dataclasses.replace(self, values=_gather(weight, self.order))

    def unpack(self) -> Tensor:
        """The masked weight [filters, *kernel, channels], bit for bit, from what a kernel reads."""
        steps, tiles = len(self.values), len(self.step_begin) - 1
        # One bit pattern for each place, summed as integers: all but one of them are 0.
        slots = torch.zeros(
            (steps, self.rows, 8, 4), dtype=_BITS[self.values.dtype], device=self.values.device
        )
        bits = self.values.view(slots.dtype).view(steps, self.rows // 16, 8, 4, 2, 2, 2)
        # [step, block, g, t, half, high, member] -> [step, block, high, g, half, t, member]
        bits = bits.permute(0, 1, 5, 2, 4, 3, 6).reshape(steps, self.rows, 8, 2)
        # Bits of [high, group % 4]:
        shifts = torch.arange(0, 32, 4, device=self.values.device).view(2, 4)
        fields = self.metadata.view(steps, self.rows // 32, 8, 2, 2, 1, 1) >> shifts
        # [step, pair, g, block % 2, half, high, group % 4]
        fields = fields.permute(0, 1, 3, 5, 2, 4, 6).reshape(steps, self.rows, 8, 1)
        places = torch.cat([fields & 3, fields >> 2 & 3], dim=-1)
        slots = slots.scatter_add(3, places.long(), bits).view(steps, self.rows, _STEP)

        main = -(-self.columns // _STEP)
        weight = slots.new_zeros(tiles, self.rows, self.columns)
        for tile in range(tiles):
            first, end = self.step_begin[tile : tile + 2].tolist()
            own = slots[first:end].transpose(0, 1).flatten(1)  # [rows, columns and extra ones]
            weight[tile] = own[:, : self.columns]
            columns, extra = self.copies[slice(*self.copy_begin[tile : tile + 2].tolist())].unbind(
                1
            )
            weight[tile].index_add_(1, columns, own[:, main * _STEP + extra])
        return weight.flatten(0, 1)[: self.filters].view(self.values.dtype).view(self.shape)

    def report(self) -> dict[str, int | float]:
        """What the packing cost.

        Returns:
            filters, columns and rows of a tile; kept weights; groups of four columns of a row, and
            those of them that are overfull (more than two kept); spilled weights; extra columns of
            all tiles; `growth`: columns that are computed over columns, mean over the tiles;
            `growth_unpadded`: the same without filling the last step of 32 up.
        """
        steps, overfull, spilled, extra = self.counts.sum(0).tolist()
        columns = len(self.counts) * self.columns
        return {
            "filters": self.filters,
            "columns": self.columns,
            "rows": self.rows,
            "kept": self.kept,
            "groups": self.filters * -(-self.columns // 4),
            "overfull": overfull,
            "spilled": spilled,
            "extra_columns": extra,
            "growth": _STEP * steps / columns if columns else 1.0,
            "growth_unpadded": 1 + extra / columns if columns else 1.0,
        }


def pack_sparse24(
    weight: Tensor,  # [K, *kernel, C]
    mask: Tensor,  # bool, the weight's shape; or int32 [K, taps, words], see pack_mask
    rows: int = 64,
) -> Sparse24:
    """Pack the kept weights for sparse tensor cores, without loss.

    A tile is `rows` filters. Its columns are followed by repeated ones for those weights that are
    the third or fourth kept of four neighbours. With independent masks and tiles of 64 that adds 5 % of
    columns at density .1, 23 % at .2 and half at .5, with rows and channels of uneven density more
    (`benchmarks.sparse24_growth`); a dense weight doubles them.

    Args:
        weight: fp32, bf16 or fp16, channels last. Only kept values are read.
        mask: True, or a set bit, for a kept weight; a kept weight of value 0 is packed like others.
        rows: filters of a tile: a multiple of 32, at most 256.

    Returns:
        The packed weight, on the device of `weight`; packing itself runs on the CPU.

    Raises:
        FastpieError: for another dtype, shapes that do not fit, or 2**31 weights and more.
    """
    if weight.dtype not in _BITS:
        raise FastpieError(
            f"Expected `weight` to be float32, bfloat16 or float16, but got {weight.dtype}."
        )
    if weight.ndim < 2:
        raise FastpieError(
            f"Expected `weight` to have shape [K, *kernel, C], but got {list(weight.shape)}."
        )
    if not isinstance(rows, int) or isinstance(rows, bool) or rows % 32 or not 32 <= rows <= 256:
        raise FastpieError(f"Expected `rows` to be a multiple of 32 up to 256, but got {rows!r}.")
    filters, channels, taps = weight.shape[0], weight.shape[-1], weight.shape[1:-1].numel()
    words = (filters, taps, -(-channels // 32))
    if mask.dtype is torch.int32 and mask.shape == words:
        mask = reference.unpack_mask(mask, channels).transpose(1, 2)
    elif mask.dtype is not torch.bool or mask.shape != weight.shape:
        raise FastpieError(
            f"Expected `mask` to be bool of shape {list(weight.shape)} or int32 of shape "
            f"{list(words)}, but got {mask.dtype} {list(mask.shape)}."
        )
    keep = mask.cpu().contiguous()
    tiles, columns = -(-filters // rows), taps * channels
    counts = torch.empty((tiles, 4), dtype=torch.int64)
    arguments = (keep.data_ptr(), filters, columns, rows)
    threads = torch.get_num_threads()
    _native.call(_C.count_sparse24, *arguments, counts.data_ptr(), threads)
    step_begin, copy_begin = torch.zeros((2, tiles + 1), dtype=torch.int64)
    step_begin[1:], copy_begin[1:] = counts[:, 0].cumsum(0), counts[:, 3].cumsum(0)
    steps = int(step_begin[-1])
    order = torch.empty((steps, rows // 16, 32, 8), dtype=torch.int32)
    metadata = torch.empty((steps, rows // 32, 32), dtype=torch.int32)
    copies = torch.empty((int(copy_begin[-1]), 2), dtype=torch.int32)
    _native.call(
        _C.pack_sparse24,
        *arguments,
        step_begin.data_ptr(),
        copy_begin.data_ptr(),
        order.data_ptr(),
        metadata.data_ptr(),
        copies.data_ptr(),
        threads,
    )
    order = order.to(weight.device)
    return Sparse24(
        values=_gather(weight, order),
        metadata=metadata.to(weight.device),
        copies=copies.to(weight.device),
        step_begin=step_begin.to(weight.device),
        copy_begin=copy_begin.to(weight.device),
        order=order,
        counts=counts,
        shape=weight.shape,
        rows=rows,
        kept=int(keep.sum()),
    )


def _gather(weight: Tensor, order: Tensor) -> Tensor:
    """The values in packed order, 0 where there is none."""
    values = weight.reshape(-1).index_select(0, order.view(-1).clamp(min=0)).view(order.shape)
    return values.masked_fill_(order < 0, 0)


def sparse24_conv_cuda(
    input: Tensor,  # [N, C, *spatial]
    packed: Sparse24,  # of a weight [K, *kernel, C]
    scale: Tensor | None,  # fp32 [K]
    bias: Tensor | None,  # fp32 [K]
    residual: Tensor | None,  # as output
    output: Tensor,  # [N, K, *spatial]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: tuple[str, float] = ("none", 0.0),
    tile_pixels: int = 0,
) -> None:
    """Convolve with a packed weight on sparse tensor cores, into `output`.

    Equivalent to::

        convolve = (F.linear, F.conv1d, F.conv2d, F.conv3d)[len(stride)]
        y = convolve(input, packed.unpack().movedim(-1, 1), None, stride, padding, dilation)
        output[:] = activate(scale * y + bias + residual)

    with fp32 in between. Nothing is allocated and nothing waited for: the call can be captured in a
    CUDA graph, and the tensors must live as long as that.

    Args:
        input: bf16 or fp16, channels a multiple of 32, channels last in memory.
        packed: in tiles of 64 or 128 rows, of the same dtype.
        scale: a factor of each filter, or None for 1.
        bias: or None.
        residual: or None.
        output: channels last in memory; its size says how much padding lies behind. Overlaps no
            other tensor.
        stride: of each spatial dimension, none for a linear layer; as the next two.
        padding: before the first pixel.
        dilation: see stride.
        activation: a name of `fastpie.ops.packing.ACTIVATIONS` and a slope.
        tile_pixels: pixels that a block of threads computes, 64 or 128; 0: a default.

    Raises:
        FastpieError: for what the kernel does not do, and for tensors that do not fit.
    """
    rank, (filters, *kernel, channels) = len(stride), packed.shape
    if len(kernel) != rank or rank > 3 or not len(padding) == len(dilation) == rank:
        raise FastpieError(
            f"Expected a stride, padding and dilation for each of the {len(kernel)} dimensions of "
            f"the kernel, at most 3, but got {list(stride)}, {list(padding)} and {list(dilation)}."
        )
    _check_channels_last("input", input, packed, channels)
    _check_channels_last("output", output, packed, filters)
    if residual is not None:
        _check_channels_last("residual", residual, packed, filters)
        if residual.shape != output.shape:
            raise FastpieError(
                f"Expected `residual` to have shape {list(output.shape)}, but got "
                f"{list(residual.shape)}."
            )
    if input.shape[0] != output.shape[0]:
        raise FastpieError(
            f"Expected `output` to have {input.shape[0]} images, but got {output.shape[0]}."
        )
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is not None and not (
            vector.dtype is torch.float32
            and vector.shape == (filters,)
            and vector.is_contiguous()
            and vector.device == input.device
        ):
            raise FastpieError(
                f"Expected `{name}` to be contiguous float32 of shape [{filters}] on "
                f"{input.device}, but got {vector.dtype} {list(vector.shape)} on {vector.device}."
            )
    if activation[0] not in ACTIVATIONS:
        raise FastpieError(
            f"Expected `activation` to be one of {sorted(ACTIVATIONS)}, but got {activation[0]!r}."
        )
    for name, values, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if min(values, default=least) < least:
            raise FastpieError(f"Expected `{name}` to be >= {least}, but got {list(values)}.")

    def three(values: Sequence[int], fill: int = 1) -> tuple[int, ...]:
        return (*[fill] * (3 - rank), *values)

    arguments = (
        input.data_ptr(),
        (
            packed.values.data_ptr(),
            packed.metadata.data_ptr(),
            packed.copies.data_ptr(),
            packed.step_begin.data_ptr(),
            packed.copy_begin.data_ptr(),
        ),
        *(0 if t is None else t.data_ptr() for t in (scale, bias, residual)),
        output.data_ptr(),
        dtype_code(input.dtype),
        (input.shape[0], channels, filters, packed.rows, tile_pixels),
        three(input.shape[2:]),
        three(output.shape[2:]),
        (three(kernel), three(stride), three(padding, 0), three(dilation)),
        ACTIVATIONS[activation[0]],
        activation[1],
    )
    if input.device.type == "cpu" and _C.cuda_emulated:
        _native.call(_C.sparse24_conv_cuda, *arguments, 0)
        return
    if input.device.type != "cuda":
        raise FastpieError(f"Expected tensors on a CUDA device, but got {input.device}.")
    if (reason := _native.cuda_unusable_reason()) is not None:
        raise FastpieError(f"Expected usable CUDA kernels, but {reason}.")
    with torch.cuda.device(input.device):
        _native.call(_C.sparse24_conv_cuda, *arguments, _native.cuda_stream(input))


def _check_channels_last(name: str, tensor: Tensor, packed: Sparse24, channels: int) -> None:
    rank = len(packed.shape) - 2
    if (
        tensor.ndim != rank + 2
        or tensor.shape[1] != channels
        or not tensor.movedim(1, -1).is_contiguous()
    ):
        raise FastpieError(
            f"Expected `{name}` to have {rank + 2} dimensions, the second of size {channels} and "
            f"last in memory, but got shape {list(tensor.shape)} and strides "
            f"{list(tensor.stride())}."
        )
    if tensor.dtype is not packed.values.dtype or tensor.device != packed.values.device:
        raise FastpieError(
            f"Expected `{name}` to be {packed.values.dtype} on {packed.values.device}, as the "
            f"packed weight, but got {tensor.dtype} on {tensor.device}."
        )
