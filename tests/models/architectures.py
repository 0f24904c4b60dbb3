"""Small language models of every architecture in transformers, built from its default configurations.

    for name in causal_types():
        model = build_causal(name)
        model(tokens())

Default configurations are reduced by the names of their fields, so one rule serves all architectures. The few
that need more are in `_MORE`.
"""

import dataclasses
import re
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 64

# The size that a field is reduced to: that of the first pattern that matches its name. Smaller values are kept.
_SIZES = [
    (r"kv_lora_rank|q_lora_rank|o_lora_rank|hc_lowrank|.*_rank", 8),
    (r".*vocab_size.*|.*vocabulary.*|.*_vocab|hash_byte_group_vocab", VOCABULARY),
    (r".*num_(key_value|kv|global_key_value)_heads|.*n_head_kv|num_mem_blocks", 2),
    (r".*(num_.*heads|n_heads?|_attention_heads|attention_heads|_nheads|n_mamba_heads|heads_per_ngram)", 4),
    (r".*(num_.*layers?|n_layers?|num_.*blocks|_layers|depth)", 2),
    (r"qk_rope_head_dim", 4),
    (r".*head_dim|.*_head_size|kv_channels|d_kv|dim_head", 8),
    (r".*(experts_per_tok|top_?k|_k|topk_group)", 2),
    (r"n_group", 2),
    (r".*(num|n)_.*experts|.*expert_num|num_experts", 4),
    (r".*(intermediate|ffn|d_ff|dff|d_inner|feed_forward|dim_ff|ffw).*", 64),
    (r".*(hidden_size|hidden_dim|d_model|n_embd|emb_dim|embed_dim|embedding_size|model_dim|dim_model|lru_width)", 32),
    (r".*(position|max_seq_len|context_length|n_ctx|window|chunk_size|max_len|_length|seq_length|block_size).*", 64),
    (r".*(d_state|state_size)", 8),
    (r"adapter_(in_dim|out_dim|input_size)", 32),
    (r"image_size", 16),
    (r"patch_size", 8),
    (r".*chunk_length", 16),
]
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "attn_layers")  # one entry per layer

# What an architecture needs in addition.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 2,
}
_MORE: dict[str, dict[str, Any]] = {
    "blt": {
        "use_cache": False,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "codegen": {"rotary_dim": 4},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "num_buckets": 4,
    },
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3},
}


def causal_types() -> list[str]:
    """Return the model types that have a causal language model."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(kind: str) -> Any:
    """Return the default configuration of a model type, reduced in size."""
    return _small(CONFIG_MAPPING[kind], _MORE.get(kind, {}))


def build_causal(kind: str, **changes: Any) -> torch.nn.Module:
    """Return a causal language model with the same random weights each time."""
    config = small_config(kind)
    cls = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    if not isinstance(config, cls.config_class):  # the configuration describes more than this model
        config = next((part for part in vars(config).values() if isinstance(part, cls.config_class)), config)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return cls(config).eval()


def tokens(rows: int = 1, length: int = 6) -> torch.Tensor:
    """Return token ids, (rows, length), without special tokens."""
    return torch.arange(rows * length).reshape(rows, length) % (VOCABULARY - 20) + 5


def inputs_of(model: torch.nn.Module, **sizes: int) -> torch.Tensor:
    """Return the input of a model: tokens, or for a model of sound one row of tokens per codebook."""
    return tokens(getattr(model, "num_codebooks", 1), **sizes)


def _small(cls: type, more: dict[str, Any]) -> Any:
    changes = {}
    for field in dataclasses.fields(cls):
        small = _cut(field.name, _default(field))
        if small is not None:
            changes[field.name] = small
    for name, sub in getattr(cls, "sub_configs", {}).items():
        changes[name] = _small_part(cls, name, sub, more.get(name, {}))
    fields = {field.name for field in dataclasses.fields(cls)}
    if "head_dim" in fields:
        changes["head_dim"] = 8
    if fields & {"kv_lora_rank", "q_lora_rank"} and "num_key_value_heads" in fields:
        changes["num_key_value_heads"] = changes["num_attention_heads"]  # latent attention has as many
    changes |= _kinds_of_layers(cls, changes)
    changes |= {name: value for name, value in more.items() if not isinstance(value, dict) or name not in changes}
    return cls(**changes)


def _default(field: dataclasses.Field) -> Any:
    return None if field.default is dataclasses.MISSING else field.default


def _cut(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    if name.endswith(("token_id", "token_index", "_index", "_id")):
        return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, min(value, VOCABULARY - 1))
    size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
    return None if size is None or value <= size else size


def _small_part(cls: type, name: str, sub: type, more: dict[str, Any]) -> Any:
    """Return the reduced configuration of one tower of a model."""
    known = getattr(cls(), name)
    return _small(type(known), more) if known is not None else None


def _kinds_of_layers(cls: type, changes: dict[str, Any]) -> dict[str, Any]:
    """Return changes that keep one layer of each kind where the default has several kinds."""
    default, found = cls(), {}
    for name in _KINDS:
        kinds = list(dict.fromkeys(getattr(default, name, None) or ()))
        if kinds and name in {field.name for field in dataclasses.fields(cls)}:
            found[name] = (kinds * 2)[: max(2, len(kinds))]
    if found:
        count = max(len(kinds) for kinds in found.values())
        found = {name: (kinds * count)[:count] for name, kinds in found.items()}
        layers = [n for n in ("num_hidden_layers", "n_layer", "num_layers") if n in changes or hasattr(default, n)]
        found |= {layers[0]: count} if layers else {}
    return found
