"""Running statistics over epochs, against literal computations, sample by sample."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

import fastpie
from fastpie.mining import EpochStatistics

LEVELS = [0.3, 0.7]
EPOCHS, SAMPLES, CLASSES = 6, 9, 4
IDS = [f"s{i}" for i in range(SAMPLES)]


def logits(seed: int, *, levels: int = len(LEVELS)) -> tuple[Tensor, Tensor]:
    """Of every epoch: dense [E, n, C], pruned [E, L, n, C]."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(EPOCHS, SAMPLES, CLASSES, generator=generator) * 2
    pruned = dense.unsqueeze(1) + torch.randn(EPOCHS, levels, SAMPLES, CLASSES, generator=generator)
    return dense, pruned


def recorded(statistics: EpochStatistics, dense: Tensor, pruned: Any, labels: Any) -> pa.Table:
    """Every epoch in two batches, samples in disorder."""
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))
    for epoch in range(EPOCHS):
        for rows in order.split(5):
            of_pruned = None if pruned is None else pruned[epoch][..., rows, :]
            of_labels = None if labels is None else labels[rows]
            counted = statistics.update(rows, dense[epoch, rows], of_pruned, of_labels, epoch=epoch)
            assert counted.all()
    return statistics.table(IDS)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def softmax(z: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in z)
    return [math.exp(v) / total for v in z]


def margin(z: list[float], y: int) -> float:
    return z[y] - max(v for j, v in enumerate(z) if j != y)


def divergence(p: list[float], q: list[float]) -> float:
    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return (kl(p, m) + kl(q, m)) / 2


def test_multiclass_columns_are_their_definitions() -> None:
    dense, pruned = logits(0)
    labels = torch.arange(SAMPLES) % CLASSES
    dense[:, 3] = -dense[:, 3].abs()  # never right: the label's logit is below the others
    dense[:, 3, labels[3]] = -50
    statistics = EpochStatistics(SAMPLES, CLASSES, sparsities=LEVELS, el2n_epochs=[1, 2])
    rows = recorded(statistics, dense, pruned, labels).to_pylist()
    assert [row["sample_id"] for row in rows] == IDS
    events = 0
    for i, row in enumerate(rows):
        y = int(labels[i])
        z = dense[:, i].double().tolist()
        of_level = pruned[:, :, i].double().tolist()
        p = [softmax(e) for e in z]
        right = [max(range(CLASSES), key=e.__getitem__) == y for e in z]
        losses = [[-math.log(softmax(v)[y]) for v in levels] for levels in of_level]
        divergences = [
            [divergence(p[e], softmax(v)) for v in levels] for e, levels in enumerate(of_level)
        ]
        flips = [
            [v.index(max(v)) != z[e].index(max(z[e])) for v in levels]
            for e, levels in enumerate(of_level)
        ]
        confidence = mean([e[y] for e in p])
        forgotten = sum(a and not b for a, b in itertools.pairwise(right))
        events += forgotten
        expected = {
            "label": y,
            "epochs": EPOCHS,
            "hardness": mean([mean(e) for e in losses]),
            "hardness_last": mean(losses[-1]),
            "loss_dense_mean": mean([-math.log(e[y]) for e in p]),
            "loss_pruned_mean": mean([mean(e) for e in losses]),
            "loss_pruned_mean@0.3": mean([e[0] for e in losses]),
            "loss_pruned_mean@0.7": mean([e[1] for e in losses]),
            "margin_dense_mean": mean([margin(e, y) for e in z]),  # AUM
            "margin_pruned_mean": mean([margin(v, y) for e in of_level for v in e]),
            "margin_pruned_mean@0.3": mean([margin(e[0], y) for e in of_level]),
            "margin_pruned_mean@0.7": mean([margin(e[1], y) for e in of_level]),
            "confidence": confidence,
            "variability": math.sqrt(mean([(e[y] - confidence) ** 2 for e in p])),
            "correctness": sum(right) / EPOCHS,
            "forgetting": forgotten,
            "never_learned": not any(right),
            "el2n": mean([math.dist(e, [float(j == y) for j in range(CLASSES)]) for e in p[1:3]]),
            "js_mean": mean([mean(e) for e in divergences]),
            "js_mean@0.3": mean([e[0] for e in divergences]),
            "js_mean@0.7": mean([e[1] for e in divergences]),
            "flips": mean([mean([float(f) for f in e]) for e in flips]),
            "flips@0.3": mean([float(e[0]) for e in flips]),
            "flips@0.7": mean([float(e[1]) for e in flips]),
        }
        assert list(row) == ["sample_id", *expected]
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert events > 3
    assert rows[3]["never_learned"]
    assert rows[3]["forgetting"] == 0
    assert sum(row["never_learned"] for row in rows) < SAMPLES


