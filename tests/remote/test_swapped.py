"""Tests of the engine run on a server, and the list of those that do not names tests that exist."""

from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration

from diffsight import LanguageModel, Model
from diffsight.remote import is_on_server
from helpers import same
from models.nets import Net, inputs
from remote.made_for_one_process import TESTS, why_local
from remote.swapped import swapped

TESTED = Path(__file__).parents[1]
FILES = [path for folder in ("engine", "pipelines", "lenses") for path in (TESTED / folder).rglob("test_*.py")]


def test_models_are_on_the_server(model_server):
    with swapped(*model_server):
        model = Model(Net())
        with model.trace(inputs()) as run:
            hidden = run.layers[1].output
        threads = [type(one).__name__ for one in model_server[1].values()]
    assert is_on_server(model) and not is_on_server(Model(Net())) and threads == ["Model"]
    with torch.no_grad():
        assert torch.equal(run.result, Net()(inputs())) and not hidden.requires_grad


def test_a_value_with_the_name_of_a_module(model_server):
    """The attention modules of T5 have projections called q, k and v, whose outputs are not yet split into heads."""
    config = T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    net, ids = T5ForConditionalGeneration(config).eval(), torch.tensor([[5, 6, 7]])

    def read():
        with torch.no_grad(), LanguageModel(net).trace(ids) as run:
            projected = run.layers[0].self_attn["q"].output
            split = run.q[0]
            probs = run.layers[1].self_attn.products[0].attention_probs
        return projected, split, probs

    expected = read()
    with swapped(*model_server):
        found = read()
    assert same(found, expected) and expected[0].shape == (1, 1, 16) and expected[1].shape == (1, 1, 2, 8)


def test_the_list_names_tests_that_exist():
    for key in TESTS:
        file, _, name = key.partition("::")
        text = "".join(path.read_text(encoding="utf-8") for path in FILES if path.name == file)
        assert f"def {name.partition('[')[0].partition('*')[0]}" in text, key
    assert why_local("test_order.py::test_too_late[a-b-skip]") and not why_local(
        "test_order.py::test_too_late[a-b-read]"
    )
