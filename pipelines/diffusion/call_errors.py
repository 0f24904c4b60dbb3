"""Errors of a pipeline's own code, as opposed to those of code that runs inside its call, such as an edit."""

from traceback import walk_tb

CALL_ERRORS = (AttributeError, IndexError, TypeError, ValueError)  # what pipelines raise for arguments they cannot use


def is_of_pipeline(error: Exception) -> bool:
    """Return whether the code of diffusers raised an error itself."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith("diffusers.")
