"""`Recorder`: score a data set after every epoch of a training, and keep what each sample did."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastpie._checks import whole_number
from fastpie.dual import DualModel
from fastpie.dual.output import DualOutput
from fastpie.errors import FastpieError
from fastpie.mining.epochs import EARLY_EPOCHS, TASKS, EpochStatistics
from fastpie.mining.ranks import Ranks
from fastpie.mining.reading import Batch, Problem
from fastpie.mining.rescan import Rescan, check_state
from fastpie.mining.run import DEFAULT_LADDER
from fastpie.mining.run_folder import RunFolder, unreachable
from fastpie.mining.scoring import Scorer

__all__ = ["Recorder"]

_FORMAT = "fastpie-recorder-1"
_RECALIBRATION_SAMPLES = 512  # a quarter of what `mine` takes
_STATE, _TABLE, _ERRORS = "samples.safetensors", "samples.parquet", "errors.parquet"


class Recorder:
    """Scores a data set with the dense and the pruned model as a training goes on.

    Put it beside any training loop::

        recorder = fastpie.mining.Recorder(model, train_set_without_augmentation, out="records/")
        for epoch in range(epochs):
            train_one_epoch(...)
            recorder.step(epoch)
        table = recorder.result()

    After an epoch the model's weights are copied, masks are chosen from them anew by the same rule,
    BatchNorm statistics of the pruned model are taken from the 512 samples of lowest id hash, the
    engine (compiled once) is refreshed, and every sample is scored in eval mode. `EpochStatistics`
    says what is kept: the epoch means of our own scores, and AUM, cartography, forgetting and EL2N,
    all from that one pass.

    The training is not touched: the model's weights, buffers, gradients and modes, and the random
    generators of Python, NumPy and torch are as they were, so a training gives the same bits with
    and without. A private copy of the model and the engine stay in memory meanwhile.

    With `out` the state is written after every recorded epoch, whole or not at all, and a Recorder
    made again with the same arguments goes on from there: `samples.parquet` (the table),
    `errors.parquet`, `samples.safetensors` (the state). Save the checkpoint of an epoch after its
    `step`: then a training that is killed and goes on records every epoch, with the same bits. An
    epoch that is recorded is not scored again, even where the training has gone back further; for
    records that go back with a checkpoint keep `state_dict()` in it.

    Where `torch.distributed` is initialised (torchrun, DDP) *every* process makes the Recorder and
    calls `step`, not rank 0 alone: they share the batches, scored with the model of rank 0, and all
    have the result. The folder must be one that all of them see.

    Attributes:
        every: how often it records.
        epochs: those recorded, increasing.
    """

    def __init__(
        self,
        model: nn.Module | DualModel,
        data: Dataset[Any] | DataLoader[Any],
        out: str | os.PathLike[str] | None = None,
        *,
        every: int = 1,
        task: str = "multiclass",
        el2n_epochs: Collection[int] = EARLY_EPOCHS,
        batch_size: int | None = None,
        num_workers: int | None = None,
        read_timeout: float | None = None,
        sample_ids: Sequence[Any] | None = None,
        output: str | int | None = None,
        precision: str = "fp32",
        backend: str = "auto",
        device: str | torch.device | None = None,
    ) -> None:
        """Copy the model and try it on the first samples; nothing is scored or written yet.

        Args:
            model: the model that is trained (in DistributedDataParallel or torch.compile or not),
                pruned by magnitude at .1, .3, .5 and .7; or a DualModel of it, which gives levels,
                method, scope and the weights to prune, not the masks themselves. Attributes other
                than parameters and buffers are used as they are now. Parameters that are sharded over
                processes (FSDP) are not supported.
            data: as for `mine`. It must give the same sample for the same index: the training
                samples *without* the random augmentation of the training.
            out: a folder or URL for state and table; None keeps them in memory.
            every: record every n-th epoch: with 5 after the epochs 4, 9, 14, ... counted from 0.
            task: "multiclass" or "multilabel".
            el2n_epochs: the epochs, counted from 0, that EL2N is averaged over.
            batch_size: as for `mine`.
            num_workers: as for `mine`.
            read_timeout: as for `mine`.
            sample_ids: as for `mine`.
            output: as for `mine`.
            precision: as for `mine`.
            backend: as for `mine`.
            device: to score on; by default where the model is now.

        Raises:
            FastpieError: for unusable arguments, data, outputs or masks that `prune` did not choose,
                or a folder of another configuration.
        """
        if task not in TASKS:
            raise FastpieError(f"Expected `task` to be one of {TASKS}, but got {task!r}.")
        self.every = whole_number("every", every, 1)
        self.epochs: list[int] = []
        self._rescan = Rescan(
            model,
            data,
            DEFAULT_LADDER,
            features=False,
            recalibrated_from=lambda _: _RECALIBRATION_SAMPLES,
            batch_size=batch_size,
            num_workers=num_workers,
            read_timeout=read_timeout,
            sample_ids=sample_ids,
            precision=precision,
            backend=backend,
            device=device,
        )
        sweep, masks = self._rescan.sweep, self._rescan.follower.dual.masks
        labelled = sweep.kind.label is not None
        self._scorer = Scorer(
            task, masks.sparsities, masks.is_ladder, labelled, output, keep_logits=True
        )
        classes = self._try()
        self._statistics = EpochStatistics(
            len(sweep.plan),
            classes,
            task=task,
            sparsities=masks.sparsities,
            is_ladder=masks.is_ladder,
            labelled=labelled,
            el2n_epochs=el2n_epochs,
        )
        self._config = {
            "task": task,
            "el2n_epochs": sorted(self._statistics.el2n_epochs),
            "classes": classes,
            "output": output,
            **self._rescan.config(),
        }
        self._folder = None if out is None else RunFolder(out)
        if self._folder is not None:
            self._take_up(self._folder)

    def _try(self) -> int:
        """Score the first batch that can be: the number of classes."""
        classes = 0

        def account(batch: Batch, out: DualOutput) -> tuple[list[int], list[Problem]]:
            nonlocal classes
            rows, _, problems, kept = self._scorer.score(
                out, batch.labels, batch.positions, batch.slots
            )
            if rows:
                classes = int(kept["logits"][0].shape[1])
            return rows, problems

        self._rescan.try_out(account)
        return classes

    # ------------------------------------------------------------------ an epoch

    def step(self, epoch: int) -> bool:
        """Score the data set with the model as it is now, if it is the epoch's turn.

        Args:
            epoch: that has just ended, counted from 0.

        Returns:
            Whether it was recorded: False where it is not its turn, and, with a warning, for an
            epoch that is not later than those recorded, which stay as they are.

        Raises:
            FastpieError: for weights that are not finite, no sample that can be scored, or a folder
                that cannot be written. What was recorded before holds. Single samples that cannot be
                read or scored do not raise: they are in `errors`.
        """
        epoch = whole_number("epoch", epoch, 0)
        if (epoch + 1) % self.every:
            return False
        ranks = Ranks()
        try:
            if not self._rescan.goes_on(epoch, self.epochs, ranks, "recorded"):
                return False
            self._record(epoch, ranks)
            if self._folder is not None:
                ranks.first(self._write)
        finally:
            ranks.close()
        return True

    def _record(self, epoch: int, ranks: Ranks) -> None:
        """Score every sample; what was known before stays in force unless all of it succeeds."""
        statistics = self._statistics.copy()
        shares = self._rescan.run(
            epoch,
            ranks,
            lambda batch, out: self._account(statistics, batch, out, epoch),
            lambda mine: statistics.take(mine) if ranks.count > 1 else {},
        )
        for rank, (theirs, values) in enumerate(shares):
            if rank != ranks.rank:
                statistics.put(theirs, values)
        self._statistics = statistics
        self.epochs = [*self.epochs, epoch]

    def _account(
        self, statistics: EpochStatistics, batch: Batch, out: DualOutput, epoch: int
    ) -> tuple[list[int], list[Problem]]:
        """Add a batch to the statistics."""
        rows, columns, problems, kept = self._scorer.score(
            out, batch.labels, batch.positions, batch.slots
        )
        positions = [batch.positions[row] for row in rows]
        if positions:
            dense, pruned = map(torch.from_numpy, kept["logits"])  # [n, C], [n, L, C]
            pruned = pruned.transpose(0, 1).contiguous()
            labels = None
            if statistics.labelled:
                column = columns["label"]  # [n], or lists of C
                multilabel = statistics.task == "multilabel"
                values = (column.flatten() if multilabel else column).to_numpy().copy()
                labels = torch.from_numpy(values)
                labels = labels.reshape(dense.shape) if multilabel else labels
            statistics.update(positions, dense, pruned, labels, epoch=epoch)
        return positions, problems

    # ------------------------------------------------------------------ what is known

    def result(self) -> pa.Table:
        """One row for each sample scored so far, in sample_id order; see `EpochStatistics`.

        The metadata of the schema say what `hardness` is and name the epochs.

        Raises:
            FastpieError: before the first recorded epoch.
        """
        if not self.epochs:
            raise FastpieError("Expected a recorded epoch, but there is none yet: call step().")
        table = self._statistics.table(self._rescan.sweep.plan.sample_ids.array)
        return table.replace_schema_metadata(
            {
                "hardness": self._statistics.hardness,
                "epochs": json.dumps(self.epochs),
                "task": self._statistics.task,
            }
        )

    @property
    def errors(self) -> pa.Table:
        """Samples that could not be read or scored in some epoch, with the last reason.

        Columns as in `MiningResult.errors`, and `epoch`, the last one with an error; a sample that
        could be scored in other epochs is in `result()` as well.
        """
        return self._rescan.error_table()

    def state_dict(self) -> dict[str, Any]:
        """Everything recorded: tensors, numbers and text (`torch.load(weights_only=True)`)."""
        return {
            "format": _FORMAT,
            "config": copy.deepcopy(self._config),
            "epochs": list(self.epochs),
            "plan": copy.deepcopy(self._rescan.follower.plan),
            "errors": self._rescan.error_state(),
            "statistics": self._statistics.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of `state_dict`; the folder follows with the next recorded epoch.

        Raises:
            FastpieError: if the state is of another configuration.
        """
        check_state("a Recorder", _FORMAT, state, self._config)
        self._statistics.load_state_dict(state["statistics"])
        self.epochs = list(state["epochs"])
        self._rescan.follower.take_plan(copy.deepcopy(state["plan"]))
        self._rescan.load_error_state(state["errors"])

    def _take_up(self, folder: RunFolder) -> None:
        """Go on from a folder, if something is in it."""
        try:
            tensors = load(folder.storage.read(_STATE))
            state = json.loads(tensors.pop("state").numpy().tobytes())
        except FileNotFoundError:
            return
        except OSError as error:
            raise unreachable(folder.location, error) from error
        except (SafetensorError, KeyError, ValueError) as error:
            raise FastpieError(
                f"Expected the state of a Recorder in {folder.location}/{_STATE}, but: {error!r}. "
                "Choose another folder, or remove this one."
            ) from error
        folder.remove_leftovers()
        try:
            self.load_state_dict({**state, "statistics": tensors})
        except FastpieError as error:
            raise FastpieError(f"{error} Choose another folder than {folder.location}.") from error

    def _write(self) -> None:
        """The table, and then, as the sign that the epoch is recorded, the state."""
        assert self._folder is not None
        self._folder.write_table(_TABLE, self.result())
        self._folder.write_table(_ERRORS, self.errors)
        state = self.state_dict()
        tensors = state.pop("statistics")
        # Not safetensors' own metadata: those may be 100 MB at most, and errors may be many.
        tensors["state"] = torch.from_numpy(
            np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
        )
        self._folder.write_file(_STATE, save(tensors))
