"""The operator `disagreement`: kernel against twin, and twin and kernel against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from scipy.spatial import distance
from torch import Tensor

from fastpie import ops
from fastpie.ops import reference
from fastpie.ops.disagreement import SCORES

CLASSES = (1, 2, 3, 14, 127, 128, 129, 1000, 10_000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def rows_of(kind: str, n: int, classes: int) -> tuple[Tensor, Tensor]:
    """Dense [n, classes] and pruned [2, n, classes] logits of one kind."""
    dense, pruned = torch.randn(n, classes) * 3, torch.randn(2, n, classes) * 3
    if kind == "tied":
        return dense.round(), pruned.round()
    if kind == "constant":
        dense[::2] = 1.5
        pruned[:, ::3] = -2.0
    if kind == "extreme":
        dense, pruned = dense * 1e4, pruned * 1e4
        dense[0], pruned[0, 0] = dense[0] * 1e30, pruned[0, 0] * 1e30
        dense[-1] = dense[-1] * 1e-40
    if kind == "close":
        pruned = dense + 1e-4 * pruned
    return dense, pruned


def labels_of(task: str, n: int, classes: int) -> Tensor:
    if task == "multiclass":
        return torch.randint(0, classes, (n,))
    targets = torch.randint(0, 2, (n, classes)).float()
    targets[torch.rand(n, classes) < 0.2] = torch.nan
    targets[0] = torch.nan
    return targets


def assert_same(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    for name, g, w in zip(SCORES, got, want, strict=True):
        torch.testing.assert_close(
            g,
            w,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            check_dtype=False,
            msg=lambda message, name=name: f"{name}: {message}",
        )


def scores(*args, **kwargs) -> dict[str, Tensor]:
    return dict(zip(SCORES, ops.disagreement(*args, **kwargs), strict=True))


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("kind", ["random", "tied", "constant", "extreme", "close"])
@pytest.mark.parametrize("classes", CLASSES)
def test_kernel_agrees_with_its_twin(classes: int, kind: str, task: str) -> None:
    n = 2 if classes > 1000 else 13
    dense, pruned = rows_of(kind, n, classes)
    for labels in (None, labels_of(task, n, classes)):
        got = ops.disagreement(dense, pruned, labels, task)
        assert got.dtype is torch.float32
        assert_same(got, reference.disagreement(dense, pruned, labels, task))


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_dtype_is_scored_from_its_exact_values(dtype: torch.dtype, task: str) -> None:
    dense, pruned = (x.to(dtype) for x in rows_of("tied", 17, 20))
    pruned[0, 1], pruned[0, 2] = dense[1] * 1e-7, dense[2]  # fp16: subnormal numbers
    labels = labels_of(task, 17, 20)
    got = ops.disagreement(dense, pruned, labels, task)
    assert got.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    want = reference.disagreement(dense.double(), pruned.double(), labels, task)
    assert_same(got, want)


def test_every_half_precision_number_is_read_exactly() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        dense = torch.stack([values, torch.zeros_like(values)], 1)
        got = scores(dense, dense.unsqueeze(0))["margin_dense"][0]
        finite_or_low = ~(values.isnan() | (values == torch.inf))
        want = torch.where(finite_or_low, values.float().abs(), torch.nan)
        assert torch.equal(got.nan_to_num(nan=-1), want.nan_to_num(nan=-1))


@pytest.mark.parametrize("kind", ["random", "tied", "close"])
@pytest.mark.parametrize("classes", [2, 20, 300])
def test_multiclass_scores_agree_with_scipy(classes: int, kind: str) -> None:
    dense, pruned = rows_of(kind, 12, classes)
    labels = labels_of("multiclass", 12, classes)
    got = scores(dense, pruned, labels)
    for level in range(2):
        for i in range(12):
            z, y = dense[i].double().numpy(), pruned[level, i].double().numpy()
            p, q = special.softmax(z), special.softmax(y)
            label = int(labels[i])
            loss = [-special.log_softmax(x)[label] for x in (z, y)]
            margin = [x[label] - np.delete(x, label).max() for x in (z, y)]
            want = {
                "js": distance.jensenshannon(p, q) ** 2,
                "kl": special.rel_entr(p, q).sum(),
                "kl_reverse": special.rel_entr(q, p).sum(),
                "spearman": stats.spearmanr(z, y).statistic if z.std() and y.std() else np.nan,
                "flip": float(z.argmax() != y.argmax()),
                "margin_dense": margin[0],
                "margin_pruned": margin[1],
                "drift": np.linalg.norm(z / np.linalg.norm(z) - y / np.linalg.norm(y)),
                "loss_dense": loss[0],
                "loss_pruned": loss[1],
                "damage": loss[1] - loss[0],
            }
            if kind == "close":  # SciPy's JS cancels to NaN or noise near zero
                del want["js"]
            for name, value in want.items():
                have = float(got[name][level, i])
                assert have == pytest.approx(value, rel=1e-5, abs=1e-5, nan_ok=True), name


def test_multilabel_scores_agree_with_scipy() -> None:
    dense, pruned = rows_of("random", 10, 14)
    targets = torch.randint(0, 2, (10, 14)).float()
    targets[3, 4] = torch.nan
    got = scores(dense, pruned[:1], targets, "multilabel")
    z, y = dense.double().numpy(), pruned[0].double().numpy()
    p, q, t = special.expit(z), special.expit(y), targets.double().numpy()

    def bernoulli_kl(a, b):
        return (special.rel_entr(a, b) + special.rel_entr(1 - a, 1 - b)).mean(-1)

    middle = (p + q) / 2
    js = (bernoulli_kl(p, middle) + bernoulli_kl(q, middle)) / 2
    cross = [-(t * special.log_expit(x) + (1 - t) * special.log_expit(-x)) for x in (z, y)]
    margin = [
        np.nanmin(np.where(t == 1, x, np.nan), -1) - np.nanmax(np.where(t == 0, x, np.nan), -1)
        for x in (z, y)
    ]
    want = {
        "js": js,
        "kl": bernoulli_kl(p, q),
        "kl_reverse": bernoulli_kl(q, p),
        "flip": ((p > 0.5) != (q > 0.5)).any(-1),
        "margin_dense": margin[0],
        "margin_pruned": margin[1],
        "loss_dense": np.nanmean(cross[0], -1),
        "loss_pruned": np.nanmean(cross[1], -1),
        "damage": np.nanmean(cross[1], -1) - np.nanmean(cross[0], -1),
    }
    for name, value in want.items():
        np.testing.assert_allclose(got[name][0], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_spearman_is_that_of_pandas_corrwith() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is an extra of the tests")
    dense, pruned = rows_of("tied", 50, 20)
    a, b = (pandas.DataFrame(x.double().numpy()) for x in (dense, pruned[0]))
    want = a.corrwith(b, axis=1, method="spearman").to_numpy()
    np.testing.assert_allclose(scores(dense, pruned[:1])["spearman"][0], want, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("classes", [1, 2, 20, 1000])
def test_identical_rows_disagree_by_exactly_zero(
    classes: int, task: str, dtype: torch.dtype
) -> None:
    dense = torch.cat([rows_of(kind, 9, classes)[0] for kind in ("random", "tied", "extreme")])
    dense = dense.clamp(-6e4, 6e4).to(dtype)
    got = scores(dense, dense.unsqueeze(0), labels_of(task, 27, classes), task)
    for name in ("js", "kl", "kl_reverse", "drift", "flip"):
        assert not got[name].any(), name
    assert not got["damage"].nan_to_num().any()
    rho = got["spearman"][~got["spearman"].isnan()]
    assert torch.equal(rho, torch.ones_like(rho))


@settings(deadline=None, max_examples=60)
@given(
    st.data(), st.integers(1, 6), st.integers(1, 9), st.sampled_from(["multiclass", "multilabel"])
)
def test_scores_stay_in_their_ranges_and_match_the_twin_for_any_row(
    data: st.DataObject, n: int, classes: int, task: str
) -> None:
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    special_values = st.sampled_from([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e38, -1e38])
    value = st.one_of(finite, st.floats(-5, 5, width=32), special_values)
    flat = data.draw(st.lists(value, min_size=2 * n * classes, max_size=2 * n * classes))
    both = torch.tensor(flat, dtype=torch.float32).view(2, n, classes)
    got = scores(both[0], both[1:], None, task)
    assert_same(
        torch.stack(list(got.values())), reference.disagreement(both[0], both[1:], None, task)
    )
    for name in ("js", "kl", "kl_reverse", "drift"):
        assert (got[name].nan_to_num() >= 0).all(), name
    assert (got["js"].nan_to_num() <= np.log(2) + 1e-6).all()
    assert (got["drift"].nan_to_num() <= 2 + 1e-6).all()
    assert (got["spearman"].nan_to_num().abs() <= 1).all()
    assert ((got["flip"] == 0) | (got["flip"] == 1)).all()


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("classes", [5, 200])
def test_nan_or_positive_infinity_spoils_its_own_row_only(
    classes: int, value: float, task: str
) -> None:
    dense, pruned = rows_of("random", 11, classes)
    labels = torch.ones(11, classes) if task == "multilabel" else torch.zeros(11, dtype=torch.int64)
    clean = ops.disagreement(dense, pruned, labels, task)
    dense[2, classes - 1] = value
    pruned[1, 7, 0] = value
    got = ops.disagreement(dense, pruned, labels, task)
    spoiled = torch.zeros(2, 11, dtype=torch.bool)
    spoiled[:, 2] = spoiled[1, 7] = True
    flip = SCORES.index("flip")
    assert not got[flip][spoiled].any()
    rest = [i for i in range(len(SCORES)) if i != flip]
    assert got[rest][:, spoiled].isnan().all()
    assert torch.equal(got[:, ~spoiled], clean[:, ~spoiled])


@pytest.mark.parametrize("size", [1e6, 3e11, 1e20, 3e38])
def test_huge_logits_that_tie_share_their_probability(size: float) -> None:
    dense, pruned = torch.tensor([[size, size, -size]]), torch.tensor([[[0.0, 1.0, 0.5]]])
    labels = torch.tensor([1])
    half, q = torch.tensor([0.5, 0.5, 0.0]), pruned[0, 0].softmax(-1)
    got = scores(dense, pruned, labels)
    torch.testing.assert_close(got["kl"].squeeze(), special_kl(half, q))
    torch.testing.assert_close(got["loss_dense"].squeeze(), torch.tensor(2.0).log())
    mirrored = scores(pruned[0], dense.unsqueeze(0), labels)
    torch.testing.assert_close(mirrored["kl_reverse"].squeeze(), special_kl(half, q))


def special_kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.from_numpy(special.rel_entr(p.numpy(), q.numpy())).sum()


def test_negative_infinity_is_a_class_of_probability_zero() -> None:
    dense = torch.tensor([[1.0, 2.0, -torch.inf]])
    pruned = torch.tensor([[[2.0, 1.0, -torch.inf]], [[2.0, 1.0, 0.0]]])
    got = scores(dense, pruned, torch.tensor([0]))
    without = scores(dense[:, :2], pruned[:1, :, :2], torch.tensor([0]))
    for name in ("js", "kl", "kl_reverse", "flip", "margin_dense", "loss_pruned", "damage"):
        torch.testing.assert_close(got[name][0], without[name][0])
    assert got["kl_reverse"][1, 0] == torch.inf
    assert got["kl"][1, 0].isfinite()


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("logit", [-90.0, -705.0, -712.0, -744.0, -746.0, -1e4, -3.4e38])
def test_infinity_is_infinity_however_small_its_share(logit: float, task: str) -> None:
    row, excluded = torch.tensor([[0.5, 0.0, logit]]), torch.tensor([[[0.5, 0.0, -torch.inf]]])
    for function in (ops.disagreement, reference.disagreement):
        for dense, pruned, name in (
            (row, excluded, "kl"),
            (excluded[0], row.unsqueeze(0), "kl_reverse"),
        ):
            got = dict(zip(SCORES, function(dense, pruned, None, task), strict=True))
            other = {"kl": "kl_reverse", "kl_reverse": "kl"}[name]
            assert got[name].item() == torch.inf
            assert got[other].isfinite().all()
            assert got["js"].isfinite().all()


def test_constant_row_has_no_rank_correlation_and_every_other_score() -> None:
    dense, pruned = torch.full((1, 6), 0.5), torch.randn(1, 1, 6)
    got = scores(dense, pruned, torch.tensor([2]))
    assert got.pop("spearman").isnan().all()
    assert all(score.isfinite().all() for score in got.values())


def test_signed_zeros_are_tied() -> None:
    dense = torch.tensor([[0.0, -0.0, 1.0]]).repeat(1, 70)
    pruned = torch.tensor([[[-0.0, 0.0, 1.0]]]).repeat(1, 1, 70)
    for columns in (3, 210):
        got = scores(dense[:, :columns], pruned[..., :columns])
        assert got["spearman"].item() == 1
        assert got["flip"].item() == 0


@pytest.mark.parametrize("label", [-1, 4, -(2**63), 2**63 - 1])
def test_label_out_of_range_spoils_only_the_scores_that_use_it(label: int) -> None:
    dense, pruned = rows_of("random", 3, 4)
    labels = torch.tensor([1, label, 3])
    for function in (ops.disagreement, reference.disagreement):
        got = dict(zip(SCORES, function(dense, pruned, labels, "multiclass"), strict=True))
        for name, score in got.items():
            uses_it = name.startswith(("margin", "loss", "damage"))
            assert score[:, 1].isnan().all() == uses_it, name
            assert score[:, [0, 2]].isfinite().all(), name


def test_rows_without_known_targets_have_no_supervised_scores() -> None:
    dense, pruned = rows_of("random", 2, 4)
    targets = torch.tensor([[torch.nan] * 4, [1, 1, torch.nan, 1]])
    got = scores(dense, pruned, targets, "multilabel")
    for name in ("margin_dense", "margin_pruned", "loss_dense", "loss_pruned", "damage"):
        assert got[name][:, 0].isnan().all(), name
        assert got[name][:, 1].isfinite().all(), name
    # No negative in row 1: the decision threshold 0 stands in.
    assert got["margin_dense"][0, 1] == dense[1, [0, 1, 3]].min()
    assert got["js"].isfinite().all()


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize(("levels", "n"), [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rows_or_no_levels_give_empty_scores(
    levels: int, n: int, task: str, dtype: torch.dtype
) -> None:
    dense, pruned = torch.zeros(n, 4, dtype=dtype), torch.zeros(levels, n, 4, dtype=dtype)
    labels = torch.zeros(n, dtype=torch.int64) if task == "multiclass" else torch.zeros(n, 4)
    for given_labels in (None, labels):
        assert ops.disagreement(dense, pruned, given_labels, task).shape == (11, levels, n)


STRIDED = {
    "sliced_columns": lambda d, p: (d[:, 2:9], p[:, :, 1:8]),
    "every_other_column": lambda d, p: (d[:, ::2], p[:, :, ::2]),
    "every_other_row": lambda d, p: (d[::2], p[:, ::2]),
    "transposed": lambda d, p: (
        d.t().contiguous().t(),
        p.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ),
    "levels_inside_rows": lambda d, p: (d, p.transpose(0, 1).contiguous().transpose(0, 1)),
    "expanded_dense": lambda d, p: (d[:1].expand(d.shape), p),
    "expanded_levels": lambda d, p: (d, p[:1].expand(p.shape)),
    "one_column": lambda d, p: (d[:, 3:4], p[:, :, 3:4]),
    "reversed_levels": lambda d, p: (d, p.flip(0)),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_logits_score_as_their_contiguous_copies(view, dtype: torch.dtype) -> None:
    dense, pruned = (x.to(dtype) for x in rows_of("random", 10, 12))
    dense, pruned = view(dense, pruned)
    want = ops.disagreement(dense.contiguous(), pruned.contiguous())
    got = ops.disagreement(dense, pruned)
    assert torch.equal(got.nan_to_num(nan=-9), want.nan_to_num(nan=-9))


def test_strided_labels_are_read_by_their_strides() -> None:
    dense, pruned = rows_of("random", 6, 4)
    labels = torch.arange(12) % 4
    assert_same(
        ops.disagreement(dense, pruned, labels[::2]),
        ops.disagreement(dense, pruned, labels[::2].contiguous()),
    )
    targets = torch.randint(0, 2, (4, 6)).double().t()
    assert_same(
        ops.disagreement(dense, pruned, targets, "multilabel"),
        ops.disagreement(dense, pruned, targets.contiguous().float(), "multilabel"),
    )
