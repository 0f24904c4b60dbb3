"""The guides' examples with text instead of token ids: from LanguageModel to Model Editing in nnsight's walkthrough."""

import pytest
import torch
from torch import nn

import diffsight.compat as nnsight
from compat.constants import TOKENS
from diffsight.errors import DiffsightError, InputError
from helpers import outputs
from models import diffusion


@pytest.fixture
def text_model():
    import transformers

    tokenizer = diffusion.gemma_tokenizer()
    config = transformers.GPT2Config(
        n_layer=3, n_head=2, n_embd=16, n_positions=64, vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return nnsight.LanguageModel((model, tokenizer))


PROMPT, OTHER = "a red circle above a blue square", "a green circle below a blue square"


def test_text(text_model):
    gpt2 = text_model.module
    with torch.no_grad():
        with text_model.trace(PROMPT) as tracer:
            tokens = tracer.invoker.inputs[0][0]["input_ids"][0]
            hs = text_model.transformer.h[2].output[0][:, -1, :].save()
            token_ids = text_model.lm_head.output.argmax(dim=-1).save()
            logits = text_model.output.logits.save()
        with text_model.edit() as edited:
            text_model.transformer.h[2].output[0][:, -1, :] = hs
        with edited.trace(OTHER):
            modified = text_model.lm_head.output.argmax(dim=-1).save()
    ids = torch.tensor([text_model.tokenizer(PROMPT)["input_ids"]])
    assert torch.equal(tokens, ids[0]) and torch.equal(logits, gpt2(ids).logits)
    assert text_model.tokenizer.decode(token_ids[0][-1]) and modified[0, -1] == token_ids[0, -1]


def test_invokes_of_text(text_model):
    gpt2 = text_model.module
    with torch.no_grad(), text_model.trace() as tracer:
        with tracer.invoke(PROMPT) as invoker:
            embeddings = text_model.transformer.wte.output
        with tracer.invoke(OTHER):
            text_model.transformer.wte.output = embeddings
            logits = text_model.lm_head.output.save()
    ids = torch.tensor([text_model.tokenizer(PROMPT)["input_ids"]])
    assert torch.equal(logits, gpt2(ids).logits) and torch.equal(invoker.inputs[0][0]["input_ids"], ids)


def test_generated_text(text_model):
    gpt2, layers = text_model.module, text_model.transformer.h
    with text_model.generate(PROMPT, **TOKENS):
        first = layers[-1].output[0].save()
        second = layers[-1].next().output[0].save()
        out = text_model.generator.output.save()
    with text_model.generate(PROMPT, **TOKENS):
        every = nnsight.list().save()
        with layers.all():
            every.append(layers[-1].output[0])
    ids = torch.tensor([text_model.tokenizer(PROMPT)["input_ids"]])
    states = outputs(gpt2.transformer.h[-1], gpt2.generate, ids, **TOKENS)
    assert torch.equal(out, gpt2.generate(ids, **TOKENS)) and len(every) == 3
    assert all(torch.equal(a, b) for a, b in zip([first, second, *every], [*states[:2], *states]))


def test_sessions_of_text(text_model):
    with torch.no_grad(), text_model.session() as session:
        results = nnsight.list().save()
        with session.iter([PROMPT, OTHER]) as prompt:
            with text_model.trace(prompt):
                results.append(text_model.lm_head.output)
    for prompt, logits in zip([PROMPT, OTHER], results):
        ids = torch.tensor([text_model.tokenizer(prompt)["input_ids"]])
        assert torch.equal(logits, text_model.module(ids).logits)
    assert torch.equal(text_model.trace(OTHER, trace=False).logits, results[1])


@pytest.mark.parametrize(
    "use",
    [
        len,
        list,
        lambda ids: ids[0],
        lambda ids: ids[:, -1],
        lambda ids: ids.shape,
        lambda ids: ids.dtype,
        lambda ids: ids.cpu(),
        lambda ids: ids.tolist(),
    ],
)
def test_run_used_like_its_result(text_model, use):
    """nnsight's guide: "Without a `with`, `ids = model.generate(...)` just returns the ids"."""
    with pytest.raises(DiffsightError, match=r"as in model\.generate\(\.\.\.\)\.result"):
        use(text_model.generate(PROMPT, **TOKENS))


def test_texts_of_a_run_used_like_its_result(text_model):
    ids = text_model.generate(PROMPT, **TOKENS)
    for decode in (text_model.tokenizer.decode, text_model.tokenizer.batch_decode):
        with pytest.raises(InputError, match=r"as in model\.generate\(\.\.\.\)\.result"):
            decode(ids)
    assert ids.lm_head.path == ids["lm_head"].path == "model.lm_head" and not hasattr(ids, "shape")
    assert torch.equal(ids.result, text_model.generate(PROMPT, **TOKENS, trace=False))
    with text_model.generate(PROMPT, **TOKENS) as tracer:
        assert tracer.dtype == torch.float32 and len(tracer) == 2
