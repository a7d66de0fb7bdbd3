"""`RunningTopK`: the hardest samples of a stream, kept where the scores are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastpie import ops
from fastpie.errors import FastpieError

__all__ = ["RunningTopK"]


class RunningTopK:
    """The k highest scored samples seen so far, on one device, updated without waiting for the host.

    The result is the same, bit for bit, however the stream is cut into batches and shared out among
    ranks: the highest score first, of equal scores the lowest id first. NaN and -inf never enter.

    ::

        hardest = RunningTopK(1000, device="cuda")
        for first, images in batches:
            out = engine(images)
            fastpie.ops.disagreement_top_k(
                out.dense, out.pruned, values=hardest.values, ids=hardest.ids, first_id=first
            )
        scores, ids = hardest.result()

    Attributes:
        values: fp32 [k], the state: sorted scores, -inf in places that are not used yet.
        ids: int64 [k], their ids, -1 in places that are not used yet.
    """

    def __init__(self, k: int, device: torch.device | str | None = None) -> None:
        """Begin with nothing seen.

        Args:
            k: how many samples to keep, at least 1.
            device: of the state and of all scores; torch's default device if None.

        Raises:
            FastpieError: if `k` is not a positive integer.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise FastpieError(f"Expected `k` to be a positive integer, but got {k!r}.")
        self.values = torch.full((k,), -torch.inf, dtype=torch.float32, device=device)
        self.ids = torch.full((k,), -1, dtype=torch.int64, device=device)

    def update(
        self,
        values: Tensor,  # fp32 [n] or [L, n]
        ids: Tensor | None = None,  # int64 [n]
        *,
        first_id: int | None = None,
    ) -> None:
        """Take n samples in.

        Args:
            values: scores, higher = harder; on L levels their mean counts.
            ids: of the samples; or else
            first_id: the ids are `first_id`, `first_id + 1`, ...

        Raises:
            FastpieError: without ids or with both kinds, and for shapes, dtypes or devices that do
                not fit.
        """
        if (ids is None) == (first_id is None):
            got = "neither" if ids is None else "both"
            raise FastpieError(f"Expected either `ids` or `first_id`, but got {got}.")
        ops.top_k_update(self.values, self.ids, values, ids, first_id or 0)

    def merge(self, other: RunningTopK) -> None:
        """Take in what another one kept, say that of another rank, of any k and device."""
        device = self.values.device
        ops.top_k_update(self.values, self.ids, other.values.to(device), other.ids.to(device))

    def result(self) -> tuple[Tensor, Tensor]:  # fp32 [m], int64 [m]
        """Scores and ids of the m <= k samples kept, hardest first, as new tensors.

        Waits for the device: it must say how many there are.
        """
        used = self.values > -torch.inf
        return self.values[used], self.ids[used]

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state, for `load_state_dict`."""
        return {"values": self.values.clone(), "ids": self.ids.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state of the same k, of any device.

        Raises:
            FastpieError: if it is not such a state.
        """
        if set(state) != {"values", "ids"}:
            raise FastpieError(
                f"Expected a state with `values` and `ids`, but got {sorted(map(str, state))}."
            )
        values, ids = (state[name].to(self.values.device) for name in ("values", "ids"))
        if values.shape != self.values.shape:
            raise FastpieError(
                f"Expected a state of k = {len(self.values)}, but got values of shape "
                f"{list(values.shape)}."
            )
        fresh = RunningTopK(len(self.values), self.values.device)
        fresh.update(values, ids)  # checked and in order, whoever wrote it
        self.values.copy_(fresh.values)
        self.ids.copy_(fresh.ids)
