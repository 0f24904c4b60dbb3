"""The output of a layer of a language model is a tuple, as in transformers 4."""

import pickle

import numpy as np
import pytest
import torch
import transformers

from compat.notebooks.cells import EIFFEL, run_cells
from diffsight.compat import CONFIG, LanguageModel
from diffsight.errors import InputError
from helpers import outputs, replaced

pytestmark = pytest.mark.usefixtures("no_gradients")


def test_layer_outputs_are_tuples(model, net, ids):
    with model.trace(EIFFEL):
        given = model.transformer.h[3].output
        inside = model.transformer.h[4].mlp.output
    assert isinstance(given, tuple) and len(given) == 1
    assert torch.equal(given[0], outputs(net.transformer.h[3], net, ids[EIFFEL])[0])
    assert isinstance(inside, torch.Tensor)


@pytest.mark.parametrize("value", ["(zeros,)", "(zeros, *layer.output[1:])", "zeros"])
def test_setting_a_layer(model, net, ids, value):
    with replaced(net.transformer.h[3], torch.zeros_like):
        expected = net(ids[EIFFEL]).logits
    names = run_cells(
        f"""
with model.trace({EIFFEL!r}) as tracer:
    layer = model.transformer.h[3]
    zeros = torch.zeros_like(layer.output[0])
    layer.output = {value}
    logits = model.lm_head.output.save()
""",
        model=model,
        torch=torch,
    )
    assert torch.equal(names["logits"], expected)


def test_setting_a_layer_ahead_and_in_place(model, net, ids):
    zeros = torch.zeros(1, ids[EIFFEL].shape[1], 32)
    with replaced(net.transformer.h[3], torch.zeros_like):
        expected = net(ids[EIFFEL]).logits
    with model.trace(EIFFEL):
        model.transformer.h[3].output = (zeros,)
        ahead = model.lm_head.output
    with model.trace(EIFFEL):
        model.transformer.h[3].output[0][:] = 0
        in_place = model.lm_head.output
    assert torch.equal(ahead, expected) and torch.equal(in_place, expected)


def test_adding_to_a_layer(model, net, ids):
    """function_vectors.ipynb, `output[0] += h`, which assigns the sum to the item once it is added in place."""
    layer = model.transformer.h[3]
    with model.trace(EIFFEL):
        layer.output[0] += 1
        added = model.lm_head.output
    with replaced(net.transformer.h[3], lambda out: out + 1):
        assert torch.equal(added, net(ids[EIFFEL]).logits)
    with pytest.raises(InputError, match=r"Write `\.output\[0\]\["), model.trace(EIFFEL):
        layer.output[0] = layer.output[0] + 1
    with pytest.raises(TypeError) as caught, model.trace(EIFFEL):
        (layer.output[0],)[0] += 1
    assert "hidden += x" in caught.value.__notes__[0]


def test_calls_and_rows_of_a_layer(model, net, ids):
    layers, batch = model.transformer.h, ids[EIFFEL].repeat(2, 1)
    first, second, third = [outputs(layer, net, batch)[0] for layer in net.transformer.h[:3]]
    with model.trace([EIFFEL, EIFFEL]) as tracer:
        row = tracer.rows[1].transformer.h
        values = layers[0].calls[0].output, layers[1].calls[0].output, row[2].output
        row[3].output = (torch.zeros_like(row[3].output[0]),)
        layers[4].calls[0].output = (torch.ones_like(layers[4].output[0]),)
        after = layers[3].output[0], layers[4].output[0]
    assert all(isinstance(value, tuple) and len(value) == 1 for value in values)
    assert (
        torch.equal(values[0][0], first) and torch.equal(values[1][0], second) and torch.equal(values[2][0], third[1:])
    )
    assert after[0][0].any() and not after[0][1].any() and after[1].eq(1).all()


def test_a_layer_that_is_called(model, net, ids):
    with model.trace(EIFFEL):
        hidden = model.transformer.h[3].output[0]
        again = model.transformer.h[3](hidden)
    assert isinstance(again, tuple) and torch.equal(again[0], net.transformer.h[3](hidden))


@pytest.mark.parametrize(
    "use",
    [
        lambda out: out * 2,
        lambda out: 2 * out,
        lambda out: np.float32(2) * out,
        lambda out: np.ones(32) + out,
        lambda out: out + out,
        lambda out: out == 0,
        lambda out: out != torch.zeros(32),
        lambda out: out > 0,
        lambda out: out + torch.ones(32),
        lambda out: torch.ones(32) + out,
        lambda out: out - torch.ones(32),
        lambda out: out @ torch.ones(32),
        lambda out: out / 2,
        lambda out: -out,
        abs,
        lambda out: out[None],
        lambda out: out[torch.tensor([True])],
        lambda out: torch.stack([out, out]),
        lambda out: torch.cat([out, out]),
        torch.zeros_like,
        torch.norm,
        torch.nn.LayerNorm(32),
        lambda out: torch.ones(1, 1, 32).mul_(out),
    ],
)
def test_layer_used_as_a_tensor(model, use):
    with pytest.raises(InputError, match=r"^the output of a layer is a tuple here.*BLOCKS_GIVE_TUPLES") as caught:
        with model.trace(EIFFEL):
            use(model.transformer.h[3].output)
    assert "layout" not in str(caught.value)


def test_layer_used_as_a_tuple(model):
    with model.trace(EIFFEL):
        out = model.transformer.h[3].output
        hidden = out[0]
    longer, longest = (*out, 1), (0, hidden, 1)
    assert out + (1,) == longer and (0,) + out + (1,) == longest and (0, *out[:1], 1) == longest  # noqa: RUF005
    assert not hasattr(out, "shape") and not hasattr(out, "dtype") and hasattr(out, "count")
    assert out == (hidden,) and out != () and out != None and {out: 1}[(hidden,)] == 1  # noqa: E711
    assert torch.equal(torch.cat(out), hidden) and torch.equal(torch.stack(out)[0], hidden) and hidden in out


def test_saving_a_layer_to_a_file(model, tmp_path):
    with model.trace(EIFFEL):
        out = model.transformer.h[3].output.save()
    torch.save({"out": out}, tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt")["out"]
    assert type(loaded) is tuple and torch.equal(loaded[0], out[0]) and b"diffsight" not in pickle.dumps(out)


def test_option_to_turn_tuples_off(model, net, ids):
    CONFIG.APP.BLOCKS_GIVE_TUPLES = False
    try:
        with model.trace(EIFFEL):
            given = model.transformer.h[3].output
    finally:
        CONFIG.APP.BLOCKS_GIVE_TUPLES = True
    assert torch.equal(given, outputs(net.transformer.h[3], net, ids[EIFFEL])[0])


def test_standard_names_and_accessors_stay_plain(model):
    with model.trace(EIFFEL) as tracer:
        assert isinstance(tracer.layers_output[3], torch.Tensor)
        assert isinstance(model.layers[4].output, tuple)


def test_a_layer_that_returns_a_tuple_itself(tokenizer):
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    net = transformers.T5ForConditionalGeneration(config).eval()
    model = LanguageModel((net, tokenizer))
    with model.trace(EIFFEL) as tracer:
        given = model.encoder.block[1].output
    own = outputs(net.encoder.block[1], net, tracer.tokens, decoder_input_ids=torch.tensor([[0]]))[0]
    assert type(own) is type(given) is tuple and len(own) == len(given) > 1
    assert torch.equal(given[0], own[0])
