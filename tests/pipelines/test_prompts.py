"""Invalid prompts, seeds and arguments raise an error before anything runs."""

import warnings

import pytest
import torch
from torch import nn

from diffsight import DiffusionModel
from diffsight.errors import InputError
from diffsight.pipelines.diffusion.prompts import PromptWarning
from helpers import refusal
from models import diffusion

CLIP = "diffsight/shapes-clip"


def watched(pipe):
    """Return a model and the list of the components that have run."""
    ran = []
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            part.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    for owner, name in [
        (pipe, "encode_prompt"),
        (getattr(pipe, "vae", None), "encode"),
        (pipe.scheduler, "set_timesteps"),
    ]:
        if owner is not None:
            owner.__dict__[name] = lambda *_, name=name, **__: ran.append(name)
    return DiffusionModel(pipe), ran


def refusal_before_running(pipe, *args, **kwargs):
    """Return the message of the error that a call raises, and check that no component has run."""
    model, ran = watched(pipe)
    message = refusal(model.generate, *args, **kwargs)
    assert ran == []
    return message


# Empty prompts


@pytest.mark.parametrize("name", ["stable_diffusion", "flux", "pixart_sigma", "sana", "wan"])
def test_an_empty_list_of_prompts(name):
    assert "there is no prompt, because the list is empty" in refusal_before_running(
        diffusion.PIPELINES[name].build(), [], seed=0
    )


@pytest.mark.parametrize("prompt", ["", "  \n", [""], ["a red circle", ""]], ids=repr)
def test_an_empty_prompt_is_drawn_as_the_pipeline_does(sd, prompt):
    call = {"num_inference_steps": 1, "output_type": "pt"}
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(prompt) if isinstance(prompt, list) else 1)]
    want = sd(prompt, generator=seeds, **call).images
    assert torch.equal(DiffusionModel(sd).generate(prompt, seed=0, **call).images, want)


@pytest.mark.parametrize("prompt", [3, ["a red circle", None], b"a red circle"], ids=repr)
def test_a_prompt_that_is_not_text(sd, prompt):
    assert "a prompt is a string, not" in refusal_before_running(sd, prompt, seed=0)


def test_an_empty_negative_prompt_is_accepted(sd):
    call = {"num_inference_steps": 1, "output_type": "pt"}
    images = DiffusionModel(sd).generate("a red circle", negative_prompt="", seed=0, **call).images
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(images, sd("a red circle", negative_prompt="", generator=generator, **call).images)


def test_no_prompt_at_all_is_left_to_the_pipeline(sd):
    with pytest.raises(ValueError, match="prompt_embeds"):
        _ = DiffusionModel(sd).generate(seed=0).images


# Prompts that are too long


def words(count):
    """Return a number of words, each of which is one token in every tokenizer of these pipelines."""
    return " ".join(["red"] * count)


def test_words_that_the_tokenizer_drops_are_named(sd):
    message = refusal_before_running(
        sd, words(75) + " blue circle above", seed=0
    )  # 77 tokens, two of them start and end
    assert "77" in message
    assert "'blue circle above'" in message
    assert "red" not in message


def test_the_longest_prompt_that_fits(sd):
    DiffusionModel(sd).generate(words(75), seed=0)
    assert "'red'" in refusal_before_running(sd, words(76), seed=0)


def test_one_of_several_prompts_is_too_long(sd):
    assert "'blue circle'" in refusal_before_running(sd, ["a red circle", words(75) + " blue circle"], seed=0)


def test_an_encoder_without_a_start_token():
    pipe = diffusion.PIPELINES["pixart_sigma"].build()
    message = refusal_before_running(
        pipe, words(15) + " blue circle", seed=0, max_sequence_length=16
    )  # the 16th is the end
    assert "16" in message
    assert "'blue circle'" in message
    DiffusionModel(pipe).generate(words(15), seed=0, max_sequence_length=16)


def test_the_default_length_of_the_pipeline_counts():
    pipe = diffusion.PIPELINES["cogvideox"].build()
    pipe.tokenizer.model_max_length = 512
    assert "226" in refusal_before_running(pipe, words(225) + " blue circle", seed=0)  # CogVideoX reads 226 tokens
    DiffusionModel(pipe).generate(words(225), seed=0)


def test_one_tokenizer_that_fits_the_prompt_is_enough():
    pipe = diffusion.PIPELINES["stable_diffusion_3"].build()
    assert "77" in refusal_before_running(pipe, words(100), seed=0)
    pipe.tokenizer_3.model_max_length = 512  # T5's real length
    DiffusionModel(pipe).generate(words(100), seed=0, max_sequence_length=256)


