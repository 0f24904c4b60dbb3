"""Small language models with random weights that read text, for the tests of the lenses.

    language.model().trace("A cat sat on the")

The weights are the same each time.
"""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from diffsight import LanguageModel
from models.building import build

PROMPTS = ["The Eiffel Tower is in the city of", "A cat sat on the", "The capital of France is"]
_TEXTS = [*PROMPTS, "Paris London Madrid Rome", "in Paris and London, in Madrid and Rome", "cat hello king -> ?"]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level tokenizer, in which " Paris" is one token and "Paris" another."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        _TEXTS * 4, trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")


TOKENIZER = tokenizer()
SIZES = {"vocab_size": len(TOKENIZER), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(**SIZES, n_embd=32, n_layer=4, n_head=4, n_positions=64)
    return build(transformers.GPT2LMHeadModel, config)


def llama() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    return build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES, **sizes, num_key_value_heads=2))


def gemma2() -> torch.nn.Module:
    """Return a Gemma 2, which caps its logits."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 0.5}
    return build(transformers.Gemma2ForCausalLM, transformers.Gemma2Config(**SIZES, **sizes, **heads))


def neox() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    return build(transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**SIZES, **sizes))


def qwen3() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.Qwen3Config(**SIZES, **sizes, num_key_value_heads=2, head_dim=8)
    return build(transformers.Qwen3ForCausalLM, config)


def mixtral() -> torch.nn.Module:
    """Return a Mixtral, a mixture of experts."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.MixtralConfig(**SIZES, **sizes, num_key_value_heads=2, num_local_experts=2)
    return build(transformers.MixtralForCausalLM, config)


def mamba() -> torch.nn.Module:
    config = transformers.MambaConfig(**SIZES, hidden_size=32, state_size=8, num_hidden_layers=4)
    return build(transformers.MambaForCausalLM, config)


def model(net: torch.nn.Module | None = None) -> LanguageModel:
    return LanguageModel((net or gpt2(), TOKENIZER))


@torch.no_grad()
def hidden_states(net: torch.nn.Module, layers: torch.nn.ModuleList, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the output of each layer, (batch, tokens, features), from ordinary hooks."""
    kept = []
    hooks = [layer.register_forward_hook(lambda module, args, output: kept.append(output)) for layer in layers]
    net(ids)
    for hook in hooks:
        hook.remove()
    return [output if isinstance(output, torch.Tensor) else output[0] for output in kept]


def ids(text: str) -> torch.Tensor:
    return TOKENIZER(text, return_tensors="pt")["input_ids"]
