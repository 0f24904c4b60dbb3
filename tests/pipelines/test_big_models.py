"""Big models as accelerate and diffusers run them: offloaded, cast, cached. Reads and edits equal plain hooks."""

import copy

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FluxPipeline,
    MagCacheConfig,
    PipelineQuantizationConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import TextKVCacheConfig, apply_group_offloading

from diffsight import DiffusionModel
from diffsight.errors import InputError
from diffsight.pipelines.diffusion.attention import find_attentions
from helpers import SEED, draw, first, hooked, module_at, replaced, same, with_first
from models import diffusion

SD = diffusion.PIPELINES["stable_diffusion"].inputs
CPU = torch.device("cpu")


def group_offload(pipe):
    apply_group_offloading(pipe.unet, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def model_offload(pipe):
    """Do what `enable_model_cpu_offload` does, which refuses to begin without an accelerator."""
    hook = None
    for name in ("text_encoder", "unet", "vae"):
        _, hook = cpu_offload_with_hook(getattr(pipe, name), CPU, prev_module_hook=hook)


def sequential_offload(pipe):
    """Do what `enable_sequential_cpu_offload` does: weights are on the meta device between the calls."""
    cpu_offload(pipe.unet, CPU, offload_buffers=True)
    assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"meta"}


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


def check_against_hooks(model, inputs, path, envoy):
    """Check that reading and editing a module in every step equals hooks on the bare pipeline."""
    pipe = model.pipeline
    seen, drawn = reads(pipe, inputs, path)
    with model.generate(**inputs, seed=SEED) as run:
        read = [first(run[envoy].output).clone() for _ in run.steps]
    assert len(seen) and same(read, seen) and same(run.result[0], drawn)
    with replaced(module_at(pipe, path), half):
        edited = draw(pipe, inputs)
    with model.generate(**inputs, seed=SEED) as run:
        for _ in run.steps:
            run[envoy].output = half(run[envoy].output)
    assert same(run.result[0], edited) and not same(edited, drawn)


@pytest.mark.parametrize("prepare", [group_offload, model_offload, sequential_offload, layerwise_casting])
def test_offloaded_and_cast_modules(prepare):
    pipe = diffusion.stable_diffusion()
    prepare(pipe)
    check_against_hooks(DiffusionModel(pipe), SD(), "unet.mid_block", "unet.mid_block")


def test_a_pipeline_is_offloaded_through_the_model():
    model = DiffusionModel(diffusion.stable_diffusion())
    model.enable_model_cpu_offload(device="cpu")
    check_against_hooks(model, SD(), "unet.mid_block", "unet.mid_block")


@pytest.mark.parametrize("library", ["torchao", "optimum.quanto"])
def test_a_quantised_pipeline(library, tmp_path):
    """Modules of `quanto` are of a class that cannot take the place of a plain one, so they are loaded at once."""
    pytest.importorskip(library, reason=f"{library} is not installed")
    kind = diffusion.PIPELINES["flux"]
    kind.build().save_pretrained(tmp_path)
    model = DiffusionModel(
        tmp_path, quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": quantisation(library)})
    )
    weight = model.pipeline.transformer.transformer_blocks[0].attn.to_q.weight
    assert type(weight).__module__.startswith(library)
    for part in ("attn", "attn.to_q"):
        path, envoy = (f"transformer.transformer_blocks{at}.{part}" for at in (".0", "[0]"))
        check_against_hooks(model, kind.inputs(), path, envoy)


def quantisation(library):
    if library == "torchao":
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from diffusers import QuantoConfig

    return QuantoConfig(weights_dtype="int8")


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
    "mag": lambda pipe: MagCacheConfig(mag_ratios=[1.0] * 8, num_inference_steps=4, threshold=0.5),
    "TaylorSeer": lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "text keys and values": lambda pipe: TextKVCacheConfig(),
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
    check_calls_against_hooks(pipe, inputs, CACHES[name], "attn")


