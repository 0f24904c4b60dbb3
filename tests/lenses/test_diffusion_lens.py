"""The diffusion lens against plain diffusers: each layer's hidden state put into the final norm by hand."""

import copy
import io
import json
import platform
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffsight import DiffusionModel, diffusion_lens
from diffsight.errors import InputError
from diffsight.lenses.diffusion_lens import DiffusionLensResult
from diffsight.pipelines.diffusion.prompts import PromptWarning
from helpers import close_image, draw, refusal, same_image
from models import diffusion

PROMPT = "a red circle above a blue square"
CLIP = ("encoder.layers", "final_layer_norm")
T5 = ("encoder.block", "encoder.final_layer_norm")
GEMMA = ("layers", "norm")
# Pipelines that draw from the final norm of their text encoder; where it has its layers and that norm.
KINDS = {
    "stable_diffusion": CLIP,
    "img2img": CLIP,
    "controlnet": CLIP,
    "latent_consistency": CLIP,
    "deepfloyd_if": T5,
    "pixart_sigma": T5,
    "sana": GEMMA,
}
LAYERS = ("embedding", 0, 1, 2)
LAST = 2


def arguments_of(name):
    """Return the arguments of a call without the prompt, for a pipeline that draws PIL images."""
    drop = ("prompt", "output_type")
    return {key: value for key, value in diffusion.PIPELINES[name].inputs().items() if key not in drop}


SD = arguments_of("stable_diffusion")


@pytest.fixture(params=KINDS)
def name(request):
    return request.param


def draw_image(pipe, seed, **arguments):
    return draw(pipe, {"prompt": PROMPT, **arguments}, seed)[0]


def draw_by_hand(pipe, paths, layer, seed, **arguments):
    """Draw the image from one layer with PyTorch hooks: the layer's output for the prompt goes into the norm."""
    layers, norm = (pipe.text_encoder.get_submodule(path) for path in paths)
    taken, replaced = [], []

    def take_output(module, args, output):
        taken.append(output[0] if isinstance(output, tuple) else output)

    def take_input(module, args, kwargs):
        taken.append(args[0] if args else kwargs["hidden_states"])

    def put(module, args):
        replaced.append(None)
        if len(replaced) == 1:  # the prompt comes first, then the negative prompt
            return (taken[0],)

    hooks = [norm.register_forward_pre_hook(put)]
    if layer == "embedding":
        hooks.append(layers[0].register_forward_pre_hook(take_input, with_kwargs=True))
    else:
        hooks.append(layers[layer].register_forward_hook(take_output, prepend=True))
    try:
        return draw_image(pipe, seed, **arguments)
    finally:
        for hook in hooks:
            hook.remove()


def watched(pipe):
    """Return a model, and the list of components that have run."""
    ran = []
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            part.register_forward_hook(lambda module, args, output, name=name: ran.append(name))
    return DiffusionModel(pipe), ran


def lens_refusal(pipe, *args, **kwargs):
    """Return the message of an invalid call of the lens, and check that the denoiser has not run."""
    model, ran = watched(pipe)
    message = refusal(diffusion_lens, model, *args, progress=False, **kwargs)
    assert not {"unet", "transformer", "vae"} & set(ran)
    return message


# Images


def test_every_layer_as_by_hand(name):
    pipe, arguments = diffusion.PIPELINES[name].build(), arguments_of(name)
    wanted = [draw_by_hand(pipe, KINDS[name], layer, 3, **arguments) for layer in LAYERS]
    model = DiffusionModel(pipe)
    for size, alike in ((1, same_image), (None, close_image)):
        result = diffusion_lens(model, PROMPT, seed=3, batch_size=size, progress=False, **arguments)
        assert result.layers == LAYERS
        assert len(result.images) == 4
        for image, wanted_image in zip(result.images, wanted, strict=True):
            assert alike(image, wanted_image)
    assert not close_image(wanted[1], wanted[-1])  # the layer makes a difference


