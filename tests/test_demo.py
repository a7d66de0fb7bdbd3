"""The demo's own parts; the whole of it runs in `make demo`."""

import json

import pytest

import fastpie
from fastpie import demo


def test_data_are_long_tailed_and_a_tenth_of_the_labels_is_wrong(tmp_path):
    data = demo.make_data(tmp_path, seed=0)
    assert len(data.wrong) == int(0.1 * len(data.train))
    assert set(data.train.sample_ids).isdisjoint(
        line.split(",")[2] for line in (tmp_path / "test.csv").read_text().split()
    )
    counts = data.labels.bincount(minlength=10)
    assert counts[0] > 8 * counts[9]
    assert data.test_labels.bincount().tolist() == [50] * 10
    assert data.images.shape[1:] == (1, 8, 8)
    assert 0 <= data.images.min() < data.images.max() <= 1


def test_one_short_demo_leaves_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "EPOCHS", 2)
    result = demo.run_demo(tmp_path / "out", seeds=1, progress=False)
    assert json.loads((tmp_path / "out" / "demo.json").read_text()) == result
    run = fastpie.MiningResult(tmp_path / "out" / "run")
    assert len(run) == result["samples"]
    assert (tmp_path / "out" / "run" / "report.html").exists()
    assert {row["training"] for row in result["accuracy"]} >= {"plain", "attended"}
    assert all(0 <= row["precision_at_5_percent"] <= 1 for row in result["found"])
    demo.run_demo(tmp_path / "out", seeds=1, progress=False)  # an earlier demo is replaced


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "train.csv").write_text("path,label\n")
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(fastpie.FastpieError, match="other files"):
        demo.run_demo(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
