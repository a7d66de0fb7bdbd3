"""`mine()`: the dual forward over a whole data set, resumable."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastpie.dual import DualModel
from fastpie.dual.calibration import statistics_of
from fastpie.errors import FastpieError
from fastpie.mining.ranks import Ranks
from fastpie.mining.reading import Reader
from fastpie.mining.result import MiningResult
from fastpie.mining.run_folder import RunFolder
from fastpie.mining.scoring import DENSE
from fastpie.mining.session import Session
from fastpie.pruning import prune
from fastpie.scores.disagreement import TASKS

__all__ = ["DEFAULT_LADDER", "check_arguments", "loader_of", "mine"]

DEFAULT_LADDER = (0.1, 0.3, 0.5, 0.7)
"""Levels that a plain model is pruned at: moderate ones, at which it keeps its accuracy."""

MOST_COPIES = 255
"""Of a committee."""

Model = DualModel | nn.Module
Models = Model | Sequence[Model | Callable[[], Model]]


def mine(
    dual: Models,
    data: Dataset[Any] | DataLoader[Any],
    out: str | os.PathLike[str],
    *,
    task: str = "multiclass",
    batch_size: int | None = None,
    num_workers: int | None = None,
    read_timeout: float | None = None,
    sample_ids: Sequence[Any] | None = None,
    recalibrate: bool = True,
    keep_logits: bool = False,
    keep_features: bool | str = False,
    committee: int = 0,
    output: str | int | None = None,
    precision: str = "fp32",
    backend: str = "auto",
    device: str | torch.device | None = None,
    models_at_once: int | None = None,
    limit: int | None = None,
    shard: tuple[int, int] = (0, 1),
    retry_errors: bool = False,
    progress: bool | None = None,
    log: str | None = None,
    note: dict[str, Any] | None = None,
) -> MiningResult:
    """Score every sample by the disagreement of the dense and the pruned model.

    Runs in eval mode and leaves `dual` and its model as they were. Samples are taken in sample_id
    order in batches of fixed content, and the kernels that were chosen by timing are kept with the
    run (`plan.json`), so the table is the same bits for equal batch size, threads, instruction set
    and versions, however often the run is interrupted and however many processes share it. Call it
    again with the same arguments to go on where a run stopped; a finished run is returned as it is.
    A crash at any instant loses at most the open part (about 10 s of work); SIGTERM and Ctrl-C lose
    nothing: the batch in hand is finished and kept, and the process ends by the signal.

    Where `torch.distributed` is initialised (torchrun), every process calls `mine` with the same
    arguments; they share the parts of the run, and the folder must be one that all of them see.

    Args:
        dual: the dual model; a plain model is pruned by magnitude at .1, .3, .5 and .7. A list (say
            of the models of several seeds), or of functions that load them, is mined in one pass
            over the data: each model has a run folder `models/<k>` of its own, and the table holds
            means over the models.
        data: a map-style data set of `(image[, label[, sample_id]])` or of dicts with `image`,
            `label`, `sample_id`; or a DataLoader, which lends its data set, batch size, workers and
            collate function (its order is not used). The data set must return the same sample for
            the same index (no random augmentation). With a string attribute `fingerprint` (of its
            labels and preprocessing) a run is refused when that has changed.
        out: the run folder, made if it is not there; or a URL that fsspec knows ("s3://..."), where
            files are put whole and no lock keeps two runs apart: they would do the same work twice.
        task: "multiclass" (labels: class indices), "multilabel" (labels: [C] of 1, 0, NaN),
            "segmentation" or "embedding" (labels are not scored).
        batch_size: samples in a pass; by default the DataLoader's, else 64.
        num_workers: processes that read; by default the DataLoader's, else none.
        read_timeout: seconds that a worker may take for one sample, which is an error after that; by
            default the DataLoader's `timeout`, else 300.
        sample_ids: one for each sample of the data set, for one that does not tell them itself. A
            data set tells them by an attribute `sample_ids`, or through its items (then all are
            read once before the run starts). Without any, the index is the id.
        recalibrate: give the pruned model BatchNorm statistics from the 2,048 samples of lowest id
            hash, on a private copy. The published protocol (PruneCXR) does not.
        keep_logits: write both models' outputs beside the scores (PIE and forgettability need them).
        keep_features: write both models' features; `dual` must name a feature module. "dense": those
            of the dense model alone, which is what neighbours are looked for among.
        committee: this many copies (0, or 2 and more) of the dense model with noise on their weights
            score each sample too, for as many dense passes more: `margin_committee` (mean margin,
            as `margin_pruned`), `js_committee` and `flip_committee` (means against the dense model).
            See `fastpie.dual.committee`.
        output: key or index of the logits in a model that returns a dict or tuple.
        precision: "fp32", "bf16" or, on a GPU, "fp16".
        backend: of the engine, see `DualModel.compile`.
        device: to run on; by default where the model is.
        models_at_once: of several models, how many are held in memory; the data are read once for
            each such group. By default as many as half of the free memory should hold.
        limit: score about this many samples more (whole batches) and stop, in sample_id order.
        shard: (i, n): score only the i-th of n equal stretches of the run; i counts from 0. Several
            processes can do one each, in the same folder, without knowing of each other.
        retry_errors: read again the samples that are in the errors table of a run.
        progress: whether to show a bar; by default where stderr is a terminal.
        log: "csv" or "tensorboard": a row a part in the folder `log/` of the run: images a second,
            seconds waiting for data, copying, computing, scoring and writing, use and power of the
            GPU. See `fastpie.mining.telemetry`.
        note: anything JSON can hold, kept in `run.json`.

    Returns:
        MiningResult: the table, the errors, and the choice of the hardest; `telemetry` tells where
        the time of this call went.

    Raises:
        FastpieError: for a run folder of another configuration, unusable data, labels or outputs,
            a full disk. Samples that cannot be read or scored do not raise: they are in
            `result.errors`.
    """
    check_arguments(task, limit, note, committee, keep_features)
    if not 0 <= shard[0] < shard[1]:
        raise FastpieError(f"Expected a `shard` (i, n) with 0 <= i < n, but got {shard}.")
    several = not isinstance(dual, nn.Module)
    models = [dual] if isinstance(dual, nn.Module) else list(dual)
    loaders = [loader_of(model, keep_features) for model in models]
    if not loaders:
        raise FastpieError("Expected at least one model, but got an empty list.")
    options = {
        "recalibrate": recalibrate,
        "keep_logits": keep_logits,
        "keep_features": keep_features,
        "output": output,
        "precision": precision,
        "backend": backend,
        **({"committee": committee} if committee else {}),
    }
    reader = Reader(data, batch_size=batch_size, num_workers=num_workers, read_timeout=read_timeout)
    ranks = Ranks()
    try:
        session = Session(RunFolder(out), reader, loaders, several, ranks, progress)
        session.run(
            task,
            options,
            device,
            sample_ids=sample_ids,
            models_at_once=models_at_once,
            limit=limit,
            shard=shard,
            retry_errors=retry_errors,
            log=log,
            note=note,
        )
    finally:
        ranks.close()
    result = MiningResult(out)
    result.telemetry = session.telemetry.summary()
    return result


def check_arguments(
    task: str,
    limit: int | None,
    note: dict[str, Any] | None,
    committee: int,
    keep_features: bool | str,
) -> None:
    """What can be told before anything is read; see `mine`.

    Raises:
        FastpieError: for what `mine` would not take.
    """
    if task not in TASKS:
        raise FastpieError(f"Expected `task` to be one of {TASKS}, but got {task!r}.")
    if committee != 0 and not 2 <= committee <= MOST_COPIES:
        raise FastpieError(
            f"Expected a `committee` of 0 (none) or of 2 to {MOST_COPIES} copies, but got {committee}."
        )
    if keep_features not in (True, False, DENSE):
        raise FastpieError(
            f"Expected `keep_features` to be True, False or {DENSE!r}, but got {keep_features!r}."
        )
    if limit is not None and limit < 1:
        raise FastpieError(f"Expected a `limit` of at least 1, but got {limit}.")
    try:
        json.dumps(note)
    except (TypeError, ValueError) as error:
        raise FastpieError(f"Expected a `note` that JSON can hold, but: {error}.") from error


def loader_of(
    model: Model | Callable[[], Model], keep_features: bool | str
) -> Callable[[], DualModel]:
    """A function that gives the dual model, checked."""

    def load() -> DualModel:
        dual = model if isinstance(model, nn.Module) else model()
        if not isinstance(dual, nn.Module):
            raise FastpieError(f"Expected a model, but got {type(dual).__name__}.")
        if not isinstance(dual, DualModel):
            dual = DualModel(dual, prune(dual, DEFAULT_LADDER))
        if keep_features and dual.feature_module is None:
            raise FastpieError(
                "Expected a DualModel with a feature module for keep_features=True, but it names none."
            )
        _check_finite(dual)
        return dual

    return load


def _check_finite(dual: DualModel) -> None:
    # Other buffers may hold infinities by design: the mask of an attention layer, say.
    tensors = {**dict(dual.model.named_parameters()), **statistics_of(dual.model)}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise FastpieError(
                f"Expected finite weights, but `{name}` holds {count} NaN or infinite of "
                f"{tensor.numel()}."
            )
