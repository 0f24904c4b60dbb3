"""nnsight's tutorials: logit_lens, activation_patching, attribution_patching, LoRA_tutorial, diffusion_lens."""

import numpy
import torch
from torch import nn

import diffsight.compat as nnsight
from compat.constants import TOKENS
from diffsight.compat import DiffusionModel, Envoy
from helpers import outputs, replaced
from models import diffusion


def test_logit_lens(llm, gpt2, ids):
    layers = llm.transformer.h
    probs_layers = []
    with torch.no_grad():
        with llm.trace() as tracer:
            with tracer.invoke(input_ids=ids) as invoker:
                for layer in layers:
                    layer_output = llm.lm_head(llm.transformer.ln_f(layer.output))
                    probs = nn.functional.softmax(layer_output, dim=-1).save()
                    probs_layers.append(probs)
    probs = torch.cat([probs.value for probs in probs_layers])
    tokens = probs.max(dim=-1).indices
    states = [outputs(layer, gpt2, ids)[0] for layer in gpt2.transformer.h]
    expected = torch.cat([gpt2.lm_head(gpt2.transformer.ln_f(state)).argmax(-1) for state in states])
    assert torch.equal(tokens, expected) and torch.equal(invoker.inputs[0][0]["input_ids"][0], ids[0])


def test_activation_patching(llm, gpt2, ids, other):
    clean, corrupted, correct, incorrect = ids, other, 7, 8

    def difference(logits):
        return logits[0, -1, correct] - logits[0, -1, incorrect]

    with torch.no_grad():
        with llm.trace(input_ids=clean) as tracer:
            clean_tokens = tracer.invoker.inputs[0][0]["input_ids"][0]
            clean_hs = [layer.output.save() for layer in llm.transformer.h]
            clean_logit_diff = difference(llm.lm_head.output).save()
        with llm.trace() as tracer:
            with tracer.invoke(corrupted):
                corrupted_logit_diff = difference(llm.lm_head.output).save()
            ioi_patching_results = []
            for layer_idx in range(len(llm.transformer.h)):
                _ioi_patching_results = []
                for token_idx in range(len(clean_tokens)):
                    with tracer.invoke(corrupted):
                        llm.transformer.h[layer_idx].output[:, token_idx, :] = clean_hs[layer_idx][:, token_idx, :]
                        patched_logit_diff = difference(llm.lm_head.output)
                        patched_result = (patched_logit_diff - corrupted_logit_diff) / (
                            clean_logit_diff - corrupted_logit_diff
                        )
                        _ioi_patching_results.append(patched_result.item().save())
                ioi_patching_results.append(_ioi_patching_results)

        assert torch.equal(clean_tokens, ids[0])
        base = difference(gpt2(corrupted).logits)
        for layer_idx, row in enumerate(ioi_patching_results):
            state = outputs(gpt2.transformer.h[layer_idx], gpt2, clean)[0]
            for token_idx, found in enumerate(row):

                def patch(out, state=state, token_idx=token_idx):
                    out[:, token_idx] = state[:, token_idx]
                    return out

                with replaced(gpt2.transformer.h[layer_idx], patch):
                    patched = difference(gpt2(corrupted).logits)
                assert found == ((patched - base) / (difference(gpt2(clean).logits) - base)).item()


def test_attribution_patching(llm, gpt2, ids, other):
    """Activations of two prompts and gradients of one, with `retain_grad` before and `.grad` after `backward()`."""
    clean_out, corrupted_out = [], []
    with llm.trace() as tracer:
        with tracer.invoke(ids):
            for layer in llm.transformer.h:
                clean_out.append(layer.attn.c_proj.input.save())
        with tracer.invoke(other):
            for layer in llm.transformer.h:
                corrupted_out.append(layer.attn.c_proj.input.save())
                corrupted_out[-1].retain_grad()
            llm.lm_head.output[0, -1, 7].backward()
    corrupted_grads = [out.grad.save() for out in corrupted_out]
    found = [
        (grad.value * (clean.value - corrupted.value)).sum((0, 2))
        for grad, clean, corrupted in zip(corrupted_grads, clean_out, corrupted_out)
    ]
    gpt2.zero_grad()
    for index, layer in enumerate(gpt2.transformer.h):
        kept = []
        handle = layer.attn.c_proj.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        gpt2(ids)
        logits = gpt2(other).logits
        handle.remove()
        (gradient,) = torch.autograd.grad(logits[0, -1, 7], kept[1])
        assert torch.allclose(found[index], (gradient * (kept[0] - kept[1])).sum((0, 2)), atol=1e-6)


class LORA(nn.Module):
    """Walkthrough: Training a LoRA; LoRA_tutorial.ipynb."""

    def __init__(self, module: Envoy, dim: int, r: int) -> None:
        super().__init__()
        self.r = r
        self.module = module
        self.WA = nn.Parameter(torch.randn(dim, self.r), requires_grad=True).save()
        self.WB = nn.Parameter(torch.zeros(self.r, dim), requires_grad=True).save()

    def __call__(self, alpha: float = 1.0):
        A_x = torch.matmul(self.module.input, self.WA)
        BA_x = torch.matmul(A_x, self.WB)
        h = BA_x + self.module.output
        self.module.output = h * alpha

    def parameters(self):
        return [self.WA, self.WB]


