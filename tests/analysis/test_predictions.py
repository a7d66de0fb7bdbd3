"""Predictions from arrays and from runs: shapes, levels, labels, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

import fastpie
from fastpie import FastpieError
from fastpie.analysis import Predictions

S, L, N, C = 2, 3, 5, 4
LEVELS = [0.2, 0.5, 0.9]


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((S, N, C)), rng.random((S, L, N, C))


def made(dense=None, pruned=None, sparsities=LEVELS, task="multilabel", **how):
    first, second = arrays()
    return Predictions.of_arrays(
        first if dense is None else dense,
        second if pruned is None else pruned,
        sparsities,
        task=task,
        **how,
    )


def test_shapes_that_may_be_given():
    dense, pruned = arrays()
    whole = made()
    assert (whole.models, whole.samples, whole.classes) == (S, N, C)
    assert whole.class_names == ["0", "1", "2", "3"]
    for given in (
        made(dense[0], pruned[0]),
        made(dense[:1], pruned[:1]),
        made(dense[0], pruned[:1]),
    ):
        assert given.dense.shape == (1, N, C)
        np.testing.assert_array_equal(given.pruned, pruned[:1])
    for given in (made(dense, pruned[:, 1], 0.5), made(dense, pruned[:, 1:2], [0.5])):
        assert given.sparsities == [0.5]
        np.testing.assert_array_equal(given.pruned, pruned[:, 1:2])
    one = made(dense[0], pruned[0, 1], 0.5)
    np.testing.assert_array_equal(one.pruned, pruned[:1, 1:2])


def test_tensors_and_dtypes():
    dense, pruned = arrays()
    given = made(torch.from_numpy(dense).requires_grad_(), torch.from_numpy(pruned).float())
    assert (given.dense.dtype, given.pruned.dtype) == (np.float64, np.float32)
    assert made((dense > 0.5).astype(int), pruned).dense.dtype == np.float64
    half = made(torch.from_numpy(dense).half(), pruned)
    np.testing.assert_array_equal(half.dense, dense.astype(np.float16).astype(np.float64))
    with pytest.raises(FastpieError, match="`dense` to hold numbers, but got"):
        made(dense.astype(str), pruned)
    with pytest.raises(FastpieError, match="`pruned` to hold numbers, but got complex128"):
        made(dense, pruned + 0j)


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_probabilities(task, dtype):
    rng = np.random.default_rng(0)
    dense, pruned = (4 * rng.normal(size=(S, *k, N, C)).astype(dtype) for k in ((), (L,)))
    given = made(dense, pruned, task=task, logits=True)
    for level, logits in ((None, dense), (0, pruned[:, 0]), (2, pruned[:, 2])):
        e = np.exp(logits.astype(np.float64))
        wanted = e / (1 + e) if task == "multilabel" else e / e.sum(-1, keepdims=True)
        found = given.probabilities(level)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    np.testing.assert_array_equal(made().probabilities(1), arrays()[1][:, 1])


def test_levels():
    given = made()
    assert [given.level(s) for s in (None, 0.2, 0.5 + 1e-12)] == [2, 0, 1]
    with pytest.raises(FastpieError, match=r"one of \[0.2, 0.5, 0.9\], but got 0.3"):
        given.level(0.3)
    for bad in ([], [0.5, 0.2], [0.2, 0.2], [0, 0.5], [0.5, 1], float("nan")):
        with pytest.raises(FastpieError, match=r"`sparsities` in \(0, 1\), increasing"):
            made(sparsities=bad)


def test_labels():
    labels = np.array([[1, 0, np.nan, 1]] * N)
    given = made(labels=labels)
    np.testing.assert_array_equal(given.positives(), labels)
    assert given.positives().dtype == np.float32
    classes = made(task="multiclass", labels=torch.tensor([0, 3, -1, 1, 1]))
    assert classes.labels.dtype == np.int64
    nan = np.nan
    np.testing.assert_array_equal(
        classes.positives(),
        [[1, 0, 0, 0], [0, 0, 0, 1], [nan] * 4, [0, 1, 0, 0], [0, 1, 0, 0]],
    )
    unknown = made(task="multiclass", labels=[0, 3, nan, 1, 1])
    np.testing.assert_array_equal(unknown.labels, classes.labels)
    with pytest.raises(FastpieError, match="predictions with labels, but these have none"):
        made().positives()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"task": "regression"}, "`task` to be one of"),
        ({"dense": np.zeros((S, N))}, r"\[3, 2, 5, 4\]|shape"),
        ({"dense": np.zeros((S, N, 3))}, r"beside `dense` of shape \[2, 5, 3\]"),
        ({"dense": np.zeros(4)}, r"`dense` of shape \[S, N, C\]"),
        ({"pruned": np.zeros((S, 2, N, C))}, r"`pruned` of shape \[2, 3, 5, 4\]"),
        ({"dense": np.full((S, N, C), 1.5)}, "`dense` to hold probabilities in"),
        ({"pruned": np.full((S, L, N, C), -0.1)}, "`pruned` to hold probabilities in"),
        ({"labels": np.zeros((N, 3))}, r"multilabel `labels` of shape \[5, 4\]"),
        ({"labels": np.full((N, C), 2)}, r"of 1, 0 or NaN \(unknown\), but got 2"),
        ({"task": "multiclass", "labels": [0, 1, 2, 3, 4]}, r"in \[0, 4\).*but got 4"),
        ({"task": "multiclass", "labels": [0, 1, 2, 3, 0.5]}, "but got 0.5"),
        ({"task": "multiclass", "labels": [0, 1, 2, 3, -2]}, "but got -2"),
        ({"class_names": ["a"]}, "4 `class_names`, but got 1"),
        ({"class_names": ["a", "b", "a", "c"]}, "`class_names` that all differ"),
        ({"sample_ids": ["a"]}, "5 `sample_ids`, but got 1"),
        ({"train_counts": [1, 2, 3]}, "`train_counts` of 4 numbers of at least 0"),
        ({"train_counts": [1, 2, 3, -4]}, "`train_counts` of 4 numbers of at least 0"),
    ],
)
def test_what_is_refused(how, said):
    with pytest.raises(FastpieError, match=said):
        made(**how)


def test_nan_scores_are_data_and_not_an_error():
    dense, pruned = arrays()
    dense[0, 0, 0] = pruned[1, 2, 3] = np.nan
    assert np.isnan(made(dense, pruned).dense).sum() == 1
    dense[:] = np.nan  # a model that broke down
    assert np.isnan(made(dense, pruned).dense).all()


class Odd(nn.Module):
    """Cannot score some samples."""

    def __init__(self, inner, bar):
        super().__init__()
        self.inner, self.bar = inner, bar

    def forward(self, x):
        return torch.where(x[:, 0, 0, :1] > self.bar, torch.nan, self.inner(x))


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
@pytest.mark.parametrize("models", [1, 2])
def test_of_a_run(task, models, tmp_path):
    images = torch.randn(10, 1, 3, 3)
    bar = images[:, 0, 0, 0].sort().values[-2]
    labels = [torch.tensor([1.0, 0, torch.nan])] * 10 if task == "multilabel" else [2, 0] * 5
    data = [
        {"image": image, "label": label, "sample_id": f"s{i}"}
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    duals = []
    for bars in (float("inf"), float(bar))[:models]:
        model = Odd(nn.Sequential(nn.Flatten(), nn.Linear(9, 3)), bars)
        duals.append(fastpie.DualModel(model.eval(), fastpie.prune(model, [0.3, 0.6])))
    run = fastpie.mine(
        duals if models > 1 else duals[0],
        data,
        tmp_path / "run",
        task=task,
        batch_size=4,
        keep_logits=True,
    )
    given = Predictions.of_run(
        tmp_path / "run", class_names=["a", "b", "c"], train_counts=[1, 2, 3]
    )
    ids = run.table["sample_id"].to_pylist()
    assert given.sample_ids == ids
    assert len(ids) == (10 if models == 1 else 9)
    assert (given.task, given.logits, given.sparsities) == (task, True, [0.3, 0.6])
    assert (given.class_names, given.train_counts.tolist()) == (["a", "b", "c"], [1, 2, 3])
    rows = torch.stack([images[int(name[1:])] for name in ids])
    for s, dual in enumerate(duals):
        with torch.no_grad():
            out = dual(rows)
        np.testing.assert_allclose(given.dense[s], out.dense, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(given.pruned[s], out.pruned, rtol=1e-4, atol=1e-6)
    if task == "multilabel":
        np.testing.assert_array_equal(given.labels, [[1, 0, np.nan]] * len(ids))
    else:
        assert given.labels.tolist() == [labels[int(name[1:])] for name in ids]
