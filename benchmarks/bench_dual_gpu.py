"""The dual forward on a GPU: the engine against two passes of PyTorch, layer by layer and as a whole.

Everything runs in this process, on one GPU, in rounds: a round times each provider once, over
inputs that rotate among more than the L2 cache holds, by CUDA events. Every provider scores what it
computed (js and the other measures), and power and clocks are read while it runs. Before anything is
timed, each provider's outputs are held against PyTorch's in fp32.

    python -m benchmarks.bench_dual_gpu --networks resnet50 --batches 16 256

Rows of `benchmarks/results/dual-forward-<gpu>.json` with a `ratio` are comparisons; the row of
provider "fastpie" has the engine's `report`, each layer with its rate and its share of the roofline.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn

import fastpie
from benchmarks import harness, networks
from fastpie import ops
from fastpie.bench import pruned_models
from fastpie.dual.gpu.device import fp32_convolutions

WHAT = "dual-forward"
PROVIDERS = ("fastpie", "own-dense", "compile", "eager")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Largest deviation from PyTorch in fp32, relative to the largest output; see benchmarks.bench_dual.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}

# Measured on an H200 (KERNELS.md): a large copy, bytes read and written, and a large bf16 product.
BYTES_PER_SECOND = 4.3e12
FLOPS_PER_SECOND = {"bf16": 790e12, "fp16": 790e12}

ROTATION_BYTES = 512 << 20
TURN_SECONDS = 0.05

Pass = Callable[[Tensor], Any]


class Clock:
    """Seconds of work on the device, by its own events."""

    def __init__(self, device: torch.device) -> None:
        """A clock of a CUDA device; of the CPU one that reads the time of day."""
        self.device = device

    def seconds(self, work: Callable[[], Any]) -> float:
        """From before the first launch of `work` to after its last."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


class Telemetry:
    """Power and clocks of the GPU, read through NVML after each turn."""

    def __init__(self, device: torch.device) -> None:
        """Watch a device; nothing is read where NVML cannot be."""
        self.seen: dict[str, list[tuple[float, float]]] = {}
        self._handle: Any = None
        if device.type == "cuda":
            import pynvml

            try:
                pynvml.nvmlInit()
                self._handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
            except pynvml.NVMLError as error:
                _say(f"power and clocks cannot be read: {error}")

    def read(self, provider: str) -> None:
        """Note power and clock as they are now."""
        if self._handle is None:
            return
        import pynvml

        try:
            watts = pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3
            megahertz = pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM)
        except pynvml.NVMLError as error:
            _say(f"power and clocks cannot be read: {error}")
            self._handle = None
            return
        self.seen.setdefault(provider, []).append((watts, megahertz))

    def of(self, provider: str) -> dict[str, float] | None:
        """Medians over the turns of a provider."""
        if provider not in self.seen:
            return None
        watts, megahertz = zip(*self.seen[provider], strict=True)
        return {"watts": statistics.median(watts), "sm_mhz": statistics.median(megahertz)}


