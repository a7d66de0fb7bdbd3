"""`fastpie.pie` against independent computations of the published definitions."""

import numpy as np
import pandas as pd
import pytest
import torch

import fastpie


def probabilities(seed, models=5, samples=300, classes=8, digits=None):
    values = np.random.default_rng(seed).random((models, samples, classes))
    return values if digits is None else values.round(digits)


@pytest.mark.parametrize("digits", [None, 1])
def test_spearman_equals_pandas_where_no_tie_decides(digits):
    dense, pruned = probabilities(0, digits=digits), probabilities(1, digits=digits)
    rho = pd.DataFrame(dense.mean(0)).corrwith(
        pd.DataFrame(pruned.mean(0)), axis=1, method="spearman"
    )
    chosen = fastpie.pie((dense, pruned), fraction=0.1)
    assert chosen.dtype == np.int64
    assert len(chosen) == 30
    assert rho[chosen].max() <= np.sort(rho)[30] + 1e-12
    assert (np.diff(rho[chosen]) >= -1e-12).all()


def test_a_constant_row_comes_after_all_that_have_a_ranking():
    dense, pruned = probabilities(0, models=1), probabilities(1, models=1)
    dense[0, 7] = 0.5
    order = fastpie.pie((dense, pruned), fraction=1.0)
    assert order[-1] == 7


def modal(labels):
    counts = np.bincount(labels)
    return np.flatnonzero(counts == counts.max()).max()  # a tie takes the larger id


@pytest.mark.parametrize("models", [1, 2, 5])
def test_modal_equals_a_literal_transcription(models):
    dense, pruned = probabilities(2, models, classes=3), probabilities(3, models, classes=3)
    expected = {
        i
        for i in range(dense.shape[1])
        if modal(dense[:, i].argmax(1)) != modal(pruned[:, i].argmax(1))
    }
    assert set(fastpie.pie((dense, pruned), "modal")) == expected
    assert 0 < len(expected) < dense.shape[1]


@pytest.mark.parametrize("models", [1, 4])
def test_vote_equals_a_literal_transcription(models):
    dense, pruned = probabilities(4, models, classes=2), probabilities(5, models, classes=2)
    expected = set()
    for i in range(dense.shape[1]):
        for c in range(2):
            votes = [(p[:, i, c] > 0.6).sum() > models / 2 for p in (dense, pruned)]
            if votes[0] != votes[1]:
                expected.add(i)
    assert set(fastpie.pie((dense, pruned), "vote", threshold=0.6)) == expected


def test_equal_predictions_have_no_pie_by_modal_and_vote():
    dense = probabilities(6)
    assert len(fastpie.pie((dense, dense), "modal")) == 0
    assert len(fastpie.pie((dense, dense), "vote")) == 0


def test_two_dimensional_arrays_and_tensors_are_one_model():
    dense, pruned = probabilities(7, models=1), probabilities(8, models=1)
    expected = fastpie.pie((dense, pruned), fraction=0.2)
    got = fastpie.pie((torch.from_numpy(dense[0]), torch.from_numpy(pruned[0])), fraction=0.2)
    assert (got == expected).all()


@pytest.mark.parametrize(
    ("dense", "pruned", "message"),
    [
        (np.zeros((3, 4, 5)), np.zeros((3, 4, 6)), "same samples and classes"),
        (np.zeros(4), np.zeros((3, 4)), "shape"),
        (np.full((4, 5), 2.0), np.zeros((4, 5)), r"\[0, 1\]"),
        (np.full((4, 5), np.nan), np.zeros((4, 5)), r"\[0, 1\]"),
    ],
)
def test_bad_arrays_are_refused(dense, pruned, message):
    with pytest.raises(fastpie.FastpieError, match=message):
        fastpie.pie((dense, pruned))


def test_bad_options_are_refused():
    arrays = (probabilities(0), probabilities(1))
    with pytest.raises(fastpie.FastpieError, match="definition"):
        fastpie.pie(arrays, "median")
    with pytest.raises(fastpie.FastpieError, match="fraction"):
        fastpie.pie(arrays, fraction=1.5)


class Images(torch.utils.data.Dataset):
    sample_ids = [f"s{i:03d}" for i in range(60)]  # noqa: RUF012

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return torch.randn(4, generator=torch.Generator().manual_seed(index)), index % 3


def test_a_run_gives_sample_ids_and_follows_the_level(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    dual = fastpie.DualModel(model, fastpie.prune(model, [0.3, 0.8]), features="1")
    run = fastpie.mine(
        dual, Images(), tmp_path / "run", keep_logits=True, keep_features=True, progress=False
    )
    images = torch.stack([Images()[i][0] for i in range(60)])
    with torch.no_grad():
        out = dual.eval()(images)
    for level, sparsity in enumerate([0.3, 0.8]):
        arrays = (out.dense.softmax(-1), out.pruned[level].softmax(-1))
        for definition in ("spearman", "modal", "vote", "taxicab", "js", "margin", "flip"):
            expected = {Images.sample_ids[i] for i in fastpie.pie(arrays, definition, 0.2)}
            assert set(fastpie.pie(run, definition, 0.2, sparsity=sparsity)) == expected
        features = (out.features[0], out.features[1][level])
        expected = {Images.sample_ids[i] for i in fastpie.pie(features, "drift", 0.2)}
        assert set(fastpie.pie(run, "drift", 0.2, sparsity=sparsity)) == expected
        # As the public script: averaged, and here given, in fp32.
        kept = (x.softmax(-1) for x in map(torch.from_numpy, run.logits()))
        dense, pruned = (x.numpy() for x in kept)
        rows = fastpie.pie((dense, pruned[level]), fraction=0.2, compat="prunecxr")
        ids = fastpie.pie(run, fraction=0.2, sparsity=sparsity, compat="prunecxr")
        assert ids == [Images.sample_ids[i] for i in rows]
    assert fastpie.pie(run, "modal") == fastpie.pie(run, "modal", sparsity=0.8)
    with pytest.raises(fastpie.FastpieError, match="sparsity"):
        fastpie.pie(run, sparsity=0.5)
    with pytest.raises(fastpie.FastpieError, match=r"but got 0\.9"):
        fastpie.pie(run, compat="prunecxr")  # the script's level


def test_a_run_without_logits_is_refused(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    run = fastpie.mine(model, Images(), tmp_path / "run", progress=False)
    with pytest.raises(fastpie.FastpieError, match="keep_logits"):
        fastpie.pie(run)
    with pytest.raises(fastpie.FastpieError, match="keep_features"):
        fastpie.pie(run, "drift")


class Embedder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 8)

    def forward(self, x):
        return self.layer(x)


def test_drift_of_an_embedding_run_is_that_of_its_outputs(tmp_path):
    torch.manual_seed(0)
    dual = fastpie.DualModel(model := Embedder(), fastpie.prune(model, 0.5))
    images = [(Images()[i][0],) for i in range(60)]
    run = fastpie.mine(
        dual,
        images,
        tmp_path / "run",
        task="embedding",
        sample_ids=Images.sample_ids,
        keep_logits=True,
        progress=False,
    )
    drift = run.table.column("drift").to_numpy()
    ids = run.table.column("sample_id").to_pylist()
    chosen = fastpie.pie(run, "drift", 0.2)
    assert [ids.index(i) for i in chosen] == np.argsort(-drift, kind="stable")[:12].tolist()
    with pytest.raises(fastpie.FastpieError, match="classifier"):
        fastpie.pie(run, "js")