def check_calls_against_hooks(pipe, inputs, cache, part):
    """Check that the calls of a part of the first block, read and edited, equal hooks on the bare pipeline."""
    path, envoy = (f"transformer.transformer_blocks{at}.{part}" for at in (".0", "[0]"))

    def anew():  # a cache keeps its state from call to call
        if pipe.transformer.is_cache_enabled:
            pipe.transformer.disable_cache()
        pipe.transformer.enable_cache(cache(pipe))

    anew()
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


def faster_cache(pipe):
    return FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 2000),
        unconditional_batch_skip_range=3,
        unconditional_batch_timestep_skip_range=(-1, 2000),
        current_timestep_callback=lambda: pipe._current_timestep,
        attention_weight_callback=lambda module: 0.5,
        tensor_format="BFCHW",
    )


def test_faster_cache():
    """It takes the unconditional branch out of some calls, so that nobody knows whose the rows of a value are."""
    kind = diffusion.PIPELINES["cogvideox"]
    pipe, inputs = kind.build(), kind.inputs() | {"num_inference_steps": 4}
    check_calls_against_hooks(pipe, inputs, faster_cache, "attn1")
    model = DiffusionModel(pipe)
    for branch in ("cond", "uncond"):
        with pytest.raises(InputError, match="FasterCache skips the unconditional branch in some calls"):
            with model.generate(**inputs, seed=SEED) as run:
                getattr(run, branch).transformer.transformer_blocks[0].output
    halves = []
    with model.generate(**inputs, seed=SEED) as run:
        for _ in run.steps:
            whole = first(run.transformer.output)
            halves.append(
                same([first(run.uncond.transformer.output), first(run.cond.transformer.output)], [*whole.split(1)])
            )
    assert halves == [True] * 4
    pipe.transformer.disable_cache()
    with model.generate(**inputs, seed=SEED) as run:
        assert len(first(run.uncond.transformer.transformer_blocks[0].output)) == 1


def cached_flux(name):
    kind = diffusion.PIPELINES["flux"]
    pipe = kind.build()
    pipe.transformer.enable_cache(CACHES[name](pipe))
    return pipe, kind.inputs() | {"num_inference_steps": 4}


@pytest.mark.parametrize("name", CACHES)
def test_a_run_that_ends_early_leaves_the_cache_empty(name):
    pipe, inputs = cached_flux(name)
    want = draw(pipe, inputs)
    with DiffusionModel(pipe).generate(**inputs, seed=SEED) as run:
        for _ in run.steps[1:2]:
            run.transformer.transformer_blocks[0].output
        run.stop()
    assert same(draw(pipe, inputs), want)
    with pytest.raises(ZeroDivisionError), DiffusionModel(pipe).generate(**inputs, seed=SEED) as run:
        for step in run.steps:
            _ = run.transformer.output, 1 / (1 - step.index)
    assert same(draw(pipe, inputs), want)


def test_attentions_of_a_pipeline_with_a_cache():
    pipe, inputs = cached_flux("first block")
    want = draw(pipe, inputs)
    inputs = {name: inputs[name] for name in ("height", "width", "max_sequence_length")}
    found = find_attentions(DiffusionModel(pipe), **inputs)
    assert str(found) == str(find_attentions(DiffusionModel(diffusion.PIPELINES["flux"].build()), **inputs))
    assert same(draw(pipe, cached_flux("first block")[1]), want)


def test_two_runs_at_once_of_a_pipeline_with_a_cache():
    pipe, inputs = cached_flux("first block")
    model, want = DiffusionModel(pipe), draw(pipe, inputs)
    with model.generate(**inputs, seed=SEED) as run:
        run.transformer.output
        other = FluxPipeline(**pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)})
        for call in (lambda: draw(pipe, inputs), lambda: model(**inputs), lambda: DiffusionModel(other)(**inputs)):
            with pytest.raises(InputError, match=r"in the cache of the transformer.* transformer.disable_cache\(\)"):
                call()
    assert same(run.result[0], want)
    pipe.transformer.disable_cache()
    with model.generate(**inputs, seed=SEED) as run:
        run.transformer.output
        assert same(draw(pipe, inputs), draw(diffusion.PIPELINES["flux"].build(), inputs))