def test_a_prompt_that_is_encoded_already_is_not_checked(sd):
    encoded, negative = sd.encode_prompt("a red circle", "cpu", 1, True)
    run = DiffusionModel(sd).generate(prompt_embeds=encoded, negative_prompt_embeds=negative, num_inference_steps=1)
    assert len(run.images) == 1


# Words that the model does not know


def test_unknown_words_give_a_warning_at_the_users_line():
    model = DiffusionModel(CLIP)
    with pytest.warns(PromptWarning) as seen:
        model.generate("a pink circle above a dragon", seed=0)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    message = str(seen[0].message)
    unknown, known = message.split("It knows: ")
    assert "'pink'" in unknown
    assert "'dragon'" in unknown
    assert "'circle'" not in unknown
    assert {"red", "circle", "above", "left", "background", "gray"} <= set(known.split(", "))
    assert not {"<pad>", "<unknown>", "<start>"} & set(known.split(", "))


def test_unknown_characters_of_another_tokenizer():
    pipe = diffusion.PIPELINES["pixart_sigma"].build()
    with pytest.warns(PromptWarning, match="does not know '北京'. It knows: .*▁red"):
        DiffusionModel(pipe).generate("a red 北京", seed=0)


@pytest.mark.parametrize("name", ["stable_diffusion", "flux", "pixart_sigma", "sana"])
def test_known_words_give_no_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptWarning)
        DiffusionModel(diffusion.PIPELINES[name].build()).generate("a red circle above a blue square", seed=0)


def test_the_words_of_the_scenes_are_known():
    model = DiffusionModel(CLIP)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptWarning)
        model.generate("a red circle below a blue square on a gray background", seed=0)
        model.generate("A Red Circle left of a white ring", seed=0)


# Seeds


@pytest.mark.parametrize("seed", [-1, [-1], True, 1.5, "3", [0.5], [None]], ids=repr)
def test_a_seed_of_the_wrong_type(sd, seed):
    bad = seed[0] if isinstance(seed, list) else seed
    message = refusal_before_running(sd, "a red circle", seed=seed)
    assert "a seed is an integer from 0 to" in message
    assert repr(bad) in message


def test_a_seed_that_is_too_large(sd):
    assert str(2**64) in refusal_before_running(sd, "a red circle", seed=2**64)


@pytest.mark.parametrize(
    "call, images",
    [
        ({"prompt": "a red circle"}, 1),
        ({"prompt": ["a red circle"] * 2}, 2),
        ({"prompt": ["a red circle"] * 2, "num_images_per_prompt": 2}, 4),
        ({"prompt": "a red circle", "num_images_per_prompt": 5}, 5),
    ],
)
@pytest.mark.parametrize("seeds", [[], [0, 1, 2]], ids=repr)
def test_a_list_of_seeds_of_the_wrong_length(sd, call, images, seeds):
    message = refusal_before_running(sd, **call, seed=seeds)
    assert f"{len(seeds)} seeds for {images} image" in message


def test_a_list_of_seeds_of_the_wrong_length_for_unconditional_images():
    assert "3 seeds for 2 images" in refusal_before_running(diffusion.ddpm(), batch_size=2, seed=[1, 2, 3])


def test_seed_and_generator_exclude_each_other(sd):
    message = refusal_before_running(sd, "a red circle", seed=0, generator=torch.Generator())
    assert "seed" in message
    assert "generator" in message


# Arguments


def test_an_argument_that_the_pipeline_does_not_have():
    message = refusal_before_running(diffusion.PIPELINES["flux"].build(), "a red circle", num_inference_step=3)
    assert "FluxPipeline" in message
    assert "did you mean 'num_inference_steps'" in message


def test_an_argument_that_is_given_twice(sd):
    assert "prompt" in refusal_before_running(sd, "a red circle", prompt="a red circle")


def test_a_prompt_for_a_pipeline_that_takes_none():
    assert "prompt" in refusal_before_running(diffusion.ddpm(), prompt="a red circle", seed=0)
    assert "DDPMPipeline" in refusal_before_running(diffusion.ddpm(), "a red circle", seed=0)


@pytest.mark.parametrize("name", ["stable_diffusion", "flux"])
def test_a_mistyped_argument_is_refused_even_where_the_pipeline_would_ignore_it(name):
    model = DiffusionModel(diffusion.PIPELINES[name].build())
    with pytest.raises(InputError, match=r"'num_inference_step'.*did you mean 'num_inference_steps'"):
        model.generate("a red circle", num_inference_step=3)
