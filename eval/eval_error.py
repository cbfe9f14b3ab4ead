"""The error that an evaluation reports in one line, without a traceback."""


class EvalError(ValueError):
    """What was asked for cannot be done; the message names the value and the remedy."""
