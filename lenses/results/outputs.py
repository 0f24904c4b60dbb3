"""What pipelines make, as pictures and as files: pictures themselves, videos, sounds."""

import io
import wave
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffsight.pipelines.diffusion.model import DiffusionModel

_FRAMES_A_SECOND = 8
_WAVE = (192, 96)  # width and height of the picture of a sound


def picture_of(output: Any) -> Image.Image:
    """A picture as it is, the middle frame of a video, the wave of a sound."""
    if isinstance(output, Image.Image):
        return output
    if _is_sound(output):
        return _wave(_samples(output))
    frames = frames_of(output)
    return frames[len(frames) // 2]


def frames_of(output: Any) -> list[Image.Image]:
    """The frames of a video."""
    if isinstance(output, list) and output and isinstance(output[0], Image.Image):
        return output
    return [Image.fromarray((np.asarray(frame) * 255).round().astype(np.uint8)) for frame in output]


def files_of(name: str, output: Any, rate: int | None) -> dict[str, Callable[[Path], None]]:
    """What is written of an output besides its picture: name to a function that writes it."""
    if isinstance(output, Image.Image):
        return {}
    if _is_sound(output):
        return {f"{name}.wav": lambda path: _write_sound(path, _samples(output), rate or 16000)}
    first, *rest = frames_of(output)
    duration = 1000 // _FRAMES_A_SECOND
    return {f"{name}.gif": lambda path: first.save(path, save_all=True, append_images=rest, duration=duration, loop=0)}


def rate_of(model: DiffusionModel) -> int | None:
    """How many samples a second the pipeline's sounds have; None where it makes none."""
    parts = model.pipeline.components.values()
    rates = (getattr(getattr(part, "config", None), "sampling_rate", None) for part in parts)
    return next((rate for rate in rates if isinstance(rate, int)), None)


def _is_sound(output: Any) -> bool:
    return getattr(output, "ndim", 4) < 3


def _samples(output: Any) -> np.ndarray:
    """A sound as (channels, samples)."""
    return np.atleast_2d(np.asarray(output, dtype=np.float32))


def _wave(samples: np.ndarray) -> Image.Image:
    """The wave of a sound, (channels, samples): in each column from its least to its greatest value."""
    width, height = _WAVE
    picture = np.full((height, width), 255, np.uint8)
    mono = samples.mean(0).clip(-1, 1)
    edges = np.linspace(0, len(mono), width + 1).astype(int)
    for column, (start, stop) in enumerate(pairwise(edges)):
        part = mono[start : max(stop, start + 1)]
        top, bottom = ((1 - value) / 2 * (height - 1) for value in (part.max(), part.min()))
        picture[round(float(top)) : round(float(bottom)) + 1, column] = 32
    return Image.fromarray(picture).convert("RGB")


def _write_sound(path: Path, samples: np.ndarray, rate: int) -> None:
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.T.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    path.write_bytes(data.getvalue())