def test_forgetting_counts_falls_from_right_to_wrong() -> None:
    right = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1]])
    statistics = EpochStatistics(3, 2)
    for epoch, column in enumerate(right.T):
        z = torch.stack([torch.zeros(3), column * 2.0 - 1], 1)
        statistics.update([0, 1, 2], z, None, torch.ones(3, dtype=torch.int64), epoch=epoch)
    table = statistics.table(["a", "b", "c"])
    assert table["forgetting"].to_pylist() == [2, 0, 0]
    assert table["never_learned"].to_pylist() == [False, True, False]
    assert table["correctness"].to_pylist() == pytest.approx([4 / 7, 0, 6 / 7])


def test_multilabel_columns_use_the_known_classes() -> None:
    dense, pruned = logits(2)
    generator = torch.Generator().manual_seed(3)
    labels = (torch.rand(SAMPLES, CLASSES, generator=generator) > 0.5).float()
    labels[1, 2] = labels[4, :3] = torch.nan
    labels[6] = torch.nan
    dense[:, 0] = dense[:, 0].abs() * (labels[0] * 2 - 1)  # right in every epoch
    statistics = EpochStatistics(SAMPLES, CLASSES, task="multilabel", sparsities=LEVELS)
    rows = recorded(statistics, dense, pruned, labels).to_pylist()

    def sigmoid(v: float) -> float:
        return 1 / (1 + math.exp(-v))

    def loss(z: list[float], y: list[tuple[int, float]]) -> float:
        return mean([-math.log(sigmoid(z[j] if v else -z[j])) for j, v in y])

    def multi_margin(z: list[float], y: list[tuple[int, float]]) -> float:
        lowest = min((z[j] for j, v in y if v), default=0.0)
        return lowest - max((z[j] for j, v in y if not v), default=0.0)

    for i, row in enumerate(rows):
        y = [(j, v) for j, v in enumerate(labels[i].tolist()) if not math.isnan(v)]
        z, of_level = dense[:, i].double().tolist(), pruned[:, :, i].double().tolist()
        if not y:
            unknown = {name for name, value in row.items() if value is None}
            assert unknown == set(rows[0]) - {"sample_id", "label", "epochs"} - {
                name for name in row if name.startswith(("js_mean", "flips"))
            }
            continue
        of_label = [mean([sigmoid(e[j] if v else -e[j]) for j, v in y]) for e in z]
        right = [all((e[j] > 0) == bool(v) for j, v in y) for e in z]
        expected = {
            "loss_dense_mean": mean([loss(e, y) for e in z]),
            "loss_pruned_mean": mean([loss(v, y) for e in of_level for v in e]),
            "margin_dense_mean": mean([multi_margin(e, y) for e in z]),
            "margin_pruned_mean": mean([multi_margin(v, y) for e in of_level for v in e]),
            "confidence": mean(of_label),
            "variability": math.sqrt(mean([(v - mean(of_label)) ** 2 for v in of_label])),
            "correctness": sum(right) / EPOCHS,
            "forgetting": sum(a and not b for a, b in itertools.pairwise(right)),
            "never_learned": not any(right),
            "el2n": mean([math.hypot(*(sigmoid(e[j]) - v for j, v in y)) for e in z]),
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert rows[0]["correctness"] == 1
    assert len(rows[1]["label"]) == CLASSES
    assert math.isnan(rows[1]["label"][2])


def test_without_labels_there_is_what_needs_none() -> None:
    dense, pruned = logits(4, levels=1)
    statistics = EpochStatistics(
        SAMPLES, CLASSES, sparsities=[0.5], is_ladder=False, labelled=False
    )
    table = recorded(statistics, dense, pruned, None)
    assert table.column_names == [
        "sample_id", "epochs", "hardness", "hardness_last", "js_mean", "flips",
    ]  # fmt: skip
    assert table["hardness"].equals(table["js_mean"])
    last = fastpie.disagreement(dense[-1], pruned[-1, 0])["js"].double()
    assert table["hardness_last"].to_pylist() == pytest.approx(last.tolist())
    again = EpochStatistics(SAMPLES, CLASSES, sparsities=[0.5], is_ladder=False, labelled=False)
    assert recorded(again, dense, pruned[:, 0], None).equals(table)  # without the level dimension


def test_dense_logits_alone() -> None:
    """What a training step can give at no forward pass; bf16 as autocast leaves it."""
    dense, pruned = logits(5)
    labels = torch.arange(SAMPLES) % CLASSES
    both = recorded(EpochStatistics(SAMPLES, CLASSES, sparsities=LEVELS), dense, pruned, labels)
    alone = recorded(EpochStatistics(SAMPLES, CLASSES), dense, None, labels)
    assert not [n for n in alone.column_names if "pruned" in n or n.startswith(("js", "flips"))]
    assert alone.equals(both.select(alone.column_names))
    half = recorded(EpochStatistics(SAMPLES, CLASSES), dense.bfloat16(), None, labels)
    widened = dense.bfloat16().float()
    assert half.equals(recorded(EpochStatistics(SAMPLES, CLASSES), widened, None, labels))


def test_logits_that_are_no_numbers_do_not_count() -> None:
    dense, pruned = logits(6)
    labels = torch.arange(SAMPLES) % CLASSES
    one = EpochStatistics(SAMPLES, CLASSES, sparsities=LEVELS)
    two = EpochStatistics(SAMPLES, CLASSES, sparsities=LEVELS)
    good = [i for i in range(SAMPLES) if i not in (2, 5)]
    broken = pruned.clone()
    broken[0, 1, 2, 0] = torch.nan
    broken[0, 0, 5, 1] = torch.inf
    for epoch in range(2):
        counted = one.update(range(SAMPLES), dense[epoch], broken[epoch], labels, epoch=epoch)
        assert counted.tolist() == [epoch or i in good for i in range(SAMPLES)]
    two.update(good, dense[0][good], pruned[0][:, good], labels[good])
    two.update(range(SAMPLES), dense[1], pruned[1], labels, epoch=1)
    assert one.table(IDS).equals(two.table(IDS))
    assert one.table(IDS)["epochs"].to_pylist() == [2, 2, 1, 2, 2, 1, 2, 2, 2]


def test_no_samples_are_no_update() -> None:
    statistics = EpochStatistics(SAMPLES, CLASSES, sparsities=LEVELS)
    nothing = torch.zeros(0, dtype=torch.int64)
    counted = statistics.update([], torch.zeros(0, 4), torch.zeros(2, 0, 4), nothing)
    assert counted.shape == (0,)
    assert statistics.table(IDS).num_rows == 0


def test_a_class_of_probability_zero_is_data() -> None:
    statistics = EpochStatistics(2, 3, sparsities=LEVELS)
    z = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, 1.0, 2.0]])
    for epoch in range(2):
        statistics.update([0, 1], z, z.expand(2, 2, 3), torch.tensor([1, 1]), epoch=epoch)
    row = statistics.table(["a", "b"]).to_pylist()[0]
    assert row["loss_pruned_mean"] == math.inf
    assert row["margin_dense_mean"] == -math.inf
    assert row["confidence"] == row["variability"] == 0


