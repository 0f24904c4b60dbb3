"""`with tracer.invoke():`, an invoke without an input, which has the inputs of all earlier invokes."""

import pytest
import torch

from diffsight.compat import DiffusionModel, NNsight, StandardizedTransformer
from diffsight.errors import InputError
from helpers import outputs, replaced


def test_invoke_of_all_inputs(llm, gpt2, ids, other):
    with torch.no_grad(), llm.trace() as tracer:
        with tracer.invoke(ids):
            first = llm.transformer.h[1].output
            inner = tracer.result
        with tracer.invoke(other):
            pass
        with tracer.invoke():
            both = llm.transformer.h[1].output
    expected = outputs(gpt2.transformer.h[1], gpt2, torch.cat([ids, other]))[0]
    assert torch.equal(both, expected) and torch.equal(first, outputs(gpt2.transformer.h[1], gpt2, ids)[0])
    assert torch.equal(inner.logits, gpt2(ids).logits)  # that of the invoke, not a list of all
    assert len(tracer.result) == 3


@pytest.mark.parametrize("change", ["assigned", "in place", "skipped"])
def test_invoke_of_all_inputs_after_a_change(llm, ids, change):
    with torch.no_grad(), pytest.raises(InputError, match="an invoke before it has changed"), llm.trace() as tracer:
        with tracer.invoke(ids):
            layer = llm.transformer.h[0]
            if change == "assigned":
                layer.output = layer.output * 2
            elif change == "skipped":
                layer.skip(layer.input)
            else:
                layer.output[:] = 0
        with tracer.invoke():
            pass


@pytest.mark.parametrize("inside", [False, True])
def test_invoke_of_all_inputs_in_inference_mode(llm, ids, inside):
    """Changes in place cannot be seen there, neither in the invokes before it nor in its own block."""
    with pytest.raises(InputError, match=r"use torch\.no_grad\(\)"), llm.trace() as tracer:
        with torch.inference_mode(), tracer.invoke(ids):
            if not inside:
                llm.transformer.h[0].output[:] = 0
        with torch.inference_mode(inside), tracer.invoke():
            llm.transformer.h[0].output[:] = 0


def test_invoke_of_all_inputs_is_read_only(llm, ids):
    for in_place in (False, True):
        with torch.no_grad(), pytest.raises(InputError, match="can only be read"), llm.trace() as tracer:
            with tracer.invoke(ids):
                pass
            with tracer.invoke():
                if in_place:
                    llm.transformer.h[0].output[:] = 0
                else:
                    llm.transformer.h[0].output = llm.transformer.h[0].output * 0


def _zero(value):
    value[:] = 0


