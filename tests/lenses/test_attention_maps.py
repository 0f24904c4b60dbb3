"""Attention maps, against sums of probabilities that a hand-written processor or a plain function mode keeps."""

import json
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diffsight import DiffusionModel, LanguageModel, VisionLanguageModel
from diffsight.errors import InputError
from diffsight.lenses import attention_from, attention_maps
from diffsight.lenses.attention import map_memory
from diffsight.lenses.attention.concepts import Concepts
from diffsight.pipelines.diffusion.attention import find_attentions
from helpers import same_image
from models import diffusion, text_encoders, vision_language
from models.denoisers import DENOISERS

PROMPT = "a red circle above a blue square"  # one token each, after the token that begins the prompt
SHORT = {"num_inference_steps": 2}


class Keeping(AttnProcessor):
    """Keeps the probabilities of the conditional half, (heads, queries, keys)."""

    def __init__(self, kept):
        self.kept = kept

    def __call__(self, attn, *args, **kwargs):
        def keep(*given):
            probs = type(attn).get_attention_scores(attn, *given)
            self.kept.append(probs.unflatten(0, (-1, attn.heads))[-1].detach())
            return probs

        attn.get_attention_scores = keep
        try:
            return super().__call__(attn, *args, **kwargs)
        finally:
            del attn.get_attention_scores


@pytest.fixture(scope="module")
def model():
    """A pipeline that no test changes, so that its attentions are looked for once. `sd` has the same weights."""
    return DiffusionModel(text_encoders.built("stable_diffusion"))


@pytest.fixture(scope="module")
def flux():
    return DiffusionModel(text_encoders.built("flux"))


def kept_by_processors(pipe, of, **given):
    """Return the probabilities of every module whose name ends with `of`, in the order of the calls."""
    kept = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith(of):
            module.set_processor(Keeping(kept.setdefault(name, [])))
    pipe(PROMPT, generator=torch.Generator().manual_seed(3), **SHORT, **given)
    return kept


def enlarged(maps):
    """Return maps (words, positions) as squares of 16 rows."""
    side = int(maps.shape[-1] ** 0.5)
    squares = maps.unflatten(-1, (side, side))[None]
    return squares[0] if side == 16 else F.interpolate(squares, size=(16, 16), mode="bicubic")[0]


def test_maps_of_words(model, sd):
    result = attention_maps(model, PROMPT, ["circle", "blue square"], seed=3, **SHORT)
    kept = kept_by_processors(sd, "attn2")
    tokens = [[3], [6, 7]]
    every = [probs for of in kept.values() for probs in of]
    maps = [enlarged(torch.stack([probs[..., word].mean((0, -1)) for word in tokens])) for probs in every]
    assert len(maps) == 8
    assert result.maps.shape == (2, 16, 16)
    assert torch.allclose(result.maps, torch.stack(maps).mean(0), atol=1e-5)
    assert result.words == ("circle", "blue square")
    assert same_image(result.image, sd(PROMPT, generator=torch.Generator().manual_seed(3), **SHORT).images[0])


def test_the_prompt_is_encoded_once(model):
    attention_maps(model, PROMPT, **SHORT)  # the attentions are known from here on
    calls = []
    hook = model.pipeline.text_encoder.register_forward_hook(lambda *given: calls.append(0))
    model.pipeline(PROMPT, **SHORT)
    plain = len(calls)
    attention_maps(model, PROMPT, **SHORT)
    hook.remove()
    assert len(calls) == 2 * plain


def test_some_layers_heads_and_steps(model, sd):
    result = attention_maps(model, PROMPT, "circle", seed=3, layers=[1, -1], heads=[1], steps=iter([1]), **SHORT)
    kept = kept_by_processors(sd, "attn2")
    names = ["mid_block.attentions.0.transformer_blocks.0.attn2", "up_blocks.1.attentions.1.transformer_blocks.0.attn2"]
    maps = [enlarged(kept[name][1][1, :, 3][None]) for name in names]
    assert torch.allclose(result.maps, torch.stack(maps).mean(0), atol=1e-5)
    assert result.layers == (
        "unet.mid_block.attentions[0].transformer_blocks[0].attn2",
        "unet.up_blocks[1].attentions[1].transformer_blocks[0].attn2",
    )


