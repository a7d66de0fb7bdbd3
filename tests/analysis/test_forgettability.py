"""Tables of forgetting against the published formulas in pandas, a known structure, and none."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from fastpie import FastpieError
from fastpie.analysis import Predictions, intervals
from fastpie.analysis.forgettability import (
    class_changes,
    curves,
    first_significant,
    levels,
    links,
)
from fastpie.analysis.metrics import measure
from multilabel_set import DENSE_AP, multilabel_set

SPARSITIES = [0.3, 0.6, 0.9]


def predictions(seed=0, models=4, tied=False, classes=7, samples=150):
    """Damage that grows with the level, more of it for the later classes."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((samples, classes)) < 0.25).astype(float)
    noise = rng.random((models, 4, samples, classes))
    harm = np.array([0, 0.1, 0.4, 1])[:, None, None] * np.linspace(0.2, 1, classes)
    values = (0.5 * labels * (1 - harm) + 0.5 * noise).clip(0, 1)
    values = values.round(1) if tied else values
    return Predictions.of_arrays(
        values[:, 0],
        values[:, 1:],
        SPARSITIES,
        task="multilabel",
        labels=labels,
        class_names=[f"class {i}" for i in range(classes)],
        train_counts=np.arange(classes) ** 2 + 5,
    )


def published(given):
    """The data frame of PruneCXR's main_analysis.py, with its names, from scikit-learn's metrics."""
    rows = []
    for seed in range(given.models):
        for place, ratio in enumerate([0, *given.sparsities]):
            outputs = given.dense[seed] if place == 0 else given.pruned[seed, place - 1]
            for c, label in enumerate(given.class_names):
                y = given.labels[:, c]
                ap = average_precision_score(y, outputs[:, c])
                auc = roc_auc_score(y, outputs[:, c])
                rows.append((seed, ratio, label, auc, ap))
    metrics = pd.DataFrame(rows, columns=["seed", "ratio", "label", "auc", "ap"])
    dense = metrics[metrics["ratio"] == 0][["auc", "ap"]].reset_index(drop=True)
    parts = []
    for ratio in given.sparsities:
        of_ratio = metrics[metrics["ratio"] == ratio].reset_index(drop=True)
        part = (of_ratio[["auc", "ap"]] - dense) / (dense + 1e-12)
        part[["label", "ratio"]] = of_ratio[["label", "ratio"]]
        parts.append(part)
    changes = pd.concat(parts)
    delta = changes.groupby(["label", "ratio"], as_index=False).agg(
        {"auc": "median", "ap": "median"}
    )
    return metrics, delta


