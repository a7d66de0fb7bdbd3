"""The command line: `fastpie prune | mine | analyze | train | report | bench | demo | doctor`.

stdout is data, stderr progress and messages. Exit codes: 0 done, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastpie.cli.analyze import analyze, report
from fastpie.cli.mine import mine
from fastpie.cli.options import (
    LADDER,
    Json,
    Method,
    Model,
    ModelArgs,
    Precision,
    Scope,
    Unpickle,
    Weights,
    load_model,
    messages,
    names,
    print_json,
    size_of,
    sparsities_of,
)
from fastpie.cli.train import train
from fastpie.errors import FastpieError

__all__ = ["main"]

app = typer.Typer(
    name="fastpie",
    help="Find the samples that a network finds hard: where its pruned self disagrees with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(mine)
app.command()(analyze)
app.command()(report)
app.command()(train)


@app.command()
def prune(
    model: Model,
    out: Annotated[Path, typer.Option(help="Masks to write, .safetensors.")],
    weights: Weights = None,
    model_args: ModelArgs = "{}",
    sparsity: Annotated[
        str | None,
        typer.Option(
            help="A fraction removed, or several with commas for a nested ladder, by default "
            f"{LADDER}; of the method 2:4 it is .5."
        ),
    ] = None,
    method: Method = Method.l1,
    scope: Scope = Scope.everywhere,
    exclude: Annotated[
        str, typer.Option(help="Modules or parameters to leave alone, with commas.")
    ] = "",
    seed: Annotated[int | None, typer.Option(help="Of the method random.")] = None,
    unpickle: Unpickle = False,
    as_json: Json = False,
) -> None:
    """Choose the weights to remove and write them as masks."""
    import fastpie

    if sparsity is None and method is not Method.two_of_four:
        sparsity = LADDER
    masks = fastpie.prune(
        load_model(model, model_args, weights, unpickle),
        None if sparsity is None else sparsities_of(sparsity),
        method=method.value,
        scope=scope.value,
        exclude=names(exclude),
        seed=seed,
    )
    masks.save(out)
    removed = [sum(level.values()) for level in masks.removed()]
    data = {
        "masks": str(out),
        "weights": masks.total,
        "sparsities": masks.sparsities,
        "removed": removed,
    }
    if as_json:
        print_json(data)
        return
    table = Table("sparsity", "weights removed", f"of {masks.total}")
    for level, count in zip(masks.sparsities, removed, strict=True):
        table.add_row(f"{level:g}", str(count), f"{count / masks.total:.4f}")
    Console().print(table)


@app.command()
def bench(
    model: Model,
    weights: Weights = None,
    model_args: ModelArgs = "{}",
    size: Annotated[
        str, typer.Option(help="Of an input: 224, 224,256 or, a volume, 96,96,96.")
    ] = "224",
    channels: Annotated[int, typer.Option(min=1, help="Of an input.")] = 3,
    sparsity: Annotated[float, typer.Option(help="Fraction removed, by magnitude.")] = 0.9,
    scope: Scope = Scope.everywhere,
    batch: Annotated[int, typer.Option(min=1, help="Images in a pass.")] = 16,
    precision: Precision = Precision.fp32,
    compile_: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Measure torch.compile too (minutes).")
    ] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds at most.")] = 15,
    seconds: Annotated[
        float, typer.Option(help="Begin no round after this long, once there are five.")
    ] = 60.0,
    layers: Annotated[int, typer.Option(min=0, help="Slowest layers to show.")] = 10,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the rates as bars: .svg, .png or .pdf.")
    ] = None,
    unpickle: Unpickle = False,
    as_json: Json = False,
) -> None:
    """Time the engine on your model, on noise, against two passes in PyTorch."""
    from fastpie._extras import load_extra
    from fastpie.bench import plot_bench, run_bench

    if plot is not None and plot.suffix not in (".svg", ".png", ".pdf"):
        raise typer.BadParameter(
            f"expected .svg, .png or .pdf, but got {plot}", param_hint="--plot"
        )
    if plot is not None:  # before the minutes of measuring
        load_extra("matplotlib.figure", "report", "a plot")
        if not plot.parent.is_dir():
            raise FastpieError(f"Expected to write {plot}, but {plot.parent} is no folder.")
    sides = size_of(size, most=3)
    result = run_bench(
        load_model(model, model_args, weights, unpickle),
        [channels, *(sides * 2 if len(sides) == 1 else sides)],
        sparsity=sparsity,
        scope=scope.value,
        batch=batch,
        precision=precision.value,
        compile=compile_,
        repeats=repeats,
        seconds=seconds,
        say=lambda message: messages.print(message, markup=False),
    )
    if plot is not None:
        plot_bench(result)[0].savefig(plot)
        messages.print(f"plot: {plot}", markup=False)
    if as_json:
        print_json(result)
        return
    _print_bench(result, layers)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path(
        "demo-run"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions to average over.")] = 3,
    as_json: Json = False,
) -> None:
    """Find wrong labels in long-tailed digits, and train again on what was mined."""
    from fastpie.demo import run_demo

    result = run_demo(out, seeds=seeds)
    if as_json:
        print_json(result)
        return
    console = Console()
    repeats = f"mean of {seeds} repetitions" if seeds > 1 else "one repetition"
    table = Table(
        "training", "accuracy, overall", "accuracy, tail classes",
        title=f"Digits, {result['samples']} training images, {result['wrong_labels']} labels wrong ({repeats})",
    )  # fmt: skip
    for row in result["accuracy"]:
        table.add_row(row["training"], f"{row['overall']:.3f}", f"{row['tail_classes']:.3f}")
    table.add_section()
    table.add_row(
        "[bold]wrong labels found by[/bold]",
        "[bold]precision at 5 %[/bold]",
        "[bold]precision at 10 %[/bold]",
    )
    for row in result["found"]:
        table.add_row(
            row["score"],
            f"{row['precision_at_5_percent']:.3f}",
            f"{row['precision_at_10_percent']:.3f}",
        )
    table.add_section()
    table.add_row("mining, images/s", f"{result['images_per_second']:.0f}", "")
    console.print(table)
    typer.echo(f"report: {result['report']}")
    typer.echo(f"table:  {result['table']}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what works on this machine, and why the rest does not."""
    from fastpie.doctor import examine

    found = examine()
    if as_json:
        print_json(found)
        return
    console = Console(highlight=False)
    table = Table("package", "version", title="Versions")
    for name, version in found["versions"].items():
        table.add_row(name, version or "not installed")
    console.print(table)
    cpu, cuda = found["cpu"], found["cuda"]
    console.print(
        f"CPU: {cpu['machine']}, {cpu['threads']} threads, kernels in use: {cpu['in_use']} "
        f"(usable: {', '.join(cpu['instruction_sets'])})"
    )
    console.print(f"CUDA kernels in this build: {cuda['kernels_for'] or 'none'}")
    for gpu in found["gpus"]:
        console.print(f"GPU: {gpu['name']}, {gpu['memory_gib']} GiB, driver {gpu['driver']}")
    if not found["gpus"]:
        console.print(f"GPU: none ({found['gpus_unreadable'] or 'NVML lists none'})", markup=False)
    table = Table("kernels", "usable", "why not", title="Kernels")
    for row in found["kernels"]:
        # A reason may name an extra, "fastpie[cudnn]", which is no markup.
        table.add_row(row["name"], "yes" if row["usable"] else "no", escape(row["reason"] or ""))
    console.print(table)


