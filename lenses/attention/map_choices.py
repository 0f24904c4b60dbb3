"""Check the choices for attention maps before an image is drawn: modules, heads, and which maps are kept apart."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffsight.errors import InputError, suggest
from diffsight.lenses.attention.map_memory import check_memory
from diffsight.lenses.denoising.call_checks import Steps, check_steps_ahead, count_steps
from diffsight.lenses.encoders.checks import check_call
from diffsight.lenses.layers import Layers, choose_layers
from diffsight.pipelines.diffusion.attention import Attention, Attentions
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.numbers import as_integer, unpacked

_KEPT = ("steps", "layers", "heads")


def check_maps(
    lens: str, model: Any, prompt: Any, steps: Steps, seed: Any, keep: Any, arguments: Mapping[str, Any]
) -> list[int | slice]:
    """Return the items of `steps`. Raise InputError for an argument that no attention map can take."""
    check_call(lens, model, prompt, seed, None, arguments)
    if keep is not None and keep not in _KEPT:
        raise InputError(f"keep: there is no {keep!r}{suggest(str(keep), _KEPT)}, only {', '.join(_KEPT)}")
    model.check(prompt=prompt, seed=seed, **arguments)
    return check_steps_ahead(steps, model, arguments)


def chosen_attentions(
    attentions: Attentions, kinds: tuple[str, ...], layers: Layers, what: str, model: DiffusionModel
) -> list[Attention]:
    """Return the chosen modules of some kinds, in the order in which they run. `what` names them in errors."""
    found = attentions.of_kind(*kinds)
    placed = [attention for attention in found if attention.grid is not None and attention.unplaced is None]
    if not placed:
        unplaced = [*found, *attentions.of_kind("none")]
        reasons = f": {unplaced[0]}" if unplaced else ""
        raise InputError(f"no {what} was found in {type(model.pipeline).__name__}{reasons}")
    return [placed[number] for number in sorted(choose_layers(layers, len(placed), with_embedding=False))]


def check_map_size(
    model: DiffusionModel, chosen: Sequence[Attention], words: int, keep: str | None, arguments: Mapping[str, Any]
) -> None:
    """Raise InputError if the maps do not fit into memory: the sums in the sizes of the modules, and the maps of each
    group in the largest size."""
    positions = [math.prod(attention.grid) for attention in chosen]
    groups = {
        None: 1,
        "steps": count_steps(model, arguments) or 1,
        "layers": len(chosen),
        "heads": max(attention.heads for attention in chosen),
    }[keep]
    sums = (
        sum(positions) if keep == "layers" else groups * sum({one.grid: math.prod(one.grid) for one in chosen}.values())
    )
    what = f"maps of {words} words" + (f", {groups} {keep} apart," if keep else "")
    check_memory(
        what,
        4 * words * (sums + groups * max(positions)),
        model.pipeline.device,
        "choose fewer words, or fewer of what is kept apart",
    )


def picked_heads(chosen: Sequence[Attention], heads: Iterable[int] | None) -> list[int] | None:
    """Return the chosen heads, which all modules must have; None for all."""
    return None if heads is None else checked_heads(heads, min(attention.heads for attention in chosen))


def checked_heads(heads: Iterable[int], count: int | None) -> list[int]:
    """Return heads as a list, each once. `count` is the number of heads, if it is known."""
    given = list(unpacked(heads))
    picked = list(map(as_integer, given))
    for head, number in zip(given, picked):
        if number is None or number < 0 or (count is not None and number >= count):
            known = "" if count is None else f". The modules have {count} heads, 0 to {count - 1}"
            raise InputError(f"heads: there is no head {head!r}{known}")
    if not picked:
        raise InputError("heads: the selection is empty")
    return list(dict.fromkeys(picked))
