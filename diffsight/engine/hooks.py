"""Overrides: what a run puts in the place of what the model calls, so that the calls go through its taps.

Every module that a run follows has for the time of the run a `forward` of its own, which counts its calls, or sends
them through a tap. Ordinary hooks would do the same, at several times the cost: a module that has any leaves PyTorch's
fast path. Within other people's hooks it stands where the last of those before and the first of those after the call
would, and that is where a run belongs: transformers captures hidden states in hooks, and an edit has to be in those.

Methods are tapped by giving the object a subclass of its class for the time of the run: unlike a wrapper stored on the
instance this follows copies of the object (pipelines step a copy of their scheduler) and reaches `__call__`. Names and
signatures stay those of the original. Where several runs are open at once, the last one puts things back.
"""

import copy
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from threading import RLock
from types import FrameType, FunctionType, MethodType
from typing import Any

from greenlet import getcurrent
from torch import nn

from diffsight.engine.coroutine import current_owner

FORWARD = "forward"
COMPILED = "_compiled_call_impl"  # of a module after `module.compile()`: what its calls go to
_OWNER = "_diffsight_owner"  # on a tapped object: whose taps its calls go to; copies carry it along

_lock = RLock()


# ---- the forward passes of modules

_followed: dict[int, list] = {}  # id of a module: what overrides its calls, where, what was there, how many runs follow
# Python heeds signals, and newer versions collect garbage, where a function has been called. So that a module is always
# either followed or not, whatever comes in between, all that says so is changed without a call.


def follow(modules: Iterable[nn.Module], followed: list) -> None:
    """Sends the calls of modules through the taps of the run that makes them, until as many have said `unfollow`. Puts
    each on the list `followed`."""
    for module in modules:
        with _lock:  # within the loop: Python 3.13 would not let go of it where an interrupt comes between two turns
            number = id(module)
            if number in _followed:
                _followed[number][3] += 1
            else:
                held, forward = module.__dict__, getattr(type(module), FORWARD, None)
                if type(forward) is FunctionType and FORWARD not in held and held.get(COMPILED) is None:
                    name, own, function = FORWARD, None, _through_taps(forward)
                else:
                    name, own, function = _of_its_own(module)
                put = MethodType(function, module)
                if own is not None:
                    put = functools.update_wrapper(_InPlaceOf(function, module), own)
                _followed[number] = [put, name, own, 1]
                held[name] = put
            followed.append(module)


def unfollow(followed: list) -> None:
    """Takes off again what `follow` has put on, and each module off the list."""
    while followed:
        with _lock:  # within the loop, as above
            module = followed[-1]
            number, held = id(module), module.__dict__
            put, name, own, _ = known = _followed[number]
            is_ours = held.get(name) is put  # or someone has put another there meanwhile
            known[3] -= 1
            del followed[-1]
            if not known[3]:
                del _followed[number]
                if is_ours and own is None:
                    del held[name]
                elif is_ours:
                    held[name] = own


class _InPlaceOf(functools.partial):
    """What stands in the place of an instance's own forward pass; in a copy of the instance, a copy of that does."""

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)


@functools.cache
def _through_taps(forward: Callable) -> Callable:
    """The forward pass of a class of modules, through the taps."""
    return functools.wraps(forward)(_through(forward))


def _of_its_own(module: nn.Module) -> tuple[str, Any, Callable]:
    """What the calls of a module go to, where that is on the instance: the name, what is there, and that through the
    taps. Compiled code is called through them, and left as it is."""
    held = module.__dict__
    name = FORWARD if held.get(COMPILED) is None else COMPILED
    own = held.get(name)
    target = module.forward if own is None else own  # a module of TorchScript looks its own up when it is asked
    return name, own, _through(lambda module, /, *args, **kwargs: target(*args, **kwargs))


