"""fastpie: the hard samples of an image classifier, from where its dense and pruned selves disagree."""

from fastpie.errors import FastpieError

__all__ = ["FastpieError"]
