"""Steering a model in everything it does, compared with a plain hook."""

import warnings

import numpy as np
import pytest
import torch
import transformers

from diffsight import LanguageModel, steer, steering_sweep
from diffsight.errors import InputError
from helpers import refusal
from models import language

PROMPTS = language.PROMPTS
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 3


def with_hooks(net, layers, edit, call):
    hooks = [net.transformer.h[layer].register_forward_hook(lambda m, args, out: edit(out.clone())) for layer in layers]
    try:
        with torch.no_grad():
            return call()
    finally:
        for hook in hooks:
            hook.remove()


def test_a_forward_pass(net, model):
    ids = language.ids(PROMPTS[0])
    steered = steer(model, [1, 2], VECTOR, factor=2)
    expected = with_hooks(net, [1, 2], lambda out: out + VECTOR * 2, lambda: net(ids).logits)
    with torch.no_grad():
        assert torch.allclose(steered.trace(PROMPTS[0]).result.logits, expected, atol=1e-6)
        assert torch.equal(model.trace(PROMPTS[0]).result.logits, net(ids).logits)  # the model itself has not changed


def test_every_token_it_writes(net, model):
    ids = language.ids(PROMPTS[0])
    arguments = {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    expected = with_hooks(net, [1], lambda out: out + VECTOR, lambda: net.generate(ids, **arguments))
    steered = steer(model, 1, VECTOR).generate(PROMPTS[0], **arguments)
    assert torch.equal(steered.result, expected)
    assert not torch.equal(expected, net.generate(ids, **arguments))


def test_positions_are_those_of_each_prompt(net, model):
    steered = steer(model, 0, VECTOR, positions=[0, -2])
    with torch.no_grad():
        batch = steered.trace(PROMPTS)
        for row, text in zip(batch.result.logits, PROMPTS):

            def edit(out):
                out[:, [0, -2]] += VECTOR
                return out

            expected = with_hooks(net, [0], edit, lambda text=text: net(language.ids(text)).logits)
            assert torch.allclose(row[-expected.shape[1] :], expected[0], atol=1e-5)


def test_positions_are_of_the_prompt_alone(net, model):
    seen = []
    steered = steer(model, 0, VECTOR, positions=0)
    with steered.generate(PROMPTS[0], max_new_tokens=3, min_new_tokens=3) as run:
        for step in run.steps:
            seen.append((step.index, run.layers_output[0][:, 0].clone()))
    with model.generate(PROMPTS[0], max_new_tokens=3, min_new_tokens=3) as run:
        run.layers_output[0][:, 0] += VECTOR
        for (_, steered_state), _ in zip(seen, run.steps):
            assert torch.allclose(run.layers_output[0][:, 0], steered_state, atol=1e-6)


def test_copies_stack_and_are_cleared(net, model):
    twice = steer(steer(model, 1, VECTOR), 1, VECTOR)
    with torch.no_grad():
        expected = steer(model, 1, VECTOR, factor=2).trace(PROMPTS[0]).result.logits
        assert torch.allclose(twice.trace(PROMPTS[0]).result.logits, expected, atol=1e-5)
        twice.clear_edits()
        assert torch.equal(twice.trace(PROMPTS[0]).result.logits, net(language.ids(PROMPTS[0])).logits)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layers": 7}, "there is no layer 7"),
        ({"vector": torch.zeros(31)}, "the vector has 31 features, but hidden states have 32"),
        ({"vector": torch.zeros(2, 32)}, r"a float tensor \(features,\) or .*, not torch.float32 \(2, 32\)"),
        ({"vector": [0.0] * 32}, "not list"),
        ({"vector": VECTOR * torch.nan}, "the vector has components that are not finite"),
        ({"keep_norm": "x"}, "keep_norm is True or False, not 'x'"),
        ({"layers": []}, "no layers are chosen"),
        ({"positions": []}, "no positions are chosen"),
        ({"positions": slice(1, 3)}, r"positions are integers, .*, not slice\(1, 3, None\)"),
    ],
)
def test_bad_input(model, given, words):
    with pytest.raises(InputError, match=words):
        steer(model, **{"layers": 0, "vector": VECTOR, **given})


