"""`tracer.iter`, `.all()` and `.next()`.

Multiple Token Generation in nnsight's walkthrough; multiple_token.ipynb; `.all()` in the guide to 0.4.
"""

import re

import pytest
import torch
from torch import nn

import diffsight.compat as nnsight
from compat.constants import TOKENS
from diffsight.compat import NNsight
from diffsight.errors import InputError, NoRunError, SourceError
from helpers import outputs, replaced


def test_generated_tokens(llm, gpt2, ids):
    with llm.generate(ids, **TOKENS):
        out = llm.generator.output.save()
    assert torch.equal(out, gpt2.generate(ids, **TOKENS))


def test_next(llm, gpt2, ids):
    with llm.generate(ids, **TOKENS) as tracer:
        hidden_states1 = llm.transformer.h[-1].output.save()
        hidden_states2 = llm.transformer.h[-1].next().output.save()
        hidden_states3 = llm.transformer.h[-1].next().output.save()
        out = llm.generator.output.save()
    expected = outputs(gpt2.transformer.h[-1], gpt2.generate, ids, **TOKENS)
    assert all(torch.equal(a, b) for a, b in zip((hidden_states1, hidden_states2, hidden_states3), expected))
    assert torch.equal(out, gpt2.generate(ids, **TOKENS)) and torch.equal(tracer.result, out)
    with llm.generate(ids, **TOKENS) as tracer:
        llm.transformer.h[-1].output
        assert torch.equal(tracer.next().transformer.h[-1].output, expected[1])


