"""Windows of denoising steps: sets of steps in which an intervention acts together.

choose_windows(None, 20)                        # {"all steps": range(0, 20)}
choose_windows("each", 3)                       # {"0": (0,), "1": (1,), "2": (2,)}
choose_windows([0, slice(1, 5), -1], 20)        # {"0": (0,), "1-4": (1, 2, 3, 4), "19": (19,)}
"""

from collections.abc import Iterable
from typing import Any

from diffsight.errors import InputError
from diffsight.lenses.denoising.call_checks import choose_steps
from diffsight.pipelines.numbers import as_integer, as_slice, unpacked

Windows = str | int | slice | Iterable[int | slice | range] | None


def check_windows(steps: Windows) -> list[Any] | str | None:
    """Return the items that the user passed as steps, before the number of steps is known.

    Raises:
        InputError: The items are not steps.
    """
    if steps is None or (isinstance(steps, str) and steps in ("each", "all")):
        return steps
    steps = unpacked(steps)
    items = [steps] if isinstance(steps, (int, slice, range)) else steps
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise InputError(f'steps are "all", "each", or a list of integers, slices and ranges, not {steps!r}')
    items = list(items)
    for item in items:
        found = item if isinstance(item, range) else as_slice(item) if isinstance(item, slice) else as_integer(item)
        if found is None:
            raise InputError(f"a window of steps is an integer, a slice or a range, not {item!r}")
    if not items:
        raise InputError('no steps are chosen: pass some, "each" or "all"')
    return items


def choose_windows(steps: Windows, count: int) -> dict[str, tuple[int, ...]]:
    """Return the steps of each window by its name.

    Args:
        steps: None or "all": all steps together. "each": each step by itself. A list: each item is one window, a step,
            or a slice or range of steps.
        count: The number of steps of the run.

    Raises:
        InputError: A step does not exist.
    """
    items = check_windows(steps)
    if items is None or items == "all":
        return {"all steps": tuple(range(count))}
    items = list(range(count)) if items == "each" else items
    found = {}
    for item in items:
        chosen = choose_steps(item if isinstance(item, slice) else [*item] if isinstance(item, range) else item, count)
        found[_name(chosen)] = chosen
    return found


def _name(steps: tuple[int, ...]) -> str:
    if len(steps) > 1 and steps == tuple(range(steps[0], steps[-1] + 1)):
        return f"{steps[0]}-{steps[-1]}"
    return ", ".join(map(str, steps))
