"""Code of nnsight's guides, through `diffsight.compat`.

Each test says which section of which guide it follows: the walkthrough (W), the guides to 0.3 and 0.4, the pages and
tutorials by name, and the README. The models are small and random; the blocks of a bare GPT-2 return plain tensors in
transformers 5, so that the guides' `.output[0]` is `.output` here. What the values should be comes from ordinary hooks.
Language models are in tests/pipelines/test_compat_language.py.
"""

import re
from collections import OrderedDict
from enum import Enum

import numpy
import pytest
import torch
from engine.nets import footprint, outputs, replaced
from torch import nn

import diffsight
import diffsight.compat as nnsight
import tiny
from diffsight import DiffsightError, InputError, Model, OutOfOrderError
from diffsight.compat import CONFIG, DiffusionModel, Envoy, NNsight
from diffsight.errors import NeverReachedError, NoRunError, PointNotFoundError, SourceError

INPUT_SIZE, HIDDEN_DIMS, OUTPUT_SIZE = 5, 10, 2


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [
            ("layer1", nn.Linear(INPUT_SIZE, HIDDEN_DIMS)),
            ("layer2", nn.Linear(HIDDEN_DIMS, OUTPUT_SIZE)),
        ]
        return nn.Sequential(OrderedDict(layers)).requires_grad_(False)


@pytest.fixture
def tiny_model(net):
    return NNsight(net)


