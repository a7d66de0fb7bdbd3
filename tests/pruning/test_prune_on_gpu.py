"""`fastpie.prune` through the operator that selects where the weights lie, against NumPy."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import fastpie
from fastpie import FastpieError
from networks import PlainCNN, TiedWeights


def models_with_ties() -> list[nn.Module]:
    """Several dtypes and memory layouts, weights that repeat, empty and tied ones."""
    cnn = PlainCNN().to(memory_format=torch.channels_last)
    empty = nn.Linear(20, 1)
    empty.weight = nn.Parameter(torch.zeros(0, 20))
    mixed = nn.Sequential(nn.Linear(30, 20), empty, nn.Conv2d(20, 7, 3).half())
    mixed.append(nn.Linear(9, 4).bfloat16())
    models: list[nn.Module] = [PlainCNN(), cnn, mixed, TiedWeights(), nn.Linear(1, 1)]
    with torch.no_grad():
        for model in models[1:]:
            for parameter in model.parameters():
                parameter.copy_((parameter * 40).round() / 40)
    return models


@pytest.fixture
def _by_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the way through the operator on the CPU, which computes its twin there."""
    module = importlib.import_module("fastpie.pruning.prune")
    monkeypatch.setattr(module, "_all_on_one_gpu", lambda _: True)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, [0.0, 0.2, 0.5, 0.501, 0.97]])
def test_the_operator_gives_the_masks_that_numpy_gives(
    sparsity: float | list[float], scope: str, request: pytest.FixtureRequest
) -> None:
    models = models_with_ties()
    want = [fastpie.prune(model, sparsity, scope=scope) for model in models]
    request.getfixturevalue("_by_operator")
    for model, masks in zip(models, want, strict=True):
        got = fastpie.prune(model, sparsity, scope=scope)
        assert got == masks
        assert got.info == masks.info
        assert all(code.device.type == "cpu" for code in got.levels.values())


@pytest.mark.usefixtures("_by_operator")
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_operator_refuses_weights_that_are_not_finite_by_name(scope: str) -> None:
    model = PlainCNN()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0] = float("nan")
    message = rf"`conv2\.weight` holds 3 NaN or infinite of {model.conv2.weight.numel()}"
    with pytest.raises(FastpieError, match=message):
        fastpie.prune(model, 0.0, scope=scope)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.37, [0.0, 0.2, 0.5, 0.501, 0.97]])
@pytest.mark.parametrize("method", ["l1", "random"])
def test_masks_of_a_model_on_a_gpu_are_those_on_the_cpu(
    method: str, sparsity: float | list[float], scope: str
) -> None:
    for model in [*models_with_ties(), PlainCNN().double()]:
        want = fastpie.prune(model, sparsity, scope=scope, method=method, seed=4)
        got = fastpie.prune(model.cuda(), sparsity, scope=scope, method=method, seed=4)
        assert got == want
        assert got.info == want.info
