"""Steps of generation: one per generated token, however many forward passes a choice of tokens takes.

Compared with the bare `generate`, given a stopping criterion and a forward hook written by hand.
"""

import pytest
import torch
import transformers

from diffsight import HFPipeline, LanguageModel, steer
from diffsight.errors import InputError, NeverReachedError, OutOfOrderError, RunClosedError
from helpers import hooked, not_called
from models.building import build
from models.language_kinds import SIZE, TOKENIZER, ids, llama, t5

PROMPT = "a red circle above a red circle above a red"
LENGTH = 8
SEED = 0  # of a text in which no byte that is not a character changes how those before it are decoded

pytestmark = pytest.mark.usefixtures("no_gradients")


def draft() -> torch.nn.Module:
    """Return a model of one layer, with the weights of `llama()`: some of its drafts are right, some are not."""
    net = llama()
    config = transformers.LlamaConfig(**{**net.config.to_dict(), "num_hidden_layers": 1})
    small = build(transformers.LlamaForCausalLM, config)
    small.load_state_dict(net.state_dict(), strict=False)
    return small


class Passes(transformers.StoppingCriteria):
    """Counts the forward passes before each choice of tokens, and the tokens in each choice."""

    def __init__(self, net):
        self.passes, self.lengths, self._count = [], [], 0
        self._hook = net.register_forward_hook(self._note)

    def _note(self, module, args, output):
        self._count += 1

    def __call__(self, input_ids, scores, **kwargs):
        self.passes.append(self._count)
        self.lengths.append(input_ids.shape[-1])
        self._count = 0
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def remove(self):
        self._hook.remove()

    def of_tokens(self, prompt: int) -> list[int]:
        """Return how many passes each token has: the first of those chosen at once has them all."""
        counts = []
        for passes, before, after in zip(self.passes, [prompt, *self.lengths], self.lengths):
            counts += [passes] + [0] * (after - before - 1)
        return counts


def passes_in_each_step(run) -> list[int]:
    counts = []
    for _ in run.steps:
        counts.append(0)
        try:
            while True:
                run.lm_head.calls[counts[-1]].output
                counts[-1] += 1
        except OutOfOrderError:
            pass
    return counts


