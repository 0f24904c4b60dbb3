"""Parts that `torch.compile`, data parallelism or PEFT wrap keep their names, their steps and their branches."""

import pytest
import torch
import transformers
from torch import nn

from diffsight import DiffusionModel, LanguageModel, diffusion_lens
from diffsight.errors import InputError

CALL = {"prompt": "a red circle above a blue square", "num_inference_steps": 3, "output_type": "pt"}
IDS = torch.arange(2, 12)[None]


class BaseTuner(nn.Module):
    """What the modules of PEFT that hold a model look like."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["model"], name)

    def forward(self, *args, **kwargs):
        return self.model.forward(*args, **kwargs)


WRAPPERS = [lambda module: torch.compile(module, backend="eager"), BaseTuner]


@pytest.fixture
def pipe():
    pipe = DiffusionModel("diffsight/shapes-clip").pipeline
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_denoiser(pipe, wrap):
    def zeroed_cond(module, args, output):
        return torch.cat([output[:1], output[1:] * 0])

    handle = pipe.unet.mid_block.register_forward_hook(zeroed_cond)
    want = pipe(**CALL, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)).images
    handle.remove()
    pipe.unet, timesteps = wrap(pipe.unet), []
    with DiffusionModel(pipe).generate(**CALL, guidance_scale=3.0, seed=0) as run:
        for step in run.steps:
            timesteps.append(step.timestep)
            run.cond.unet.mid_block.output[:] = 0
    assert timesteps == pipe.scheduler.timesteps.tolist()
    torch.testing.assert_close(run.images, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_text_encoder(pipe, wrap):
    want = diffusion_lens(DiffusionModel(pipe), CALL["prompt"], layers=[1, 11], num_inference_steps=1, progress=False)
    pipe.text_encoder = wrap(pipe.text_encoder)
    model = DiffusionModel(pipe)
    assert model.encoders["text_encoder"].kind == "CLIPTextModel"
    result = diffusion_lens(model, CALL["prompt"], layers=[1, 11], num_inference_steps=1, progress=False)
    assert [image.tobytes() for image in result.images] == [image.tobytes() for image in want.images]


def test_the_methods_of_a_vae(pipe):
    pipe.vae = BaseTuner(pipe.vae)
    with DiffusionModel(pipe).generate(**CALL, seed=0) as run:
        decoded = run.vae.decode.output
    assert decoded[0].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("wrap", [*WRAPPERS, nn.DataParallel])
def test_a_language_model(wrap):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=0)
    net = transformers.GPT2LMHeadModel(config).eval()
    if wrap is nn.DataParallel:
        wrapped = wrap(net)
        wrapped.config = net.config
    else:
        wrapped = wrap(net)
    want, model = LanguageModel(net), LanguageModel(wrapped)
    with want.trace([[2, 3, 4, 5], [6, 7]]) as run:
        expected = run.layers_output[1]
    with model.trace([[2, 3, 4, 5], [6, 7]]) as run:
        hidden = run.layers_output[1]
    mask = run.mask.bool()
    torch.testing.assert_close(hidden[mask], expected[want.trace([[2, 3, 4, 5], [6, 7]]).mask.bool()])


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_the_steps_of_a_language_model(wrap):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=None)
    net = transformers.GPT2LMHeadModel(config).eval()
    expected = net.generate(IDS, max_new_tokens=4, do_sample=False)
    with LanguageModel(wrap(net)).generate(IDS, max_new_tokens=4, do_sample=False) as run:
        tokens = [step.tokens.item() for step in run.steps]
    assert tokens == expected[0, 10:].tolist()


def test_a_pipeline_whose_steps_cannot_be_counted(pipe):
    class Blind(nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.unet, self.config, self.dtype = unet, unet.config, unet.dtype

        def forward(self, *args, **kwargs):
            return self.unet(*args, **kwargs)

    pipe.unet = Blind(pipe.unet)
    with pytest.raises(InputError, match=r"the steps of .* cannot be counted"):
        with DiffusionModel(pipe).generate(**CALL, seed=0) as run:
            for _ in run.steps:
                pass
