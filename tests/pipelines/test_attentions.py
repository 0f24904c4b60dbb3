"""What attends to what in the denoisers of diffusion pipelines, as the code of diffusers lays it out."""

import weakref

import pytest
import torch

from diffsight import DiffusionModel
from diffsight.errors import InputError
from diffsight.pipelines.diffusion.attention import find_attentions
from helpers import SEED, footprint
from models import diffusion, text_encoders


def consecutive(count, start=0):
    """Return the keys of tokens that stand side by side."""
    return tuple(range(start, start + count))


CLIP, T5 = consecutive(77), consecutive(16)
SELF, SMALL_SELF = ("self", (16, 16), {}), ("self", (8, 8), {})


def cross(grid, **text):
    return ("cross", grid, text)


def joint(grid, **text):
    return ("joint", grid, text)


UNET = [SELF, cross((16, 16), text_encoder=CLIP), SMALL_SELF, cross((8, 8), text_encoder=CLIP)]
UNET += 2 * [SELF, cross((16, 16), text_encoder=CLIP)]
TWO = {"text_encoder": CLIP, "text_encoder_2": CLIP}
XL = [SELF, cross((16, 16), **TWO), *2 * [SMALL_SELF, cross((8, 8), **TWO)], *2 * [SELF, cross((16, 16), **TWO)]]
SD3 = {name: consecutive(77, 64) for name in TWO} | {"text_encoder_3": consecutive(16, 64 + 77)}
QWEN = (*[None] * 34, *consecutive(193))  # the tokens of the instruction are cut off
KANDINSKY = (*[None] * 40, *consecutive(191))
LINEAR = ("none", None, {})

# Kind, grid, and the keys of each encoder's tokens, in the order of the calls.
EXPECTED = {
    "stable_diffusion": UNET,
    "stable_diffusion_2": UNET,
    "stable_diffusion_xl": XL,
    "stable_diffusion_3": 2 * [joint((8, 8), **SD3)],  # the image first, then CLIP, then T5
    "flux": 4 * [joint((8, 8), text_encoder_2=T5)],  # the text first; CLIP is pooled
    "flux2": 2 * [joint((8, 8), text_encoder=consecutive(128))],
    "pixart_sigma": 2 * [SMALL_SELF, cross((8, 8), text_encoder=T5)],
    "sana": [*2 * [cross((16, 16), text_encoder=T5)], LINEAR, LINEAR],
    "qwen_image": 2 * [joint((4, 4), text_encoder=QWEN)],
    "z_image": [
        SMALL_SELF,
        ("text", None, {"text_encoder": (*consecutive(51), *[None] * 77)}),
        joint((8, 8), text_encoder=(*consecutive(51, 64), *[None] * 77)),
    ],
    "kandinsky5": [
        ("text", None, {"text_encoder": KANDINSKY}),
        *2 * [("self", (4, 4), {}), cross((4, 4), text_encoder=KANDINSKY)],
    ],
    "lumina": 2 * [("self", (2, 2), {}), cross((2, 2), text_encoder=consecutive(8))],
    "wan": 2 * [("self", (2, 2, 2), {}), cross((2, 2, 2), text_encoder=(*consecutive(8), *[None] * 8))],
    "cogvideox": 2 * [joint((3, 2, 2), text_encoder=T5)],
    "ltx": 2 * [("self", (2, 4, 4), {}), cross((2, 4, 4), text_encoder=T5)],
    "deepfloyd_if": [*4 * [joint((16, 16), text_encoder=CLIP)], LINEAR],  # the last pools the text
    "ddpm": 4 * [SELF],
}


def small(name):
    if name in diffusion.PIPELINES:
        return diffusion.PIPELINES[name].build(), diffusion.PIPELINES[name].inputs()
    return text_encoders.built(name), text_encoders.TEXT_PIPELINES[name].inputs()


@pytest.mark.parametrize("name", EXPECTED)
def test_what_attends_to_what(name):
    pipe, inputs = small(name)
    found = find_attentions(DiffusionModel(pipe), **inputs)
    assert [(one.kind, one.grid, dict(one.text)) for one in found.values()] == EXPECTED[name]
    for one in found.values():
        assert (one.unplaced is None) == (one.kind != "none")
        if one.kind == "joint":
            taken = {key for keys in one.text.values() for key in keys if key is not None}
            assert taken.isdisjoint(one.image_keys) and len(one.image_keys) == len(one.image)


def test_positions_that_are_not_square():
    pipe, inputs = small("flux")
    found = find_attentions(DiffusionModel(pipe), **inputs | {"height": 48, "width": 32})
    assert [one.grid for one in found.values()] == 4 * [(12, 8)]
    assert {one.scale for one in found.values()} == {2.0}


def test_an_image_prompt(sd):
    inputs = diffusion.PIPELINES["stable_diffusion"].inputs() | diffusion.add_image_prompt(sd)
    found = find_attentions(DiffusionModel(sd), **inputs)
    path = "unet.mid_block.attentions[0].transformer_blocks[0].attn2"
    text, image = found[f"{path}.products[0]"], found[f"{path}.products[1]"]
    assert dict(text.text) == {"text_encoder": CLIP}
    assert image.text == {} and image.keys == 4 and image.unplaced == "its keys are neither text nor the image"
    assert text.path == image.path == path


def test_attentions_of_a_model(sd):
    model = DiffusionModel(sd)
    before = {name: footprint(module) for name, module in sd.unet.named_modules()}
    state = torch.get_rng_state()
    found = model.attentions
    assert model.attentions is found
    assert {name: footprint(module) for name, module in sd.unet.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert str(found).splitlines()[:3] == [
        "StableDiffusionPipeline: unet",
        "  unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1: self, 2 heads; image 16 x 16",
        "  unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2: cross, 2 heads; image 16 x 16; text_encoder: "
        "tokens 0 to 76 at keys 0 to 76",
    ]
    assert len(found.of_kind("cross")) == len(found.of_kind("self")) == 4
    with pytest.raises(InputError, match="has no attention"):
        found["unet.attn1"]
    with model.generate(**diffusion.PIPELINES["stable_diffusion"].inputs(), seed=SEED) as run:
        for attention in found.values():
            assert run[attention.path].attention_probs.shape[1] == attention.heads


def test_a_pipeline_that_needs_more():
    model = DiffusionModel(text_encoders.built("stable_audio"))
    with pytest.raises(InputError, match="cannot be called"):
        find_attentions(model, "a bell", audio_end_in_s=-1)


def test_what_follows_a_linear_attention_is_not_kept():
    """Its products have no softmax, and what is computed from them lives no longer than in a bare call."""
    pipe = diffusion.PIPELINES["sana"].build()
    inputs = dict(diffusion.PIPELINES["sana"].inputs())
    first, second = pipe.transformer.transformer_blocks
    outputs, alive = [], []
    first.attn1.to_out[0].register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    second.attn1.register_forward_pre_hook(lambda module, args: alive.append(outputs[-1]() is not None))
    find_attentions(DiffusionModel(pipe), **inputs)
    assert alive and not any(alive)
