"""`Committee`: copies of a model with noise on its weights, as one engine."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastpie.dual import calibration
from fastpie.dual.calibration import statistics_of
from fastpie.dual.model import Buffers, DualModel
from fastpie.dual.output import DualOutput
from fastpie.errors import FastpieError
from fastpie.pruning.masks import Masks

__all__ = ["Committee"]


class Committee(DualModel):
    """K copies of a model, each with Gaussian noise of its own on its weights.

    How much a label's margin depends on the very weights tells memorised labels from learnt ones. The
    noise of a weight tensor with two dimensions or more is `noise` times the standard deviation of
    its values; biases and normalisation are left alone. For one seed the copies are the same on
    every device.

    A committee is a `DualModel` whose "dense" model is the first copy and whose "pruned" models are
    the others, so that everything that captures, checks and runs dual models runs committees. No mask
    takes part. `outputs` gives the copies of a result in one dimension.
    """

    def __init__(
        self, model: nn.Module, copies: int = 6, noise: float = 0.3, seed: int = 0
    ) -> None:
        """Copy a model; it is left as it was.

        Args:
            model: any module.
            copies: K, at least 2.
            noise: standard deviation of the noise, in those of each weight tensor.
            seed: of the noise.

        Raises:
            FastpieError: for fewer than 2 copies, a noise that is not above 0, or a model without
                weights.
        """
        if copies < 2:
            raise FastpieError(f"Expected a committee of at least 2 copies, but got {copies}.")
        if not 0 < noise < float("inf"):
            raise FastpieError(f"Expected a `noise` above 0, but got {noise}.")
        dense = dict(model.named_parameters())
        if not any(weight.ndim > 1 for weight in dense.values()):
            raise FastpieError(
                f"Expected a model with weights, but {type(model).__name__} has none."
            )
        first = copy.deepcopy(model).eval().requires_grad_(False)
        for name, weight in first.named_parameters():
            if weight.ndim > 1:
                weight.data = _disturbed(dense[name], noise, seed, 0, name)
        # The levels only count the copies: nothing has a mask.
        levels = [number / copies for number in range(1, copies)]
        fingerprint = Masks.fingerprint_of(first)
        super().__init__(first, Masks({}, levels, is_ladder=True, fingerprint=fingerprint))
        shared: dict[int, str] = {}
        sites = {
            site: shared.setdefault(id(weight), site)  # several sites of one tensor have one noise
            for site, weight in model.named_parameters(remove_duplicate=False)
            if weight.ndim > 1
        }
        for number in range(1, copies):
            weights = {
                name: _disturbed(dense[name], noise, seed, number, name)
                for name in set(sites.values())
            }
            own = {k: v.detach().clone() for k, v in statistics_of(model).items()}
            own.update({site: weights[name] for site, name in sites.items()})
            self._statistics[number - 1] = Buffers(own)
        self.eval()

    def calibration(self) -> calibration.Calibration:
        """Of BatchNorm in every layer of every copy: there is noise upstream of each."""
        return calibration.calibration_of_all(self)

    def own_statistics(self) -> dict[str, Tensor]:
        """The normalisation buffers of every copy, by one flat name ("0/bn1.running_mean")."""
        first = statistics_of(self.model)
        others = [self.statistics(number) for number in range(len(self.sparsities))]
        return {
            f"{number}/{name}": own[name]
            for number, own in enumerate([first, *others])
            for name in first
        }

    @staticmethod
    def outputs(out: DualOutput) -> Any:
        """What the copies gave: the model's structure, each tensor [K, N, ...]."""
        return pytree.tree_map(
            lambda first, others: (
                torch.cat([first.unsqueeze(0), others])
                if isinstance(first, Tensor)
                else [first, *others]
            ),
            out.dense,
            out.pruned,
        )


def _disturbed(weight: Tensor, noise: float, seed: int, number: int, name: str) -> Tensor:
    """The weight with noise that depends on the seed, the copy's number and the name alone."""
    key = hashlib.sha256(f"{seed} {number} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    values = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
    scale = noise * weight.detach().double().std(correction=0).item()
    return (weight.detach() + (values * scale).to(weight.device, weight.dtype)).clone()
