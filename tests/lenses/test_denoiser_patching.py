"""Activation patching and ablation of pipelines, against a loop over bare pipelines with ordinary hooks."""

import pytest
import torch
from hook_patching import Block
from matplotlib.figure import Figure

from diffsight import DiffusionModel, activation_patching, block_ablation
from diffsight.errors import InputError, PointNotFoundError
from diffsight.lenses import latent_distance, pixel_distance
from helpers import SEED, draw, first, module_at, outputs, pipeline_footprint, refusal, replaced, with_first
from models import denoisers, diffusion, text_encoders

KINDS = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "pixart_sigma")
CLEAN, CORRUPTED = "a red circle above a blue square", "a green ring"
METRIC, QUIET = latent_distance(), {"progress": False, "seed": SEED}


def arguments_of(kind):
    given = {**kind.inputs(), "num_inference_steps": 3}
    return {name: value for name, value in given.items() if name not in ("prompt", "output_type")}


def latents(pipe, prompt, arguments):
    return draw(pipe, {"prompt": prompt, **arguments, "output_type": "latent"})


def distance(a, b):
    return float((a - b).pow(2).mean().sqrt())


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    """A pipeline, its arguments, the path of a block, and the latents of both prompts."""
    kind = diffusion.PIPELINES[request.param]
    pipe, arguments = kind.build(), arguments_of(kind)
    pipe.set_progress_bar_config(disable=True)
    ends = [latents(pipe, prompt, arguments) for prompt in (CLEAN, CORRUPTED)]
    return DiffusionModel(pipe), pipe, arguments, Block.of(pipe, request.param), ends


def test_equals_a_loop_with_hooks(case):
    """A block in three windows of steps."""
    model, pipe, arguments, block, (clean, corrupted) = case
    before = pipeline_footprint(pipe)
    windows = [0, slice(1, 3), slice(0, 3)]
    result = activation_patching(model, CLEAN, CORRUPTED, METRIC, sites=block.site, steps=windows, **QUIET, **arguments)
    module = block.module
    given = outputs(module, latents, pipe, CLEAN, arguments)
    for column, steps in enumerate((range(1), range(1, 3), range(3))):
        count = -1

        def change(output, steps=steps):
            nonlocal count
            count += 1
            return block.with_image(output, block.image(given[count])) if count * 3 // len(given) in steps else output

        with replaced(module, change):
            expected = distance(latents(pipe, CORRUPTED, arguments), clean)
        assert float(result.values[0, 0, column]) == pytest.approx(expected, abs=2e-4)
    assert float(result.corrupted_metric) == pytest.approx(distance(corrupted, clean), abs=2e-4)
    assert float(result.clean_metric) == pytest.approx(0, abs=1e-4)
    assert result.columns == ("0", "1-2", "0-2")
    assert pipeline_footprint(pipe) == before


def test_several_tensors_are_told_apart():
    model = DiffusionModel(diffusion.PIPELINES["flux"].build())
    given = {"sites": "transformer.transformer_blocks[0]", **QUIET, "num_inference_steps": 1}
    said = refusal(activation_patching, model, CLEAN, CORRUPTED, METRIC, **given)
    assert "has several tensors: write transformer.transformer_blocks[0].output[0] or" in said


def test_zeros_equal_a_loop_with_hooks(case):
    model, pipe, arguments, block, ends = case
    result = block_ablation(model, CLEAN, METRIC, sites=block.path, mode="zero", **QUIET, **arguments)

    def zero(output):
        items = [output] if isinstance(output, torch.Tensor) else list(output)
        found = [item * 0 if isinstance(item, torch.Tensor) else item for item in items]
        return found[0] if isinstance(output, torch.Tensor) else tuple(found)

    with replaced(block.module, zero):
        expected = distance(latents(pipe, CLEAN, arguments), ends[0])
    assert float(result.values[0, 0, 0]) == pytest.approx(expected, rel=1e-3, abs=2e-4)
    assert float(result.target) == pytest.approx(0, abs=1e-5)


# ---- modes, regions, branches


