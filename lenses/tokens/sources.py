"""The prompts and positions that a lens reads, as its predictions record them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from diffsight.lenses.layers import Layer
from diffsight.lenses.tokens.batches import Batch, join
from diffsight.lenses.tokens.predictions import LensPredictions
from diffsight.lenses.tokens.token_text import Spelling
from diffsight.pipelines.language.model import LanguageModel


@dataclass(frozen=True, eq=False)
class Sources:
    """Prompts, the chosen positions in them, (prompts, positions), and the tokens at these positions as text."""

    prompts: tuple[str, ...]
    positions: torch.Tensor
    inputs: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, model: LanguageModel, batches: list[Batch]) -> "Sources":
        """Return the sources of all batches."""
        spell = Spelling(model)
        prompts, inputs = [], []
        for batch in batches:
            tokens = batch.run.tokens.cpu()
            mask = torch.ones_like(tokens) if batch.run.mask is None else batch.run.mask.cpu()
            for row, real, read, where, chosen in zip(
                tokens, mask.bool(), batch.tokens.cpu(), batch.where, batch.chosen
            ):
                prompts.append(spell.text(row[real].tolist()))
                inputs.append(tuple(map(spell, read[where[chosen]].tolist())))
        return cls(tuple(prompts), join([batch.positions for batch in batches], 1), tuple(inputs))

    def predictions(
        self,
        lens: str,
        model: LanguageModel,
        layers: tuple[Layer, ...],
        tokens: tuple[int, ...],
        read: Mapping[str, torch.Tensor],
    ) -> LensPredictions:
        """Return the result of a lens.

        Args:
            lens: The name of the lens.
            model: The model.
            layers: The layers that were read.
            tokens: The ids of the chosen tokens.
            read: The tensors that a PredictionReader read, by name, (prompts, layers, positions, ...).
        """
        spell = Spelling(model)
        ids = {*read["ids"].flatten().tolist(), *tokens} - {-1}
        return LensPredictions(
            lens=lens,
            model=model.label,
            prompts=self.prompts,
            layers=layers,
            num_layers=len(model.layers_output),
            positions=self.positions,
            inputs=self.inputs,
            tokens=tokens,
            texts={token: spell(token) for token in sorted(ids)},
            **read,
        )
