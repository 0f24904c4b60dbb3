"""Prompts that show a task by examples, and ask for one more answer.

    prompts = few_shot_prompts([("hot", "cold"), ("big", "small"), ("up", "down")], shots=2, count=3)
    prompts[0].text             # "Q: big\nA: small\n\nQ: up\nA: down\n\nQ: hot\nA:"
    prompts[0].answer           # " cold"
    prompts[0].shuffled         # the same with the answers of the examples in another order

The template comes from Todd et al., "Function Vectors in Large Language Models" (2024), section 2.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffsight.errors import InputError
from diffsight.lenses.tokens.choosing import check_count
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.numbers import as_integer
from diffsight.pipelines.seeds import as_seed

Pairs = Sequence[tuple[str, str]]
TEMPLATE = "Q: {}\nA:{}\n\n"


@dataclass(frozen=True)
class FewShotPrompt:
    """A prompt with examples of a task.

    Attributes:
        text: The prompt. The answer is what should come next.
        answer: The answer, with a space before it.
        shuffled: The prompt with the answers of the examples in another order, so that each is wrong. None if there are
            no examples.
    """

    text: str
    answer: str
    shuffled: str | None = field(default=None, repr=False)


def few_shot_prompts(
    pairs: Pairs, shots: int = 5, count: int | None = None, seed: int = 0, template: str = TEMPLATE
) -> list[FewShotPrompt]:
    """Return prompts of `shots` examples each, drawn from the other pairs.

    Args:
        pairs: Questions and their answers.
        shots: The number of examples in a prompt. 0 asks without any.
        count: The number of prompts. Default: one for each pair.
        seed: The seed for choosing examples.
        template: How an example is written: "{}" stands for the question, and for the answer with its space.

    Raises:
        InputError: The pairs are not pairs of texts, there are too few, or all examples of a prompt have the same
            answer.
    """
    pairs = check_pairs(pairs)
    if template.count("{}") != 2:
        raise InputError(f"a template must contain {{}} twice, for the question and the answer, unlike {template!r}")
    examples = as_integer(shots)
    if examples is None or examples < 0 or examples == 1:
        raise InputError(f"shots must be 2 or more, so that answers can be shuffled, or 0 for none, not {shots!r}")
    if examples >= len(pairs):
        raise InputError(f"{examples} examples and a question need {examples + 1} pairs, but there are {len(pairs)}")
    chosen, prompts = random.Random(as_seed(seed)), []
    for number in range(len(pairs) if count is None else check_count("count", count)):
        asked = pairs[number % len(pairs)]
        shown = chosen.sample([pair for pair in pairs if pair != asked], examples)
        answers = [answer for _, answer in shown]
        others = answers[1:] + answers[:1]  # each question gets the answer of the next
        if examples and answers == others:
            raise InputError(
                f"the examples of a prompt all have the answer {answers[0]!r}, so the answers cannot be shuffled"
            )
        question = template.format(asked[0], "\0").partition("\0")[0]
        shuffled = _written(template, zip((q for q, _ in shown), others)) + question if examples else None
        prompts.append(FewShotPrompt(_written(template, shown) + question, f" {asked[1]}", shuffled))
    return prompts


def check_pairs(pairs: Any) -> list[tuple[str, str]]:
    """Return the pairs with spaces around the texts removed. Raise InputError if they are not pairs of texts."""
    found = [tuple(pair) if isinstance(pair, (tuple, list)) else (pair,) for pair in pairs]
    for pair in found:
        if len(pair) != 2 or not all(isinstance(text, str) and text.strip() for text in pair):
            raise InputError(f"each pair must be a question and an answer, such as ('hot', 'cold'), not {pair!r}")
    if not found:
        raise InputError("there are no pairs")
    return list(dict.fromkeys((question.strip(), answer.strip()) for question, answer in found))


def answer_tokens(model: LanguageModel, prompts: Sequence[FewShotPrompt]) -> list[int]:
    """Return the first token of each answer, as it continues its prompt.

    Raises:
        InputError: The model has no tokenizer, or it merges the end of a prompt with the answer.
    """
    if model.tokenizer is None:
        raise InputError("answers need a tokenizer, but the model has none")
    found = []
    for prompt in prompts:
        before, whole = ([*model.tokenizer(text)["input_ids"]] for text in (prompt.text, prompt.text + prompt.answer))
        if whole[: len(before)] != before or len(whole) == len(before):
            raise InputError(
                f"the tokenizer does not separate the answer {prompt.answer!r} from the prompt: choose another template"
            )
        found.append(whole[len(before)])
    return found


def _written(template: str, pairs: Any) -> str:
    return "".join(template.format(question, f" {answer}") for question, answer in pairs)
