"""`model.edit`, and modules attached to a model.

Model Editing in nnsight's walkthrough and in the guide to 0.3; model_editing.ipynb; editing_tutorial.ipynb.
"""

import pytest
import torch
from torch import nn

import diffsight.compat as nnsight
from compat.constants import HIDDEN_DIMS
from diffsight.compat import NNsight
from diffsight.errors import PointNotFoundError
from helpers import outputs, replaced


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


def test_points_of_an_attached_module_fire_in_an_edit(llm, gpt2, ids, other):
    """editing_tutorial.ipynb, the first cell, calls it without `hook=True`. Elsewhere calls fire no points."""
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


def test_an_attached_module_is_replaced_by_the_next(llm, gpt2, ids):
    """editing_tutorial.ipynb attaches a plain module first, and then one with an encoder under the same name."""

    class Coders(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = SAE()

        def forward(self, x):
            return self.encoder(x) + 1

    submodule = llm.transformer.h[0]
    submodule.sae = SAE()
    try:
        with llm.trace(ids):
            plain = submodule.sae(submodule.output).save()
        submodule.sae = Coders()
        with llm.edit(""):
            submodule.sae(submodule.output, hook=True)
        with llm.trace(ids):
            acts = submodule.sae.encoder.output.save()
            out = submodule.sae.output.save()
        state = outputs(gpt2.transformer.h[0], gpt2, ids)[0]
        assert torch.equal(plain, acts) and torch.equal(acts, SAE()(state)) and torch.equal(out, acts + 1)
    finally:
        llm.clear_edits()
    assert not hasattr(gpt2.transformer.h[0], "sae")


def test_editing_with_an_attachment(llm, gpt2, ids):
    """Guide to 0.3: Model Editing, the second cell."""

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


@pytest.mark.parametrize("name", ["edit", "clear_edits", "generate", "scan", "session"])
def test_methods_that_only_the_model_has(llm, name):
    with pytest.raises(PointNotFoundError, match=rf"write model\.{name}\(\.\.\.\)"):
        getattr(llm.transformer.h[1], name)


def test_edit_in_the_run_of_a_part(llm, gpt2):
    layer, hidden = llm.transformer.h[1], torch.ones(1, 2, 16)
    with llm.edit(inplace=True):
        layer.mlp.output[:] = 0
    with torch.no_grad(), layer.trace(hidden) as tracer:
        pass
    with torch.no_grad(), replaced(gpt2.transformer.h[1].mlp, torch.zeros_like):
        assert torch.equal(tracer.result, gpt2.transformer.h[1](hidden))
