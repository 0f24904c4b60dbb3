"""Token tracking: how likely a model finds some words as what comes next.

    targets = {"right": "Paris", "traps": ["London", "Madrid"], "long": "the country of France"}
    prompt = Prompt.from_strings("The capital of France (not England or Spain) is", targets, model)
    run_prompts(model, [prompt])["right"]                       # (prompts,)
    run_prompts(model, [prompt], lens=logit_lens).plot()        # by layer

A word counts by its first token, once as it begins a text and once as it follows a space: " Paris" and "Paris", the
probabilities summed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.results import plots
from diffsight.lenses.results.saving import save_files, write_record
from diffsight.lenses.tokens.batches import check_model, choose_tokens, open_batches
from diffsight.lenses.tokens.predictions import LensPredictions
from diffsight.lenses.tokens.reader import Reader, Spelling, name_of
from diffsight.pipelines.language.model import LanguageModel

Words = str | Sequence[str]
_BEFORE = ("\n", "🍐")  # what a word is put behind, so that no tokenizer adds a space of its own


def first_tokens(words: Words, model: LanguageModel) -> tuple[int, ...]:
    """The first tokens of words, each with and without a space before it; without doublets, in order.

    first_tokens(["London", "Madrid"], model)       # " London", "London", " Madrid", "Mad"

    Raises InputError for an empty word, and where the tokenizer does not tell words from what stands before them."""
    words = [words] if isinstance(words, str) else list(words)
    if not words:
        raise InputError("there is no word to track: the list is empty")
    if model.tokenizer is None:
        raise InputError(
            "words need a tokenizer, and the model has none: give token ids, Prompt(text, {'right': [17]})"
        )
    found = []
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise InputError(f"a word to track is a text that is not empty, not {word!r}")
        found += [token for form in (f" {word.strip()}", word.strip()) for token in _first(model.tokenizer, form)]
    return tuple(dict.fromkeys(found))


def _first(tokenizer: Any, form: str) -> list[int]:
    """The first token of a form that stands within a text; none, if that is the space alone."""
    for before in _BEFORE:
        known = tokenizer(before, add_special_tokens=False)["input_ids"]
        ids = tokenizer(before + form, add_special_tokens=False)["input_ids"]
        if ids[: len(known)] == known and len(ids) > len(known):
            first = ids[len(known)]
            piece = tokenizer.convert_ids_to_tokens(first)
            return [] if piece.strip("▁Ġ ") == "" else [first]
    raise InputError(f"the tokenizer does not say where {form!r} begins within a text: give token ids")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the tokens to track as what comes next: name to token ids, whose probabilities are summed."""

    text: str
    targets: Mapping[str, Sequence[int]]
    words: Mapping[str, Words] = field(default_factory=dict)

    @classmethod
    def from_strings(cls, text: str, targets: Words | Mapping[str, Words], model: LanguageModel) -> "Prompt":
        """A prompt whose targets are words: name to a word or several; or words alone, under the name "target"."""
        words = targets if isinstance(targets, Mapping) else {"target": targets}
        return cls(text, {name: first_tokens(some, model) for name, some in words.items()}, dict(words))

    @property
    def shared_tokens(self) -> dict[int, tuple[str, ...]]:
        """The tokens that belong to more than one target, and which: those cannot be told apart."""
        names: dict[int, tuple[str, ...]] = {}
        for name, tokens in self.targets.items():
            for token in tokens:
                names[token] = (*names.get(token, ()), name)
        return {token: of for token, of in names.items() if len(of) > 1}


