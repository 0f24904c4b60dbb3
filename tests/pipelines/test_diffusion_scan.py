"""Scans of pipelines: every small pipeline, loaded or not, and one as large as Stable Diffusion XL."""

import functools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils._pytree import tree_leaves

from diffsight import DiffusionModel
from diffsight.errors import InputError, ScanError
from helpers import pipeline_footprint
from models import diffusion

SD = diffusion.PIPELINES["stable_diffusion"]
UNSCANNABLE: dict[str, str] = {}  # name to reason, of pipelines that need values inside a component; none do


@pytest.fixture(params=[name for name in diffusion.PIPELINES if name not in UNSCANNABLE])
def kind(request):
    return diffusion.PIPELINES[request.param]


def shapes(value):
    return [(tuple(leaf.shape), leaf.dtype) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def read_shapes(run, kind):
    """Read shapes at the text encoder, the denoiser and the scheduler, step by step."""
    seen = [shapes(run[kind.text_encoder_layer].output)] if kind.text_encoder_layer else []
    for step in run.steps:
        denoiser = run[kind.denoiser]
        given = shapes(denoiser.inputs)
        seen.append(
            (step.index, step.timestep, given, shapes(run[kind.denoiser_block].output), shapes(denoiser.output))
        )
        seen.append(shapes(run.scheduler.step.output))
    return seen


def weights(pipe):
    """Return every weight by name: the object and its values."""
    return {
        f"{name}.{path}": (value, value.clone())
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module)
        for path, value in part.state_dict(keep_vars=True).items()
    }


