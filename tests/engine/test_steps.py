"""Steps: in a run of `generate`, one a forward pass."""

import warnings

import pytest
import torch

from diffsight import Model, OutOfOrderError
from diffsight.errors import InputError, NeverReachedError, RunClosedError
from helpers import footprint, outputs, replaced
from models.nets import Net, inputs


@pytest.fixture
def logits(gpt2, ids, greedy):
    """Return the outputs of `lm_head` in each of the four passes."""
    return outputs(gpt2.lm_head, gpt2.generate, ids, **greedy)


@pytest.fixture
def generate(gpt2, ids, greedy):
    return lambda: Model(gpt2).generate(ids, **greedy)


def test_one_step_a_token(gpt2, ids, greedy, logits, generate):
    blocks = outputs(gpt2.transformer.h[1], gpt2.generate, ids, **greedy)
    seen = []
    with generate() as run:
        for step in run.steps:
            assert torch.equal(run.transformer.h[1].output, blocks[step.index])
            assert torch.equal(run.lm_head.output, logits[step.index])
            seen.append(step.index)
    assert seen == [0, 1, 2, 3]
    assert torch.equal(run.result, gpt2.generate(ids, **greedy))


def test_without_steps_the_scope_is_the_whole_run(logits, generate):
    with generate() as run:
        kept = run.lm_head.output
        assert torch.equal(kept, logits[0])
        assert torch.equal(run.lm_head.calls[2].output, logits[2])
        assert run.lm_head.output is kept, "read before and held, so it is there"
        with pytest.raises(OutOfOrderError):
            run.lm_head.calls[1].output


def test_a_step_begins_before_the_model_is_called(gpt2, ids, greedy, generate):
    lengths = []
    with generate() as run:
        for _ in run.steps:
            lengths.append(run.inputs[1]["input_ids"].shape[1])
    assert lengths == [3, 1, 1, 1]


def test_an_edit_in_one_step(gpt2, ids, greedy, generate):
    with generate() as run:
        for step in run.steps:
            if step.index == 1:
                run.transformer.h[2].output = -run.transformer.h[2].output
    with replaced(gpt2.transformer.h[2], torch.neg, only=1):
        expected = gpt2.generate(ids, **greedy)
    assert torch.equal(run.result, expected)
    assert not torch.equal(expected, gpt2.generate(ids, **greedy))


def test_an_edit_in_every_step(gpt2, ids, greedy, generate):
    with generate() as run:
        for _ in run.steps:
            run.transformer.h[0].mlp.output = -run.transformer.h[0].mlp.output
    with replaced(gpt2.transformer.h[0].mlp, torch.neg):
        assert torch.equal(run.result, gpt2.generate(ids, **greedy))


@pytest.mark.parametrize(
    "cut", [slice(1, 3), slice(2), slice(2, None), slice(None, None, 2), slice(1, None, 2), slice(1, 50), slice(2, 2)]
)
def test_slices(logits, generate, cut):
    seen = []
    with generate() as run:
        for step in run.steps[cut]:
            seen.append(step.index)
            assert torch.equal(run.lm_head.output, logits[step.index])
    assert seen == list(range(4))[cut]


def test_a_slice_runs_the_model_no_further_than_it_reaches(net, x):
    with Model(net).generate(x, steps=4) as run:
        for _ in run.steps[1:3]:
            pass
        assert net.log.count("first") <= 3
        assert net.log.count("first") >= 1
    assert torch.equal(run.result, Net().generate(x, steps=4))


@pytest.mark.parametrize("cut", [slice(-1, None), slice(None, -2), slice(None, None, -1), slice("a", None)])
def test_slices_count_from_the_beginning(generate, cut):
    with generate() as run, pytest.raises(InputError, match=r"run\.steps"):
        run.steps[cut]


def test_steps_are_walked_through(generate):
    with generate() as run:
        with pytest.raises(TypeError, match=r"run\.steps\[2:3\]`"):
            run.steps[2]
        with pytest.raises(TypeError, match="known only once the model has finished"):
            len(run.steps)
        with pytest.raises(TypeError):
            run.steps[1:][1:]


