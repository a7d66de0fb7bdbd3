"""The pictures and heat maps of the samples that a report shows."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from tqdm import tqdm

from fastpie.dual import DualModel
from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult
from fastpie.report.columns import Columns
from fastpie.report.heatmaps import HeatMap, heat_map
from fastpie.report.identities import Identities
from fastpie.report.thumbnails import Pictures, Sizes, picture_of

__all__ = ["Gallery"]

_LARGE = 100  # samples, the hardest, that have a larger picture too
_LARGE_SIDE = 448
_LARGE_SHARE = 0.2  # of the budget, for those


class Gallery:
    """Pictures of some samples, as JSON can hold them.

    Attributes:
        note: why there are no pictures, or not all of them; empty if there is nothing to say.
        map_note: of the heat maps, likewise.
    """

    def __init__(
        self, result: MiningResult, dataset: Any, some: Columns, identities: Identities
    ) -> None:
        """Find the samples in the data set.

        Args:
            result: the run.
            dataset: of the run, or None.
            some: the samples, hardest first.
            identities: says what may be shown of an error.
        """
        self._some = some
        self._ids = some.texts("sample_id")
        self._pictures = Pictures(dataset, result, self._ids, identities.reason)
        self._reason = identities.reason
        self._output = result.record["config"].get("output")
        self._task = result.record["config"]["task"]
        self._maps: dict[int, HeatMap] = {}
        self.note = self._pictures.note if self._ids else ""
        self.map_note = ""

    @property
    def found(self) -> bool:
        """Whether the data set has any of the samples."""
        return bool(len(self._pictures))

    def draw_heat_maps(
        self, dual: DualModel, count: int, module: str | None, sparsity: float | None
    ) -> None:
        """Heat maps of the first samples; what fails becomes a note."""
        if not self.found:
            self.map_note = "There are no heat maps: they need the data set."
            return
        failed: dict[str, int] = {}
        for row in range(min(count, len(self._ids))):
            if self._ids[row] not in self._pictures:
                continue
            try:
                image = self._pictures.read(self._ids[row])
            except Exception:  # noqa: S112 - its card says so
                continue
            try:
                self._maps[row] = heat_map(
                    dual,
                    image,
                    self._class(row),
                    module=module,
                    sparsity=sparsity,
                    output=self._output,
                )
            except FastpieError as error:  # of ours: it names no sample
                failed[str(error)] = failed.get(str(error), 0) + 1
            except Exception as error:  # a model is anybody's code
                reason = self._reason(error)
                failed[reason] = failed.get(reason, 0) + 1
        if failed:
            said = max(failed, key=lambda reason: failed[reason])
            self.map_note = f"{sum(failed.values())} heat maps could not be drawn: {said}"
        elif self._maps:
            first = next(iter(self._maps.values()))
            self.map_note = (
                f"The {len(self._maps)} hardest have heat maps (Grad-CAM at module {first.module}, pruned "
                f"at {first.sparsity:g})."
            )

    def nothing(self) -> dict[str, Any]:
        """What `encode` gives, without a picture."""
        count = len(self._ids)
        maps = {str(row): self._encoded_map(row, (1, 1)) for row in self._maps}
        found = {"any": self.found, "small": [None] * count, "missing": {}, "large": {}}
        return {**found, "maps": maps, "map_note": self._detail_note()}

    def encode(self, budget: int) -> dict[str, Any]:
        """Pictures, in at most so many characters: `small` for all samples, `large` for the hardest.

        Args:
            budget: characters.
        """
        found = self.nothing()
        count = sum(i in self._pictures for i in self._ids)
        many = min(_LARGE, count)
        large = Sizes(int(_LARGE_SHARE * budget), many, _LARGE_SIDE)
        small = Sizes(budget - int(_LARGE_SHARE * budget), count)
        left_out = 0
        rows = [row for row, i in enumerate(self._ids) if i in self._pictures]
        missing = set(range(len(self._ids))) - set(rows)
        found["missing"] = {str(row): "no picture" for row in missing} if self.found else {}
        for number, row in enumerate(tqdm(rows, desc="pictures", disable=None, leave=False)):
            try:
                picture = picture_of(self._pictures.look(self._ids[row]), _LARGE_SIDE)
            except Exception as error:  # a data set is anybody's code, a bad file no reason to stop
                found["missing"][str(row)] = f"cannot be shown: {self._reason(error)}"
                small.skip()
                if number < many:
                    large.skip()
                continue
            uri = small.uri(picture)
            if uri is None:
                left_out += 1
                found["missing"][str(row)] = "left out for size"
            found["small"][row] = uri
            if number < many:
                bigger = large.uri(picture)
                if bigger is not None and uri is not None and len(bigger) > len(uri):
                    found["large"][str(row)] = bigger
            if row in self._maps:
                found["maps"][str(row)]["picture"] = list(picture.size)
        self.note = self._pictures.note
        if left_out:
            self.note = (
                f"{self.note} {left_out:,} samples have no picture: the file would grow beyond 20 MB."
            ).strip()
        return found

    @property
    def classes(self) -> set[int]:
        """Those that the heat maps are of."""
        return {found.klass for found in self._maps.values()}

    def _class(self, row: int) -> int | list[int] | None:
        """The class that the heat map is of: the label or labels, else the prediction."""
        labels, several = self._some.numbers("label"), self._some.multilabels()
        if several is not None:
            return np.flatnonzero(several[row] == 1).tolist() or None
        if labels is not None and np.isfinite(labels[row]):
            return int(labels[row])
        return None

    def _detail_note(self) -> str:
        return "" if not self._maps else "Heat maps are drawn for the hardest samples only."

    def _encoded_map(self, row: int, picture: tuple[int, int]) -> dict[str, Any]:
        found = self._maps[row]
        overlap = found.overlap
        return {
            "size": list(found.dense.shape),
            "picture": list(picture),
            "dense": _bytes(found.dense),
            "pruned": _bytes(found.pruned),
            "class": found.klass,
            "sparsity": found.sparsity,
            "overlap": None if overlap is None else round(overlap, 3),
        }


def _bytes(values: np.ndarray) -> str:  # [h, w] in [0, 1]
    return base64.b64encode(np.round(255 * values).astype(np.uint8).tobytes()).decode()
