"""Fixtures shared by all suites."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastpie import _C


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not _C.cuda_emulated:
        skip = pytest.mark.skip(reason="this build does not emulate CUDA (make emulate)")
        for item in items:
            if item.get_closest_marker("cuda_emulated"):
                item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c() -> None:
    """A shell ignores SIGINT for what it starts in the background, and processes inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Times of kernels are kept for this session only, and away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTPIE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seed_torch() -> None:
    """Every test starts from the same state of the random generator, whatever ran before it."""
    torch.manual_seed(20240229)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Lets a test call torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., SimpleNamespace]:
    """Calls the entry point in this process (a new one imports torch for seconds)."""

    def call(*arguments: Any) -> SimpleNamespace:
        from fastpie import cli

        monkeypatch.setattr(sys, "argv", ["fastpie", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return SimpleNamespace(code=stop.value.code or 0, out=out, err=err)

    return call