def test_el2n_is_null_where_no_early_epoch_was_seen() -> None:
    dense, pruned = logits(7)
    statistics = EpochStatistics(SAMPLES, CLASSES, sparsities=LEVELS, el2n_epochs=[0])
    labels = torch.zeros(SAMPLES, dtype=torch.int64)
    statistics.update([1, 2], dense[0, 1:3], pruned[0][:, 1:3], labels[:2], epoch=0)
    statistics.update([2, 3], dense[1, 2:4], pruned[1][:, 2:4], labels[:2], epoch=1)
    table = statistics.table(IDS)
    assert table["sample_id"].to_pylist() == ["s1", "s2", "s3"]  # samples never seen are left out
    assert [v is None for v in table["el2n"].to_pylist()] == [False, False, True]


def test_state_and_shares_go_from_one_to_another() -> None:
    dense, pruned = logits(8)
    labels = torch.arange(SAMPLES) % CLASSES
    whole = EpochStatistics(SAMPLES, CLASSES, sparsities=LEVELS)
    shared = whole.copy()
    for epoch in range(3):
        whole.update(range(SAMPLES), dense[epoch], pruned[epoch], labels, epoch=epoch)
        halves = [shared.copy(), shared.copy()]
        for half, rows in zip(halves, (range(4), range(4, SAMPLES)), strict=True):
            half.update(rows, dense[epoch][rows], pruned[epoch][:, rows], labels[rows], epoch=epoch)
            shared.put(rows, half.take(rows))
    assert shared.table(IDS).equals(whole.table(IDS))
    fresh = EpochStatistics(SAMPLES, CLASSES, sparsities=LEVELS)
    fresh.load_state_dict(whole.state_dict())
    for statistics in (fresh, whole):
        statistics.update(range(SAMPLES), dense[3], pruned[3], labels, epoch=3)
    assert fresh.table(IDS).equals(whole.table(IDS))
    other = EpochStatistics(SAMPLES, CLASSES, sparsities=[0.1])
    with pytest.raises(fastpie.FastpieError, match=r"differs in .*js_mean"):
        other.load_state_dict(whole.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [0, 0]}, "some occur twice"),
        ({"rows": [0, 9]}, r"in \[0, 9\), but got 0 to 9"),
        ({"dense": torch.zeros(2, 3)}, r"`dense` of shape \[2, 4\], but got \[2, 3\]"),
        ({"pruned": torch.zeros(1, 2, 4)}, r"`pruned` of shape \[2, 2, 4\], but got \[1, 2, 4\]"),
        ({"pruned": None}, r"`pruned` of shape \[2, 2, 4\], but got None"),
        ({"labels": None}, "`labels` in every update"),
        ({"labels": torch.tensor([0, 4])}, r"`labels` in \[0, 4\), but got 4"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    statistics = EpochStatistics(SAMPLES, CLASSES, sparsities=LEVELS)
    arguments: dict[str, Any] = {
        "rows": [0, 1],
        "dense": torch.zeros(2, 4),
        "pruned": torch.zeros(2, 2, 4),
        "labels": torch.tensor([0, 1]),
    }
    with pytest.raises(fastpie.FastpieError, match=message):
        statistics.update(**{**arguments, **change})
    assert statistics.table(IDS).num_rows == 0


def test_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(fastpie.FastpieError, match="'segmentation'"):
        EpochStatistics(1, 2, task="segmentation")
    with pytest.raises(fastpie.FastpieError, match="got neither"):
        EpochStatistics(1, 2, labelled=False)
    with pytest.raises(fastpie.FastpieError, match=r"`el2n_epochs` to hold numbers .* got 5"):
        EpochStatistics(1, 2, el2n_epochs=5)  # type: ignore[arg-type]
    with pytest.raises(fastpie.FastpieError, match="9 sample ids, but got 1"):
        EpochStatistics(SAMPLES, CLASSES).table(["a"])