def test_a_slice_that_lies_behind(generate):
    with generate() as run:
        run.lm_head.calls[2].output
        with pytest.raises(OutOfOrderError, match=r"run\.steps\[1:3\] was asked for too late"):
            for _ in run.steps[1:3]:
                pass
        assert [step.index for step in run.steps[3:]] == [3]


def test_a_slice_behind_the_last_step_warns(generate):
    with generate() as run, pytest.warns(RuntimeWarning, match=r"run\.steps\[5:7\].*ended after 4 steps") as caught:
        for _ in run.steps[5:7]:
            run.lm_head.output[:] = 0
    assert caught[0].filename == __file__
    with generate() as run, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [step.index for step in run.steps[3:7]] == [3]


def test_a_slice_behind_the_only_step_warns(gpt2, ids, greedy):
    with Model(gpt2).generate(ids, **greedy | {"max_new_tokens": 1, "min_new_tokens": 1}) as run:
        with pytest.warns(RuntimeWarning, match=r"run\.steps\[2:4\] never ran: the model ended after 1 step$"):
            assert list(run.steps[2:4]) == []


def test_an_edit_of_later_steps_does_not_warn(gpt2, ids, greedy):
    def later(run):
        for _ in run.steps[5:7]:
            run.lm_head.output[:] = 0

    model = Model(gpt2).edit(later)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.generate(ids, **greedy).result, gpt2.generate(ids, **greedy))


def test_a_step_that_was_left_is_not_left_out_silently(generate):
    """After steps 1 and 2 the model is in step 2, past its beginning: a slice from 2 on either has it or says so."""
    seen = []
    with generate() as run:
        for _ in run.steps[1:3]:
            run.lm_head.output
        try:
            seen = [step.index for step in run.steps[2:4]]
        except OutOfOrderError:
            seen = [2, 3]
    assert seen == [2, 3]


def test_break_and_go_on(net, x):
    plain = outputs(net.last, net.generate, x, steps=4)
    with Model(net).generate(x, steps=4) as run:
        for step in run.steps:
            value = run.last.output
            if step.index == 1:
                break
        assert torch.equal(value, plain[1])
        with pytest.raises(OutOfOrderError):
            run.last.output  # the scope is the whole run again, and its first call is long past
        assert torch.equal(run.last.calls[2].output, plain[2])
    assert torch.equal(run.result, plain[3])


def test_code_after_the_loop_runs(generate):
    reached = []
    with generate() as run:
        for step in run.steps:
            reached.append(step.index)
        reached.append("after")
    assert reached == [0, 1, 2, 3, "after"]


def test_after_the_last_step_the_run_has_ended(gpt2, ids, greedy, generate):
    with generate() as run:
        for _ in run.steps:
            value = run.lm_head.output
        with pytest.raises(RunClosedError, match=r"lm_head\.output"):
            run.lm_head.output
        assert torch.equal(run.result, gpt2.generate(ids, **greedy))
    assert value.shape[-1] == 61


def test_two_loops_one_after_the_other(logits, generate):
    with generate() as run:
        for step in run.steps:
            assert torch.equal(run.lm_head.output, logits[step.index])
            if step.index == 1:
                break
        rest = [(step.index, run.lm_head.output) for step in run.steps]
    assert [index for index, _ in rest] == [2, 3]
    assert all(torch.equal(value, logits[index]) for index, value in rest)


def test_two_slices_one_after_the_other(logits, generate):
    with generate() as run:
        values = [run.lm_head.output for _ in run.steps[:2]] + [run.lm_head.output for _ in run.steps[2:]]
    assert len(values) == 4 and all(map(torch.equal, values, logits))


def test_a_loop_over_a_run_that_has_ended(net, x):
    before = footprint(net)
    with Model(net).generate(x) as run:
        assert [step.index for step in run.steps] == [0, 1, 2]
        assert [step.index for step in run.steps] == []
    assert [step.index for step in run.steps] == []
    assert footprint(net) == before


def test_the_result_asked_for_in_a_loop_ends_it(net, x):
    before = footprint(net)
    with Model(net).generate(x) as run:
        seen = [(step.index, run.result is not None) for step in run.steps]
    assert seen == [(0, True)]
    assert footprint(net) == before and torch.equal(run.result, Net().generate(x))


