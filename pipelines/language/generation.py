"""Generation, token by token.

    for step in run.steps:                          # one iteration per generated token
        step.tokens, step.text

    for piece in run.stream():
        print(piece, end="")

transformers calls its stopping criteria whenever tokens have been chosen. A run adds a criterion that never
stops the generation. It records the tokens and ends the step. A step therefore lies between two choices, however many
forward passes it takes: two with `guidance_scale`, several for a long prompt with `prefill_chunk_size`, drafts in
assisted decoding. Where one pass yields several tokens, as in assisted decoding, each token gets a step, and the pass
belongs to the step of the first.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, StoppingCriteria, StoppingCriteriaList

from diffsight.errors import InputError, OutOfOrderError, suggest
from diffsight.extending import (
    FORWARD,
    Asked,
    Clock,
    Points,
    Run,
    Step,
    Target,
    current_owner,
    flow_of,
    join,
    keeping_attribute_errors,
    raise_kept,
    tree_of,
    unwrapped,
    wrapped_targets,
)
from diffsight.pipelines.arguments import named_arguments

_GENERATE = "generate"  # the method of a model
_INCOMPLETE = "\ufffd"  # how a tokenizer decodes bytes that are not a whole character yet
_CHOICE = re.compile(r"tokens|steps\[\d+\]\.tokens")  # the names of a choice of tokens in a run
_SEVERAL = ("assistant_model", "custom_generate", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


class Choice(NamedTuple):
    """The token ids after a choice of one token per sequence.

    Attributes:
        ids: All token ids so far, `(sequences, tokens)`.
        start: The index at which the generated text begins.
    """

    ids: torch.Tensor
    start: int


class TokenClock(Clock):
    """Begins a step at the first forward pass after a choice of tokens, and one for each further token of that choice.

    The forward passes are those of the model that chooses the tokens: a model inside, if its `generate` is given the
    stopping criterion.

    Args:
        starts: As in `Clock`.
        generated: The stopping criterion.
        inside: The models inside that can generate.
    """

    def __init__(self, starts: Sequence[Target], generated: "GeneratedTokens", inside: Sequence[Target]) -> None:
        super().__init__(starts, [generated.target])
        self.watched |= {target.key for target in inside}
        self._generated = generated

    def begins(self, target: Target, args: tuple, kwargs: dict) -> bool:
        if target.name != _GENERATE:
            return super().begins(target, args, kwargs)
        if self._generated in (kwargs.get("stopping_criteria") or ()):
            self.starts = frozenset([(target.key[0], FORWARD)])
        return False

    @property
    def ending(self) -> str:
        choices = self._generated.choices
        if not choices:
            return ""
        count, last = len(choices), choices[-1]
        is_end = all(self._generated.end_tokens.intersection(row) for row in last.ids[:, last.start :].tolist())
        return f" after {count} token{'s' * (count > 1)}{' (at the end-of-text token)' * is_end}"

    def check_counted(self, title: str) -> None:
        if (self.index >= 0) == self.has_ended_one:
            return
        why = "did not call its stopping criteria, which tell when a token was chosen"
        if self.has_ended_one:
            why = "chose tokens without a forward pass of its own"
        raise InputError(
            f"run.steps: the steps of this run cannot be counted, because {title} {why}. Read values on the run "
            "itself, and .calls[i] for later forward passes"
        )


class GeneratedTokens(StoppingCriteria):
    """A stopping criterion that never stops: it records tokens as they are chosen."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.choices: list[Choice] = []
        self.has_beams = False
        self.end_tokens: set[int] = set()
        self._clock = Clock([])
        self.given: torch.Tensor | None = None  # the tokens that a decoder was given to continue, if any
        self._prompt: int | None = None  # the number of tokens before the first choice, if one choice may add several
        self._is_new = True  # whether the next choice is the first of a text

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        choices = self.choices_of(input_ids)
        self.choices += choices
        self._is_new = False
        self._clock.note_end(self.target)
        run = current_owner()
        for _ in choices[1:] if run is not None and run.clock is self._clock else ():
            run.begin_empty_step()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def target(self) -> Target:
        """The target under which a run reads a choice of tokens."""
        return ChoiceTarget(self, "__call__", "tokens")

    def choices_of(self, ids: torch.Tensor) -> list[Choice]:
        """Return the new choices, one per token, given all token ids so far."""
        length = ids.shape[-1]
        if self._continues(ids):
            last = self.choices[-1]
            before, start = last.ids.shape[-1], last.start
        else:
            before = start = self._prompt if self._prompt is not None and self._prompt < length else length - 1
        return [Choice(ids[:, :end], start) for end in range(before + 1, length + 1)]

    def along_with(self, net: nn.Module, arguments: Mapping[str, Any]) -> StoppingCriteriaList:
        """Begin a new text, and return the stopping criteria for its call of `generate`."""
        self._is_new = True
        self.given = arguments.get("decoder_input_ids")
        several = any(setting(net, arguments, name) for name in _SEVERAL)
        self._prompt = _prompt_length(net, arguments) if several else None
        ends = setting(net, arguments, "eos_token_id")
        self.end_tokens.update([] if ends is None else torch.as_tensor(ends).flatten().tolist())
        self.has_beams = setting(net, arguments, "num_beams") not in (None, 1)
        return StoppingCriteriaList([*(arguments.get("stopping_criteria") or []), self])

    def clock_from(self, models: Sequence[Target], inside: Sequence[Target]) -> Clock:
        """Return a clock whose steps begin at a forward pass of one of `models`, or of one of the models inside that is
        to choose the tokens, and end with a choice of tokens."""
        self._clock = TokenClock(models, self, inside)
        return self._clock

    def _continues(self, ids: torch.Tensor) -> bool:
        """Return whether token ids continue from the last choice. Some models generate texts one by one."""
        if self._is_new or not self.choices or len(ids) != len(self.choices[-1].ids):
            return False
        before = self.choices[-1].ids
        added = ids.shape[-1] - before.shape[-1]
        return added == 1 or (added > 1 and torch.equal(ids[:, :-added], before))


