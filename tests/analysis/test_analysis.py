"""`Analysis` on disk."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest

from fastpie import FastpieError
from fastpie.analysis import Analysis

HOSTILE = ['=1+1", "x', "a\nb", "", "nan", "é,\t;"]


def make() -> Analysis:
    samples = pa.table({"sample_id": ["a", "b"], "hard": [0.5, None], "pie": [True, None]})
    tables = {
        "levels": pa.table(
            {
                "sparsity": [0.1, 1 / 3],
                "metric": ["map", "map"],
                "p": pa.array([None, 1e-300], pa.float64()),
                "significant": [False, True],
            }
        ),
        "classes": pa.table({"class": HOSTILE, "n": pa.array([0, 1, 2, 3, None], pa.int64())}),
        "empty": pa.table({"class": pa.array([], pa.string()), "n": pa.array([], pa.int64())}),
    }
    return Analysis(samples, tables, {"fraction": 0.05, "models": 3}, ["It is so.", "And so."])


def test_what_is_saved_is_loaded(tmp_path):
    analysis = make()
    found = Analysis.load(analysis.save(tmp_path / "analysis"))
    assert found.samples.equals(analysis.samples)
    assert found.tables.keys() == analysis.tables.keys()
    for name, table in analysis.tables.items():
        assert found.tables[name].equals(table), name
    assert found.facts == analysis.facts
    assert found.sentences == analysis.sentences


def test_numbers_keep_their_last_bit(tmp_path):
    values = [math.pi, 1 / 3, 1e-310, 1.7976931348623157e308, -0.0, math.nan, math.inf, None]
    analysis = Analysis(pa.table({"sample_id": []}), {"t": pa.table({"x": values})}, {}, [])
    found = Analysis.load(analysis.save(tmp_path)).tables["t"]["x"].to_pylist()
    assert [str(v) for v in found] == [str(v) for v in values]


def test_an_earlier_analysis_is_replaced(tmp_path):
    make().save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    Analysis(pa.table({"sample_id": ["c"]}), {}, {}, []).save(tmp_path)
    assert Analysis.load(tmp_path).tables == {}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "analysis.json",
        "notes.txt",
        "samples.parquet",
    ]


def test_no_analysis_is_an_error_that_says_so(tmp_path):
    with pytest.raises(FastpieError, match="Expected an analysis in"):
        Analysis.load(tmp_path)


@pytest.mark.parametrize("file", ["levels.csv", "samples.parquet", "analysis.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_analysis_is_refused(tmp_path, file, damage):
    path = make().save(tmp_path) / file
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FastpieError, match="Expected an analysis"):
        Analysis.load(tmp_path)


def test_another_format_is_refused(tmp_path):
    path = make().save(tmp_path) / "analysis.json"
    path.write_text(path.read_text().replace("fastpie-analysis-1", "fastpie-analysis-9"))
    with pytest.raises(FastpieError, match="fastpie-analysis-9"):
        Analysis.load(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FastpieError, match="Expected to write an analysis"):
        make().save(tmp_path / "file")
