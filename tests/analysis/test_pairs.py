"""Pairs of classes against the published code, literal definitions, and their nominal rates."""

from itertools import combinations, permutations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import stats
from scipy.spatial.distance import euclidean
from sklearn.linear_model import LinearRegression
from sklearn.metrics import average_precision_score

from fastpie import FastpieError
from fastpie.analysis import Predictions, intervals
from fastpie.analysis.metrics import measure
from fastpie.analysis.pairs import pair_links, pairs, regression
from multilabel_set import structure

SPARSITIES = [0.5, 0.7, 0.9]
NAMES = ["a", "b", "c", "d", "e", "f", "g"]


def predictions(seed=0, models=3, tied=False, unknown=False, train_counts=None):
    rng = np.random.default_rng(seed)
    shared = rng.random((120, 1)) < 0.3
    labels = ((rng.random((120, 7)) < np.linspace(0.1, 0.5, 7)) | shared).astype(float)
    if unknown:
        labels[rng.random(labels.shape) < 0.2] = np.nan
    values = rng.random((models, 4, 120, 7)) + 0.3 * np.nan_to_num(labels)
    values = (values / 2).round(1 if tied else 9)
    return Predictions.of_arrays(
        values[:, 0],
        values[:, 1:],
        SPARSITIES,
        task="multilabel",
        labels=labels,
        class_names=NAMES,
        train_counts=train_counts,
    )


def published_curves(given):
    """{class: vector of the median relative change in AP}, as in main_analysis.py."""
    result = {}
    for c, name in enumerate(given.class_names):
        y = given.labels[:, c]
        outputs = np.concatenate([given.dense[:, None], given.pruned], axis=1)[..., c]
        ap = np.array([[average_precision_score(y, o) for o in model] for model in outputs])
        frame = pd.DataFrame((ap - ap[:, :1]) / (ap[:, :1] + 1e-12))
        result[name] = frame.median().to_numpy()[1:]
    return result


