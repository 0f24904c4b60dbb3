"""Attribution patching of pipelines, against finite differences of bare pipelines with ordinary hooks."""

import diffusers
import pytest
import torch
from hook_patching import Block

from diffsight import DiffusionModel, activation_patching, attribution_patching
from diffsight.lenses import latent_distance, pixel_distance
from diffsight.lenses.sites.site import Site
from helpers import SEED, draw, outputs, pipeline_footprint, refusal, replaced
from models import diffusion

KINDS = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "pixart_sigma")
CLEAN, CORRUPTED = "a red circle above a blue square", "a green ring"
METRIC, QUIET = latent_distance(), {"progress": False, "seed": SEED}
STEPS, SMALL = 2, 1e-2  # the size of a finite difference, relative to the value


def latents(pipe, prompt, arguments):
    return draw(pipe, {"prompt": prompt, **arguments, "output_type": "latent"})


def distance(a, b):
    return float((a - b).double().pow(2).mean().sqrt())


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    """A pipeline, its arguments, and the path of a block."""
    kind = diffusion.PIPELINES[request.param]
    pipe, arguments = kind.build(), {**kind.inputs(), "num_inference_steps": STEPS}
    pipe.set_progress_bar_config(disable=True)
    arguments = {name: value for name, value in arguments.items() if name not in ("prompt", "output_type")}
    return DiffusionModel(pipe), pipe, arguments, Block.of(pipe, request.param)


def size_of(given, own):
    """Return the part of a patch that changes a value a little."""
    return float(SMALL * own.norm() / (given - own).norm())


def slope(pipe, block, given, own, arguments, steps, metric):
    """Return how fast a metric of the corrupted prompt's latents changes with a part of a patch in some steps."""
    ends, size = [], size_of(block.image(given[0]), block.image(own[0]))
    for factor in (-size, size):
        count = -1

        def change(output, factor=factor):
            nonlocal count
            count += 1
            if count * STEPS // len(given) not in steps:
                return output
            own = block.image(output)
            return block.with_image(output, own + factor * (block.image(given[count]) - own))

        with replaced(block.module, change):
            ends.append(metric(latents(pipe, CORRUPTED, arguments)))
    return (ends[1] - ends[0]) / (2 * size)


def test_equals_finite_differences(case):
    """Through the whole run, for each step and for both together."""
    model, pipe, arguments, block = case
    clean = latents(pipe, CLEAN, arguments)
    before = pipeline_footprint(pipe)
    options = {"sites": block.site, "steps": [0, 1, slice(0, 2)], **QUIET, **arguments}
    result = attribution_patching(model, CLEAN, CORRUPTED, METRIC, **options)
    given, own = (outputs(block.module, latents, pipe, prompt, arguments) for prompt in (CLEAN, CORRUPTED))
    for column, steps in enumerate(([0], [1], [0, 1])):
        expected = slope(pipe, block, given, own, arguments, steps, lambda found: distance(found, clean))
        found = float(result.values[0, 0, column] - result.corrupted_metric)
        assert found == pytest.approx(expected, rel=0.05, abs=1e-6)
        assert abs(expected) > 2e-6
    assert result.columns == ("0", "1", "0-1")
    assert result.passes == 3 + 2 * STEPS  # each step is computed again
    assert pipeline_footprint(pipe) == before
    assert result.compare(activation_patching(model, CLEAN, CORRUPTED, METRIC, **options)).correlation > 0


@pytest.fixture(scope="module")
def small():
    """Stable Diffusion, as a model and as a pipeline, and its arguments."""
    kind = diffusion.PIPELINES["stable_diffusion"]
    pipe = kind.build()
    pipe.set_progress_bar_config(disable=True)
    arguments = {**kind.inputs(), "num_inference_steps": STEPS}
    arguments = {name: value for name, value in arguments.items() if name not in ("prompt", "output_type")}
    return DiffusionModel(pipe), pipe, arguments


def stepwise(pipe, prompt, arguments, latents_after=None):
    """Return the latents after each step. The next step starts from `latents_after`, if they are given."""
    found = []

    def keep(pipe, step, timestep, values):
        found.append(values["latents"].clone())
        return {} if latents_after is None else {"latents": latents_after[step].clone()}

    latents(pipe, prompt, {**arguments, "callback_on_step_end": keep})
    return found


ATTENTION = "unet.mid_block.attentions[0].transformer_blocks[0].attn2"


