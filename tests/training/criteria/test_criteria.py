from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastpie.errors import FastpieError
from fastpie.scores.cam import CamLayers
from fastpie.training.criteria.counts import effective_number_weights
from fastpie.training.criteria.criterion import CRITERIA, class_counts, criterion
from fastpie.training.objectives.boxes import SupervisedBoxes
from fastpie.training.objectives.care import CARE
from fastpie.training.objectives.consistency import Consistency
from fastpie.training.objectives.objective import Supervised
from fastpie.training.objectives.semi_supervised import MeanTeacher
from fastpie.training.objectives.two_stage import MetricLearning
from fastpie.training.objectives.weakly_supervised import WeaklySupervised

COUNTS = [500, 120, 40, 9, 1]
BINARY_COUNTS = torch.tensor([[10, 800, 500, 990, 999], [990, 200, 500, 10, 1]])
NAMES = [(task, name) for task, names in CRITERIA.items() for name in names]


def make(task: str, name: str, **options: Any) -> nn.Module:
    counts = BINARY_COUNTS if task == "multilabel" else COUNTS
    return criterion(name, task, counts, **options)


def batch(task: str, n: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits and labels, all known."""
    if task == "multiclass":
        return torch.randn(n, 5, dtype=dtype) * 3, torch.randint(5, (n,))
    if task == "multilabel":
        return torch.randn(n, 5, dtype=dtype) * 3, torch.randint(2, (n, 5)).float()
    return torch.randn(n, 3, 4, 5, dtype=dtype) * 3, torch.randint(3, (n, 4, 5))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def weights_of(counts: np.ndarray, beta: float) -> np.ndarray:
    w = (1 - beta) / (1 - beta ** counts.astype(float))
    return w / w.sum() * len(counts)


# The papers' formulas, one sample at a time.


def cross_entropy(z: np.ndarray, y: int, e: float = 0.1) -> float:
    log_p = np.log(softmax(z))
    target = np.full(len(z), e / len(z))
    target[y] += 1 - e
    return -(target * log_p).sum()


def class_balanced(z: np.ndarray, y: int) -> float:
    return -weights_of(np.array(COUNTS), 0.99)[y] * np.log(softmax(z)[y])


def class_balanced_focal(z: np.ndarray, y: int) -> float:
    p = softmax(z)[y]
    return -weights_of(np.array(COUNTS), 0.99)[y] * (1 - p) ** 1.5 * np.log(p)


def focal(z: np.ndarray, y: int) -> float:
    p = softmax(z)[y]
    return -((1 - p) ** 2) * np.log(p)


def logit_adjusted(z: np.ndarray, y: int) -> float:
    prior = np.array(COUNTS) / sum(COUNTS)
    return -np.log(softmax(z + 1.3 * np.log(prior))[y])


def balanced_softmax(z: np.ndarray, y: int) -> float:
    n = np.array(COUNTS)
    return -np.log(n[y] * np.exp(z[y]) / (n * np.exp(z)).sum())


def ldam(z: np.ndarray, y: int, weights: bool = False) -> float:
    margins = np.array(COUNTS) ** -0.25
    margins = margins * 0.4 / margins.max()
    z = z.copy()
    z[y] -= margins[y]
    loss = -np.log(softmax(2.5 * z)[y])
    return loss * weights_of(np.array(COUNTS), 0.99)[y] if weights else loss


def ldam_drw(z: np.ndarray, y: int) -> float:
    return ldam(z, y, weights=True)


LDAM_OPTIONS = {"max_margin": 0.4, "scale": 2.5, "beta": 0.99}


@pytest.mark.parametrize(
    ("name", "options", "formula"),
    [
        ("cross_entropy", {"label_smoothing": 0.1}, cross_entropy),
        ("class_balanced", {"beta": 0.99}, class_balanced),
        ("class_balanced", {"beta": 0.99, "gamma": 1.5}, class_balanced_focal),
        ("focal", {}, focal),
        ("logit_adjusted", {"tau": 1.3}, logit_adjusted),
        ("balanced_softmax", {}, balanced_softmax),
        ("ldam", LDAM_OPTIONS, ldam),
        ("ldam", {**LDAM_OPTIONS, "reweight_from": 0}, ldam_drw),
    ],
)
def test_multiclass_formulas(name: str, options: dict[str, Any], formula: Any) -> None:
    logits, labels = batch("multiclass", 40)
    wanted = [formula(z.numpy(), int(y)) for z, y in zip(logits, labels, strict=True)]
    found = criterion(name, counts=COUNTS, **options)(logits, labels)
    assert found.dtype is torch.float64
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def binary(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -(y * np.log(sigmoid(z)) + (1 - y) * np.log(sigmoid(-z)))


def binary_focal(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    p = np.where(y == 1, sigmoid(z), sigmoid(-z))
    return -((1 - p) ** 2) * np.log(p)


def binary_balanced(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    return weights_of(BINARY_COUNTS[1].numpy(), 0.999) * binary(z, y)


def binary_adjusted(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The softmax over (absent, present), both logits with their log prior."""
    negatives, positives = BINARY_COUNTS.numpy()
    rate = positives / (positives + negatives)
    return np.array(
        [
            logit_adjusted_pair(np.array([0, z[c]]), int(y[c]), np.array([1 - rate[c], rate[c]]))
            for c in range(len(z))
        ]
    )


def logit_adjusted_pair(z: np.ndarray, y: int, prior: np.ndarray) -> float:
    return -np.log(softmax(z + 0.7 * np.log(prior))[y])


def asymmetric(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    p = sigmoid(z)
    shifted = np.maximum(p - 0.05, 0)
    return -(y * (1 - p) * np.log(p) + (1 - y) * shifted**4 * np.log(1 - shifted))


@pytest.mark.parametrize(
    ("name", "options", "formula"),
    [
        ("cross_entropy", {}, binary),
        ("focal", {}, binary_focal),
        ("class_balanced", {"beta": 0.999}, binary_balanced),
        ("logit_adjusted", {"tau": 0.7}, binary_adjusted),
        ("asymmetric", {}, asymmetric),
    ],
)
def test_multilabel_formulas(name: str, options: dict[str, Any], formula: Any) -> None:
    logits, labels = batch("multilabel", 40)
    labels[torch.rand(labels.shape) < 0.2] = float("nan")
    labels[0] = torch.tensor([1, 0, 1, 0, 1])  # one sample wholly known
    labels[1] = float("nan")
    wanted = []
    for z, y in zip(logits.numpy(), labels.double().numpy(), strict=True):
        known = ~np.isnan(y)
        wanted.append(formula(z, np.where(known, y, 0))[known].mean() if known.any() else 0)
    found = criterion(name, "multilabel", BINARY_COUNTS, **options)(logits, labels)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_against_torch() -> None:
    logits, labels = batch("multiclass", 30)
    weights = torch.rand(5)
    torch.testing.assert_close(
        criterion("cross_entropy", label_smoothing=0.2)(logits, labels),
        nn.functional.cross_entropy(logits, labels, label_smoothing=0.2, reduction="none"),
    )
    torch.testing.assert_close(
        criterion("cross_entropy", weights=weights)(logits, labels),
        nn.functional.cross_entropy(logits, labels, weights.double(), reduction="none"),
    )
    logits, labels = batch("multilabel", 30)
    torch.testing.assert_close(
        criterion("cross_entropy", "multilabel")(logits, labels),
        nn.functional.binary_cross_entropy_with_logits(
            logits, labels.double(), reduction="none"
        ).mean(1),
    )


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_against_monai(gamma: float) -> None:
    losses = pytest.importorskip("monai.losses")
    logits, labels = batch("multiclass", 30, torch.float32)
    theirs = losses.FocalLoss(gamma=gamma, use_softmax=True, to_onehot_y=True, reduction="none")
    torch.testing.assert_close(
        criterion("focal", gamma=gamma)(logits, labels), theirs(logits, labels[:, None]).sum(1)
    )
    logits, labels = batch("multilabel", 30, torch.float32)
    theirs = losses.FocalLoss(gamma=gamma, reduction="none")
    torch.testing.assert_close(
        criterion("focal", "multilabel", gamma=gamma)(logits, labels),
        theirs(logits, labels).mean(1),
    )


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("size", [(6, 5), (4, 3, 5)])
def test_dice_against_monai(background: bool, size: tuple[int, ...]) -> None:
    dice_loss = pytest.importorskip("monai.losses").DiceLoss
    logits, labels = torch.randn(4, 3, *size), torch.randint(3, (4, *size))
    theirs = dice_loss(background, to_onehot_y=True, softmax=True, reduction="none")
    wanted = theirs(logits, labels[:, None]).flatten(1).mean(1)
    ours = criterion("dice", "segmentation", include_background=background)
    torch.testing.assert_close(ours(logits, labels), wanted)
    torch.testing.assert_close(ours(logits, labels[:, None]), wanted)
    logits, labels = torch.randn(4, 1, *size), torch.randint(2, (4, *size))
    labels[0] = 0  # no foreground
    theirs = dice_loss(sigmoid=True, reduction="none")
    torch.testing.assert_close(
        ours(logits, labels), theirs(logits, labels[:, None]).flatten(), rtol=1e-5, atol=1e-6
    )


def test_segmentation_sums_its_parts() -> None:
    logits, labels = batch("segmentation")
    pixels = nn.functional.cross_entropy(logits, labels, reduction="none").mean((1, 2))
    dice = criterion("dice", "segmentation")(logits, labels)
    torch.testing.assert_close(criterion("cross_entropy", "segmentation")(logits, labels), pixels)
    both = criterion("dice_cross_entropy", "segmentation", cross_entropy=0.3, dice=2.0)
    torch.testing.assert_close(both(logits, labels), 0.3 * pixels + 2 * dice)


def test_unknown_pixels_are_as_if_they_were_not_there() -> None:
    logits, labels = torch.randn(2, 3, 6, 8), torch.randint(3, (2, 6, 8))
    labels[:, 3:] = -1
    for name in CRITERIA["segmentation"]:
        loss = criterion(name, "segmentation")
        torch.testing.assert_close(loss(logits, labels), loss(logits[:, :, :3], labels[:, :3]))
        masks = torch.where(labels < 0, float("nan"), (labels > 0).float())
        torch.testing.assert_close(
            loss(logits[:, :1], masks), loss(logits[:, :1, :3], masks[:, :3])
        )


@pytest.mark.parametrize("name", CRITERIA["multiclass"])
def test_dense_outputs_have_the_mean_of_their_pixels(name: str) -> None:
    logits, labels = torch.randn(3, 5, 4, 2), torch.randint(-1, 5, (3, 4, 2))
    labels[1, 0, 0] = 2
    loss = make("multiclass", name)
    pixels = loss(logits.movedim(1, -1).reshape(-1, 5), labels.flatten()).view(3, -1)
    known = (labels >= 0).flatten(1).sum(1)
    torch.testing.assert_close(loss(logits, labels), pixels.sum(1) / known.clamp_min(1))


@pytest.mark.parametrize(("task", "name"), NAMES)
def test_gradients(task: str, name: str) -> None:
    logits, labels = batch(task, 4)
    loss = make(task, name)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())


@pytest.mark.parametrize(("task", "name"), NAMES)
def test_unknown_labels_lose_nothing_and_pull_at_nothing(task: str, name: str) -> None:
    logits, labels = batch(task, 4, torch.float32)
    loss = make(task, name)
    known = loss(logits, labels)
    labels[1] = -1
    if task == "multilabel":
        labels[2] = float("nan")
    logits[1] = float("nan")
    logits.requires_grad_()
    losses = loss(logits, labels)
    losses.sum().backward()
    assert losses[1] == 0
    assert (logits.grad[1] == 0).all()
    torch.testing.assert_close(losses[[0, 3]], known[[0, 3]])
    assert (logits.grad[[0, 3]] != 0).any()
    if task == "multilabel":
        assert losses[2] == 0
        assert (logits.grad[2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("task", "name"), NAMES)
def test_extreme_logits_under_autocast(task: str, name: str, dtype: torch.dtype) -> None:
    logits, labels = batch(task, 6)
    logits = (logits.sign() * torch.finfo(torch.float16).max).to(dtype)
    logits[0] = 0
    logits[1] = 30
    logits.requires_grad_()
    with torch.autocast("cpu", dtype):
        losses = make(task, name)(logits, labels)
    assert losses.dtype is torch.float32
    assert losses.shape == (6,)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_flat_powers_have_no_pole(gamma: float) -> None:
    logits = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    loss = criterion("focal", gamma=gamma)(logits, torch.tensor([0])) + criterion(
        "asymmetric", "multilabel", gamma_negative=gamma, gamma_positive=gamma
    )(logits, torch.tensor([[1.0, 0.0, 0.0]]))
    loss.sum().backward()
    assert logits.grad.isfinite().all()


def test_adjustment_by_a_flat_prior_is_cross_entropy() -> None:
    logits, labels = batch("multiclass")
    for name in ("logit_adjusted", "balanced_softmax", "class_balanced"):
        torch.testing.assert_close(
            criterion(name, counts=[30] * 5)(logits, labels),
            criterion("cross_entropy")(logits, labels),
        )
    logits, labels = batch("multilabel")
    torch.testing.assert_close(
        criterion("logit_adjusted", "multilabel", [[30] * 5, [30] * 5])(logits, labels),
        criterion("cross_entropy", "multilabel")(logits, labels),
    )


def test_adjustment_trains_towards_balance() -> None:
    """One feature that says nothing: the network should end without preference, not at the prior."""
    labels = torch.arange(2).repeat_interleave(torch.tensor([90, 10]))
    bias = torch.zeros(2, requires_grad=True)
    loss = criterion("logit_adjusted", counts=class_counts(labels, 2))
    optimizer = torch.optim.SGD([bias], 1.0)
    for _ in range(200):
        optimizer.zero_grad()
        loss(bias.expand(100, 2), labels).mean().backward()
        optimizer.step()
    assert bias.softmax(0)[0].item() == pytest.approx(0.5, abs=1e-3)


def test_deferred_reweighting_begins_with_its_epoch() -> None:
    logits, labels = batch("multiclass", 20)
    objective = Supervised(nn.Identity(), criterion("ldam", counts=COUNTS, reweight_from=3))
    plain = objective.criterion(logits, labels)
    weights = effective_number_weights(COUNTS)[labels].float()
    for epoch, factor in ((2, 1), (3, weights), (4, weights), (0, 1)):
        objective.begin_epoch(epoch)
        torch.testing.assert_close(objective.criterion(logits, labels), plain * factor)
    Supervised(nn.Identity(), nn.functional.mse_loss).begin_epoch(1)
    assert not objective.state_dict()


@pytest.mark.parametrize(
    "objective",
    [
        Consistency,
        MeanTeacher,
        MetricLearning,
        SupervisedBoxes,
        lambda *args: CARE(*args, layer="0", rare_classes=[1]),
        lambda *args: WeaklySupervised(*args, CamLayers("0", "2"), every=2),
    ],
)
def test_every_objective_tells_its_criterion_the_epoch(objective: Any) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, len(COUNTS)))
    made = objective(network, criterion("ldam", counts=COUNTS, reweight_from=3))
    for epoch in (2, 3, 4):
        made.begin_epoch(epoch)
        assert made.criterion.reweighting == (epoch >= 3)


