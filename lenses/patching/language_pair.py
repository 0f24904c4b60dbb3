"""A pair of prompts of a language model: values of the source's run are put into the target's run.

pair = LanguagePair.of(model, "The capital of France is", "The capital of Italy is", sites, "each", "each", {})
pair.columns                                # which tokens of the one take the place of which of the other
run_side(pair.source, metric, points)       # the outcome, and the values at points
run_side(pair.target, metric, states=True)  # the outcome, and the hidden states between the layers
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from diffsight.errors import InputError
from diffsight.lenses.encoders.columns import Column
from diffsight.lenses.metrics.metric import LAST_LOGITS, Metric, Outcome
from diffsight.lenses.sites.position_pairs import Positions, pair_positions
from diffsight.lenses.sites.prompt_tokens import PromptTokens
from diffsight.lenses.sites.site import Site
from diffsight.lenses.tokens.token_text import Spelling
from diffsight.pipelines.language.model import LanguageModel, LanguageRun

_ENCODER = ("encoder", "model.encoder")


@dataclass(frozen=True)
class LanguageSide:
    """One prompt of a pair, as the model reads it.

    Attributes:
        model: The model.
        prompt: The prompt as text, without special tokens.
        values: The arguments of the forward pass, one row.
        tokens: The tokens that the sites of the sweep see.
        is_patched_in_encoder: Whether the sites are in the encoder of an encoder-decoder.
    """

    model: LanguageModel
    prompt: str
    values: Mapping[str, Any] = field(repr=False)
    tokens: PromptTokens
    is_patched_in_encoder: bool = False

    @classmethod
    def of(cls, model: LanguageModel, prompt: Any, sites: Sequence[Site], inputs: Mapping[str, Any]) -> "LanguageSide":
        """Return a prompt as the model reads it. Nothing runs.

        Raises:
            InputError: The model does not take this prompt, or there are several prompts.
        """
        run = model.trace(prompt, **inputs)
        values = {**run.model_inputs.values, **{n: v for n, v in inputs.items() if n != "images"}}
        read, is_patched_in_encoder = run.tokens, False
        ids = read
        if model.is_encoder_decoder:
            values["decoder_input_ids"] = run.decoder_tokens
            is_patched_in_encoder = in_encoder(sites)
            ids = read if is_patched_in_encoder else run.decoder_tokens
        if ids is None:
            raise InputError("patching needs to know the tokens: pass strings or token ids, not embeddings")
        if len(ids) != 1:
            raise InputError(f"a prompt of a pair is one input, not {len(ids)}: pass a list of prompts")
        if model.takes_argument("use_cache"):
            values["use_cache"] = False
        text = Spelling(model).text((ids if read is None else read)[0].tolist())
        return cls(model, text, values, PromptTokens.of(model, ids[0].tolist()), is_patched_in_encoder)

    @property
    def name(self) -> str:
        """The prompt in messages."""
        return f"the prompt {self.prompt!r}"

    def open(
        self, metric: Metric, rows: int = 1, encoded: torch.Tensor | None = None, grad: bool = False
    ) -> LanguageRun:
        """Open a run of copies of the prompt.

        Args:
            metric: The metric of the outcome: if it reads the last token only, the head computes only this token.
            rows: The number of copies.
            encoded: The output of an encoder-decoder's encoder, (1, tokens, features), to use instead of running it.
            grad: Whether gradients are enabled.
        """
        values = {n: torch.cat([v] * rows) if isinstance(v, torch.Tensor) else v for n, v in self.values.items()}
        if encoded is not None:
            values.pop("input_ids")
            values["encoder_outputs"] = BaseModelOutput(torch.cat([encoded] * rows))
        if LAST_LOGITS in metric.reads and self.model.takes_argument("logits_to_keep"):
            values["logits_to_keep"] = 1
        return self.model.trace(values, grad=grad)

    def open_generation(
        self, tokens: int, rows: int, values: Mapping[str, Any] | None = None, **stored: Any
    ) -> LanguageRun:
        """Open a run that continues copies of the prompt greedily, each by the same number of tokens.

        The result has the logits of each step, (rows, vocabulary).

        Args:
            tokens: The number of tokens.
            rows: The number of copies.
            values: The model's inputs for all rows. Default: those of the prompt.
            stored: What the model stored for these inputs.
        """
        if values is None:
            values = {n: torch.cat([v] * rows) if isinstance(v, torch.Tensor) else v for n, v in self.values.items()}
            values.pop("use_cache", None)
        chosen = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": 1}
        return self.model.generate(values, **chosen, **stored, output_logits=True, return_dict_in_generate=True)


@dataclass(frozen=True)
class LanguagePair:
    """Two prompts, and which tokens of the first replace which tokens of the second."""

    source: LanguageSide
    target: LanguageSide
    columns: tuple[Column, ...]
    align: str

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        source: Any,
        target: Any,
        sites: Sequence[Site],
        positions: Positions,
        align: str,
        inputs: Mapping[str, Any],
    ) -> "LanguagePair":
        """Return a pair of prompts.

        Raises:
            InputError: A prompt or position is invalid.
        """
        sides = [LanguageSide.of(model, prompt, sites, inputs) for prompt in (source, target)]
        columns = pair_positions(*(side.tokens for side in sides), positions, align)
        return cls(*sides, tuple(columns), align)

    @property
    def sides(self) -> tuple[LanguageSide, LanguageSide]:
        """The source and the target."""
        return self.source, self.target

    def is_whole(self, column: Column) -> bool:
        """Return whether a column covers all tokens of both prompts."""
        return len(column.source) == len(self.source.tokens) == len(self.target.tokens) == len(column.target)

    def spans(self, column: Column) -> tuple[range | None, range | None]:
        """Return the tokens that are taken and the tokens that they replace. None stands for the whole value."""
        if self.is_whole(column):
            return None, None
        last = slice(-1, None) if self.align == "last" else slice(None)
        return column.source[last], column.target[last]


@dataclass(frozen=True)
class Passed:
    """The values kept from a run of one prompt.

    Attributes:
        outcome: The outcome, one row.
        values: The values at points, by their paths, in the order in which the model reached them, (1, ...).
        states: The hidden states before each layer and after the last, (1, tokens, features).
        encoded: The output of an encoder-decoder's encoder.
    """

    outcome: Outcome
    values: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    states: Sequence[torch.Tensor] = field(default=(), repr=False)
    encoded: torch.Tensor | None = field(default=None, repr=False)


def in_encoder(sites: Iterable[Site]) -> bool:
    """Return whether sites of an encoder-decoder are in its encoder.

    Raises:
        InputError: Some sites are in the encoder, and some are not.
    """
    found = {site.module.startswith(_ENCODER) for site in sites}
    if len(found) > 1:
        raise InputError("some sites are in the encoder and some in the decoder, which read other tokens: choose one")
    return found.pop()


@torch.no_grad()
def run_side(side: LanguageSide, metric: Metric, points: Sequence[str] = (), states: bool = False) -> Passed:
    """Run a prompt once.

    Args:
        side: The prompt.
        metric: The metric of the outcome.
        points: The paths of the points whose values are kept.
        states: Whether to keep the hidden states between the layers.

    Raises:
        InputError: The model does not reach one of the points, or reaches it several times.
    """
    values: dict[str, torch.Tensor] = {}
    passages: Counter[str] = Counter()
    between = []

    def keep(site: Site, value: Any) -> None:
        passages[site.point] += 1
        values.setdefault(site.point, site.tensor(value).clone())

    with side.open(metric) as run:
        for site in map(Site, points):
            run.follow(site.path, partial(keep, site))
        if states:
            between = [run.layers_input[0].clone()]
            between += [run.layers_output[i].clone() for i in range(len(side.model.layers))]
        result = run.result
    check_reached_once(points, passages)
    encoded = None if side.is_patched_in_encoder else getattr(result, "encoder_last_hidden_state", None)
    return Passed(Outcome(logits=result.logits), values, between, encoded)


def check_reached_once(points: Iterable[str], passages: Mapping[str, int], when: str = "with this prompt") -> None:
    """Check that a pass reaches each of the points once.

    Args:
        points: The paths of the points.
        passages: How many times the pass reached each of them.
        when: Which pass it was, for the message.

    Raises:
        InputError: It reaches a point never, or several times.
    """
    for point in points:
        times = passages.get(point, 0)
        if not times:
            raise InputError(f"the model never reaches {point} {when}, so nothing can be changed there")
        if times > 1:
            raise InputError(
                f"the model reaches {point} {times} times in a pass {when}, so it is not clear which value is meant: "
                "choose a module that is called once"
            )


def check_values(pair: LanguagePair, values: Mapping[str, torch.Tensor], sites: Sequence[Site]) -> None:
    """Check that the values at the sites fit the tokens of the columns.

    Raises:
        InputError: They do not fit.
    """
    lengths = len(pair.source.tokens), len(pair.target.tokens)
    for site in {site.point: site for site in sites}.values():
        shape = tuple(values[site.point].shape)
        has_tokens = len(shape) > site.token_dim and shape[site.token_dim] == lengths[0]
        if not has_tokens and not all(map(pair.is_whole, pair.columns)):
            raise InputError(
                f"{site.point} has the shape {shape}, without one value for each of the {lengths[0]} tokens: pass "
                'positions="all"'
            )
        if site.value == "attention_probs" and lengths[0] != lengths[1]:
            raise InputError(
                f"the prompts have {lengths[0]} and {lengths[1]} tokens, so the attention probabilities of one cannot "
                "take the place of those of the other"
            )
