"""What a feature of a sparse autoencoder does: change it, and look at what the model makes of it.

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

from diffsight.errors import InputError
from diffsight.lenses.denoising.call_checks import Steps, check_one_image, choose_steps
from diffsight.lenses.denoising.inverted_images import takes_inverted
from diffsight.lenses.encoders.drawing import for_each_row
from diffsight.lenses.features.activation_stream import PointReader, channels_last, tensor_in, value_at
from diffsight.lenses.features.autoencoder import SAE
from diffsight.lenses.features.sae_checks import check_features, point_of
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.image_grid import image_grid
from diffsight.lenses.results.outputs import image_of
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import ImageSection, Section, distinct
from diffsight.pipelines.argument_types import check_types
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import DiffusionRun, progress_bar

CHANGES = ("scale", "set", "add")


@dataclass(frozen=True)
class FeatureEffect(LensResult):
    """Images by the amount of a change.

    `save(folder)` writes `grid.png`, an image for each amount (`change_00.png`), and `lens.json`.

    Attributes:
        images: One for each of `amounts`, and before them the one without a change.
        amounts: The amounts.
        change: "scale", "set" or "add".
        features: The features that were changed.
        point: Where.
        prompt: The prompt.
        seed: The seed of every image.
        model: The name of the model.
        arguments: The arguments of the pipeline.
    """

    images: tuple[Image.Image, ...] = field(repr=False)
    amounts: tuple[float, ...]
    change: str
    features: tuple[int, ...]
    point: str
    prompt: str
    seed: int
    model: str
    arguments: Mapping[str, Any]

    def grid(self) -> Image.Image:
        """Return all images in one, with their amounts."""
        features = ", ".join(map(str, self.features[:8])) + (", …" if len(self.features) > 8 else "")
        heading = f"{self.prompt}\nfeatures {features} of {self.point}"
        return image_grid(self.images, columns=len(self.images), titles=self._titles(), title=heading, cell=128)

    def _titles(self) -> list[str]:
        names = {"scale": "times {:g}", "set": "= {:g}", "add": "+ {:g}"}
        return ["unchanged", *(names[self.change].format(amount) for amount in self.amounts)]

    def preview(self) -> Image.Image:
        return self.grid()

    def sections(self) -> list[Section]:
        return [ImageSection("", {"": dict(zip(distinct(self._titles()), self.images))})]

    def files(self) -> dict[str, Callable[[Path], None]]:
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
            "arguments": dict(self.arguments),
        }


@takes_inverted
@repeatable
def feature_effect(
    model: DiffusionModel,
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
    """Draw a prompt with features of an SAE scaled, set, or raised by each of `amounts`, in the conditional branch.

        feature_effect(model, sae, "a red circle", 417, amounts=[0, 2, 4])                  # removed, doubled, ...
        feature_effect(model, sae, "a red circle", [3, 88], change="add", amounts=[10], steps=slice(0, 5))

    Args:
        model: The pipeline.
        sae: The SAE.
        prompt: The prompt.
        features: The features to change together.
        amounts: The amounts; each is a row of one call. "scale" with 0 removes the features.
        change: "scale" multiplies the features by the amount, "set" sets them to it at every position, "add" adds it
            at every position.
        steps: The denoising steps in which the features are changed, for a point in the denoiser. Default: all.
        point: The path of the module. Default: the point that the SAE was trained at.
        seed: The seed of every image.
        progress: Whether to show a progress bar.
        inverted: An image that `invert` found the noise of, to work on this image. Omit the seed and the number of
            steps, see [inversion](../lenses/inversion.md).
        arguments: Arguments of the pipeline.

    Raises:
        InputError: Before anything runs, if an argument is not valid.
    """
    check_one_image(feature_effect, model, prompt, seed, None, arguments)
    point, chosen = point_of(sae, point), check_features(sae, features)
    if change not in CHANGES:
        raise InputError(f"change must be one of {', '.join(CHANGES)}, not {change!r}")
    check_types(feature_effect, amounts=amounts, point=point)
    amounts = tuple(float(amount) for amount in amounts)
    if not amounts:
        raise InputError("there are no amounts: pass amounts=[0, 2] or others")
    reader = PointReader(model, point, sae.of, steps, arguments)
    reader.check()
    rows = len(amounts) + 1
    call = {"prompt": [prompt] * rows, "seed": [seed] * rows, **for_each_row(arguments, rows)}
    model.check(**call)
    values = _Change(sae, point, chosen, change, torch.tensor(amounts))
    with torch.no_grad(), progress_bar(model.pipeline, desc="features", disable=not progress):
        with model.generate(**call) as run:
            if reader.is_in_denoiser:
                steps_chosen = None
                for step in run.steps:
                    steps_chosen = steps_chosen or choose_steps(steps, len(run.scheduler.timesteps))
                    if step.index in steps_chosen:
                        values.make(run)
            else:
                values.make(run)
        images = tuple(map(image_of, run.result[0]))
    return FeatureEffect(images, amounts, change, chosen, point, prompt, int(seed), model.source, arguments)


class _Change:
    """A change of features in a batch whose first row stays as it is."""

    def __init__(self, sae: SAE, point: str, features: tuple[int, ...], change: str, amounts: torch.Tensor) -> None:
        self._sae, self._point, self._features = sae, point, list(features)
        self._change, self._amounts = change, amounts

    def make(self, run: DiffusionRun) -> None:
        """Change the next call of the conditional branch."""
        points = run.cond[self._point]
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
