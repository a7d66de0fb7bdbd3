"""Attention beside a training: against the formulas, on fresh random inputs."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import WeightedRandomSampler

import fastpie
from attending import Labelled, change, expected_attention, margin, outputs_of
from fastpie import FastpieError
from fastpie.analysis.probe import probe_margins
from fastpie.dual.output import DualOutput
from fastpie.training.attention.attention import Attention
from recording import Small, Training, seed

COUNT = 61
REFERENCE: dict[str, Any] = {"batch_size": 16, "backend": "reference", "warmup": 1, "every": 1}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(random.SystemRandom().randrange(2**31))


def labelled(count: int = COUNT, **options: Any) -> Labelled:
    return Labelled(torch.randn(count, 1, 8, 8), torch.randint(3, (count,)), **options)


def by_index(attention: Attention, name: str, data: Labelled) -> np.ndarray:
    """A column of the table in the order of the data set."""
    table = attention.table()
    place = {sample_id: i for i, sample_id in enumerate(table["sample_id"].to_pylist())}
    values = table[name].to_numpy(zero_copy_only=False)
    return values[[place[i] for i in data.sample_ids]]


@pytest.mark.parametrize("sparsity", [0.6, [0.2, 0.5]])
@pytest.mark.parametrize("per", [None, "label", "attribute"])
def test_attention_is_the_formula_over_three_minings(sparsity: Any, per: Any) -> None:
    model, data = Small(), labelled()
    attribute = ["abc"[i % 3] for i in range(COUNT)]
    attention = Attention(
        model,
        data,
        sparsity=sparsity,
        per=attribute if per == "attribute" else per,
        momentum=0.6,
        fraction=0.25,
        guard=None,
        strength=3,
        **REFERENCE,
    )
    rounds = []
    for epoch in range(3):
        change(model, epoch)
        assert attention.step(epoch)
        out = outputs_of(model, data, sparsity)
        levels = out.pruned if isinstance(sparsity, list) else out.pruned[None]
        rounds.append(
            -np.mean([margin(level, data.labels).double().numpy() for level in levels], 0)
        )
    strata = {None: np.zeros(COUNT), "label": data.labels.numpy()}.get(per)
    strata = np.arange(COUNT) % 3 if strata is None else strata
    expected = expected_attention(rounds, 0.6, strata)
    np.testing.assert_allclose(by_index(attention, "score", data), rounds[-1], atol=1e-4)
    np.testing.assert_allclose(by_index(attention, "attention", data), expected, atol=1e-9)
    weights = (1 + 3 * expected) / (1 + 3 * expected).mean()
    np.testing.assert_allclose(attention.weights(data.sample_ids), weights, rtol=1e-6)
    hard = attention.hard(data.sample_ids).numpy()
    for stratum in np.unique(strata):
        here = strata == stratum
        assert hard[here].sum() == int(0.25 * here.sum())
        # Ranks that were exchanged in another round have equal sums, but for rounding.
        assert expected[here & hard].min() >= expected[here & ~hard].max() - 1e-9
    assert (by_index(attention, "hard", data) == hard).all()
    np.testing.assert_allclose(by_index(attention, "weight", data), weights, rtol=1e-6)


def test_the_engine_gives_what_two_passes_give_and_one_where_the_dense_model_is_not_needed() -> (
    None
):
    model, data = Small(), labelled()
    start = copy.deepcopy(model.state_dict())
    scores: list[np.ndarray] = []
    for options in ({"guard": "margin"}, {"guard": None}, {"backend": "reference"}):
        attention = Attention(model, data, **{**REFERENCE, "backend": "auto", **options})
        change(model, 0)
        for epoch in range(2):  # compiled, refreshed
            change(model, epoch)
            attention.step(epoch)
        scores.append(attention.table()["score"].to_numpy())
        steps = attention.state_dict()["plan"].get("passes", ())
        assert len(steps) == (2 if options.get("guard") else 1 if "backend" not in options else 0)
        model.load_state_dict(start)
    np.testing.assert_allclose(scores[0], scores[2], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(scores[1], scores[2], rtol=1e-3, atol=1e-4)


def test_ways_to_attend() -> None:
    model, data = Small(), labelled()
    found = {}
    for attend in ("soft", "weights", "oversample", "consistency"):
        attention = Attention(
            model, data, attend=attend, strength=2, guard=None, fraction=0.3, **REFERENCE
        )
        assert (attention.weights(data.sample_ids) == 1).all()
        assert not attention.hard(data.sample_ids).any()
        assert attention.draw_weights() is None
        attention.step(0)
        found[attend] = attention
    s = by_index(found["soft"], "attention", data)
    hard = found["weights"].hard(data.sample_ids).numpy()
    assert hard.sum() == int(0.3 * COUNT)
    soft, weights = 1 + 2 * s, 1 + 2.0 * hard
    ids = data.sample_ids
    np.testing.assert_allclose(found["soft"].weights(ids), soft / soft.mean(), rtol=1e-6)
    np.testing.assert_allclose(found["weights"].weights(ids), weights / weights.mean(), rtol=1e-6)
    for attend in ("oversample", "consistency"):
        assert (found[attend].weights(ids) == 1).all()
        assert (found[attend].hard(ids).numpy() == hard).all()
    drawn = found["oversample"].draw_weights()
    assert drawn is not None
    np.testing.assert_allclose(drawn, weights / weights.sum(), rtol=1e-12)
    picks = np.bincount(list(WeightedRandomSampler(drawn.tolist(), 60_000)), minlength=COUNT)
    assert np.abs(picks / 60_000 - drawn).max() < 6 * np.sqrt(drawn.max() / 60_000)
    assert found["soft"].draw_weights() is None


def test_a_model_that_was_moved_after_it_was_given_is_told_of() -> None:
    for device in (None, "cpu"):
        model = Small()
        attention = Attention(model, labelled(), device=device, **REFERENCE)
        model.to("meta")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with pytest.raises(NotImplementedError):
                attention.step(0)
        assert [str(w.message)[:24] for w in told] == ["The model is on meta now"] * (
            device is None
        )
        assert all(w.filename == __file__ for w in told)


# ---------------------------------------------------------------------- guards


@pytest.mark.parametrize("guard", ["auto", "margin", "probe", "function", "array"])
def test_what_is_most_in_doubt_is_left_out(guard: str) -> None:
    model, data = Small(), labelled()
    given: Any = guard
    doubts = np.random.default_rng().random(COUNT)
    if guard == "array":
        given = doubts
    elif guard == "function":

        def given(out: DualOutput, labels: Tensor) -> Tensor:
            return out.dense[:, 0]

    attention = Attention(
        model, data, guard=given, doubtful=0.2, fraction=0.5, doubtful_weight=0.5, **REFERENCE
    )
    change(model, 1)
    attention.step(0)
    names = fastpie.dual.stage_features(model, data.images[:1])
    out = outputs_of(model, data, features=names)
    labels = data.labels.numpy()
    doubt = {
        "probe": -probe_margins(out.features.dense.numpy(), labels, 3),
        "function": out.dense[:, 0].numpy(),
        "array": doubts,
        "margin": -margin(out.dense, data.labels).numpy(),
        "auto": -margin(out.pruned, data.labels).numpy(),
    }[guard]
    groups = labels if guard in ("auto", "margin", "probe") else np.zeros(COUNT)
    expected = np.zeros(COUNT, bool)
    for group in np.unique(groups):
        here = np.flatnonzero(groups == group)
        expected[here[np.argsort(-doubt[here])][: int(0.2 * len(here))]] = True
    found = by_index(attention, "doubtful", data)
    assert (found == expected).all()
    raw = np.where(expected, 0.5, 1 + 4 * by_index(attention, "attention", data))
    np.testing.assert_allclose(attention.weights(data.sample_ids), raw / raw.mean(), rtol=1e-6)
    hard = attention.hard(data.sample_ids).numpy()
    assert not (hard & expected).any()
    assert hard.sum() == (COUNT - expected.sum()) // 2


def test_wrong_labels_are_doubted_and_a_small_class_is_kept() -> None:
    """Images of two brightnesses, ten labels of 120 wrong; three samples are of a class of their own."""
    count = 123
    labels = torch.arange(count) % 2
    images = torch.randn(count, 1, 8, 8) + 2 * labels[:, None, None, None]
    wrong = torch.randperm(120)[:10]
    labels[wrong] = 1 - labels[wrong]
    labels[120:] = 2
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(15):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    data = Labelled(images, labels)
    for guard in ("margin", "probe"):
        attention = Attention(model, data, guard=guard, doubtful=0.1, **REFERENCE)
        attention.step(0)
        weights = attention.weights(data.sample_ids)
        assert (weights[wrong] == 0).sum() >= 7, guard
        assert (weights[120:] > 0).all()


# ---------------------------------------------------------------------- scores


@pytest.mark.parametrize("score", ["margin_dense", "loss_dense", "js", "flip", "random"])
def test_controls_and_label_free_scores_run_through_the_same_code(score: str) -> None:
    model, data = Small(), labelled()
    attention = Attention(model, data, score=score, **REFERENCE)
    attention.step(0)
    ranks = by_index(attention, "rank", data)
    out = outputs_of(model, data)
    if score == "random":
        again = Attention(model, data, score=score, seed=0, **REFERENCE)
        other = Attention(model, data, score=score, seed=1, **REFERENCE)
        for one in (again, other):
            one.step(0)
        assert (by_index(again, "rank", data) == ranks).all()
        assert (by_index(other, "rank", data) != ranks).any()
        assert sorted(ranks) == pytest.approx(np.linspace(0, 1, COUNT))
        return
    given = fastpie.disagreement(out.dense, out.pruned, data.labels)[score].double().numpy()
    expected = expected_attention([-given if score == "margin_dense" else given], 0.7)
    assert np.abs(ranks - expected).max() < 0.1  # js and flip come close to ties
    assert np.corrcoef(ranks, expected)[0, 1] > 0.999


def test_a_function_sees_the_features_that_the_dual_model_names() -> None:
    model, data = Small(), labelled()
    dual = fastpie.DualModel(model, fastpie.prune(model, [0.3, 0.6]), features="bn2")
    seen = []

    def drift(out: DualOutput, labels: Tensor, images: Tensor) -> Tensor:
        seen.append((out.features.pruned.shape, images.shape))
        return (out.features.dense - out.features.pruned).flatten(2).norm(dim=2).mean(0)

    attention = Attention(dual, data, score=drift, guard="probe", **REFERENCE)
    attention.step(0)
    assert set(seen) == {((2, 16, 8, 4, 4), (16, 1, 8, 8))}
    features = outputs_of(model, data, [0.3, 0.6], features="bn2").features
    expected = (features.dense - features.pruned).flatten(2).norm(dim=2).mean(0)
    np.testing.assert_allclose(by_index(attention, "score", data), expected, rtol=1e-4)
    doubt = -probe_margins(features.dense.flatten(1).numpy(), data.labels.numpy(), 3)
    found = by_index(attention, "doubtful", data)
    for c in range(3):
        here = np.flatnonzero(data.labels.numpy() == c)
        assert set(here[found[here]]) == set(
            here[np.argsort(-doubt[here])][: int(0.05 * len(here))]
        )


class Segmenting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 1, 1, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"mask": self.head(self.norm(self.conv(x)).relu())}


def misfit(logits: Tensor, masks: Tensor) -> np.ndarray:
    """Cross-entropy plus 1 - soft Dice of one channel [n, 1, H, W]."""
    p, t = logits[:, 0].sigmoid(), masks.float()
    dice = (2 * (p * t).sum((1, 2)) + 1) / (p.sum((1, 2)) + t.sum((1, 2)) + 1)
    entropy = functional.binary_cross_entropy(p, t, reduction="none").mean((1, 2))
    found: np.ndarray = (entropy + 1 - dice).numpy()
    return found


@pytest.mark.parametrize(
    ("score", "guard"), [("iou", "loss"), ("damage", "loss"), ("loss_pruned", "loss_pruned")]
)
def test_masks_that_fit_least_are_left_out(score: str, guard: str) -> None:
    model, images = Segmenting(), torch.randn(20, 1, 8, 8)
    masks = (images[:, 0] + torch.randn(20, 8, 8) > 0).long()
    masks[3] = -1
    data = Labelled(images, masks)
    found = []
    for given in ("auto", guard):
        followed = copy.deepcopy(model)
        attention = Attention(
            followed, data, score=score, guard=given, task="segmentation", output="mask", doubtful=0.2,
            per=[i % 2 for i in range(20)], momentum=0.37, **REFERENCE,
        )  # fmt: skip
        rounds = []
        for epoch in range(2):
            change(followed, epoch)
            attention.step(epoch)
            out = outputs_of(followed, data)
            logits = (out.dense if guard == "loss" else out.pruned)["mask"]
            rounds.append(np.delete(misfit(logits, masks.clamp(min=0)), 3))
        doubt = np.insert(expected_attention(rounds, 0.37), 3, -1)
        expected = np.zeros(20, bool)
        expected[np.argsort(-doubt)[:3]] = True  # of the 19 that have a mask
        found.append(by_index(attention, "doubtful", data))
        assert (found[-1] == expected).all()
        assert (attention.weights(data.sample_ids)[torch.from_numpy(expected)] == 0).all()


def test_masks_of_other_images_are_doubted() -> None:
    """Bright discs and their masks, three of 40 another's; the model has learned what is bright."""
    images = torch.randn(40, 1, 8, 8) * 0.3
    centres = torch.rand(40, 2) * 7
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    masks = ((y - centres[:, :1, None]) ** 2 + (x - centres[:, 1:, None]) ** 2 < 6).long()
    images[:, 0] += 2 * masks
    wrong = torch.argsort(centres[:, 0])[[0, 1, -1]]
    masks[wrong] = masks[wrong].flip(1)  # another place: that of the image upside down
    model = Segmenting()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        logits = model(images)["mask"][:, 0]
        functional.binary_cross_entropy_with_logits(logits, masks.float()).backward()
        optimizer.step()
    data = Labelled(images, masks)
    attention = Attention(
        model,
        data,
        score="loss_pruned",
        task="segmentation",
        output="mask",
        doubtful=0.1,
        **REFERENCE,
    )
    attention.step(0)
    assert (attention.weights(data.sample_ids)[wrong] == 0).all()
    assert not attention.hard(data.sample_ids)[wrong].any()


