"""Diffusers' modular pipelines, compared with the bare pipelines and plain hooks."""

import json
import shutil

import diffusers
import pytest
import torch
from diffusers.guiders import AutoGuidance, ClassifierFreeGuidance, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from torch.utils._pytree import tree_leaves

from diffsight import DiffusionModel
from diffsight.errors import InputError, NeverReachedError
from diffsight.lenses import (
    activation_patching,
    attention_maps,
    diffusion_lens,
    pixel_distance,
    prompt_to_prompt,
    trajectory_lens,
)
from helpers import recorded
from models.diffusion import PIPELINES
from models.text_encoders import TEXT_PIPELINES

PROMPT, NEGATIVE = "a red circle", "blue"
GIVEN = {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "pt", "height": 32, "width": 32}


SMALL = {**PIPELINES, **TEXT_PIPELINES}


class Case:
    """How to build and call one modular pipeline from the components of a small one that is not modular."""

    def __init__(self, blocks, small, denoiser="transformer", output="images", same=(), guider=dict, **call):
        self.blocks, self.small, self.denoiser, self.output, self.call = blocks, small, denoiser, output, GIVEN | call
        self.same, self.guider = dict(same), guider

    def components(self):
        source = SMALL[self.small].build()
        names = getattr(diffusers, self.blocks)().component_names
        parts = {name: getattr(source, name, None) for name in names if name not in ("image_processor", "guider")}
        parts |= {name: parts[other] for name, other in self.same.items()}
        return {name: part for name, part in parts.items() if part is not None} | self.guider()

    def build(self):
        pipe = getattr(diffusers, self.blocks)().init_pipeline()
        pipe.update_components(**self.components())
        return pipe

    def bare(self, pipe, seed=0, **more):
        generator = torch.Generator().manual_seed(seed)
        return torch.as_tensor(pipe(**(self.call | more), generator=generator, output=self.output))


def guider():
    return {"guider": ClassifierFreeGuidance(guidance_scale=3.0)}


