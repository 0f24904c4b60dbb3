"""The error for code that needs the values of fake tensors, which have none."""

import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from diffsight.engine.coroutine import current_owner
from diffsight.engine.hooks import FORWARD
from diffsight.engine.target import Target, in_run, join
from diffsight.errors import ScanError


def is_about_values(error: Exception) -> bool:
    """Return whether PyTorch raised an error because a fake tensor has no values."""
    return (
        isinstance(error, (ScanError, UnsupportedOperatorException, NotImplementedError))
        or _ABOUT_DATA.search(str(error)) is not None
    )


def values_needed(function: Callable, components: Sequence[Target], error: Exception | None = None) -> ScanError:
    """Return the error for a function that needs values, naming the module and the line that called it.

    `error` is that of PyTorch, if it has raised one."""
    frames = _frames(sys._getframe(1))
    call = next((place for place, frame in enumerate(frames) if frame.f_code is _MODULE_CALL), None)
    module = None if call is None else _path_of(frames[call].f_locals.get("self"), components)
    asks = module or ("the body" if current_owner() is None else "the model")
    # The line outside PyTorch, or else that in the `forward` of a module of PyTorch.
    outside = (frame for frame in frames if not frame.f_code.co_filename.startswith((_HERE, _TORCH)))
    inside = [frame for frame in frames[:call] if not frame.f_code.co_filename.startswith(_HERE)]
    frame = next(outside, inside[-1] if inside else frames[0])
    name = getattr(function, "__name__", str(function))
    place = f"({name}, at {frame.f_code.co_filename}:{frame.f_lineno})"
    instead = f", or skip this part: `{in_run(module)}.skip(value)`" if module else ""
    if isinstance(error, UnsupportedOperatorException) or str(error).startswith("Could not run"):
        why = f"{asks} calls a function {place} that PyTorch cannot compute on shapes alone"
    else:
        why = f"{asks} asks for the values of a tensor {place}, but a scan knows only its shape"
    return ScanError(f"{why}, so it cannot go past this line. Use a real run{instead}")


def _frames(frame: FrameType | None) -> list[FrameType]:
    """Return a frame and those around it, innermost first."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _path_of(module: Any, components: Sequence[Target]) -> str | None:
    return next((path for path, other in modules_with_paths(components) if other is module), None)


def modules_with_paths(components: Sequence[Target]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in some components, each with its path as the user writes it."""
    for component in components:
        outer = component.path if component.name == FORWARD else component.path.rpartition(".")[0]
        for path, module in component.owner.named_modules():
            yield reduce(join, path.split(".") if path else (), outer), module


class Unreported(logging.Filter):
    """Keeps PyTorch from logging, with a traceback, an error about a fake tensor that `function` raises anyway."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self._code = function.__code__

    def filter(self, record: logging.LogRecord) -> bool:
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code is not self._code:
            frame = frame.f_back
        return frame is None


_MODULE_CALL = nn.Module._call_impl.__code__
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
_ABOUT_DATA = re.compile(r"data pointer|data is not allocated|(?<![a-z])meta(?![a-z])", re.IGNORECASE)
_HERE, _TORCH = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)
