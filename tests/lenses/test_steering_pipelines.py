"""Steering a pipeline at any point, compared with plain hooks on the bare pipeline."""

import diffusers
import pytest
import torch

from diffsight import DiffusionModel, Model, steer, steering_sweep
from diffsight.errors import InputError, PointNotFoundError
from helpers import SEED, draw, module_at
from models import denoisers, diffusion

FACTOR = 3.0


def vector(width):
    return torch.randn(width, generator=torch.Generator().manual_seed(1))


def add(value, direction):
    return value + FACTOR * direction


def remove(value, direction):
    unit = direction / direction.norm()
    return value - FACTOR * (value * unit).sum(-1, keepdim=True) * unit


def keeping_norm(value, direction):
    moved = add(value, direction)
    return moved * value.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)


# kind, path of steer, real path, width, item of a tuple, dimension of the features
SITES = [
    ("stable_diffusion", "unet.mid_block", "unet.mid_block", 32, None, 1),
    (
        "stable_diffusion",
        "unet.mid_block.**.attn2",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2",
        32,
        None,
        -1,
    ),
    ("stable_diffusion", "text_encoder.layers[1]", "text_encoder.encoder.layers.1", 32, None, -1),
    ("stable_diffusion_xl", "text_encoder_2.layers[0]", "text_encoder_2.text_model.encoder.layers.0", 32, None, -1),
    (
        "stable_diffusion_3",
        "transformer.transformer_blocks[0].attn.output[0]",
        "transformer.transformer_blocks.0.attn",
        32,
        0,
        -1,
    ),
    ("flux", "transformer.transformer_blocks[1].output[1]", "transformer.transformer_blocks.1", 32, 1, -1),
    ("two_call_guidance", "transformer.transformer_blocks[1].output[1]", "transformer.transformer_blocks.1", 32, 1, -1),
    ("pixart_sigma", "transformer.transformer_blocks[1].attn2", "transformer.transformer_blocks.1.attn2", 32, None, -1),
]  # fmt: skip


def hooked(pipe, path, change, item, dim, is_cond, steps=None):
    """Change the conditional branch of what a module returns, in some steps, with an ordinary hook."""
    calls = -1

    def hook(module, args, output):
        nonlocal calls
        calls += 1
        value = output if item is None else output[item]
        if not is_cond(calls, len(value)) or (steps is not None and calls not in steps):
            return None
        start = is_cond(calls, len(value)) - 1
        value = value.clone()
        value[start:] = change(value[start:].movedim(dim, -1)).movedim(-1, dim)
        return value if item is None else (*output[:item], value, *output[item + 1 :])

    return module_at(pipe, path).register_forward_hook(hook)


def of_batch(call, size):
    """The second half of a batch of two is the conditional branch, or all of a batch of one."""
    return size  # of 1 from place 0, of 2 from place 1


def of_encoder(call, size):
    """The first call encodes the prompt."""
    return 1 if call == 0 else 0


def of_two_calls(call, size):
    """The first of two calls is the conditional one."""
    return 1 if call % 2 == 0 else 0


@pytest.mark.parametrize(("kind", "path", "real", "width", "item", "dim"), SITES, ids=lambda value: str(value))
def test_the_conditional_branch_at_any_point(kind, path, real, width, item, dim):
    small = diffusion.ALL_PIPELINES[kind]
    pipe, direction = small.build(), vector(width)
    is_cond = of_two_calls if kind == "two_call_guidance" else of_encoder if "text_encoder" in real else of_batch
    handle = hooked(pipe, real, lambda value: add(value, direction), item, dim, is_cond)
    expected = draw(pipe, small.inputs())
    handle.remove()
    steered = steer(DiffusionModel(pipe), path, direction, FACTOR)
    torch.testing.assert_close(steered.generate(**small.inputs(), seed=SEED).images, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, draw(pipe, small.inputs()), atol=1e-3)


@pytest.fixture(scope="module")
def pipe():
    return diffusion.stable_diffusion()


@pytest.fixture(scope="module")
def model(pipe):
    return DiffusionModel(pipe)


INPUTS = diffusion.PIPELINES["stable_diffusion"].inputs()
MID = "unet.mid_block"


