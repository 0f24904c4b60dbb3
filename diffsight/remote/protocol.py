"""The protocol of remote runs: the messages allowed on the WebSocket of a run.

The client opens a run, then sends requests. Each request is a list of operations, of which only the last is answered.
Operations that need no answer, such as assignments, are sent with the next one that does.

    {"version": 1, "method": "generate", "args": …, "kwargs": …}    opens a run
    {"do": [{"op": "assign", …}, {"op": "ask", "path": "layers[4]", "part": "output"}]}
    {"say": "value", "value": …, "state": {…}}                      the answer
    {"say": "passed", "number": 0, …}                               a followed value, before the answer
    {"say": "turn", "body": 1, …}                                   an edit or a function of `run.each` continues

The path of a value inside the calls of a module has "::" before the value's name, as in "layers[4].self_attn::q".

A message with an unknown operation, an unknown field, or a field of another type is refused, and ends the run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffsight.remote.frames import Frame, pack, unpack
from diffsight.remote.wire_values import ProtocolError

VERSIONS = (1,)  # supported by this release, best last
LONGEST_JSON = 1 << 25  # bytes in a client's message, besides its tensors
_MOST_EDITS = 1000  # of a model, in one run
_ANY = object

# The fields of each operation, and their types.
_POINT = {"path": str, "part": str, "call": int, "selection": (dict, type(None))}
OPERATIONS: dict[str, dict[str, Any]] = {
    "ask": _POINT,
    "assign": _POINT | {"value": _ANY, "where": str},
    "skip": {"path": str, "call": int, "value": _ANY, "where": str},
    "write": {"number": int, "path": str, "value": dict},
    "let_go": {"numbers": list},
    "follow": _POINT | {"number": int},
    "step": {},
    "leave_steps": {},
    "call": {"path": str, "method": str, "args": list, "kwargs": dict, "hook": bool},
    "attribute": {"path": str, "name": str},
    "each": {"count": int},
    "end_body": {"failed": bool},
    "backward": {"numbers": list, "gradients": list},
    "stop": {},
    "close": {},
    "finish": {},
    "find": {"name": str},
    "lens": {"name": str, "args": list, "kwargs": dict},
}
_WITH_NAME = {name: {"op": str} | fields for name, fields in OPERATIONS.items()}
_MESSAGE = {"body": (int, type(None)), "do": list}
_OPENING = {
    "version": int,
    "method": (str, type(None)),
    "args": list,
    "kwargs": dict,
    "edits": list,
    "half": bool,
    "grad": bool,
}


@dataclass(frozen=True)
class Operation:
    """One operation of a message."""

    op: str
    fields: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.fields[name]
        except KeyError:
            raise AttributeError(name) from None


def operations(message: Mapping[str, Any]) -> tuple[int | None, list[Operation]]:
    """Return the body that sent a message (None for the leading body) and the message's operations.

    Raises:
        ProtocolError: The message has an unknown operation or wrong fields.
    """
    _check("a message", _MESSAGE, message)
    found = []
    for given in message["do"]:
        if not isinstance(given, dict) or given.get("op") not in OPERATIONS:
            raise ProtocolError(f"there is no such operation: {str(given)[:80]}")
        op = given["op"]
        _check(op, _WITH_NAME[op], given)
        found.append(Operation(op, given))
    if not found:
        raise ProtocolError("a message has at least one operation")
    return message["body"], found


def common_version(others: Sequence[int]) -> int:
    """Return the best version of the protocol that this release and a server both support.

    Raises:
        ProtocolError: There is none.
    """
    both = [version for version in VERSIONS if version in others]
    if not both:
        raise ProtocolError(
            f"the server speaks version {' and '.join(map(str, others))} of the protocol, and this client "
            f"{' and '.join(map(str, VERSIONS))}: install the same version of diffsight on both sides"
        )
    return both[-1]


def opening_without_run(version: int = VERSIONS[-1], half: bool = False) -> dict[str, Any]:
    """Return the opening message of a connection that runs lenses and calls parts of the model, without a run."""
    return {"version": version, "method": None, "args": [], "kwargs": {}, "edits": [], "half": half, "grad": False}


def job_frames(frame: bytes) -> list[Frame]:
    """Return the frames of a connection that carries out a job: the lens in `frame`, or the run that it opens.

    Raises:
        ProtocolError: `frame` requests something else.
    """
    sent: Frame = frame.decode(errors="replace") if frame[:1] == b"{" else frame
    message, _ = unpack(sent, LONGEST_JSON)
    if "do" not in message:
        check_opening(message)
        if message["method"] is None or message["edits"] or message["grad"]:
            raise ProtocolError("a job is one lens, or a run without a body and without edits")
        return [sent, pack({"body": None, "do": [{"op": "finish"}]}, {})]
    _, ops = operations(message)
    if [one.op for one in ops] != ["lens"]:
        raise ProtocolError("a job is one lens, or one run")
    return [pack(opening_without_run(), {}), sent]


def says_error(frame: Frame) -> bool:
    """Return whether a frame from a server is an error."""
    return isinstance(frame, str) and unpack(frame)[0].get("say") == "error"


def check_opening(message: Mapping[str, Any]) -> None:
    """Raise ProtocolError if a message does not open a run, or is of an unsupported version of the protocol."""
    if message.get("version") not in VERSIONS:
        raise ProtocolError(
            f"the server speaks version {' and '.join(map(str, VERSIONS))} of the protocol, not "
            f"{message.get('version')!r}: install the same version of diffsight on both sides"
        )
    _check("the opening of a run", _OPENING, message)
    if len(message["edits"]) > _MOST_EDITS:
        raise ProtocolError(f"a run has at most {_MOST_EDITS} edits, not {len(message['edits'])}")


def _check(what: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ProtocolError unless exactly the known fields are given, each with the right type."""
    if given.keys() != known.keys():
        unknown, missing = sorted(given.keys() - known.keys()), sorted(known.keys() - given.keys())
        problem = f"has no {unknown[0]!r}" if unknown else f"needs {missing[0]!r}"
        raise ProtocolError(f"{what} {problem}")
    for name, kind in known.items():
        value = given[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ProtocolError(f"{what}: {name!r} cannot be a {type(value).__name__}")
