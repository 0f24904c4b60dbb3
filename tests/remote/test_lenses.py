"""Lenses of a model on a server run there, and their results are those of the model itself."""

import dataclasses

import pytest
import torch
from PIL import Image

from diffsight import (
    attach_sae,
    attention_maps,
    attribution_patching,
    collect_activations,
    diffusion_lens,
    encoder_patching,
    invert,
    logit_lens,
    trajectory_lens,
)
from diffsight.errors import InputError
from diffsight.lenses import SAE
from diffsight.lenses.encoders.drawing import NoImagesError
from diffsight.remote.wire_errors import described, error_of
from helpers import refusal, same, same_image

CLIP = "diffsight/shapes-clip"
IDS = [[5, 17, 42], [1, 2, 3]]


def data(result):
    """Return the tensors and images of a result, by the name of the attribute."""
    found = {}
    for one in dataclasses.fields(result):
        value = getattr(result, one.name)
        if isinstance(value, torch.Tensor):
            found[one.name] = value
        if isinstance(value, (list, tuple)) and value and hasattr(value[0], "tobytes"):
            found[one.name] = [image.tobytes() for image in value]
    return found


def test_attention_maps(pipelines, remote_pipelines):
    expected, found = (
        attention_maps(one[CLIP], "a red circle", seed=0, num_inference_steps=2)
        for one in (pipelines, remote_pipelines)
    )
    assert same_image(expected.image, found.image)
    assert data(expected).keys() == data(found).keys() and same(data(expected), data(found))
    assert found.call.models["model"].options["remote"].startswith("http://127.0.0.1")


def test_diffusion_lens(pipelines, remote_pipelines):
    def lens(model):
        return diffusion_lens(model, "a red circle", seed=0, layers=[0, 2], num_inference_steps=2)

    expected, found = lens(pipelines[CLIP]), lens(remote_pipelines[CLIP])
    assert all(map(same_image, expected.images, found.images))


def test_logit_lens(language, remote_language):
    expected, found = (logit_lens(one, IDS, top_k=3) for one in (language, remote_language))
    assert data(expected) and same(data(expected), data(found))


def test_collect_activations(language, remote_language, tmp_path):
    expected, found = (collect_activations(one, IDS) for one in (language, remote_language))
    assert torch.equal(expected.values, found.values)
    collect_activations(remote_language, IDS, folder=tmp_path / "states")  # runs here, and reads from the server
    assert any((tmp_path / "states").iterdir())


def test_lenses_on_an_image_that_was_inverted_on_either_side(pipelines, remote_pipelines):
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    here, there = (
        invert(one[CLIP], image, "a red circle", num_inference_steps=2) for one in (pipelines, remote_pipelines)
    )
    assert same(data(here), data(there))
    expected = trajectory_lens(pipelines[CLIP], inverted=here, steps=-1)
    for inverted in (here, there):
        found = trajectory_lens(remote_pipelines[CLIP], inverted=inverted, steps=-1)
        assert same_image(found.image, expected.image) and same(found.latents, expected.latents)


def test_a_server_writes_no_files(remote_language, tmp_path):
    assert "writes no files" in refusal(remote_language.server.lens, "collect_activations", IDS, folder="states")
    assert "paths mean nothing" in refusal(remote_language.server.lens, "logit_lens", tmp_path)


def test_errors_are_those_of_the_lens(language, remote_language):
    assert refusal(logit_lens, remote_language, IDS, layers=9) == refusal(logit_lens, language, IDS, layers=9)
    with pytest.raises(NoImagesError, match="returns audios"):  # the classes of errors of lenses
        raise error_of(described(NoImagesError("the pipeline returns audios")))


def test_arguments_that_cannot_be_sent(pipelines, remote_pipelines):
    """The lens runs here, and asks the server for its values."""
    given = {"words": "circle", "layers": [1], "seed": 0, "num_inference_steps": 1, "progress": False}
    expected, found = (
        encoder_patching(target, "a red circle", "a blue circle", source_model=pipelines[CLIP], **given)
        for target in (pipelines[CLIP], remote_pipelines[CLIP])
    )
    assert all(map(same_image, expected.images[0], found.images[0]))


def test_a_lens_that_needs_gradients(remote_language):
    message = refusal(attribution_patching, remote_language, "a", "b", "c")
    assert "attribution_patching computes gradients with a model in this process" in message


def test_an_sae_cannot_be_attached(remote_language):
    assert "attach_sae adds a module to a model in this process" in refusal(
        attach_sae, remote_language, SAE(16, 32), "layers[0]"
    )


def test_only_lenses_run(remote_language):
    with pytest.raises(Exception, match="does not run 'train_sae'; it runs attention_from"):
        remote_language.server.lens("train_sae", IDS)


@pytest.mark.parametrize(
    "given", [{"image": "a.png"}, {"ip_adapter_image": ["http://a"]}, {"x": {"a_url": "b"}}], ids=str
)
def test_text_that_would_be_opened_is_refused(remote_pipelines, given):
    lens, generate = remote_pipelines[CLIP].server.lens, remote_pipelines[CLIP].generate
    assert "a server opens no files or addresses" in refusal(lens, "diffusion_lens", "a red circle", **given)
    with pytest.raises(InputError, match=r"a server opens no files or addresses|has no argument"):
        generate("a red circle", **given).finish()
    assert "a server opens no files" in refusal(lens, "invert", "a.png")


@pytest.mark.parametrize("name", ["trust_remote_code", "custom_generate", "streamer"])
def test_arguments_that_run_code_are_refused(remote_language, name):
    with pytest.raises(InputError, match="a server does not accept the argument"):
        remote_language.server.lens("logit_lens", IDS, **{name: "x"})