@pytest.mark.parametrize(
    ("options", "change", "steps"),
    [
        ({"mode": "remove"}, remove, None),
        ({"keep_norm": True}, keeping_norm, None),
        ({"steps": slice(1, None)}, add, [1, 2]),
        ({"steps": [-2]}, add, [1]),
        ({"steps": iter([0, 2])}, add, [0, 2]),
    ],
)
def test_options(pipe, model, options, change, steps):
    direction = vector(32)
    handle = hooked(pipe, MID, lambda value: change(value, direction), None, 1, of_batch, steps)
    expected = draw(pipe, INPUTS)
    handle.remove()
    images = steer(model, MID, direction, FACTOR, **options).generate(**INPUTS, seed=SEED).images
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, draw(pipe, INPUTS), atol=1e-4)


def test_both_branches_are_one_and_the_other(model):
    def images(*branches):
        steered = model
        for branch in branches:
            steered = steer(steered, MID, vector(32), branch=branch)
        return steered.generate(**INPUTS, seed=SEED).images

    assert torch.allclose(images("both"), images("cond", "uncond"), atol=1e-6)
    assert torch.equal(images("cond"), images(None))
    assert not torch.allclose(images("cond"), images("uncond"), atol=1e-4)


def value_at(model, path):
    with model.generate(**INPUTS, seed=SEED) as run:
        for _ in run.steps:
            value = run.cond[path].output.clone()
            run.stop()
            break
    return value


def test_a_mask_steers_a_region(model):
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True  # the upper half
    attention = f"{MID}.attentions[0].transformer_blocks[0].attn2"
    for path, shape in ((MID, (1, 32, 8, 8)), (attention, (1, 64, 32))):
        change = value_at(steer(model, path, vector(32), positions=mask), path) - value_at(model, path)
        change = (change if change.ndim == 4 else change.movedim(-1, 1)).reshape(1, 32, 8, 8)
        assert torch.allclose(change[0, :, :4], vector(32)[:, None, None].expand(-1, 4, 8), atol=1e-5)
        assert not change[0, :, 4:].any()
        assert shape == tuple(value_at(model, path).shape)


def test_an_iterator_holds_positions_and_steps(model):
    sweep = {"factors": [1, 2], "batch_size": 1, "progress": False, "num_inference_steps": 3}
    given, lists = (
        steering_sweep(model, "a circle", MID, vector(32), positions=kind([0, 5]), steps=kind([0, -1]), **sweep).images[
            0
        ]
        for kind in (iter, list)
    )
    assert [one.tobytes() for one in given] == [one.tobytes() for one in lists]


def test_positions_of_a_text_encoder(model):
    path = "text_encoder.layers[1]"
    before, after = (value_at_encoder(one, path) for one in (model, steer(model, path, vector(32), positions=[1, -1])))
    assert torch.allclose((after - before)[0, [1, -1]], vector(32).expand(2, -1), atol=1e-5)
    assert not (after - before)[0, 2:-1].any()


def value_at_encoder(model, path):
    with model.generate(**INPUTS, seed=SEED) as run:
        value = run.cond[path].output.clone()
        run.stop()
    return value


def test_a_plain_model():
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    x, direction = torch.randn(3, 4), vector(8)
    with torch.no_grad():
        steered = steer(Model(net), "0", direction, 2.0).trace(x).result
        assert torch.allclose(steered, net[1](net[0](x) + 2 * direction), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layers": 3}, "by path, such as 'text_encoder.layers\\[4\\]'"),
        ({"mode": "subtract"}, "mode must be one of 'add', 'remove'"),
        ({"branch": "conditional"}, "branch must be one of 'cond', 'uncond', 'both'"),
        ({"layers": "vae.decoder", "branch": "cond"}, "no branches of guidance at vae.decoder"),
        ({"layers": "text_encoder.layers[1]", "steps": 1}, r"text_encoder.layers\[1\] does not run in steps"),
        ({"steps": 1.5}, "steps are integers or slices"),
        ({"positions": torch.ones(4, 4)}, "must be of torch.bool"),
        ({"positions": "circle"}, "positions are integers, or a mask"),
        ({"vector": None}, "the vector must be a float tensor"),
    ],
)
def test_bad_input(model, given, words):
    with pytest.raises(InputError, match=words):
        steer(model, **{"layers": MID, "vector": vector(32), **given})


def test_a_path_that_does_not_exist(model):
    with pytest.raises(PointNotFoundError, match="did you mean 'mid_block'"):
        steer(model, "unet.midblock", vector(32))
    with pytest.raises(PointNotFoundError, match="no part of the model matches"):
        steer(model, "unet.**.attn9", vector(32))


