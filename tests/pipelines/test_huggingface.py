"""HFPipeline: transformers pipelines for many tasks, compared with the bare pipelines and plain hooks."""

import json
import socket
import time
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from diffsight import HFPipeline, LanguageModel, OutOfOrderError
from diffsight.errors import InputError, PointNotFoundError, ScanError
from helpers import first, refusal, replaced, with_first
from models import huggingface

TEXT = huggingface.TEXT
GENERATING = [task for task, case in huggingface.PIPELINES.items() if case.generates]


@pytest.fixture(autouse=True)
def no_warnings_about_depth():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a depth map of random weights may be even
        yield


@pytest.fixture(params=huggingface.PIPELINES)
def case(request):
    return huggingface.PIPELINES[request.param]


@pytest.fixture
def classifier():
    return huggingface.PIPELINES["text-classification"].build()


@pytest.fixture
def writer():
    return huggingface.PIPELINES["text-generation"].build()


def is_same(a, b):
    """Return whether two results are the same to the bit, whatever they contain."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    if isinstance(a, (torch.Tensor, np.ndarray, Image.Image)):
        return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind == "f")
    return a == b


# Every task


def test_there_are_many_tasks():
    assert len(huggingface.PIPELINES) >= 15


def test_an_unread_run_is_the_bare_call(case):
    pipe = case.build()
    expected = pipe(*case.args, **case.kwargs)
    assert is_same(HFPipeline(pipe).trace(*case.args, **case.kwargs).result, expected)


def test_a_read_run_has_the_same_result_and_leaves_nothing(case):
    pipe = case.build()
    expected = pipe(*case.args, **case.kwargs)
    classes = {name: type(part) for name, part in vars(pipe).items()}
    modules = [module for part in vars(pipe).values() if isinstance(part, nn.Module) for module in part.modules()]
    with HFPipeline(pipe).trace(*case.args, **case.kwargs) as run:
        inputs = run.preprocess.output
        hidden = first(run.model[case.layer].output)
        outputs = run.forward.output
        answer = run.postprocess.output
    assert is_same(run.result, expected)
    assert hidden.ndim == 3 and inputs is not None and outputs is not None
    assert is_same(answer, run.result) or is_same([answer], run.result)
    assert {name: type(part) for name, part in vars(pipe).items()} == classes
    assert type(pipe).__module__.startswith("transformers")
    assert not any("forward" in vars(module) for module in modules)


def test_an_edit_of_a_layer_is_what_a_hook_does(case):
    pipe = case.build()
    model = HFPipeline(pipe)
    layer = model.model[case.layer]._owner
    with replaced(layer, lambda output: with_first(output, first(output) * -3)):
        expected = pipe(*case.args, **case.kwargs)
    with model.trace(*case.args, **case.kwargs) as run:
        for _ in run.steps:
            first(run.model[case.layer].output).mul_(-3)
    assert is_same(run.result, expected)
    assert not is_same(expected, pipe(*case.args, **case.kwargs))


def test_a_step_is_a_call_of_the_model(case):
    pipe, calls = case.build(), []
    handle = pipe.model.register_forward_hook(lambda *call: calls.append(call))
    pipe(*case.args, **case.kwargs)
    handle.remove()
    steps = [step.index for step in HFPipeline(pipe).trace(*case.args, **case.kwargs).steps]
    assert steps == list(range(len(calls))) != []


def test_parts_are_envoys(case):
    pipe = case.build()
    with HFPipeline(pipe).trace(*case.args, **case.kwargs) as run:
        name = next(n for n in ("processor", "image_processor", "feature_extractor", "tokenizer") if getattr(pipe, n))
        prepared = run[name].output
        inputs, kwargs = run.model.inputs
    assert len(prepared) > 0
    assert inputs or kwargs


# Pipelines that write


@pytest.mark.parametrize("task", GENERATING)
def test_generating(task):
    case = huggingface.PIPELINES[task]
    pipe = case.build()
    expected = pipe(*case.args, **case.kwargs)
    with HFPipeline(pipe).generate(*case.args, **case.kwargs) as run:
        chosen = [int(run.model.lm_head.output[0, -1].argmax()) for _ in run.steps]
    assert is_same(run.result, expected)
    tokenizer = pipe.tokenizer or pipe.processor.tokenizer
    assert run.result[0]["generated_text"].endswith(tokenizer.decode(chosen, skip_special_tokens=True))
    assert len(chosen) == 4


@pytest.mark.parametrize("task", GENERATING)
def test_the_tokens_of_a_step_and_its_text(task):
    case = huggingface.PIPELINES[task]
    pipe = case.build()
    model, tokenizer = HFPipeline(pipe), pipe.tokenizer or pipe.processor.tokenizer
    with model.generate(*case.args, **case.kwargs) as run:
        steps = [(int(run.model.lm_head.output[0, -1].argmax()), step.tokens.tolist(), step.text) for step in run.steps]
    assert all(tokens == [said] for said, tokens, _ in steps)
    written = tokenizer.decode([said for said, _, _ in steps], skip_special_tokens=True)
    assert "".join(text for *_, text in steps) == written.rstrip("\ufffd")
    assert "".join(model.generate(*case.args, **case.kwargs).stream()) == written
    assert "generate" not in vars(pipe.model)


def test_texts_one_after_the_other_and_two_runs_at_once(writer):
    """Each run has its own tokens, and each text begins anew."""
    model, given = HFPipeline(writer), {"max_new_tokens": 3, "min_new_tokens": 3}
    texts = [TEXT, f"{TEXT} above the square"]
    alone = [[step.tokens.tolist() for step in model.generate(text, seed=3, **given).steps] for text in texts]
    with model.generate(texts[0], seed=3, **given) as first, model.generate(texts[1], seed=3, **given) as second:
        both = [(a.tokens.tolist(), b.tokens.tolist()) for a, b in zip(first.steps, second.steps)]
    assert [list(tokens) for tokens in zip(*both)] == alone
    pieces = [step.text for step in model.generate(texts, do_sample=False, **given).steps]
    single = [[step.text for step in model.generate(text, do_sample=False, **given).steps] for text in texts]
    assert pieces == single[0] + single[1]


@pytest.mark.parametrize("texts", [TEXT, [TEXT] * 2])
def test_what_comes_after_the_last_step_can_be_read_and_edited(writer, texts):
    given = {"max_new_tokens": 3, "do_sample": False, "batch_size": 2}
    writer.tokenizer.pad_token = writer.tokenizer.eos_token
    plain = writer(texts, **given)
    with HFPipeline(writer).generate(texts, **given) as run:
        written = [step.tokens.tolist() for step in run.steps]
        ids = run.postprocess.input["generated_sequence"]
        run.postprocess.output = "other"
    assert len(written) == 3
    assert ids.flatten()[-3:].tolist() == [tokens[0] for tokens in written]
    assert run.result == ("other" if isinstance(texts, str) else ["other", plain[1]])


def test_a_run_with_a_streamer_that_is_dropped_unread(writer):
    streamer = transformers.TextIteratorStreamer(writer.tokenizer)
    model, given = HFPipeline(writer), {"max_new_tokens": 2, "streamer": streamer}
    with pytest.warns(RuntimeWarning, match="a run with a streamer was dropped before anything ran") as caught:
        model.generate(TEXT, **given)
    assert caught[0].filename == __file__
    assert [*streamer] == [""]  # it has ended
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.generate(TEXT, max_new_tokens=2)
        model.generate(TEXT, **given).model.lm_head.output


def test_a_direction_in_one_step(writer):
    model = HFPipeline(writer)
    given = {"max_new_tokens": 4, "do_sample": False, "return_tensors": True}
    with model.generate(TEXT, **given) as run:
        for step in run.steps:
            if step.index == 2:
                run.model.lm_head.output[:, -1, 20] = 1000
    written, plain = (result[0]["generated_token_ids"] for result in (run.result, writer(TEXT, **given)))
    assert written[-2] == 20 != plain[-2]
    assert list(written[:-2]) == list(plain[:-2])


def test_seeds(writer):
    model, given = HFPipeline(writer), {"max_new_tokens": 6, "do_sample": True}
    before = torch.get_rng_state()
    results = [model.generate(TEXT, seed=seed, **given).result for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]
    assert torch.equal(before, torch.get_rng_state())
    with model.generate(TEXT, seed=0, **given) as run:
        run.model.lm_head.output
    assert run.result == results[0]
    torch.manual_seed(0)
    assert writer(TEXT, **given) == results[0]


def test_a_pipeline_that_draws_is_seeded():
    case = huggingface.PIPELINES["text-to-audio"]
    pipe = case.build()
    pipe.model.noise_scale = pipe.model.noise_scale_duration = 0.7
    one, again, other = (HFPipeline(pipe).trace(TEXT, seed=seed).result["audio"] for seed in (0, 0, 1))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


# Batches


def test_a_list_is_processed_one_by_one(classifier):
    texts = [TEXT, "the green square", "a photo"]
    with HFPipeline(classifier).trace(texts) as run:
        seen = [run.model.layers[1].output.shape for _ in run.steps]
    assert run.result == classifier(texts)
    assert [shape[0] for shape in seen] == [1, 1, 1] and len({shape[1] for shape in seen}) > 1
    with pytest.raises(InputError, match="this run has no rows"):
        HFPipeline(classifier).trace(texts).rows


def test_a_list_in_batches(classifier):
    texts = [TEXT, "the green square", "a photo"]
    with HFPipeline(classifier).trace(texts, batch_size=2) as run:
        seen = [len(run.model.layers[1].output) for _ in run.steps]
    assert seen == [2, 1]
    assert run.result == classifier(texts, batch_size=2)


def test_rows_of_one_batch(classifier):
    texts = [TEXT, "the green square"]
    with HFPipeline(classifier).trace(texts, batch_size=2, top_k=None) as run:
        _, second = run.rows
        second.model.layers[1].output[:] = 0
    plain = classifier(texts, batch_size=2, top_k=None)
    assert run.result[0] == plain[0]
    assert run.result[1] != plain[1]


def test_inputs_from_a_generator(classifier):
    texts = [TEXT, "the green square"]
    with HFPipeline(classifier).trace(text for text in texts) as run:
        steps = len(list(run.steps))
    assert steps == 2
    assert run.result == list(classifier(text for text in texts))


# The engine's ways


def test_edits_persist(classifier):
    model = HFPipeline(classifier)

    @model.edit
    def numb(run):
        run.model.layers[0].output[:] = 0

    layer = model.model.layers[0]._owner
    with replaced(layer, torch.zeros_like):
        expected = classifier(TEXT)
    assert numb.trace(TEXT).result == expected
    assert model.trace(TEXT).result == classifier(TEXT) != expected


def test_invokes(classifier):
    model = HFPipeline(classifier)
    with model.trace(top_k=None) as run:
        with run.invoke(TEXT):
            hidden = run.model.layers[1].output
        with run.invoke("a red square above a blue circle"):
            run.model.layers[1].output = hidden
    first, second = run.result
    assert first == second == classifier(TEXT, top_k=None)


def test_order(classifier):
    with pytest.raises(OutOfOrderError), HFPipeline(classifier).trace(TEXT) as run:
        run.postprocess.input
        run.model.layers[0].output


def test_methods_are_assigned(classifier):
    other = classifier.preprocess("the green square")
    with HFPipeline(classifier).trace(TEXT) as run:
        run.forward.input = dict(other)
    assert run.result == classifier("the green square")
    with HFPipeline(classifier).trace(TEXT) as run:
        run.forward.output.logits[:] = torch.tensor([0.0, 9.0, 0.0])
    assert run.result[0]["label"] == "LABEL_1"
    with HFPipeline(classifier).trace(TEXT) as run:
        run.postprocess.output = "nothing"
    assert run.result == ["nothing"]


def test_scans():
    for task in ("text-classification", "image-classification", "object-detection", "text-generation"):
        case = huggingface.PIPELINES[task]
        model = HFPipeline(case.build())
        with model.scan(*case.args, **case.kwargs) as run:
            hidden = first(run.model[case.layer].output)
            assert is_fake(hidden)
        with pytest.raises(ScanError, match=r"run\.result: a scan computes shapes only"):
            run.result
        with model.trace(*case.args, **case.kwargs) as run:
            assert first(run.model[case.layer].output).shape == hidden.shape


def test_a_cache_is_left_as_it_is_by_a_scan(writer):
    cache, model = transformers.DynamicCache(), HFPipeline(writer)
    with model.scan("a b", past_key_values=cache, max_new_tokens=3) as run:
        assert run.model.calls[2].inputs[1]["past_key_values"].get_seq_length() > 0
    with model.scan(past_key_values=cache, max_new_tokens=3) as run, run.invoke("a b"):
        assert run.model.calls[1].output is not None
    assert cache.get_seq_length() == 0


def test_gradients(classifier):
    model = HFPipeline(classifier)
    with model.trace(TEXT, top_k=None, grad=True) as run:
        hidden = run.model.layers[1].output
        hidden.retain_grad()
        run.forward.output.logits[0, 0].backward()
    assert run.result == classifier(TEXT, top_k=None)
    kept = []

    def keep(module, args, output):
        kept.append(output)
        output.retain_grad()

    handle = model.model.layers[1]._owner.register_forward_hook(keep)
    classifier.model(**classifier.tokenizer(TEXT, return_tensors="pt")).logits[0, 0].backward()
    handle.remove()
    assert torch.equal(hidden.grad, kept[0].grad) and hidden.grad.abs().sum() > 0
    assert not {"get_inference_context", "forward"} & vars(classifier).keys()


def test_gradients_through_generation(writer):
    with HFPipeline(writer).generate(TEXT, max_new_tokens=2, do_sample=False, grad=True) as run:
        hidden = run.model.layers[1].output
        hidden.retain_grad()
        run.model.lm_head.next().output[0, -1].max().backward()
    assert hidden.grad.abs().sum() > 0
    assert "generate" not in vars(writer.model)
    assert run.result == writer(TEXT, max_new_tokens=2, do_sample=False)


# Names, and opening


def test_standard_names():
    pipe = huggingface.PIPELINES["zero-shot-image-classification"].build()
    model = HFPipeline(pipe)
    net = pipe.model
    assert model.model.vision_model.layers[0]._owner is net.vision_model.encoder.layers[0]
    assert model.model.text_model.ln_final._owner is net.text_model.final_layer_norm
    assert model.model.vision_model.layers[0].mlp._owner is net.vision_model.encoder.layers[0].mlp
    writer = HFPipeline(huggingface.PIPELINES["text-generation"].build())
    assert writer.model.lm_head._owner is writer.pipeline.model.lm_head
    assert writer.model.embed_tokens._owner is writer.pipeline.model.transformer.wte
    bert = HFPipeline(huggingface.PIPELINES["text-classification"].build())
    assert bert.model.layers[0].self_attn.path == "model.layers[0].self_attn"
    with pytest.raises(PointNotFoundError):
        bert.model.lm_head


def test_the_pipeline_is_shown(classifier):
    shown = repr(HFPipeline(classifier))
    for part in ("ClassificationPipeline(", "(model): BertForSequenceClassification", "(tokenizer): GemmaTokenizer"):
        assert part in shown
    assert "preprocess(), forward(), postprocess()" in shown


def test_calling_it_is_calling_the_pipeline(classifier):
    model = HFPipeline(classifier)
    assert model(TEXT) == classifier(TEXT)
    assert model.pipeline is classifier
    assert model.task == "text-classification"


def test_a_task_and_a_folder(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    model = HFPipeline("text-classification", model=str(tmp_path), device="cpu")
    assert model.trace(TEXT).result == classifier(TEXT)
    parts = {"model": classifier.model, "tokenizer": classifier.tokenizer}
    assert HFPipeline("text-classification", **parts, device="cpu").trace(TEXT).result == classifier(TEXT)


@pytest.mark.parametrize(
    ("source", "given", "match"),
    [
        ("text-clasification", {"model": "somewhere"}, "did you mean 'text-classification'"),
        ("nothing/at-all", {}, "the pipeline 'nothing/at-all' cannot be loaded"),
        ("text-classification", {"model": "nothing/at-all"}, "cannot be loaded: OSError"),
        (3, {}, "HFPipeline takes transformers.pipeline"),
        (torch.nn.Linear(1, 1), {}, "HFPipeline takes transformers.pipeline"),
    ],
)
def test_sources_that_are_not_pipelines(source, given, match):
    with pytest.raises(InputError, match=match):
        HFPipeline(source, **given)


def without_weights(file, part):
    kept = {name: tensor for name, tensor in load_file(file).items() if part not in name}
    save_file(kept, file, {"format": "pt"})


def test_weights_that_are_missing_are_listed(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"BertForMaskedLM lacks the weights cls\.predictions\."):
        HFPipeline("fill-mask", model=tmp_path)
    without_weights(tmp_path / "model.safetensors", "layer.1.")
    with pytest.raises(InputError, match=r"BertForSequenceClassification lacks the weights bert\.encoder\.layer\.1\."):
        HFPipeline("text-classification", model=tmp_path)


def test_weights_of_another_shape_are_named(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 99}))
    with pytest.raises(InputError, match=r"Classification does not fit its files: bert\.encoder\.layer\.0\..* \(99"):
        HFPipeline("text-classification", model=tmp_path)


def test_weights_that_are_missing_from_an_adapter_are_listed(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    lora = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    adapted = peft.get_peft_model(classifier.model, lora)
    adapted.save_pretrained(tmp_path)
    expected = adapted(torch.arange(4)[None]).logits
    settings = {}
    model = HFPipeline("text-classification", model=tmp_path, dtype=torch.float32, model_kwargs=settings)
    assert torch.equal(model.pipeline.model(torch.arange(4)[None]).logits, expected)
    assert settings == {}
    without_weights(tmp_path / "adapter_model.safetensors", "layer.1.")
    for told in (
        refusal(HFPipeline, "text-classification", model=tmp_path),
        refusal(LanguageModel, tmp_path, dispatch=True),
    ):
        assert "the adapter of BertForSequenceClassification lacks the weights bert.encoder.layer.1." in told


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.json", "[]", "config.json holds a list, not a dictionary"),
        ("tokenizer.json", None, "has no vocabulary"),
        ("model.safetensors", None, "there are no weights in"),
        ("model.safetensors", "{", "SafetensorError"),
    ],
)
def test_a_damaged_folder(classifier, tmp_path, file, content, told):
    classifier.save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=rf"the pipeline 'text-classification' cannot be loaded: .*{told}"):
        HFPipeline("text-classification", model=tmp_path)


def test_bad_input(classifier):
    model = HFPipeline(classifier)
    with pytest.raises(InputError, match="device cannot be used with a pipeline that is already loaded"):
        HFPipeline(classifier, device="cpu")
    with pytest.raises(PointNotFoundError, match="TextClassificationPipeline does not generate"):
        model.generate(TEXT)
    with pytest.raises(InputError, match="a seed is an integer"):
        model.trace(TEXT, seed=-1)
    with pytest.raises(InputError, match="num_workers"):
        model.trace([TEXT], num_workers=2)


# Options


def test_every_task_takes_its_options(case):
    HFPipeline(case.build()).check(*case.args, **case.kwargs, batch_size=1)


def test_an_option_that_the_pipeline_does_not_know(case):
    model = HFPipeline(case.build())
    for wrong in ("banana", "sed"):
        with pytest.raises(InputError, match=f"has no argument '{wrong}'"):
            model.trace(*case.args, **case.kwargs, **{wrong: 3})


@pytest.mark.parametrize(
    ("task", "option", "meant"),
    [
        ("text-classification", {"topk": 2}, "top_k"),
        ("text-classification", {"truncatoin": True}, "truncation"),
        ("text-generation", {"max_new_token": 3}, "max_new_tokens"),
        ("text-generation", {"temprature": 0.3}, "temperature"),
    ],
)
def test_a_mistyped_option_is_told_the_near_name(task, option, meant):
    with pytest.raises(InputError, match=f"did you mean .*'{meant}'"):
        HFPipeline(huggingface.PIPELINES[task].build()).trace(TEXT, **option)


def test_options_that_are_passed_on(classifier, writer):
    expected = classifier(TEXT, truncation=True, max_length=3, top_k=None)
    assert is_same(HFPipeline(classifier).trace(TEXT, truncation=True, max_length=3, top_k=None).result, expected)
    options = {"max_new_tokens": 3, "do_sample": False, "repetition_penalty": 1.2, "return_full_text": False}
    assert is_same(HFPipeline(writer).generate(TEXT, **options).result, writer(TEXT, **options))


def test_a_hub_that_cannot_be_reached_is_not_asked_again_and_again(monkeypatch):
    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("diffsight.pipelines.hub_access.getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it was asked again"))
    assert "the pipeline 'someone/some-model' cannot be loaded" in refusal(HFPipeline, "someone/some-model")
    assert constants.HF_HUB_OFFLINE is False
