"""`hidden.grad` before `loss.backward()`, which code for early versions of nnsight reads, saves and edits.

    with model.trace(prompt):
        hidden = model.transformer.h[0].output[0]
        gradient = hidden.grad.save()           # stands for the gradient until backward() has computed it
        hidden.grad[:, 0] = 0                   # applied at that time
        model.lm_head.output.sum().backward()
    gradient.norm()                             # can be used like a tensor from then on

In the block of a trace, `.grad` of a tensor that autograd computes (not of a parameter) returns a `LaterGradient`. When
the gradient arrives, a hook on the tensor sets its value and applies the recorded operations in order.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from functools import partial
from threading import Lock
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from diffsight.errors import DiffsightError, OutOfOrderError

_PLAIN_GRAD, _PLAIN_REQUIRES_GRAD = torch._C.TensorBase.grad, torch._C.TensorBase.requires_grad
_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")}
_SPECIAL = {
    *(f"__{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "abs")),
    *(f"__r{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "matmul")),
    *(f"__{name}__" for name in ("eq", "ne", "lt", "le", "gt", "ge", "getitem", "and", "or", "xor", "invert")),
}
_NEEDS_VALUE = {
    f"__{name}__"
    for name in ("bool", "float", "int", "complex", "len", "iter", "index", "contains", "format", "reduce_ex")
}


class LaterGradient:
    """A gradient that `backward()` has not computed yet, or a value computed from such gradients.

    Args:
        tensor: The tensor whose gradient this is; None for a value computed from gradients.
    """

    __hash__ = object.__hash__

    def __init__(self, tensor: torch.Tensor | None = None, operands: tuple["LaterGradient", ...] = ()) -> None:
        self._known: Any = None
        self._is_known = False
        self._like = None if tensor is None else tensor.detach().to("meta")  # has the tensor's shape and type
        self._device = None if tensor is None else tensor.device
        self._programs = {id(p): p for o in operands for p in o._programs.values()}

    @property
    def value(self) -> Any:
        """The gradient itself.

        Raises DiffsightError before `backward()` has computed it."""
        if not self._is_known:
            raise DiffsightError(
                "this gradient does not exist yet: no backward() has reached its tensor since `.grad` was read. Call "
                "backward() after that line. Until then it can be saved, indexed, computed with and changed; to look "
                "at gradients as they are computed, write `with loss.backward():`"
            )
        return self._known

    def save(self) -> "LaterGradient":
        """Return the gradient itself: a name bound in a run stays bound after it."""
        return self

    def become(self, value: Any) -> None:
        """Set the value, now that it is known."""
        self._known, self._is_known, self._like, self._programs = value, True, None, {}

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _applied(function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"a gradient has no {name!r}")
        if self._is_known:
            return getattr(self._known, name)
        if self._like is not None and name == "device":
            return self._device
        if self._like is not None and name in ("shape", "dtype", "ndim", "size", "dim", "numel"):
            return getattr(self._like, name)
        if name in ("item", "tolist", "numpy"):
            return getattr(self.value, name)
        if not callable(getattr(torch.Tensor, name)):
            return _applied(getattr, (self, name), {}) if name in ("T", "mT", "data") else self.value
        return partial(_applied_to, lambda own, *args, **kwargs: getattr(own, name)(*args, **kwargs), self)

    def __setitem__(self, key: Any, value: Any) -> None:
        _applied(operator.setitem, (self, key, value), {})

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> numpy.ndarray:
        array = self.value.__array__(dtype)
        return array.copy() if copy else array

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return deepcopy(self.value, memo)

    def __repr__(self) -> str:
        return repr(self._known) if self._is_known else "<a gradient that backward() has not computed yet>"


def _special(name: str) -> Callable:
    def method(own: Any, *args: Any, **kwargs: Any) -> Any:
        if name in _IN_PLACE:
            _applied(lambda value, *given: getattr(value, name)(*given), (own, *args), {})
            return own
        if name in _NEEDS_VALUE:
            return getattr(own.value, name)(*args, **kwargs)
        return _applied(lambda value, *given: getattr(value, name)(*given), (own, *args), {})

    return method


for _name in _SPECIAL | _IN_PLACE | _NEEDS_VALUE:
    setattr(LaterGradient, _name, _special(_name))


def _applied_to(function: Callable, *args: Any, **kwargs: Any) -> Any:
    return _applied(function, args, kwargs)


def _applied(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call a function of gradients, now or as soon as all of them are known."""
    operands = tuple(leaf for leaf in tree_leaves((args, kwargs), _is_later) if isinstance(leaf, LaterGradient))

    def call() -> Any:
        given = tree_map_only(LaterGradient, lambda later: later.value, (args, kwargs), is_leaf=_is_later)
        return function(*given[0], **given[1])

    if all(operand._is_known for operand in operands):
        return call()
    result = LaterGradient(operands=operands)
    step = (operands, call, result)
    for program in result._programs.values():
        program.steps.append(step)
    return result