@pytest.mark.parametrize(
    ("layers", "given", "words"),
    [
        (MID, {"vector": torch.ones(31)}, "the vector has 31 features, but unet.mid_block has 32"),
        (MID, {"vector": torch.ones(32), "steps": 7}, "there is no step 7"),
        (MID, {"vector": torch.ones(32), "positions": 64}, "there is no position 64"),
        (
            f"{MID}.resnets[0].conv1",
            {"vector": torch.ones(32), "positions": torch.zeros(2, 2) > 0},
            "the mask is empty",
        ),
        ("unet.conv_norm_out", {"vector": torch.ones(32), "positions": [0], "steps": 9}, "there is no step 9"),
    ],
)
def test_what_is_known_in_the_run_only(model, layers, given, words):
    with pytest.raises(InputError, match=words):
        steer(model, layers, **given).generate(**INPUTS, seed=SEED).result


def test_a_block_that_returns_text_and_image_needs_to_be_told_which():
    small = diffusion.PIPELINES["flux"]
    steered = steer(DiffusionModel(small.build()), "transformer.transformer_blocks[1]", vector(32))
    with pytest.raises(InputError, match=r"has several tensors: write .*output\[0\] or .*output\[1\]"):
        steered.generate(**small.inputs(), seed=SEED).result


@pytest.mark.parametrize("path", [MID, "text_encoder.layers[0]"])
def test_a_run_without_guidance_has_no_unconditional_branch(model, path):
    steered = steer(model, path, vector(32), branch="uncond")
    with pytest.raises(InputError, match="there is no unconditional branch at that point: guidance is off"):
        steered.generate("a circle", seed=SEED, guidance_scale=1.0, num_inference_steps=3).result


def two_denoisers():
    kind = diffusion.PIPELINES["wan"]
    parts = kind.build().components | {"transformer_2": kind.build().transformer}
    pipe = diffusers.WanPipeline(**parts, boundary_ratio=0.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe, kind.inputs() | {"num_inference_steps": 4}


def test_the_unconditional_branch_of_a_second_denoiser():
    """It runs in the last steps only, in two calls: the conditional branch first."""
    pipe, call = two_denoisers()
    direction, calls = vector(32), []

    def hook(module, args, output):
        calls.append(output)
        return output + direction if len(calls) % 2 == 0 else None

    handle = pipe.transformer_2.blocks[0].register_forward_hook(hook)
    want = draw(pipe, call)
    handle.remove()
    assert 0 < len(calls) < 8
    steered = steer(DiffusionModel(pipe), "transformer_2.blocks[0]", direction, branch="uncond")
    assert torch.equal(torch.as_tensor(steered.generate(**call, seed=SEED).result.frames), torch.as_tensor(want))
    with pytest.raises(InputError, match=r"uncond.transformer_2.blocks\[0\] was asked for, but there is no uncond"):
        steered.generate(**call | {"guidance_scale": 1.0}, seed=SEED).finish()


def test_a_stopped_run_may_have_no_unconditional_branch_so_far():
    pipe, call = two_denoisers()
    model = DiffusionModel(pipe)
    for path in ("transformer_2.blocks[0]", "text_encoder.layers[0]"):
        with steer(model, path, vector(32), branch="uncond").generate(**call, seed=SEED) as run:
            assert run.cond.transformer.blocks[0].output is not None
            run.stop()


def test_an_unconditional_pipeline_has_one_branch():
    kind, direction = diffusion.PIPELINES["ddpm"], vector(32)
    pipe = kind.build()
    handle = pipe.unet.mid_block.register_forward_hook(lambda module, args, output: output + direction[:, None, None])
    want = draw(pipe, kind.inputs(), SEED)
    handle.remove()
    got = steer(DiffusionModel(pipe), "unet.mid_block", direction).generate(**kind.inputs(), seed=SEED).images
    assert torch.equal(torch.as_tensor(got), torch.as_tensor(want))


def test_branches_that_cannot_be_told_apart_are_steered_together():
    pipe, direction = denoisers.kandinsky_decoder(), vector(32)
    embeddings = torch.ones(1, 32)
    given = {"image_embeds": embeddings, "negative_image_embeds": embeddings * 0, "num_inference_steps": 1}
    given |= {"height": 32, "width": 32, "output_type": "np"}
    with pytest.raises(InputError, match='or pass branch="both" to a lens'):
        steer(DiffusionModel(pipe), "unet.mid_block", direction).generate(**given).finish()
    got = steer(DiffusionModel(pipe), "unet.mid_block", direction, branch="both").generate(**given, seed=SEED).images
    pipe.unet.mid_block.register_forward_hook(lambda module, args, output: output + direction[:, None, None])
    want = pipe(**given, generator=torch.Generator().manual_seed(SEED)).images
    assert torch.equal(torch.as_tensor(got), torch.as_tensor(want))
