"""Prompt-to-Prompt, against the same edit by a hand-written attention processor."""

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diffsight import DiffusionModel
from diffsight.errors import InputError
from diffsight.lenses import prompt_to_prompt
from diffsight.lenses.attention import map_memory
from diffsight.lenses.attention.prompt_alignment import map_tokens
from helpers import close_image, same_image
from models import diffusion

SOURCE, TARGET = "a red circle above a blue square", "a red circle above a green square"
CALL = {"num_inference_steps": 4, "guidance_scale": 5.0}


@pytest.fixture
def sd(sd):
    """Return the small pipeline with an attention that makes a difference to the image."""
    for name, module in sd.unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            module.weight.data *= 5
    return sd


class Controlling(AttnProcessor):
    """Lets the last row of the batch attend as the row before it does, in the calls that `is_on` says."""

    def __init__(self, is_on, change):
        self.is_on, self.change, self.calls = is_on, change, 0

    def __call__(self, attn, *args, **kwargs):
        def changed(*given):
            probs = type(attn).get_attention_scores(attn, *given).unflatten(0, (-1, attn.heads)).clone()
            probs[-1] = self.change(probs[-2], probs[-1], self.is_on(self.calls))
            return probs.flatten(0, 1)

        attn.get_attention_scores = changed
        try:
            return super().__call__(attn, *args, **kwargs)
        finally:
            del attn.get_attention_scores
            self.calls += 1


def controlled(pipe, cross, itself, change=lambda before, own, is_on: before if is_on else own):
    """Return the images of the bare pipeline with controlling processors."""
    for name, module in pipe.unet.named_modules():
        if name.endswith(("attn1", "attn2")):
            steps = itself if name.endswith("attn1") else cross
            own = change if name.endswith("attn2") else lambda before, own, is_on: before if is_on else own
            module.set_processor(Controlling(lambda call, steps=steps: call < steps, own))
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    return pipe([SOURCE, TARGET], generator=generators, **CALL).images


@pytest.mark.parametrize("cross, itself", [(0, 0), (0.5, 0.25), (1, 1)])
def test_a_word_that_is_replaced(sd, cross, itself):
    """Both prompts have the same tokens but one, so that the maps are those of the source."""
    result = prompt_to_prompt(DiffusionModel(sd), SOURCE, TARGET, cross_steps=cross, self_steps=itself, seed=3, **CALL)
    expected = controlled(sd, 4 * cross, 4 * itself)
    assert close_image(result.source_image, expected[0])
    assert close_image(result.target_image, expected[1])
    if cross == 0:
        assert close_image(
            result.target_image, sd(TARGET, generator=torch.Generator().manual_seed(3), **CALL).images[0]
        )


def test_a_word_that_is_reweighted(sd):
    def change(before, own, is_on):
        own = own.clone()
        own[..., 6] *= 20  # "green"
        return own

    given = {"cross_steps": 0, "self_steps": 0, "reweight": {"green": 20}}
    model = DiffusionModel(sd)
    result = prompt_to_prompt(model, SOURCE, TARGET, seed=3, **given, **CALL)
    plain = prompt_to_prompt(model, SOURCE, TARGET, seed=3, cross_steps=0, self_steps=0, **CALL)
    assert close_image(result.target_image, controlled(sd, 0, 0, change)[1])
    assert not close_image(result.target_image, plain.target_image)


def test_a_word_that_is_added(sd):
    """Its own attention stays, and the tokens after it have that of the same tokens of the source."""
    source, target = "a red circle", "a red green circle"
    result = prompt_to_prompt(DiffusionModel(sd), source, target, cross_steps=1, self_steps=0, seed=3, **CALL)

    def change(before, own, is_on):
        new = own.clone()
        new[..., :3] = before[..., :3]
        new[..., 4:] = before[..., 3:-1]
        return new

    for name, module in sd.unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(Controlling(lambda call: True, change))
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    expected = sd([source, target], generator=generators, **CALL).images
    assert close_image(result.target_image, expected[1])


def test_the_image_changes_only_where_a_word_is_attended_to(sd):
    given = {"cross_steps": 0, "self_steps": 0, "seed": 3, **CALL}
    model = DiffusionModel(sd)
    plain = prompt_to_prompt(model, SOURCE, TARGET, **given)
    local = prompt_to_prompt(model, SOURCE, TARGET, local="square", **given)
    source, changed, less = (np.asarray(i, float) for i in (plain.source_image, plain.target_image, local.target_image))
    assert close_image(plain.source_image, local.source_image)
    assert 0 < np.abs(less - source).mean() < np.abs(changed - source).mean()


