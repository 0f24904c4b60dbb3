"""Attention maps: where in the image each word of the prompt is attended to.

    result = attention_maps(model, "a red circle above a blue square", words=["circle", "square"])
    result.maps, result["circle"]           # (words, rows, columns), (rows, columns)
    result.overlay("circle"), result.grid() # over the image
    result.mask("circle", 0.5)              # where it is attended to at least half as much as at its maximum

    attention_from(model, "a red circle above a blue square", position=(0.5, 0.2)).grid()   # where one place looks

A map is the mean of the probabilities with which the positions of the image attend to the tokens of a word, over heads,
layers and denoising steps in the conditional branch of guidance. All layers are resized to one size (Tang et al., "What
the DAAM: Interpreting Stable Diffusion Using Cross Attention", ACL 2023, section 3). In joint attention, the
probabilities are the block of image queries and text keys.

With `method="concept"`, words need not be in the prompt. They go through the text stream of a model with joint
attention as a separate prompt. They attend to themselves and to the prompt's image, but the image does not attend to
them. A map is the product of the attention's outputs at the positions of the image and at the word. With several words,
a softmax over the words turns the products into shares (Helbling et al., "ConceptAttention: Diffusion Transformers
Learn Highly Interpretable Features", ICML 2025, section 4).
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from diffsight.errors import InputError, suggest
from diffsight.lenses.attention.concepts import Concepts
from diffsight.lenses.attention.given_image import GivenImage
from diffsight.lenses.attention.image_looks import looks_at_image
from diffsight.lenses.attention.map_choices import (
    check_map_size,
    check_maps,
    checked_heads,
    chosen_attentions,
    picked_heads,
)
from diffsight.lenses.attention.map_sums import MapSums, WordMeans
from diffsight.lenses.attention.word_keys import WordKeys
from diffsight.lenses.denoising.call_checks import Steps, choose_steps
from diffsight.lenses.denoising.inverted_images import takes_inverted
from diffsight.lenses.layers import Layers, choose_layers
from diffsight.lenses.options import check_kind, check_options
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.outputs import frames_of, image_of, outputs_in
from diffsight.lenses.results.sections import distinct
from diffsight.lenses.results.word_maps import AttentionMaps
from diffsight.lenses.where_models_are import where_the_model_is
from diffsight.pipelines.argument_types import check_types, fits
from diffsight.pipelines.attention.attention_probabilities import AttentionProduct
from diffsight.pipelines.diffusion.attention import (
    Attention,
    Attentions,
    find_attentions,
    follow_products,
    known_attentions,
)
from diffsight.pipelines.diffusion.attention_tracing import denoiser_of
from diffsight.pipelines.diffusion.encoder_calls import EncoderRecord
from diffsight.pipelines.diffusion.encoding import record_tokens
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import DiffusionRun
from diffsight.pipelines.vision_language.model import VisionLanguageModel

_METHODS = ("cross", "concept")


@takes_inverted
@repeatable
@where_the_model_is
def attention_maps(
    model: DiffusionModel | VisionLanguageModel,
    prompt: str,
    words: Sequence[str] | str | None = None,
    *,
    method: str = "cross",
    layers: Layers = None,
    heads: Iterable[int] | None = None,
    steps: Steps = None,
    keep: str | None = None,
    encoder: str | None = None,
    image: Any = None,
    seed: int = 0,
    **arguments: Any,
) -> AttentionMaps:
    """Draw `prompt`, and show where in the image each word is attended to.

        attention_maps(model, "a red circle above a blue square")
        attention_maps(model, "a red circle above a blue square", words=["red circle"], keep="steps")
        attention_maps(flux, "a cat on a mat", words=["animal", "floor"], method="concept")
        attention_maps(model, "a red circle", image=Image.open("scene.png"), steps=12)      # of a given image
        attention_maps(llava, "What is this?", image="cat.png", max_new_tokens=20)  # where each token looks

    Only sums of maps are kept, so memory depends on neither the number of steps nor the number of layers.

    With a vision-language model, text is generated, and the words are its tokens. A token is chosen at the position
    before it, so its map is the attention of that position to the tokens of the image.

    Args:
        model: The pipeline, or a vision-language model.
        prompt: The prompt.
        words: Words or phrases of the prompt. With "concept", any words or phrases. Default: all words of the
            prompt.
        method: "cross": probabilities in cross-attention, or of the image's queries and the text's keys in joint
            attention. "concept": products of outputs, for models with joint attention.
        layers: The attention modules, numbered in the order in which they run: an integer, a slice, or a list of
            them. `model.attentions.of_kind("cross", "joint")` lists them. Default: all.
        heads: Which heads. Default: all.
        steps: Which denoising steps: an integer, a slice, or a list of them. Default: all.
        keep: Also keep separate maps for the "steps", "layers" or "heads".
        encoder: The text encoder whose tokens count. Default: all text encoders.
        image: Look at this image instead of drawing one: a PIL image in mode RGB, or a float tensor (3, height, width)
            from 0 to 1. At every step the denoiser is shown the image with the noise of this step, so `steps` chooses
            how noisy it is. If the pipeline itself takes an image, this is the pipeline's argument.
        seed: The seed of the image, or of the noise that is added to it.
        inverted: The result of `invert` for an image, to apply the lens to that image. Omit the seed and the number
            of steps, see [inversion](../lenses/inversion.md).
        arguments: Arguments of the pipeline, or of `generate`.

    Returns:
        The maps and the image.

    Raises:
        InputError: Before an image is drawn: a word is not in the prompt, a layer or head does not exist, the
            pipeline has no attention between image and text, or it cannot be shown the image.
    """
    if isinstance(model, VisionLanguageModel):
        own = {"words": words, "method": method, "steps": steps, "encoder": encoder}
        return _of_generated_tokens(model, prompt, image, layers, heads, keep, seed, own, arguments)
    check_kind("attention_maps", model, DiffusionModel)
    if image is not None and "image" in model.argument_names:
        arguments, image = {**arguments, "image": image}, None
    check_options(attention_maps, model, arguments)
    check_types(attention_maps, words=words, heads=heads, encoder=encoder)
    steps = check_maps("attention_maps", model, prompt, steps, seed, keep, arguments)
    words = words if words is None or isinstance(words, str) else [*map(str, words)]
    if words is not None and not words:
        raise InputError("words is empty: pass words, or omit the argument for all words of the prompt")
    if method not in _METHODS:
        raise InputError(f"there is no method {method!r}{suggest(str(method), _METHODS)}: choose 'cross' or 'concept'")
    given = None if image is None else GivenImage(model, image, seed, arguments)
    arguments = arguments if given is None else given.arguments
    kinds, what = ("cross", "joint"), "attention between image and text"
    if method == "concept":
        found = find_attentions(model, prompt, **arguments)
        chosen = chosen_attentions(found, kinds, layers, what, model)
        picked = picked_heads(chosen, heads)
        concepts = Concepts(model, prompt, words, encoder, found.of_kind("joint"), arguments)
        check_map_size(model, chosen, len(concepts.names), keep, arguments)
        reading = _Reading(steps, keep, chosen, concepts.names, picked)
        run = _run_concepts(model, concepts, reading, seed, given)
        return _result(run, reading, prompt, seed, model, arguments, method, given)

    def prepare(found: Attentions, records: Mapping[str, EncoderRecord]) -> tuple[_Reading, _Read]:
        chosen = chosen_attentions(found, kinds, layers, what, model)
        picked = picked_heads(chosen, heads)
        named = WordKeys(model, prompt, words, encoder, records)
        check_map_size(model, chosen, len(named.names), keep, arguments)
        wanted = {attention.name: WordMeans(named.keys(attention), attention.keys) for attention in chosen}

        def read(attention: Attention, product: AttentionProduct) -> torch.Tensor:
            return wanted[attention.name].values(product, attention, picked, keep == "heads")

        return _Reading(steps, keep, chosen, named.names, picked), read

    run, reading = _run_prompt(model, prompt, prepare, seed, arguments, given)
    return _result(run, reading, prompt, seed, model, arguments, method, given)


def _of_generated_tokens(
    model: VisionLanguageModel,
    prompt: Any,
    image: Any,
    layers: Layers,
    heads: Iterable[int] | None,
    keep: str | None,
    seed: int,
    others: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> AttentionMaps:
    """Return where the tokens that a vision-language model generates look in its image."""
    check_options(attention_maps, model, arguments, also=model.generation_argument_names)
    check_types(attention_maps, heads=heads)
    defaults = inspect.signature(attention_maps).parameters
    for name, value in others.items():
        if value != defaults[name].default:
            raise InputError(f"omit {name} for a VisionLanguageModel: its words are the tokens that it generates")
    if keep not in (None, "layers", "heads"):
        raise InputError(f"for a VisionLanguageModel, keep must be 'layers', 'heads' or None, not {keep!r}")
    if image is None or isinstance(image, (list, tuple)):
        raise InputError("image: a VisionLanguageModel needs one image")
    numbers = sorted(choose_layers(layers, len(model.layers), with_embedding=False))
    picked = None if heads is None else checked_heads(heads, None)
    model.check(prompt, images=image, seed=seed, **arguments)
    found = looks_at_image(model, prompt, image, numbers, picked, keep, seed, arguments)
    names = [f"layers[{number}]" for number in numbers]
    parts = names if keep == "layers" else [f"head {number}" for number in picked or range(found.maps.shape[1])]
    return AttentionMaps(
        maps=found.maps.mean(1),
        words=tuple(distinct(found.words)),
        image=found.image,
        frames=(),
        prompt=prompt if isinstance(prompt, str) else str(prompt),
        seed=int(seed),
        model=model.label,
        arguments=arguments,
        method="cross",
        layers=tuple(names),
        kept=keep,
        parts=dict(zip(parts, found.maps.movedim(1, 0))) if keep else {},
    )


@takes_inverted
@repeatable
@where_the_model_is
def attention_from(
    model: DiffusionModel,
    prompt: str,
    position: tuple[float, float],
    *,
    layers: Layers = None,
    heads: Iterable[int] | None = None,
    steps: Steps = None,
    keep: str | None = None,
    seed: int = 0,
    **arguments: Any,
) -> AttentionMaps:
    """Draw `prompt`, and show where one place in the image looks: the self-attention of that place.

        attention_from(model, "a red circle above a blue square", position=(0.5, 0.25))

    Args:
        model: The pipeline.
        prompt: The prompt.
        position: The place, (x, y), as shares of the width and the height: (0, 0) is the upper left corner, (1, 1) the
            lower right one.
        layers: Which of `model.attentions.of_kind("self", "joint")`. Default: all.
        heads: Which heads. Default: all.
        steps: Which denoising steps. Default: all.
        keep: Also keep separate maps for the "steps", "layers" or "heads".
        seed: The seed of the image.
        inverted: The result of `invert` for an image, to apply the lens to that image. Omit the seed and the number
            of steps, see [inversion](../lenses/inversion.md).
        arguments: Arguments of the pipeline.

    Returns:
        The map and the image.

    Raises:
        InputError: The position is not in the image, a layer or head does not exist, or the pipeline has no
            self-attention.
    """
    check_kind("attention_from", model, DiffusionModel)
    check_options(attention_from, model, arguments)
    check_types(attention_from, heads=heads)
    steps = check_maps("attention_from", model, prompt, steps, seed, keep, arguments)
    if not fits(position, tuple[float, float]) or not all(0 <= share <= 1 for share in position):
        raise InputError(f"position is (x, y), shares of width and height from 0 to 1, not {position!r}")

    def prepare(found: Attentions, records: Mapping[str, EncoderRecord]) -> tuple[_Reading, _Read]:
        chosen = chosen_attentions(found, ("self", "joint"), layers, "attention from the image to itself", model)
        picked = picked_heads(chosen, heads)
        check_map_size(model, chosen, 1, keep, arguments)

        def read(attention: Attention, product: AttentionProduct) -> torch.Tensor:
            *frames, rows, columns = attention.grid
            place = min(int(position[1] * rows), rows - 1) * columns + min(int(position[0] * columns), columns - 1)
            place += attention.image.start + (frames[0] // 2 * rows * columns if frames else 0)
            keys = slice(attention.image_keys.start, attention.image_keys.stop)
            ((_, probs),) = product.blocks(keys, range(place, place + 1), picked)
            return probs[0]  # (heads, 1, keys)

        return _Reading(steps, keep, chosen, (f"from ({position[0]:g}, {position[1]:g})",), picked), read

    run, reading = _run_prompt(model, prompt, prepare, seed, arguments)
    return _result(run, reading, prompt, seed, model, arguments, "from")


class _Reading:
    """The reading of a run: the steps, modules and heads that are read, the names of the maps, and their sums."""

    def __init__(
        self,
        steps: Steps,
        keep: str | None,
        chosen: Sequence[Attention],
        names: tuple[str, ...],
        heads: Sequence[int] | None,
    ) -> None:
        self.keep, self.chosen, self.names, self.heads, self.sums = keep, chosen, names, heads, MapSums()
        self._asked = steps
        self._steps: tuple[int, ...] = ()

    def is_in(self, run: DiffusionRun, step: int) -> bool:
        """Return whether a step of a run is read. The run must know its number of steps."""
        self._steps = self._steps or choose_steps(self._asked, len(run.scheduler.timesteps))
        return step in self._steps

    def stop_after(self, run: DiffusionRun, step: int) -> None:
        """End a run after the last step that is read."""
        if self.is_in(run, step) and step == self._steps[-1]:
            run.scheduler.step.input  # all calls of the denoiser have been made
            run.stop()

    def add(self, step: int, attention: Attention, values: torch.Tensor) -> None:
        """Add the values read from a product, (heads or 1, words, positions of the image)."""
        if self.keep == "heads":
            for number, part in zip(range(len(values)) if self.heads is None else self.heads, values):
                self.sums.add(f"head {number}", attention, part)
            return
        group = {None: "", "steps": f"step {step}", "layers": attention.name}[self.keep]
        self.sums.add(group, attention, values[0] if len(values) == 1 else values.mean(0))


_Read = Callable[[Attention, AttentionProduct], torch.Tensor]


def _run_prompt(
    model: DiffusionModel,
    prompt: str,
    prepare: Callable[[Attentions, Mapping[str, EncoderRecord]], tuple[_Reading, _Read]],
    seed: int,
    arguments: Mapping[str, Any],
    given: GivenImage | None = None,
    found: Attentions | None = None,
) -> tuple[DiffusionRun, _Reading]:
    """Draw the prompt, and add the values read from every product.

    Once the prompt is encoded, `prepare` is called with the attentions and the tokens. So the prompt is encoded once,
    unless the attentions are not known yet."""
    with torch.no_grad(), model.generate(prompt=prompt, seed=seed, **arguments) as run:
        if given is not None:
            given.follow(run, denoiser_of(model))
        records = record_tokens(run)
        found = known_attentions(run) if found is None else found
        if found is not None:
            run[found.denoiser].inputs
            reading, read = prepare(found, records)

            def add(attention: Attention, step: int, product: AttentionProduct) -> None:
                if reading.is_in(run, step):
                    reading.add(step, attention, read(attention, product))

            follow_products(run, reading.chosen, add)
            for step in run.steps if given is not None else ():
                reading.stop_after(run, step.index)  # the output of the run would be meaningless
            return run, reading
        run.stop()
    found = find_attentions(model, prompt, **arguments)
    return _run_prompt(model, prompt, prepare, seed, arguments, given, found)


def _run_concepts(
    model: DiffusionModel,
    concepts: Concepts,
    reading: _Reading,
    seed: int,
    given: GivenImage | None,
) -> DiffusionRun:
    """Draw the prompt, and add the products of the outputs of image and words."""
    chosen = {attention.name for attention in reading.chosen}
    with torch.no_grad(), model.generate(**concepts.arguments, seed=[seed, seed]) as run:
        if given is not None:
            given.follow(run, denoiser_of(model))
        for step in run.steps:

            def is_read(attention: Attention, index: int = step.index) -> bool:
                return attention.name in chosen and reading.is_in(run, index)

            def add(attention: Attention, values: torch.Tensor, index: int = step.index) -> None:
                values = values if reading.heads is None else values[reading.heads]
                values = values if reading.keep == "heads" else values.sum(0, keepdim=True)
                reading.add(index, attention, values.softmax(1) if len(reading.names) > 1 else values)

            concepts.read(run, is_read, add)
            if given is not None:
                reading.stop_after(run, step.index)
    return run


def _result(
    run: DiffusionRun,
    reading: _Reading,
    prompt: str,
    seed: int,
    model: DiffusionModel,
    arguments: Mapping[str, Any],
    method: str,
    given: GivenImage | None = None,
) -> AttentionMaps:
    sums, keep = reading.sums, reading.keep
    output = outputs_in(run.result, model.pipeline)[0] if given is None else given.image
    lowest = -torch.inf if method == "concept" else 0.0  # enlarging may make probabilities negative
    return AttentionMaps(
        maps=sums.mean().clamp_min(lowest),
        words=reading.names,
        image=image_of(output),
        frames=() if isinstance(output, Image.Image) else tuple(frames_of(output)),
        prompt=prompt,
        seed=int(seed),
        model=model.source,
        arguments=arguments,
        method=method,
        layers=tuple(attention.name for attention in reading.chosen),
        kept=keep,
        parts={group: sums.mean(group).clamp_min(lowest) for group in sums.groups} if keep else {},
    )
