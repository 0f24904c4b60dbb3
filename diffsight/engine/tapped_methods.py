"""Methods that a run taps or changes on one object, and how they are restored.

override = TappedMethod(vae, "decode")      # calls go through the taps of the run that makes them
...
override.remove()

A method is tapped by giving its object a subclass of its class for the duration of the run. Unlike a wrapper stored on
the instance, this follows copies of the object (pipelines step a copy of their scheduler) and reaches `__call__`. The
subclass has the name and the signatures of the original, and compares equal to it. If several runs are open at once,
the last one restores everything.
"""

import functools
import weakref
from collections.abc import Callable
from threading import RLock
from typing import Any

from diffsight.engine.coroutine import current_owner
from diffsight.engine.tapped_pickles import reduce_tapped

OWNER = "_diffsight_owner"  # on a tapped object and its copies: the object to whose taps calls go
CLASS_WITHOUT_TAPS = "_diffsight_class"  # on the class of a tapped object: the class that it had
_lock = RLock()


class Override:
    """A function in place of a method of one object, for as long as any run uses it.

    Subclasses define `put_on` and `take_off`. If several runs override the same method, only the first override is put
    on, and it is taken off with the last `remove`."""

    _users: dict = {}  # the overrides of one method
    _first: dict = {}  # the one of them that was put on

    def __init__(self, target: Any, name: str) -> None:
        self.target, self.name = target, name
        self.key = (id(target), name)
        try:
            with _lock:
                users = Override._users.setdefault(self.key, [])
                users.append(self)
                if len(users) == 1:
                    Override._first[self.key] = self
                    self.put_on()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore the method, if no other run overrides it. May be called again."""
        with _lock:
            users = Override._users.get(self.key, [])
            if self not in users:
                return
            if len(users) == 1:  # it counts as removed at the end: if this is interrupted, it is done again
                first = Override._first.get(self.key)
                if first is not None:
                    first.take_off()
                Override._first.pop(self.key, None)
                del Override._users[self.key]
            else:
                users.remove(self)

    def put_on(self) -> None:
        """Put the function in place of the method."""
        raise NotImplementedError

    def take_off(self) -> None:
        """Restore the method. May be called again."""
        raise NotImplementedError


class ChangedMethod(Override):
    """Puts `change(method)` in place of a method of one object, or of a class that defines it.

    override = ChangedMethod(processor, "pt_to_numpy", lambda method: lambda images: method(images.detach()))
    ...
    override.remove()
    """

    def __init__(self, target: Any, name: str, change: Callable[[Callable], Callable]) -> None:
        self._change = change
        super().__init__(target, name)

    _own: Any = None
    _put: Any = None

    def put_on(self) -> None:
        self._own = vars(self.target).get(self.name)
        self._put = self._change(getattr(self.target, self.name))
        self._set(self._put)

    def take_off(self) -> None:
        if vars(self.target).get(self.name) is not self._put:
            return  # somebody has replaced it meanwhile
        if self._own is not None:
            self._set(self._own)
        elif not isinstance(self.target, type):
            self.target.__dict__.pop(self.name, None)

    def _set(self, method: Any) -> None:
        if isinstance(self.target, type):
            setattr(self.target, self.name, method)
        else:
            self.target.__dict__[self.name] = method


class TappedMethod(Override):
    """Sends the calls of one method, of an object and of its copies, through the taps of the run that makes them."""

    own: Any = None

    def put_on(self) -> None:
        self.own = own = self.target.__dict__.get(self.name)
        if own is not None:  # the user has put another on the object itself, such as a compiled one

            @functools.wraps(own)
            def method(*args: Any, **kwargs: Any) -> Any:
                host = current_owner()
                tap = host.taps.get(self.key) if host is not None else None
                return own(*args, **kwargs) if tap is None else tap.call(own, args, kwargs)

            self.put = self.target.__dict__[self.name] = method
            return
        cls = type(self.target)
        names = frozenset({self.name, *getattr(cls, "_diffsight_names", ())})
        self._become(self.target, getattr(cls, CLASS_WITHOUT_TAPS, cls), names)
        self.target.__dict__[OWNER] = id(self.target)

    def take_off(self) -> None:
        if self.own is not None:
            if self.target.__dict__.get(self.name) is self.put:
                self.target.__dict__[self.name] = self.own
            return
        number = id(self.target)
        for target in (self.target, *_copies.get(number, ())):
            cls = type(target)
            if self.name in getattr(cls, "_diffsight_names", ()):
                self._become(target, cls._diffsight_class, cls._diffsight_names - {self.name})
            if not hasattr(type(target), CLASS_WITHOUT_TAPS):
                target.__dict__.pop(OWNER, None)
        if not hasattr(type(self.target), CLASS_WITHOUT_TAPS):
            _copies.pop(number, None)

    def _become(self, target: Any, cls: type, names: frozenset[str]) -> None:
        object.__setattr__(target, "__class__", _tapped_class(cls, names) if names else cls)


_copies: dict[int, weakref.WeakSet] = {}  # id of a tapped object: the copies that were made of it meanwhile


@functools.cache
def _tapped_class(cls: type, names: frozenset[str]) -> type:
    """Return a subclass of `cls` with the same name, whose methods `names` go through the taps of the current run."""

    def wrap(name: str) -> Callable:
        original = getattr(cls, name)

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            host = current_owner()
            tap = host.taps.get((self.__dict__.get(OWNER), name)) if host is not None else None
            if tap is None:
                return original(self, *args, **kwargs)
            return tap.call(functools.partial(original, self), args, kwargs)

        return method

    def __setstate__(self: Any, state: Any) -> None:
        """Fill a copy that is being made. It gets its class back when the object does."""
        if hasattr(cls, "__setstate__"):
            cls.__setstate__(self, state)
        else:
            self.__dict__.update(state)
        _copies.setdefault(self.__dict__.get(OWNER), weakref.WeakSet()).add(self)

    body = {name: wrap(name) for name in names}
    body["__setstate__"] = __setstate__
    body["__reduce_ex__"] = lambda self, protocol: reduce_tapped(self, protocol, cls, OWNER)
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    body |= {CLASS_WITHOUT_TAPS: cls, "_diffsight_names": names}
    if not hasattr(cls, "__dict__") or "__slots__" in cls.__dict__:
        body["__slots__"] = ()
    return _equal_kind(type(cls))(cls.__name__, (cls,), body)


@functools.cache
def _equal_kind(kind: type) -> type:
    """Return a metaclass for tapped classes, which makes each equal to the class that it stands for. Bria's pipeline,
    for example, compares `type(scheduler)` with the classes of schedulers."""

    def __eq__(cls: type, other: object) -> bool:
        return getattr(cls, CLASS_WITHOUT_TAPS, cls) is getattr(other, CLASS_WITHOUT_TAPS, other)

    def __hash__(cls: type) -> int:
        return kind.__hash__(cls._diffsight_class)

    return type(kind.__name__, (kind,), {"__eq__": __eq__, "__hash__": __hash__})
