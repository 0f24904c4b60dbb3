"""Which values have the batch as their first dimension, in a model that runs with a batch of several inputs.

A first dimension of the same size may be something else, such as tokens, experts or frames. So the first time that a
row is asked for, the component, the outermost module that is running, is called with larger batches, see
`larger_batches`. What is found is kept with the component, for calls that are like this one: of the same settings, with
arguments of the same kinds. Where several dimensions have the size of the batch, it is found anew in each run, since
not everything that decides about a layout can be compared.
"""

import sys
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from diffsight.engine.call_settings import ModuleSettings, kinds_of
from diffsight.engine.coroutine import Coroutine
from diffsight.engine.hooks import running_call
from diffsight.engine.larger_batches import Growth, Sizes, has_cache, try_larger_batches
from diffsight.engine.target import Target
from diffsight.engine.users_hooks import may_exchange_dimensions

_MOST = 16  # settings of a component that are kept, kinds of arguments for each, and calls in a run
_NOTHING = Growth("it was asked for when the call that it belongs to had returned")


class CountedCalls(Protocol):
    """The calls of a module; see `diffsight.engine.tapped_call.Tap`."""

    target: Target
    host: "Running"
    active: list[int]  # numbers of the calls in progress, outermost first; the last one leaves as it reaches its output
    entered: int  # number of calls begun so far
    step_base: int  # calls begun before the current step


class Running(Protocol):
    """The run; see `diffsight.engine.run_to_point.Flow`."""

    coroutine: Coroutine | None
    parked: Any  # where the model stands, see `diffsight.engine.points.Point`; None on its way
    taps: dict[tuple[int, str], CountedCalls]
    known_dimensions: "KnownDimensions | None"


class Found(NamedTuple):
    """Which of the things in a value have the batch as their first dimension, see `Growth.of`. If that is unknown,
    `sizes` is None, and `why_unknown` says why."""

    sizes: Sizes | None
    why_unknown: str = ""


_UNKNOWN = Found(None, _NOTHING.why_unknown)


class KnownDimensions:
    """What is known of the values of one run."""

    def __init__(self) -> None:
        # By component, size of the batch and whether it is found anew; and by the number of the call.
        self.growth: dict[tuple, dict[int, Growth]] = {}
        self.new: set[tuple[ModuleSettings, tuple]] = set()  # what this run has found: settings and kinds of arguments
        self.last: dict[tuple, tuple[int, Found]] = {}  # by value: the call that it was last found for, and what


# By component: the settings that it was called with, and what was found, by the kinds of arguments.
_kept: WeakKeyDictionary[nn.Module, list[tuple[ModuleSettings, dict[tuple, Growth]]]] = WeakKeyDictionary()


def batch_dimensions(tap: CountedCalls, index: int, part: str, value: Any, total: int) -> Found:
    """Return which of the tensors in a value have the batch as their first dimension.

    Args:
        tap: The calls of the module that the value belongs to.
        index: The number of the call.
        part: "inputs", "input" or "output".
        value: The value.
        total: The size of the batch.
    """
    target, host = tap.target, tap.host
    leaves = [value] if type(value) is torch.Tensor else tree_leaves(value)
    if target.outer is None and part != "output":  # the inputs of a component define the batch
        return Found([_length(leaf) == total for leaf in leaves])
    if host.known_dimensions is None:
        host.known_dimensions = KnownDimensions()
    key = (target.key, part, len(leaves), total)
    known = host.known_dimensions.last.get(key)
    if known is not None and known[0] == index:
        return known[1]
    component = _component(host, target)
    calls, is_unclear = host.taps[component.key], any(_has_size_twice(leaf, total) for leaf in leaves)
    growths = host.known_dimensions.growth.setdefault((component.key, total, is_unclear), {})
    numbers, latest = _calls_around(tap, index, calls), calls.entered - 1
    if latest in numbers and latest not in growths:
        growths[latest] = _growth(host, component.owner, total, is_unclear)
        for number in [*growths][:-_MOST]:
            del growths[number]
    founds = [_found(growths.get(number, _NOTHING), target, part, leaves) for number in numbers] or [_UNKNOWN]
    found = founds[0] if founds.count(founds[0]) == len(founds) else _UNKNOWN
    if found.sizes and is_unclear:  # the calls with larger batches left out the user's hooks
        hooked = next(filter(may_exchange_dimensions, component.owner.modules()), None)
        if hooked is not None:
            found = Found(None, f"a hook on a {type(hooked).__name__} may have exchanged dimensions of this size")
    host.known_dimensions.last[key] = index, found
    return found


def _component(host: Running, target: Target) -> Target:
    """Return the outermost module around a target, or the target itself, that is being called; else the outermost one.

    While an encoder-decoder model generates, its encoder is called beside the model's own forward pass."""
    around = [*target.around(), target]
    return next((module for module in around if _is_called(host, module)), around[0])


def _is_called(host: Running, target: Target) -> bool:
    """Whether a call of a target is in progress, or the model stands at its output."""
    tap = host.taps.get(target.key)
    return tap is not None and (bool(tap.active) or (host.parked is not None and host.parked.tap is tap))


def _calls_around(tap: CountedCalls, index: int, calls: CountedCalls) -> range:
    """Return the numbers of the calls of a component in which call `index` of a module may have been made."""
    parked = tap.host.parked
    if calls is tap:
        return range(index, index + 1)
    if calls.active and (parked is None or (parked.tap is tap and parked.index == index)):  # being made now
        return range(calls.active[-1], calls.active[-1] + 1)
    return range(calls.step_base) if index < tap.step_base else range(calls.step_base, calls.entered)


def _found(growth: Growth, target: Target, part: str, leaves: list[Any]) -> Found:
    sizes = growth.of(target.owner, part, len(leaves))
    unlike = "with a larger batch, the model does not call it, or with other values"
    return Found(sizes, "" if sizes else growth.why_unknown or unlike)


def _has_size_twice(leaf: Any, total: int) -> bool:
    """Whether a first dimension of the size of the batch could be another one, apart from features at the end."""
    if not isinstance(leaf, torch.Tensor) or leaf.shape[:1] != (total,):
        return False
    return total in leaf.shape[1 : -1 if leaf.is_floating_point() else None]


def _length(leaf: Any) -> int | None:
    return leaf.shape[0] if isinstance(leaf, torch.Tensor) and leaf.ndim else None


def _growth(host: Running, component: nn.Module, total: int, anew: bool) -> Growth:
    """Return what grows with the batch in the running call of a component; with `anew`, as found in this run."""
    frame = sys._getframe() if host.coroutine.is_running else host.coroutine.frame
    call = running_call(frame, component)
    if call is None:
        return _NOTHING
    kept, kinds = _kept.setdefault(component, []), kinds_of(call, total)
    known = next((known for known in kept if known[0].are_current()), None)
    if known is None:
        known = ModuleSettings(component), {}
        kept.insert(0, known)
        del kept[_MOST:]
    growths, new = known[1], host.known_dimensions.new
    if kinds not in growths or (anew and (known[0], kinds) not in new):
        growth = try_larger_batches(component, call, total)
        if growth.is_of_values:
            return growth
        if growth.why_unknown and has_cache(call):  # then it is as in an earlier step
            earlier = (other for kind, other in growths.items() if kind[0] == total and not other.why_unknown)
            growth = next(earlier, growth)
        growths[kinds] = growth
        new.add((known[0], kinds))
        for other in [*growths][:-_MOST]:
            del growths[other]
    return growths[kinds]
