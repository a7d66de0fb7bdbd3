import numpy as np
import pyarrow as pa
import pytest

from fastpie.analysis.quadrants import highest, quadrants
from fastpie.errors import FastpieError


def test_the_four_quadrants():
    hard = [9, 8, 1, 2, 3, 4, 5, 6, 7, 0]
    doubt = [9, 1, 8, 2, 3, 4, 5, 6, 7, 0]
    table = quadrants(hard, doubt, fraction=0.2)
    expected = ["hard, label in doubt", "hard", "label in doubt", *["typical"] * 7]
    assert table["quadrant"].to_pylist() == expected
    raised = quadrants(hard, doubt, fraction=0.3)["quadrant"].to_pylist()
    assert raised[:3] == table["quadrant"].to_pylist()[:3]
    assert raised[8] == "hard, label in doubt"
    assert table["is_atypical"].null_count == 10


def test_the_number_is_of_those_known_and_ties_go_by_position():
    values = [np.nan, 1, 1, 1, np.nan, 1, 0]
    assert np.flatnonzero(highest(values, 0.5)).tolist() == [1, 2]
    assert np.flatnonzero(highest(values, 1)).tolist() == [1, 2, 3, 5, 6]
    assert not highest(values, 0).any()
    assert highest([np.nan], 1).tolist() == [False]
    assert len(highest([], 0.5)) == 0


def test_what_is_unknown():
    hard = pa.chunked_array([[None, 2.0], [None, 1.0]])
    table = quadrants(hard, [5, np.nan, np.nan, 1], [np.nan, 3, 1, 2], fraction=0.5)
    assert table["quadrant"].to_pylist() == ["label in doubt", "hard", None, "typical"]
    assert table["is_atypical"].to_pylist() == [None, True, False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [1, 2]), "scores of the same samples, but got 1, 2 and 1"),
        (([1], [1], [1, 2]), "but got 1, 1 and 2"),
        (([[1]], [1]), r"`hard` of shape \[N\], but got \[1, 1\]"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(FastpieError, match=message):
        quadrants(*arguments)


def test_bad_fraction():
    with pytest.raises(FastpieError, match=r"`fraction` in \[0, 1\], but got 1.5"):
        quadrants([1], [1], fraction=1.5)
