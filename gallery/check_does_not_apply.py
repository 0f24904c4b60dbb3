"""The exception for a check that does not apply."""


class CheckDoesNotApply(Exception):
    """The model lacks the feature that a check tests. The message names it."""
