"""`fastpie bench`: the engine on the user's own model, against two passes of PyTorch.

`interleave` and the passes are also what `benchmarks/` measures with.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fastpie.dual import DualModel
from fastpie.errors import FastpieError
from fastpie.pruning import prune
from fastpie.scores import disagreement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "compiled_pass", "eager_pass", "interleave", "plot_bench", "pruned_models", "run_bench", "scorer",
]  # fmt: skip

Pass = Callable[[], Any]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_MOST_COMPILED = 64  # modules of one class that torch.compile keeps apart; its default is 8


def wall_clock(call: Pass) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(
    providers: Mapping[str, Pass],
    *,
    repeats: int = 15,
    seconds: float = 10.0,
    warm_up: int = 2,
    timed: Callable[[Pass], float] = wall_clock,
) -> dict[str, dict[str, float]]:
    """Time each provider `repeats` times in turn, so that a noisy moment hits all alike.

    Args:
        providers: by name, what to call.
        repeats: rounds.
        seconds: stop after this long once five rounds are done.
        warm_up: rounds that do not count.
        timed: makes a call and says how many seconds it took.

    Returns:
        For each provider p20, p50 and p80 in seconds and the number of repeats.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    begin = time.perf_counter()
    for round_ in range(warm_up + repeats):
        if round_ >= warm_up + 5 and time.perf_counter() - begin > seconds:
            break
        for name, call in providers.items():
            took = timed(call)
            if round_ >= warm_up:
                times[name].append(took)
    return {
        name: {
            **{f"p{q}": float(np.percentile(values, q)) for q in (20, 50, 80)},
            "repeats": len(values),
        }
        for name, values in times.items()
    }


def pruned_models(dual: DualModel) -> list[nn.Module]:
    """The pruned model of each level as a model of its own: masked weights, own statistics."""
    models = []
    for level in range(len(dual.sparsities)):
        model = copy.deepcopy(dual.model).eval()
        tensors = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        with torch.no_grad():
            for name, value in dual.pruned_state(level).items():
                tensors[name].copy_(value)
        models.append(model)
    return models


def eager_pass(
    model: nn.Module, x: Tensor, *, precision: str = "fp32", channels_last: bool = True
) -> Pass:
    """One pass of a private copy of `model` over `x`, without gradients.

    bf16 is a model and an input of that type: no slower than autocast, which casts the weights
    again in every pass.
    """
    model, x = _prepared(model, x, precision, channels_last)

    def run() -> Any:
        with torch.no_grad():
            return model(x)

    return run


def compiled_pass(
    model: nn.Module,
    x: Tensor,
    *,
    precision: str = "fp32",
    options: Mapping[str, Any] | None = None,
) -> Pass:
    """One pass of a private copy of `model` by torch.compile: frozen weights, channels last.

    Args:
        model: left as it is.
        x: the input, of the only shape that is compiled for.
        precision: "fp32", or "bf16" for a model and an input of that type.
        options: more of `torch._inductor.config`, such as max_autotune.
    """
    from torch._dynamo import config as dynamo_config
    from torch._inductor import config as inductor_config

    model, x = _prepared(model, x, precision, channels_last=True)
    compiled = torch.compile(model, dynamic=False)
    # Behind the limit torch.compile would run eagerly, and say so in a log only.
    limit: dict[str, Any] = {"recompile_limit": _MOST_COMPILED, "fail_on_recompile_limit_hit": True}
    with (
        torch.no_grad(),
        inductor_config.patch({"freezing": True, **(options or {})}),
        dynamo_config.patch(limit),
    ):
        compiled(x)

    def run() -> Any:
        with torch.no_grad():
            return compiled(x)

    return run


def scorer(output: Any, task: str | None = None) -> Callable[[Any, Any], Any]:
    """What scores a dense and a pruned output: `fastpie.disagreement` where it applies.

    Args:
        output: of the dense model. A tensor `[N, C]` is scored as multiclass, a larger one as a
            segmentation; anything else is not scored.
        task: of `disagreement`, in place of that.
    """
    if not isinstance(output, Tensor) or output.ndim < 2:
        return lambda dense, pruned: None
    chosen = task or ("multiclass" if output.ndim == 2 else "segmentation")
    return lambda dense, pruned: disagreement(dense.float(), pruned.float(), task=chosen)


