"""What a training says of its epochs: rows of a table, and how the GPU was used."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import torch

from fastpie._extras import load_extra
from fastpie._files import write_atomically
from fastpie.errors import FastpieError
from fastpie.mining.telemetry import GPU_COLUMNS, LOGS, GpuMonitor, TensorBoardLog

__all__ = ["TrainingLog", "check_log"]

_SPEED = ("seconds", "images_per_second", "evaluation_seconds", "mining_seconds")


class TrainingLog:
    """Writes the history of a training to `log.csv` or `tensorboard/`, a row an epoch.

    `log.csv` is written anew each time, so that an epoch that a crash made train twice is there once.
    """

    def __init__(
        self,
        folder: Path | None,
        kind: str | None,
        device: torch.device,
        history: list[dict[str, Any]],
    ) -> None:
        """Open the log and begin to look at the GPU.

        Args:
            folder: of the training.
            kind: "csv", "tensorboard" (the extra `fastpie[tensorboard]`) or None.
            device: that computes.
            history: so far.

        Raises:
            FastpieError: for another kind, one without a folder, or without the extra that it needs.
        """
        check_log(kind, folder is not None)
        self._csv = folder / "log.csv" if folder is not None and kind == "csv" else None
        self._board = None
        if folder is not None and kind == "tensorboard":
            self._board = TensorBoardLog(
                folder / "tensorboard", len(history) - 1, "epoch", _group_of
            )
        self._write_table(history)  # a crash may have come between checkpoint and log
        self._gpu = GpuMonitor(device) if device.type == "cuda" else None

    def gpu(self) -> dict[str, float | None]:
        """`gpu_utilisation` (percent), `gpu_power_w`, `gpu_memory_gib`: means since the last call."""
        return {} if self._gpu is None else self._gpu.of_part()

    def write(self, history: list[dict[str, Any]]) -> None:
        """Write the history, whose last row is new.

        Raises:
            FastpieError: it cannot be written.
        """
        if self._board is not None and history:
            self._board.write(history[-1])
        self._write_table(history)

    def close(self) -> None:
        """Close the log and stop looking at the GPU."""
        if self._gpu is not None:
            self._gpu.stop()
        if self._board is not None:
            self._board.close()

    def _write_table(self, history: list[dict[str, Any]]) -> None:
        if self._csv is not None:
            columns = list(dict.fromkeys(name for row in history for name in row))
            text = io.StringIO()
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                for row in history
            )
            try:
                write_atomically(self._csv, text.getvalue().encode())
            except OSError as error:
                raise FastpieError(
                    f"Expected to write the log {self._csv}, but: {error}"
                ) from error


def check_log(kind: str | None, has_folder: bool) -> None:
    """Refuse a kind of log that there is not.

    Raises:
        FastpieError: for another kind, one without a folder, or without the extra that it needs.
    """
    if kind is not None and (kind not in LOGS or not has_folder):
        raise FastpieError(f"Expected `log` to be one of {LOGS}, with `out`, but got {kind!r}.")
    if kind == "tensorboard":
        load_extra("tensorboard", "tensorboard", "log='tensorboard'")


def _group_of(column: str) -> str:
    if column in GPU_COLUMNS:
        return "gpu"
    return "speed" if column in _SPEED else "valid" if column.startswith("valid_") else "train"
