"""The logit lens on an image: each patch, compared with the same by hand."""

import json

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from diffsight import VisionLanguageModel, collect_activations, image_token_lens, logit_lens
from diffsight.errors import InputError
from models import language, vision_language

IMAGE = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
PROMPT = "a red circle"
SHAPES = {"llava": (4, 4), "qwen2_vl": (3, 4), "idefics3": (4, 4), "paligemma": (4, 4)}


def model_of(kind):
    return VisionLanguageModel(vision_language.MODELS[kind]())


@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_every_patch_as_by_hand_in_its_place(kind):
    model = model_of(kind)
    result = image_token_lens(model, PROMPT, IMAGE, top_k=2, tokens=[7])
    with model.trace(PROMPT, images=IMAGE) as run:
        grid = run.image_grids[0][0]
        for i in range(len(model.layers)):
            said = model.project_on_vocab(run.layers_output[i][0, grid]).softmax(-1)
            assert torch.allclose(result.probabilities()[i], said.amax(-1), atol=1e-6)
            assert torch.allclose(result.probabilities(0)[i], said[..., 7], atol=1e-6)
            words = [[result.predictions.texts[int(token)] for token in row] for row in said.argmax(-1)]
            assert result.words(i) == words
    assert result.shape == SHAPES[kind]
    assert result.layers == (0, 1, 2)


@torch.no_grad()
def test_images_of_many_prompts_go_along_in_batches():
    """One image for each prompt, or a list of images; a single image belongs to all prompts."""
    model, texts = model_of("llava"), ["a red circle", "a square", "the photo of a circle"]
    images = [IMAGE, IMAGE.rotate(90), [IMAGE, IMAGE.rotate(180)]]
    several = logit_lens(model, texts, images=images, positions=-1, keep_logits=True, batch_size=2)
    states = collect_activations(model, texts, images=IMAGE, batch_size=2)
    for i, (text, image) in enumerate(zip(texts, images)):
        assert torch.allclose(several.logits[i, -1, 0], model.trace(text, images=image).logits[0, -1], atol=1e-5)
        alone = model.trace(text, images=IMAGE).layers_output[-1][0, -1]
        assert torch.allclose(states[2][i], alone, atol=1e-5)


def test_the_image_is_what_the_model_sees():
    """LLaVA's processor crops a square from the middle; Qwen2-VL's keeps the whole image."""
    assert image_token_lens(model_of("llava"), PROMPT, IMAGE).image.size == (32, 32)
    assert image_token_lens(model_of("qwen2_vl"), PROMPT, IMAGE).image.size == (96, 64)


def test_it_shows_itself(tmp_path):
    IMAGE.save(tmp_path / "image.png")
    result = image_token_lens(model_of("qwen2_vl"), PROMPT, tmp_path / "image.png", tokens=[5, 9])
    assert result.image.size == (96, 64)
    assert isinstance(result.plot(), Figure)
    assert isinstance(result.maps(layers=[0, 2]), Figure)
    assert result._repr_png_().startswith(b"\x89PNG")
    paths = result.save(tmp_path / "out")
    assert {path.name for path in paths} == {
        *("image.png", "lens.json", "lens.safetensors", "maps.png", "page.html"),
        *(f"layer_{i:02}.png" for i in range(3)),
    }
    record = json.loads((tmp_path / "out" / "lens.json").read_text())
    assert record["words"]["2"] == result.words(2)
    assert record["shape"] == [3, 4]


def test_bad_input():
    with pytest.raises(InputError, match="takes a VisionLanguageModel, not LanguageModel"):
        image_token_lens(language.model(), PROMPT, IMAGE)
    model = model_of("llava")
    with pytest.raises(InputError, match="takes one image, not a list of 2"):
        image_token_lens(model, PROMPT, [IMAGE, IMAGE])
    with pytest.raises(InputError, match="there is no layer 9"):
        image_token_lens(model, PROMPT, IMAGE, layers=9)
    with pytest.raises(InputError, match="lie on no grid"):
        image_token_lens(model_of("idefics2"), PROMPT, IMAGE)
    result = image_token_lens(model, PROMPT, IMAGE, layers=[0, 2])
    with pytest.raises(InputError, match="does not have layer 1: it has 0, 2"):
        result.words(1)
    with pytest.raises(InputError, match="no tokens were chosen"):
        result.maps()
