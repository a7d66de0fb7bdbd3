"""`Consistency`: hard samples have to give what their pruned self gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpie.dual import DualModel
from fastpie.dual.inputs import as_arguments, random_state
from fastpie.errors import FastpieError
from fastpie.mining.follower import rule_of, trained
from fastpie.pruning import prune
from fastpie.scores import disagreement
from fastpie.training.objectives.objective import Criterion, Objective, TrainBatch, entry_of

__all__ = ["Consistency", "consistency"]

_DISTANCES = {
    "multiclass": ("kl", "js", "mse"),
    "multilabel": ("kl", "js", "mse"),
    "segmentation": ("mse",),
}


class Consistency(Objective):
    """A criterion, and for the samples called hard the distance to what the pruned model gives.

    Of each sample

        criterion(dense, label) + strength * [hard] * d(dense, stopgrad(pruned))

    with `TrainBatch.hard` of an `Attention(attend="consistency")`; without it, or where no sample of
    the batch is hard, the criterion alone, and the pruned model is not run. Both models see the same
    images in training mode with the same dropout, the pruned one with batch statistics of its own. Masks
    are chosen from the current weights at the beginning of every epoch. Source: Attend Who is Weak (arXiv
    2212.02675) names consistency; the formula is ours.

    Attributes:
        dual: both models; its masks are in the state.
    """

    def __init__(
        self,
        model: nn.Module | DualModel,
        criterion: Criterion,
        *,
        sparsity: float | Sequence[float] = 0.5,
        strength: float = 1.0,
        distance: str | None = None,
        task: str = "multiclass",
        output: str | int | None = None,
    ) -> None:
        """Prune a model for the first time.

        Args:
            model: any network; or a DualModel of it, which gives levels, method, scope and the weights to
                prune.
            criterion: the loss of the dense model, sample by sample.
            sparsity: a level, or a ladder, over which distances are averaged.
            strength: of the distance, at least 0.
            distance: see `consistency`; by default "kl", of segmentation "mse".
            task: "multiclass", "multilabel" or "segmentation".
            output: key or index of the logits in a dict or tuple output, or None.

        Raises:
            FastpieError: for a distance that the task has not, or a model that cannot be pruned.
        """
        super().__init__()
        _check(task, distance)
        if not 0 <= strength < float("inf"):
            raise FastpieError(f"Expected `strength` of at least 0, but got {strength}.")
        inner, masks, _ = trained(model, sparsity)
        self.dual = DualModel(inner, masks)
        self._rule = rule_of(masks, inner)
        self.criterion = criterion
        self.strength = strength
        self.distance = distance
        self.task = task
        self.output = output

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # held once, by `dual`
        """The network that is trained."""
        return self.dual.model

    def begin_epoch(self, epoch: int) -> None:
        """Choose the masks from the current weights."""
        super().begin_epoch(epoch)
        levels = self.dual.sparsities
        sparsity = levels if self.dual.is_ladder else levels[0]
        self.dual.masks = prune(self.dual.model, sparsity, **self._rule)

    def forward(self, batch: TrainBatch) -> Tensor:  # [n]
        """The loss of each sample."""
        args = as_arguments(batch.images)
        restore = random_state(args)
        dense = entry_of(self.dual.model(*args), self.output)
        losses = self.criterion(dense, batch.labels)
        if batch.hard is None or self.strength == 0:
            return losses
        hard = batch.hard.to(dense.device)
        if not self._run_pruned(hard):
            return losses
        rows = hard.nonzero().flatten()
        after = random_state(args)
        total = torch.zeros(len(rows), device=dense.device)
        with torch.no_grad():
            pruned = []
            for level in range(len(self.dual.sparsities)):
                restore()  # the same dropout
                out = self.dual.run_pruned(self.dual.pruned_state(level), args)
                pruned.append(entry_of(out, self.output)[rows])
            after()
        for of_level in pruned:
            d = consistency(dense[rows], of_level, distance=self.distance, task=self.task)
            total = total + d.float() / len(pruned)
        return losses.index_add(0, rows, (self.strength * total).to(losses.dtype))

    def _run_pruned(self, hard: Tensor) -> bool:
        """Whether a sample is hard; with SyncBatchNorm in any process, for all have to run it then."""
        some = hard.any().int()
        joined = dist.is_available() and dist.is_initialized()
        synchronised = (isinstance(m, nn.SyncBatchNorm) for m in self.dual.modules())
        if self.training and joined and any(synchronised):
            dist.all_reduce(some, dist.ReduceOp.MAX)
        return bool(some)


def consistency(
    dense: Tensor,  # [N, C], segmentation [N, C, ...]
    pruned: Tensor,  # the same
    *,
    distance: str | None = None,
    task: str = "multiclass",
) -> Tensor:  # fp32 [N], fp64 of fp64
    """How far the dense model's outputs are from the pruned model's, which get no gradient.

    "kl": KL(pruned || dense), the pruned model's distribution being the target; "js": Jensen-Shannon;
    both in nats, multilabel: of the Bernoulli distribution of each class, mean over the classes. "mse":
    mean over the classes of the squared difference of the logits; segmentation: of the probabilities
    (one channel: sigmoid, else softmax), mean over classes and pixels.

    Args:
        dense: logits.
        pruned: logits; detached here.
        distance: by default "kl", of segmentation "mse", the only one there.
        task: "multiclass", "multilabel" or "segmentation".

    Raises:
        FastpieError: for a distance that the task has not, or shapes that differ.
    """
    distance = _check(task, distance)
    if dense.shape != pruned.shape or dense.ndim < 2:
        raise FastpieError(
            "Expected outputs of both models of one shape [N, C, ...], but got "
            f"{list(dense.shape)} and {list(pruned.shape)}."
        )
    pruned = pruned.detach().to(dense.dtype)
    if distance != "mse":
        # of named scores both differentiable, by the same formulas as in the tables
        return disagreement(dense, pruned, task=task)["kl_reverse" if distance == "kl" else "js"]
    work = torch.promote_types(dense.dtype, torch.float32)
    p, q = dense.to(work), pruned.to(work)
    if task == "segmentation":
        one = dense.shape[1] == 1
        p, q = (x.sigmoid() if one else x.softmax(1) for x in (p, q))
    return (p - q).square().flatten(1).mean(1)


def _check(task: str, distance: str | None) -> str:
    if task not in _DISTANCES:
        raise FastpieError(f"Expected `task` to be one of {tuple(_DISTANCES)}, but got {task!r}.")
    if distance is None:
        return _DISTANCES[task][0]
    if distance not in _DISTANCES[task]:
        raise FastpieError(
            f"Expected `distance` to be one of {_DISTANCES[task]} for task {task!r}, but got "
            f"{distance!r}."
        )
    return distance