@pytest.fixture(scope="module")
def small():
    """Stable Diffusion, as a model and as a pipeline, and its arguments."""
    pipe = diffusion.PIPELINES["stable_diffusion"].build()
    pipe.set_progress_bar_config(disable=True)
    return DiffusionModel(pipe), pipe, arguments_of(diffusion.PIPELINES["stable_diffusion"])


ATTENTION = "unet.mid_block.attentions[0].transformer_blocks[0].attn2"


@pytest.mark.parametrize("mode", ["skip", "mean"])
def test_modes_equal_a_loop_with_hooks(small, mode):
    model, pipe, arguments = small
    block = "unet.mid_block.attentions[0]"
    result = block_ablation(model, CLEAN, METRIC, sites=block, mode=mode, steps=[1], **QUIET, **arguments)
    module, count = pipe.unet.mid_block.attentions[0], -1

    def hook(_, args, output):
        nonlocal count
        count += 1
        value = args[0] if mode == "skip" else first(output).mean((2, 3), keepdim=True).expand_as(first(output))
        return with_first(output, value) if count == 1 else output

    handle = module.register_forward_hook(hook)
    changed = latents(pipe, CLEAN, arguments)
    handle.remove()
    expected = distance(changed, latents(pipe, CLEAN, arguments))
    assert expected > 1e-5
    assert float(result.effect) == pytest.approx(expected, rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("kind", ["stable_diffusion_3", "flux", "pixart_sigma"])
def test_skipped_blocks_equal_a_loop_with_hooks(kind):
    """A row for each block. In FLUX, the inputs of blocks hold rotary embeddings that all rows share."""
    model = DiffusionModel(diffusion.PIPELINES[kind].build())
    pipe, arguments = model.pipeline, arguments_of(diffusion.PIPELINES[kind])
    pipe.set_progress_bar_config(disable=True)
    lists = [name for name in dict(pipe.transformer.named_children()) if name.endswith("transformer_blocks")]
    blocks = [
        (f"transformer.{name}[{i}]", one) for name in lists for i, one in enumerate(getattr(pipe.transformer, name))
    ]
    result = block_ablation(model, CLEAN, METRIC, sites=[path for path, _ in blocks], **QUIET, **arguments)
    clean = latents(pipe, CLEAN, arguments)
    for (_, block), value in zip(blocks, result.values.flatten().tolist()):

        def give(_, args, kwargs, output):
            hidden = [*args, *kwargs.values()][0]
            return (kwargs["encoder_hidden_states"], hidden) if isinstance(output, tuple) else hidden

        handle = block.register_forward_hook(give, with_kwargs=True)
        expected = distance(latents(pipe, CLEAN, arguments), clean)
        handle.remove()
        assert value == pytest.approx(expected, rel=1e-2, abs=1e-5)


def test_a_skipped_block_may_be_inside_another(small):
    model, _, arguments = small
    sites = ["unet.mid_block", "unet.mid_block.attentions[0]"]
    both = block_ablation(model, CLEAN, METRIC, sites=sites, **QUIET, **arguments)
    alone = [block_ablation(model, CLEAN, METRIC, sites=site, **QUIET, **arguments) for site in sites]
    assert torch.allclose(both.values, torch.cat([one.values for one in alone], 1), atol=1e-4)


def test_a_block_with_an_input_of_both_branches_is_not_skipped_in_one():
    """The rotary embeddings of HunyuanDiT."""
    model, call = DiffusionModel(denoisers.hunyuan_dit()), {"num_inference_steps": 1, "height": 64, "width": 64}
    call |= {"use_resolution_binning": False, "sites": "transformer.blocks[0]", **QUIET}
    said = refusal(block_ablation, model, CLEAN, METRIC, branch="cond", **call)
    assert said.startswith(
        "transformer.blocks[0] cannot be skipped in one branch (cond.transformer.blocks[0].inputs cannot"
    )
    assert said.endswith('Omit branch, or pass mode="zero"')
    assert float(block_ablation(model, CLEAN, METRIC, branch="cond", mode="zero", **call).effect) > 0
    assert float(block_ablation(model, CLEAN, METRIC, **call).effect) > 0


def test_a_skipped_module_returns_its_first_input():
    """The rotary embeddings of LTX have the shape of the hidden states."""
    model = DiffusionModel(diffusion.PIPELINES["ltx"].build())
    arguments = arguments_of(diffusion.PIPELINES["ltx"])
    block = "transformer.transformer_blocks[0]"
    result = block_ablation(model, CLEAN, METRIC, sites=block, **QUIET, **arguments)
    module, pipe = model.pipeline.transformer.transformer_blocks[0], model.pipeline
    clean = latents(pipe, CLEAN, arguments)
    handle = module.register_forward_hook(lambda _, args, kwargs, __: kwargs["hidden_states"], with_kwargs=True)
    expected = distance(latents(pipe, CLEAN, arguments), clean)
    handle.remove()
    assert float(result.values) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_a_branch_and_a_region(small, branch):
    """The left half of a cross-attention's output, in one branch: half of the batch, columns 0 and 1 of each row."""
    model, pipe, arguments = small
    result = activation_patching(
        model, CLEAN, CORRUPTED, METRIC, sites=ATTENTION, positions="left", branch=branch, **QUIET, **arguments
    )
    module = module_at(pipe, ATTENTION.replace("[0]", ".0"))
    given, count = outputs(module, latents, pipe, CLEAN, arguments), -1
    side = int(given[0].shape[1] ** 0.5)

    def change(output):
        nonlocal count
        count += 1
        changed, row = output.clone(), 1 if branch == "cond" else 0
        part, value = (x[row].unflatten(0, (side, side))[:, : side // 2] for x in (changed, given[count]))
        part.copy_(value)
        return changed

    with replaced(module, change):
        changed = latents(pipe, CORRUPTED, arguments)
    clean, corrupted = (latents(pipe, prompt, arguments) for prompt in (CLEAN, CORRUPTED))
    assert float(result.values) == pytest.approx(distance(changed, clean), abs=1e-5)
    assert result.columns == ("left",)
    assert distance(changed, corrupted) > 1e-6


def test_a_branch_that_has_a_call_of_its_own():
    """FLUX with true guidance calls the transformer once for each branch."""
    kind = diffusion.ALL_PIPELINES["two_call_guidance"]
    pipe, arguments = kind.build(), arguments_of(kind)
    pipe.set_progress_bar_config(disable=True)
    block = Block.of(pipe, "two_call_guidance")
    options = {"sites": block.site, "branch": "cond", **QUIET, **arguments}
    result = activation_patching(DiffusionModel(pipe), CLEAN, CORRUPTED, METRIC, **options)
    given, count = outputs(block.module, latents, pipe, CLEAN, arguments), -1

    def change(output):
        nonlocal count
        count += 1
        return block.with_image(output, block.image(given[count])) if count % 2 == 0 else output

    with replaced(block.module, change):
        changed = latents(pipe, CORRUPTED, arguments)
    clean, corrupted = (latents(pipe, prompt, arguments) for prompt in (CLEAN, CORRUPTED))
    assert float(result.values) == pytest.approx(distance(changed, clean), abs=1e-5)
    assert distance(changed, corrupted) > 1e-4


def encoded(pipe, prompt):
    return pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids


def test_words_in_a_text_encoder(small):
    """The states of "red" after a layer take the place of those of "green"."""
    model, pipe, arguments = small
    options = {"sites": "text_encoder.layers[1]", "positions": [("red", "green"), "circle"], **QUIET, **arguments}
    prompts = "a red circle above", "a green circle above"
    result = activation_patching(model, *prompts, METRIC, **options)
    module = pipe.text_encoder.encoder.layers[1]
    given = outputs(module, latents, pipe, prompts[0], arguments)
    places = [
        [encoded(pipe, text)[0].tolist().index(encoded(pipe, word)[0, 1].item()) for text, word in pair]
        for pair in (((prompts[0], "red"), (prompts[1], "green")), ((prompts[0], "circle"), (prompts[1], "circle")))
    ]
    clean = latents(pipe, prompts[0], arguments)
    for column, (taken, place) in enumerate(places):
        count = -1

        def change(output, taken=taken, place=place):
            nonlocal count
            count += 1
            changed = first(output).clone()
            changed[:, place] = first(given[count])[:, taken]
            return with_first(output, changed)

        with replaced(module, change):
            changed = latents(pipe, prompts[1], arguments)
        assert float(result.values[0, 0, column]) == pytest.approx(distance(changed, clean), abs=1e-6)
        assert distance(changed, latents(pipe, prompts[1], arguments)) > 1e-6
    assert result.columns == ("red → green", "circle")
    assert result.axis == "token"


@pytest.mark.parametrize("which", ["k", "v"])
def test_words_among_the_keys_of_cross_attention(small, which):
    model, pipe, arguments = small
    options = {"sites": f"{ATTENTION}.{which}", "positions": [("red", "green")], **QUIET, **arguments}
    prompts = "a red circle above", "a green circle above"
    result = activation_patching(model, *prompts, METRIC, **options)
    module = module_at(pipe, ATTENTION.replace("[0]", ".0")).get_submodule(f"to_{which}")
    given = outputs(module, latents, pipe, prompts[0], arguments)
    place = encoded(pipe, prompts[0])[0].tolist().index(encoded(pipe, "red")[0, 1].item())
    heads, clean = len(result.sites), latents(pipe, prompts[0], arguments)
    for head in range(heads):
        count = -1

        def change(output, head=head):
            nonlocal count
            count += 1
            changed = output.clone()
            parts = [value.unflatten(-1, (heads, -1))[:, place, head] for value in (changed, given[count])]
            parts[0].copy_(parts[1])
            return changed

        with replaced(module, change):
            changed = latents(pipe, prompts[1], arguments)
        assert float(result.values[0, head, 0]) == pytest.approx(distance(changed, clean), abs=1e-6)
        assert which == "k" or distance(changed, latents(pipe, prompts[1], arguments)) > 1e-7


def test_the_text_encoder_and_the_heads(small):
    """All of the text encoder's output makes the clean image; the heads of an attention are sites of their own."""
    model, _, arguments = small
    sites = {"sites": "text_encoder.final_layer_norm"}
    result = activation_patching(model, CLEAN, CORRUPTED, METRIC, **sites, **QUIET, **arguments)
    assert float(result.effect) == pytest.approx(1, abs=1e-3)
    sites = {"sites": f"{ATTENTION}.heads_output", "heads": [1]}
    result = activation_patching(model, CLEAN, CORRUPTED, METRIC, **sites, **QUIET, **arguments)
    assert [site.head for site in result.sites] == [1]
    assert result.values.shape == (1, 1, 1)


def test_steps_before_the_patch_are_not_computed_again(small):
    model, pipe, arguments = small
    calls = []
    handle = pipe.unet.conv_in.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    result = activation_patching(
        model, CLEAN, CORRUPTED, METRIC, sites="unet.mid_block", steps=[2], **QUIET, **arguments
    )
    handle.remove()
    assert calls == [4, 4, 4, 4]  # two rows of two branches in three steps, and once more in the last step
    assert result.passes == 2


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batches_change_nothing(small, batch_size):
    model, _, arguments = small
    options = {"sites": ["unet.mid_block", ATTENTION], "steps": "each", **QUIET, **arguments}
    plain = activation_patching(model, CLEAN, CORRUPTED, METRIC, **options)
    result = activation_patching(model, CLEAN, CORRUPTED, METRIC, batch_size=batch_size, **options)
    assert plain.values.shape == (1, 2, 3)
    assert torch.allclose(plain.values, result.values, atol=1e-5)


def test_pairs_directions_and_what_a_result_shows(small, tmp_path):
    model, _, arguments = small
    options = {"sites": "unet.**.attn2", **QUIET, **arguments}
    both = activation_patching(model, [CLEAN, CORRUPTED], [CORRUPTED, CLEAN], pixel_distance(), **options)
    back = activation_patching(model, CORRUPTED, CLEAN, pixel_distance(), **options)
    assert torch.allclose(both.values[1], back.values[0], atol=1e-4)
    into = activation_patching(
        model, CLEAN, CORRUPTED, lambda result: float(result.latents.mean()), into="clean", **options
    )
    assert into.values.shape == both.values[:1].shape
    assert isinstance(both.plot(), Figure)
    assert {path.name for path in both.save(tmp_path)} >= {"lens.json", "effects.png"}
    assert CLEAN in str(into)


def test_ablation_by_default_measures_pixels(small):
    model, _, arguments = small
    result = block_ablation(model, [CLEAN, CORRUPTED], sites="unet.**.attn1", mode="zero", **QUIET, **arguments)
    assert result.metric == "pixel distance"
    assert torch.equal(result.effect, result.values.mean(0))
    assert isinstance(result.plot(), Figure)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sites": "layers"}, "write the paths"),
        ({"sites": "unet.**.attn3"}, "attn3"),
        ({"sites": "unet.mid_block.output[1]"}, "unet.mid_block.output has no tensor 1"),
        ({"steps": [99]}, "there is no step 99"),
        ({"steps": "early"}, "'early'"),
        ({"positions": ["centre"]}, "there is no region 'centre', and unet.mid_block.output has no words"),
        ({"positions": ["ring"], "sites": "text_encoder.layers[0]"}, "'ring' does not occur in the prompt"),
        ({"positions": [("circle", "green")], "sites": f"{ATTENTION}.q"}, "has no words"),
        ({"positions": "left", "align": "mean"}, "align is for positions that are words"),
        ({"positions": (0, 0, 2, 1)}, "a region is a box"),
        ({"branch": "both"}, "branch must be"),
        ({"layers": 3}, "layers is an argument for a language model"),
        ({"corrupted": [CLEAN, CLEAN]}, "1 clean and 2 corrupted"),
        ({"sites": "vae.encoder"}, "never reaches vae.encoder"),
        ({"heads": 0}, "none of the sites has heads"),
        ({"max_rows": 1, "steps": "each"}, "the sweep has 3 rows"),
        ({"metric": lambda result: None}, "must return a number"),
        ({"num_inference_step": 3}, "num_inference_steps"),
    ],
)
def test_refused(small, change, said):
    model, _, arguments = small
    given = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC, "sites": "unet.mid_block"}
    with pytest.raises((InputError, PointNotFoundError)) as error:
        activation_patching(model, **{**given, **QUIET, **arguments, **change})
    assert said in str(error.value)


