"""`Sweep`: a data set in fixed batches, as a model's inputs, to be read again and again."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from fastpie.dual.inputs import as_arguments
from fastpie.errors import FastpieError
from fastpie.mining.lanes import Lanes
from fastpie.mining.plan import Plan, known_sample_ids
from fastpie.mining.reading import Batch, Kind, Reader, Sample

__all__ = ["Sweep"]

_SAMPLES_LOOKED_AT = 8  # shape and labels of most of them are those of all, as in `mine`


class Sweep:
    """Samples in sample_id order in batches of fixed content, as `mine` takes them.

    Attributes:
        plan: which sample is in which batch.
        kind: what the samples are like; its label is None for a data set without labels.
        lanes: the device, and its streams.
    """

    def __init__(
        self, reader: Reader, device: torch.device, sample_ids: Sequence[Any] | None = None
    ) -> None:
        """Find the ids and look at the first samples.

        Args:
            reader: of the data set.
            device: where the model is.
            sample_ids: one for each sample; by default the data set is asked, see `mine`.

        Raises:
            FastpieError: for ids that do not fit, or no sample that can be read.
        """
        self.lanes = Lanes(device)
        self._reader = reader
        count = len(reader.dataset)
        given = known_sample_ids(reader.dataset) if sample_ids is None else sample_ids
        self._check_ids = given is None and self._items_have_ids()
        if self._check_ids:
            with tqdm(total=count, desc="sample ids", unit="img", leave=False, disable=None) as bar:
                given = reader.read_sample_ids(bar.update)
        elif given is None:
            given = range(count)
            warnings.warn(
                "The data set names no sample ids, so its indices serve as ids. Pass `sample_ids`, "
                "or give the data set an attribute `sample_ids`.",
                stacklevel=4,
            )
        self.plan = Plan.cut(given, reader.batch_size)
        if len(self.plan) != count:
            raise FastpieError(
                f"Expected one sample id for each of the {count} samples, but got {len(self.plan)}."
            )
        self.kind = self._first_samples()

    def _items_have_ids(self) -> bool:
        reads = map(self._reader.read_one, range(len(self._reader.dataset)))
        first = next((sample for sample in reads if isinstance(sample, Sample)), None)
        return first is not None and first.sample_id is not None

    def _first_samples(self) -> Kind:
        found: list[Sample] = []
        reason = "it is empty"
        for index in self.plan.order:
            sample = self._reader.read_one(int(index))
            if isinstance(sample, str):
                reason = sample
                continue
            found.append(sample)
            if len(found) == _SAMPLES_LOOKED_AT:
                break
        if not found:
            raise FastpieError(
                f"Expected samples that can be read, but of {len(self.plan)} none can; the last: "
                f"{reason}"
            )
        labelled = 2 * sum(sample.label is not None for sample in found) >= len(found)
        return Kind.of_most(found, labelled=labelled, batch_size=self.plan.batch_size)

    def batches(self, numbers: Iterable[int]) -> Generator[Batch, None, None]:
        """Batches of the plan, in the order of their numbers. Close the iterator to end the workers."""
        return self.read(map(self.plan.positions, numbers))

    def read(self, positions: Iterable[Sequence[int]]) -> Generator[Batch, None, None]:
        """Batches of any positions, at most `plan.batch_size` in one."""
        yield from self._reader.read(
            self.plan,
            positions,
            like=self.kind,
            check_ids=self._check_ids,
            pin_memory=self.lanes.device.type == "cuda",
        )

    def arguments(self, images: Any) -> tuple[Any, ...]:
        """The images of a batch on the device, as the model's positional arguments."""
        images = self._reader.normalize(self.lanes.to_device(images))
        return as_arguments(tuple(images) if isinstance(images, list) else images)

    def subset(self, count: int) -> Generator[tuple[Any, ...], None, None]:
        """The samples of lowest id hash, for `DualModel.recalibrate`: the same in every sweep.

        Raises:
            FastpieError: if none of them can be read.
        """
        positions = sorted(self.plan.lowest_hashes(count))
        size = self.plan.batch_size
        chunks = [positions[i : i + size] for i in range(0, len(positions), size)]
        found = False
        with contextlib.closing(self.read(chunks)) as batches:
            for batch in batches:
                if batch.images is None:
                    continue
                found = True
                slots = torch.as_tensor(batch.slots, device=self.lanes.device)
                # A tuple within a tuple: `recalibrate` takes the first element of a batch, and
                # spreads it over the arguments of the model.
                yield (
                    pytree.tree_map(
                        lambda leaf, slots=slots: leaf[slots] if isinstance(leaf, Tensor) else leaf,
                        self.arguments(batch.images),
                    ),
                )
        if not found:
            raise FastpieError(
                "Expected readable samples to recalibrate BatchNorm from, but none of the "
                f"{len(positions)} of lowest id hash is."
            )
