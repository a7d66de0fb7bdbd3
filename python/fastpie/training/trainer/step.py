"""One step of a training, in one process or several, in any precision."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastpie.errors import FastpieError
from fastpie.mining.ranks import Ranks
from fastpie.training.objectives.objective import Objective, TrainBatch
from fastpie.training.trainer.randomness import seed_everything

if TYPE_CHECKING:
    from fastpie.training.masking.masked import MaskedTraining

__all__ = ["PRECISIONS", "Stepper"]

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Stepper:
    """Loss, gradients and the optimizer's step over the processes of a training.

    The loss of a step is `sum(losses * weights) / n` over the n samples of the batch in all
    processes: gradients do not depend on how many share it. A step whose gradients are not finite
    (in any process: they are the same in all) is not taken.

    Attributes:
        scaler: of the loss, for fp16.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        device: torch.device,
        precision: str,
        clip: float | None,
        masked: MaskedTraining | None = None,
    ) -> None:
        """Join the processes.

        Args:
            objective: on the device.
            optimizer: of its parameters.
            ranks: the processes.
            device: of this one.
            precision: of `PRECISIONS`.
            clip: the largest norm of all gradients together, or None.
            masked: a `MaskedTraining`; gradients of removed weights do not count in the norm.
        """
        self.objective, self.optimizer = objective, optimizer
        self.processes, self.device, self.precision, self.clip = (
            ranks.count,
            device,
            precision,
            clip,
        )
        self._masked = masked
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._module: nn.Module = _shared(objective, device) if ranks.count > 1 else objective

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def step(
        self, batch: TrainBatch, weights: Tensor | None, total: int, seed: int
    ) -> float | None:
        """Train on this process's share of a batch.

        Args:
            batch: the share.
            weights: fp32 [n] of the losses; None for 1.
            total: samples of the batch in all processes.
            seed: of the random numbers, dropout's for one.

        Returns:
            Sum of the weighted losses of the share, or None if the step was not taken.

        Raises:
            FastpieError: if the objective does not give a loss for each sample.
        """
        seed_everything(seed)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            losses = self._module(batch)
        if not isinstance(losses, Tensor) or losses.shape != (len(batch),):
            found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise FastpieError(
                f"Expected the objective to return a loss for each of {len(batch)} samples, but got "
                f"{found}."
            )
        losses = losses.float()
        if weights is not None:
            losses = losses * weights.to(losses)
        loss = losses.sum()
        # DistributedDataParallel takes the mean over the processes.
        self.scaler.scale(loss * (self.processes / total)).backward()
        self.scaler.unscale_(self.optimizer)
        if self._masked is not None:
            self._masked.mask_gradients()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        # Both in one copy off the device: each would hold up the step.
        known = torch.stack([norm.to(loss.device).isfinite().double(), loss.detach().double()])
        is_finite, value = known.tolist()
        finite = is_finite > 0
        if finite and self.clip is not None:
            clip_grads_with_norm_(self._parameters, self.clip, norm)
        if finite or self.scaler.is_enabled():  # the scaler sees for itself, and lowers its scale
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return value if finite else None

    def share_buffers(self) -> None:
        """Give every process the buffers of rank 0: BatchNorm's statistics differ otherwise."""
        if self.processes > 1:
            for buffer in self.objective.buffers():
                torch.distributed.broadcast(buffer, 0)


def _shared(objective: Objective, device: torch.device) -> DistributedDataParallel:
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in objective.modules())
    if norms and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    elif norms:
        warnings.warn(
            f"BatchNorm on {device.type} takes its statistics from each process's share of a batch: "
            "the training differs a little with the number of processes.",
            stacklevel=3,
        )
    # A batch may leave parameters out (a branch for boxes that none of its samples has), and which
    # ones may differ from batch to batch; to look for them takes a walk through the graph, which an
    # objective that knows better can save.
    unused = bool(getattr(objective, "has_unused_parameters", True))
    warnings.filterwarnings("ignore", ".*find_unused_parameters=True was specified", UserWarning)
    places: list[Any] | None = [device] if device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=places, find_unused_parameters=unused)
