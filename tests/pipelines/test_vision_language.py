"""VisionLanguageModel: images, texts and image tokens, compared with the bare models of transformers."""

import base64
import io

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from diffsight import HFPipeline, VisionLanguageModel
from diffsight.errors import InputError, PointNotFoundError, ScanError
from diffsight.pipelines.vision_language.processors import placeholder
from helpers import refusal, replaced
from models import architectures, diffusion, vision_language

pytestmark = pytest.mark.usefixtures("no_gradients")

IMAGE = diffusion.IMAGE
OTHER = Image.radial_gradient("L").resize((48, 32)).convert("RGB")
TEXT, LONGER = "a red circle", "a photo of a blue square above the red circle"
FOUR = {"max_new_tokens": 4, "do_sample": False}
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}the{% endif %}"
)


@pytest.fixture(params=vision_language.MODELS)
def kind(request):
    return request.param


@pytest.fixture
def net_and_processor(kind):
    """Return a model and its processor."""
    return vision_language.MODELS[kind]()


@pytest.fixture
def llava():
    return VisionLanguageModel(vision_language.llava())


def bare_inputs(processor, text=TEXT, images=(IMAGE,), **more):
    """Return the inputs that a user would pass to the bare model."""
    text = placeholder(processor) * len(images) + text
    values = processor(images=[list(images)], text=[text], return_tensors="pt", **more)
    return {name: value for name, value in values.items() if name != "labels"}  # PaliGemma's, for training


# Every kind of model


def test_runs_like_the_bare_model(net_and_processor):
    net, processor = net_and_processor
    model, values = VisionLanguageModel(net_and_processor), bare_inputs(processor)
    run = model.trace(TEXT, images=IMAGE)
    assert torch.equal(run.result.logits, net(**values).logits)
    assert torch.equal(run.tokens, values["input_ids"])
    assert not torch.equal(run.result.logits, model.trace(TEXT, OTHER).result.logits[:, : run.tokens.shape[1]])


def test_an_image_without_text(net_and_processor):
    net, processor = net_and_processor
    run = VisionLanguageModel(net_and_processor).generate("", images=IMAGE, **FOUR)
    assert torch.equal(run.result, net.generate(**bare_inputs(processor, ""), **FOUR))


def test_an_empty_text_among_others(llava):
    both = llava.generate(["", TEXT], IMAGE, **FOUR).result[:, -4:]
    alone = [llava.generate(text, IMAGE, **FOUR).result[0, -4:] for text in ("", TEXT)]
    assert torch.equal(both, torch.stack(alone))


def test_a_text_without_tokens(llava):
    tokenizer = llava.processor.tokenizer
    assert llava.trace("").tokens.shape == (1, 1)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    for given in ("", [TEXT, ""]):
        with pytest.raises(InputError, match="the prompt is empty: pass at least one word, or an image"):
            llava.trace(given)
    assert llava.trace("", IMAGE).tokens.shape[1] > 1


def test_generates_like_the_bare_model(net_and_processor):
    net, processor = net_and_processor
    expected = net.generate(**bare_inputs(processor), **FOUR)
    run = VisionLanguageModel(net_and_processor).generate(TEXT, images=IMAGE, **FOUR)
    assert torch.equal(run.result, expected)
    start = run.tokens.shape[1]
    assert run.text == processor.tokenizer.decode(expected[0, start:], skip_special_tokens=True)


def test_generates_from_padded_token_ids_like_the_bare_model(llava):
    net, ids = llava.module, torch.tensor([[0, 0, 0, 7, 8], [8, 9, 5, 7, 11]])
    more = FOUR | {"pad_token_id": 0, "eos_token_id": None}
    bare = net.generate(ids, **more)
    assert torch.equal(bare[0, 5:], net.generate(ids[:1, 3:], **more)[0, 2:])
    assert torch.equal(llava.generate({"input_ids": ids}, **more).result, bare)
    assert torch.equal(llava.generate(ids, **more).result, bare)


