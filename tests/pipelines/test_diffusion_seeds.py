"""Seeds: each image of a batch is the image of a run of its own."""

from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from diffsight import DiffusionModel
from diffsight.errors import InputError
from diffsight.pipelines.diffusion.input_counts import count_images_each, count_inputs
from diffsight.pipelines.seeds import generators, have_drawn_alike
from helpers import SEED, draw, drawn, not_called, patched
from models import denoisers, diffusion

SD = diffusion.PIPELINES["stable_diffusion"].inputs


def batch_of(kind):
    """Return inputs for two images of one prompt, or for two prompts."""
    if "prompt" not in kind.inputs():
        return {**kind.inputs(), "batch_size": 2}
    images = {"image": [kind.inputs()["image"]] * 2} if "image" in kind.inputs() else {}
    return {**kind.inputs(), **images, "prompt": ["a red circle", "a blue square above a green circle"]}


@pytest.mark.parametrize("kind", diffusion.ALL_PIPELINES, indirect=True)
def test_each_image_of_a_batch_has_a_seed_of_its_own(kind, pipe):
    inputs = batch_of(kind)
    batch = drawn(DiffusionModel(pipe).generate(**inputs, seed=5))
    assert len(batch) == 2
    for i, image in enumerate(batch):
        single = {**kind.inputs(), "prompt": inputs["prompt"][i]} if "prompt" in inputs else kind.inputs()
        assert torch.allclose(image, draw(pipe, single, 5 + i)[0], atol=1e-4)


@pytest.mark.parametrize("seeds", [[9, 4], (7, 7)], ids=str)
def test_a_seed_for_each_image(sd, seeds):
    inputs = batch_of(diffusion.PIPELINES["stable_diffusion"])
    batch = DiffusionModel(sd).generate(**inputs, seed=seeds).images
    assert len(batch) == 2
    for image, prompt, seed in zip(batch, inputs["prompt"], seeds):
        assert torch.allclose(image, draw(sd, {**inputs, "prompt": prompt}, seed)[0], atol=1e-4)


