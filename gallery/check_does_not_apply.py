"""The exception of a check that does not apply."""


class NothingOfTheKind(Exception):
    """The model has nothing of the kind that a check is about. The message says what it lacks."""
