"""The plots of an analysis, and the files that `write_plots` makes of them."""

from __future__ import annotations

import csv

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import fastpie
from analyses import samples_of, tables_of
from fastpie import FastpieError
from fastpie.analysis import Analysis
from fastpie.report import class_plots, group_plots, write_plots
from fastpie.report.drawing import plain, spread
from fastpie.report.svg import inline_svg

NAMES = ["healthy", "caries", "<b>$x^2$</b> & very long indeed it is", "日本語\nzwei"]
TABLES = tables_of(NAMES)
SAMPLES = samples_of([f"s{i}" for i in range(40)], np.arange(40.0))
LEVELS = TABLES["stability"].filter(pc.equal(TABLES["stability"]["what"], "level"))
DRAW = {
    "metrics": (class_plots.plot_metrics, TABLES["levels"]),
    "curves": (class_plots.plot_curves, TABLES["curves"]),
    "classes": (class_plots.plot_classes, TABLES["classes"]),
    "frequency": (class_plots.plot_frequency, TABLES["classes"]),
    "impact": (class_plots.plot_impact, TABLES["classes"]),
    "counts": (class_plots.plot_counts, TABLES["counts"]),
    "subgroups": (group_plots.plot_subgroups, TABLES["subgroups"]),
    "pairs": (group_plots.plot_pairs, TABLES["pairs"]),
    "quadrants": (group_plots.plot_quadrants, SAMPLES),
    "comparisons": (group_plots.plot_comparisons, LEVELS),
    "agreement": (group_plots.plot_comparisons, TABLES["agreement"]),
}


@pytest.mark.parametrize("name", DRAW)
def test_draws_on_the_given_axes_or_on_its_own(name):
    draw, table = DRAW[name]
    fig, ax = draw(table)
    assert ax.figure is fig
    own = Figure()
    axes = own.subplots()
    fig, ax = draw(table, ax=axes)
    assert fig is own
    assert ax is axes
    assert ax.has_data()


@pytest.mark.parametrize("name", DRAW)
def test_names_are_drawn_as_text_whatever_they_hold(name):
    draw, table = DRAW[name]
    svg = inline_svg(lambda: draw(table), "alt", name)
    assert "<b>" not in svg
    assert "<svg" in svg


@pytest.mark.parametrize("name", DRAW)
def test_no_rows_or_no_numbers_are_said(name):
    draw, table = DRAW[name]
    nulls = pa.table(
        {
            f.name: pa.nulls(table.num_rows, f.type)
            if pa.types.is_floating(f.type)
            else table.column(f.name)
            for f in table.schema
        }
    )
    for odd in (table.slice(0, 0), nulls):
        _, ax = draw(odd)
        if name != "comparisons" or not odd.num_rows:  # a diagonal of ones is left
            assert next(t.get_text() for t in ax.texts).startswith("no ")


def test_curves_start_at_the_dense_model_and_name_twelve_at_most():
    table = tables_of([f"class {i}" for i in range(30)])["curves"]
    _, ax = class_plots.plot_curves(table)
    lines = [line for line in ax.lines if len(line.get_xdata()) == 5]
    assert len(lines) == 30
    assert all(line.get_xdata()[0] == line.get_ydata()[0] == 0 for line in lines)
    named = [t.get_text() for t in ax.texts if t.get_text() != "first drop"]
    assert len(named) == 12
    last = {r["class"]: r["change"] for r in table.to_pylist() if r["sparsity"] == 0.7}
    order = sorted(last, key=last.get)
    assert set(named) == {*order[:8], *order[-4:]}


def test_subgroups_show_what_is_small_and_what_is_significant():
    _, ax = group_plots.plot_subgroups(TABLES["subgroups"])
    filled, hollow, crossed = (line.get_xdata().tolist() for line in ax.lines[:3])
    # The odds ratio of 0 has no place on a logarithmic axis.
    assert filled == [0.5, 2.0]
    assert hollow == [3.0]
    assert crossed == [1.5]
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names == ["sex: F", "sex: M", "view: PA", "doctor: Dr. Who"]
    assert ax.get_xscale() == "log"


def test_of_many_subgroups_those_with_evidence_are_drawn():
    n = 100
    table = pa.table(
        {
            "attribute": ["sex"] * 10 + ["sex, age"] * 90,
            "value": [str(i) for i in range(n)],
            "odds_ratio": [50.0 if i % 3 == 0 else 1.5 for i in range(n)],
            "low": [1.0] * n,
            "high": [60.0] * n,
            "p": [i / n for i in range(n)],
            "q": [1.0] * n,
            "small": [i % 3 == 0 for i in range(n)],
        }
    )
    _, ax = group_plots.plot_subgroups(table)
    names = [t.get_text().split(": ")[1] for t in ax.get_yticklabels()]
    assert names == [str(i) for i in range(n) if i % 3][:40]


