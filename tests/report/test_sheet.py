"""What a notebook shows of runs made by the real `mine`: the right samples, and nothing alive."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from torch import nn

import fastpie
from fastpie import FastpieError

SCRIPT = "<script>alert(1)</script>"
IDS = [SCRIPT, '"><img src=x onerror=alert(1)>', "a&b'c", *(f"s{i:02d}" for i in range(27))]


class Data(torch.utils.data.Dataset):
    sample_ids = IDS
    class_names = ("cat", SCRIPT, "gnu")

    def __init__(self, broken=False, side=8):
        self.broken, self.side = broken, side

    def __len__(self):
        return len(IDS)

    def __getitem__(self, index):
        if self.broken and index % 2:
            raise OSError(f"no {SCRIPT}")
        generator = torch.Generator().manual_seed(index)
        return torch.randn(1, self.side, self.side, generator=generator), index % 3


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.images, self.open = [], "", [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        else:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def mined(path, levels=(0.3, 0.6), **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    dual = fastpie.DualModel(net, fastpie.prune(net, levels))
    return fastpie.mine(
        dual, Data(), path, batch_size=10, backend="reference", recalibrate=False, progress=False,
        **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return mined(tmp_path_factory.mktemp("run"))


def test_the_hardest_with_their_pictures(run):
    sheet = run.show(8, dataset=Data())
    assert [card.sample_id for card in sheet.cards] == run.select(8.5 / 30)
    page = Page(sheet._repr_html_())
    assert page.tags.count("figure") == 8
    assert "script" not in page.tags
    pictures = [Image.open(io.BytesIO(base64.b64decode(s.split(",")[1]))) for s in page.images]
    assert [p.size for p in pictures] == [(8, 8)] * 8
    assert "8 of 30 samples, hardest first by hardness" in page.words
    rows = {row["sample_id"]: row for row in run.table.to_pylist()}
    for card in sheet.cards:
        row = rows[card.sample_id]
        assert dict(card.facts) == {
            "label": Data.class_names[row["label"]],
            "dense": Data.class_names[row["prediction_dense"]],
            "pruned 0.6": Data.class_names[row["prediction_pruned@0.6"]],
            "hardness": f"{row['hardness']:.3g}",
        }


def test_texts_stay_texts(run):
    page = Page(run.show(30, dataset=Data())._repr_html_())
    assert set(page.tags) == {"div", "p", "figure", "figcaption", "img", "b"}
    assert len(page.images) == 30
    assert page.words.count(SCRIPT) >= 10  # the class, and one id
    assert "a&b'c" in page.words


def test_what_cannot_be_shown_says_why(run):
    page = Page(run.show(30, by="js", dataset=Data(broken=True))._repr_html_())
    assert len(page.images) == 15
    assert page.words.count(f"cannot be shown: no {SCRIPT}") == 15
    page = Page(run.show(3)._repr_html_())
    assert page.words.count("no data set given") == 3
    subset = torch.utils.data.Subset(Data(), range(20))
    page = Page(run.show(30, dataset=torch.utils.data.DataLoader(subset))._repr_html_())
    assert page.words.count("not in the data set") == 10


def test_large_pictures_are_small(run):
    sheet = run.show(2, dataset=Data(side=600))
    assert all(card.picture.startswith("data:image/jpeg") for card in sheet.cards)
    assert len(sheet._repr_html_()) < 60_000


def test_lines_in_a_terminal(run):
    lines = repr(run.show(3, by="js@0.6")).splitlines()
    assert lines[0] == "3 of 30 samples, hardest first by js@0.6"
    assert len(lines) == 4
    assert "js@0.6 " in lines[1]


def test_a_single_level_and_the_summary(tmp_path):
    run = mined(tmp_path / "a&b", levels=0.5)
    assert dict(run.show(1).cards[0].facts).keys() == {"label", "dense", "pruned 0.5", "hardness"}
    page = Page(run._repr_html_())
    assert "a&b" in page.words
    assert run.record["hardness"] in page.words
    assert run.show(0).cards == []


def test_bad_arguments(run):
    with pytest.raises(FastpieError, match="`n`"):
        run.show(-1)
    with pytest.raises(FastpieError, match="nothing"):
        run.show(by="nothing")
    with pytest.raises(FastpieError, match="names no sample ids"):
        run.show(dataset=[1, 2])


def test_rows_in_the_order_asked_for(run):
    rows = torch.tensor([7, 2, 29, 2]).numpy()
    taken = run.take(rows, ["js", "sample_id"])
    assert taken.equals(run.table.select(["js", "sample_id"]).take(rows))
    assert run.take(rows[:0]).num_rows == 0
    with pytest.raises(FastpieError, match="no_such"):
        run.take(rows, ["no_such"])
