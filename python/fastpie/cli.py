"""The command line: `fastpie prune | mine | report | bench | demo | doctor`.

stdout is data, stderr progress and messages. Exit codes: 0 done, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastpie.errors import FastpieError

if TYPE_CHECKING:
    from torch import nn

    from fastpie.data import ManifestDataset
    from fastpie.mining import MiningResult

__all__ = ["main"]

app = typer.Typer(
    name="fastpie",
    help="Find the samples that a network finds hard: where its pruned self disagrees with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_NOTE = "fastpie.cli"  # in run.json's `note`: how the command line opened the data
_messages = Console(stderr=True, highlight=False, soft_wrap=True)


class Task(str, Enum):
    """What the labels are."""

    multiclass = "multiclass"
    multilabel = "multilabel"


class Method(str, Enum):
    """How weights are chosen."""

    l1 = "l1"
    random = "random"


class Scope(str, Enum):
    """Over what sparsity is counted."""

    everywhere = "global"
    layer = "layer"


class Precision(str, Enum):
    """Arithmetic of the engine."""

    fp32 = "fp32"
    bf16 = "bf16"


_Model = Annotated[
    str,
    typer.Option(help="What builds the network: package.module:factory, called without arguments."),
]
_ModelArgs = Annotated[str, typer.Option(help="JSON object of keyword arguments of the factory.")]
_Weights = Annotated[
    Path | None,
    typer.Option(help="Checkpoint: .safetensors, or a file of torch.save with tensors only."),
]
_Unpickle = Annotated[
    bool, typer.Option(help="Let torch.load run code in the checkpoint. Only for files you trust.")
]
_Sparsity = Annotated[
    str, typer.Option(help="A fraction removed, or several with commas for a nested ladder.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]


@app.command()
def prune(
    model: _Model,
    out: Annotated[Path, typer.Option(help="Masks to write, .safetensors.")],
    weights: _Weights = None,
    model_args: _ModelArgs = "{}",
    sparsity: _Sparsity = "0.1,0.3,0.5,0.7",
    method: Method = Method.l1,
    scope: Scope = Scope.everywhere,
    exclude: Annotated[
        str, typer.Option(help="Modules or parameters to leave alone, with commas.")
    ] = "",
    seed: Annotated[int | None, typer.Option(help="Of the method random.")] = None,
    unpickle: _Unpickle = False,
    as_json: _Json = False,
) -> None:
    """Choose the weights to remove and write them as masks."""
    import fastpie

    masks = fastpie.prune(
        _load_model(model, model_args, weights, unpickle),
        _sparsities(sparsity),
        method=method.value,
        scope=scope.value,
        exclude=_names(exclude),
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
        _print_json(data)
        return
    table = Table("sparsity", "weights removed", f"of {masks.total}")
    for level, count in zip(masks.sparsities, removed, strict=True):
        table.add_row(f"{level:g}", str(count), f"{count / masks.total:.4f}")
    Console().print(table)


@app.command()
def mine(
    model: _Model,
    data: Annotated[
        Path,
        typer.Option(
            help="Manifest (.csv, .parquet) with a column of paths, or a folder of class folders."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Run folder; an interrupted run in it is taken up.")],
    weights: _Weights = None,
    model_args: _ModelArgs = "{}",
    masks: Annotated[
        Path | None, typer.Option(help="Masks of `fastpie prune`; else --sparsity.")
    ] = None,
    sparsity: _Sparsity = "0.1,0.3,0.5,0.7",
    root: Annotated[
        Path | None, typer.Option(help="What the manifest's paths are relative to.")
    ] = None,
    labels: Annotated[
        str, typer.Option(help="Label column; multilabel: columns with commas.")
    ] = "",
    task: Task = Task.multiclass,
    classes: Annotated[
        str, typer.Option(help="Class names in the order of the model's outputs, with commas.")
    ] = "",
    path_column: Annotated[str, typer.Option(help="Column of paths.")] = "path",
    size: Annotated[
        str, typer.Option(help="Resize to this height and width: 224 or 224,256.")
    ] = "",
    mean: Annotated[
        str, typer.Option(help="Subtracted from values in [0, 1], one or one a channel.")
    ] = "0",
    std: Annotated[str, typer.Option(help="Divided by after that.")] = "1",
    channels: Annotated[int, typer.Option(help="1 (grey) or 3 (RGB).")] = 3,
    features: Annotated[
        str, typer.Option(help="Module whose output to compare as an embedding.")
    ] = "",
    batch_size: Annotated[int, typer.Option(help="Images in a pass.")] = 64,
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = 0,
    keep_logits: Annotated[bool, typer.Option(help="Write the logits beside the scores.")] = False,
    keep_features: Annotated[
        bool, typer.Option(help="Write the features beside the scores.")
    ] = False,
    recalibrate: Annotated[
        bool, typer.Option(help="BatchNorm statistics for the pruned model.")
    ] = True,
    precision: Precision = Precision.fp32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    retry_errors: Annotated[bool, typer.Option(help="Read again what could not be read.")] = False,
    report: Annotated[bool, typer.Option(help="Write report.html when done.")] = True,
    unpickle: _Unpickle = False,
    as_json: _Json = False,
) -> None:
    """Score every image and write the table of the hardest."""
    import fastpie
    from fastpie.mining.preflight import preflight

    network = _load_model(model, model_args, weights, unpickle)
    try:
        network = network.to(device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        raise FastpieError(
            f"Expected --device to be one that torch can use, but got {device!r}: {error}"
        ) from error
    chosen = fastpie.Masks.load(masks) if masks else fastpie.prune(network, _sparsities(sparsity))
    dual = fastpie.DualModel(network, chosen, features=features or None)
    source = {
        "source": str(data.resolve()),
        "root": None if root is None else str(root.resolve()),
        "labels": _names(labels),
        "task": task.value,
        "class_names": _names(classes),
        "path_column": path_column,
        "size": _size(size),
        "mean": _numbers("--mean", mean),
        "std": _numbers("--std", std),
        "channels": channels,
    }
    dataset = _open_data(source)
    check = preflight(dual, dataset, task=task.value, recalibrate=recalibrate)
    _say_preflight(check)
    result = fastpie.mine(
        dual,
        dataset,
        out,
        task=task.value,
        batch_size=batch_size,
        num_workers=workers,
        recalibrate=recalibrate,
        keep_logits=keep_logits,
        keep_features=keep_features,
        precision=precision.value,
        retry_errors=retry_errors,
        note={_NOTE: {"data": source, "preflight": check}},
    )
    written = _write_report(result, dataset) if report else None
    _print_result(result, written, as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[
        Path | None, typer.Option(help="By default report.html in the run folder.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Write the report of a run, finished or not, with images if their files are still there."""
    import fastpie
    from fastpie.report import write_report

    result = fastpie.MiningResult(run)
    note = result.record.get("note")
    ours = note.get(_NOTE) if isinstance(note, dict) else None
    source = ours.get("data") if isinstance(ours, dict) else None
    dataset = None
    if source is not None:
        try:
            dataset = _open_data(source)
        except FastpieError as error:
            _messages.print(f"The report has no images: {error}", markup=False)
    names = None if dataset is None else dataset.class_names
    path = write_report(result, out, dataset=dataset, class_names=names)
    if as_json:
        _print_json({"report": str(path), "samples": len(result), "errors": result.errors.num_rows})
    else:
        typer.echo(path)


