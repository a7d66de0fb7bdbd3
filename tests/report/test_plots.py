"""The plots: what they draw, and that they leave the user's matplotlib alone."""

from __future__ import annotations

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from fastpie import FastpieError
from fastpie.report import plots
from fastpie.report.classes import AccuracyCurve
from fastpie.report.svg import inline_svg

CURVE = AccuracyCurve([0.0, 0.3, 0.7], [0.9, 0.8, 0.5], [0.8, 0.7, 0.4], [1.0, 0.9, 0.6])
VALUES = np.array([0.0, 0.1, 0.1, 2.0, np.nan, np.inf])
DRAW = {
    "hardness": lambda ax=None: plots.plot_hardness(VALUES, ax=ax),
    "levels": lambda ax=None: plots.plot_levels({0.3: VALUES, 0.7: VALUES}, ax=ax),
    "margins": lambda ax=None: plots.plot_margins(VALUES, VALUES[::-1], ax=ax),
    "accuracy": lambda ax=None: plots.plot_accuracy(CURVE, ax=ax),
}


@pytest.mark.parametrize("name", DRAW)
def test_draws_on_the_given_axes_or_on_its_own(name):
    fig, ax = DRAW[name]()
    assert ax.figure is fig
    own = Figure()
    axes = own.subplots()
    fig, ax = DRAW[name](axes)
    assert fig is own
    assert ax is axes
    assert ax.has_data()


@pytest.mark.parametrize(
    "values", [np.array([]), np.full(3, np.nan), np.ones(4), np.array([1e30, 1e30 * (1 + 1e-15)])]
)
def test_empty_missing_and_constant_values_are_drawn(values):
    for fig, _ in (
        plots.plot_hardness(values),
        plots.plot_levels({0.5: values}),
        plots.plot_margins(values, values),
        plots.plot_accuracy(AccuracyCurve([0.0, 0.5], [], [], [])),
    ):
        assert inline_svg(lambda fig=fig: (fig, None), "alt", "name").startswith("<svg")


def test_histogram_counts_every_finite_value():
    _, ax = plots.plot_hardness(VALUES)
    assert sum(patch.get_height() for patch in ax.patches) == 4


def test_the_border_of_the_hardest_is_the_quantile():
    values = np.arange(100.0)
    _, ax = plots.plot_hardness(values, fraction=0.1)
    assert ax.lines[0].get_xdata()[0] == 90.0


def test_at_most_eight_levels_are_drawn_with_both_ends():
    _, ax = plots.plot_levels({s / 20: np.random.default_rng(0).random(9) for s in range(1, 20)})
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(labels) == 8
    assert labels[0] == "0.05"
    assert labels[-1] == "0.95"


def test_accuracy_draws_the_curves_that_are_there():
    _, ax = plots.plot_accuracy(CURVE)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), CURVE.overall)
    assert len(ax.lines) == 3
    _, ax = plots.plot_accuracy(AccuracyCurve([0.0, 0.5], [], [], [1.0, 0.9]))
    assert [line.get_label() for line in ax.lines] == ["predicts as the dense model"]


def test_svg_takes_the_colour_of_the_page_and_names_no_address():
    svg = inline_svg(DRAW["accuracy"], 'an "alt" & <more>', "accuracy")
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert "http" not in svg
    assert 'aria-label="an &quot;alt&quot; &amp; &lt;more&gt;"' in svg
    assert svg == inline_svg(DRAW["accuracy"], 'an "alt" & <more>', "accuracy")


def test_leaves_backend_and_settings_alone():
    before = dict(matplotlib.rcParams)
    pyplot_was_there = "matplotlib.pyplot" in sys.modules
    for draw in DRAW.values():
        inline_svg(draw, "alt", "name")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_was_there


def test_without_matplotlib_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FastpieError, match=r"pip install 'fastpie\[report\]'"):
        plots.plot_hardness(VALUES)
