"""Prompt-to-Prompt: change words of a prompt and keep the rest of the image.

    result = prompt_to_prompt(model, "a red circle above a blue square", "a red circle above a green square", seed=1)
    result.grid()                           # both images

    prompt_to_prompt(model, prompt, prompt, reweight={"red": 3})            # more of a word
    prompt_to_prompt(model, source, target, local="square")                 # change only where the word is attended to

Both prompts are rows of one call, drawn from the same noise. In the first steps, the second image attends to its words
as the first image does: a replaced word is attended to where the old word was, and an added word keeps its own
attention. Self-attention is shared for fewer steps, which keeps shapes and layout (Hertz et al.,
"Prompt-to-Prompt Image Editing with Cross Attention Control", ICLR 2023). In joint attention, the two are the
attention of image queries to text keys and to image keys, and rows of probabilities are rescaled to sum to 1.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from diffsight.errors import InputError
from diffsight.lenses.attention.map_memory import check_memory
from diffsight.lenses.attention.prompt_alignment import TokenMapping, map_tokens
from diffsight.lenses.attention.word_keys import WordKeys
from diffsight.lenses.denoising.inverted_images import takes_inverted
from diffsight.lenses.encoders.checks import check_call, check_diffusion_model, check_prompt
from diffsight.lenses.encoders.drawing import for_each_row
from diffsight.lenses.options import check_options
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.image_grid import image_grid
from diffsight.lenses.results.outputs import image_of, outputs_in
from diffsight.lenses.results.overlays import scaled
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import ImageSection, Section, distinct
from diffsight.lenses.where_models_are import where_the_model_is
from diffsight.pipelines.argument_types import check_types
from diffsight.pipelines.diffusion.attention import Attention, find_attentions
from diffsight.pipelines.diffusion.encoder_calls import EncoderRecord
from diffsight.pipelines.diffusion.encoding import encodings_in, record_encoding
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.numbers import as_integer, as_number

_LARGEST_SELF = 32 * 32  # image positions: in larger maps self-attention is left alone (the paper's choice)
_MASK = 0.3  # as a share of the largest value of a map


@dataclass(frozen=True, eq=False)
class PromptToPromptResult(LensResult):
    """The image of a prompt, and its edit.

    `save(folder)` writes `source.png`, `target.png`, `grid.png` and `lens.json`.

    Attributes:
        source_image: The image of the source prompt, as the bare pipeline draws it.
        target_image: The edited image.
        source: The source prompt.
        target: The target prompt.
        seed: The seed of both images.
        model: The name of the model.
        options: The options of the edit.
        arguments: The arguments of the pipeline.
    """

    source_image: Image.Image = field(repr=False)
    target_image: Image.Image = field(repr=False)
    source: str
    target: str
    seed: int
    model: str
    options: Mapping[str, Any]
    arguments: Mapping[str, Any]

    def grid(self) -> Image.Image:
        """Return both images in one, with their prompts."""
        return image_grid([self.source_image, self.target_image], titles=[self.source, self.target], columns=2)

    def preview(self) -> Image.Image:
        return self.grid()

    def sections(self) -> list[Section]:
        names = distinct([self.source, self.target])
        return [ImageSection("", {"": dict(zip(names, (self.source_image, self.target_image)))})]

    def files(self) -> dict[str, Callable[[Path], None]]:
        images = {"source.png": self.source_image, "target.png": self.target_image, "grid.png": self.grid()}
        return {name: image.save for name, image in images.items()}

    def record(self) -> dict[str, Any]:
        return {
            "lens": "prompt_to_prompt",
            "model": self.model,
            "source": self.source,
            "target": self.target,
            "seed": self.seed,
            **self.options,
            "arguments": dict(self.arguments),
        }


@takes_inverted
@repeatable
@where_the_model_is
def prompt_to_prompt(
    model: DiffusionModel,
    source: str,
    target: str,
    *,
    cross_steps: float = 0.8,
    self_steps: float = 0.4,
    reweight: Mapping[str, float] | None = None,
    local: str | Sequence[str] | None = None,
    seed: int = 0,
    **arguments: Any,
) -> PromptToPromptResult:
    """Draw `source`, and `target` with the attention of `source`.

        prompt_to_prompt(model, "a red circle above a blue square", "a red circle above a green square", seed=1)
        prompt_to_prompt(model, "a cat on a mat", "a cat on a mat in the snow", self_steps=0.6)

    Args:
        model: The pipeline.
        source: The prompt of the first image.
        target: The prompt of the second image.
        cross_steps: The share of the steps in which attention to words is taken from the first image, from 0 to 1.
        self_steps: The share of the steps in which self-attention is taken from the first image.
        reweight: Factors of words of `target`: attention to them is multiplied in all steps.
        local: Change the image only where one of these words of `source` or `target` is attended to.
        seed: The seed of both images.
        inverted: The result of `invert` for an image, to apply the lens to that image. Omit the seed and the number
            of steps, see [inversion](../lenses/inversion.md).
        arguments: Arguments of the pipeline.

    Returns:
        Both images.

    Raises:
        InputError: Before anything is drawn: a word is not in the prompt, a share is not between 0 and 1, or the
            pipeline has no attention between image and text.
    """
    check_diffusion_model("prompt_to_prompt", model)
    check_options(prompt_to_prompt, model, arguments)
    check_call("prompt_to_prompt", model, source, seed, None, arguments)
    check_prompt("prompt_to_prompt", target)
    check_types(prompt_to_prompt, reweight=reweight, local=local)
    for name, share in (("cross_steps", cross_steps), ("self_steps", self_steps)):
        number = as_number(share)
        if number is None or not 0 <= number <= 1:
            raise InputError(f"{name} is a share of the steps, from 0 to 1, not {share!r}")
    model.check(prompt=[source, target], seed=[seed, seed], **arguments)
    edit = _Edit(model, source, target, reweight or {}, [local] if isinstance(local, str) else local or [], arguments)
    edit.check_size(model, bool(self_steps))
    total = _steps(model, arguments)
    given = {**for_each_row(arguments, 2), "prompt": [source, target], "seed": [seed, seed]}
    with torch.no_grad(), model.generate(**given) as run:
        for step in run.steps:
            edit.apply(run, step.index < cross_steps * total, step.index < self_steps * total)
            if local and step.index >= total // 5:
                edit.keep_outside(run)
    images = outputs_in(run.result, model.pipeline)
    options = {"cross_steps": cross_steps, "self_steps": self_steps, "reweight": dict(reweight or {}), "local": local}
    return PromptToPromptResult(*map(image_of, images), source, target, int(seed), model.source, options, arguments)


class _Edit:
    """The changes to the attention of the second row.

    Args:
        model: The model.
        source: The prompt of the first row.
        target: The prompt of the second row.
        reweight: Factors of words of the target.
        local: Words of either prompt.
        arguments: The arguments of the pipeline.
    """

    def __init__(
        self,
        model: DiffusionModel,
        source: str,
        target: str,
        reweight: Mapping[str, float],
        local: Sequence[str],
        arguments: Mapping[str, Any],
    ) -> None:
        found = find_attentions(model, source, **arguments)
        other = find_attentions(model, target, **arguments)
        shapes = [[(one.name, one.queries, one.keys, one.text) for one in each.values()] for each in (found, other)]
        if shapes[0] != shapes[1]:
            raise InputError(
                "the prompts have different numbers of tokens in this pipeline, so they cannot share a batch"
            )
        self._attentions = [one for one in found.of_kind("self", "cross", "joint") if one.grid is not None]
        if not any(one.text for one in self._attentions):
            raise InputError(f"no attention between image and text was found in {type(model.pipeline).__name__}")
        records = {prompt: record_encoding(model, prompt, arguments) for prompt in (source, target)}
        before, after = (encodings_in(model, prompt, records[prompt]) for prompt in (source, target))
        self._tokens = {name: map_tokens(before[name].ids.tolist(), after[name].ids.tolist()) for name in before}
        encoders = {prompt: record.encoders for prompt, record in records.items()}
        self._reweight = [
            (WordKeys(model, target, word, None, encoders[target]), factor) for word, factor in reweight.items()
        ]
        self._local = [self._of_words(model, prompt, local, encoders[prompt]) for prompt in (source, target) if local]
        if local and not any(self._local):
            raise InputError(f"neither prompt contains any of the words in local: {', '.join(map(repr, local))}")
        self._sums: list[torch.Tensor] = []

    @staticmethod
    def _of_words(
        model: DiffusionModel, prompt: str, words: Sequence[str], records: Mapping[str, EncoderRecord]
    ) -> list[WordKeys]:
        found = []
        for word in words:
            try:
                found.append(WordKeys(model, prompt, word, None, records))
            except InputError:  # the word is in the other prompt
                continue
        return found

    def check_size(self, model: DiffusionModel, is_self: bool) -> None:
        """Raise InputError if memory cannot hold the attention of a module for both prompts: the scores, the
        probabilities, and the changed probabilities, in float32."""
        changed = [one for one in self._attentions if one.text or self._changes_self(one, is_self)]
        largest = max(changed, key=lambda one: one.heads * one.queries * one.keys)
        size = 3 * 4 * 2 * largest.heads * largest.queries * largest.keys
        what = f"the attention probabilities of {largest.name} ({largest.queries:,} x {largest.keys:,})"
        check_memory(what, size, model.device, "draw smaller images")

    @staticmethod
    def _changes_self(attention: Attention, is_self: bool) -> bool:
        return is_self and attention.image_keys is not None and len(attention.image) <= _LARGEST_SELF

    def apply(self, run: Any, is_cross: bool, is_self: bool) -> None:
        """Change the attention of the second row in one step."""
        rows, maps = run.cond.rows, []
        for attention in self._attentions:
            changes_self = self._changes_self(attention, is_self)
            if not (changes_self or (attention.text and (is_cross or self._reweight or self._local))):
                continue
            first, second = (_product(row, attention) for row in rows)
            before, own = first.attention_probs, second.attention_probs
            if self._local and attention.text:
                maps.append(self._map(attention, before, own))
            probs = self._changed(attention, before, own, is_cross, changes_self)
            if probs is not own:
                second.attention_probs = probs
        if maps:
            self._sums = self._sums + maps if not self._sums else [a + b for a, b in zip(self._sums, maps)]

    def _changed(
        self, attention: Attention, before: torch.Tensor, own: torch.Tensor, is_cross: bool, is_self: bool
    ) -> torch.Tensor:
        image = slice(attention.image.start, attention.image.stop)
        probs = own.clone()
        if is_self:
            keys = slice(attention.image_keys.start, attention.image_keys.stop)
            probs[..., image, keys] = before[..., image, keys]
        if is_cross:
            for mapping, keys in self._mapped(attention):
                mapped = before[..., image, :][..., keys] @ mapping.matrix.to(before)
                new = torch.where(mapping.is_mapped.to(own.device), mapped, probs[..., image, :][..., keys])
                probs[..., image, :] = probs[..., image, :].index_copy(-1, keys, new)
        if (is_self or is_cross) and attention.kind == "joint":
            probs[..., image, :] /= probs[..., image, :].sum(-1, keepdim=True)
        for words, factor in self._reweight if attention.text else ():
            for word in words.keys(attention):
                probs[..., image, word] *= factor
        return probs

    def _mapped(self, attention: Attention) -> list[tuple[TokenMapping, torch.Tensor]]:
        """Return the mappings of the tokens among the keys, and their keys. If encoders share keys, the first encoder
        counts."""
        found, taken = [], set()
        for encoder, keys in attention.text.items():
            tokens = [token for token, key in enumerate(keys) if key is not None and key not in taken]
            if encoder not in self._tokens or not tokens:
                continue
            mapping = self._tokens[encoder]
            matrix = mapping.matrix[tokens][:, tokens]
            found.append((TokenMapping(matrix, matrix.sum(0) > 0), torch.tensor([keys[token] for token in tokens])))
            taken |= {keys[token] for token in tokens}
        return found

    # ---- where the image may change

    def _map(self, attention: Attention, before: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return how much the words of the mask are attended to in a product, (rows, columns) of the largest grid."""
        image, total = slice(attention.image.start, attention.image.stop), 0.0
        for probs, words in zip((before, own), self._local):
            for word in words:
                total = total + probs[0, :, image][..., word.keys(attention)[0]].mean((0, -1))
        size = max((one.grid for one in self._attentions), key=lambda grid: grid[-1])
        return F.interpolate(total.reshape(1, 1, *attention.grid[-2:]).float(), size=size[-2:], mode="bicubic")[0, 0]

    def keep_outside(self, run: Any) -> None:
        """Copy the latents of the first row into the second where the words of the mask are not attended to."""
        output = run.scheduler.step.output
        latents = output[0]
        mask = scaled(torch.stack(self._sums).sum(0)) >= _MASK
        if latents.ndim == 3:  # a sequence of positions
            place = F.interpolate(mask[None, None].float(), size=mask.shape)[0, 0].flatten()[:, None]
            place = place if len(place) == latents.shape[1] else None
        else:
            place = F.interpolate(mask[None, None].float(), size=latents.shape[-2:])[0]
        if place is None:
            raise InputError("omit local: the latents of this pipeline do not have the layout of its image positions")
        latents[1] = torch.where(place.to(latents.device) > 0, latents[1], latents[0])


def _product(row: Any, attention: Attention) -> Any:
    envoy = row[attention.path]
    _, _, number = attention.name.partition(".products[")
    return envoy.products[int(number[:-1])] if number else envoy


def _steps(model: DiffusionModel, arguments: Mapping[str, Any]) -> int:
    """Return the number of denoising steps of a call."""
    default = inspect.signature(model.pipeline.__call__).parameters.get("num_inference_steps")
    steps = as_integer(arguments.get("num_inference_steps", None if default is None else default.default))
    if steps is None or steps < 1:
        raise InputError("pass num_inference_steps: cross_steps and self_steps are shares of this number")
    return steps