def _through(original: Callable) -> Callable:
    """`original`, of a module and arguments, through the taps of the run that calls it."""

    def forward(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        flow = getattr(getcurrent(), "owner", None)
        if flow is None:
            return original(module, *args, **kwargs)
        taps, number = flow.taps, id(module)
        calls = taps.counts.get(number)
        if calls is None:
            tap = taps.get((number, FORWARD))
            if tap is None:
                return original(module, *args, **kwargs)
            return tap.call(MethodType(original, module), args, kwargs)
        taps.counts[number] = calls + 1
        output = original(module, *args, **kwargs)
        if number in taps.counts:
            return output
        tap = taps.get((number, FORWARD))  # it was asked for while it ran
        return output if tap is None else tap.leave(output)

    return forward


_CODE = _through(nn.Module.forward).__code__


def count_running(frame: FrameType | None, module: nn.Module) -> int:
    """How many calls of a followed module have begun and not ended on the stack that ends with `frame`."""
    running = 0
    while frame is not None:
        running += frame.f_code is _CODE and frame.f_locals["module"] is module
        frame = frame.f_back
    return running


# ---- methods


class Override:
    """A function put in the place of a method of one object, for as long as any run uses it."""

    _users: Counter = Counter()
    _first: dict = {}  # the override that was put on, of those of one method

    def __init__(self, target: Any, name: str) -> None:
        self.target, self.name = target, name
        self.key = (id(target), name)
        with _lock:
            Override._users[self.key] += 1
            if Override._users[self.key] == 1:
                self.put_on()
                Override._first[self.key] = self

    def remove(self) -> None:
        with _lock:
            Override._users[self.key] -= 1
            if not Override._users[self.key]:
                del Override._users[self.key]
                Override._first.pop(self.key).take_off()


class MethodOverride(Override):
    """Sends the calls of one method, of an object and of copies of it, through the taps of the run that makes them."""

    def put_on(self) -> None:
        self.own = own = self.target.__dict__.get(self.name)
        if own is not None:  # the user has put another on the object itself, a compiled one for instance

            @functools.wraps(own)
            def method(*args: Any, **kwargs: Any) -> Any:
                flow = current_owner()
                tap = flow.taps.get(self.key) if flow is not None else None
                return own(*args, **kwargs) if tap is None else tap.call(own, args, kwargs)

            self.put = self.target.__dict__[self.name] = method
            return
        cls = type(self.target)
        names = frozenset({self.name, *getattr(cls, "_diffsight_names", ())})
        self._become(getattr(cls, "_diffsight_class", cls), names)
        self.target.__dict__[_OWNER] = id(self.target)

    def take_off(self) -> None:
        if self.own is not None:
            if self.target.__dict__.get(self.name) is self.put:
                self.target.__dict__[self.name] = self.own
            return
        for target in (self.target, *_copies.pop(id(self.target), ())):
            self.target = target
            cls = type(target)
            self._become(cls._diffsight_class, cls._diffsight_names - {self.name})
            if not hasattr(type(target), "_diffsight_class"):
                target.__dict__.pop(_OWNER, None)

    def _become(self, cls: type, names: frozenset[str]) -> None:
        object.__setattr__(self.target, "__class__", _tapped_class(cls, names) if names else cls)


_copies: dict[int, weakref.WeakSet] = {}  # by the id of a tapped object: the copies of it that were made meanwhile


@functools.cache
def _tapped_class(cls: type, names: frozenset[str]) -> type:
    """A subclass of `cls`, of the same name, whose methods `names` go through the taps of the current run."""

    def wrap(name: str) -> Callable:
        original = getattr(cls, name)

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            flow = current_owner()
            tap = flow.taps.get((self.__dict__.get(_OWNER), name)) if flow is not None else None
            if tap is None:
                return original(self, *args, **kwargs)
            return tap.call(functools.partial(original, self), args, kwargs)

        return method

    def __setstate__(self: Any, state: Any) -> None:
        """A copy is made: it is given back its class when the object is."""
        if hasattr(cls, "__setstate__"):
            cls.__setstate__(self, state)
        else:
            self.__dict__.update(state)
        _copies.setdefault(self.__dict__.get(_OWNER), weakref.WeakSet()).add(self)

    body = {name: wrap(name) for name in names}
    body["__setstate__"] = __setstate__
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    body |= {"_diffsight_class": cls, "_diffsight_names": names}
    if not hasattr(cls, "__dict__") or "__slots__" in cls.__dict__:
        body["__slots__"] = ()
    return type(cls)(cls.__name__, (cls,), body)
