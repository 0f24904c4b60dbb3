"""Notebooks with a language model, from loading to patching and generation."""

import pytest
import torch

from compat.notebooks.cells import EIFFEL, GARDEN, LAYERS, TOKENS, run_cells
from diffsight.compat import LanguageModel
from diffsight.extending import owner_of
from helpers import outputs, replaced

pytestmark = pytest.mark.usefixtures("no_gradients")


# ---- loading


def test_a_first_notebook(folder, net, ids):
    """Load a model by name, print its tree, trace once, decode."""
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


# ---- using a model


def test_logit_lens(model, net, ids):
    """Decode each layer with the final norm and the head."""
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
    """Patch every layer of one prompt into another at the last token, one invoke each."""
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
    """Gradients of a logit difference at the input of each attention layer's output projection."""
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


def test_ablating_a_layer_at_every_generated_token(model, net, ids):
    """Set a layer's output to zero at every token, in each of the ways to write it."""
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


def test_an_edited_model(model, net, ids, tokenizer):
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


def test_a_scan_before_loading(folder):
    """Shapes are available before the weights are loaded."""
    model = LanguageModel(folder)
    with model.scan(EIFFEL):
        width = model.transformer.h[5].output[0].shape[-1]
    assert width == 32
    assert all(parameter.is_meta for parameter in owner_of(model).parameters())


def test_several_texts_at_once(model, net, ids):
    with model.trace([EIFFEL, GARDEN]):
        hidden = model.transformer.h[4].output[0].save()
    for row, text in zip(hidden, (EIFFEL, GARDEN)):
        expected = outputs(net.transformer.h[4], net, ids[text])[0][0]
        assert torch.allclose(row[-len(expected) :], expected, atol=1e-5)


@pytest.mark.parametrize("value", ["h[3].output", "h[3].attn.output", "h[3].mlp.output", "h[3].output[0]"])
def test_stopping_early(model, net, ids, value):
    """At a layer, at a module that returns a tuple itself, at a tensor."""
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
