"""Which weights are removed: `prune` chooses them, `Masks` holds and stores the choice."""

from fastpie.pruning.masks import Masks
from fastpie.pruning.prune import prune

__all__ = ["Masks", "prune"]
