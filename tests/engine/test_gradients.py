"""Gradients through runs, checked against plain hooks and finite differences."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from diffsight import DiffusionModel, Model
from models import diffusion


def test_a_loss_reaches_any_point():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(2, 4)
    with torch.no_grad():
        opened = Model(net).trace(x, grad=True)
    with opened as run:
        hidden = run[1].output
        hidden.retain_grad()
        run.output.square().sum().backward()
    kept = []

    def keep(module, inputs, output):
        output.retain_grad()
        kept.append(output)

    hook = net[1].register_forward_hook(keep)
    net(x).square().sum().backward()
    hook.remove()
    assert torch.equal(hidden.grad, kept[0].grad)


def test_a_gradient_is_edited_on_its_way():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.randn(2, 4, requires_grad=True)
    with Model(net).trace(x) as run:
        run[0].output.register_hook(lambda gradient: gradient * 3)
        run.output.sum().backward()
    edited = x.grad.clone()
    x.grad = None
    net(x).sum().backward()
    assert torch.allclose(edited, 3 * x.grad)


def test_generate_of_transformers_lifts_its_no_grad():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30)).eval()
    ids = torch.arange(5)[None]
    for grad in (False, True):
        with Model(gpt2).generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0, grad=grad) as run:
            assert run.lm_head.output.requires_grad is grad


def test_a_loss_on_the_image_reaches_the_text_encoder():
    """Through the whole denoising loop, compared with a central difference. The images are unchanged."""
    chosen = diffusion.PIPELINES["stable_diffusion"]
    model = DiffusionModel(chosen.build())
    given = {name: value for name, value in chosen.inputs().items() if name != "output_type"}

    def loss(shift: float) -> float:
        with model.generate(**given, seed=0) as run:
            run.text_encoder.layers[1].output[0, 1, 2] += shift
            return run.vae.decode.output[0].double().square().mean().item()

    with model.generate(**given, seed=0, grad=True) as run:
        hidden = run.text_encoder.layers[1].output
        hidden.retain_grad()
        run.vae.decode.output[0].square().mean().backward()
    difference = (loss(1e-2) - loss(-1e-2)) / 2e-2
    assert abs(hidden.grad[0, 1, 2].item() - difference) < 0.05 * abs(difference)
    plain = model.pipeline(**given, generator=torch.Generator().manual_seed(0)).images[0]
    assert run.images[0].tobytes() == plain.tobytes()
    assert "pt_to_numpy" not in vars(model.pipeline.image_processor)


def test_runs_with_gradients_side_by_side():
    """Two runs of one pipeline, both with images to be turned into PIL ones, fed from one to the other."""
    chosen = diffusion.PIPELINES["stable_diffusion"]
    model = DiffusionModel(chosen.build())
    given = {name: value for name, value in chosen.inputs().items() if name != "output_type"}
    with model.generate(**given, seed=0, grad=True) as first, model.generate(**given, seed=1, grad=True) as second:
        second.unet.mid_block.output = first.unet.mid_block.output
    plain = model.pipeline(**given, generator=torch.Generator().manual_seed(0)).images[0]
    assert first.images[0].tobytes() == plain.tobytes() != second.images[0].tobytes()
    assert "pt_to_numpy" not in vars(model.pipeline.image_processor)
