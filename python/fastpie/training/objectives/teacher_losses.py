"""What a student loses by differing from a teacher, sample by sample: consistency, pseudo-labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastpie.errors import FastpieError

__all__ = ["DISTANCES", "TASKS", "consistency_loss", "pseudo_label_loss"]

TASKS = ("multiclass", "multilabel", "segmentation")
DISTANCES = ("mse", "kl")


def consistency_loss(
    student: Tensor,  # [n, C, ...]
    teacher: Tensor,  # [n, C, ...]
    *,
    task: str = "multiclass",
    distance: str = "mse",
) -> Tensor:  # [n]
    """Distance of the student's probabilities p from the teacher's q, the mean over positions.

    Probabilities are the softmax over C, or for "multilabel" and for a segmentation with C == 1 the
    sigmoid of each logit.

    Args:
        student: logits; the gradient reaches these alone.
        teacher: logits.
        task: "multiclass", "multilabel" or "segmentation".
        distance: "mse": the mean over C of `(p - q)^2` (Tarvainen and Valpola, NeurIPS 2017, arXiv
            1703.01780); "kl": `KL(q || p)`, in nats, of sigmoids the mean over C.

    Returns:
        At least 0, in fp32, or fp64 for fp64 logits.

    Raises:
        FastpieError: for an unknown option, or shapes that differ.
    """
    if distance not in DISTANCES:
        raise FastpieError(f"Expected `distance` to be one of {DISTANCES}, but got {distance!r}.")
    student, teacher, sigmoid = _checked(student, teacher, task)
    if distance == "mse":
        p, q = (x.sigmoid() if sigmoid else x.softmax(1) for x in (student, teacher))
        return _mean((p - q).square())
    if sigmoid:
        # From logits, so that no probability is rounded to 0 or 1.
        entropy = functional.binary_cross_entropy_with_logits
        q = teacher.sigmoid()
        cross = entropy(student, q, reduction="none")
        return _mean(cross - entropy(teacher, q, reduction="none"))
    log_p, log_q = student.log_softmax(1), teacher.log_softmax(1)
    q = log_q.exp()
    return _mean(torch.where(q > 0, q * (log_q - log_p), 0.0).sum(1))


def pseudo_label_loss(
    student: Tensor,  # [n, C, ...]
    teacher: Tensor,  # [n, C, ...]
    *,
    threshold: float = 0.95,
    task: str = "multiclass",
) -> Tensor:  # [n]
    """Cross-entropy of the student with the teacher's classes, where the teacher is sure of them.

    `[max_c q_c >= threshold] CE(student, argmax_c q_c)`, the mean over positions, those that are not
    taken as 0 among them: Sohn et al., FixMatch, NeurIPS 2020, arXiv 2001.07685. With sigmoids (see
    `consistency_loss`) a logit counts where q or 1 - q reaches the threshold, the mean over C.

    Args:
        student: logits; the gradient reaches these alone.
        teacher: logits.
        threshold: least confidence, in [0, 1]; with sigmoids at least 0.5.
        task: "multiclass", "multilabel" or "segmentation".

    Returns:
        At least 0, in fp32, or fp64 for fp64 logits.

    Raises:
        FastpieError: for an unknown task, shapes that differ or a threshold out of range.
    """
    student, teacher, sigmoid = _checked(student, teacher, task)
    if not (0.5 if sigmoid else 0) <= threshold <= 1:
        raise FastpieError(
            f"Expected `threshold` in [0, 1], of sigmoids in [0.5, 1], but got {threshold}."
        )
    if sigmoid:
        q = teacher.sigmoid()
        losses = functional.binary_cross_entropy_with_logits(
            student, (q >= 0.5).to(q.dtype), reduction="none"
        )
        return _mean(losses.where(torch.maximum(q, 1 - q) >= threshold, 0.0))
    if not student.numel():
        return _mean(student)
    confidence, labels = teacher.softmax(1).max(1)
    losses = functional.cross_entropy(student, labels, reduction="none")
    return _mean(losses.where(confidence >= threshold, 0.0))


def _checked(student: Tensor, teacher: Tensor, task: str) -> tuple[Tensor, Tensor, bool]:
    """Both in full precision, the teacher without a graph, and whether logits are independent."""
    if task not in TASKS:
        raise FastpieError(f"Expected `task` to be one of {TASKS}, but got {task!r}.")
    if student.shape != teacher.shape or student.ndim < 2:
        raise FastpieError(
            f"Expected logits [n, C, ...] of one shape, but got {list(student.shape)} and "
            f"{list(teacher.shape)}."
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    sigmoid = task == "multilabel" or (task == "segmentation" and student.shape[1] == 1)
    return student.to(dtype), teacher.detach().to(dtype), sigmoid


def _mean(losses: Tensor) -> Tensor:  # [n, ...] -> [n]
    return losses if losses.ndim == 1 else losses.flatten(1).mean(1)
