"""The error of a checkpoint that does not fit."""


class WeightError(ValueError):
    """A checkpoint cannot be loaded. The message names the tensor or file, what was expected, and what to do."""
