"""The tree of modules under nnsight's names: paths, parents, replaced modules, further names."""

import pytest
import torch
from torch import nn

from diffsight.compat import Envoy, NNsight, get_rename_dict
from diffsight.errors import InputError
from helpers import outputs


def test_paths_and_parents(llm, gpt2):
    layer = llm.transformer.h[1]
    assert layer.path == "model.transformer.h.1" and llm.path == "model"
    assert layer is llm.get("transformer.h.1") and layer.parent is llm.transformer.h and layer.root is llm
    assert llm.parent is None and llm.transformer.parent is llm and llm.base_model is llm.transformer
    assert layer._module is gpt2.transformer.h[1]


def test_old_name_of_the_module(llm, gpt2):
    """function_vectors.ipynb, the last cell. A child of that name comes first."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self._model = gpt2

    hidden = torch.ones(1, 16)
    assert llm._model is gpt2 and torch.equal(llm._model.lm_head(hidden), gpt2.lm_head(hidden))
    assert NNsight(Outer())._model._module is gpt2


def test_modules_are_envoys(llm, gpt2):
    names = dict(llm.named_modules())
    assert {path.removeprefix("model").lstrip(".") for path in names} == dict(gpt2.named_modules()).keys()
    assert names["model.lm_head"] is llm.lm_head and llm.modules()[-1] is llm
    assert llm.modules(include_fn=lambda envoy: envoy.path.endswith(".mlp")) == [
        layer.mlp for layer in llm.transformer.h
    ]
    assert all(isinstance(envoy, Envoy) for envoy in llm.modules())


def test_values_of_listed_modules(llm, gpt2, ids):
    with llm.trace(ids):
        found = {path: envoy.output for path, envoy in llm.named_modules() if path.endswith(".mlp.c_proj")}
    for path, value in found.items():
        assert torch.equal(value, outputs(gpt2.get_submodule(path.removeprefix("model.")), gpt2, ids)[0])


def test_envoy_wraps_a_module(net, input):
    class Own(Envoy):
        def doubled(self):
            return self.layer1.output * 2

    model = Envoy(net)
    assert isinstance(model, NNsight) and model.device == torch.device("cpu") and model.to("cpu") is model
    with Own(net).trace(input):
        pass
    own = Own(net)
    with own.trace(input):
        doubled = own.doubled()
    assert torch.equal(doubled, net.layer1(input) * 2)


def test_replacing_a_module(net, tiny_model, input):
    other = nn.Linear(*reversed(net.layer1.weight.shape))
    tiny_model.layer1 = other
    with tiny_model.trace(input):
        hidden = tiny_model.layer1.output
    assert net.layer1 is other and torch.equal(hidden, other(input))
    with pytest.raises(InputError, match="exists already"), tiny_model.trace(input):
        tiny_model.layer1 = nn.Identity()


def test_tracing_a_part(llm, gpt2, ids):
    hidden = outputs(gpt2.transformer.h[0], gpt2, ids)[0]
    with llm.transformer.h[1].trace(hidden) as tracer:
        inner = llm.transformer.h[1].mlp.output
    assert torch.equal(tracer.result, gpt2.transformer.h[1](hidden))
    assert torch.equal(inner, outputs(gpt2.transformer.h[1].mlp, gpt2.transformer.h[1], hidden)[0])


def test_renamed_modules(gpt2, ids):
    rename = {"transformer.h": "layers", "mlp": ["ffn", "feed_forward"], "attn.c_proj": "attn.o_proj", "*.ln_f": "norm"}
    model = NNsight(gpt2, rename=rename)
    assert model.layers[1].ffn is model.transformer.h[1].mlp is model.layers[1].feed_forward
    assert model.norm is model.transformer.ln_f and model.layers[0].attn.o_proj is model.transformer.h[0].attn.c_proj
    with model.trace(ids):
        value = model.layers[2].ffn.output
    assert torch.equal(value, outputs(gpt2.transformer.h[2].mlp, gpt2, ids)[0])
    by_class = NNsight(gpt2, rename={type(gpt2.transformer.h[0].attn): "attention"})
    assert by_class.transformer.h[0].attention is by_class.transformer.h[0].attn


def test_a_misspelled_name_of_a_module(gpt2):
    with pytest.warns(
        UserWarning, match=r"no module is called 'transfomer', .* \(did you mean 'transformer'\?\)"
    ) as told:
        NNsight(gpt2, rename={"transfomer.h": "layers", "encoder.layers": "layers"})
    assert len(told) == 1 and told[0].filename == __file__


@pytest.mark.parametrize(
    "rename, words",
    [
        ({"lm_head": "transformer"}, "would shadow"),
        ({"lm_head": "output"}, "would shadow"),
        ({"lm_head": "config"}, "would shadow"),
        ({nn.LayerNorm: "norm"}, "matches 2 modules"),
        ({"attn.c_proj": "mlp.o_proj"}, "is not inside 'mlp'"),
    ],
)
def test_names_that_are_taken(gpt2, rename, words):
    with pytest.raises(InputError, match=words):
        NNsight(gpt2, rename=rename)


def test_names_of_nnterp(gpt2, ids):
    model = NNsight(gpt2, rename=get_rename_dict())
    assert model.layers is model.transformer.h and model.ln_final is model.transformer.ln_f
    assert model.layers[0].self_attn is model.transformer.h[0].attn and model.embed_tokens is model.transformer.wte
    with model.trace(ids):
        value = model.layers[0].self_attn.output[0]
    assert torch.equal(value, outputs(gpt2.transformer.h[0].attn, gpt2, ids)[0][0])


def test_modules_called_output():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.output = nn.Linear(3, 3)

        def forward(self, x):
            return self.output(x) + 1

    net, x = Net(), torch.ones(1, 3)
    with pytest.warns(UserWarning, match="already provides") as told:
        model = NNsight(net)
        Envoy(net)
        type(model)(net, rename={})
    assert [one.filename for one in told] == [__file__] * 3
    with model.trace(x):
        inner, outer = model.E_output.output, model.output
    assert torch.equal(inner, net.output(x)) and torch.equal(outer, net(x))


def test_loading(llm):
    assert llm.dispatched and llm.dispatch() is llm