def test_the_last_layer_is_the_plain_image(name):
    pipe, arguments = diffusion.PIPELINES[name].build(), arguments_of(name)
    result = diffusion_lens(DiffusionModel(pipe), PROMPT, layers=LAST, seed=4, progress=False, **arguments)
    assert same_image(result.images[0], draw_image(pipe, 4, **arguments))


def test_all_layers_are_rows_of_one_call(sd):
    model, calls = DiffusionModel(sd), []
    hook = sd.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    try:
        diffusion_lens(model, PROMPT, seed=0, progress=False, **{**SD, "guidance_scale": 1.0})
    finally:
        hook.remove()
    assert set(calls[1:]) == {len(LAYERS)}, "after the encoding, which stops at the first call"


def test_a_seed_is_the_same_for_all_layers(sd):
    model = DiffusionModel(sd)
    both = diffusion_lens(model, PROMPT, layers=[0, 1], seed=5, progress=False, **SD)
    alone = diffusion_lens(model, PROMPT, layers=[1], seed=5, progress=False, **SD)
    other = diffusion_lens(model, PROMPT, layers=[1], seed=6, progress=False, **SD)
    assert close_image(both.images[1], alone.images[0])
    assert not close_image(other.images[0], alone.images[0])


def test_a_negative_prompt_is_encoded_in_full(sd):
    arguments = {**SD, "negative_prompt": "a green square"}
    wanted = draw_by_hand(sd, CLIP, 0, 0, **arguments)
    assert not same_image(wanted, draw_by_hand(sd, CLIP, 0, 0, **SD))
    result = diffusion_lens(DiffusionModel(sd), PROMPT, layers=0, progress=False, **arguments)
    assert same_image(result.images[0], wanted)


def test_a_prompt_before_an_instruction():
    """Sana puts an instruction before its prompt, and removes its encoding."""
    pipe, arguments = diffusion.PIPELINES["sana"].build(), arguments_of("sana")
    arguments |= {"complex_human_instruction": ["a photo of the"]}
    wanted = [draw_by_hand(pipe, GEMMA, layer, 0, **arguments) for layer in (0, LAST)]
    assert not close_image(*wanted)
    result = diffusion_lens(DiffusionModel(pipe), PROMPT, layers=[0, LAST], progress=False, **arguments)
    assert all(map(close_image, result.images, wanted))


# Layers


@pytest.fixture(scope="module")
def drawn_by_hand():
    pipe = diffusion.stable_diffusion()
    return {layer: draw_by_hand(pipe, CLIP, layer, 0, **SD) for layer in LAYERS}


@pytest.mark.parametrize(
    "layers, numbers",
    [
        (None, LAYERS),
        (2, (2,)),
        (0, (0,)),
        (-1, (2,)),
        (-3, (0,)),
        ("embedding", ("embedding",)),
        ([2, 0], (2, 0)),
        ((1, "embedding", -1, 1), (1, "embedding", 2)),
        (range(0, 3, 2), (0, 2)),
        ((layer for layer in (0, 2)), (0, 2)),
        (slice(None), (0, 1, 2)),
        (slice(None, None, 2), (0, 2)),
        (slice(1, 3), (1, 2)),
        (slice(-2, None), (1, 2)),
        (["embedding", slice(1, None), 0], ("embedding", 1, 2, 0)),
    ],
)
def test_layers_are_chosen(sd, drawn_by_hand, layers, numbers):
    result = diffusion_lens(DiffusionModel(sd), PROMPT, layers=layers, progress=False, **SD)
    assert result.layers == numbers
    for layer, image in zip(numbers, result.images, strict=True):
        assert close_image(image, drawn_by_hand[layer])


@pytest.mark.parametrize("layers", [3, -4, [0, 3], [1.0], ["1"], [True], range(2, 5), "1,2", "embeddings"], ids=repr)
def test_layers_that_do_not_exist(sd, layers):
    message = lens_refusal(sd, PROMPT, layers=layers, **SD)
    assert "there is no layer" in message
    assert 'choose from "embedding" and 0 to 2' in message


@pytest.mark.parametrize("layers", [[], slice(4, 9), slice(2, 2), range(0)], ids=repr)
def test_no_layers(sd, layers):
    message = lens_refusal(sd, PROMPT, layers=layers, **SD)
    assert "no layers" in message or "goes past the last layer" in message
    assert 'choose from "embedding" and 0 to 2' in message


