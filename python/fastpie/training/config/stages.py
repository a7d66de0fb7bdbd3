"""All stages of a configuration, trained one after the other, and what they came to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpie._files import write_atomically
from fastpie.errors import FastpieError
from fastpie.mining.ranks import Ranks
from fastpie.training.config.config import TrainConfig
from fastpie.training.config.configured import ConfiguredTraining
from fastpie.training.config.file import config_text
from fastpie.training.trainer.progress import TrainResult

__all__ = ["TrainOutcome", "train_configured"]

_WEIGHTS, _RESULT, _CONFIG = "model.safetensors", "result.json", "config.yaml"


@dataclass(frozen=True)
class TrainOutcome:
    """What a configured training came to.

    Attributes:
        out: its folder.
        weights: of the best epoch of the last stage.
        stages: what each stage came to.
        test: metrics on `data.test` with these weights; None without.
    """

    out: Path
    weights: Path
    stages: list[TrainResult]
    test: dict[str, float] | None

    def data(self) -> dict[str, Any]:
        """Plain values."""
        last = self.stages[-1]
        row = last.history[last.epoch - 1 if last.best is None else last.best]
        return {
            "out": str(self.out),
            "weights": str(self.weights),
            "epochs": [stage.epoch for stage in self.stages],
            "stopped_early": last.stopped_early,
            "best_epoch": last.best,
            "metrics": {name: row[name] for name in row if name == "loss" or "valid_" in name},
            "test": self.test,
        }


def train_configured(
    config: TrainConfig,
    *,
    device: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: bool | None = None,
) -> TrainOutcome:
    """Train all stages, or what remains of them, and evaluate.

    Where `torch.distributed` is initialised every process calls it.

    Args:
        config: from `read_config`.
        device: instead of the configuration's.
        say: told what is trained on.
        progress: whether to show bars; None: on a terminal.

    Returns:
        TrainOutcome: also in `result.json` of the folder, beside `config.yaml`.

    Raises:
        FastpieError: naming the field, for what cannot be built; else as `Trainer`.
    """
    ranks, out = Ranks(), Path(config.out)
    results: list[TrainResult] = []
    weights = out / _WEIGHTS
    for number, stage in enumerate(config.stages, 1):
        last = stage.then is None
        folder = out if last else out / f"stage-{number}"
        before = weights if number > 1 else None
        training = ConfiguredTraining(
            stage, folder, weights=before, device=device, progress=progress
        )
        if len(config.stages) > 1:
            say(f"stage {number} of {len(config.stages)}: {stage.recipe.name}")
        for line in training.summary():
            say(line)
        if ranks.rank == 0 and not (folder / "checkpoint.pt").exists():
            _write(out / _CONFIG, config_text(config))
        results.append(training.trainer.fit())
        weights = folder / _WEIGHTS
        if not weights.is_file():
            raise FastpieError(
                f"Expected the best weights in {weights}, but no epoch had a {training.monitor!r} that "
                "is a number."
            )
    outcome = TrainOutcome(out, weights, results, training.test(weights, ranks))
    if ranks.rank == 0:
        _write(out / _CONFIG, config_text(config))
        _write(out / _RESULT, json.dumps(outcome.data(), indent=2) + "\n")
    ranks.close()
    return outcome


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise FastpieError(f"Expected to write {path}, but: {error}") from error
