"""Undisturbed runs, which those that are disturbed are compared with."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fault_runs


@pytest.fixture(scope="session", autouse=True)
def _environment() -> Iterator[None]:
    """The processes find `fault_runs`, and have one thread."""
    tests = str(Path(fault_runs.__file__).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", tests, prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        # Or ranks that are started again find the addresses of those before (pytorch issue 135712).
        patch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        yield


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """undisturbed(retried=False, models=0): the folder of such a run."""
    done: dict[tuple[bool, int], Path] = {}

    def folder(retried: bool = False, models: int = 0) -> Path:
        if (retried, models) not in done:
            new = tmp_path_factory.mktemp("undisturbed") / "run"
            fault_runs.finish(new, models=models)
            if retried:
                fault_runs.finish(new, models=models, mended=True, retry_errors=True)
            done[retried, models] = new
        return done[retried, models]

    return folder


@pytest.fixture
def instants() -> random.Random:
    """Random instants; where a test fails, the seed is shown."""
    seed = int(os.environ.get("FASTPIE_FAULTS_SEED", random.randrange(2**32)))
    print(f"FASTPIE_FAULTS_SEED={seed}")
    return random.Random(seed)
