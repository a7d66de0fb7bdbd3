"""Autocast around an engine, a module with two names, numbers of NumPy."""

import numpy as np
import torch
from torch import nn

import fastpie


def test_an_engine_is_compiled_and_refreshed_inside_autocast():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(4, 64)
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.5))
    expected = dual(x)
    with torch.autocast("cpu", torch.bfloat16):
        engine = dual.compile(x)
        engine.refresh()
        out = engine(x)
    torch.testing.assert_close(out.pruned, expected.pruned)


def test_features_of_a_module_by_its_second_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.alias = model[0]
    model.forward = lambda x: model[1](model[0](x))
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.5), features="alias")
    assert dual(torch.randn(2, 4)).features.dense.shape == (2, 4)


def test_a_numpy_seed_is_kept_as_a_number(tmp_path):
    masks = fastpie.prune(nn.Linear(4, 4), 0.5, method="random", seed=np.int64(3))
    masks.save(tmp_path / "m")
    assert fastpie.Masks.load(tmp_path / "m").info["seed"] == 3