MODES = {
    "greedy": {},
    "guidance": {"guidance_scale": 2.0},
    "chunks": {"prefill_chunk_size": 4},
    "chunks and guidance": {"prefill_chunk_size": 4, "guidance_scale": 2.0},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "of a configuration": {"generation_config": transformers.GenerationConfig(prompt_lookup_num_tokens=3)},
    "an assistant": {"assistant_model": draft},
    "sampling with an assistant": {"assistant_model": draft, "do_sample": True, "top_k": 0},
    "early exit": {"assistant_early_exit": 1},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_a_token_in_every_mode(mode):
    net = llama()

    def options():  # an assistant remembers how many of its drafts were right
        made = {name: value() if callable(value) else value for name, value in MODES[mode].items()}
        return made | {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH}

    given = {"input_ids": ids(PROMPT), "attention_mask": torch.ones_like(ids(PROMPT))}
    seen = Passes(net)
    torch.manual_seed(SEED)
    expected = net.generate(**given, **options(), stopping_criteria=[seen])[0, given["input_ids"].shape[1] :]
    seen.remove()
    model = LanguageModel((net, TOKENIZER))
    with model.generate(PROMPT, seed=SEED, **options()) as run:
        steps = [(step.index, step.tokens.tolist(), step.text) for step in run.steps]
    assert [index for index, *_ in steps] == list(range(LENGTH))
    assert [tokens for _, tokens, _ in steps] == [[token] for token in expected.tolist()]
    assert "".join(text for *_, text in steps) == run.text
    assert "".join(model.generate(PROMPT, seed=SEED, **options()).stream()) == run.text
    with model.generate(PROMPT, seed=SEED, **options()) as run:
        assert passes_in_each_step(run) == seen.of_tokens(given["input_ids"].shape[1])


EARLY = {"max_new_tokens": LENGTH, "assistant_early_exit": 1}


@pytest.mark.parametrize("end", ["stop", "error", "dropped", "finished"])
def test_an_early_exit_leaves_the_layers_as_they_were(end):
    net = llama()
    model, layers, logits = LanguageModel((net, TOKENIZER)), net.config.num_hidden_layers, net(ids(PROMPT)).logits
    run = model.generate(PROMPT, **EARLY)
    if end == "error":
        with pytest.raises(ValueError, match="of the body"), run:
            run.layers_output[0]
            raise ValueError("of the body")
    else:
        run.layers_output[0]
        assert net.config.num_hidden_layers == 1
        if end != "dropped":
            getattr(run, {"stop": "stop", "finished": "finish"}[end])()
    del run
    assert net.config.num_hidden_layers == layers and torch.equal(net(ids(PROMPT)).logits, logits)
    assert torch.equal(model.trace(PROMPT).result.logits, logits)


@pytest.mark.parametrize("others", [({}, EARLY), (EARLY, {}), (EARLY, EARLY)])
def test_a_run_with_early_exit_is_the_only_open_one(others):
    net = llama()
    model, layers = LanguageModel((net, TOKENIZER)), net.config.num_hidden_layers
    calls = [{"max_new_tokens": LENGTH, **other} for other in others]
    with pytest.raises(InputError, match=r"assistant_early_exit .* no other run of the model can be open"):
        with model.generate(PROMPT, **calls[0]) as x, model.generate(PROMPT, **calls[1]) as y:
            x.layers_output[0] + y.layers_output[0]
    assert net.config.num_hidden_layers == layers
    texts = [model.generate(PROMPT, **call).text for call in (*calls, {"max_new_tokens": LENGTH})]
    assert len({*texts}) == 1


def test_positions_in_a_prompt_whose_beginning_is_in_a_cache():
    net, tokens, vector = llama(), torch.arange(8)[None] + 3, torch.ones(32)
    arguments = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def cache():
        return net(tokens[:, :3], use_cache=True).past_key_values

    def add(module, args, output):
        output = output.clone()
        output[:, -2] += vector
        return output

    stored = cache()
    with hooked(net.model.layers[0], add):
        expected = net.generate(tokens, past_key_values=stored, **arguments).logits[0]
    model = LanguageModel(net)
    for position in (-2, 6):
        with model.generate(tokens, past_key_values=cache(), **arguments) as run:
            run.steer(0, vector, positions=position)
        assert torch.equal(run.result.logits[0], expected)
    for position, told in (
        (2, "the token at position 2 is not read, because the first 3 tokens .* are in past_key_values"),
        (-6, "the token at position -6 is not read, because the first 3 tokens"),
        (8, "there is no position 8, because the sequence has 8 tokens"),
    ):
        with model.generate(tokens, past_key_values=cache(), **arguments) as run:
            with pytest.raises(InputError, match=f"steer: {told}"):
                run.steer(0, vector, positions=[-1, position])


def test_positions_beside_a_cache_of_a_decoder_that_reads_all_its_tokens():
    net, read, begun = t5(), torch.arange(5)[None] + 3, torch.arange(4)[None]
    cache = net(input_ids=read, decoder_input_ids=begun[:, :3], use_cache=True).past_key_values
    arguments = {"decoder_input_ids": begun, "past_key_values": cache, "max_new_tokens": 1, "do_sample": False}
    with LanguageModel(net).generate(read, **arguments) as run:
        before = run.layers_output[0].clone()
        run.steer(0, torch.ones(before.shape[-1]), positions=3)
        added = run.layers_output[0] - before
    assert added.sum(-1).nonzero()[:, 1].unique().tolist() == [3]


def test_positions_in_padded_prompts_whose_beginning_is_in_a_cache():
    net, vector = llama(), torch.ones(32)
    tokens, mask = torch.arange(16).reshape(2, 8) + 3, torch.ones(2, 8).long()
    mask[0, :3] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 1, "do_sample": False}
    cache = net(tokens[:, :3], attention_mask=mask[:, :3], use_cache=True).past_key_values
    with LanguageModel(net).generate(tokens, past_key_values=cache, **arguments) as run:
        with pytest.raises(InputError, match="the token at position 2 is not read"):  # of the second row
            run.steer(0, vector, positions=2)
        before = run.layers_output[0].clone()
        run.rows[0].steer(0, vector, positions=0)
        run.steer(0, vector, positions=4)
        added = run.layers_output[0] - before
    assert added.sum(-1).nonzero().tolist() == [[0, 0], [0, 4], [1, 1]]


