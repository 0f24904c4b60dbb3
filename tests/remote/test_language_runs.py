"""Runs of a language model on a server return what the same lines return on the model itself, bit for bit."""

import copy
import re

import pytest
import torch
from transformers import GenerationConfig

from diffsight import LanguageModel, logit_lens
from diffsight.errors import InputError, NeverReachedError, OutOfOrderError, PointNotFoundError, RunClosedError
from diffsight.remote import Held
from helpers import same
from remote.serving import serving

IDS = torch.tensor([[5, 17, 42, 8]])
BATCH = torch.tensor([[5, 17, 42], [1, 2, 3]])


def read(model):
    with model.trace(IDS) as run:
        first, last = run.layers_output[0], run.layers[2].output
        inputs = run.ln_final.input
        logits = run.logits
    return first, last, inputs, logits, run.result.logits


def read_arguments(model):
    with model.trace(IDS) as run:
        args, kwargs = run.layers[1].mlp.inputs
        run.stop()
    return args, kwargs


def assign(model):
    with model.trace(IDS) as run:
        run.layers[2].output = run.layers_output[0] * 2
        run.layers[1].mlp.output = torch.zeros(1, 4, 16)
    return run.result.logits


def assign_where_it_stands(model):
    with model.trace(IDS) as run:
        hidden = run.layers_output[1]
        run.layers_output[1] = hidden + 1
        again = run.layers_output[1]
        logits = run.logits
    return hidden, again, logits


def change_in_place(model):
    with model.trace(IDS) as run:
        run.layers_output[1][:, 0] = 0
        run.layers_output[1][:, 1] = 1
        again = run.layers_output[1]
        run.layers[2].mlp.input.mul_(2)
    return again, run.result.logits


def change_a_part(model):
    with model.trace(IDS) as run:
        last = run.at("layers[1].output", (slice(None), -1))
        before = last.clone()
        last += 1
        logits = run.at("lm_head.output", (0, -1))
    return before, logits, run.result.logits


def change_in_place_later(model):
    with model.trace(IDS) as run:
        inputs = run.layers[1].mlp.input
        run.layers[1].mlp.output
        inputs.zero_()  # the model has used it, and may use it again
        logits = run.logits
        again = run.layers[1].mlp.input
    return logits, again


def change_what_was_assigned(model):
    new = torch.ones(1, 4, 16)
    with model.trace(IDS) as run:
        run.layers[2].output = new
        run.layers_output[1]
        new[:, 0] = 5
        found = run.layers_output[2]
        found[:, 1] = 7
        same_object = found is new
    return run.result.logits, new, same_object


def change_the_arguments(model):
    with model.trace(IDS) as run:
        arguments = run.layers[2].attn.inputs[1]
        arguments["attention_mask"] = torch.zeros(1, 1, 4, 4)
    return run.result.logits


def change_an_output_object(model):
    with model.trace(IDS) as run:
        run.transformer.output.last_hidden_state = torch.ones(1, 4, 16)
    return run.result.logits


def skip(model):
    with model.trace(IDS) as run:
        hidden = run.layers[1].input
        run.layers[1].skip(hidden)
        run.layers[2].mlp.skip(torch.ones(1, 4, 16))
    return run.result.logits


def rows(model):
    with model.trace(BATCH) as run:
        x, y = run.rows
        y.layers[1].output = x.layers[1].output
        x.layers_output[2] = x.layers_output[2] * 3
        mine = y.layers_output[2]
    return mine, run.result.logits


def each(model):
    with model.trace(BATCH) as run:

        def body(row):
            hidden = row.layers[row.index].output
            row.layers[2].output = hidden * (row.index + 2)
            return row.index, hidden, row.lm_head.output

        found = run.each(body)
    return found, run.result.logits


def invoke(model):
    with model.trace() as run:
        with run.invoke(IDS):
            clean = run.layers[1].output
        with run.invoke(IDS + 1):
            run.layers[1].output = clean
    return [one.logits for one in run.result]


