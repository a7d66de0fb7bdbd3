"""Class impact and the classes of exemplars against literal computations, and on null sets."""

import numpy as np
import pytest
from scipy import stats

from fastpie import FastpieError
from fastpie.analysis import Predictions
from fastpie.analysis.classes import class_impact, class_ratios, count_ratios


def multiclass(seed=0, models=6, samples=300, classes=4, harm=0.0, levels=1):
    """Models that are right four times in five, pruned ones less so by `harm` in class 1."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, samples)

    def outputs(right):
        hit = generator.random((models, samples)) < right
        other = (labels + generator.integers(1, classes, (models, samples))) % classes
        values = np.full((models, samples, classes), 0.1 / (classes - 1))
        np.put_along_axis(values, np.where(hit, labels, other)[..., None], 0.9, 2)
        return values

    dense = outputs(np.full(samples, 0.8))
    pruned = [outputs(np.where(labels == 1, 0.8 - harm, 0.8)) for _ in range(levels)]
    return Predictions.of_arrays(
        dense,
        np.stack(pruned, 1),
        [0.5, 0.9][:levels],
        task="multiclass",
        labels=labels,
        class_names=list("abcd"[:classes]),
    )


def test_impact_is_the_t_test_of_recall_minus_accuracy():
    predictions = multiclass(harm=0.4, levels=2)
    table = class_impact(predictions, 0.5)
    assert table.column("class").to_pylist() == ["a", "b", "c", "d"]
    rows = table.to_pylist()
    pvalues = []
    for c, row in enumerate(rows):
        groups = []
        for outputs in (predictions.pruned[:, 0], predictions.dense):
            top = outputs.argmax(2)
            of_class = predictions.labels == c
            groups.append(
                [(t[of_class] == c).mean() - (t == predictions.labels).mean() for t in top]
            )
        test = stats.ttest_ind(*groups, equal_var=False)
        interval = test.confidence_interval(0.95)
        assert row["impact"] == pytest.approx(np.mean(groups[0]) - np.mean(groups[1]))
        assert row["impact_p"] == pytest.approx(test.pvalue, rel=1e-9)
        assert (row["impact_low"], row["impact_high"]) == pytest.approx(interval)
        pvalues.append(test.pvalue)
    # Benjamini and Hochberg, literally.
    for c, row in enumerate(rows):
        candidates = [p * 4 / (sorted(pvalues).index(p) + 1) for p in pvalues if p >= pvalues[c]]
        assert row["impact_q"] == pytest.approx(min([*candidates, 1]))
    assert rows[1]["impact"] < -0.2
    assert rows[1]["impact_q"] < 0.001
    assert class_impact(predictions).to_pylist() != rows  # the highest level


def test_recall_of_several_classes_an_image():
    generator = np.random.default_rng(1)
    labels = (generator.random((200, 3)) < 0.4).astype(float)
    labels[generator.random((200, 3)) < 0.1] = np.nan
    labels[:, 2] = np.where(np.isnan(labels[:, 2]), np.nan, 0)  # a class without positives
    dense, pruned = generator.random((2, 5, 200, 3))
    dense[0, 7] = np.nan
    predictions = Predictions.of_arrays(dense, pruned, 0.9, task="multilabel", labels=labels)
    rows = class_impact(predictions, threshold=0.3).to_pylist()
    for c in (0, 1):
        groups = []
        for outputs in (pruned, dense):
            group = []
            for values in outputs:
                hits, total = [0, 0, 0], [0, 0, 0]
                for n in range(200):
                    for k in range(3):
                        if labels[n, k] == 1 and not np.isnan(values[n]).any():
                            total[k] += 1
                            hits[k] += values[n, k] > 0.3
                group.append(hits[c] / total[c] - sum(hits) / sum(total))
            groups.append(group)
        test = stats.ttest_ind(*groups, equal_var=False)
        assert rows[c]["impact"] == pytest.approx(np.mean(groups[0]) - np.mean(groups[1]))
        assert rows[c]["impact_p"] == pytest.approx(test.pvalue)
    assert [v for k, v in rows[2].items() if k != "class"] == [None] * 5
    assert rows[0]["impact_q"] == pytest.approx(
        min(2 * min(rows[0]["impact_p"], rows[1]["impact_p"]), rows[0]["impact_p"])
        if rows[0]["impact_p"] > rows[1]["impact_p"]
        else min(2 * rows[0]["impact_p"], rows[1]["impact_p"])
    )


def test_one_class_an_image_is_a_case_of_several():
    predictions = multiclass(harm=0.3)
    several = Predictions.of_arrays(
        predictions.dense,
        predictions.pruned,
        [0.5],
        task="multilabel",
        labels=predictions.positives(),
        class_names=predictions.class_names,
    )
    assert class_impact(several).to_pylist() == class_impact(predictions).to_pylist()


def test_without_a_second_model_or_a_difference_there_is_no_test():
    one = class_impact(multiclass(models=1, harm=0.5)).to_pylist()
    assert one[1]["impact"] < 0
    assert one[1]["impact_p"] is one[1]["impact_low"] is one[1]["impact_q"] is None
    labels = np.arange(12) % 3
    same = np.repeat(np.eye(3)[labels][None], 4, 0)
    rows = class_impact(
        Predictions.of_arrays(same, same, 0.5, task="multiclass", labels=labels)
    ).to_pylist()
    assert [row["impact"] for row in rows] == [0, 0, 0]
    assert [row["impact_p"] for row in rows] == [None] * 3


def test_impact_needs_labels_and_a_level():
    predictions = multiclass()
    with pytest.raises(FastpieError, match="sparsity"):
        class_impact(predictions, 0.7)
    unlabelled = Predictions.of_arrays(
        predictions.dense, predictions.pruned, [0.5], task="multiclass"
    )
    with pytest.raises(FastpieError, match="labels"):
        class_impact(unlabelled)


def test_null_impact_is_significant_at_the_nominal_rate():
    p = np.concatenate(
        [
            class_impact(multiclass(seed, models=8, samples=200)).column("impact_p").to_numpy()
            for seed in range(150)
        ]
    )
    assert len(p) == 600
    # A binomial count with a share of .05 is within these with a probability above .999.
    assert 12 <= (p < 0.05).sum() <= 52
    assert 0.4 < np.median(p) < 0.6


def test_class_ratios_literally():
    labels = np.array([[1, 0], [1, np.nan], [0, 1], [1, 1], [0, 0], [0, 1], [1, np.nan]])
    pie = np.array([True, True, True, False, False, False, False])
    table = class_ratios(labels, pie, ["x", "y"])
    assert table.column_names == ["class", "pie_ratio", "pie_ratio_low", "pie_ratio_high"]
    assert table.column("pie_ratio").to_pylist() == pytest.approx(
        [(2 / 3) / (2 / 4), (1 / 2) / (2 / 3)]
    )


def test_intervals_are_those_of_a_bootstrap_over_samples():
    generator = np.random.default_rng(2)
    pie = np.arange(600) < 120
    labels = (generator.random((600, 2)) < np.where(pie[:, None], 0.4, 0.2)).astype(float)
    labels[generator.random((600, 2)) < 0.05] = np.nan
    rows = class_ratios(labels, pie, ["x", "y"], resamples=4000).to_pylist()
    for c, row in enumerate(rows):
        known = ~np.isnan(labels[:, c])
        groups = [labels[known & pie, c], labels[known & ~pie, c]]
        ratios = []
        for _ in range(4000):
            shares = [generator.choice(g, len(g)).mean() for g in groups]
            ratios.append(shares[0] / shares[1])
        low, high = np.percentile(ratios, [2.5, 97.5])
        assert row["pie_ratio_low"] == pytest.approx(low, rel=0.03)
        assert row["pie_ratio_high"] == pytest.approx(high, rel=0.03)
    assert rows == class_ratios(labels, pie, ["x", "y"], resamples=4000).to_pylist()
    assert rows != class_ratios(labels, pie, ["x", "y"], resamples=4000, seed=1).to_pylist()


def test_intervals_of_a_null_set_hold_one_at_the_nominal_rate():
    generator = np.random.default_rng(3)
    pie = np.arange(2000) < 200
    labels = (generator.random((2000, 400)) < 0.2).astype(np.float32)
    table = class_ratios(labels, pie, [str(i) for i in range(400)], resamples=1000)
    low, high = (table.column(f"pie_ratio_{b}").to_numpy() for b in ("low", "high"))
    covered = ((low <= 1) & (high >= 1)).sum()
    assert 362 <= covered <= 394  # of 380 expected


def test_what_a_bootstrap_cannot_tell_is_null():
    pie = np.arange(40) < 10
    labels = np.zeros((40, 5))
    labels[12:30, 0] = 1  # none in the PIEs
    labels[:5, 1] = 1  # none in the others
    labels[[1, 20], 2] = 1  # one of the others: many resamples have none
    labels[:, 3] = np.nan
    labels[:, 4] = np.arange(40) % 2
    rows = class_ratios(labels, pie, list("abcde")).to_pylist()
    assert [row["pie_ratio"] for row in rows] == [0, None, pytest.approx(3), None, 1]
    assert [row["pie_ratio_low"] is None for row in rows] == [True, True, False, True, False]
    assert [row["pie_ratio_high"] is None for row in rows] == [True, True, True, True, False]


def test_counts_of_labels():
    names = ["a", "No Finding", "b", "c", "d", "e"]
    labels = np.zeros((8, 6))
    labels[0, 1] = 1  # counts as none
    labels[1, :] = 1  # five
    labels[2, [0, 2]] = 1
    labels[3, [0, 3]] = 1
    labels[4, 0] = np.nan
    labels[4, 2] = 1  # one that is known
    labels[5] = np.nan  # nothing known
    labels[5, 1] = 1
    labels[6, 5] = 1
    pie = np.array([False, True, True, False, False, True, False, False])
    table = count_ratios(labels, pie, names)
    assert table.column_names == ["labels", "n", "n_pie", "pie_ratio", "low", "high"]
    assert table.column("labels").to_pylist() == ["0", "1", "2", "3", "4+"]
    assert table.column("n").to_pylist() == [2, 2, 2, 0, 1]
    assert table.column("n_pie").to_pylist() == [0, 0, 1, 0, 1]
    assert table.column("pie_ratio").to_pylist() == [0, 0, (1 / 2) / (1 / 5), None, None]
    every = count_ratios(labels, pie, names, leave_out=())
    assert every.column("n").to_pylist() == [1, 4, 2, 0, 1]


def test_bad_arrays_are_refused():
    with pytest.raises(FastpieError, match="labels"):
        class_ratios(np.zeros(4), np.zeros(4, bool), ["a"])
    with pytest.raises(FastpieError, match="bool"):
        class_ratios(np.zeros((4, 1)), np.zeros(4), ["a"])
    with pytest.raises(FastpieError, match="pie"):
        count_ratios(np.zeros((4, 1)), np.zeros(3, bool), ["a"])
    with pytest.raises(FastpieError, match="resamples"):
        count_ratios(np.zeros((4, 1)), np.zeros(4, bool), ["a"], resamples=0)