@pytest.mark.parametrize("positions", [None, -1, 0])
def test_steering_needs_the_prompt_in_one_pass(positions):
    model, vector = LanguageModel((llama(), TOKENIZER)), torch.ones(32)
    with pytest.raises(InputError, match="steer needs the prompt in one pass, but with prefill_chunk_size=4"):
        with model.generate(PROMPT, max_new_tokens=2, prefill_chunk_size=4) as run:
            run.steer(0, vector, positions=positions)
    with pytest.raises(InputError, match="next_token_probs needs the prompt in one pass"):
        with model.generate([PROMPT, PROMPT], max_new_tokens=2, prefill_chunk_size=4) as run:
            run.rows[0].next_token_probs
    with pytest.raises(InputError, match="skip_layers needs the prompt in one pass"):
        with model.generate(PROMPT, max_new_tokens=2, prefill_chunk_size=4) as run:
            run.skip_layers(1)
    found = []
    for chunks in ({}, {"prefill_chunk_size": 99}):
        with model.generate(PROMPT, max_new_tokens=2, **chunks) as run:
            run.steer(0, vector, positions=positions)
        found.append(run.result)
    assert torch.equal(*found)


def test_steering_the_tokens_after_a_prompt_in_several_passes():
    model, found = LanguageModel((llama(), TOKENIZER)), []
    for chunks in ({}, {"prefill_chunk_size": 4}):
        with model.generate(PROMPT, max_new_tokens=6, **chunks) as run:
            for _ in run.steps[1:]:
                run.steer(0, torch.ones(32), positions=-1)
                found.append(run.next_token_probs)
    assert len(found) == 10 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[:5], found[5:]))


def test_a_steered_model_needs_the_prompt_in_one_pass_for_positions():
    model, vector = LanguageModel((llama(), TOKENIZER)), torch.ones(32)
    chunks = {"max_new_tokens": 6, "prefill_chunk_size": 4}
    with pytest.raises(InputError, match=r"layers\[1\] has the shape \(1, 4, 32\), without one value for each of"):
        steer(model, 1, vector, positions=-1).generate(PROMPT, **chunks).finish()
    expected = steer(model, 1, vector).generate(PROMPT, max_new_tokens=6).result
    assert torch.equal(steer(model, 1, vector).generate(PROMPT, **chunks).result, expected)


def test_several_tokens_at_once_are_in_the_modes_above():
    net = llama()
    seen = Passes(net)
    net.generate(ids(PROMPT), assistant_early_exit=1, max_new_tokens=LENGTH, stopping_criteria=[seen])
    seen.remove()
    assert 0 in seen.of_tokens(ids(PROMPT).shape[1])


def test_an_assistant_with_another_tokenizer():
    config = transformers.LlamaConfig(**{**draft().config.to_dict(), "vocab_size": SIZE + 3})
    small = build(transformers.LlamaForCausalLM, config)
    options = {"assistant_model": small, "tokenizer": TOKENIZER, "assistant_tokenizer": TOKENIZER}
    model = LanguageModel((llama(), TOKENIZER))
    with model.generate(PROMPT, max_new_tokens=LENGTH, **options) as run:
        tokens = [step.tokens.item() for step in run.steps]
    assert tokens == run.result[0, ids(PROMPT).shape[1] :].tolist()


def test_assisted_decoding_of_an_encoder_with_a_decoder():
    net, options = t5(), {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH}
    for more in ({}, {"decoder_input_ids": ids(PROMPT)[:, :3]}):
        expected = net.generate(ids(PROMPT), assistant_model=t5(), **options, **more)
        with LanguageModel((net, TOKENIZER)).generate(PROMPT, assistant_model=t5(), **options, **more) as run:
            tokens = [step.tokens.item() for step in run.steps]
        assert tokens == expected[0, -LENGTH:].tolist()


