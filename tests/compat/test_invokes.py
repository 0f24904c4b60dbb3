"""`tracer.invoke`, and values of a language model in one pass.

LanguageModel and Batching in nnsight's walkthrough; getting, setting, operations, modules, cross_prompt; the README.
"""

import pytest
import torch

from compat.constants import TOKENS
from diffsight.errors import InputError
from helpers import outputs, replaced


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
    """Walkthrough: Batching, the second cell; cross_prompt.ipynb; the README's Cross Prompt Intervention."""
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
    with pytest.raises(InputError, match=r"the invoke\(\) without an input last"), llm.trace() as tracer:
        with tracer.invoke(ids):
            pass
        with tracer.invoke():
            llm.lm_head.output
        with tracer.invoke(other):
            pass


def test_values_of_invokes_of_other_lengths(llm, ids, other):
    """start_remote_access.ipynb, where nnsight pads both prompts to one length."""
    with pytest.raises(RuntimeError) as caught, torch.no_grad(), llm.trace() as tracer:
        with tracer.invoke(ids):
            hidden = llm.transformer.h[1].output
        with tracer.invoke(other[:, :2]):
            llm.transformer.h[1].output[:] = hidden
    assert "Here each invoke is a separate pass" in "".join(caught.value.__notes__)


def test_readme_style_of_invokes(llm, gpt2, ids):
    """As in the first releases: `generator.invoke(...) as invoker`, `generator.output`."""
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
