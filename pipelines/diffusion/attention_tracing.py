"""Follow tokens and positions of the image into the attention modules of a denoiser.

Parts of the denoiser's input are changed. The queries and keys that change with them belong to the same tokens and
positions. To keep a change from reaching anything else, all operations that mix places are cut in the denoiser:
attention adds nothing, a convolution uses only the middle of its kernel, and a group norm normalizes each place alone.

    tracer = AttentionTracer(model, prompt, arguments)
    plain = tracer.trace()                                  # {("blocks.0.attn", 0): Trace}
    changed = tracer.trace(text=("text_encoder", [3]))      # with token 3 of a text encoder changed
    difference(changed[key].keys, plain[key].keys)          # how much each key has changed, (keys,)
"""

import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from diffsight.errors import InputError
from diffsight.extending import Model, Run, flow_of, owner_of
from diffsight.pipelines.attention.attention_modules import is_named_attention
from diffsight.pipelines.attention.attention_probabilities import AttentionProduct
from diffsight.pipelines.attention.eager_attention import EagerAttention
from diffsight.pipelines.attention.product_dispatch import WATCHED
from diffsight.pipelines.attention.sdpa_attention import (
    MULTI_HEAD_ATTENTION,
    SCALED_DOT_PRODUCT,
    FusedCall,
    without_dispatch,
)
from diffsight.pipelines.diffusion.batch_layouts import COND
from diffsight.pipelines.diffusion.components import components, text_encoder_names, traceable_methods
from diffsight.pipelines.diffusion.denoising_clock import denoisers

_FEATURES = 16  # the number of features kept of a query or key
Key = tuple[str, int]  # the path of a module in the denoiser, and the number of its product in a call