def test_a_token_without_a_pass_of_its_own_has_no_values():
    net, options = llama(), {"assistant_early_exit": 1, "max_new_tokens": LENGTH, "min_new_tokens": LENGTH}
    seen = Passes(net)
    net.generate(ids(PROMPT), **options, stopping_criteria=[seen])
    seen.remove()
    empty = seen.of_tokens(ids(PROMPT).shape[1]).index(0)
    with pytest.raises(OutOfOrderError, match="ended without reaching it"):
        with LanguageModel((net, TOKENIZER)).generate(PROMPT, **options) as run:
            for step in run.steps:
                if step.index == empty:
                    run.layers[1].output


def test_beam_search_decides_in_the_end():
    model = LanguageModel((llama(), TOKENIZER))
    options = {"num_beams": 2, "max_new_tokens": 3}
    with model.generate(PROMPT, **options) as run:
        for step in run.steps:
            with pytest.raises(InputError, match="beam search follows several texts"):
                step.text
    assert isinstance(run.text, str)
    with pytest.raises(InputError, match=r"stream\(\): beam search"):
        model.generate(PROMPT, **options).stream()
    with model.generate(PROMPT, **options) as run:
        next(iter(run.steps)).tokens
        run.stop()
    with pytest.raises(InputError, match="beam search"):
        run.text


def by_two(model, input_ids, logits_processor, stopping_criteria, generation_config, extra=1, **model_kwargs):
    """Generate two tokens at a time."""
    while True:
        for _ in range(2):
            for _ in range(extra):
                logits = model(input_ids).logits
            input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], -1)
        if stopping_criteria(input_ids, None).all():
            return input_ids


def deaf(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """Generate without asking the stopping criteria."""
    for _ in range(3):
        input_ids = torch.cat([input_ids, model(input_ids).logits[:, -1:].argmax(-1)], -1)
    return input_ids


def test_a_loop_of_the_users_own():
    net, options = llama(), {"custom_generate": by_two, "extra": 3, "max_new_tokens": 6}
    texts = [PROMPT, PROMPT.replace("red", "blue")]
    both = torch.cat([ids(text) for text in texts])
    expected = net.generate(both, **options)[:, both.shape[1] :]
    with LanguageModel((net, TOKENIZER)).generate(both, **options) as run:
        tokens = [step.tokens for step in run.steps]
    assert torch.equal(torch.stack(tokens, 1), expected)


def test_a_loop_of_the_users_own_that_tells_nothing_has_no_steps():
    net = llama()
    model = LanguageModel((net, TOKENIZER))
    expected = net.generate(ids(PROMPT), custom_generate=deaf)
    with pytest.raises(InputError, match=r"cannot be counted, because .* did not call its stopping criteria"):
        with model.generate(PROMPT, custom_generate=deaf) as run:
            for _ in run.steps:
                pass
    with model.generate(PROMPT, custom_generate=deaf) as run:
        assert run.lm_head.calls[2].output.shape[1] == ids(PROMPT).shape[1] + 2
    assert torch.equal(run.result, expected)
    with model.generate(PROMPT, custom_generate=deaf) as run:
        for _ in run.steps:
            run.stop()
            break


def test_a_pipeline_with_an_assistant():
    pipe = transformers.pipeline(
        "text-generation", model=llama(), tokenizer=TOKENIZER, assistant_model=draft(), return_full_text=False
    )
    options = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "do_sample": False}
    texts = [PROMPT, "a blue square"]
    model = HFPipeline(pipe)
    for more in ({}, {"assistant_early_exit": 1}):
        expected = [pipe.model.generate(ids(text), **options, **more)[0, -LENGTH:].tolist() for text in texts]
        steps = [step.tokens.item() for step in model.generate(texts, **options, **more).steps]
        assert [steps[:LENGTH], steps[LENGTH:]] == expected
    assert "".join(model.generate(PROMPT, **options).stream()) == pipe(PROMPT, **options)[0]["generated_text"]


# ---- how it ended


