"""How a steered model changes a value: what is added or removed, where, and in which steps."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F

from diffsight.errors import InputError, users_frame
from diffsight.lenses.denoising.call_checks import Steps, check_steps
from diffsight.lenses.layers import Layers
from diffsight.lenses.tokens.batches import batch_of
from diffsight.lenses.visits.named_points import NamedPoint, PointName, named_points
from diffsight.lenses.visits.visited_steps import VisitedSteps
from diffsight.lenses.visits.visiting import Visit, is_in_steps
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.language.text_configs import WRITES, text_config
from diffsight.pipelines.numbers import unpacked
from diffsight.pipelines.steering_arguments import check_finite, check_positions, described

Positions = int | Sequence[int] | torch.Tensor | None

MODES = ("add", "remove")


@dataclass(frozen=True)
class Steering:
    """A change of the values at some points.

    Attributes:
        model: The model.
        points: The points.
        vectors: The vector of each point, (features,), or (steps, features).
        factors: The factor of the vectors, or one factor for each row of the batch, (rows,).
        positions: The positions, or a mask over the image, (rows, columns). None means all.
        mode: "add" or "remove".
        steps: The denoising steps or generated tokens. None means all.
        keep_norm: Whether each vector of a value keeps its length.
        timesteps: The timesteps that vectors of several steps belong to.
    """

    model: Any
    points: tuple[NamedPoint, ...]
    vectors: Mapping[PointName, torch.Tensor]
    factors: float | torch.Tensor
    positions: list[int] | torch.Tensor | None
    mode: str
    steps: list[int | slice] | None
    keep_norm: bool
    timesteps: tuple[float, ...] | None = None

    def change(self, visit: Visit) -> torch.Tensor | None:
        """Return the steered value of a visit, (batch, ..., features), or None if the value does not change."""
        if not self._is_chosen(visit):
            return None
        where = self._where(visit)
        return None if where is None else torch.where(where, self._moved(visit), visit.value)

    def step_check(self) -> Callable[[int], None] | None:
        """Return a function that takes the number of steps of a run of a language model, and warns of chosen steps that
        the run did not have, at the line of the user's code that is being executed now.

        Return None if there is nothing to check: the model is another one, or all steps are chosen."""
        if self.steps is None or not isinstance(self.model, LanguageModel):
            return None
        frame, _ = users_frame()
        return partial(self._warn_of_steps, frame.f_globals, frame.f_code.co_filename, frame.f_lineno)

    def _warn_of_steps(self, names: dict[str, Any], file: str, line: int, count: int) -> None:
        missed = [_written(item) for item in self.steps if not any(is_among(step, [item]) for step in range(count))]
        if missed:
            which = ", ".join(missed if len(missed) < 4 else [*missed[:2], "…", missed[-1]])
            ran = f"{count} steps, 0 to {count - 1}" if count > 1 else "1 step, 0"
            message = f"nothing was steered in step{'s' * (len(missed) > 1)} {which}: the run had {ran}"
            registry = names.setdefault("__warningregistry__", {})  # so that a line warns once by default
            warnings.warn_explicit(message, RuntimeWarning, file, line, registry=registry)

    def _moved(self, visit: Visit) -> torch.Tensor:
        value, vector = visit.value, self._vector(visit)
        factors = self.factors
        if isinstance(factors, torch.Tensor):
            factors = factors.to(value).repeat_interleave(len(value) // len(factors), 0)
            factors = factors.reshape(-1, *[1] * (value.ndim - 1))
        if self.mode == "add":
            moved = value + (factors * vector.to(value.device)).to(value)
        else:
            unit = F.normalize(vector.float(), dim=0).to(value)
            moved = value - factors * (value @ unit)[..., None] * unit
        if self.keep_norm:
            norms = [torch.linalg.vector_norm(one.float(), dim=-1, keepdim=True) for one in (value, moved)]
            moved = (moved * (norms[0] / norms[1].clamp(min=torch.finfo(torch.float32).tiny))).to(value)
        return moved

    def _vector(self, visit: Visit) -> torch.Tensor:
        vector = self.vectors[visit.point.name]
        if vector.ndim == 2:
            if visit.step.index >= len(vector) or visit.step.timestep != self.timesteps[visit.step.index]:
                raise InputError(
                    f"the vectors were computed for {len(vector)} steps at the timesteps {_shown(self.timesteps)}, but "
                    f"step {visit.step.index} of this run is at {visit.step.timestep:g}: use the same number of steps "
                    "and the same scheduler for both"
                )
            vector = vector[visit.step.index]
        if len(vector) != visit.value.shape[-1]:
            raise InputError(
                f"the vector has {len(vector)} features, but {visit.point.name} has {visit.value.shape[-1]}"
            )
        return vector

    @cached_property
    def _visited(self) -> VisitedSteps:
        return VisitedSteps(self.steps)

    def _is_chosen(self, visit: Visit) -> bool:
        if visit.step is not None and self.steps is not None and isinstance(self.model, LanguageModel):
            return is_among(visit.step.index, self.steps)
        return self._visited.include(visit)

    # ---- positions

    def _where(self, visit: Visit) -> torch.Tensor | None:
        """Return a mask of the vectors that are steered, broadcastable to the value, or None if there are none."""
        if self.positions is None:
            return torch.ones((), dtype=torch.bool, device=visit.value.device)
        if isinstance(self.model, LanguageModel):
            is_prompt = visit.step.index == 0 and visit.call == 0
            return self._where_in_prompts(visit) if is_prompt else None
        if isinstance(self.positions, torch.Tensor):
            return region(self.model, visit, self.positions)
        return where_in_sequence(visit, self.positions)

    def _where_in_prompts(self, visit: Visit) -> torch.Tensor:
        batch = batch_of(self.model, visit.run, self.positions)
        rows, value = len(batch.tokens), visit.value
        if value.ndim != 3 or len(value) % rows or value.shape[1] != batch.tokens.shape[1]:
            raise InputError(
                f"{visit.point.path} has the shape {tuple(value.shape)}, without one value for each of "
                f"{tuple(batch.tokens.shape)} tokens: omit positions"
            )
        where = torch.zeros(batch.tokens.shape, dtype=torch.bool)
        where[batch.indices] = True
        return where.repeat_interleave(len(value) // rows, 0)[..., None].to(value.device)


def find_steering(
    model: Any,
    layers: Layers,
    vector: Any,
    factors: float | torch.Tensor,
    positions: Positions,
    mode: str,
    steps: Steps,
    keep_norm: bool,
) -> Steering:
    """Return the steering that the arguments of `steer` describe.

    Raises:
        InputError: One of them is not valid.
        PointNotFoundError: A path does not exist.
    """
    if not hasattr(type(model), "edit"):
        raise InputError(f"steer takes a DiffusionModel, LanguageModel or Model, not {type(model).__name__}")
    if mode not in MODES:
        raise InputError(f"mode must be one of {', '.join(map(repr, MODES))}, not {mode!r}")
    if not isinstance(unpacked(keep_norm), bool):
        raise InputError(f"keep_norm is True or False, not {keep_norm!r}")
    vectors, timesteps = vector if isinstance(vector, Mapping) else None, getattr(vector, "timesteps", None)
    points = named_points(model, list(vectors) if layers is None and vectors is not None else layers)
    if vectors is None:
        vectors = {point.name: check_vector(vector) for point in points}
    else:
        vectors = {point.name: vectors[point.name] for point in points}
    _check_width(model, points, vectors)
    chosen, places = _checked_steps(model, points, steps), _checked_positions(model, positions)
    if isinstance(model, LanguageModel) and places is not None and chosen is not None and not is_among(0, chosen):
        raise InputError(
            "positions are those of the prompt, which is step 0, but steps leave that out: omit positions to steer the "
            "tokens of the chosen steps"
        )
    return Steering(model, points, vectors, factors, places, mode, chosen, keep_norm, timesteps)


def check_vector(vector: Any) -> torch.Tensor:
    """Return a vector, (features,). Raise InputError for anything else."""
    if not isinstance(vector, torch.Tensor) or vector.ndim != 1 or not vector.is_floating_point():
        raise InputError(
            f"the vector must be a float tensor (features,) or a result of steering_vector, not {described(vector)}"
        )
    check_finite(vector)
    return vector


def _check_width(model: Any, points: Sequence[NamedPoint], vectors: Mapping[PointName, torch.Tensor]) -> None:
    """Check the vectors of numbered layers. The width of other modules is known when they are called."""
    if not isinstance(model, LanguageModel):
        return
    width = getattr(text_config(model.config, WRITES), "hidden_size", None)
    for point in points:
        found = vectors[point.name].shape[-1]
        if not isinstance(point.name, str) and width not in (None, found):
            raise InputError(f"the vector has {found} features, but hidden states have {width}")


def _checked_steps(model: Any, points: Sequence[NamedPoint], steps: Steps) -> list[int | slice] | None:
    if steps is None:
        return None
    items = check_steps(steps)
    bounds = [bound for item in items for bound in _bounds(item)]
    if isinstance(model, LanguageModel) and any(bound is not None and bound < 0 for bound in bounds):
        raise InputError(
            "steps cannot be negative here: step 0 is the prompt, and it is not known in advance how many tokens follow"
        )
    for point in points:
        if not is_in_steps(model, point):
            raise InputError(f"{point.name} does not run in steps: omit steps")
    return items


def _bounds(item: int | slice) -> tuple[int | None, ...]:
    return (item.start, item.stop) if isinstance(item, slice) else (item,)


def _written(item: int | slice) -> str:
    """Return a step or a slice of steps as it is written in brackets: 5:9."""
    if not isinstance(item, slice):
        return str(item)
    bounds = [item.start, item.stop] if item.step is None else [item.start, item.stop, item.step]
    return ":".join("" if bound is None else str(bound) for bound in bounds)


def _checked_positions(model: Any, positions: Positions) -> list[int] | torch.Tensor | None:
    if positions is None:
        return None
    if isinstance(positions, torch.Tensor) and positions.ndim == 2:
        if not isinstance(model, DiffusionModel):
            raise InputError("a mask over an image is for pipelines: pass the positions of tokens")
        if positions.dtype != torch.bool:
            raise InputError(f"a mask over the image must be of torch.bool, not {positions.dtype}")
        return positions
    return check_positions(positions, ", or a mask (rows, columns) of torch.bool")


def is_among(index: int, steps: Sequence[int | slice]) -> bool:
    """Return whether a generated token is chosen, while the number of tokens is unknown."""
    return any(
        index in range(item.start or 0, index + 1 if item.stop is None else item.stop, item.step or 1)
        if isinstance(item, slice)
        else item == index
        for item in steps
    )


def region(model: Any, visit: Visit, mask: torch.Tensor) -> torch.Tensor:
    """Return a mask over the image as a mask over the positions of a value, (positions, 1) or (rows, columns, 1).

    Raises:
        InputError: It is not known where the positions of the value are in the image.
    """
    value = visit.value
    if value.ndim == 4:
        return _resized(mask, value.shape[1:3]).to(value.device)[..., None]
    attention = model.attentions.get(visit.point.path) if visit.point.path in model.attentions else None
    if attention is None or attention.grid is None or value.ndim != 3:
        raise InputError(
            f"it is not known where in the image the positions of {visit.point.name} are: a mask works at feature maps "
            "and attention modules. Pass positions as integers"
        )
    image, count = attention.image, value.shape[1]
    start = image.start if count == attention.queries else 0  # text and image may be two tensors of the output
    if count not in (attention.queries, len(image)) or len(attention.grid) != 2:
        raise InputError(
            f"{visit.point.name} has {count} positions, but {len(image)} were found for images of the default size"
        )
    where = torch.zeros(count, dtype=torch.bool)
    where[start : start + len(image)] = _resized(mask, attention.grid).flatten()
    return where[:, None].to(value.device)


def _resized(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return a mask in another size: a cell is included if the mask covers more than half of it."""
    resized = F.interpolate(mask[None, None].float(), size=tuple(size), mode="area")[0, 0] > 0.5
    if not resized.any():
        raise InputError(f"the mask is empty at a grid of {size[0]} by {size[1]} positions: choose a larger region")
    return resized


def where_in_sequence(visit: Visit, places: Sequence[int]) -> torch.Tensor:
    """Return which positions of a value are chosen, (positions, 1), or (rows, columns, 1) in a feature map."""
    shape = visit.value.shape[1:-1]
    count = shape.numel()
    for place in places:
        if not -count <= place < count:
            raise InputError(
                f"there is no position {place} at {visit.point.name}, which has {count} (0 to {count - 1})"
            )
    where = torch.zeros(count, dtype=torch.bool)
    where[places] = True
    return where.reshape(*shape, 1).to(visit.value.device)


def _shown(timesteps: Sequence[float]) -> str:
    some = [f"{time:g}" for time in timesteps]
    return ", ".join(some if len(some) < 6 else [*some[:3], "…", some[-1]])
