"""A sweep over strengths of steering: a grid of images, or a table of texts.

    steering_sweep(pipeline, "a red circle", vector=vectors, factors=[0, 5, 10, 20]).grid()
    print(steering_sweep(model, ["I think that", "The weather is"], 15, direction, factors=[-4, 0, 4]))

The strengths of a prompt are rows of one call.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.denoising.call_checks import Steps, check_one_image
from diffsight.lenses.denoising.inverted_images import takes_inverted
from diffsight.lenses.encoders.drawing import for_each_row
from diffsight.lenses.layers import Layers
from diffsight.lenses.options import check_options
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.image_grid import image_grid
from diffsight.lenses.results.outputs import image_of, outputs_in
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import Cell, ImageSection, Section, TableSection
from diffsight.lenses.steering_vector import SteeringVectors
from diffsight.lenses.visits.named_points import PointName
from diffsight.lenses.visits.steered import Positions, find_steering
from diffsight.lenses.visits.visiting import visiting
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import progress_bar
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.numbers import as_number, unpacked

_CELL = 128  # pixels of an image in a grid
_LONGEST = 60  # characters of a prompt in the title of a row


@dataclass(frozen=True, eq=False)
class SteeringSweep(LensResult):
    """Images or texts by prompt and factor.

    `save(folder)` writes an image for each cell and `grid.png`, and `lens.json` with the texts.

    Attributes:
        model: The name of the model.
        prompts: The rows.
        factors: The columns.
        layers: Where the model was steered.
        mode: "add" or "remove".
        images: `images[i][j]` is prompt i with factor j. None for a language model.
        texts: `texts[i][j]` is what follows prompt i with factor j. None for a pipeline.
        seed: The seed.
        arguments: Further arguments of the model.
    """

    model: str
    prompts: tuple[str, ...]
    factors: tuple[float, ...]
    layers: tuple[PointName, ...]
    mode: str
    images: tuple[tuple[Image.Image, ...], ...] | None = field(repr=False)
    texts: tuple[tuple[str, ...], ...] | None
    seed: int
    arguments: Mapping[str, Any]

    def grid(self) -> Image.Image:
        """Return all images in one: a row for each prompt, a column for each factor.

        Raises:
            InputError: The results are texts.
        """
        if self.images is None:
            raise InputError("the results of a language model are texts, not images: print the result, or read .texts")
        rows = [text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…" for text in self.prompts]
        title = f"{self.mode} (seed {self.seed})"
        return image_grid(self.images, row_titles=rows, column_titles=self._titles(), title=title, cell=_CELL)

    def preview(self) -> Image.Image | None:
        return None if self.images is None else self.grid()

    def sections(self) -> list[Section]:
        if self.images is not None:
            rows = {text: dict(zip(self._titles(), images)) for text, images in zip(self.prompts, self.images)}
            return [ImageSection("", rows)]
        rows = {text: [Cell(one) for one in texts] for text, texts in zip(self.prompts, self.texts)}
        return [TableSection("", "prompt", self._titles(), rows)]

    def files(self) -> dict[str, Callable[[Path], None]]:
        if self.images is None:
            return {}
        files: dict[str, Callable[[Path], None]] = {"grid.png": self.grid().save}
        places = [(i, j) for i in range(len(self.prompts)) for j in range(len(self.factors))]
        return files | {f"image_{i:02}_{j:02}.png": self.images[i][j].save for i, j in places}

    def record(self) -> dict[str, Any]:
        record = {"lens": "steering_sweep", "model": self.model, "prompts": list(self.prompts)}
        record |= {"factors": list(self.factors), "layers": list(self.layers), "mode": self.mode, "seed": self.seed}
        if self.texts is not None:
            record["texts"] = [list(row) for row in self.texts]
        return record | {"arguments": dict(self.arguments)}

    def _titles(self) -> list[str]:
        return [f"{factor:g}" for factor in self.factors]


@takes_inverted
@repeatable
def steering_sweep(
    model: DiffusionModel | LanguageModel,
    prompts: str | Sequence[str],
    layers: Layers = None,
    vector: torch.Tensor | SteeringVectors | None = None,
    *,
    factors: Sequence[float],
    positions: Positions = None,
    mode: str = "add",
    steps: Steps = None,
    branch: str | None = None,
    keep_norm: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> SteeringSweep:
    """Draw or continue each prompt with each strength of steering.

        steering_sweep(pipeline, "a red circle", "unet.mid_block", direction, factors=[0, 10, 20])
        steering_sweep(model, "I think that", 15, direction, factors=[-4, 0, 4], max_new_tokens=20)

    Args:
        model: The model.
        prompts: A prompt, or several.
        layers: As in `steer`.
        vector: As in `steer`.
        factors: The strengths, as `factor` in `steer`. 0 leaves the model as it is.
        positions: As in `steer`.
        mode: As in `steer`.
        steps: As in `steer`.
        branch: As in `steer`.
        keep_norm: As in `steer`.
        batch_size: The number of rows in a call. Default: all strengths of a prompt.
        seed: The seed of every image, or of every text.
        progress: Whether to show a progress bar.
        inverted: The result of `invert` for an image, to apply the lens to that image. Omit the seed and the number
            of steps, see [inversion](../lenses/inversion.md).
        arguments: Further arguments of `generate`.

    Returns:
        The images or texts.

    Raises:
        InputError: As in `steer`, or there are no factors.
    """
    texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError("prompts must be a prompt, or a list of prompts")
    given = unpacked(factors)
    wanted = tuple(map(as_number, given)) if isinstance(given, Sequence) and not isinstance(given, str) else ()
    if not wanted or None in wanted or not all(map(math.isfinite, wanted)):
        raise InputError(f"factors must be finite numbers, such as [0, 5, 10], not {factors!r}")
    run = _checked(model, texts, batch_size, seed, arguments)
    size = batch_size or len(wanted)
    found: list[list[Any]] = []
    steering = find_steering(model, layers, vector, torch.tensor(wanted), positions, mode, steps, keep_norm)
    with tqdm(desc="strengths", total=len(texts) * len(wanted), disable=not progress) as bar:
        for text in texts:
            found.append([])
            for start in range(0, len(wanted), size):
                some = torch.tensor(wanted[start : start + size], dtype=torch.float)
                part = replace(steering, factors=some)
                steered = visiting(model, part.points, part.change, branch, part.step_check(), required=True)
                found[-1] += run(steered, text, len(some), seed, arguments)
                bar.update(len(some))
    rows = tuple(map(tuple, found))
    is_text = isinstance(model, LanguageModel)
    return SteeringSweep(
        model=model.label if is_text else model.source,
        prompts=texts,
        factors=tuple(map(float, wanted)),
        layers=tuple(point.name for point in steering.points),
        mode=mode,
        images=None if is_text else rows,
        texts=rows if is_text else None,
        seed=int(seed),
        arguments=arguments,
    )


def _checked(
    model: Any, prompts: Sequence[str], batch_size: int | None, seed: int, arguments: Mapping[str, Any]
) -> Callable[..., list[Any]]:
    """Check the arguments, and return the function that draws or writes."""
    if isinstance(model, LanguageModel):
        check_options(steering_sweep, model, arguments, also=model.generation_argument_names)
        if arguments.get("num_return_sequences", 1) != 1:
            raise InputError("steering_sweep writes one text for each strength: omit num_return_sequences")
        return _texts
    for prompt in prompts:
        check_one_image(steering_sweep, model, prompt, seed, batch_size, arguments)
        model.check(prompt=prompt, seed=seed, **arguments)
    return _images


def _images(
    model: DiffusionModel, prompt: str, rows: int, seed: int, arguments: Mapping[str, Any]
) -> list[Image.Image]:
    with torch.no_grad(), progress_bar(model.pipeline, disable=True):
        given = {"prompt": [prompt] * rows, "seed": [seed] * rows}
        result = model.generate(**given, **for_each_row(arguments, rows)).result
        return list(map(image_of, outputs_in(result, model.pipeline)))


def _texts(model: LanguageModel, prompt: str, rows: int, seed: int, arguments: Mapping[str, Any]) -> list[str]:
    with torch.no_grad():
        text = model.generate([prompt] * rows, seed=seed, **arguments).text
    return [text] if rows == 1 else text
