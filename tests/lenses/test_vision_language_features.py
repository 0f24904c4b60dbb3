"""Activations, SAEs and the logit lens on vision-language models, compared with hooks on one prompt at a time."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffsight import (
    VisionLanguageModel,
    attach_sae,
    collect_activations,
    concept_features,
    evaluate_sae,
    image_token_lens,
    logit_lens,
    top_examples,
    train_sae,
)
from diffsight.lenses import SAE, SAESettings
from diffsight.lenses.features.activation_stream import PointReader
from helpers import first, outputs, refusal
from models import language, vision_language

IMAGE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
TEXTS = ["a red circle", "a square", "the photo of a circle"]
IMAGES = [IMAGE, IMAGE.rotate(90), IMAGE.rotate(180)]
FEATURES, K = 64, 4
KINDS = ("llava", "qwen2_vl")


@pytest.fixture(scope="module")
def models():
    return {kind: VisionLanguageModel(vision_language.MODELS[kind]()) for kind in KINDS}


@pytest.fixture(scope="module")
def sae():
    torch.manual_seed(1)
    sae = SAE(32, FEATURES, k=K, point="layers[1]").eval().requires_grad_(False)
    sae.encoder_bias.normal_(std=0.1)
    return sae


def module_of(model, point):
    net = model.module.model
    if not point.startswith("vision"):
        return net.language_model.layers[1]
    return net.visual.blocks[1] if hasattr(net, "visual") else net.vision_tower.encoder.layers[1]


def alone(model, point, number):
    """Return what a module returns for one prompt with its image, (vectors, width), and which are image tokens."""
    inputs = model.trace(TEXTS[number], images=IMAGES[number]).model_inputs.values
    given = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        (value,) = outputs(module_of(model, point), model.module, **given)
    image = given["input_ids"][0] == model.module.config.image_token_id
    return first(value).flatten(0, -2), image


def varied(model, sae, point):
    """Return the feature that differs most between the vectors of the three prompts."""
    return torch.cat([sae.encode(alone(model, point, i)[0]) for i in range(3)]).var(0).argmax().item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_images_are_collected(models, kind):
    """Prompts of different lengths, padded in a batch."""
    model = models[kind]
    found = collect_activations(model, TEXTS, layers=1, positions="image", images=IMAGES, batch_size=3, progress=False)
    expected = [value[image] for value, image in (alone(model, "layers[1]", i) for i in range(3))]
    torch.testing.assert_close(found[1], torch.cat(expected), rtol=1e-4, atol=1e-5)
    read = logit_lens(model, TEXTS, layers=[1], positions="image", images=IMAGES, progress=False)
    single = image_token_lens(model, TEXTS[1], IMAGES[1], layers=[1]).predictions
    torch.testing.assert_close(read.probabilities[1], single.probabilities[0], rtol=1e-4, atol=1e-6)
    assert "prompt 0 has no image" in refusal(collect_activations, model, TEXTS, positions="image")
    assert "prompt 0 has no image" in refusal(logit_lens, language.model(), "a cat", positions="image")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("point", ["layers[1]", "vision.layers[1]"])
def test_training_reads_each_prompt_with_its_image(models, kind, point):
    """What goes through the buffer is what hooks see on one prompt at a time."""
    refill = PointReader(models[kind], point, arguments={"images": IMAGES}).stream(TEXTS, 2)
    (early, position), (late, end) = refill(0), refill(2)
    assert (position, end) == (2, 3)
    expected = torch.cat([alone(models[kind], point, i)[0] for i in range(3)])
    torch.testing.assert_close(torch.cat([early, late]), expected, rtol=1e-4, atol=1e-5)


def test_a_trained_sae_is_attached_and_changes_what_the_model_says(models):
    model = models["llava"]
    settings = SAESettings(updates=3, batch_size=32)
    sae = train_sae(
        model, "vision.layers[0]", TEXTS, features=FEATURES, k=K, images=IMAGES, settings=settings, buffer=64,
        progress=False,
    )  # fmt: skip
    inputs = dict(model.trace(TEXTS[0], images=IMAGES[0]).model_inputs.values)
    plain, opened = model.trace(TEXTS[0], images=IMAGES[0]).result.logits, attach_sae(model, sae)
    with opened.trace(TEXTS[0], images=IMAGES[0]) as run:
        assert run.vision.layers[0].sae.features.output.shape == (1, 17, FEATURES)
    assert torch.equal(run.result.logits, plain)
    with opened.trace(TEXTS[0], images=IMAGES[0]) as run:
        run.vision.layers[0].sae.features.output[..., 7] += 3
    layer = model.module.model.vision_tower.encoder.layers[0]
    hook = layer.register_forward_hook(lambda m, args, out: first(out) + 3 * sae.decoder[7])
    with torch.no_grad():
        expected = model.module(**inputs).logits
    hook.remove()
    torch.testing.assert_close(run.result.logits, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_features_of_image_tokens(models, sae):
    model = models["llava"]
    with attach_sae(model, sae).trace(TEXTS[0], images=IMAGES[0]) as run:
        maps = run.layers[1].sae.features.output[0, run.image_grids[0][0]]
    value, image = alone(model, "layers[1]", 0)
    torch.testing.assert_close(maps, sae.encode(value[image]).reshape(4, 4, FEATURES), rtol=1e-3, atol=1e-4)
    chosen = varied(model, sae, "layers[1]")
    found = top_examples(model, sae, TEXTS, chosen, images=IMAGES, batch_size=2, progress=False)
    for one in found.examples[chosen]:
        value, image = alone(model, "layers[1]", TEXTS.index(one.prompt))
        torch.testing.assert_close(one.activations, sae.encode(value)[:, chosen], rtol=1e-3, atol=1e-4)
        assert one.tokens.count("<image>") == 16 and one.activations.count_nonzero() > 1
        assert torch.equal(one.heat, one.activations[image].reshape(4, 4))
    chosen = varied(model, sae, "vision.layers[1]")
    tower = top_examples(model, sae, TEXTS, chosen, point="vision.layers[1]", images=IMAGES, progress=False)
    for one in tower.examples[chosen]:
        value, _ = alone(model, "vision.layers[1]", TEXTS.index(one.prompt))
        torch.testing.assert_close(one.activations, sae.encode(value)[:, chosen], rtol=1e-3, atol=1e-4)
        assert torch.equal(one.heat, one.activations[1:].reshape(4, 4))  # the class token comes first


@pytest.mark.parametrize("kind", KINDS)
def test_heat_maps_lie_on_the_images_of_the_prompts(models, sae, kind, tmp_path):
    chosen = varied(models[kind], sae, "layers[1]")
    found = top_examples(models[kind], sae, TEXTS, chosen, count=3, images=IMAGES, progress=False)
    for one in found.examples[chosen]:
        given = IMAGES[TEXTS.index(one.prompt)]
        assert np.abs(np.asarray(one.image, dtype=float) - np.asarray(given)).max() < 25  # colours are stretched
        assert one.shown().size == given.size
    names = {path.name for path in found.save(tmp_path)}
    assert {"examples.txt", "grid.png"} <= names and "steps.png" not in names


def test_there_are_no_heat_maps_without_images(models, sae):
    found = top_examples(models["llava"], sae, TEXTS, 7, progress=False)
    assert found.examples[7][0].heat is None and found.preview() is None
    assert "this example has no heat map" in refusal(found.examples[7][0].shown)


def test_features_of_a_concept_are_read_with_the_images_of_both_lists(models, sae):
    found = concept_features(models["llava"], sae, TEXTS[:1], TEXTS[1:], images=IMAGES, batch_size=1)
    sums = [sae.encode(alone(models["llava"], "layers[1]", i)[0]).double().sum(0) for i in range(3)]
    others = sums[1] + sums[2]
    torch.testing.assert_close(found, (sums[0] / sums[0].sum() - others / others.sum()).float(), rtol=1e-3, atol=1e-5)


def test_the_loss_is_that_of_text(models, sae):
    model = models["llava"]
    losses = [[], []]
    for i in range(3):
        inputs = dict(model.trace(TEXTS[i], images=IMAGES[i]).model_inputs.values)
        ids = inputs["input_ids"][0]
        text = ids[1:] != model.module.config.image_token_id
        for some, put in zip(losses, (None, lambda module, args, output: sae(first(output)))):
            hook = module_of(model, "layers[1]").register_forward_hook(put) if put else None
            with torch.no_grad():
                logits = model.module(**inputs).logits[0, :-1]
            some.append(torch.nn.functional.cross_entropy(logits[text], ids[1:][text], reduction="none"))
            if hook:
                hook.remove()
    result = evaluate_sae(model, sae, TEXTS, images=IMAGES, batch_size=2)
    expected = [torch.cat(some).mean().item() for some in losses]
    assert list(result.effect.values()) == pytest.approx(expected, abs=1e-3)


def test_points_without_tokens(models, sae):
    message = refusal(top_examples, models["llava"], sae, TEXTS, 7, point="model.multi_modal_projector", images=IMAGES)
    assert "model.multi_modal_projector has no vector for each token: its shape is (3, 16, 32)" in message
    message = refusal(top_examples, models["qwen2_vl"], sae, TEXTS, 7, point="vision.layers[1]", images=IMAGES)
    assert "one image for each prompt" in message