def edits(model):
    def halve(run):
        run.layers_output[1] = run.layers_output[1] / 2

    def add(run):
        run.layers_output[1] = run.layers_output[1] + 1

    edited = model.edit(halve).edit(add)
    with edited.trace(IDS) as run:
        seen = run.layers_output[1]
    return seen, run.result.logits, edited.trace(IDS).result.logits


def edit_of_steps(model):
    def every(run):
        for step in run.steps:
            run.layers_output[2] = run.layers_output[2] * (1 + step.index)

    edited = model.edit(every)
    with edited.generate(IDS, max_new_tokens=4, do_sample=False) as run:
        found = [run.logits for _ in run.steps]
    return found, run.result


def generate(model):
    with model.generate(IDS, max_new_tokens=5, do_sample=True, seed=3) as run:
        found = []
        for step in run.steps:
            run.layers_output[1][:, -1] += step.index
            found += [step.index, run.logits, step.tokens]
    return found, run.result


def generate_unread(model):
    return model.generate(IDS, max_new_tokens=5, do_sample=True, seed=4).result


def generate_with_a_configuration(model):
    config = GenerationConfig(max_new_tokens=4, do_sample=True, top_k=5, eos_token_id=60, pad_token_id=0)
    with model.generate(IDS, generation_config=config, seed=1) as run:
        found = [step.tokens for step in run.steps]
    return found, run.result


def some_steps(model):
    with model.generate(IDS, max_new_tokens=6, do_sample=False) as run:
        found = [run.layers_output[0] for _ in run.steps[1:4]]
        found.append(run.lm_head.calls[5].output)
    return found


def calls(model):
    with model.generate(IDS, max_new_tokens=3, do_sample=False) as run:
        return run.lm_head.output, run.lm_head.calls[1].output, run.lm_head.next().next().output


def record(model):
    with model.generate(IDS, max_new_tokens=3, do_sample=False) as run:
        kept = run.record(["layers[*].mlp", "ln_final.input"], dtype=torch.float64)
        for _ in run.steps:
            pass
    return dict(kept)


def record_once(model):
    with model.trace(IDS) as run:
        kept = run.record("**.attn")
    return dict(kept)


def follow(model):
    found = []
    run = model.generate(IDS, max_new_tokens=4, do_sample=False)
    run.follow("layers[0].output", lambda hidden: found.append(hidden.clone()))
    run.finish()
    return found


def stop(model):
    with model.generate(IDS, max_new_tokens=8, do_sample=False) as run:
        for step in run.steps:
            tokens = step.tokens
            if step.index == 2:
                run.stop()
    return tokens, run.layers is not None


def call_parts(model):
    with model.trace(IDS) as run:
        hidden = run.layers_output[0]
        logits = model.lm_head(model.ln_final(hidden))
        inner = run.layers[2].mlp(hidden)
    return logits, inner, model.lm_head(hidden), model.project_on_vocab(hidden)


def attention(model):
    with model.trace(IDS) as run:
        probs = run.attention_probs[1]
        heads = run.heads_output[1]
        run.attention_probs[2] = torch.full((1, 2, 4, 4), 0.25)
        run.heads_result[2][:, :, 0] = 0
    return probs, heads, run.result.logits


def steer(model):
    with model.trace(IDS) as run:
        run.steer([0, 1], torch.arange(16.0), factor=0.5, positions=-1)
        probs = run.next_token_probs
    return probs, run.result.logits


def inside_blocks(model):
    with model.trace(IDS) as run:
        with torch.device("meta"):
            first = run.layers_output[0]
        with torch.inference_mode():
            run.layers_output[1] = run.layers_output[1] * 2
        summed = torch.vmap(lambda row: row + run.layers_output[2].sum())(torch.ones(3))
    return first, summed, run.result.logits


def open_across_lines(model):
    run = model.trace(IDS)
    hidden = run.layers_output[0]
    run.layers_output[1] = hidden
    return hidden, run.finish().logits


def lockstep(model):
    hidden = model.trace(IDS)
    with hidden:
        value = hidden.layers_output[2]
    return value


