"""Agreement of exemplars against literal computations, and on null sets."""

import numpy as np
import pytest
from scipy import stats

from fastpie import FastpieError
from fastpie.analysis import Predictions
from fastpie.analysis.stability import control_share, stability, stability_of_scores
from fastpie.scores.pie import scored_exemplars

COLUMNS = ["what", "a", "b", "jaccard", "rank_correlation", "n"]


def made(
    seed=0, models=4, samples=300, classes=5, levels=(0.3, 0.5, 0.9), truth=None, noise=0.5, **more
):
    """Multilabel logits; pruning moves them by `truth` [samples] times a random direction, plus noise."""
    generator = np.random.default_rng(seed)
    dense = generator.normal(0, 2, (1, samples, classes)) + generator.normal(
        0, 0.05, (models, samples, classes)
    )
    size = np.zeros(samples) if truth is None else truth
    moves = [
        generator.normal(0, 1, (models, samples, classes)) * (noise + level * size[:, None])
        for level in levels
    ]
    return Predictions.of_arrays(
        dense, dense[:, None] + np.stack(moves, 1), levels, task="multilabel", logits=True, **more
    )


def jaccard(a, b):
    return len(set(a) & set(b)) / len(set(a) | set(b))


def test_rows_against_a_literal_computation():
    predictions = made(truth=np.random.default_rng(9).random(300))
    hardness = np.random.default_rng(8).random(300)
    table = stability(predictions, sparsity=0.5, fraction=0.1, hardness=hardness)
    assert table.column_names == COLUMNS
    rows = {(r["what"], r["a"], r["b"]): r for r in table.to_pylist()}
    names = ["spearman", "vote", "js", "margin", "flip", "hardness"]
    assert list(rows) == [
        *(("level", a, b) for a, b in (("0.3", "0.5"), ("0.3", "0.9"), ("0.5", "0.9"))),
        *(("model", str(a), str(b)) for a in range(4) for b in range(a + 1, 4)),
        *(("definition", a, b) for i, a in enumerate(names) for b in names[i + 1 :]),
    ]

    def found(level, definition="spearman", model=slice(None)):
        return scored_exemplars(
            predictions.probabilities()[model],
            predictions.probabilities(level)[model],
            definition,
            0.1,
            task="multilabel",
        )

    for key, one, other in (
        (("level", "0.3", "0.9"), found(0), found(2)),
        (("model", "1", "3"), found(1, model=slice(1, 2)), found(1, model=slice(3, 4))),
        (("definition", "vote", "margin"), found(1, "vote"), found(1, "margin")),
        (("definition", "js", "hardness"), found(1, "js"), (np.argsort(-hardness)[:30], hardness)),
    ):
        assert rows[key]["jaccard"] == jaccard(one[0], other[0])
        expected = stats.spearmanr(one[1], other[1]).statistic
        assert rows[key]["rank_correlation"] == pytest.approx(expected)
        assert rows[key]["n"] == 300


def test_one_model_at_one_level_has_only_definitions_to_compare():
    table = stability(made(models=1, levels=[0.5]))
    assert set(table.column("what").to_pylist()) == {"definition"}


def test_multiclass_has_its_own_definitions():
    generator = np.random.default_rng(1)
    logits = generator.normal(0, 1, (2, 3, 80, 4))
    predictions = Predictions.of_arrays(*logits, 0.5, task="multiclass", logits=True)
    rows = stability(predictions, definition="taxicab").to_pylist()
    names = {r["a"] for r in rows if r["what"] == "definition"}
    assert names == {"spearman", "modal", "taxicab", "js", "margin"}  # "flip" is the last b


def test_empty_sets_constant_scores_and_nan_are_told_apart():
    dense = np.random.default_rng(2).random((2, 50, 4))
    predictions = Predictions.of_arrays(dense, dense, 0.5, task="multilabel")
    rows = {(r["a"], r["b"]): r for r in stability(predictions).to_pylist()}
    assert rows["vote", "flip"]["jaccard"] is None
    assert rows["vote", "flip"]["rank_correlation"] is None
    assert rows["vote", "flip"]["n"] == 50
    pruned = np.random.default_rng(3).random((2, 50, 4))
    pruned[0, 7] = np.nan
    predictions = Predictions.of_arrays(dense, pruned, 0.5, task="multilabel")
    rows = {(r["a"], r["b"]): r for r in stability(predictions).to_pylist()}
    assert rows["js", "margin"]["n"] == 49
    assert rows["0", "1"]["n"] == 49


def test_random_scores_agree_by_chance_only():
    predictions = made(models=8, samples=4000, noise=3.0)
    rows = stability(predictions, definition="js", fraction=0.1).to_pylist()
    apart = [r for r in rows if r["what"] == "model"]
    assert abs(np.mean([r["jaccard"] for r in apart]) - 0.1 / 1.9) < 0.01
    correlations = np.array([r["rank_correlation"] for r in apart])
    # What pruning moves is random; how far js goes depends on the dense probabilities, the same here.
    assert abs(correlations.mean()) < 0.1


def test_one_truth_makes_models_and_levels_agree():
    truth = 4 * (np.random.default_rng(4).random(1000) < 0.1)
    rows = stability(made(samples=1000, truth=truth), definition="js", fraction=0.1).to_pylist()
    assert min(r["jaccard"] for r in rows if r["what"] == "model") > 0.3


