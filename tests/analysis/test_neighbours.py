"""Nearest neighbours against scikit-learn and a literal computation, also where rounding could decide."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch.utils.data import TensorDataset

import fastpie
from fastpie.analysis import neighbour_search as module
from fastpie.analysis.neighbours import (
    atypical,
    label_conflict,
    nearest_neighbours,
    neighbour_agreement,
    run_features,
)
from fastpie.errors import FastpieError
from fastpie.mining.run_folder import NO_ROWS, RunFolder


@pytest.fixture(params=[None, (7, 5)], ids=["one block", "small blocks"])
def blocks(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(module, "_QUERIES", request.param[0])
        monkeypatch.setattr(module, "_CANDIDATES", request.param[1])


def literal(features, k):
    """Euclidean, by (distance, index)."""
    indices = []
    for i, row in enumerate(features):
        d = np.sqrt(((features - row) ** 2).sum(1))
        d[i] = np.inf
        indices.append(np.lexsort((np.arange(len(features)), d))[:k])
    return np.array(indices)


def features(seed, n=97, d=13, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(dtype)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_equals_scikit_learn(blocks, metric, dtype):
    x = features(0, dtype=dtype)
    found = nearest_neighbours(x, 4, metric=metric)
    peer = NearestNeighbors(n_neighbors=5, metric=metric, algorithm="brute")
    distances, indices = peer.fit(x.astype(np.float64)).kneighbors()
    assert found.indices.dtype == np.int64
    assert (found.indices == indices[:, :4]).all()
    np.testing.assert_allclose(found.distances, distances[:, :4], rtol=1e-9)


def test_neighbours_that_fp32_cannot_tell_apart_come_in_their_true_order(blocks):
    # 1 away from everything, the differences of distance far below what a product in fp32 resolves.
    generator = np.random.default_rng(1)
    x = 1000 + generator.normal(size=(60, 20)) * 1e-4
    assert (nearest_neighbours(x, 5, metric="euclidean").indices == literal(x, 5)).all()


def test_ties_come_by_index(blocks):
    x = np.random.default_rng(2).integers(0, 2, size=(120, 4)).astype(np.float32)
    found = nearest_neighbours(x, 9, metric="euclidean")
    assert (found.indices == literal(x, 9)).all()
    assert (np.diff(found.distances) == 0).any()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_duplicates_are_at_distance_zero(blocks, metric):
    x = np.repeat(features(3, n=3), 30, axis=0)
    found = nearest_neighbours(x, 29, metric=metric)
    assert (found.distances == 0).all()
    for i, row in enumerate(found.indices):
        first = i // 30 * 30
        assert row.tolist() == [j for j in range(first, first + 30) if j != i]


def test_all_samples_equal(blocks):
    found = nearest_neighbours(np.ones((50, 3)), 2)
    assert found.indices[0].tolist() == [1, 2]
    assert found.indices[30].tolist() == [0, 1]
    assert (found.distances == 0).all()


def test_fewer_samples_than_neighbours():
    found = nearest_neighbours(np.array([[0.0], [1.0], [3.0]]), 4, metric="euclidean")
    assert found.indices.tolist() == [[1, 2, -1, -1], [0, 2, -1, -1], [1, 0, -1, -1]]
    np.testing.assert_array_equal(
        found.distances,
        [[1, 3, np.nan, np.nan], [1, 2, np.nan, np.nan], [2, 3, np.nan, np.nan]],
    )


@pytest.mark.parametrize("n", [0, 1])
def test_no_other_sample(n):
    found = nearest_neighbours(np.ones((n, 2)), 3)
    assert found.indices.shape == (n, 3)
    assert (found.indices == -1).all()
    assert np.isnan(found.distances).all()


def test_a_sample_without_finite_features_has_no_neighbours_and_is_none(blocks):
    x = features(4)
    x[[3, 50], [0, 12]] = np.nan, np.inf
    good = np.delete(np.arange(len(x)), [3, 50])
    found = nearest_neighbours(x, 6, metric="euclidean")
    assert (found.indices[[3, 50]] == -1).all()
    assert np.isnan(found.distances[[3, 50]]).all()
    assert (found.indices[good] == good[literal(x[good], 6)]).all()


def test_a_row_of_zeros_is_a_direction_of_its_own(blocks):
    x = features(5, n=30)
    x[[4, 9]] = 0
    found = nearest_neighbours(x, 29)
    assert found.indices[4, 0] == 9
    assert found.distances[4, 0] == 0
    np.testing.assert_allclose(found.distances[4, 1:], 1)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_huge_and_tiny_features(blocks, metric, scale):
    x = features(6)
    plain, scaled = (nearest_neighbours(v, 5, metric=metric) for v in (x, x * np.float32(scale)))
    assert (scaled.indices == plain.indices).all()
    factor = scale if metric == "euclidean" else 1
    np.testing.assert_allclose(scaled.distances, plain.distances * factor, rtol=1e-5)


def test_one_row_far_from_all_others_does_not_blur_them(blocks):
    x = features(7)
    x[0] = 1e20
    assert (
        nearest_neighbours(x, 5, metric="euclidean").indices == literal(x.astype(float), 5)
    ).all()


def test_blocks_and_threads_do_not_show(monkeypatch, restore_threads):
    x = features(8, n=500, d=40)
    whole = nearest_neighbours(x)
    torch.set_num_threads(1)
    monkeypatch.setattr(module, "_QUERIES", 33)
    monkeypatch.setattr(module, "_CANDIDATES", 64)
    monkeypatch.setattr(module, "_CHUNK", 100)
    parts = nearest_neighbours(x)
    assert (whole.indices == parts.indices).all()
    assert (whole.distances == parts.distances).all()


def test_lower_precision_of_products_does_not_show():
    x = features(9, n=300, d=256)
    expected = nearest_neighbours(x, metric="euclidean").indices
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert (nearest_neighbours(x, metric="euclidean").indices == expected).all()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_memory_maps_and_tensors(tmp_path):
    x = features(10)
    np.save(tmp_path / "x.npy", x)
    expected = nearest_neighbours(x).indices
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert (nearest_neighbours(mapped).indices == expected).all()
    assert (nearest_neighbours(torch.from_numpy(x).requires_grad_()).indices == expected).all()
    half = torch.from_numpy(x).bfloat16()
    assert (nearest_neighbours(half).indices == nearest_neighbours(half.float()).indices).all()


def test_atypical_is_the_mean_distance_to_those_there_are():
    x = np.array([[0.0], [1.0], [1.0], [5.0], [np.nan]])
    found = nearest_neighbours(x, 2, metric="euclidean")
    np.testing.assert_array_equal(atypical(found), [1, 0.5, 0.5, 4, np.nan])
    found = nearest_neighbours(x, 9, metric="euclidean")
    np.testing.assert_allclose(atypical(found), [7 / 3, 5 / 3, 5 / 3, 13 / 3, np.nan])


def test_agreement_weighs_near_neighbours_more():
    x = np.array([[0.0], [1.0], [3.0]])
    found = nearest_neighbours(x, 2, metric="euclidean")
    # Sample 0: distances 1 and 3, mean 2, weights 1/3 and 1/5.
    shares = neighbour_agreement(found, [0, 0, 1])
    np.testing.assert_allclose(shares, [5 / 8, 3.5 / 6, 0])


def test_agreement_among_duplicates_is_the_plain_share():
    found = nearest_neighbours(np.ones((5, 2)), 4)
    np.testing.assert_allclose(neighbour_agreement(found, [0, 0, 0, 1, 1]), [0.5] * 3 + [0.25] * 2)


def test_agreement_leaves_out_what_is_unknown():
    x = np.array([[0.0], [1.0], [2.0], [3.0], [np.nan]])
    found = nearest_neighbours(x, 3, metric="euclidean")
    shares = neighbour_agreement(found, [1, -1, 1, 1, 1])
    np.testing.assert_array_equal(shares, [1, np.nan, 1, 1, np.nan])


def test_agreement_of_several_labels_is_the_mean_over_the_known_classes():
    x = features(12, n=30)
    found = nearest_neighbours(x, 6)
    labels = np.random.default_rng(0).integers(0, 2, size=(30, 3)).astype(np.float32)
    labels[4, 1] = np.nan
    of_class = [neighbour_agreement(found, np.nan_to_num(y, nan=-1)) for y in labels.T]
    expected = np.nanmean(of_class, axis=0)
    np.testing.assert_allclose(neighbour_agreement(found, labels, task="multilabel"), expected)


def literal_conflict(x, y, k):
    conflict = np.full(len(x), np.nan)
    for i in range(len(x)):
        d = np.sqrt(((x - x[i]) ** 2).sum(1))
        others = (np.arange(len(x)) != i) & (y >= 0)
        own, other = (np.sort(d[others & mask])[:k] for mask in (y == y[i], y != y[i]))
        if y[i] >= 0 and len(own) and len(other):
            conflict[i] = own.mean() / (own.mean() + other.mean())
    return conflict


@pytest.mark.parametrize("k", [1, 5, 200])
def test_conflict_equals_a_literal_computation(blocks, k):
    x = features(13).astype(np.float64)
    y = np.random.default_rng(1).integers(-1, 4, len(x))
    expected = literal_conflict(x, y, k)
    assert np.isnan(expected).any()
    np.testing.assert_allclose(label_conflict(x, y, k, metric="euclidean"), expected)


def test_conflict_of_each_class_of_several_labels(blocks):
    x = features(14).astype(np.float64)
    y = np.random.default_rng(2).integers(0, 2, (len(x), 3)).astype(np.float32)
    y[5, 0], y[:, 2] = np.nan, 1  # nobody is without the third
    got = label_conflict(x, y, 3, metric="euclidean", task="multilabel")
    for c in range(3):
        of_class = literal_conflict(x, np.nan_to_num(y[:, c], nan=-1), 3)
        np.testing.assert_allclose(got[:, c], of_class)
    assert np.isnan(got[:, 2]).all()


def test_conflict_finds_wrong_labels_and_survives_duplicates():
    generator = np.random.default_rng(3)
    truth = np.repeat([0, 1, 2], 40)
    x = np.eye(3)[truth] * 5 + generator.normal(size=(120, 3))
    labels = truth.copy()
    wrong = [3, 50, 90]
    labels[wrong] = (labels[wrong] + 1) % 3
    x = np.concatenate([x, x[:10]])  # exact copies, one of them of a wrong label
    labels = np.concatenate([labels, truth[:10]])
    conflict = label_conflict(x, labels, metric="euclidean")
    assert np.isfinite(conflict).all()
    assert set(np.argsort(-conflict)[:3]) == set(wrong)
    same = label_conflict(np.ones((6, 2)), [0, 0, 0, 1, 1, 1])
    assert (same == 0.5).all()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("exact", [True, False])
def test_faiss(monkeypatch, metric, exact):
    pytest.importorskip("faiss")
    if not exact:
        monkeypatch.setattr(module, "_FAISS_EXACT", 100)
    x = np.concatenate([features(11, n=2000), np.ones((30, 13), np.float32)])
    x[5, 0] = np.nan
    ours = nearest_neighbours(x, 5, metric=metric)
    theirs = nearest_neighbours(x, 5, metric=metric, library="faiss")
    assert (theirs.indices[5] == -1).all()
    same = (ours.indices == theirs.indices)[:2000].mean()
    assert same == 1 if exact else same > 0.5
    np.testing.assert_allclose(theirs.distances[2000:], 0, atol=1e-12)
    if exact:
        np.testing.assert_allclose(theirs.distances, ours.distances, atol=1e-6)


def test_faiss_that_is_not_installed_is_asked_for(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(
        FastpieError, match=r"Expected faiss for nearest neighbours.*fastpie\[faiss\]"
    ):
        nearest_neighbours(features(0), library="faiss")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": np.ones(3)}, r"`features` of shape \[N, D\] and numbers, but got \[3\]"),
        ({"features": np.array([["a"]])}, "numbers, but got"),
        ({"k": 0}, "`k` of at least 1, but got 0"),
        ({"metric": "manhattan"}, "`metric` to be one of .* but got 'manhattan'"),
        ({"library": "annoy"}, "`library` to be one of .* but got 'annoy'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(FastpieError, match=message):
        nearest_neighbours(**{"features": features(0), **arguments})


@pytest.mark.parametrize(
    ("labels", "task", "message"),
    [
        (
            np.zeros(4),
            "multiclass",
            r"multiclass `labels` of shape \[97\] and numbers, but got \[4\]",
        ),
        (np.zeros(97), "multilabel", r"`labels` of shape \[97, C\] and numbers, but got \[97\]"),
        (np.full((97, 2), 3.0), "multilabel", "of 1, 0 or NaN"),
        (np.array(["a"] * 97), "multiclass", "numbers, but got"),
        (np.zeros(97), "embedding", "`task` to be one of"),
    ],
)
def test_bad_labels(labels, task, message):
    x = features(0)
    with pytest.raises(FastpieError, match=message):
        label_conflict(x, labels, task=task)
    with pytest.raises(FastpieError, match=message):
        neighbour_agreement(nearest_neighbours(x, 2), labels, task=task)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(4, 6)
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x.flatten(1)))


def mined(folder, **options):
    torch.manual_seed(0)
    images = torch.randn(40, 1, 2, 2)
    images[7] = torch.nan  # in the errors, not in the table
    models = []
    for _ in range(options.pop("models", 1)):
        network = Network().eval()
        masks = fastpie.prune(network, [0.3, 0.5])
        models.append(fastpie.DualModel(network, masks, features="body"))
    data = TensorDataset(images, torch.arange(40) % 3)
    ids = [f"s{i:02d}" for i in range(40)]
    run = fastpie.mine(
        models if len(models) > 1 else models[0],
        Named(data, ids), folder, batch_size=8, progress=False, **options,
    )  # fmt: skip
    return run, [m.model for m in models], images


class Named(torch.utils.data.Dataset):
    def __init__(self, data, ids):
        self.data, self.sample_ids = data, ids

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i]


def test_features_of_a_run(tmp_path):
    run, (network,), images = mined(tmp_path / "run", keep_features=True)
    kept = run_features(run)
    assert kept.dtype == np.float32
    assert (kept == run.features()[0]).all()
    rows = [int(i[1:]) for i in run.table["sample_id"].to_pylist()]
    assert 7 not in rows
    expected = network.body(images.flatten(1)).detach().numpy()[rows]
    np.testing.assert_allclose(kept, expected, atol=1e-6)
    found = nearest_neighbours(tmp_path / "run", 3)
    assert (found.indices == nearest_neighbours(expected, 3).indices).all()


def test_features_of_a_run_of_several_models_make_the_mean_of_their_cosine_distances(tmp_path):
    run, _, _ = mined(tmp_path / "run", models=2, keep_features=True)
    n = len(run)
    found = nearest_neighbours(run, n - 1)
    by_pair = np.zeros((n, n))
    for member in run.members:
        of_one = nearest_neighbours(member.features()[0], n - 1)
        np.put_along_axis(
            by_pair, of_one.indices,
            np.take_along_axis(by_pair, of_one.indices, 1) + of_one.distances / 2, 1,
        )  # fmt: skip
    expected = np.take_along_axis(by_pair, found.indices, 1)
    np.testing.assert_allclose(found.distances, expected, atol=1e-6)


def test_a_run_without_features(tmp_path):
    run, _, _ = mined(tmp_path / "run")
    with pytest.raises(FastpieError, match="was made without keep_features=True"):
        nearest_neighbours(run)


def test_a_part_of_which_nothing_could_be_scored(tmp_path):
    run, _, _ = mined(tmp_path / "run", keep_features=True)
    expected = run_features(run)
    RunFolder(run.location).write_part(99, NO_ROWS, {})
    assert (run_features(run.location) == expected).all()
