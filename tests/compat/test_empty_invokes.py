"""`with tracer.invoke():`, an invoke without an input, which has the inputs of all earlier invokes."""

import pytest
import torch

from diffsight.compat import StandardizedTransformer
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
    "steer": lambda model: model.steer(1, torch.ones(16)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_by_every_name(gpt2, ids, name):
    model = StandardizedTransformer(gpt2)

    def change(tracer):
        CHANGES[name](tracer if name == "rows" else model)

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
