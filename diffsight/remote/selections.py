"""Selections, such as a row of a batch or the first item of a tuple, as remote runs send them.

    @sent_as("part", "start", "stop", "total", "stride", "name")
    class Part(Selection): ...

A selection is sent as its kind and its fields. Attributes that depend on the run, such as the layout of the batches,
are taken from the run on the server.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from diffsight.engine.batch_slicing import Indexed, Part
from diffsight.errors import InputError
from diffsight.remote.wire_values import ProtocolError

_T = TypeVar("_T", bound=type)


class _Kind(NamedTuple):
    cls: type
    names: tuple[str, ...]
    of_run: Mapping[str, Callable[[Any], Any]]


_kinds: dict[str, _Kind] = {}
_names: dict[type, str] = {}


def sent_as(kind: str, *names: str, **of_run: Callable[[Any], Any]) -> Callable[[_T], _T]:
    """Return a decorator that makes a class of selections sendable.

    Args:
        kind: The name of the class in messages.
        names: The attributes that are sent: plain values, tensors, or other selections.
        of_run: Functions that return the other attributes, given the run on the server.
    """

    def register(cls: _T) -> _T:
        _kinds[kind], _names[cls] = _Kind(cls, names, of_run), kind
        return cls

    return register


sent_as("part", "start", "stop", "total", "stride", "name")(Part)
sent_as("indexed", "index", "of")(Indexed)


def encode_selection(selection: Any, encode: Callable[[Any], Any]) -> dict[str, Any] | None:
    """Return a selection in the form used in messages. `encode` encodes the values of its fields."""
    if selection is None:
        return None
    kind = _names.get(type(selection))
    if kind is None:
        raise InputError(f"{selection.name or type(selection).__name__} is not known to servers: use a local model")

    def field(value: Any) -> Any:
        return {"selection": encode_selection(value, encode)} if type(value) in _names else {"value": encode(value)}

    return {"kind": kind, "fields": {name: field(getattr(selection, name)) for name in _kinds[kind].names}}


def decode_selection(data: Any, decode: Callable[[Any], Any], run: Any) -> Any:
    """Return the selection that was encoded as `data`, for a run.

    Raises:
        ProtocolError: The kind of selection is unknown, or it has other fields.
    """
    if data is None:
        return None
    kind = _kinds.get(data.get("kind")) if isinstance(data, dict) else None
    fields = data.get("fields") if kind else None
    if not isinstance(fields, dict) or set(fields) != set(kind.names):
        raise ProtocolError(f"this is not a selection: {str(data)[:80]}")
    found = {}
    for name, value in fields.items():
        if not isinstance(value, dict) or len(value) != 1 or not value.keys() <= {"selection", "value"}:
            raise ProtocolError(f"this is not a field of a selection: {str(value)[:80]}")
        is_inner = "selection" in value
        found[name] = decode_selection(value["selection"], decode, run) if is_inner else decode(value["value"])
    selection = object.__new__(kind.cls)
    selection.__dict__.update(found, **{name: of(run) for name, of in kind.of_run.items()})
    return selection
