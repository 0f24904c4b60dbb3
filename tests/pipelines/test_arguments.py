"""An argument that a call does not name is an error with near names, also where `**kwargs` would swallow it."""

from functools import partial

import peft
import pytest
import torch

from diffsight import (
    DiffusionModel,
    LanguageModel,
    collect_activations,
    diffusion_lens,
    layer_fidelity,
    logit_lens,
    trajectory_lens,
)
from diffsight.errors import InputError
from diffsight.lenses import patchscope_generate
from diffsight.pipelines.arguments import named_arguments
from models import diffusion
from models.llama import llama

CLIP = "diffsight/shapes-clip"
IDS = torch.arange(2, 12)[None]


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"sed": 0}, r"'sed' \(did you mean 'seed'"),
        ({"num_images": 4}, r"'num_images' \(did you mean 'num_images_per_prompt'"),
        ({"banana": 3}, "'banana'"),
        ({"remote": True}, "'remote'"),
    ],
)
@pytest.mark.parametrize("call", ["generate", "trace", "check"])
def test_a_pipeline_that_takes_any_keyword(call, given, hint):
    with pytest.raises(InputError, match=f"StableDiffusionPipeline has no argument {hint}"):
        getattr(DiffusionModel(CLIP), call)("a red circle", **given)


def test_words_of_a_name_and_arguments_of_another_call():
    with pytest.raises(InputError, match=r"'steps' \(did you mean .*'num_inference_steps'"):
        DiffusionModel(CLIP).generate("a red circle", steps=3)
    with pytest.raises(InputError, match=r"not take 'max_new_tokens': use model.generate\(..., max_new_tokens=...\)"):
        LanguageModel(llama(num_hidden_layers=2)).trace(IDS, max_new_tokens=3)
    with pytest.raises(InputError, match=r"model.trace\(text\)"):
        LanguageModel(llama(num_hidden_layers=2))("The Eiffel Tower")


@pytest.mark.parametrize("steps", [0, -1])
def test_a_number_of_steps_that_draws_nothing(steps):
    with pytest.raises(InputError, match=f"num_inference_steps must be 1 or more, not {steps}"):
        DiffusionModel(CLIP).check("a red circle", num_inference_steps=steps)


def test_a_run_without_a_prompt():
    with pytest.raises(InputError, match="opened without a prompt"):
        DiffusionModel(CLIP).generate(seed=0).images


def test_a_component_that_is_none():
    model = DiffusionModel(CLIP)
    with pytest.raises(InputError, match="scheduler is a component of the pipeline"):
        model.scheduler = 3


def test_old_keywords_that_a_pipeline_reads_from_its_kwargs_are_known():
    pipe = diffusion.stable_diffusion()
    assert {"prompt", "callback", "callback_steps"} <= named_arguments(pipe.__call__)
    steps = []
    call = diffusion.PIPELINES["stable_diffusion"].inputs()
    DiffusionModel(pipe).generate(
        **call, seed=0, callback=lambda i, t, latents: steps.append(i), callback_steps=1
    ).images
    assert steps


@pytest.mark.parametrize("given", [{"remote": True}, {"topk": 3}, {"images": None}])
def test_a_forward_pass_that_takes_any_keyword(given):
    with pytest.raises(InputError, match=f"LlamaForCausalLM has no argument '{next(iter(given))}'"):
        LanguageModel(llama(num_hidden_layers=2)).trace(IDS, **given)


def test_what_the_loss_takes():
    net = llama(num_hidden_layers=2)
    for given in ({"shift_labels": IDS.roll(-3, 1)}, {"ignore_index": int(IDS[0, 1])}):
        expected = net(IDS, labels=IDS, **given).loss
        assert expected != net(IDS, labels=IDS).loss
        assert torch.equal(LanguageModel(net).trace(IDS, labels=IDS, **given).result.loss, expected)