def test_a_slice_with_a_step_of_zero(sd):
    assert "step" in lens_refusal(sd, PROMPT, layers=slice(0, 3, 0), **SD)


# What cannot be drawn


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt(sd, prompt):
    assert "empty" in lens_refusal(sd, prompt, **SD)


@pytest.mark.parametrize("prompt", [[PROMPT], None, 3], ids=repr)
def test_a_prompt_that_is_not_a_string(sd, prompt):
    assert f"not {type(prompt).__name__}" in lens_refusal(sd, prompt, **SD)


def test_a_prompt_that_is_too_long(sd):
    assert "'blue square'" in lens_refusal(sd, "red " * 75 + "blue square", **SD)


@pytest.mark.parametrize("seed", [-1, 0.5, "1"], ids=repr)
def test_an_invalid_seed(sd, seed):
    assert repr(seed) in lens_refusal(sd, PROMPT, seed=seed, **SD)


def test_arguments_that_do_not_fit(sd):
    assert "num_images_per_prompt" in lens_refusal(sd, PROMPT, num_images_per_prompt=2, **SD)
    assert "generator" in lens_refusal(sd, PROMPT, generator=torch.Generator(), **SD)
    flux = diffusion.PIPELINES["flux"].build()
    assert "did you mean 'guidance_scale'" in lens_refusal(flux, PROMPT, layers=[1], guidance_scal=3.0)


def test_a_pipeline_without_a_text_encoder():
    message = lens_refusal(diffusion.ddpm(), PROMPT)
    assert "needs a text encoder, but DDPMPipeline has none" in message


def test_an_invalid_model(sd):
    with pytest.raises(InputError, match="takes a DiffusionModel, not StableDiffusionPipeline"):
        diffusion_lens(sd, PROMPT)


def test_unknown_words_are_warned_of_once_at_the_users_line():
    model = DiffusionModel(diffusion.PIPELINES["pixart_sigma"].build())
    with pytest.warns(PromptWarning) as seen:
        diffusion_lens(model, "a red 北京", layers=[0, 1, -1], progress=False, **arguments_of("pixart_sigma"))
    assert [warning.filename for warning in seen if warning.category is PromptWarning] == [__file__]


# Nothing is left


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl"])
def test_nothing_is_left_on_the_pipeline(name, capsys):  # after an image, and after an error half way
    pipe, arguments = diffusion.PIPELINES[name].build(), arguments_of(name)
    draw_image(pipe, 0, **arguments)
    pipe.set_progress_bar_config(desc="denoising", leave=False)
    attributes = set(vars(pipe))
    with suppress(InputError):
        diffusion_lens(DiffusionModel(pipe), PROMPT, layers=[1], progress=False, **arguments)
    assert pipe._progress_bar_config == {"desc": "denoising", "leave": False}
    assert set(vars(pipe)) == attributes
    assert "denoising" not in capsys.readouterr().err
    assert all(not module._forward_pre_hooks for module in pipe.text_encoder.modules())
    draw_image(pipe, 0, **arguments)
    assert "denoising" in capsys.readouterr().err


def test_a_pipeline_whose_progress_bar_was_never_set_shows_it_afterwards(sd, capsys):
    del sd._progress_bar_config
    diffusion_lens(DiffusionModel(sd), PROMPT, layers=[1], progress=False, **SD)
    assert "it/s" not in capsys.readouterr().err
    draw_image(sd, 0, **SD)
    assert "3/3" in capsys.readouterr().err


def test_a_progress_bar_over_the_layers(sd, capsys, monkeypatch):
    monkeypatch.setattr(sd, "_progress_bar_config", {}, raising=False)  # other tests have turned it off
    diffusion_lens(DiffusionModel(sd), PROMPT, layers=["embedding", 1], **SD)
    shown = capsys.readouterr().err
    assert "2 layers" in shown  # one bar for both, which counts the denoising steps
    assert shown.count(" 0/3 ") == 1
    assert "3/3" in shown


