"""Metrics: numbers against plain PyTorch, and against the shapes' known truth."""

import random

import numpy as np
import pytest
import torch

from diffsight import DiffusionModel
from diffsight.errors import InputError
from diffsight.lenses import (
    clip_score,
    kl_divergence,
    latent_distance,
    logit_difference,
    pixel_distance,
    shapes_verdict,
    token_probability,
)
from diffsight.lenses.metrics.metric import Outcome, as_metric
from diffsight.lenses.patching.shared_prefix import agree
from diffsight.pipelines.shapes.scenes import Scene, Thing, render
from helpers import refusal
from models import language

SCENE = Scene((Thing("red", "circle"), Thing("blue", "square")), "above", "gray")


@pytest.fixture
def logits():
    return torch.randn(3, 5, len(language.TOKENIZER))


def one(text):
    (token,) = language.TOKENIZER(text)["input_ids"]
    return token


def measured(metric, model, outcome, pair=0, pairs=1):
    return as_metric(metric).bound(model, pairs).values(outcome, outcome.row(0), pair)


def test_token_metrics(model, logits):
    outcome, paris, rome = Outcome(logits), one(" Paris"), one(" London")
    expected = logits[:, -1, paris] - logits[:, -1, rome]
    assert torch.equal(measured(logit_difference(" Paris", " London"), model, outcome), expected)
    assert torch.equal(measured(logit_difference(paris, rome), model, outcome), expected)
    share = logits[:, 2].softmax(-1)[:, paris]
    assert torch.equal(measured(token_probability(" Paris", position=2), model, outcome), share)
    plain = torch.nn.functional.kl_div(
        logits[:, -1].log_softmax(-1), logits[:1, -1].log_softmax(-1).expand(3, -1), log_target=True, reduction="none"
    )
    found = measured(kl_divergence(), model, outcome)
    assert torch.allclose(found, plain.sum(-1), atol=1e-5)
    assert abs(found[0]) < 1e-6
    logits[:, -1, paris] = -torch.inf  # a token that no row can choose adds nothing
    others = torch.arange(len(language.TOKENIZER)) != paris
    assert torch.allclose(
        measured(kl_divergence(), model, outcome), measured(kl_divergence(), model, Outcome(logits[..., others]))
    )


def test_a_model_whose_logits_are_not_numbers(model, logits):
    metric, broken = as_metric(kl_divergence()).bound(model, 1), Outcome(torch.full_like(logits[:1], torch.nan))
    with pytest.raises(InputError, match="the metric KL divergence is nan for the run: a metric must be a finite"):
        metric.measure(broken, broken, 0, ["the run"])
    assert not agree(broken.logits, broken.logits)


def test_tokens_of_several_pairs(model, logits):
    metric = token_probability([" Paris", " London"])
    found = measured(metric, model, Outcome(logits), pair=1, pairs=2)
    assert torch.equal(found, measured(token_probability(" London"), model, Outcome(logits)))
    assert "2 tokens for 3 prompt pairs" in refusal(metric.bound, model, 3)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (token_probability("Paris and London"), "is not one token"),
        (token_probability(10**6), "there is no token"),
        (logit_difference(" Paris", 1.5), "not 1.5"),
    ],
)
def test_refused_tokens(model, metric, said):
    assert said in refusal(metric.bound, model, 1)


def test_functions(model, logits):
    outcome = Outcome(logits)
    assert measured(lambda result: result.logits[0, -1, 3], model, outcome).tolist() == logits[:, -1, 3].tolist()
    assert measured(lambda result: 2, model, outcome).tolist() == [2, 2, 2]
    assert "returned Tensor of shape (5," in refusal(measured, lambda result: result.logits[0], model, outcome)
    assert "returned str" in refusal(measured, lambda result: "good", model, outcome)
    assert "not 'brightness'" in refusal(as_metric, "brightness")
    assert "a metric is" in refusal(as_metric, Outcome)
    assert "returned ndarray" in refusal(measured, lambda result: np.zeros(2), model, outcome)


def test_distances(sd):
    model, latents = DiffusionModel(sd), torch.randn(2, 4, 8, 8)
    images = [render(SCENE, random.Random(seed)) for seed in (0, 1)]
    outcome = Outcome(images=images, latents=latents)
    expected = (latents[1] - latents[0]).pow(2).mean().sqrt()
    assert torch.allclose(measured(latent_distance(), model, outcome), torch.tensor([0.0, expected]))
    a, b = (np.asarray(image, dtype=float) / 255 for image in images)
    expected = np.sqrt(((a - b) ** 2).mean())
    assert torch.allclose(measured(pixel_distance(), model, outcome), torch.tensor([0.0, expected]).float())


def test_image_metrics_need_a_pipeline(model):
    for metric in (latent_distance(), pixel_distance(), shapes_verdict("red")):
        assert "does not draw images" in refusal(metric.bound, model, 1)


@pytest.mark.parametrize(
    ("text", "is_seen"),
    [
        ("red", True),
        ("a red circle", True),
        ("blue circle", False),
        ("square", True),
        ("ring", False),
        ("circle above square", True),
        ("square below circle", True),
        ("square above circle", False),
        ("red above blue square", True),
        ("circle left of square", False),
        ("gray background", True),
        ("red circle on a gray background", True),
        ("black background", False),
    ],
)
def test_what_the_reader_sees(sd, text, is_seen):
    outcome = Outcome(images=[render(SCENE, random.Random(3))])
    assert measured(shapes_verdict(text), DiffusionModel(sd), outcome).tolist() == [is_seen]


@pytest.mark.parametrize(
    ("text", "said"),
    [("rad circle", "did you mean 'red'"), ("above square", "on one side"), ("", "names no colour"), (3, "not 3")],
)
def test_refused_verdicts(text, said):
    assert said in refusal(shapes_verdict, text)


def test_clip_score(sd):
    class Clip(torch.nn.Module):
        device = torch.device("cpu")

        def get_image_features(self):
            raise NotImplementedError

        def forward(self, pixels, words):
            return type("Scored", (), {"image_embeds": pixels, "text_embeds": words})

    class Batch(dict):
        def to(self, device):
            return self

    def processor(text, images, **options):
        return Batch(pixels=torch.eye(2)[: len(images)], words=torch.tensor([[1.0, 1.0]]))

    images = [render(SCENE, random.Random(seed)) for seed in (0, 1)]
    found = measured(clip_score(Clip(), processor, "red"), DiffusionModel(sd), Outcome(images=images))
    assert torch.allclose(found, torch.full((2,), 0.5**0.5))
    assert "takes a CLIPModel" in refusal(clip_score, "clip", None, "red")
