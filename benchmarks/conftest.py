"""Options of `test_operations.py`."""

from __future__ import annotations

import pytest

from benchmarks import networks


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("operations")
    names = list(networks.NETWORKS)
    group.addoption("--network", default="resnet50", choices=names, help="whose layers to time")
    group.addoption("--batch", default=16, type=int, help="images")
    group.addoption("--sparsity", default=0.9, type=float, help="fraction of each weight removed")
    group.addoption("--dtype", default="fp32", choices=["fp32", "bf16"])
    group.addoption("--short", action="store_true", help="every fourth layer only")
