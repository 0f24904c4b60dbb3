"""Find the tokens of a text and the positions of the image among the queries and keys of a denoiser.

Some of them at a time are changed in the inputs of the denoiser, and the queries and keys that change with them are
recorded, see `attention_tracing.py`.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product, starmap
from typing import Any, NamedTuple

import torch

from diffsight.pipelines.diffusion.attention_tracing import AttentionTracer, TracedChange, difference
from diffsight.pipelines.diffusion.cut_attention import Key, Trace

_CHANGED = 1e-3  # relative to the length of a query or key
_OWN = 0.05  # relative to the largest change of a key
_AGREEMENT = 0.95  # the fraction of queries that must change as their place predicts


# ---- tokens of a text


def text_keys(
    tracer: AttentionTracer, encoder: str, plain: Mapping[Key, Trace], image: Mapping[Key, torch.Tensor]
) -> dict[Key, tuple[int | None, ...]]:
    """Return the key of each token of a text encoder, for each product whose keys include tokens.

    Tokens are numbered from 1, and there is one change for each bit of the numbers. It changes the tokens whose number
    has this bit, so the changes with which a key changes spell the number of its token."""
    count = tracer.tokens[encoder]
    if not count:
        return {}
    bits = range(count.bit_length())
    numbered = [[token for token in range(count) if (token + 1) >> bit & 1] for bit in bits]
    traces = tracer.traces([TracedChange(text=(encoder, tokens)) for tokens in (range(count), *numbered)])
    every = next(traces)
    whole = {key: difference(every[key].keys, plain[key].keys) for key in plain}
    if all((change <= _CHANGED).all() for change in whole.values()):
        return {}
    tokens = {key: torch.zeros(len(change), dtype=torch.long) for key, change in whole.items()}
    for bit, changed in zip(bits, traces):
        for key, change in whole.items():
            part = difference(changed[key].keys, plain[key].keys)
            tokens[key] += (part > change / 2).long() << bit
    found = {}
    for key, change in whole.items():
        own = max(_CHANGED, _OWN * change.max())  # pooling lets other tokens change a key slightly
        places = torch.nonzero(change > own).flatten().tolist()
        places = [place for place in places if place not in image[key]]
        numbers = [int(tokens[key][place]) - 1 for place in places]
        is_unique = len(set(numbers)) == len(numbers)
        if places and is_unique and all(0 <= number < count for number in numbers):
            keys = dict(zip(numbers, places))
            found[key] = tuple(keys.get(token) for token in range(count))
    return found


# ---- positions of the image


class _Stripes(NamedTuple):
    """The odd or the even of `count` stripes of the latents along an axis (0: frames, 1: rows, 2: columns)."""

    axis: int
    count: int
    odd: bool

    def contain(self, size: int) -> torch.Tensor:
        """Return which of `size` places along the axis lie in the stripes, (size,)."""
        shares = (torch.arange(size) + 0.5) / size
        return (shares * self.count).long() % 2 == int(self.odd)


class ImageSearch:
    """Finds the positions of the image among the queries and keys.

    Attributes:
        queries: Which queries of each product change with the image.
        keys: Which keys of each product change with the image.
        references: Which queries of each product change with reference images.
        height: The number of rows of the latents.
    """

    def __init__(self, tracer: AttentionTracer, plain: Mapping[Key, Trace]) -> None:
        self._tracer = tracer
        decoded = tracer.decoded() if len(tracer.image) != 3 else None
        self._sizes, self._axes = _layout(tracer.image, tracer.latents)
        self.height = self._sizes[1]
        possible = starmap(_Stripes, product(range(3), (2, 4), (False, True))) if self._axes else ()
        patterns = [stripes for stripes in possible if self._sizes[stripes.axis] >= stripes.count]
        masks = [
            lambda tensor: torch.ones_like(tensor, dtype=torch.bool),
            *(partial(self._where, stripes=stripes) for stripes in patterns),
        ]
        every, *parts = tracer.traces([TracedChange(image=mask) for mask in masks])
        self.queries = {k: _changed(every[k].queries, plain[k].queries) for k in plain}
        self.keys = {k: set(_changed(every[k].keys, plain[k].keys)) for k in plain}
        seen = tracer.trace(references=True) if tracer.drawn is not None else plain
        self.references = {k: _changed(seen[k].queries, plain[k].queries) for k in plain}
        self._problem = None if self._axes else f"the positions of the image in {tracer.image} were not found"
        self._changes: dict[_Stripes, dict[Key, torch.Tensor]] = {
            stripes: {k: difference(changed[k].queries, plain[k].queries) for k in plain}
            for stripes, changed in zip(patterns, parts)
        }
        if self._axes and len(tracer.image) == 2 and not self._is_decoded_there(decoded):
            self._problem = "the order of the image positions that go into the denoiser was not found"

    def grid(self, key: Key) -> tuple[tuple[int, ...] | None, str | None]:
        """Return the grid of the image positions among the queries of a product, or why there is none."""
        queries = self.queries[key]
        if not queries:
            return None, None
        if self._problem is not None:
            return None, self._problem
        if as_range(queries) is None:
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
        """Return whether the queries of a grid change more with the stripes that they lie in than with the others."""
        for stripes, change in self._changes.items():
            size = grid[stripes.axis]
            straddles = stripes.axis and size % stripes.count and size != self._input_size(stripes.axis)
            if stripes.odd or straddles or size < stripes.count:
                continue
            other = self._changes[_Stripes(stripes.axis, stripes.count, True)]
            queries = self.queries[key]
            more = (change[key][queries] > other[key][queries]).reshape(grid)
            expected = stripes.contain(size).reshape([-1 if axis == stripes.axis else 1 for axis in range(3)])
            if (more == expected).float().mean() < _AGREEMENT:
                return False
        return True

    def _input_size(self, axis: int) -> int:
        """Return the number of places along an axis in what goes into the denoiser."""
        return (self._axes if len(self._tracer.image) == 2 else self._sizes)[axis]

    def _where(self, tensor: torch.Tensor, stripes: _Stripes) -> torch.Tensor:
        """Return a mask of the places where an input tensor of the denoiser holds the given stripes of the latents."""
        place = torch.zeros(tensor.shape, dtype=torch.bool)
        if len(self._tracer.image) == 2:
            inside = stripes.contain(self._input_size(stripes.axis))
            inside = inside.reshape([-1 if axis == stripes.axis else 1 for axis in range(3)]).expand(self._axes)
            place[:, inside.flatten()] = True
            return place
        frame_axis, row_axis = self._axes
        axis = (frame_axis, row_axis, row_axis + 1)[stripes.axis] + tensor.ndim - len(self._tracer.image)
        place.movedim(axis, 0)[stripes.contain(tensor.shape[axis])] = True
        return place

    def _is_decoded_there(self, plain: torch.Tensor | None) -> bool:
        """Return whether the decoded latents change where image positions in the denoiser's input were changed."""
        if plain is None:
            return False
        even = [stripes for stripes in self._changes if not stripes.odd]
        masks = [TracedChange(image=partial(self._where, stripes=stripes)) for stripes in even]
        for stripes, changed in zip(even, self._tracer.all_decoded(masks)):
            change = (changed - plain).abs().sum((0, 1)).reshape(self._sizes).movedim(stripes.axis, 0)
            inside = stripes.contain(self._input_size(stripes.axis))
            inside = inside.repeat_interleave(len(change) // len(inside))
            if change[: len(inside)][inside].sum() < _AGREEMENT * change.sum():
                return False
        return True


def _layout(image: tuple[int, ...], latents: tuple[int, ...]) -> tuple[tuple[int, int, int], Any]:
    """Return the numbers of frames, rows and columns of the latents, and where these are in the input of the denoiser.

    For one image, the second value is the axis of the frames (or None) and the axis of the rows. For a sequence of
    positions, it is the numbers of frames, rows and columns in the sequence. It is None if it was not found."""
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


def as_range(places: Any) -> range | None:
    """Return contiguous places as a range, or None if they are not contiguous or there are none."""
    places = sorted(places)
    return range(places[0], places[-1] + 1) if places and places[-1] - places[0] + 1 == len(places) else None