@dataclass(eq=False)
class Trace:
    """A product in one call of the denoiser.

    Attributes:
        shape: (batch, heads, queries, keys).
        queries: A random projection of the queries of the conditional branch, (queries, features).
        keys: A random projection of the keys, (keys, features).
    """

    shape: tuple[int, ...]
    queries: torch.Tensor = field(repr=False)
    keys: torch.Tensor = field(repr=False)


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
            run.follow(f"{name}.output", lambda output, name=name: self._change_text(name, output, None))
        given = tree_leaves(run[self.denoiser].inputs)
        module = owner_of(self._model[self.denoiser])
        shapes = tuple(tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in given)
        processors = tuple(type(getattr(part, "processor", None)) for part in module.modules())
        return self.denoiser, id(module), shapes, processors, tuple(self.tokens.items())

    def trace(
        self,
        text: tuple[str, Sequence[int]] | None = None,
        image: Callable[[torch.Tensor], torch.Tensor] | None = None,
        references: bool = False,
    ) -> dict[Key, Trace]:
        """Return the products of the first call of the denoiser.

        Args:
            text: The name of a text encoder, and which of its tokens are changed.
            image: Returns a mask of the changed places, for an input tensor with one or several images.
            references: Whether reference images are changed.
        """
        run, mode = self._opened(text, image)
        if references:
            run.follow(f"{self.denoiser}.input", self._change_references)
        with run:
            run[self.denoiser].output
            run.stop()
        return mode.traces

    def decoded(self, image: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Return the latents that are decoded after a few steps, (batch, channels, …), or None if none are decoded."""
        pipeline = self._model.pipeline
        decoders = [
            name for name, part in components(pipeline).items() if "decode" in traceable_methods(pipeline, part)
        ]
        arguments = {"num_inference_steps": 2} if "num_inference_steps" in self._model.argument_names else {}
        run, _ = self._opened(None, image, **arguments)
        if image is None and len(self.image) == 2:
            self._follow_drawn(run)
        with run:
            value = None
            if decoders:
                value = run[f"{decoders[0]}.decode"].input.detach().float().cpu()
            run.stop()
        self.latents = () if value is None else tuple(value.shape[1:])
        return value

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

    def _opened(self, text: Any, image: Any, **more: Any) -> tuple[Run, "CutAttention"]:
        run = self._model.generate(**{**self._arguments, **more}, seed=0)
        module = owner_of(self._model[self.denoiser])
        mode = CutAttention(module, lambda: flow_of(run).observer.entries(module, COND))
        flow_of(run).add_mode(mode)
        for name in text_encoder_names(self._model.pipeline):
            run.follow(f"{name}.output", lambda output, name=name: self._change_text(name, output, text))
        run.follow(f"{self.denoiser}.input", lambda value: self._change_image(value, image))
        return run, mode

    def _change_text(self, name: str, output: Any, text: tuple[str, Sequence[int]] | None) -> None:
        hidden = [tensor for tensor in _tensors(output) if tensor.ndim == 3]
        self.tokens.setdefault(name, hidden[0].shape[1] if hidden else 0)
        if text is None or text[0] != name:
            return
        for tensor in hidden:
            tokens = [token for token in text[1] if token < tensor.shape[1]]
            tensor[:, tokens] = -tensor[:, tokens].roll(tensor.shape[-1] // 2 + 1, -1)

    def _change_image(self, value: Any, where: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        tensors = _tensors(value)
        self.image = self.image or tuple(tensors[0].shape if isinstance(value, (list, tuple)) else tensors[0].shape[1:])
        for tensor in tensors if where is not None else ():
            if self.drawn is not None and tensor.shape[1] == self._positions:
                tensor = tensor[:, self.drawn]
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor)
            place = where(tensor).to(tensor.device)
            tensor.copy_(torch.where(place, 3 * noise, tensor))

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


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return the floating-point tensors in a value, each once."""
    leaves = value.values() if isinstance(value, Mapping) else [value]
    found = [leaf for leaf in tree_leaves(list(leaves)) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return list({(tensor.data_ptr(), tensor.shape): tensor for tensor in found}.values())


class CutAttention(TorchFunctionMode):
    """Records the queries and keys of every product in a module, and cuts all operations that mix places.

    A product belongs to the innermost running module, not counting processors and softmax layers.

    Args:
        module: The denoiser.
        entries: Returns the places of the conditional branch in its batch, or None if they are not known.
    """

    def __init__(self, module: nn.Module, entries: Callable[[], list[int] | None]) -> None:
        super().__init__()
        self._entries = entries
        self.traces: dict[Key, Trace] = {}
        self._paths = {id(part): path for path, part in module.named_modules()}
        self._root = module
        self._eager = EagerAttention()
        self._attention: nn.Module | None = None  # the module whose products are followed now

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name not in WATCHED and name not in _PLACE_BY_PLACE and self._eager.is_empty:
            return func(*args, **kwargs)
        running = [*_running(sys._getframe(1))]
        if self._root not in running:
            self._eager.clear()
            return func(*args, **kwargs)
        if name in _PLACE_BY_PLACE:
            return _PLACE_BY_PLACE[name](func, *args, **kwargs)
        owner = next(m for m in running if not isinstance(m, nn.Softmax) and "Processor" not in type(m).__name__)
        self._forget_others(owner, running)
        probe = _Probe(self, owner, self._paths[id(owner)])
        if name == MULTI_HEAD_ATTENTION:
            with self:
                return without_dispatch(func)(*args, **kwargs)
        if name == SCALED_DOT_PRODUCT:
            return FusedCall.of([probe], args, kwargs).run(func)
        return self._eager.run([probe], name, func, args, kwargs)

    def _forget_others(self, owner: nn.Module, running: list[nn.Module]) -> None:
        """Forget the products of other modules, which would keep alive everything computed from them: a product without
        a softmax, as in linear attention, is never used up."""
        attention = next(filter(is_named_attention, running), None)
        if self._attention not in running or attention not in (None, self._attention):
            self._eager.clear()
            self._attention = owner if attention is None else attention

    def keep(self, path: str, product: AttentionProduct) -> None:
        """Record a product of the module at a path."""
        number = sum(known == path for known, _ in self.traces)
        entries = self._entries()
        entry = entries[0] if entries and entries[-1] < len(product.q) else -1
        q, k = (_projected(tensor[entry]) for tensor in (product.q, product.k))
        self.traces[path, number] = Trace(product.shape, q, k)


def _convolution(
    func: Callable,
    tensor: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Convolve with only the middle of the kernel: a kernel of size 1, which is fast and needs no copy of the weights.

    A convolution that uses each place once is left unchanged."""
    sizes = tuple(weight.shape[2:])
    strides, dilations, paddings = (_of_axes(value, len(sizes)) for value in (stride, dilation, padding))
    if sizes == strides:
        return func(tensor, weight, bias, stride, padding, dilation, groups)
    margins = []  # what is added to each axis, or cut off if negative, so that every output reads its middle
    for axis in reversed(range(len(sizes))):  # the order of `pad`
        length, reach = tensor.shape[tensor.ndim - len(sizes) + axis], dilations[axis] * (sizes[axis] - 1)
        padded = {"same": reach, "valid": 0}[padding] if isinstance(padding, str) else 2 * paddings[axis]
        before = padded // 2 - dilations[axis] * (sizes[axis] // 2)
        outputs = (length + padded - reach - 1) // strides[axis] + 1
        margins += [before, (outputs - 1) * strides[axis] + 1 - length - before]
    middle = weight[(..., *(slice(size // 2, size // 2 + 1) for size in sizes))]
    return func(nn.functional.pad(tensor, margins), middle, bias, stride, 0, 1, groups)


def _of_axes(value: Any, count: int) -> tuple:
    """Return a value for each axis."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * count if len(values) == 1 else values


def _group_norm(
    func: Callable,
    tensor: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Normalize each place alone, instead of all places together."""
    return nn.functional.layer_norm(tensor.movedim(1, -1), tensor.shape[1:2], weight, bias, eps).movedim(-1, 1)


_PLACE_BY_PLACE = {"conv1d": _convolution, "conv2d": _convolution, "conv3d": _convolution, "group_norm": _group_norm}


class _Probe:
    """Stands in for the watched modules of a run, see `watched_modules.Watched`."""

    def __init__(self, mode: CutAttention, owner: nn.Module, path: str) -> None:
        self.calls = SimpleNamespace(target=SimpleNamespace(owner=owner, path=path))
        self._mode, self._path = mode, path

    def has_taps(self, value: str) -> bool:
        return self.wants(value)

    def wants(self, *values: str) -> bool:
        return "attention_product" in values or "heads_output" in values

    def through(self, value: str, current: Any) -> Any:
        if value == "attention_product":
            self._mode.keep(self._path, current)
        return torch.zeros_like(current) if value == "heads_output" else current

    def end_product(self) -> None:
        pass


def _running(frame: FrameType | None) -> Iterator[nn.Module]:
    """Yield the modules whose calls are in progress, innermost first."""
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            yield frame.f_locals["self"]
        frame = frame.f_back


def _projected(tensor: torch.Tensor) -> torch.Tensor:
    """Return a random projection of (heads, tokens, features) to (tokens, 16), on the CPU."""
    flat = tensor.transpose(0, 1).flatten(1).detach().float().cpu()
    matrix = torch.randn(flat.shape[-1], _FEATURES, generator=torch.Generator().manual_seed(0))
    return flat @ matrix