def without_weights(pipe):
    """Return the pipeline as if it had never been loaded."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.to("meta")
    return pipe


@functools.cache
def real_run(kind):
    """Return what is read in a run with weights, and what it returns."""
    with DiffusionModel(kind.build()).generate(**kind.inputs(), seed=3) as run:
        seen = read_shapes(run, kind)
    return seen, type(run.result), shapes(dict(run.result))


def test_shapes_are_those_of_a_real_run(kind):
    with DiffusionModel(without_weights(kind.build())).scan(**kind.inputs(), seed=3) as scan:
        seen = read_shapes(scan, kind)
    assert (seen, type(scan.result), shapes(dict(scan.result))) == real_run(kind)


# With weights: one of each family, as the shapes do not depend on whether there are any.
LOADED = [
    "img2img",
    "stable_diffusion_xl",
    "stable_diffusion_3",
    "flux",
    "pixart_sigma",
    "sana",
    "wan",
    "cogvideox",
    "ltx",
]


@pytest.mark.parametrize("kind", LOADED, indirect=True)
def test_a_scan_leaves_the_pipeline_as_it_was(kind):
    pipe = kind.build()
    draw = lambda: pipe(**kind.inputs(), generator=torch.Generator().manual_seed(3))[0]  # noqa: E731
    want, clean, before = draw(), pipeline_footprint(pipe), weights(pipe)
    with DiffusionModel(pipe).scan(**kind.inputs(), seed=3) as run:
        seen = read_shapes(run, kind)
    assert (seen, type(run.result), shapes(dict(run.result))) == real_run(kind)
    stopped = DiffusionModel(pipe).scan(**kind.inputs())
    stopped[kind.denoiser_block].output
    del stopped
    with pytest.raises(ScanError), DiffusionModel(pipe).scan(**kind.inputs()) as run:
        next(leaf for leaf in tree_leaves(run[kind.denoiser_block].output) if leaf is not None).sum().item()
    assert pipeline_footprint(pipe) == clean
    for name, (value, copied) in weights(pipe).items():
        assert value is before[name][0] and torch.equal(copied, before[name][1])
    assert torch.equal(draw(), want)


# What is real and what is not


@pytest.fixture
def model():
    return DiffusionModel(without_weights(diffusion.stable_diffusion()))


def test_inside_is_fake_and_between_are_zeros(model):
    with model.scan(**SD.inputs(), seed=3) as run:
        ids = run.tokenizer.output.input_ids
        assert torch.equal(
            ids[0],
            diffusion.clip_tokenizer()(SD.inputs()["prompt"], padding="max_length", return_tensors="pt").input_ids[0],
        )
        assert is_fake(run.text_encoder.layers[0].output)
        assert not run.text_encoder.output[0].any()
        embeds, _ = run.encode_prompt.output
        assert embeds.shape == (1, 77, diffusion.WIDTH) and not embeds.any()
        for _ in run.steps[:3]:
            latents = run.unet.input
            assert latents.device == torch.device("cpu")
            assert latents.any(), "the noise is real, and so is what the scheduler makes of it"
            assert is_fake(run.unet.mid_block.output)
        latents = run.vae.decode.input
        assert not is_fake(latents)
        assert is_fake(run.vae.decoder.mid_block.output)
    assert is_fake(run.result.images) and run.result.images.shape == (1, 3, diffusion.SIDE, diffusion.SIDE)


def test_there_are_no_images(model):
    with model.scan(["a red circle", "a blue square"], num_inference_steps=1) as run:
        row = run.rows[1]
    for part in (run, row):
        with pytest.raises(ScanError, match=r"run\.images: a scan computes shapes only"):
            part.images
    assert run.result.images[0].size == (diffusion.SIDE, diffusion.SIDE)


def test_arguments_are_checked_as_for_a_real_run(model):
    for arguments, told in [
        ({"prompt": []}, "empty"),
        ({"prompt": "a", "num_inference_stepps": 3}, "stepps"),
        ({"prompt": "a", "seed": -1}, "seed"),
    ]:
        with pytest.raises(InputError, match=told):
            model.scan(**arguments)


def test_the_same_latents_as_in_a_real_run(model):
    with (
        model.scan(**SD.inputs(), seed=3) as scan,
        DiffusionModel(diffusion.stable_diffusion()).generate(**SD.inputs(), seed=3) as run,
    ):
        assert torch.equal(scan.unet.input, run.unet.input)


def test_values_of_the_inside_can_go_anywhere(model):
    with model.scan(**SD.inputs(), seed=3) as run:
        run.text_encoder.ln_final.input = run.text_encoder.layers[0].output
        for step in run.steps[:3]:
            if step.index == 0:
                hidden = run.unet.mid_block.output
            else:
                run.unet.mid_block.output = hidden
            run.scheduler.step.input = run.unet.conv_out.output[:1]  # fake, into a scheduler that computes for real
        run.vae.decode.input = torch.zeros(1, 4, 16, 16, device="meta")
        run.vae.decode.output = (run.vae.decoder.output,)
    assert run.result.images.shape == (1, 3, diffusion.SIDE, diffusion.SIDE)


def test_calling_parts_in_the_body(model):
    with model.scan(**SD.inputs(), seed=3) as run:
        embeds, negative = model.encode_prompt("a red circle", "cpu", 1, True)
        hidden = run.text_encoder(torch.tensor([[0, 1]])).last_hidden_state
        decoded = model.vae.decode(run.unet.input[:1]).sample
        run.stop()
    assert [tuple(value.shape) for value in (embeds, negative, hidden, decoded)] == [
        (1, 77, diffusion.WIDTH),
        (1, 77, diffusion.WIDTH),
        (1, 2, diffusion.WIDTH),
        (1, 3, diffusion.SIDE, diffusion.SIDE),
    ]


def test_rows_and_branches(model):
    with model.scan(**SD.inputs() | {"prompt": ["a red circle", "a blue square"]}, seed=3) as run:
        a, b = run.rows
        assert a.text_encoder.layers[0].output.shape == (1, 77, diffusion.WIDTH)
        hidden = b.unet.mid_block.output
        a.unet.mid_block.output = hidden * 2
        assert run.cond.unet.conv_out.output.shape == (
            2,
            4,
            diffusion.SIDE // 2,
            diffusion.SIDE // 2,
        )
    assert run.result.images.shape == (2, 3, diffusion.SIDE, diffusion.SIDE)


def test_gradients_from_the_image_to_the_prompt(model):
    with model.scan(**SD.inputs(), seed=3, grad=True) as run:
        hidden = run.text_encoder.layers[0].output
        hidden.retain_grad()
        run.vae.decode.output[0].mean().backward()
    assert hidden.grad.shape == hidden.shape == (1, 77, diffusion.WIDTH)


def test_a_generator_among_the_arguments(model):
    generator = torch.Generator()
    state = generator.get_state()
    with model.scan(**SD.inputs(), generator=generator) as run:
        assert run.unet.mid_block.output is not None
    assert torch.equal(generator.get_state(), state)


def test_in_lockstep_with_a_real_run(model):
    pipe = diffusion.stable_diffusion()
    want = pipe(**SD.inputs(), generator=torch.Generator().manual_seed(3)).images
    with model.scan(**SD.inputs(), seed=3) as scan, DiffusionModel(pipe).generate(**SD.inputs(), seed=3) as run:
        for _ in zip(scan.steps, run.steps):
            assert scan.unet.mid_block.output.shape == run.unet.mid_block.output.shape
    assert torch.equal(run.images, want)


# Pipelines that do things to their modules


class Direct(diffusers.DDPMPipeline):
    """A pipeline that uses weights and parts of its denoiser itself, and casts it."""

    @torch.no_grad()
    def __call__(self, generator=None, num_inference_steps=2):
        device, dtype = self.unet.conv_in.weight.device, self.unet.dtype
        self.unet.to(dtype=torch.float64)
        sample = torch.randn(
            1,
            3,
            diffusion.SIDE,
            diffusion.SIDE,
            generator=generator,
            device=device,
            dtype=self.unet.dtype,
        )
        scale = self.unet.conv_in.bias.mean() * self.unet.some_table.sum()
        assert self.unet.conv_in(sample).shape == (1, 16, diffusion.SIDE, diffusion.SIDE)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noise = self.unet(sample * (1 + scale), t).sample
            sample = self.scheduler.step(noise, t, sample, generator=generator).prev_sample
        self.unet.to(dtype=dtype)
        return diffusers.ImagePipelineOutput(images=sample.float().cpu().numpy())


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "never loaded"])
def test_weights_that_a_pipeline_uses_itself(loaded):
    whole = diffusion.ddpm()
    pipe = Direct(unet=whole.unet, scheduler=whole.scheduler)
    pipe.unet.register_buffer("some_table", torch.ones(3))
    if not loaded:
        without_weights(pipe)
    clean, before = pipeline_footprint(pipe), weights(pipe)
    with DiffusionModel(pipe).scan(seed=0) as run:
        for _ in run.steps:
            assert run.unet.mid_block.output.dtype == torch.float64
    assert run.result.images.shape == (1, 3, diffusion.SIDE, diffusion.SIDE)
    assert pipeline_footprint(pipe) == clean
    assert all(value is before[name][0] for name, (value, _) in weights(pipe).items())
    assert pipe.unet.dtype == torch.float32


def test_a_half_precision_pipeline_that_casts_its_vae():
    tested = diffusion.PIPELINES["stable_diffusion_xl"]
    pipe = tested.build().to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    before = weights(pipe)
    with DiffusionModel(pipe).scan(**tested.inputs(), seed=0) as run:
        assert run.unet.mid_block.output.dtype == torch.float16
        assert run.vae.decoder.mid_block.output.dtype == torch.float32
    assert {(value.dtype, value is before[name][0]) for name, (value, _) in weights(pipe).items()} == {
        (torch.float16, True)
    }


def test_a_safety_checker():
    """It looks at the image, which no scan can see through; all images pass."""
    config = diffusion.transformers.CLIPConfig(
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 8,
            "patch_size": 4,
        },
        projection_dim=8,
    )
    checker = diffusers.pipelines.stable_diffusion.StableDiffusionSafetyChecker(config)
    extractor = diffusion.transformers.CLIPImageProcessorPil(size=8, crop_size=8)
    pipe = diffusion.stable_diffusion_family(
        diffusers.StableDiffusionPipeline, safety_checker=checker, feature_extractor=extractor
    )
    with DiffusionModel(pipe).scan("a red circle", num_inference_steps=1) as run:
        run.unet.output
    assert run.result.images[0].size == (diffusion.SIDE, diffusion.SIDE)


# Size

SDXL = """
    import json, time
    from pathlib import Path
    import diffusers, torch, transformers
    from accelerate import init_empty_weights
    from models import diffusion
    from diffsight import DiffusionModel

    def encoder(cls, width, layers, heads, **config):
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
        return cls(transformers.CLIPTextConfig(
            **sizes, num_hidden_layers=layers, num_attention_heads=heads, eos_token_id=257, **config))

    tokenizer, began = diffusion.clip_tokenizer(), time.process_time()
    with init_empty_weights():
        parts = {
            "text_encoder": encoder(transformers.CLIPTextModel, 768, 12, 12),
            "text_encoder_2": encoder(transformers.CLIPTextModelWithProjection, 1280, 32, 20, hidden_act="gelu"),
            "unet": diffusers.UNet2DConditionModel(
                sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, use_linear_projection=True,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
                addition_embed_type="text_time", addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816),
            "vae": diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=1024, scaling_factor=0.13025),
        }
    pipe = diffusers.StableDiffusionXLPipeline(
        **parts, tokenizer=tokenizer, tokenizer_2=diffusion.clip_tokenizer("!"), add_watermarker=False,
        scheduler=diffusers.EulerDiscreteScheduler())
    seen = {}
    with DiffusionModel(pipe).scan("a red circle above a blue square", num_inference_steps=2, seed=0) as run:
        seen["text"] = list(run.text_encoder_2.layers[30].output.shape)
        seen["steps"] = [list(run.unet.mid_block.output.shape) for step in run.steps]
    seen["image"] = run.result.images[0].size
    seen["weights"] = sum(p.numel() for name in parts for p in parts[name].parameters())
    seen["seconds"] = time.process_time() - began
    # Of this program alone: getrusage would count the process that started it.
    status = Path("/proc/self/status").read_text()
    seen["bytes"] = 1024 * int(status.split("VmHWM:")[1].split()[0])
    print(json.dumps(seen))
"""


def test_the_size_of_stable_diffusion_xl():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SDXL)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],  # where the package `models` is
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["text"] == [1, 77, 1280]
    assert seen["steps"] == [[2, 1280, 32, 32]] * 2
    assert seen["image"] == [1024, 1024]
    assert seen["weights"] > 3.4e9
    assert seen["bytes"] < 1e9, f"{seen['bytes'] / 1e9:.2f} GB"
    assert seen["seconds"] < 60
