"""Calls of a component with larger batches, which show the dimensions of its values that grow with the batch.

    growth = try_larger_batches(unet, (args, kwargs), total=3)
    growth.of(unet.mid_block, "output", 1)          # [True]: the first dimension of its only tensor is the batch

The component is called twice more, with batches that are larger by one and by two. These calls run on a copy of its
structure, with tensors on the meta device, or with the real weights if the model is small or needs values, see
`trial_mode`. With real values, the entries that were added also have to arrive as they were: chunks of frames, say, may
grow in number with the batch, and are not its rows.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from diffsight.engine.hooks import has_forward_of_its_own
from diffsight.engine.opaque_values import is_cache
from diffsight.engine.random_generators import (
    GivenGenerators,
    generators_of,
    held_by,
    kept_generators,
    states_of,
    states_of_other_libraries,
)
from diffsight.engine.structural_copy import structural_copy, without_global_hooks
from diffsight.engine.torch_state import TorchState, call_in
from diffsight.engine.trial_mode import TrialMode, without_dropout
from diffsight.engine.wrapped_modules import wrapped_path

Shapes = list[tuple[int, ...] | None]  # of everything in a value; None for anything but a tensor
Sizes = list[bool | None]  # for everything in a value: whether its first dimension is the batch; None if another is
Call = tuple[tuple, dict]  # the arguments of a call

_SMALL = 10**7  # parameters: such a model runs faster with its weights than on the meta device
_ROUNDING = 0.05  # relative difference


class Growth:
    """Which dimensions of the values in a component grow with its batch.

    `why_unknown` says why this could not be determined; it is empty if it was. `is_of_values` is True if shapes may
    depend on the values of tensors, as the number of tokens of an expert does. What was found then holds for this one
    call only."""

    def __init__(self, why_unknown: str = "") -> None:
        self.why_unknown = why_unknown
        self.is_of_values = False
        self._sizes: WeakKeyDictionary[nn.Module, dict[tuple[str, int], Sizes]] = WeakKeyDictionary()
        self._firsts: WeakKeyDictionary[nn.Module, dict[str, set[bool | None]]] = WeakKeyDictionary()
        self._varying: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # with more parts in a larger batch

    def of(self, module: nn.Module, part: str, count: int) -> Sizes | None:
        """Return which of the `count` things in a value have the batch as their first dimension.

        The list has True if the first dimension is the batch, None if another one is, False if none is. If the number
        of things depends on the batch, as in a list with a tensor per input, None stands for each of them. The result
        is None instead of a list if nothing is known of such a value.

        A single tensor may also be a part of the value, such as the logits of an output, or computed from it. Then it
        has the batch if all tensors in the value have it that could: those that begin with a dimension of its size."""
        found = self._sizes.get(module, {}).get((part, count))
        if found is None and part in self._varying.get(module, ()):
            return [None] * count
        if found is None and count == 1:
            return [True] if self._firsts.get(module, {}).get(part) == {True} else None
        return found

    def note(self, module: nn.Module, calls: dict[str, list[Shapes]], larger: dict[str, list[Shapes]], total: int):
        """Take note of the shapes of a module's values in the calls with one more entry and with two more."""
        known = self._sizes.setdefault(module, {})
        for part, shapes in calls.items():
            others = larger.get(part, [])
            if {len(shape) for shape in shapes} != {len(shape) for shape in others}:
                self._varying.setdefault(module, set()).add(part)
            found = [_compare(a, b, total) for a, b in zip(shapes, others) if len(a) == len(b)]
            alike = len(found) == len(shapes) == len(others) and all(sizes == found[0] for sizes in found)
            for count in {len(shape) for shape in shapes}:  # if not alike, it may be called for parts of the batch
                known[part, count] = found[0] if alike else [None] * count
            pairs = [pair for a, b in zip(shapes, others) for pair in zip(a, b)]
            firsts = {_is_batch(a, b, total) for a, b in pairs if a and b and 2 * a[0] - b[0] == total}
            self._firsts.setdefault(module, {})[part] = firsts if alike else {None}

    def doubt_time(self) -> None:
        """Take back everything if the supposed batch is the time dimension of a recurrent layer or of attention."""
        if any(map(self._has_time_first, self._sizes)):
            for known in self._sizes.values():
                known.update({key: [None] * len(sizes) for key, sizes in known.items()})
            self._firsts.clear()

    def _has_time_first(self, module: nn.Module) -> bool:
        if getattr(module, "batch_first", True):
            return False
        return any(sizes[:1] == [True] for (part, _), sizes in self._sizes[module].items() if part == "input")


