"""The systems that the engine is measured against, each at its best setting.

Every function here opens one of them inside a worker process (`benchmarks/worker.py`), from the files
that `bench_dual` left in a folder: `dual.pt` (both models), `x.npy`, and `dense.onnx`, `pruned.onnx`
for those that read ONNX. Every two-pass provider includes `fastpie.disagreement`, but DeepSparse,
whose Python has no torch.

What was tried (torch 2.13, OpenVINO 2026.4, ONNX Runtime 1.31, DeepSparse 1.8; ResNet-18 at 224,
batch 1 and 4, one Zen 4 core; differences below 2 % called none):

- eager: contiguous and channels_last are providers of their own. bf16 as a model and input of
  that type; autocast casts the weights again in every pass.
- torch.compile: `freezing`, channels_last, no gradients, static shape. Against no freezing: none.
  `max_autotune` and `cpp_wrapper`: none at batch 4; at batch 1 up to 10 % in bf16, for a longer
  compile: the provider "compile-autotune". bf16 as a type against autocast: 2 to 3 % faster, and
  compiles in a third of the time.
- ONNX Runtime: all optimisations, as many threads as torch. It has no bf16 on CPUs.
- OpenVINO: hints "latency" (one request on all cores) and "throughput" (two requests of half the
  batch side by side); what is faster at the batch at hand is taken, by timing when it is opened.
  `INFERENCE_PRECISION_HINT` f32 or bf16 explicitly: left alone it takes bf16 where the processor has it.
- DeepSparse: opens no ONNX file of IR 10, which torch's present exporter writes: the models are
  exported by the TorchScript exporter, opset 13. No bf16.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.worker import Provider, serve
from fastpie.bench import Pass, compiled_pass, eager_pass, pruned_models, scorer
from fastpie.dual import DualEngine, DualModel

__all__ = ["OPENERS", "environment", "export", "pruned_alone"]

_AUTOTUNE = {"max_autotune": True, "cpp_wrapper": True}


def environment(peer: str, folder: Path) -> dict[str, str]:
    """Where a worker's compilers keep what they have compiled; and a better setting of PyTorch."""
    found = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "FASTPIE_CACHE_DIR": str(folder / "fastpie"),
        "XDG_CACHE_HOME": str(folder / "xdg"),
    }
    if peer.startswith(("eager", "compile")):  # huge pages: an eager pass takes 9 % less
        found["THP_MEM_ALLOC_ENABLE"] = "1"
    return found


def pruned_alone(engine: DualEngine, x: Tensor) -> float:
    """Seconds of the pruned model's pass alone: the sum of its kernel calls in one run."""
    rows = engine.report()
    return sum(row["seconds"] for row in rows if row["model"].startswith("pruned"))


def open_fastpie(spec: dict[str, Any]) -> Provider:
    """The engine."""
    dual, x = _load(spec)
    seconds, engine = _timed(
        lambda: dual.compile(x, precision=spec["precision"], backend=spec["backend"])
    )
    first, out = _timed(lambda: engine(x))
    score = scorer(out.dense, spec["task"])

    def both() -> None:
        out = engine(x)
        score(out.dense, out.pruned)

    alone: dict[str, Callable[[], float]] = {}
    if pruned_alone(engine, x) is not None:
        alone["fastpie-pruned"] = lambda: pruned_alone(engine, x) or 0.0
    return Provider(
        modes={
            "fastpie-dual": both,
            "fastpie-scoring": lambda: score(out.dense, out.pruned),
        },
        outputs=lambda: {"dense": _array(out.dense), "pruned": _array(out.pruned)},
        compile_seconds=seconds + first,
        setting=f"backend {engine.backend}",
        measured=alone,
        report=engine.report,
    )


def open_eager(spec: dict[str, Any], *, channels_last: bool) -> Provider:
    """PyTorch as it is."""
    layout = "channels_last" if channels_last else "contiguous"

    def make(model: torch.nn.Module, x: Tensor) -> Pass:
        return eager_pass(model, x, precision=spec["precision"], channels_last=channels_last)

    return _of_torch(spec, make, f"eager {layout}")


def open_compiled(spec: dict[str, Any], *, autotune: bool) -> Provider:
    """torch.compile."""

    def make(model: torch.nn.Module, x: Tensor) -> Pass:
        options = _AUTOTUNE if autotune else None
        return compiled_pass(model, x, precision=spec["precision"], options=options)

    return _of_torch(spec, make, "torch.compile" + (" max-autotune" if autotune else ""))