def test_a_position_that_a_prompt_does_not_have(model):
    with pytest.raises(InputError, match="there is no position 50 in prompt 0"):
        steer(model, 0, VECTOR, positions=50).trace(PROMPTS[0]).result
    with pytest.raises(InputError, match="steer takes a DiffusionModel, LanguageModel or Model, not GPT2LMHeadModel"):
        steer(language.gpt2(), 0, VECTOR)


def of_tokens(cls, config, **more):
    torch.manual_seed(0)
    return LanguageModel(cls(config(vocab_size=64, **more)).eval())


def gpt2():
    return of_tokens(
        transformers.GPT2LMHeadModel, transformers.GPT2Config, n_embd=32, n_layer=2, n_head=2, eos_token_id=0
    )


def bert():
    more = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return of_tokens(transformers.BertForMaskedLM, transformers.BertConfig, **more)


@pytest.mark.parametrize("build", [gpt2, bert])
@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("by", ["lens", "run", "row"])
def test_positions_do_not_count_padding(build, position, by):
    model, vector = build(), torch.randn(32)
    long, short = [2, 3, 4, 5, 6], [7, 8, 9]

    def logits(inputs):
        if by == "lens":
            return steer(model, 0, vector, 5, positions=position).trace(inputs).result.logits
        with model.trace(inputs) as run:
            for handle in [run] if by == "run" else run.rows:
                handle.steer(0, vector, 5, positions=position)
        return run.result.logits

    together, mask = logits([long, short]), model.trace([long, short]).mask
    for row, ids in enumerate([long, short]):
        torch.testing.assert_close(together[row][mask[row].bool()], logits([ids])[0], atol=1e-5, rtol=1e-4)


def test_a_position_beyond_the_end_of_a_row_is_an_error():
    model = gpt2()
    with pytest.raises(InputError, match="there is no position 3, because the sequence has 3 tokens"):
        with model.trace([[2, 3, 4, 5, 6], [7, 8, 9]]) as run:
            run.steer(0, torch.randn(32), positions=3)


def test_a_vector_that_is_not_finite(model):
    assert "not finite" in refusal(steer, model, 0, torch.full((32,), torch.nan))


@pytest.mark.parametrize("factor", ["x", float("nan")])
def test_a_factor_that_is_not_a_number(factor):
    with pytest.raises(InputError, match=f"factor is a finite number, not {factor!r}"):
        steer(gpt2(), 0, torch.randn(32), factor=factor)