@pytest.mark.parametrize(("task", "name"), NAMES)
def test_compiles_to_one_graph(task: str, name: str) -> None:
    logits, labels = batch(task, 4)
    loss = make(task, name)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, labels), loss(logits, labels))


def test_empty_batches() -> None:
    for task, name in NAMES:
        logits, labels = batch(task, 2)
        logits = logits[:0].requires_grad_()
        losses = make(task, name)(logits, labels[:0])
        assert losses.shape == (0,)
        losses.sum().backward()


def test_non_contiguous_inputs() -> None:
    for task, name in NAMES:
        logits, labels = batch(task, 6)
        loss = make(task, name)
        wanted = loss(logits[::2].clone(), labels[::2].clone())
        torch.testing.assert_close(loss(logits[::2], labels[::2]), wanted)


def test_counts() -> None:
    labels = torch.randint(-1, 4, (300,))
    wanted = [sum(int(label) == c for label in labels) for c in range(6)]
    assert class_counts(labels, 6).tolist() == wanted
    assert class_counts(labels.tolist(), 6).tolist() == wanted
    assert class_counts(labels.view(3, 10, 10), 6, "segmentation").tolist() == wanted
    assert class_counts([0, 2]).tolist() == [1, 0, 1]
    assert class_counts([], 3).tolist() == [0, 0, 0]
    many = torch.randint(-1, 2, (50, 4)).float()
    many[many < 0] = float("nan")
    found = class_counts(many, 4, "multilabel").tolist()
    assert found == [[int((many[:, c] == v).sum()) for c in range(4)] for v in (0, 1)]


