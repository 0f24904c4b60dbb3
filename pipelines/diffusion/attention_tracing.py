"""Follow tokens and positions of the image into the attention modules of a denoiser.

Parts of the denoiser's input are changed. The queries and keys that change with them belong to the same tokens and
positions. To keep a change from reaching anything else, all operations that mix places are cut in the denoiser, see
`cut_attention.py`.

    tracer = AttentionTracer(model, arguments)
    plain = tracer.trace()                                              # {("blocks.0.attn", 0): Trace}
    changed = tracer.trace(TracedChange(text=("text_encoder", [3])))    # with token 3 of a text encoder changed
    difference(changed[key].keys, plain[key].keys)                      # how much each key has changed, (keys,)
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch.utils._pytree import tree_leaves

from diffsight.errors import InputError
from diffsight.extending import Model, Run, flow_of, owner_of
from diffsight.pipelines.diffusion.components import components, text_encoder_names, traceable_methods
from diffsight.pipelines.diffusion.cut_attention import CutAttention, Inseparable, Key, Trace
from diffsight.pipelines.diffusion.denoising_clock import denoisers

_SAME = 1e-4  # relative to the length of a query or key: what rounding in a batch may change
_BATCH = 2**15  # numbers in the images of one run with several changes: a run of a large pipeline makes only one


@dataclass(frozen=True)
class TracedChange:
    """What is changed in a run.

    Attributes:
        text: The name of a text encoder, and which of its tokens are changed.
        image: Returns a mask of the changed places, for an input tensor with one or several images.
    """

    text: tuple[str, Sequence[int]] | None = None
    image: Callable[[torch.Tensor], torch.Tensor] | None = None


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return how much each token differs, (tokens,), relative to its length."""
    return (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-12)


