"""The predictions of a model at each layer and position, as a lens reads them.

result = logit_lens(model, "The Eiffel Tower is in the city of", tokens=[" Paris", " London"])
result.words[0][28]             # the prediction of layer 28, position by position
result.plot()                   # tokens by layer; result.curves() for the chosen tokens
result.save("lens")
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from diffsight.errors import InputError
from diffsight.lenses.layers import Layer
from diffsight.lenses.results.figure import write_figure
from diffsight.lenses.results.marked_text import marked
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import Cell, CurveSection, Section, TableSection
from diffsight.lenses.results.token_plots import curves, table, visible
from diffsight.pipelines.numbers import as_integer


@dataclass(frozen=True, eq=False)
class LensPredictions(LensResult):
    """Next-token predictions by prompt, layer and position.

    `save(folder)` writes `lens.json`, `lens.safetensors` with all tensors, and for each prompt `table_00.png` and, if
    tokens were chosen, `curves_00.png`.

    Attributes:
        lens: The name of the lens.
        model: The name of the model.
        prompts: The prompts.
        layers: Non-negative integers, and "embedding" for the input of the first layer.
        num_layers: The number of layers of the model.
        positions: Positions in each prompt, counted from 0, (prompts, positions). If a prompt has fewer positions than
            others, the rest are -1, and their probabilities NaN.
        inputs: The tokens at these positions, for each prompt.
        ids: The ids of the k most likely tokens, (prompts, layers, positions, k).
        probabilities: Their probabilities, (prompts, layers, positions, k).
        tokens: The ids of the chosen tokens.
        token_probabilities: Their probabilities, (prompts, layers, positions, tokens).
        logits: All logits, if they were kept, (prompts, layers, positions, vocabulary).
        texts: All token ids in the result as text.
    """

    lens: str
    model: str
    prompts: tuple[str, ...]
    layers: tuple[Layer, ...]
    num_layers: int
    positions: torch.Tensor = field(repr=False)
    inputs: tuple[tuple[str, ...], ...] = field(repr=False)
    ids: torch.Tensor = field(repr=False)
    probabilities: torch.Tensor = field(repr=False)
    tokens: tuple[int, ...] = ()
    token_probabilities: torch.Tensor | None = field(default=None, repr=False)
    logits: torch.Tensor | None = field(default=None, repr=False)
    texts: Mapping[int, str] = field(default_factory=dict, repr=False)

    @property
    def words(self) -> list[list[list[str]]]:
        """The most likely token by prompt, layer and position: `words[0][j]` belongs to `layers[j]`."""
        return [
            [[self.texts[token] for token in layer[: len(self.inputs[i])]] for layer in prompt]
            for i, prompt in enumerate(self.ids[..., 0].tolist())
        ]

    @property
    def token_names(self) -> list[str]:
        """The chosen tokens as figures show them, with their ids where two look the same."""
        names = [visible(self.texts[token]) for token in self.tokens]
        return [f"{name} ({token})" if names.count(name) > 1 else name for name, token in zip(names, self.tokens)]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, prompt: int) -> "LensPredictions":
        """Return the predictions of one prompt."""
        number = as_integer(prompt)
        if number is None:
            raise InputError(f"a result is indexed by the number of a prompt, such as result[0], not {prompt!r}")
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no prompt {prompt}: the number of prompts is {len(self)}")
        i, length = number % len(self), len(self.inputs[number])
        cut = {
            name: value[i : i + 1, :, :length]
            for name in ("ids", "probabilities", "token_probabilities", "logits")
            if (value := getattr(self, name)) is not None
        }
        return replace(
            self,
            prompts=self.prompts[i : i + 1],
            inputs=self.inputs[i : i + 1],
            positions=self.positions[i : i + 1, :length],
            **cut,
        )

    def plot(self, prompt: int = 0) -> Figure:
        """Plot the predictions of one prompt as a table of layers and positions, coloured by probability.

        If there is a single position, the columns are its k most likely tokens."""
        one = self[prompt]
        if one.positions.shape[1] > 1:
            words, shown = one.words[0], one.probabilities[0, :, :, 0]
            columns = [visible(text) for text in one.inputs[0]]
        else:
            words = [[self.texts[token] for token in layer[0]] for layer in one.ids[0].tolist()]
            shown = one.probabilities[0, :, 0]
            columns = [f"{k + 1}." for k in range(shown.shape[-1])]
        return table(words, shown, columns, self.layers, one.prompts[0])

    def curves(self, prompt: int = 0) -> Figure:
        """Plot the probabilities of the chosen tokens by layer, at the last of the positions.

        Raises:
            InputError: No tokens were chosen.
        """
        if self.token_probabilities is None:
            raise InputError(
                "there are no curves, because no tokens were chosen: pass tokens=[' Paris', …] to the lens"
            )
        one = self[prompt]
        lines = {name: one.token_probabilities[0, :, -1, i] for i, name in enumerate(self.token_names)}
        return curves(lines, self.layers, one.prompts[0])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors of the result by name."""
        names = ("positions", "ids", "probabilities", "token_probabilities", "logits")
        return {name: value.contiguous() for name in names if (value := getattr(self, name)) is not None}

    def preview(self) -> Figure:
        return self.plot()

    def sections(self) -> list[Section]:
        found: list[Section] = []
        for i, prompt in enumerate(self.prompts):
            found.append(self._table(i, prompt if len(self) > 1 else ""))
            if self.tokens:
                read = self[i].token_probabilities[0, :, -1].T.tolist()
                title = "Chosen tokens, at the last position" + (f": {prompt}" if len(self) > 1 else "")
                lines = dict(zip(self.token_names, read))
                found.append(CurveSection(title, "layer", [str(layer) for layer in self.layers], lines))
        return found

    def _table(self, prompt: int, title: str) -> TableSection:
        """Return the table of a prompt: a row for each layer, the last on top, and a column for each position. If there
        is a single position, the columns are its k most likely tokens."""
        one = self[prompt]
        columns = [marked(text) for text in one.inputs[0]]
        rows = {}
        for layer, ids, shares in zip(self.layers, one.ids[0].tolist(), one.probabilities[0].tolist()):
            tops = [[(marked(self.texts[token]), p) for token, p in zip(*place)] for place in zip(ids, shares)]
            shown = [[top] for top in tops[0]] if len(columns) == 1 else tops
            rows[str(layer)] = [Cell(*top[0], details=top) for top in shown]
        if len(columns) == 1:
            columns = [f"{k + 1}." for k in range(one.ids.shape[-1])]
        return TableSection(title, "layer", columns, dict(reversed(rows.items())))

    def files(self) -> dict[str, Callable[[Path], None]]:
        files: dict[str, Callable[[Path], None]] = {"lens.safetensors": partial(save_file, self.tensors())}
        for i in range(len(self)):
            files[f"table_{i:02}.png"] = partial(write_figure, partial(self.plot, i))
            if self.tokens:
                files[f"curves_{i:02}.png"] = partial(write_figure, partial(self.curves, i))
        return files

    def record(self) -> dict[str, Any]:
        return {
            "lens": self.lens,
            "model": self.model,
            "prompts": list(self.prompts),
            "layers": list(self.layers),
            "num_layers": self.num_layers,
            "inputs": [list(words) for words in self.inputs],
            "words": self.words,
            "tokens": [{"id": token, "text": self.texts[token]} for token in self.tokens],
        }