def test_steps_through_the_generated_tokens(net_and_processor):
    net, processor = net_and_processor
    values = bare_inputs(processor)
    with VisionLanguageModel(net_and_processor).generate(TEXT, IMAGE, **FOUR) as run:
        chosen = [(step.index, int(run.logits[0, -1].argmax()), int(step.tokens)) for step in run.steps]
    written = net.generate(**values, **FOUR)[0, values["input_ids"].shape[1] :].tolist()
    assert chosen == [(i, token, token) for i, token in enumerate(written)]


def test_edits_a_layer_of_the_language_model_like_a_hook(net_and_processor):
    net, processor = net_and_processor
    values, model = bare_inputs(processor), VisionLanguageModel(net_and_processor)
    with replaced(model.layers[1]._owner, lambda hidden: hidden * -2):
        expected = net(**values).logits
    with model.trace(TEXT, IMAGE) as run:
        run.layers_output[1] = run.layers_output[1] * -2
    assert torch.equal(run.result.logits, expected)
    assert not torch.equal(expected, net(**values).logits)


def test_edits_a_layer_of_the_vision_tower_like_a_hook(net_and_processor):
    net, processor = net_and_processor
    values, model = bare_inputs(processor), VisionLanguageModel(net_and_processor)

    def doubled(output):
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    with replaced(model.vision.layers[0]._owner, doubled):
        expected = net(**values).logits
    with model.trace(TEXT, IMAGE) as run:
        run.vision.layers[0].output = doubled(run.vision.layers[0].output)
    assert torch.equal(run.result.logits, expected)
    assert not torch.equal(expected, net(**values).logits)


def test_has_the_standard_names(net_and_processor):
    net, _ = net_and_processor
    model = VisionLanguageModel(net_and_processor)
    assert model.lm_head._owner is net.get_output_embeddings()
    assert model.embed_tokens._owner is net.get_input_embeddings()
    assert model.vision._owner is net.get_encoder(modality="image")
    assert len(model.layers) == 3 and len(model.vision.layers) in (2, 3)
    assert "vision = " in repr(model)


def test_a_row_is_computed_as_it_would_be_alone(net_and_processor):
    model = VisionLanguageModel(net_and_processor)
    together = model.trace([TEXT, LONGER], [IMAGE, OTHER])
    for text, image, logits in zip([TEXT, LONGER], [IMAGE, OTHER], together.result.logits):
        alone = model.trace(text, image).result.logits[0]
        assert torch.allclose(logits[-len(alone) :], alone, atol=1e-5)
    written = [model.generate(text, image, **FOUR).text for text, image in ((TEXT, IMAGE), (LONGER, OTHER))]
    assert model.generate([TEXT, LONGER], [IMAGE, OTHER], **FOUR).text == written


def test_rows_have_their_own_images(net_and_processor):
    model = VisionLanguageModel(net_and_processor)
    if isinstance(
        net_and_processor[0], transformers.LlavaNextForConditionalGeneration
    ):  # whose tiles are not told apart
        with pytest.raises(InputError, match=r"rows\[0\]\.vision\.layers\[0\]\.output cannot be cut into rows"):
            model.trace([TEXT, LONGER], [IMAGE, OTHER]).rows[0].vision.layers[0].output
        return
    with model.trace([TEXT, LONGER], [IMAGE, OTHER]) as run:
        seen = [row.vision.layers[0].output for row in run.rows]
        whole = run.vision.layers[0].output
        hidden = [row.layers_output[1] for row in run.rows]
    alone = [model.trace(*one).vision.layers[0].output for one in ((TEXT, IMAGE), (LONGER, OTHER))]
    assert torch.equal(torch.cat(seen), whole)
    for own, expected in zip(seen, alone):
        assert torch.allclose(own, expected, atol=1e-5)
    assert [len(one) for one in hidden] == [1, 1]


