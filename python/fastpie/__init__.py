"""fastpie: the hard samples of an image classifier, where its dense and pruned selves disagree."""

from importlib import metadata
from typing import TYPE_CHECKING, Any

from fastpie import ops
from fastpie.dual import DualEngine, DualModel, DualOutput
from fastpie.errors import FastpieError
from fastpie.pruning import Masks, prune
from fastpie.scores import disagreement, pie

if TYPE_CHECKING:
    from fastpie.mining import MiningResult, mine

__all__ = [
    "DualEngine",
    "DualModel",
    "DualOutput",
    "FastpieError",
    "Masks",
    "MiningResult",
    "disagreement",
    "mine",
    "ops",
    "pie",
    "prune",
]

__version__ = metadata.version("fastpie")

_LAZY = {"MiningResult": "fastpie.mining", "mine": "fastpie.mining"}


def __getattr__(name: str) -> Any:
    """Import what needs pyarrow on first use: `import fastpie` stays quick."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastpie' has no attribute {name!r}")