def _print_bench(result: dict[str, Any], layers: int) -> None:
    console = Console(highlight=False)
    side = "x".join(map(str, result["size"]))
    table = Table(
        "dense and pruned model, scored", "seconds", "images/s", "engine is faster by",
        title=f"{result['model']}, {result['batch']} x {side}, {result['precision']}, "
        f"{result['sparsity']:g} removed ({result['scope']}), {result['threads']} threads",
    )  # fmt: skip
    for row in result["rows"]:
        seconds = row["seconds"]["p50"]
        table.add_row(
            row["provider"],
            f"{seconds:.4g}",
            f"{row['images_per_second']:.4g}",
            f"{row['ratio']:.2f}x",
        )
    for provider, reason in result["failed"].items():
        table.add_row(provider, "failed", "", reason)
    console.print(table)
    shown = result["layers"][:layers]
    if not shown:
        return
    total = sum(row["seconds"] for row in result["layers"])
    table = Table(
        "model", "layer", "kernel", "ms", "share", "chosen over",
        title=f"Slowest {len(shown)} of {len(result['layers'])} layers",
    )  # fmt: skip
    for row in shown:
        share = row["seconds"] / total if total else 0.0
        over = ", ".join(f"{o['kernel']} {o['seconds'] * 1e3:.3f}" for o in row["over"])
        milliseconds = f"{row['seconds'] * 1e3:.3f}"
        table.add_row(row["model"], row["layer"], row["kernel"], milliseconds, f"{share:.1%}", over)
    console.print(table)


def main() -> NoReturn:
    """Entry point of the command `fastpie`."""
    try:
        app(standalone_mode=True)
    except FastpieError as error:
        messages.print(f"error: {error}", markup=False, style="red")
        sys.exit(1)
    sys.exit(0)
