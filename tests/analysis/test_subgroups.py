"""Odds ratios of hard samples by attribute against literal counts, and on null sets."""

import math

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats
from scipy.stats.contingency import odds_ratio

from fastpie import FastpieError
from fastpie.analysis.subgroups import subgroups

COLUMNS = [
    "attribute", "value", "n", "n_hard", "odds_ratio", "low", "high", "p", "q", "small",
]  # fmt: skip


def manifest(seed=0, samples=400):
    generator = np.random.default_rng(seed)
    labels = (generator.random((samples, 3)) < [0.5, 0.3, 0.1]).astype(np.float32)
    labels[generator.random((samples, 3)) < 0.1] = np.nan
    pick = generator.integers
    return pa.table(
        {
            "sample_id": [f"s{i}" for i in range(samples)],
            "path": [f"s{i}.png" for i in range(samples)],
            "sex": pa.array([("F", "M", None)[i] for i in pick(0, 3, samples)]),
            "age": pa.array([None if a < 20 else float(a) for a in pick(10, 70, samples)]),
            "group": [f"p{i // 3}" for i in range(samples)],
            "patient": [f"p{i}" for i in range(samples)],
            "follow": [str(i) for i in pick(0, 40, samples)],
            "pixels": pa.array(pick(0, 3, samples)),
            "portable": pa.array(pick(0, 2, samples).astype(bool)),
            "label": pa.FixedSizeListArray.from_arrays(pa.array(labels.reshape(-1)), 3),
        }
    )


