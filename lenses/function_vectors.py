"""Function vectors: the sum of a few heads' outputs that makes a model carry out a task without examples.

    antonyms = [("hot", "cold"), ("big", "small"), ("up", "down"), …]
    result = function_vector(model, antonyms)
    result.plot()                                           # which heads carry the task
    result.heads                                            # ((12, 3), (9, 0), …): the layer and the number of each
    evaluate_function_vector(model, held_out, result)       # accuracy without examples, with and without the vector
    steer(model, result.layer, result.vector, positions=-1).generate("Q: long\\nA:").text

Let a(h) be the mean output of head h at the last token of prompts that show the task by examples. The causal effect of
the head is the rise in the probability of the right answer when a(h) replaces the head's output in a prompt whose
examples have shuffled answers. The vector is the sum of what the strongest heads add to the residual stream on average
(Todd et al., "Function Vectors in Large Language Models", 2024, section 2).
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.demonstrations.few_shot_prompts import (
    TEMPLATE,
    FewShotPrompt,
    Pairs,
    answer_tokens,
    few_shot_prompts,
)
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.effect_plots import effect_map
from diffsight.lenses.results.figure import write_figure
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import HeatMapSection, Section
from diffsight.lenses.tokens.batches import open_batches
from diffsight.lenses.tokens.choosing import check_count, check_language_model
from diffsight.lenses.tracing.stored_starts import can_start_from
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.numbers import as_integer, unpacked

Head = tuple[int, int]


@dataclass(frozen=True, eq=False)
class FunctionVector(LensResult):
    """A function vector, and the effect of every head.

    `save(folder)` writes `effects.png`, `function_vector.safetensors` and `lens.json`.

    Attributes:
        model: The name of the model.
        vector: The vector, (features,).
        heads: The heads whose outputs it sums, as (layer, head), the strongest first.
        layer: The layer to whose output to add the vector: the one after the first third of the layers.
        effects: The mean causal effect of each head, (layers, heads), from -1 to 1.
        errors: The standard error of the effect over the prompts, (layers, heads).
        pairs: The pairs that show the task.
        baseline: The mean probability of the right answer after shuffled examples.
        clean: The mean probability of the right answer after right examples.
        passes: The number of forward passes.
    """

    model: str
    vector: torch.Tensor = field(repr=False)
    heads: tuple[Head, ...]
    layer: int
    effects: torch.Tensor = field(repr=False)
    errors: torch.Tensor = field(repr=False)
    pairs: tuple[tuple[str, str], ...] = field(repr=False)
    baseline: float
    clean: float
    passes: int

    def top(self, count: int) -> list[tuple[Head, float]]:
        """Return the heads with the largest effects, and their effects."""
        return [(head, float(self.effects[head])) for head in strongest_heads(self.effects, count)]

    def plot(self) -> Figure:
        """Plot the effect of each head, a row for each layer."""
        layers, heads = (list(map(str, range(count))) for count in self.effects.shape)
        return effect_map(self.effects, layers, heads, "head", self._title(), "rise in probability")

    def preview(self) -> Figure:
        return self.plot()

    def sections(self) -> list[Section]:
        layers, heads = (list(map(str, range(count))) for count in self.effects.shape)
        return [HeatMapSection(self._title(), layers, heads, self.effects, "rise in probability", ("layer", "head"))]

    def files(self) -> dict[str, Callable[[Path], None]]:
        tensors = {"vector": self.vector, "effects": self.effects, "errors": self.errors}
        return {
            "function_vector.safetensors": partial(save_file, {n: t.contiguous() for n, t in tensors.items()}),
            "effects.png": partial(write_figure, self.plot),
        }

    def record(self) -> dict[str, Any]:
        return {
            "lens": "function_vector",
            "model": self.model,
            "heads": [list(head) for head in self.heads],
            "layer": self.layer,
            "baseline": self.baseline,
            "clean": self.clean,
            "passes": self.passes,
            "pairs": [list(pair) for pair in self.pairs],
        }

    def _title(self) -> str:
        shown = ", ".join(f"{question} → {answer}" for question, answer in self.pairs[:3])
        return f"{shown}{', …' if len(self.pairs) > 3 else ''}"


@repeatable
def function_vector(
    model: LanguageModel,
    pairs: Pairs,
    *,
    shots: int = 5,
    prompts: int | None = None,
    heads: int | Sequence[Head] = 10,
    template: str = TEMPLATE,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> FunctionVector:
    """Find the heads that carry a task, and the vector that they write.

        function_vector(model, [("hot", "cold"), ("big", "small"), …])
        function_vector(model, pairs, heads=[(12, 3), (9, 0)])              # of these heads

    Args:
        model: A decoder.
        pairs: Questions and their answers.
        shots: The number of examples in a prompt.
        prompts: The number of prompts. Default: one for each pair.
        heads: The number of strongest heads to sum, or the heads themselves.
        template: How an example is written, see `few_shot_prompts`.
        batch_size: The number of rows in a pass.
        seed: The seed of the choice of examples.
        progress: Whether to show a progress bar.

    Returns:
        The vector, and the effects of all heads.

    Raises:
        InputError: Before anything runs, if the pairs are not valid or too few, the tokenizer does not separate
            answers from prompts, or a head does not exist.
    """
    check_language_model("function_vector", model)
    if model.is_encoder_decoder:
        raise InputError("function_vector takes a decoder, not an encoder-decoder model")
    made = few_shot_prompts(pairs, shots, prompts, seed, template)
    if not shots:
        raise InputError("function_vector needs examples: shots must be 2 or more")
    answers, batch_size = answer_tokens(model, made), check_count("batch_size", batch_size)
    means = head_means(model, made, batch_size)
    heads = unpacked(heads)
    chosen = _check_heads(heads, means.outputs.shape[:2]) if isinstance(heads, Iterable) else None
    if chosen is None:
        heads = check_count("heads", heads, means.outputs.shape[0] * means.outputs.shape[1])
    effects, baseline = head_effects(model, made, answers, means, batch_size, progress)
    mean = effects.mean(-1)
    chosen = chosen or strongest_heads(mean, heads)
    clean = probabilities(model, [prompt.text for prompt in made], answers, batch_size)
    return FunctionVector(
        model=model.label,
        vector=sum(means.results[head] for head in chosen),
        heads=chosen,
        layer=len(model.layers_output) // 3,
        effects=mean,
        errors=effects.std(-1) / len(made) ** 0.5,
        pairs=tuple(dict.fromkeys((q.strip(), a.strip()) for q, a in pairs)),
        baseline=float(baseline.mean()),
        clean=float(clean.mean()),
        passes=_count_passes(len(made), batch_size, means.outputs.shape[:2]),
    )


# ---- the pieces


@dataclass(frozen=True)
class HeadMeans:
    """The mean output of every head at the last token.

    Attributes:
        outputs: Probabilities times values, (layers, heads, features of a head).
        results: What each head adds to the residual stream, (layers, heads, features).
    """

    outputs: torch.Tensor
    results: torch.Tensor


@torch.no_grad()
def head_means(model: LanguageModel, prompts: Sequence[FewShotPrompt], batch_size: int = 64) -> HeadMeans:
    """Return the mean output of every head at the last token of the prompts."""
    sums: list[torch.Tensor] = []
    for batch in open_batches(model, [prompt.text for prompt in prompts], -1, batch_size):
        with batch.run as run:
            found = []
            for layer in range(len(model.layers_output)):
                outputs = batch.pick(run.heads_output[layer]).sum(0)
                found.append((outputs.float().cpu(), batch.pick(run.heads_result[layer]).sum(0).float().cpu()))
            run.stop()
        parts = [torch.stack(list(kind)) for kind in zip(*found)]
        sums = parts if not sums else [total + part for total, part in zip(sums, parts)]
    return HeadMeans(*(total / len(prompts) for total in sums))


@torch.no_grad()
def head_effects(
    model: LanguageModel,
    prompts: Sequence[FewShotPrompt],
    answers: Sequence[int],
    means: HeadMeans,
    batch_size: int = 64,
    progress: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the causal effect of every head on each prompt, (layers, heads, prompts), and the probability of the
    answer without a change, (prompts,).

    The heads of a layer are rows of one pass, which begins at the stored input of that layer where the model allows
    it."""
    layers, heads = means.outputs.shape[:2]
    size = max(1, batch_size // heads)
    effects, baselines = [], []
    with tqdm(desc="heads", total=layers * -(-len(prompts) // size), disable=not progress) as bar:
        for start in range(0, len(prompts), size):
            texts = [prompt.shuffled for prompt in prompts[start : start + size]]
            ids = torch.tensor(answers[start : start + size])
            inputs, logits = _inputs_of_layers(model, texts)
            plain = _of_answers(logits.float().cpu(), ids)
            baselines.append(plain)
            of_batch, starts = [], can_start_from(model, texts, inputs[-1], logits)
            for layer in range(layers):
                given = inputs[layer] if starts else None
                found = _patched(model, texts, ids, layer, given, means.outputs[layer])
                of_batch.append(found - plain)
                bar.update()
            effects.append(torch.stack(of_batch))
    return torch.cat(effects, -1), torch.cat(baselines)


def probabilities(
    model: LanguageModel, texts: Sequence[str], answers: Sequence[int], batch_size: int = 64
) -> torch.Tensor:
    """Return the probability of each answer as the next token, (prompts,)."""
    found = []
    for batch in open_batches(model, list(texts), -1, batch_size):
        with torch.no_grad(), batch.run as run:
            logits = batch.pick(run.logits).float().cpu()
        found.append(_of_answers(logits, torch.tensor(answers[batch.start : batch.start + len(logits)])))
    return torch.cat(found)


def strongest_heads(effects: torch.Tensor, count: int) -> tuple[Head, ...]:
    """Return the heads with the largest effects, (layers, heads), as (layer, head)."""
    order = effects.flatten().argsort(descending=True)[:count].tolist()
    return tuple(divmod(place, effects.shape[1]) for place in order)


def _count_passes(prompts: int, batch_size: int, shape: Sequence[int]) -> int:
    """Return the number of passes: those for the means and the clean prompts, and for each batch of shuffled prompts a
    plain run, a trial and a pass for each layer."""
    layers, heads = shape
    return 2 * -(-prompts // batch_size) + (layers + 2) * -(-prompts // max(1, batch_size // heads))


def _inputs_of_layers(model: LanguageModel, texts: list[str]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the input of each layer, and the logits at the last tokens, (texts, vocabulary)."""
    (batch,) = open_batches(model, texts, -1, len(texts))
    with batch.run as run:
        inputs = [run.layers_input[layer].clone() for layer in range(len(model.layers_output))]
        logits = batch.pick(run.logits)
    return inputs, logits


def _patched(
    model: LanguageModel,
    texts: list[str],
    answers: torch.Tensor,
    layer: int,
    given: torch.Tensor | None,
    means: torch.Tensor,
) -> torch.Tensor:
    """Return the probability of each answer when the mean of a head replaces its output, (heads, prompts).

    `given` is the input of the layer for each text. None runs the layers before it."""
    count = len(means)
    (batch,) = open_batches(model, [text for text in texts for _ in range(count)], -1, len(texts) * count)
    rows, where = batch.indices
    heads = torch.arange(count).repeat(len(texts))
    with batch.run as run:
        if layer and given is not None:
            run.skip_layers(0, layer - 1, given.repeat_interleave(count, 0))
        outputs = run.heads_output[layer].clone()
        outputs[rows, where, heads] = means[heads].to(outputs)
        run.heads_output[layer] = outputs
        logits = batch.pick(run.logits).float().cpu()
    return _of_answers(logits, answers.repeat_interleave(count)).reshape(len(texts), count).T


def _of_answers(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1)[torch.arange(len(answers)), answers]


def _check_heads(heads: Sequence[Head], shape: Sequence[int]) -> tuple[Head, ...]:
    found = []
    for head in heads:
        numbers = [as_integer(number) for number in unpacked(head)] if isinstance(head, Collection) else []
        if len(numbers) != 2 or None in numbers:
            raise InputError(f"a head is a layer and a number, such as (12, 3), not {head!r}")
        if not all(-size <= number < size for number, size in zip(numbers, shape)):
            raise InputError(f"there is no head {tuple(numbers)}: the model has {shape[0]} layers of {shape[1]} heads")
        found.append((numbers[0] % shape[0], numbers[1] % shape[1]))
    if not found:
        raise InputError("no heads are chosen")
    return tuple(dict.fromkeys(found))
