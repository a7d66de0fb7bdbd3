"""The dual model of a run, made again from its folder."""

from __future__ import annotations

import pytest
import torch

import fastpie
from fastpie import FastpieError
from fastpie.mining.restore import dual_of_run


@pytest.mark.parametrize("sparsity", [0.6, [0.3, 0.6]])
@pytest.mark.parametrize("recalibrate", [True, False])
def test_it_gives_the_outputs_that_were_scored(
    tmp_path, network, labelled, images, sparsity, recalibrate
):
    model = network("normalised")
    dual = fastpie.DualModel(model, fastpie.prune(model, sparsity), features="bn2")
    run = fastpie.mine(
        dual, labelled(12), tmp_path / "run", keep_logits=True, recalibrate=recalibrate
    )
    found = dual_of_run(run, model)
    assert not found.training
    assert found.feature_module == "bn2"
    with torch.no_grad():
        out = found(images(12))
    dense, pruned = run.logits()
    torch.testing.assert_close(out.dense, torch.from_numpy(dense), rtol=1e-4, atol=1e-4)
    expected = torch.from_numpy(pruned if found.is_ladder else pruned[0])
    torch.testing.assert_close(out.pruned, expected, rtol=1e-4, atol=1e-4)
    if recalibrate:  # the model given has other statistics: they were taken from the folder
        with torch.no_grad():
            assert not torch.allclose(dual(images(12)).pruned, out.pruned, rtol=1e-3, atol=1e-3)


def test_the_model_given_is_left_alone(tmp_path, network, labelled):
    model = network("normalised")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    found = dual_of_run(fastpie.mine(model, labelled(5), tmp_path / "run"), model)
    assert model.training
    found.model.conv1.weight.data.zero_()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_other_weights_are_refused(tmp_path, network, labelled):
    run = fastpie.mine(network(), labelled(5), tmp_path / "run")
    with pytest.raises(FastpieError, match="Expected the weights that the run"):
        dual_of_run(run, network(seed=1))


def test_several_models_are_refused(tmp_path, network, labelled):
    models = [network(seed=0), network(seed=1)]
    run = fastpie.mine(models, labelled(5), tmp_path / "run")
    with pytest.raises(FastpieError, match="one of its `members`"):
        dual_of_run(run, models[0])
    assert dual_of_run(run.members[1], models[1]).sparsities == [0.1, 0.3, 0.5, 0.7]


@pytest.mark.parametrize("name", ["masks.safetensors", "recalibration.safetensors"])
def test_damaged_files_are_an_error(tmp_path, network, labelled, name):
    model = network("normalised")
    run = fastpie.mine(model, labelled(5), tmp_path / "run")
    (run.path / name).write_bytes(b"nothing")
    with pytest.raises(FastpieError, match="Expected"):
        dual_of_run(run, model)
