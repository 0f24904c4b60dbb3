"""Big models as accelerate and diffusers run them: offloaded, cast, cached. Reads and edits equal plain hooks."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_group_offloading

from diffsight import DiffusionModel
from helpers import SEED, draw, first, hooked, module_at, replaced, same, with_first
from models import diffusion

SD = diffusion.PIPELINES["stable_diffusion"].inputs
CPU = torch.device("cpu")


def group_offload(pipe):
    apply_group_offloading(pipe.unet, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def layerwise_casting(pipe):
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


def half(output):
    return with_first(output, first(output) * 0.5)


def reads(pipe, inputs, path):
    """Return what a block returns in each call of the bare pipeline, and what the pipeline draws."""
    seen = []
    with hooked(module_at(pipe, path), lambda module, args, output: seen.append(first(output).clone())):
        drawn = draw(pipe, inputs)
    return seen, drawn


@pytest.mark.parametrize("prepare", [group_offload, layerwise_casting])
def test_offloaded_and_cast_modules(prepare):
    pipe = diffusion.stable_diffusion()
    prepare(pipe)
    seen, drawn = reads(pipe, SD(), "unet.mid_block")
    model = DiffusionModel(pipe)
    with model.generate(**SD(), seed=SEED) as run:
        read = [first(run.unet.mid_block.output).clone() for _ in run.steps]
    assert same(read, seen) and same(run.result[0], drawn)
    with replaced(pipe.unet.mid_block, half):
        edited = draw(pipe, SD())
    with model.generate(**SD(), seed=SEED) as run:
        for _ in run.steps:
            run.unet.mid_block.output = half(run.unet.mid_block.output)
    assert same(run.result[0], edited) and not same(edited, drawn)


def test_a_pipeline_with_a_device_map(saved_pipeline):
    model = DiffusionModel(saved_pipeline, device_map="cpu")
    bare = DiffusionModel(saved_pipeline)
    inputs = {"prompt": "a red circle", "num_inference_steps": 2, "output_type": "pt"}
    runs = []
    for one in (model, bare):
        with one.generate(**inputs, seed=SEED) as run:
            hidden = run.text_encoder.layers_output[1].clone()
            for _ in run.steps:
                run.unet.mid_block.output[:] *= 0.5
        runs.append((hidden, run.images))
    assert same(*runs)


CACHES = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=0.2),
    "pyramid attention broadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        current_timestep_callback=lambda: pipe._current_timestep,
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_of_diffusers(name):
    """A cache leaves blocks out in some steps; the calls that there are can be read and edited as with plain hooks."""
    kind = diffusion.PIPELINES["flux"]
    pipe, inputs = kind.build(), kind.inputs() | {"num_inference_steps": 4}
    path, envoy = "transformer.transformer_blocks.0.attn", "transformer.transformer_blocks[0].attn"

    def anew():  # a cache keeps its state from call to call
        pipe.transformer.disable_cache()
        pipe.transformer.enable_cache(CACHES[name](pipe))

    pipe.transformer.enable_cache(CACHES[name](pipe))
    seen, drawn = reads(pipe, inputs, path)
    anew()
    followed = []
    with DiffusionModel(pipe).generate(**inputs, seed=SEED) as run:
        run.follow(envoy, lambda output: followed.append(first(output).clone()))
    assert len(seen) and same(followed, seen) and same(run.result[0], drawn)
    anew()
    with replaced(module_at(pipe, path), half, only=0):
        edited = draw(pipe, inputs)
    anew()
    with DiffusionModel(pipe).generate(**inputs, seed=SEED) as run:
        run[envoy].output = half(run[envoy].output)
    assert same(run.result[0], edited) and not same(edited, drawn)
