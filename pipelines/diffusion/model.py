"""DiffusionModel: a diffusers pipeline, every part of it traceable, every picture seeded.

model = DiffusionModel("diffsight/shapes-clip")
model.generate("a red circle above a blue square", seed=17).images[0]

with model.generate("a red circle above a blue square", seed=17) as run:
    for step in run.steps:
        print(step.index, step.timestep, run.unet.mid_block.output.norm())
run.images
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn
from transformers import PreTrainedModel

from diffsight.errors import InputError, PointNotFoundError, suggest
from diffsight.extending import (
    FORWARD,
    ChangedMethod,
    Clock,
    Model,
    Run,
    Step,
    Target,
    Tree,
    flow_of,
    join,
    keeping_attribute_errors,
    tree_of,
    with_gradients,
)
from diffsight.pipelines.diffusion.branches import BranchView, DiffusionRow, rows_of
from diffsight.pipelines.diffusion.components import part_targets
from diffsight.pipelines.diffusion.guidance import COND, UNCOND, Layouts
from diffsight.pipelines.diffusion.loading import open_pipeline
from diffsight.pipelines.diffusion.prompts import check_prompts
from diffsight.pipelines.diffusion.seeds import check_seed
from diffsight.pipelines.diffusion.text_encoders import Encoders, find_encoders
from diffsight.pipelines.language.standard_names import standard_names

_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "num_images_per_caption")


class DiffusionStep(Step):
    """One denoising step: from one `scheduler.step` to the next."""

    def __init__(self, index: int, component: str, call: tuple[tuple, dict], tree: "DiffusionTree") -> None:
        super().__init__(index, component, call)
        self._tree = tree

    @property
    def timestep(self) -> float | None:
        """The scheduler's timestep, such as 981 at the beginning of a run of Stable Diffusion; None where the denoiser
        is told none."""
        return self._tree.timestep(self.component, self._call)


class DiffusionRun(Run):
    """A run of a diffusion pipeline."""

    @property
    def rows(self) -> tuple[DiffusionRow, ...]:
        """One view per prompt: `a, b = run.rows`. Each has `num_images_per_prompt` pictures."""
        return rows_of(self._pass, flow_of(self._pass).observer)

    @property
    def cond(self) -> BranchView:
        """The run narrowed to the conditional branch of guidance; all of it where guidance is off."""
        return BranchView(self._pass, flow_of(self._pass).observer, COND)

    @property
    def uncond(self) -> BranchView:
        """The run narrowed to the unconditional branch of guidance: what the negative prompt makes."""
        return BranchView(self._pass, flow_of(self._pass).observer, UNCOND)

    @property
    def images(self) -> Any:
        """The pictures that the pipeline made; runs it to its end first."""
        return self._of_result("images")

    @property
    def frames(self) -> Any:
        """The videos that the pipeline made; runs it to its end first."""
        return self._of_result("frames")

    def _make_step(self, index: int, path: str, call: tuple[tuple, dict]) -> DiffusionStep:
        return DiffusionStep(index, path, call, tree_of(self))

    def _of_result(self, name: str) -> Any:
        self._check_one_pass(name)
        with keeping_attribute_errors(self):
            result = self.result
        if isinstance(result, tuple):  # the pipeline was called with return_dict=False
            return result[0]
        if name not in result:
            raise InputError(f"{type(result).__name__} has no {name}, it has {', '.join(result)}")
        return result[name]


class DiffusionModel(Model):
    """Wraps a diffusers pipeline: `source` is a packaged name (`diffsight/shapes-clip`), a folder, a hub id, or a live
    pipeline. `arguments` go to `DiffusionPipeline.from_pretrained`.

    Weights are loaded when they are first needed: by a run, a call, `.pipeline`, `.to(...)`; with `dispatch=True` at
    once. Until then the model is there without them: it can be printed, looked through and scanned.

    Every component is an envoy under its own name; so are the methods that pipelines call directly (`encode_prompt`,
    `vae.encode`, `vae.decode`, `scheduler.step`) and the tokenizers. Text encoders answer to the standard names
    `.layers[i]` and `.ln_final`. What else the pipeline has is reached through (`model.device`,
    `model.enable_model_cpu_offload()`, `model.set_progress_bar_config(disable=True)`).

    Raises InputError where `source` names no pipeline.
    """

    _run_class = DiffusionRun

    def __init__(self, source: str | Path | DiffusionPipeline, dispatch: bool = False, **arguments: Any) -> None:
        pipeline, loader = open_pipeline(source, **arguments)
        self._wrap(DiffusionTree(Target(pipeline, "__call__", ""), loader))
        if dispatch:
            self._tree.weights.load()
        name = type(pipeline).__name__ if isinstance(source, DiffusionPipeline) else str(source)
        self.__dict__["source"] = name

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The pipeline itself, with its weights."""
        return self.module

    @property
    def encoders(self) -> Encoders:
        """The text encoders, by name, and what the pipeline takes from each: found by encoding a prompt, once."""
        parts = tuple(self._owner.components.values())
        known = self.__dict__.get("_known_encoders")
        if known is None or any(a is not b for a, b in zip_longest(known[0], parts)):
            plain = self._copy()
            plain.clear_edits()
            found = find_encoders(plain)
            known = self.__dict__["_known_encoders"] = (tuple(self._owner.components.values()), found)
        return known[1]

    def to(self, *args: Any, **kwargs: Any) -> "DiffusionModel":
        """Moves or casts the pipeline, as `pipeline.to(...)` does; gives the model."""
        self.pipeline.to(*args, **kwargs)
        return self

    def generate(
        self, *args: Any, seed: int | Sequence[int] | None = None, grad: bool = False, **kwargs: Any
    ) -> DiffusionRun:
        """A run of the pipeline: `with model.generate("a red circle", seed=17) as run:`, or right away
        `model.generate("a red circle", seed=17).images`.

        `args` and `kwargs` are those of the pipeline, and its defaults are kept. With `seed`, picture *i* of the call
        is made with seed + i, on a generator on the CPU, so that a seed means the same picture on every device and in
        every batch; a list gives one seed a picture.

        Raises InputError, before anything runs, for arguments that the pipeline does not have, an empty prompt, one
        that is too long for every tokenizer, and seeds that are negative or too few."""
        arguments, seeds = self._checked(args, seed, kwargs)
        again = None if args or "prompt" in kwargs else partial(self.generate, seed=seed, grad=grad, **kwargs)

        def call() -> Any:
            given = dict(kwargs)
            if seeds is not None:
                generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
                given["generator"] = generators if len(generators) > 1 else generators[0]
            if not grad:
                return self._owner(*args, **given)
            with _detached_pictures(self._owner):
                return with_gradients(self._owner.__call__)(*args, **given)

        run = self._new_run(call, again=again, grad=grad)
        flow_of(run).observer = Layouts(self._owner, arguments, _inputs(arguments), _pictures_each(arguments))
        return run

    def trace(self, *args: Any, **kwargs: Any) -> DiffusionRun:
        """The same as `generate`."""
        return self.generate(*args, **kwargs)

    def check(self, *args: Any, seed: int | Sequence[int] | None = None, grad: bool = False, **kwargs: Any) -> None:
        """Check the arguments of `generate` without opening a run or running anything.

        Raises InputError if they cannot be used, and warns as `generate` does."""
        self._checked(args, seed, kwargs)

    # ---- arguments

    def _checked(
        self, args: tuple, seed: int | Sequence[int] | None, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], list[int] | None]:
        """The pipeline's arguments by name, and the seed of each image."""
        arguments = self._bind(args, kwargs)
        if arguments.get("prompt") is not None:
            check_prompts(self._owner, arguments["prompt"], arguments)
        return arguments, None if seed is None else self._seeds(seed, arguments)

    def _bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's arguments by name, those that were given."""
        name = type(self._owner).__name__
        signature = inspect.signature(self._owner.__call__)
        takes_more = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        for given in kwargs:
            mistyped = bool(get_close_matches(given, signature.parameters, cutoff=0.85))  # else it would be ignored
            if given not in signature.parameters and (mistyped or not takes_more):
                raise InputError(f"{name} has no argument {given!r}{suggest(given, signature.parameters)}")
        if args and isinstance(args[0], str) and not any("prompt" in known for known in signature.parameters):
            raise InputError(f"{name} takes no prompt")
        try:
            return signature.bind_partial(*args, **kwargs).arguments
        except TypeError as error:
            raise InputError(f"{name}: {error}") from None

    def _seeds(self, seed: int | Sequence[int], arguments: dict[str, Any]) -> list[int]:
        name = type(self._owner).__name__
        if "generator" in arguments:
            raise InputError("give either seed or generator, not both")
        parameters = inspect.signature(self._owner.__call__).parameters
        if "generator" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise InputError(f"{name} takes no generator, so it cannot be seeded")
        count = _inputs(arguments) * _pictures_each(arguments)
        several = isinstance(seed, Iterable) and not isinstance(seed, str)
        for s in seed if several else [seed]:
            check_seed(s)
        seeds = [int(s) for s in seed] if several else [int(seed) + i for i in range(count)]
        if len(seeds) != count:
            raise InputError(f"{len(seeds)} seeds for {count} pictures: give one seed a picture, or a single number")
        return seeds

    # ---- setting

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._tree.parts():
            setattr(self._owner, name, value)  # a component is exchanged: model.scheduler = DDIMScheduler(...)
        else:
            try:
                super().__setattr__(name, value)
            except PointNotFoundError as error:
                raise PointNotFoundError(f"{error}{suggest(name, self._tree.parts())}") from None