def test_next_call_of_a_module(ids):
    """In a run of one pass, `next()` is the next call of the module."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return self.inner(self.inner(x))

    net, x = Twice(), torch.ones(1, 3)
    model = NNsight(net)
    with model.trace(x):
        first = model.inner.output
        second = model.inner.next().output
    assert torch.equal(first, net.inner(x)) and torch.equal(second, net(x))


@pytest.fixture
def states(gpt2, ids):
    """The output of the last block at each token, with the output of the first set to zero."""
    with replaced(gpt2.transformer.h[0], torch.zeros_like):
        return outputs(gpt2.transformer.h[-1], gpt2.generate, ids, **TOKENS)


def test_next_in_a_loop(llm, ids, states):
    layers = llm.transformer.h
    hidden_states = []
    with llm.generate(ids, **TOKENS):
        for _ in range(3):
            layers[0].output[:] = 0
            hidden_states.append(layers[-1].output.save())
            layers[0].next()
    assert len(hidden_states) == 3 and all(torch.equal(a, b) for a, b in zip(hidden_states, states))


def test_all_of_a_block(llm, ids, states):
    layers = llm.transformer.h
    with llm.generate(ids, **TOKENS) as tracer:
        hidden_states = nnsight.list().save()
        with layers.all():
            layers[0].output[:] = 0
            hidden_states.append(layers[-1].output)
    assert len(hidden_states) == 3 and all(torch.equal(a, b) for a, b in zip(hidden_states, states))
    with llm.generate(ids, **TOKENS) as tracer:
        again = []
        with tracer.all() as step:
            layers[0].output[:] = 0
            again.append((step, layers[-1].output))
    assert [step for step, _ in again] == [0, 1, 2] and torch.equal(again[2][1], states[2])


def test_all_as_a_statement(llm, ids, states):
    """Guide to 0.4: what follows `.all()` in the block of the trace is repeated for each token."""
    layers = llm.transformer.h
    with llm.generate(ids, **TOKENS):
        hidden_states = nnsight.list().save()
        count = 0
        layers.all()
        layers[0].output[:] = 0
        hidden_states.append(layers[-1].output)
        count += 1
    assert count == len(hidden_states) == 3 and all(torch.equal(a, b) for a, b in zip(hidden_states, states))


def test_generator_output_after_all_steps(llm, gpt2, ids, other):
    expected = gpt2.generate(ids, **TOKENS)
    with llm.generate(ids, **TOKENS):
        with llm.transformer.h.all():
            llm.lm_head.output
        assert torch.equal(llm.generator.output, expected) and torch.equal(llm.generator.output, expected)
    with pytest.raises(NoRunError):
        llm.generator.output
    with llm.generate(**TOKENS) as outer:
        with outer.invoke(ids):
            with llm.all():
                llm.lm_head.output
            assert torch.equal(llm.generator.output, expected)
        assert torch.equal(outer.output, expected)
        with outer.invoke(other):
            pass
    assert torch.equal(outer.output[0], expected) and torch.equal(outer.output[1], gpt2.generate(other, **TOKENS))


STEPS = [lambda run, llm: run.iter[:2], lambda run, llm: run.all(), lambda run, llm: llm.all()]


@pytest.mark.parametrize("steps", STEPS)
def test_steps_around_invokes(llm, gpt2, ids, other, steps):
    """function_vectors.ipynb nests them in this order: the block of each invoke is repeated for its own steps."""
    with llm.generate(**TOKENS) as tracer:
        seen = []
        with steps(tracer, llm) as step:
            for given in (ids, other):
                with tracer.invoke(given):
                    seen.append((given, step, llm.lm_head.output))
    number = len(seen) // 2
    assert number == (2 if steps is STEPS[0] else 3) and [step for _, step, _ in seen] == [*range(number)] * 2
    expected = [
        logits for given in (ids, other) for logits in outputs(gpt2.lm_head, gpt2.generate, given, **TOKENS)[:number]
    ]
    assert all(torch.equal(logits, value) for (_, _, logits), value in zip(seen, expected, strict=True))


@pytest.mark.parametrize("steps", STEPS)
def test_steps_around_invokes_that_cannot_be_repeated(llm, ids, steps):
    with pytest.raises(InputError, match=r"inside `with tracer\.invoke\(\.\.\.\):`"):
        with llm.generate(**TOKENS) as tracer:
            for _ in steps(tracer, llm):
                with tracer.invoke(ids):
                    llm.lm_head.output
    with pytest.raises(InputError, match=r"inside `with tracer\.invoke\(\.\.\.\):`"):
        with llm.generate(**TOKENS) as tracer, steps(tracer, llm):
            llm.lm_head.output


def test_results_in_a_block_that_is_repeated(llm, gpt2, ids, other):
    """function_vectors.ipynb, `intervene_with_fn_vector`: the output of the generator is that after all steps."""
    layer = llm.transformer.h[0]
    with replaced(gpt2.transformer.h[0], torch.zeros_like):
        expected = [gpt2.generate(given, **TOKENS) for given in (ids, other)]
    with llm.generate(**TOKENS) as tracer:
        with llm.all():
            with tracer.invoke(ids):
                bare = llm.generator.output.save()
            with tracer.invoke(ids) as invoker:
                layer.output[:] = 0
                first = invoker.result
            with tracer.invoke(other):
                layer.output[:] = 0
                second = llm.generator.output.save()
    assert torch.equal(bare, gpt2.generate(ids, **TOKENS))
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])
    with llm.generate(ids, **TOKENS) as tracer:
        with tracer.all():
            layer.output[:] = 0
            inside = tracer.result
    with llm.generate(ids, **TOKENS):
        llm.all()
        layer.output[:] = 0
        below = llm.generator.output.save()
    assert torch.equal(inside, expected[0]) and torch.equal(below, expected[0])


def test_steps_of_an_invoke(llm, gpt2, ids, other):
    """`tracer` can be used in the block of an invoke, too."""
    expected = [outputs(gpt2.lm_head, gpt2.generate, given, **TOKENS) for given in (ids, other)]
    seen = []
    with llm.generate(**TOKENS) as tracer:
        with tracer.invoke(ids):
            with tracer.iter[1:] as step:
                seen.append((0, step, llm.lm_head.output))
        with tracer.invoke(other):
            seen += [(1, step, llm.lm_head.output) for step in tracer.iter[:1]]
            seen.append((1, 1, tracer.next().lm_head.output))
        with tracer.invoke(other):
            tracer.all()
            logits = llm.lm_head.output
    assert [(row, step) for row, step, _ in seen] == [(0, 1), (0, 2), (1, 0), (1, 1)]
    assert all(torch.equal(value, expected[row][step]) for row, step, value in seen)
    assert torch.equal(logits, expected[1][2])


def test_all_in_an_edit(llm, ids):
    with llm.edit() as edited, edited.all():
        edited.transformer.h[0].output[:] = 0
    with edited.generate(ids, **TOKENS) as tracer:
        assert [llm.transformer.h[0].output.any().item() for _ in tracer.iter[:]] == [False] * 3
    with llm.edit() as edited:
        llm.transformer.h.all()
        llm.transformer.h[0].output[:] = 0
    with pytest.raises(InputError, match=r"in an edit, write `with model\.all\(\):`"):
        edited.generate(ids, **TOKENS).result


def test_all_at_the_end_of_a_block(llm, ids):
    with llm.generate(ids, **TOKENS) as tracer:
        llm.transformer.h.all()
    assert tracer.result.shape == (1, ids.shape[1] + 3)


@pytest.mark.parametrize(
    "line, instead",
    [
        ("with tracer.cond(False): 1", "Write it with `if`"),
        ("with tracer.iter[:]: 1", "Write a loop: `for step in tracer.iter[:]:`"),
        ("tracer.all()", "Write a loop: `for step in tracer.iter[:]:`"),
        ("with session.iter([1]): 1", "Write a loop: `for item in session.iter(items):`"),
        ("with model.edit(): 1", "Write the block as a function that takes the run, and pass that: "),
    ],
)
def test_blocks_without_source(llm, ids, line, instead):
    with pytest.raises(SourceError, match=r"source at <string>:1 cannot be read.*\. " + re.escape(instead)):
        with llm.session() as session, llm.generate(ids, **TOKENS) as tracer:
            exec(line, {"tracer": tracer, "session": session, "model": llm})
    with llm.session() as session, llm.generate(ids, **TOKENS) as tracer:
        exec("with tracer.cond(True): seen = [step for step in tracer.iter[:]]", names := {"tracer": tracer})
    assert names["seen"] == [0, 1, 2]


@pytest.mark.parametrize("chosen, steps", [(slice(1, None), [1, 2]), (1, [1]), ([0, 2], [0, 2]), (slice(2), [0, 1])])
def test_iter_of_steps(llm, gpt2, ids, chosen, steps):
    expected = outputs(gpt2.lm_head, gpt2.generate, ids, **TOKENS)
    logits = []
    with llm.generate(ids, **TOKENS) as tracer:
        with tracer.iter[chosen] as step:
            logits.append((step, llm.lm_head.output))
    with llm.generate(ids, **TOKENS) as tracer:
        in_a_loop = [(step, llm.lm_head.output) for step in tracer.iter[chosen]]
    for found in (logits, in_a_loop):
        assert [step for step, _ in found] == steps
        assert all(torch.equal(value, expected[step]) for step, value in found)
