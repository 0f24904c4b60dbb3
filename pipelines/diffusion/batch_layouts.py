"""Find the branches of classifier-free guidance: which prompt and which branch each entry of a batch belongs to.

Under guidance a denoiser gets both branches in one batch, in either order, or each in a call of its own. Without
guidance it gets one branch. Perturbed-attention guidance adds a copy of the conditional branch at the end. The inputs
show which: the entries of a denoiser's text input are compared with the output of `encode_prompt`, and the token ids of
a text encoder are decoded to words and compared with the prompts. No pipeline is recognised by its name. If the
comparison is inconclusive, the branches are unknown and asking for them is an error.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
from diffusers import ModularPipelineBlocks
from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines import PipelineState

from diffsight.extending import FORWARD, Tap, Target
from diffsight.pipelines.arguments import signature
from diffsight.pipelines.diffusion.call_arguments import call_defaults
from diffsight.pipelines.diffusion.components import GUIDERS_METHODS, TEXT_EMBEDDINGS
from diffsight.pipelines.diffusion.prompts import as_read, text_tokenizer

COND, UNCOND = "cond", "uncond"
_PERTURBED = "perturbed"  # a copy of the conditional branch, whose attention a pipeline with a `pag_scale` perturbs
VIDEO = 5  # dimensions of the latents of videos: batch, channels, frames, height, width

BatchLayout = tuple[tuple[str, int], ...]  # for each entry of a batch, its branch and the index of its prompt
Embeddings = torch.Tensor | Sequence[torch.Tensor]  # embeddings of texts, one per entry of a batch


class BatchLayouts:
    """The prompts and branches in the batches of one run of a pipeline.

    The run draws `images` images for each of `prompts` prompts. The engine reports the run's calls through `called`,
    `returned` and `ended`."""

    def __init__(self, pipeline: Any, arguments: dict[str, Any], prompts: int, images: int) -> None:
        self.prompts, self.images = prompts, images
        self._pipeline, self._arguments = pipeline, arguments
        self._calls: dict[int, list[_RecordedCall]] = {}  # calls of text encoders and denoisers, by id
        given = {COND: arguments.get("prompt_embeds"), UNCOND: arguments.get("negative_prompt_embeds")}
        given = {branch: texts for branch, texts in given.items() if texts is not None}
        self._embeddings: list[dict[str, Embeddings]] = [given] if given else []  # by branch
        self._encoding: list[str | None] = []  # the branch of each running call of encode_prompt
        self.latent_dimensions = 0  # set once the scheduler has returned latents
        self._seen: dict[tuple[int, int], tuple[Embeddings, list[BatchLayout]]] = {}

    def layout(self, tap: Tap, index: int) -> BatchLayout | None:
        """Return the layout of the batch in call `index` of a tapped module, which has begun, or None if unknown.

        If both branches have the same text, the result is one of several layouts that fit, see `is_certain`."""
        call = self._call(tap, index)
        return None if call is None or not call.layouts else call.layouts[0]

    def is_certain(self, tap: Tap, index: int) -> bool:
        """Return whether only one layout fits call `index` of a tapped module, or the choice does not matter.

        In a scan the embeddings are zeros, so several layouts fit, but they all have the same shapes."""
        call = self._call(tap, index)
        return call is not None and (len(call.layouts) == 1 or (tap.host.is_scan and bool(call.layouts)))

    def entries(self, component: Any, branch: str) -> list[int] | None:
        """Return the places of a branch in the batch that a component is running on, or None if unknown."""
        calls = self._calls.get(id(component))
        layouts = calls[-1].layouts if calls else []
        return [place for place, (of, _) in enumerate(layouts[0]) if of == branch] if layouts else None

    def is_in_vae(self, tap: Tap) -> bool:
        """Return whether a point belongs to a VAE."""
        return hasattr(_component(tap).owner, "decode")

    def has_branches(self, tap: Tap) -> bool:
        """Return whether a point can belong to a branch. Methods such as `scheduler.step` and VAEs cannot."""
        return _component(tap).name == FORWARD and not self.is_in_vae(tap)

    def leaves_branches_out(self, tap: Tap) -> bool:
        """Return whether diffusers' FasterCache removes the unconditional branch from some calls within a denoiser."""
        registry = getattr(_component(tap).owner, "_diffusers_hook", None)
        cache = registry.get_hook("faster_cache_denoiser") if registry is not None and tap.target.outer else None
        return cache is not None and not cache.is_guidance_distilled

    def why_unknown(self, tap: Tap) -> str:
        """Return why the branches at a point are unknown, as the end of an error message."""
        component = _component(tap)
        if not self.has_branches(tap) or id(component.owner) not in self._calls:
            return (
                "belongs to no branch: only the text encoders and the denoisers have branches. "
                "Read it on the run itself"
            )
        unknown = f"belongs to an unknown branch: {component.path} was given"
        if any(len(call.layouts) > 1 for call in self._calls[id(component.owner)]):
            return f"{unknown} the same text for the prompt and the negative prompt. Read it on the run itself"
        if component.key not in tap.host.clock.starts:
            return f"{unknown} words that match neither the prompt alone nor the negative prompt alone"
        if not self._embeddings:
            title = type(self._pipeline).__name__
            reason = f"no text that {title}.encode_prompt returned"
            if not hasattr(self._pipeline, "encode_prompt"):
                reason = f"a batch without known texts, because {title} has no encode_prompt"
            return f'{unknown} {reason}. Read it on the run itself, or pass branch="both" to a lens'
        return (
            f"{unknown} a batch that differs from what encode_prompt returned for the prompt and the negative prompt, "
            'each of them once. Read it on the run itself, or pass branch="both" to a lens'
        )

    # ---- reports from the engine

    def called(self, tap: Tap, args: tuple, kwargs: dict[str, Any]) -> None:
        target = tap.target
        if target.name == "encode_prompt":
            self._encoding.append(self._branch_of(target.owner, args, kwargs))
        elif target.outer is not None or target.name != FORWARD:
            return
        elif target.key in tap.host.clock.starts:
            turn = tap.entered - tap.step_base
            found = self._compare(id(target.owner), turn, [*_values(args, kwargs)])
            self._add(tap, partial(_in_turn, found, turn))
        elif (ids := _token_ids(args, kwargs)) is not None:
            earlier = list(self._calls.get(id(target.owner), ()))
            self._add(tap, lambda: _in_turn(self._read(target, ids, earlier), len(earlier)))

    def returned(self, tap: Tap, output: Any) -> None:
        if tap.target.key in tap.host.clock.ends:
            self.latent_dimensions = next((v.ndim for v in _items(output) if isinstance(v, torch.Tensor)), 0)
        if tap.target.name in GUIDERS_METHODS:
            self._embeddings = _embeddings_of_guider(output)
        elif isinstance(tap.target.owner, ModularPipelineBlocks):
            self._embeddings += _embeddings_of_block(output)
        if tap.target.name != "encode_prompt":
            return
        branch = self._encoding.pop()
        values = [v for v in _items(output) if _are_embeddings(v)]
        if branch is None or not values:
            return
        texts = next((known for known in self._embeddings if branch not in known), {})
        if not texts:
            self._embeddings.append(texts)
        texts[branch] = values[0]  # in all pipelines the prompt's embeddings come first
        alike = next((value for value in values[1:] if _look_alike(value, values[0])), None)
        if branch == COND and alike is not None:
            texts[UNCOND] = alike

    def ended(self) -> None:
        self._calls.clear()
        self._embeddings.clear()
        self._seen.clear()

    def _call(self, tap: Tap, index: int) -> "_RecordedCall | None":
        """Return the call of a component during which call `index` of a tapped module began."""
        calls = reversed(self._calls.get(id(_component(tap).owner), ()))
        return next((call for call in calls if call.bases.get(tap.target.key, 0) <= index), None)

    def _add(self, tap: Tap, look: Callable[[], list[BatchLayout]]) -> None:
        self._calls.setdefault(id(tap.target.owner), []).append(_RecordedCall(tap.host.taps.entered(), look))

    def _branch_of(self, pipeline: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
        """Return the branch whose prompt is passed to `encode_prompt`, or None if unknown.

        Some pipelines call it once per branch, and some of these with an empty prompt of their own for the
        unconditional branch. Others call it once for both, with the conditional branch's prompt."""
        given = signature(pipeline.encode_prompt).bind_partial(*args, **kwargs).arguments
        names = ("prompt", "prompt_embeds")
        cond, uncond = (
            any(_is_same(given.get(name), self._arguments.get(prefix + name)) for name in names)
            for prefix in ("", "negative_")
        )
        has_cond = any(COND in texts for texts in self._embeddings)
        is_default = self._arguments.get("negative_prompt") is None and given.get("prompt") in ("", [""] * self.prompts)
        if (uncond or is_default) and (has_cond or not cond):
            return UNCOND
        return COND if cond or not has_cond else None

    # ---- the text embeddings passed to a denoiser

    def _compare(self, component: int, turn: int, values: list[Embeddings]) -> list[BatchLayout]:
        """Return the layouts with which one of a denoiser's inputs equals the output of `encode_prompt`."""
        seen, found = self._seen.get((component, turn), (None, []))
        if any(value is seen for value in values):  # usually the same in every step
            return found
        has_perturbed = "pag_scale" in call_defaults(self._pipeline)
        for value, texts in product(values, self._embeddings):
            fits = partial(self._fits, value, texts)
            for frames in self._frames(values, len(value)):
                possible = self._possible(self.images * frames, len(value), has_perturbed)
                found = [layout for layout in possible if all(map(fits, *_pairs(layout)))]
                if found:
                    self._seen[component, turn] = (value, found)
                    return found
        return []

    def _frames(self, values: list[Embeddings], size: int) -> list[int]:
        """Return how many entries each image or video may have in a batch of this size: several only if the denoiser
        gets videos, whose frames have an entry each."""
        videos = [v.shape for v in values if isinstance(v, torch.Tensor) and v.ndim == VIDEO]
        frames = {shape[axis] for shape in videos for axis in (1, 2) if shape[0] * shape[axis] == size}
        length = self._arguments.get("video_length", call_defaults(self._pipeline).get("video_length"))
        return sorted({1, *frames, length or 1})  # the frames of TextToVideoZero are a batch of images

    def _fits(self, value: Embeddings, texts: dict[str, Embeddings], position: int, entry: tuple[str, int]) -> bool:
        branch, prompt = entry
        text, total = texts.get(COND if branch == _PERTURBED else branch), self.prompts * self.images
        if text is None or len(text) not in (self.prompts, total):
            return False
        given, text = value[position], text[prompt * (len(text) // self.prompts)]
        return given.shape == text.shape and torch.equal(given, text.to(given))

    def _possible(self, repeats: int, size: int, has_perturbed: bool = False) -> list[BatchLayout]:
        """Return the layouts that a batch of this size may have, the more common ones first."""
        cond, uncond, perturbed = (
            tuple((branch, prompt) for prompt in range(self.prompts) for _ in range(repeats))
            for branch in (COND, UNCOND, _PERTURBED)
        )
        layouts = [cond, uncond, uncond + cond, cond + uncond]
        layouts += [cond + perturbed, uncond + cond + perturbed] if has_perturbed else []
        return [layout for layout in layouts if len(layout) == size]

    # ---- the words passed to a text encoder

    def _read(self, target: Target, ids: torch.Tensor, earlier: "list[_RecordedCall]") -> list[BatchLayout]:
        """Return the layouts with which the token ids passed to a text encoder match the words of the prompts."""
        tokenizer = self._tokenizer(target.path)
        if tokenizer is None:
            return []
        texts = [_words(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        known = {branch: self._known_words(tokenizer, branch) for branch in (COND, UNCOND)}
        follows = any(call.layouts and call.layouts[0][0][0] == COND for call in earlier)

        def fits(position: int, entry: tuple[str, int]) -> bool:
            branch, prompt = entry
            text, other = texts[position], UNCOND if branch == COND else COND
            fit = _fit(text, known[branch][prompt])
            if fit == (1, 0) and text and not follows:  # any text contains an empty prompt
                return False
            return fit is not None and fit >= (_fit(text, known[other][prompt]) or fit)

        return [layout for layout in self._possible(1, len(texts)) if all(map(fits, *_pairs(layout)))]

    def _tokenizer(self, encoder: str) -> Any:
        """Return the tokenizer of a text encoder: `tokenizer_2` for `text_encoder_2`, or the only one."""
        parts = self._pipeline.components
        tokenizers = {name: part for name, part in parts.items() if name.startswith("tokenizer") and part is not None}
        only = next(iter(tokenizers.values())) if len(tokenizers) == 1 else None
        return text_tokenizer(tokenizers.get(encoder.replace("text_encoder", "tokenizer"), only))

    def _known_words(self, tokenizer: Any, branch: str) -> list[list[str]]:
        """Return the words of every prompt (`prompt`, `prompt_2` …) or negative prompt, as the tokenizer decodes
        them."""
        prefix = "" if branch == COND else "negative_"
        defaults = call_defaults(self._pipeline)
        known: list[list[str]] = [[] for _ in range(self.prompts)]
        for name in (name for name in defaults if re.fullmatch(rf"{prefix}prompt(_\d+)?", name)):
            given = self._arguments.get(name, defaults[name])
            for words, text in zip(known, [given] * self.prompts if isinstance(given, str) else given or ()):
                (text,) = as_read(self._pipeline, [text], tokenizer)
                ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
                words.append(_words(tokenizer.decode(ids, skip_special_tokens=True)))
        return known if branch == COND else [texts or [""] for texts in known]


class _RecordedCall:
    """A call of a text encoder or denoiser. `bases` holds, for every other tapped point, how many of its calls had
    begun before this call."""

    def __init__(self, bases: dict[tuple[int, str], int], look: Callable[[], list[BatchLayout]]) -> None:
        self.bases, self._look = bases, look

    @cached_property
    def layouts(self) -> list[BatchLayout]:
        return self._look()


def _embeddings_of_block(output: tuple[Any, PipelineState]) -> list[dict[str, Embeddings]]:
    """Return the text embeddings that a block of a modular pipeline has put into the state, by branch."""
    given = {COND: output[1].get(TEXT_EMBEDDINGS), UNCOND: output[1].get(f"negative_{TEXT_EMBEDDINGS}")}
    texts = {branch: value for branch, value in given.items() if value is not None and _are_embeddings(value)}
    return [texts] if texts else []


def _embeddings_of_guider(batches: Sequence[Any]) -> list[dict[str, Embeddings]]:
    """Return the text embeddings in the batches that a guider of a modular pipeline prepares, by branch.

    These are the inputs that differ between the branches, if any do. The batches are called "pred_cond", "pred_uncond"
    and so on."""
    found: dict[str, dict[str, Embeddings]] = {}
    for batch in batches:
        inputs = batch.as_dict()
        branch = UNCOND if inputs.pop(BaseGuidance._identifier_key).startswith("pred_uncond") else COND
        for name, value in inputs.items():
            if _are_embeddings(value):
                found.setdefault(name, {}).setdefault(branch, value)
    different = [texts for texts in found.values() if texts.get(COND) is not texts.get(UNCOND)]
    return different or [*found.values()]  # without a negative prompt, both branches may have the same text


def _component(tap: Tap) -> Target:
    """Return the component that a tapped module belongs to."""
    return (tap.target.around() or [tap.target])[0]


def _in_turn(found: list[BatchLayout], turn: int) -> list[BatchLayout]:
    """Return those of the fitting layouts that call `turn` of a component may have, the likeliest first.

    If both branches have the same prompt and a separate call each, the conditional call usually comes first."""
    alone = [layout for layout in found if len({branch for branch, _ in layout}) == 1]
    return alone[turn % len(alone) :] + alone[: turn % len(alone)] if alone else found


def _pairs(layout: BatchLayout) -> tuple[range, BatchLayout]:
    return range(len(layout)), layout


def _values(args: tuple, kwargs: dict[str, Any]) -> Iterator[Embeddings]:
    """Yield the arguments of a denoiser that may be text embeddings."""
    for value in (*args, *kwargs.values()):
        yield from (v for v in (value.values() if isinstance(value, dict) else [value]) if _are_embeddings(v))


def _items(output: Any) -> list[Any]:
    """Return the output of a method as a list of items."""
    if isinstance(output, dict):
        return list(output.values())
    return list(output) if isinstance(output, (tuple, list)) else [output]


def _are_embeddings(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim > 1 and value.is_floating_point()
    tensors = isinstance(value, (list, tuple)) and all(isinstance(v, torch.Tensor) for v in value)
    return tensors and bool(value) and all(v.ndim > 0 for v in value)


def _look_alike(a: Embeddings, b: Embeddings) -> bool:
    """Return whether two values may be embeddings of the same kind, which differ only in the number of tokens."""
    return type(a) is type(b) and len(a) == len(b) and a[0].ndim == b[0].ndim and a[0].shape[-1] == b[0].shape[-1]


def _token_ids(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    values = (kwargs.get("input_ids"), *args, *kwargs.values())
    tensors = (value for value in values if isinstance(value, torch.Tensor))
    return next((t for t in tensors if t.ndim == 2 and t.dtype in (torch.int32, torch.int64)), None)


def _words(text: str) -> str:
    """Return a text without the characters that tokenizers and prompt cleaning may change."""
    return "".join(character for character in text.lower() if character.isalnum())


def _fit(text: str, known: list[str]) -> tuple[int, int] | None:
    """Return how well a text matches one of several prompts, or None if it matches none.

    A text matches if it contains the prompt (the longer the prompt, the better), or is a truncated prompt."""
    whole = [(1, len(words)) for words in known if words in text]
    cut = [(0, len(text)) for words in known if text and words.startswith(text)]
    return max(whole + cut, default=None)


def _is_same(a: Any, b: Any) -> bool:
    """Return whether two arguments are the same prompts, or the same embeddings."""
    a, b = ([value] if isinstance(value, str) else value for value in (a, b))
    if all(isinstance(value, (list, tuple)) and value and isinstance(value[0], str) for value in (a, b)):
        return list(a) == list(b)
    return a is not None and a is b
