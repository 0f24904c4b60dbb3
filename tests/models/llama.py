"""A small Llama."""

from typing import Any

import transformers

from models.building import build


def llama(**more: Any) -> transformers.LlamaForCausalLM:
    """Return a Llama of three layers of width 32; `more` are further fields of its configuration."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
    config = transformers.LlamaConfig(**{"num_hidden_layers": 3, "eos_token_id": None, **sizes, **more})
    return build(transformers.LlamaForCausalLM, config)