def test_a_step_at_the_same_noisy_latents(small):
    """Each step starts from the corrupted run's latents, and the metric is that of the latents after it."""
    model, pipe, arguments = small
    options = {"sites": "unet.mid_block", "steps": "each", "through": "step", **QUIET, **arguments}
    result = attribution_patching(model, CLEAN, CORRUPTED, METRIC, **options)
    module, target = pipe.unet.mid_block, stepwise(pipe, CORRUPTED, arguments)
    states = outputs(module, latents, pipe, CORRUPTED, arguments)
    for step in range(STEPS):
        given = []
        handle = module.register_forward_hook(lambda _, args, output, given=given: given.append(output.clone()))
        clean = stepwise(pipe, CLEAN, arguments, target)
        handle.remove()
        size, measured = size_of(given[step], states[step]), []
        for factor in (-size, size):
            count = -1

            def change(output, factor=factor, step=step, given=given):
                nonlocal count
                count += 1
                return output + factor * (given[step] - output) if count == step else output

            with replaced(module, change):
                measured.append(distance(stepwise(pipe, CORRUPTED, arguments)[step], clean[step]))
        expected = (measured[1] - measured[0]) / (2 * size)
        assert abs(expected) > 1e-6
        assert float(result.values[0, 0, step] - result.target[0, step]) == pytest.approx(expected, rel=0.05, abs=1e-7)
        assert float(result.target[0, step]) == pytest.approx(distance(target[step], clean[step]), rel=1e-3)
        assert float(result.source[0, step]) == 0
    assert result.effect.shape == (1, STEPS)
    both = attribution_patching(model, CLEAN, CORRUPTED, METRIC, **{**options, "steps": None})
    assert torch.allclose(both.values[..., 0], result.values.mean(-1), atol=1e-6)
    assert torch.allclose(both.target[..., 0], result.target.mean(-1), atol=1e-6)


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_the_gradient_goes_through_what_the_scheduler_keeps(small, scheduler):
    """A multistep scheduler also uses the denoiser's earlier outputs. The graph of the whole run is the reference."""
    model, pipe, arguments = small
    before, arguments = pipe.scheduler, {**arguments, "num_inference_steps": 3}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(before.config)
    options = {"sites": ["unet.mid_block", "text_encoder.layers[1]"], "steps": "each", **QUIET, **arguments}
    try:
        result = attribution_patching(model, CLEAN, CORRUPTED, METRIC, **options)
        with model.generate(CLEAN, seed=SEED, output_type="latent", **arguments) as run:
            state = run.text_encoder.layers[1].output.clone()
            given = [run.unet.mid_block.output.clone() for _ in run.steps]
        with model.generate(CORRUPTED, seed=SEED, grad=True, output_type="latent", **arguments) as run:
            leaves = [Site("text_encoder.layers[1].output").track(run)]
            leaves += [Site("unet.mid_block.output").track(run) for _ in run.steps]
            distance = (run.result.images - run_of(model, CLEAN, arguments)).square().mean().sqrt()
        gradients = torch.autograd.grad(distance, leaves)
    finally:
        pipe.scheduler = before
    changes = [((y - x) * g).sum() for x, y, g in zip(leaves, [state, *given], gradients)]
    found = (result.values - result.target)[0]
    assert torch.allclose(found[0], torch.stack(changes[1:]), rtol=1e-4, atol=1e-6)
    assert torch.allclose(found[1], changes[0].expand(3), rtol=1e-4, atol=1e-6)
    assert found[:, 0].abs().min() > 1e-3


def run_of(model, prompt, arguments):
    return model.generate(prompt, seed=SEED, output_type="latent", **arguments).result.images


def test_each_step_is_computed_again(small):
    """The graph is that of one step, so the denoiser runs with and without a graph."""
    model, pipe, arguments = small
    grads = []
    handle = pipe.unet.mid_block.register_forward_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    attribution_patching(model, CLEAN, CORRUPTED, METRIC, sites="unet.mid_block", **QUIET, **arguments)
    handle.remove()
    assert grads.count(True) == STEPS  # the target's
    assert grads.count(False) == 3 * STEPS  # both prompts together, and each by itself
    result = attribution_patching(
        model, CLEAN, CORRUPTED, METRIC, sites="unet.mid_block", steps=[1], **QUIET, **arguments
    )
    assert result.passes == 3 + 2  # step 0 is not computed again