@pytest.fixture
def input():
    return torch.rand((1, INPUT_SIZE), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def llm(gpt2):
    return NNsight(gpt2)


@pytest.fixture
def other():
    return torch.tensor([[3, 9, 27]])


TOKENS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


# ---- W: Tracing Context, Getting


def test_tracing_context(tiny_model, net, input):
    with tiny_model.trace(input) as tracer:
        pass
    assert torch.equal(tracer.result, net(input)) and torch.equal(tracer.output, net(input))


def test_getting(tiny_model, net, input):
    with tiny_model.trace(input) as tracer:
        l1_output = tiny_model.layer1.output.save()
        l2_input = tiny_model.layer2.input.save()
        output = tiny_model.output.save()
        tracer.log("Layer 1 - out: ", tiny_model.layer1.output)
    hidden = net.layer1(input)
    assert torch.equal(l1_output, hidden) and torch.equal(l2_input, hidden) and torch.equal(output, net(input))
    assert repr(tiny_model) == repr(net) and isinstance(tiny_model.layer1, Envoy)


def test_outside_of_a_run(tiny_model):
    for ask in (
        lambda: tiny_model.output,
        lambda: tiny_model.layer1.next(),
        lambda: tiny_model.layer1.all(),
        lambda: tiny_model.generator,
    ):
        with pytest.raises(NoRunError):
            ask()


def test_log(tiny_model, net, input, capsys):
    with tiny_model.trace(input) as tracer:
        tracer.log("Layer 1 - out: ", tiny_model.layer1.output.shape)
        nnsight.log("out", 5)
    assert capsys.readouterr().out == "Layer 1 - out:  torch.Size([1, 10])\nout 5\n"


def test_without_a_trace(tiny_model, net, input):
    """W: Getting, `trace=False`."""
    assert torch.equal(tiny_model.trace(input, trace=False), net(input))


# ---- W: Functions, Methods, and Operations; Custom Functions


def test_operations(tiny_model, net, input):
    with tiny_model.trace(input):
        l1_output = tiny_model.layer1.output
        l1_amax = torch.argmax(l1_output, dim=1).save()
        value = (tiny_model.layer1.output.sum() + tiny_model.layer2.output.sum()).save()
    assert torch.equal(l1_amax, net.layer1(input).argmax(1)) and value == net.layer1(input).sum() + net(input).sum()


def test_custom_functions(tiny_model, net, input):
    def tensor_sum(tensor):
        total = 0
        for element in tensor.flatten():
            total += element.item()
        return torch.tensor(total)

    with tiny_model.trace(input) as tracer:
        custom_sum = nnsight.apply(tensor_sum, tiny_model.layer1.output).save()
        again = tracer.apply(tensor_sum, tiny_model.layer1.output)
        sum = tiny_model.layer1.output.sum()
        sum.save()
    assert torch.equal(custom_sum, tensor_sum(net.layer1(input))) and torch.equal(again, custom_sum)
    assert torch.equal(sum, net.layer1(input).sum())


# ---- W: Setting; Scan and Validate


def test_setting(tiny_model, net, input):
    with tiny_model.trace(input) as tracer:
        l1_output_before = tiny_model.layer1.output.clone().save()
        tiny_model.layer1.output[:, HIDDEN_DIMS - 1] = 0
        l1_output_after = tiny_model.layer1.output.save()
    expected = net.layer1(input)
    assert torch.equal(l1_output_before, expected)
    expected[:, -1] = 0
    assert torch.equal(l1_output_after, expected) and torch.equal(tracer.result, net.layer2(expected))


@pytest.mark.parametrize("checks", [{}, {"scan": True, "validate": True}])
def test_setting_what_is_not_there(tiny_model, net, input, checks):
    before = footprint(net)
    with pytest.raises(IndexError, match="out of bounds"), tiny_model.trace(input, **checks):
        tiny_model.layer1.output[:, HIDDEN_DIMS] = 0
    assert footprint(net) == before


@pytest.mark.skipif(not hasattr(Model, "scan"), reason="there is no scan yet")
def test_scanning(tiny_model, input):
    """W: Scan and Validate; scan_validate.ipynb; 0.3: Scanning."""
    with tiny_model.scan(input):
        dim = tiny_model.layer1.output.shape[-1]
    assert dim == HIDDEN_DIMS


# ---- W: Gradients; gradients.ipynb


def test_gradients(tiny_model, net, input):
    """As the guide has it, with `.grad` behind `backward()`."""
    with tiny_model.trace(input):
        layer1 = tiny_model.layer1.output
        layer1.requires_grad = True
        layer2 = tiny_model.layer2.output
        layer2.retain_grad()
        loss = tiny_model.output.sum()
        loss.backward()
        layer1_output_grad = layer1.grad.save()
        layer2_output_grad = layer2.grad.save()
    assert torch.equal(layer1_output_grad, net.layer2.weight.sum(0, keepdim=True))
    assert torch.equal(layer2_output_grad, torch.ones(1, OUTPUT_SIZE))


@pytest.mark.parametrize("ask", ["save", "clone", "set"])
def test_gradients_before_backward(tiny_model, input, ask):
    with pytest.raises((AttributeError, TypeError)) as caught, tiny_model.trace(input):
        tiny_model.layer1.output.requires_grad = True
        if ask == "save":
            tiny_model.layer1.output.grad.save()
        elif ask == "clone":
            tiny_model.layer1.output.grad.clone()
        else:
            tiny_model.layer1.output.grad[:] = 0
    assert "A gradient is there after backward()" in caught.value.__notes__[0]


def test_setting_gradients(llm, gpt2, ids):
    """gradients.ipynb, the third cell, with `register_hook`."""
    with llm.trace(ids):
        hidden_states = llm.transformer.h[1].output.save()
        hidden_states.retain_grad()
        early = llm.transformer.h[-1].output
        early.register_hook(lambda gradient: gradient * 0)
        llm.output.logits.sum().backward()
    assert torch.equal(hidden_states.grad, torch.zeros_like(hidden_states))
    gpt2.zero_grad()


# ---- W: Early Stopping; early_stopping.ipynb


def test_early_stopping(tiny_model, net, input):
    reached = []
    with tiny_model.trace(input):
        l1_out = tiny_model.layer1.output.save()
        tiny_model.layer1.output.stop()
        reached.append("behind")
    assert torch.equal(l1_out, net.layer1(input)) and reached == []
    with tiny_model.trace(input) as tracer:
        l1_out = tiny_model.layer1.output
        tracer.stop()
        reached.append("behind")
    with pytest.raises(OutOfOrderError), tiny_model.trace(input):
        tiny_model.layer2.output.save()
        tiny_model.layer1.output.stop()
    assert torch.equal(l1_out, net.layer1(input)) and reached == []


# ---- W: Conditional Interventions; conditionals.ipynb; 0.3: Conditional Interventions


@pytest.mark.parametrize("number", [-3, 4, 5])
def test_conditions(tiny_model, net, input, number, capsys):
    with tiny_model.trace(input) as tracer:
        rand_int = torch.tensor([number])
        with tracer.cond(rand_int % 2 == 0):
            tracer.log("Even")
        with nnsight.cond(rand_int % 2 == 1):
            tracer.log("Odd")
        with tracer.cond(number > 0):
            with tracer.cond(number % 2 == 0):
                tracer.apply(print, "Positive and even")
        if rand_int % 2 == 0:
            tracer.log("if even")
        elif rand_int % 2 == 1:
            tracer.log("if odd")
        with tracer.cond(torch.all(tiny_model.layer1.output != 1)):
            tiny_model.layer1.output[:] = number
    told = ["Even", "Positive and even", "if even"] if number == 4 else ["Odd", "if odd"]
    assert capsys.readouterr().out.splitlines() == told
    assert torch.equal(tracer.result, net.layer2(torch.full((1, HIDDEN_DIMS), float(number))))


def test_a_condition_that_is_none(tiny_model, input):
    with pytest.raises(RuntimeError, match="more than one value is ambiguous"):
        with tiny_model.trace(input) as tracer:
            with tracer.cond(tiny_model.layer1.output != 1):
                pass


# ---- W: Iterative Interventions; iterator.ipynb; 0.3: Iterator Context, Session Context


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
    assert steps == 2 and not tracer._flow.has_result


@pytest.mark.parametrize("leave", [lambda session: session.exit(), lambda session: nnsight.stop()])
def test_session_ends_early(tiny_model, leave):
    with tiny_model.session() as session:
        li = nnsight.list().save()
        li.append(0)
        leave(session)
        li.append(2)
    assert li == [0]


def test_values_flow_within_a_session(llm, gpt2, ids, other):
    """0.3: Session Context; sessions.ipynb."""
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


# ---- W: LanguageModel, Batching; getting, setting, operations, modules, cross_prompt


def test_language_model(llm, gpt2, ids):
    with torch.no_grad(), llm.trace(ids):
        llm.transformer.h[-1].mlp.output[0][:] = 0
        token_ids = llm.lm_head.output.argmax(dim=-1).save()
    with replaced(gpt2.transformer.h[-1].mlp, torch.zeros_like):
        assert torch.equal(token_ids, gpt2(ids).logits.argmax(-1))


def test_batching(llm, gpt2, ids):
    with torch.no_grad(), llm.trace() as tracer:
        with tracer.invoke(ids):
            llm.transformer.h[-1].mlp.output[0][:] = 0
            token_ids_intervention = llm.lm_head.output.argmax(dim=-1).save()
        with tracer.invoke(ids):
            token_ids_original = llm.lm_head.output.argmax(dim=-1).save()
    assert torch.equal(token_ids_original, gpt2(ids).logits.argmax(-1))
    with replaced(gpt2.transformer.h[-1].mlp, torch.zeros_like):
        assert torch.equal(token_ids_intervention, gpt2(ids).logits.argmax(-1))


def test_cross_prompt(llm, gpt2, ids, other):
    """W: Batching, the second cell; cross_prompt.ipynb; the README's Cross Prompt Intervention."""
    with llm.generate(**TOKENS) as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(ids):
            embeddings = llm.transformer.wte.output
            original = llm.generator.output.save()
            barrier()
        with tracer.invoke(other):
            barrier()
            llm.transformer.wte.output = embeddings
            intervened = llm.generator.output.save()
    assert torch.equal(original, gpt2.generate(ids, **TOKENS))
    with replaced(gpt2.transformer.wte, lambda out: embeddings, only=0):
        assert torch.equal(intervened, gpt2.generate(other, **TOKENS))
    with pytest.raises(InputError, match=r"run\.rows"), llm.trace() as tracer:
        tracer.invoke()


def test_readme_style_of_invokes(llm, gpt2, ids):
    """The first releases' way: `generator.invoke(...) as invoker`, `generator.output`."""
    with llm.generate(**TOKENS) as generator:
        with generator.invoke(ids) as invoker:
            hidden_states = llm.transformer.h[-1].output.save()
    assert torch.equal(invoker.output, gpt2.generate(ids, **TOKENS))
    assert torch.equal(hidden_states, outputs(gpt2.transformer.h[-1], gpt2, ids)[0])


def test_setting_values(llm, gpt2, ids):
    """setting.ipynb; the README's Setting."""
    with torch.no_grad(), llm.trace(ids) as tracer:
        hidden_states_pre = llm.transformer.h[-1].mlp.output.clone().save()
        noise = (0.001**0.5) * torch.randn(hidden_states_pre.shape)
        llm.transformer.h[-1].mlp.output = hidden_states_pre + noise
        hidden_states_post = llm.transformer.h[-1].mlp.output.save()
    assert torch.equal(hidden_states_post, hidden_states_pre + noise)
    with replaced(gpt2.transformer.h[-1].mlp, lambda out: hidden_states_post):
        assert torch.equal(tracer.result.logits, gpt2(ids).logits)


def test_ad_hoc_modules(llm, gpt2, ids):
    """modules.ipynb; the README's Ad-hoc Module."""
    with torch.no_grad(), llm.trace(ids):
        hidden_states = llm.transformer.h[1].output
        hidden_states = llm.lm_head(llm.transformer.ln_f(hidden_states)).save()
        tokens = torch.softmax(hidden_states, dim=2).argmax(dim=2).save()
    state = outputs(gpt2.transformer.h[1], gpt2, ids)[0]
    assert torch.equal(tokens, gpt2.lm_head(gpt2.transformer.ln_f(state)).argmax(-1))


# ---- W: Multiple Token Generation; multiple_token.ipynb; 0.4: .all()


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
    """In a single pass, the module's next call."""

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
    """What the last block returns for each token, with zeros for what the first returns."""
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
    """0.4: what follows `.all()` in the block of the trace is for each token."""
    layers = llm.transformer.h
    with llm.generate(ids, **TOKENS):
        hidden_states = nnsight.list().save()
        count = 0
        layers.all()
        layers[0].output[:] = 0
        hidden_states.append(layers[-1].output)
        count += 1
    assert count == len(hidden_states) == 3 and all(torch.equal(a, b) for a, b in zip(hidden_states, states))


def test_what_was_generated_is_there_behind_all_steps(llm, gpt2, ids, other):
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


@pytest.mark.parametrize(
    "steps", [lambda run, llm: run.iter[:2], lambda run, llm: run.all(), lambda run, llm: llm.all()]
)
def test_steps_around_invokes(llm, ids, steps):
    """function_vectors.ipynb has them in this order: a pass of its own has steps of its own."""
    with pytest.raises(InputError, match=r"inside of `with tracer\.invoke\(\.\.\.\):`"):
        with llm.generate(**TOKENS) as tracer:
            with steps(tracer, llm):
                with tracer.invoke(ids):
                    llm.lm_head.output


def test_steps_of_an_invoke(llm, gpt2, ids, other):
    """`tracer` is written in the invoke as well."""
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
    with pytest.raises(InputError, match=r"within an edit write `with model\.all\(\):`"):
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
        ("with tracer._model.edit(): 1", "Write the block as a function that takes the run, and pass that: "),
    ],
)
def test_where_there_is_no_source(llm, ids, line, instead):
    with pytest.raises(SourceError, match=r"source at <string>:1 cannot be read.*\. " + re.escape(instead)):
        with llm.session() as session, llm.generate(ids, **TOKENS) as tracer:
            exec(line, {"tracer": tracer, "session": session})
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


