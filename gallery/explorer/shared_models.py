"""The models that all views of the explorer share, and the jobs that use them.

bench = Workbench(["diffsight/shapes-clip"])
model = bench.model("diffsight/shapes-clip")            # loaded once, for all visitors
with bench.work(job, model):                            # can be stopped by bench.stop(job)
    result = diffusion_lens(model, prompt)
"""

import html
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from threading import Event, Lock
from typing import Any, ParamSpec, TypeVar

import gradio as gr
from torch import nn

from diffsight.errors import DiffsightError, InputError
from diffsight.gallery.model_opening import open_model
from diffsight.lenses.results.result import LensResult
from diffsight.pipelines.diffusion.components import components
from diffsight.pipelines.diffusion.model import DiffusionModel

_P, _R = ParamSpec("_P"), TypeVar("_R")


class StoppedError(BaseException):
    """The user has stopped the work. Not an Exception, after which a lens would try a smaller batch."""


class Workbench:
    """The models of the explorer by name, and the jobs that use them.

    Args:
        names: The models that may be chosen. Visitors cannot load others.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._models: dict[str, Any] = {}
        self._stops: dict[str, Event] = {}  # by job
        self._one_at_a_time = Lock()  # a stopped job keeps running until the next call of a module

    def model(self, name: str) -> Any:
        """Return a model, which is loaded on first use. Raises InputError if it is not one of `names`."""
        if name not in self.names:
            raise InputError(f"choose one of {', '.join(self.names)}, not {name}")
        with self._one_at_a_time:
            if name not in self._models:
                self._models[name] = open_model(name)
            return self._models[name]

    @contextmanager
    def work(self, job: str, model: Any) -> Iterator[None]:
        """Raise StoppedError in the block, at the next call of a module, once `stop` is called for the job.

        The block waits until no other job is running.
        """
        stop = self._stops[job] = Event()

        def check(*_: Any) -> None:
            if stop.is_set():
                raise StoppedError("stopped")

        is_pipeline = isinstance(model, DiffusionModel)
        parts = components(model.pipeline).values() if is_pipeline else [model.module]
        try:
            with self._one_at_a_time, ExitStack() as hooks:
                for part in parts:
                    if isinstance(part, nn.Module):
                        hooks.callback(part.register_forward_pre_hook(check).remove)
                yield
        finally:
            if self._stops.get(job) is stop:  # otherwise the visitor has started another job
                del self._stops[job]

    def stop(self, job: str) -> None:
        """Stop a job if it is running or waiting for others."""
        stop = self._stops.get(job)
        if stop is not None:
            stop.set()


def job_of(request: gr.Request, view: str) -> str:
    """Return the name of a visitor's job in a view."""
    return f"{view} {request.session_hash}"


def whole_numbers(**given: int | None) -> list[int]:
    """Return the numbers in fields of the page. Raise InputError if a field is empty."""
    for label, number in given.items():
        if number is None:
            raise InputError(f"{label} is empty")
    return [int(number) for number in given.values() if number is not None]


def reporting(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a function of a view show its errors to the visitor as text."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except (DiffsightError, StoppedError) as error:
            raise gr.Error(html.escape(str(error)), title="diffsight", print_exception=False) from error
        except Exception as error:  # in the pipeline or another library: its traceback is also printed
            raise gr.Error(html.escape(f"{type(error).__name__}: {error}"), title="diffsight") from error

    return call


def code_of(result: LensResult) -> str:
    """Return the Python code that makes a result."""
    return "" if result.call is None else result.call.code()


def archive_of(result: LensResult) -> str:
    """Return the path of a ZIP file with all files of a result."""
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "result")
        name = Path(tempfile.mkdtemp()) / str(result.record()["lens"])
        return shutil.make_archive(str(name), "zip", Path(folder) / "result")
