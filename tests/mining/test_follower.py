"""A copy of a model in training is pruned anew by the rule that its masks were chosen by."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastpie
from attending import change
from fastpie import FastpieError
from fastpie.mining.follower import Follower, rule_of
from fastpie.mining.ranks import Ranks
from recording import Small


@pytest.mark.parametrize(
    "rule",
    [
        {"sparsity": 0.5, "method": "filter", "norm": 2, "scope": "layer", "exclude": ["fc"]},
        {"method": "2:4"},
        {"sparsity": [0.3, 0.6], "exclude": ["conv1"]},
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_masks_are_those_of_the_weights_of_the_moment(rule: dict[str, Any], alone: bool) -> None:
    model = Small().eval()
    dual = fastpie.DualModel(model, fastpie.prune(model, **rule))
    if alone and dual.is_ladder:
        pytest.skip("Of one level alone.")
    follower = Follower(dual, None, 0.5, features=False, precision="fp32", backend="reference")
    if alone:
        follower.leave_out_dense()
    change(model, 0)
    x = torch.randn(8, 1, 8, 8)
    follower.follow(Ranks(), lambda: [x])
    fresh = fastpie.DualModel(model, fastpie.prune(model, **rule)).recalibrate([x])
    assert fresh.masks != dual.masks
    with torch.no_grad():
        expected = fresh(x)
    out = follower.refresh(Ranks(), (x,))(x)
    torch.testing.assert_close(out.pruned, expected.pruned)
    torch.testing.assert_close(out.dense, expected.pruned if alone else expected.dense)


def test_masks_that_prune_did_not_choose_are_refused() -> None:
    model = Small()
    mask = {"conv1.weight": torch.rand_like(model.conv1.weight) > 0.5}
    with pytest.raises(FastpieError, match="method 'given'"):
        rule_of(fastpie.Masks.from_tensors(mask, model), model)