# ---- W: Model Editing; model_editing.ipynb; editing_tutorial.ipynb; 0.3: Model Editing


def test_model_editing(llm, gpt2, ids, other):
    with torch.no_grad():
        with llm.trace(ids):
            hs = llm.transformer.h[2].output[:, -1, :].save()
        with llm.edit() as llm_edited:
            llm.transformer.h[2].output[:, -1, :] = hs
        with llm.trace(other):
            original_tokens = llm.lm_head.output.argmax(dim=-1).save()
        with llm_edited.trace(other):
            modified_tokens = llm.lm_head.output.argmax(dim=-1).save()
        with llm.edit(inplace=True):
            llm.transformer.h[2].output[:, -1, :] = hs
        with llm.trace(other):
            in_place = llm.lm_head.output.argmax(dim=-1).save()
        llm.clear_edits()
        with llm.trace(other):
            cleared = llm.lm_head.output.argmax(dim=-1).save()
    assert torch.equal(original_tokens, gpt2(other).logits.argmax(-1)) and torch.equal(cleared, original_tokens)
    assert modified_tokens[0, -1] == gpt2(ids).logits[0, -1].argmax() and torch.equal(in_place, modified_tokens)
    assert isinstance(llm_edited, NNsight)


class Coder(nn.Module):
    def forward(self, x):
        return x * 2


class SAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Coder(), Coder()

    def forward(self, x):
        return self.decoder(self.encoder(x))


def test_editing_tutorial(llm, gpt2, ids):
    submodule = llm.transformer.h[0]
    submodule.sae = SAE()
    try:
        with llm.edit(""):
            acts = submodule.output
            submodule.sae(acts, hook=True)
        with llm.trace(ids):
            acts = submodule.sae.encoder.output.save()
            out = submodule.sae.output.save()
        state = outputs(gpt2.transformer.h[0], gpt2, ids)[0]
        assert torch.equal(acts, state * 2) and torch.equal(out, state * 4)
    finally:
        llm.clear_edits()
    assert not hasattr(gpt2.transformer.h[0], "sae")


def test_attached_modules_are_points_where_an_edit_calls_them(llm, gpt2, ids, other):
    """editing_tutorial.ipynb, the first cell: without `hook=True`. Elsewhere a call is a call."""
    submodule = llm.transformer.h[0]
    submodule.sae = SAE()
    try:
        with llm.edit(""):
            acts = submodule.output
            submodule.sae(acts)
        with llm.trace(ids):
            acts = submodule.sae.output.save()
        assert torch.equal(acts, outputs(gpt2.transformer.h[0], gpt2, ids)[0] * 4)
        with llm.edit(inplace=True):
            lens = llm.lm_head(llm.transformer.ln_f(llm.transformer.h[0].output))
            submodule.output[:] = lens.argmax(-1, keepdim=True)
        with llm.trace(ids) as tracer:
            logits = llm.lm_head.output.save()
        assert torch.equal(logits, tracer.result.logits)
    finally:
        llm.clear_edits()


