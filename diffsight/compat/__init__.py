"""nnsight's names for what diffsight does, so that code written for nnsight runs:

    import diffsight.compat as nnsight
    from diffsight.compat import CONFIG, LanguageModel, NNsight

    with model.trace(prompt) as tracer:
        hidden = model.transformer.h[-1].output.save()

A run is live here: values are the real ones as soon as the line that asks for them has run. So `.save()` gives back
what it is called on, `nnsight.apply` calls, `nnsight.log` prints, `scan=True` and `validate=True` have nothing left to
do; and values are asked for in the order in which the model computes them. What has no meaning in a live run raises an
error that says what to write instead: `.grad` before `backward()`, `.source`, `tracer.cache`, `remote=True`.

Importing this module adds `save` to tensors, arrays, lists, tuples, dicts, sets, numbers, strings and bytes, `stop` to
tensors, tuples and dicts, and `value` to tensors.
"""

import builtins
import ctypes
import gc
import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from functools import cache, wraps
from types import MappingProxyType, ModuleType, SimpleNamespace, TracebackType
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import diffsight
from diffsight.engine.capture import Block, Deferred, advising, following
from diffsight.engine.flow import STOPPED
from diffsight.engine.open_runs import current_edit
from diffsight.engine.points import Asked
from diffsight.engine.target import Target
from diffsight.envoy import Envoy as _Envoy
from diffsight.errors import DiffsightError, InputError
from diffsight.extending import flow_of, run_meant_by, target_of, tree_of
from diffsight.model import Model
from diffsight.run import Run
from diffsight.session import Session as _Session
from diffsight.session import Turns

__version__ = diffsight.__version__

# ---- the functions of the module


def save(value: Any) -> Any:
    """Gives `value` back: what is bound in a run stays bound."""
    return value