class AttendingAlike(TorchFunctionMode):
    """Lets the image of the second row attend as that of the first does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and "query" in kwargs and kwargs["query"].shape[-2] == 80:
            q, k, v = (kwargs[name] for name in ("query", "key", "value"))
            probs = torch.softmax(q[0] @ k[0].transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
            output[1, :, 16:] = (probs @ v[1])[:, 16:]
        return output


def test_joint_attention():
    pipe = diffusion.flux()
    for name, module in pipe.transformer.named_modules():
        if name.endswith(("to_v", "to_out.0", "proj_out")):
            module.weight.data *= 5
    model = DiffusionModel(pipe)
    inputs = {"height": 32, "width": 32, "max_sequence_length": 16, "num_inference_steps": 3}
    all_of_it = prompt_to_prompt(model, SOURCE, TARGET, cross_steps=1, self_steps=1, seed=3, **inputs)
    none_of_it = prompt_to_prompt(model, SOURCE, TARGET, cross_steps=0, self_steps=0, seed=3, **inputs)
    for result in (all_of_it, none_of_it):
        assert close_image(result.source_image, model.generate(SOURCE, seed=3, **inputs).images[0])
    assert close_image(none_of_it.target_image, model.generate(TARGET, seed=3, **inputs).images[0])
    with AttendingAlike():
        expected = pipe([SOURCE, TARGET], generator=[torch.Generator().manual_seed(3) for _ in range(2)], **inputs)
    assert close_image(all_of_it.target_image, expected.images[1])
    assert not same_image(all_of_it.target_image, none_of_it.target_image)


@pytest.mark.parametrize(
    "source, target, matrix",
    [
        ([1, 5, 2], [1, 6, 2], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        ([1, 2], [1, 7, 2], [[1, 0, 0], [0, 0, 1]]),
        ([1, 7, 2], [1, 2], [[1, 0], [0, 0], [0, 1]]),
        ([1, 7, 2], [1, 8, 9, 2], [[1, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1]]),
    ],
)
def test_tokens_are_mapped(source, target, matrix):
    found = map_tokens(source, target)
    assert found.matrix.tolist() == matrix
    assert found.is_mapped.tolist() == [any(row[token] for row in matrix) for token in range(len(target))]


@pytest.mark.parametrize(
    "given, words",
    [
        ({"cross_steps": 1.5}, "cross_steps is a share of the steps, from 0 to 1, not 1.5"),
        ({"self_steps": True}, "self_steps is a share"),
        ({"reweight": {"blue": 2}}, "'blue' does not occur in the prompt"),
        ({"local": "triangle"}, "neither prompt contains any of the words in local: 'triangle'"),
        ({"stepz": 1}, "stepz"),
    ],
)
def test_bad_input(sd, given, words):
    with pytest.raises(InputError, match=words):
        prompt_to_prompt(DiffusionModel(sd), SOURCE, TARGET, **{**CALL, **given})
    with pytest.raises(InputError, match="the prompt is empty"):
        prompt_to_prompt(DiffusionModel(sd), SOURCE, " ", **CALL)


def test_probabilities_larger_than_memory(sd, monkeypatch):
    """Self-attention of 16 x 16 positions is the largest, if it is changed: two heads, two prompts, three times."""
    size, model = 3 * 4 * 2 * 2 * 256 * 256, DiffusionModel(sd)
    monkeypatch.setattr(map_memory, "memory_of", lambda device: size - 1)
    with pytest.raises(InputError, match=r"attn1 \(256 x 256\) would take 3.0 MB, but cpu has 3.0 MB of memory"):
        prompt_to_prompt(model, SOURCE, TARGET, **CALL)
    prompt_to_prompt(model, SOURCE, TARGET, self_steps=0, num_inference_steps=1)


def test_what_is_saved(sd, tmp_path):
    result = prompt_to_prompt(DiffusionModel(sd), SOURCE, TARGET, seed=3, **CALL)
    paths = result.save(tmp_path / "edit")
    assert {path.name for path in paths} == {
        "lens.json",
        "page.html",
        "thumbnail.jpg",
        "source.png",
        "target.png",
        "grid.png",
    }