class ChoiceTarget(Target):
    """The choice of tokens that ends a step."""

    def point(self, part: str, call: int) -> str:
        return f"{self.path}, the end of the step, to which step.text and step.tokens run the model,"


class GenerationStep(Step):
    """One generated token: from one choice of tokens to the next."""

    def __init__(self, index: int, component: str, call: tuple[tuple, dict], run: "GenerationRun") -> None:
        super().__init__(index, component, call)
        self._run = run

    @property
    def tokens(self) -> torch.Tensor:
        """The token ids generated in this step, one per sequence, or with beam search per candidate, best first.

        Runs the model until they are known."""
        with keeping_attribute_errors(self):
            return self._run._choice(self.index).ids[:, -1]

    @property
    def text(self) -> str | list[str]:
        """The text that this step adds, or a list for several sequences. Runs the model until it is known.

        Raises InputError with beam search, which chooses its text only at the end."""
        with keeping_attribute_errors(self):
            return self._run._text_added_in(self.index)

    def __getattr__(self, name: str) -> Any:
        raise_kept(self)
        raise AttributeError(f"a step has no {name!r}{suggest(name, ('index', 'tokens', 'text', 'component'))}")


class GenerationRun(Run):
    """A run in which a model may generate text."""

    _generated: GeneratedTokens | None = None  # None if it does not generate

    def __getitem__(self, key: int | str | slice) -> Any:
        if not isinstance(key, str):  # transformers returns lists; a child of the model would be a surprise here
            names = (name for name in ("text", "result", "rows") if hasattr(type(self), name))
            raise InputError(f"a run has no part {key!r}: read {', '.join(f'run.{name}' for name in names)}")
        return super().__getitem__(key)

    def stream(self) -> Iterator[str | list[str]]:
        """Yield the text piece by piece as it is generated: `for piece in model.generate(prompt).stream():`.

        Raises InputError with beam search, which chooses its text only at the end."""
        self._check_generates("stream()")
        self._check_streams()
        self._check_no_beams("stream()")
        return self._pieces()

    def _check_streams(self) -> None:
        outcome = flow_of(self._pass).outcome
        if outcome is not None:
            raise OutOfOrderError(f"run.stream() was asked for too late: {outcome}. Read run.text")

    def _pieces(self) -> Iterator[str | list[str]]:
        self._check_streams()
        step = None
        for step in self.steps:
            piece = step.text
            if piece and any(piece):
                yield piece
        if step is not None and step.index < len(self._generated.choices):  # otherwise the run was stopped
            ids, start = self._choice(step.index)
            rest = [_incomplete_end(decoded(self._generated.tokenizer, row[start:])) for row in ids]
            if any(rest):
                yield one_or_many(rest)

    def _make_step(self, index: int, path: str, call: tuple[tuple, dict]) -> Step:
        if self._generated is None:
            return super()._make_step(index, path, call)
        return GenerationStep(index, path or tree_of(self).title, call, self)

    def _own_target(self, path: str) -> Target | None:
        is_choice = self._generated is not None and _CHOICE.fullmatch(path)
        return ChoiceTarget(self._generated, "__call__", path) if is_choice else super()._own_target(path)

    @property
    def _has_passed(self) -> bool:
        """Whether the run is a single forward pass and has finished."""
        flow = flow_of(self._pass)
        return flow.has_result and not flow.is_scan and self._pass._generated is None

    def _check_generates(self, what: str) -> None:
        if self._generated is None:
            raise InputError(
                f"run.{what} needs a run that generates text: open it with model.generate(...), not model.trace(...)"
            )

    def _check_no_beams(self, what: str) -> None:
        if self._generated.has_beams:
            raise InputError(
                f"{what}: beam search follows several texts, and chooses one only at the end. Read run.text after "
                "the run, or step.tokens, the tokens of all candidates"
            )

    def _choice(self, step: int) -> Choice:
        """Return the choice of tokens in a step. For the current step, run the model until it is known."""
        generated = self._generated
        if step < len(generated.choices):
            return generated.choices[step]
        target = ChoiceTarget(generated, "__call__", f"steps[{step}].tokens")
        ids = Points(tree_of(self), target, self).input
        is_known = step < len(generated.choices)  # a server reports its choices before it answers
        return generated.choices[step] if is_known else generated.choices_of(ids)[0]

    def _text_added_in(self, step: int) -> str | list[str]:
        self._check_no_beams("step.text")
        ids, start = self._choice(step)
        return one_or_many([_added(self._generated.tokenizer, row[start:]) for row in ids])


