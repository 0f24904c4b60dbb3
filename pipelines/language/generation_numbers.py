"""The arguments of `generate` that are numbers, checked before anything runs."""

from collections.abc import Mapping
from typing import Any

from diffsight.errors import InputError
from diffsight.pipelines.argument_types import fits

_WHOLE = (
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "min_length",
    "num_beams",
    "num_return_sequences",
    "top_k",
    "no_repeat_ngram_size",
)
_ANY = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "length_penalty",
    "guidance_scale",
)


def check_generation_numbers(title: str, given: Mapping[str, Any]) -> None:
    """Raise InputError if an argument of `generate` is not a valid number.

    Args:
        title: The name of the function that takes the arguments.
        given: The arguments by name.
    """
    for names, kind, words in ((_WHOLE, int, "a whole number"), (_ANY, float, "a number")):
        for name in names:
            if given.get(name) is not None and not fits(given[name], kind):
                raise InputError(f"{title}: {name} must be {words}, not {given[name]!r}")
    for name in ("num_beams", "num_return_sequences"):
        if given.get(name) is not None and given[name] < 1:
            raise InputError(f"{title}: {name} must be 1 or more, not {given[name]!r}")
