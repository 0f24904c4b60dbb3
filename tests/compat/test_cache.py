"""`tracer.cache()`."""

import copy

import pytest
import torch
from torch import nn

from diffsight.compat import LanguageModel, NNsight
from diffsight.errors import InputError
from helpers import outputs


def test_cache(llm, gpt2, ids):
    with torch.no_grad(), llm.trace(ids) as tracer:
        cache = tracer.cache(include_inputs=True).save()
        llm.transformer.h[1].output[:, 0] = 0
    for index, layer in enumerate(gpt2.transformer.h[:1]):
        value = outputs(layer, gpt2, ids)[0]
        assert torch.equal(cache[f"model.transformer.h.{index}"].output, value)
        assert torch.equal(cache.model.transformer.h[index].output, value)
        assert torch.equal(cache.transformer.h[1].input, value)
    assert not cache.transformer.h[1].output[:, 0].any()
    assert "model.lm_head" in cache and "model.absent" not in cache
    assert cache.transformer.h[0].mlp.keys()[0].startswith("model.transformer.h.0.mlp")


def test_cache_of_some_modules(llm, ids):
    with torch.no_grad(), llm.trace(ids) as tracer:
        cache = tracer.cache(modules=[llm.lm_head, "model.transformer.ln_f"], dtype=torch.float64)
    assert sorted(cache.keys()) == ["model.lm_head", "model.transformer.ln_f"]
    assert cache.lm_head.output.dtype == torch.float64 and cache.lm_head.inputs is None
    with pytest.raises(InputError, match="before reading or modifying"), llm.trace(ids) as tracer:
        llm.lm_head.output
        tracer.cache()


def test_cache_as_a_dictionary(tiny_model, net, input):
    with tiny_model.trace(input) as tracer:
        cache = tracer.cache()
    assert list(cache) == cache.keys() == ["model.layer1", "model.layer2", "model"] and len(cache) == 3
    values = {path: part.output for path, part in cache.items()}
    assert torch.equal(values["model.layer2"], net(input)) and torch.equal(cache.values()[0].output, net[0](input))
    assert torch.equal(cache.get("model.layer1").output, values["model.layer1"]) and cache.get("model.x", 5) == 5
    assert "model.layer1" in cache and 7 not in cache and len(cache["model.layer1"]) == 1
    with pytest.raises(KeyError, match="the cache as a whole has no value: choose a module"):
        cache.output
    with pytest.raises(TypeError, match=r"the cache of model.layer1 cannot be looped over: write \.keys"):
        list(cache["model.layer1"])


def test_cache_of_layers_whose_outputs_are_tuples(gpt2, ids):
    model = LanguageModel(gpt2)
    with torch.no_grad(), model.trace(ids) as tracer:
        cache = tracer.cache()
        live = model.transformer.h[1].output[0].save()
    kept = cache["model.transformer.h.1"].output
    assert isinstance(kept, tuple) and torch.equal(kept[0], live)
    assert torch.equal(cache.transformer.h[1].output[0], live)
    assert isinstance(cache["model.transformer.h.1.mlp"].output, torch.Tensor)
    with pytest.raises(InputError, match="the output of a layer is a tuple here"):
        kept[:, -1]


def test_cache_of_several_calls():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(3):
                x = self.block(x)
            return x

    net, x = Net(), torch.ones(1, 4)
    with NNsight(net).trace(x) as tracer:
        cache = tracer.cache()
    assert len(cache["model.block"]) == 3
    assert torch.equal(cache.block.output[2], net(x)) and torch.equal(cache.block.output[0], net.block(x))


def test_cache_in_a_file(gpt2, ids, tmp_path):
    model = LanguageModel(gpt2)
    with torch.no_grad(), model.trace(ids) as tracer:
        cache = tracer.cache(modules=[model.transformer.h[0], model.lm_head], include_inputs=True)
    torch.save(cache, tmp_path / "cache.pt")
    loaded, hidden = torch.load(tmp_path / "cache.pt", weights_only=False), cache.transformer.h[0].output[0]
    assert (tmp_path / "cache.pt").stat().st_size < 20_000 and loaded.keys() == cache.keys() and len(loaded) == 2
    for found in (loaded["model.transformer.h.0"], loaded.transformer.h[0], loaded.model.transformer["h"][0]):
        assert type(found.output) is tuple and torch.equal(found.output[0], hidden)
    assert torch.equal(loaded.lm_head.input, cache.lm_head.input) and "model.lm_head" in loaded
    assert "model.transformer.h.1" not in loaded
    for absent in (lambda: loaded.transformer.h[1], lambda: loaded.transformer.wte):
        with pytest.raises(AttributeError, match=r"nothing was kept in model\.transformer"):
            absent()
    copied = copy.deepcopy(cache)
    assert torch.equal(copied.layers[0].output[0], hidden) and copied.layers[0].output[0] is not hidden
