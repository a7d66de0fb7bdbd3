"""`fastpie train`, alone or under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastpie.cli.options import Json, messages, print_json
from fastpie.cli.processes import torchrun
from fastpie.errors import FastpieError

if TYPE_CHECKING:
    from fastpie.training.config.stages import TrainOutcome

__all__ = ["train"]


def train(
    config: Annotated[
        Path, typer.Option(help="YAML file; see examples/ and docs/tutorials/train.md.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field to replace: --set epochs=3 --set attention.every=2."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder, instead of the file's; a training begun in it is gone on with."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Build everything, print the whole configuration, and end."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train as a YAML file says, also on what is mined as the training goes on."""
    from fastpie.training.config.configured import ConfiguredTraining
    from fastpie.training.config.file import config_data, config_text, parse_overrides, read_config
    from fastpie.training.config.stages import train_configured

    try:
        overrides = parse_overrides(set_ or [])
    except FastpieError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from error
    if out is not None:
        overrides["out"] = str(out.resolve())
    checked = read_config(config, overrides)
    with torchrun(checked.device) as (rank, device):

        def say(text: str) -> None:
            if rank == 0:
                messages.print(text, markup=False)

        if not check:
            outcome = train_configured(checked, device=device, say=say)
            if rank == 0:
                _print_outcome(outcome, as_json)
            return
        for stage in checked.stages:
            for line in ConfiguredTraining(stage, None, device=device).summary():
                say(line)
        if rank == 0 and as_json:
            print_json(config_data(checked))
        elif rank == 0:
            typer.echo(config_text(checked), nl=False)


def _print_outcome(outcome: TrainOutcome, as_json: bool) -> None:
    data = outcome.data()
    if as_json:
        print_json(data)
        return
    best = data["best_epoch"]
    rows: dict[str, Any] = {
        "epochs": " + ".join(map(str, data["epochs"])),
        "best epoch": "none compared, the last one kept" if best is None else best,
        **data["metrics"],
        **{f"test_{name}": value for name, value in (data["test"] or {}).items()},
        "weights": data["weights"],
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        typer.echo(f"{name:<{width}}  {text}")