def test_training_a_lora(llm, gpt2, ids):
    module, answer = llm.transformer.h[-1].mlp, torch.tensor([5])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with llm.session() as session:
            dataset = [(ids, answer)] * 3
            lora = LORA(module, 16, 4)
            by_hand = [parameter.detach().clone().requires_grad_() for parameter in lora.parameters()]
            optimizer = torch.optim.AdamW(lora.parameters(), lr=0.1)
            losses = nnsight.list().save()
            with session.iter(dataset) as batch:
                prompt = batch[0]
                correct_token = batch[1]
                with llm.trace(prompt):
                    lora()
                    logits = llm.lm_head.output
                    loss = nn.functional.cross_entropy(logits[:, -1], correct_token)
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    with torch.no_grad():
        with llm.generate(ids, **TOKENS):
            lora()
            out = llm.generator.output.save()
        without = llm.generate(ids, trace=False, **TOKENS)

    mlp, expected = gpt2.transformer.h[-1].mlp, []
    handle = mlp.register_forward_hook(lambda _, args, out: out + args[0] @ by_hand[0] @ by_hand[1])
    optimizer = torch.optim.AdamW(by_hand, lr=0.1)
    for _ in range(3):
        loss = nn.functional.cross_entropy(gpt2(ids).logits[:, -1], answer)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    handle.remove()
    gpt2.zero_grad()
    assert losses == expected and losses[2] < losses[1] < losses[0]
    hidden = outputs(mlp, gpt2, ids)[0] + outputs(gpt2.transformer.h[-1].ln_2, gpt2, ids)[0] @ by_hand[0] @ by_hand[1]
    with replaced(mlp, lambda out: hidden, only=0):
        assert torch.equal(out, gpt2.generate(ids, **TOKENS))
    assert torch.equal(without, gpt2.generate(ids, **TOKENS))


def test_diffusion_lens():
    """diffusion_lens.ipynb, Stable Diffusion: each layer of the text encoder into its last norm."""
    pipe, kind = diffusion.stable_diffusion(), diffusion.PIPELINES["stable_diffusion"]
    arguments = kind.inputs() | {"output_type": "pil"}
    model = DiffusionModel(pipe)
    encoder = pipe.text_encoder
    images = []
    for layer in range(encoder.config.num_hidden_layers):
        with model.generate(**arguments, seed=17):
            hidden_state = model.text_encoder.text_model.encoder.layers[layer].output[0]
            model.text_encoder.text_model.final_layer_norm.input = hidden_state
            image = model.output.images[0].save()
            images.append(image)
    for layer, image in enumerate(images):
        states = []
        handle = encoder.encoder.layers[layer].register_forward_hook(
            lambda _, args, out, states=states: states.append(out)
        )
        norm = encoder.final_layer_norm
        # Call 0 of the norm is for the prompt.
        with replaced(norm, lambda _, norm=norm, states=states: norm.forward(states[0]), only=0):
            expected = pipe(**arguments, generator=torch.Generator().manual_seed(17)).images[0]
        handle.remove()
        assert numpy.array_equal(numpy.asarray(image), numpy.asarray(expected))


def test_diffusion_lens_of_the_second_text_encoder():
    """diffusion_lens.ipynb, SDXL: a layer of the second encoder, normed, in the place of the last layer but one."""
    pipe, kind = diffusion.stable_diffusion_xl(), diffusion.PIPELINES["stable_diffusion_xl"]
    arguments = kind.inputs() | {"num_inference_steps": 1, "output_type": "pil"}
    model = DiffusionModel(pipe)
    empty = pipe.tokenizer("", padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with model.generate(**arguments, seed=17):
        model.text_encoder.input = empty
        encoder = model.text_encoder_2.text_model
        hidden_state = encoder.encoder.layers[0].output[0]
        encoder.encoder.layers[-2].output[0][:] = encoder.final_layer_norm(hidden_state)[0][:]
        vectors = encoder.encoder.layers[-2].output[0].clone()
        image = model.output.images[0].save()
    plain, states, calls = pipe.text_encoder_2.text_model, [], []
    handles = [
        plain.encoder.layers[0].register_forward_hook(lambda _, args, out: states.append(out)),
        pipe.text_encoder.register_forward_pre_hook(
            lambda _, args: calls.append(args) or ((empty, *args[1:]) if len(calls) == 1 else args)
        ),
    ]
    norm = plain.final_layer_norm
    # In place, since the pipeline takes what transformers has kept of the layer. Call 0 is for the prompt.
    with replaced(plain.encoder.layers[-2], lambda out: out.copy_(norm.forward(states[0])), only=0):
        expected = pipe(**arguments, generator=torch.Generator().manual_seed(17)).images[0]
    for handle in handles:
        handle.remove()
    assert torch.equal(vectors, norm(states[0])) and len(vectors[0].unique(dim=0)) > 5  # no token has that of another
    assert numpy.array_equal(numpy.asarray(image), numpy.asarray(expected))
