"""`Rescan`: a data set through the model of a training as it is now, dense and freshly pruned."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from fastpie.dual import DualModel
from fastpie.dual.inputs import random_state
from fastpie.dual.output import DualOutput
from fastpie.errors import FastpieError
from fastpie.mining.follower import Follower
from fastpie.mining.plan import fingerprint_of
from fastpie.mining.ranks import Ranks
from fastpie.mining.reading import Batch, Problem, Reader, path_of
from fastpie.mining.run_folder import ERRORS_SCHEMA
from fastpie.mining.sweep import Sweep

__all__ = ["Account", "Rescan", "check_state"]

_T = TypeVar("_T")

Account = Callable[[Batch, DualOutput], tuple[list[int], list[Problem]]]
"""Takes what it wants of a batch; the positions that it could use, and why others not."""


class Rescan:
    """Runs a data set through a private copy of the model, pruned anew, whenever it is asked to.

    The training is not touched: the model's weights, buffers, gradients and modes, and the random
    generators of Python, NumPy and torch are as they were. The engine is compiled once and refreshed
    after that. The processes of `torch.distributed` share the batches.

    Attributes:
        follower: the copy, and its engine.
        sweep: the data set in batches.
        errors: what of samples could not be used, by position: stage, error, epoch, the last of each.
    """

    def __init__(
        self,
        model: nn.Module | DualModel,
        data: Dataset[Any] | DataLoader[Any],
        sparsity: float | Sequence[float],
        *,
        features: bool,
        recalibrated_from: Callable[[int], int],
        batch_size: int | None,
        num_workers: int | None,
        read_timeout: float | None,
        sample_ids: Sequence[Any] | None,
        precision: str,
        backend: str,
        device: str | torch.device | None,
    ) -> None:
        """Copy the model and look at the first samples.

        Args:
            model: see `Recorder`.
            data: likewise.
            sparsity: for a model that is no DualModel.
            features: whether to give those that a DualModel names.
            recalibrated_from: of so many samples, how many BatchNorm statistics are taken from; they are
                run through every level each time, in plain PyTorch.
            batch_size: as for `mine`.
            num_workers: as for `mine`.
            read_timeout: as for `mine`.
            sample_ids: as for `mine`.
            precision: as for `mine`.
            backend: as for `mine`.
            device: see `Recorder`.

        Raises:
            FastpieError: for a model that cannot be copied or pruned, or data that cannot be used.
        """
        self._reader = Reader(
            data, batch_size=batch_size, num_workers=num_workers, read_timeout=read_timeout
        )
        self.follower = Follower(
            model, device, sparsity, features=features, precision=precision, backend=backend
        )
        self._options = {"precision": precision, "backend": backend}
        with _apart(self.follower.device):
            self.sweep = Sweep(self._reader, self.follower.device, sample_ids)
        self._recalibrated_from = recalibrated_from(len(self.sweep.plan))
        self.errors: dict[int, tuple[str, str, int]] = {}
        self._example: tuple[Any, ...] = ()

    def try_out(self, account: Account) -> None:
        """Account for the first batch of which a sample can be used.

        What the data or the model is not fit for should show before hours of training.

        Raises:
            FastpieError: if the model does not take a batch, or no sample can be used.
        """
        problem = Problem(0, "read", "it is empty")
        every = range(self.sweep.plan.batches)
        with (
            _apart(self.follower.device),
            contextlib.closing(self.sweep.batches(every)) as batches,
        ):
            for batch in batches:
                problem = next(iter(batch.problems), problem)
                if batch.images is None:
                    continue
                self._example = self.sweep.arguments(batch.images)
                try:
                    out = self.follower.dual(*self._example)
                except Exception as error:
                    shapes = [list(a.shape) for a in self._example if isinstance(a, Tensor)]
                    raise FastpieError(
                        f"Expected the model to take a batch of shape {shapes}, but it raised "
                        f"{type(error).__name__}: {error}"
                    ) from error
                positions, problems = account(batch, out)
                if positions:
                    return
                problem = next(iter(problems), Problem(0, "score", "it has no known label"))
        raise FastpieError(
            f"Expected samples that can be scored, but of {len(self.sweep.plan)} none can; one of "
            f"them: {problem.error}"
        )

    def watch_stages(self) -> None:
        """Give the features of the early stages from now on; after `try_out`.

        Raises:
            FastpieError: for a model without stages, see `fastpie.dual.stage_features`.
        """
        with _apart(self.follower.device):
            self.follower.watch_stages(self._example)

    def leave_out_dense(self) -> None:
        """Run the pruned model alone from now on: what is accounted for has its outputs twice."""
        self.follower.leave_out_dense()

    # ------------------------------------------------------------------ a pass

    def run(
        self, epoch: int, ranks: Ranks, account: Account, share: Callable[[np.ndarray], _T]
    ) -> list[tuple[np.ndarray, _T]]:
        """Every sample, with the model as it is now on rank 0.

        Args:
            epoch: for the errors and the progress bar.
            ranks: the processes that share the batches.
            account: called with every batch of this process that can be read; after `try_out`.
            share: of the positions that this process could use, what the others need to know.

        Returns:
            Of every process, by rank: positions int64 [n], and what it shares.

        Raises:
            FastpieError: for weights that are not finite, or if no sample can be used; `errors` then
                stay as they were.
        """
        with _apart(self.follower.device):
            self.follower.follow(ranks, lambda: self.sweep.subset(self._recalibrated_from))
            engine = self.follower.refresh(ranks, self._example)
            used: list[int] = []
            problems: list[Problem] = []

            def forward(batch: Batch) -> DualOutput | None:
                return None if batch.images is None else engine(*self.sweep.arguments(batch.images))

            def finish(batch: Batch, out: DualOutput | None) -> None:
                problems.extend(batch.problems)
                if out is not None:
                    positions, unusable = account(batch, out)
                    used.extend(positions)
                    problems.extend(unusable)

            batches = range(self.sweep.plan.batches)[ranks.rank :: ranks.count]
            with (
                contextlib.closing(self.sweep.batches(batches)) as read,
                tqdm(
                    total=len(batches),
                    desc=f"epoch {epoch}",
                    unit="batch",
                    leave=False,
                    disable=True if ranks.rank else None,
                ) as bar,
            ):
                for _ in self.sweep.lanes.overlapped(read, forward, finish):
                    bar.update()
            mine = np.array(used, dtype=np.int64)
            shares = ranks.all((mine, share(mine), problems))
        if not any(len(positions) for positions, _, _ in shares):
            first = min(
                (problem for _, _, found in shares for problem in found),
                default=Problem(0, "score", "it has no known label"),
            )
            raise FastpieError(
                f"Expected samples that can be scored, but after epoch {epoch} none of "
                f"{len(self.sweep.plan)} can; the first: {first.error}"
            )
        for _, _, found in shares:
            self.errors.update((p.position, (p.stage, p.error, epoch)) for p in found)
        return [(positions, values) for positions, values, _ in shares]

    @staticmethod
    def goes_on(epoch: int, epochs: Sequence[int], ranks: Ranks, done: str) -> bool:
        """Whether an epoch is later than those done ("recorded"); warns where it is not.

        Raises:
            FastpieError: if the processes do not agree on the epochs done.
        """
        known = ranks.all(epochs)
        if known.count(epochs) < len(known):
            raise FastpieError(
                f"Expected the same epochs on every rank, but they have {done} {known}. All must see "
                "the same folder, or load the same state."
            )
        if epochs and epoch <= epochs[-1]:
            warnings.warn(
                f"Epoch {epoch} is not {done}: epoch {epochs[-1]} already is, and what is {done} "
                "stays as it is. To go back with a checkpoint, load the state_dict() of that time.",
                stacklevel=3,
            )
            return False
        return True

    # ------------------------------------------------------------------ what is known

    def config(self) -> dict[str, Any]:
        """What must be the same for a state to mean the same; JSON."""
        masks = self.follower.dual.masks
        return {
            "sparsities": masks.sparsities,
            "is_ladder": masks.is_ladder,
            **{key: masks.info.get(key) for key in ("method", "scope", "seed", "norm")},
            "weights": sorted(masks),
            "data": f"{len(self.sweep.plan)} samples, {self.sweep.plan.fingerprint()}",
            "samples": fingerprint_of(self._reader.dataset),
            "label": self.sweep.kind.label,
            "batch_size": self._reader.batch_size,
            **self._options,
            "device": self.follower.device.type,
        }

    def error_table(self) -> pa.Table:
        """Columns as in `MiningResult.errors`, and `epoch`, the last one with an error."""
        ids, order = self.sweep.plan.sample_ids, self.sweep.plan.order
        rows = [
            {
                "sample_id": ids[position],
                "path": path_of(self._reader.dataset, int(order[position])),
                "stage": stage,
                "error": error,
                "epoch": epoch,
            }
            for position, (stage, error, epoch) in sorted(self.errors.items())
        ]
        return pa.Table.from_pylist(
            rows, schema=ERRORS_SCHEMA.append(pa.field("epoch", pa.int64()))
        )

    def error_state(self) -> list[list[Any]]:
        """`errors` as numbers and text."""
        return [[position, *error] for position, error in sorted(self.errors.items())]

    def load_error_state(self, state: Sequence[Sequence[Any]]) -> None:
        """Take `errors` of `error_state`."""
        self.errors = {p: (stage, error, epoch) for p, stage, error, epoch in state}


def check_state(what: str, format: str, state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a state of another format or configuration.

    Raises:
        FastpieError: that names what differs.
    """
    if state.get("format") != format:
        raise FastpieError(
            f"Expected a state of format {format!r}, but got {state.get('format')!r}."
        )
    stored = state["config"]
    differing = [
        f"{key}: {stored.get(key)!r:.80} in the state, {value!r:.80} now"
        for key, value in now.items()
        if stored.get(key) != value
    ]
    if differing:
        raise FastpieError(
            f"Expected the state of {what} made with the same arguments, but it differs in "
            + "; ".join(differing)
            + "."
        )


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
