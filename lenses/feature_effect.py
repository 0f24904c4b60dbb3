"""Feature effects: change a feature of a sparse autoencoder, and look at what the model draws or writes.

    result = feature_effect(model, sae, "a red circle above a blue square", 417, amounts=[0, 2, 4], seed=0)
    result.grid()

The rows of one call differ only in the amount of the change.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.denoising.call_checks import Steps, check_one_image, choose_steps
from diffsight.lenses.denoising.inverted_images import takes_inverted
from diffsight.lenses.encoders.drawing import for_each_row
from diffsight.lenses.features.activation_stream import PointReader, channels_last, tensor_in, value_at
from diffsight.lenses.features.autoencoder import SAE
from diffsight.lenses.features.sae_checks import check_features, check_model, point_of
from diffsight.lenses.options import check_options
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.image_grid import image_grid
from diffsight.lenses.results.outputs import image_of, outputs_in
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import Cell, ImageSection, Section, TableSection, distinct
from diffsight.pipelines.argument_types import check_types
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import progress_bar
from diffsight.pipelines.language.model import LanguageModel

CHANGES = ("scale", "set", "add")


@dataclass(frozen=True, eq=False)
class FeatureEffect(LensResult):
    """Images or texts by the amount of a change.

    `save(folder)` writes `grid.png` and an image for each amount (`change_00.png`), and `lens.json` with the texts.

    Attributes:
        images: The image without a change, then one for each of `amounts`. None for a language model.
        texts: The texts that follow the prompt, in the same order. None for a pipeline.
        amounts: The amounts.
        change: "scale", "set" or "add".
        features: The features that were changed.
        point: The path of the module.
        prompt: The prompt.
        seed: The seed of every image.
        model: The name of the model.
        arguments: Further arguments of the model.
    """

    images: tuple[Image.Image, ...] | None = field(repr=False)
    texts: tuple[str, ...] | None
    amounts: tuple[float, ...]
    change: str
    features: tuple[int, ...]
    point: str
    prompt: str
    seed: int
    model: str
    arguments: Mapping[str, Any]

    def grid(self) -> Image.Image:
        """Return all images in one, with their amounts.

        Raises:
            InputError: The results are texts.
        """
        if self.images is None:
            raise InputError("the results of a language model are texts, not images: print the result, or read .texts")
        features = ", ".join(map(str, self.features[:8])) + (", …" if len(self.features) > 8 else "")
        heading = f"{self.prompt}\nfeatures {features} of {self.point}"
        return image_grid(self.images, columns=len(self.images), titles=self._titles(), title=heading, cell=128)

    def _titles(self) -> list[str]:
        names = {"scale": "times {:g}", "set": "= {:g}", "add": "+ {:g}"}
        return ["unchanged", *(names[self.change].format(amount) for amount in self.amounts)]

    def preview(self) -> Image.Image | None:
        return None if self.images is None else self.grid()

    def sections(self) -> list[Section]:
        titles = distinct(self._titles())
        if self.images is None:
            return [TableSection("", "change", ["text"], {t: [Cell(one)] for t, one in zip(titles, self.texts)})]
        return [ImageSection("", {"": dict(zip(titles, self.images))})]

    def files(self) -> dict[str, Callable[[Path], None]]:
        if self.images is None:
            return {}
        files: dict[str, Callable[[Path], None]] = {"grid.png": self.grid().save}
        return files | {f"change_{i:02}.png": image.save for i, image in enumerate(self.images)}

    def record(self) -> dict[str, Any]:
        return {
            "lens": "feature_effect",
            "model": self.model,
            "point": self.point,
            "features": list(self.features),
            "change": self.change,
            "amounts": list(self.amounts),
            "prompt": self.prompt,
            "seed": self.seed,
            **({} if self.texts is None else {"texts": list(self.texts)}),
            "arguments": dict(self.arguments),
        }


@takes_inverted
@repeatable
def feature_effect(
    model: DiffusionModel | LanguageModel,
    sae: SAE,
    prompt: str,
    features: int | Sequence[int],
    *,
    amounts: Sequence[float] = (0.0, 2.0, 4.0),
    change: str = "scale",
    steps: Steps = None,
    point: str | None = None,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> FeatureEffect:
    """Draw or continue a prompt with features of an SAE scaled, set, or raised by each of `amounts`.

        feature_effect(model, sae, "a red circle", 417, amounts=[0, 2, 4])                  # removed, doubled, ...
        feature_effect(model, sae, "a red circle", [3, 88], change="add", amounts=[10], steps=slice(0, 5))
        feature_effect(language_model, sae, "The weather is", 31, amounts=[0, 4], max_new_tokens=20)

    In a pipeline, features are changed in the conditional branch. In a language model, they are changed at every token,
    including those of the prompt.

    Args:
        model: The model.
        sae: The SAE.
        prompt: The prompt.
        features: The features to change together.
        amounts: The amounts; each is a row of one call. "scale" with 0 removes the features.
        change: "scale" multiplies the features by the amount, "set" sets them to it at every position, "add" adds it
            at every position.
        steps: The denoising steps in which the features are changed, for a point in the denoiser. Default: all.
        point: The path of the module. Default: the point that the SAE was trained at.
        seed: The seed of every image, or of the texts.
        progress: Whether to show a progress bar.
        inverted: The result of `invert` for an image, to apply the lens to that image. Omit the seed and the number
            of steps, see [inversion](../lenses/inversion.md).
        arguments: Further arguments of `generate`.

    Raises:
        InputError: Before anything runs, if an argument is not valid.
    """
    check_model(feature_effect, model)
    is_text = isinstance(model, LanguageModel)
    if is_text:
        check_options(feature_effect, model, arguments, also=model.generation_argument_names)
        check_types(feature_effect, prompt=prompt, seed=seed)
    else:
        check_one_image(feature_effect, model, prompt, seed, None, arguments)
    point, chosen = point_of(sae, point), check_features(sae, features)
    if change not in CHANGES:
        raise InputError(f"change must be one of {', '.join(CHANGES)}, not {change!r}")
    check_types(feature_effect, amounts=amounts, point=point)
    amounts = tuple(float(amount) for amount in amounts)
    if not amounts:
        raise InputError("amounts is empty: pass numbers, such as amounts=[0, 2]")
    reader = PointReader(model, point, sae.of, steps, arguments)
    reader.check()
    values = _Change(sae, point, chosen, change, torch.tensor(amounts))
    draw = _texts if is_text else _images
    images, texts = draw(reader, values, prompt, len(amounts) + 1, seed, progress)
    name = model.label if is_text else model.source
    return FeatureEffect(images, texts, amounts, change, chosen, point, prompt, int(seed), name, arguments)


def _images(
    reader: PointReader, values: "_Change", prompt: str, rows: int, seed: int, progress: bool
) -> tuple[tuple[Image.Image, ...], None]:
    """Draw the rows."""
    model, arguments = reader.model, reader.arguments
    call = {"prompt": [prompt] * rows, "seed": [seed] * rows, **for_each_row(arguments, rows)}
    model.check(**call)
    with torch.no_grad(), progress_bar(model.pipeline, desc="features", disable=not progress):
        with model.generate(**call) as run:
            if reader.is_in_denoiser:
                steps_chosen = None
                for step in run.steps:
                    steps_chosen = steps_chosen or choose_steps(reader.steps, len(run.scheduler.timesteps))
                    if step.index in steps_chosen:
                        values.make(run.cond)
            else:
                values.make(run.cond)
        return tuple(map(image_of, outputs_in(run.result, model.pipeline))), None


def _texts(
    reader: PointReader, values: "_Change", prompt: str, rows: int, seed: int, progress: bool
) -> tuple[None, tuple[str, ...]]:
    """Write the rows."""
    with torch.no_grad(), reader.model.generate([prompt] * rows, seed=seed, **reader.arguments) as run:
        for _ in tqdm(run.steps, desc="tokens", disable=not progress):
            values.make(run)
    return None, tuple(run.text)


class _Change:
    """A change of features in a batch whose first row stays as it is."""

    def __init__(self, sae: SAE, point: str, features: tuple[int, ...], change: str, amounts: torch.Tensor) -> None:
        self._sae, self._point, self._features = sae, point, list(features)
        self._change, self._amounts = change, amounts

    def make(self, part: Any) -> None:
        """Change the next call in a run, or in its conditional branch."""
        points = part[self._point]
        vectors = channels_last(value_at(points, self._sae.of))
        before = self._sae.encode(vectors)[1:, ..., self._features]
        amounts = self._amounts.to(before).reshape(-1, *(1 for _ in before.shape[1:]))
        if self._change == "scale":
            after = before * amounts
        else:
            after = (before if self._change == "add" else 0) + amounts.expand_as(before)
        added = (after - before) @ self._sae.decoder[self._features]
        value = tensor_in(points.output)
        value[1:] += (added.movedim(-1, 1) if value.ndim >= 4 else added).to(value.dtype)
