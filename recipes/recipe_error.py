"""The error that a recipe reports in one line, without a traceback."""


class RecipeError(ValueError):
    """What was asked for cannot be done; the message names the value and the remedy. Nothing has been written."""
