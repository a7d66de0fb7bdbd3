"""`Masks`: which weights are kept, at one sparsity or along a nested ladder."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastpie._files import write_atomically
from fastpie.errors import FastpieError

__all__ = ["Masks"]

_FORMAT = "fastpie-masks-1"
_MAX_LEVELS = 255
_SAME_LEVEL = 1e-9  # sparsities closer than this are one level


class Masks(Mapping[str, Tensor]):
    """Boolean masks by parameter name, True = kept, at one or several sparsities.

    A mapping: `masks["layer1.0.conv1.weight"]` is a bool tensor of the weight's shape on the CPU.
    On a ladder (several nested levels) it is the mask of the highest level; `masks.at(sparsity)`
    is any one of them. One byte a weight holds all levels: the index of the level that removes it.

    Attributes:
        sparsities: the levels, increasing, each the fraction of weights removed, in [0, 1]
            (`prune` gives none of 1; masks made elsewhere may remove all). What `prune` took for a
            sparsity: of "filter" the fraction of filters, of "N:M" that of full groups; `removed`
            counts weights whatever the method.
        is_ladder: False for the masks of a single number, which give `[N, ...]` outputs of the
            pruned model; True for those of a list, which give `[L, N, ...]`.
        info: how the masks were made (method, scope, seed, digest of the weights), for the record.
    """

    def __init__(
        self,
        levels: Mapping[str, Tensor],
        sparsities: Sequence[float],
        *,
        is_ladder: bool,
        fingerprint: str,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        """Masks from level bytes; most callers want `prune` or `Masks.from_tensors`.

        Args:
            levels: by parameter name, uint8 of the weight's shape: the index of the level that
                removes the weight, or `len(sparsities)` where none does.
            sparsities: the levels, strictly increasing, in [0, 1].
            is_ladder: whether outputs of the pruned model carry a level dimension.
            fingerprint: of the parameter names and shapes of the model (`Masks.fingerprint_of`).
            info: anything JSON can hold.
        """
        self.sparsities = [float(s) for s in sparsities]
        self.is_ladder = bool(is_ladder)
        self.fingerprint = fingerprint
        self.info = dict(info or {})
        if not 1 <= len(self.sparsities) <= _MAX_LEVELS:
            raise FastpieError(f"Expected 1 to {_MAX_LEVELS} levels, but got {len(sparsities)}.")
        if not is_ladder and len(self.sparsities) != 1:
            raise FastpieError(f"Expected one sparsity without a ladder, but got {sparsities}.")
        if not all(0 <= s <= 1 for s in self.sparsities) or any(
            b <= a for a, b in zip(self.sparsities, self.sparsities[1:], strict=False)
        ):
            raise FastpieError(f"Expected levels in [0, 1] that increase, but got {sparsities}.")
        for name, level in levels.items():
            if level.dtype is not torch.uint8:
                raise FastpieError(f"Expected levels of `{name}` as uint8, but got {level.dtype}.")
        self._levels = dict(levels)

    @classmethod
    def from_tensors(
        cls, masks: Mapping[str, Tensor], model: nn.Module, *, info: Mapping[str, Any] | None = None
    ) -> Masks:
        """Masks of one level from bool tensors made elsewhere.

        Args:
            masks: by parameter name of `model`, bool of the parameter's shape, True = kept.
            model: the model that the masks belong to.
            info: how they were made, for the record.

        Raises:
            FastpieError: for an unknown name, a wrong shape or a dtype other than bool.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        levels, kept, total = {}, 0, 0
        holders: dict[int, str] = {}
        for name, mask in masks.items():
            if name not in parameters:
                raise FastpieError(
                    f"Expected masks of parameters of {type(model).__name__}, but it has no "
                    f"parameter {name!r}."
                )
            if mask.dtype is not torch.bool or mask.shape != parameters[name].shape:
                raise FastpieError(
                    f"Expected the mask of `{name}` to be bool of shape "
                    f"{list(parameters[name].shape)}, but got {mask.dtype} {list(mask.shape)}."
                )
            other = holders.setdefault(id(parameters[name]), name)
            if other != name:
                raise FastpieError(
                    f"Expected one mask of the weight `{other}`, but `{name}` shares it."
                )
            levels[name] = mask.detach().cpu().contiguous().to(torch.uint8)
            kept, total = kept + int(mask.sum()), total + mask.numel()
        if total == 0:
            raise FastpieError("Expected at least one mask, but got none.")
        return cls(
            levels,
            [1 - kept / total],
            is_ladder=False,
            fingerprint=cls.fingerprint_of(model),
            info={"method": "given", **(info or {})},
        )

    # ------------------------------------------------------------------ mapping

    def __getitem__(self, name: str) -> Tensor:
        """The mask of one parameter at the highest level."""
        return self._levels[name] >= len(self.sparsities)

    def __iter__(self) -> Iterator[str]:
        return iter(self._levels)

    def __len__(self) -> int:
        return len(self._levels)

    def __eq__(self, other: object) -> bool:
        """The same kept weights at the same sparsities, of the same model."""
        if not isinstance(other, Masks):
            return NotImplemented
        return (
            self.sparsities == other.sparsities
            and self.is_ladder == other.is_ladder
            and self.fingerprint == other.fingerprint
            and self.keys() == other.keys()
            and all(torch.equal(level, other._levels[name]) for name, level in self._levels.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"Masks({len(self)} parameters, {self.total} weights, sparsities={self.sparsities}, "
            f"is_ladder={self.is_ladder})"
        )

    # ------------------------------------------------------------------ levels

    @property
    def levels(self) -> Mapping[str, Tensor]:
        """By parameter name, uint8: the index of the level that removes each weight."""
        return self._levels

    @property
    def total(self) -> int:
        """How many weights the masks cover, kept or not."""
        return sum(level.numel() for level in self._levels.values())

    def at(self, sparsity: float) -> Masks:
        """The masks of one level of the ladder, as masks of a single sparsity.

        Raises:
            FastpieError: if no level lies within 1e-9 of `sparsity`.
        """
        for index, level in enumerate(self.sparsities):
            if abs(level - sparsity) <= _SAME_LEVEL:
                return Masks(
                    {name: (t > index).to(torch.uint8) for name, t in self._levels.items()},
                    [level],
                    is_ladder=False,
                    fingerprint=self.fingerprint,
                    info=self.info,
                )
        raise FastpieError(f"Expected one of the levels {self.sparsities}, but got {sparsity}.")

    def removed(self) -> list[dict[str, int]]:
        """How many weights each level removes, by parameter name."""
        return [
            {name: int((t <= index).sum()) for name, t in self._levels.items()}
            for index in range(len(self.sparsities))
        ]

    # ------------------------------------------------------------------ the model they belong to

    @staticmethod
    def fingerprint_of(model: nn.Module) -> str:
        """Hash of the names and shapes of a model's parameters."""
        lazy = [n for n, p in model.named_parameters() if nn.parameter.is_lazy(p)]
        if lazy:
            raise FastpieError(
                f"Expected initialised parameters, but {lazy} are lazy; run one batch."
            )
        shapes = [(name, list(p.shape)) for name, p in model.named_parameters()]
        return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that the masks were not made for.

        Other weights of the same architecture are fine: the fingerprint covers names and shapes.

        Raises:
            FastpieError: naming what differs.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, level in self._levels.items():
            if name not in parameters:
                raise FastpieError(
                    f"Expected the model that these masks were made for, but "
                    f"{type(model).__name__} has no parameter {name!r}."
                )
            if parameters[name].shape != level.shape:
                raise FastpieError(
                    f"Expected the model that these masks were made for, with `{name}` of shape "
                    f"{list(level.shape)}, but its shape is {list(parameters[name].shape)}."
                )
        if self.fingerprint != self.fingerprint_of(model):
            raise FastpieError(
                "Expected the model that these masks were made for, but the parameters of this "
                f"{type(model).__name__} differ in names or shapes (fingerprint "
                f"{self.fingerprint_of(model)[:12]}, masks have {self.fingerprint[:12]})."
            )

    def apply_(self, model: nn.Module) -> None:
        """Set the removed weights of `model` to zero in place, at the highest level."""
        self.check_model(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name in self:
                parameters[name].masked_fill_(~self[name].to(parameters[name].device), 0)

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks as safetensors, bit-packed: ceil(log2(L + 1)) bits a weight.

        The file is written under a temporary name and renamed: a crash leaves the old file or the
        new one.
        """
        write_atomically(Path(path), self.to_bytes())

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        from safetensors.numpy import save

        bits = _bits(len(self.sparsities))
        planes = {}
        for name, level in self._levels.items():
            flat = level.cpu().reshape(-1).numpy()
            planes[name] = np.stack([np.packbits((flat >> b) & 1) for b in range(bits)])
        header = {
            "format": _FORMAT,
            "sparsities": self.sparsities,
            "is_ladder": self.is_ladder,
            "fingerprint": self.fingerprint,
            "shapes": {name: list(level.shape) for name, level in self._levels.items()},
            "info": self.info,
        }
        data: bytes = save(planes, metadata={"header": json.dumps(header)})
        return data

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read masks written by `save`.

        Raises:
            FastpieError: if the file is missing, damaged or not one of masks.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, TypeError) as error:  # TypeError: bf16 in NumPy
            raise FastpieError(f"Expected masks in safetensors at {path}, but: {error}") from error
        return cls._unpacked(metadata, packed, f"at {path}")

    @classmethod
    def from_bytes(cls, data: bytes) -> Masks:
        """The masks of `to_bytes`.

        Raises:
            FastpieError: for other or damaged bytes.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            packed = load(data)
            size = int.from_bytes(data[:8], "little")  # of the JSON that safetensors begin with
            metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        except (AttributeError, SafetensorError, TypeError, ValueError) as error:
            raise FastpieError(f"Expected masks in safetensors, but: {error}") from error
        return cls._unpacked(metadata, packed, "in these bytes")

    @classmethod
    def _unpacked(
        cls, metadata: Mapping[str, str], packed: Mapping[str, np.ndarray], where: str
    ) -> Masks:
        try:
            header = json.loads(metadata["header"])
            if header["format"] != _FORMAT:
                raise ValueError(f"format {header['format']!r} instead of {_FORMAT!r}")
            bits = _bits(len(header["sparsities"]))
            levels = {}
            for name, shape in header["shapes"].items():
                count = math.prod(shape)
                flat = np.zeros(count, dtype=np.uint8)
                if packed[name].shape != (bits, -(-count // 8)):
                    raise ValueError(f"{name} holds {packed[name].shape}")
                for b in range(bits):
                    flat |= np.unpackbits(packed[name][b], count=count) << b
                levels[name] = torch.from_numpy(flat).reshape(shape)
            return cls(
                levels,
                header["sparsities"],
                is_ladder=header["is_ladder"],
                fingerprint=header["fingerprint"],
                info=header["info"],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FastpieError(f"Expected complete masks {where}, but: {error!r}") from error


def _bits(levels: int) -> int:
    return levels.bit_length()  # codes 0 ... levels
