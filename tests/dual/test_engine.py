"""`DualModel.compile(backend="reference")`: a snapshot that gives what DualModel gives."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import fastpie
from fastpie import DualModel, FastpieError
from networks import SMALL, Network, TiedWeights

LADDER = [0.2, 0.5, 0.9]
NOT_CAPTURED = {"control_flow"}
small = pytest.mark.parametrize("network", SMALL, ids=lambda n: n.name)


def by_name(name: str) -> Network:
    return next(n for n in SMALL if n.name == name)


def compiled(network: Network, sparsity: Any = 0.5, batch: int = 4, **kwargs: Any) -> tuple:
    model, x = network.build(), network.inputs(batch)
    dual = DualModel(model, fastpie.prune(model, sparsity))
    lowered = kwargs.get("backend", "auto") != "reference"
    warned = lowered and network.name in NOT_CAPTURED
    with pytest.warns(UserWarning, match="runs as DualModel") if warned else nullcontext():
        return dual, x, dual.compile(x if len(x) > 1 else x[0], **kwargs)


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    assert pytree.tree_structure(got) == pytree.tree_structure(want)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        if a is not None:
            torch.testing.assert_close(a, b.detach(), rtol=tolerance, atol=tolerance)


@small
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_engine_gives_what_the_dual_model_gives(network: Network, backend: str) -> None:
    dual, x, engine = compiled(network, LADDER, backend=backend)
    captured = backend != "reference" and network.name not in NOT_CAPTURED
    assert engine.backend == ("cpu" if captured else "reference")
    assert engine.batch == 4
    for inputs in (x, network.inputs(4)):
        out = engine(*inputs)
        assert_close(out, dual(*inputs))
        assert not any(t.requires_grad for t in pytree.tree_leaves(out[:2]))


@small
def test_all_ones_masks_give_the_same_bits(network: Network) -> None:
    for precision in ("fp32", "bf16"):
        _, x, engine = compiled(network, 0.0, precision=precision)
        out = engine(*x)
        assert_close(out.pruned, out.dense, tolerance=0)


def test_engine_runs_in_eval_mode_and_leaves_the_model_in_its_own() -> None:
    network = by_name("dropout")
    model, x = network.build().train(), network.inputs()
    dual = DualModel(model, fastpie.prune(model, 0.5))
    engine = dual.compile(*x)
    assert model.training
    assert_close(engine(*x), engine(*x), tolerance=0)
    assert_close(engine(*x), dual.eval()(*x))


def test_compiling_leaves_weights_statistics_and_random_state_as_they_were() -> None:
    network = by_name("residual")
    model, x = network.build().train(), network.inputs()
    dual = DualModel(model, fastpie.prune(model, 0.5))
    before = {k: v.clone() for k, v in dual.model.state_dict().items()}
    state = torch.get_rng_state()
    dual.compile(*x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(dual.model.state_dict()[k], v) for k, v in before.items())
    assert all(p.requires_grad for p in model.parameters())


def test_engine_is_a_snapshot_until_it_is_refreshed() -> None:
    dual, x, engine = compiled(by_name("residual"))
    before = engine(*x)
    with torch.no_grad():
        for parameter in dual.model.parameters():
            parameter.add_(0.05)
    dual.recalibrate([x[0] + 1])
    assert_close(engine(*x), before, tolerance=0)
    engine.refresh()
    assert_close(engine(*x), dual(*x))
    assert not torch.allclose(engine(*x).dense, before.dense)


def test_refresh_takes_new_masks() -> None:
    dual, x, engine = compiled(by_name("plain"), LADDER)
    other = fastpie.prune(dual.model, LADDER, method="random", seed=2)
    engine.refresh(other)
    assert_close(engine(*x), DualModel(dual.model, other)(*x))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (lambda model: fastpie.prune(TiedWeights(), 0.5), "made for"),
        (lambda model: fastpie.prune(model, 0.7), "levels"),
        (lambda model: fastpie.prune(model, [0.5]), "levels"),
    ],
    ids=["another_model", "other_level", "ladder"],
)
def test_masks_that_do_not_fit_are_refused_and_the_engine_goes_on(masks: Any, message: str) -> None:
    dual, x, engine = compiled(by_name("plain"))
    before = engine(*x)
    with pytest.raises(FastpieError, match=message):
        engine.refresh(masks(dual.model))
    assert_close(engine(*x), before, tolerance=0)


@pytest.mark.parametrize("batch", [0, 1, 3, 4])
def test_smaller_batches_are_taken(batch: int) -> None:
    network = by_name("residual")
    dual, _, engine = compiled(network, LADDER)
    x = network.inputs(batch)
    assert_close(engine(*x), dual(*x))


def test_larger_batches_and_other_numbers_of_inputs_are_refused() -> None:
    network = by_name("several_inputs")
    _, x, engine = compiled(network)
    with pytest.raises(FastpieError, match=r"at most 4.*5"):
        engine(*network.inputs(5))
    with pytest.raises(FastpieError, match=r"2 inputs.*1"):
        engine(x[0])


def test_outputs_are_fresh_tensors() -> None:
    for sparsity in (0.5, LADDER):
        _, x, engine = compiled(by_name("dict_output"), sparsity)
        first = engine(*x)
        kept = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, first)
        for leaf in pytree.tree_leaves(engine(*x)[:2]):
            leaf.fill_(7.0)
        assert_close(first, kept, tolerance=0)
        assert_close(engine(*x), kept, tolerance=0)


def test_features_come_out_of_the_engine() -> None:
    network = by_name("plain")
    model, x = network.build(), network.inputs()
    dual = DualModel(model, fastpie.prune(model, LADDER), features="conv2")
    engine = dual.compile(*x)
    out = engine(*x)
    assert_close(out, dual(*x))
    assert out.features.pruned.shape[:2] == (3, 4)


def test_report_has_a_row_for_each_pass() -> None:
    _, _, engine = compiled(by_name("plain"), LADDER, backend="reference")
    rows = engine.report()
    assert len(rows) == 4
    for row in rows:
        assert set(row) >= {"layer", "kernel", "seconds", "over"}
        assert row["seconds"] > 0
    for sparsity in LADDER:
        assert any(str(sparsity) in row["layer"] for row in rows)


@small
def test_bf16_engine_is_near_the_model_in_fp32(network: Network) -> None:
    dual, x, engine = compiled(network, precision="bf16")
    got, want = engine(*x), dual(*x)
    for a, b in zip(pytree.tree_leaves(got[:2]), pytree.tree_leaves(want[:2]), strict=True):
        assert (a.float() - b).abs().max() <= 0.1 * b.abs().max()


def test_bf16_engine_computes_in_bf16() -> None:
    for backend in ("cpu", "reference"):
        dual, x, engine = compiled(by_name("plain"), precision="bf16", backend=backend)
        assert engine(*x).dense.dtype is torch.float32
        assert not torch.allclose(engine(*x).dense, dual(*x).dense, rtol=1e-5)


def test_fp32_engine_computes_in_fp32_whatever_autocast_is_on() -> None:
    dual, x, engine = compiled(by_name("plain"))
    want = dual(*x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(engine(*x), want)


class NoisyEval(nn.Module):
    """Monte-Carlo dropout: draws random numbers in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(self.layer(x), 0.5, training=True)


def test_a_model_that_draws_in_eval_mode_draws_the_same_for_both_models() -> None:
    model, x = NoisyEval().eval(), torch.randn(5, 6)
    with pytest.warns(UserWarning, match="dropout"):
        engine = DualModel(model, fastpie.prune(model, [0.0, 0.5])).compile(x)
    out = engine(x)
    assert torch.equal(out.dense, out.pruned[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tpu"}, "backend.*tpu"),
        ({"backend": "cuda"}, "backend.*cuda"),
        ({"precision": "fp8"}, "precision.*fp8"),
        ({"precision": torch.float32}, "precision"),
    ],
)
def test_unknown_backends_and_precisions_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(FastpieError, match=message):
        compiled(by_name("plain"), **arguments)


def test_an_example_without_a_tensor_is_refused() -> None:
    model = by_name("plain").build()
    with pytest.raises(FastpieError, match="tensor"):
        DualModel(model, fastpie.prune(model, 0.5)).compile(3)
