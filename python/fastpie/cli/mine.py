"""`fastpie mine`, alone or under torchrun."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastpie.cli.data import NOTE, open_data
from fastpie.cli.options import (
    LADDER,
    Json,
    Model,
    ModelArgs,
    Precision,
    Sparsity,
    Unpickle,
    load_model,
    load_weights,
    messages,
    names,
    numbers,
    print_json,
    size_of,
    sparsities_of,
)
from fastpie.cli.processes import torchrun
from fastpie.errors import FastpieError

if TYPE_CHECKING:
    from torch import Tensor

    import fastpie
    from fastpie.data import ManifestDataset
    from fastpie.mining import MiningResult

__all__ = ["STAGES", "mine"]

_GIB = 2**30
_IMAGES_TRIED = 256
STAGES = "stages"
"""As `--features`: those of the early stages."""


class Task(str, Enum):
    """What the labels are."""

    multiclass = "multiclass"
    multilabel = "multilabel"


class Log(str, Enum):
    """Where the figures of a run go."""

    csv = "csv"
    tensorboard = "tensorboard"


def mine(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(
            help="Manifest (.csv, .parquet), folder of class folders, tar shards, or a data set's own "
            "label files; see --format."
        ),
    ],
    out: Annotated[
        str, typer.Option(help="Run folder or URL; an interrupted run in it is taken up.")
    ],
    weights: Annotated[
        list[Path] | None,
        typer.Option(
            help="Checkpoint: .safetensors, or a file of torch.save with tensors only. Several (of "
            "several seeds) are mined in one pass."
        ),
    ] = None,
    model_args: ModelArgs = "{}",
    masks: Annotated[
        Path | None, typer.Option(help="Masks of `fastpie prune`; else --sparsity.")
    ] = None,
    sparsity: Sparsity = LADDER,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="auto, table, folder, webdataset, huggingface, nih, cxr-lt, chexpert or isic.",
        ),
    ] = "auto",
    root: Annotated[
        Path | None, typer.Option(help="What the manifest's paths are relative to.")
    ] = None,
    labels: Annotated[
        str, typer.Option(help="Label column; multilabel: columns with commas.")
    ] = "",
    task: Annotated[
        Task | None, typer.Option(help="By default that of the data set, of a table multiclass.")
    ] = None,
    classes: Annotated[
        str, typer.Option(help="Class names in the order of the model's outputs, with commas.")
    ] = "",
    path_column: Annotated[str, typer.Option(help="Column of paths.")] = "path",
    uncertain: Annotated[
        str, typer.Option(help="CheXpert: u_ones, u_zeros or u_ignore, what -1 counts as.")
    ] = "",
    manifest_args: Annotated[
        str, typer.Option(help="JSON object of more arguments of fastpie.data.read_manifest.")
    ] = "{}",
    split: Annotated[str, typer.Option(help="Only the samples of this split.")] = "",
    size: Annotated[
        str, typer.Option(help="Resize to height and width: 224 or 224,256; a volume: 64,96,96.")
    ] = "",
    mean: Annotated[
        str, typer.Option(help="Subtracted from values in [0, 1], one or one a channel.")
    ] = "0",
    std: Annotated[str, typer.Option(help="Divided by after that.")] = "1",
    channels: Annotated[int, typer.Option(help="1 (grey) or 3 (RGB).")] = 3,
    window: Annotated[
        str, typer.Option(help="DICOM and NIfTI: lowest and highest value: -160,240.")
    ] = "",
    cache: Annotated[
        Path | None, typer.Option(help="Folder of decoded images, for all runs and epochs.")
    ] = None,
    cache_limit: Annotated[
        float | None, typer.Option(help="GiB that the cache may take on the disk.")
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            help="Module whose output to compare as an embedding (behind it :input for what goes into "
            "it); penultimate: what goes into the last linear layer; stages: the early stages, pooled."
        ),
    ] = "",
    batch_size: Annotated[int, typer.Option(help="Images in a pass.")] = 64,
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = 0,
    read_timeout: Annotated[
        float, typer.Option(help="Seconds that a worker may take for an image.")
    ] = 300.0,
    keep_logits: Annotated[bool, typer.Option(help="Write the logits beside the scores.")] = False,
    keep_features: Annotated[
        bool,
        typer.Option(
            help="Write the features beside the scores, which tells wrong labels and odd images; by "
            "default those of the early stages, of the dense model."
        ),
    ] = False,
    committee: Annotated[
        int,
        typer.Option(
            help="So many copies of the model with noise on their weights score each image too, as many "
            "dense passes more; 6 is a good number."
        ),
    ] = 0,
    recalibrate: Annotated[
        bool, typer.Option(help="BatchNorm statistics for the pruned model.")
    ] = True,
    precision: Precision = Precision.fp32,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ... Under torchrun cuda is one GPU a process.")
    ] = "cpu",
    models_at_once: Annotated[
        int | None, typer.Option(min=1, help="Of several checkpoints, how many are held in memory.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score about this many images more, and stop.")
    ] = None,
    shard: Annotated[
        str, typer.Option(help="Score only one of n stretches: 1/4 to 4/4, each its own process.")
    ] = "1/1",
    retry_errors: Annotated[bool, typer.Option(help="Read again what could not be read.")] = False,
    log: Annotated[
        Log | None,
        typer.Option(
            "--log",
            "--telemetry",  # torchrun takes --log for an abbreviation of options of its own
            help="Rows of rates, stage times and GPU use in the run folder.",
        ),
    ] = None,
    report: Annotated[bool, typer.Option(help="Write report.html when done.")] = True,
    unpickle: Unpickle = False,
    as_json: Json = False,
) -> None:
    """Score every image and write the table of the hardest."""
    import fastpie
    from fastpie.mining.preflight import preflight
    from fastpie.mining.scoring import DENSE

    source = {
        "source": str(data.resolve()),
        "split": split,
        "manifest": {
            **_json_object("--manifest-args", manifest_args),
            **_given(
                format=format_ if format_ != "auto" else None,
                root=None if root is None else str(root.resolve()),
                labels=_labels(labels, task),
                task=None if task is None else task.value,
                class_names=names(classes) or None,
                path_column=path_column if path_column != "path" else None,
                uncertain=uncertain or None,
            ),
        },
        "preprocessing": _given(
            size=_sides(size_of(size, most=3)),
            mean=numbers("--mean", mean),
            std=numbers("--std", std),
            channels=channels,
            window=_window(window),
        ),
        "cache": None if cache is None else str(cache.resolve()),
        "cache_limit": None if cache_limit is None else int(cache_limit * _GIB),
    }
    stretch = _stretch(shard)
    with torchrun(device) as (rank, place):
        dataset = open_data(source)
        keep: bool | str = keep_features
        if keep_features and not features:
            features, keep = STAGES, DENSE
        example = partial(_example, dataset) if features == STAGES else None
        duals = _duals(
            model, model_args, weights or [], unpickle, masks, sparsity, features, example, place
        )
        task_value = dataset.manifest.task or "multiclass"
        check = None
        if rank == 0:
            check = preflight(duals[0](), dataset, task=task_value, recalibrate=recalibrate)
            _say_preflight(check)
        result = fastpie.mine(
            duals if len(duals) > 1 else duals[0](),
            dataset,
            out,
            task=task_value,
            batch_size=batch_size,
            num_workers=workers,
            read_timeout=read_timeout,
            recalibrate=recalibrate,
            keep_logits=keep_logits,
            keep_features=keep,
            committee=committee,
            precision=precision.value,
            models_at_once=models_at_once,
            limit=limit,
            shard=stretch,
            retry_errors=retry_errors,
            log=None if log is None else log.value,
            note={
                NOTE: {
                    "data": source,
                    "model": {
                        "factory": model,
                        "arguments": model_args,
                        "weights": [str(path.resolve()) for path in weights or []],
                    },
                    "preflight": check,
                }
            },
        )
        if rank == 0:
            written = _write_report(result, dataset) if report else None
            _print_result(result, written, as_json)


# ---------------------------------------------------------------------- what the options mean


def _duals(
    factory: str,
    arguments: str,
    weights: list[Path],
    unpickle: bool,
    masks: Path | None,
    sparsity: str,
    features: str,
    example: Callable[[], Tensor] | None,
    device: str,
) -> list[Callable[[], fastpie.DualModel]]:
    """Functions that load the dual models; the first is loaded, and what is wrong with it told."""
    import fastpie

    if masks is not None and len(weights) > 1:
        raise typer.BadParameter(
            "expected one checkpoint for the masks of a file; for several, each gets its own by "
            "--sparsity",
            param_hint="--masks",
        )

    def load(checkpoint: Path | None) -> fastpie.DualModel:
        network = load_model(factory, arguments, None, unpickle, quiet=checkpoint is not None)
        if checkpoint is not None:
            load_weights(network, checkpoint, unpickle, factory)
        try:
            network = network.to(device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
            raise FastpieError(
                f"Expected --device to be one that torch can use, but got {device!r}: {error}"
            ) from error
        levels = sparsities_of(sparsity)
        chosen = fastpie.Masks.load(masks) if masks else fastpie.prune(network, levels)
        named = features or None
        if example is not None:
            named = fastpie.dual.stage_features(network, example().to(device))
        return fastpie.DualModel(network, chosen, features=named)

    first = load(weights[0] if weights else None)

    def loader(number: int) -> Callable[[], fastpie.DualModel]:
        return lambda: first if number == 0 else load(weights[number])

    return [loader(number) for number in range(max(1, len(weights)))]


def _example(dataset: ManifestDataset) -> Tensor:  # [1, C, H, W]
    """The first image that can be read."""
    for index in range(min(len(dataset), _IMAGES_TRIED)):
        try:
            return dataset[index][0].unsqueeze(0)
        except (FastpieError, OSError):
            continue
    raise FastpieError(
        f"Expected images to find the stages of the network with, but none of the first "
        f"{min(len(dataset), _IMAGES_TRIED)} can be read."
    )


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(
            f"expected a JSON object, but: {error}", param_hint=option
        ) from error


def _labels(text: str, task: Task | None) -> str | list[str] | None:
    columns = names(text)
    if len(columns) == 1 and task is not Task.multilabel:
        return columns[0]
    return columns or None


def _sides(size: list[int]) -> list[int] | None:
    return size * 2 if len(size) == 1 else size or None


def _window(text: str) -> list[float] | None:
    values = numbers("--window", text)
    if values and (len(values) != 2 or not values[0] < values[1]):
        raise typer.BadParameter(
            f"expected a lowest and a highest value, but got {text!r}", param_hint="--window"
        )
    return values or None


def _stretch(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    try:
        stretch = int(first) - 1, int(count)
    except ValueError:
        stretch = -1, 0
    if not 0 <= stretch[0] < stretch[1]:
        raise typer.BadParameter(
            f"expected i/n with 1 <= i <= n, but got {text!r}", param_hint="--shard"
        )
    return stretch


# ---------------------------------------------------------------------- what is printed


def _say_preflight(check: dict[str, Any] | None) -> None:
    if check is None:
        return
    values = ", ".join(f"{name} {value:.3f}" for name, value in check["values"].items())
    messages.print(
        f"{check['metric']} on {check['samples']} samples: {values} (chance {check['chance']:.3f})"
    )
    if check["near_chance"]:
        messages.print(
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
        messages.print(f"No report: {error}", markup=False)
        return None


def _print_result(result: MiningResult, report: Path | None, as_json: bool) -> None:
    data = {
        "run": result.location,
        "samples": len(result),
        "errors": result.errors.num_rows,
        "hardness": result.record["hardness"],
        "hardest": result.select(0.05),
        "report": None if report is None else str(report),
        "telemetry": result.telemetry,
    }
    if as_json:
        print_json(data)
        return
    messages.print(
        f"{data['samples']} samples scored, {data['errors']} in errors.parquet; the hardest 5 % "
        f"by {data['hardness']}:",
        markup=False,
    )
    _say_telemetry(result.telemetry)
    for sample_id in data["hardest"]:
        typer.echo(sample_id)
    if report is not None:
        messages.print(f"report: {report}", markup=False)


def _say_telemetry(found: dict[str, Any] | None) -> None:
    if not found or not found["images"]:
        return
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["stages"].items())
    gpu = found["gpu"]
    used = f"; GPU {gpu['gpu_utilisation']:.0f} % used" if gpu and gpu["gpu_utilisation"] else ""
    messages.print(
        f"{found['images']} images in {found['seconds']:.1f} s, {found['images_per_second']:.0f} a "
        f"second (seconds: {stages}){used}"
    )