def test_image_tokens_are_where_the_image_is(net_and_processor):
    model = VisionLanguageModel(net_and_processor)
    with model.trace([TEXT, LONGER], [IMAGE, OTHER]) as run:
        embedded = run.layers_input[0].clone()
        words = model.embed_tokens(run.tokens)
    words *= (embedded[0, -1] / words[0, -1]).mean()  # PaliGemma scales them
    for row, positions in enumerate(run.image_tokens):
        others = [p for p in range(run.tokens.shape[1]) if p not in positions]
        assert torch.allclose(embedded[row, others], words[row, others], atol=1e-4)
        assert not torch.isclose(embedded[row, positions], words[row, positions], atol=1e-4).all(-1).any()


@pytest.mark.parametrize(
    ("kind", "layers", "head", "vision"),
    [
        ("llama4", "language_model.model.layers", "language_model.lm_head", "vision_model"),
        ("internvl", "model.language_model.layers", "lm_head", "model.vision_tower"),
        ("qwen3_vl", "model.language_model.layers", "lm_head", "model.visual"),
        ("git", "git.encoder.layer", "output", "git.image_encoder"),
        ("fuyu", "model.language_model.layers", "lm_head", None),
    ],
)
def test_names_of_other_architectures(kind, layers, head, vision):
    cls = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind])
    net = cls(architectures.small_config(kind)).eval()
    model = VisionLanguageModel(net)
    assert model.layers._owner is net.get_submodule(layers)
    assert model.lm_head._owner is net.get_submodule(head)
    if vision is None:
        with pytest.raises(PointNotFoundError):
            model.vision
    else:
        assert model.vision._owner is net.get_submodule(vision)
        assert len(model.vision.layers) > 0


def test_layers_between_are_not_the_layers():
    net = transformers.IdeficsForVisionText2Text(architectures.small_config("idefics"))
    with pytest.warns(UserWarning, match="could not be verified"):  # it has no pass without images
        model = VisionLanguageModel(net)
    assert model.layers._owner is net.model.layers  # not those that look at the image, beside them
    assert model.vision.layers._owner is net.model.vision_model.encoder.layers


# The grid of patches


@pytest.mark.parametrize(
    ("build", "side", "shape"),
    [
        (vision_language.llava, 32, (4, 4)),
        (lambda: vision_language.llava("full"), 32, (4, 4)),
        (vision_language.llava_next, 64, (8, 8)),
        (vision_language.paligemma, 32, (4, 4)),
        (vision_language.gemma3, 32, (2, 2)),
        (vision_language.qwen2_vl, 64, (4, 4)),
        (vision_language.idefics3, 64, (4, 4)),
        (lambda: vision_language.idefics3(splits=False), 32, (2, 2)),
    ],
    ids=[
        "llava",
        "llava with a class token",
        "llava_next",
        "paligemma",
        "gemma3",
        "qwen2_vl",
        "idefics3",
        "idefics3 without tiles",
    ],
)
def test_the_grid_lies_on_the_image(build, side, shape):
    """Without the layers of the vision tower a token knows its own patches only: a spot changes the token under it."""
    model = VisionLanguageModel(build())
    rows, columns = shape
    plain = Image.new("RGB", (side, side), "gray")

    def embedded(image):
        with model.trace(TEXT, image) as run:
            for layer in run.vision.layers:
                layer.skip(layer.input)
            hidden = run.layers_input[0]
        return hidden[0], run.image_grids[0][0]

    before, grid = embedded(plain)
    assert grid.shape == shape
    for row, column in ((0, 0), (0, columns - 1), (rows - 1, 0), (1, 0)):
        spotted = plain.copy()
        high, wide = side // rows, side // columns
        spotted.paste("red", (column * wide, row * high, (column + 1) * wide, (row + 1) * high))
        changed = (embedded(spotted)[0] - before).norm(dim=-1)[grid]
        there = float(changed[row, column])
        changed[row, column] = 0
        assert changed.max() < there / 4  # a processor that resizes blurs the spot's edges


def test_images_of_another_shape_have_another_grid():
    model = VisionLanguageModel(vision_language.qwen2_vl())
    wide, high = Image.new("RGB", (64, 32), "red"), Image.new("RGB", (16, 48), "blue")
    run = model.trace([TEXT, LONGER], [[wide, high], [high]])
    assert [[tuple(grid.shape) for grid in row] for row in run.image_grids] == [[(2, 4), (3, 1)], [(3, 1)]]
    assert [torch.cat([grid.flatten() for grid in row]).tolist() for row in run.image_grids] == [
        positions.tolist() for positions in run.image_tokens
    ]


