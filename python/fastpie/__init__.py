"""fastpie: the hard samples of an image classifier, where its dense and pruned selves disagree."""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

from fastpie import nn, ops
from fastpie.dual import DualEngine, DualModel, DualOutput
from fastpie.errors import FastpieError
from fastpie.pruning import Masks, prune
from fastpie.scores import disagreement

if TYPE_CHECKING:
    from fastpie import mining, training
    from fastpie.mining import MiningResult, mine, pie
    from fastpie.training import HardnessSampler

__all__ = [
    "DualEngine",
    "DualModel",
    "DualOutput",
    "FastpieError",
    "HardnessSampler",
    "Masks",
    "MiningResult",
    "disagreement",
    "mine",
    "mining",
    "nn",
    "ops",
    "pie",
    "prune",
    "training",
]

__version__ = metadata.version("fastpie")

_LAZY = {
    "HardnessSampler": "fastpie.training",
    "MiningResult": "fastpie.mining",
    "mine": "fastpie.mining",
    "pie": "fastpie.mining",
}
_LAZY_MODULES = ("mining", "training")


def __getattr__(name: str) -> Any:
    """Import what needs pyarrow on first use: `import fastpie` stays quick."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f"fastpie.{name}")
    raise AttributeError(f"module 'fastpie' has no attribute {name!r}")
