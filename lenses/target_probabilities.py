"""Target probabilities: how likely a model thinks certain words are to come next.

    targets = {"right": "Paris", "traps": ["London", "Madrid"], "long": "the country of France"}
    prompt = Prompt.from_strings("The capital of France (not England or Spain) is", targets, model)
    run_prompts(model, [prompt])["right"]                       # (prompts,)
    run_prompts(model, [prompt], lens=logit_lens).plot()        # by layer

A word is represented by its first token, both with and without a leading space: the probabilities of " Paris" and
"Paris" are added.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from tqdm.auto import tqdm

from diffsight.errors import InputError, UnknownKeyError, suggest
from diffsight.lenses.layers import Layer
from diffsight.lenses.options import check_options
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.figure import write_figure
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import Cell, CurveSection, Section, TableSection
from diffsight.lenses.results.token_plots import bars, curves
from diffsight.lenses.tokens.batches import open_batches
from diffsight.lenses.tokens.choosing import check_language_model, choose_tokens
from diffsight.lenses.tokens.prediction_reader import PredictionReader
from diffsight.lenses.tokens.predictions import LensPredictions
from diffsight.lenses.tokens.token_text import Spelling
from diffsight.lenses.where_models_are import where_the_model_is
from diffsight.pipelines.argument_types import fits
from diffsight.pipelines.language.model import LanguageModel

Words = str | Sequence[str]
_BEFORE = ("\n", "🍐")  # put before a word, so that the tokenizer does not add a space of its own


def first_tokens(words: Words, model: LanguageModel) -> tuple[int, ...]:
    """Return the ids of the first tokens of words, each with and without a leading space, in order and once each.

        first_tokens(["London", "Madrid"], model)       # " London", "London", " Madrid", "Mad"

    Raises:
        InputError: A word is empty, the model has no tokenizer, or the tokenizer merges words with what precedes them.
    """
    words = [words] if isinstance(words, str) else list(words)
    if not words:
        raise InputError("there is no word to track: the list is empty")
    if model.tokenizer is None:
        raise InputError(
            "words need a tokenizer, but the model has none: pass token ids, Prompt(text, {'right': [17]})"
        )
    found = []
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise InputError(f"a word to track must be a string that is not empty, not {word!r}")
        found += [token for form in (f" {word.strip()}", word.strip()) for token in _first(model.tokenizer, form)]
    return tuple(dict.fromkeys(found))


def _first(tokenizer: Any, form: str) -> list[int]:
    """Return the first token of a form in the middle of a text, or no token if it is only the space."""
    for before in _BEFORE:
        known = tokenizer(before, add_special_tokens=False)["input_ids"]
        ids = tokenizer(before + form, add_special_tokens=False)["input_ids"]
        if ids[: len(known)] == known and len(ids) > len(known):
            first = ids[len(known)]
            piece = tokenizer.convert_ids_to_tokens(first)
            return [] if piece.strip("▁Ġ ") == "" else [first]
    raise InputError(f"the tokenizer does not separate {form!r} from what precedes it: pass token ids")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the tokens to track as its next token.

    Attributes:
        text: The prompt.
        targets: Names to token ids, whose probabilities are added.
        words: Names to the words that the token ids come from.
    """

    text: str
    targets: Mapping[str, Sequence[int]]
    words: Mapping[str, Words] = field(default_factory=dict)

    @classmethod
    def from_strings(cls, text: str, targets: Words | Mapping[str, Words], model: LanguageModel) -> "Prompt":
        """Return a prompt whose targets are words.

        Args:
            text: The prompt.
            targets: Names to one word or several; or words without names, which get the name "target".
            model: The model whose tokenizer is used.
        """
        words = targets if isinstance(targets, Mapping) else {"target": targets}
        return cls(text, {name: first_tokens(some, model) for name, some in words.items()}, dict(words))

    @property
    def shared_tokens(self) -> dict[int, tuple[str, ...]]:
        """The tokens that belong to several targets and so cannot tell them apart, with the names of the targets."""
        names: dict[int, tuple[str, ...]] = {}
        for name, tokens in self.targets.items():
            for token in tokens:
                names[token] = (*names.get(token, ()), name)
        return {token: of for token, of in names.items() if len(of) > 1}


@dataclass(frozen=True, eq=False)
class TargetProbabilities(LensResult, Mapping):
    """The probabilities of the targets by name: `result["right"]`, (prompts,), or with a lens (prompts, layers).

    `save(folder)` writes `targets.json`, `targets.safetensors` and `targets.png`.

    Attributes:
        model: The name of the model.
        prompts: The prompts.
        layers: Non-negative integers, and "embedding" for the input of the first layer. None without a lens.
        probabilities: Names to probabilities.
        tokens: Names to the tokens of all prompts, as text.
    """

    model: str
    prompts: tuple[Prompt, ...]
    layers: tuple[Layer, ...] | None
    probabilities: Mapping[str, torch.Tensor] = field(repr=False)
    tokens: Mapping[str, tuple[str, ...]] = field(repr=False)
    record_file: ClassVar[str] = "targets.json"

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.probabilities:
            raise UnknownKeyError(
                f"there is no target {name!r}{suggest(str(name), self)}: the result has {', '.join(self)}"
            )
        return self.probabilities[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.probabilities)

    def __len__(self) -> int:
        return len(self.probabilities)

    def plot(self) -> Figure:
        """Plot curves by layer: the mean over prompts, and each prompt thin. Without a lens, plot bars."""
        title = self.prompts[0].text if len(self.prompts) == 1 else f"{len(self.prompts)} prompts"
        if self.layers is None:
            return bars(self.probabilities, title)
        return curves(self.probabilities, self.layers, title)

    def preview(self) -> Figure:
        return self.plot()

    def sections(self) -> list[Section]:
        if self.layers is None:
            columns = [values.tolist() for values in self.probabilities.values()]
            rows = {f"{i}. {p.text}": [_cell(c[i]) for c in columns] for i, p in enumerate(self.prompts)}
            return [TableSection("", "prompt", list(self), rows)]
        places, means = [str(one) for one in self.layers], {n: v.mean(0).tolist() for n, v in self.items()}
        found: list[Section] = [CurveSection("Mean over prompts", "layer", places, means)]
        if len(self.prompts) > 1:
            for i, prompt in enumerate(self.prompts):
                lines = {name: values[i].tolist() for name, values in self.items()}
                found.append(CurveSection(prompt.text, "layer", places, lines))
        return found

    def files(self) -> dict[str, Callable[[Path], None]]:
        tensors = {name: values.contiguous() for name, values in self.probabilities.items()}
        return {
            "targets.safetensors": partial(save_file, tensors),
            "targets.png": partial(write_figure, self.plot),
        }

    def record(self) -> dict[str, Any]:
        return {
            "lens": "run_prompts",
            "model": self.model,
            "prompts": [
                {"text": p.text, "targets": {n: list(t) for n, t in p.targets.items()}, "words": dict(p.words)}
                for p in self.prompts
            ],
            "layers": None if self.layers is None else list(self.layers),
            "tokens": {name: list(texts) for name, texts in self.tokens.items()},
        }


