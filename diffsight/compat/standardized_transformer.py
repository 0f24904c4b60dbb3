"""nnterp's `StandardizedTransformer`, a `LanguageModel` with nnterp's names.

model = StandardizedTransformer("gpt2", enable_attention_probs=True)
with model.trace("The cat sat on the mat"):
    hidden = model.layers_output[5].save()
    probabilities = model.attention_probabilities[5].save()
    logits = model.logits.save()
"""

from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.extending import run_meant_by


class StandardizedNames:
    """The arguments and attributes that nnterp's `StandardizedTransformer` adds to `LanguageModel`.

    Args:
        source: As for `LanguageModel`.
        enable_attention_probs: Whether to load an attention implementation whose probabilities can be read.
        check_renaming, allow_dispatch, check_attn_probs_with_trace: Have no effect; names are always checked.
        kwargs: As for `LanguageModel`.
    """

    def __init__(
        self,
        source: Any,
        *args: Any,
        enable_attention_probs: bool = False,
        check_renaming: bool = True,
        allow_dispatch: bool = True,
        check_attn_probs_with_trace: bool = True,
        rename_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if rename_config is not None:
            raise InputError('rename_config is not supported: pass names={"self_attn": ..., "mlp": ...}')
        if enable_attention_probs and isinstance(source, str):
            kwargs.setdefault("attn_implementation", "eager")
        super().__init__(source, *args, **kwargs)

    @property
    def attentions(self) -> list[Any]:
        """The attention of each layer."""
        return [layer.self_attn for layer in self.layers]

    @property
    def mlps(self) -> list[Any]:
        """The MLP of each layer."""
        return [layer.mlp for layer in self.layers]

    @property
    def attention_probabilities(self) -> Any:
        """The attention probabilities of each layer, `(rows, heads, queries, keys)`."""
        return self.attention_probs

    @property
    def attn_probs_available(self) -> bool:
        """Whether the model computes attention probabilities."""
        return self.config.get_text_config()._attn_implementation == "eager"

    @property
    def input_ids(self) -> torch.Tensor:
        """The token ids of the run's inputs, `(rows, tokens)`."""
        return run_meant_by(self, "input_ids").tokens

    @property
    def input_size(self) -> torch.Size:
        """The numbers of rows and tokens."""
        return self.input_ids.shape

    @property
    def attention_mask(self) -> torch.Tensor:
        """1 for tokens and 0 for padding, `(rows, tokens)`."""
        mask = run_meant_by(self, "attention_mask").mask
        return torch.ones_like(self.input_ids) if mask is None else mask

    @property
    def token_embeddings(self) -> torch.Tensor:
        """The output of the word embeddings, `(rows, tokens, features)`. Assignable."""
        return self.embed_tokens.output

    @token_embeddings.setter
    def token_embeddings(self, value: torch.Tensor) -> None:
        self.embed_tokens.output = value

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """The number of attention heads of a layer."""
        return self.config.get_text_config().num_attention_heads

    @property
    def hidden_size(self) -> int:
        """The number of features of hidden states."""
        return self.config.get_text_config().hidden_size

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return self.config.get_text_config().vocab_size

    def skip_layer(self, layer: int, skip_with: torch.Tensor | None = None) -> None:
        """Skip a layer: the model continues with the layer's input, or with `skip_with`."""
        self.skip_layers(layer, layer, skip_with)

    def skip_layers(self, start_layer: int, end_layer: int, skip_with: torch.Tensor | None = None) -> None:
        """Skip layers, up to and including `end_layer`."""
        super().skip_layers(start_layer, end_layer, skip_with)

    def steer(
        self, layers: int | list[int], steering_vector: torch.Tensor, factor: float = 1, positions: Any = None
    ) -> None:
        """Add `factor` times a vector to the output of layers, at the given positions or at all of them."""
        super().steer(layers, steering_vector, factor, positions)

    def get_topk_closest_tokens(self, hidden_state: torch.Tensor, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return the tokens that a hidden state `(rows, features)` predicts, with their probabilities."""
        found = self.project_on_vocab(hidden_state).softmax(-1).topk(k)
        rows = zip(found.indices.reshape(-1, k).tolist(), found.values.reshape(-1, k).tolist())
        return [[(self.tokenizer.decode([i]), p) for i, p in zip(ids, values)] for ids, values in rows]