@pytest.mark.parametrize("keep, count", [("steps", 2), ("layers", 4), ("heads", 2)])
def test_what_is_kept_apart(model, keep, count):
    result = attention_maps(model, PROMPT, ["circle", "square"], seed=3, keep=keep, **SHORT)
    plain = attention_maps(model, PROMPT, ["circle", "square"], seed=3, **SHORT)
    assert len(result.parts) == count
    assert torch.allclose(torch.stack(list(result.parts.values())).mean(0), plain.maps, atol=1e-6)
    assert len(result.plot("circle").axes) >= count
    assert len(plain.plot("circle").axes) == 1


def test_heads_are_named_by_their_numbers(model):
    given = {"words": np.array(["circle"]), "seed": 3, **SHORT}
    kept = attention_maps(model, PROMPT, keep="heads", heads=np.array([1, 1]), **given)
    assert list(kept.parts) == ["head 1"]
    assert torch.allclose(kept.maps, attention_maps(model, PROMPT, heads=[1], **given).maps, atol=1e-6)


class Joint(TorchFunctionMode):
    """Keeps the mean over heads of the probabilities of every attention over so many tokens."""

    def __init__(self, tokens=80):
        super().__init__()
        self.kept, self._tokens = [], tokens

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        q, k = (*args[:2], *(kwargs or {}).values())[:2] if func is F.scaled_dot_product_attention else (None, None)
        if q is not None and q.shape[-2] == self._tokens:
            self.kept.append(torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)[0].mean(0))
        return output


def test_maps_in_joint_attention(flux):
    pipe = flux.pipeline
    inputs = {"height": 32, "width": 32, "max_sequence_length": 16, **SHORT}
    result = attention_maps(flux, PROMPT, ["circle", "square"], seed=3, **inputs)
    with Joint() as joint:
        pipe(PROMPT, generator=torch.Generator().manual_seed(3), **inputs)
    probs = torch.stack(joint.kept).mean(0)
    assert len(joint.kept) == 8
    expected = probs[16:, [2, 6]].T.unflatten(-1, (8, 8))  # text first; T5 has no token that begins a prompt
    assert torch.allclose(result.maps, expected, atol=1e-5)


@pytest.fixture(scope="module")
def kontext():
    pipe = diffusers.FluxKontextPipeline(**text_encoders.built("flux").components)
    pipe.set_progress_bar_config(disable=True)
    inputs = {"image": diffusion.IMAGE, "max_area": 32 * 32, "_auto_resize": False}
    return DiffusionModel(pipe), {"height": 32, "width": 32, "max_sequence_length": 16, **inputs, **SHORT}


def test_maps_beside_a_reference_image(kontext):
    """The maps are those of the image that is drawn, whose 64 positions stand between the text and the reference."""
    model, inputs = kontext
    result = attention_maps(model, PROMPT, ["circle", "square"], seed=3, **inputs)
    with Joint(16 + 64 + 64) as joint:
        drawn = model.pipeline(prompt=PROMPT, generator=torch.Generator().manual_seed(3), **inputs).images[0]
    assert len(joint.kept) == 8
    expected = torch.stack(joint.kept).mean(0)[16:80, [2, 6]].T.unflatten(-1, (8, 8))
    assert torch.allclose(result.maps, expected, atol=1e-5)
    assert same_image(result.image, drawn)


def test_concepts_do_not_affect_a_reference_image(kontext):
    """After the last block, the image and the reference are the same in both rows."""
    model, inputs = kontext
    rows = []
    block = model.pipeline.transformer.single_transformer_blocks[-1]
    attention_maps(model, PROMPT, "circle", seed=3, **inputs)  # from here on the attentions are known
    hook = block.register_forward_hook(lambda module, args, output: rows.append(output[1]))  # without the text
    attention_maps(model, PROMPT, ["photo", "green"], method="concept", seed=3, **inputs)
    hook.remove()
    assert [row.shape[:2] for row in rows] == 2 * [(2, 128)]
    for first, second in rows:
        assert torch.allclose(first, second, atol=1e-4)