def test_editing_with_an_attachment(llm, gpt2, ids):
    """0.3: Model Editing, the second cell."""

    class ComplexModule(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nnsight.util.WrapperModule()

        def forward(self, x):
            return self.one(x)

    l0 = llm.transformer.h[0]
    l0.attachment = ComplexModule()
    try:
        with torch.no_grad(), llm.edit() as gpt2_edited:
            acts = l0.output
            l0.output[:] = l0.attachment(acts, hook=True)
        with torch.no_grad(), llm.trace(ids):
            original = l0.output.clone().save()
            l0.output[:] *= 0.0
            original_output = llm.output.logits.save()
        with torch.no_grad(), gpt2_edited.trace(ids):
            one = l0.attachment.one.output.clone().save()
            l0.attachment.output *= 0.0
            edited_output = llm.output.logits.save()
    finally:
        llm.clear_edits()
    with replaced(gpt2.transformer.h[0], torch.zeros_like):
        expected = gpt2(ids).logits
    assert (
        torch.equal(original, one) and torch.equal(original_output, expected) and torch.equal(edited_output, expected)
    )


def test_editing_with_the_editor(tiny_model, net, input):
    with tiny_model.edit(inplace=True, return_context=True):
        tiny_model.layer1.output[0][:] = 0
    with tiny_model.trace(input) as edited:
        assert torch.equal(tiny_model.layer1.output, torch.zeros(1, HIDDEN_DIMS))
    tiny_model.clear_edits()
    assert torch.equal(edited.result, net.layer2(torch.zeros(1, HIDDEN_DIMS)))
    assert torch.equal(tiny_model.trace(input).result, net(input))


# ---- tutorials: logit_lens, activation_patching, attribution_patching, LoRA, diffusion_lens


def test_logit_lens(llm, gpt2, ids):
    layers = llm.transformer.h
    probs_layers = []
    with torch.no_grad():
        with llm.trace() as tracer:
            with tracer.invoke(input_ids=ids) as invoker:
                for layer in layers:
                    layer_output = llm.lm_head(llm.transformer.ln_f(layer.output))
                    probs = nn.functional.softmax(layer_output, dim=-1).save()
                    probs_layers.append(probs)
    probs = torch.cat([probs.value for probs in probs_layers])
    tokens = probs.max(dim=-1).indices
    states = [outputs(layer, gpt2, ids)[0] for layer in gpt2.transformer.h]
    expected = torch.cat([gpt2.lm_head(gpt2.transformer.ln_f(state)).argmax(-1) for state in states])
    assert torch.equal(tokens, expected) and torch.equal(invoker.inputs[0][0]["input_ids"][0], ids[0])


def test_activation_patching(llm, gpt2, ids, other):
    clean, corrupted, correct, incorrect = ids, other, 7, 8

    def difference(logits):
        return logits[0, -1, correct] - logits[0, -1, incorrect]

    with torch.no_grad():
        with llm.trace(input_ids=clean) as tracer:
            clean_tokens = tracer.invoker.inputs[0][0]["input_ids"][0]
            clean_hs = [layer.output.save() for layer in llm.transformer.h]
            clean_logit_diff = difference(llm.lm_head.output).save()
        with llm.trace() as tracer:
            with tracer.invoke(corrupted):
                corrupted_logit_diff = difference(llm.lm_head.output).save()
            ioi_patching_results = []
            for layer_idx in range(len(llm.transformer.h)):
                _ioi_patching_results = []
                for token_idx in range(len(clean_tokens)):
                    with tracer.invoke(corrupted):
                        llm.transformer.h[layer_idx].output[:, token_idx, :] = clean_hs[layer_idx][:, token_idx, :]
                        patched_logit_diff = difference(llm.lm_head.output)
                        patched_result = (patched_logit_diff - corrupted_logit_diff) / (
                            clean_logit_diff - corrupted_logit_diff
                        )
                        _ioi_patching_results.append(patched_result.item().save())
                ioi_patching_results.append(_ioi_patching_results)

        assert torch.equal(clean_tokens, ids[0])
        base = difference(gpt2(corrupted).logits)
        for layer_idx, row in enumerate(ioi_patching_results):
            state = outputs(gpt2.transformer.h[layer_idx], gpt2, clean)[0]
            for token_idx, found in enumerate(row):

                def patch(out, state=state, token_idx=token_idx):
                    out[:, token_idx] = state[:, token_idx]
                    return out

                with replaced(gpt2.transformer.h[layer_idx], patch):
                    patched = difference(gpt2(corrupted).logits)
                assert found == ((patched - base) / (difference(gpt2(clean).logits) - base)).item()


def test_attribution_patching(llm, gpt2, ids, other):
    """Activations of two prompts, and the gradients of one, with `retain_grad` and `.grad` behind `backward()`."""
    clean_out, corrupted_out = [], []
    with llm.trace() as tracer:
        with tracer.invoke(ids):
            for layer in llm.transformer.h:
                clean_out.append(layer.attn.c_proj.input.save())
        with tracer.invoke(other):
            for layer in llm.transformer.h:
                corrupted_out.append(layer.attn.c_proj.input.save())
                corrupted_out[-1].retain_grad()
            llm.lm_head.output[0, -1, 7].backward()
    corrupted_grads = [out.grad.save() for out in corrupted_out]
    found = [
        (grad.value * (clean.value - corrupted.value)).sum((0, 2))
        for grad, clean, corrupted in zip(corrupted_grads, clean_out, corrupted_out)
    ]
    gpt2.zero_grad()
    for index, layer in enumerate(gpt2.transformer.h):
        kept = []
        handle = layer.attn.c_proj.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        gpt2(ids)
        logits = gpt2(other).logits
        handle.remove()
        (gradient,) = torch.autograd.grad(logits[0, -1, 7], kept[1])
        assert torch.allclose(found[index], (gradient * (kept[0] - kept[1])).sum((0, 2)), atol=1e-6)


class LORA(nn.Module):
    """W: Training a LoRA; LoRA_tutorial.ipynb."""

    def __init__(self, module: Envoy, dim: int, r: int) -> None:
        super().__init__()
        self.r = r
        self.module = module
        self.WA = nn.Parameter(torch.randn(dim, self.r), requires_grad=True).save()
        self.WB = nn.Parameter(torch.zeros(self.r, dim), requires_grad=True).save()

    def __call__(self, alpha: float = 1.0):
        A_x = torch.matmul(self.module.input, self.WA)
        BA_x = torch.matmul(A_x, self.WB)
        h = BA_x + self.module.output
        self.module.output = h * alpha

    def parameters(self):
        return [self.WA, self.WB]


def test_training_a_lora(llm, gpt2, ids):
    module, answer = llm.transformer.h[-1].mlp, torch.tensor([5])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with llm.session() as session:
            dataset = [(ids, answer)] * 3
            lora = LORA(module, 16, 4)
            by_hand = [parameter.detach().clone().requires_grad_() for parameter in lora.parameters()]
            optimizer = torch.optim.AdamW(lora.parameters(), lr=0.1)
            losses = nnsight.list().save()
            with session.iter(dataset) as batch:
                prompt = batch[0]
                correct_token = batch[1]
                with llm.trace(prompt):
                    lora()
                    logits = llm.lm_head.output
                    loss = nn.functional.cross_entropy(logits[:, -1], correct_token)
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    with torch.no_grad():
        with llm.generate(ids, **TOKENS):
            lora()
            out = llm.generator.output.save()
        without = llm.generate(ids, trace=False, **TOKENS)

    mlp, expected = gpt2.transformer.h[-1].mlp, []
    handle = mlp.register_forward_hook(lambda _, args, out: out + args[0] @ by_hand[0] @ by_hand[1])
    optimizer = torch.optim.AdamW(by_hand, lr=0.1)
    for _ in range(3):
        loss = nn.functional.cross_entropy(gpt2(ids).logits[:, -1], answer)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    handle.remove()
    gpt2.zero_grad()
    assert losses == expected and losses[2] < losses[1] < losses[0]
    hidden = outputs(mlp, gpt2, ids)[0] + outputs(gpt2.transformer.h[-1].ln_2, gpt2, ids)[0] @ by_hand[0] @ by_hand[1]
    with replaced(mlp, lambda out: hidden, only=0):
        assert torch.equal(out, gpt2.generate(ids, **TOKENS))
    assert torch.equal(without, gpt2.generate(ids, **TOKENS))


def test_diffusion_lens():
    """diffusion_lens.ipynb, Stable Diffusion: each layer of the text encoder into its last norm."""
    pipe, kind = tiny.stable_diffusion(), tiny.PIPELINES["stable_diffusion"]
    arguments = kind.inputs() | {"output_type": "pil"}
    model = DiffusionModel(pipe)
    encoder = pipe.text_encoder
    images = []
    for layer in range(encoder.config.num_hidden_layers):
        with model.generate(**arguments, seed=17):
            hidden_state = model.text_encoder.encoder.layers[layer].output
            model.text_encoder.final_layer_norm.input = hidden_state
            image = model.output.images[0].save()
            images.append(image)
    for layer, image in enumerate(images):
        states = []
        handle = encoder.encoder.layers[layer].register_forward_hook(
            lambda _, args, out, states=states: states.append(out)
        )
        norm = encoder.final_layer_norm
        with replaced(norm, lambda _, norm=norm, states=states: norm.forward(states[0]), only=0):  # the prompt's
            expected = pipe(**arguments, generator=torch.Generator().manual_seed(17)).images[0]
        handle.remove()
        assert numpy.array_equal(numpy.asarray(image), numpy.asarray(expected))


def test_a_picture_is_still_saved(tmp_path):
    from PIL import Image

    image = Image.new("RGB", (2, 2), "red")
    image.save(tmp_path / "red.png")
    assert image.save() is image and Image.open(tmp_path / "red.png").getpixel((0, 0)) == (255, 0, 0)


# ---- the same with text: W: LanguageModel to Model Editing, getting, cross_prompt, sessions, the README


@pytest.fixture
def text_model():
    if not hasattr(diffsight, "LanguageModel"):
        pytest.skip("there is no LanguageModel yet")
    import transformers

    tokenizer = tiny.gemma_tokenizer()
    config = transformers.GPT2Config(
        n_layer=3, n_head=2, n_embd=16, n_positions=64, vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return nnsight.LanguageModel((model, tokenizer))


PROMPT, OTHER = "a red circle above a blue square", "a green circle below a blue square"


def test_text(text_model):
    gpt2 = text_model._owner
    with torch.no_grad():
        with text_model.trace(PROMPT) as tracer:
            tokens = tracer.invoker.inputs[0][0]["input_ids"][0]
            hs = text_model.transformer.h[2].output[0][:, -1, :].save()
            token_ids = text_model.lm_head.output.argmax(dim=-1).save()
            logits = text_model.output.logits.save()
        with text_model.edit() as edited:
            text_model.transformer.h[2].output[0][:, -1, :] = hs
        with edited.trace(OTHER):
            modified = text_model.lm_head.output.argmax(dim=-1).save()
    ids = torch.tensor([text_model.tokenizer(PROMPT)["input_ids"]])
    assert torch.equal(tokens, ids[0]) and torch.equal(logits, gpt2(ids).logits)
    assert text_model.tokenizer.decode(token_ids[0][-1]) and modified[0, -1] == token_ids[0, -1]


def test_invokes_of_text(text_model):
    gpt2 = text_model._owner
    with torch.no_grad(), text_model.trace() as tracer:
        with tracer.invoke(PROMPT) as invoker:
            embeddings = text_model.transformer.wte.output
        with tracer.invoke(OTHER):
            text_model.transformer.wte.output = embeddings
            logits = text_model.lm_head.output.save()
    ids = torch.tensor([text_model.tokenizer(PROMPT)["input_ids"]])
    assert torch.equal(logits, gpt2(ids).logits) and torch.equal(invoker.inputs[0][0]["input_ids"], ids)


def test_generated_text(text_model):
    gpt2, layers = text_model._owner, text_model.transformer.h
    with text_model.generate(PROMPT, **TOKENS):
        first = layers[-1].output[0].save()
        second = layers[-1].next().output[0].save()
        out = text_model.generator.output.save()
    with text_model.generate(PROMPT, **TOKENS):
        every = nnsight.list().save()
        with layers.all():
            every.append(layers[-1].output[0])
    ids = torch.tensor([text_model.tokenizer(PROMPT)["input_ids"]])
    states = outputs(gpt2.transformer.h[-1], gpt2.generate, ids, **TOKENS)
    assert torch.equal(out, gpt2.generate(ids, **TOKENS)) and len(every) == 3
    assert all(torch.equal(a, b) for a, b in zip([first, second, *every], [*states[:2], *states]))


def test_sessions_of_text(text_model):
    with torch.no_grad(), text_model.session() as session:
        results = nnsight.list().save()
        with session.iter([PROMPT, OTHER]) as prompt:
            with text_model.trace(prompt):
                results.append(text_model.lm_head.output)
    for prompt, logits in zip([PROMPT, OTHER], results):
        ids = torch.tensor([text_model.tokenizer(prompt)["input_ids"]])
        assert torch.equal(logits, text_model._owner(ids).logits)
    assert torch.equal(text_model.trace(OTHER, trace=False).logits, results[1])


# ---- what has nothing to do, and what cannot be done


def test_a_stop_ends_what_it_stands_in(llm, gpt2, ids):
    with llm.trace() as tracer:
        with tracer.invoke(ids):
            hidden_states = llm.transformer.h[0].output.save()
            hidden_states.stop()
            raise AssertionError("stopped")
        with tracer.invoke(ids):
            logits = llm.lm_head.output.save()
    assert torch.equal(hidden_states, outputs(gpt2.transformer.h[0], gpt2, ids)[0])
    assert torch.equal(logits, gpt2(ids).logits)
    open_run = llm.trace(ids)
    open_run.transformer.h[0].output
    open_run.stop()
    assert "stopped" in repr(open_run)


@pytest.mark.parametrize("opens", [lambda model: model.edit(inpace=True), lambda model: model.session(iter=1)])
def test_unknown_arguments(tiny_model, opens):
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        opens(tiny_model)


def test_settings(tiny_model, net, input):
    """0.4: Improved Error Messaging, Turning off syntactic changes; remote_execution.ipynb, the key."""
    CONFIG.set_default_api_key("YOUR_API_KEY")
    nnsight.CONFIG.APP.REMOTE_LOGGING = False
    nnsight.CONFIG.APP.CONTROL_FLOW_HANDLING = False
    nnsight.CONFIG.APP.DEBUG = False
    nnsight.CONFIG.save()
    assert CONFIG.API.APIKEY == "YOUR_API_KEY" and CONFIG.APP.CONTROL_FLOW_HANDLING is False
    with tiny_model.trace(input, remote=False), nnsight.local():
        output = tiny_model.output
    assert torch.equal(output, net(input)) and nnsight.trace(len) is len


def test_remote(tiny_model, input):
    for opened in (
        lambda: tiny_model.trace(input, remote=True),
        lambda: tiny_model.generate(input, remote=True),
        lambda: tiny_model.session(remote=True),
        lambda: tiny_model.edit(remote=True),
    ):
        with pytest.raises(InputError, match="no server"):
            opened()


def test_what_is_done_otherwise(llm, ids):
    with pytest.raises(DiffsightError, match="methods="):
        llm.transformer.h[0].source
    with pytest.raises(InputError, match=r"tracer\.record"), llm.trace(ids) as tracer:
        tracer.cache()
    with pytest.raises(PointNotFoundError, match="has 3 children"), llm.trace(ids):
        llm.transformer.h[100].output
    with pytest.raises(NeverReachedError), llm.trace(ids):
        llm.transformer.h[0].output.calls = llm.transformer.h[0].calls[5].output


def test_save_on_values():
    values = [1, 1.5, "a", [1], (1,), {"a": 1}, {1}, True, torch.ones(2), numpy.ones(2), nn.Parameter(torch.ones(1))]
    values += [
        b"a",
        1j,
        frozenset([1]),
        range(2),
        numpy.float32(1),
        torch.float16,
        torch.device("cpu"),
        torch.Size([2]),
    ]
    assert all(value.save() is value for value in values) and torch.ones(1).value == 1
    anything = object()
    assert nnsight.save(anything) is anything and not hasattr(anything, "save")

    class Color(str, Enum):  # noqa: UP042  (strings have `save`, and an enumeration its own `value`)
        RED = "red"

    assert Color.RED.value == "red" and Color.RED.save() is Color.RED
    assert (nnsight.list, nnsight.dict, nnsight.int, nnsight.str) == (list, dict, int, str)
