"""The vectors at a point of a model for many prompts, in shuffled batches, with only a buffer of them in memory.

A vector is a token of a sequence, a patch of an image, or a position of a feature map (batch, channels, height, width).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.lenses.denoising.call_checks import Steps, check_steps, check_steps_ahead, choose_steps
from diffsight.pipelines.diffusion.components import text_encoder_names
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import progress_bar
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.vision_language.model import VisionLanguageModel

Refill = Callable[[int], tuple[torch.Tensor, int]]


def channels_last(value: torch.Tensor) -> torch.Tensor:
    """Return a value with its vectors along the last dimension. In a feature map, they lie along the second."""
    return value.movedim(1, -1) if value.ndim >= 4 else value


def tensor_in(output: Any) -> torch.Tensor:
    """Return a module's output, or the first tensor in it.

    Raises InputError if there is none, as in the list of images that the transformer of Z-Image returns."""
    if isinstance(output, torch.Tensor):
        return output
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    found = next((item for item in items if isinstance(item, torch.Tensor)), None)
    if found is None:
        raise InputError(
            f"a module that this lens reads returns a {type(output).__name__} without a tensor of its own, such as a "
            "list of images: the lens cannot read or change it"
        )
    return found


def value_at(points: Any, of: str) -> torch.Tensor:
    """Return the output at a point of a run, or its difference from the input.

    Raises:
        InputError: Output and input have different shapes.
    """
    if of == "output":
        return tensor_in(points.output)
    given = tensor_in(points.input)
    return difference(tensor_in(points.output), given, points.path)


def difference(output: torch.Tensor, given: torch.Tensor, path: str) -> torch.Tensor:
    """Return what a module adds to its input.

    Raises:
        InputError: Output and input have different shapes.
    """
    if given.shape != output.shape:
        raise InputError(
            f"the difference of output and input cannot be computed at {path}, because their shapes are "
            f'{tuple(output.shape)} and {tuple(given.shape)}. Use an SAE of="output"'
        )
    return output - given


@dataclass(frozen=True)
class PointValues:
    """The values at a point for some prompts.

    Attributes:
        steps: (prompts, ..., width) for each denoising step, or a single value if there are no steps; in a vision
            tower, (images, ..., width) or (patches, width).
        tokens: The ids of the tokens, (prompts, tokens), for a point in a text encoder or a language model.
        mask: Which tokens are not padding, (prompts, tokens). Default: all.
    """

    steps: list[torch.Tensor]
    tokens: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def vectors(self) -> torch.Tensor:
        """Return all vectors except those of padding tokens, (vectors, width), on the device of the model."""
        parts = self.steps if self.mask is None else [self.steps[0][self.mask]]
        return torch.cat([part.flatten(0, -2).float() for part in parts])


@dataclass(frozen=True)
class PointReader:
    """Reads the vectors at a point for prompts.

    Attributes:
        model: The model.
        point: The path of the point, such as "unet.mid_block".
        of: "output", or "difference" of output and input.
        steps: The denoising steps to read, for a point in a denoiser.
        arguments: Further arguments of the model.
    """

    model: DiffusionModel | LanguageModel
    point: str
    of: str = "output"
    steps: Steps = None
    arguments: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            object.__setattr__(self, "steps", check_steps(self.steps))  # an iterator can be read only once

    @property
    def is_in_denoiser(self) -> bool:
        """Whether the point is read at every step, in the conditional branch."""
        component = self.point.split(".")[0].split("[")[0]
        return isinstance(self.model, DiffusionModel) and component not in text_encoder_names(self.model.pipeline)

    def check(self) -> None:
        """Check the point, the steps and the arguments before anything runs.

        Raises:
            InputError: An argument or a step does not exist.
            PointNotFoundError: The point does not exist.
        """
        self.model[self.point]
        if isinstance(self.model, DiffusionModel):
            arguments = dict(self.arguments or {})
            self.model.check("", seed=0, **arguments)
            check_steps_ahead(self.steps if self.is_in_denoiser else None, self.model, arguments)
        elif self.steps is not None:
            raise InputError("steps are the steps of a denoiser: omit them for a language model")

    @property
    def is_in_vision_tower(self) -> bool:
        """Whether the vectors belong to images, in a vision-language model."""
        return isinstance(self.model, VisionLanguageModel) and self.model.is_in_vision(self.point)

    def of_part(self, start: int, size: int, count: int) -> "PointReader":
        """Return a reader for `size` of `count` prompts from `start` on, with the images that belong to them."""
        images = (self.arguments or {}).get("images")
        if not isinstance(images, (list, tuple)) or len(images) != count:
            return self
        return replace(self, arguments={**self.arguments, "images": list(images[start : start + size])})

    @torch.no_grad()
    def read(self, prompts: Sequence[str], seed: int = 0) -> "PointValues":
        """Return the values for some prompts.

        Raises:
            InputError: The point of a language model has no vector for each token.
        """
        arguments = dict(self.arguments or {})
        if not isinstance(self.model, DiffusionModel):
            with self.model.trace(list(prompts), **arguments) as run:
                tokens, mask = run.tokens, run.mask.bool()
                values = channels_last(value_at(run[self.point], self.of))
                run.stop()
            if self.is_in_vision_tower:
                return PointValues([values])
            if values.shape[:-1] != tokens.shape:
                raise InputError(
                    f"{self.point} has no vector for each token: its shape is {tuple(values.shape)} for "
                    f"{tuple(tokens.shape)} tokens. Choose another point"
                )
            return PointValues([values], tokens, mask)
        with progress_bar(self.model.pipeline, disable=True):
            if self.is_in_denoiser:
                return PointValues(self._read_steps(prompts, seed, arguments))
            with self.model.generate(list(prompts), seed=seed, **arguments) as run:
                tokens = tensor_in(run[self.point.split(".")[0]].input)
                values = value_at(run[self.point], self.of)
                run.stop()
            return PointValues([values], tokens)

    def _read_steps(self, prompts: Sequence[str], seed: int, arguments: Mapping[str, Any]) -> list[torch.Tensor]:
        values, chosen = [], None
        with self.model.generate(list(prompts), seed=seed, **{"output_type": "latent", **arguments}) as run:
            for step in run.steps:
                chosen = chosen or choose_steps(self.steps, len(run.scheduler.timesteps))
                if step.index in chosen:
                    values.append(channels_last(value_at(run.cond[self.point], self.of)))
                if step.index == chosen[-1]:
                    run.stop()
        return values

    def stream(self, prompts: Sequence[str], batch_size: int) -> Refill:
        """Return a function that takes a position and returns the vectors of the prompts there, (vectors, width), and
        the next position. It cycles through the prompts, with different noise each time."""

        def refill(position: int) -> tuple[torch.Tensor, int]:
            start = position % len(prompts)
            part = prompts[start : start + batch_size]
            reader = self.of_part(start, len(part), len(prompts))
            vectors = reader.read(part, seed=position).vectors()
            check_finite(vectors, f"the values at {self.point}")
            return vectors, position + len(part)

        return refill


class ShuffledBuffer:
    """Batches of vectors in random order.

    Args:
        refill: Returns the vectors at a position of the data and the next position.
        size: The number of vectors in memory.
        position: Where in the data to begin.
        generator: The generator of the random order.
    """

    def __init__(self, refill: Refill, size: int, position: int, generator: torch.Generator) -> None:
        self.position = position
        self._refill, self._size, self._generator = refill, size, generator
        self._vectors: torch.Tensor | None = None
        self._used = 0

    def batches(self, count: int) -> Iterator[torch.Tensor]:
        """Yield batches of `count` vectors without end. Half of the buffer is used before it is filled up again."""
        while True:
            if self._vectors is None or self._used + count > max(count, len(self._vectors) // 2):
                self._fill(count)
            yield self._vectors[self._used : self._used + count]
            self._used += count

    def _fill(self, least: int) -> None:
        parts = [] if self._vectors is None else [self._vectors[self._used :]]
        total = sum(map(len, parts))
        while total < max(self._size, least):
            vectors, self.position = self._refill(self.position)
            parts.append(vectors)
            total += len(vectors)
        joined = torch.cat(parts)
        order = torch.randperm(len(joined), generator=self._generator)[: max(self._size, least)]
        self._vectors, self._used = joined[order], 0


def check_finite(vectors: torch.Tensor, what: str) -> None:
    """Raise InputError if vectors contain nan or infinity."""
    if not torch.stack(vectors.aminmax()).isfinite().all():
        raise InputError(f"{what} contain nan or infinity, which no SAE can learn from")


def stored(vectors: torch.Tensor, batch_size: int = 65536) -> Refill:
    """Return a function that goes through stored vectors, (vectors, width), as `PointReader.stream` does."""

    def refill(position: int) -> tuple[torch.Tensor, int]:
        start = position % len(vectors)
        part = vectors[start : start + batch_size]
        return part.float(), position + len(part)

    return refill