def _cell(probability: float) -> Cell:
    return Cell(f"{probability:.3f}", probability)


@repeatable
@where_the_model_is
def run_prompts(
    model: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    lens: Callable[..., LensPredictions] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    **arguments: Any,
) -> TargetProbabilities:
    """Return how likely the targets of `prompts` are as the next token: in the model's output, or by layer in a lens.

        run_prompts(model, prompts, lens=patchscope_lens, target=repeat_prompt())

    Args:
        model: The model.
        prompts: One prompt or several. Their targets must have the same names.
        lens: `logit_lens`, `patchscope_lens`, or a function like them. Default: the model's output.
        batch_size: The number of prompts in a batch. Default: 32, or that of the lens.
        progress: Whether to show a progress bar.
        arguments: Arguments of the lens, such as `layers`.

    Returns:
        The probabilities by name.

    Raises:
        InputError: Before anything runs, if the names of targets differ, or a target has no token.
    """
    prompts = list(prompts) if fits(prompts, Sequence[Any]) else [prompts]
    ids = _check(model, prompts)
    if lens is not None and not callable(lens):
        raise InputError(f"lens takes a function, such as lens=logit_lens, not {lens!r}")
    texts = [prompt.text for prompt in prompts]
    if lens is None:
        check_options(run_prompts, None, arguments)
        read = _output(model, texts, ids, 32 if batch_size is None else batch_size, progress)[:, None]
        layers = None
    else:
        arguments = {"positions": -1, "tokens": ids, "progress": progress} | arguments
        arguments |= {} if batch_size is None else {"batch_size": batch_size}
        result = lens(model, texts, **arguments)
        layers, read = result.layers, result.token_probabilities[:, :, -1]
    column = {token: i for i, token in enumerate(ids)}
    found = {
        name: torch.stack([read[i, :, [column[t] for t in p.targets[name]]].sum(-1) for i, p in enumerate(prompts)])
        for name in prompts[0].targets
    }
    if layers is None:
        found = {name: values[:, 0] for name, values in found.items()}
    spell = Spelling(model)
    names = {name: tuple(map(spell, dict.fromkeys(t for p in prompts for t in p.targets[name]))) for name in found}
    return TargetProbabilities(model.label, tuple(prompts), layers, found, names)


def _check(model: LanguageModel, prompts: list[Prompt]) -> tuple[int, ...]:
    """Check the prompts, and return the ids of all tokens to track."""
    check_language_model("run_prompts", model)
    if not prompts:
        raise InputError("there is no prompt: the list is empty")
    for prompt in prompts:
        if not isinstance(prompt, Prompt):
            raise InputError(
                f"run_prompts takes Prompt objects, not {prompt!r}: use Prompt.from_strings(text, targets, model)"
            )
        if prompt.targets.keys() != prompts[0].targets.keys():
            raise InputError(
                f"all prompts must have the same names of targets: {', '.join(prompts[0].targets)} in the first, "
                f"{', '.join(prompt.targets)} in {prompt.text!r}"
            )
        for name, tokens in prompt.targets.items():
            if isinstance(tokens, (str, int)):
                raise InputError(
                    f"the target {name!r} of {prompt.text!r} must be token ids, such as [17], not {tokens!r}. For "
                    "words, use Prompt.from_strings(text, targets, model)"
                )
        empty = [name for name, tokens in prompt.targets.items() if not len(tokens)]
        if empty or not prompt.targets:
            raise InputError(f"{prompt.text!r} has no tokens to track{f' under {empty[0]!r}' if empty else ''}")
    ids = dict.fromkeys(token for p in prompts for tokens in p.targets.values() for token in tokens)
    return choose_tokens(model, ids)


def _output(model: LanguageModel, texts: list[str], ids: tuple[int, ...], size: int, progress: bool) -> torch.Tensor:
    """Return the probabilities of tokens in the model's output, (prompts, tokens)."""
    batches, reader = open_batches(model, texts, -1, size), PredictionReader(model, 1, ids, keep_logits=False)
    for batch in tqdm(batches, desc="prompts", disable=not progress or len(batches) == 1):
        with torch.no_grad(), batch.run as run:
            rows, where = batch.indices
            logits = run.logits
            reader.add_logits(logits[rows.to(logits.device), where.to(logits.device)])
            run.stop()
    return reader.take(1)["token_probabilities"][0]