def test_a_module_by_its_path(net, model):
    steered = steer(model, "layers[2].mlp", VECTOR, factor=2)
    handle = net.transformer.h[2].mlp.register_forward_hook(lambda module, args, out: out + VECTOR * 2)
    with torch.no_grad():
        expected = net(language.ids(PROMPTS[0])).logits
        handle.remove()
        assert torch.allclose(steered.trace(PROMPTS[0]).result.logits, expected, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_removing_a_direction(net, model, factor):
    unit = VECTOR / VECTOR.norm()
    steered = steer(model, 1, VECTOR, factor, mode="remove")
    with torch.no_grad(), steered.trace(PROMPTS[0]) as run:
        left = run.layers_output[1] @ unit
    with torch.no_grad(), model.trace(PROMPTS[0]) as run:
        before = run.layers_output[1] @ unit
    assert torch.allclose(left, (1 - factor) * before, atol=1e-4)
    assert before.abs().min() > 1e-3


def test_the_norm_is_kept(model):
    steered = steer(model, 1, VECTOR, 3, positions=-1, keep_norm=True)
    with torch.no_grad(), steered.trace(PROMPTS[0]) as run:
        after = run.layers_output[1].clone()
    with torch.no_grad(), model.trace(PROMPTS[0]) as run:
        before = run.layers_output[1].clone()
    assert torch.allclose(after.norm(dim=-1), before.norm(dim=-1), atol=1e-5)
    assert torch.equal(after[:, :-1], before[:, :-1]) and not torch.allclose(after[:, -1], before[:, -1])


@pytest.mark.parametrize(("steps", "changed"), [(0, [0]), (slice(1, None), [1, 2]), ([0, 2], [0, 2])])
def test_generated_tokens_are_chosen(model, steps, changed):
    call = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    steered = steer(model, 1, VECTOR, 100, steps=steps)
    with torch.no_grad(), steered.generate(PROMPTS[0], **call) as run:
        found = [step.index for step in run.steps if run.layers_output[1].norm(dim=-1).min() > 100]
    assert found == changed


def test_generated_tokens_are_not_counted_from_the_end(model):
    with pytest.raises(InputError, match="steps cannot be negative"):
        steer(model, 0, VECTOR, steps=-1)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"factor": np.int64(2)}, {"factor": 2}),
        ({"factor": np.float32(0.5)}, {"factor": 0.5}),
        ({"factor": torch.tensor(2.0)}, {"factor": 2.0}),
        ({"layers": torch.arange(2)}, {"layers": [0, 1]}),
        ({"layers": np.int64(1)}, {"layers": 1}),
        ({"positions": np.arange(2)}, {"positions": [0, 1]}),
        ({"positions": torch.tensor(-1)}, {"positions": -1}),
        ({"positions": iter([0, -1])}, {"positions": [0, -1]}),
        ({"steps": np.arange(1)}, {"steps": 0}),
        ({"steps": iter([0])}, {"steps": 0}),
        ({"steps": slice(np.int64(0), np.int64(1))}, {"steps": 0}),
    ],
)
def test_numbers_of_any_kind(model, given, plain):
    ours, expected = (
        steer(model, **{"layers": 1, "vector": VECTOR, **one}).trace(PROMPTS[0]).result.logits for one in (given, plain)
    )
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"factor": True}, "factor is a finite number, not True"),
        ({"factor": torch.ones(2)}, "factor is a finite number"),
        ({"factor": 1j}, "factor is a finite number, not 1j"),
        ({"layers": torch.ones(2)}, "there is no layer 1.0"),
        ({"positions": 1.5}, "not 1.5"),
        ({"positions": []}, "no positions are chosen"),
        ({"steps": np.ones(2)}, "steps are integers or slices, not 1.0"),
        ({"steps": []}, "no steps are chosen"),
        ({"steps": slice(0, 2, 0)}, "steps are integers or slices"),
    ],
)
def test_other_values_are_refused(model, given, said):
    assert said in refusal(steer, model, **{"layers": 1, "vector": VECTOR, **given})


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([0, 9], "step 9: the run had 2 steps, 0 to 1"),
        (slice(5, 9), "step 5:9:"),
        ([slice(5, None, 2), 4], "steps 5::2, 4:"),
        (range(6), "steps 2, 3, …, 5"),
    ],
)
def test_a_warning_of_steps_that_a_generation_did_not_have(model, steps, said):
    steered = steer(model, [0, 1], VECTOR, steps=steps)
    with pytest.warns(RuntimeWarning) as told:
        steered.generate(PROMPTS[0], max_new_tokens=2).result
    assert len(told) == 1 and f"nothing was steered in {said}" in str(told[0].message)
    assert told[0].filename == __file__


@pytest.mark.parametrize("steps", [None, 1, slice(1, None), slice(0, 9)])
def test_no_warning_of_steps_that_a_generation_had(model, steps, recwarn):
    steer(model, 1, VECTOR, steps=steps).generate(PROMPTS[0], max_new_tokens=2).result
    with steer(model, 1, VECTOR, steps=[0, 9]).generate(PROMPTS[0], max_new_tokens=2) as run:
        run.layers[1].output
        run.stop()
    assert not [one for one in recwarn if "steered" in str(one.message)]


def test_positions_in_steps_without_the_prompt(model):
    with pytest.raises(InputError, match="positions are those of the prompt, which is step 0, but steps"):
        steer(model, 1, VECTOR, positions=-1, steps=slice(1, None))


def test_steps_are_counted_only_where_some_are_chosen(model):
    assert len(steer(model, 0, VECTOR).edits) == 1 and len(steer(model, 0, VECTOR, steps=0).edits) == 2


@pytest.mark.parametrize("factors", [[], [0, "x"], [0, float("nan")], [float("inf")], "1"])
def test_factors_of_a_sweep(model, factors):
    with pytest.raises(InputError, match=r"factors must be finite numbers, such as \[0, 5, 10\], not"):
        steering_sweep(model, PROMPTS, 1, VECTOR, factors=factors)


def test_a_line_warns_once_of_steps(model):
    """By default, as with other warnings: a sweep makes many runs."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        steering_sweep(
            model, PROMPTS, 1, VECTOR, factors=[0, 1], steps=9, batch_size=1, max_new_tokens=2, progress=False
        )
    assert len([one for one in told if "nothing was steered in step 9" in str(one.message)]) == 1
