"""Modules trained in runs: their gradients are those of plain hooks, and the weights of the model stay."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from diffsight import DiffusionModel, LanguageModel
from helpers import SEED
from models import diffusion, language

PROMPT = "A cat sat on the"
CALL = {"prompt": "a red circle", "num_inference_steps": 2, "output_type": "pt", "guidance_scale": 5.0}


class LoRA(nn.Module):
    def __init__(self, width, rank=2):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x):
        return self.up(self.down(x))


@pytest.fixture
def lora():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LoRA(32)


def gradients(module):
    return [weight.grad.clone() for weight in module.parameters()]


def with_lora(module, lora):
    """Add a LoRA to what a module returns, with an ordinary hook."""
    return module.register_forward_hook(lambda module, args, output: output + lora(args[0]))


def test_a_language_model(net, lora, tmp_path):
    model, other = LanguageModel((net, language.TOKENIZER)), copy.deepcopy(lora)
    model.requires_grad_(False)
    before = {name: weight.clone() for name, weight in net.named_parameters()}
    optimizer, losses = torch.optim.AdamW(lora.parameters(), lr=0.05), []
    hook = with_lora(net.transformer.h[-1].mlp, other)
    net(language.ids(PROMPT)).logits[:, -1].log_softmax(-1)[:, 7].sum().neg().backward()
    hook.remove()
    for step in range(8):
        with model.trace(PROMPT, grad=True) as run:
            mlp = run.layers[-1].mlp
            mlp.output = mlp.output + lora(mlp.input)
            loss = -run.logits[:, -1].log_softmax(-1)[:, 7].sum()
        loss.backward()
        if not step:
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients(lora), gradients(other)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(weight, before[name]) for name, weight in net.named_parameters())
    assert all(weight.grad is None for weight in net.parameters())

    save_file(lora.state_dict(), tmp_path / "lora.safetensors")
    loaded = LoRA(32)
    loaded.load_state_dict(load_file(tmp_path / "lora.safetensors"))

    def logits(one):
        @model.edit
        def adapted(run):
            run.layers[-1].mlp.output = run.layers[-1].mlp.output + one(run.layers[-1].mlp.input)

        with torch.no_grad():
            return adapted.trace(PROMPT).result.logits

    assert torch.equal(logits(lora), logits(loaded))
    net.requires_grad_(True)


def test_a_denoiser(lora):
    pipe, other = diffusion.stable_diffusion(), copy.deepcopy(lora)
    model = DiffusionModel(pipe).requires_grad_(False)
    module = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    path = "unet.mid_block.attentions[0].transformer_blocks[0].attn2"

    hook = module.register_forward_hook(
        lambda module, args, out: torch.cat([out[:1], out[1:] + other(args[0][1:])])  # the conditional half
    )
    images = type(pipe).__call__.__wrapped__(pipe, **CALL, generator=torch.Generator().manual_seed(SEED)).images
    images.mean().backward()
    hook.remove()
    with model.generate(**CALL, seed=SEED, grad=True) as run:
        for _ in run.steps:
            point = run.cond[path]
            point.output = point.output + lora(point.input)
    run.images.mean().backward()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients(lora), gradients(other)))
    assert any(gradient.abs().max() > 1e-7 for gradient in gradients(lora))
    frozen = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    assert all(weight.grad is None for part in frozen for weight in part.parameters())


def test_a_lora_from_peft(tmp_path):
    def adapted():
        torch.manual_seed(0)
        net = inject_adapter_in_model(LoraConfig(target_modules=["down_proj"], r=2), language.llama())
        return net, LanguageModel((net, language.TOKENIZER))

    with torch.random.fork_rng(devices=[]):
        (net, model), (other, _) = adapted(), adapted()
    optimizer = torch.optim.AdamW([weight for weight in net.parameters() if weight.requires_grad], lr=0.05)
    before, losses = net.model.layers[0].mlp.down_proj.base_layer.weight.clone(), []
    for _ in range(4):
        with model.trace(PROMPT, grad=True) as run:
            added = run.layers[-1].mlp.down_proj.lora_B.default.output
            loss = -run.logits[:, -1].log_softmax(-1)[:, 7].sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert added.abs().max() > 0
    assert torch.equal(net.model.layers[0].mlp.down_proj.base_layer.weight, before)
    save_file(get_peft_model_state_dict(net), tmp_path / "peft.safetensors")
    set_peft_model_state_dict(other, load_file(tmp_path / "peft.safetensors"))
    with torch.no_grad():
        assert torch.equal(other(language.ids(PROMPT)).logits, net(language.ids(PROMPT)).logits)
