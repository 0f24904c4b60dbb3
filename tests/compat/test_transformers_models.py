"""`TransformersModel`, `VisionLanguageModel`, `DiffusionModel` and `StandardizedTransformer`."""

import warnings

import pytest
import torch
import transformers
from PIL import Image

from diffsight.compat import (
    DiffusionModel,
    LanguageModel,
    StandardizedTransformer,
    TransformersModel,
    VisionLanguageModel,
)
from diffsight.errors import InputError
from helpers import outputs, with_input
from models import diffusion, language, vision_language
from models.building import build

TEXT = "The Eiffel Tower is in the city of"
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def net():
    return language.gpt2()


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("bert"))
    config = transformers.BertConfig(
        vocab_size=400, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    build(transformers.BertForSequenceClassification, config).save_pretrained(folder)
    language.tokenizer().save_pretrained(folder)
    return folder


def test_layers_give_what_they_return(net):
    model = TransformersModel(net, tokenizer=language.TOKENIZER, task="text-generation", device="cpu")
    ids = language.ids(TEXT)
    with model.trace(TEXT):
        hidden = model.transformer.h[1].output
    assert torch.equal(hidden, outputs(net.transformer.h[1], net, ids)[0])
    old = LanguageModel(net, tokenizer=language.TOKENIZER)
    with old.trace(TEXT):
        assert torch.equal(old.transformer.h[1].output[0], hidden)
    assert isinstance(old, TransformersModel) and old.task == model.task == "text-generation"


class Collected(transformers.generation.streamers.BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        pass


def test_tokens_of_each_step(net):
    model, collected = TransformersModel(net, tokenizer=language.TOKENIZER), Collected()
    arguments = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with pytest.warns(UserWarning, match="leaves out the last token") as caught:
        with model.generate(TEXT, **arguments) as tracer:
            steps = [model.generator.streamer.output for _ in tracer.iter[:]]
    result = net.generate(language.ids(TEXT), **arguments, streamer=collected)
    assert caught[0].filename == __file__ and torch.equal(tracer.result, result)
    assert len(steps) == 3 and all(map(torch.equal, steps, collected.tokens))
    with warnings.catch_warnings(), model.generate(TEXT, **arguments) as tracer:
        warnings.simplefilter("error")
        steps = [model.generator.streamer.output for _ in tracer.iter[:2]]
    assert len(steps) == 2 and all(map(torch.equal, steps, collected.tokens))


def test_arguments_of_the_tokenizer(net):
    model = TransformersModel(net, tokenizer=language.TOKENIZER)
    for arguments in ({"truncation": True, "max_length": 3}, {"invoker_args": {"truncation": True, "max_length": 3}}):
        with model.trace(TEXT, **arguments):
            logits = model.lm_head.output
        assert torch.equal(logits, net(language.ids(TEXT)[:, :3]).logits)
    with pytest.raises(InputError, match="has no argument 'banana'"):
        model.trace(TEXT, banana=True)


def test_class_of_a_task(bert_folder):
    model = TransformersModel(bert_folder, task="text-classification")
    assert not model.dispatched and isinstance(model._module, transformers.BertForSequenceClassification)
    assert type(TransformersModel(bert_folder, automodel="AutoModelForSequenceClassification")._module) is type(
        model._module
    )
    with pytest.raises(InputError, match="image-classification"):
        TransformersModel(bert_folder, task="image-classification")
    with pytest.raises(InputError, match="automodel"):
        TransformersModel(model._module, automodel="AutoModel")


def test_invoke_of_all_texts(net):
    model = TransformersModel(net, tokenizer=language.TOKENIZER)
    ids = language.ids(TEXT)
    with model.trace() as tracer:
        with tracer.invoke(TEXT):
            pass
        with tracer.invoke({"input_ids": ids}):
            pass
        with tracer.invoke():
            logits = model.lm_head.output
    assert torch.equal(logits, net(ids.repeat(2, 1)).logits)
    with pytest.raises(InputError, match="an invoke before it has changed"), model.trace() as tracer:
        with tracer.invoke(TEXT):
            model.layers_output[1] = model.layers_output[1] * 2
        with tracer.invoke():
            pass


def test_pipelines(net):
    model = TransformersModel(net, tokenizer=language.TOKENIZER, task="text-generation")
    arguments = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    with model.pipe(TEXT, **arguments) as tracer:
        hidden = model.transformer.h[0].output
        result = tracer.result
    assert result == model.pipeline(TEXT, **arguments)
    assert torch.equal(hidden, outputs(net.transformer.h[0], net, language.ids(TEXT))[0])


def test_images_and_text():
    net, processor = vision_language.llava()
    image = Image.new("RGB", (32, 32), "red")
    encoded = processor(images=[image], text="<image> a red circle", return_tensors="pt")
    for kind in (
        VisionLanguageModel(net, processor=processor),
        TransformersModel(net, processor=processor, task="image-text-to-text"),
    ):
        with kind.trace(text="<image> a red circle", images=[image]):
            logits = kind.lm_head.output
        assert torch.equal(logits, net(**encoded).logits)
        pixels = {"images": [image], "text": "<image> a red circle"}
        with kind.generate(pixels, generate_kwargs={"max_new_tokens": 2, "min_new_tokens": 2}) as tracer:
            tokens = tracer.result
        assert torch.equal(tokens, net.generate(**encoded, max_new_tokens=2, min_new_tokens=2))


def test_edits_bind_two_names(net):
    model = TransformersModel(net, tokenizer=language.TOKENIZER)
    with model.edit() as (_, edited):
        edited.transformer.h[0].output[:] = 0
    with edited.trace(TEXT):
        hidden = edited.transformer.h[0].output
    with model.trace(TEXT):
        plain = model.transformer.h[0].output
    assert not hidden.any() and plain.any()


def test_names_of_nnterp(net):
    model = StandardizedTransformer(net, tokenizer=language.TOKENIZER)
    ids = language.ids(TEXT)
    with model.trace(TEXT):
        tokens, mask, embedded = model.input_ids, model.attention_mask, model.token_embeddings
        hidden = model.layers_output[1]
        logits, size = model.logits, model.input_size
    assert torch.equal(tokens, ids) and mask.all() and size == ids.shape
    assert torch.equal(embedded, net.transformer.wte(ids))
    assert torch.equal(hidden, outputs(net.transformer.h[1], net, ids)[0]) and torch.equal(logits, net(ids).logits)
    assert (model.num_layers, model.hidden_size) == (net.config.n_layer, net.config.n_embd)
    assert len(model.attentions) == len(model.mlps) == model.num_layers and model.vocab_size == net.config.vocab_size
    with model.trace(TEXT):
        model.skip_layer(1)
        skipped = model.layers_input[2]
    assert torch.equal(skipped, outputs(net.transformer.h[0], net, ids)[0])
    (closest,) = model.get_topk_closest_tokens(hidden[0, -1:], k=2)
    probabilities = net.lm_head(net.transformer.ln_f(hidden[0, -1:])).softmax(-1)[0]
    assert [p for _, p in closest] == pytest.approx(probabilities.topk(2).values.tolist())


def test_attention_probabilities_of_nnterp():
    """nnterp's guide to advanced features, the first cell: no attention to the first token."""
    net = language.gpt2()
    net.set_attn_implementation("eager")
    attention, ids = net.transformer.h[1].attn, language.ids(TEXT)
    model = StandardizedTransformer(net, tokenizer=language.TOKENIZER)
    with model.trace(TEXT):
        probs = model.attention_probabilities[1].save()
        read = probs.clone()
        probs[:, :, 1:, 0] = 0
        probs /= probs.sum(dim=-1, keepdim=True)
        logits = model.logits.save()
    given = net(ids, output_attentions=True).attentions[1]
    assert torch.equal(read, given)
    given[:, :, 1:, 0] = 0
    values = outputs(attention.c_attn, net, ids)[0].chunk(3, dim=-1)[2].unflatten(-1, (net.config.n_head, -1))
    heads = given / given.sum(dim=-1, keepdim=True) @ values.transpose(1, 2)
    expected = with_input(attention.c_proj, heads.transpose(1, 2).flatten(2), lambda: net(ids).logits)
    assert torch.allclose(logits, expected, atol=1e-6) and not torch.allclose(logits, net(ids).logits, atol=1e-3)


def _saved(folder):
    language.gpt2().save_pretrained(folder)
    language.tokenizer().save_pretrained(folder)
    return str(folder)


def test_diffusion_models(tmp_path):
    pipe, kind = diffusion.stable_diffusion(), diffusion.PIPELINES["stable_diffusion"]
    model = DiffusionModel(pipe)
    arguments = {name: value for name, value in kind.inputs().items() if name != "num_inference_steps"}
    with model.trace(**arguments, seed=0) as tracer:
        steps = [model.unet.output for _ in tracer.iter[:]]
    assert len(steps) == 1  # the default, as in nnsight
    pipe.save_pretrained(tmp_path)
    other = DiffusionModel(str(tmp_path), automodel="StableDiffusionImg2ImgPipeline")
    assert type(other.pipeline).__name__ == "StableDiffusionImg2ImgPipeline"
    other = DiffusionModel(str(tmp_path), automodel="DiffusionPipeline", safety_checker=None)
    assert type(other.pipeline) is type(pipe) and other.pipeline.safety_checker is None
    with pytest.raises(InputError, match="automodel"):
        DiffusionModel(pipe, automodel="StableDiffusionImg2ImgPipeline")
    assert other.device == pipe.device == torch.device("cpu") and other.devices == {pipe.device}
    assert DiffusionModel(str(tmp_path)).device == LanguageModel(_saved(tmp_path / "gpt2")).device == pipe.device
    layer = pipe.text_encoder.encoder.layers[0]
    with model.generate(**kind.inputs(), seed=0):
        output = model.text_encoder.text_model.encoder.layers[0].output
    assert isinstance(output, tuple) and output[0].shape[-1] == layer.embed_dim