CASES = {
    "stable diffusion xl": Case("StableDiffusionXLAutoBlocks", "stable_diffusion_xl", "unet", negative_prompt=NEGATIVE),
    "stable diffusion 3": Case("StableDiffusion3AutoBlocks", "stable_diffusion_3", negative_prompt=NEGATIVE),
    "flux": Case("FluxAutoBlocks", "flux"),
    "wan": Case("WanBlocks", "wan", output="videos", num_frames=5, height=16, width=16, negative_prompt=NEGATIVE),
    "qwen image": Case("QwenImageAutoBlocks", "qwen_image", negative_prompt=NEGATIVE),
    "z image": Case("ZImageAutoBlocks", "z_image", guider=guider, negative_prompt=NEGATIVE),
    "wan 2.2": Case(
        "Wan22Blocks", "wan", output="videos", same={"transformer_2": "transformer"}, num_frames=5, height=16, width=16
    ),
    "ltx": Case("LTXAutoBlocks", "ltx", output="videos", num_frames=9, negative_prompt=NEGATIVE),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def sdxl():
    return CASES["stable diffusion xl"]


def first(output):
    return tree_leaves(output)[0]


def outputs(run, case):
    return torch.as_tensor(run.images if case.output == "images" else run.frames)


def calls_of(module):
    """Return a list that a hook fills with what the module returns."""
    kept = []
    hook = module.register_forward_hook(lambda module, args, output: kept.append(first(output).clone()))
    return kept, hook


def test_an_unread_run_and_a_read_one_are_the_bare_call(case):
    pipe = case.build()
    expected = case.bare(pipe)
    model = DiffusionModel(pipe)
    assert torch.equal(outputs(model.generate(**case.call, seed=0), case), expected)
    assert torch.equal(outputs(model.generate(**case.call, seed=0, output=case.output), case), expected)
    with model.generate(**case.call, seed=0) as run:
        for _ in run.steps:
            run[case.denoiser].output
    assert torch.equal(outputs(run, case), expected)
    assert type(run.result).__name__ == "PipelineState"


def test_steps_and_branches(case):
    pipe = case.build()
    kept, hook = calls_of(getattr(pipe, case.denoiser))
    case.bare(pipe)
    hook.remove()
    timesteps = pipe.scheduler.timesteps.tolist()
    with DiffusionModel(pipe).generate(**case.call, seed=0) as run:
        steps, conds, unconds = [], [], []
        for step in run.steps:
            steps.append(step.timestep)
            conds.append(first(run.cond[case.denoiser].output).clone())
            if case.blocks.startswith("Flux"):
                with pytest.raises(NeverReachedError, match="no unconditional branch"):
                    run.uncond[case.denoiser].output
                break
            unconds.append(first(run.uncond[case.denoiser].output).clone())
    assert steps == pytest.approx(timesteps[: len(steps)])
    if unconds:
        assert len(kept) == 4
        for a, b, one, two in zip(conds, unconds, kept[::2], kept[1::2]):
            assert torch.equal(a, one) and torch.equal(b, two)
            assert not torch.equal(a, b)
    else:
        assert torch.equal(conds[0], kept[0])


def test_what_comes_after_the_last_step_can_be_read(case):
    pipe = case.build()
    expected = case.bare(pipe)
    with recorded(pipe.vae, "decode") as calls:
        case.bare(pipe)
    with DiffusionModel(pipe).generate(**case.call, seed=0) as run:
        steps = [step.index for step in run.steps]
        latents = run.vae.decode.input
    assert steps == [*range(case.call["num_inference_steps"])]
    assert torch.equal(latents, calls[0][0][0][0])
    assert torch.equal(outputs(run, case), expected)


SKIPPED = LayerSkipConfig(indices=[0], fqn="mid_block.attentions.0.transformer_blocks")


@pytest.mark.parametrize(
    ("guider", "call"),
    [  # and the call of the denoiser for which they put hooks on it
        (AutoGuidance(auto_guidance_config=SKIPPED, start=0.0, stop=1.0), 1),
        (SkipLayerGuidance(skip_layer_config=SKIPPED, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0), 2),
    ],
)
def test_a_guider_leaves_no_hooks_on_the_denoiser(sdxl, guider, call):
    pipe = sdxl.build()
    pipe.update_components(guider=guider)
    expected = sdxl.bare(pipe)
    with DiffusionModel(pipe).generate(**sdxl.call, seed=0) as run:
        for _ in run.steps[1:]:
            run.unet.mid_block.calls[call].output
            run.stop()
    assert torch.equal(sdxl.bare(pipe), expected)


def test_an_edit_of_one_branch_is_what_a_hook_does(sdxl):
    pipe = sdxl.build()
    calls = []

    def edit(module, args, output):
        calls.append(None)
        return (output[0] * 0,) if len(calls) % 2 else output

    hook = pipe.unet.register_forward_hook(edit)
    expected = sdxl.bare(pipe)
    hook.remove()
    with DiffusionModel(pipe).generate(**sdxl.call, seed=0) as run:
        for _ in run.steps:
            run.cond.unet.output[0].mul_(0)
    assert torch.equal(run.images, expected)
    assert not torch.equal(expected, sdxl.bare(pipe))


def test_two_runs_at_once(case):
    pipe = case.build()
    expected = [case.bare(pipe, seed) for seed in (0, 1)]
    model = DiffusionModel(pipe)
    with model.generate(**case.call, seed=0) as x, model.generate(**case.call, seed=1) as y:
        for _ in zip(x.steps, y.steps):
            pass
    assert torch.equal(outputs(x, case), expected[0])
    assert torch.equal(outputs(y, case), expected[1])


def test_a_guider_that_starts_later_is_not_at_its_step_in_another_run(sdxl):
    pipe = sdxl.build()
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=5.0, start=0.5))
    expected = sdxl.bare(pipe)
    model = DiffusionModel(pipe)
    with model.generate(**sdxl.call, seed=0) as x, model.generate(**sdxl.call, seed=0) as y:
        for _ in zip(x.steps, y.steps):
            pass
    assert torch.equal(x.images, expected)
    assert torch.equal(y.images, expected)


def test_seeds_of_several_images(sdxl):
    model = DiffusionModel(sdxl.build())
    both = model.generate(**sdxl.call, num_images_per_prompt=2, seed=4).images
    alone = [model.generate(**sdxl.call, seed=seed).images[0] for seed in (4, 5)]
    assert torch.allclose(both, torch.stack(alone), atol=1e-5)


def test_encoders_and_the_diffusion_lens(sdxl):
    model = DiffusionModel(sdxl.build())
    assert list(model.encoders) == ["text_encoder", "text_encoder_2"]
    plain = DiffusionModel(SMALL["stable_diffusion_xl"].build())
    assert [e.used_layers for e in model.encoders.values()] == [e.used_layers for e in plain.encoders.values()]
    size = {"num_inference_steps": 2, "height": 32, "width": 32}
    result, same = (diffusion_lens(lensed, PROMPT, seed=0, **size) for lensed in (model, plain))
    assert result.layers == same.layers
    assert len(result.images) == len(result.layers)