@torch.no_grad()
def test_the_grid_of_tiles_without_their_padding():
    """LLaVA-NeXT has tokens of the image as a whole, of its tiles, and of the ends of lines."""
    model = VisionLanguageModel(vision_language.llava_next())
    wide, high = Image.new("RGB", (64, 32), "red"), Image.new("RGB", (40, 60), "blue")
    run = model.trace([TEXT, LONGER], [[wide, high], [Image.new("RGB", (100, 30))]])
    assert [[tuple(grid.shape) for grid in row] for row in run.image_grids] == [[(4, 8), (8, 6)], [(2, 8)]]
    ends = model._owner.model.image_newline
    with run:
        hidden = run.layers_input[0]
    for positions, grids, row in zip(run.image_tokens, run.image_grids, hidden):
        between = set(positions.tolist()) - {int(at) for grid in grids for at in grid.flatten()}
        lines = [grid[:, -1] + 1 for grid in grids]
        assert all(torch.equal(row[at], ends.expand(len(at), -1)) for at in lines)
        assert {int(at) for line in lines for at in line} < between
        assert len(between) == sum(16 + len(grid) for grid in grids)


def test_several_images_have_a_grid_each():
    for build in (vision_language.llava, vision_language.idefics3):
        run = VisionLanguageModel(build()).trace([TEXT, LONGER, TEXT], [[IMAGE, OTHER], [IMAGE], None])
        assert [len(row) for row in run.image_grids] == [2, 1, 0]
        first, second = run.image_grids[0]
        assert first.max() < second.min()


def test_tokens_of_a_resampler_have_no_grid():
    run = VisionLanguageModel(vision_language.idefics2()).trace(TEXT, IMAGE)
    with pytest.raises(InputError, match="lie on no grid, because Idefics2PerceiverResampler"):
        run.image_grids
    assert len(run.image_tokens[0]) == 4


def test_an_ambiguous_grid(llava):
    values = bare_inputs(llava.processor)
    with llava.trace(values) as run:
        run.stop()
    run._inputs.values["pixel_values"] = torch.zeros(1, 3, 24, 24)
    with pytest.raises(InputError, match="on the image are unknown"):
        run.image_grids


# Images


def as_png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def test_images_in_every_form(llava, tmp_path):
    path = tmp_path / "image.png"
    IMAGE.save(path)
    whole = torch.as_tensor(np.array(IMAGE))
    forms = {
        "PIL": IMAGE,
        "path": path,
        "text": str(path),
        "list": [IMAGE],
        "tensor": whole.permute(2, 0, 1),
        "fractions": whole.permute(2, 0, 1) / 255,
        "height first": whole,
        "array": np.array(IMAGE),
        "float array": np.array(IMAGE, dtype=np.float64) / 255,
        "batch": whole.permute(2, 0, 1)[None],
        "gray": IMAGE.convert("L"),
        "gray tensor": torch.as_tensor(np.array(IMAGE.convert("L"))),
        "one channel": torch.as_tensor(np.array(IMAGE.convert("L")))[None],
        "with alpha": IMAGE.convert("RGBA"),
    }
    expected = llava.trace(TEXT, IMAGE).result.logits
    for name, form in forms.items():
        assert torch.equal(llava.trace(TEXT, form).result.logits, expected), name


def test_one_image_goes_with_every_text(llava):
    run = llava.trace([TEXT, LONGER], IMAGE)
    expected = llava.trace([TEXT, LONGER], [IMAGE, IMAGE]).result.logits
    assert torch.equal(run.result.logits, expected)


def test_images_are_distributed_by_their_placeholders(llava):
    texts = ["<image> a <image> red", "circle", "the <image>"]
    dealt = llava.trace(texts, [IMAGE, OTHER, IMAGE])
    nested = llava.trace(texts, [[IMAGE, OTHER], None, [IMAGE]])
    assert torch.equal(dealt.result.logits, nested.result.logits)
    assert [len(positions) for positions in dealt.image_tokens] == [32, 0, 16]


