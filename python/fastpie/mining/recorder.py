"""`Recorder`: score a data set after every epoch of a training, and keep what each sample did."""

from __future__ import annotations

import contextlib
import copy
import json
import operator
import os
import random
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from fastpie.dual import DualEngine, DualModel
from fastpie.dual.inputs import random_state
from fastpie.dual.output import DualOutput
from fastpie.errors import FastpieError
from fastpie.mining.epochs import EARLY_EPOCHS, TASKS, EpochStatistics
from fastpie.mining.follower import Follower
from fastpie.mining.plan import fingerprint_of
from fastpie.mining.ranks import Ranks
from fastpie.mining.reading import Batch, Problem, Reader, path_of
from fastpie.mining.run_folder import ERRORS_SCHEMA, RunFolder, unreachable
from fastpie.mining.scoring import Scorer
from fastpie.mining.sweep import Sweep

__all__ = ["Recorder"]

_FORMAT = "fastpie-recorder-1"
_STATE, _TABLE, _ERRORS = "samples.safetensors", "samples.parquet", "errors.parquet"

# A quarter of what `mine` takes: it is run through every level after every epoch, in plain PyTorch.
_RECALIBRATION_SAMPLES = 512


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
        self.every = _at_least("every", every, 1)
        self.epochs: list[int] = []
        self._reader = Reader(
            data, batch_size=batch_size, num_workers=num_workers, read_timeout=read_timeout
        )
        self._errors: dict[int, tuple[str, str, int]] = {}  # position: stage, error, epoch
        self._follower = Follower(model, device, precision=precision, backend=backend)
        masks = self._follower.dual.masks
        with _apart(self._follower.device):
            self._sweep = Sweep(self._reader, self._follower.device, sample_ids)
            labelled = self._sweep.kind.label is not None
            self._scorer = Scorer(
                task, masks.sparsities, masks.is_ladder, labelled, output, keep_logits=True
            )
            self._example, classes = self._try()
        self._statistics = EpochStatistics(
            len(self._sweep.plan),
            classes,
            task=task,
            sparsities=masks.sparsities,
            is_ladder=masks.is_ladder,
            labelled=labelled,
            el2n_epochs=el2n_epochs,
        )
        self._config = {
            "task": task,
            "sparsities": masks.sparsities,
            "is_ladder": masks.is_ladder,
            **{key: masks.info.get(key) for key in ("method", "scope", "seed")},
            "weights": sorted(masks),
            "el2n_epochs": sorted(self._statistics.el2n_epochs),
            "data": f"{len(self._sweep.plan)} samples, {self._sweep.plan.fingerprint()}",
            "samples": fingerprint_of(self._reader.dataset),
            "label": self._sweep.kind.label,
            "classes": classes,
            "batch_size": self._reader.batch_size,
            "output": output,
            "precision": precision,
            "backend": backend,
            "device": self._follower.device.type,
        }
        self._folder = None if out is None else RunFolder(out)
        if self._folder is not None:
            self._take_up(self._folder)

    def _try(self) -> tuple[tuple[Any, ...], int]:
        """Score the first batch that can be read: its arguments, and the number of classes.

        What the data or the model is not fit for should show before hours of training.
        """
        problem = Problem(0, "read", "it is empty")
        every = range(self._sweep.plan.batches)
        with contextlib.closing(self._sweep.batches(every)) as batches:
            for batch in batches:
                problem = next(iter(batch.problems), problem)
                if batch.images is None:
                    continue
                args = self._sweep.arguments(batch.images)
                try:
                    out = self._follower.dual(*args)
                except Exception as error:
                    shapes = [list(a.shape) for a in args if isinstance(a, Tensor)]
                    raise FastpieError(
                        f"Expected the model to take a batch of shape {shapes}, but it raised "
                        f"{type(error).__name__}: {error}"
                    ) from error
                rows, _, problems, kept = self._scorer.score(
                    out, batch.labels, batch.positions, batch.slots
                )
                if rows:
                    return args, int(kept["logits"][0].shape[1])
                problem = problems[0]
        raise FastpieError(
            f"Expected samples that can be scored, but of {len(self._sweep.plan)} none can; one of "
            f"them: {problem.error}"
        )

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
        epoch = _at_least("epoch", epoch, 0)
        if (epoch + 1) % self.every:
            return False
        ranks = Ranks()
        try:
            known = ranks.all(self.epochs)
            if known.count(self.epochs) < len(known):
                raise FastpieError(
                    f"Expected the same epochs on every rank, but they have recorded {known}. All "
                    "must see the same folder, or load the same state."
                )
            if self.epochs and epoch <= self.epochs[-1]:
                warnings.warn(
                    f"Epoch {epoch} is not recorded: epoch {self.epochs[-1]} already is, and records "
                    "stay as they are. To go back with a checkpoint, load the state_dict() of that "
                    "time.",
                    stacklevel=2,
                )
                return False
            with _apart(self._follower.device):
                self._follower.follow(ranks, lambda: self._sweep.subset(_RECALIBRATION_SAMPLES))
                engine = self._follower.refresh(ranks, self._example)
                self._record(epoch, engine, ranks)
            if self._folder is not None:
                ranks.first(self._write)
        finally:
            ranks.close()
        return True

    def _record(self, epoch: int, engine: DualEngine, ranks: Ranks) -> None:
        """Score every sample; what was known before stays in force unless all of it succeeds."""
        statistics = self._statistics.copy()
        rows: list[int] = []
        problems: list[Problem] = []

        def forward(batch: Batch) -> DualOutput | None:
            return None if batch.images is None else engine(*self._sweep.arguments(batch.images))

        def account(batch: Batch, out: DualOutput | None) -> None:
            problems.extend(batch.problems)
            if out is not None:
                rows.extend(self._account(statistics, batch, out, epoch, problems))

        batches = range(self._sweep.plan.batches)[ranks.rank :: ranks.count]
        with (
            contextlib.closing(self._sweep.batches(batches)) as read,
            tqdm(
                total=len(batches),
                desc=f"epoch {epoch}",
                unit="batch",
                leave=False,
                disable=True if ranks.rank else None,
            ) as bar,
        ):
            for _ in self._sweep.lanes.overlapped(read, forward, account):
                bar.update()
        mine = np.array(rows, dtype=np.int64)
        shares = ranks.all((mine, statistics.take(mine) if ranks.count > 1 else {}, problems))
        if not any(len(share[0]) for share in shares):
            first = min(problem for share in shares for problem in share[2])
            raise FastpieError(
                f"Expected samples that can be scored, but after epoch {epoch} none of "
                f"{len(self._sweep.plan)} can; the first: {first.error}"
            )
        for rank, (theirs, values, _) in enumerate(shares):
            if rank != ranks.rank:
                statistics.put(theirs, values)
        for share in shares:
            self._errors.update((p.position, (p.stage, p.error, epoch)) for p in share[2])
        self._statistics = statistics
        self.epochs = [*self.epochs, epoch]

    def _account(
        self,
        statistics: EpochStatistics,
        batch: Batch,
        out: DualOutput,
        epoch: int,
        problems: list[Problem],
    ) -> list[int]:
        """Add a batch to the statistics; the rows that were."""
        rows, columns, unusable, kept = self._scorer.score(
            out, batch.labels, batch.positions, batch.slots
        )
        problems += unusable
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
        return positions

    # ------------------------------------------------------------------ what is known

    def result(self) -> pa.Table:
        """One row for each sample scored so far, in sample_id order; see `EpochStatistics`.

        The metadata of the schema say what `hardness` is and name the epochs.

        Raises:
            FastpieError: before the first recorded epoch.
        """
        if not self.epochs:
            raise FastpieError("Expected a recorded epoch, but there is none yet: call step().")
        table = self._statistics.table(self._sweep.plan.sample_ids.array)
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
        ids, order = self._sweep.plan.sample_ids, self._sweep.plan.order
        rows = [
            {
                "sample_id": ids[position],
                "path": path_of(self._reader.dataset, int(order[position])),
                "stage": stage,
                "error": error,
                "epoch": epoch,
            }
            for position, (stage, error, epoch) in sorted(self._errors.items())
        ]
        return pa.Table.from_pylist(
            rows, schema=ERRORS_SCHEMA.append(pa.field("epoch", pa.int64()))
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything recorded: tensors, numbers and text (`torch.load(weights_only=True)`)."""
        return {
            "format": _FORMAT,
            "config": copy.deepcopy(self._config),
            "epochs": list(self.epochs),
            "plan": copy.deepcopy(self._follower.plan),
            "errors": [[position, *error] for position, error in sorted(self._errors.items())],
            "statistics": self._statistics.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of `state_dict`; the folder follows with the next recorded epoch.

        Raises:
            FastpieError: if the state is of another configuration.
        """
        if state.get("format") != _FORMAT:
            raise FastpieError(
                f"Expected a state of format {_FORMAT!r}, but got {state.get('format')!r}."
            )
        config = state["config"]
        differing = [
            f"{key}: {config.get(key)!r:.80} in the state, {value!r:.80} now"
            for key, value in self._config.items()
            if config.get(key) != value
        ]
        if differing:
            raise FastpieError(
                "Expected the state of a Recorder made with the same arguments, but it differs in "
                + "; ".join(differing)
                + "."
            )
        self._statistics.load_state_dict(state["statistics"])
        self.epochs = list(state["epochs"])
        self._follower.take_plan(copy.deepcopy(state["plan"]))
        self._errors = {position: tuple(error) for position, *error in state["errors"]}

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


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Without gradients and autocast, and with the random generators as they were at the end."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - data sets use it
    restore = random_state(torch.empty(0, device=device))
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        restore()


def _at_least(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise FastpieError(
            f"Expected `{name}` to be an int of at least {least}, but got {value!r}."
        )
    return number