def open_onnxruntime(spec: dict[str, Any]) -> Provider:
    """ONNX Runtime."""
    import onnxruntime

    _refuse_bf16(spec, "ONNX Runtime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = spec["threads"]
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    x = np.load(Path(spec["folder"]) / "x.npy")

    def make(path: Path) -> Callable[[], np.ndarray]:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        name = session.get_inputs()[0].name
        return lambda: session.run(None, {name: x})[0]

    setting = f"version {onnxruntime.__version__}, all optimisations"
    return _of_onnx(spec, make, "ONNX Runtime")._replace(setting=setting)


def open_openvino(spec: dict[str, Any]) -> Provider:
    """OpenVINO, with the faster of its two hints."""
    import openvino

    core = openvino.Core()
    x = np.load(Path(spec["folder"]) / "x.npy")
    config = {
        "INFERENCE_PRECISION_HINT": "bf16" if spec["precision"] == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": spec["threads"],
    }

    def latency(path: Path) -> Callable[[], np.ndarray]:
        compiled = core.compile_model(path, "CPU", {**config, "PERFORMANCE_HINT": "LATENCY"})
        request = compiled.create_infer_request()
        return lambda: request.infer([x], share_inputs=True)[0]

    def throughput(path: Path) -> Callable[[], np.ndarray]:
        half = len(x) // 2
        model = core.read_model(path)
        model.reshape([half, *x.shape[1:]])
        compiled = core.compile_model(
            model,
            "CPU",
            {**config, "PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": 2},
        )
        requests = [compiled.create_infer_request() for _ in range(2)]
        parts = [np.ascontiguousarray(part) for part in (x[:half], x[half:])]

        def run() -> np.ndarray:
            for request, part in zip(requests, parts, strict=True):
                request.start_async([part], share_inputs=True)
            for request in requests:
                request.wait()
            return np.concatenate([r.get_output_tensor(0).data for r in requests])

        return run

    path = Path(spec["folder"]) / "dense.onnx"
    choices = {"latency": latency}
    if len(x) % 2 == 0 and spec["threads"] > 1:
        choices["throughput"] = throughput
    if len(choices) == 1:
        chosen = "latency"
    else:
        times = {}
        for name, make in choices.items():
            run = make(path)
            run()
            times[name] = min(_timed(run)[0] for _ in range(4))
        chosen = min(times, key=lambda name: times[name])
    provider = _of_onnx(spec, choices[chosen], "OpenVINO")
    return provider._replace(setting=f"version {openvino.__version__}, hint {chosen}")


def export(folder: Path) -> None:
    """Write dense.onnx and pruned.onnx from dual.pt and x.npy."""
    dual, x = _load({"folder": str(folder)})
    for name, model in zip(("dense", "pruned"), (dual.model, *pruned_models(dual)), strict=True):
        torch.onnx.export(
            model,
            (x,),
            str(folder / f"{name}.onnx"),
            dynamo=False,
            opset_version=13,
            input_names=["x"],
            output_names=["y"],
        )


OPENERS: dict[str, Callable[[dict[str, Any]], Provider]] = {
    "fastpie": open_fastpie,
    "compile": functools.partial(open_compiled, autotune=False),
    "compile-autotune": functools.partial(open_compiled, autotune=True),
    "eager": functools.partial(open_eager, channels_last=True),
    "eager-contiguous": functools.partial(open_eager, channels_last=False),
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
}


def _load(spec: dict[str, Any]) -> tuple[DualModel, Tensor]:
    folder = Path(spec["folder"])
    dual: DualModel = torch.load(folder / "dual.pt", weights_only=False)  # written by bench_dual
    return dual.eval(), torch.from_numpy(np.load(folder / "x.npy"))


def _of_torch(
    spec: dict[str, Any], make: Callable[[torch.nn.Module, Tensor], Pass], name: str
) -> Provider:
    dual, x = _load(spec)
    is_ladder = dual.is_ladder
    models = [dual.model, *pruned_models(dual)]
    del dual
    passes: list[Pass] = []

    def compile_all() -> Any:
        while models:  # a source goes when its private copy is made: memory is that of the passes
            passes.append(make(models.pop(0), x))
        outputs = [one() for one in passes]
        return outputs[0]

    seconds, output = _timed(compile_all)
    score = scorer(output, spec["task"])

    def both() -> tuple[Any, Any]:
        dense, *pruned = (one() for one in passes)
        levels = torch.stack(pruned) if is_ladder else pruned[0]
        score(dense, levels)
        return dense, levels

    def outputs() -> dict[str, np.ndarray]:
        dense, pruned = both()
        return {"dense": _array(dense), "pruned": _array(pruned)}

    count = "two" if len(passes) == 2 else str(len(passes))
    return Provider(
        modes={f"{count} {name} passes": both, f"one {name} pass": passes[0]},
        outputs=outputs,
        compile_seconds=None if name.startswith("eager") else seconds,
        setting="THP_MEM_ALLOC_ENABLE=1",
    )


def _of_onnx(
    spec: dict[str, Any], make: Callable[[Path], Callable[[], np.ndarray]], name: str
) -> Provider:
    folder = Path(spec["folder"])
    passes: dict[str, Callable[[], np.ndarray]] = {}

    def compile_all() -> np.ndarray:
        for kind in ("dense", "pruned"):
            passes[kind] = make(folder / f"{kind}.onnx")
        outputs = [one() for one in passes.values()]
        return outputs[0]

    seconds, output = _timed(compile_all)
    score = scorer(torch.from_numpy(output), spec["task"])

    def both() -> None:
        dense, pruned = (torch.from_numpy(one()) for one in passes.values())
        score(dense, pruned)

    return Provider(
        modes={
            f"two {name} passes": both,
            f"one {name} pruned pass": passes["pruned"],
        },
        outputs=lambda: {kind: one() for kind, one in passes.items()},
        compile_seconds=seconds,
    )


def _array(output: Tensor) -> np.ndarray:
    return output.float().numpy()


def _refuse_bf16(spec: dict[str, Any], name: str) -> None:
    if spec["precision"] == "bf16":
        raise ValueError(f"{name} has no bf16 on CPUs")


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def main(arguments: Sequence[str]) -> None:
    """`export FOLDER` or `serve PROVIDER`."""
    what, name = arguments
    if what == "export":
        export(Path(name))
    else:
        serve(OPENERS[name])


if __name__ == "__main__":
    main(sys.argv[1:])