@app.command()
def bench(
    model: _Model,
    weights: _Weights = None,
    model_args: _ModelArgs = "{}",
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
    unpickle: _Unpickle = False,
    as_json: _Json = False,
) -> None:
    """Time the engine on your model, on noise, against two passes in PyTorch."""
    from fastpie.bench import plot_bench, run_bench
    from fastpie.report._extra import load_extra

    if plot is not None and plot.suffix not in (".svg", ".png", ".pdf"):
        raise typer.BadParameter(
            f"expected .svg, .png or .pdf, but got {plot}", param_hint="--plot"
        )
    if plot is not None:  # before the minutes of measuring
        load_extra("matplotlib.figure")
        if not plot.parent.is_dir():
            raise FastpieError(f"Expected to write {plot}, but {plot.parent} is no folder.")
    sides = _size(size, most=3)
    result = run_bench(
        _load_model(model, model_args, weights, unpickle),
        [channels, *(sides * 2 if len(sides) == 1 else sides)],
        sparsity=sparsity,
        scope=scope.value,
        batch=batch,
        precision=precision.value,
        compile=compile_,
        repeats=repeats,
        seconds=seconds,
        say=lambda message: _messages.print(message, markup=False),
    )
    if plot is not None:
        plot_bench(result)[0].savefig(plot)
        _messages.print(f"plot: {plot}", markup=False)
    if as_json:
        _print_json(result)
        return
    _print_bench(result, layers)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path(
        "demo-run"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions to average over.")] = 3,
    as_json: _Json = False,
) -> None:
    """Find wrong labels in long-tailed digits, and train again on what was mined."""
    from fastpie.demo import run_demo

    result = run_demo(out, seeds=seeds)
    if as_json:
        _print_json(result)
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
def doctor(as_json: _Json = False) -> None:
    """Say what works on this machine, and why the rest does not."""
    from fastpie.doctor import examine

    found = examine()
    if as_json:
        _print_json(found)
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


# ---------------------------------------------------------------------- what the options mean


