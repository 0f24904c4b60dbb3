"""`session.iter` and values that pass between runs.

Iterative Interventions in nnsight's walkthrough; iterator.ipynb; Iterator Context and Session Context in the guide to
0.3; sessions.ipynb.
"""

import pytest
import torch

import diffsight.compat as nnsight
from compat.constants import INPUT_SIZE, TOKENS
from diffsight.extending import flow_of
from helpers import outputs, replaced


def test_iterative_interventions(tiny_model):
    with tiny_model.session() as session:
        li = nnsight.list()
        [li.append([num]) for num in range(0, 3)]
        li2 = nnsight.list().save()
        with session.iter(li) as item:
            with session.iter(item) as item_2:
                li2.append(item_2)
        for item in li:
            for item_2 in item:
                li2.append(item_2)
    assert li2 == [0, 1, 2, 0, 1, 2]


def test_traces_in_an_iterator(tiny_model, net):
    prompts = nnsight.list([torch.full((1, INPUT_SIZE), float(number)) for number in range(3)])
    with tiny_model.session() as session:
        results = nnsight.list().save()
        with session.iter(prompts) as prompt:
            with tiny_model.trace(prompt):
                results.append(tiny_model.layer2.output)
    assert len(results) == 3 and all(torch.equal(a, net(x)) for a, x in zip(results, prompts))


def test_iterator_with_its_context(tiny_model, capsys):
    with tiny_model.session() as session:
        with session.iter([0, 1, 2, 3], return_context=True) as (item, iterator):
            with iterator.cond(item % 2 == 0):
                nnsight.log(item)
        with session.iter([0, 1, 2, 3], return_context=True) as (item, iterator):
            with iterator.cond(item == 2):
                iterator.exit()
            nnsight.log("until", item)
        with session.iter([0, 1, 2, 3]) as item:
            session.log("again", item)
            with nnsight.cond(item == 1):
                nnsight.stop()
    assert capsys.readouterr().out.splitlines() == ["0", "2", "until 0", "until 1", "again 0", "again 1"]


def test_stop_keeps_what_was_assigned(tiny_model, llm, ids):
    count = 0
    with tiny_model.session() as session:
        with session.iter([3, 4, 5]) as item:
            count += item
            with nnsight.cond(item == 4):
                nnsight.stop()
    assert (count, item) == (7, 4)
    with llm.generate(ids, **TOKENS) as tracer:
        with tracer.iter[:] as step:
            logits = llm.lm_head.output
            if step == 1:
                tracer.stop()
    assert step == 1 and logits.shape[1] == 1
    steps = 0
    with llm.generate(ids, **TOKENS) as tracer:
        llm.transformer.h.all()
        steps += 1
        if steps == 2:
            nnsight.stop()
    assert steps == 2 and not flow_of(tracer).has_result


@pytest.mark.parametrize("leave", [lambda session: session.exit(), lambda session: nnsight.stop()])
def test_session_ends_early(tiny_model, leave):
    with tiny_model.session() as session:
        li = nnsight.list().save()
        li.append(0)
        leave(session)
        li.append(2)
    assert li == [0]


def test_values_flow_within_a_session(llm, gpt2, ids, other):
    """Guide to 0.3: Session Context; sessions.ipynb."""
    with llm.session() as session:
        with llm.trace(ids):
            hs = llm.transformer.h[-1].output[:, -1, :]
            t1_tokens_out = llm.lm_head.output.argmax(dim=-1).save()
        with llm.trace(other):
            llm.transformer.h[1].output[:, -1, :] = hs[:]
            t2_tokens_out = llm.lm_head.output.argmax(dim=-1).save()
        session.log("done")
    assert torch.equal(t1_tokens_out, gpt2(ids).logits.argmax(-1))
    state = outputs(gpt2.transformer.h[-1], gpt2, ids)[0][:, -1]

    def edit(out):
        out[:, -1] = state
        return out

    with torch.no_grad(), replaced(gpt2.transformer.h[1], edit):
        assert torch.equal(t2_tokens_out, gpt2(other).logits.argmax(-1))