@pytest.mark.parametrize("models", [1, 2, 4, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_curves_and_drops_as_published(models, tied):
    given = predictions(models=models, tied=tied)
    measurement = measure(given, repeats=3)
    metrics, delta = published(given)
    found = curves(measurement).to_pandas()
    for ours, theirs in (("ap", "ap"), ("auroc", "auc")):
        table = found[(found["metric"] == ours) & (found["sparsity"] > 0)]
        wanted = delta.set_index(["label", "ratio"])[theirs]
        np.testing.assert_allclose(
            table["change"],
            wanted.loc[list(zip(table["class"], table["sparsity"], strict=True))],
            atol=1e-12,
        )
    classes = class_changes(measurement, level=1).to_pandas().set_index("class")
    for label, row in classes.iterrows():
        curve = delta[delta["label"] == label].sort_values("ratio").reset_index(drop=True)
        below = np.where(curve["ap"] < -0.2)[0]
        if len(below):
            assert row["first_drop"] == curve.loc[below[0], "ratio"]
        else:
            assert np.isnan(row["first_drop"])
        assert row["extreme_drop"] == pytest.approx(curve["ap"].iloc[-1])
        of_class = metrics[metrics["label"] == label]
        median = of_class.groupby("ratio")[["ap", "auc"]].median()
        assert row["ap"] == pytest.approx(median.loc[0, "ap"])
        assert row["auroc_pruned"] == pytest.approx(median.loc[0.6, "auc"])
    assert classes["first_drop"].notna().any()
    assert classes["first_drop"].isna().any()


@pytest.mark.parametrize("tied", [False, True])
def test_links_as_published(tied):
    given = predictions(4, models=3, tied=tied)
    measurement = measure(given)
    _, delta = published(given)
    frequency = dict(zip(given.class_names, given.train_counts, strict=True))
    extreme = delta[delta["ratio"] == 0.9]
    first = delta[delta["ap"] < -0.2].groupby("label", as_index=False)["ratio"].min()
    table = links(measurement).to_pandas().set_index(["y", "method"])
    assert (table["x"] == "ln_n_train").all()
    for name, frame, column in (
        ("extreme_drop", extreme, "ap"),
        ("first_drop", first, "ratio"),
    ):
        x, y = np.log(frame["label"].map(frequency)), frame[column]
        for method, scipys in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
            assert table.loc[(name, method), "n"] == len(frame)
            assert table.loc[(name, method), "value"] == pytest.approx(scipys(x, y)[0])


def test_links_take_the_labels_where_training_is_unknown():
    given = predictions(models=2)
    named = Predictions.of_arrays(
        given.dense, given.pruned, SPARSITIES, task="multilabel", labels=given.labels
    )
    measurement = measure(named)
    table = links(measurement, metric="auroc").to_pandas()
    assert (table["x"] == "ln_n").all()
    extreme = class_changes(measurement, metric="auroc")["extreme_drop"].to_numpy()
    wanted = stats.pearsonr(np.log(given.labels.sum(0)), extreme)[0]
    assert table.query("y == 'extreme_drop'")["value"].iloc[0] == pytest.approx(wanted)
    assert class_changes(measurement)["n_train"].null_count == 7


def test_levels_of_several_models():
    given = predictions(models=6)
    measurement = measure(given)
    table = levels(measurement)
    metrics, _ = published(given)
    of_model = metrics.groupby(["seed", "ratio"])["ap"].mean().unstack()
    found = table.filter(pc.field("metric") == "map").to_pandas()
    assert found["sparsity"].tolist() == [0, *SPARSITIES]
    np.testing.assert_allclose(found["value"], of_model.median())
    p = [stats.ttest_rel(of_model[k], of_model[0], alternative="less").pvalue for k in SPARSITIES]
    np.testing.assert_allclose(found["p"][1:], p, rtol=1e-8)
    np.testing.assert_allclose(found["q"][1:], stats.false_discovery_control(p), rtol=1e-8)
    relative = of_model.sub(of_model[0], axis=0).div(of_model[0], axis=0)
    np.testing.assert_allclose(found["change"], relative.median(), atol=1e-9)
    assert (found["low"] <= found["value"]).all()
    assert (found["value"] <= found["high"]).all()
    assert table["significant"].to_pylist()[0] is None
    significant = [k for k, q in zip(SPARSITIES, found["q"][1:], strict=True) if q < 0.05]
    assert first_significant(table) == significant[0]


def test_first_significant():
    table = pa.table(
        {
            "sparsity": [0.0, 0.3, 0.6, 0.9] * 2,
            "metric": ["map"] * 4 + ["mauroc"] * 4,
            "significant": [None, False, True, True, None, False, False, False],
        }
    )
    assert first_significant(table) == 0.6
    assert first_significant(table, "mauroc") is None
    with pytest.raises(FastpieError, match=r"one of \['map', 'mauroc'\], but got 'accuracy'"):
        first_significant(table, "accuracy")


def test_multiclass_levels():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    logits = rng.normal(size=(3, 3, 200, 4)) + 2 * (labels[:, None] == np.arange(4))
    logits[:, 2] = rng.normal(size=(3, 200, 4))
    given = Predictions.of_arrays(
        logits[:, 0], logits[:, 1:], [0.5, 0.9], task="multiclass", labels=labels, logits=True
    )
    table = levels(measure(given)).to_pandas()
    assert list(dict.fromkeys(table["metric"])) == [
        "balanced_accuracy",
        "accuracy",
        "map",
        "mauroc",
    ]
    accuracy = (logits.argmax(-1) == labels).mean(-1)
    found = table[table["metric"] == "accuracy"]["value"]
    np.testing.assert_allclose(found, np.median(accuracy, axis=0))


def test_what_cannot_be_told_is_null():
    given = predictions(models=1)
    given.labels[:, 2] = 0
    measurement = measure(given, repeats=20)
    for table in (curves(measurement), class_changes(measurement), levels(measurement)):
        for column in table.itercolumns():
            if pa.types.is_floating(column.type):
                assert not pc.any(pc.is_nan(column)).as_py()
    rows = class_changes(measurement).to_pylist()
    assert [row["ap"] is None for row in rows] == [c == 2 for c in range(7)]
    assert rows[2]["extreme_drop"] is rows[2]["first_drop"] is rows[2]["recall_pruned"] is None
    of_class = curves(measurement).filter(pc.field("class") == "class 2")
    assert of_class["change"].null_count == len(of_class) == 12
    given.labels[:] = 0
    nothing = measure(given, repeats=2)
    assert levels(nothing)["p"].null_count == 8
    assert first_significant(levels(nothing)) is None
    assert links(nothing)["value"].null_count == 4


def test_all_ones_masks_cost_nothing():
    for models in (1, 3):
        given = predictions(models=models)
        same = Predictions.of_arrays(
            given.dense,
            np.stack([given.dense, given.dense], axis=1),
            [0.3, 0.6],
            task="multilabel",
            labels=given.labels,
        )
        measurement = measure(same, repeats=10)
        table = levels(measurement).to_pandas()
        assert (table["p"].dropna() == 1).all()
        assert (table["change"] == 0).all()
        assert set(curves(measurement)["change"].to_pylist()) == {0}


def test_bad_input():
    measurement = measure(predictions())
    with pytest.raises(FastpieError, match=r"`level` in \[0, 3\), but got 3"):
        class_changes(measurement, level=3)
    with pytest.raises(FastpieError, match=r"`drop` in \(0, 1\), but got 20"):
        class_changes(measurement, drop=20)
    with pytest.raises(FastpieError, match=r"`metric` to be one of .*, but got 'f1'"):
        links(measurement, metric="f1")


def measured(seed, **how):
    """Of a generated set, and that set."""
    made = multilabel_set(seed, **how)
    given = Predictions.of_arrays(
        made.dense,
        made.pruned,
        made.sparsities,
        task="multilabel",
        labels=made.labels,
        train_counts=made.train_counts,
    )
    return measure(given, repeats=100, seed=seed), made


@pytest.mark.parametrize("models", [1, 6])
def test_a_known_structure_is_in_the_intervals(models):
    repeats, classes = 6, 10
    held = total = 0
    for seed in range(repeats):
        measurement, made = measured(
            seed,
            models=models,
            samples=1000,
            classes=classes,
            sparsities=(0.6, 0.9),
            spread=0.05 if models > 1 else 0,  # one model tells nothing about other models
        )
        truth = np.concatenate([np.zeros((1, classes)), made.truth.curves])
        found = curves(measurement).filter(pc.field("metric") == "ap")
        low, high, change = (
            found[name].to_numpy().reshape(classes, 3).T[1:] for name in ("low", "high", "change")
        )
        inside = (low <= truth[1:]) & (truth[1:] <= high)
        held, total = held + inside.sum(), total + inside.size
        assert np.corrcoef(change[-1], truth[-1])[0, 1] > 0.5
        table = levels(measurement)
        assert table["value"][0].as_py() == pytest.approx(DENSE_AP, abs=0.06)
        assert first_significant(table) == 0.6
    # Classes share samples, so the count spreads more than a binomial one.
    assert held / total > 0.88


@pytest.mark.parametrize("models", [1, 4])
def test_no_drop_is_found_at_the_nominal_rate(models):
    repeats, below = 80, 0
    for seed in range(repeats):
        measurement, _ = measured(
            seed,
            models=models,
            samples=300,
            classes=4,
            sparsities=(0.5,),
            spread=0.1 if models > 1 else 0,
            drop=0,
            slope=0,
            alike=0,
            own=0,
        )
        below += levels(measurement)["p"][1].as_py() < 0.05
    low, high = stats.binom.interval(0.9999, repeats, 0.05)
    assert low <= below <= high


def test_links_find_the_slope_and_nothing_else(monkeypatch):
    monkeypatch.setattr(intervals, "_BUDGET", 1)
    repeats, found = 30, {0.0: 0, 0.2: 0}
    for slope in found:
        for seed in range(repeats):
            measurement, _ = measured(
                seed, models=2, samples=500, classes=10, sparsities=(0.9,), slope=slope, alike=0
            )
            row = links(measurement, seed=seed).to_pylist()[2]
            assert (row["y"], row["method"]) == ("extreme_drop", "pearson")
            found[slope] += row["p"] <= 0.05
            if slope and row["p"] <= 0.05:
                assert row["value"] > 0  # the frequent are forgotten less
    low, high = stats.binom.interval(0.9999, repeats, 0.05)
    assert low <= found[0.0] <= high
    assert found[0.2] > 0.8 * repeats