def test_the_model_can_be_used_on(sd):
    model = DiffusionModel(sd)
    diffusion_lens(model, PROMPT, progress=False, **SD)
    assert same_image(model.generate(PROMPT, seed=1, **SD).images[0], draw_image(sd, 1, **SD))


# The result


@pytest.fixture(scope="module")
def result(saved_pipeline):
    return diffusion_lens(
        DiffusionModel(saved_pipeline), PROMPT, layers=["embedding", 0, -1], seed=7, progress=False, **SD
    )


def test_the_result_records_its_inputs(saved_pipeline, result):
    assert isinstance(result, DiffusionLensResult)
    assert all(isinstance(image, Image.Image) and image.size == (32, 32) for image in result.images)
    assert (result.layers, result.prompt, result.seed) == (("embedding", 0, 2), PROMPT, 7)
    assert (result.model, result.arguments) == (str(saved_pipeline), SD)
    with pytest.raises(AttributeError):
        result.seed = 8
    assert PROMPT in repr(result)


def test_the_grid_shows_every_image(result):
    cells = [np.asarray(image.resize((192, 192), Image.NEAREST)) for image in result.images]
    grid = np.asarray(result.grid())
    assert result.grid().mode == "RGB"
    assert grid.shape[1] == 3 * 192 + 4 * 16  # 16 pixels around each
    assert grid.shape[0] > 192 + 2 * 16  # and titles
    for column, cell in enumerate(cells):
        left = 16 + column * 208
        strip = grid[:, left : left + 192]
        assert any(np.array_equal(strip[top : top + 192], cell) for top in range(len(grid) - 191))


def test_the_grid_of_one_image(result):
    one = DiffusionLensResult(result.images[:1], (0,), PROMPT, 7, result.model, SD)
    assert one.grid().width == 192 + 2 * 16


def test_the_plot_names_the_layers(result):
    figure = result.plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == ["embedding", "layer 0", "layer 2"]
    for axes, image in zip(shown, result.images, strict=True):
        assert np.array_equal(axes.images[0].get_array(), np.asarray(image))
    assert figure.get_suptitle() == PROMPT
    figure.savefig(io.BytesIO(), format="png")


def test_the_plot_of_many_images_has_rows():
    images = tuple(Image.new("RGB", (8, 8), (20 * i, 0, 0)) for i in range(13))
    figure = DiffusionLensResult(images, ("embedding", *range(12)), PROMPT, 0, "", {}).plot()
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == ["embedding", *(f"layer {layer}" for layer in range(12))]
    rows = {axes.get_subplotspec().rowspan.start for axes in shown}
    assert len(rows) == 2


def test_notebooks_show_the_grid(result):
    data = result._repr_png_()
    assert data.startswith(b"\x89PNG")
    assert same_image(Image.open(io.BytesIO(data)), result.grid())


# Saving

FILES = {"grid.png", "embedding.png", "layer_00.png", "layer_02.png", "lens.json", "page.html", "thumbnail.jpg"}


def test_exactly_these_files_are_written(result, tmp_path):
    paths = result.save(tmp_path / "deep" / "lens")
    assert {path.name for path in (tmp_path / "deep" / "lens").iterdir()} == FILES
    assert {path.relative_to(tmp_path / "deep" / "lens").name for path in paths} == FILES
    assert all(path.is_file() for path in paths)
    for name, image in zip(("embedding", "layer_00", "layer_02"), result.images, strict=True):
        assert same_image(Image.open(tmp_path / "deep" / "lens" / f"{name}.png"), image)
    assert same_image(Image.open(tmp_path / "deep" / "lens" / "grid.png"), result.grid())


def test_the_run_is_repeated_from_its_record(result, tmp_path):
    result.save(tmp_path)
    record = json.loads((tmp_path / "lens.json").read_text(encoding="utf-8"))
    assert record["lens"] == "diffusion_lens"
    versions = {"python": platform.python_version()}
    versions |= {package: version(package) for package in ("diffsight", "torch", "diffusers", "transformers")}
    assert record["versions"] == versions
    again = diffusion_lens(
        DiffusionModel(record["model"]),
        record["prompt"],
        layers=record["layers"],
        seed=record["seed"],
        progress=False,
        **record["arguments"],
    )
    assert again.layers == result.layers
    assert all(map(same_image, again.images, result.images))


