"""Notebooks written for nnsight, on a language model, through `diffsight.compat`.

A GPT-2 of twelve layers with random weights, and a byte-level tokenizer that is trained here. The cells are our own,
in the manner of nnsight's guides, which were written when the layers of transformers gave tuples. What the values
should be comes from ordinary hooks.
"""

import linecache

import pytest
import torch
import transformers
from engine.nets import outputs, replaced
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import diffsight.compat as nnsight
from diffsight import InputError, OutOfOrderError
from diffsight.compat import CONFIG, LanguageModel
from diffsight.errors import SourceError

pytestmark = pytest.mark.usefixtures("no_gradients")

EIFFEL = "The Eiffel Tower is in the city of"
GARDEN = "Madison Square Garden is in the city of"
TOKENS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
LAYERS = 12


@pytest.fixture(scope="module")
def tokenizer():
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    plain.train_from_iterator([EIFFEL, GARDEN, " Paris Rome York John Mary"], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<|endoftext|>", bos_token="<|endoftext|>", model_max_length=64
    )


@pytest.fixture(scope="module")
def net(tokenizer):
    config = transformers.GPT2Config(
        n_layer=LAYERS, n_embd=32, n_head=4, n_positions=64, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
        for parameter in model.parameters():  # larger than the usual start, so that edits make a difference
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def folder(net, tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp("saved") / "gpt2"
    net.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


@pytest.fixture
def model(net, tokenizer):
    return LanguageModel((net, tokenizer))


@pytest.fixture
def ids(tokenizer):
    return {text: tokenizer(text, return_tensors="pt")["input_ids"] for text in (EIFFEL, GARDEN)}


def run_cells(*cells, **names):
    """Runs cells in turn, in one namespace, each from a source of its own as a notebook's."""
    for number, cell in enumerate(cells):
        place = f"<cell {number} of {hash(cells)}>"
        linecache.cache[place] = (len(cell), None, cell.splitlines(keepends=True), place)
        exec(compile(cell, place, "exec"), names)
    return names


# ---- from the hub to the last layer


def test_a_first_notebook(folder, net, ids):
    """The model of a name, its tree, one trace, decoded."""
    names = run_cells(
        "import diffsight.compat as nnsight\nfrom diffsight.compat import LanguageModel, util\nimport torch",
        'model = LanguageModel(folder, device_map="auto", dispatch=True)\nprint(model)',
        f"""
with model.trace({EIFFEL!r}) as tracer:
    hidden_states = model.transformer.h[-1].output[0].save()
    output = model.output.save()
""",
        """
last = model.tokenizer.decode(output.logits[0, -1].argmax())
given = tracer.invoker.inputs[0][0]["input_ids"]
""",
        folder=folder,
    )
    expected = net(ids[EIFFEL])
    assert torch.equal(names["output"].logits, expected.logits)
    assert torch.equal(names["hidden_states"], outputs(net.transformer.h[-1], net, ids[EIFFEL])[0])
    assert names["last"] == names["model"].tokenizer.decode(expected.logits[0, -1].argmax())
    assert torch.equal(names["given"], ids[EIFFEL])


def test_the_tokenizer_pads(folder, tokenizer):
    assert tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token
    model = LanguageModel(folder)
    both = model.tokenizer([EIFFEL, "The city"], return_tensors="pt", padding=True)
    assert both["input_ids"].shape == both["attention_mask"].shape
    assert both["attention_mask"].sum() < both["attention_mask"].numel()


@pytest.mark.parametrize(
    "line",
    [
        "from diffsight.compat.util import WrapperModule",
        "from diffsight.compat.envoy import Envoy",
        "from diffsight.compat.models.LanguageModel import LanguageModel",
        "from diffsight.compat.modeling.language import LanguageModel",
        "from diffsight.compat.modeling.diffusion import DiffusionModel",
        "from diffsight.compat.tracing.graph import Proxy",
        "from diffsight.compat.logger import remote_logger; remote_logger.propagate = False",
        "import diffsight.compat.modeling.language as language; language.LanguageModel",
        "from diffsight.compat import util; util.WrapperModule()",
    ],
)
def test_imports(line):
    names = run_cells(line)
    assert all(found is getattr(nnsight, name) for name, found in names.items() if hasattr(nnsight, name))


@pytest.mark.parametrize(
    "line", ["from diffsight.compat.modeling.vllm import VLLM", "from diffsight.compat.util import X"]
)
def test_what_is_not_there_cannot_be_imported(line):
    with pytest.raises(ImportError):
        run_cells(line)


# ---- layers give tuples


def test_layers_give_tuples(model, net, ids):
    with model.trace(EIFFEL):
        given = model.transformer.h[3].output
        inside = model.transformer.h[4].mlp.output
    assert isinstance(given, tuple) and len(given) == 1
    assert torch.equal(given[0], outputs(net.transformer.h[3], net, ids[EIFFEL])[0])
    assert isinstance(inside, torch.Tensor)


@pytest.mark.parametrize("value", ["(zeros,)", "(zeros, *layer.output[1:])", "zeros"])
def test_setting_a_layer(model, net, ids, value):
    with replaced(net.transformer.h[3], torch.zeros_like):
        expected = net(ids[EIFFEL]).logits
    names = run_cells(
        f"""
with model.trace({EIFFEL!r}) as tracer:
    layer = model.transformer.h[3]
    zeros = torch.zeros_like(layer.output[0])
    layer.output = {value}
    logits = model.lm_head.output.save()
""",
        model=model,
        torch=torch,
    )
    assert torch.equal(names["logits"], expected)


def test_setting_a_layer_ahead_and_in_place(model, net, ids):
    zeros = torch.zeros(1, ids[EIFFEL].shape[1], 32)
    with replaced(net.transformer.h[3], torch.zeros_like):
        expected = net(ids[EIFFEL]).logits
    with model.trace(EIFFEL):
        model.transformer.h[3].output = (zeros,)
        ahead = model.lm_head.output
    with model.trace(EIFFEL):
        model.transformer.h[3].output[0][:] = 0
        in_place = model.lm_head.output
    assert torch.equal(ahead, expected) and torch.equal(in_place, expected)


def test_a_layer_that_is_called(model, net, ids):
    with model.trace(EIFFEL):
        hidden = model.transformer.h[3].output[0]
        again = model.transformer.h[3](hidden)
    assert isinstance(again, tuple) and torch.equal(again[0], net.transformer.h[3](hidden))


def test_the_switch(model, net, ids):
    CONFIG.APP.BLOCKS_GIVE_TUPLES = False
    try:
        with model.trace(EIFFEL):
            given = model.transformer.h[3].output
    finally:
        CONFIG.APP.BLOCKS_GIVE_TUPLES = True
    assert torch.equal(given, outputs(net.transformer.h[3], net, ids[EIFFEL])[0])


def test_standard_names_and_accessors_stay_plain(model):
    with model.trace(EIFFEL) as tracer:
        assert isinstance(tracer.layers_output[3], torch.Tensor)
        assert isinstance(model.layers[4].output, tuple)


def test_a_layer_that_gives_a_tuple_of_its_own(tokenizer):
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    net = transformers.T5ForConditionalGeneration(config).eval()
    model = LanguageModel((net, tokenizer))
    with model.trace(EIFFEL) as tracer:
        given = model.encoder.block[1].output
    own = outputs(net.encoder.block[1], net, tracer.tokens, decoder_input_ids=torch.tensor([[0]]))[0]
    assert type(own) is type(given) is tuple and len(own) == len(given) > 1
    assert torch.equal(given[0], own[0])


# ---- what one does with them


def test_logit_lens(model, net, ids):
    """Each layer through the final norm and the head."""
    names = run_cells(
        f"""
probs_layers = []
with model.trace() as tracer:
    with tracer.invoke({EIFFEL!r}) as invoker:
        for layer in model.transformer.h:
            layer_output = model.lm_head(model.transformer.ln_f(layer.output[0]))
            probs = torch.nn.functional.softmax(layer_output, dim=-1).save()
            probs_layers.append(probs)
probs = torch.cat([probs.value for probs in probs_layers])
max_probs, tokens = probs.max(dim=-1)
words = [[model.tokenizer.decode(t.cpu()) for t in layer_tokens] for layer_tokens in tokens]
input_words = [model.tokenizer.decode(t) for t in invoker.inputs[0][0]["input_ids"][0]]
""",
        model=model,
        torch=torch,
    )
    hidden = [outputs(layer, net, ids[EIFFEL])[0] for layer in net.transformer.h]
    expected = [net.lm_head(net.transformer.ln_f(state)).softmax(-1) for state in hidden]
    assert torch.equal(names["probs"], torch.cat(expected))
    assert len(names["words"]) == LAYERS and "".join(names["input_words"]) == EIFFEL


def test_activation_patching(model, net, ids):
    """Every layer of one prompt into another, one invoke each, at the last token."""
    names = run_cells(
        f"""
with model.trace({EIFFEL!r}) as tracer:
    clean_hs = [model.transformer.h[i].output[0].save() for i in range(len(model.transformer.h))]
    clean_logits = model.lm_head.output[0, -1].save()
""",
        f"""
results = []
for i in range(len(model.transformer.h)):
    with model.trace({GARDEN!r}) as tracer:
        model.transformer.h[i].output[0][:, -1, :] = clean_hs[i][:, -1, :]
        patched_logits = model.lm_head.output
        results.append(patched_logits[0, -1].save())
""",
        f"""
in_one = []
with model.trace() as tracer:
    with tracer.invoke({EIFFEL!r}):
        late = model.transformer.h[9].output[0][:, -1]
    with tracer.invoke({GARDEN!r}):
        model.transformer.h[2].output[0][:, -1] = late
        in_one.append(model.lm_head.output[0, -1].save())
""",
        model=model,
    )
    states = [outputs(layer, net, ids[EIFFEL])[0] for layer in net.transformer.h]

    def patched(index, state):
        def patch(out):
            out[:, -1] = state[:, -1]
            return out

        with replaced(net.transformer.h[index], patch):
            return net(ids[GARDEN]).logits[0, -1]

    assert all(torch.equal(found, patched(i, states[i])) for i, found in enumerate(names["results"]))
    assert torch.equal(names["in_one"][0], patched(2, states[9]))


def test_attribution_patching(model, net, ids):
    """Gradients of a difference of logits, at each layer's attention output, where it is projected."""
    names = run_cells(
        f"""
values = []
with torch.enable_grad():
    with model.trace({EIFFEL!r}) as tracer:
        for layer in model.transformer.h:
            attn_out = layer.attn.c_proj.input
            attn_out.retain_grad()
            values.append(attn_out.save())
        logits = model.lm_head.output.save()
        loss = (logits[0, -1, 5] - logits[0, -1, 7]).save()
        loss.backward()
grads = [value.grad for value in values]
""",
        model=model,
        torch=torch,
    )
    kept = []

    def keep(module, args):
        args[0].retain_grad()
        kept.append(args[0])

    hooks = [layer.attn.c_proj.register_forward_pre_hook(keep) for layer in net.transformer.h]
    with torch.enable_grad():
        logits = net(ids[EIFFEL]).logits
        (logits[0, -1, 5] - logits[0, -1, 7]).backward()
    for hook in hooks:
        hook.remove()
    net.zero_grad()
    assert all(torch.equal(found, value.grad) for found, value in zip(names["grads"], kept))


def test_ablating_tokens_as_they_are_written(model, net, ids):
    """A layer's output set to zero at every token, in each of the ways to say so."""
    with replaced(net.transformer.h[2], torch.zeros_like):
        expected = net.generate(ids[EIFFEL], attention_mask=torch.ones_like(ids[EIFFEL]), **TOKENS)
    for body in (
        "with model.transformer.h.all():\n        model.transformer.h[2].output[0][:] = 0",
        "with tracer.all():\n        model.transformer.h[2].output[0][:] = 0",
        "with tracer.iter[:]:\n        model.transformer.h[2].output[0][:] = 0",
        "for step in tracer.iter[:]:\n        model.transformer.h[2].output[0][:] = 0",
        "model.transformer.h.all()\n    model.transformer.h[2].output[0][:] = 0",
        "for _ in range(3):\n        model.transformer.h[2].output[0][:] = 0\n        model.transformer.h[2].next()",
    ):
        names = run_cells(
            f"with model.generate({EIFFEL!r}, **tokens) as tracer:\n    {body}\nout = tracer.result\n",
            model=model,
            tokens=TOKENS,
        )
        assert torch.equal(names["out"], expected), body


def test_hidden_states_of_each_token(model, net, ids):
    mask = torch.ones_like(ids[EIFFEL])
    with model.generate(EIFFEL, **TOKENS):
        first = model.transformer.h[-1].output[0].save()
        second = model.transformer.h[-1].next().output[0].save()
        third = model.transformer.h[-1].next().output[0].save()
        out = model.generator.output.save()
    expected = outputs(net.transformer.h[-1], net.generate, ids[EIFFEL], attention_mask=mask, **TOKENS)
    assert all(torch.equal(a, b) for a, b in zip((first, second, third), expected))
    assert model.tokenizer.decode(out[0]) == model.tokenizer.decode(
        net.generate(ids[EIFFEL], attention_mask=mask, **TOKENS)[0]
    )


def test_a_model_edited_for_good(model, net, ids, tokenizer):
    wanted = torch.full((1, len(tokenizer)), -100.0)
    wanted[:, 7] = 100.0
    hidden = outputs(net.transformer.h[6], net, ids[EIFFEL])[0][:, -1]
    with model.edit() as edited:
        model.transformer.h[6].output[0][:, -1, :] = hidden
    with model.trace(GARDEN):
        plain = model.lm_head.output.save()
    with edited.trace(GARDEN):
        changed = model.lm_head.output.save()

    def patch(out):
        out[:, -1] = hidden
        return out

    assert torch.equal(plain, net(ids[GARDEN]).logits)
    with replaced(net.transformer.h[6], patch):
        assert torch.equal(changed, net(ids[GARDEN]).logits)


def test_a_scan_beforehand(folder):
    """Shapes of a model whose weights have not been loaded."""
    model = LanguageModel(folder)
    with model.scan(EIFFEL):
        width = model.transformer.h[5].output[0].shape[-1]
    assert width == 32
    assert all(parameter.is_meta for parameter in model._owner.parameters())


def test_several_texts_at_once(model, net, ids):
    with model.trace([EIFFEL, GARDEN]):
        hidden = model.transformer.h[4].output[0].save()
    for row, text in zip(hidden, (EIFFEL, GARDEN)):
        expected = outputs(net.transformer.h[4], net, ids[text])[0][0]
        assert torch.allclose(row[-len(expected) :], expected, atol=1e-5)


@pytest.mark.parametrize("value", ["h[3].output", "h[3].attn.output", "h[3].mlp.output", "h[3].output[0]"])
def test_stopping_early(model, net, ids, value):
    """At a layer, at a part that gives a tuple of its own, at a tensor."""
    names = run_cells(
        f"""
reached = []
with model.trace({EIFFEL!r}):
    before = model.transformer.h[2].output[0].save()
    model.transformer.{value}.stop()
    reached.append("behind")
""",
        model=model,
    )
    assert torch.equal(names["before"], outputs(net.transformer.h[2], net, ids[EIFFEL])[0]) and not names["reached"]


# ---- what cannot be: each error says what to write


def failing(model, cell, kind):
    with pytest.raises(kind) as caught:
        run_cells(cell, model=model, torch=torch, nnsight=nnsight)
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


@pytest.mark.parametrize("line", ["hidden.grad.save()", "hidden.grad[:] = 0", "hidden.grad.clone()"])
def test_a_gradient_before_backward(model, line):
    cell = f"""
with torch.enable_grad(), model.trace({EIFFEL!r}):
    hidden = model.transformer.h[3].output[0]
    {line}
    model.output.logits.sum().backward()
"""
    told = failing(model, cell, (AttributeError, TypeError))
    assert "x.retain_grad() before it and x.grad after it" in told and "x.register_hook(" in told


@pytest.mark.parametrize(
    "body, kind, words",
    [
        ("model.past.save()", AttributeError, "has no 'past'"),
        ("object().save()", AttributeError, "Write nnsight.save(x)"),
        ("model.output.past_key_values.save()", AttributeError, "Write nnsight.save(x)"),
        (
            "count = nnsight.int(0); count.update(count + 1)",
            AttributeError,
            "write x = ... in the place of x.update(...)",
        ),
        ("tracer.cache()", InputError, r'kept = tracer.record("transformer.h[*]")'),
        ("model.transformer.h[0].source", Exception, "Model(net, methods=[...])"),
        ("model.lm_head.output; model.transformer.h[0].output", OutOfOrderError, "Ask in the order in which the model"),
    ],
)
def test_what_cannot_be_says_what_to_write(model, body, kind, words):
    assert words in failing(model, f"with model.trace({EIFFEL!r}) as tracer:\n    {body}\n", kind)
    # `session` blocks say the same
    if "tracer" not in body:
        nested = f"with model.session() as session:\n    with model.trace({EIFFEL!r}):\n        {body}\n"
        assert failing(model, nested, kind).count(words) == 1


def test_all_without_with_and_without_source(model):
    with pytest.raises(SourceError, match=r"Write a loop: `for step in tracer\.iter\[:\]:`"):
        with model.generate(EIFFEL, **TOKENS) as tracer:
            exec("tracer.all()\nmodel.lm_head.output", {"tracer": tracer, "model": model})


def test_a_server(model):
    told = failing(model, f"with model.trace({EIFFEL!r}, remote=True):\n    pass\n", InputError)
    assert "Leave it out, and the model runs in this process" in told
    told = failing(model, "with model.session(remote=True):\n    pass\n", InputError)
    assert "Leave it out" in told


def test_saving_anything(model):
    """`nnsight.save` takes what has no `.save()`."""
    with model.trace(EIFFEL, use_cache=True):
        cache = nnsight.save(model.output.past_key_values)
        thing = nnsight.save(object())
    assert cache.get_seq_length() == len(model.tokenizer(EIFFEL)["input_ids"])
    assert thing is not None
