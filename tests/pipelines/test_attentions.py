"""What attends to what in the denoisers of diffusion pipelines, as the code of diffusers lays it out."""

import dataclasses
import functools
import weakref

import diffusers
import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diffsight import DiffusionModel
from diffsight.errors import InputError
from diffsight.pipelines.diffusion.attention import find_attentions, follow_products
from helpers import SEED, footprint, hooked
from models import diffusion, text_encoders
from models.denoisers import DENOISERS
from models.diffusion import SIDE


def consecutive(count, start=0):
    """Return the keys of tokens that stand side by side."""
    return tuple(range(start, start + count))


def padded(keys, length):
    """Return keys of tokens, and None for the padding after them."""
    return (*keys, *[None] * (length - len(keys)))


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
HUNYUAN = {"text_encoder": padded(consecutive(9), 77), "text_encoder_2": padded(consecutive(8, 77), 256)}
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
    "chroma": 2 * [joint((8, 8), text_encoder=T5)],
    # The padding is zero, and learned tokens come first.
    "aura_flow": 2 * [joint((8, 8), text_encoder=padded(consecutive(8, 8), 16))],
    "lumina2": [
        ("text", None, {"text_encoder": padded(consecutive(26), 128)}),  # with the words that are put before the prompt
        ("self", (2, 2), {}),
        joint((2, 2), text_encoder=padded(consecutive(26), 128)),
    ],
    "hunyuan_dit": [
        ("text", None, {}),  # pools the text
        *2 * [("self", (4, 4), {}), cross((4, 4), **HUNYUAN)],
    ],
    "kandinsky_decoder": 4 * [("self", (16, 16), {})],  # its other keys are those of an embedding of an image
    "hunyuan_video": [
        ("text", None, {"text_encoder": (*[None] * 8, *consecutive(11, 5))}),  # a template and padding come first
        *2 * [joint((3, 4, 4), text_encoder=(*[None] * 8, *consecutive(11, 53)))],
    ],
}


def small(name):
    if name in diffusion.PIPELINES:
        return diffusion.PIPELINES[name].build(), diffusion.PIPELINES[name].inputs()
    if name in DENOISERS:
        return built(name), DENOISERS[name].inputs()
    return text_encoders.built(name), text_encoders.TEXT_PIPELINES[name].inputs()


@functools.cache
def built(name):
    return DENOISERS[name].build()


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


def test_one_image_at_a_time():
    """As in large pipelines. Small ones draw several images in one run."""
    pipe, inputs = small("pixart_sigma")
    found = find_attentions(DiffusionModel(pipe), **inputs | {"prompt": [inputs["prompt"]]})
    assert [(one.kind, one.grid, dict(one.text)) for one in found.values()] == EXPECTED["pixart_sigma"]


def test_a_hook_that_changes_only_the_first_image():
    def change(module, args, output):
        output[0][0] += torch.arange(output[0].shape[-1]) % 3  # in place

    pipe, inputs = small("stable_diffusion")
    with hooked(pipe.text_encoder, change):
        found = find_attentions(DiffusionModel(pipe), **inputs)
    assert [(one.kind, one.grid, dict(one.text)) for one in found.values()] == EXPECTED["stable_diffusion"]


class PlainProducts(TorchFunctionMode):
    """Keeps the softmax of q and k of every fused kernel in the first call of a denoiser."""

    def __init__(self, denoiser):
        super().__init__()
        self.kept, self.calls = [], 0
        denoiser.register_forward_pre_hook(self.count)

    def count(self, module, args):
        self.calls += 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and self.calls == 1:
            self.kept.append(self.probabilities(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def probabilities(self, query, key, value, attn_mask=None, scale=None, **rest):
        assert not rest.get("is_causal")
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype is torch.bool else scores + attn_mask
        return torch.nan_to_num(scores.softmax(-1))  # a query without keys attends to nothing


@pytest.mark.parametrize("name", DENOISERS)
def test_probabilities_of_every_module(name):
    pipe, inputs = small(name)
    model, kept = DiffusionModel(pipe), []
    found = [one for one in find_attentions(model, **inputs).values() if not one.path.endswith("pooler")]
    with model.generate(**inputs, seed=SEED) as run:
        for attention in found:
            kept.append(run[attention.path].attention_probs)
        run.stop()
    pipe = DENOISERS[name].build()
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    with torch.no_grad(), PlainProducts(denoiser) as plain:
        pipe(**inputs, generator=torch.Generator().manual_seed(SEED))
    plain.kept = [probs for probs in plain.kept if probs.ndim == 4]
    assert len(kept) == len(plain.kept) == len(found)
    for attention, probs, expected in zip(found, kept, plain.kept):
        assert probs.shape[1:] == (attention.heads, attention.queries, attention.keys)
        assert torch.allclose(probs, expected, atol=1e-5)


@pytest.mark.parametrize("rows, columns", [(12, 8), (7, 8), (7, 9)])  # odd numbers cannot be halved
def test_positions_that_are_not_square(rows, columns):
    pipe, inputs = small("flux")
    found = find_attentions(DiffusionModel(pipe), **inputs | {"height": 4 * rows, "width": 4 * columns})
    assert [one.grid for one in found.values()] == 4 * [(rows, columns)]
    assert {one.scale for one in found.values()} == {2.0}


REFERENCE = diffusion.IMAGE.resize((64, 64))


def test_reference_images_beside_the_image():
    """FLUX Kontext: the text first, then the image that is drawn, then the given one."""
    pipe = diffusers.FluxKontextPipeline(**text_encoders.built("flux").components)
    inputs = text_encoders.TEXT_PIPELINES["flux"].inputs(image=REFERENCE, max_area=SIDE**2, _auto_resize=False)
    found = find_attentions(DiffusionModel(pipe), **inputs)
    assert [(one.kind, one.grid, dict(one.text)) for one in found.values()] == EXPECTED["flux"]
    for one in found.values():
        assert (one.image, one.image_keys, one.references) == (range(16, 80), range(16, 80), range(80, 336))


def test_reference_images_in_a_product_of_their_own():
    """FLUX.2 klein with kept keys: reference images come before the image, and attend to themselves alone."""
    pipe = diffusers.Flux2KleinKVPipeline(**text_encoders.built("flux2").components)
    model = DiffusionModel(pipe)
    inputs = text_encoders.TEXT_PIPELINES["flux2"].inputs(image=REFERENCE)
    found = find_attentions(model, **{name: value for name, value in inputs.items() if name in model.argument_names})
    first, second = list(found.values())[:2]
    assert (first.kind, first.grid, dict(first.text)) == EXPECTED["flux2"][0]
    assert (first.image, first.image_keys, first.references) == (range(128, 192), range(384, 448), None)
    assert (second.grid, len(second.references)) == (None, 256)


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


def test_products_of_another_size(sd):
    """Whatever was found for the first call does not hold for a product of another size."""
    model, inputs = DiffusionModel(sd), diffusion.PIPELINES["stable_diffusion"].inputs()
    found = dataclasses.replace(model.attentions.of_kind("cross")[0], keys=76)
    with pytest.raises(InputError, match=r"2 heads, 256 queries and 77 keys, not 2 heads, 256 queries and 76 keys"):
        with model.generate(**inputs, seed=SEED) as run:
            run.unet.inputs
            follow_products(run, [found], lambda *given: None)


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