def test_several_images_of_each_prompt(sd):
    prompts = ["a red circle", "a blue square"]
    images = DiffusionModel(sd).generate(**{**SD(), "prompt": prompts}, num_images_per_prompt=2, seed=5).images
    assert len(images) == 4
    for i, image in enumerate(images):
        want = draw(sd, {**SD(), "prompt": prompts[i // 2]}, seed=5 + i)[0]
        assert torch.allclose(image, want, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "scheduler", "settings"),
    [
        ("flux", diffusers.FlowMatchLCMScheduler, {}),
        ("flux", diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "use_flow_sigmas": True}),
        ("stable_diffusion_3", diffusers.FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
    ],
)
def test_noise_for_which_the_pipeline_passes_no_generator(kind, scheduler, settings):
    """It is drawn as if the pipeline did."""
    kind = diffusion.PIPELINES[kind]
    pipe, inputs = kind.build(), {**kind.inputs(), "num_inference_steps": 3}
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, prediction_type="flow_prediction", **settings)
    images = DiffusionModel(pipe).generate(**inputs, num_images_per_prompt=2, seed=5).images
    for image, seed in zip(images, (5, 6), strict=True):
        generator = torch.Generator().manual_seed(seed)
        with patched(pipe.scheduler, "step", partial(step_with, generator)):
            want = pipe(**inputs, generator=generator)[0]
        assert torch.equal(DiffusionModel(pipe).generate(**inputs, seed=seed).images, want)
        assert torch.allclose(image, want[0], atol=1e-4)


def step_with(generator, step, *args, **kwargs):
    return step(*args, **kwargs, generator=generator)


class OneByOne(diffusers.DDPMPipeline):
    """Steps each image by itself."""

    @torch.no_grad()
    def __call__(self, generator, batch_size=1):
        self.scheduler.set_timesteps(2)
        sample = randn_tensor((batch_size, 3, diffusion.SIDE, diffusion.SIDE), generator)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            steps = [self.scheduler.step(one, timestep, one).prev_sample for one in sample.split(1)]
            sample = self.unet(torch.cat(steps), timestep).sample
        return diffusers.ImagePipelineOutput(images=sample)


def test_noise_that_is_not_that_of_one_image_for_each_seed():
    pipe = OneByOne(diffusion.ddpm().unet, diffusers.DDPMScheduler())
    told = "OneByOne cannot draw from 2 seeds in this call: its scheduler draws noise for 1 of them"
    with not_called(pipe.unet), pytest.raises(InputError, match=told):
        DiffusionModel(pipe).generate(batch_size=2, seed=5).finish()
    DiffusionModel(pipe).generate(seed=5).finish()


def test_several_videos_of_a_prompt():
    kind = diffusion.PIPELINES["ltx"]
    pipe = kind.build()
    frames = DiffusionModel(pipe).generate(**kind.inputs(), num_videos_per_prompt=2, seed=5).frames
    for i in range(2):
        assert torch.allclose(frames[i], draw(pipe, kind.inputs(), seed=5 + i)[0], atol=1e-4)


def flux_from_an_image():
    parts = {k: v for k, v in diffusion.PIPELINES["flux"].build().components.items() if "image" not in k}
    return diffusion.quiet_pipeline(diffusers.FluxImg2ImgPipeline, **parts)


def video_from_an_image():
    return diffusion.quiet_pipeline(diffusers.LTXImageToVideoPipeline, **diffusion.PIPELINES["ltx"].build().components)


ENCODING_ONE_IMAGE = {
    "inpaint": (diffusion.PIPELINES["inpaint"].build, diffusion.PIPELINES["inpaint"].inputs),
    "flux": (flux_from_an_image, lambda: {**diffusion.PIPELINES["flux"].inputs(), "image": diffusion.IMAGE}),
    "ltx": (video_from_an_image, lambda: {**diffusion.PIPELINES["ltx"].inputs(), "image": diffusion.IMAGE}),
}


@pytest.mark.parametrize("name", ENCODING_ONE_IMAGE)
def test_an_image_that_is_encoded_once_for_several_seeds_is_passed_for_each(name):
    """The pipeline draws for the given image from the first seed alone, or looks for an image for each seed."""
    build, inputs = ENCODING_ONE_IMAGE[name]
    pipe = build()
    model, inputs = DiffusionModel(pipe), inputs()
    several = {"num_videos_per_prompt" if name == "ltx" else "num_images_per_prompt": 2}
    for given in (several, {"prompt": [inputs["prompt"]] * 2}):
        with pytest.raises(
            InputError, match=r"cannot draw from 2 seeds .* Draw from one seed in each run, or .* image=\[image\] \* 2"
        ):
            with model.generate(**{**inputs, **given}, seed=5) as run:
                run[diffusion.PIPELINES[name].denoiser].output
    assert "progress_bar" not in vars(pipe)
    made = drawn(model.generate(**{**inputs, **several, "image": [diffusion.IMAGE] * 2}, seed=5))
    for i in range(2):
        assert torch.allclose(made[i], draw(pipe, inputs, seed=5 + i)[0], atol=1e-4)


@pytest.mark.parametrize("block", [7, 624, 16 * 624])
def test_generators_that_have_drawn_alike(block):
    made = generators([3, 4, 2**40])
    assert have_drawn_alike(made)
    for one in made:
        torch.randn(1000, generator=one)
    assert have_drawn_alike(made)
    torch.rand(block, generator=made[1])
    assert not have_drawn_alike(made)
    made = generators([3, 4])
    for count, one in enumerate(made, 1):  # normal numbers are made in pairs
        torch.randn(count, generator=one)
    assert not have_drawn_alike(made)


def test_encoded_prompts_are_counted(sd):
    inputs = SD()
    encoded, negative = sd.encode_prompt(["a red circle", "a blue square"], "cpu", 1, True)
    del inputs["prompt"]
    inputs |= {"prompt_embeds": encoded, "negative_prompt_embeds": negative}
    images = DiffusionModel(sd).generate(**inputs, seed=5).images
    for i, prompt in enumerate(["a red circle", "a blue square"]):
        assert torch.allclose(images[i], draw(sd, {**SD(), "prompt": prompt}, 5 + i)[0], atol=1e-4)


def test_the_same_seed_draws_the_same_and_another_does_not(sd):
    model = DiffusionModel(sd)
    once = model.generate(**SD(), seed=5).images
    assert torch.equal(model.generate(**SD(), seed=5).images, once)
    assert not torch.equal(model.generate(**SD(), seed=6).images, once)


def test_a_seed_does_not_touch_the_global_generator(sd):
    before = torch.get_rng_state()
    _ = DiffusionModel(sd).generate(**SD(), seed=5).images
    assert torch.equal(torch.get_rng_state(), before)


def test_a_call_that_hides_its_arguments_can_be_seeded(sd):
    class Hiding(type(sd)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    model = DiffusionModel(Hiding(**sd.components, requires_safety_checker=False))
    model.set_progress_bar_config(disable=True)
    assert torch.equal(model.generate(**SD(), seed=SEED).images, draw(sd, SD()))


def dit():
    sizes = {"sample_size": 8, "patch_size": 4, "in_channels": 4, "out_channels": 8, "num_layers": 1}
    sizes |= {"attention_head_dim": 8, "num_attention_heads": 2, "num_embeds_ada_norm": 1000}
    return diffusion.quiet_pipeline(
        diffusers.DiTPipeline,
        transformer=diffusion.model(diffusers.DiTTransformer2DModel, **sizes, norm_elementwise_affine=False, seed=1),
        vae=diffusion.model(diffusers.AutoencoderKL, block_out_channels=[8], norm_num_groups=4, latent_channels=4),
        scheduler=diffusers.DDIMScheduler(),
    )


def test_inputs_that_are_not_prompts_are_counted():
    embeddings = torch.linspace(-1, 1, 64).reshape(2, 32)
    images = {"image_embeds": embeddings, "negative_image_embeds": embeddings * 0, "height": 32, "width": 32}
    for pipe, inputs in ((dit(), {"class_labels": [1, 2]}), (denoisers.kandinsky_decoder(), images)):
        inputs |= {"num_inference_steps": 2, "output_type": "np"}
        want = pipe(**inputs, generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)]).images
        with DiffusionModel(pipe).generate(**inputs, seed=5) as run:
            assert len(run.rows) == 2
        assert np.abs(run.images - want).max() < 1e-5