def groups(table):
    """(attribute, value) -> (set of rows, set of the others), from Python lists."""
    rows = table.to_pylist()
    found = {}

    def add(attribute, key):
        values = [key(row) for row in rows]
        for value in set(values) - {None}:
            members = {i for i, v in enumerate(values) if v == value}
            known = {i for i, v in enumerate(values) if v is not None}
            found[attribute, value] = members, known - members
        unknown = {i for i, v in enumerate(values) if v is None}
        if unknown:
            found[attribute, "unknown"] = unknown, set(range(len(rows))) - unknown

    add("sex", lambda r: r["sex"])
    add(
        "age",
        lambda r: r["age"] and "{}-{}".format(*[int(r["age"] // 10 * 10 + k) for k in (0, 9)]),
    )
    add("pixels", lambda r: str(r["pixels"]))
    add("portable", lambda r: str(r["portable"]).lower())
    for c, name in enumerate(["No Finding", "Mass", "Hernia"]):
        found["class", name] = tuple(
            {i for i, r in enumerate(rows) if r["label"][c] == wanted} for wanted in (1, 0)
        )

    def count(row):
        known = [v for v in row["label"][1:] if not math.isnan(v)]
        return str(int(sum(known))) if known else None

    add("labels", count)
    return found


NAMES = ["No Finding", "Mass", "Hernia"]


def test_every_attribute_against_literal_counts():
    table = manifest()
    hard = np.random.default_rng(1).random(400) < 0.15
    result = subgroups(table, hard, class_names=NAMES)
    assert result.column_names == COLUMNS
    names = list(dict.fromkeys(result.column("attribute").to_pylist()))
    assert names == ["sex", "age", "class", "labels", "follow", "pixels", "portable"]
    got = {(r["attribute"], r["value"]): r for r in result.to_pylist()}
    expected = groups(table)
    assert {k for k in got if k[0] != "follow"} == set(expected)
    for key, (members, others) in expected.items():
        row = got[key]
        counts = [
            [sum(bool(hard[i]) == h for i in s) for h in (True, False)] for s in (members, others)
        ]
        ratio = odds_ratio(counts)
        low, high = ratio.confidence_interval(0.95)
        assert (row["n"], row["n_hard"]) == (len(members), counts[0][0])
        for name, value in {"odds_ratio": ratio.statistic, "low": low, "high": high}.items():
            assert row[name] == (None if math.isinf(value) else pytest.approx(value)), (key, name)
        assert row["p"] == pytest.approx(stats.fisher_exact(counts).pvalue)
        n = len(members) + len(others)
        sides = [[sum(r) for r in counts], [sum(c) for c in zip(*counts, strict=True)]]
        assert row["small"] == (min(a * b / n for a in sides[0] for b in sides[1]) < 5)
    assert {row["small"] for row in got.values()} == {True, False}
    p = result.column("p").to_numpy()
    assert np.allclose(result.column("q").to_numpy(), stats.false_discovery_control(p))


def test_numbers_that_came_as_text_are_banded_in_quarters():
    table = manifest()
    result = subgroups(table, np.arange(400) < 40, attributes=["follow"])
    values = sorted(int(v) for v in table.column("follow").to_pylist())
    edges = [values[k * 100 - 1] for k in (1, 2, 3)]  # the least value with a quarter up to it
    assert result.column("value").to_pylist() == [
        f"< {edges[0]}", f"{edges[0]} to {edges[1]}", f"{edges[1]} to {edges[2]}", f">= {edges[2]}",
    ]  # fmt: skip
    bounds = [-1, *edges, 1000]
    assert result.column("n").to_pylist() == [
        sum(a <= v < b for v in values)
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)  # noqa: RUF007
    ]


def test_intersections_against_literal_counts():
    table = manifest()
    hard = np.random.default_rng(2).random(400) < 0.2
    result = subgroups(
        table, hard, attributes=["sex", "class", "portable"], class_names=NAMES, pairs=True
    )
    got = {(r["attribute"], r["value"]): r for r in result.to_pylist()}
    single = groups(table)

    def of(attribute, value):
        return single[attribute, value]

    checked = 0
    for (a, b), values in {
        ("sex", "portable"): [(s, p) for s in "FM" for p in ("false", "true")],
        ("sex", "class"): [(s, c) for s in "FM" for c in NAMES],
        ("class", "portable"): [(c, p) for c in NAMES for p in ("false", "true")],
    }.items():
        for value in values:
            parts = [of(a, value[0]), of(b, value[1])]
            members = parts[0][0] & parts[1][0]
            known = (parts[0][0] | parts[0][1]) & (parts[1][0] | parts[1][1])
            row = got[f"{a}, {b}", ", ".join(value)]
            counts = [
                [sum(bool(hard[i]) == h for i in s) for h in (True, False)]
                for s in (members, known - members)
            ]
            assert (row["n"], row["n_hard"]) == (len(members), counts[0][0])
            assert row["odds_ratio"] == pytest.approx(odds_ratio(counts).statistic)
            assert row["p"] == pytest.approx(stats.fisher_exact(counts).pvalue)
            checked += 1
    assert sum("," in name for name in result.column("attribute").to_pylist()) == checked
    q = stats.false_discovery_control(result.column("p").to_numpy())
    assert np.allclose(result.column("q").to_numpy(), q)  # over singles and pairs


def test_an_effect_is_found_and_its_interval_holds_it():
    generator = np.random.default_rng(3)
    site = generator.integers(0, 3, 30_000)
    odds = np.where(site == 2, 3.0, 1.0) * (0.04 / 0.96)
    hard = generator.random(30_000) < odds / (1 + odds)
    table = pa.table({"site": [f"h{i}" for i in site], "sex": np.where(site % 2, "F", "M")})
    rows = {r["value"]: r for r in subgroups(table, hard).to_pylist()}
    assert rows["h2"]["low"] < 3 < rows["h2"]["high"]
    assert rows["h2"]["q"] < 1e-6
    assert rows["h0"]["odds_ratio"] < 1


def test_large_tables_are_within_one_percent_of_exact():
    generator = np.random.default_rng(4)
    sex = generator.random(9000) < 0.4
    hard = generator.random(9000) < np.where(sex, 0.06, 0.05)
    row = subgroups(pa.table({"sex": np.where(sex, "F", "M")}), hard).to_pylist()[0]
    counts = [
        [int((sex & hard).sum()), int((sex & ~hard).sum())],
        [int((~sex & hard).sum()), int((~sex & ~hard).sum())],
    ]
    ratio = odds_ratio(counts)
    assert row["odds_ratio"] == pytest.approx(ratio.statistic, rel=1e-3)
    assert (row["low"], row["high"]) == pytest.approx(ratio.confidence_interval(0.95), rel=0.01)
    assert row["low"] != ratio.confidence_interval(0.95).low  # the other formula was used


def test_an_empty_cell_of_a_large_table_has_one_bound():
    hard = np.arange(60_000) % 20 == 0
    site = np.where(hard | (np.arange(60_000) % 2 == 0), "a", "b")
    a, b = subgroups(pa.table({"site": site}), hard).to_pylist()
    assert (b["n_hard"], b["odds_ratio"], b["low"]) == (0, 0, 0)
    assert 0 < b["high"] < 0.01
    assert (a["odds_ratio"], a["high"]) == (None, None)
    assert a["low"] > 100
    assert a["p"] == b["p"] < 1e-6


@pytest.mark.parametrize("count", [0, 40])
def test_where_nothing_can_be_compared_all_is_null(count):
    result = subgroups(pa.table({"sex": ["F", "M"] * 20}), np.arange(40) < count)
    for name in ("odds_ratio", "low", "high", "p", "q"):
        assert result.column(name).null_count == 2
    one = subgroups(pa.table({"sex": ["F"] * 40}), np.arange(40) < 5, attributes=["sex"])
    assert one.column("odds_ratio").to_pylist() == [None]
    assert subgroups(pa.table({"sex": ["F"] * 40}), np.arange(40) < 5).num_rows == 0


def test_the_hardest_fraction():
    hardness = np.array([0.1, np.nan, 0.9, 0.9, 0.9, 0.2, 0.3, 0.4, 0.5, 0.6])
    table = pa.table({"sex": list("abcdefghij")})
    result = subgroups(table, hardness, fraction=0.2)
    assert result.column("n_hard").to_pylist() == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert sum(subgroups(table, hardness, fraction=1.0).column("n_hard").to_pylist()) == 10


def test_one_label_a_sample_and_rows_without_labels():
    labels = pa.array([0, 1, 2, -1, None, 1, 1, 0, 2, 2])
    rows = subgroups(pa.table({"label": labels}), np.arange(10) < 4).to_pylist()
    assert [(r["attribute"], r["value"], r["n"]) for r in rows] == [
        ("class", "0", 2), ("class", "1", 3), ("class", "2", 3), ("class", "unknown", 2),
    ]  # fmt: skip
    lists = pa.array([[1, 0], None, [0, 1], [1, math.nan]], pa.list_(pa.float32(), 2))
    table = pa.table({"label": lists}).slice(1)
    rows = subgroups(table, np.array([True, True, False]), class_names=["a", "b"]).to_pylist()
    assert [(r["attribute"], r["value"], r["n"], r["n_hard"]) for r in rows] == [
        ("class", "a", 1, 0), ("class", "b", 1, 1), ("labels", "1", 2, 1), ("labels", "unknown", 1, 1),
    ]  # fmt: skip


def test_an_age_in_days_is_no_age_in_decades():
    table = pa.table({"age": [float(10_000 + i) for i in range(40)]})
    rows = subgroups(table, np.arange(40) < 5).to_pylist()
    assert [r["value"] for r in rows] == [
        "< 10009", "10009 to 10019", "10019 to 10029", ">= 10029",
    ]  # fmt: skip


def test_odd_columns():
    table = pa.table(
        {
            "text": pa.array([" x", "x ", "", None, "y", "y"]),
            "coded": pa.array(["u", "v", "u", "v", "u", "v"]).dictionary_encode(),
            "nothing": pa.array([None] * 6, pa.float64()),
            "infinite": pa.array([math.inf, math.nan, 1.0, 1.0, 2.0, 2.0]),
            "when": pa.array([0] * 6, pa.timestamp("s")),
        }
    )
    rows = subgroups(table, np.arange(6) < 2).to_pylist()
    assert [(r["attribute"], r["value"], r["n"]) for r in rows] == [
        ("text", "x", 2), ("text", "y", 2), ("text", "unknown", 2),
        ("coded", "u", 3), ("coded", "v", 3),
        ("infinite", "1", 2), ("infinite", "2", 2), ("infinite", "unknown", 2),
    ]  # fmt: skip


def test_null_sets_give_findings_at_the_nominal_rate():
    generator = np.random.default_rng(5)
    found, tests = 0, 0
    for _ in range(100):
        table = pa.table({n: generator.integers(0, 3, 2000) for n in ("a", "b", "c")})
        result = subgroups(table, generator.random(2000) < 0.3)
        tests += result.num_rows
        found += (result.column("p").to_numpy() < 0.05).sum()
    # Fisher's test is cautious: a little below .05 with cells of this size.
    assert tests == 900
    assert 18 <= found <= 63


def test_bad_input_is_refused():
    table = manifest()
    hard = np.zeros(400, bool)
    with pytest.raises(FastpieError, match="hard"):
        subgroups(table, hard[:5])
    with pytest.raises(FastpieError, match="hard"):
        subgroups(table, hard.astype(int))
    with pytest.raises(FastpieError, match="fraction"):
        subgroups(table, hard.astype(float), fraction=2)
    with pytest.raises(FastpieError, match="'colour'"):
        subgroups(table, hard, attributes=["colour"])
    with pytest.raises(FastpieError, match="at most 50 texts"):
        subgroups(table, hard, attributes=["patient"])
    with pytest.raises(FastpieError, match="fixed_size_list"):
        subgroups(table, hard, attributes=["label"])
    with pytest.raises(FastpieError, match="class_names"):
        subgroups(table, hard, class_names=["a"])
