"""What lenses on text encoders refuse before any picture is made."""

from collections.abc import Iterable, Mapping
from typing import Any

from diffsight.errors import InputError
from diffsight.pipelines.diffusion.components import text_encoder_names
from diffsight.pipelines.diffusion.encoder_calls import EncoderRecord
from diffsight.pipelines.diffusion.encoding import cut_off
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.text_encoders import Encoder


def check_call(
    lens: str, model: Any, prompt: Any, seed: Any, batch_size: int | None, arguments: Mapping[str, Any]
) -> None:
    """The arguments that are the same for all of them."""
    check_model(lens, model)
    check_prompt(lens, prompt)
    if not hasattr(seed, "__index__") or isinstance(seed, bool):
        raise InputError(f"{lens} takes one seed for all pictures, a whole number, not {seed!r}")
    if batch_size is not None and (not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1):
        raise InputError(f"batch_size is a number of rows from 1 on, or None for all in one call, not {batch_size!r}")
    if arguments.get("output_type", "pil") != "pil":
        raise InputError(f"{lens} makes PIL pictures: leave output_type out")
    for name in ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"):
        if arguments.get(name, 1) != 1:
            raise InputError(f"{lens} makes one picture of each kind: leave {name} out")


def check_model(lens: str, model: Any) -> None:
    """Whether it is a pipeline with text encoders."""
    if not isinstance(model, DiffusionModel):
        raise InputError(f"{lens} takes a DiffusionModel, not {type(model).__name__}")
    if not text_encoder_names(model.pipeline):
        raise InputError(f"{type(model.pipeline).__name__} has no text encoder, so there is nothing to look through")


def check_prompt(lens: str, prompt: Any) -> None:
    """Whether it is one text."""
    if not isinstance(prompt, str):
        raise InputError(f"{lens} takes one prompt, a text, not {type(prompt).__name__}")


def check_seen(model: DiffusionModel, encoder: Encoder) -> None:
    """Whether the layers of the encoder can be seen in a picture."""
    if not encoder.uses:
        raise InputError(
            f"{type(model.pipeline).__name__} takes nothing of {encoder.name} as it is, so its layers cannot be seen. "
            "print(model.encoders) tells what was found"
        )


def check_whole(model: DiffusionModel, reading: EncoderRecord, prompt: str) -> None:
    """Whether the encoder is given all of the prompt."""
    cut = cut_off(model, reading, prompt)
    if cut is not None:
        raise InputError(
            f"the prompt is too long for {reading.name}: {reading.prompt.ids.shape[1]} tokens are read, and these "
            f"words would be dropped: {cut!r}"
        )


def choose_layers(layers: int | slice | Iterable[int] | None, last: int) -> tuple[int, ...]:
    """The numbers of the chosen layers, of those from 0 to `last`."""
    if layers is None:
        layers = slice(None)
    if isinstance(layers, slice):
        if layers.step == 0:
            raise InputError("layers are chosen with a step of 0: take 1 or more")
        if any(bound is not None and bound > last + 1 for bound in (layers.start, layers.stop)):
            raise InputError(f"there are no layers up to {layers.stop}: they are 0 (the embedding) to {last}")
        chosen = range(last + 1)[layers]
    else:
        chosen = list(dict.fromkeys(layers)) if isinstance(layers, Iterable) else [layers]
    for layer in chosen:
        if not hasattr(layer, "__index__") or isinstance(layer, bool) or not 0 <= layer <= last:
            raise InputError(f"there is no layer {layer!r}: they are 0 (the embedding) to {last}")
    if not chosen:
        raise InputError(f"no layers are chosen: take some of 0 (the embedding) to {last}")
    return tuple(int(layer) for layer in chosen)