def test_all_that_a_tokenizer_returns():
    net, given = llama(num_hidden_layers=2), {"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS)}
    assert torch.equal(LanguageModel(net).trace(**given).result.logits, net(**given).logits)


def test_adapters_of_peft_by_row():
    lora = partial(peft.LoraConfig, r=2, target_modules=["q_proj"], init_lora_weights=False)
    net, ids = peft.get_peft_model(llama(num_hidden_layers=2), lora()), IDS[:1].expand(2, -1)
    net.add_adapter("other", lora())
    given = {"adapter_names": ["default", "other"]}
    with torch.no_grad():
        logits = LanguageModel(net.eval()).trace(ids, **given).result.logits
        assert torch.equal(logits, net(ids, **given).logits) and not torch.equal(logits[0], logits[1])
        given |= {"max_new_tokens": 2, "do_sample": False}
        assert torch.equal(LanguageModel(net).generate(ids, **given).result, net.generate(input_ids=ids, **given))


def test_generation_names_near_arguments():
    with pytest.raises(InputError, match=r"no argument 'max_new_token' \(did you mean 'max_new_tokens'"):
        LanguageModel(llama(num_hidden_layers=2)).generate(IDS, max_new_token=3)


def test_what_a_forward_pass_reads_from_its_kwargs_is_taken():
    result = LanguageModel(llama(num_hidden_layers=2)).trace(IDS, output_hidden_states=True, return_dict=True).result
    assert len(result.hidden_states) == 3


@pytest.mark.parametrize(
    ("lens", "given", "hint"),
    [
        (logit_lens, {"topk": 3}, r"logit_lens has no argument 'topk' \(did you mean 'top_k'"),
        (logit_lens, {"layer": 1}, r"logit_lens has no argument 'layer' \(did you mean 'layers'"),
        (logit_lens, {"images": []}, "logit_lens has no argument 'images'"),
        (collect_activations, {"batchsize": 1}, r"no argument 'batchsize' \(did you mean 'batch_size'"),
        (patchscope_generate, {"max_new_token": 1}, r"no argument 'max_new_token' \(did you mean 'max_new_tokens'"),
    ],
)
def test_options_of_lenses_of_language_models(lens, given, hint):
    with pytest.raises(InputError, match=hint):
        lens(LanguageModel(llama(num_hidden_layers=2)), [2, 3, 4], **given)


@pytest.mark.parametrize(("name", "near"), [("layer", "layers"), ("batchsize", "batch_size"), ("sed", "seed")])
def test_options_of_lenses_of_pipelines(name, near):
    with pytest.raises(InputError, match=rf"diffusion_lens has no argument '{name}' \(did you mean '{near}'"):
        diffusion_lens(DiffusionModel(CLIP), "a red circle", **{name: 1})


@pytest.mark.parametrize(
    ("lens", "options", "told"),
    [
        (diffusion_lens, {"encoder": ["text_encoder"]}, "has no text encoder"),
        (trajectory_lens, {"steps": "x"}, "steps are integers or slices"),
        (trajectory_lens, {"steps": [0, None]}, "steps are integers or slices"),
        (trajectory_lens, {"show": 3}, "show must name the images to draw"),
        (layer_fidelity, {"seed": "x"}, "a seed is an integer"),
    ],
)
def test_options_of_the_wrong_type_are_refused_before_anything_is_drawn(lens, options, told):
    model, drawn = DiffusionModel(diffusion.stable_diffusion()), []
    model.pipeline.unet.register_forward_hook(lambda module, args, output: drawn.append(output))
    with pytest.raises(InputError, match=told):
        lens(model, 2 if lens is layer_fidelity else "a red circle", **options)
    assert not drawn


@pytest.mark.parametrize(
    ("options", "told"), [({"of": 3}, "cannot be collected"), ({"folder": 3}, "a string or a Path")]
)
def test_options_of_the_wrong_type_of_collect_activations(options, told):
    with pytest.raises(InputError, match=told):
        collect_activations(LanguageModel(llama(num_hidden_layers=2)), IDS, **options)


class Streamer:
    """Counts what it is given, as a streamer of transformers."""

    def __init__(self):
        self.ended = 0

    def put(self, tokens):
        pass

    def end(self):
        self.ended += 1


def test_check_knows_the_arguments_of_both_calls():
    model = LanguageModel(llama(num_hidden_layers=2))
    model.check(IDS, max_new_tokens=3, use_cache=False)
    with pytest.raises(InputError, match=r"has no argument 'max_new_token' .*'max_new_tokens'"):
        model.check(IDS, max_new_token=3)


def test_a_run_with_a_streamer_that_is_dropped_unread():
    model, streamer = LanguageModel(llama(num_hidden_layers=2)), Streamer()
    with pytest.warns(RuntimeWarning, match="a run with a streamer was dropped before anything ran"):
        model.generate(IDS, max_new_tokens=2, streamer=streamer)
    assert streamer.ended == 1
    model.generate(IDS, max_new_tokens=2, streamer=streamer).finish()
    assert streamer.ended == 2
