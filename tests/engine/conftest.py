"""Small nets and models with random weights, and what several files of these tests share."""

import pytest
import torch

from models.nets import Net, inputs


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def x() -> torch.Tensor:
    return inputs()


@pytest.fixture(scope="session")
def t5():
    """Return a T5 whose encoder and decoder share one embedding module, as in the paper."""
    from transformers import T5Config, T5ForConditionalGeneration

    from models.building import build

    config = T5Config(
        vocab_size=61, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = build(T5ForConditionalGeneration, config)
    model.set_input_embeddings(model.shared)
    return model


@pytest.fixture
def greedy() -> dict:
    """Return arguments of `generate` for exactly four tokens."""
    return {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture(autouse=True)
def no_mode_is_left():
    yield
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.fixture(params=["loaded", "never loaded"])
def some(request):
    """Return a net with its weights, and one without any."""
    return Net() if request.param == "loaded" else Net().to("meta")