def test_lenses_that_draw(sdxl):
    """They show what the same pipeline shows that is not modular: latents, and images as long as noise is the same."""
    model, given = DiffusionModel(sdxl.build()), {"num_inference_steps": 2, "height": 32, "width": 32}
    drawn = model.generate(PROMPT, seed=0, **given).images
    traced = trajectory_lens(model, PROMPT, seed=0, **given)
    assert traced.image == drawn[0]
    assert attention_maps(model, PROMPT, words=["red"], seed=0, **given).image == drawn[0]
    assert prompt_to_prompt(model, PROMPT, "a blue circle", seed=0, **given).source_image == drawn[0]
    pair = (PROMPT, "a blue circle", pixel_distance())
    result = activation_patching(model, *pair, sites="unet.mid_block", seed=0, **given)
    assert result.clean_metric != result.corrupted_metric


def test_arguments_are_checked_against_the_inputs_of_the_blocks(sdxl):
    model = DiffusionModel(sdxl.build())
    for given, match in [
        ({"banana": 3}, "no argument 'banana'"),
        ({"sed": 3}, "'seed'"),
        ({"num_images": 3}, "num_images_per_prompt"),
        ({"seed": 0, "generator": torch.Generator()}, "either seed or generator"),
        ({"grad": True}, "disable gradients themselves"),
    ]:
        with pytest.raises(InputError, match=match):
            model.generate(PROMPT, **given)
    with pytest.raises(InputError, match="all other arguments by name"):
        model.generate(PROMPT, 20)
    assert torch.equal(model.generate(PROMPT, **{n: v for n, v in sdxl.call.items() if n != "prompt"}, seed=0).images,
                       model.generate(**sdxl.call, seed=0).images)  # fmt: skip
    with pytest.raises(InputError, match="has no images; it has latents"):
        model.generate(**sdxl.call, seed=0, output="latents").images


def test_from_blocks(sdxl):
    blocks = diffusers.StableDiffusionXLAutoBlocks()
    run = DiffusionModel(blocks, **sdxl.components()).generate(**sdxl.call, seed=0)
    assert torch.equal(run.images, sdxl.bare(sdxl.build()))
    with pytest.raises(InputError, match="no components yet"):
        DiffusionModel(blocks)
    with pytest.raises(InputError, match=r"'unett'.*'unet'"):
        DiffusionModel(blocks, unett=None)


def test_from_a_folder(sdxl, tmp_path):
    pipe = sdxl.build()
    pipe.save_pretrained(str(tmp_path / "saved"), overwrite_modular_index=True)
    loaded = diffusers.ModularPipeline.from_pretrained(str(tmp_path / "saved"))
    loaded.load_components()
    expected = sdxl.bare(loaded)
    assert torch.equal(DiffusionModel(tmp_path / "saved").generate(**sdxl.call, seed=0).images, expected)
    configuration = tmp_path / "saved" / "text_encoder" / "config.json"
    configuration.rename(tmp_path / "config.json")
    with pytest.raises(InputError, match=rf"there is no config\.json in {configuration.parent}"):
        DiffusionModel(tmp_path / "saved")
    (tmp_path / "config.json").rename(configuration)
    index = tmp_path / "saved" / "modular_model_index.json"
    entries = json.loads(index.read_text())
    entries["unet"][2]["type_hint"] = ["some_library", "Net"]
    index.write_text(json.dumps(entries))
    with pytest.raises(InputError, match="neither diffusers nor transformers"):
        DiffusionModel(tmp_path / "saved")


def test_from_a_hub_repository_with_a_modular_index_alone(sdxl, tmp_path):
    sdxl.build().save_pretrained(str(tmp_path / "saved"), overwrite_modular_index=True)
    repository = tmp_path / "cache" / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copy(tmp_path / "saved" / "modular_model_index.json", snapshot)
    model = DiffusionModel("owner/name", cache_dir=str(tmp_path / "cache"), local_files_only=True)
    expected = DiffusionModel(tmp_path / "saved").generate(**sdxl.call, seed=0).images
    assert torch.equal(model.generate(**sdxl.call, seed=0).images, expected)
