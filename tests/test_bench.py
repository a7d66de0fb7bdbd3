"""`fastpie bench` and what it measures with; no assertion here is about time."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastpie
from fastpie import bench
from networks import SMALL, masked_copy

RESIDUAL = next(network for network in SMALL if network.name == "residual")
MODEL = "fastpie.demo:small_resnet"
QUICK = ["--no-compile", "--batch", "2", "--repeats", "1"]


@pytest.fixture
def fastpie_cli(monkeypatch, capfd):
    def call(*arguments):
        from fastpie import cli

        monkeypatch.setattr(sys, "argv", ["fastpie", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=stop.value.code or 0, stdout=out, stderr=err)

    return call


def run(model, **keywords):
    return bench.run_bench(model, (3, 8, 8), batch=2, repeats=1, compile=False, **keywords)


def test_providers_take_turns_and_warm_up_is_not_counted():
    calls = []
    providers = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = iter([9.0, 9.0, 1.0, 5.0, 3.0, 5.0])
    timed = bench.interleave(
        providers, repeats=2, warm_up=1, timed=lambda call: (call(), next(seconds))[1]
    )
    assert calls == list("ababab")
    assert timed["a"]["p50"] == 2.0
    assert timed["b"] == {"p20": 5.0, "p50": 5.0, "p80": 5.0, "repeats": 2}


def test_rounds_stop_after_the_time_but_not_before_the_fifth():
    assert bench.interleave({"a": lambda: None}, seconds=0, repeats=9)["a"]["repeats"] == 5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_eager_passes_are_the_dense_and_the_pruned_models(precision, channels_last):
    model, (x,) = RESIDUAL.build(), RESIDUAL.inputs(2)
    masks = fastpie.prune(model, [0.5, 0.8])
    dual = fastpie.DualModel(model, masks).recalibrate([torch.randn(8, 3, 8, 8)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = dual(x)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision == "fp32" else {"rtol": 0.1, "atol": 0.1}
    models = [model, *bench.pruned_models(dual)]
    for one, want in zip(models, [expected.dense, *expected.pruned], strict=True):
        got = bench.eager_pass(one, x, precision=precision, channels_last=channels_last)()
        torch.testing.assert_close(got.float(), want, **tolerance)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype


def test_pruned_models_without_recalibration_are_masked_copies():
    model = next(network for network in SMALL if network.name == "tied").build()
    masks = fastpie.prune(model, 0.5)
    (pruned,) = bench.pruned_models(fastpie.DualModel(model, masks))
    x = torch.randn(3, 6)
    assert torch.equal(pruned(x), masked_copy(model, masks)(x))


def test_compiled_passes_are_told_apart_beyond_the_limit_of_torch_compile(monkeypatch):
    """Eleven models of one class, each with its weights; torch.compile keeps eight by default."""
    from torch._inductor import config

    torch.compiler.reset()
    monkeypatch.setattr(config, "compile_threads", 1)
    x = torch.randn(2, 3)
    models = [nn.Linear(3, 2) for _ in range(11)]
    passes = [bench.compiled_pass(model, x) for model in models]
    for model, one in zip(models, passes, strict=True):
        torch.testing.assert_close(one(), model(x))
    torch.compiler.reset()


def test_the_result_holds_rows_layers_and_json():
    result = run(RESIDUAL.build(), sparsity=0.5, scope="layer")
    result = json.loads(json.dumps(result))
    engine, eager = result["rows"]
    assert engine["provider"].startswith("fastpie engine (")
    assert engine["ratio"] == 1.0
    assert eager["provider"] == "two eager channels_last passes"
    assert eager["ratio"] == pytest.approx(eager["seconds"]["p50"] / engine["seconds"]["p50"])
    assert eager["images_per_second"] == pytest.approx(2 / eager["seconds"]["p50"])
    times = [row["seconds"] for row in result["layers"]]
    assert times == sorted(times, reverse=True)
    assert {"layer", "kernel", "seconds", "over"} <= result["layers"][0].keys()
    assert result["compile_seconds"]["engine"] > 0
    assert result["failed"] == {}


def test_a_compiler_that_fails_is_named(monkeypatch):
    def broken(*arguments, **keywords):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(bench, "compiled_pass", broken)
    said = []
    result = bench.run_bench(
        RESIDUAL.build(), (3, 8, 8), batch=1, repeats=1, compile=True, say=said.append
    )
    assert result["failed"] == {"two torch.compile passes": "RuntimeError: no C++ compiler"}
    assert any("no C++ compiler" in message for message in said)
    assert len(result["rows"]) == 2


def test_outputs_that_cannot_be_scored_are_timed_without():
    class Dictionary(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return {"maps": self.conv(x)}

    said = []
    assert len(run(Dictionary(), say=said.append)["rows"]) == 2
    assert "The outputs are no tensor [N, C, ...]: the times hold no scoring." in said


@pytest.mark.parametrize(
    ("shape", "scores"), [((2, 5), "js"), ((2, 3, 4, 4), "iou"), ((2, 3, 2, 2, 2), "iou")]
)
def test_what_is_scored_follows_from_the_output(shape, scores):
    dense, pruned = torch.randn(shape), torch.randn(shape)
    assert scores in bench.scorer(dense)(dense, pruned)
    assert scores in bench.scorer(dense)(dense.bfloat16(), pruned.bfloat16())


def test_an_input_that_the_model_refuses_is_named():
    with pytest.raises(fastpie.errors.FastpieError, match=r"tensor of shape \[2, 1, 8, 8\]"):
        bench.run_bench(RESIDUAL.build(), (1, 8, 8), batch=2, compile=False)


def test_bench_prints_a_table_and_draws(fastpie_cli, tmp_path):
    plot = tmp_path / "bars.svg"
    done = fastpie_cli(
        "bench", "--model", MODEL, "--size", "8", "--channels", "1", "--plot", plot, *QUICK
    )
    assert done.returncode == 0, done.stderr
    for text in ("two eager channels_last passes", "fastpie engine", "images/s", "Slowest"):
        assert text in done.stdout
    assert "compiling the engine" in done.stderr
    assert "<svg" in plot.read_text()


def test_bench_as_json(fastpie_cli):
    done = fastpie_cli(
        "bench", "--model", MODEL, "--size", "8,9", "--channels", "1", "--sparsity", "0.5",
        "--scope", "layer", "--json", *QUICK,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["size"] == [1, 8, 9]
    assert (result["sparsity"], result["scope"], result["batch"]) == (0.5, "layer", 2)
    assert len(result["rows"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--size", "8,8,8,8"], 2, "at most 3 whole numbers"),
        (["--plot", "bars.txt"], 2, "expected .svg, .png or .pdf"),
        (["--batch", "0"], 2, "greater than or equal to 1"),
        (["--size", "8", "--channels", "2"], 1, "Expected a model that takes a tensor of shape"),
        (["--size", "8", "--channels", "1", "--sparsity", "1.5"], 1, "sparsity"),
        (
            ["--size", "8", "--channels", "1", "--plot", "no/such/folder.svg"],
            1,
            "no/such is no folder",
        ),
    ],
)
def test_bad_usage_of_bench(fastpie_cli, arguments, code, message):
    done = fastpie_cli("bench", "--model", MODEL, "--no-compile", "--repeats", "1", *arguments)
    assert done.returncode == code
    assert message in " ".join(done.stderr.replace("│", " ").split())