def test_a_text_alone(llava):
    net, tokenizer = llava._owner, llava.processor.tokenizer
    run = llava.trace(TEXT)
    assert torch.equal(run.result.logits, net(**tokenizer(TEXT, return_tensors="pt")).logits)
    assert [len(positions) for positions in run.image_tokens] == [0]
    assert run.image_grids == [[]]


def test_inputs_made_by_a_processor(llava):
    values = bare_inputs(llava.processor)
    expected = llava.trace(TEXT, IMAGE)
    for run in (llava.trace(values), llava.trace(**values)):
        assert torch.equal(run.result.logits, expected.result.logits)
        assert torch.equal(run.image_tokens[0], expected.image_tokens[0])
        assert torch.equal(run.image_grids[0][0], expected.image_grids[0][0])


# Placeholders


def test_placeholders_are_those_of_the_chat_template():
    _, processor = vision_language.llava()
    assert placeholder(processor) == "<image>"
    processor.chat_template = CHAT
    assert placeholder(processor) == "<image>\n"
    processor.chat_template = "{{ messages[0]['role'] }}"
    assert placeholder(processor) == "<image>"
    assert placeholder(vision_language.qwen2_vl()[1]) == "<|vision_start|><|image_pad|><|vision_end|>"


def test_a_placeholder_in_the_text_stays_where_it_is(llava):
    run = llava.trace("a red <image> circle", IMAGE)
    assert run.image_tokens[0].tolist() == list(range(4, 20))
    run = llava.trace(["a red <image> circle", LONGER], [IMAGE, OTHER])
    assert [len(positions) for positions in run.image_tokens] == [16, 16]


# Chats