def scored(forward: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Pass:
    """Both models and every disagreement score."""

    def run(x: Tensor) -> Any:
        dense, pruned = forward(x)
        return ops.disagreement(dense.float(), pruned.float().unsqueeze(0))

    return run


class Contest:
    """The providers on one case.

    Attributes:
        forwards: (dense, pruned) outputs from an input, by provider.
        passes: what is timed, by name.
        seconds_to_compile: by provider.
        engine: fastpie's, where it takes part.
    """

    def __init__(
        self, case: dict[str, Any], providers: Sequence[str], device: torch.device, backend: str
    ) -> None:
        """Build and compile; the first call of each is made here."""
        self.backend = backend
        model, _ = networks.build(case["network"])
        masks = networks.masks_for(model, case["sparsity"], case["scope"], case["kind"])
        self.dual = fastpie.DualModel(model, masks)
        generator = torch.Generator().manual_seed(1)
        size = case["size"]
        self.dual.recalibrate([torch.randn(8, *size, generator=generator)])
        self.dual.eval().to(device)
        self.dtype = DTYPES[case["precision"]]
        self.batch, self.device, self.precision = case["batch"], device, case["precision"]
        each = self.batch * math.prod(size) * 4
        count = max(2, min(16, -(-ROTATION_BYTES // each))) if device.type == "cuda" else 2
        self.inputs = [
            torch.randn(self.batch, *size, generator=generator)
            .to(device)
            .contiguous(memory_format=channels_last(len(size) + 1))
            for _ in range(count)
        ]
        self.forwards: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {}
        self.passes: dict[str, Pass] = {}
        self.seconds_to_compile: dict[str, float] = {}
        self.engine: fastpie.DualEngine | None = None
        for provider in providers:
            start = time.perf_counter()
            getattr(self, "_" + provider.replace("-", "_"))()
            for run in self.passes.values():
                run(self.inputs[0])
            if device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds_to_compile[provider] = time.perf_counter() - start
            _say(f"  {provider}: ready after {self.seconds_to_compile[provider]:.1f} s")

    def _fastpie(self) -> None:
        engine = self.dual.compile(self.inputs[0], precision=self.precision, backend=self.backend)
        self.engine = engine

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            out = engine(x)
            return out.dense, out.pruned

        self.forwards["fastpie"] = forward
        self.passes["fastpie-dual"] = scored(forward)

    def _own_dense(self) -> None:
        """Twice our own dense model: what the dual form saves over the engine itself."""
        none = fastpie.prune(self.dual.model, 0.0)
        engine = fastpie.DualModel(self.dual.model, none).eval()
        compiled = engine.compile(self.inputs[0], precision=self.precision, backend=self.backend)

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            return compiled(x).dense, compiled(x).dense

        self.passes["two passes of fastpie's dense model"] = scored(forward)

    def _models(self) -> list[nn.Module]:
        """The two models as PyTorch wants them: pruned weights stored, channels-last, `dtype`."""
        form = channels_last(self.inputs[0].ndim)
        models = [copy.deepcopy(self.dual.model), *pruned_models(self.dual)]
        return [m.eval().requires_grad_(False).to(self.dtype, memory_format=form) for m in models]

    def _two(self, models: Sequence[Callable[[Tensor], Tensor]]) -> Any:
        dense, pruned = models
        dtype = self.dtype

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            x = x.to(dtype)
            # A graph's outputs lie in memory of its own, which the next replay overwrites.
            return dense(x).clone(), pruned(x).clone()

        return forward

    def _eager(self) -> None:
        self.forwards["eager"] = self._two(self._models())
        self.passes["two eager channels_last passes"] = scored(self.forwards["eager"])

    def _compile(self) -> None:
        mode = "max-autotune" if self.device.type == "cuda" else None  # with CUDA graphs
        torch._inductor.config.freezing = True  # BatchNorm folded, weights laid out for the kernels
        models = self._models()
        both = [torch.compile(m, mode=mode, dynamic=False) for m in models]
        self.forwards["compile"] = self._two(both)
        name = "two torch.compile(max-autotune) passes"
        self.passes[name] = scored(self.forwards["compile"])
        dense, dtype = both[0], self.dtype
        self.passes["one torch.compile(max-autotune) pass, not scored"] = lambda x: dense(
            x.to(dtype)
        )

    def check(self) -> dict[str, float]:
        """Each provider's deviation from PyTorch in fp32 on some images.

        Raises:
            RuntimeError: if one computes something else.
        """
        x = self.inputs[0]
        some = slice(0, min(len(x), 8))
        with fp32_convolutions(allow_tf32=False):
            want = self.dual(x[some])
        errors = {}
        for provider, forward in self.forwards.items():
            dense, pruned = forward(x)
            errors[provider] = max(
                float((got[some].float() - w).abs().max() / w.abs().max())
                for got, w in ((dense, want.dense), (pruned, want.pruned))
            )
            if not errors[provider] <= TOLERANCE[self.precision]:
                raise RuntimeError(
                    f"{provider}'s outputs differ from PyTorch's by {errors[provider]:.3g}"
                )
        return errors


def channels_last(ndim: int) -> torch.memory_format:
    """The format with channels innermost."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return formats.get(ndim, torch.contiguous_format)


@torch.no_grad()
def measure(case: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every provider on one case; rows for the results file."""
    device = torch.device(options.device)
    contest = Contest(case, options.providers, device, options.backend)
    errors = contest.check()
    clock, telemetry = Clock(device), Telemetry(device)
    turns = {}
    for name, run in contest.passes.items():
        inputs = itertools.cycle(contest.inputs)
        once = clock.seconds(lambda run=run, inputs=inputs: run(next(inputs)))
        turns[name] = (run, inputs, max(1, min(200, round(TURN_SECONDS / max(once, 1e-6)))))

    def timed(name: str) -> float:
        run, inputs, passes = turns[name]

        def turn() -> None:
            for _ in range(passes):
                run(next(inputs))

        run(next(inputs))
        seconds = clock.seconds(turn)
        telemetry.read(name)
        return seconds / passes

    with torch.no_grad():
        timings = harness.interleave(
            {name: name for name in turns}, repeats=options.repeats, seconds=options.seconds,
            timed=timed,
        )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for provider, seconds in contest.seconds_to_compile.items():
        row: dict[str, Any] = {**case, "provider": provider, "compile_seconds": seconds}
        row["deviation"] = errors.get(provider)
        if provider == "fastpie" and contest.engine is not None:
            row["report"] = with_rates(contest.engine.report(), case["precision"])
        rows.append(row)
    for name in timings:
        if name == "fastpie-dual" or "fastpie-dual" not in timings:
            continue
        rows.append(harness.row(case, timings, "fastpie-dual", name))
        rows[-1]["images_per_second"] = round(case["batch"] / timings["fastpie-dual"]["p50"])
        rows[-1]["baseline_images_per_second"] = round(case["batch"] / timings[name]["p50"])
        rows[-1]["gpu"] = {"fastpie-dual": telemetry.of("fastpie-dual"), name: telemetry.of(name)}
    return rows


def with_rates(report: list[dict[str, Any]], precision: str) -> list[dict[str, Any]]:
    """The rows of a report with what each layer reaches of the machine.

    `roofline` is the least time that the layer's bytes or multiply-adds allow over the time it took.
    A masked layer's zeros are counted: what the kernels compute.
    """
    rated = []
    for row in report:
        row = dict(row)
        if "bytes" in row:
            flops = 2 * row["multiply_adds"]
            row["gigabytes_per_second"] = round(row["bytes"] / row["seconds"] / 1e9, 1)
            row["teraflops"] = round(flops / row["seconds"] / 1e12, 2)
            if precision in FLOPS_PER_SECOND:
                least = max(row["bytes"] / BYTES_PER_SECOND, flops / FLOPS_PER_SECOND[precision])
                row["roofline"] = round(least / row["seconds"], 3)
        rated.append(row)
    return rated


def identity(row: dict[str, Any]) -> list[Any]:
    """What tells rows of the results file apart."""
    keys = ("network", "batch", "size", "precision", "sparsity", "scope", "kind", "backend")
    return [row[key] for key in keys] + [row["provider"], row.get("baseline")]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = parser.add_argument
    add("--networks", nargs="+", default=["resnet50"], choices=list(networks.NETWORKS))
    add("--batches", nargs="+", type=int, default=[16])
    add("--sparsities", nargs="+", type=float, default=[0.9])
    add("--scope", default="layer", choices=["layer", "global"])
    add("--kind", default="magnitude", choices=["magnitude", "random", "trained-like"])
    add("--precision", nargs="+", default=["bf16"], choices=list(DTYPES))
    add("--providers", nargs="+", default=PROVIDERS, choices=PROVIDERS)
    add("--repeats", type=int, default=15, help="rounds at most")
    add("--seconds", type=float, default=30.0, help="begin no round after this long, once five")
    add("--device", default="cuda")
    add("--backend", default="auto", help='of the engine; "cuda" saves minutes of compiling Triton')
    add("--out", type=Path, help="folder of the results file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure case by case; each is in the results file when it is done. The table comes last."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No GPU here: torch.cuda.is_available() is False. Nothing was measured.")
        return 1
    found: list[dict[str, Any]] = []
    for network, precision, sparsity, batch in itertools.product(
        options.networks, options.precision, options.sparsities, options.batches
    ):
        case = {
            "network": network,
            "batch": batch,
            "size": list(networks.NETWORKS[network].size),
            "precision": precision,
            "sparsity": sparsity,
            "scope": options.scope,
            "kind": options.kind,
            "backend": options.backend,
        }
        _say(", ".join(f"{key} {value}" for key, value in case.items()))
        rows = measure(case, options)
        path = harness.merge_results(WHAT, rows, identity, packages=["monai"], folder=options.out)
        _say(str(path))
        found += rows
    print_layers([row for row in found if "report" in row])
    print(f"{'network':>16} {'batch':>5} {'type':>4} {'ms':>9} {'img/s':>8} {'ratio':>6} against")
    for row in found:
        if "ratio" in row:
            print(
                f"{row['network']:>16} {row['batch']:>5} {row['precision']:>4} "
                f"{row['seconds']['p50'] * 1e3:>9.3f} {row['images_per_second']:>8} "
                f"{row['ratio']:>6} {row['baseline']}"
            )
    return 0


def print_layers(rows: Sequence[dict[str, Any]]) -> None:
    """The layers of each engine that take longest."""
    for row in rows:
        report = sorted(row["report"], key=lambda r: r["seconds"], reverse=True)
        print(f"{row['network']} at batch {row['batch']}: the layers that take longest")
        for r in report[:15]:
            print(
                f"  {r['seconds'] * 1e6:>8.1f} us {r.get('gigabytes_per_second', 0):>7.0f} GB/s "
                f"{r.get('teraflops', 0):>6.1f} TFLOP/s {r.get('roofline', 0):>5.2f} of roofline  "
                f"{r['kernel']:<28} {r['model']}: {r['layer']}"
            )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
