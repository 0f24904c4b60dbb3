"""Metrics of pipelines that draw images.

    latent_distance()                               # root mean square distance of the last latents from the clean run's
    pixel_distance()                                # the same of the pixels, from 0 to 1
    shapes_verdict("red circle")                    # 1 if the shapes reader sees one, else 0
    shapes_verdict("circle above square")
    clip_score(clip, processor, "a red circle")     # cosine of CLIP's embeddings of image and text

A function of the result of one row works as well: `lambda result: np.asarray(result.images[0]).mean()`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffsight.errors import InputError, suggest
from diffsight.lenses.metrics.metric import IMAGES, LATENTS, Metric, Outcome
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.shapes.reader import read_scene
from diffsight.pipelines.shapes.scenes import BACKGROUNDS, COLORS, RELATIONS, SHAPES, Scene, Thing


class ImageMetric(Metric):
    """A metric on what a pipeline draws."""

    def bound(self, model: Any, pairs: int) -> "ImageMetric":
        if not isinstance(model, DiffusionModel):
            raise InputError(f"{self.name} compares images, but a {type(model).__name__} does not draw images")
        return self


@dataclass(frozen=True)
class LatentDistance(ImageMetric):
    """The root mean square distance of the last latents from those of the clean run."""

    name: str = "latent distance"
    reads: tuple[str, ...] = (LATENTS,)

    def values(self, outcome: Outcome, clean: Outcome, pair: int) -> torch.Tensor:
        return (outcome.latents - clean.latents).float().flatten(1).square().mean(1).sqrt()


@dataclass(frozen=True)
class PixelDistance(ImageMetric):
    """The root mean square distance of the pixels, from 0 to 1, from those of the clean run's image."""

    name: str = "pixel distance"
    reads: tuple[str, ...] = (IMAGES,)

    def values(self, outcome: Outcome, clean: Outcome, pair: int) -> torch.Tensor:
        wanted = _pixels(clean.images[0])
        return torch.stack([(_pixels(image) - wanted).square().mean().sqrt() for image in outcome.images])


@dataclass(frozen=True)
class ShapesVerdict(ImageMetric):
    """Whether the reader of the shapes pipelines sees things of some colour and shape, in a relation.

    Attributes:
        text: What should be seen.
        things: The colour and the shape of each thing; None stands for any.
        relation: The relation of the first thing to the second, if any.
        background: The colour of the background; None stands for any.
    """

    text: str
    things: tuple[tuple[str | None, str | None], ...] = ()
    relation: str | None = None
    background: str | None = None
    reads: tuple[str, ...] = (IMAGES,)

    @property
    def name(self) -> str:
        return self.text

    def values(self, outcome: Outcome, clean: Outcome, pair: int) -> torch.Tensor:
        return torch.tensor([float(self.is_seen(read_scene(image))) for image in outcome.images])

    def is_seen(self, scene: Scene | None) -> bool:
        """Return whether a scene shows what should be seen."""
        if scene is None or self.background not in (None, scene.background):
            return False
        if self.relation is None:
            return all(any(map(_fits(thing), scene.things)) for thing in self.things)
        told = (scene.told_from(0), scene.told_from(1)) if len(scene.things) == 2 else ()
        return any(
            one.relation == self.relation and all(_fits(want)(has) for want, has in zip(self.things, one.things))
            for one in told
        )


@dataclass(frozen=True)
class ClipScore(ImageMetric):
    """The cosine of CLIP's embeddings of the image and of a text."""

    text: str
    model: Any = field(repr=False)
    processor: Any = field(repr=False)
    name: str = "CLIP score"
    reads: tuple[str, ...] = (IMAGES,)

    @torch.no_grad()
    def values(self, outcome: Outcome, clean: Outcome, pair: int) -> torch.Tensor:
        inputs = self.processor(text=[self.text], images=list(outcome.images), return_tensors="pt", padding=True)
        scored = self.model(**inputs.to(self.model.device))
        return torch.nn.functional.cosine_similarity(scored.image_embeds, scored.text_embeds).float().cpu()


def latent_distance() -> LatentDistance:
    """Return the metric: the root mean square distance of a row's last latents from those of the clean run.

    These are the latents that the last `scheduler.step` returned, without what a callback changes afterwards."""
    return LatentDistance()


def pixel_distance() -> PixelDistance:
    """Return the metric: the root mean square distance of a row's pixels, from 0 to 1, from the clean run's image."""
    return PixelDistance()


def shapes_verdict(text: str) -> ShapesVerdict:
    """Return the metric: 1 if the reader of the shapes pipelines sees in the image what the text says, else 0.

        shapes_verdict("red")                       # something red
        shapes_verdict("red circle")
        shapes_verdict("circle above square")       # a relation, whatever the colours
        shapes_verdict("gray background")

    Raises:
        InputError: The text contains a word that the reader does not know, or describes nothing.
    """
    if not isinstance(text, str):
        raise InputError(f"shapes_verdict takes a text such as 'red circle', not {text!r}")
    head, background = _without_background(text)
    relation = next((one for one in RELATIONS if f" {one} " in f" {head} "), None)
    parts = f" {head} ".split(f" {relation} ") if relation else [head]
    things = tuple(thing for part in parts if (thing := _thing(part, text)) != (None, None))
    if len(things) != len(parts) and (relation or background is None):
        raise InputError(f"{text!r} names no colour or shape" + (f" on one side of {relation!r}" if relation else ""))
    return ShapesVerdict(text, things, relation, background)


def clip_score(model: Any, processor: Any, text: str) -> ClipScore:
    """Return the metric: the cosine of the embeddings of image and text by a CLIP model from transformers.

        clip_score(CLIPModel.from_pretrained(name), CLIPProcessor.from_pretrained(name), "a red circle")

    Args:
        model: A `CLIPModel`, or a model that returns `image_embeds` and `text_embeds` as it does.
        processor: Its processor.
        text: The text.
    """
    if not hasattr(model, "get_image_features") or not callable(processor):
        raise InputError(
            f"clip_score takes a CLIPModel and its processor, not {type(model).__name__} and {type(processor).__name__}"
        )
    if not isinstance(text, str):
        raise InputError(f"clip_score takes one text, not {text!r}")
    return ClipScore(text, model, processor)


def _without_background(text: str) -> tuple[str, str | None]:
    """Return a text without its background, and the background if it names one."""
    words = text.split()
    if words[-1:] != ["background"] or len(words) < 2:
        return text, None
    if words[-2] not in BACKGROUNDS:
        raise InputError(f"the reader knows the backgrounds {', '.join(BACKGROUNDS)}, not {words[-2]!r}")
    rest = words[:-2]
    while rest and rest[-1] in ("a", "on"):
        rest.pop()
    return " ".join(rest), words[-2]


def _thing(part: str, text: str) -> tuple[str | None, str | None]:
    """Return the colour and the shape that some words name."""
    color, shape = None, None
    for word in part.split():
        if word in COLORS:
            color = word
        elif word in SHAPES:
            shape = word
        elif word not in ("a", "an", "the"):
            known = [*COLORS, *SHAPES, *RELATIONS, *BACKGROUNDS]
            raise InputError(f"{text!r}: the reader does not know {word!r}{suggest(word, known)}: {', '.join(known)}")
    return color, shape


def _fits(wanted: tuple[str | None, str | None]) -> Callable[[Thing], bool]:
    color, shape = wanted
    return lambda thing: color in (None, thing.color) and shape in (None, thing.shape)


def _pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)