def test_where_a_place_looks(model, sd):
    result = attention_from(model, PROMPT, (0.2, 0.7), seed=3, **SHORT)
    kept = kept_by_processors(sd, "attn1")
    maps = []
    for probs in (probs for of in kept.values() for probs in of):
        side = int(probs.shape[-1] ** 0.5)
        maps.append(enlarged(probs[:, int(0.7 * side) * side + int(0.2 * side)].mean(0)[None]))
    assert torch.allclose(result.maps, torch.stack(maps).mean(0).clamp_min(0), atol=1e-5)


def test_concepts(flux):
    """The image is that of the prompt, whatever the words; and the words see the image."""
    inputs = {"height": 32, "width": 32, "max_sequence_length": 16, **SHORT}
    given = {"method": "concept", "seed": 3, **inputs}
    result = attention_maps(flux, PROMPT, ["photo", "green"], **given)
    plain = flux.generate(PROMPT, seed=3, **inputs).images[0]
    assert np.abs(np.asarray(plain, float) - np.asarray(result.image, float)).max() <= 2
    assert result.maps.shape == (2, 8, 8)
    assert torch.allclose(result.maps.sum(0), torch.ones(8, 8), atol=1e-5)
    other = attention_maps(flux, PROMPT, ["photo", "circle"], **given)
    assert same_image(result.image, other.image)
    assert not torch.allclose(result.maps[0], other.maps[0], atol=1e-3)


def test_a_concept_within_another(flux):
    """ "circle" is the third token of "red circle circle" alone."""
    inputs = {"height": 32, "width": 32, "max_sequence_length": 16, **SHORT}
    joint = find_attentions(flux, PROMPT, **inputs).of_kind("joint")
    found = Concepts(flux, PROMPT, ["red circle", "circle", "circle"], None, joint, inputs)
    assert found.names == ("red circle", "circle")
    assert found.tokens(joint[0]) == [[0, 1], [2]]


def test_concepts_need_joint_attention(model):
    with pytest.raises(InputError, match=r'needs joint attention.*StableDiffusionPipeline.*method="cross"'):
        attention_maps(model, PROMPT, ["cat"], method="concept", **SHORT)


