"""The error that ends a command."""


class UserError(Exception):
    """Something the user can put right. The text is one sentence that says what to do."""

    source = "runtime: "
    """What the command line prints before the text."""
