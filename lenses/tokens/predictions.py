"""What a lens makes a model predict, by layer and position.

result = logit_lens(model, "The Eiffel Tower is in the city of", tokens=[" Paris", " London"])
result.words[0][28]             # what layer 28 would say, position by position
result.plot()                   # token by layer; result.curves() of the chosen tokens
result.save("lens")
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from diffsight.errors import InputError
from diffsight.lenses.results import plots
from diffsight.lenses.results.saving import save_files, write_record


@dataclass(frozen=True)
class LensPredictions:
    """Next-token predictions by prompt, layer and position. `ids` and `probabilities`, both (prompts, layers,
    positions, k), are those of the k likeliest tokens; where `tokens` were chosen, `token_probabilities` are theirs,
    (prompts, layers, positions, tokens). `positions`, (prompts, positions), count the tokens of each prompt from 0 on;
    where a prompt has fewer than others, they are -1, and probabilities NaN. `inputs` are the prompts' tokens there."""

    lens: str
    model: str
    prompts: tuple[str, ...]
    layers: tuple[int, ...]
    positions: torch.Tensor = field(repr=False)
    inputs: tuple[tuple[str, ...], ...] = field(repr=False)
    ids: torch.Tensor = field(repr=False)
    probabilities: torch.Tensor = field(repr=False)
    tokens: tuple[int, ...] = ()
    token_probabilities: torch.Tensor | None = field(default=None, repr=False)
    logits: torch.Tensor | None = field(default=None, repr=False)
    texts: Mapping[int, str] = field(default_factory=dict, repr=False)  # of all tokens in it, by their ids

    @property
    def words(self) -> list[list[list[str]]]:
        """The likeliest token by prompt, layer and position."""
        return [
            [[self.texts[token] for token in layer[: len(self.inputs[i])]] for layer in prompt]
            for i, prompt in enumerate(self.ids[..., 0].tolist())
        ]

    @property
    def token_names(self) -> list[str]:
        """The chosen tokens as they are shown; with their ids where two look the same."""
        names = [plots.visible(self.texts[token]) for token in self.tokens]
        return [f"{name} ({token})" if names.count(name) > 1 else name for name, token in zip(names, self.tokens)]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, prompt: int) -> "LensPredictions":
        """The same of one prompt."""
        if not -len(self) <= prompt < len(self):
            raise IndexError(f"there is no prompt {prompt} in {len(self)}")
        i, length = prompt % len(self), len(self.inputs[prompt])
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
        """The table of one prompt: what each layer would say at each position, coloured by its probability. Of a
        single position the k likeliest tokens."""
        one = self[prompt]
        if one.positions.shape[1] > 1:
            words, shown = one.words[0], one.probabilities[0, :, :, 0]
            columns = [f"{plots.visible(text)}" for text in one.inputs[0]]
        else:
            words = [[self.texts[token] for token in layer[0]] for layer in one.ids[0].tolist()]
            shown = one.probabilities[0, :, 0]
            columns = [f"{k + 1}." for k in range(shown.shape[-1])]
        return plots.table(words, shown, columns, self.layers, one.prompts[0])

    def curves(self, prompt: int = 0) -> Figure:
        """The probabilities of the chosen tokens by layer, at the last of the positions."""
        if self.token_probabilities is None:
            raise InputError("no tokens were chosen, so there are no curves: give the lens tokens=[' Paris', …]")
        one = self[prompt]
        lines = {name: one.token_probabilities[0, :, -1, i] for i, name in enumerate(self.token_names)}
        return plots.curves(lines, self.layers, one.prompts[0])

    def numbers(self) -> dict[str, torch.Tensor]:
        """All tensors in it, by their names."""
        names = ("positions", "ids", "probabilities", "token_probabilities", "logits")
        return {name: value.contiguous() for name in names if (value := getattr(self, name)) is not None}

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `lens.json`, which tells what it is and the words, `lens.safetensors` with all numbers, and pictures
        a prompt (`table_00.png`, `curves_00.png`); gives the paths. All files are written or none."""
        record = {
            "lens": self.lens,
            "model": self.model,
            "prompts": list(self.prompts),
            "layers": list(self.layers),
            "inputs": [list(words) for words in self.inputs],
            "words": self.words,
            "tokens": [{"id": token, "text": self.texts[token]} for token in self.tokens],
        }
        files = {"lens.json": partial(write_record, record), "lens.safetensors": partial(save_file, self.numbers())}
        for i in range(len(self)):
            files[f"table_{i:02}.png"] = partial(plots.write, partial(self.plot, i))
            if self.tokens:
                files[f"curves_{i:02}.png"] = partial(plots.write, partial(self.curves, i))
        return save_files(folder, files)

    def _repr_png_(self) -> bytes:
        return self.plot()._repr_png_()
