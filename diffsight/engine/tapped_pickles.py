"""Pickles of objects that have a tapped subclass of their class while a run is open: they are of the original class.

Another process cannot import the subclass, and it has no taps. Copies made by `copy` keep the subclass, because the
model may call their methods in place of the object's, such as those of a pipeline that steps a copy of its scheduler.
"""

import copy
import copyreg
import functools
import sys
from typing import Any


def reduce_tapped(tapped: Any, protocol: int, cls: type, private: str) -> Any:
    """Return what `pickle` needs to rebuild an object as one of its original class, or `copy` as one of the subclass.

    Args:
        tapped: The object.
        protocol: As for `__reduce_ex__`.
        cls: The original class.
        private: The name of an attribute that tapped objects have in addition.
    """
    reduced = cls.__reduce_ex__(tapped, protocol)
    if isinstance(reduced, str) or _is_called_by_copy():
        return reduced
    function, args, *rest = reduced
    args = tuple(cls if arg is type(tapped) else arg for arg in args)
    if function is copyreg.__newobj__:  # pickle would compare its class with that of the object
        function = cls.__new__
    elif function is copyreg.__newobj_ex__:
        function, args = functools.partial(cls.__new__, cls, *args[1], **args[2]), ()
    elif function is type(tapped):
        function = cls
    return function, args, *(_without(state, private) for state in rest[:1]), *rest[1:]


def _without(state: Any, private: str) -> Any:
    if isinstance(state, tuple) and len(state) == 2:  # with the values of slots
        return _without(state[0], private), state[1]
    return {name: value for name, value in state.items() if name != private} if isinstance(state, dict) else state


def _is_called_by_copy() -> bool:
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(__package__):
        frame = frame.f_back
    return frame.f_globals is vars(copy)
