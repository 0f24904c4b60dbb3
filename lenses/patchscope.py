"""Patchscopes: a hidden state, put into another prompt, that makes the model say what is in it.

    result = patchscope_lens(model, "The Eiffel Tower is in the city of", tokens=" Paris")
    result.words[0]                                     # by layer: what the model repeats
    patchscope_generate(model, "Diana, Princess of Wales", target=DESCRIPTION).texts[0]

The hidden state of a token of the source prompt, at each layer, takes the place of a token of the target prompt, at the
same layer (Ghandeharioun et al., "Patchscopes: A Unifying Framework for Inspecting Hidden Representations of Language
Models", ICML 2024, section 3).
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.results.saving import save_files, write_record
from diffsight.lenses.tokens.batches import (
    Batch,
    Layers,
    Tokens,
    as_prompts,
    check_count,
    check_model,
    choose,
    choose_layers,
    open_batches,
)
from diffsight.lenses.tokens.predictions import LensPredictions
from diffsight.lenses.tokens.reader import Reader, Sources, name_of, predictions
from diffsight.pipelines.language.model import LanguageModel, LanguageRun


@dataclass(frozen=True)
class TargetPrompt:
    """A prompt that a hidden state is put into, in the place of the token at `position`."""

    text: str
    position: int = -1


# Of the paper: few-shot token identity (section 4.1), and descriptions of entities (section 4.3).
IDENTITY = TargetPrompt("cat -> cat\n1135 -> 1135\nhello -> hello\n?")
DESCRIPTION = TargetPrompt(
    "Syria: Country in the Middle East, Leonardo DiCaprio: American actor, Samsung: South Korean multinational major "
    "appliance and consumer electronics corporation, x"
)

Target = TargetPrompt | Sequence[TargetPrompt]


def repeat_prompt(
    words: Sequence[str] = ("king", "1135", "hello"), between: str = " ", separator: str = "\n", placeholder: str = "?"
) -> TargetPrompt:
    """A target prompt that makes the model repeat: each word twice, then the placeholder.

    repeat_prompt(["cat", "1135", "hello"], between=" -> ") == IDENTITY
    """
    return TargetPrompt(separator.join([*(f"{word}{between}{word}" for word in words), placeholder]))


@dataclass(frozen=True)
class PatchscopeTexts:
    """What the model wrote: `texts[i][j]` with the hidden state of prompt i at layer `layers[j]`."""

    model: str
    prompts: tuple[str, ...]
    layers: tuple[int, ...]
    targets: tuple[TargetPrompt, ...] = field(repr=False)
    texts: tuple[tuple[str, ...], ...] = field(repr=False)

    def __str__(self) -> str:
        blocks = []
        for prompt, texts in zip(self.prompts, self.texts):
            blocks.append(prompt)
            blocks += [f"{layer:>4}  {text!r}" for layer, text in zip(self.layers, texts)]
        return "\n".join(blocks)

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `lens.json`, with everything that is in it; gives its path."""
        record = {
            "lens": "patchscope_generate",
            "model": self.model,
            "prompts": list(self.prompts),
            "layers": list(self.layers),
            "targets": [{"text": target.text, "position": target.position} for target in self.targets],
            "texts": [list(texts) for texts in self.texts],
        }
        return save_files(folder, {"lens.json": partial(write_record, record)})


def patchscope_lens(
    model: LanguageModel,
    prompts: Any,
    *,
    target: Target = IDENTITY,
    layers: Layers = None,
    target_layer: int | None = None,
    positions: int | Sequence[int] = -1,
    top_k: int = 5,
    tokens: Tokens = None,
    keep_logits: bool = False,
    batch_size: int = 16,
    progress: bool = True,
) -> LensPredictions:
    """Predictions of what follows the target prompt, with a hidden state of each of `prompts` put into it: that of the
    token at `positions` (one for all prompts, or one a prompt), of each of `layers` in turn, at the same layer or at
    `target_layer`. The result has the form of a logit lens's, see there for `top_k`, `tokens` and `keep_logits`.

        patchscope_lens(model, prompts, target=repeat_prompt(["cat", "1135"], " -> "), tokens=" Paris")

    `target` is one for all prompts, or one a prompt. In the place of prompts, hidden states of the shape (layers, n,
    features) can be given. `batch_size` is the number of rows, of which each prompt has one a layer.

    Raises InputError, before anything runs, for what is not there: a layer, a position, a token."""
    chosen, ids = choose("patchscope_lens", model, layers, tokens, top_k)
    patches = _Patches(model, prompts, positions, chosen, target, target_layer, batch_size)
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model._owner.forward).parameters else {}
    reader = Reader(model, top_k, ids, keep_logits)
    for run in patches.runs(None, progress, **keep):
        reader.add_logits(run.logits[:, -1])
        run.stop()
    read = {name: values.transpose(0, 1)[:, :, None] for name, values in reader.take(len(chosen)).items()}
    return predictions("patchscope_lens", model, chosen, ids, patches.sources, read)


