"""The dual model that a run was scored with, from its folder and the dense model."""

from __future__ import annotations

import copy
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastpie._digest import digest_of
from fastpie.dual import DualModel
from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult
from fastpie.pruning.masks import Masks

__all__ = ["dual_of_run", "load_statistics", "model_digest"]


def dual_of_run(run: MiningResult, model: nn.Module) -> DualModel:
    """Masks and recalibrated statistics of a run around a copy of its dense model.

    Args:
        run: of one model, in a folder of this machine; of a run of several, one of `members`.
        model: the dense model, with the weights that the run was made with. It is left as it was.

    Returns:
        DualModel in eval mode whose outputs are those that the run scored.

    Raises:
        FastpieError: for a run of several models, other weights than the run's, or files of the run
            that cannot be read.
    """
    if run.members:
        raise FastpieError(
            f"Expected a run of one model, but {run.location} is one of {len(run.members)}: take one "
            "of its `members`."
        )
    expected = run.record["fingerprints"]["model"]
    found = model_digest(model)
    if found != expected:
        raise FastpieError(
            f"Expected the weights that the run in {run.location} was made with (digest "
            f"{expected[:12]}), but those of this {type(model).__name__} are others ({found[:12]})."
        )
    model = copy.deepcopy(model).eval()
    dual = DualModel(
        model, Masks.load(run.path / "masks.safetensors"), run.record["config"]["features"]
    ).eval()
    name = "recalibration.safetensors"
    if (run.path / name).exists():  # not without BatchNorm, nor where recalibrate=False
        load_statistics(dual, run.path / name)
    return dual


def model_digest(model: nn.Module) -> str:
    """What tells the weights of one model from another's, as in `run.json`."""
    return digest_of({k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)})


def load_statistics(dual: DualModel, path: Path) -> None:
    """Put the statistics of a file into a dual model.

    Raises:
        FastpieError: if the file cannot be read, or is another model's.
    """
    own = dual.own_statistics()
    try:
        for name, value in load_file(path).items():
            own[name].copy_(value)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise FastpieError(
            f"Expected the statistics of the run in {path}, but: {error}."
        ) from error