def test_significant_levels_are_filled():
    _, ax = class_plots.plot_metrics(TABLES["levels"])
    filled = next(line for line in ax.lines if line.get_linestyle() == "None")
    assert filled.get_xdata().tolist() == [0.5, 0.7]


def test_the_matrix_is_symmetric_with_its_values():
    _, ax = group_plots.plot_comparisons(LEVELS)
    matrix = ax.collections[0].get_array()
    np.testing.assert_allclose(matrix, matrix.T)
    np.testing.assert_allclose(matrix[0], [1, 0.8, 0.6, 0.4])


def test_classes_are_in_the_order_of_their_loss():
    _, ax = class_plots.plot_classes(TABLES["classes"])
    table = TABLES["classes"]
    loss = np.array(table["ap"].to_pylist()) - np.array(table["ap_pruned"].to_pylist())
    expected = [plain(NAMES[i]) for i in np.argsort(-loss)]
    assert [t.get_text() for t in ax.get_yticklabels()] == expected


def test_a_million_pairs_and_samples_do_not_make_a_million_points():
    rng = np.random.default_rng(0)
    n = 50_000
    names = ("fcd", "frequency_difference", "iou_root")
    _, ax = group_plots.plot_pairs(pa.table({name: rng.random(n) for name in names}))
    assert len(ax.collections[0].get_offsets()) <= 1_500
    _, ax = group_plots.plot_quadrants(samples_of([str(i) for i in range(n)], rng.random(n)))
    assert len(ax.collections[0].get_offsets()) <= 1_500


@pytest.mark.parametrize("seed", range(5))
def test_labels_are_spread_in_their_order_and_no_further_than_needed(seed):
    places = np.random.default_rng(seed).normal(size=12)
    moved = spread(places, 0.3)
    assert (np.argsort(moved, kind="stable") == np.argsort(places, kind="stable")).all()
    assert np.diff(np.sort(moved)).min() >= 0.3 - 1e-9
    far = np.arange(5.0)
    np.testing.assert_array_equal(spread(far, 0.3), far)


def test_plain_text_is_short_and_no_formula():
    assert plain("a\n b\t$x$\x00") == r"a b \$x\$"
    assert plain("x" * 40) == "x" * 27 + "…"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    dual = fastpie.DualModel(model, fastpie.prune(model, [0.3, 0.6]))
    data = torch.utils.data.TensorDataset(torch.randn(40, 1, 4, 4), torch.arange(40) % 3)
    ids = [f"s{i}" for i in range(40)]
    return fastpie.mine(
        dual, data, tmp_path_factory.mktemp("run"), batch_size=20, sample_ids=ids, recalibrate=False
    )


def test_every_plot_is_written_with_its_data(result):
    subgroups = TABLES["subgroups"].set_column(
        1, "value", pa.array(["=1+1", '"quoted", so', "c", "d", "e"])
    )
    analysis = Analysis(SAMPLES, {**TABLES, "subgroups": subgroups}, {}, [])
    files = write_plots(result, analysis)
    folder = result.path / "plots"
    assert sorted(files) == sorted(folder.iterdir())
    stems = {path.stem for path in files}
    assert {p.name for p in files} == {f"{s}.{k}" for s in stems for k in ("svg", "png", "csv")}
    assert stems == {
        "hardness", "js", "margins", "accuracy", "quadrants", "levels", "curves-ap", "classes",
        "impact", "frequency", "counts", "subgroups", "pairs", "stability-level",
        "stability-control", "agreement",
    }  # fmt: skip
    for path in files:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert picture.size[0] > 500

    def rows(name):
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    assert [r["value"] for r in rows("subgroups")] == ["'=1+1", '"quoted", so', "c", "d", "e"]
    assert [float(r["odds_ratio"]) for r in rows("subgroups")] == [0.5, 2.0, 0.0, 1.5, 3.0]
    assert sum(int(r["samples"]) for r in rows("hardness")) == 40
    assert sum(int(r["samples"]) for r in rows("margins")) == 40
    assert [r["sparsity"] for r in rows("accuracy")] == ["0", "0.3", "0.6"]
    right = np.mean(
        np.array(result.table["label"].to_pylist())
        == np.array(result.table["prediction_pruned@0.6"].to_pylist())
    )
    assert float(rows("accuracy")[-1]["accuracy"]) == pytest.approx(right)


def test_plots_go_where_they_are_wanted_or_the_reason_is_told(result, tmp_path):
    files = write_plots(result, folder=tmp_path / "a" / "b")
    assert {p.stem for p in files} == {"hardness", "js", "margins", "accuracy"}
    (tmp_path / "file").touch()
    with pytest.raises(FastpieError, match="write plots"):
        write_plots(result, folder=tmp_path / "file")
