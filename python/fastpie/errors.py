"""The one error class of fastpie."""

__all__ = ["FastpieError"]


class FastpieError(ValueError):
    """Bad input, or a state that fastpie cannot go on from.

    The message says what was expected and what came.
    """
