"""Notes on Python errors that code written for nnsight causes here: they say what to write instead."""

import re
import traceback
from types import TracebackType

_GRADIENT = (
    "This value has no gradient: the model runs without gradients (torch.no_grad(), generate), or nothing that it was "
    "computed from requires one. Leave out torch.no_grad(), or open the run with grad=True"
)
_SAVE = "Write nnsight.save(x), or leave it out: a name assigned in a block keeps its value after the block"
_PADDING = (
    "Here each invoke is a separate pass, while nnsight pads the inputs of all invokes to one length: choose positions "
    "that exist in both, or trace all inputs at once and use run.rows"
)
_ITEM = "To change a value in a tuple in place, give it a name: hidden = layer.output[0], and then hidden += x"
_SIZES = re.compile(r"size of (the )?tensor .*must match|shape mismatch")
_UPDATE = "Values are real objects here, not proxies: write x = ... instead of x.update(...)"


def add_hint(error: BaseException | None, trace: TracebackType | None, is_invoke: bool = False) -> None:
    """Add a note to an error raised in a block, if it is one that nnsight would not have raised."""
    if not isinstance(error, (AttributeError, TypeError, RuntimeError)) or trace is None:
        return
    hint = _hint(str(error), traceback.extract_tb(trace)[-1].line or "", is_invoke)
    if hint is not None and hint not in getattr(error, "__notes__", ()):  # the error may leave several blocks
        error.add_note(hint)


def _hint(message: str, line: str, is_invoke: bool) -> str | None:
    if is_invoke and _SIZES.search(message):
        return _PADDING
    if "NoneType" in message and ".grad" in line:
        return _GRADIENT
    if message.startswith("'tuple' object does not support item assignment"):
        return _ITEM
    if message.endswith("no attribute 'save'"):
        return _SAVE
    if message.endswith("no attribute 'update'"):
        return _UPDATE
    return None