def decoded(tokenizer: Any, ids: torch.Tensor) -> str:
    """Return token ids as text."""
    if tokenizer is None:
        raise InputError(
            "text needs a tokenizer, and the model has none: pass one, as in LanguageModel((model, tokenizer))"
        )
    return tokenizer.decode(ids, skip_special_tokens=True)


def start_after(given: torch.Tensor | None, ids: torch.Tensor) -> int:
    """Return the index at which a decoder continues the tokens that it was given, perhaps after its own start token; 0
    if they are not in its output."""
    if not isinstance(given, torch.Tensor) or given.ndim != 2:
        return 0
    given = given.repeat_interleave(max(1, len(ids) // len(given)), 0).to(ids.device)
    count = given.shape[1]
    for start in (0, 1):
        if torch.equal(ids[:, start : start + count], given):
            return start + count
    return 0


def one_or_many(texts: list[str]) -> str | list[str]:
    """Return the only text, or the list of them."""
    return texts[0] if len(texts) == 1 else texts


def generation_argument_names(net: nn.Module) -> set[str]:
    """Return the names of the arguments of a model's `generate`, including the arguments of its forward pass."""
    functions = (net.generate, net.prepare_inputs_for_generation, unwrapped(net).forward)
    return set(vars(GenerationConfig())).union(*map(named_arguments, functions))


def setting(net: nn.Module, arguments: Mapping[str, Any], name: str) -> Any:
    """Return a setting of a call of `generate`: from its arguments, or else the first generation config that sets it,
    the one that was passed or the model's own. None if it is not set."""
    if name in arguments:
        return arguments[name]
    configs = (arguments.get("generation_config"), getattr(net, "generation_config", None))
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def inferred_mask(net: nn.Module, ids: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the mask that transformers' `generate` infers for token ids that are passed without one, or None if it
    takes all of them for real tokens.

    Padding tokens count as padding, unless the padding token also ends a text. Nothing is inferred for an encoder."""
    padding, ends = (setting(net, arguments, name) for name in ("pad_token_id", "eos_token_id"))
    if padding is None or net.config.is_encoder_decoder or ids.is_meta:
        return None
    is_end = ends is not None and padding in torch.as_tensor(ends).flatten().tolist()
    return None if is_end else ids.ne(padding).long()


def _prompt_length(net: nn.Module, arguments: Mapping[str, Any]) -> int:
    """Return the number of tokens before the first generated one."""
    is_pair = net.config.is_encoder_decoder
    ids = arguments.get("decoder_input_ids" if is_pair else "input_ids")
    if ids is None and not is_pair:
        ids = arguments.get("inputs")
    if not isinstance(ids, torch.Tensor):
        return int(is_pair)  # a decoder begins with a token of its own
    starts = [setting(net, arguments, name) for name in ("decoder_start_token_id", "bos_token_id")]
    start = next((token for token in starts if token is not None), None)
    is_added = is_pair and start is not None and not (ids[:, 0] == torch.as_tensor(start, device=ids.device)).any()
    return ids.shape[-1] + is_added


def _added(tokenizer: Any, ids: torch.Tensor) -> str:
    """Return the text that the last of `ids` adds. A character of several tokens is added with its last token."""
    before, whole = (decoded(tokenizer, part).rstrip(_INCOMPLETE) for part in (ids[:-1], ids))
    return whole[len(before) :]


def _incomplete_end(text: str) -> str:
    """Return the end of a text that no step has added, because tokens of its last character are missing."""
    return text[len(text.rstrip(_INCOMPLETE)) :]


def set_generated(run: GenerationRun, generated: GeneratedTokens, model: Target) -> None:
    """Make a run count and read its tokens from `generated`, one of the stopping criteria of `model`."""
    run._generated = generated
    wrapped = wrapped_targets(model)  # a wrapper passes `generate` on to its model, which then calls itself
    inside = _generating_inside([model, *wrapped][-1])
    generates = [Target(target.owner, _GENERATE, join(target.path, _GENERATE)) for target in inside]
    for target in (*wrapped, *inside, *generates):
        flow_of(run).taps.add(target)
    flow_of(run).clock = generated.clock_from([model, *wrapped], inside)
    flow_of(run).mirror(Asked(generated.target, "input"), lambda ids: generated(ids, None))


def _generating_inside(model: Target) -> list[Target]:
    """Return the models inside a model whose `generate` it may call in its own."""
    if getattr(type(model.owner), _GENERATE, None) is GenerationMixin.generate:
        return []
    waiting = model.inner()
    for target in waiting:
        waiting += target.inner()
    return [target for target in waiting if isinstance(target.owner, GenerationMixin)]
