"""The script that trains the packaged pipelines, a few steps of it."""

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from diffsight.pipelines.packaged import FOLDERS
from diffsight.pipelines.shapes.flux_defaults import CALL
from diffsight.pipelines.shapes.flux_training import make_flux_pipeline
from diffsight.pipelines.shapes.reader import read_scene
from diffsight.pipelines.shapes.scenes import COLORS, SHAPES
from diffsight.pipelines.shapes.train import PlaceReader, make_data, make_text_encoder, make_tokenizer, train


@pytest.fixture(autouse=True)
def precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_the_things_in_each_place_are_those_of_the_image():
    images, captions, things = make_data(40, seed=0)
    assert len(captions) == 2 * len(images)
    nothing = (len(COLORS), len(SHAPES))
    for image, told in zip(images, things.tolist(), strict=True):
        seen = read_scene(Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))).things
        found = [(list(COLORS).index(thing.color), SHAPES.index(thing.shape)) for thing in seen]
        assert list(map(tuple, told)) == [*found, nothing][:2]
    assert things[:, 1, 0].eq(nothing[0]).any()  # scenes of one thing are among them


def test_two_places_are_read_from_the_output_of_a_text_encoder():
    tokenizer = make_tokenizer("t5")
    ids = tokenizer(["a red circle", "a ring"], padding="max_length", return_tensors="pt").input_ids
    colors, shapes = PlaceReader(64)(make_text_encoder("t5", tokenizer)(ids)[0])
    assert colors.shape == (2, 2, len(COLORS) + 1) and shapes.shape == (2, 2, len(SHAPES) + 1)


def test_training_goes_on_with_another_encoder(tmp_path):
    out, known = tmp_path / "t5", FOLDERS["diffsight/shapes-clip"]
    train("t5", out, known, seed=0, scenes=4, vae_steps=0, text_steps=1, steps=2)
    before = diffusers.StableDiffusionPipeline.from_pretrained(known)
    after = diffusers.StableDiffusionPipeline.from_pretrained(out)
    assert type(after.text_encoder) is transformers.T5EncoderModel
    alike = [
        all(torch.equal(a, b) for a, b in zip(getattr(before, part).parameters(), getattr(after, part).parameters()))
        for part in ("vae", "unet")
    ]
    assert alike == [True, False]
    assert not any("_name_or_path" in file.read_text() for file in out.rglob("*.json"))
    assert np.asarray(after("a red circle", num_inference_steps=1).images[0]).shape == (64, 64, 3)


def test_training_goes_on_with_shapes_flux(tmp_path):
    out, known = tmp_path / "flux", FOLDERS["diffsight/shapes-flux"]
    train("flux", out, known, seed=0, scenes=4, vae_steps=4, text_steps=0, steps=2)
    before = diffusers.FluxPipeline.from_pretrained(known)
    after = diffusers.FluxPipeline.from_pretrained(out)
    alike = [
        all(torch.equal(a, b) for a, b in zip(getattr(before, part).parameters(), getattr(after, part).parameters()))
        for part in ("text_encoder", "text_encoder_2", "vae", "transformer")
    ]
    assert alike == [True, True, False, False]
    assert not any("_name_or_path" in file.read_text() for file in out.rglob("*.json"))
    assert after("a red circle", num_inference_steps=1, **CALL).images[0].size == (64, 64)


def test_a_new_shapes_flux_begins_with_the_text_encoders_of_the_others():
    pipe, clip = (
        make_flux_pipeline(),
        diffusers.StableDiffusionPipeline.from_pretrained(FOLDERS["diffsight/shapes-clip"]),
    )
    ids = [p.tokenizer("a red circle", padding="max_length", return_tensors="pt").input_ids for p in (pipe, clip)]
    assert ids[0][0, 4] == len(pipe.tokenizer) - 1 != ids[1][0, 4]
    with torch.no_grad():
        assert torch.equal(pipe.text_encoder(ids[0])[0], clip.text_encoder(ids[1])[0])