class DiffusionTree(Tree):
    """What can be tapped in a diffusers pipeline: its components, and the methods that pipelines call directly."""

    opens_with = "generate"

    def __init__(self, root: Target, load: Callable[[], None] | None = None) -> None:
        super().__init__(root, load)
        self._standard_names: WeakKeyDictionary = WeakKeyDictionary()
        self._part_targets: dict[str, Target] = {}

    def attribute(self, owner: Any, name: str) -> Any:
        return getattr(owner, name) if name in _WITHOUT_WEIGHTS else super().attribute(owner, name)

    def parts(self) -> dict[str, Any]:
        """The pipeline's components, by name."""
        held = vars(self.root.owner)
        parts = ((name, held.get(name)) for name in self.root.owner.config if not name.startswith("_"))
        return {name: part for name, part in parts if part is not None and not isinstance(part, _PLAIN)}

    def children_of(self, target: Target) -> dict[str, Target]:
        if target.owner is not self.root.owner:
            return target.named_children()
        return part_targets(self.parts(), self._part_targets)

    def methods_of(self, owner: Any) -> Mapping[str, str]:
        """`encode_prompt` of the pipeline, `encode` and `decode` of a VAE, `step` of a scheduler."""
        if owner is self.root.owner:
            return {name: name for name in ("encode_prompt",) if _has_method(owner, name)}
        for path, part in self.parts().items():
            if part is owner:
                return {name: join(path, name) for name in _methods_worth(part) if _has_method(part, name)}
        return {}

    def names_of(self, owner: Any) -> Mapping[str, str]:
        if not isinstance(owner, PreTrainedModel):
            return {}
        if owner not in self._standard_names:
            component = any(part is owner for part in self.parts().values())
            self._standard_names[owner] = standard_names(owner) if component else {}
        return self._standard_names[owner]

    def components(self) -> list[Target]:
        targets = self.method_targets(self.root)
        for target in self.children_of(self.root).values():
            targets += [target] if target.is_called else []
            targets += self.method_targets(target)
        return targets

    def method_targets(self, target: Target) -> list[Target]:
        return [Target(target.owner, name, path) for name, path in self.methods_of(target.owner).items()]

    def stand_ins(self) -> Mapping[tuple[int, str], Callable]:
        """A safety checker looks at the pictures: a scan lets all of them pass."""
        checkers = (target for target in self.children_of(self.root).values() if "safety_checker" in target.path)
        return {target.key: partial(_let_pass, target.owner) for target in checkers}

    def clock(self) -> Clock:
        """A step begins with a part that is told the timestep, once the scheduler has stepped since the last."""
        parts = self.children_of(self.root).values()
        denoisers = [target for target in parts if target.name == FORWARD and _time_parameter(target.owner)]
        steps = [target for part in parts for target in self.method_targets(part) if target.name == "step"]
        return Clock(denoisers, steps, lambda target, *call: _told(target.owner, *call))

    def timestep(self, component: str, call: tuple[tuple, dict]) -> float | None:
        """The timestep a denoiser was called with, in the scheduler's own count: some pipelines divide it by 1000."""
        moment = _told(self.children_of(self.root)[component].owner, *call)
        if moment is None:
            return None
        told, rounding = moment
        near = []
        for scheduler in (part for part in self.parts().values() if isinstance(part, SchedulerMixin)):
            known = torch.as_tensor(getattr(scheduler, "timesteps", [])).flatten()
            span = scheduler.config.get("num_train_timesteps", 1000)
            for order, value in enumerate((told, told * span, (1 - told) * span) if known.numel() else ()):
                nearest = known[(known.double() - value).abs().argmin()].item()
                if abs(nearest - value) <= rounding * span:
                    near.append((abs(nearest - value), order, nearest))
        return min(near)[2] if near else told

    def describe(self, owner: Any) -> str:
        if owner is not self.root.owner:
            return repr(owner)
        lines, besides, names = [], list(self.methods_of(owner)), []
        for path, part in self.parts().items():
            shown = repr(part) if isinstance(part, nn.Module) else f"{type(part).__name__}()"
            lines.append(f"  ({path}): " + shown.replace("\n", "\n  "))
            besides += self.methods_of(part).values()
            besides += [path] if not isinstance(part, nn.Module) and callable(part) else []
            names += [f"{path}.{name} = {path}.{real}" for name, real in self.names_of(part).items() if name != real]
        text = f"{type(owner).__name__}(\n" + "\n".join(lines) + "\n)"
        text += "\ntraceable besides modules: " + ", ".join(f"{path}()" for path in besides)
        return text + ("\nstandard names: " + ", ".join(names) if names else "") + self.describe_weights()


