"""Patchscopes: put a hidden state into another prompt, and let the model say what is in it.

    result = patchscope_lens(model, "The Eiffel Tower is in the city of", tokens=" Paris")
    result.words[0]                                     # by layer: what the model repeats
    patchscope_generate(model, "Diana, Princess of Wales", target=DESCRIPTION).texts[0]

The hidden state of a token of the source prompt, at each layer, replaces that of a token of the target prompt at the
same layer (Ghandeharioun et al., "Patchscopes: A Unifying Framework for Inspecting Hidden Representations of Language
Models", ICML 2024, section 3).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.layers import Layer, Layers, choose_layer
from diffsight.lenses.options import check_options
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.marked_text import marked
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import Cell, Section, TableSection
from diffsight.lenses.tokens.batches import Batch, as_prompts, open_batches
from diffsight.lenses.tokens.choosing import (
    Tokens,
    check_count,
    check_language_model,
    hidden_states,
    layers_and_tokens,
    layers_to_read,
)
from diffsight.lenses.tokens.prediction_reader import PredictionReader
from diffsight.lenses.tokens.predictions import LensPredictions
from diffsight.lenses.tokens.sources import Sources
from diffsight.lenses.where_models_are import where_the_model_is
from diffsight.pipelines.argument_types import check_types, fits
from diffsight.pipelines.language.model import LanguageModel, LanguageRun
from diffsight.pipelines.numbers import unpacked


@dataclass(frozen=True)
class TargetPrompt:
    """A prompt that a hidden state is put into, in place of the token at `position`."""

    text: str
    position: int = -1


# From the paper: few-shot token identity (section 4.1), and descriptions of entities (section 4.3).
IDENTITY = TargetPrompt("cat -> cat\n1135 -> 1135\nhello -> hello\n?")
DESCRIPTION = TargetPrompt(
    "Syria: Country in the Middle East, Leonardo DiCaprio: American actor, Samsung: South Korean multinational major "
    "appliance and consumer electronics corporation, x"
)

Target = TargetPrompt | Sequence[TargetPrompt]


def repeat_prompt(
    words: str | Sequence[str] = ("king", "1135", "hello"),
    between: str = " ",
    separator: str = "\n",
    placeholder: str = "?",
) -> TargetPrompt:
    """Return a target prompt that makes the model repeat: each word twice, then the placeholder.

    repeat_prompt(["cat", "1135", "hello"], between=" -> ") == IDENTITY

    Raises InputError if there are no words.
    """
    words = [words] if isinstance(words, str) else list(words)
    if not words:
        raise InputError("repeat_prompt needs at least one word that the prompt repeats, such as repeat_prompt('cat')")
    return TargetPrompt(separator.join([*(f"{word}{between}{word}" for word in words), placeholder]))


@dataclass(frozen=True, eq=False)
class PatchscopeTexts(LensResult):
    """What the model generated. `print` shows it by prompt and layer; `save(folder)` writes `lens.json`.

    Attributes:
        model: The name of the model.
        prompts: The source prompts.
        layers: Non-negative integers, and "embedding" for the input of the first layer.
        targets: The target prompt of each source prompt.
        texts: `texts[i][j]` was generated with the hidden state of prompt i at `layers[j]`.
    """

    model: str
    prompts: tuple[str, ...]
    layers: tuple[Layer, ...]
    targets: tuple[TargetPrompt, ...] = field(repr=False)
    texts: tuple[tuple[str, ...], ...] = field(repr=False)

    def __str__(self) -> str:
        width = max(4, *(len(str(layer)) for layer in self.layers))
        blocks = []
        for prompt, texts in zip(self.prompts, self.texts):
            blocks.append(prompt)
            blocks += [f"{layer:>{width}}  {text!r}" for layer, text in zip(self.layers, texts)]
        return "\n".join(blocks)

    def sections(self) -> list[Section]:
        return [
            TableSection(prompt, "layer", ["text"], {str(i): [Cell(marked(t))] for i, t in zip(self.layers, texts)})
            for prompt, texts in zip(self.prompts, self.texts)
        ]

    def record(self) -> dict[str, Any]:
        return {
            "lens": "patchscope_generate",
            "model": self.model,
            "prompts": list(self.prompts),
            "layers": list(self.layers),
            "targets": [{"text": target.text, "position": target.position} for target in self.targets],
            "texts": [list(texts) for texts in self.texts],
        }


@repeatable
@where_the_model_is
def patchscope_lens(
    model: LanguageModel,
    prompts: Any,
    *,
    target: Target = IDENTITY,
    layers: Layers = None,
    target_layer: int | str | None = None,
    positions: int | Sequence[int] = -1,
    top_k: int = 5,
    tokens: Tokens = None,
    keep_logits: bool = False,
    batch_size: int = 16,
    progress: bool = True,
) -> LensPredictions:
    """Put a hidden state of each of `prompts` into a target prompt, and predict the next token.

        patchscope_lens(model, prompts, target=repeat_prompt(["cat", "1135"], " -> "), tokens=" Paris")

    Args:
        model: The model.
        prompts: The source prompts: a string, several strings, or token ids; or hidden states, (layers, n, features).
        target: The target prompt, or one for each source prompt.
        layers: The layers that hidden states are taken from, in turn. Layer i is the output of `layers[i]`, -1 the
            last, and "embedding" the input of the first. Default: all layers, without the embedding.
        target_layer: The layer that they are put into. Default: the same layer.
        positions: The position of the hidden state in the source prompt, one for all prompts or one for each.
        top_k: The number of most likely tokens to keep.
        tokens: Tokens whose probabilities to keep, as in `logit_lens`.
        keep_logits: Whether to keep all logits.
        batch_size: The number of rows in a batch. Each prompt has a row for each layer.
        progress: Whether to show a progress bar.

    Returns:
        The predictions by prompt and layer, in the form of a logit lens with one position.

    Raises:
        InputError: Before anything runs, if a layer, position or token does not exist.
    """
    check_types(patchscope_lens, positions=positions)
    chosen, ids, top_k = layers_and_tokens("patchscope_lens", model, layers, tokens, top_k)
    patches = _Patches(model, prompts, positions, chosen, target, target_layer, batch_size)
    keep = {"logits_to_keep": 1} if model.takes_argument("logits_to_keep") else {}
    reader = PredictionReader(model, top_k, ids, keep_logits)
    for run in patches.runs(None, progress, **keep):
        reader.add_logits(run.logits[:, -1])
        run.stop()
    read = {name: values.transpose(0, 1)[:, :, None] for name, values in reader.take(len(chosen)).items()}
    return patches.sources.predictions("patchscope_lens", model, chosen, ids, read)


@repeatable
@where_the_model_is
def patchscope_generate(
    model: LanguageModel,
    prompts: Any,
    *,
    target: Target = DESCRIPTION,
    layers: Layers = None,
    target_layer: int | str | None = None,
    positions: int | Sequence[int] = -1,
    max_new_tokens: int = 20,
    batch_size: int = 16,
    progress: bool = True,
    **arguments: Any,
) -> PatchscopeTexts:
    """Put hidden states of `prompts` into a target prompt, as in `patchscope_lens`, and generate text after it.

        print(patchscope_generate(model, ["Diana, Princess of Wales"], layers=range(0, 20, 4)))

    Args:
        max_new_tokens: The number of tokens to generate.
        arguments: Arguments of `model.generate`, such as `do_sample=True, seed=0`.

    The other arguments are those of `patchscope_lens`.

    Returns:
        A text for each prompt and layer.

    Raises:
        InputError: Before anything runs, if a layer or position does not exist.
    """
    check_language_model("patchscope_generate", model)
    check_options(patchscope_generate, model, arguments, also={"seed", *model.generation_argument_names})
    check_types(patchscope_generate, positions=positions)
    chosen = layers_to_read(model, layers)
    arguments["max_new_tokens"] = check_count("max_new_tokens", max_new_tokens)
    patches = _Patches(model, prompts, positions, chosen, target, target_layer, batch_size)
    texts: list[str] = []
    for run in patches.runs(model.generate, progress, **arguments):
        texts += [run.text] if isinstance(run.text, str) else run.text
    each = len(patches.targets)
    return PatchscopeTexts(
        model=model.label,
        prompts=patches.sources.prompts,
        layers=chosen,
        targets=patches.targets,
        texts=tuple(tuple(texts[i::each]) for i in range(each)),
    )


class _Patches:
    """The hidden states and the rows that they go into: one for each prompt and layer.

    The rows are the target prompts of all source prompts for the first layer, then for the next, and so on.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Any,
        positions: int | Sequence[int],
        layers: tuple[Layer, ...],
        target: Target,
        target_layer: int | str | None,
        batch_size: int,
    ) -> None:
        if not model.module.can_generate() or model.is_encoder_decoder:
            raise InputError(f"a patchscope needs a decoder that generates text, but {model.label} is not one")
        self._model, self._layers, self._size = model, layers, batch_size
        self._into = layers
        if target_layer is not None:
            self._into = (choose_layer(target_layer, len(model.layers_output)),) * len(layers)
        self._batches: list[Batch] = []
        if isinstance(prompts, torch.Tensor) and prompts.is_floating_point():
            self._hidden = _checked(prompts, len(layers))
            count = prompts.shape[1]
            names = tuple(f"hidden state {i}" for i in range(count))
            self.sources = Sources(names, torch.zeros(count, 1, dtype=torch.long), (("",),) * count)
        else:
            prompts = as_prompts(prompts)
            positions = unpacked(positions)
            each = [[place] for place in positions] if isinstance(positions, Iterable) else positions
            self._batches = open_batches(model, prompts, each, batch_size)
            self.sources = Sources.of(model, self._batches)
        self.targets = _targets(target, len(self.sources.prompts))

    def runs(
        self, open_run: Callable[..., LanguageRun] | None, progress: bool, **arguments: Any
    ) -> Iterator[LanguageRun]:
        """Yield the runs over the target prompts, each with its hidden states in place."""
        rows = self.targets * len(self._layers)
        texts, positions = [row.text for row in rows], [[row.position] for row in rows]
        # checks the prompts before any of them runs
        batches = open_batches(self._model, texts, positions, self._size, open_run, **arguments)
        self._collect()
        for batch in tqdm(batches, desc="patchscope", disable=not progress or len(batches) == 1):
            with torch.no_grad(), batch.run as run:
                self._put(batch, run)
                yield run

    def _collect(self) -> None:
        """Collect the hidden states of the source prompts, (layers, prompts, features)."""
        found: list[list[torch.Tensor]] = [[] for _ in self._layers]
        for batch in self._batches:
            with torch.no_grad(), batch.run as run:
                for layer, parts in zip(self._layers, found):
                    parts.append(batch.pick(hidden_states(run, layer)))
                run.stop()
        if self._batches:
            self._hidden = torch.stack([torch.cat(parts) for parts in found])

    def _put(self, batch: Batch, run: LanguageRun) -> None:
        """Put the hidden states of a batch's rows into its run, in place."""
        numbers = torch.arange(batch.start, batch.start + len(batch.where))
        of_layer, of_prompt = numbers // len(self.targets), numbers % len(self.targets)
        for i in of_layer.unique().tolist():
            rows = (of_layer == i).nonzero().flatten()
            hidden = self._model.hidden_layout.tokens_first(hidden_states(run, self._into[i]))
            place = (rows.to(hidden.device), batch.where[rows, 0].to(hidden.device))
            hidden[place] = self._hidden[i, of_prompt[rows]].to(hidden)


def _targets(target: Target, count: int) -> tuple[TargetPrompt, ...]:
    """Return one target prompt for each of `count` source prompts."""
    if isinstance(target, str):
        raise InputError(f"a target must be a TargetPrompt: TargetPrompt({target!r}, position=-1)")
    if not fits(target, Target):
        raise InputError("target must be a TargetPrompt, or one for each prompt: TargetPrompt(text, position=-1)")
    targets = (target,) * count if isinstance(target, TargetPrompt) else tuple(target)
    if len(targets) != count:
        raise InputError(f"there are {len(targets)} target prompts for {count} prompts: pass one for each, or one")
    return targets


def _checked(hidden: torch.Tensor, layers: int) -> torch.Tensor:
    if hidden.ndim != 3 or len(hidden) != layers or not hidden.shape[1]:
        raise InputError(
            f"hidden states must have the shape (layers, n, features), here ({layers}, n, features), not "
            f"{tuple(hidden.shape)}"
        )
    return hidden
