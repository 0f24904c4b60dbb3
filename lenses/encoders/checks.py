"""Checks of lenses on text encoders, made before anything is drawn. Every function raises InputError."""

from collections.abc import Mapping
from typing import Any

from diffsight.errors import InputError
from diffsight.lenses.options import check_kind
from diffsight.pipelines.diffusion.components import text_encoder_names
from diffsight.pipelines.diffusion.encoder_calls import EncoderRecord
from diffsight.pipelines.diffusion.encoding import cut_off
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.text_encoders import Encoder
from diffsight.pipelines.numbers import as_integer

_SEVERAL = ". For several, call it for each, or use diffsight.gallery.sweep"


def check_call(
    lens: str, model: Any, prompt: Any, seed: Any, batch_size: int | None, arguments: Mapping[str, Any]
) -> None:
    """Check the arguments that all of these lenses have."""
    check_diffusion_model(lens, model)
    check_prompt(lens, prompt)
    if as_integer(seed) is None:
        raise InputError(f"{lens} takes one seed for all images, an integer, not {seed!r}{_SEVERAL}")
    if batch_size is not None and (as_integer(batch_size) or 0) < 1:
        raise InputError(f"batch_size must be 1 or more rows, or None for all rows in one call, not {batch_size!r}")
    if arguments.get("output_type", "pil") != "pil":
        raise InputError(f"{lens} needs PIL images: omit output_type")
    for name in ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"):
        if arguments.get(name, 1) != 1:
            raise InputError(f"{lens} draws one image in each row: omit {name}")


def check_pooled(pooled: Any) -> None:
    """Check the argument `pooled` of lenses that draw from layers."""
    if pooled not in ("layer", "full"):
        raise InputError(f'pooled must be "layer" or "full", not {pooled!r}')


def check_diffusion_model(lens: str, model: Any) -> None:
    """Check that `model` is a pipeline with a text encoder."""
    check_kind(lens, model, DiffusionModel)
    if not text_encoder_names(model.pipeline):
        raise InputError(f"{lens} needs a text encoder, but {type(model.pipeline).__name__} has none")


def check_prompt(lens: str, prompt: Any) -> None:
    """Check that `prompt` is one text."""
    if not isinstance(prompt, str):
        raise InputError(f"{lens} takes one prompt, a string, not {type(prompt).__name__}{_SEVERAL}")
    if not prompt.strip():
        raise InputError('the prompt is empty: describe an image, such as "a red circle above a blue square"')


def check_used(model: DiffusionModel, encoder: Encoder) -> None:
    """Check that the pipeline uses the encoder in a way that was found, so that its layers affect the image."""
    if not encoder.uses:
        raise InputError(
            f"{type(model.pipeline).__name__} does not seem to use any output of {encoder.name} unchanged, so the "
            "layers of this encoder cannot be drawn. print(model.encoders) shows what was found"
        )


def check_whole(model: DiffusionModel, reading: EncoderRecord, prompt: str) -> None:
    """Check that the encoder's tokenizer does not truncate the prompt."""
    cut = cut_off(model, reading, prompt)
    if cut is not None:
        raise InputError(
            f"the prompt is too long for {reading.name}, which reads {reading.prompt.ids.shape[1]} tokens: these words "
            f"would be dropped: {cut!r}"
        )
