"""`NNsight`, `LanguageModel`, `VisionLanguageModel` and `DiffusionModel`, with nnsight's arguments."""

import weakref
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn

from diffsight.compat.compat_envoy import TAKEN, CompatEnvoy
from diffsight.compat.edit_blocks import with_pair
from diffsight.compat.renames import Rename, Renames
from diffsight.compat.sessions import Session
from diffsight.compat.standardized_transformer import StandardizedNames
from diffsight.compat.tracer import Tracer, describe_opening, entered_tracers
from diffsight.compat.transformers_models import TransformersNames
from diffsight.errors import InputError, PointNotFoundError, warn_user
from diffsight.extending import Model, Run, flow_of, run_meant_by
from diffsight.remote import is_on_server

_IGNORED = ("remote", "backend", "scan", "validate", "blocking")  # arguments without an effect here
_NO_JOBS = (
    "blocking=False: the block runs on this machine, so a server cannot run it in the background. Leave the argument "
    "out, or start a run without a block with diffsight.LanguageModel(...).generate(..., blocking=False)"
)


class CompatModel(CompatEnvoy):
    """The arguments and attributes of nnsight's models, on top of one of diffsight's wrappers."""

    _not_sent = ("trace", *_IGNORED)  # arguments that have no meaning for a server
    _no_jobs = _NO_JOBS
    _gives_tuples = False  # whether the output of a layer is a tuple, as code for transformers 4 expects
    _seeds_images = False  # whether `seed` is the seed of the first image, and each image has its own

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not issubclass(getattr(cls, "_run_class", Tracer), Tracer):
            cls._run_class = type("Tracer", (Tracer, cls._run_class), {"__doc__": Tracer.__doc__})

    def __init__(
        self,
        *args: Any,
        rename: Rename | None = None,
        device: torch.device | str | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> None:
        if "envoys" in kwargs:
            raise InputError(
                "envoys= is not supported: write functions that take a module, and use rename= to add names of your own"
            )
        is_live = bool(args) and isinstance(args[0], (nn.Module, tuple))
        super().__init__(*args, **kwargs, **({} if is_live or device_map is None else {"device_map": device_map}))
        self._be_root()
        self._tree.blocks_give_tuples, self._tree.seeds_images = self._gives_tuples, self._seeds_images
        self._warn_of_hidden_modules()
        if rename:
            self._tree.renames = Renames(self._tree, rename, dir(CompatEnvoy))
        device = device_map if device is None and is_live and device_map != "auto" else device
        if device is not None:
            self.to(device)

    def _warn_of_hidden_modules(self) -> None:
        """Warn about modules that cannot be reached by their own names, since envoys have values with those names."""
        hidden = [p for p, _ in self._modules_here() if p.rpartition(".")[2] in TAKEN and p]
        if hidden:
            warn_user(
                f"the model has modules with the same names as values that nnsight already provides ({hidden[0]}, "
                f"{len(hidden)} in all): write `.E_output` for a module `output`, and so on"
            )

    def _modules_here(self) -> Iterator[tuple[str, nn.Module]]:
        return self._owner.named_modules() if isinstance(self._owner, nn.Module) else iter(())

    def _be_root(self) -> None:
        self.__dict__["_family"] = {"root": weakref.ref(self), "handles": {}}

    def _copy(self) -> "CompatModel":
        copy = super()._copy()
        copy._be_root()
        return copy

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except PointNotFoundError:
            if name == "_model":  # the name in older releases
                return self._module
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def dispatched(self) -> bool:
        """Whether the weights are loaded."""
        return self._tree.weights.are_loaded

    def dispatch(self) -> "CompatModel":
        """Load the weights now, and return the model."""
        self._tree.weights.load()
        return self

    def trace(self, *args: Any, trace: bool = True, **kwargs: Any) -> Any:
        """Open a run of one forward pass. With `trace=False`, return its result."""
        opens = super(CompatEnvoy, self).trace
        return _opened(opens, args, _known_here(self, kwargs), trace, generates=self._tree.opens_with == "generate")

    def generate(self, *args: Any, trace: bool = True, **kwargs: Any) -> Any:
        """Open a run that generates. With `trace=False`, return its result."""
        return _opened(super().generate, args, _known_here(self, kwargs), trace, generates=True)

    def scan(self, *args: Any, **kwargs: Any) -> Run:
        """Open a run that computes only shapes."""
        return super().scan(*args, **_known_here(self, kwargs))

    def edit(self, *args: Any, inplace: bool = False, return_context: bool = False, **kwargs: Any) -> Any:
        """Edit a copy of the model. The older form, `with model.edit(""):`, edits the model itself."""
        _check_empty("edit", _known_here(self, kwargs))
        functions = [argument for argument in args if callable(argument)]
        editing = super().edit(*functions, inplace=inplace or len(functions) < len(args))
        return editing if functions else with_pair(editing)

    def session(self, **kwargs: Any) -> Session:
        """Group runs of this model and of others: `with model.session() as session:`."""
        _check_empty("session", _known_here(self, kwargs))
        return Session()

    @property
    def generator(self) -> "Generator":
        """The run's result as `model.generator.output`, even in a block whose run has already ended."""
        around = [tracer for tracer in entered_tracers() if flow_of(tracer).tree.open_runs is self._tree.open_runs]
        has_ended = bool(around) and flow_of(around[-1]).outcome is not None
        return Generator(around[-1] if has_ended else run_meant_by(self, "generator.output"))


class Generator:
    """The result of a run under nnsight's name for it, `model.generator.output`."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def output(self) -> Any:
        """The result of the run. Reading it runs the model to its end."""
        return self._run.result

    @property
    def streamer(self) -> "Streamer":
        """The tokens of each step."""
        return Streamer(self._run)


class Streamer:
    """The tokens of a step under nnsight's name for them, `model.generator.streamer.output`."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def output(self) -> torch.Tensor:
        """The tokens with which the step begins: first those of the prompt, `(rows, tokens)`, later the last generated
        ones, `(rows,)`. No step begins with the very last ones, which end the run's result."""
        flow = flow_of(self._run)
        flow.is_streamed = True
        args, kwargs = self._run.inputs
        tokens = (args[0] if args else kwargs)["input_ids"]
        return tokens if flow.scope.step <= 0 else tokens[:, -1]


@cache
def wrapper_named(name: str) -> type[Model]:
    """Return a wrapper, such as `DiffusionModel`, with nnsight's names.

    Wrappers are imported by name on first use: they belong to a layer above the engine and are slow to import."""
    if name == "TransformersModel":
        return _named(name, TransformersNames, CompatModel, import_module("diffsight").LanguageModel)
    if name == "StandardizedTransformer":
        return _named(name, StandardizedNames, wrapper_named("LanguageModel"))
    wrapper = getattr(import_module("diffsight"), name)
    if name == "LanguageModel":
        return _named(name, wrapper_named("TransformersModel"), wrapper, _task="text-generation", _gives_tuples=True)
    if name == "VisionLanguageModel":
        return _named(name, vision_transformers_model(), _gives_tuples=True)
    return _named(name, DiffusionNames, wrapper)


@cache
def vision_transformers_model() -> type[Model]:
    """Return the class of `TransformersModel(name, task="image-text-to-text")`."""
    wrapper = import_module("diffsight").VisionLanguageModel
    return _named("TransformersModel", wrapper_named("TransformersModel"), wrapper, _task="image-text-to-text")


class DiffusionNames(CompatModel):
    """The arguments that nnsight's `DiffusionModel` accepts in addition to diffsight's.

    Args:
        source: As for `diffsight.DiffusionModel`.
        automodel: The class of pipeline to load, or its name: `"StableDiffusionImg2ImgPipeline"`. It is loaded at once.
    """

    _gives_tuples = _seeds_images = True

    def __init__(self, source: Any, *, automodel: Any = None, **kwargs: Any) -> None:
        if automodel is not None:
            if not isinstance(source, str):
                raise InputError("automodel= chooses the class to load, but a live pipeline is already loaded: omit it")
            kind = getattr(import_module("diffusers"), automodel) if isinstance(automodel, str) else automodel
            loading = {name: kwargs.pop(name) for name in list(kwargs) if name not in _OF_MODEL}
            arguments = import_module("diffsight.pipelines.loading_arguments")
            check, loading = arguments.check_pipeline_arguments, arguments.with_dtypes(loading, of_pipeline=True)
            if not kind.__name__.startswith(("AutoPipeline", "DiffusionPipeline")):  # these find it while loading
                check(kind, loading)
            source = kind.from_pretrained(source, **loading)
            check(type(source), loading, kind)
        super().__init__(source, **kwargs)

    def trace(self, *args: Any, trace: bool = True, **kwargs: Any) -> Any:
        """Open a run of the pipeline with one denoising step, unless `num_inference_steps` is passed."""
        if "num_inference_steps" in self.argument_names:
            kwargs.setdefault("num_inference_steps", 1)
        return super().trace(*args, trace=trace, **kwargs)


_OF_MODEL = ("rename", "device", "dispatch")


def _named(name: str, *bases: type, **facts: Any) -> type[Model]:
    return type(name, bases, {"__doc__": bases[-1].__doc__, "__module__": __package__, **facts})


class NNsight(CompatModel, Model):
    """Wraps any module; see `diffsight.Model`.

    Args:
        module: The module.
        rename: Additional names for modules; see `diffsight.compat.renames`.
        device: The device to move the module to.
    """


def _opened(opens: Callable[..., Tracer], args: tuple, kwargs: dict[str, Any], trace: bool, generates: bool) -> Any:
    """Open a run; with `trace=False`, return its result."""
    has_input = (
        bool(args)
        or not kwargs.keys().isdisjoint(("prompt", "text", "images"))
        or any(isinstance(v, torch.Tensor) for v in kwargs.values())
    )
    tracer = describe_opening(opens(*args, **kwargs), generates, has_input)
    return tracer if trace else tracer.result


def _known_here(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments without those that have no effect here. Raise InputError for a backend, for `remote=True` if
    the model is not on a server, and for `blocking=False` if it is."""
    if kwargs.get("backend") is not None:
        raise InputError("backend= is not supported: a block always runs where it stands. Leave the argument out")
    if is_on_server(model):
        if kwargs.get("blocking") is False:
            raise InputError(_NO_JOBS)
    elif kwargs.get("remote") not in (None, False, "local"):
        raise InputError(
            "remote: the model is in this process. Open it with the address of a server, as in "
            "LanguageModel(name, remote='http://127.0.0.1:8000'), or leave remote out"
        )
    return {name: value for name, value in kwargs.items() if name not in _IGNORED}


def _check_empty(method: str, kwargs: dict[str, Any]) -> None:
    if kwargs:
        raise TypeError(f"{method}() got an unexpected keyword argument {next(iter(kwargs))!r}")