@pytest.mark.parametrize(
    ("stops", "told"), [(True, r"after 1 token \(at the end-of-text token\)"), (False, "after 3 tokens")]
)
def test_errors_say_after_how_many_tokens_generation_ended(stops, told):
    net, options = llama(), {"max_new_tokens": 3, "do_sample": False}
    first = net.generate(ids(PROMPT), **options)[0, ids(PROMPT).shape[1]].item()
    options |= {"eos_token_id": first if stops else None}
    model = LanguageModel((net, TOKENIZER))
    with pytest.raises(RunClosedError, match=rf"the run has ended {told}"):
        with model.generate(PROMPT, **options) as run:
            for _ in run.steps:
                pass
            run.layers[0].output
    with pytest.raises(NeverReachedError, match=rf"the model ended without reaching it {told}"):
        with model.generate(PROMPT, **options) as run:
            run.layers[0].calls[5].output
    with pytest.raises(NeverReachedError, match=rf"The model ran without them, and ended {told}"):
        with model.generate(PROMPT, **options) as run:
            run.layers[0].calls[5].output = torch.zeros(1)


def test_steps_that_the_run_does_not_have_are_refused_before_the_model_is_called():
    net = llama()
    few = r"run.steps\[50:60\] has no steps: the run has 3, 0 to 2"
    with not_called(net), pytest.raises(InputError, match=few):
        with LanguageModel(net, TOKENIZER).generate(PROMPT, max_new_tokens=3) as run:
            for _ in run.steps[50:60]:
                pass
    with LanguageModel(net, TOKENIZER).generate(PROMPT, max_new_tokens=3, min_new_tokens=3) as run:
        assert [step.index for step in run.steps[1:60]] == [1, 2]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"max_new_tokens": "3"}, "max_new_tokens must be a whole number, not '3'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, not 2.5"),
        ({"num_beams": 0}, "num_beams must be 1 or more, not 0"),
        ({"num_beams": [2]}, r"num_beams must be a whole number, not \[2\]"),
        ({"temperature": "x", "do_sample": True}, "temperature must be a number, not 'x'"),
    ],
)
def test_numbers_that_generation_cannot_take(given, told):
    with pytest.raises(InputError, match=told):
        LanguageModel(llama(), TOKENIZER).generate(PROMPT, **given)


def test_strings_at_which_the_text_ends():
    """They are found with the tokenizer of the model."""
    net = llama()
    text = TOKENIZER.decode(net.generate(ids(PROMPT), max_new_tokens=LENGTH)[0, ids(PROMPT).shape[1] :])
    options = {"max_new_tokens": LENGTH, "stop_strings": [text[2:4]]}
    expected = net.generate(ids(PROMPT), tokenizer=TOKENIZER, **options)
    with LanguageModel((net, TOKENIZER)).generate(PROMPT, **options) as run:
        pass
    assert torch.equal(run.result, expected) and expected.shape[1] < ids(PROMPT).shape[1] + LENGTH


def test_tokens_that_a_decoder_was_given():
    start = torch.cat([torch.zeros(1, 1, dtype=torch.long), ids(PROMPT)[:, :3]], 1)
    for given in (start, start[:, 1:]):
        run = LanguageModel((t5(), TOKENIZER)).generate(PROMPT, max_new_tokens=LENGTH, decoder_input_ids=given)
        pieces = "".join(run.stream())
        assert run.text == pieces == TOKENIZER.decode(run.result[0, -LENGTH:], skip_special_tokens=True)


def test_steps_of_a_run_that_has_ended():
    model = LanguageModel((llama(), TOKENIZER))
    with model.generate(PROMPT, max_new_tokens=2) as run:
        run.text
        with pytest.warns(RuntimeWarning, match="ended after 0 steps, because something else, such as run.result"):
            assert list(run.steps) == []
    with pytest.raises(OutOfOrderError, match=r"stream\(\) was asked for too late: the run has ended. Read run.text"):
        run.stream()


def test_a_stream_that_is_stopped_or_read_too_late():
    model = LanguageModel((llama(), TOKENIZER))
    run = model.generate(PROMPT, max_new_tokens=LENGTH, min_new_tokens=LENGTH)
    for _ in run.stream():
        run.stop()
    with model.generate(PROMPT, max_new_tokens=2) as run:
        pieces = run.stream()
    with pytest.raises(OutOfOrderError, match=r"stream\(\) was asked for too late"):
        next(pieces)
