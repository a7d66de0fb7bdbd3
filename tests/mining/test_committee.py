"""`mine(..., committee=K)`: columns of the copies with noise on their weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastpie
from fastpie import FastpieError
from fastpie.dual.committee import Committee

COLUMNS = ["margin_committee", "js_committee", "flip_committee"]


@pytest.mark.parametrize("sparsity", [0.6, [0.3, 0.6]])
def test_the_columns_are_means_over_the_copies(tmp_path, network, labelled, images, sparsity):
    model = network("normalised")
    dual = fastpie.DualModel(model, fastpie.prune(model, sparsity))
    data = labelled(11)
    table = fastpie.mine(dual, data, tmp_path / "run", batch_size=4, committee=3).table
    labels = torch.tensor([label for _, label, _ in data.items])
    committee = Committee(model, 3).recalibrate(images(11).split(4))
    with torch.no_grad():
        copies = Committee.outputs(committee(images(11)))  # [3, 11, C]
        dense = model(images(11))
    scores = fastpie.disagreement(dense, copies, labels)
    for name, of in zip(COLUMNS, ("margin_pruned", "js", "flip"), strict=True):
        expected = scores[of].double().mean(0).numpy()
        np.testing.assert_allclose(table[name].to_numpy(), expected, rtol=1e-3, atol=1e-5)
    assert table["flip_committee"].to_numpy().max() <= 1


def test_without_labels_the_margin_is_to_the_second_class(tmp_path, network, samples, images):
    model = network()
    run = fastpie.mine(model, samples([(x,) for x in images(6)], range(6)), tmp_path, committee=2)
    copies = Committee.outputs(Committee(model, 2)(images(6)))
    top = copies.topk(2, dim=2).values
    expected = (top[..., 0] - top[..., 1]).mean(0).detach().numpy()
    np.testing.assert_allclose(run.table["margin_committee"].to_numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("task", "columns"),
    [("segmentation", ["iou_committee", "iou_soft_committee"]), ("embedding", ["drift_committee"])],
)
def test_other_tasks(tmp_path, network, samples, images, task, columns):
    model = network("segmenting" if task == "segmentation" else "plain")
    data = samples([(x,) for x in images(6)], range(6))
    table = fastpie.mine(model, data, tmp_path / "run", task=task, committee=2).table
    with torch.no_grad():
        copies = Committee.outputs(Committee(model, 2)(images(6)))
        scores = fastpie.disagreement(model(images(6)), copies, task=task)
    for name in columns:
        expected = scores[name.removesuffix("_committee")].mean(0).numpy()
        np.testing.assert_allclose(table[name].to_numpy(), expected, rtol=1e-3, atol=1e-6)


def test_it_changes_no_other_column(tmp_path, network, labelled):
    plain = fastpie.mine(network("normalised"), labelled(9), tmp_path / "a").table
    more = fastpie.mine(network("normalised"), labelled(9), tmp_path / "b", committee=2).table
    assert more.column_names[-3:] == COLUMNS
    for name in plain.column_names:  # kernels are chosen by timing in each run
        a, b = plain[name].to_pylist(), more[name].to_pylist()
        assert a == b or np.allclose(
            np.array(a, float), np.array(b, float), rtol=1e-3, atol=1e-5, equal_nan=True
        ), name


@pytest.mark.usefixtures("tiny_parts")
def test_a_run_that_is_taken_up_gives_the_same_bits(tmp_path, network, labelled):
    model, data = network("normalised"), labelled(23)
    options = {"batch_size": 4, "committee": 3}
    fastpie.mine(model, data, tmp_path / "run", limit=8, **options)
    for name in ("plan.json", "committee-plan.json"):
        assert (tmp_path / "run" / name).is_file()
    resumed = fastpie.mine(model, data, tmp_path / "run", **options).table
    assert resumed.num_rows == 23
    again = tmp_path / "run" / "scores"
    before = {path.name: path.read_bytes() for path in again.iterdir()}
    sorted(again.iterdir())[2].unlink()
    assert fastpie.mine(model, data, tmp_path / "run", **options).table.equals(resumed)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == before


def test_several_models(tmp_path, network, labelled):
    models = [network(seed=0), network(seed=1)]
    run = fastpie.mine(models, labelled(6), tmp_path / "run", committee=2)
    parts = [member.table["margin_committee"].to_numpy() for member in run.members]
    np.testing.assert_allclose(
        run.table["margin_committee"].to_numpy(), np.mean(parts, 0), rtol=1e-5
    )


def test_another_committee_is_another_run(tmp_path, network, labelled):
    fastpie.mine(network(), labelled(5), tmp_path / "run")
    with pytest.raises(FastpieError, match="committee: None in the folder, 2 now"):
        fastpie.mine(network(), labelled(5), tmp_path / "run", committee=2)


@pytest.mark.parametrize("number", [1, -1, 256])
def test_bad_numbers(tmp_path, network, labelled, number):
    with pytest.raises(FastpieError, match=f"`committee` of 0 .*, but got {number}"):
        fastpie.mine(network(), labelled(5), tmp_path / "run", committee=number)