CHANGES = {
    "layers_output": lambda model: _zero(model.layers_output[1]),
    "layers_input": lambda model: _zero(model.layers_input[1]),
    "mlps_output": lambda model: _zero(model.mlps_output[1]),
    "attentions_output": lambda model: _zero(model.attentions_output[1]),
    "heads_output": lambda model: _zero(model.heads_output[1]),
    "attention_probabilities": lambda model: _zero(model.attention_probabilities[1]),
    "logits": lambda model: _zero(model.logits),
    "token_embeddings": lambda model: _zero(model.token_embeddings),
    "calls": lambda model: _zero(model.layers[1].mlp.calls[0].output),
    "rows": lambda model: _zero(model.rows[0].layers[1].mlp.output),
    "follow": lambda model: model.follow("layers[1].output", _zero),
    "each": lambda model: model.each(lambda row: (row.layers_output[0], _zero(row.layers_output[1]))),
    "steer": lambda model: model.steer(1, torch.ones(16)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_by_every_name(gpt2, ids, name):
    model = StandardizedTransformer(gpt2)

    def change(tracer):
        CHANGES[name](tracer if name in ("rows", "follow", "each") else model)

    with torch.no_grad(), pytest.raises(InputError, match="an invoke before it has changed"), model.trace() as tracer:
        with tracer.invoke(ids) as invoker:
            change(invoker)
        with tracer.invoke():
            pass
    with torch.no_grad(), pytest.raises(InputError, match="can only be read"), model.trace() as tracer:
        with tracer.invoke(ids):
            pass
        with tracer.invoke() as invoker:
            change(invoker)


def test_edits_are_in_every_invoke(llm, gpt2, ids, other):
    with llm.edit(inplace=True):
        llm.transformer.h[0].output = llm.transformer.h[0].output * 2
        llm.transformer.h[1].output[:, 0] = 0
    with torch.no_grad(), llm.trace() as tracer:
        with tracer.invoke(ids):
            llm.transformer.h[0].output
        with tracer.invoke(other):
            pass
        with tracer.invoke():
            logits = llm.lm_head.output

    def without_first(out):
        out[:, 0] = 0
        return out

    h = gpt2.transformer.h
    with torch.no_grad(), replaced(h[0], lambda out: out * 2), replaced(h[1], without_first):
        assert torch.equal(logits, gpt2(torch.cat([ids, other])).logits)


def test_changes_of_the_model_itself(input):
    net = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.ReLU(inplace=True)).requires_grad_(False)
    model = NNsight(net)
    with model.trace() as tracer:
        with tracer.invoke(input):
            hidden = model[0].output
            own = model.output
        hidden[:] = 9  # its pass has ended
        with tracer.invoke():
            whole = model.output
    assert torch.equal(whole, net(input)) and own is not whole
    with pytest.raises(InputError, match="has changed a value in place"), model.trace() as tracer:
        with tracer.invoke(input):
            held = model[0].output
            model[1].input
            held[:] = 0
        tracer.invoke()


SAMPLED = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": True}


@pytest.mark.parametrize("seed", [None, 3])
def test_sampling_of_one_invoke_is_repeated(gpt2, ids, seed):
    model = StandardizedTransformer(gpt2)
    torch.manual_seed(0)
    with model.generate(**SAMPLED, seed=seed) as tracer:
        with tracer.invoke(ids):
            logits = [model.logits for _ in tracer.iter[:]]
            own = tracer.result
        following = torch.random.get_rng_state()
        with tracer.invoke():
            torch.rand(3)
            again = [model.logits for _ in tracer.iter[:]]
            whole = tracer.result
    torch.manual_seed(3 if seed else 0)
    assert torch.equal(own, gpt2.generate(ids, **SAMPLED)) and torch.equal(own, whole)
    assert all(map(torch.equal, logits, again))
    torch.set_rng_state(following)
    torch.rand(3)
    expected = torch.rand(1)
    torch.set_rng_state(following)
    with model.trace() as tracer:  # the pass of an empty invoke leaves the random state of the program alone
        with tracer.invoke(ids):
            pass
        with tracer.invoke():
            torch.rand(3)
    assert torch.equal(torch.rand(1), expected)


def test_sampling_that_cannot_be_repeated(gpt2, ids, other):
    model = StandardizedTransformer(gpt2)
    with pytest.raises(InputError, match=r"has drawn random numbers .* pass do_sample=False"):
        with model.generate(**SAMPLED) as tracer:
            with tracer.invoke(ids):
                pass
            with tracer.invoke(other):
                pass
            tracer.invoke()
    with pytest.raises(InputError, match="in its block as well as in the model"):
        with model.generate(**SAMPLED) as tracer:
            with tracer.invoke(ids):
                for _ in tracer.iter[:]:
                    model.logits + torch.randn(1)
            tracer.invoke()


def test_dropout_of_one_invoke_is_repeated(input):
    net = torch.nn.Sequential(torch.nn.Linear(5, 20), torch.nn.Dropout(0.5)).requires_grad_(False)
    model = NNsight(net)
    torch.manual_seed(0)
    with model.trace() as tracer:
        with tracer.invoke(input):
            own = model.output
        with tracer.invoke():
            whole = model.output
    torch.manual_seed(0)
    assert torch.equal(own, net(input)) and torch.equal(own, whole)


def test_seeds_of_images(sd):
    model, arguments = DiffusionModel(sd), {"num_inference_steps": 2, "output_type": "np"}
    with model.generate(**arguments, seed=5, num_images_per_prompt=2) as tracer:
        for prompt in ("a red circle", "a blue square"):
            with tracer.invoke(prompt):
                pass
        with tracer.invoke():
            pass
    first, second, both = (result.images for result in tracer.result)
    alone = sd("a red circle", **arguments, num_images_per_prompt=2, generator=_generators(5, 6)).images
    assert torch.allclose(torch.tensor(first), torch.tensor(alone), atol=1e-5)
    apart = torch.cat([torch.tensor(first), torch.tensor(second)])
    assert torch.allclose(torch.tensor(both), apart, atol=1e-4) and not torch.allclose(apart[:2], apart[2:], atol=1e-2)


def test_noise_of_images_without_a_seed(sd):
    model, arguments = DiffusionModel(sd), {"num_inference_steps": 2, "output_type": "np"}
    with model.generate(**arguments) as tracer:
        with tracer.invoke("a red circle"):
            own = model.unet.output[0]
        with tracer.invoke():
            whole = model.unet.output[0]
    assert torch.equal(own, whole)
    with pytest.raises(InputError, match="seed= to a diffusion model"), model.generate(**arguments) as tracer:
        for prompt in ("a red circle", "a blue square"):
            with tracer.invoke(prompt):
                pass
        tracer.invoke()
    with pytest.raises(InputError, match="drawn from the generator that you passed"):
        with model.generate(**arguments, generator=_generators(0)) as tracer:
            with tracer.invoke("a red circle"):
                pass
            tracer.invoke()


def _generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]
