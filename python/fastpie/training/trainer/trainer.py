"""`Trainer`: the training loop, in one process or several, that goes on exactly where it was stopped."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from fastpie.dual.modes import evaluating
from fastpie.errors import FastpieError
from fastpie.mining.follower import usable_device
from fastpie.mining.interruption import Interruption
from fastpie.mining.plan import ids_of
from fastpie.mining.ranks import Ranks
from fastpie.training.objectives.objective import Objective
from fastpie.training.sampling.order import Cut, epoch_order
from fastpie.training.trainer.configuration import configuration_of, digest_of_draws
from fastpie.training.trainer.evaluation import evaluate_model
from fastpie.training.trainer.feed import Feed, Fetched
from fastpie.training.trainer.folder import TrainingFolder
from fastpie.training.trainer.log import TrainingLog, check_log
from fastpie.training.trainer.progress import Progress, TrainResult
from fastpie.training.trainer.randomness import generators_kept, seed_everything, seed_of
from fastpie.training.trainer.step import PRECISIONS, Stepper

if TYPE_CHECKING:
    from fastpie.training.attention.attention import Attention
    from fastpie.training.masking.masked import MaskedTraining

__all__ = ["TrainResult", "Trainer"]

_BATCH_SIZE = 32
_STOP_AFTER = (
    10  # steps in a row without finite gradients; for fp16 as many more as halve 2^16 to 1
)
_READING, _STEP, _BEGIN = 0, 1, 3  # what a seed is for; 2 is the evaluation's


class Trainer:
    """Trains an objective on a data set.

    For example::

        objective = Supervised(model, criterion)
        optimizer = torch.optim.AdamW(objective.parameters())
        Trainer(objective, data, optimizer=optimizer, epochs=20, valid=valid, out="run/").fit()

    *Exactness.* The order of an epoch, the augmentation of a sample and the dropout of a step are
    functions of `seed`, the epoch and the place in it alone (`Feed`, `Cut`). So the training is the
    same for any number of workers, and stopped at any moment and gone on with it gives the weights
    of an undisturbed one, on the CPU, with as many threads, bit for bit. `batch_size` counts the samples of all processes:
    two processes train as one does, but for rounding, dropout (drawn a process), and BatchNorm on
    the CPU, whose statistics are then a process's own (CUDA: SyncBatchNorm).

    *Stopping.* With `out`, a Trainer made again with the same arguments goes on at the last
    checkpoint, and returns at once if it is done; more `epochs` or `patience` than before are fine,
    another configuration is refused. SIGTERM and Ctrl-C end the training after the step, with a checkpoint.
    `checkpoint.pt` holds all there is to go on; `model.safetensors` is the network at the best epoch
    by `monitor`, or at the last checkpoint without one or while it is NaN; `errors.csv` tells of unreadable samples.

    *Processes.* Where `torch.distributed` is initialised (torchrun), every process makes the Trainer
    and calls `fit`; `out` is a folder that all of them see.
    """

    def __init__(
        self,
        objective: Objective,
        data: Dataset[Any] | DataLoader[Any],
        *,
        optimizer: torch.optim.Optimizer,
        epochs: int,
        batch_size: int | None = None,
        scheduler: Any = None,
        scheduler_per_step: bool = False,
        attention: Attention | None = None,
        draw_weights: Any = None,
        masked: MaskedTraining | None = None,
        valid: Dataset[Any] | DataLoader[Any] | None = None,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        monitor: str | None = None,
        patience: int | None = None,
        clip: float | None = None,
        precision: str = "fp32",
        compile: bool | str = False,
        device: str | torch.device | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        out: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 1,
        checkpoint_minutes: float | None = None,
        log: str | None = None,
        progress: bool | None = None,
    ) -> None:
        """Put the objective on its device; nothing is read or written yet.

        Args:
            objective: what a step minimises.
            data: to train on, map-style; items as `Feed` takes them. A DataLoader lends its data set,
                batch size, workers and collate function; one with a sampler of its own is refused.
            optimizer: of the objective's parameters.
            epochs: how many, from the first one on.
            batch_size: the most samples in a step, of all processes together; by default the
                DataLoader's, else 32. An epoch is cut into batches whose sizes differ by at most 1.
            scheduler: of the learning rate, stepped after each epoch (ReduceLROnPlateau: with the
                monitor).
            scheduler_per_step: step it after each step instead.
            attention: an `Attention`: weights, hard samples and draws; re-mines after its epochs.
            draw_weights: fp64 [N], what each sample of an epoch is drawn in proportion to, with
                replacement (balanced classes, `hardness_weights`); not beside an attention that draws.
            masked: a `MaskedTraining`.
            valid: labelled samples for `evaluate_model`, after each epoch.
            evaluate: a function of the model, in eval mode and without gradients, called by rank 0;
                gives metrics by name. Beside `valid` both are told.
            monitor: the column of the history by which epochs are compared, such as "valid_loss" or
                "valid_balanced_accuracy"; lower is better for names that end with "loss", else
                higher. By default "valid_loss" with `valid`, else none.
            patience: stop after so many epochs that are no better than the best one before.
            clip: the largest norm of all gradients together.
            precision: "fp32", or by autocast "bf16" or "fp16" (with a scaled loss).
            compile: compile `objective.model` in place; text: by that backend of torch.compile.
            device: to train on; by default where the objective is.
            num_workers: processes that read samples; by default the DataLoader's, else none.
            seed: at least 0.
            out: folder of checkpoints and logs; None keeps nothing.
            checkpoint_every: epochs from one checkpoint to the next.
            checkpoint_minutes: also within an epoch, after so many minutes.
            log: "csv" (`log.csv`) or "tensorboard", in `out`.
            progress: whether to show bars; None: on a terminal.

        Raises:
            FastpieError: for unusable arguments, or more processes than samples in a batch.
        """
        _check(
            objective,
            precision,
            clip,
            epochs=(epochs, 1),
            seed=(seed, 0),
            checkpoint_every=(checkpoint_every, 1),
            patience=(1 if patience is None else patience, 1),
        )
        check_log(log, out is not None)
        if monitor is None and valid is not None:
            monitor = "valid_loss"
        if patience is not None and monitor is None:
            raise FastpieError(
                "Expected `valid` or `monitor` to have patience with, but got neither."
            )
        self._plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        if self._plateau and (monitor is None or scheduler_per_step):
            raise FastpieError(
                "Expected `valid` or `monitor` for ReduceLROnPlateau, which looks at it after each "
                "epoch, but got neither or `scheduler_per_step`."
            )
        self.objective, self.optimizer, self.scheduler = objective, optimizer, scheduler
        self.attention, self.masked = attention, masked
        self.epochs, self.seed = epochs, seed
        self._draw_weights = draw_weights
        self._per_step, self._monitor, self._patience = scheduler_per_step, monitor, patience
        self._evaluate = evaluate
        self._feed = Feed(data, batch_size=batch_size, num_workers=num_workers)
        if batch_size is None and not isinstance(data, DataLoader):
            self._feed.batch_size = _BATCH_SIZE
        # The data set that is mined may be in another order.
        self._ids = None if attention is None or self._feed.ids is None else ids_of(self._feed.ids)
        self._valid = None
        if valid is not None:
            own = None if isinstance(valid, DataLoader) else self._feed.batch_size
            self._valid = Feed(valid, batch_size=own, num_workers=num_workers)
        self._every, self._minutes = checkpoint_every, checkpoint_minutes
        self._log_kind = log
        self._ranks = Ranks()
        self._hide = (None if progress is None else not progress) if not self._ranks.rank else True
        if self._feed.batch_size < 1 or not len(self._feed.dataset):
            raise FastpieError(
                "Expected a batch size of at least 1 and at least one sample, but got "
                f"{self._feed.batch_size} and {len(self._feed.dataset)}."
            )
        self._cut = Cut(
            len(self._feed.dataset), self._feed.batch_size, self._ranks.count, self._ranks.rank
        )
        _check_parameters(objective, optimizer, attention)
        self._device = usable_device(device, objective)
        objective.to(self._device)
        configuration = configuration_of(
            objective,
            self._feed.dataset,
            optimizer,
            {
                "seed": seed,
                "batch_size": self._feed.batch_size,
                "precision": precision,
                "clip": clip,
                "monitor": monitor,
                "scheduler": None if scheduler is None else type(scheduler).__qualname__,
                "scheduler_per_step": scheduler_per_step,
                "attention": None if attention is None else type(attention).__qualname__,
                "draw_weights": None if draw_weights is None else digest_of_draws(draw_weights),
                "masked": None if masked is None else type(masked).__qualname__,
            },
        )
        self._folder = None
        if out is not None:
            self._folder = TrainingFolder(Path(out), configuration, self._ranks)
        if compile:
            objective.model.compile(**({"backend": compile} if isinstance(compile, str) else {}))
        self._step = Stepper(
            objective, optimizer, self._ranks, self._device, precision, clip, masked
        )
        self._progress = Progress()
        self._taken_up = False
        self._log: TrainingLog
        self._saved = time.monotonic()

    def fit(self) -> TrainResult:
        """Train what remains.

        Returns:
            The history; the objective, the optimizer and the others are as after the last epoch.

        Raises:
            FastpieError: `out` holds another training or cannot be written, another process trains in
                it, or gradients are not finite for many steps in a row.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(generators_kept(self._device))
            if self._folder is not None:
                stack.callback(self._folder.close)
                self._folder.open()
            if not self._taken_up:
                self._take_up()
                self._taken_up = True
            told = self._ranks.rank == 0
            self._log = TrainingLog(
                self._folder.path if told and self._folder is not None else None,
                self._log_kind if told else None,
                self._device,
                self._progress.history,
            )
            stack.callback(self._log.close)
            interruption = Interruption()
            if self._folder is not None:  # without a checkpoint there is nothing to finish
                stack.enter_context(interruption)
            while not self._done():
                if not self._epoch(interruption):
                    if not interruption.requested:
                        raise FastpieError(
                            "Expected to train on, but another process of the training was told to stop; "
                            "what is done is in the checkpoint."
                        )
                    break
        return self._progress.result()

    def _done(self) -> bool:
        return self._progress.stopped_early or self._progress.epoch >= self.epochs

    # ------------------------------------------------------------------ an epoch

    def _epoch(self, interruption: Interruption) -> bool:
        """Train what remains of an epoch; False if it was interrupted, with a checkpoint."""
        progress, epoch = self._progress, self._progress.epoch
        if not progress.begun:
            self._begin(epoch)
            if self.masked is not None:
                self.masked.begin_epoch(epoch)
            progress.begin_epoch()
        if not self._steps(interruption):
            return False
        row = self._row()
        lower = bool(self._monitor and self._monitor.endswith("loss"))
        value = math.nan
        if self._monitor is not None:
            if self._monitor not in row:
                raise FastpieError(
                    f"Expected `monitor` to be a column of the history, {list(row)}, but got "
                    f"{self._monitor!r}."
                )
            value = float(row[self._monitor])
        if self.scheduler is not None and not self._per_step:
            self.scheduler.step(value) if self._plateau else self.scheduler.step()
        best = progress.improved(value, lower=lower)
        progress.history.append(row)
        progress.epoch, progress.begun = epoch + 1, False
        progress.be_patient(self._patience)
        due = self._done() or progress.epoch % self._every == 0
        if self._folder is not None and (best or (progress.best is None and due)):
            self._folder.write_weights(self.objective.model)
        if due:
            self._save()
        self._log.write(progress.history)
        return True

    def _begin(self, epoch: int) -> None:
        seed_everything(seed_of(_BEGIN, self.seed, epoch))
        self.objective.train()
        self.objective.begin_epoch(epoch)

    def _steps(self, interruption: Interruption) -> bool:
        """The steps that remain of an epoch; False if they were interrupted, with a checkpoint."""
        progress, epoch = self._progress, self._progress.epoch
        weights = None if self.attention is None else self.attention.draw_weights(self._ids)
        weights = self._draw_weights if weights is None else weights
        order = epoch_order(self._cut.samples, self.seed, epoch, weights)
        remaining = range(progress.batch, len(self._cut))
        fetched_all = self._feed.batches(
            order,
            map(self._cut.share, remaining),
            (_READING, self.seed, epoch),
            pin_memory=self._device.type == "cuda",
        )
        bar = tqdm(
            total=len(self._cut), initial=progress.batch, desc=f"epoch {epoch}", unit="batch",
            disable=self._hide, leave=False,
        )  # fmt: skip
        with contextlib.closing(fetched_all), bar:
            since = time.perf_counter()
            for number, fetched in zip(remaining, fetched_all, strict=True):
                go_on, samples, lacking = self._agree(len(fetched.ids), interruption)
                if not go_on:
                    return False
                progress.note(self._feed, fetched.unreadable)
                if lacking:
                    progress.skipped_batches += 1
                else:
                    self._train(fetched, samples, number)
                now = time.perf_counter()
                progress.seconds, since = progress.seconds + now - since, now
                progress.batch = number + 1
                bar.update()
        return self._agree(1, interruption)[0]

    def _agree(self, readable: int, interruption: Interruption) -> tuple[bool, int, bool]:
        """Before a batch: whether to go on, its samples, and whether a process has none.

        The processes decide together, or they would wait for each other for ever.
        """
        due = self._minutes is not None and time.monotonic() - self._saved > 60 * self._minutes
        stop, save, samples, lacking = self._ranks.sum(
            [
                int(interruption.requested),
                int(due and not self._ranks.rank),
                readable,
                int(not readable),
            ]
        )
        if stop or save:
            self._save()
        return not stop, samples, lacking > 0

    def _train(self, fetched: Fetched, samples: int, number: int) -> None:
        progress = self._progress
        batch = fetched.to(self._device)
        batch.images = self._feed.normalize(batch.images)
        weights = None
        if self.attention is not None:
            weights = self.attention.weights(batch.ids)
            batch.hard = self.attention.hard(batch.ids).to(self._device)
        seed = seed_of(_STEP, self.seed, progress.epoch, number, self._ranks.rank)
        loss = self._step.step(batch, weights, samples, seed)
        if loss is None:
            self._not_finite(number)
            return
        progress.not_finite = 0
        progress.images += samples
        progress.loss += loss
        if self.masked is not None:
            self.masked.after_step()
        self.objective.after_step()
        if self.scheduler is not None and self._per_step:
            self.scheduler.step()

    def _not_finite(self, number: int) -> None:
        progress = self._progress
        progress.skipped_steps += 1
        progress.not_finite += 1
        if progress.not_finite >= _STOP_AFTER + 16 * self._step.scaler.is_enabled():
            raise FastpieError(
                f"Expected finite gradients, but those of {progress.not_finite} steps in a row are not, "
                f"up to step {number} of epoch {progress.epoch}. Lower the learning rate, give `clip`, "
                "or look at the labels."
            )

    # ------------------------------------------------------------------ after an epoch

    def _row(self) -> dict[str, Any]:
        """The row of the epoch, after its evaluation and mining."""
        progress = self._progress
        loss = sum(self._ranks.all(progress.loss))
        row: dict[str, Any] = {
            "epoch": progress.epoch,
            "loss": loss / progress.images if progress.images else math.nan,
            "images": progress.images,
            "unreadable": progress.share_errors(self._ranks, self._cut.samples),
            "skipped_steps": progress.skipped_steps,
            "skipped_batches": progress.skipped_batches,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "seconds": progress.seconds,
            "images_per_second": progress.images / max(progress.seconds, 1e-9),
        }
        self._step.share_buffers()
        start = time.perf_counter()
        if self._valid is not None:
            metrics, unreadable = evaluate_model(
                self.objective, self._valid, self._ranks, self._device, self._step.autocast()
            )
            row |= {f"valid_{name}": value for name, value in metrics.items()}
            row["valid_unreadable"] = len(unreadable)
        if self._evaluate is not None:
            row |= {f"valid_{k}": float(v) for k, v in self._ranks.first(self._ask).items()}
        middle = time.perf_counter()
        if self._valid is not None or self._evaluate is not None:
            row["evaluation_seconds"] = middle - start
        if self.attention is not None:
            self.attention.step(progress.epoch)
            row["mining_seconds"] = time.perf_counter() - middle
        return row | self._log.gpu()

    def _ask(self) -> dict[str, float]:
        with evaluating(self.objective.model), torch.no_grad():
            return {} if self._evaluate is None else dict(self._evaluate(self.objective.model))

    # ------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        self._saved = time.monotonic()
        if self._folder is not None:
            self._folder.write(self._progress, self._parts())

    def _parts(self) -> dict[str, Any]:
        """What is trained or kept, by name."""
        parts = {
            "objective": self.objective,
            "optimizer": self.optimizer,
            "scaler": self._step.scaler,
            "scheduler": self.scheduler,
            "attention": self.attention,
            "masked": self.masked,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _take_up(self) -> None:
        """Be where the last checkpoint is."""
        found = None if self._folder is None else self._folder.read()
        if found is None:
            return
        self._progress, states = found
        self._progress.be_patient(self._patience)  # which may be another one now
        if self._progress.begun:
            # What an objective keeps of an epoch beside its state (a schedule's place, say) comes from
            # the call; the state is then put back to how the steps since have left it.
            self._begin(self._progress.epoch)
        for name, part in self._parts().items():
            part.load_state_dict(states[name])


def _check_parameters(
    objective: Objective, optimizer: torch.optim.Optimizer, attention: Attention | None
) -> None:
    """Refuse what would be given no gradient, or mined without having been trained."""
    known = {id(p) for p in objective.parameters()}
    if not any(id(p) in known for group in optimizer.param_groups for p in group["params"]):
        raise FastpieError(
            "Expected an optimizer of the objective's parameters, but it has none of them: make it of "
            "objective.parameters()."
        )
    mined = getattr(attention, "model", None)  # one's own attention need not name it
    if mined is not None and not any(id(p) in known for p in mined.parameters()):
        raise FastpieError(
            "Expected an attention to the model that is trained, but it has none of the objective's "
            "parameters: make it of objective.model."
        )


def _check(objective: Any, precision: str, clip: float | None, **counts: tuple[Any, int]) -> None:
    """Refuse arguments that no training can use; `counts` are values and the least of each."""
    if not isinstance(objective, Objective):
        raise FastpieError(
            "Expected `objective` to be an Objective, such as Supervised(model, criterion), but got "
            f"{type(objective).__name__}."
        )
    if precision not in PRECISIONS:
        raise FastpieError(
            f"Expected `precision` to be one of {tuple(PRECISIONS)}, but got {precision!r}."
        )
    for name, (value, least) in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise FastpieError(
                f"Expected `{name}` to be an int of at least {least}, but got {value!r}."
            )
    if clip is not None and not clip > 0:
        raise FastpieError(f"Expected `clip` above 0, but got {clip}.")