@dataclass(frozen=True)
class TargetProbabilities(Mapping):
    """The probabilities of the targets by name: `result["right"]`, (prompts,), or of a lens (prompts, layers)."""

    model: str
    prompts: tuple[Prompt, ...]
    layers: tuple[int, ...] | None
    probabilities: Mapping[str, torch.Tensor] = field(repr=False)
    tokens: Mapping[str, tuple[str, ...]] = field(repr=False)  # of all prompts, as texts

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.probabilities[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.probabilities)

    def __len__(self) -> int:
        return len(self.probabilities)

    def plot(self) -> Figure:
        """Curves by layer: the mean over prompts, each prompt thin; without a lens, a bar a target."""
        title = self.prompts[0].text if len(self.prompts) == 1 else f"{len(self.prompts)} prompts"
        if self.layers is None:
            return plots.bars(self.probabilities, title)
        return plots.curves(self.probabilities, self.layers, title)

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `targets.json`, `targets.safetensors` and `targets.png`; gives their paths."""
        record = {
            "lens": "run_prompts",
            "model": self.model,
            "prompts": [
                {"text": p.text, "targets": {n: list(t) for n, t in p.targets.items()}, "words": dict(p.words)}
                for p in self.prompts
            ],
            "layers": None if self.layers is None else list(self.layers),
            "tokens": {name: list(texts) for name, texts in self.tokens.items()},
        }
        numbers = {name: values.contiguous() for name, values in self.probabilities.items()}
        files = {
            "targets.json": partial(write_record, record),
            "targets.safetensors": partial(save_file, numbers),
            "targets.png": partial(plots.write, self.plot),
        }
        return save_files(folder, files)

    def _repr_png_(self) -> bytes:
        return self.plot()._repr_png_()


def run_prompts(
    model: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    lens: Callable[..., LensPredictions] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    **arguments: Any,
) -> TargetProbabilities:
    """How likely the targets of `prompts` are as the next token: what the model says, or by layer what a lens says.

        run_prompts(model, prompts, lens=patchscope_lens, target=repeat_prompt())

    `lens` is `logit_lens`, `patchscope_lens` or a function like them, `arguments` go to it, and `batch_size` if it is
    given. All prompts have targets of the same names.

    Raises InputError, before anything runs, where they have not, or a target has no token."""
    prompts = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    ids = _check(model, prompts)
    texts = [prompt.text for prompt in prompts]
    if lens is None:
        layers, read = None, _say(model, texts, ids, 32 if batch_size is None else batch_size, progress)[:, None]
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
    return TargetProbabilities(name_of(model), tuple(prompts), layers, found, names)


def _check(model: LanguageModel, prompts: list[Prompt]) -> tuple[int, ...]:
    """All tokens that are tracked."""
    check_model(model, "run_prompts")
    if not prompts:
        raise InputError("there is no prompt: the list is empty")
    for prompt in prompts:
        if not isinstance(prompt, Prompt):
            raise InputError(f"run_prompts takes Prompts, as Prompt.from_strings(text, targets, model), not {prompt!r}")
        if prompt.targets.keys() != prompts[0].targets.keys():
            raise InputError(
                f"all prompts have targets of the same names: {', '.join(prompts[0].targets)} in the first, "
                f"{', '.join(prompt.targets)} in {prompt.text!r}"
            )
        empty = [name for name, tokens in prompt.targets.items() if not len(tokens)]
        if empty or not prompt.targets:
            raise InputError(f"{prompt.text!r} has no tokens to track{f' under {empty[0]!r}' if empty else ''}")
    ids = dict.fromkeys(token for p in prompts for tokens in p.targets.values() for token in tokens)
    return choose_tokens(model, ids)


def _say(model: LanguageModel, texts: list[str], ids: tuple[int, ...], size: int, progress: bool) -> torch.Tensor:
    """What the model itself says, (prompts, tokens)."""
    batches, reader = open_batches(model, texts, -1, size), Reader(model, 1, ids, keep_logits=False)
    for batch in tqdm(batches, desc="prompts", disable=not progress or len(batches) == 1):
        with torch.no_grad(), batch.run as run:
            rows, where = batch.places
            logits = run.logits
            reader.add_logits(logits[rows.to(logits.device), where.to(logits.device)])
            run.stop()
    return reader.take(1)["token_probabilities"][0]
