"""The one error of this package."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The text is one sentence that names the file and what is wrong with it."""
