"""Textual inversion: a word of the prompt stands for several vectors, which the pipeline reads as tokens."""

import pytest
import torch

from diffsight import DiffusionModel, encoder_patching
from models import diffusion

PROMPT, CALL = "a red <cat>", {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt"}


@pytest.fixture
def pipe():
    pipe = diffusion.stable_diffusion()
    vectors = torch.randn(3, pipe.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion({"<cat>": vectors}, token="<cat>")
    return pipe


def test_a_word_is_found_at_all_of_its_vectors(pipe):
    read = pipe.tokenizer(pipe.maybe_convert_prompt(PROMPT, pipe.tokenizer)).input_ids
    tokens = pipe.tokenizer.convert_ids_to_tokens(read)
    places = [place for place, token in enumerate(tokens) if token.startswith("<cat>")]
    patched = encoder_patching(
        DiffusionModel(pipe), PROMPT, "a red circle", words="<cat>", into="circle", align="last", layers=[1],
        num_inference_steps=1, progress=False,
    )  # fmt: skip
    assert len(places) == 3
    assert [*patched.source_tokens[0]] == places


@pytest.mark.parametrize("prompts", [(PROMPT, None), (PROMPT, "blue"), ("blue", PROMPT), (PROMPT, "<cat>")])
def test_branches_are_told_apart(pipe, prompts):
    """Stable Diffusion puts the unconditional half first."""
    call = {**CALL, "prompt": prompts[0], "negative_prompt": prompts[1]}

    def doubled(module, args, output):
        return torch.cat([output[:1], 2 * output[1:]])

    handle = pipe.unet.mid_block.register_forward_hook(doubled)
    expected = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    handle.remove()
    with DiffusionModel(pipe).generate(**call, seed=0) as run:
        for _ in run.steps:
            run.cond.unet.mid_block.output = 2 * run.cond.unet.mid_block.output
    assert torch.equal(run.images, expected)


def test_branches_of_the_text_encoder_are_told_apart(pipe):
    """It is called for the prompt first, and then for the negative prompt."""
    seen = []
    handle = pipe.text_encoder.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    pipe(prompt=PROMPT, negative_prompt="blue", **CALL)
    handle.remove()
    with DiffusionModel(pipe).generate(prompt=PROMPT, negative_prompt="blue", **CALL) as run:
        for branch, expected in zip((run.cond, run.uncond), seen):
            assert torch.equal(branch.text_encoder.output[0], expected)
