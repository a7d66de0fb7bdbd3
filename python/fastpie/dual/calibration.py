"""Normalisation statistics of the pruned model: which there are, and recalibration from data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastpie.dual import inputs
from fastpie.dual.modes import evaluating
from fastpie.errors import FastpieError

if TYPE_CHECKING:
    from fastpie.dual.model import DualModel

__all__ = [
    "Calibration",
    "affected_layers",
    "calibration_of",
    "calibration_of_all",
    "statistics_of",
]

State = Callable[[], dict[str, Tensor]]


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """Buffers of the layers that keep running statistics (BatchNorm, InstanceNorm), by name."""
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            for name, buffer in module.named_buffers(recurse=False):
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def affected_layers(dual: DualModel, args: tuple[Any, ...], level: int) -> set[str]:
    """BatchNorm layers with a removed weight upstream at one level.

    Found by running the model once with NaN in place of every removed weight: NaN spreads through
    convolutions, activations, pooling and attention to all that depends on the weight, whatever
    the data. Must be called in eval mode.
    """
    state = dual.at_every_site(lambda w, codes: w.masked_fill(codes <= level, torch.nan))
    reached: set[str] = set()

    def look(name: str, x: Tensor) -> None:
        if x.isnan().any():
            reached.add(name)

    with _watch_inputs(dual.model, _batch_norms(dual.model), look):
        dual.run_pruned(state, args)
    return reached


@dataclass
class _Moments:
    """Mean and sum of squared deviations per channel, merged batch by batch (Chan et al., 1979)."""

    count: int
    mean: Tensor  # [C] fp64
    m2: Tensor  # [C] fp64

    def merge(self, count: int, mean: Tensor, m2: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.m2 = self.m2 + m2 + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total


class Calibration:
    """Recalibrates models of one module tree from data that come batch by batch.

    Each layer normalises a batch by that batch's own statistics, and its pooled ones over all batches
    replace what it had. Nothing changes before `finish`.
    """

    def __init__(
        self,
        dual: DualModel,
        targets: Sequence[tuple[State, dict[str, Tensor]]],
        layers: Callable[[tuple[Any, ...]], list[set[str]]],
    ) -> None:
        """Nothing is run yet.

        Args:
            dual: holds the module tree.
            targets: of each model, what makes its state (`DualModel.pruned_state`), and its
                statistics by name, to be replaced.
            layers: of the first batch's arguments, the BatchNorm layers of each model to recalibrate.
        """
        self._dual = dual
        self._targets = targets
        self._layers = layers
        self._chosen: list[set[str]] | None = None
        self._moments: list[dict[str, _Moments]] = [{} for _ in targets]

    @property
    def idle(self) -> bool:
        """Whether further batches change nothing, as no layer is to be recalibrated."""
        return self._chosen is not None and not any(self._chosen)

    def add(self, batch: Any) -> None:
        """Account for a batch; see DualModel.recalibrate."""
        args = inputs.of_batch(batch)
        if inputs.batch_size(args) == 0:
            return
        with torch.no_grad(), evaluating(self._dual.model):
            if self._chosen is None:
                self._chosen = self._layers(args)
            for (state, _), layers, moments in zip(
                self._targets, self._chosen, self._moments, strict=True
            ):
                if layers:
                    _observe(self._dual, args, state(), layers, moments)

    def finish(self) -> None:
        """Replace the statistics: of all models, or of none if one is not finite."""
        if self._chosen is None:
            raise FastpieError("Expected batches to recalibrate from, but there are none.")
        with torch.no_grad():
            dense = statistics_of(self._dual.model)
            replacements = []
            for moments in self._moments:
                fresh = {name: value.clone() for name, value in dense.items()}
                for layer, m in moments.items():
                    if not (m.mean.isfinite().all() and m.m2.isfinite().all()):
                        raise FastpieError(
                            f"Expected finite inputs of {layer!r} while recalibrating, but the data "
                            "give NaN or infinite statistics."
                        )
                    prefix = f"{layer}." if layer else ""
                    fresh[f"{prefix}running_mean"] = m.mean
                    fresh[f"{prefix}running_var"] = m.m2 / max(m.count - 1, 1)
                replacements.append(fresh)
            for (_, own), fresh in zip(self._targets, replacements, strict=True):
                for name, value in fresh.items():
                    own[name].copy_(value)


def calibration_of(dual: DualModel) -> Calibration:
    """Of the pruned model at every level, in the layers with a removed weight upstream."""
    levels = range(len(dual.sparsities))
    return Calibration(
        dual,
        [(partial(dual.pruned_state, level), dual.statistics(level)) for level in levels],
        lambda args: [affected_layers(dual, args, level) for level in levels],
    )


def calibration_of_all(dual: DualModel) -> Calibration:
    """Of every model, the one called dense too, in every layer."""
    levels = range(len(dual.sparsities))
    layers = set(_batch_norms(dual.model))
    return Calibration(
        dual,
        [
            (dict, statistics_of(dual.model)),
            *((partial(dual.pruned_state, level), dual.statistics(level)) for level in levels),
        ],
        lambda args: [layers] * (1 + len(levels)),
    )


def _observe(
    dual: DualModel,
    args: tuple[Any, ...],
    state: dict[str, Tensor],
    layers: set[str],
    into: dict[str, _Moments],
) -> None:
    """Run a model once; each of `layers` normalises by the batch and is accounted."""
    state = {**state, **{name: t.clone() for name, t in statistics_of(dual.model).items()}}
    modules = {name: m for name, m in _batch_norms(dual.model).items() if name in layers}

    def account(name: str, x: Tensor) -> None:
        if x.numel() == 0:
            return
        x = x.double().transpose(0, 1).flatten(1) if x.ndim > 1 else x.double().unsqueeze(1)
        count, mean = x.shape[1], x.mean(1)
        m2 = (x - mean.unsqueeze(1)).square().sum(1)
        # Under functional_call these are the clones above: eval mode then uses the batch's own.
        modules[name].running_mean.copy_(mean)  # type: ignore[operator]
        modules[name].running_var.copy_(m2 / count)  # type: ignore[operator]
        if name in into:
            into[name].merge(count, mean, m2)
        else:
            into[name] = _Moments(count, mean, m2)

    with _watch_inputs(dual.model, modules, account):
        dual.run_pruned(state, args)


def _batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }


@contextmanager
def _watch_inputs(model: nn.Module, modules: dict[str, nn.Module], look: Any) -> Iterator[None]:
    """Call look(name, input) before each of `modules` runs."""
    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(
                lambda module, args, name=name: look(name, args[0])
            )
            stack.callback(handle.remove)
        yield
