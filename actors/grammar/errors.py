"""What is wrong with a constraint."""


class BadGrammar(ValueError):
    """A constraint that cannot be kept; the text is one sentence for the client."""