@pytest.mark.parametrize(
    ("arguments", "inputs", "each"),
    [
        ({"prompt": "a", "image_embeddings": torch.zeros(6, 4, 3, 3)}, 1, 6),
        ({"prompt": ["a", "b"], "image_embeddings": [torch.zeros(4, 4, 3, 3)], "num_images_per_prompt": 3}, 2, 6),
        ({"image_embeddings": torch.zeros(6, 4), "prompt": None}, 6, 1),
        ({"pooled_prompt_embeds": torch.zeros(3, 4)}, 3, 1),
        ({"image": torch.zeros(3, 8, 8), "batch_size": 4}, 1, 1),
        ({"image": torch.zeros(2, 3, 8, 8)}, 2, 1),
        ({"class_labels": 7, "batch_size": 4}, 4, 1),
        ({"prompt": []}, 0, 1),
    ],
)
def test_how_many_images_a_call_draws(arguments, inputs, each):
    assert (count_inputs(arguments), count_images_each(arguments)) == (inputs, each)


def test_class_labels_that_do_not_fit_the_batch():
    sizes = {"block_out_channels": [8], "norm_num_groups": 4, "num_class_embeds": 10, "sample_size": 8}
    blocks = {"down_block_types": ["ResnetDownsampleBlock2D"], "up_block_types": ["ResnetUpsampleBlock2D"]}
    unet = diffusion.model(diffusers.UNet2DModel, **sizes, **blocks)
    model = DiffusionModel(diffusers.ConsistencyModelPipeline(unet, diffusers.CMStochasticIterativeScheduler()))
    with pytest.raises(InputError, match="2 class_labels do not fit batch_size=1: pass batch_size=2"):
        model.generate(class_labels=[1, 2])
    model.check(class_labels=[1, 2], batch_size=2)


@pytest.mark.parametrize("seed", [torch.tensor(3), torch.tensor([3]), [torch.tensor(3)]], ids=str)
def test_a_seed_is_no_tensor(sd, seed):
    with pytest.raises(InputError, match=r"a seed is an integer from 0 to 2\*\*64 - 1, not tensor"):
        DiffusionModel(sd).generate(**SD(), seed=seed)


def test_a_number_of_images_is_whole(sd):
    with pytest.raises(InputError, match=r"num_images_per_prompt must be a whole number, not 1\.5"):
        DiffusionModel(sd).generate(**SD(), seed=0, num_images_per_prompt=1.5)