@pytest.mark.parametrize("score", ["iou_soft", "loss_pruned"])
def test_segmentation(score: str) -> None:
    model, images = Segmenting(), torch.randn(20, 1, 8, 8)
    masks = (images[:, 0] + torch.randn(20, 8, 8) > 0).long()
    data = Labelled(images, masks if score == "loss_pruned" else None)
    attention = Attention(
        model, data, score=score, task="segmentation", output="mask", per=[i % 2 for i in range(20)],
        guard=None, **REFERENCE,
    )  # fmt: skip
    attention.step(0)
    out = outputs_of(model, data)
    if score == "iou_soft":
        given = fastpie.disagreement(out.dense["mask"], out.pruned["mask"], task="segmentation")
        expected = 1 - given["iou_soft"].numpy()
    else:
        expected = misfit(out.pruned["mask"], masks)
    np.testing.assert_allclose(by_index(attention, "score", data), expected, rtol=1e-3, atol=1e-5)
    assert not by_index(attention, "doubtful", data).any()
    assert attention.hard(data.sample_ids).sum() == 4


def test_multilabel_strata_are_those_of_the_rarest_finding() -> None:
    model, images = Small(), torch.randn(50, 1, 8, 8)
    labels = (torch.rand(50, 3) < torch.tensor([0.8, 0.5, 0.2])).float()
    labels[4] = torch.nan
    data = Labelled(images, labels)
    attention = Attention(
        model, data, task="multilabel", score="loss_pruned", per="label", **REFERENCE
    )
    attention.step(0)
    frequency = (labels == 1).sum(0)
    strata = [min((c for c in range(3) if row[c] == 1), key=lambda c: frequency[c], default=-1)
              for row in labels]  # fmt: skip
    score = by_index(attention, "score", data).astype(float)
    assert np.isnan(score[4])
    ranks = by_index(attention, "rank", data).astype(float)
    for stratum in range(3):
        here = [i for i in range(50) if strata[i] == stratum]
        expected = expected_attention([score[here]], 0)
        np.testing.assert_allclose(ranks[here], expected)