def test_classes_that_never_come_leave_everything_finite() -> None:
    logits, labels = torch.randn(3, 3), torch.tensor([0, 1, 2])
    for name in CRITERIA["multiclass"]:
        assert criterion(name, counts=[5, 0, 5])(logits, labels).isfinite().all()
    for name in CRITERIA["multilabel"]:
        loss = criterion(name, "multilabel", [[5, 0, 9], [0, 5, 1]])
        assert loss(logits, torch.ones(3, 3)).isfinite().all()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: criterion("huber"), "one of .*'cross_entropy', 'class_balanced'"),
        (lambda: criterion("focal", "detection"), "one of .*'multilabel'"),
        (lambda: criterion("focal", gama=1), r"among \['gamma', 'weights'\], but got \['gama'\]"),
        (lambda: criterion("ldam"), "`counts`"),
        (lambda: criterion("focal", gamma=-1), "gamma"),
        (lambda: criterion("cross_entropy", label_smoothing=1.0), "label_smoothing"),
        (lambda: criterion("class_balanced", counts=[1, 2], beta=1.0), "beta"),
        (lambda: criterion("class_balanced", counts=[[1, 2], [3, 4]]), r"shape \[C\]"),
        (lambda: criterion("logit_adjusted", "multilabel", [1, 2]), r"\[2, C\]"),
        (lambda: criterion("class_balanced", "multilabel", [1, 2]), r"\[2, C\]"),
        (lambda: criterion("logit_adjusted", counts=[1, -2]), "at least 0"),
        (
            lambda: criterion("logit_adjusted", counts=[1, 2])(torch.ones(1, 3), torch.tensor([0])),
            "2 classes",
        ),
        (lambda: criterion("focal")(torch.ones(2, 3), torch.tensor([0, 3])), "below 3, but got 3"),
        (lambda: criterion("focal")(torch.ones(2, 3), torch.tensor([0.0, 1.0])), "integers"),
        (lambda: criterion("focal")(torch.ones(2, 3), torch.tensor([0])), r"shape \[2\]"),
        (lambda: criterion("focal")(torch.ones(2, 3), None), "NoneType"),
        (lambda: criterion("focal")(torch.ones(2, 3).long(), torch.tensor([0, 1])), "floating"),
        (
            lambda: criterion("focal", "multilabel")(torch.ones(1, 2), torch.tensor([[0, 2]])),
            "got 2",
        ),
        (lambda: criterion("dice", "segmentation")(torch.ones(1, 2), torch.ones(1)), "maps"),
        (lambda: class_counts([0, 5], 3), "below 3"),
        (lambda: class_counts([0.5, 1.0], 3), "integers"),
        (lambda: class_counts([0, 1], 2, "multilabel"), r"\[N, 2\]"),
        (lambda: class_counts([0, 1], 2, "boxes"), "`task`"),
    ],
)
def test_bad_input(call: Any, text: str) -> None:
    with pytest.raises(FastpieError, match=text):
        call()