def try_larger_batches(component: nn.Module, call: Call, total: int) -> Growth:
    """Call a copy of a component with batches larger than `total`; return what grows with them."""
    for module in component.modules():
        if has_forward_of_its_own(module) and not wrapped_path(module):
            return Growth(
                f"a {type(module).__name__} has a `forward` of its own, which no copy of the model would have"
            )
    for value in chain.from_iterable(map(held_by, component.modules())):
        if hasattr(type(value), "__del__"):  # a copy would do when it is freed what this one does
            return Growth(f"it holds a {type(value).__name__}, which cannot be copied")
    if any(map(is_lazy, component.parameters())):
        return Growth("it has weights that its first call creates: call the model once, outside of runs")
    state, generators = TorchState.capture().bare(), generators_of(component.modules())
    ways, why = [_as_it_is, _with_empty_caches, _without_caches] if has_cache(call) else [_as_it_is], ""
    for with_weights in (True, False) if _is_small(component) else (False, True):
        why = "" if with_weights else why  # with weights, the reason is the model's own
        for change in ways:
            growth = Growth()
            try:
                shapes = []
                for more in (1, 2):
                    with kept_generators(generators):  # so that both draw the same numbers
                        trial = partial(_call, component, call, total, more, with_weights, change, growth)
                        shapes.append(call_in(state, None, trial))
            except Exception as error:  # of any kind: then the dimensions cannot be determined
                why = why or f"the model fails with a larger batch ({type(error).__name__}: {_in_a_line(error)})"
                continue
            if growth.why_unknown:
                return growth
            for module, seen in shapes[0].items():
                growth.note(module, seen, shapes[1].get(module, {}), total)
            growth.doubt_time()
            return growth
    return Growth(why)


def _is_small(component: nn.Module) -> bool:
    return sum(parameter.numel() for parameter in component.parameters()) < _SMALL


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:100]


def has_cache(call: Call) -> bool:
    """Whether a call has a cache of keys and values. It has begun to fill it, and may fail if it is made again with it.
    A cache changes the lengths of values, not their dimensions."""
    return any(map(is_cache, tree_leaves(call)))


def _as_it_is(call: Call) -> Call:
    return call


def _with_empty_caches(call: Call) -> Call:
    for cache in filter(is_cache, tree_leaves(call)):
        cache.reset()
    return call


def _without_caches(call: Call) -> Call:
    return tree_map(lambda value: None if is_cache(value) else value, call)


def _compare(one_more: Shapes, two_more: Shapes, total: int) -> Sizes:
    return [None if a is None or b is None else _is_batch(a, b, total) for a, b in zip(one_more, two_more)]


def _is_batch(one_more: Sequence[int], two_more: Sequence[int], total: int) -> bool | None:
    if one_more == two_more:
        return False
    is_mixed = isinstance(one_more, _Mixed) or isinstance(two_more, _Mixed)
    return True if (one_more[:1], two_more[:1]) == ((total + 1,), (total + 2,)) and not is_mixed else None