@pytest.mark.parametrize("models", [1, 2, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_compat_equals_the_published_code(models, tied):
    given = predictions(models=models, tied=tied, train_counts=range(1, 8))
    y = pd.DataFrame(given.labels.astype(int), columns=NAMES)
    matrix = pd.DataFrame(np.dot(y.transpose(), y), index=NAMES, columns=NAMES)
    curves = published_curves(given)
    rows = []
    for a, b in combinations(NAMES, 2):
        iou = matrix.loc[a, b] / (matrix[a].sum() + matrix[b].sum() - matrix.loc[a, b])
        gap = abs(np.log(matrix[a].sum()) - np.log(matrix[b].sum()))
        rows.append((a, b, euclidean(curves[a], curves[b]), gap, iou, iou ** (1 / 4)))
    columns = ["class_a", "class_b", "fcd", "frequency_difference", "iou", "iou_root"]
    measurement = measure(given, repeats=2)
    found = pairs(given, measurement, compat="prunecxr").to_pandas()
    wanted = pd.DataFrame(rows, columns=columns)
    pd.testing.assert_frame_equal(found, wanted, check_dtype=False, atol=1e-12)
    ours = pairs(given, measurement).to_pandas()
    np.testing.assert_array_equal(ours["fcd"], found["fcd"])
    assert (ours["iou"] > found["iou"]).all()  # a column sum is more than the positives


@pytest.mark.parametrize("train_counts", [None, [5, 9, 1, 0, 44, 7, 2]])
def test_true_iou_and_frequencies(train_counts):
    given = predictions(unknown=True, train_counts=train_counts)
    found = pairs(given, measure(given))
    labels = given.labels
    counts = (labels == 1).sum(0) if train_counts is None else train_counts
    for row in found.to_pylist():
        a, b = (labels[:, NAMES.index(row[name])] for name in ("class_a", "class_b"))
        known = ~np.isnan(a) & ~np.isnan(b)
        first, second = a[known] == 1, b[known] == 1
        iou = (first & second).sum() / (first | second).sum()
        assert row["iou"] == pytest.approx(iou)
        assert row["iou_root"] == pytest.approx(iou**0.25)
        f = [counts[NAMES.index(row[name])] for name in ("class_a", "class_b")]
        if 0 in f:
            assert row["frequency_difference"] is None
        else:
            assert row["frequency_difference"] == pytest.approx(abs(np.log(f[0] / f[1])))


def table_of(fcd, gap, iou, classes):
    first, second = np.triu_indices(classes, 1)
    return pa.table(
        {
            "class_a": [str(i) for i in first],
            "class_b": [str(i) for i in second],
            "fcd": fcd,
            "frequency_difference": gap,
            "iou": iou,
            "iou_root": np.asarray(iou) ** 0.25,
        }
    )


def random_table(seed, classes):
    rng = np.random.default_rng(seed)
    count = classes * (classes - 1) // 2
    return table_of(*rng.random((3, count)).round(1), classes)


def all_orders(table, statistic, term="frequency_difference"):
    """The statistic of FCD and a term for every permutation of the term's classes."""
    first, second = (np.array(table[name].to_pylist(), int) for name in ("class_a", "class_b"))
    classes = second.max() + 1
    square = np.zeros((classes, classes))
    square[first, second] = square[second, first] = term
    for order in permutations(range(classes)):
        moved = square[np.ix_(order, order)]
        yield statistic(moved[first, second])


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_links_against_all_permutations_of_the_classes(method):
    table = random_table(2, 5)
    scipys = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[method]
    y = table["fcd"].to_numpy()
    for row in pair_links(table).to_pylist():
        if row["method"] != method:
            continue
        x = table[row["x"]].to_numpy()
        value = scipys(x, y)[0]
        every = np.array(list(all_orders(table, lambda moved: scipys(moved, y)[0], x)))
        exact = (np.abs(every) >= abs(value) - 1e-12).mean()
        assert row["y"] == "fcd"
        assert row["n"] == 10
        assert row["value"] == pytest.approx(value)
        assert row["p"] == pytest.approx(exact, abs=0.02)
        assert row["low"] <= value <= row["high"]


def literal_terms(table):
    z = [
        (table[name].to_numpy() - np.mean(table[name])) / np.std(table[name].to_numpy())
        for name in ("frequency_difference", "iou_root")
    ]
    return np.stack([*z, z[0] * z[1]], axis=1)


def test_regression_against_sklearn_and_all_permutations():
    table = random_table(0, 6)
    y, terms = table["fcd"].to_numpy(), literal_terms(table)
    fit = LinearRegression().fit(terms, y)
    found = regression(table).to_pandas().set_index("term")
    np.testing.assert_allclose(found["coefficient"], [fit.intercept_, *fit.coef_])
    for place, name in enumerate(("frequency_difference", "iou_root", "interaction")):
        others = np.delete(terms, place, axis=1)
        on_others = LinearRegression().fit(others, terms[:, place])
        explained = on_others.score(others, terms[:, place])
        assert found.loc[name, "vif"] == pytest.approx(1 / (1 - explained))
        rest = terms[:, place] - on_others.predict(others)

        def t_value(term, others=others):
            design = np.column_stack([np.ones(len(y)), others, term])
            coefficients, squares, _, _ = np.linalg.lstsq(design, y, rcond=None)
            variance = squares[0] / (len(y) - 4) * np.linalg.inv(design.T @ design)[-1, -1]
            return coefficients[-1] / np.sqrt(variance)

        every = np.abs(list(all_orders(table, t_value, rest)))
        exact = (every >= abs(t_value(rest)) * (1 - 1e-9)).mean()
        assert found.loc[name, "p"] == pytest.approx(exact, abs=0.02), name
    assert np.isnan(found.loc["intercept", ["p", "vif"]].astype(float)).all()
    assert (found["low"] < found["coefficient"]).all()
    assert (found["coefficient"] < found["high"]).all()


def test_multiclass_has_no_co_occurrence():
    rng = np.random.default_rng(0)
    values = rng.dirichlet(np.ones(7), (2, 3, 100))
    given = Predictions.of_arrays(
        values[:, 0], values[:, 1:], [0.5, 0.9], task="multiclass", labels=rng.integers(0, 7, 100)
    )
    table = pairs(given, measure(given), metric="auroc")
    assert set(table["iou"].to_pylist()) == {0}
    found = pair_links(table).to_pylist()
    assert [row["value"] is None for row in found] == [False, False, True, True]
    rows = {row["term"]: row for row in regression(table).to_pylist()}
    assert rows["iou_root"]["coefficient"] is rows["interaction"]["p"] is None
    x = table["frequency_difference"].to_numpy()
    slope = stats.linregress((x - x.mean()) / x.std(), table["fcd"].to_numpy()).slope
    assert rows["frequency_difference"]["coefficient"] == pytest.approx(slope)
    assert rows["frequency_difference"]["vif"] == pytest.approx(1)


def test_unknown_classes_take_no_part():
    table = random_table(1, 8)
    lost = np.array(
        [
            ("3" in pair)
            for pair in zip(*(table[n].to_pylist() for n in ("class_a", "class_b")), strict=True)
        ]
    )
    without = pair_links(table.filter(pa.array(~lost))).to_pylist()
    holes = pa.array(table["fcd"].to_numpy(), mask=lost)
    holed = table.set_column(table.column_names.index("fcd"), "fcd", holes)
    assert pair_links(holed).to_pylist() == without
    assert without[0]["n"] == 21
    assert regression(holed).equals(regression(table.filter(pa.array(~lost))))


def test_too_few_classes_tell_nothing():
    few = random_table(0, 4)
    assert pair_links(few)["value"].null_count == 4
    assert regression(few)["coefficient"].null_count == 4
    nothing = table_of([], [], [], 1)
    typed = nothing.cast(random_table(0, 4).schema)
    assert regression(typed)["vif"].null_count == 4


def test_bad_input():
    given = predictions()
    measurement = measure(given)
    with pytest.raises(FastpieError, match="`compat` to be None or 'prunecxr', but got 'x'"):
        pairs(given, measurement, compat="x")
    with pytest.raises(FastpieError, match="`metric` to be one of"):
        pairs(given, measurement, metric="f1")


CLASSES = 16


def structured(seed, **how):
    """The table of pairs of a drawn structure: of infinitely many samples and models."""
    truth = structure(np.random.default_rng(seed), CLASSES, SPARSITIES, **how)
    first, second = np.triu_indices(CLASSES, 1)
    fcd = np.linalg.norm(truth.curves[:, first] - truth.curves[:, second], axis=0)
    gap = np.abs(np.log(truth.prevalence[first] / truth.prevalence[second]))
    return table_of(fcd, gap, truth.iou[first, second], CLASSES)


def coefficients(table):
    terms = literal_terms(table)
    return LinearRegression().fit(terms, table["fcd"].to_numpy()).coef_


def test_a_known_structure_is_found_and_is_in_the_intervals(monkeypatch):
    monkeypatch.setattr(intervals, "_BUDGET", 1)
    how = {"slope": 0.12, "alike": 0.1, "own": 0.02}
    population = [structured(10_000 + i, **how) for i in range(400)]
    together = pa.concat_tables(population)
    wanted = {}
    for x in ("frequency_difference", "iou_root"):
        sides = together[x].to_numpy(), together["fcd"].to_numpy()
        wanted[x, "pearson"] = stats.pearsonr(*sides)[0]
        wanted[x, "spearman"] = stats.spearmanr(*sides)[0]
    terms = np.mean([coefficients(table) for table in population], axis=0)
    assert wanted["frequency_difference", "pearson"] > 0.2
    assert wanted["iou_root", "pearson"] < -0.1
    repeats = 60
    held, found = dict.fromkeys([*wanted, 0, 1, 2], 0), dict.fromkeys(wanted, 0)
    for seed in range(repeats):
        table = structured(seed, **how)
        for row in pair_links(table, seed=seed).to_pylist():
            key = row["x"], row["method"]
            held[key] += row["low"] <= wanted[key] <= row["high"]
            found[key] += row["p"] <= 0.05
        for i, row in enumerate(regression(table, seed=seed).to_pylist()[1:]):
            held[i] += row["low"] <= terms[i] <= row["high"]
    lowest = stats.binom.ppf(1e-4, repeats, 0.9)  # measured on 400 sets: .90 to .99
    assert min(held.values()) >= lowest, held
    assert found["frequency_difference", "pearson"] > repeats / 2


def test_nothing_is_found_at_the_nominal_rate(monkeypatch):
    monkeypatch.setattr(intervals, "_BUDGET", 1)
    repeats, found = 150, {}
    for seed in range(repeats):
        table = structured(seed, slope=0, alike=0, own=0.07)
        for row in pair_links(table, seed=seed).to_pylist():
            key = row["x"], row["method"]
            found[key] = found.get(key, 0) + (row["p"] <= 0.05)
        for row in regression(table, seed=seed).to_pylist()[1:]:
            found[row["term"]] = found.get(row["term"], 0) + (row["p"] <= 0.05)
    low, high = stats.binom.interval(0.9999, repeats, 0.05)
    assert len(found) == 7
    assert all(low <= count <= high for count in found.values()), found