def _is_later(value: Any) -> bool:
    return isinstance(value, LaterGradient)


class Program:
    """The operations applied to the gradient of one tensor before it exists."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.steps: list[tuple[tuple[LaterGradient, ...], Callable[[], Any], LaterGradient]] = []
        self.current = self._new(tensor)
        self._first = self.current
        self._hook = tensor.register_hook(self._arrive)
        self._replaced: list[LaterGradient] = []

    def replace(self, tensor: torch.Tensor, value: Any) -> None:
        """Replace the gradient with another value: `hidden.grad = value`."""
        if value is self.current:  # the assignment that ends `hidden.grad *= 2`
            return
        held = value if isinstance(value, LaterGradient) else None
        self.current = self._new(tensor)
        operands = (self._first,) if held is None else (self._first, held)
        self.steps.append((operands, lambda: value if held is None else held.value, self.current))

    def _new(self, tensor: torch.Tensor) -> LaterGradient:
        later = LaterGradient(tensor)
        later._programs = {id(self): self}
        return later

    def _arrive(self, gradient: torch.Tensor) -> torch.Tensor | None:
        self._hook.remove()
        own = gradient.clone() if self.steps else gradient
        self._first.become(own)
        for operands, call, result in self.steps:
            if not result._is_known and all(operand._is_known for operand in operands):
                result.become(call())
        return self.current.value if self.steps else None


_programs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_reader: ContextVar[Any] = ContextVar("diffsight_gradient_reader", default=None)
_held: ContextVar[list[torch.Tensor]] = ContextVar("diffsight_held_tensors")
_freed: ContextVar[list[Any]] = ContextVar("diffsight_freed_graphs")  # the last nodes of graphs that are used up
_lock, _users = Lock(), [0]


@contextmanager
def reading_gradients(reader: Any = None) -> Iterator[None]:
    """Let `.grad` return gradients that do not exist yet.

    Args:
        reader: An object whose `read(tensor)` and `write(tensor, value)` serve `.grad`; None to use `LaterGradient`.
    """
    with _lock:
        _users[0] += 1
        torch.Tensor.grad = property(_get, _set, _PLAIN_GRAD.__delete__)
        torch.Tensor.requires_grad = property(_PLAIN_REQUIRES_GRAD.__get__, _set_requires_grad)
    token = _reader.set(reader) if reader is not None else None
    held, freed = _held.set([]), _freed.set([])
    try:
        yield
    finally:
        _held.reset(held)
        _freed.reset(freed)
        if token is not None:
            _reader.reset(token)
        with _lock:
            _users[0] -= 1
            if not _users[0]:
                del torch.Tensor.grad, torch.Tensor.requires_grad


def _get(tensor: torch.Tensor) -> Any:
    reader = _reader.get()
    if reader is not None and tensor.requires_grad:
        return reader.read(tensor)
    known = None if not tensor.is_leaf and not tensor.retains_grad else _PLAIN_GRAD.__get__(tensor)
    return known if known is not None or _has_own(tensor) else _program_of(tensor).current


def _set(tensor: torch.Tensor, value: Any) -> None:
    reader = _reader.get()
    if reader is not None and tensor.requires_grad:
        reader.write(tensor, value)
    elif value is None or _has_own(tensor):
        _PLAIN_GRAD.__set__(tensor, value)
    else:
        _program_of(tensor).replace(tensor, value)


def _set_requires_grad(tensor: torch.Tensor, value: bool) -> None:
    """Set `requires_grad`. PyTorch refuses to set it on computed tensors, even if it is already True."""
    if not (value and _PLAIN_REQUIRES_GRAD.__get__(tensor)):
        _PLAIN_REQUIRES_GRAD.__set__(tensor, value)


def _has_own(tensor: torch.Tensor) -> bool:
    """Return whether `.grad` of a tensor has its usual PyTorch meaning."""
    return isinstance(tensor, nn.Parameter) or not tensor.requires_grad or tensor.retains_grad


def note_freed(node: Any) -> None:
    """Note that `backward()` has used up the graph that ends in a node. None stands for no graph."""
    freed = _freed.get(None)
    if node is not None and freed is not None:
        freed.append(node)


def _is_freed(tensor: torch.Tensor) -> bool:
    """Return whether the graph that a tensor was computed in is used up, so that its gradient will never come."""
    waiting = [*_freed.get()]
    seen = {*waiting}
    for node in waiting:
        inner = {earlier for earlier, _ in node.next_functions if earlier is not None} - seen
        seen |= inner
        waiting += inner
    return tensor.grad_fn in seen


def _program_of(tensor: torch.Tensor) -> Program:
    if tensor not in _programs:
        if _is_freed(tensor):
            raise OutOfOrderError(
                "this gradient is past: backward() has been called, and the gradient of a computed tensor is kept only "
                "if `.grad` was read before, or retain_grad() called. Read `.grad` before backward()"
            )
        _programs[tensor] = Program(tensor)
        _held.get().append(tensor)  # keeps the tensor's gradient available until the block ends
    return _programs[tensor]
