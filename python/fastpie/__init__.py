"""fastpie: the hard samples of an image classifier, from where its dense and pruned selves disagree."""

from fastpie.errors import FastpieError
from fastpie.pruning import Masks, prune

__all__ = ["FastpieError", "Masks", "prune"]