def run_bench(
    model: nn.Module,
    size: Sequence[int],
    *,
    sparsity: float = 0.9,
    scope: str = "global",
    batch: int = 16,
    precision: str = "fp32",
    compile: bool = True,
    repeats: int = 15,
    seconds: float = 60.0,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Measure the engine against two passes in PyTorch, on noise, repeats interleaved.

    Args:
        model: any network of one input; it is left as it is.
        size: [channels, ...] of one input.
        sparsity: fraction removed by magnitude.
        scope: "global" or "layer".
        batch: images in a pass.
        precision: "fp32" or "bf16".
        compile: measure torch.compile too, which takes a minute or two to compile.
        repeats: at most; 5 at least.
        seconds: no further round is begun after this long.
        say: told what happens.

    Returns:
        What was measured: `rows`, each with provider, seconds (p20, p50, p80, repeats),
        images_per_second and ratio (its time over the engine's); `layers` of `engine.report()`,
        slowest first; `compile_seconds`; `failed` with the reason of what could not run.

    Raises:
        FastpieError: if the model does not take such an input or cannot be pruned.
    """
    if batch < 1:
        raise FastpieError(f"Expected a batch of at least 1, but got {batch}.")
    model = model.eval()
    x = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
    dual = DualModel(model, prune(model, sparsity, scope=scope))
    try:
        with torch.no_grad():
            output = model(x)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise FastpieError(
            f"Expected a model that takes a tensor of shape {list(x.shape)}, but: {error}"
        ) from error
    score = scorer(output)
    if score(output, output) is None:
        say("The outputs are no tensor [N, C, ...]: the times hold no scoring.")
    say("compiling the engine")
    start = time.perf_counter()
    engine = dual.compile(x, precision=precision)
    compile_seconds = {"engine": time.perf_counter() - start}
    ours = f"fastpie engine ({engine.backend})"

    def run_engine() -> None:
        out = engine(x)
        score(out.dense, out.pruned)

    providers: dict[str, Pass] = {ours: run_engine}
    failed: dict[str, str] = {}
    models = [model, *pruned_models(dual)]
    providers["two eager channels_last passes"] = _two(
        [eager_pass(m, x, precision=precision) for m in models], score
    )
    if compile:
        name = "two torch.compile passes"
        say("compiling with torch.compile")
        start = time.perf_counter()
        try:
            passes = [compiled_pass(m, x, precision=precision) for m in models]
        except Exception as error:  # whatever a compiler of another project raises
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            say(f"torch.compile failed: {failed[name]}")
        else:
            compile_seconds["torch.compile"] = time.perf_counter() - start
            providers[name] = _two(passes, score)
    say("measuring")
    timings = interleave(providers, repeats=repeats, seconds=seconds)
    report = sorted(engine.report(), key=lambda row: -row["seconds"])
    return {
        "model": type(model).__name__,
        "size": list(size),
        "batch": batch,
        "precision": precision,
        "sparsity": sparsity,
        "scope": scope,
        "threads": torch.get_num_threads(),
        "backend": engine.backend,
        "compile_seconds": compile_seconds,
        "rows": [
            {
                "provider": name,
                "seconds": timing,
                "images_per_second": batch / timing["p50"],
                "ratio": timing["p50"] / timings[ours]["p50"],
            }
            for name, timing in timings.items()
        ],
        "layers": report,
        "failed": failed,
    }


def plot_bench(result: dict[str, Any], *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Bars of the images a second of each provider of `run_bench`; needs `fastpie[report]`.

    Args:
        result: of `run_bench`.
        ax: to draw on; by default a new figure.
    """
    from fastpie._extras import load_extra
    from fastpie.report.drawing import DENSE, PRUNED

    if ax is None:
        figure = load_extra("matplotlib.figure", "report", "a plot").Figure(
            figsize=(7, 2.4), layout="constrained"
        )
        ax = figure.add_subplot()
        ax.spines[["top", "right"]].set_visible(False)
    rows = result["rows"]
    rates = [row["images_per_second"] for row in rows]
    bars = ax.barh(range(len(rows)), rates, color=[PRUNED] + [DENSE] * (len(rows) - 1))
    ax.bar_label(
        bars, [f"{rate:.4g}" if rate < 1000 else f"{rate:,.0f}" for rate in rates], padding=4
    )
    ax.set_yticks(range(len(rows)), [row["provider"] for row in rows])
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set(
        xlabel="images per second, both models",
        title=f"{result['model']}, batch {result['batch']}, {result['precision']}, "
        f"{result['sparsity']:.0%} removed",
    )
    return ax.get_figure(root=True), ax  # type: ignore[return-value]


def _two(passes: Sequence[Pass], score: Callable[[Any, Any], Any]) -> Pass:
    def run() -> None:
        dense, pruned = (one() for one in passes)
        score(dense, pruned)

    return run


def _prepared(
    model: nn.Module, x: Tensor, precision: str, channels_last: bool
) -> tuple[nn.Module, Tensor]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = copy.deepcopy(model).eval().requires_grad_(False).to(dtype=dtype)
    x = x.to(dtype)
    layout = _CHANNELS_LAST.get(x.ndim)
    if channels_last and layout is not None:
        # Module.to(memory_format) refuses 5 dimensions to 4-dimensional weights, so by hand.
        for parameter in model.parameters():
            if parameter.ndim == x.ndim:
                parameter.data = parameter.data.contiguous(memory_format=layout)
        x = x.contiguous(memory_format=layout)
    return model, x