class Cross(TorchFunctionMode):
    """Keeps the probabilities of the last row of every attention from the image to the text, (heads, queries, 77)."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            q, k = args[:2] if args else (kwargs["query"], kwargs["key"])
            if k.shape[-2] == 77 != q.shape[-2]:
                scores = q[-1].float() @ k[-1].float().transpose(-1, -2)
                self.kept.append(torch.softmax(scores / q.shape[-1] ** 0.5, -1))
        return func(*args, **(kwargs or {}))


def lora(pipe):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))


SETTINGS = {
    "LoRA": lora,
    "IP-Adapter": diffusion.add_image_prompt,
    "VAE slicing": lambda pipe: pipe.vae.enable_slicing(),
    "VAE tiling": lambda pipe: pipe.vae.enable_tiling(),
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential offload": lambda pipe: cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=True),
    "bfloat16": lambda pipe: pipe.to(torch.bfloat16),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_pipelines(setting, sd):
    prepare, bare = SETTINGS[setting], diffusion.stable_diffusion()
    given, same = prepare(sd), prepare(bare)
    given, same = (one if isinstance(one, dict) else {} for one in (given, same))
    result = attention_maps(DiffusionModel(sd), PROMPT, ["circle", "square"], seed=3, **given, **SHORT)
    with Cross() as cross:
        image = bare(PROMPT, generator=torch.Generator().manual_seed(3), **same, **SHORT).images[0]
    maps = [enlarged(probs[..., [3, 7]].mean(0).T) for probs in cross.kept]
    assert len(maps) == 8
    assert torch.allclose(result.maps, torch.stack(maps).mean(0).clamp_min(0), atol=1e-3 if "16" in setting else 1e-5)
    assert same_image(result.image, image)


def latents_of(pipe):
    """Return the latents of the image by hand, and noise."""
    pixels = torch.from_numpy(np.array(diffusion.IMAGE)).permute(2, 0, 1)[None] / 127.5 - 1
    latents = pipe.vae.encode(pixels).latent_dist.mode() - (pipe.vae.config.shift_factor or 0)
    return latents * pipe.vae.config.scaling_factor


def noise_for(latents):
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@torch.no_grad()
def test_a_given_image(sd, scheduler):
    sd.scheduler = scheduler.from_config(sd.scheduler.config)
    call = {"num_inference_steps": 4, "guidance_scale": 5.0}
    result = attention_maps(DiffusionModel(sd), PROMPT, "circle", image=diffusion.IMAGE, steps=[0, 2], seed=3, **call)
    kept, latents = [], latents_of(sd)
    for name, module in sd.unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(Keeping(kept))
    sd.scheduler.set_timesteps(4)
    text = sd.encode_prompt(PROMPT, "cpu", 1, False)[0]
    for time in sd.scheduler.timesteps[[0, 2]]:
        noised = sd.scheduler.add_noise(latents, noise_for(latents), time[None])
        sd.unet(sd.scheduler.scale_model_input(noised, time), time, text)
        sd.scheduler._step_index = None  # the scheduler counts the calls
    maps = [enlarged(probs[..., 3].mean(0)[None]) for probs in kept]
    assert len(maps) == 8
    assert torch.allclose(result.maps, torch.stack(maps).mean(0).clamp_min(0), atol=1e-5)
    assert result.image is diffusion.IMAGE


@pytest.mark.parametrize("method", ["cross", "concept"])
@torch.no_grad()
def test_a_given_image_in_joint_attention(flux, method):
    """The oracle replaces what goes into the transformer in a plain call of the pipeline."""
    pipe = flux.pipeline
    inputs = {"height": 32, "width": 32, "max_sequence_length": 16, "num_inference_steps": 4}
    given = {"method": method, "seed": 3, **inputs}
    result = attention_maps(flux, PROMPT, ["circle", "red"], image=diffusion.IMAGE, steps=2, **given)
    latents = latents_of(pipe)
    packed = pipe._pack_latents(latents, *latents.shape)
    noise = noise_for(packed)

    def show(module, args, kwargs):
        sigma = kwargs["timestep"][0]
        kwargs["hidden_states"] = ((1 - sigma) * packed + sigma * noise).expand_as(kwargs["hidden_states"])
        return args, kwargs

    hook = pipe.transformer.register_forward_pre_hook(show, with_kwargs=True)
    if method == "concept":  # the same lens, on a pipeline in which a hook shows the image
        expected = attention_maps(flux, PROMPT, ["circle", "red"], steps=2, **given).maps
    else:
        with Joint() as joint:
            pipe(PROMPT, generator=torch.Generator().manual_seed(3), **inputs)
        probs = torch.stack(joint.kept[8:12]).mean(0)
        expected = probs[16:, [2, 1]].T.unflatten(-1, (8, 8))
    hook.remove()
    assert torch.allclose(result.maps, expected, atol=1e-5)


def test_a_pipeline_that_takes_an_image_gets_it():
    small = diffusion.PIPELINES["img2img"]
    inputs = {name: value for name, value in small.inputs().items() if name != "output_type"}
    result = attention_maps(DiffusionModel(small.build()), words="circle", seed=3, **inputs)
    drawn = small.build()(**inputs, generator=torch.Generator().manual_seed(3)).images[0]
    assert same_image(result.image, drawn)


NO_IMAGES = [
    ({"image": "scene.png"}, "the image must be a PIL image or a tensor, not str"),
    ({"image": diffusion.IMAGE.convert("L")}, "has the mode L"),
    ({"image": diffusion.IMAGE.resize((33, 32))}, "has 33 x 32 pixels"),
    ({"image": diffusion.IMAGE, "height": 64}, "height=64 does not match the image, whose height is 32"),
]


@pytest.mark.parametrize("given, words", NO_IMAGES)
def test_images_that_cannot_be_shown(model, given, words):
    with pytest.raises(InputError, match=words):
        attention_maps(model, PROMPT, **SHORT, **given)


def test_a_pipeline_without_an_autoencoder_cannot_be_shown_an_image():
    inputs = diffusion.PIPELINES["deepfloyd_if"].inputs() | {"output_type": "pil"}
    with pytest.raises(InputError, match="IFPipeline has no autoencoder for images"):
        attention_maps(DiffusionModel(diffusion.deepfloyd_if()), image=diffusion.IMAGE, **inputs)


def test_a_pipeline_with_latents_of_its_own_layout_cannot_be_shown_an_image():
    model = DiffusionModel(text_encoders.built("kandinsky5"))
    with pytest.raises(InputError, match="Kandinsky5T2IPipeline cannot be given the latents of an image"):
        attention_maps(model, PROMPT, image=diffusion.IMAGE, **SHORT)


def test_guidance_in_two_calls_of_different_lengths():
    """The unconditional text has fewer tokens, so its call makes products of another size."""
    pipe, inputs = DENOISERS["lumina2"].build(), {**DENOISERS["lumina2"].inputs(), **SHORT, "output_type": "pil"}
    model, prompt = DiffusionModel(pipe), inputs.pop("prompt")
    with Joint(26 + 4) as joint:
        pipe(prompt, generator=torch.Generator().manual_seed(3), **inputs)
    attention = find_attentions(model, prompt, **inputs).of_kind("joint")[0]
    word = [key for key in attention.text["text_encoder"] if key is not None][-1]
    result = attention_maps(model, prompt, "square", seed=3, **inputs)
    expected = torch.stack([probs[-4:, word] for probs in joint.kept]).mean(0).reshape(2, 2)
    assert len(joint.kept) == 2 and torch.allclose(result.maps[0], expected, atol=1e-5)


def test_videos():
    pipe, inputs = diffusion.ltx(), dict(diffusion.PIPELINES["ltx"].inputs())
    prompt = inputs.pop("prompt")
    inputs |= {"num_inference_steps": 2, "output_type": "pil"}
    result = attention_maps(DiffusionModel(pipe), prompt, ["circle"], seed=3, **inputs)
    assert result.maps.shape == (1, 2, 4, 4)
    heats = [result.mask("circle", 0.5, frame=frame) for frame in range(9)]  # the first frame is encoded alone
    assert not np.array_equal(heats[0], heats[1]) and all(np.array_equal(heats[1], heat) for heat in heats[2:])
    assert result.overlay("circle", frame=0).size == result.image.size
    with pytest.raises(InputError, match="there is no frame 9: the video has 9 frames, 0 to 8"):
        result.overlay("circle", frame=9)
    assert result.mask("circle", 0.5, frame=-1).shape == result.image.size[::-1]
    single = replace(result, frames=result.frames[:1])
    assert np.array_equal(single.mask("circle", 0.5), heats[0])


def test_masks_and_overlays(model):
    result = attention_maps(model, PROMPT, ["circle"], seed=3, **SHORT)
    mask = result.mask("circle", 0.5)
    assert mask.shape == result.image.size[::-1] and mask.dtype == bool
    heat = F.interpolate(result.maps[None], size=mask.shape, mode="bicubic")[0, 0]
    heat = (heat - heat.min()) / (heat.max() - heat.min())
    assert np.array_equal(mask, (heat >= 0.5).numpy())
    assert result.mask("circle", 0).all() and result.mask("circle", 1).sum() == 1
    assert result.overlay("circle").size == result.image.size
    assert np.array_equal(result.mask("circle", np.float32(0.5)), mask)
    with pytest.raises(InputError, match="there is no frame 0: this is one image"):
        result.mask("circle", frame=0)
    for threshold in (-0.1, 1.1, float("nan"), True, "half"):
        with pytest.raises(InputError, match="a threshold is a number between 0 and 1"):
            result.mask("circle", threshold)
    with pytest.raises(InputError, match=r"no map of 'circl' \(did you mean 'circle'\?\)"):
        result.overlay("circl")


def test_what_is_saved(model, tmp_path):
    result = attention_maps(model, PROMPT, ["circle", "square"], seed=3, keep="steps", **SHORT)
    paths = result.save(tmp_path / "maps")
    assert {path.name for path in paths} == {
        *(
            "lens.json",
            "image.png",
            "grid.png",
            "thumbnail.jpg",
            "word_00.png",
            "word_01.png",
            "maps.png",
            "page.html",
            "maps.safetensors",
        ),
    }
    tensors = load_file(tmp_path / "maps" / "maps.safetensors")
    assert torch.equal(tensors["maps"], result.maps) and torch.equal(tensors["steps.step 1"], result.parts["step 1"])
    record = json.loads((tmp_path / "maps" / "lens.json").read_text())
    assert (record["words"], record["seed"], record["arguments"]) == (["circle", "square"], 3, SHORT)
    assert same_image(Image.open(tmp_path / "maps" / "image.png"), result.image)


WRONG = [
    ({"words": ["circl"]}, r"'circl' does not occur in the prompt .*did you mean 'circle'"),
    ({"method": "daam"}, "there is no method 'daam'"),
    ({"keep": "words"}, "keep: there is no 'words'"),
    ({"layers": 4}, "there is no layer 4: choose from 0 to 3"),
    ({"layers": "embedding"}, "there is no layer 'embedding': choose from 0 to 3"),
    ({"heads": [2]}, r"there is no head 2. The modules have 2"),
    ({"heads": []}, "heads: the selection is empty"),
    ({"steps": [99]}, "there is no step 99: the run has"),
    ({"encoder": "text_encoder_2"}, "no text encoder 'text_encoder_2'"),
    ({"num_images_per_prompt": 2}, "draws one image in each row"),
    ({"stepz": 2}, "stepz"),
    ({"words": np.array([""])}, "'' does not occur in the prompt"),
    ({"prompt": "?!"}, r"the prompt '\?!' has no words"),
]


@pytest.mark.parametrize("given, words", WRONG)
def test_bad_input(model, given, words):
    with pytest.raises(InputError, match=words):
        attention_maps(model, **{"prompt": PROMPT, **SHORT, **given})


IMAGE = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
GRIDS = {"llava": (4, 4), "qwen2_vl": (3, 4), "idefics3": (4, 4)}


@pytest.mark.parametrize("kind", GRIDS)
@torch.no_grad()
def test_where_generated_tokens_look(kind):
    """Eager attention returns the probabilities that the bare model has, a tuple of layers for each token."""
    net, processor = vision_language.MODELS[kind]()
    model, (rows, columns) = VisionLanguageModel((net, processor)), GRIDS[kind]
    given = {"image": IMAGE, "max_new_tokens": 3, "do_sample": False}
    result = attention_maps(model, PROMPT, layers=[0, -1], keep="layers", **given)
    by_head = attention_maps(model, PROMPT, layers=[0, 2], heads=[1, 3], keep="heads", **given)
    with model.trace(PROMPT, images=IMAGE) as run:
        inputs, grid = run.inputs[1], run.image_grids[0][0]
        run.stop()
    net.set_attn_implementation("eager")
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")
    named = {name: inputs[name] for name in names if name in inputs}
    bare = net.generate(
        **named, max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    looks = torch.stack([torch.stack([probs[0, :, -1, grid] for probs in step]) for step in bare.attentions])
    assert looks.shape[2:] == (4, rows, columns)
    assert torch.allclose(result.maps, looks[:, [0, 2]].mean((1, 2)), atol=1e-5)
    assert torch.allclose(result.parts["layers[2]"], looks[:, 2].mean(1), atol=1e-5)
    assert torch.allclose(by_head.parts["head 3"], looks[:, [0, 2], 3].mean(1), atol=1e-5)
    assert len(result.words) == len(bare.attentions) and result.overlay(result.words[0]).size == result.image.size


def test_where_tokens_of_a_text_encoder_look():
    """The text encoder of an editing pipeline is a vision-language model, which can be opened by itself."""
    net, processor = vision_language.MODELS["qwen2_vl"]()
    parts = {**text_encoders.built("qwen_image").components, "tokenizer": processor.tokenizer}
    pipe = diffusers.QwenImageEditPipeline(**parts | {"text_encoder": net, "processor": processor})
    given = {"image": IMAGE, "max_new_tokens": 2, "do_sample": False}
    result = attention_maps(VisionLanguageModel((pipe.text_encoder, pipe.processor)), PROMPT, **given)
    assert torch.equal(result.maps, attention_maps(VisionLanguageModel((net, processor)), PROMPT, **given).maps)


BAD_GENERATION = [
    ({"words": "circle"}, "omit words for a VisionLanguageModel"),
    ({"method": "concept"}, "omit method for a VisionLanguageModel"),
    ({"keep": "steps"}, "keep must be 'layers', 'heads' or None"),
    ({"image": None}, "needs one image"),
    ({"layers": 3}, "there is no layer 3"),
    ({"heads": [4]}, "there is no head 4"),
    ({"num_beams": 2}, "omit num_beams"),
    ({"max_new_token": 2}, "did you mean 'max_new_tokens'"),
]


@pytest.fixture(scope="module")
def llava():
    return VisionLanguageModel(vision_language.MODELS["llava"]())


@pytest.mark.parametrize("given, words", BAD_GENERATION)
def test_bad_generation(llava, given, words):
    with pytest.raises(InputError, match=words):
        attention_maps(llava, PROMPT, **{"image": IMAGE, "max_new_tokens": 2, **given})


def test_maps_larger_than_memory(model, monkeypatch):
    """Three maps of 16 x 16 and one of 8 x 8, and four of 16 x 16 in the result, of two words in float32."""
    size, keep = 4 * 2 * (3 * 16 * 16 + 8 * 8 + 4 * 16 * 16), {"keep": "layers", "seed": 3}
    monkeypatch.setattr(map_memory, "memory_of", lambda device: size - 1)
    with pytest.raises(InputError, match=r"maps of 2 words, 4 layers apart, would take 0.0 MB, but cpu has 0.0 MB"):
        attention_maps(model, PROMPT, ["circle", "square"], **keep, **SHORT)
    monkeypatch.setattr(map_memory, "memory_of", lambda device: size)
    assert attention_maps(model, PROMPT, ["circle", "square"], **keep, **SHORT).maps.shape == (2, 16, 16)


def test_a_kernel_that_shows_nothing():
    pipe = diffusion.flux()
    for module in pipe.transformer.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = "flex"
    with pytest.raises(InputError, match=r"computes its attention with 'flex'.*set_attention_backend\(\"native\"\)"):
        attention_maps(DiffusionModel(pipe), PROMPT, height=32, width=32, max_sequence_length=16, **SHORT)


def test_models_without_such_an_attention(model):
    with pytest.raises(InputError, match="takes a DiffusionModel"):
        attention_maps(LanguageModel(text_encoders.built("flux2").text_encoder), PROMPT)
    with pytest.raises(InputError, match="needs a text encoder"):
        attention_maps(DiffusionModel(diffusion.ddpm()), PROMPT)
    with pytest.raises(InputError, match="no attention from the image to itself"):
        attention_from(DiffusionModel(diffusion.sana()), PROMPT, (0.5, 0.5), height=32, width=32, **SHORT)
    for position in ((1.5, 0), (0.5,), ("a", "b")):
        with pytest.raises(InputError, match="position"):
            attention_from(model, PROMPT, position, **SHORT)
