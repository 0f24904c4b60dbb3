"""The exception of a check that does not apply."""


class CheckDoesNotApply(Exception):
    """The model lacks what a check is about. The message says what."""