def test_the_control_is_compared_at_common_levels():
    ours, control = made(0), made(1, models=2, levels=(0.5, 0.7, 0.9))
    rows = stability(ours, control=control, fraction=0.1).to_pylist()
    rows = [r for r in rows if r["what"] == "control"]
    assert [(r["a"], r["b"]) for r in rows] == [("0.5", "control"), ("0.9", "control")]
    pairs = [
        scored_exemplars(p.probabilities(), p.probabilities(p.level(0.9)), fraction=0.1)
        for p in (ours, control)
    ]
    assert rows[1]["jaccard"] == jaccard(pairs[0][0], pairs[1][0])
    expected = stats.spearmanr(pairs[0][1], pairs[1][1]).statistic
    assert rows[1]["rank_correlation"] == pytest.approx(expected)


def test_samples_are_matched_by_their_ids():
    ids = [f"s{i}" for i in range(300)]
    ours, control = made(0, sample_ids=ids), made(1)
    order = np.random.default_rng(5).permutation(300)[:250]
    shuffled = Predictions.of_arrays(
        control.dense[:, order],
        control.pruned[:, :, order],
        control.sparsities,
        task="multilabel",
        logits=True,
        sample_ids=[ids[i] for i in order],
    )
    some = np.sort(order)
    fewer = [
        Predictions.of_arrays(
            p.dense[:, some], p.pruned[:, :, some], p.sparsities, task="multilabel", logits=True
        )
        for p in (ours, control)
    ]
    assert control_share(ours, shuffled) == control_share(*fewer)
    got = [r for r in stability(ours, control=shuffled).to_pylist() if r["what"] == "control"]
    want = [r for r in stability(fewer[0], control=fewer[1]).to_pylist() if r["what"] == "control"]
    assert got == want
    assert [r["n"] for r in got] == [250] * 3


def test_what_is_magnitudes_own_and_what_any_damage():
    generator = np.random.default_rng(6)
    truth = generator.gamma(1, 1, 3000)
    other = generator.gamma(1, 1, 3000)
    sizes = {"samples": 3000, "models": 6, "levels": (0.9,), "noise": 0.3}
    ours = made(0, truth=truth, **sizes)
    same = control_share(ours, made(1, truth=truth, **sizes), definition="js")
    half = control_share(ours, made(1, truth=(truth + other) / 2, **sizes), definition="js")
    apart = control_share(ours, made(2, truth=other, **sizes), definition="js")
    assert same["any_damage"] > 0.9  # although the raw correlation is .77
    assert same["rank_correlation"] < 0.85
    assert 0.35 < half["any_damage"] < 0.6  # two truths, one of them shared: .5
    assert apart["any_damage"] < 0.05
    for facts in (same, half, apart):
        assert 0.5 < facts["reliability"] < 0.95
        assert facts["any_damage"] + facts["own"] == pytest.approx(1)
        assert facts["pies_shared_by_chance"] == 0.05
    assert apart["pies_shared"] < 0.1
    assert same["pies_shared"] > 0.3


def test_one_model_gives_raw_shares():
    sizes = {"samples": 500, "models": 1, "levels": (0.9,)}
    ours, control = made(0, **sizes), made(1, **sizes)
    facts = control_share(ours, control, definition="js")
    assert facts["reliability"] is facts["control_reliability"] is None
    assert facts["any_damage"] == pytest.approx(max(0, facts["rank_correlation"]) ** 2)
    constant = Predictions.of_arrays(
        ours.dense, ours.dense[:, None], [0.9], task="multilabel", logits=True
    )
    facts = control_share(constant, control, definition="flip")
    assert facts["own"] is facts["any_damage"] is facts["pies_shared"] is None


def test_scores_without_predictions():
    generator = np.random.default_rng(7)
    scores = {"0.3": generator.random(100), "0.7": generator.random(100)}
    scores["0.7"][3] = np.nan
    table = stability_of_scores("level", scores, fraction=0.2)
    assert table.column_names == COLUMNS
    known = np.delete(np.arange(100), 3)
    sets = [np.argsort(-scores["0.3"])[:20], known[np.argsort(-scores["0.7"][known])[:20]]]
    (row,) = table.to_pylist()
    expected = stats.spearmanr(scores["0.3"][known], scores["0.7"][known]).statistic
    assert row == {
        "what": "level", "a": "0.3", "b": "0.7", "jaccard": jaccard(*sets),
        "rank_correlation": pytest.approx(expected), "n": 99,
    }  # fmt: skip
    assert stability_of_scores("level", {}).num_rows == 0
    with pytest.raises(FastpieError, match=r"'0.7' of shape \[3\]"):
        stability_of_scores("level", {"0.3": np.zeros(3), "0.7": np.zeros(4)})
    with pytest.raises(FastpieError, match="fraction"):
        stability_of_scores("level", scores, fraction=2)


def test_bad_input_is_refused():
    predictions = made()
    with pytest.raises(FastpieError, match="drift"):
        stability(predictions, definition="drift")
    with pytest.raises(FastpieError, match="definition"):
        stability(predictions, definition="median")
    with pytest.raises(FastpieError, match="sparsity"):
        stability(predictions, sparsity=0.4)
    with pytest.raises(FastpieError, match="hardness"):
        stability(predictions, hardness=np.zeros(3))
    with pytest.raises(FastpieError, match="same 300 samples"):
        stability(predictions, control=made(samples=20))
    with pytest.raises(FastpieError, match="classes"):
        control_share(predictions, made(classes=3))
    with pytest.raises(FastpieError, match="levels"):
        stability(predictions, control=made(levels=(0.2, 0.4)))
    with pytest.raises(FastpieError, match="none of them"):
        control_share(
            made(sample_ids=[f"a{i}" for i in range(300)]),
            made(sample_ids=[f"b{i}" for i in range(300)]),
        )