class AttentionTracer:
    """Runs a pipeline up to the first call of its denoiser, with parts of the denoiser's input changed.

    Args:
        model: A `DiffusionModel`.
        arguments: The arguments of the pipeline, with the prompt.
    """

    def __init__(self, model: Model, arguments: Mapping[str, Any]) -> None:
        self._model, self._arguments = model, dict(arguments)
        self.denoiser = denoiser_of(model)
        self.image: tuple[int, ...] = ()  # the shape of the denoiser's input for the image that is drawn
        self.drawn: slice | None = None  # its positions in a sequence that also holds reference images
        self._positions = 0  # the length of that sequence
        self.latents: tuple[int, ...] = ()  # the shape of the decoded latents for one image; () if unknown
        self.tokens: dict[str, int] = {}  # the number of tokens that each text encoder returns
        self._plain: dict[Key, Trace] = {}  # the products of an image without changes
        self._is_batched = True  # whether to draw several images in one run

    def inputs(self) -> Hashable:
        """Run the pipeline up to its denoiser, and return everything that determines the products of the first call.

        These are the shapes of the denoiser's inputs, the numbers of tokens, and the processors."""
        with self._model.generate(**self._arguments, seed=0) as run:
            found = self.inputs_of(run)
            run.stop()
        return found

    def inputs_of(self, run: Run) -> Hashable:
        """Return the same for a run that has not begun, which then stands at its denoiser."""
        for name in text_encoder_names(self._model.pipeline):
            run.follow(f"{name}.output", lambda output, name=name: self._change_text(name, output))
        given = tree_leaves(run[self.denoiser].inputs)
        module = owner_of(self._model[self.denoiser])
        shapes = tuple(tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in given)
        processors = tuple(type(getattr(part, "processor", None)) for part in module.modules())
        return self.denoiser, id(module), shapes, processors, tuple(self.tokens.items())

    def trace(self, change: TracedChange = TracedChange(), references: bool = False) -> dict[Key, Trace]:
        """Return the products of the first call of the denoiser.

        Args:
            change: What is changed.
            references: Whether reference images are changed.
        """
        (traces,) = self._traces([change], references)
        if change == TracedChange() and not references:
            self._plain = traces
        return traces

    def traces(self, changes: Sequence[TracedChange]) -> Iterator[dict[Key, Trace]]:
        """Yield the products of the first call of the denoiser with each of several changes."""
        return self._in_batches(changes, self._traces_together)

    def decoded(self) -> torch.Tensor | None:
        """Return the latents that are decoded after a few steps, (batch, channels, …), or None if none are decoded."""
        (value,) = self._decoded([TracedChange()])
        self.latents = () if value is None else tuple(value.shape[1:])
        return value

    def all_decoded(self, changes: Sequence[TracedChange]) -> Iterator[torch.Tensor]:
        """Yield the latents that are decoded after a few steps with each of several changes."""
        return self._in_batches(changes, self._decoded)

    def _in_batches(
        self, changes: Sequence[TracedChange], observe: Callable[[Sequence[TracedChange]], list]
    ) -> Iterator:
        """Yield what is observed with each of several changes.

        A small pipeline draws several images in one run, with a change each. Not every pipeline can: some take only one
        prompt, or do not keep the images apart."""
        done = 0
        while done < len(changes):
            is_batched = self._is_batched and isinstance(self._arguments.get("prompt"), str)
            batch = changes[done : done + max(1, _BATCH // math.prod(self.image) if is_batched else 1)]
            try:
                found = observe(batch)
            except Exception:
                if len(batch) == 1:
                    raise
                self._is_batched = False
            else:
                yield from found
                done += len(batch)

    def _traces_together(self, changes: Sequence[TracedChange]) -> list[dict[Key, Trace]]:
        """Return the products with each of several changes, all in one run.

        The first and the last image of the run are left as they are. If they differ from the one that was drawn alone,
        the changes have reached other images than theirs, or a hook of the user's changes only some of the images."""
        if len(changes) == 1:
            return self._traces(changes)
        first, *traces, last = self._traces([TracedChange(), *changes, TracedChange()])
        for (key, plain), found in product(self._plain.items(), (first, last)):
            for there, alone in ((found[key].queries, plain.queries), (found[key].keys, plain.keys)):
                if there.shape != alone.shape or (difference(there, alone) > _SAME).any():
                    raise Inseparable
        return traces

    def _traces(self, changes: Sequence[TracedChange], references: bool = False) -> list[dict[Key, Trace]]:
        run = self._opened(changes)
        mode = self._cut(run, len(changes))
        if references:
            run.follow(f"{self.denoiser}.input", self._change_references)
        with run:
            run[self.denoiser].output
            run.stop()
        return mode.traces

    def _decoded(self, changes: Sequence[TracedChange]) -> list[torch.Tensor | None]:
        pipeline = self._model.pipeline
        decoders = [
            name for name, part in components(pipeline).items() if "decode" in traceable_methods(pipeline, part)
        ]
        arguments = {"num_inference_steps": 2} if "num_inference_steps" in self._model.argument_names else {}
        run = self._opened(changes, **arguments)
        self._cut(run)
        if changes[0].image is None and len(self.image) == 2:
            self._follow_drawn(run)
        with run:
            value = None
            if decoders:
                value = run[f"{decoders[0]}.decode"].input.detach().float().cpu()
            run.stop()
        return [None if value is None else _entries_of(value, number, len(changes)) for number in range(len(changes))]

    def _follow_drawn(self, run: Run) -> None:
        """Find the positions that the scheduler steps among those that go into the denoiser."""
        sequence: list[torch.Tensor] = []

        def keep(value: Any) -> None:
            if not sequence:
                sequence.append(_tensors(value)[0][0].detach().clone())

        def compare(inputs: Any) -> None:
            if self._positions or not sequence:
                return
            self._positions = len(sequence[0])
            for latents in (tensor[0].to(sequence[0]) for tensor in _tensors(inputs) if tensor.ndim == 3):
                if latents.shape[1:] != sequence[0].shape[1:] or len(latents) >= self._positions:
                    continue
                for start in torch.nonzero((sequence[0] == latents[0]).all(-1)).flatten().tolist():
                    if torch.equal(sequence[0][start : start + len(latents)], latents):
                        self.drawn, self.image = slice(start, start + len(latents)), tuple(latents.shape)
                        return

        run.follow(f"{self.denoiser}.input", keep)
        for name, part in components(self._model.pipeline).items():
            if isinstance(part, SchedulerMixin):
                run.follow(f"{name}.step.inputs", compare)

    def _opened(self, changes: Sequence[TracedChange], **more: Any) -> Run:
        arguments, seed = {**self._arguments, **more}, 0
        if len(changes) > 1:
            arguments |= {name: [text] * len(changes) for name, text in arguments.items() if _is_prompt(name, text)}
            seed = [0] * len(changes)
        run = self._model.generate(**arguments, seed=seed)
        for name in text_encoder_names(self._model.pipeline):
            run.follow(f"{name}.output", lambda output, name=name: self._change_text(name, output, changes))
        run.follow(f"{self.denoiser}.input", lambda value: self._change_image(value, changes))
        return run

    def _cut(self, run: Run, count: int = 1) -> CutAttention:
        """Cut the operations that mix places. Record the products for each of several prompts."""
        module = owner_of(self._model[self.denoiser])
        mode = CutAttention(module, lambda branch: flow_of(run).observer.entries(module, branch), count)
        flow_of(run).add_mode(mode)
        return mode

    def _change_text(self, name: str, output: Any, changes: Sequence[TracedChange] = ()) -> None:
        hidden = [tensor for tensor in _tensors(output) if tensor.ndim == 3]
        self.tokens.setdefault(name, hidden[0].shape[1] if hidden else 0)
        for tensor, (number, change) in product(hidden, enumerate(changes)):
            if change.text is not None and change.text[0] == name:
                part = _entries_of(tensor, number, len(changes))
                tokens = [token for token in change.text[1] if token < tensor.shape[1]]
                part[:, tokens] = -part[:, tokens].roll(tensor.shape[-1] // 2 + 1, -1)

    def _change_image(self, value: Any, changes: Sequence[TracedChange]) -> None:
        tensors = _tensors(value)
        is_list = isinstance(value, (list, tuple))  # of one image each
        self.image = self.image or tuple(tensors[0].shape if is_list else tensors[0].shape[1:])
        for number, change in enumerate(changes):
            if change.image is None:
                continue
            for tensor in _entries_of(tensors, number, len(changes)) if is_list else tensors:
                part = tensor if is_list else _entries_of(tensor, number, len(changes))
                if self.drawn is not None and part.shape[1] == self._positions:
                    part = part[:, self.drawn]
                noise = torch.randn(part.shape, generator=torch.Generator().manual_seed(1)).to(part)
                place = change.image(part).to(part.device)
                part.copy_(torch.where(place, 3 * noise, part))

    def _change_references(self, value: Any) -> None:
        for tensor in _tensors(value):
            drawn = tensor[:, self.drawn].clone()
            tensor.copy_(3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
            tensor[:, self.drawn] = drawn


def denoiser_of(model: Model) -> str:
    """Return the name of the denoiser, the largest if there are several."""
    found = denoisers(model.pipeline)
    if not found:
        raise InputError(f"{type(model.pipeline).__name__} has no component that takes a timestep")
    if len(found) == 1:
        return next(iter(found))
    return max(found, key=lambda name: sum(p.numel() for p in found[name].parameters()))


def _is_prompt(name: str, value: Any) -> bool:
    return isinstance(value, str) and name.removeprefix("negative_").startswith("prompt")


def _entries_of(batch: Any, number: int, count: int) -> Any:
    """Return those entries of a batch that belong to one of several prompts, which follow each other in each branch."""
    if len(batch) % count:
        raise Inseparable
    return batch[number::count]


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return the floating-point tensors in a value, each once."""
    leaves = value.values() if isinstance(value, Mapping) else [value]
    found = [leaf for leaf in tree_leaves(list(leaves)) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return list({(tensor.data_ptr(), tensor.shape): tensor for tensor in found}.values())
