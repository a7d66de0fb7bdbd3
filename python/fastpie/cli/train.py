"""`fastpie train`, alone or under torchrun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastpie.cli.data import open_data
from fastpie.cli.mine import torchrun
from fastpie.cli.options import Json, load_model, messages, print_json
from fastpie.errors import FastpieError

__all__ = ["train"]


def train(
    config: Annotated[Path, typer.Option(help="YAML file; see examples/.")],
    out: Annotated[str | None, typer.Option(help="Folder, instead of the file's.")] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ... Under torchrun cuda is one GPU a process.")
    ] = "cpu",
    as_json: Json = False,
) -> None:
    """Train a network by a configuration; an interrupted training goes on."""
    from fastpie.training.config import read_config
    from fastpie.training.recipes import trainers

    try:
        settings = read_config(config)
    except FastpieError as error:
        raise typer.BadParameter(str(error), param_hint="--config") from error
    if out is not None:
        settings = settings.model_copy(update={"out": out})
    data = settings.data
    source = {
        "source": data.train,
        "split": data.train_split,
        "manifest": data.manifest,
        "preprocessing": data.preprocessing,
        "cache": data.cache,
        "cache_limit": None,
    }
    with torchrun(device) as (rank, place):
        import torch

        torch.manual_seed(settings.seed)  # what the factory draws, in every process alike
        try:
            train_set, valid_set = open_data(source), None
            if data.valid is not None or data.valid_split:
                valid_set = open_data(
                    {**source, "source": data.valid or data.train, "split": data.valid_split}
                )
        except TypeError as error:
            raise FastpieError(f"Expected other options in `data`: {error}.") from error
        model = settings.model
        weights = None if model.weights is None else Path(model.weights)
        network = load_model(model.factory, json.dumps(model.args), weights, False, quiet=True).to(
            place
        )
        results: list[dict[str, Any]] = []
        for trainer in trainers(settings, network, train_set, valid_set, place):
            result = trainer.fit()
            results.append(
                {
                    "epochs": result.epoch,
                    "best": result.best,
                    "stopped_early": result.stopped_early,
                    "errors": len(result.errors),
                    "last": result.history[-1] if result.history else None,
                }
            )
        if rank:
            return
    if as_json:
        print_json({"out": settings.out, "trainings": results})
        return
    for found in results:
        row = found["last"] or {}
        told = ("loss", "accuracy", "valid_map", "valid_mauroc")
        figures = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k.endswith(told))
        best = "" if found["best"] is None else f"; best epoch {found['best']}"
        messages.print(f"{found['epochs']} epochs{best}: {figures}", markup=False)
    typer.echo(settings.out)