BODIES = [value for name, value in sorted(globals().items()) if callable(value) and value.__module__ == __name__]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_the_same_values(body, language, remote_language):
    torch.manual_seed(0)
    with torch.no_grad():
        expected = body(language)
    found = body(remote_language)
    assert same(plain(expected), plain(found))


def plain(value):
    """Return a value with dictionaries in place of records, without objects that only a server has."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value if isinstance(value, (torch.Tensor, int, float, str)) or value is None else "object"


def test_the_tree_is_known_without_a_run(language, remote_language):
    assert repr(remote_language) == repr(language)
    assert "layers" in dir(remote_language) and len(remote_language.layers) == 3
    with remote_language.scan(IDS) as run:
        assert run.layers_output[1].shape == (1, 4, 16)
        assert run.project_on_vocab(run.layers_output[2]).shape == (1, 4, 61)


def test_the_generation_settings_of_the_model(gpt2):
    """They are known to the client: with beams, the rows of a run have other sizes."""
    net = copy.deepcopy(gpt2)
    net.generation_config = GenerationConfig(num_beams=3, max_new_tokens=3, pad_token_id=0)

    def read(model):
        with model.generate(IDS) as run:
            return run.rows[0].layers_output[0], run.result

    with serving({"beams": LanguageModel(net)}) as address:
        found = read(LanguageModel("beams", remote=address))
    with torch.no_grad():
        expected = read(LanguageModel(net))
    assert same(found, expected) and len(found[0]) == 3


def test_errors_are_those_of_a_local_run(language, remote_language):
    def message(model, body):
        with torch.no_grad(), pytest.raises(Exception) as error:
            body(model)
        return type(error.value), re.sub(r",? (read )?(in|at) [^ ]*\.py:.*?,", "", str(error.value)).partition(" (/")[0]

    def too_late(model):
        with model.trace(IDS) as run:
            run.layers[2].output
            run.layers[0].output

    def changed_too_late(model):
        with model.trace(IDS) as run:
            hidden = run.layers[1].mlp.output
            run.layers[2].output
            hidden.zero_()
            run.logits

    def never(model):
        with model.trace(IDS) as run:
            run.layers[2].calls[3].output = torch.zeros(1, 4, 16)

    def not_there(model):
        with model.trace(IDS) as run:
            run.layers[7].output

    def wrong_shape(model):
        with model.trace(IDS) as run:
            run.layers_output[1] = torch.zeros(1, 4, 5)

    def of_the_body(model):
        with model.trace(IDS) as run:
            run.layers[0].output
            raise KeyError("mine")

    def ended(model):
        with model.trace(IDS) as run:
            run.result
            run.layers[0].output

    def in_each(model):
        with model.trace(BATCH) as run:
            run.each(lambda row: 1 / row.index)

    def in_edit(model):
        model.edit(lambda run: run.layers[9]).trace(IDS).result

    for body in (too_late, changed_too_late, never, not_there, wrong_shape, of_the_body, ended, in_each, in_edit):
        assert message(language, body) == message(remote_language, body), body.__name__


def test_an_error_is_at_the_line_that_asked(remote_language):
    with pytest.raises(OutOfOrderError) as error:
        with remote_language.trace(IDS) as run:
            run.layers[2].output
            run.layers[0].output
    assert error.traceback[-1].path.name == "test_language_runs.py"
    assert "run.layers[0].output" in str(error.traceback[-1].statement)


def test_never_reached_names_the_line(remote_language):
    with pytest.raises(NeverReachedError, match=r"layers\[2\]\.calls\[3\].output .*test_language_runs.py:\d+"):
        with remote_language.trace(IDS) as run:
            run.layers[2].calls[3].output = torch.zeros(1, 4, 16)


def test_what_a_followed_value_is_changed_to_is_not_lost(remote_language):
    run = remote_language.trace(IDS)
    run.follow("layers[0].output", lambda hidden: hidden.zero_())
    with pytest.raises(InputError, match=r"layers\[0\].output: a function of run.follow changed it in place"):
        run.finish()


def test_a_lens_in_a_run(language, remote_language):
    """The replica of the run carries it out, since there may be no other."""
    with remote_language.trace(IDS) as run:
        run.layers_output[1] = run.layers_output[0] * 2
        found = logit_lens(remote_language, IDS, top_k=3)
        logits = run.logits
    with torch.no_grad(), language.trace(IDS) as run:
        run.layers_output[1] = run.layers_output[0] * 2
        assert torch.equal(run.logits, logits)
    assert torch.equal(logit_lens(language, IDS, top_k=3).ids, found.ids)


def test_a_followed_function_asks_nothing(remote_language):
    with pytest.raises(InputError, match=r"lm_head cannot be asked for in a function of run.follow"):
        with remote_language.trace(IDS) as run:
            run.follow("layers[1].output", lambda value, *_: remote_language.lm_head(value))


def test_an_output_object_that_is_changed_too_late(remote_language):
    with pytest.raises(OutOfOrderError, match=r"transformer\.output was changed too late"):
        with remote_language.trace(IDS) as run:
            found = run.transformer.output
            run.lm_head.output
            found.last_hidden_state = torch.ones(1, 4, 16)
            run.logits


def test_an_edit_that_does_nothing_warns(remote_language):
    edited = remote_language.edit(lambda run: run.layers[0].calls[5].output)
    with pytest.warns(UserWarning, match=r"did nothing in this run: the model never reached .*layers\[0\].calls\[5\]"):
        edited.trace(IDS).finish()


def test_a_refused_assignment_is_raised_at_its_own_line(remote_language):
    with pytest.raises(OutOfOrderError, match=r"layers\[0\]\.output was assigned too late") as error:
        with remote_language.trace(IDS) as run:
            run.layers[2].output
            run.layers[0].output = torch.zeros(1, 4, 16)
            run.logits
    assert "run.layers[0].output = " in str(error.traceback[-1].statement)
    assert "test_language_runs.py" in error.value.__notes__[0]


def test_two_parts_of_one_tensor_cannot_undo_each_other(remote_language):
    with pytest.raises(Exception, match="but the same tensor or another part of it"):
        with remote_language.trace(BATCH) as run:
            whole, row = run.layers[1].output, run.rows[0].layers[1].output
            row[:] = 0
            whole[1] = 1
            run.logits


def test_lockstep_with_a_local_run(language, remote_language):
    with torch.no_grad(), language.trace(IDS) as x, remote_language.trace(IDS + 1) as y:
        y.layers_output[1] = x.layers_output[1]
        x.layers_output[2] = y.layers_output[2]
    with torch.no_grad(), language.trace(IDS) as a, language.trace(IDS + 1) as b:
        b.layers_output[1] = a.layers_output[1]
        a.layers_output[2] = b.layers_output[2]
    assert torch.equal(x.result.logits, a.result.logits) and torch.equal(y.result.logits, b.result.logits)


def test_objects_stay_on_the_server(language, remote_language):
    with remote_language.trace(IDS, use_cache=True) as run:
        args, kwargs = run.layers[1].inputs
        held = [value for value in (*args, *kwargs.values()) if isinstance(value, Held)]
        run.layers[1].inputs = (args, kwargs)
    with torch.no_grad():
        expected = language.trace(IDS, use_cache=True).result.logits
    assert held and repr(held[0]).endswith("on the server>") and not hasattr(held[0], "items")
    with pytest.raises(PointNotFoundError, match="the DynamicCache stays on the server"):
        held[0].layers
    assert torch.equal(run.result.logits, expected)


def test_the_label_names_the_model_on_the_server(language, remote_language):
    assert remote_language.label == f"{language.label} (gpt2)"


def test_a_run_that_ended_is_closed(remote_language):
    run = remote_language.trace(IDS)
    run.finish()
    with pytest.raises(RunClosedError):
        run.layers[0].output


def test_functions_are_refused(remote_language):
    with pytest.raises(InputError, match="cannot be sent"):
        remote_language.generate(IDS, max_new_tokens=2, logits_processor=[lambda ids, scores: scores]).finish()


def test_autocast_here_is_refused(remote_language):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="autocast does not reach a server"):
        remote_language.trace(IDS)
