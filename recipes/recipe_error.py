"""The errors that a recipe reports in one line, without a traceback."""

# What transformers, accelerate and torch raise for arguments that they refuse.
REFUSALS = (ValueError, TypeError, ImportError, OSError, RuntimeError, NotImplementedError)


class RecipeError(ValueError):
    """What was asked for cannot be done; the message names the value and the remedy. Nothing has been written."""
