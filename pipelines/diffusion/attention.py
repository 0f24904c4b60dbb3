"""The attention modules of a pipeline's denoiser: what attends to what.

    print(model.attentions)                     # everything that was found
    attention = model.attentions["unet.mid_block.attentions[0].transformer_blocks[0].attn2"]
    attention.kind, attention.heads             # "cross", 8
    attention.grid                              # (8, 8): rows and columns of the image positions among its queries
    attention.text["text_encoder"]              # the key of each token of this text encoder

Nothing is looked up by the name of a pipeline. Tokens and positions are changed one after another in what goes into the
denoiser, and found again among the queries and keys, see `attention_tracing.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import product, starmap
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import nn

from diffsight.errors import InputError, UnknownKeyError, suggest
from diffsight.extending import Model, Run, flow_of, join, model_of, owner_of
from diffsight.pipelines.attention import attentions_in
from diffsight.pipelines.attention_mode import count_heads
from diffsight.pipelines.attention_product import AttentionProduct
from diffsight.pipelines.diffusion.attention_tracing import AttentionTracer, Key, Trace, difference
from diffsight.pipelines.diffusion.batch_layouts import COND
from diffsight.pipelines.diffusion.encoding import PLAIN_PROMPT, required_arguments
from diffsight.pipelines.diffusion.run import progress_bar

_PLACES = (
    (0.15, 0.65),
    (0.8, 0.3),
    (0.35, 0.9),
    (0.6, 0.15),
)  # where the image is changed, as shares of height and width
_CHANGED = 1e-3  # relative to the length of a query or key
_AGREEMENT = 0.95  # the share of the queries that have to change as their place says


@dataclass(frozen=True)
class Attention:
    """A product that an attention module of the denoiser makes.

    Attributes:
        name: The path of the module; with `.products[i]` if it makes several products in one call.
        kind: "self" (the image attends to itself), "cross" (the image attends to other things), "joint" (text and image
            in one product), "text" (none of its queries is a position of the image), "none" (it makes no product).
        heads: The number of heads.
        queries: The number of queries in the call that was looked at.
        keys: The number of keys.
        image: Which queries are positions of the image; None if they are none, or in no order that was found.
        image_keys: Which keys are positions of the image.
        grid: The rows and columns of the image positions, with the frames before them for a video.
        scale: How many rows of the latents one row of the grid covers.
        text: For each text encoder whose tokens are among the keys, the key of each token; None if it has none.
        unplaced: What was not found, and why.
    """

    name: str
    kind: str
    heads: int
    queries: int
    keys: int
    image: range | None
    image_keys: range | None
    grid: tuple[int, ...] | None
    scale: float | None
    text: Mapping[str, tuple[int | None, ...]] = field(repr=False)
    unplaced: str | None = None

    @property
    def path(self) -> str:
        """The path of the module."""
        return self.name.partition(".products[")[0]

    def __str__(self) -> str:
        parts = [f"{self.kind}, {self.heads} heads"]
        if self.grid is not None:
            parts.append("image " + " x ".join(map(str, self.grid)))
        parts += [f"{encoder}: {_shown(keys)}" for encoder, keys in self.text.items()]
        parts += [self.unplaced] if self.unplaced else []
        return f"{self.name}: " + "; ".join(parts)


class Attentions(Mapping[str, Attention]):
    """The attention products of a denoiser, by name, in the order in which they are made. `print` it to see them."""

    def __init__(self, pipeline: str, denoiser: str, attentions: Sequence[Attention]) -> None:
        self.denoiser = denoiser
        self._pipeline = pipeline
        self._attentions = {attention.name: attention for attention in attentions}

    def of_kind(self, *kinds: str) -> list[Attention]:
        """Return those of some kinds: "self", "cross", "joint", "text", "none"."""
        return [attention for attention in self.values() if attention.kind in kinds]

    def __getitem__(self, name: str) -> Attention:
        if name not in self._attentions:
            raise UnknownKeyError(f"{self._pipeline} has no attention {name!r}{suggest(str(name), self._attentions)}")
        return self._attentions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._attentions)

    def __len__(self) -> int:
        return len(self._attentions)

    def __repr__(self) -> str:
        return "\n".join([f"{self._pipeline}: {self.denoiser}", *(f"  {attention}" for attention in self.values())])


def find_attentions(model: Model, prompt: str | None = None, **arguments: Any) -> Attentions:
    """Return the attention products of the denoiser of a `DiffusionModel`.

    The pipeline runs up to its denoiser some twenty times, and once or twice for a few steps. What was found for a
    pipeline is kept: later calls with inputs of the same length and size run up to the denoiser once.

    Args:
        model: The model.
        prompt: The prompt of the calls. None stands for a plain prompt, if the pipeline takes one.
        arguments: Other arguments of these calls, such as a small `height` and `width`.

    Raises:
        InputError: The pipeline cannot be called with these arguments.
    """
    if prompt is not None or "prompt" in model.argument_names:
        arguments["prompt"] = PLAIN_PROMPT if prompt is None else prompt
    with progress_bar(model.pipeline, disable=True):
        return _found(model, arguments)


_known: WeakKeyDictionary = WeakKeyDictionary()  # for each pipeline: what was found, by the shapes that were seen


def _found(model: Model, arguments: Mapping[str, Any]) -> Attentions:
    tracer, plain = _started(model, arguments)
    module = owner_of(model[tracer.denoiser])
    shapes = tuple((key, trace.shape[1:]) for key, trace in plain.items())
    seen = (tracer.denoiser, id(module), shapes, tuple(tracer.tokens.items()))
    known = _known.setdefault(model.pipeline, {})
    if seen not in known:
        known[seen] = _searched(model, tracer, plain)
    return known[seen]


def _searched(model: Model, tracer: AttentionTracer, plain: Mapping[Key, Trace]) -> Attentions:
    image = _ImageSearch(tracer, plain)
    text = {name: _text_keys(tracer, name, plain, image.keys) for name in tracer.tokens}
    several = {path for path, number in plain if number}
    found = [_attention(tracer.denoiser, key, plain[key], image, text, key[0] in several) for key in plain]
    paths = {path for path, _ in plain}
    others = attentions_in(owner_of(model[tracer.denoiser])).items()
    found += [_without_product(tracer.denoiser, path, module) for path, module in others if path not in paths]
    return Attentions(type(model.pipeline).__name__, tracer.denoiser, found)


def follow_products(
    run: Run, attentions: Sequence[Attention], function: Callable[[Attention, int, AttentionProduct], None]
) -> None:
    """Call `function` with the conditional branch of every product that the model makes from now on.

    It gets the attention, the number of the denoising step, and the product."""
    flow = flow_of(run)

    def follow(attention: Attention, value: AttentionProduct) -> None:
        denoiser = owner_of(model_of(run)[attention.name.partition(".")[0]])
        entries = flow.observer.entries(denoiser, COND)
        if entries is None or (entries and entries[-1] >= len(value.q)):
            raise InputError(f"{attention.name}: it is not known which part of the batch is the conditional branch")
        if entries:
            function(attention, flow.clock.index, value.part(entries))

    for attention in attentions:
        run.follow(f"{attention.name}.attention_product", partial(follow, attention))


def _started(model: Model, arguments: Mapping[str, Any]) -> tuple[AttentionTracer, dict[Key, Trace]]:
    """Return a tracer, and the products of a plain call."""
    required = required_arguments(model.pipeline)
    images = {name: value for name, value in required.items() if isinstance(value, Image.Image)}
    for stand_ins in (required.keys() - images.keys(), required.keys()):  # an image only if it is needed
        try:
            tracer = AttentionTracer(model, {name: required[name] for name in stand_ins} | arguments)
            return tracer, tracer.trace()
        except Exception as error:
            first = error
    name = type(model.pipeline).__name__
    raise InputError(
        f"{name} cannot be called with its defaults alone ({first}). Pass what it needs, as in "
        'find_attentions(model, "a red circle", height=64)'
    ) from first


def _attention(
    denoiser: str, key: Key, trace: Trace, image: "_ImageSearch", text: Mapping[str, Mapping], is_one_of: bool
) -> Attention:
    queries, keys = image.queries[key], image.keys[key]
    found = {encoder: of[key] for encoder, of in text.items() if key in of}
    name = reduce(join, key[0].split("."), denoiser) + (f".products[{key[1]}]" if is_one_of else "")
    grid, reason = image.grid(key)
    kind = "text" if not len(queries) else "self" if len(keys) and not found else "joint" if len(keys) else "cross"
    if kind == "cross" and not found:
        reason = "; ".join(filter(None, (reason, "its keys are neither text nor the image")))
    heads, rows, columns = trace.shape[1:]
    is_placed = grid is not None
    return Attention(
        name,
        kind,
        heads,
        rows,
        columns,
        _range(queries) if is_placed else None,
        _range(keys),
        grid,
        image.height / grid[-2] if is_placed else None,
        found,
        reason,
    )


def _without_product(denoiser: str, path: str, module: nn.Module) -> Attention:
    reason = f"{type(module).__name__} makes no product with a softmax in this call, such as linear attention"
    name, heads = reduce(join, path.split("."), denoiser), count_heads(module) or 0
    return Attention(name, "none", heads, 0, 0, None, None, None, None, {}, reason)


# ---- tokens of a text


def _text_keys(
    tracer: AttentionTracer, encoder: str, plain: Mapping[Key, Trace], image: Mapping[Key, torch.Tensor]
) -> dict[Key, tuple[int | None, ...]]:
    """Return the key of each token of a text encoder, for each product that has any.

    Each bit of a token's number, counted from 1, says in which of several runs it is changed. So the runs in which a
    key changes spell its token."""
    count = tracer.tokens[encoder]
    if not count:
        return {}
    every = tracer.trace(text=(encoder, range(count)))
    whole = {key: difference(every[key].keys, plain[key].keys) for key in plain}
    if all((change <= _CHANGED).all() for change in whole.values()):
        return {}
    tokens = {key: torch.zeros(len(change), dtype=torch.long) for key, change in whole.items()}
    for bit in range(count.bit_length()):
        changed = tracer.trace(text=(encoder, [t for t in range(count) if (t + 1) >> bit & 1]))
        for key, change in whole.items():
            part = difference(changed[key].keys, plain[key].keys)
            tokens[key] += (part > change / 2).long() << bit
    found = {}
    for key, change in whole.items():
        places = torch.nonzero(change > _CHANGED).flatten().tolist()
        places = [place for place in places if place not in image[key]]
        numbers = [int(tokens[key][place]) - 1 for place in places]
        is_unique = len(set(numbers)) == len(numbers)
        if places and is_unique and all(0 <= number < count for number in numbers):
            keys = dict(zip(numbers, places))
            found[key] = tuple(keys.get(token) for token in range(count))
    return found


# ---- positions of the image


class _Stripes(NamedTuple):
    """Stripes of the latents: the odd or even ones of `count` along an axis (0: frames, 1: rows, 2: columns)."""

    axis: int
    count: int
    odd: bool

    def contain(self, size: int) -> torch.Tensor:
        """Return which of `size` places along the axis lie in the stripes, (size,)."""
        shares = (torch.arange(size) + 0.5) / size
        return (shares * self.count).long() % 2 == int(self.odd)


class _ImageSearch:
    """Finds the positions of the image among the queries and keys.

    Attributes:
        queries: Which queries of each product change with the image.
        keys: Which keys do.
        height: The number of rows of the latents.
    """

    def __init__(self, tracer: AttentionTracer, plain: Mapping[Key, Trace]) -> None:
        self._tracer = tracer
        decoded = tracer.decoded() if len(tracer.image) != 3 else None
        self._sizes, self._axes = _layout(tracer.image, tracer.latents)
        self.height = self._sizes[1]
        every = tracer.trace(image=lambda tensor: torch.ones_like(tensor, dtype=torch.bool))
        self.queries = {k: _changed(every[k].queries, plain[k].queries) for k in plain}
        self.keys = {k: set(_changed(every[k].keys, plain[k].keys)) for k in plain}
        self._problem = None if self._axes else f"the positions of the image in {tracer.image} were not found"
        self._changes: dict[_Stripes, dict[Key, torch.Tensor]] = {}
        for stripes in starmap(_Stripes, product(range(3), (2, 4), (False, True))) if self._axes else ():
            if self._sizes[stripes.axis] >= stripes.count:
                changed = tracer.trace(image=lambda tensor, stripes=stripes: self._where(tensor, stripes))
                self._changes[stripes] = {k: difference(changed[k].queries, plain[k].queries) for k in plain}
        if self._axes and len(tracer.image) == 2 and not self._is_decoded_there(decoded):
            self._problem = "the order of the image positions that go into the denoiser was not found"

    def grid(self, key: Key) -> tuple[tuple[int, ...] | None, str | None]:
        """Return the grid of the image positions among the queries of a product, or why there is none."""
        queries = self.queries[key]
        if not queries:
            return None, None
        if self._problem is not None:
            return None, self._problem
        if _range(queries) is None:
            return None, "the image positions among its queries are not next to each other"
        for grid in self._possible(len(queries)):
            if self._fits(key, grid):
                return grid if grid[0] > 1 else grid[1:], None
        return None, "the order of the image positions among its queries was not found"

    def _possible(self, count: int) -> Iterator[tuple[int, int, int]]:
        frames, height, width = self._sizes
        for rows in range(height, 0, -1):
            columns = rows * width / height
            fits = columns == int(columns) and count % (rows * int(columns)) == 0
            if fits and count // (rows * int(columns)) <= frames:
                yield count // (rows * int(columns)), rows, int(columns)

    def _fits(self, key: Key, grid: tuple[int, int, int]) -> bool:
        """Whether the queries of a grid change more with the stripes that they lie in than with the others."""
        for stripes, change in self._changes.items():
            size = grid[stripes.axis]
            if stripes.odd or (size % stripes.count and stripes.axis) or size < stripes.count:
                continue
            other = self._changes[_Stripes(stripes.axis, stripes.count, True)]
            queries = self.queries[key]
            more = (change[key][queries] > other[key][queries]).reshape(grid)
            expected = stripes.contain(size).reshape([-1 if axis == stripes.axis else 1 for axis in range(3)])
            if (more == expected).float().mean() < _AGREEMENT:
                return False
        return True

    def _where(self, tensor: torch.Tensor, stripes: _Stripes) -> torch.Tensor:
        """Return where a tensor that goes into the denoiser holds stripes of the latents."""
        place = torch.zeros(tensor.shape, dtype=torch.bool)
        if len(self._tracer.image) == 2:
            inside = stripes.contain(self._axes[stripes.axis])
            inside = inside.reshape([-1 if axis == stripes.axis else 1 for axis in range(3)]).expand(self._axes)
            place[:, inside.flatten()] = True
            return place
        frame_axis, row_axis = self._axes
        axis = (frame_axis, row_axis, row_axis + 1)[stripes.axis] + tensor.ndim - len(self._tracer.image)
        place.movedim(axis, 0)[stripes.contain(tensor.shape[axis])] = True
        return place

    def _is_decoded_there(self, plain: torch.Tensor | None) -> bool:
        """Whether what is decoded changes where the image positions that go into the denoiser were changed."""
        if plain is None:
            return False
        for stripes in [stripes for stripes in self._changes if not stripes.odd]:
            changed = self._tracer.decoded(lambda tensor, stripes=stripes: self._where(tensor, stripes))
            change = (changed - plain).abs().sum((0, 1)).reshape(self._sizes).movedim(stripes.axis, 0)
            if change[stripes.contain(self._sizes[stripes.axis])].sum() < _AGREEMENT * change.sum():
                return False
        return True


def _layout(image: tuple[int, ...], latents: tuple[int, ...]) -> tuple[tuple[int, int, int], Any]:
    """Return the frames, rows and columns of the latents, and where they are in what goes into the denoiser.

    That is the axis of the frames (or None) and that of the rows, for one image. For a sequence of positions it is the
    numbers of frames, rows and columns in it. None if it was not found."""
    if len(image) == 3:
        return (1, image[1], image[2]), (None, 1)
    if len(latents) not in (3, 4):
        return (1, 1, 1), None
    frames, (height, width) = (latents[1] if len(latents) == 4 else 1), latents[-2:]
    if len(image) == 2:
        for size, depth in product(range(1, 9), range(1, frames + 1)):
            if height % size == width % size == frames % depth == 0:
                grid = (frames // depth, height // size, width // size)
                if grid[0] * grid[1] * grid[2] == image[0]:
                    return (frames, height, width), grid
        return (frames, height, width), None
    rows = next((i for i in (2, 1) if image[i : i + 2] == (height, width)), None)
    if len(image) != 4 or rows is None:
        return (frames, height, width), None
    axes = [axis for axis in range(4) if axis not in (rows, rows + 1) and image[axis] == frames]
    axis = next((axis for axis in (1, 0, 3) if axis in axes), None)
    return (frames, height, width), None if axis is None else (axis, rows)


def _changed(a: torch.Tensor, b: torch.Tensor) -> list[int]:
    return torch.nonzero(difference(a, b) > _CHANGED).flatten().tolist()


def _range(places: Any) -> range | None:
    """Return places that are next to each other as a range; None if they are not, or if there are none."""
    places = sorted(places)
    return range(places[0], places[-1] + 1) if places and places[-1] - places[0] + 1 == len(places) else None


def _shown(keys: Sequence[int | None]) -> str:
    """Return the keys of tokens in words."""
    known = [(token, key) for token, key in enumerate(keys) if key is not None]
    (first, start), (last, stop) = known[0], known[-1]
    if last - first == stop - start == len(known) - 1:
        return f"tokens {first} to {last} at keys {start} to {stop}"
    return f"{len(known)} tokens from {first} to {last} at keys between {start} and {stop}"