def test_a_site_behind_the_steps_is_refused(small):
    model, _, arguments = small
    said = refusal(block_ablation, model, CLEAN, sites="vae.decoder.mid_block", mode="zero", **QUIET, **arguments)
    assert "reaches vae.decoder.mid_block.output neither before the steps nor in the first step" in said


def test_refused_ablations(small):
    model, _, arguments = small
    given = {**QUIET, **arguments}
    assert "mode must be" in refusal(block_ablation, model, CLEAN, sites="unet.mid_block", mode="drop", **given)
    assert "cannot be skipped" in refusal(block_ablation, model, CLEAN, sites="unet.conv_in", **given)
    assert "pass its path, not the path of one of its values" in refusal(
        block_ablation, model, CLEAN, sites="unet.mid_block.input", **given
    )


def test_a_denoiser_that_returns_a_list_is_refused():
    small = text_encoders.TEXT_PIPELINES["z_image"]
    model, given = DiffusionModel(text_encoders.built("z_image")), {**small.call, **QUIET, "num_inference_steps": 2}
    said = refusal(block_ablation, model, CLEAN, METRIC, sites="transformer.layers[0]", **given)
    assert "returns a tuple without a tensor of its own" in said


@pytest.mark.parametrize("lens", [activation_patching, block_ablation])
def test_a_metric_that_is_not_finite(small, lens):
    model, _, arguments = small
    prompts = (CLEAN, CORRUPTED) if lens is activation_patching else (CLEAN,)
    numbers = iter([1.0] * len(prompts) + [float("nan")])
    said = refusal(lens, model, *prompts, lambda result: next(numbers), sites="unet.mid_block", **QUIET, **arguments)
    assert f"is nan for the prompt {prompts[-1]!r} with unet.mid_block changed at" in said
