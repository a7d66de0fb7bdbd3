"""Normalisation statistics of the pruned model: which there are, and recalibration from data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastpie.dual import inputs
from fastpie.errors import FastpieError

if TYPE_CHECKING:
    from fastpie.dual.model import DualModel

__all__ = ["affected_layers", "recalibrate", "statistics_of"]


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


def recalibrate(dual: DualModel, batches: Iterable[Any]) -> None:
    """Recalibrate every level of `dual` in one pass over `batches`; see DualModel.recalibrate."""
    levels = range(len(dual.sparsities))
    affected: list[set[str]] | None = None
    moments: list[dict[str, _Moments]] = [{} for _ in levels]
    with torch.no_grad(), _eval_mode(dual.model):
        for batch in batches:
            args = inputs.of_batch(batch)
            if inputs.batch_size(args) == 0:
                continue
            if affected is None:
                affected = [affected_layers(dual, args, level) for level in levels]
            if not any(affected):
                break
            for level in levels:
                if affected[level]:
                    _observe(dual, args, level, affected[level], moments[level])
        if affected is None:
            raise FastpieError("Expected batches to recalibrate from, but there are none.")
        dense = statistics_of(dual.model)
        replacements = []
        for level in levels:
            fresh = {name: value.clone() for name, value in dense.items()}
            for layer, m in moments[level].items():
                if not (m.mean.isfinite().all() and m.m2.isfinite().all()):
                    raise FastpieError(
                        f"Expected finite inputs of {layer!r} while recalibrating, but the data "
                        "give NaN or infinite statistics."
                    )
                prefix = f"{layer}." if layer else ""
                fresh[f"{prefix}running_mean"] = m.mean
                fresh[f"{prefix}running_var"] = m.m2 / max(m.count - 1, 1)
            replacements.append(fresh)
        for level, fresh in enumerate(replacements):  # all of them, or none if one is not finite
            own = dual.statistics(level)
            for name, value in fresh.items():
                own[name].copy_(value)


def _observe(
    dual: DualModel, args: tuple[Any, ...], level: int, layers: set[str], into: dict[str, _Moments]
) -> None:
    """Run the pruned model once; each of `layers` normalises by the batch and is accounted."""
    state = dual.pruned_state(level)
    state.update({name: value.clone() for name, value in statistics_of(dual.model).items()})
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


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, each module's own mode after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
