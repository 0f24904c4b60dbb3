"""Small language models of several kinds, which read with Gemma's tokenizer: decoders, encoders, both, a state space.

    net = gpt2()
    net(ids("a red circle")).logits

The weights are the same each time.
"""

from typing import Any

import torch
import transformers

from models import diffusion
from models.building import build

TOKENIZER = diffusion.gemma_tokenizer()
SIZE = len(TOKENIZER)
SIZES = {"vocab_size": SIZE, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}


def ids(text: str) -> torch.Tensor:
    """Return the tokens of a text, (1, tokens)."""
    return TOKENIZER(text, return_tensors="pt")["input_ids"]


def gpt2(**more: Any) -> torch.nn.Module:
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64} | SIZES | more
    return build(transformers.GPT2LMHeadModel, transformers.GPT2Config(**sizes))


def llama() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**SIZES, **sizes, num_key_value_heads=2, max_position_embeddings=64)
    return build(transformers.LlamaForCausalLM, config)


def opt() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.OPTConfig(**SIZES, **sizes, word_embed_proj_dim=32, max_position_embeddings=64)
    return build(transformers.OPTForCausalLM, config)


def bloom() -> torch.nn.Module:
    return build(transformers.BloomForCausalLM, transformers.BloomConfig(**SIZES, hidden_size=32, n_layer=3, n_head=4))


def mamba() -> torch.nn.Module:
    config = transformers.MambaConfig(**SIZES, hidden_size=32, state_size=8, num_hidden_layers=3)
    return build(transformers.MambaForCausalLM, config)


def t5() -> torch.nn.Module:
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
    return build(transformers.T5ForConditionalGeneration, transformers.T5Config(**SIZES, **sizes))


def bart() -> torch.nn.Module:
    sizes = {"d_model": 32, "max_position_embeddings": 64, "decoder_start_token_id": 1, "forced_eos_token_id": None}
    for half in ("encoder", "decoder"):
        sizes |= {f"{half}_layers": 2, f"{half}_ffn_dim": 64, f"{half}_attention_heads": 4}
    return build(transformers.BartForConditionalGeneration, transformers.BartConfig(**SIZES, **sizes))


def bert() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.BertConfig(**SIZES, **sizes, max_position_embeddings=64)
    return build(transformers.BertForMaskedLM, config)
