"""DiffusionModel: a diffusers pipeline in which every part can be traced and every image has a seed.

model = DiffusionModel("diffsight/shapes-clip")
model.generate("a red circle above a blue square", seed=17).images[0]

with model.generate("a red circle above a blue square", seed=17) as run:
    for step in run.steps:
        print(step.index, step.timestep, run.unet.mid_block.output.norm())
run.images
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from torch import nn

from diffsight.errors import DiffsightError, InputError, PointNotFoundError, suggest
from diffsight.extending import (
    ChangedMethod,
    Model,
    Run,
    Selection,
    Target,
    flow_of,
    with_gradients,
)
from diffsight.pipelines.diffusion.attention import Attentions, find_attentions
from diffsight.pipelines.diffusion.attention_processors import processors_restored
from diffsight.pipelines.diffusion.batch_layouts import BatchLayouts
from diffsight.pipelines.diffusion.call_arguments import argument_names, arguments_by_name, call_defaults
from diffsight.pipelines.diffusion.call_errors import CALL_ERRORS, is_of_pipeline
from diffsight.pipelines.diffusion.clip_skip import check_clip_skip
from diffsight.pipelines.diffusion.components import components, text_encoder_names
from diffsight.pipelines.diffusion.decoding import draw
from diffsight.pipelines.diffusion.denoiser_caches import caches_emptied
from diffsight.pipelines.diffusion.denoising_clock import count_of_steps, is_last_step
from diffsight.pipelines.diffusion.diffusion_tree import DiffusionTree
from diffsight.pipelines.diffusion.encoder_accessors import HasEncoders, PipelineEnvoy
from diffsight.pipelines.diffusion.encoding import images_beside_prompt
from diffsight.pipelines.diffusion.guider_hooks import guider_hooks_removed
from diffsight.pipelines.diffusion.image_seeds import images_kept_apart, noise_of_schedulers_seeded
from diffsight.pipelines.diffusion.input_counts import PER_INPUT, check_labels, count_images_each, count_inputs
from diffsight.pipelines.diffusion.loading import Source, open_pipeline
from diffsight.pipelines.diffusion.lora_scales import lora_scales_restored
from diffsight.pipelines.diffusion.pipeline_copies import stateful_parts
from diffsight.pipelines.diffusion.pipelines_in_use import PipelineOfRun
from diffsight.pipelines.diffusion.prompts import check_prompts
from diffsight.pipelines.diffusion.run import DiffusionRun, ProgressBars, progress_bar, set_pipeline
from diffsight.pipelines.diffusion.text_encoders import Encoders, find_encoders
from diffsight.pipelines.seeds import generators, seeded_noise, seeds_of_images
from diffsight.pipelines.unread_runs import warn_if_unread
from diffsight.pipelines.valid_text import check_text
from diffsight.remote import ServedModel, is_on_server, put_on_server


class DiffusionModel(HasEncoders, Model):
    """Wraps a diffusers pipeline.

    Every component is an envoy under its own name. So are the tokenizers and the methods that pipelines call directly:
    `encode_prompt`, `vae.encode`, `vae.decode`, `scheduler.step`. Text encoders have the standard names `.layers[i]`
    and `.ln_final`, and `.layers_input[i]` and `.layers_output[i]`, the hidden states of a layer. All other attributes
    are those of the pipeline (`model.device`, `model.enable_model_cpu_offload()`,
    `model.set_progress_bar_config(disable=True)`).

    Weights are loaded when they are first needed: by a run, a call, `.pipeline` or `.to(...)`. Until then the model can
    be printed, browsed and scanned.

    Args:
        source: A packaged name (`diffsight/shapes-clip`), a folder, a hub id, or a live pipeline. Modular pipelines can
            also be passed as blocks, with their components as `arguments`.
        dispatch: Whether to load the weights immediately.
        remote: The address of a server that has the weights, such as "http://127.0.0.1:8000"; True takes it from the
            environment variable DIFFSIGHT_REMOTE. `source` is then the name of the model there, and runs are sent
            there, see [remote runs](../remote.md).
        api_key: The key for the server. Default: the environment variable DIFFSIGHT_API_KEY.
        arguments: Passed to `DiffusionPipeline.from_pretrained`.

    Raises:
        InputError: `source` does not name a pipeline, or an argument is unknown.
        RemoteError: The server cannot be reached, or refuses.
    """

    _run_class = DiffusionRun

    def __init__(
        self,
        source: Source,
        dispatch: bool = False,
        *,
        remote: str | bool | None = None,
        api_key: str | None = None,
        **arguments: Any,
    ) -> None:
        if remote:
            self._open_remote(ServedModel.of(self, source, remote, api_key, dispatch, arguments))
            return
        pipeline, loader = open_pipeline(source, dispatch, **arguments)
        self._wrap(DiffusionTree(Target(pipeline, "__call__", ""), loader))
        is_live = not isinstance(source, (str, Path))
        self.__dict__["source"] = type(pipeline).__name__ if is_live else str(source)
        self.__dict__["loaded_from"] = None if is_live else {"source": str(source), **arguments}

    def _open_remote(self, server: ServedModel) -> None:
        with server.configuration() as folder:
            pipeline, _ = open_pipeline(folder, weights=False)
        self._wrap(DiffusionTree(Target(pipeline, "__call__", "")))
        self.__dict__.update(source=server.name, loaded_from={"source": server.name, "remote": str(server.address)})
        put_on_server(self, server)

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The wrapped pipeline, with its weights."""
        return self.module

    @property
    def argument_names(self) -> set[str]:
        """The names of the arguments of the pipeline, including those that it reads from its `**kwargs`."""
        return argument_names(self._owner)

    @property
    def encoders(self) -> Encoders:
        """The text encoders by name, and the outputs of each that the pipeline uses. The first access encodes a prompt
        to find them."""
        texts = [getattr(self._owner, name) for name in text_encoder_names(self._owner)]
        sizes = [sum(1 for _ in part.modules()) for part in texts]  # layers may be removed in place
        return self._found("_known_encoders", _encoders_there if is_on_server(self) else find_encoders, sizes)

    @property
    def attentions(self) -> Attentions:
        """The attention modules of the denoiser by name, and what their queries and keys stand for. The first access
        runs the pipeline up to its denoiser for about twenty images to find out, see `find_attentions`."""
        return self._found("_known_attentions", _attentions_there if is_on_server(self) else find_attentions)

    def _found(self, name: str, find: Callable[[Model], Any], sizes: Sequence[int] = ()) -> Any:
        """Return the result of `find` for the model without its edits, cached while the components stay the same, and
        `sizes`, which describe what is in them."""
        parts = tuple(self._owner.components.values())
        known = self.__dict__.get(name)
        if known is None or known[1] != sizes or any(a is not b for a, b in zip_longest(known[0], parts)):
            plain = self._copy()
            plain.clear_edits()
            found = find(plain)
            known = self.__dict__[name] = (tuple(self._owner.components.values()), sizes, found)
        return known[2]

    def to(self, *args: Any, **kwargs: Any) -> "DiffusionModel":
        """Move or cast the pipeline, as `pipeline.to(...)` does, and return the model."""
        self.pipeline.to(*args, **kwargs)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "DiffusionModel":
        """Set whether gradients are computed for the weights of all components, and return the model.

        `model.requires_grad_(False)` freezes the pipeline, for example to train a module that is used in its runs."""
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(requires_grad)
        return self

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        """Call the pipeline. While a run of it is open, this calls a copy with its own schedulers, as other runs do."""
        if hook or is_on_server(self):
            return super().__call__(*args, hook=hook, **kwargs)
        self._tree.load_unless_scanning()
        with PipelineOfRun(self._owner, kwargs).in_use() as call:
            return call(*args, **kwargs)

    def generate(
        self, *args: Any, seed: int | Sequence[int] | None = None, grad: bool = False, **kwargs: Any
    ) -> DiffusionRun:
        """Open a run of the pipeline.

            with model.generate("a red circle", seed=17) as run:
                ...
            model.generate("a red circle", seed=17).images

        Args:
            args, kwargs: The arguments of the pipeline. Its defaults are kept.
            seed: Image *i* of the call gets `seed + i`. A list has one seed per image. The generators are on the CPU,
                so that a seed produces the same image on every device and in every batch.
            grad: Whether gradients can flow from the images to any value in the run.

        Raises:
            InputError: The pipeline has no such argument, a prompt is too long for every tokenizer, or a seed
                is not valid. Nothing has run yet. Or the pipeline encodes a given image once for several seeds, which
                shows before its first step.
        """
        arguments, seeds = self._checked(args, seed, kwargs)
        is_modular = isinstance(self._owner, ModularPipeline)
        if is_modular:
            args, kwargs = (), arguments
            if grad:
                raise InputError(
                    f"grad=True: the blocks of {type(self._owner).__name__} disable gradients themselves. Use the "
                    "non-modular pipeline instead"
                )
        again = None if args or "prompt" in kwargs else partial(self.generate, seed=seed, grad=grad, **kwargs)

        named = {**arguments, **kwargs}
        own, bars = PipelineOfRun(self._owner, named, can_wait=True), ProgressBars()

        def call() -> Any:
            given = dict(kwargs)
            with own.in_use() as method, ExitStack() as changes, _naming_the_prompt(is_missing=again is not None):
                pipeline = own.pipeline
                changes.enter_context(bars.watched(pipeline))
                changes.enter_context(processors_restored(pipeline))
                changes.enter_context(caches_emptied(pipeline))
                changes.enter_context(lora_scales_restored(pipeline, named))
                changes.enter_context(guider_hooks_removed(pipeline))
                if seeds is not None:
                    given["generator"] = made = generators(seeds)
                    if len(seeds) > 1:
                        changes.enter_context(images_kept_apart(pipeline, made))
                    of_images = made if len(seeds) > 1 else [made]
                    changes.enter_context(noise_of_schedulers_seeded(pipeline, of_images))
                    changes.enter_context(seeded_noise(stateful_parts(pipeline), seeds))
                if not grad:
                    return method(*args, **given)
                changes.enter_context(_detached_images(pipeline))
                return with_gradients(method)(*args, **given)

        run = self._new_run(call, again=again, grad=grad)
        set_pipeline(run, own, arguments.get("output") if is_modular else None)
        warn_if_unread(run, named)
        clock = flow_of(run).clock
        clock.is_last = lambda target, *call: bars.are_closed or is_last_step(own.pipeline, target.owner, *call)
        clock.count = lambda: count_of_steps(own.pipeline)
        flow_of(run).seed = None if seeds is None else seeds[0]  # for noise drawn without a generator
        flow_of(run).observer = BatchLayouts(
            self._owner, arguments, count_inputs(arguments), count_images_each(arguments)
        )
        return run

    def encode(self, prompt: str | Sequence[str], **arguments: Any) -> Any:
        """Return the embeddings of a prompt, as the pipeline encodes it.

            embeddings, negative = model.encode("a red circle")     # of Stable Diffusion

        Images that the pipeline requires, and that do not change the embeddings, may be left out.

        Args:
            prompt: The prompt, or several.
            arguments: Other arguments of the pipeline, such as `negative_prompt`.

        Returns:
            The output of the pipeline's `encode_prompt`: tensors of `(prompts, tokens, features)`, pooled vectors of
            `(prompts, features)` and others, in the order that its documentation states.

        Raises:
            InputError: The pipeline has no `encode_prompt`, the prompt is not valid, or the pipeline needs other
                arguments.
        """
        if "encode_prompt" not in self._tree.methods_of(self._owner):
            raise InputError(
                f"{type(self._owner).__name__} has no encode_prompt: read the outputs of its text encoders in a run"
            )
        arguments["prompt"] = prompt
        errors, stand_ins = [], images_beside_prompt(self._owner)
        for given in [{}, stand_ins] if stand_ins.keys() - arguments.keys() else [{}]:  # an image only if it is needed
            try:
                return self._encoded(given | arguments)
            except CALL_ERRORS as error:
                if not is_of_pipeline(error):
                    raise
                errors.append(error)
        advice = ". Pass what it needs, as in model.encode(prompt, image=image)" if stand_ins else ""
        raise InputError(
            f"{type(self._owner).__name__} cannot be called with these arguments and its defaults ({errors[0]}){advice}"
        ) from errors[0]

    def _encoded(self, arguments: dict[str, Any]) -> Any:
        with torch.no_grad(), progress_bar(self.pipeline, disable=True), self.generate(**arguments) as run:
            encoded = run.encode_prompt.output
            run.stop()
        return encoded

    def decode(self, latents: torch.Tensor | Sequence[torch.Tensor], **arguments: Any) -> Sequence[Any]:
        """Return the images that the pipeline decodes from latents, in the same way as after its last step.

            latents = [step.latents for step in run.steps]
            images = model.decode(latents)

        The pipeline makes one denoising step. The latents replace the result of this step and are then unpacked, scaled
        and decoded. Pipelines for inpainting paste the given image into their latents after each step, but not into
        these: to see the result of a run, decode what it returns with `output_type="latent"`.

        Args:
            latents: Latents as `step.latents` returns them, `(batch, …)`, or a list of such tensors.
            arguments: Arguments of the call that produced the latents: `height` and `width` if they differ from the
                pipeline's defaults, and `output_type`. A `callback_on_step_end` among them is not called.

        Returns:
            One image or video for each entry of the latents, as in `run.images` or `run.frames`.

        Raises:
            InputError: The latents have a different shape from the pipeline's, or it needs other arguments.
        """
        return draw(self, latents, arguments)

    def trace(self, *args: Any, **kwargs: Any) -> DiffusionRun:
        """The same as `generate`."""
        return self.generate(*args, **kwargs)

    def check(self, *args: Any, seed: int | Sequence[int] | None = None, grad: bool = False, **kwargs: Any) -> None:
        """Check the arguments of `generate` without opening a run or running anything. Warn as `generate` does.

        Raises:
            InputError: The arguments are not valid.
        """
        self._checked(args, seed, kwargs)

    # ---- arguments

    def _checked(
        self, args: tuple, seed: int | Sequence[int] | None, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], list[int] | None]:
        """Return the arguments that were passed, by name, and the seed of each image."""
        arguments = arguments_by_name(self._owner, args, kwargs)
        for name, value in arguments.items():
            check_text(name, value)
        if arguments.get("prompt") is not None:
            check_prompts(self._owner, arguments["prompt"], arguments)
        steps = arguments.get("num_inference_steps")
        if isinstance(steps, float) and not steps.is_integer():
            raise InputError(f"num_inference_steps must be a whole number, not {steps}")
        for name in PER_INPUT:
            if isinstance(arguments.get(name), float):
                raise InputError(f"{name} must be a whole number, not {arguments[name]}")
        for name in ("num_inference_steps", *PER_INPUT):
            if isinstance(arguments.get(name), int) and arguments[name] < 1:
                raise InputError(f"{name} must be 1 or more, not {arguments[name]}")
        defaults = call_defaults(self._owner)
        if "batch_size" in defaults:
            check_labels(type(self._owner).__name__, arguments, (defaults | arguments)["batch_size"])
        check_clip_skip(self._owner, arguments.get("clip_skip"))
        return arguments, None if seed is None else self._seeds(seed, arguments)

    def _seeds(self, seed: int | Sequence[int], arguments: dict[str, Any]) -> list[int]:
        name = type(self._owner).__name__
        if "generator" in arguments:
            raise InputError("pass either seed or generator, not both")
        if "generator" not in self.argument_names:
            raise InputError(f"{name} does not take a generator, so it cannot be seeded")
        count = count_inputs(arguments) * count_images_each(arguments)
        return seeds_of_images(seed, count)

    # ---- envoys

    def _bound(self, run: Run, part: Selection | None = None) -> PipelineEnvoy:
        return PipelineEnvoy(self._tree, self._target, run, part=part)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in components(self._owner):
            if is_on_server(self):
                raise InputError(
                    f"{name} belongs to the pipeline on the server at {self.server.address}: it is set there"
                )
            if isinstance(value, (bool, int, float, str, list, tuple, dict)):
                raise InputError(f"{name} is a component of the pipeline, which cannot be {value!r}")
            setattr(self._owner, name, value)  # replaces a component: model.scheduler = DDIMScheduler(...)
        else:
            try:
                super().__setattr__(name, value)
            except PointNotFoundError as error:
                raise PointNotFoundError(f"{error}{suggest(name, components(self._owner))}") from None


def _encoders_there(model: Model) -> Encoders:
    """Return the text encoders of a model, as its server finds them."""
    return Encoders(type(model.pipeline).__name__, {encoder.name: encoder for encoder in model.server.find("encoders")})


def _attentions_there(model: Model) -> Attentions:
    """Return the attention modules of a model, as its server finds them."""
    denoiser, attentions = model.server.find("attentions")
    return Attentions(type(model.pipeline).__name__, denoiser, attentions)


@contextmanager
def _naming_the_prompt(is_missing: bool) -> Iterator[None]:
    """If a pipeline complains about a missing prompt, say that the run was opened without one."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if not is_missing or isinstance(error, DiffsightError) or "prompt" not in str(error):
            raise
        raise InputError(
            f"the run was opened without a prompt: pass one, or open passes in it with run.invoke(prompt) ({error})"
        ) from error


@contextmanager
def _detached_images(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Let images with gradients be converted to numpy and PIL at the end of a run."""
    processor = getattr(pipeline, "image_processor", None) or getattr(pipeline, "video_processor", None)
    if processor is None:
        yield
        return
    detached = ChangedMethod(processor, "pt_to_numpy", lambda method: lambda images: method(images.detach()))
    try:
        yield
    finally:
        detached.remove()
