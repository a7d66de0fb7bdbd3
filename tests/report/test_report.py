"""report.html of runs made by the real `mine`: what it says, and that nothing in it is alive."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import io
import json
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import fastpie
from analyses import analysis_of
from fastpie import FastpieError
from fastpie.report import write_report
from fastpie.report.heatmaps import heat_map
from fastpie.report.thumbnails import picture_of

SCRIPT = "<script>alert(1)</script>"
HOSTILE = [SCRIPT, '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "a&b'c", "../../../etc/passwd"]
CLASSES = 3


class Images(Dataset):
    """Labelled noise; names its ids, and the files that cannot be read."""

    def __init__(self, n=40, labels=True, shape=(1, 8, 8), corrupt=()):
        generator = torch.Generator().manual_seed(n)
        self.images = torch.randn(n, *shape, generator=generator)
        self.labels = torch.randint(0, CLASSES, (n,), generator=generator) if labels else None
        self.sample_ids = [*HOSTILE, *(f"image-{i:03d}" for i in range(len(HOSTILE), n))]
        self.corrupt = corrupt

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index in self.corrupt:
            raise OSError(f"cannot identify {SCRIPT} number {index}")
        if self.labels is None:
            return (self.images[index],)
        return self.images[index], self.labels[index]


class Page(HTMLParser):
    """Elements, the text outside of style, and the balance of tags."""

    VOID = frozenset({"meta", "img", "br", "hr", "input", "link"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.words, self.cells = [], [], [], {}
        self.scripts = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts.append(data)
        elif not any(tag == "style" for tag, _ in self.open):
            self.words.append(data)
        if self.open and self.open[-1][0] in ("td", "th"):
            table = next(a.get("id") for tag, a in self.open if tag == "table")
            row = sum(1 for tag, _ in self.elements if tag == "tr")
            self.cells.setdefault(table, {}).setdefault(row, []).append(data.strip())

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def rows(self, table):
        """Cells of the body of a table."""
        return list(self.cells.get(table, {}).values())[1:]

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def network(outputs=CLASSES, channels=1):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, outputs),
    ).eval()


def run(tmp_path, data, model=None, levels=(0.3, 0.6, 0.9), **options):
    model = model or network()
    dual = fastpie.DualModel(model, fastpie.prune(model, levels))
    return fastpie.mine(dual, data, tmp_path / "run", batch_size=16, **options)


def read(path):
    """The page, after the checks that every report must pass."""
    text = path.read_text("utf-8")
    assert path.stat().st_size < 20_000_000
    page = Page(text)
    data, pictures, script = page.scripts
    assert [a.get("type") for a in page.all("script")] == ["application/json"] * 2 + [None]
    assert text.count("<script") == text.count("</script") == 3
    page.data, page.pictures = json.loads(data), json.loads(pictures)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.all("meta")[1]["content"] == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert page.all("link") == []
    assert page.all("iframe") == []
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text.replace("url(#", "")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/")
        for name in ("href", "xlink:href"):
            target = attributes.get(name, "data:image/")
            assert target.startswith("data:image/") or (target[0] == "#" and target[1:] in ids)
    assert all(attributes["alt"] for attributes in page.all("img"))
    assert len([a for a in page.all("svg") if a.get("role") == "img" and a["aria-label"]]) == len(
        page.all("figure")
    )
    assert set(page.data["tables"]) == {
        a["data-table"] for a in page.all("button") if "data-table" in a
    }
    uris = [*page.pictures["small"], *page.pictures["large"].values()]
    assert all(uri is None or uri.startswith("data:image/") for uri in uris)
    return page


def pictures_of(page):
    return [uri for uri in page.pictures["small"] if uri is not None]


def score(page, key):
    return next(s for s in page.data["scores"] if s["key"] == key)


def plots_of(page):
    return [a["id"] for a in page.all("figure")]


@pytest.fixture
def no_plots(monkeypatch):
    """For tests that do not look at plots, which take most of the time."""
    monkeypatch.setattr("fastpie.report.write.plots_of", lambda *_: [])


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    torch.manual_seed(0)
    data = Images(corrupt=(7, 20))
    names = ["healthy", SCRIPT, "caries"]
    result = run(tmp_path_factory.mktemp("labelled"), data, note={"comment": SCRIPT})
    path = write_report(result, dataset=data, class_names=names, show_ids=True)
    return data, result, path, names


@pytest.fixture(scope="module")
def page(labelled):
    return read(labelled[2])


def test_report_lies_in_the_run_folder_and_parses(labelled, page):
    _, result, path, _ = labelled
    assert path == result.path / "report.html"
    assert [p.name for p in result.path.iterdir() if p.name.startswith(".report")] == []
    assert plots_of(page) == ["plot-hardness", "plot-js", "plot-margins", "plot-accuracy"]


def test_summary_says_what_was_done(labelled, page):
    _, result, _, _ = labelled
    text = page.text
    assert "38 samples scored, 2 left out: 2 could not be read." in text
    assert "multiclass, with labels" in text
    assert "0.3, 0.6 and 0.9" in text
    assert result.record["hardness"] in text
    assert result.record["fingerprints"]["model"] in text
    assert result.record["versions"]["torch"] in text
    right = np.mean(column(result, "label") == column(result, "prediction_dense"))
    flips = column(result, "flip").mean()
    assert f"Accuracy is {right:.1%} dense" in text
    assert f"Pruning changes the prediction of {flips:.1%} of 38 samples" in text
    assert "not finished" not in text


def test_hostile_text_stays_text(labelled, page):
    raw = labelled[2].read_text("utf-8")
    assert "<script>alert" not in raw
    assert "onerror=alert" not in raw.replace(
        "&#34;&gt;&lt;img src=x onerror=alert(1)&gt;", ""
    ).replace('\\"\\u003e\\u003cimg src=x onerror=alert(1)\\u003e', "")
    assert SCRIPT in page.text  # as class name and as error
    assert SCRIPT in page.data["ids"]
    assert page.data["classes"]["1"] == SCRIPT
    assert "49" not in {word.strip() for word in page.words}


def test_every_sample_is_there_hardest_first(labelled, page):
    _, result, _, _ = labelled
    rows = result.table.sort_by([("hardness", "descending")]).to_pylist()
    data = page.data
    assert data["ids"] == [row["sample_id"] for row in rows]
    assert data["label"] == [row["label"] for row in rows]
    assert data["dense"] == [row["prediction_dense"] for row in rows]
    assert data["levels"] == [0.3, 0.6, 0.9]
    assert data["pruned"][2] == [row["prediction_pruned@0.9"] for row in rows]
    for key in ("hardness", "js", "margin_pruned"):
        np.testing.assert_allclose(score(page, key)["values"], [r[key] for r in rows], rtol=1e-3)
    assert "All 38 samples are shown." in page.text


def test_percentiles_are_those_of_the_whole_run(labelled, page):
    ranks = score(page, "hardness")["rank"]
    assert ranks[0] == 1000
    assert ranks == [round(1000 * (38 - i) / 38) for i in range(38)]


def test_flags_say_what_the_predictions_say(labelled, page):
    _, result, _, _ = labelled
    by_id = {row["sample_id"]: row for row in result.table.to_pylist()}
    rows = [by_id[i] for i in page.data["ids"]]
    flags = {flag["key"]: flag["rows"] for flag in page.data["flags"]}
    wrong = [i for i, r in enumerate(rows) if r["label"] != r["prediction_dense"]]
    lost = [
        i
        for i, r in enumerate(rows)
        if r["label"] == r["prediction_dense"] != r["prediction_pruned@0.9"]
    ]
    assert flags["wrong"] == wrong != []
    assert flags.get("lost", []) == lost
    assert flags.get("changed", []) == [i for i, r in enumerate(rows) if r["flip"]]


def test_probabilities_of_the_label_come_from_the_loss(labelled, page):
    _, result, _, _ = labelled
    by_id = {row["sample_id"]: row for row in result.table.to_pylist()}
    for sample_id, shown in zip(page.data["ids"], page.data["probabilities"], strict=True):
        row = by_id[sample_id]
        ((label, *values),) = shown
        losses = [row["loss_dense"], *(row[f"loss_pruned@{s}"] for s in (0.3, 0.6, 0.9))]
        assert label == row["label"]
        assert values == [round(1000 * np.exp(-loss)) for loss in losses]


def test_class_table_equals_an_independent_computation(labelled):
    _, result, path, names = labelled
    rows = result.table.to_pylist()
    expected = []
    for label, name in enumerate(names):
        of = [r for r in rows if r["label"] == label]
        n = len(of)
        expected.append(
            [
                name,
                str(n),
                f"{sum(r['prediction_dense'] == label for r in of) / n:.1%}",
                f"{sum(r['prediction_pruned@0.9'] == label for r in of) / n:.1%}",
                f"{sum(r['flip@0.9'] for r in of) / n:.1%}",
                f"{sum(r['hardness'] for r in of) / n:.3g}",
            ]
        )
    expected.sort(key=lambda row: -float(row[-1]))
    found = [[cell for cell in row if cell] for row in read(path).rows("class-table")]
    assert found == expected


def test_errors_are_listed(labelled, page):
    _, result, _, _ = labelled
    assert [row[1:3] for row in page.rows("error-table")] == [
        ["read", error] for error in column(result, "error", result.errors)
    ]


def test_thumbnails_are_the_samples(labelled, page):
    data = labelled[0]
    assert None not in page.pictures["small"]
    for sample_id, uri in zip(page.data["ids"], page.pictures["small"], strict=True):
        assert uri.startswith("data:image/png")
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
        source = data.images[data.sample_ids.index(sample_id)][0].numpy()
        scaled = (source - source.min()) / (source.max() - source.min()) * 255
        assert np.abs(pixels - scaled).max() <= 1


def test_readers_without_javascript_see_the_hardest(labelled, page):
    names = labelled[3]
    cards = [a["alt"] for a in page.all("img")]
    assert len(cards) == 24
    label, dense = page.data["label"][0], page.data["dense"][0]
    value = score(page, "hardness")["values"][0]
    assert cards[0] == (
        f"{page.data['ids'][0]}, label {names[label]}, dense {names[dense]}, hardness {value:.3g}"
    )


@pytest.mark.usefixtures("no_plots")
def test_without_data_set_the_report_says_why_there_are_no_pictures(labelled, tmp_path):
    _, result, _, _ = labelled
    page = read(write_report(result, tmp_path / "other.html"))
    assert pictures_of(page) == []
    assert not page.pictures["any"]
    assert "without the data set" in page.text
    assert len(page.data["ids"]) == 38


@pytest.mark.usefixtures("no_plots")
def test_another_data_set_gives_no_pictures_instead_of_wrong_ones(labelled, tmp_path):
    _, result, _, _ = labelled
    page = read(write_report(result, tmp_path / "other.html", dataset=torch.randn(40, 1, 8, 8)))
    assert pictures_of(page) == []
    assert "its indices are not the ids of the run" in page.text


@pytest.mark.usefixtures("no_plots")
def test_a_sample_that_cannot_be_read_leaves_a_placeholder(tmp_path):
    data = Images(n=12)
    result = run(tmp_path, data)
    data.corrupt = (0,)
    page = read(write_report(result, dataset=data, show_ids=True))
    assert len(pictures_of(page)) == 11
    row = page.data["ids"].index(HOSTILE[0])
    assert page.pictures["small"][row] is None
    assert page.pictures["missing"] == {
        str(row): f"cannot be shown: cannot identify {SCRIPT} number 0"
    }
    page = read(write_report(result, dataset=data))
    assert list(page.pictures["missing"].values()) == ["cannot be shown: OSError"]


@pytest.mark.usefixtures("no_plots")
def test_ids_from_the_items_are_found_again(tmp_path):
    images = torch.arange(6.0).view(6, 1, 1, 1) * torch.randn(1, 1, 8, 8)
    data = [{"image": x, "label": i % 2, "sample_id": f"s{9 - i}"} for i, x in enumerate(images)]
    page = read(write_report(run(tmp_path, data), dataset=data))
    assert len(pictures_of(page)) == 6


@pytest.mark.usefixtures("no_plots")
def test_the_samples_of_each_order_are_chosen(labelled, tmp_path):
    _, result, _, names = labelled
    page = read(write_report(result, tmp_path / "x.html", class_names=names, thumbnails=6))
    assert "6 of 38 samples are shown: the hardest of all and of each label." in page.text
    assert set(page.data["label"]) == {0, 1, 2}
    hardest = result.table.sort_by([("hardness", "descending")])["hardness"][0].as_py()
    assert score(page, "hardness")["values"][0] == pytest.approx(hardest, rel=1e-3)
    page = read(write_report(result, tmp_path / "x.html", thumbnails=0))
    assert page.data["ids"] == []
    assert "There is no sample to show." in page.text


@pytest.mark.usefixtures("no_plots")
def test_no_labels_goes_by_prediction(tmp_path):
    data = Images(labels=False)
    result = run(tmp_path, data, levels=0.9)
    page = read(write_report(result, dataset=data))
    predicted = column(result, "prediction_dense")
    assert "Accuracy is not available: the run has no labels." in page.text
    assert page.data["label"] is None
    assert page.data["probabilities"] is None
    assert sorted(page.data["dense"]) == sorted(predicted.tolist())
    flips = column(result, "flip")
    hardness = column(result, "hardness")
    expected = [
        [
            str(label),
            str((predicted == label).sum()),
            f"{flips[predicted == label].mean():.1%}",
            f"{hardness[predicted == label].mean():.3g}",
        ]
        for label in np.unique(predicted)
    ]
    found = [[cell for cell in row if cell] for row in page.rows("class-table")]
    assert sorted(found) == sorted(expected)


def test_single_level_without_ladder_columns(tmp_path):
    data = Images()
    result = run(tmp_path, data, levels=0.5)
    assert not any("@" in name for name in result.table.column_names)
    page = read(write_report(result))
    accuracy = np.mean(column(result, "label") == column(result, "prediction_pruned"))
    assert f"{accuracy:.1%} at sparsity 0.5" in page.text
    assert len(plots_of(page)) == 4


@pytest.mark.usefixtures("no_plots")
def test_multilabel(tmp_path):
    images = Images(labels=False).images
    labels = (torch.rand(40, CLASSES) > 0.5).float()
    labels[0, 0] = torch.nan
    result = run(
        tmp_path,
        torch.utils.data.TensorDataset(images, labels),
        task="multilabel",
        sample_ids=Images().sample_ids,
    )
    page = read(write_report(result, class_names=["a", "b", "c"]))
    assert {row[0]: row[1] for row in page.rows("class-table")} == {
        name: str(int((labels[:, i] == 1).sum())) for i, name in enumerate("abc")
    }
    assert "holds no predictions" in page.text
    ids = column(result, "sample_id").tolist()
    for sample_id, classes in zip(
        read(write_report(result, show_ids=True)).data["ids"], page.data["labels"], strict=True
    ):
        row = result.table["label"][ids.index(sample_id)].as_py()
        assert classes == [i for i, v in enumerate(row) if v == 1]


def test_segmentation(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    data = Images(n=10, labels=False, shape=(3, 80, 100))
    page = read(write_report(run(tmp_path, data, model, task="segmentation"), dataset=data))
    assert len(pictures_of(page)) == 10
    assert pictures_of(page)[0].startswith("data:image/webp")
    assert plots_of(page) == ["plot-hardness", "plot-iou_soft"]
    assert "The run tells no classes." in page.text


def test_embedding(tmp_path):
    page = read(write_report(run(tmp_path, Images(n=9, labels=False), task="embedding")))
    assert plots_of(page) == ["plot-hardness", "plot-drift"]


def rewritten(result, change):
    """The run with its table changed, as a fresh result."""
    (part,) = (result.path / "scores").glob("*.parquet")
    pq.write_table(change(pq.read_table(part)), part)
    return fastpie.MiningResult(result.path)


def test_empty_table(tmp_path):
    data = Images(n=8)
    result = rewritten(
        run(tmp_path, data), lambda t: pa.table({"sample_id": pa.array([], "string")})
    )
    page = read(write_report(result, dataset=data))
    assert "0 samples scored" in page.text
    assert "The run is not finished" in page.text
    assert "There is no sample to show." in page.text
    assert plots_of(page) == []
    result = rewritten(run(tmp_path / "b", data), lambda t: t.slice(0, 0))
    assert "no sample is scored" in read(write_report(result)).text


def test_columns_without_a_number(tmp_path):
    def blank(table):
        for i, name in enumerate(table.column_names):
            if pa.types.is_floating(table.schema.field(name).type):
                table = table.set_column(i, name, pa.array(np.full(len(table), np.nan)))
        return table

    result = rewritten(run(tmp_path, Images()), blank)
    page = read(write_report(result))
    assert [row[-1] for row in page.rows("class-table")] == ["–"] * CLASSES


@pytest.mark.usefixtures("no_plots")
def test_thousands_of_classes_are_capped_and_it_says_so(tmp_path):
    def multiply(table):
        n = 3000
        table = pa.concat_tables([table] * (n // len(table)))
        for name, values in (
            ("sample_id", [f"{i:05d}" for i in range(n)]),
            ("label", np.arange(n)),
            ("hardness", np.random.default_rng(0).random(n, dtype=np.float32)),
        ):
            table = table.set_column(table.column_names.index(name), name, pa.array(values))
        return table

    result = rewritten(run(tmp_path, Images(n=40)), multiply)
    page = read(write_report(result, thumbnails=50))
    assert len(page.rows("class-table")) == 200
    assert "Of 3,000 classes, the 200 hardest are shown." in page.text
    hardest = column(result, "label")[np.argmax(column(result, "hardness"))]
    assert page.rows("class-table")[0][0] == str(hardest)
    assert page.data["label"][0] == hardest


@pytest.mark.usefixtures("no_plots")
def test_more_errors_than_are_shown(tmp_path):
    data = Images(n=80, corrupt=range(10, 70))
    page = read(write_report(run(tmp_path, data)))
    assert len(page.rows("error-table")) == 50
    assert "60 samples could not be read or scored; the first 50 are shown" in page.text


@pytest.mark.usefixtures("no_plots")
def test_the_file_keeps_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr("fastpie.report.write._PICTURES", 5_000)
    data = Images(corrupt=())
    page = read(write_report(run(tmp_path, data), dataset=data))
    assert 0 < len(pictures_of(page)) < 40
    assert sum(map(len, pictures_of(page))) <= 5_000
    assert "would grow beyond 20 MB" in page.text
    monkeypatch.setattr("fastpie.report.write._MOST_BYTES", 50_000)
    with pytest.raises(FastpieError, match="fewer `thumbnails`"):
        write_report(fastpie.MiningResult(tmp_path / "run"))


@pytest.mark.parametrize(
    ("shape", "size", "mode"),
    [
        ((1, 8, 6), (6, 8), "L"),
        ((3, 8, 6), (6, 8), "RGB"),
        ((4, 8, 6), (6, 8), "L"),
        ((8, 6), (6, 8), "L"),
        ((1, 5, 8, 6), (6, 8), "L"),
        ((1, 400, 200), (80, 160), "L"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16])
def test_pictures_of_all_kinds_of_images(shape, size, mode, dtype):
    picture = picture_of((torch.rand(shape) * 255).to(dtype))
    assert (picture.size, picture.mode) == (size, mode)


def test_pictures_of_odd_values():
    volume = torch.zeros(1, 3, 4, 4)
    volume[0, 1, 0, 0] = 9
    assert np.asarray(picture_of(volume))[0, 0] == 255
    assert np.asarray(picture_of(np.full((1, 4, 4), np.nan))).tolist() == [[128] * 4] * 4
    odd = np.array([[[0.0, np.inf], [1.0, -np.inf]]])
    assert np.asarray(picture_of({"a": odd})).tolist() == [[0, 0], [255, 0]]
    for bad in (torch.zeros(3), torch.zeros(1, 0, 4), "text", torch.zeros(1, 1, 1, 1, 1)):
        with pytest.raises(FastpieError, match="not a"):
            picture_of(bad)


def test_bad_arguments_are_told(labelled, tmp_path):
    _, result, _, _ = labelled
    with pytest.raises(FastpieError, match="up to 2, but got 1"):
        write_report(result, tmp_path / "x.html", class_names=["one"])
    with pytest.raises(FastpieError, match="thumbnails"):
        write_report(result, tmp_path / "x.html", thumbnails=5_001)
    with pytest.raises(FastpieError, match="heat_maps"):
        write_report(result, tmp_path / "x.html", heat_maps=-1)
    with pytest.raises(FastpieError, match="write the report"):
        write_report(result, tmp_path / "missing" / "x.html")
    assert list(tmp_path.iterdir()) == []


def test_without_jinja_says_how_to_install_it(labelled, tmp_path, monkeypatch):
    _, result, _, _ = labelled
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(FastpieError, match=r"pip install 'fastpie\[report\]'"):
        write_report(result, tmp_path / "x.html")


def test_importing_needs_neither_library():
    code = (
        "import sys; sys.modules['jinja2'] = sys.modules['matplotlib'] = None;"
        "import fastpie, fastpie.report, fastpie.report.plots, fastpie.report.class_plots"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("no_plots")
def test_an_old_or_sparse_record_is_no_reason_to_stop(tmp_path):
    result = run(tmp_path, Images(n=8))
    record = json.loads((result.path / "run.json").read_text())
    for key in ("versions", "fingerprints", "created", "note", "hardness"):
        del record[key]
    (result.path / "run.json").write_text(json.dumps(record))
    page = read(write_report(fastpie.MiningResult(result.path), dataset=Images(n=8)))
    assert "not recorded" in page.text


def column(result, name, table=None):
    return np.array((table or result.table).column(name).to_pylist())


@pytest.mark.usefixtures("no_plots")
def test_ids_paths_notes_and_messages_are_hidden_unless_asked_for(tmp_path):
    data = Images(n=30, corrupt=(9,))
    data.paths = [f"/ward/Smith-{i}.png" for i in range(30)]
    result = run(tmp_path, data, note={"who": "Dr. Jones"})
    ids = data.sample_ids
    manifest = pa.table(
        {
            "sample_id": ids,
            "sex": ["F", "M", None] * 10,
            "age": [41.5] * 30,
            "group": [f"mrn{i}" for i in range(30)],
            "referrer": ["Dr. House"] * 30,
        }
    )
    pq.write_table(manifest, result.path / "manifest.parquet")
    result = fastpie.MiningResult(result.path)
    path = write_report(result, dataset=data)
    page, text = read(path), path.read_text("utf-8")
    for secret in (
        *ids,
        "Smith",
        "Jones",
        "House",
        "mrn",
        str(result.path.parent),
        "cannot identify",
    ):
        assert secret not in text
        assert json.dumps(secret)[1:-1] not in text
    (row,) = page.rows("error-table")
    assert row[1:] == ["read", "OSError (message hidden)"]
    with (result.path / "report-ids.csv").open(newline="", encoding="utf-8") as file:
        known = {r["pseudonym"]: r["sample_id"] for r in csv.DictReader(file)}
    assert known[row[0]] == ids[9]
    sex, age = page.data["attributes"]
    assert (sex["key"], sex["values"], age["values"]) == ("sex", ["F", "M"], ["40-49"])
    for name, code in zip(page.data["ids"], sex["index"], strict=True):
        assert (None if code is None else sex["values"][code]) == ["F", "M", None][
            ids.index(known[name]) % 3
        ]
    # Elsewhere the same names, and no list of them.
    other = read(write_report(result, tmp_path / "other.html"))
    assert other.data["ids"] == page.data["ids"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.html", "run"]
    page = read(write_report(result, tmp_path / "other.html", show_ids=True))
    assert set(page.data["ids"]) == set(ids) - {ids[9]}
    assert {o["name"] for o in page.data["others"]} == {"group", "referrer"}
    for secret in ("Dr. Jones", "/ward/Smith-9.png", "cannot identify", str(result.path)):
        assert secret in page.text


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    torch.manual_seed(0)
    data, names = Images(), ["healthy", SCRIPT, "caries"]
    model = network()
    dual = fastpie.DualModel(model, fastpie.prune(model, (0.3, 0.6, 0.9)))
    folder = tmp_path_factory.mktemp("analysed")
    result = fastpie.mine(dual, data, folder / "run", batch_size=20, keep_logits=True)
    analysis = analysis_of(result, names)
    # It can lack a sample, and has its rows in an order of its own.
    samples = analysis.samples.slice(1).sort_by([("atypical", "descending")])
    analysis = dataclasses.replace(analysis, samples=samples)
    options = {"analysis": analysis, "dataset": data, "class_names": names, "show_ids": True}
    path = write_report(result, dual=dual, heat_maps=5, heat_sparsity=0.6, **options)
    return dual, result, analysis, options, read(path)


def test_an_analysis_is_told_in_words_plots_and_tables(analysed):
    _, _, analysis, _, page = analysed
    assert page.text.index(analysis.sentences[0]) < page.text.index(analysis.sentences[2])
    assert page.text.count(analysis.sentences[0]) == 1
    plots = {name.removeprefix("plot-") for name in plots_of(page)}
    assert plots == {
        "hardness", "js", "margins", "accuracy", "quadrants", "levels", "curves-ap", "classes",
        "impact", "frequency", "counts", "subgroups", "pairs", "stability-level",
        "stability-control", "agreement",
    }  # fmt: skip
    sections = {a.get("id") for a in page.all("section")}
    assert {"gallery", "plots", "classes", "subgroups", "pairs", "stability"} <= sections
    shown = page.data["tables"]["subgroups"]
    assert shown["columns"] == analysis.tables["subgroups"].column_names
    assert [row[:2] for row in shown["rows"]] == [
        [r["attribute"], r["value"]] for r in analysis.tables["subgroups"].to_pylist()
    ]
    heads = next(iter(page.cells["class-table"].values()))
    assert "ratio of PIEs" in heads
    assert len(page.rows("table-stability")) == analysis.tables["stability"].num_rows


def test_an_analysis_joins_the_samples_by_id(analysed):
    _, _, analysis, _, page = analysed
    rows = {row["sample_id"]: row for row in analysis.samples.to_pylist()}
    data = page.data
    flags = {flag["key"]: set(flag["rows"]) for flag in data["flags"]}
    for place, sample_id in enumerate(data["ids"]):
        row = rows.get(sample_id)
        if row is None:  # the one that the analysis lacks
            assert data["quadrant"][place] is None
            assert score(page, "atypical")["values"][place] is None
            continue
        assert data["quadrants"][data["quadrant"][place]] == row["quadrant"]
        assert score(page, "atypical")["values"][place] == pytest.approx(row["atypical"], rel=1e-3)
        assert data["interval"][place] == pytest.approx(
            [row["hardness_low"], row["hardness_high"]], rel=1e-3
        )
        assert data["duplicates"][place] == row["duplicate_of"]
        for flag in ("pie", "dark", "blurred", "blank"):
            assert (place in flags.get(flag, set())) == row[flag]
        assert (place in flags["duplicate"]) == (row["duplicate_of"] is not None)
    assert len(rows) == len(data["ids"]) - 1


def test_heat_maps_of_the_hardest_lie_on_the_page(analysed):
    dual, _, _, options, page = analysed
    maps = page.pictures["maps"]
    assert sorted(maps) == ["0", "1", "2", "3", "4"]
    images = dict(zip(options["dataset"].sample_ids, options["dataset"].images, strict=True))
    for place, shown in maps.items():
        image = images[page.data["ids"][int(place)]]
        expected = heat_map(dual, image, page.data["label"][int(place)], sparsity=0.6)
        assert (shown["class"], shown["sparsity"]) == (expected.klass, 0.6)
        for name in ("dense", "pruned"):
            values = np.frombuffer(base64.b64decode(shown[name]), np.uint8).reshape(shown["size"])
            np.testing.assert_allclose(values / 255, getattr(expected, name), atol=1 / 255)
    assert "The 5 hardest have heat maps" in page.text


@pytest.mark.usefixtures("no_plots")
def test_heat_maps_that_fail_become_a_note(analysed, tmp_path):
    dual, result, _, options, _ = analysed
    path = tmp_path / "x.html"
    page = read(write_report(result, path, dual=dual, heat_maps=3, heat_sparsity=0.5))
    assert "There are no heat maps: they need the data set." in page.text
    page = read(
        write_report(
            result, path, dataset=options["dataset"], dual=dual, heat_maps=3, heat_module="nowhere"
        )
    )
    assert page.pictures["maps"] == {}
    assert "3 heat maps could not be drawn: Expected the name of a module" in page.text


@pytest.mark.usefixtures("no_plots")
def test_a_run_of_several_models(tmp_path):
    data = Images(n=12)
    duals = []
    for seed in range(2):
        model = network()
        with torch.no_grad():
            model[0].weight.add_(0.1 * seed)
        duals.append(fastpie.DualModel(model, fastpie.prune(model, [0.3, 0.6])))
    result = fastpie.mine(duals, data, tmp_path / "run", batch_size=6, keep_logits=True)
    page = read(write_report(result, dataset=data))
    assert len(pictures_of(page)) == 12
    assert all(len(shown) == CLASSES for shown in page.data["probabilities"])
