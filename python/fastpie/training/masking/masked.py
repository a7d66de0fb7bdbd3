"""`MaskedTraining`: masks that stay in force while a network is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastpie.errors import FastpieError
from fastpie.mining.ranks import Ranks
from fastpie.nn import apply_masks, remove_masks
from fastpie.ops.masked_conv_sparse import FORWARD_DENSITY
from fastpie.pruning import Masks
from fastpie.training.masking.rewinding import RewindPoint
from fastpie.training.masking.schedules import IterativePruning, MaskingSchedule
from fastpie.training.masking.tensors import MaskedTensors

__all__ = ["MaskedTraining"]

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


class MaskedTraining:
    """Keeps removed weights at zero through every step of an optimizer, by masks or a schedule.

    Given the optimizer nothing is to be called: hooks of it do the work::

        masked = MaskedTraining(model, fastpie.prune(model, 0.9), optimizer)
        masked = MaskedTraining(model, GradualPruning(0.9, begin=0, end=10_000), optimizer)
        for images, labels in loader:
            ...  # backward, optimizer.step()

    After each step the removed weights are exactly zero, and so is every tensor of their shape in
    the optimizer's state: momentum and moments, so that a weight that comes back starts clean. All
    other weights are updated as they would be, to the bit, by any `torch.optim.Optimizer`. Works with
    tied weights, gradient accumulation, GradScaler, `torch.compile` and DDP.
    An optimizer that works on sums over all weights (LBFGS, norms of layers) sees gradients of removed
    ones unless `mask_gradients` is called before its step; so does clipping by norm.

    Under torch.distributed every process makes one, after `init_process_group`; rank 0 chooses the
    masks of all. Make it when the weights are loaded: masks are chosen from them. Masks in the dtype
    of the weights take the memory of one more copy of these. What is NaN or infinite becomes NaN where
    it is removed, as in ``weight * mask``.

    Attributes:
        masks: in force, of one level.
        step: steps of the optimizer so far, those that a fused one has skipped for a GradScaler
            included; where an `IterativePruning` rewinds, those of the round.
        round: of an `IterativePruning`, counted from 0; else 0.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks | MaskingSchedule,
        optimizer: Optimizer | None = None,
        *,
        rewound: Sequence[Any] = (),
    ) -> None:
        """Set the removed weights to zero and watch the optimizer.

        Args:
            model: any network, in DDP or `torch.compile` or not.
            masks: those of `fastpie.prune` (of a ladder the highest level), or a schedule.
            optimizer: of the model's parameters. Without one call `after_step` after each step;
                momentum at removed weights is then left to itself.
            rewound: what an `IterativePruning` takes back beside model and optimizer, by their
                `state_dict`: learning-rate schedulers, a GradScaler.

        Raises:
            FastpieError: for masks of another model, an optimizer of other parameters, or an
                `IterativePruning` without an optimizer.
        """
        if not isinstance(optimizer, Optimizer | None):
            raise FastpieError(
                f"Expected a torch.optim.Optimizer or None, but got {type(optimizer).__name__}."
            )
        self._model = _unwrapped(model)
        self._optimizer = optimizer
        self._schedule = masks if isinstance(masks, MaskingSchedule) else None
        self._ranks = Ranks()
        self._hooks: list[Any] = []
        self._swapped: float | None = None  # density below which layers are masked ones
        self._active = True
        self.step = 0
        self.round = 0
        self._rewind_point: RewindPoint | None = None
        if isinstance(masks, IterativePruning) and masks.rewind is not None:
            if optimizer is None:
                raise FastpieError("Expected an optimizer to rewind, but got none.")
            self._rewind_point = RewindPoint(
                self._model,
                optimizer,
                rewound,
                step=masks.rewind_to,
                weights=masks.rewind == "weights",
            )
        elif rewound:
            raise FastpieError(f"Expected a schedule that rewinds, but got {masks!r}.")
        if isinstance(masks, MaskingSchedule):
            self._put(self._chosen(masks, masks.sparsity_at(0), None))
        elif isinstance(masks, Masks):
            self.set_masks(masks)
        else:
            raise FastpieError(
                f"Expected `masks` to be Masks or a schedule, but got {type(masks).__name__}."
            )
        if optimizer is not None:
            self._watch(optimizer)

    # ------------------------------------------------------------------ what a loop calls

    def after_step(self) -> None:
        """Set removed weights to zero and prune if the schedule says so; with hooks, nothing."""
        if self._active and self._optimizer is None:
            self._after_step()

    def begin_epoch(self, epoch: int) -> None:
        """Begin the next round where an `IterativePruning` counts epochs; called in every process."""
        if isinstance(self._schedule, IterativePruning):
            while self.round < self._schedule.round_of(epoch):
                self.next_round()

    def next_round(self) -> None:
        """Prune what the round has trained and rewind, as `IterativePruning` says.

        Raises:
            FastpieError: with another schedule, or if the round has not gone beyond the step to
                rewind to.
        """
        schedule, point = self._schedule, self._rewind_point
        if not isinstance(schedule, IterativePruning):
            raise FastpieError(f"Expected an IterativePruning, but got {type(schedule).__name__}.")
        if point is not None and not point.is_complete:
            raise FastpieError(
                f"Expected more than {schedule.rewind_to} steps before the first rewinding, but got "
                f"{self.step}."
            )
        self.round += 1
        chosen = self._chosen(schedule, schedule.sparsity_of(self.round), self.masks)
        if point is not None:
            point.go_back()
            self.step = schedule.rewind_to
        self._put(chosen)

    def mask_gradients(self) -> None:
        """Set the gradients of removed weights to zero; before gradients are clipped by norm."""
        self._tensors.zero_gradients()

    def apply_to(self, model: nn.Module) -> None:
        """Set the removed weights of another copy to zero: a teacher, a moving average.

        A moving average that began with the masks needs this only after masks have changed.
        """
        copied = _unwrapped(model)
        self.masks.check_model(copied)
        parameters = dict(copied.named_parameters(remove_duplicate=False))
        self._tensors.zero_others([parameters[name] for name in self.masks])

    def set_masks(self, masks: Masks) -> None:
        """Put other masks in force; in DDP those of rank 0.

        Raises:
            FastpieError: for masks of another model.
        """
        if masks.is_ladder:
            masks = masks.at(masks.sparsities[-1])
        self._put(self._ranks.first(lambda: masks))

    def remove(self) -> None:
        """Stop: take the hooks off the optimizer. Weights, masks and layers stay as they are."""
        self._active = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def sparsity(self) -> float:
        """The fraction of the weights covered by masks that is removed now, in [0, 1]."""
        return sum(self.masks.removed()[0].values()) / max(1, self.masks.total)

    # ------------------------------------------------------------------ sparse layers

    def swap_layers(self, density: float = FORWARD_DENSITY) -> list[str]:
        """Let layers compute with the kept weights alone, in both passes; see `nn.apply_masks`.

        On the CPU the layers of `fastpie.nn` have sparse kernels, and choose by shape and density
        whether to use them; on other devices they compute what plain ones do with masks beside.
        As masks change, layers are swapped when their turn comes.

        Args:
            density: layers that keep this fraction of the weights, or more, stay plain; by default
                that from which no sparse kernel of ours is faster.

        Returns:
            The names of the layers that are masked ones now.
        """
        self._swapped = density
        return apply_masks(self._model, self.masks, density=density)

    def restore_layers(self) -> list[str]:
        """Make all masked layers of the model torch's own again; see `nn.remove_masks`."""
        self._swapped = None
        return remove_masks(self._model)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Masks (bit-packed), counters and what to rewind to; not the model or the optimizer."""
        packed = torch.frombuffer(bytearray(self.masks.to_bytes()), dtype=torch.uint8)
        point = self._rewind_point
        return {
            "step": self.step,
            "round": self.round,
            "masks": packed,
            "rewind_point": {} if point is None else point.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; load the model's and the optimizer's as well, before or after.

        Raises:
            FastpieError: for a state of another model or another kind of schedule.
        """
        missing = sorted({"step", "round", "masks", "rewind_point"} - state.keys())
        if missing:
            raise FastpieError(f"Expected a state of MaskedTraining, but it has no {missing}.")
        if bool(state["rewind_point"]) and self._rewind_point is None:
            raise FastpieError(
                "Expected a state without rewinding, as this schedule has none, but got one."
            )
        masks = Masks.from_bytes(state["masks"].cpu().numpy().tobytes())
        masks.check_model(self._model)
        self.step, self.round = int(state["step"]), int(state["round"])
        if self._rewind_point is not None:
            self._rewind_point.load_state_dict(state["rewind_point"])
        self._put(masks)

    # ------------------------------------------------------------------ inside

    def _watch(self, optimizer: Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        if not any(id(parameters[name]) in held for name in self.masks):
            raise FastpieError(
                "Expected the optimizer to hold weights that the masks cover, but it holds none of "
                f"this {type(self._model).__name__}'s."
            )

        def before(*_: Any) -> None:
            if self._rewind_point is not None:
                self._rewind_point.before_step(self.step)

        def after(*_: Any) -> None:
            self._after_step()

        self._hooks = [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]

    def _after_step(self) -> None:
        self.step += 1
        self._tensors.zero_weights(self._optimizer)
        if self._rewind_point is not None:
            self._rewind_point.after_step(self.step)
        if self._schedule is not None:
            sparsity = self._schedule.sparsity_at(self.step)
            if sparsity != self._schedule.sparsity_at(self.step - 1):
                self._put(self._chosen(self._schedule, sparsity, self.masks))

    def _chosen(self, schedule: MaskingSchedule, sparsity: float, within: Masks | None) -> Masks:
        """Masks that rank 0 chooses."""
        return self._ranks.first(lambda: schedule.choose(self._model, sparsity, within))

    def _put(self, masks: Masks) -> None:
        """Put masks of one level in force."""
        masks.check_model(self._model)
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        weights: list[Tensor] = [parameters[name] for name in masks]
        for name, weight in zip(masks, weights, strict=True):
            sharded: bool = is_traceable_wrapper_subclass(weight)
            if sharded:
                raise FastpieError(
                    f"Expected whole parameters, but `{name}` is a {type(weight).__name__} (FSDP)."
                )
        self.masks = masks
        self._tensors = MaskedTensors(weights, list(masks.values()))
        if self._swapped is not None:
            apply_masks(self._model, masks, density=self._swapped)
        self._tensors.zero_weights(self._optimizer)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of DDP, DataParallel, a moving average and torch.compile."""
    if not isinstance(model, nn.Module):
        raise FastpieError(f"Expected `model` to be an nn.Module, but got {type(model).__name__}.")
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