def _load_model(factory: str, arguments: str, weights: Path | None, unpickle: bool) -> nn.Module:
    """Build the network and load its weights."""
    from torch import nn

    module_name, _, name = factory.partition(":")
    if not module_name or not name:
        raise typer.BadParameter(
            f"expected package.module:factory, but got {factory!r}", param_hint="--model"
        )
    try:
        keywords = dict(json.loads(arguments))
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(
            f"expected a JSON object, but: {error}", param_hint="--model-args"
        ) from error
    if os.getcwd() not in sys.path:  # noqa: PTH109 - sys.path holds strings
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        model = getattr(importlib.import_module(module_name), name)(**keywords)
    except Exception as error:
        raise FastpieError(
            f"Expected --model {factory} to build a network, but: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise FastpieError(
            f"Expected {factory} to return an nn.Module, but got {type(model).__name__}."
        )
    if weights is not None:
        state = _read_state(weights, unpickle)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise FastpieError(
                f"Expected the weights of {factory} in {weights}, but: {error}"
            ) from error
    else:
        _messages.print("No --weights: the network is used as the factory builds it.")
    return model.eval()


def _read_state(path: Path, unpickle: bool) -> dict[str, Any]:
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FastpieError(f"Expected a checkpoint at {path}, but there is no such file.")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise FastpieError(f"Expected safetensors in {path}, but: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=not unpickle)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        hint = "" if unpickle else " A file that you trust can be read with --unpickle."
        raise FastpieError(
            f"Expected a checkpoint of tensors in {path}, but: {error}{hint}"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise FastpieError(f"Expected a state dict in {path}, but got {type(state).__name__}.")
    return state


def _open_data(source: dict[str, Any]) -> ManifestDataset:
    from fastpie.data import ManifestDataset, Preprocessing

    labels: Any = source["labels"]
    size = source["size"]
    return ManifestDataset(
        source["source"],
        root=source["root"],
        labels=labels[0] if len(labels) == 1 and source["task"] != "multilabel" else labels or None,
        task=source["task"],
        class_names=source["class_names"] or None,
        path_column=source["path_column"],
        preprocessing=Preprocessing(
            size=(size[0], size[-1]) if size else None,
            mean=source["mean"],
            std=source["std"],
            channels=source["channels"],
        ),
    )


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in _names(text)]
    except ValueError as error:
        raise typer.BadParameter(
            f"expected numbers with commas, but got {text!r}", param_hint=option
        ) from error


def _size(text: str, most: int = 2) -> list[int]:
    values = _numbers("--size", text)
    if len(values) > most or not all(v.is_integer() and v > 0 for v in values):
        raise typer.BadParameter(
            f"expected at most {most} whole numbers above 0, but got {text!r}", param_hint="--size"
        )
    return [int(v) for v in values]


def _sparsities(text: str) -> float | list[float]:
    values = _numbers("--sparsity", text)
    return values[0] if len(values) == 1 else values


# ---------------------------------------------------------------------- what is printed


def _say_preflight(check: dict[str, Any] | None) -> None:
    if check is None:
        return
    values = ", ".join(f"{name} {value:.3f}" for name, value in check["values"].items())
    _messages.print(
        f"{check['metric']} on {check['samples']} samples: {values} (chance {check['chance']:.3f})"
    )
    if check["near_chance"]:
        _messages.print(
            f"[yellow]Warning:[/yellow] {', '.join(check['near_chance'])} near chance. Is the "
            "preprocessing (--size --mean --std --channels) that of the training, and the order of "
            "the classes (--classes) that of the model? A pruned model near chance has lost the "
            "network: use lower levels."
        )


def _write_report(result: MiningResult, dataset: ManifestDataset) -> Path | None:
    from fastpie.report import write_report

    try:
        return write_report(result, dataset=dataset, class_names=dataset.class_names)
    except FastpieError as error:
        _messages.print(f"No report: {error}", markup=False)
        return None


def _print_result(result: MiningResult, report: Path | None, as_json: bool) -> None:
    data = {
        "run": str(result.path),
        "samples": len(result),
        "errors": result.errors.num_rows,
        "hardness": result.record["hardness"],
        "hardest": result.select(0.05),
        "report": None if report is None else str(report),
    }
    if as_json:
        _print_json(data)
        return
    _messages.print(
        f"{data['samples']} samples scored, {data['errors']} in errors.parquet; the hardest 5 % "
        f"by {data['hardness']}:",
        markup=False,
    )
    for sample_id in data["hardest"]:
        typer.echo(sample_id)
    if report is not None:
        _messages.print(f"report: {report}", markup=False)


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


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2))


def main() -> NoReturn:
    """Entry point of the command `fastpie`."""
    try:
        app(standalone_mode=True)
    except FastpieError as error:
        _messages.print(f"error: {error}", markup=False, style="red")
        sys.exit(1)
    sys.exit(0)