def test_a_prompt_in_another_script_is_recorded_verbatim(result, tmp_path):
    prompt = "ein roter Kreis über 北京"
    DiffusionLensResult(result.images, result.layers, prompt, 7, result.model, SD).save(tmp_path)
    text = (tmp_path / "lens.json").read_text(encoding="utf-8")
    assert prompt in text
    assert json.loads(text)["prompt"] == prompt


def test_saving_again_replaces_the_files(result, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result.save(tmp_path)
    (tmp_path / "grid.png").write_bytes(b"old")
    result.save(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "notes.txt"}
    assert same_image(Image.open(tmp_path / "grid.png"), result.grid())


class Unwritable(Image.Image):
    """An image whose file cannot be written, as on a full disk."""

    def save(self, *_, **__):
        raise OSError(28, "No space left on device")


def unwritable(result):
    images = [copy.copy(image) for image in result.images]
    images[-1].__class__ = Unwritable
    return DiffusionLensResult(tuple(images), result.layers, PROMPT, 7, result.model, SD)


def test_a_save_that_fails_leaves_no_folder(result, tmp_path):
    with pytest.raises((OSError, InputError), match="No space left"):
        unwritable(result).save(tmp_path / "deep" / "lens")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_the_files_of_before(result, tmp_path):
    result.save(tmp_path)
    (tmp_path / "grid.png").write_bytes(b"old")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises((OSError, InputError), match="No space left"):
        unwritable(result).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_something_in_the_way_of_a_file_is_found_before_any_is_written(result, tmp_path):
    (tmp_path / "lens.json").mkdir()
    with pytest.raises(InputError, match=r"lens\.json"):
        result.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lens.json"]


@pytest.mark.parametrize("place", ["file", "file/deeper"])
def test_a_folder_that_cannot_be_made(result, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot be written") as error:
        result.save(tmp_path / place)
    assert str(tmp_path / place) in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_the_users_home(result, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    result.save("~/lens")
    assert {path.name for path in (tmp_path / "lens").iterdir()} == FILES


# The packaged pipeline


def test_all_layers_of_the_packaged_pipeline_in_one_call():
    model = DiffusionModel("diffsight/shapes-clip")
    model.set_progress_bar_config(disable=True)
    result = diffusion_lens(model, PROMPT, seed=2, progress=False, num_inference_steps=2)
    assert result.layers == ("embedding", *range(12))
    for layer, image in zip(result.layers, result.images, strict=True):
        assert close_image(image, draw_by_hand(model.pipeline, CLIP, layer, 2, num_inference_steps=2))


def test_the_lens_on_the_packaged_pipeline(tmp_path):
    model = DiffusionModel("diffsight/shapes-clip")
    prompt = "a red circle below a blue square on a gray background"
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptWarning)
        result = diffusion_lens(
            model, prompt, layers=["embedding", 5, 11], seed=1, progress=False, num_inference_steps=4
        )
    model.set_progress_bar_config(disable=True)
    plain = model.generate(prompt, seed=1, num_inference_steps=4).images[0]
    assert close_image(result.images[2], plain) and not close_image(result.images[0], plain)
    alone = diffusion_lens(model, prompt, layers=11, batch_size=1, seed=1, progress=False, num_inference_steps=4)
    assert same_image(alone.images[0], plain)  # bit for bit
    result.save(tmp_path)
    assert json.loads(Path(tmp_path, "lens.json").read_text(encoding="utf-8"))["model"] == "diffsight/shapes-clip"


def test_an_image_by_its_layer():
    model = DiffusionModel(diffusion.stable_diffusion())
    result = diffusion_lens(model, PROMPT, layers=["embedding", 1], num_inference_steps=1, progress=False)
    assert result["embedding"] is result.images[0] and result[1] is result.images[1]
    with pytest.raises(InputError, match="the result does not have layer 0: it has embedding, 1"):
        result[0]