def test_chats(llava, tmp_path):
    llava.processor.chat_template = CHAT
    path = tmp_path / "image.png"
    IMAGE.save(path)
    data = "data:image/png;base64," + base64.b64encode(as_png(IMAGE)).decode()

    def chat(**image):
        return [{"role": "user", "content": [image, {"type": "text", "text": TEXT}]}]

    values = llava.processor.apply_chat_template(
        chat(type="image", image=IMAGE),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    forms = [
        (chat(type="image", image=IMAGE), None),
        (chat(type="image", path=str(path)), None),
        (chat(type="image", url=str(path)), None),
        (chat(type="image_url", image_url={"url": data}), None),
        (chat(type="image"), IMAGE),
        ([{"role": "user", "content": TEXT}], IMAGE),
        ({"role": "user", "content": TEXT}, IMAGE),
        ([chat(type="image", image=IMAGE)], None),
    ]
    for form, images in forms:
        run = llava.trace(form, images)
        assert torch.equal(run.tokens, values["input_ids"]), form
        assert torch.equal(run.result.logits, llava._owner(**values).logits), form
    assert forms[0][0][0]["content"][0]["image"] is IMAGE, "the messages are left as they are"


def test_several_chats(llava):
    llava.processor.chat_template = CHAT
    chats = [[{"role": "user", "content": TEXT}], [{"role": "user", "content": LONGER}]]
    run = llava.trace(chats, [IMAGE, OTHER])
    for chat, image, logits in zip(chats, (IMAGE, OTHER), run.result.logits):
        alone = llava.trace(chat, image).result.logits[0]
        assert torch.allclose(logits[-len(alone) :], alone, atol=1e-5)


# As a language model


def test_seeds(llava):
    given = {"images": IMAGE, "max_new_tokens": 6, "do_sample": True}
    before = torch.get_rng_state()
    texts = [llava.generate(TEXT, seed=seed, **given).text for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(before, torch.get_rng_state())


def test_invokes(llava):
    with llava.trace() as run:
        with run.invoke(TEXT, images=IMAGE) as first:
            hidden = run.layers_output[1]
        with run.invoke(TEXT, images=OTHER) as second:
            run.layers_output[1] = hidden
    assert torch.equal(first.result.logits, second.result.logits)
    assert len(first.image_tokens[0]) == 16
    assert torch.equal(hidden, llava.trace(TEXT, IMAGE).layers_output[1])


def test_edits(llava):
    @llava.edit
    def blind(run):
        run.vision.layers[1].output[:] = 0

    def of(model, image):
        return model.trace(TEXT, image).result.logits

    assert torch.equal(of(blind, IMAGE), of(blind, OTHER))
    assert not torch.equal(of(llava, IMAGE), of(llava, OTHER))


@pytest.mark.parametrize("build", [vision_language.llava, vision_language.qwen2_vl, vision_language.paligemma])
def test_scans(build):
    model = VisionLanguageModel(build())

    def shapes(run):
        return [tuple(run.vision.layers[1].output.shape), tuple(run.layers_output[1].shape), tuple(run.logits.shape)]

    with model.scan(TEXT, images=IMAGE) as run:
        scanned = shapes(run)
    with model.trace(TEXT, images=IMAGE) as run:
        assert scanned == shapes(run)


def test_a_scan_does_not_see_which_images_are_padding():
    with (
        pytest.raises(ScanError, match="asks for the values"),
        VisionLanguageModel(vision_language.idefics3()).scan(TEXT, images=IMAGE) as run,
    ):
        run.logits


def test_gradients_reach_the_pixels(llava):
    values = bare_inputs(llava.processor)
    pixels = values["pixel_values"].clone().requires_grad_()
    values["pixel_values"].requires_grad_()
    with torch.enable_grad():
        with llava.trace(values) as run:
            run.logits[0, -1].max().backward()
        llava._owner(**{**values, "pixel_values": pixels}).logits[0, -1].max().backward()
    assert torch.equal(values["pixel_values"].grad, pixels.grad)
    assert pixels.grad.abs().sum() > 0


def test_a_folder(tmp_path):
    net, processor = vision_language.llava()
    net.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model = VisionLanguageModel(tmp_path)
    assert torch.equal(model.trace(TEXT, IMAGE).result.logits, net(**bare_inputs(processor)).logits)
    assert type(model.processor) is transformers.LlavaProcessor
    other = VisionLanguageModel(net, str(tmp_path))
    assert torch.equal(other.trace(TEXT, IMAGE).result.logits, net(**bare_inputs(processor)).logits)


def test_a_folder_without_a_processor(tmp_path):
    net, processor = vision_language.llava()
    net.save_pretrained(tmp_path)
    model = VisionLanguageModel(tmp_path)
    with pytest.raises(InputError, match=r"text needs a processor, and the model has none: .*\(source, processor\)"):
        model.trace(TEXT, IMAGE)
    assert torch.equal(model.trace(bare_inputs(processor)).result.logits, net(**bare_inputs(processor)).logits)
    processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no processor that can be loaded: OSError"):
        VisionLanguageModel(tmp_path).trace(TEXT, IMAGE)


def test_a_processor_without_a_vocabulary(tmp_path):
    net, processor = vision_language.MODELS["paligemma"]()
    net.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert "has no vocabulary" in refusal(VisionLanguageModel, tmp_path)
    assert "has no vocabulary" in refusal(VisionLanguageModel, net, tmp_path)
    assert "has no vocabulary" in refusal(HFPipeline, "image-text-to-text", model=tmp_path)
    model = HFPipeline("image-text-to-text", model=tmp_path, processor=processor)
    bare = transformers.pipeline("image-text-to-text", model=net, processor=processor)
    given = {"images": IMAGE, "text": placeholder(processor) + TEXT, "generate_kwargs": FOUR}
    assert model.trace(**given).result == bare(**given)


def test_names_chosen_by_the_user(llava):
    net, processor = vision_language.llava()
    model = VisionLanguageModel(net, processor, names={"vision": "model.vision_tower.encoder"})
    assert model.vision._owner is net.model.vision_tower.encoder
    with pytest.raises(InputError, match="no module 'nowhere'"):
        VisionLanguageModel(net, processor, names={"vision": "nowhere"})
    assert "vision = " not in repr(VisionLanguageModel(net, processor, names={"vision": None}))


# Bad input


@pytest.mark.parametrize(
    ("inputs", "images", "match"),
    [
        (None, IMAGE, "images go with a string, .*, not with nothing"),
        (torch.tensor([[3, 4]]), IMAGE, "images go with a string, .*, not with Tensor"),
        ("<image> a <image>", IMAGE, "has 2 placeholders '<image>', but 1 image was passed"),
        ("<image> a", [IMAGE, OTHER], "has 1 placeholder '<image>', but 2 images were passed"),
        ("<image> a", None, "has 1 placeholder '<image>', but no images were passed"),
        (TEXT, "nowhere.png", "there is no image 'nowhere.png'"),
        (TEXT, [], "the list is empty"),
        (TEXT, 3, "an image is a PIL image, .*, not int"),
        (TEXT, [IMAGE, object()], "an image is a PIL image, .*, not object"),
        (TEXT, torch.zeros(2, 8, 8), "has the shape .channels, height, width., not .2, 8, 8."),
        (TEXT, torch.full((3, 8, 8), 2.0), "floats between 0 and 1"),
        (TEXT, torch.full((3, 8, 8), -1), "floats between 0 and 1"),
        ([TEXT, LONGER], [IMAGE] * 3, "3 images for 2 texts"),
        ([TEXT, LONGER], [[IMAGE]], "images were passed for 1 texts, but there are 2"),
        ([{"role": "user", "content": TEXT}], IMAGE, "has no chat template"),
        ({"words": 3}, IMAGE, "not with dict"),
    ],
)
def test_bad_input(llava, inputs, images, match):
    with pytest.raises(InputError, match=match):
        llava.trace(inputs, images)


def test_a_file_that_is_not_an_image(llava, tmp_path):
    path = tmp_path / "image.png"
    path.write_text("no image")
    with pytest.raises(InputError, match="cannot be read: "):
        llava.trace(TEXT, path)


def test_images_in_messages_and_as_an_argument(llava):
    llava.processor.chat_template = CHAT
    chat = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": TEXT}]}]
    with pytest.raises(InputError, match="part of the messages or passed with images="):
        llava.trace(chat, OTHER)
    with pytest.raises(InputError, match="1 placeholder '<image>', but no images"):
        llava.trace([{"role": "user", "content": [{"type": "image"}]}])


def test_an_error_of_the_processor():
    model = VisionLanguageModel(vision_language.paligemma())
    with pytest.raises(InputError, match="PaliGemmaProcessor cannot take this input: `images` are expected"):
        model.trace(TEXT)


def test_texts_without_a_padding_token(llava):
    llava.processor.tokenizer.pad_token = None
    with pytest.raises(InputError, match=r"model.tokenizer.pad_token = model.tokenizer.eos_token"):
        llava.trace([TEXT, LONGER], IMAGE)
    assert llava.trace(TEXT, IMAGE).result is not None


@torch.no_grad()
def test_a_prompt_longer_than_the_context(llava):
    """The language model has rotary embeddings, so it is no error."""
    images = [IMAGE] * 16
    values = llava.processor(text="<image>" * 16 + TEXT, images=images, return_tensors="pt")
    assert values["input_ids"].shape[1] > llava.config.text_config.max_position_embeddings
    assert torch.equal(llava.trace(TEXT, images).result.logits, llava(**values).logits)


@pytest.mark.parametrize("source", ["no/such model", "diffsight/nothing", 3])
def test_no_model(source):
    with pytest.raises(InputError, match="language model"):
        VisionLanguageModel(source)


def test_no_processor():
    net, processor = vision_language.llava()
    with pytest.raises(InputError, match=r"the model has none: VisionLanguageModel\(\(model, processor\)\)"):
        VisionLanguageModel(net).trace(TEXT, IMAGE)
    with pytest.raises(
        InputError, match="a processor has a tokenizer and an image processor; this is a GemmaTokenizer"
    ):
        VisionLanguageModel((net, processor.tokenizer))
    with pytest.raises(InputError, match="one processor"):
        VisionLanguageModel((net, processor), processor)