# ---------------------------------------------------------------------- odd data


def test_what_cannot_be_scored_keeps_its_attention() -> None:
    bad = {3: OSError("gone"), 5: torch.full((1, 8, 8), torch.nan)}
    model, data = Small(), labelled(bad=bad)
    data.labels[7] = -1
    attention = Attention(model, data, guard=None, **REFERENCE)
    attention.step(0)
    first = by_index(attention, "attention", data).astype(float)
    assert np.isnan(first).nonzero()[0].tolist() == [3, 5, 7]
    raw = 1 + 4 * np.where(np.isnan(first), 0.5, first)
    np.testing.assert_allclose(attention.weights(data.sample_ids), raw / raw.mean(), rtol=1e-6)
    assert not attention.hard([data.sample_ids[i] for i in (3, 5, 7)]).any()
    stages = dict(
        zip(*(attention.errors[c].to_pylist() for c in ("sample_id", "stage")), strict=True)
    )
    assert stages == {data.sample_ids[3]: "read", data.sample_ids[5]: "image"}
    data.bad = {9: OSError("gone")}
    change(model, 2)
    attention.step(1)
    second = by_index(attention, "attention", data).astype(float)
    rank = by_index(attention, "rank", data).astype(float)
    assert second[9] == first[9]
    assert second[3] == rank[3]  # its first time
    assert second[11] == pytest.approx(0.7 * first[11] + 0.3 * rank[11])
    data.bad = {i: OSError("unmounted") for i in range(COUNT)}
    with pytest.raises(FastpieError, match="none of the 61"):
        attention.step(2)
    assert attention.epochs == [0, 1]
    assert (by_index(attention, "attention", data).astype(float)[10] == second[10]).all()


