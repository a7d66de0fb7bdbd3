"""The folder of a training: its checkpoint, the best weights, and what could not be read."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastpie._files import write_atomically
from fastpie.errors import FastpieError
from fastpie.mining.lock import RunLock
from fastpie.mining.ranks import Ranks
from fastpie.training.trainer.checkpoint import read_checkpoint, write_checkpoint, write_weights
from fastpie.training.trainer.configuration import check_configuration
from fastpie.training.trainer.progress import Progress

__all__ = ["TrainingFolder"]

_FILES = ("checkpoint.pt", "model.safetensors", "errors.csv", "log.csv")
_ERRORS = ("sample_id", "path", "stage", "error", "epoch")


class TrainingFolder:
    """`checkpoint.pt`, `model.safetensors` and `errors.csv`, written by rank 0, read by all.

    Attributes:
        path: of the folder.
    """

    def __init__(self, path: Path, configuration: Mapping[str, Any], ranks: Ranks) -> None:
        """Nothing is read or written yet."""
        self.path = path
        self._configuration = dict(configuration)
        self._ranks = ranks
        self._lock: RunLock | None = None

    def open(self) -> None:
        """Keep other trainings out.

        Raises:
            FastpieError: another process trains here.
        """

        def lock() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.path)
            self._lock.acquire()
            for name in _FILES:  # what writes that were killed have left
                for path in self.path.glob(f".{name}.*"):
                    path.unlink(missing_ok=True)

        self._ranks.first(lock)

    def close(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def read(self) -> tuple[Progress, dict[str, Any]] | None:
        """Where the last checkpoint is, and the states of the parts; None without one.

        Raises:
            FastpieError: for a checkpoint of another configuration.
        """
        path = self.path / "checkpoint.pt"
        state = read_checkpoint(path)
        if len(set(self._ranks.all(state is None))) > 1:
            raise FastpieError(f"Expected every process to see {path}, but some do not.")
        if state is None:
            return None
        check_configuration(self.path, state["configuration"], self._configuration)
        progress = Progress.of_state(state["progress"])
        if self._ranks.rank:  # rank 0 has the sums
            progress.loss, progress.unreadable = 0.0, 0
        return progress, state["parts"]

    def write(self, progress: Progress, parts: Mapping[str, Any]) -> None:
        """Write a checkpoint; called by every process.

        Args:
            progress: of this process.
            parts: what has a `state_dict`, by name.

        Raises:
            FastpieError: in every process, if rank 0 cannot write it.
        """
        state = progress.state()
        # What differs between the processes; nothing is trained with it.
        state["loss"] = sum(self._ranks.all(progress.loss))
        state["unreadable"] = sum(self._ranks.all(progress.unreadable))

        def written() -> None:
            states = {name: part.state_dict() for name, part in parts.items()}
            write_checkpoint(
                self.path / "checkpoint.pt",
                {"configuration": self._configuration, "progress": state, "parts": states},
            )
            if progress.errors:
                write_atomically(self.path / "errors.csv", _table(progress.errors))

        self._ranks.first(written)

    def write_weights(self, model: nn.Module) -> None:
        """Write the weights of the best epoch; called by every process."""
        self._ranks.first(lambda: write_weights(self.path / "model.safetensors", model))


def _table(errors: Mapping[str, Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, _ERRORS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({"sample_id": k, **row} for k, row in errors.items())
    return text.getvalue().encode()
