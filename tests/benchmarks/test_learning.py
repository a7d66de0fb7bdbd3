"""The comparison of recipes: its sets, what is measured, and a whole run of a few recipes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarks.quality import imbalance, learning, learning_table, outcomes, recipes
from benchmarks.quality.samples import test_of as the_test
from benchmarks.quality.samples import train_of
from torch import nn


@pytest.mark.parametrize("name", imbalance.SETS)
def test_what_is_in_a_set(name):
    data = imbalance.make(name, 3)
    again = imbalance.make(name, 3)
    np.testing.assert_array_equal(data.images, again.images)
    np.testing.assert_array_equal(data.labels, again.labels)
    assert not np.array_equal(data.images, imbalance.make(name, 4).images)
    share = np.bincount(data.group, minlength=len(data.groups)) / len(data.group)
    assert (share[1:] > 0).all()
    assert (share[1:] < 0.08).all()  # no label says so, and they are rare
    assert np.bincount(data.test_group).min() >= 150  # and many in the test
    assert 0.03 < data.wrong.mean() < 0.07
    assert not (data.wrong & (data.group > 0)).any()
    if data.task != "segmentation":
        assert data.counts.max() / data.counts.min() > 10
    sample = train_of(data, augment=True)[5]
    assert sample["image"].shape == data.images.shape[1:]
    assert len(the_test(data)) == len(data.test_images)


def test_a_wrong_mask_is_another_image_s():
    data = imbalance.make("skin, masks", 0)
    truth = imbalance.make("skin, masks", 0).masks
    places = np.flatnonzero(data.wrong)
    shown = {truth[place].tobytes() for place in places}
    assert {data.masks[place].tobytes() for place in places} == shown


class _Told(nn.Module):
    """Gives logits that it was told, in the order of the test set."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.at = torch.from_numpy(logits), 0

    def forward(self, x):
        self.at += len(x)
        return self.logits[self.at - len(x) : self.at]


def test_figures_of_classes():
    data = imbalance.make("digits", 1)
    right = np.eye(10, dtype=np.float32)[data.test_labels]
    assert outcomes.outcome(_Told(right), data) == {
        "balanced accuracy": 1, "tail recall": 1, "on its side": 1, "worst group gap": 0,
    }  # fmt: skip
    lying = data.test_group == 1
    half = right.copy()
    for c in np.unique(data.test_labels[lying]):  # every second of the group is wrong
        half[np.flatnonzero(lying & (data.test_labels == c))[::2]] = np.eye(10)[(c + 1) % 10]
    found = outcomes.outcome(_Told(half), data)
    assert found["balanced accuracy"] == 1
    assert found["on its side"] == pytest.approx(0.5)
    assert found["worst group gap"] == pytest.approx(0.5)
    rarest = np.argsort(data.counts, kind="stable")[:3]
    tail = right.copy()
    tail[np.isin(data.test_labels, rarest)] = 0.5  # ties go to class 0
    found = outcomes.outcome(_Told(tail), data)
    assert found["tail recall"] == (1 / 3 if 0 in rarest else 0)


def test_figures_of_findings():
    data = imbalance.make("chest film", 1)
    rng = np.random.default_rng(0)
    perfect = outcomes.outcome(_Told(data.test_labels - 0.5), data)
    assert perfect["mAP"] == perfect["mAP tail"] == perfect["another look"] == 1
    noise = rng.normal(size=data.test_labels.shape).astype(np.float32)
    found = outcomes.outcome(_Told(noise), data)
    assert found["mAP head"] > found["mAP medium"] > found["mAP tail"]
    assert found["another look"] == pytest.approx(0.5, abs=0.06)


def test_figures_of_masks():
    data = imbalance.make("skin, masks", 1)
    told = (data.test_masks[:, None] * 2.0 - 1).astype(np.float32)
    told[data.test_group == 1] = -1  # nothing is found of rings
    found = outcomes.outcome(_Told(told), data)
    assert found["IoU"] == found["IoU, dark skin"] == 1
    assert found["IoU, ring"] == 0
    assert found["worst group gap"] == 1


def test_every_control_is_a_recipe_of_the_same_set():
    for name in imbalance.SETS:
        names = [recipe.name for recipe in learning.recipes_of(imbalance.make(name, 0))]
        assert len(set(names)) == len(names)
        assert "plain" in names
        for recipe in learning.recipes_of(imbalance.make(name, 0)):
            assert recipe.control is None or recipe.control in names, recipe.name


def test_a_whole_run(tmp_path, monkeypatch):
    for name, setting in list(recipes._SETTINGS.items()):
        monkeypatch.setitem(recipes._SETTINGS, name, replace(setting, epochs=2, warmup=1, every=1))
    monkeypatch.setenv("OUT", str(tmp_path))
    work = ["--work", str(tmp_path / "work"), "--sets", "digits", "--seeds", "0", "1"]
    learning.main([*work, "--only", "loss", "--train"])
    learning.main([*work, "--only", "plain", "--train"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    learning.main([*work, "--only", "loss"])
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    (file,) = tmp_path.glob("quality-learning-*.json")
    rows = json.loads(file.read_text())["rows"]
    ours = next(row for row in rows if row["recipe"].endswith("+ attention, pruned loss"))
    assert ours["over_control"]["balanced accuracy"]["seeds"] == 2
    assert ours["figures"]["worst group gap"]["seeds"] == 2
    assert len({row["recipe"] for row in rows}) == len(rows)
    assert "not guarded" in learning_table.learning_table(rows)
    headlines = learning_table.headline_table(rows)
    assert "not guarded" not in headlines
    figure = ours["figures"]["balanced accuracy"]["mean"]
    assert f"| attention, pruned loss | {figure:.3f}" in headlines
    ours["over_adjusted"] = ours["over_control"]
    lines = learning_table.control_table(rows).splitlines()
    above = [line.split(" | ")[2] for line in lines if f"| {ours['recipe']} |" in line]
    assert above == [ours["control"]] * 2 + ["logit adjustment"] * 2