def test_unlabelled_data_with_a_label_free_score() -> None:
    data = Labelled(torch.randn(20, 1, 8, 8))
    attention = Attention(Small(), data, score="js", **REFERENCE)
    attention.step(0)
    assert attention.table()["score"].null_count == 0
    assert not attention.table()["doubtful"].to_numpy(zero_copy_only=False).any()
    some = Labelled(data.images, torch.where(torch.arange(20) % 2 == 0, -1, 1))
    attention = Attention(Small(), some, score="js", **REFERENCE)
    attention.step(0)
    assert attention.table()["score"].null_count == 0  # an unknown label does not matter


def test_ids_of_any_kind() -> None:
    images, labels = torch.randn(15, 1, 8, 8), torch.arange(15) % 3
    plain = torch.utils.data.TensorDataset(images, labels)
    with pytest.warns(UserWarning, match="indices serve as ids"):
        attention = Attention(Small(), plain, **REFERENCE)
    attention.step(0)
    ids = torch.tensor([14, 0, 3, 3])
    found = attention.weights(ids)
    assert found.dtype == torch.float32
    assert torch.equal(found, attention.weights(["14", "0", "3", "3"]))
    assert torch.equal(found, attention.weights((14, 0, 3, 3), device="cpu"))
    assert attention.weights([]).shape == (0,)
    assert attention.hard(torch.arange(0)).shape == (0,)
    for wrong in ("15", "", "zzz", "00"):
        with pytest.raises(FastpieError, match=f"'{wrong}' is not among them"):
            attention.weights(["3", wrong])


