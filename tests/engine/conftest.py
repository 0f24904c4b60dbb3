"""Models with random weights, of real classes; built once, as building costs more than running."""

import pytest
import torch
from engine.nets import Net, inputs


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def x() -> torch.Tensor:
    return inputs()


@pytest.fixture(scope="session")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=3, n_head=2, n_embd=16, n_positions=64, vocab_size=61, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
        for p in model.parameters():  # larger than the usual start, so that tokens and edits make a difference
            torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():  # transformers puts hooks of its own on at the first call that asks for hidden states
        model(torch.tensor([[1]]), output_hidden_states=True, output_attentions=True)
    return model


@pytest.fixture(scope="session")
def t5():
    """T5 with one module for the embeddings of both sides, as in its paper."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=61, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config).eval()
    model.set_input_embeddings(model.shared)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([[5, 17, 42]])


@pytest.fixture
def greedy() -> dict:
    """Arguments of `generate` for exactly four tokens."""
    return {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
