"""What a report is made of: the choice of samples, their names, probabilities and pictures."""

from __future__ import annotations

import csv
import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import nn

import fastpie
from analyses import QUADRANTS
from analyses import tables_of as made_up_tables
from fastpie.analysis import Analysis
from fastpie.data import ManifestDataset, Preprocessing
from fastpie.mining import MiningResult
from fastpie.report.choice import choose
from fastpie.report.classes import ClassRow
from fastpie.report.columns import Columns, codes_of
from fastpie.report.identities import Identities
from fastpie.report.probabilities import probabilities
from fastpie.report.tables import class_table, tables_of, without_identities
from fastpie.report.thumbnails import Pictures, Sizes, picture_of


def columns(**values):
    table = pa.table(
        {"sample_id": [f"s{i}" for i in range(len(next(iter(values.values()))))], **values}
    )
    return Columns(table, [0.5], False)


def test_everything_is_chosen_if_it_fits():
    rows, said = choose(columns(hardness=[1.0, 3.0, np.nan, 2.0]), 4)
    assert rows.tolist() == [1, 3, 0, 2]
    assert said == "All 4 samples are shown."


def test_each_order_gives_its_next():
    n = 400
    rng = np.random.default_rng(0)
    hardness, doubt, atypical = rng.random((3, n))
    label = np.repeat(np.arange(4), n // 4)
    hardness[label == 3] /= 1000  # no sample of this class is among the hardest
    quadrant = [QUADRANTS[i % 4] for i in range(n)]
    some = columns(
        hardness=hardness, label=label, label_in_doubt=doubt, atypical=atypical, quadrant=quadrant
    )
    rows, said = choose(some, 50)
    assert len(rows) == len(set(rows.tolist())) == 50
    assert (np.diff(hardness[rows]) <= 0).all()
    chosen = set(rows.tolist())
    for values in (hardness, doubt, atypical):
        assert set(np.argsort(-values)[:10].tolist()) <= chosen
    for k in range(4):
        of_class = np.flatnonzero(label == k)
        assert set(of_class[np.argsort(-hardness[of_class])[:2]].tolist()) <= chosen
    assert said == (
        "50 of 400 samples are shown: the hardest of all, of each label, those whose label is most in "
        "doubt, the most atypical and some of each quadrant."
    )


def test_a_column_without_a_number_decides_nothing():
    rows, said = choose(columns(hardness=[3.0, 2.0, 1.0], atypical=[np.nan] * 3), 2)
    assert rows.tolist() == [0, 1]
    assert said == "2 of 3 samples are shown: the hardest of all."


def test_codes_are_places_in_the_sorted_values():
    codes, values = codes_of(pa.chunked_array([["b", None], ["a", "b"]]))
    assert values == ["a", "b"]
    np.testing.assert_array_equal(codes, [1, np.nan, 0, 1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A multiclass run of two models and a multilabel run, both with logits."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs")
    images = torch.randn(12, 1, 4, 4)
    ids = [f"patient-{i:02d}" for i in range(12)]
    models = [nn.Sequential(nn.Flatten(), nn.Linear(16, 6)).eval() for _ in range(2)]
    duals = [fastpie.DualModel(m, fastpie.prune(m, [0.3, 0.6])) for m in models]
    options = {"batch_size": 6, "keep_logits": True, "sample_ids": ids, "recalibrate": False}
    data = torch.utils.data.TensorDataset(images, torch.arange(12) % 6)
    several = fastpie.mine(duals, data, folder / "several", **options)
    labels = (torch.rand(12, 6) > 0.6).float()
    data = torch.utils.data.TensorDataset(images, labels)
    multilabel = fastpie.mine(duals[0], data, folder / "labels", task="multilabel", **options)
    return several, multilabel


def test_probabilities_are_the_mean_over_the_models(runs):
    result, _ = runs
    some = Columns.of(result)
    rows = np.array([7, 2])
    shown, note = probabilities(result, some, rows)
    assert note == ""
    logits = [
        torch.from_numpy(np.concatenate([d[None], p]))
        for d, p in (m.logits() for m in result.members)
    ]
    expected = (
        torch.stack([x.double().softmax(-1) for x in logits]).mean(0).numpy()
    )  # [1 + L, N, C]
    labels = result.table["label"].to_pylist()
    for row, of_sample in zip(rows, shown, strict=True):
        classes = [c for c, _ in of_sample]
        assert classes[0] == labels[row]
        for level in (0, -1):
            assert set(np.argsort(-expected[level, row])[:3].tolist()) <= set(classes)
        assert len(classes) == len(set(classes)) <= 7
        for c, values in of_sample:
            np.testing.assert_allclose(values, expected[:, row, c], atol=1e-7)


def test_probabilities_of_several_labels(runs):
    _, result = runs
    shown, _ = probabilities(result, Columns.of(result), np.arange(12))
    dense, pruned = result.logits()
    for row, of_sample in enumerate(shown):
        positive = [i for i, v in enumerate(result.table["label"][row].as_py()) if v == 1]
        assert [c for c, _ in of_sample][: len(positive)] == positive
        for c, values in of_sample:
            logits = torch.from_numpy(np.array([dense[row, c], *pruned[:, row, c]]))
            np.testing.assert_allclose(values, logits.double().sigmoid().numpy(), atol=1e-7)


def test_too_many_logits_are_not_read(runs, monkeypatch):
    result, _ = runs
    monkeypatch.setattr("fastpie.report.probabilities._MOST_LOGITS", 12 * 6 * 3 - 1)
    monkeypatch.setattr(MiningResult, "logits", None)
    shown, note = probabilities(result, Columns.of(result), np.arange(2))
    assert "too many, or too far away" in note
    assert [len(s) for s in shown] == [1, 1]


def test_pseudonyms_stay_the_same_from_report_to_report(runs):
    result, _ = runs
    first = Identities(result, False)
    names = [first.of(i) for i in ("patient-01", "patient-02", '"odd",\nname', "patient-01")]
    assert names[0] == names[3]
    assert len(set(names)) == 3
    assert all(name.startswith("s-") and len(name) == 10 for name in names)
    assert first.save()
    path = result.path / "report-ids.csv"
    with path.open(encoding="utf-8", newline="") as file:
        known = {row["pseudonym"]: row["sample_id"] for row in csv.DictReader(file)}
    assert known[names[2]] == '"odd",\nname'
    again = Identities(result, False)
    assert again.of("patient-02") == names[1]
    written = path.stat().st_mtime_ns
    assert again.save()
    assert path.stat().st_mtime_ns == written  # nothing new
    assert Identities(result, True).of("patient-01") == "patient-01"
    path.write_bytes(b"\xff\xfe not ours")
    assert Identities(result, False).of("patient-01") != names[0]
    path.unlink()
    path.mkdir()  # where no file can be written
    odd = Identities(result, False)
    odd.of("patient-01")
    assert not odd.save()
    path.rmdir()


def test_errors_keep_their_kind_and_lose_their_names(runs):
    hidden, shown = Identities(runs[0], False), Identities(runs[0], True)
    text = "UnidentifiedImageError: cannot identify image file '/data/patient-07.png'"
    assert hidden.message("read", text) == "UnidentifiedImageError (message hidden)"
    assert hidden.message("id", "'a' is now 'b'") == "(message hidden)"
    assert hidden.message("read", "Expected a file, but patient-07: gone") == "(message hidden)"
    assert hidden.message("label", "Expected a class index in [0, 3), but got 5.").endswith("5.")
    assert shown.message("read", text) == text
    assert hidden.reason(OSError("/data/patient-07.png")) == "OSError"
    assert shown.reason(OSError("/data/patient-07.png")) == "/data/patient-07.png"


def test_subgroups_that_can_name_somebody_are_left_out():
    names = [
        "sex",
        "age band",
        "sex x view",
        "Site & class",
        "doctor",
        "sex x doctor",
        "patient_id",
    ]
    table = pa.table({"attribute": names, "value": names})
    assert without_identities(table)["attribute"].to_pylist() == names[:4]


def test_an_analysis_joins_the_table_of_classes_by_name():
    rows = [ClassRow(i, 5, 0.5, 0.25, 0.1, float(i)) for i in range(3)]
    names = ["a", "b", "c"]
    analysis = Analysis(pa.table({}), {"classes": made_up_tables(["c", "b"])["classes"]}, {}, [])
    table = class_table(rows, names.__getitem__, 0.7, analysis)
    heads = [head for head, _ in table.columns]
    assert {"n in training", "first drop", "impact", "ratio of PIEs"} <= set(heads)
    assert [row[0].text for row in table.rows] == ["c", "b", "a"]
    place = heads.index("n in training")
    assert [row[place].text for row in table.rows] == ["1,000", "500", "–"]
    assert table.rows[0][heads.index("ratio of PIEs")].text == "1.5 (0.7 to 2.2)"
    assert table.keys == [2, 1, 0]
    assert all(len(row) == len(heads) for row in table.rows)


def test_tables_of_an_analysis():
    tables = {
        t.name: t
        for t in tables_of(Analysis(pa.table({}), made_up_tables(["a", "b", "c"]), {}, []))
    }
    assert set(tables) == {
        f"table-{n}"
        for n in (
            "levels",
            "links",
            "counts",
            "subgroups",
            "pairs",
            "regression",
            "stability",
            "agreement",
        )
    }
    groups = tables["table-subgroups"]
    heads = [head for head, _ in groups.columns]
    assert heads[:6] == [
        "attribute",
        "value",
        "samples",
        "among the hardest",
        "odds ratio",
        "95 % interval",
    ]
    assert [c.text for c in groups.rows[0][:6]] == ["sex", "F", "20", "0", "0.5", "0.25 to 1"]
    assert groups.rows[2][5].text == "–"  # a bound is null
    fcd = [row[2].value for row in tables["table-pairs"].rows]
    assert fcd == sorted(fcd, reverse=True)


@pytest.mark.parametrize("budget", [0, 3_000, 40_000, 400_000])
def test_pictures_never_exceed_their_budget(budget):
    rng = np.random.default_rng(0)
    sizes = Sizes(budget, 40)
    uris = []
    for i in range(40):
        noise = rng.integers(0, 256, (120, 100, 3), dtype=np.uint8)
        noise[:, : 3 * i] = 128  # from hard to easy
        uris.append(sizes.uri(Image.fromarray(noise)))
    assert sum(len(u or "") for u in uris) <= budget
    if budget >= 40_000:
        assert None not in uris
    if budget == 400_000:
        assert sum(map(len, uris)) > budget / 4
        sides = [max(Image.open(io.BytesIO(_bytes(u))).size) for u in uris]
        assert sides[-1] == 120  # as large as the picture is


def test_a_share_that_is_not_taken_goes_to_the_others():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    alone, shared = Sizes(20_000, 1), Sizes(20_000, 4)
    for _ in range(3):
        shared.skip()
    assert alone.uri(noise) == shared.uri(noise) is not None


def _bytes(uri):
    import base64

    return base64.b64decode(uri.split(",")[1])


def test_values_that_are_already_pixels_are_shown_as_they_are():
    dim = torch.full((1, 3, 3), 0.2)
    dim[0, 0, 0] = 0.4
    assert np.asarray(picture_of(dim)).tolist()[0] == [102, 51, 51]
    assert np.asarray(picture_of((dim * 255).to(torch.uint8))).tolist()[0] == [102, 51, 51]
    assert np.asarray(picture_of(np.full((1, 2, 2), 65535 // 5, np.uint16))).tolist()[0] == [51, 51]


def test_a_manifest_shows_its_pixels_and_not_what_the_network_gets(runs, tmp_path):
    result, _ = runs
    rng = np.random.default_rng(0)
    pixels = {f"patient-{i:02d}": rng.integers(40, 80, (8, 8), dtype=np.uint8) for i in range(12)}
    for name, values in pixels.items():
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    lines = ["path,label,sample_id", *(f"{n}.png,{i % 6},{n}" for i, n in enumerate(pixels))]
    (tmp_path / "data.csv").write_text("\n".join(lines))
    data = ManifestDataset(
        tmp_path / "data.csv",
        labels="label",
        preprocessing=Preprocessing(size=(8, 8), channels=1, mean=(0.5,), std=(0.25,)),
    )
    pictures = Pictures(data, result, list(pixels))
    name = "patient-03"
    np.testing.assert_array_equal(np.asarray(picture_of(pictures.look(name))), pixels[name])
    expected = (torch.from_numpy(pixels[name]).float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(pictures.read(name)[0], expected)
