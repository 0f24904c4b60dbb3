"""Pipelines that have a processor of text and images instead of a tokenizer, such as FLUX.2 and Kandinsky 5."""

import diffusers
import numpy as np
import pytest
import torch
import transformers

from diffsight import DiffusionModel, encoder_patching
from diffsight.errors import InputError
from models import diffusion, text_encoders, vision_language

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.content %}{{ c.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def kandinsky5():
    pipe, tokenizer = text_encoders.kandinsky5(), text_encoders.qwen_tokenizer()
    pipe.tokenizer = vision_language.qwen2_vl_processor(tokenizer)
    return pipe


def flux2():
    """Mistral 3, which reads a chat with an instruction."""
    tokenizer = text_encoders.qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = transformers.CLIPImageProcessorPil()
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "vocab_size": len(tokenizer), "head_dim": 16}
    sizes = {"hidden_size": text_encoders.WIDTH, "intermediate_size": 32, "num_attention_heads": 2}
    vision = {"model_type": "pixtral", **sizes, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
    text = {"model_type": "mistral", **sizes, **ends, "num_hidden_layers": 4, "num_key_value_heads": 1}
    config = transformers.Mistral3Config(vision_config=vision, text_config=text)
    torch.manual_seed(0)
    small, encoder = text_encoders.flux2(), transformers.Mistral3ForConditionalGeneration(config).eval()
    transformer = diffusers.Flux2Transformer2DModel.from_config(small.transformer.config, guidance_embeds=True).eval()
    return diffusion.quiet_pipeline(
        diffusers.Flux2Pipeline,
        text_encoder=encoder,
        tokenizer=transformers.LlavaProcessor(images, tokenizer, patch_size=16, chat_template=CHAT),
        vae=small.vae,
        transformer=transformer,
        scheduler=diffusion.flow_scheduler(),
    )


CASES = {
    "kandinsky5": (kandinsky5, {}, "text_encoder.model.language_model"),
    "flux2": (flux2, {"max_sequence_length": 384}, "text_encoder.model.language_model"),
}


@pytest.fixture(params=CASES)
def tested(request):
    build, more, path = CASES[request.param]
    return build(), {**text_encoders.TEXT_PIPELINES[request.param].inputs(), **more}, path


def test_runs_are_those_of_the_bare_pipeline(tested):
    pipe, inputs, path = tested
    seen = []
    layer = pipe.text_encoder.model.language_model.layers[0]
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = pipe(**inputs, output_type="np", generator=torch.Generator().manual_seed(0))[0]
    handle.remove()
    with DiffusionModel(pipe).generate(**inputs, output_type="np", seed=0) as run:
        found = run[path].layers[0].output
    assert torch.equal(found, seen[0])
    assert np.array_equal(run.result[0], expected)


def test_a_long_prompt_is_refused_with_what_the_text_tokenizer_would_drop(tested):
    pipe, inputs, _ = tested
    pipe.tokenizer.tokenizer.model_max_length = 40
    with pytest.raises(InputError, match=r"the prompt is too long: only \d+ tokens are read.* blue"):
        DiffusionModel(pipe).generate(**{**inputs, "prompt": "red " * 100 + "blue"})


def test_lenses_find_words(tested):
    pipe, inputs, _ = tested
    inputs |= {"prompt": "a red circle", "num_inference_steps": 1}
    model, others = DiffusionModel(pipe), {name: value for name, value in inputs.items() if name != "prompt"}
    words = {"words": "red", "into": "blue", "align": "last", "layers": [0], "progress": False}
    patched = encoder_patching(model, "a red circle", "a blue circle", **words, **others)
    with model.generate(**inputs) as run:
        ids = run.text_encoder.inputs[1]["input_ids"][0]
        run.stop()
    assert pipe.tokenizer.tokenizer.decode(ids[list(patched.source_tokens[0])]).strip() == "red"