def _call(
    component: nn.Module,
    call: Call,
    total: int,
    more: int,
    with_weights: bool,
    change: Callable[[Call], Call],
    growth: Growth,
) -> dict[nn.Module, dict[str, list[Shapes]]]:
    """Call a copy of a component with a batch of `total + more`, and with `change` of the copied arguments; return the
    shapes of the values that passed its modules."""
    copied = without_dropout(structural_copy(component, with_weights, owns_weights=_is_small(component)))
    seen: dict[nn.Module, dict[str, list[Shapes]]] = {}
    for module, original in zip(copied.modules(), component.modules(), strict=True):
        see = partial(_see, seen.setdefault(original, {}), total)
        module.register_forward_hook(see, with_kwargs=True)
    with _Larger(total, more, with_weights) as larger:
        args, kwargs = change(copy.deepcopy(call))
    if not larger.has_grown:
        growth.why_unknown = f"no tensor that the model is called with has a first dimension of {total}"
    generators = generators_of(copied.modules())
    before, others = states_of(generators), states_of_other_libraries(generators)
    with without_global_hooks(), GivenGenerators() as given, TrialMode(component, copied, total, more) as trial:
        copied(*args, **kwargs)
    growth.is_of_values |= trial.reads_values
    if trial.moves_rows and (trial.draws_numbers or states_of_other_libraries(generators) != others):
        growth.why_unknown = "it may put the batch in another order at random"
    has_drawn = bool(given.restorers) or states_of(generators) != before
    if has_drawn and not (trial.moves_rows or trial.cuts_rows):  # then copies may differ in random numbers alone
        for shapes in chain.from_iterable(calls for parts in seen.values() for calls in parts.values()):
            shapes[:] = [shape and tuple(shape) for shape in shapes]
    return seen


def _see(calls: dict[str, list[Shapes]], total: int, _: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """Note the shapes in a call of a module."""
    values = {"inputs": (args, kwargs), "input": next(iter((*args, *kwargs.values())), None), "output": output}
    for part, value in values.items():
        calls.setdefault(part, []).append([_shape(leaf, total) for leaf in tree_leaves(value)])


def _shape(leaf: Any, total: int) -> tuple[int, ...] | None:
    if not isinstance(leaf, torch.Tensor) or leaf.is_nested:
        return None
    return tuple(leaf.shape) if _repeats_rows(leaf, total) else _Mixed(leaf.shape)


class _Mixed(tuple):
    """The shape of a tensor whose entries are not the rows, though there are as many."""

    __slots__ = ()


def _repeats_rows(leaf: Any, total: int) -> bool:
    """Whether the entries that a larger batch adds to a tensor repeat earlier ones, as in `_Larger`.

    Most numbers in an entry have to be alike, up to rounding: some may tell it from others, as on the diagonal of a
    mask. The answer is yes for anything that has no such entries or cannot be compared."""
    if type(leaf) not in (torch.Tensor, nn.Parameter) or leaf.is_meta or not leaf.ndim:
        return True
    added = leaf.shape[0] - total
    if added not in (1, 2) or leaf.is_quantized or leaf.layout is not torch.strided:
        return True
    copies, originals = leaf[total:], torch.stack([leaf[total - 1], leaf[0]][:added])
    if torch.equal(copies, originals):
        return True
    alike = copies == originals
    if leaf.is_floating_point() or leaf.is_complex():
        alike |= torch.isclose(copies, originals, rtol=_ROUNDING, equal_nan=True)
    return bool((alike.reshape(added, -1).float().mean(1) >= 0.5).all())


class _Larger(TorchFunctionMode):
    """Copies tensors with a batch of `total + more` in place of `total`, on the meta device unless `with_values`.

    The last entry is repeated, then the first one: if shapes depend on the values, both have to count as one. See also
    `_repeats_rows`."""

    has_grown = False

    def __init__(self, total: int, more: int, with_values: bool) -> None:
        super().__init__()
        self._total, self._more, self._has_values = total, more, with_values

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is not torch.Tensor.__deepcopy__:
            return function(*args, **(kwargs or {}))
        tensor = args[0].detach()
        if tensor.shape[:1] == (self._total,):
            self.has_grown = True
            tensor = torch.cat([tensor, tensor[-1:], tensor[:1]])[: self._total + self._more]
        return tensor.clone() if self._has_values else torch.empty_like(tensor, device="meta")