_WITHOUT_WEIGHTS = ("set_progress_bar_config", "progress_bar")
_PLAIN = (bool, int, float, str, list, tuple, dict)


@contextmanager
def _detached_pictures(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Lets pictures that carry gradients be turned into numpy and PIL ones at the end of a run."""
    processor = getattr(pipeline, "image_processor", None) or getattr(pipeline, "video_processor", None)
    if processor is None:
        yield
        return
    detached = ChangedMethod(processor, "pt_to_numpy", lambda method: lambda images: method(images.detach()))
    try:
        yield
    finally:
        detached.remove()


def _let_pass(checker: nn.Module, clip_input: torch.Tensor, images: Any) -> tuple:
    """What a safety checker gives where it finds nothing: pictures (batch, …), and for each that it is none; that of
    DeepFloyd IF also looks for watermarks."""
    nothing = [False] * len(images)
    return (images, nothing, nothing) if type(checker).__name__.startswith("IF") else (images, nothing)


def _methods_worth(part: Any) -> tuple[str, ...]:
    """The methods of a component that pipelines call directly, and that matter."""
    if isinstance(part, nn.Module):
        return "encode", "decode"
    return ("step",) if isinstance(part, SchedulerMixin) else ()


def _has_method(part: Any, name: str) -> bool:
    return isinstance(inspect.getattr_static(type(part), name, None), FunctionType)


def _time_parameter(module: nn.Module) -> str | None:
    """The parameter by which a denoiser is told the time; other parts have none."""
    names = list(inspect.signature(module.forward).parameters)
    return next((n for n in names if "timestep" in n), next((n for n in names[:3] if n in ("t", "r")), None))


def _told(module: nn.Module, args: tuple, kwargs: dict) -> tuple[float, float] | None:
    """The time a denoiser is told in a call, and the rounding of its type. Where each token has a time of its own, the
    latest: tokens that are given rather than drawn are told 0."""
    name = _time_parameter(module)
    given = dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs
    if given.get(name) is None:
        return None
    told = torch.as_tensor(given[name])
    rounding = 4 * torch.finfo(told.dtype).eps if told.is_floating_point() else 0
    return float(told.max()), rounding


def _inputs(arguments: dict[str, Any]) -> int:
    """How many prompts, or other inputs, a call has."""
    for name in ("prompt", "prompt_embeds", "image"):
        given = arguments.get(name)
        if given is not None:
            single = 3 if name == "image" else 2  # dimensions of one
            several = isinstance(given, (list, tuple)) or (isinstance(given, torch.Tensor) and given.ndim > single)
            return len(given) if several else arguments.get("batch_size", 1)
    return arguments.get("batch_size", 1)


def _pictures_each(arguments: dict[str, Any]) -> int:
    """How many pictures a call makes for each of its inputs."""
    return math.prod(arguments.get(name) or 1 for name in _PER_PROMPT)