def test_a_branch_of_a_pipeline_with_a_controlnet():
    kind = diffusion.ALL_PIPELINES["controlnet"]
    pipe = kind.build()
    pipe.set_progress_bar_config(disable=True)
    arguments = {name: value for name, value in kind.inputs().items() if name not in ("prompt", "output_type")}
    model, sites = DiffusionModel(pipe), ["controlnet.mid_block", "unet.mid_block"]
    options = {"sites": sites, **QUIET, **arguments}
    both, cond, uncond = (
        attribution_patching(model, CLEAN, CORRUPTED, METRIC, branch=of, **options) for of in (None, "cond", "uncond")
    )
    change = [(one.values - one.target)[0] for one in (both, cond, uncond)]
    assert torch.allclose(change[0], change[1] + change[2], rtol=1e-3, atol=1e-8)
    assert change[1].abs().min() > 1e-7


def test_gradient_checkpointing_changes_nothing(small):
    model, pipe, arguments = small
    options = {"sites": [ATTENTION, "unet.mid_block"], "steps": "each", **QUIET, **arguments}
    plain = attribution_patching(model, CLEAN, CORRUPTED, METRIC, **options)
    calls = []
    pipe.unet.enable_gradient_checkpointing()
    handle = pipe.unet.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        result = attribution_patching(model, CLEAN, CORRUPTED, METRIC, **options)
    finally:
        handle.remove()
        pipe.unet.disable_gradient_checkpointing()
    assert torch.allclose(plain.values, result.values, rtol=1e-3, atol=1e-5)
    assert len(calls) > 3 * STEPS  # computed again


def test_heads_and_regions_sum_to_the_whole(small):
    """The estimate is linear, so the parts of a value add up."""
    model, _, arguments = small
    options = {**QUIET, **arguments}

    def changes(**chosen):
        result = attribution_patching(model, CLEAN, CORRUPTED, METRIC, **chosen, **options)
        return (result.values - result.target)[0]

    whole = changes(sites=ATTENTION)
    halves = changes(sites=ATTENTION, positions=["left", "right"])
    heads = changes(sites=f"{ATTENTION}.heads_output")
    assert torch.allclose(halves.sum(), whole.sum(), rtol=1e-3)
    assert halves.abs().min() > 1e-8
    projected = changes(sites=f"{ATTENTION}.to_out[0].input")
    assert torch.allclose(heads.sum(), projected.sum(), rtol=1e-3)
    assert torch.allclose(whole.sum(), projected.sum(), rtol=1e-3)  # what follows is linear


@pytest.mark.parametrize("site", ["text_encoder.layers[1]", f"{ATTENTION}.v"])
def test_words_sum_to_the_whole(small, site):
    model, pipe, arguments = small
    options = {"sites": site, **QUIET, **arguments}
    whole = attribution_patching(model, CLEAN, CORRUPTED.replace("ring", "ring above a blue square"), METRIC, **options)
    each = attribution_patching(
        model, CLEAN, CORRUPTED.replace("ring", "ring above a blue square"), METRIC, positions="each", **options
    )
    assert each.values.shape[-1] == pipe.tokenizer.model_max_length
    change = [(one.values - one.target)[0].sum(-1) for one in (whole, each)]
    assert torch.allclose(change[0], change[1], rtol=1e-3, atol=1e-8)
    assert change[0].abs().max() > 1e-7


def test_branches_sum_to_both(small):
    model, _, arguments = small
    options = {"sites": "unet.mid_block", **QUIET, **arguments}
    both, cond, uncond = (
        attribution_patching(model, CLEAN, CORRUPTED, METRIC, branch=of, **options) for of in (None, "cond", "uncond")
    )
    change = [one.values - one.target[:, None, None] for one in (both, cond, uncond)]
    assert torch.allclose(change[0], change[1] + change[2], rtol=1e-3, atol=1e-8)
    assert change[1].abs() > 1e-6


def test_refused(small):
    model, _, arguments = small
    given = (attribution_patching, model, CLEAN, CORRUPTED)
    options = {"sites": "unet.mid_block", **QUIET, **arguments}
    assert "reads images" in refusal(*given, pixel_distance(), **options)
    assert "compute it from result.latents" in refusal(*given, lambda result: 1.0, **options)
    assert "through must be 'run' or 'step'" in refusal(*given, METRIC, through="all", **options)
    assert "qk_correction is an argument for a language model" in refusal(*given, METRIC, qk_correction=True, **options)
    assert "there is no step 5" in refusal(*given, METRIC, **options, steps=[5])
    for through in ("run", "step"):  # the root of 0 has no slope
        assert "is not finite" in refusal(*given, METRIC, **options, into="clean", through=through)
