"""Models that generate by calling the `generate` of a model inside them, compared with hooks in plain PyTorch."""

import pytest
import torch
import transformers

from diffsight import LanguageModel, steer
from diffsight.errors import InputError
from models.building import build
from models.language_kinds import SIZES, TOKENIZER, llama

PART = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = PART | {"image_size": 32, "patch_size": 16}
LENGTH = {"max_new_tokens": 4, "min_new_tokens": 4}
VECTOR = 5 * torch.randn(32, generator=torch.Generator().manual_seed(0))

pytestmark = [pytest.mark.usefixtures("no_gradients"), pytest.mark.filterwarnings("ignore:the names found")]


def blip():
    text = PART | SIZES | {"encoder_hidden_size": 32, "projection_dim": 32, "sep_token_id": 1}
    config = transformers.BlipConfig(vision_config=VISION, text_config=text, projection_dim=32)
    return build(transformers.BlipForConditionalGeneration, config), [2, 4, 6, 7, 1]


def blip_2():
    text = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=PART | {"vocab_size": 64, "encoder_hidden_size": 32},
        text_config=SIZES | text | {"model_type": "opt", "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        num_query_tokens=3,
        image_token_index=60,
    )
    return build(transformers.Blip2ForConditionalGeneration, config), [60, 60, 60, 3, 4]


@pytest.fixture(params=[blip, blip_2])
def case(request):
    net, tokens = request.param()
    given = {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens)).long()}
    return net, given | {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)}


def test_a_step_is_a_token_and_can_be_steered(case):
    net, given = case
    model = LanguageModel((net, TOKENIZER))
    layer = net.get_submodule(model._tree.names_of(net)["layers"])[0]

    def add(module, args, output):
        return (output[0] + VECTOR, *output[1:]) if isinstance(output, tuple) else output + VECTOR

    bare = net.generate(**given, **LENGTH)
    hook = layer.register_forward_hook(add)
    want = net.generate(**given, **LENGTH)
    hook.remove()
    assert not torch.equal(want, bare)
    with model.generate(given, **LENGTH) as run:
        tokens = []
        for step in run.steps:
            run.layers_output[0][:] += VECTOR
            tokens.append(step.tokens.item())
    assert torch.equal(run.result, want) and tokens == want[0, -4:].tolist()
    assert torch.equal(steer(model, 0, VECTOR).generate(given, **LENGTH).result, want)


def test_the_text_begins_where_the_prompt_that_the_model_keeps_ends(case):
    net, given = case
    model = LanguageModel((net, TOKENIZER))
    run = model.generate(given, **LENGTH)
    assert run.text == TOKENIZER.decode(net.generate(**given, **LENGTH)[0, -4:], skip_special_tokens=True)
    assert "".join(model.generate(given, **LENGTH).stream()) == run.text


def around(model, input_ids, logits_processor, stopping_criteria, generation_config, **more):
    """Generate without a forward pass of the model itself, only of the parts in it."""
    for _ in range(3):
        logits = model.lm_head(model.model(input_ids)[0])
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], -1)
        stopping_criteria(input_ids, None)
    return input_ids


def test_tokens_chosen_without_a_forward_pass_have_no_steps():
    model = LanguageModel((llama(), TOKENIZER))
    given = {"inputs": "a red circle", "custom_generate": around, "max_new_tokens": 3}
    told = "cannot be counted, because LlamaForCausalLM chose tokens without a forward pass of its own"
    with pytest.raises(InputError, match=told):
        with model.generate(**given) as run:
            for _ in run.steps:
                pass
    with pytest.raises(InputError, match=told):
        steer(model, 0, VECTOR).generate(**given).finish()
