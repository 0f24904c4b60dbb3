"""The outputs of pipelines, as images and as files. An output is an image, a video or a sound."""

import io
import wave
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.modular_pipelines import PipelineState
from PIL import Image

from diffsight.errors import InputError
from diffsight.lenses.results.sections import Media
from diffsight.pipelines.diffusion.model import DiffusionModel

_NAMES = ("images", "image", "frames", "audios")
_NAMES_IN_STATES = ("images", "videos", "frames", "audios")  # in the final state of a modular pipeline
_FRAMES_PER_SECOND = 8
_WAVE_SIZE = (192, 96)  # width and height of the image of a sound, in pixels


class NoImagesError(InputError):
    """A pipeline returns no images, videos or sounds."""


def outputs_in(result: Any, pipeline: Any) -> Sequence[Any]:
    """Return the images, videos or sounds in the result of a pipeline.

    Raises NoImagesError if there are none."""
    if isinstance(result, PipelineState):
        name = next((name for name in _NAMES_IN_STATES if result.values.get(name) is not None), None)
        if name is None:
            raise NoImagesError("the modular pipeline has made no images to look at")
        return result.values[name]
    name = next(iter(result), None) if isinstance(result, Mapping) else None
    if name is not None and name not in _NAMES:
        raise NoImagesError(f"{type(pipeline).__name__} returns {name}: there is no image to look at")
    return result[0]


def image_of(output: Any) -> Image.Image:
    """Return an image as it is, the middle frame of a video, or the waveform of a sound."""
    if isinstance(output, Image.Image):
        return output
    if _is_sound(output):
        return _waveform(_samples(output))
    frames = frames_of(output)
    return frames[len(frames) // 2]


def frames_of(video: Any) -> list[Image.Image]:
    """Return the frames of a video: a list of images, or an array (frames, height, width, channels) from 0 to 1."""
    if isinstance(video, list) and video and isinstance(video[0], Image.Image):
        return video
    return [Image.fromarray((np.asarray(frame) * 255).round().astype(np.uint8)) for frame in video]


def files_of(name: str, output: Any, rate: int | None) -> dict[str, Callable[[Path], None]]:
    """Return the files of an output besides its image: names to functions that write them to a path.

    Args:
        name: The name of the files, without a suffix.
        output: An image (no further file), a video (a GIF) or a sound (a WAV file).
        rate: The sampling rate of a sound, in Hz. Default: 16000.
    """
    if isinstance(output, Image.Image):
        return {}
    if _is_sound(output):
        return {f"{name}.wav": lambda path: path.write_bytes(_wave_file(_samples(output), rate or 16000))}
    return {f"{name}.gif": lambda path: _write_video(path, output)}


def media_of(image: Image.Image, output: Any, rate: int | None) -> Image.Image | Media:
    """Return an output for a page: an image as it is, a video or a sound with its image and its file.

    Args:
        image: The image of the output.
        output: The output.
        rate: The sampling rate of a sound, in Hz. Default: 16000.
    """
    if isinstance(output, Image.Image):
        return image
    if _is_sound(output):
        return Media(image, "audio/wav", _wave_file(_samples(output), rate or 16000))
    data = io.BytesIO()
    _write_video(data, output)
    return Media(image, "image/gif", data.getvalue())


def rate_of(model: DiffusionModel) -> int | None:
    """Return the sampling rate of the pipeline's sounds in Hz, or None if it makes no sounds."""
    parts = model.pipeline.components.values()
    rates = (getattr(getattr(part, "config", None), "sampling_rate", None) for part in parts)
    return next((rate for rate in rates if isinstance(rate, int)), None)


def _is_sound(output: Any) -> bool:
    return getattr(output, "ndim", 4) < 3


def _samples(sound: Any) -> np.ndarray:
    """Return the samples of a sound, (channels, samples)."""
    return np.atleast_2d(np.asarray(sound, dtype=np.float32))


def _waveform(samples: np.ndarray) -> Image.Image:
    """Draw samples, (channels, samples): each column of pixels spans its lowest to its highest value."""
    width, height = _WAVE_SIZE
    pixels = np.full((height, width), 255, np.uint8)
    mono = samples.mean(0).clip(-1, 1)
    edges = np.linspace(0, len(mono), width + 1).astype(int)
    for column, (start, stop) in enumerate(pairwise(edges)):
        part = mono[start : max(stop, start + 1)]
        top, bottom = ((1 - value) / 2 * (height - 1) for value in (part.max(), part.min()))
        pixels[round(float(top)) : round(float(bottom)) + 1, column] = 32
    return Image.fromarray(pixels).convert("RGB")


def _write_video(file: Path | io.BytesIO, video: Any) -> None:
    first, *rest = frames_of(video)
    duration = 1000 // _FRAMES_PER_SECOND
    first.save(file, "gif", save_all=True, append_images=rest, duration=duration, loop=0)


def _wave_file(samples: np.ndarray, rate: int) -> bytes:
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.T.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return data.getvalue()