def apply(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `function`."""
    return function(*args, **kwargs)


def trace(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives the function back: any function can be called in a run."""
    return function


def stop() -> None:
    """Ends the trace, the loop or the session that it stands in."""
    raise _Left


def cond(condition: Any) -> "Cond":
    """`with nnsight.cond(x > 0):`, the same as `if x > 0:`."""
    return Cond(condition)


def local() -> nullcontext:
    """A block that runs here; everything does."""
    return nullcontext()


class _Left(BaseException):
    """A block is left before its end."""

    def __str__(self) -> str:
        return "stop() has a meaning only in the block of a trace or a session"


class Cond(Deferred):
    """A block that runs where it stands if a condition holds, and else is left out."""

    _instead = "Write it with `if`"

    def __init__(self, condition: Any) -> None:
        self._holds = bool(condition)

    def __enter__(self) -> "Cond":
        return self if self._holds else self._enter(sys._getframe(1))

    def _given(self) -> "Cond":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        return not self._holds and super().__exit__(kind, error, trace)

    def _take(self, block: Block) -> None:
        pass


# ---- runs


class _Words:
    """nnsight's names for plain Python, which its runs and sessions both have."""

    def cond(self, condition: Any) -> Cond:
        return Cond(condition)

    def log(self, *values: Any) -> None:
        print(*values)

    def apply(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


class Tracer(_Words, Run):
    """A run, with the names of nnsight's tracer and invoker."""

    _generates = False
    _has_input = False  # whether it is a pass, rather than a run that gets its input by invokes
    _given: Mapping[int, tuple] = MappingProxyType({})  # number of a call to its inputs: those of the first
    _rest: Callable[[], Block] | None = None  # what follows `layers.all()` in the block

    @property
    def invoker(self) -> "Tracer":
        """The invoke opened last; the run itself, if it was given its input."""
        return self._pass

    def _in_turn(self) -> "Tracer":
        """The run whose steps are meant: that of the invoke it is written in."""
        return self.invoker if flow_of(self.invoker).outcome is None else self

    @property
    def inputs(self) -> tuple[tuple, dict]:
        """The inputs as the model got them; token ids under `inputs[0][0]["input_ids"]`."""
        args, kwargs = self._given[0] if self._given else self._root().inputs
        return ((kwargs,), {}) if "input_ids" in kwargs and not args else (args, kwargs)

    @property
    def output(self) -> Any:
        """What the model returned; after several invokes a list with one result a pass."""
        if self._invoked:
            return self.result if len(self._invoked) > 1 else self.invoker.output
        return self.result if self._flow.has_result else self._root().output

    @property
    def iter(self) -> "Iterations":
        """`with tracer.iter[0:3] as step:` or `for step in tracer.iter[:]:`."""
        return Iterations(self._in_turn())

    def all(self) -> "Iterations":
        """`with tracer.all():`, each step; also as a statement, for what follows it in the block of the trace."""
        return _all(self._in_turn(), sys._getframe(1))

    def next(self, step: int = 1) -> "Tracer":
        """Goes on to the next step (the next token)."""
        flow = flow_of(self._in_turn())
        for _ in range(step + (flow.scope.step < 0)):
            flow.next_step()
        return self

    def stop(self) -> None:
        """Ends the model, and leaves the block."""
        super().stop()
        if any(run is self for run in _entered.get()):
            raise _Left

    def barrier(self, parties: int) -> Callable[[], None]:
        """Nothing to wait for: each invoke has run when the next one begins."""
        return lambda: None

    def invoke(self, *args: Any, **kwargs: Any) -> "Tracer":
        if not args and not kwargs:
            raise InputError("invoke() is a pass of its own, and needs an input. Of a whole batch write run.rows")
        return super().invoke(*args, **kwargs)

    def cache(self, *args: Any, **kwargs: Any) -> None:
        raise InputError('tracer.cache: write `kept = tracer.record("transformer.h[*]")`, a dict of path to value')

    def __enter__(self) -> "Tracer":
        super().__enter__()
        _entered.set((*_entered.get(), self))
        if self._has_input:
            given = self._given = {}
            keep = given.setdefault
            self._flow.keep(Asked(target_of(self._model), "inputs"), lambda tap, index, value: index or keep(0, value))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        try:
            return self._leave(kind, error, trace)
        finally:
            _entered.set(tuple(run for run in _entered.get() if run is not self))

    def _leave(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if isinstance(error, _Left):
            self._flow.close(STOPPED)
            return True
        if error is None and self._rest is not None and self._flow.outcome is None:
            with advising(Iterations._instead):
                rest, self._rest = self._rest(), None
            try:
                rest.run_here(self.steps)
            except _Left:
                self._flow.close(STOPPED)
        _advise(error, trace)
        super().__exit__(kind, error, trace)
        return False


def _advise(error: BaseException | None, trace: TracebackType | None) -> None:
    """Adds to an error in a block what to write, where it comes of a value's being the real one."""
    if not isinstance(error, (AttributeError, TypeError)) or trace is None:
        return
    line, told = traceback.extract_tb(trace)[-1].line or "", str(error)
    if "NoneType" in told and ".grad" in line:
        note = (
            "A gradient is there after backward(). Write x.retain_grad() before it and x.grad after it; to change one, "
            "x.register_hook(lambda gradient: ...)"
        )
    elif told.endswith("no attribute 'save'"):
        note = "Write nnsight.save(x), or nothing: what is bound in a block stays bound"
    elif told.endswith("no attribute 'update'"):
        note = "A value is the real one, not a proxy: write x = ... in the place of x.update(...)"
    else:
        return
    if note not in getattr(error, "__notes__", ()):  # it may leave several blocks
        error.add_note(note)


_entered: ContextVar[tuple[Tracer, ...]] = ContextVar("diffsight_entered", default=())  # the blocks around


class Iterations(Deferred):
    """Steps of a run by number, for a loop or for a block that is repeated."""

    _repeats = True
    _instead = "Write a loop: `for step in tracer.iter[:]:`"

    def __init__(self, tracer: Tracer, chosen: slice | int | Iterable[int] = slice(None)) -> None:
        if tracer._again is not None and not tracer._has_input:
            raise InputError(
                "each invoke goes through its own steps: write `with tracer.all():` (or `tracer.iter[...]`) inside of "
                "`with tracer.invoke(...):`"
            )
        self._tracer, self._chosen = tracer, chosen

    def __getitem__(self, chosen: slice | int | Iterable[int]) -> "Iterations":
        return Iterations(self._tracer, chosen)

    def __iter__(self) -> Iterator[int]:
        steps, chosen = self._tracer.steps, self._chosen
        if isinstance(chosen, int):
            chosen = [chosen]
        if isinstance(chosen, slice):
            yield from (step.index for step in (steps if chosen == slice(None) else steps[chosen]))
        else:
            wanted = set(chosen)
            yield from (step.index for step in steps[: max(wanted) + 1] if step.index in wanted)

    def _take(self, block: Block) -> None:
        block.run_here(self)


def _all(tracer: Tracer, frame: Any) -> Iterations:
    """All steps: of the `with` statement that is being entered, else of what follows in the block."""
    steps = Iterations(tracer)
    with advising(Iterations._instead):
        rest = following(frame)
    if rest is not None and current_edit() is not None:
        raise InputError("within an edit write `with model.all():`, around what is for each step")
    if rest is not None:
        tracer._rest = rest
        if flow_of(tracer).scope.step < 0:
            flow_of(tracer).next_step()
    return steps


class Session(_Words, _Session):
    """A session, with the names of nnsight's."""

    def iter(self, items: Iterable[Any], return_context: bool = False) -> "SessionTurns":
        return SessionTurns(items, return_context)

    def stop(self) -> None:
        """Leaves the block."""
        raise _Left

    exit = stop

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        left = isinstance(error, _Left)
        _advise(error, trace)
        super().__exit__(None, None, None) if left else super().__exit__(kind, error, trace)
        return left


class SessionTurns(Turns):
    """Items in turn; with `return_context` each comes with what has `.cond`, `.log` and `.exit`."""

    def __init__(self, items: Iterable[Any], return_context: bool) -> None:
        super().__init__([(item, Session()) for item in items] if return_context else items)

    def _take(self, block: Block) -> None:
        with suppress(_Left):
            super()._take(block)


# ---- models


class Envoy(_Envoy):
    """An envoy, with what nnsight's has besides."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module. In an edit the points of one that was attached fire, as with `hook=True`."""
        if current_edit() is not None and any(self._owner is module for module in self._tree.attached.ever):
            kwargs.setdefault("hook", True)
        return self._as_tuple(super().__call__(*args, **kwargs))

    def _fetch(self, part: str) -> Any:
        value = super()._fetch(part)
        return self._as_tuple(value) if part == "output" else value

    def _assign(self, part: str, value: Any) -> None:
        is_tuple = part == "output" and isinstance(value, tuple) and len(value) == 1 and self._is_block()
        super()._assign(part, value[0] if is_tuple else value)

    def _as_tuple(self, value: Any) -> Any:
        """What a layer of a language model gives, as nnsight's code takes it: `layer.output[0]`."""
        return (value,) if isinstance(value, torch.Tensor) and self._is_block() else value

    def _is_block(self) -> bool:
        stacks = getattr(self._tree, "stacks", ()) if CONFIG.APP.BLOCKS_GIVE_TUPLES else ()
        return self._part is None and any(self._owner is layer for stack in stacks for layer in stack)

    def next(self) -> Any:
        """The next token's: goes on to the next step, in a run of one pass to the next call of the module."""
        run = run_meant_by(self, "next()")
        if run._generates:
            run.next()
            return self
        calls = run.__dict__.setdefault("_nexts", {})
        calls[self._target.key] = calls.get(self._target.key, 0) + 1
        return self.calls[calls[self._target.key]]

    def all(self) -> Iterations:
        """`with layers.all():`, each step of the run; also as a statement, for what follows it in its block."""
        return _all(run_meant_by(self, "all()"), sys._getframe(1))

    @property
    def iter(self) -> Iterations:
        """`with model.iter[0:3]:`."""
        return Iterations(run_meant_by(self, "iter"))

    @property
    def source(self) -> None:
        raise DiffsightError(
            f"{self.path}.source: the lines of a forward pass are no points here. Modules and methods are: ask for the "
            "module that the line calls, or wrap with Model(net, methods=[...])"
        )

    def _handle(self, target: Target) -> Any:
        return _dressed(super()._handle(target))

    def _bound(self, run: Run, part: Any = None) -> Any:
        return _dressed(super()._bound(run, part))


def _dressed(envoy: Any) -> Any:
    """An envoy of the engine, or of a wrapper, as one of those here."""
    if isinstance(envoy, _Envoy) and not isinstance(envoy, Envoy):
        object.__setattr__(envoy, "__class__", _dressed_class(type(envoy)))
    return envoy


@cache
def _dressed_class(cls: type) -> type:
    return type(cls.__name__, (Envoy, cls), {})


class _Generator:
    """`model.generator.output`: what the run that is open gives in the end."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def output(self) -> Any:
        return self._run.result


class _Face(Envoy):
    """What nnsight's models take and have, over one of diffsight's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tokenizer = self.__dict__.get("tokenizer")
        if tokenizer is not None and getattr(tokenizer, "pad_token", "") is None:  # code calls it with padding=True
            tokenizer.pad_token = tokenizer.eos_token

    def trace(self, *args: Any, trace: bool = True, **kwargs: Any) -> Any:
        return _opened(super().trace, args, _without(kwargs), trace, generates=False)

    def generate(self, *args: Any, trace: bool = True, **kwargs: Any) -> Any:
        return _opened(super().generate, args, _without(kwargs), trace, generates=True)

    def scan(self, *args: Any, **kwargs: Any) -> Any:
        return super().scan(*args, **_without(kwargs))

    def edit(self, *args: Any, inplace: bool = False, return_context: bool = False, **kwargs: Any) -> Any:
        """As everywhere, and in the old form, `with model.edit(""):`, in place."""
        _check_known("edit", kwargs)
        functions = [given for given in args if callable(given)]
        return super().edit(*functions, inplace=inplace or len(functions) < len(args))

    def session(self, **kwargs: Any) -> Session:
        _check_known("session", kwargs)
        return Session()

    @property
    def generator(self) -> _Generator:
        """`model.generator.output`: what the run returns in the end; in its block also where it has come to that."""
        around = [run for run in _entered.get() if tree_of(run).open_runs is self._tree.open_runs]
        has_ended = bool(around) and flow_of(around[-1]).outcome is not None
        return _Generator(around[-1] if has_ended else run_meant_by(self, "generator.output"))


def _opened(opens: Callable[..., Tracer], args: tuple, kwargs: dict[str, Any], trace: bool, generates: bool) -> Any:
    """A run, or with `trace=False` its result."""
    run = opens(*args, **kwargs)
    run._generates |= generates
    run._has_input = bool(args) or "prompt" in kwargs or any(isinstance(v, torch.Tensor) for v in kwargs.values())
    return run if trace else run.result


def _without(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments without those that have nothing to do here. Raises InputError for `remote=True`."""
    if arguments.get("remote") not in (None, False, "local"):
        raise InputError("remote: there is no server here. Leave it out, and the model runs in this process")
    return {name: value for name, value in arguments.items() if name not in _NOTHING_TO_DO}


def _check_known(name: str, arguments: dict[str, Any]) -> None:
    unknown = _without(arguments)
    if unknown:
        raise TypeError(f"{name}() got an unexpected keyword argument {next(iter(unknown))!r}")


_NOTHING_TO_DO = ("remote", "backend", "scan", "validate", "invoker_args", "blocking")


@cache
def _faced(base: type[Model]) -> type[Model]:
    """A model class of diffsight with the face of nnsight's."""
    tracer = type("Tracer", (Tracer, base._run_class), {"__doc__": Tracer.__doc__})
    return type(base.__name__, (_Face, base), {"_run_class": tracer, "__doc__": base.__doc__, "__module__": __name__})


NNsight = _faced(Model)


def __getattr__(name: str) -> Any:
    if name in ("DiffusionModel", "LanguageModel", "VisionLanguageModel"):
        return _faced(getattr(diffsight, name))
    raise AttributeError(f"module 'diffsight.compat' has no attribute {name!r}")


class WrapperModule(nn.Module):
    """Gives back what it is given."""

    def forward(self, *args: Any) -> Any:
        return args[0] if len(args) == 1 else args


class Proxy:
    """What annotations call a value in a trace; no value is one, they are the real ones."""


class _Place(ModuleType):
    """A module that code imports from in nnsight, `from nnsight.util import WrapperModule`: has what is here."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.modules[__name__], name)


_PLACES = ("util", "envoy", "logger", "tracing", "tracing.graph", "intervention", "intervention.envoy", "models")
_PLACES += ("models.LanguageModel", "models.DiffusionModel", "modeling", "modeling.language", "modeling.diffusion")


def _make_places() -> None:
    for path in _PLACES:
        outer, _, name = f"{__name__}.{path}".rpartition(".")
        place = sys.modules[f"{outer}.{name}"] = _Place(f"{outer}.{name}")
        setattr(sys.modules[outer], name, place)
    sys.modules[f"{__name__}.util"].apply = lambda data, function, cls: tree_map_only(cls, function, data)


class _Config:
    """Settings. Nothing here depends on them but on one: with `CONFIG.APP.BLOCKS_GIVE_TUPLES`, as it is at first, what
    a layer of a language model gives is a tuple, as in transformers 4; set to False, it is what the layer returns."""

    def __init__(self) -> None:
        self.APP = SimpleNamespace(DEBUG=False, REMOTE_LOGGING=False, BLOCKS_GIVE_TUPLES=True)
        self.API = SimpleNamespace(APIKEY=None)

    def set_default_api_key(self, key: str) -> None:
        self.API.APIKEY = key

    def set_default_app_debug(self, debug: bool) -> None:
        self.APP.DEBUG = debug

    def save(self) -> None:
        pass


CONFIG = _Config()
remote_logger = logging.getLogger("nnsight_remote")


# ---- `.save()` on values


def _mount() -> None:
    """Adds `save` to the types of values, `stop` to those that a module returns. Not to `object`: that would be seen on
    every class there is."""
    for cls in (*_BUILTIN, numpy.ndarray, numpy.generic, torch.dtype, torch.device):
        namespace = gc.get_referents(cls.__dict__)[0]
        if "save" not in namespace:
            namespace |= {"save": save} | ({"stop": _stop} if cls in (tuple, dict) else {})
            ctypes.pythonapi.PyType_Modified(ctypes.py_object(cls))
    torch.Tensor.save, torch.Tensor.value, torch.Tensor.stop = save, property(save), _stop
    _let_pictures_be_saved()


def _stop(value: Any) -> None:
    """`layer.output.stop()`: the model ends here."""
    raise _Left


def _let_pictures_be_saved() -> None:
    """A picture has a `save` of its own: without a file, it gives back the picture."""
    from PIL.Image import Image

    own = Image.save

    @wraps(own)
    def save_picture(image: Image, *args: Any, **kwargs: Any) -> Any:
        return own(image, *args, **kwargs) if args or kwargs else image

    Image.save = save_picture


log = print
list, tuple, dict, set = builtins.list, builtins.tuple, builtins.dict, builtins.set
int, float, str, bool, bytes = builtins.int, builtins.float, builtins.str, builtins.bool, builtins.bytes
complex, bytearray = builtins.complex, builtins.bytearray
_BUILTIN = (list, tuple, dict, set, frozenset, range, int, float, complex, str, bytes, bytearray)
_make_places()
_mount()
