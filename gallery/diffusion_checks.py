"""The checks of a pipeline; see `checking.py`.

Each check returns its finding, or raises AssertionError with the reason if the pipeline fails it.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_leaves

from diffsight.errors import InputError, NeverReachedError
from diffsight.gallery.check_does_not_apply import CheckDoesNotApply
from diffsight.lenses.diffusion_lens import diffusion_lens
from diffsight.lenses.results.outputs import image_of
from diffsight.pipelines.arguments import check_arguments
from diffsight.pipelines.diffusion.attention import find_attentions
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import progress_bar

_PROMPT, _SEED = "a red circle", 3
_DENOISERS = ("transformer", "unet", "prior")


def diffusion_checks(model: DiffusionModel, arguments: Mapping[str, Any]) -> dict[str, Callable[[], str]]:
    """Return the checks of a pipeline by name."""
    given = dict(arguments)
    names = model.argument_names
    check_arguments(type(model.pipeline).__name__, given, names)
    if "prompt" in names and not given.keys() & {"prompt", "prompt_embeds"}:
        given["prompt"] = _PROMPT
    if "num_inference_steps" in names:
        given.setdefault("num_inference_steps", 3)
    seen = _Pipeline(model, given)
    return {
        "unread run": seen.unread_run,
        "components": seen.components,
        "steps": seen.steps,
        "guidance": seen.guidance,
        "text encoders": seen.text_encoders,
        "attention": seen.attention,
        "diffusion lens": seen.lens,
        "seeds": seen.seeds,
    }


class _Pipeline:
    def __init__(self, model: DiffusionModel, arguments: dict[str, Any]) -> None:
        self._model, self._arguments = model, arguments

    def unread_run(self) -> str:
        assert same_bits(self._drawn(), self._bare()), "a run in which nothing is read differs from the bare call"
        return "a run in which nothing is read has the bits of the bare call"

    def components(self) -> str:
        """Compare the return value of every call of the components with the value that an ordinary hook sees."""
        modules = {n: m for n, m in self._model.pipeline.components.items() if isinstance(m, nn.Module)}
        hooked: dict[str, list] = {name: [] for name in modules}
        with ExitStack() as hooks:
            for name, module in modules.items():
                handle = module.register_forward_hook(
                    lambda module, args, output, kept=hooked[name]: kept.append(_copied(output))
                )
                hooks.callback(handle.remove)
            self._bare()
        followed: dict[str, list] = {name: [] for name in modules}
        with progress_bar(self._model.pipeline, disable=True), self._run() as run:
            for name in modules:
                run.follow(f"{name}.output", lambda value, kept=followed[name]: kept.append(_copied(value)))
        wrong = [name for name in modules if not same_bits(hooked[name], followed[name])]
        assert not wrong, f"values of {', '.join(wrong)} differ from those of hooks"
        called = {name: len(values) for name, values in hooked.items() if values}
        idle = [name for name in modules if name not in called]
        listed = ", ".join(f"{name} (calls: {count})" for name, count in called.items())
        return (listed or "none is called as a module") + (f"; not called: {', '.join(idle)}" if idle else "")

    def steps(self) -> str:
        counted = _count_scheduler_steps(self._model.pipeline, self._bare)
        with progress_bar(self._model.pipeline, disable=True), self._run() as run:
            try:
                steps = sum(1 for _ in run.steps)
            except InputError as error:
                raise CheckDoesNotApply(str(error).split(": ")[-1]) from None
        assert counted in (0, steps), f"run.steps has {steps}, but scheduler.step was called {counted} times"
        return f"{steps}, as many as calls of scheduler.step" if counted else f"{steps} (scheduler.step is not called)"

    def guidance(self) -> str:
        denoiser = next((name for name in _DENOISERS if name in self._model.pipeline.components), None)
        if denoiser is None:
            raise CheckDoesNotApply(f"the pipeline has none of these denoisers: {', '.join(_DENOISERS)}")
        sizes = {}
        with progress_bar(self._model.pipeline, disable=True), self._run() as run:
            whole = tree_leaves(getattr(run, denoiser).output)[0]
            for name in ("cond", "uncond"):
                try:
                    sizes[name] = len(tree_leaves(getattr(getattr(run, name), denoiser).output)[0])
                except (InputError, NeverReachedError) as error:
                    sizes[name] = str(error).splitlines()[0]
            run.stop()
        if isinstance(sizes["uncond"], str):
            raise CheckDoesNotApply(f"no unconditional branch: {sizes['uncond']}")
        assert isinstance(sizes["cond"], int), sizes["cond"]
        return f"conditional and unconditional, {sizes['cond']} and {sizes['uncond']} of {len(whole)} rows"

    def text_encoders(self) -> str:
        found = self._model.encoders
        if not found:
            raise CheckDoesNotApply("there is no text encoder")
        lost = [name for name, encoder in found.items() if not encoder.uses]
        assert not lost, f"no use of {', '.join(lost)} was found"
        return ", ".join(f"{name} ({encoder.count} layers)" for name, encoder in found.items())

    def attention(self) -> str:
        found = find_attentions(  # with these arguments: the pipeline's defaults may be for a long video
            self._model, **{name: value for name, value in self._arguments.items() if "embeds" not in name}
        )
        if not found:
            raise CheckDoesNotApply("the denoiser has no attention")
        kinds = Counter(attention.kind for attention in found.values())
        unplaced = [attention.name for attention in found.values() if attention.unplaced is not None]
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        return listed + (f"; no grid of image positions in {', '.join(unplaced)}" if unplaced else "")

    def lens(self) -> str:
        if not self._model.encoders or "prompt" not in self._arguments:
            raise CheckDoesNotApply("there is no text encoder, or no prompt")
        found = self._model.encoders.choose()
        last = found.last_used_layer
        given = dict(self._arguments)
        if "output_type" in self._model.argument_names:
            given["output_type"] = "pil"
        result = diffusion_lens(self._model, **given, layers=last, seed=_SEED, progress=False)
        with progress_bar(self._model.pipeline, disable=True):
            plain = self._model.generate(**given, seed=_SEED).result[0][0]
        assert same_bits(result.images[0], image_of(plain)), "the last layer's image is not the plain one"
        return f"the image of {'the embedding' if last == 'embedding' else f'layer {last}'} is the plain one"

    def seeds(self) -> str:
        if not self._takes_generator:
            raise CheckDoesNotApply("the pipeline does not have the argument generator")
        first, again, other = (self._drawn(seed) for seed in (_SEED, _SEED, _SEED + 1))
        assert same_bits(first, again), "the same seed gave another result"
        return "the same seed repeats the result" + ("" if same_bits(first, other) else ", another seed changes it")

    @property
    def _takes_generator(self) -> bool:
        return "generator" in self._model.argument_names

    def _run(self, seed: int = _SEED) -> Any:
        return self._model.generate(**self._arguments, **({"seed": seed} if self._takes_generator else {}))

    def _drawn(self, seed: int = _SEED) -> Any:
        with progress_bar(self._model.pipeline, disable=True):
            return self._run(seed).result

    def _bare(self) -> Any:
        given = dict(self._arguments)
        if self._takes_generator:
            given["generator"] = torch.Generator().manual_seed(_SEED)
        with progress_bar(self._model.pipeline, disable=True), torch.random.fork_rng():
            torch.manual_seed(_SEED)
            return self._model.pipeline(**given)


def same_bits(a: Any, b: Any) -> bool:
    """Return whether two values, which may be nested, have the same tensors, images and numbers."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, (np.ndarray, Image.Image)):
        return np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return type(a) is type(b)


def _copied(value: Any) -> list[torch.Tensor]:
    return [leaf.detach().clone() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _count_scheduler_steps(pipeline: Any, call: Callable[[], Any]) -> int:
    """Return how often `call` calls the `step` method of the pipeline's scheduler, or of a copy of it."""
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None:
        return 0
    kind, counted = type(scheduler), []
    original = inspect.getattr_static(kind, "step")

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(1)
        return original(self, *args, **kwargs)

    kind.step = step
    try:
        call()
    finally:
        kind.step = original
    return len(counted)
