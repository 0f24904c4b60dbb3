"""Where else `remote=` is understood, and where it is an error."""

from functools import partial

import torch

from diffsight import DiffusionModel, HFPipeline, VisionLanguageModel
from diffsight.compat import LanguageModel as CompatLanguageModel
from helpers import refusal

IDS = torch.tensor([[5, 17, 42, 8]])


def test_code_for_nnsight(address, language):
    model = CompatLanguageModel("gpt2", remote=address)
    with model.trace(IDS, remote=True):
        hidden = model.transformer.h[1].output[0].save()
        logits = model.lm_head.output.save()
    with torch.no_grad(), language.trace(IDS) as run:
        assert torch.equal(hidden, run.layers_output[1]) and torch.equal(logits, run.logits)
    assert model.generate(IDS, max_new_tokens=2, remote=True, trace=False).shape == (1, 6)
    for opens in (partial(model.trace, IDS), partial(model.generate, IDS, trace=False), model.session):
        assert "the block runs on this machine" in refusal(opens, remote=True, blocking=False)


def test_invokes_without_an_input(address, language):
    model, tokens = CompatLanguageModel("gpt2", remote=address), {"max_new_tokens": 2, "min_new_tokens": 2}
    for arguments in ({"do_sample": False}, {"do_sample": True, "seed": 3}):
        with model.generate(**tokens, **arguments) as tracer:
            with tracer.invoke(IDS):
                own = tracer.result
            with tracer.invoke():
                whole = tracer.result
        assert torch.equal(own, whole) and torch.equal(own, language.generate(IDS, **tokens, **arguments).result)
    with model.generate(**tokens, do_sample=True) as tracer:
        with tracer.invoke(IDS):
            pass
        assert "pass do_sample=False" in refusal(tracer.invoke)


def test_where_remote_is_not_understood(pipelines, language, address):
    assert "remote" in refusal(pipelines["diffsight/shapes-clip"].generate, "a red circle", remote=True)
    assert "remote" in refusal(language.trace, IDS, remote=True)
    assert "remote" in refusal(language.generate, IDS, remote=True)
    assert "this process only" in refusal(VisionLanguageModel, "gpt2", remote=address)
    assert "this process only" in refusal(HFPipeline, "gpt2", remote=address)
    assert "has no model 'gpt3'" in refusal(DiffusionModel, "gpt3", remote=address)
    assert "gpt2 is a LanguageModel" in refusal(DiffusionModel, "gpt2", remote=address)
