"""Layouts: what the entries of a batch are, by prompt and by branch of classifier-free guidance.

Under guidance a denoiser gets both branches in one batch, in either order, or each in a call of its own; without it,
one. Which it is shows in what it gets: the entries of its text input are compared with what `encode_prompt` returned,
and the token ids of a text encoder, turned back into words, with the prompts. No pipeline is known by its name. What
cannot be told in this way stays unknown: whoever asks for it gets an error, not a guess.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch

from diffsight.extending import FORWARD, Tap, Target

COND, UNCOND = "cond", "uncond"

Layout = tuple[tuple[str, int], ...]  # of each entry of a batch, its branch and the number of its prompt
Texts = torch.Tensor | Sequence[torch.Tensor]  # embeddings, an entry of the batch each


class Layouts:
    """The batches of one run of a pipeline, which draws `pictures` pictures for each of `prompts` prompts. Looks on at
    the run's calls (see `diffsight.engine.flow.Observer`)."""

    def __init__(self, pipeline: Any, arguments: dict[str, Any], prompts: int, pictures: int) -> None:
        self.prompts, self.pictures = prompts, pictures
        self._pipeline, self._arguments = pipeline, arguments
        self._calls: dict[int, list[_Call]] = {}  # of text encoders and denoisers, by the id of the component
        given = {COND: arguments.get("prompt_embeds"), UNCOND: arguments.get("negative_prompt_embeds")}
        given = {branch: texts for branch, texts in given.items() if texts is not None}
        self._texts: list[dict[str, Texts]] = [given] if given else []  # and what encode_prompt returned, by branch
        self._encoding: list[str | None] = []  # of the calls of encode_prompt that run: the branch they are for
        self._seen: dict[tuple[int, int], tuple[Texts, list[Layout]]] = {}

    def layout(self, tap: Tap, index: int) -> Layout | None:
        """What the batch holds in call number `index` of what is tapped, which has begun; None if that is unknown."""
        for call in reversed(self._calls.get(id(_component(tap).owner), ())):
            if call.bases.get(tap.target.key, 0) <= index:
                return call.layout
        return None

    def entries(self, component: Any, branch: str) -> list[int] | None:
        """The places of a branch in the batch that a component is running on; None where that cannot be told."""
        calls = self._calls.get(id(component))
        layout = calls[-1].layout if calls else None
        return None if layout is None else [place for place, (of, _) in enumerate(layout) if of == branch]

    def has_branches(self, tap: Tap) -> bool:
        """Whether it may be given a branch: not a method such as `scheduler.step`, nor anything in a VAE."""
        component = _component(tap)
        return component.name == FORWARD and not hasattr(component.owner, "decode")

    def why_unknown(self, tap: Tap) -> str:
        """Why the branches cannot be told at a point."""
        component = _component(tap)
        if not self.has_branches(tap) or id(component.owner) not in self._calls:
            return (
                "belongs to no branch: they part at the text encoders and meet before the scheduler steps. Read it on "
                "the run itself"
            )
        unknown = f"is of a branch that cannot be told: {component.path} was given"
        if component.key not in tap.host.clock.starts:
            return f"{unknown} words that are not just the prompt's, nor just the negative prompt's"
        if not self._texts:
            return f"{unknown} no text that {type(self._pipeline).__name__}.encode_prompt returned"
        return (
            f"{unknown} another text than encode_prompt returned for prompt and negative prompt, or more than these two"
        )

    # ---- looking on

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
        if tap.target.name != "encode_prompt":
            return
        branch = self._encoding.pop()
        values = [v for v in (output if isinstance(output, (tuple, list)) else [output]) if _are_texts(v)]
        if branch is None or not values:
            return
        texts = next((known for known in self._texts if branch not in known), {})
        if not texts:
            self._texts.append(texts)
        texts[branch] = values[0]  # the prompt's comes first in all pipelines
        alike = next((value for value in values[1:] if _look_alike(value, values[0])), None)
        if branch == COND and alike is not None:
            texts[UNCOND] = alike

    def ended(self) -> None:
        self._calls.clear()
        self._texts.clear()
        self._seen.clear()

    def _add(self, tap: Tap, look: "Callable[[], Layout | None]") -> None:
        self._calls.setdefault(id(tap.target.owner), []).append(_Call(tap.host.taps.entered(), look))

    def _branch_of(self, pipeline: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
        """Whose prompt encode_prompt is called with: some pipelines call it for each branch, others once for both,
        with the conditional branch's."""
        given = inspect.signature(pipeline.encode_prompt).bind_partial(*args, **kwargs).arguments
        names = ("prompt", "prompt_embeds")
        cond, uncond = (
            any(_is_same(given.get(name), self._arguments.get(prefix + name)) for name in names)
            for prefix in ("", "negative_")
        )
        has_cond = any(COND in texts for texts in self._texts)
        if uncond and (has_cond or not cond):
            return UNCOND
        return COND if cond or not has_cond else None

    # ---- the text that a denoiser is given

    def _compare(self, component: int, turn: int, values: list[Texts]) -> list[Layout]:
        """The layouts in which one of the values given to a denoiser is made of what encode_prompt returned."""
        seen, found = self._seen.get((component, turn), (None, []))
        if any(value is seen for value in values):  # as a rule the same in every step
            return found
        total = self.prompts * self.pictures
        for value, texts in product(values, self._texts):
            fits = partial(self._fits, value, texts)
            for frames in sorted({1, len(value) // (2 * total), len(value) // total}):  # video: an entry a frame
                possible = self._possible(self.pictures * frames, len(value))
                found = [layout for layout in possible if all(map(fits, *_pairs(layout)))]
                if found:
                    self._seen[component, turn] = (value, found)
                    return found
        return []

    def _fits(self, value: Texts, texts: dict[str, Texts], position: int, entry: tuple[str, int]) -> bool:
        branch, prompt = entry
        text, total = texts.get(branch), self.prompts * self.pictures
        if text is None or len(text) not in (self.prompts, total):
            return False
        given, text = value[position], text[prompt * (len(text) // self.prompts)]
        return given.shape == text.shape and torch.equal(given, text.to(given))

    def _possible(self, repeats: int, size: int) -> list[Layout]:
        """The layouts that a batch of this size may have; where several fit, the earlier is the more common one."""
        cond, uncond = (
            tuple((branch, prompt) for prompt in range(self.prompts) for _ in range(repeats))
            for branch in (COND, UNCOND)
        )
        return [layout for layout in (cond, uncond, uncond + cond, cond + uncond) if len(layout) == size]

    # ---- the words that a text encoder is given

    def _read(self, target: Target, ids: torch.Tensor, earlier: "list[_Call]") -> list[Layout]:
        """The layouts in which the token ids given to a text encoder are the words of the prompts."""
        tokenizer = self._tokenizer(target.path)
        if tokenizer is None:
            return []
        texts = [_words(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        known = {branch: self._known_words(tokenizer, branch) for branch in (COND, UNCOND)}
        follows = any(call.layout is not None and call.layout[0][0] == COND for call in earlier)

        def fits(position: int, entry: tuple[str, int]) -> bool:
            branch, prompt = entry
            text, other = texts[position], UNCOND if branch == COND else COND
            fit = _fit(text, known[branch][prompt])
            if fit == (1, 0) and text and not follows:  # it holds an empty prompt, as any text does
                return False
            return fit is not None and fit >= (_fit(text, known[other][prompt]) or fit)

        return [layout for layout in self._possible(1, len(texts)) if all(map(fits, *_pairs(layout)))]

    def _tokenizer(self, encoder: str) -> Any:
        """The tokenizer of a text encoder: `tokenizer_2` for `text_encoder_2`, or the only one."""
        parts = self._pipeline.components
        tokenizers = {name: part for name, part in parts.items() if name.startswith("tokenizer") and part is not None}
        only = next(iter(tokenizers.values())) if len(tokenizers) == 1 else None
        return tokenizers.get(encoder.replace("text_encoder", "tokenizer"), only)

    def _known_words(self, tokenizer: Any, branch: str) -> list[list[str]]:
        """The words of every prompt (`prompt`, `prompt_2` …) or negative prompt, as the tokenizer gives them back."""
        prefix = "" if branch == COND else "negative_"
        parameters = inspect.signature(self._pipeline.__call__).parameters
        known: list[list[str]] = [[] for _ in range(self.prompts)]
        for name in (name for name in parameters if re.fullmatch(rf"{prefix}prompt(_\d+)?", name)):
            given = self._arguments.get(name, parameters[name].default)
            for words, text in zip(known, [given] * self.prompts if isinstance(given, str) else given or ()):
                ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
                words.append(_words(tokenizer.decode(ids, skip_special_tokens=True)))
        return known if branch == COND else [texts or [""] for texts in known]


class _Call:
    """A call of a text encoder or denoiser. `bases` are the calls of everything else that had begun before it."""

    def __init__(self, bases: dict[tuple[int, str], int], look: Callable[[], Layout | None]) -> None:
        self.bases, self._look = bases, look

    @cached_property
    def layout(self) -> Layout | None:
        return self._look()


def _component(tap: Tap) -> Target:
    """The component that what is tapped belongs to."""
    return (tap.target.around() or [tap.target])[0]


def _in_turn(found: list[Layout], turn: int) -> Layout | None:
    """Of the layouts that fit, the one of a component's call number `turn`: where the prompts of both branches are the
    same and each has a call of its own, the conditional one comes first."""
    alone = [layout for layout in found if len({branch for branch, _ in layout}) == 1]
    return alone[turn % len(alone)] if alone else next(iter(found), None)


def _pairs(layout: Layout) -> tuple[range, Layout]:
    return range(len(layout)), layout


def _values(args: tuple, kwargs: dict[str, Any]) -> Iterator[Texts]:
    """What may be text among the arguments of a denoiser."""
    for value in (*args, *kwargs.values()):
        yield from (v for v in (value.values() if isinstance(value, dict) else [value]) if _are_texts(v))


def _are_texts(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim > 1 and value.is_floating_point()
    tensors = isinstance(value, (list, tuple)) and all(isinstance(v, torch.Tensor) for v in value)
    return tensors and bool(value) and all(v.ndim > 0 for v in value)


def _look_alike(a: Texts, b: Texts) -> bool:
    """Whether both may be embeddings of the same kind: the same but for the number of tokens."""
    return type(a) is type(b) and len(a) == len(b) and a[0].ndim == b[0].ndim and a[0].shape[-1] == b[0].shape[-1]


def _token_ids(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    values = (kwargs.get("input_ids"), *args, *kwargs.values())
    tensors = (value for value in values if isinstance(value, torch.Tensor))
    return next((t for t in tensors if t.ndim == 2 and t.dtype in (torch.int32, torch.int64)), None)


def _words(text: str) -> str:
    """A text without what tokenizers and cleaning may change."""
    return "".join(character for character in text.lower() if character.isalnum())


def _fit(text: str, known: list[str]) -> tuple[int, int] | None:
    """How well a text goes with one of several prompts: it holds all of it, the longer the better, or was cut."""
    whole = [(1, len(words)) for words in known if words in text]
    cut = [(0, len(text)) for words in known if text and words.startswith(text)]
    return max(whole + cut, default=None)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two arguments are the same prompts, or the same embeddings."""
    a, b = ([value] if isinstance(value, str) else value for value in (a, b))
    if all(isinstance(value, (list, tuple)) and value and isinstance(value[0], str) for value in (a, b)):
        return list(a) == list(b)
    return a is not None and a is b