# ---------------------------------------------------------------------- beside a training


def test_training_is_the_same_bits_with_and_without_steps() -> None:
    data = [(x, y, str(i)) for i, (x, y) in enumerate(zip(torch.randn(22, 1, 8, 8), [0, 1] * 11))]  # noqa: B905
    states = []
    for guard in (None, "probe"):
        seed()
        run = Training(Small(), data)
        attention = Attention(run.model, data, guard=guard, **REFERENCE)
        for epoch in range(3):
            run.epoch()
            if guard:
                attention.step(epoch)
                assert run.model.training
                assert all(p.requires_grad for p in run.model.parameters())
        numbers = torch.tensor([random.random(), np.random.rand(), torch.rand(1).item()])  # noqa: NPY002
        grads = [p.grad for p in run.model.parameters()]
        states.append([*run.model.state_dict().values(), *grads, numbers])
    for one, two in zip(*states, strict=True):
        assert torch.equal(one, two)


def test_turns() -> None:
    model, data = Small(), labelled(12)
    attention = Attention(model, data, **{**REFERENCE, "warmup": 4, "every": 3})
    with pytest.raises(FastpieError, match="the first is 3"):
        attention.table()
    assert [attention.step(epoch) for epoch in range(11)] == [i in (3, 6, 9) for i in range(11)]
    assert attention.epochs == [3, 6, 9]
    before = attention.table()
    change(model, 0)
    with pytest.warns(UserWarning, match="Epoch 6 is not mined: epoch 9 already is"):
        assert not attention.step(6)
    assert attention.table().equals(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "hardness"}, "`score` to be one of"),
        ({"attend": "hard"}, "`attend` to be one of"),
        ({"momentum": 1.0}, r"`momentum` to be a number in \[0, 1\)"),
        ({"fraction": 1.5}, r"`fraction` to be a number in \[0, 1\]"),
        ({"strength": -1}, r"`strength` to be a number in \[0, inf\)"),
        ({"doubtful": 1}, r"`doubtful` to be a number in \[0, 1\)"),
        ({"warmup": 0}, "`warmup` to be an int of at least 1"),
        ({"every": 2.5}, "`every` to be an int of at least 1"),
        ({"guard": "lost"}, r"`guard` to be one of \('auto', 'margin'"),
        ({"guard": "loss"}, "masks for the guard 'loss', but got 'multiclass' with labels"),
        ({"guard": [1.0, 2.0]}, r"`guard` of shape \[61\]"),
        ({"per": "sex"}, "`per` to be None, 'label'"),
        ({"per": [1, 2]}, "`per` to have a value for each of the 61 samples.*of 2"),
        ({"score": lambda out, labels: out.dense}, r"one number a sample"),
        (
            {"score": lambda out, labels: [1.0]},
            "one number for each sample of the batch, but got 1",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FastpieError, match=message):
        Attention(Small(), labelled(), **{**REFERENCE, **options})


def test_guards_by_name_need_labels() -> None:
    data = Labelled(torch.randn(9, 1, 8, 8))
    for guard in ("margin", "probe"):
        with pytest.raises(FastpieError, match="labels of classes for the guard"):
            Attention(Small(), data, score="js", guard=guard, **REFERENCE)