def test_the_model_ends_within_the_last_step(net, x):
    before = footprint(net)
    missed = []
    with Model(net).generate(x) as run:
        for step in run.steps:
            try:
                run.unused.output
            except NeverReachedError:
                missed.append(("ended", step.index))
            except OutOfOrderError:
                missed.append(("passed", step.index))
    assert missed == [("passed", 0), ("passed", 1), ("ended", 2)]
    assert footprint(net) == before


def test_a_step_that_has_ended_gives_no_more_values(net, x):
    with Model(net).generate(x) as run:
        for step in run.steps:
            if step.index == 0:
                run.last.output
                with pytest.raises(OutOfOrderError):
                    run.first.calls[1].output
                for late in (lambda: run.last.output, lambda: run.first.output):
                    with pytest.raises(OutOfOrderError, match="step 0"):
                        late()
            else:
                assert run.first.output.shape == (2, 4)
    assert torch.equal(run.result, Net().generate(x))


def test_reading_before_the_loop(net, x):
    plain = outputs(net.last, net.generate, x)
    with Model(net).generate(x) as run:
        first = run.first.output
        values = []
        for step in run.steps:
            if step.index == 0:
                assert run.first.output is first
            values.append(run.last.output)
    assert len(values) == 3 and all(map(torch.equal, values, plain))


def test_a_module_first_asked_for_in_a_late_step(net, x):
    plain = outputs(net.layers[1].leaf.lin, net.generate, x, steps=4)
    with Model(net).generate(x, steps=4) as run:
        for step in run.steps:
            if step.index >= 2:
                assert torch.equal(run.layers[1].leaf.lin.output, plain[step.index])
    assert step.index == 3


def test_one_forward_pass_is_one_step(net, x):
    with Model(net).trace(x) as run:
        assert [(step.index, run.last.output.shape) for step in run.steps] == [(0, (2, 4))]
    assert torch.equal(run.result, net(x))


def test_assignments_made_before_the_loop_are_for_the_whole_run(net, x):
    with Model(net).generate(x) as run:
        run.last.calls[1].output = inputs(1)
        for _ in run.steps:
            run.first.output
    assert torch.equal(run.result, net(inputs(1)))


def test_a_step_says_what_it_is(generate):
    with generate() as run:
        for step in run.steps[:1]:
            assert "0" in repr(step)
            assert step.component == "GPT2LMHeadModel"


def test_no_generate(x):
    net = torch.nn.Linear(4, 4)
    with pytest.raises(AttributeError, match="generate"):
        Model(net).generate(x)


def test_a_loop_that_the_model_has_left_behind(generate):
    with generate() as run:
        with pytest.warns(RuntimeWarning, match=r"ended after 2 steps, because something else, such as run"):
            for step in run.steps:
                if step.index == 1:
                    run.result
    with generate() as run:
        run.result
        with pytest.warns(RuntimeWarning, match=r"ended after 0 steps"):
            assert list(run.steps) == []
    with generate() as run, pytest.warns(RuntimeWarning, match=r"ended after 1 step, because .*another loop"):
        for _ in run.steps:
            assert [step.index for step in run.steps] == [1, 2, 3]
    with generate() as run, pytest.warns(RuntimeWarning, match=r"run\.steps\[1::2\] ended after 1 step, because"):
        for _ in run.steps[1::2]:
            run.result
    with generate() as run, warnings.catch_warnings(action="error"):
        for step in run.steps:
            if step.index == 3:
                run.result
        assert list(run.steps) == []


def test_print_shows_where_the_steps_stand(generate):
    with generate() as run:
        assert repr(run.steps) == "<steps of GPT2LMHeadModel: open, the model is before its first call>"
        for _ in run.steps:
            break
        assert repr(run.steps[1:4:2]).startswith("<steps[1:4:2] of GPT2LMHeadModel: open, the model is ")
        run.stop()
    assert repr(run.steps[2:]) == "<steps[2:] of GPT2LMHeadModel: the run was stopped>"