def patchscope_generate(
    model: LanguageModel,
    prompts: Any,
    *,
    target: Target = DESCRIPTION,
    layers: Layers = None,
    target_layer: int | None = None,
    positions: int | Sequence[int] = -1,
    max_new_tokens: int = 20,
    batch_size: int = 16,
    progress: bool = True,
    **arguments: Any,
) -> PatchscopeTexts:
    """What the model writes after the target prompt, with hidden states of `prompts` put into it as in
    `patchscope_lens`: a text a prompt and layer. `arguments` go to `model.generate` (`do_sample=True`, `seed=0`).

        print(patchscope_generate(model, ["Diana, Princess of Wales"], layers=range(0, 20, 4)))

    Raises InputError, before anything runs, for what is not there."""
    check_model(model, "patchscope_generate")
    chosen = choose_layers(model, layers)
    arguments["max_new_tokens"] = check_count("max_new_tokens", max_new_tokens)
    patches = _Patches(model, prompts, positions, chosen, target, target_layer, batch_size)
    texts: list[str] = []
    for run in patches.runs(model.generate, progress, **arguments):
        texts += [run.text] if isinstance(run.text, str) else run.text
    each = len(patches.targets)
    return PatchscopeTexts(
        model=name_of(model),
        prompts=patches.sources.prompts,
        layers=chosen,
        targets=patches.targets,
        texts=tuple(tuple(texts[i::each]) for i in range(each)),
    )


class _Patches:
    """Which hidden states are put where: one of every prompt and layer, each into a row of its own. The rows are the
    target prompts of all prompts for the first layer, then for the next."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: Any,
        positions: int | Sequence[int],
        layers: tuple[int, ...],
        target: Target,
        target_layer: int | None,
        batch_size: int,
    ) -> None:
        if not model._owner.can_generate() or model._owner.config.is_encoder_decoder:
            raise InputError(f"a patchscope needs a decoder that writes, and {type(model._owner).__name__} is none")
        self._model, self._layers, self._size = model, layers, batch_size
        self._into = layers if target_layer is None else choose_layers(model, target_layer) * len(layers)
        self._batches: list[Batch] = []
        if isinstance(prompts, torch.Tensor) and prompts.is_floating_point():
            self._hidden = _checked(prompts, len(layers))
            count = prompts.shape[1]
            names = tuple(f"hidden state {i}" for i in range(count))
            self.sources = Sources(names, torch.zeros(count, 1, dtype=torch.long), (("",),) * count)
        else:
            prompts = as_prompts(prompts)
            each = positions if hasattr(positions, "__index__") else [[place] for place in positions]
            self._batches = open_batches(model, prompts, each, batch_size)
            self.sources = Sources.of(model, self._batches)
        self.targets = _targets(target, len(self.sources.prompts))

    def runs(self, opens: Callable[..., LanguageRun] | None, progress: bool, **arguments: Any) -> Iterator[LanguageRun]:
        """The runs over the target prompts, each with its hidden states put in."""
        rows = self.targets * len(self._layers)
        texts, places = [row.text for row in rows], [[row.position] for row in rows]
        batches = open_batches(self._model, texts, places, self._size, opens, **arguments)  # checks, before any runs
        self._collect()
        for batch in tqdm(batches, desc="patchscope", disable=not progress or len(batches) == 1):
            with torch.no_grad(), batch.run as run:
                self._put(batch, run)
                yield run

    def _collect(self) -> None:
        """The hidden states of the prompts, (layers, prompts, features)."""
        found: list[list[torch.Tensor]] = [[] for _ in self._layers]
        for batch in self._batches:
            with torch.no_grad(), batch.run as run:
                for layer, parts in zip(self._layers, found):
                    parts.append(batch.pick(run.layers_output[layer]))
                run.stop()
        if self._batches:
            self._hidden = torch.stack([torch.cat(parts) for parts in found])

    def _put(self, batch: Batch, run: LanguageRun) -> None:
        numbers = torch.arange(batch.start, batch.start + len(batch.where))
        of_layer, of_prompt = numbers // len(self.targets), numbers % len(self.targets)
        for i in of_layer.unique().tolist():
            rows = (of_layer == i).nonzero().flatten()
            hidden = self._model.hidden_layout.tokens_first(run.layers_output[self._into[i]])
            place = (rows.to(hidden.device), batch.where[rows, 0].to(hidden.device))
            hidden[place] = self._hidden[i, of_prompt[rows]].to(hidden)


def _targets(target: Target, count: int) -> tuple[TargetPrompt, ...]:
    """One target prompt for every prompt."""
    if isinstance(target, str):
        raise InputError(f"a target is a TargetPrompt: TargetPrompt({target!r}, position=-1)")
    targets = (target,) * count if isinstance(target, TargetPrompt) else tuple(target)
    if not all(isinstance(one, TargetPrompt) for one in targets):
        raise InputError("the target is a TargetPrompt, or one a prompt: TargetPrompt(text, position=-1)")
    if len(targets) != count:
        raise InputError(f"{len(targets)} target prompts are given, and there are {count} prompts")
    return targets


def _checked(hidden: torch.Tensor, layers: int) -> torch.Tensor:
    if hidden.ndim != 3 or len(hidden) != layers or not hidden.shape[1]:
        raise InputError(
            f"hidden states have the shape (layers, n, features), here ({layers}, n, features), not "
            f"{tuple(hidden.shape)}"
        )
    return hidden
