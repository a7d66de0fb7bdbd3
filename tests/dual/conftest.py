"""What the tests of the engine share."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastpie.dual import capture as capture_module
from fastpie.dual import tuning

_programs: dict[Any, Any] = {}


def _force_form(patch: pytest.MonkeyPatch, form: str) -> None:
    """Make the kernels of one form the fastest; "mixed": a random choice for each layer."""
    generator = random.Random(5)
    known: dict[Any, float] = {}

    def seconds(self: tuning.Tuner, key: Any, work: Callable[[], Callable[[], Any]]) -> float:
        if key not in known:
            work()()  # what would be timed must run
            known[key] = generator.random()
        if form == "mixed":
            return known[key]
        return 1e-6 if (key[0] == "tensor") == (form == "tensors") else 1e-3

    patch.setattr(tuning.Tuner, "seconds", seconds)


@pytest.fixture(params=["positions", "tensors", "mixed"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels of one form are the fastest; see _force_form."""
    _force_form(monkeypatch, request.param)
    return request.param


@pytest.fixture
def mixed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers in each form: what timing chooses here depends on the machine."""
    _force_form(monkeypatch, "mixed")


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of the same structure share a program: torch.export takes most of a test's time."""
    plain = capture_module.capture

    def capture(model: nn.Module, args: tuple[Any, ...], **kwargs: Any) -> Any:
        shapes = [x.shape[1:] for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
        key = (type(model), repr(model), str(shapes), torch.get_num_threads(), str(kwargs))
        if key not in _programs:
            _programs[key] = plain(model, args, **kwargs)
        return _programs[key]

    monkeypatch.setattr(capture_module, "capture", capture)
