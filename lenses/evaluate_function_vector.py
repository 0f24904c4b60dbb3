"""Measure how well a function vector makes a model carry out its task without examples.

scores = evaluate_function_vector(model, held_out, result)
scores.accuracy, scores.plain           # the share of right answers with the vector, and without it
scores.random                           # with a random vector of the same length
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from diffsight.lenses.demonstrations.few_shot_prompts import TEMPLATE, Pairs, answer_tokens, few_shot_prompts
from diffsight.lenses.function_vectors import FunctionVector
from diffsight.lenses.layers import choose_layer
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import Cell, Section, TableSection
from diffsight.lenses.steering import steer
from diffsight.lenses.tokens.batches import open_batches
from diffsight.lenses.tokens.choosing import check_count, check_language_model
from diffsight.lenses.tokens.token_text import Spelling
from diffsight.lenses.visits.steered import check_vector
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.seeds import as_seed


@dataclass(frozen=True, eq=False)
class FunctionVectorScores(LensResult):
    """The answers to questions without examples.

    Attributes:
        model: The name of the model.
        questions: The questions.
        answers: The first token of each right answer.
        with_vector: The first token of each answer with the vector.
        without: The first token of each answer without the vector.
        with_random: The first token of each answer with a random vector of the same length.
        layer: The layer to whose output the vector was added, at the last token.
        factor: The number that the vector was multiplied by.
    """

    model: str
    questions: tuple[str, ...] = field(repr=False)
    answers: tuple[str, ...] = field(repr=False)
    with_vector: tuple[str, ...] = field(repr=False)
    without: tuple[str, ...] = field(repr=False)
    with_random: tuple[str, ...] = field(repr=False)
    layer: int
    factor: float

    @property
    def accuracy(self) -> float:
        """The share of questions whose answer is right with the vector."""
        return self._share(self.with_vector)

    @property
    def plain(self) -> float:
        """The share of questions whose answer is right without the vector."""
        return self._share(self.without)

    @property
    def random(self) -> float:
        """The share of questions whose answer is right with a random vector of the same length."""
        return self._share(self.with_random)

    def _share(self, given: tuple[str, ...]) -> float:
        return sum(a == b for a, b in zip(given, self.answers)) / len(self.answers)

    def sections(self) -> list[Section]:
        columns = {"right": self.answers, "with the vector": self.with_vector, "without": self.without}
        columns["random vector"] = self.with_random
        rows = {q: [Cell(of[i]) for of in columns.values()] for i, q in enumerate(self.questions)}
        return [TableSection(f"{self.accuracy:.0%} right", "question", list(columns), rows)]

    def record(self) -> dict[str, Any]:
        kept = ("model", "layer", "factor", "accuracy", "plain", "random")
        lists = ("questions", "answers", "with_vector", "without", "with_random")
        record = {"lens": "evaluate_function_vector"} | {name: getattr(self, name) for name in kept}
        return record | {name: list(getattr(self, name)) for name in lists}


@repeatable
def evaluate_function_vector(
    model: LanguageModel,
    pairs: Pairs,
    vector: torch.Tensor | FunctionVector,
    *,
    layer: int | None = None,
    factor: float = 1.0,
    template: str = TEMPLATE,
    batch_size: int = 64,
    seed: int = 0,
) -> FunctionVectorScores:
    """Ask the questions of `pairs` without examples, and compare the answers with and without the vector.

        evaluate_function_vector(model, held_out, result)
        evaluate_function_vector(model, held_out, vector, layer=9)

    Args:
        model: The model.
        pairs: Questions and right answers, ideally not those that the vector was found with. An answer is right if its
            first token is the likeliest.
        vector: The vector, (features,), or the result of `function_vector`.
        layer: The layer to whose output it is added, at the last token. Default: the layer of the result, or the
            one after the first third of the layers.
        factor: Multiplies the vector.
        template: As in `function_vector`.
        batch_size: The number of prompts in a pass.
        seed: The seed of the random vector.

    Raises:
        InputError: Before anything runs, if an argument is not valid.
    """
    check_language_model("evaluate_function_vector", model)
    found = isinstance(vector, FunctionVector)
    count = len(model.layers_output)
    layer = choose_layer((vector.layer if found else count // 3) if layer is None else layer, count)
    direction = check_vector(vector.vector if found else vector)
    prompts = few_shot_prompts(pairs, 0, template=template)
    right, size = answer_tokens(model, prompts), check_count("batch_size", batch_size)
    other = torch.randn(len(direction), generator=torch.Generator().manual_seed(as_seed(seed)))
    other *= direction.norm().cpu() / other.norm()
    texts, spell = [prompt.text for prompt in prompts], Spelling(model)

    def answer(steered: LanguageModel) -> tuple[str, ...]:
        return tuple(map(spell, _likeliest(steered, texts, size)))

    return FunctionVectorScores(
        model=model.label,
        questions=tuple(texts),
        answers=tuple(map(spell, right)),
        with_vector=answer(steer(model, layer, direction, factor, positions=-1)),
        without=answer(model),
        with_random=answer(steer(model, layer, other, factor, positions=-1)),
        layer=layer,
        factor=float(factor),
    )


@torch.no_grad()
def _likeliest(model: LanguageModel, texts: list[str], size: int) -> list[int]:
    """Return the likeliest next token of each text."""
    found: list[int] = []
    for batch in open_batches(model, texts, -1, size):
        with batch.run as run:
            found += batch.pick(run.logits).argmax(-1).tolist()
    return found
