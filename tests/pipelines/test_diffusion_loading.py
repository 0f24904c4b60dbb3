"""Sources of a DiffusionModel: a packaged name, a folder, a hub id, a live pipeline; and invalid ones."""

import functools
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from diffsight import DiffusionModel, LanguageModel
from diffsight.errors import InputError
from diffsight.pipelines.packaged import FOLDERS, PIPELINES
from helpers import draw, refusal
from models import diffusion

CLIP = "diffsight/shapes-clip"
CALL = diffusion.PIPELINES["stable_diffusion"].inputs


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


# What can be loaded


def test_a_pipeline_whose_weights_are_needed_at_once_is_built_once(monkeypatch):
    built, build = [], diffusers.UNet2DConditionModel.__init__

    def counting(self, *args, **kwargs):
        built.append(self)
        build(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "__init__", functools.wraps(build)(counting))
    model = DiffusionModel(CLIP, dispatch=True)
    assert len(built) == 1 and model.pipeline.unet is built[0]
    assert not any(weight.is_meta for weight in built[0].parameters())


def test_a_live_pipeline_is_taken_as_it_is():
    pipe = diffusion.stable_diffusion()
    model = DiffusionModel(pipe)
    assert model.pipeline is pipe
    assert torch.equal(model.generate(**CALL(), seed=3).images, draw(pipe, CALL()))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder(saved_pipeline, kind):
    model = DiffusionModel(kind(saved_pipeline))
    assert type(model.pipeline) is diffusers.StableDiffusionPipeline
    assert model.source == str(saved_pipeline)
    model.set_progress_bar_config(disable=True)
    assert torch.equal(model.generate(**CALL(), seed=3).images, draw(diffusion.stable_diffusion(), CALL()))


@pytest.mark.parametrize("name", ["pipe", "./pipe", "deeper/pipe", "~/pipe"])
def test_a_folder_in_other_words(saved_pipeline, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "deeper").mkdir()
    for place in ("pipe", "deeper/pipe"):  # "deeper/pipe" might be a hub id: the folder comes first
        (tmp_path / place).symlink_to(saved_pipeline)
    assert type(DiffusionModel(name).pipeline) is diffusers.StableDiffusionPipeline


def test_arguments_go_to_from_pretrained(saved_pipeline):
    scheduler = diffusers.EulerDiscreteScheduler()
    model = DiffusionModel(saved_pipeline, torch_dtype=torch.float64, scheduler=scheduler)
    assert model.unet.dtype == torch.float64
    assert model.pipeline.scheduler is scheduler


def test_a_packaged_name():
    model = DiffusionModel(CLIP)
    assert type(model.pipeline) is diffusers.StableDiffusionPipeline
    assert model.source == CLIP
    assert len(model.text_encoder.layers) == 12


def test_the_packaged_names_are_described():
    assert CLIP in FOLDERS
    assert FOLDERS.keys() == PIPELINES.keys()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_packaged_pipeline_loads_without_a_warning(name, caplog):
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    logger.addHandler(caplog.handler)
    try:
        DiffusionModel(name, dispatch=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


# What can not


@pytest.mark.parametrize("name", ["diffsight/shape-clip", "diffsight/shapes_clip", "shapes-clip", "Shapes-Clip"])
def test_an_unknown_name_near_a_known_one(offline, name):
    message = refusal(DiffusionModel, name)
    assert repr(name) in message
    assert f"did you mean {CLIP!r}" in message


def test_an_unknown_name_near_to_none():
    message = refusal(DiffusionModel, "zzzzzz")
    assert "'zzzzzz'" in message
    assert "did you mean" not in message
    assert f"Known: {CLIP}" in message


def test_a_hub_id_that_is_not_found(offline):
    message = refusal(DiffusionModel, "someone/some-pipeline")
    assert "'someone/some-pipeline'" in message
    assert "hub" in message
    assert CLIP in message


def test_a_hub_id_is_not_taken_for_a_packaged_name(offline):
    assert "did you mean" not in refusal(DiffusionModel, "someone/quite-another-pipeline")


def test_a_near_miss_of_a_packaged_name_that_looks_like_a_hub_id(offline):
    assert f"did you mean {CLIP!r}" in refusal(DiffusionModel, "difsight/shapes-clip")


@pytest.mark.parametrize("kind", [DiffusionModel, LanguageModel])
def test_a_hub_that_cannot_be_reached_is_not_asked_again_and_again(monkeypatch, kind):
    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("diffsight.pipelines.hub_access.getproxies", dict)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it was asked again"))
    assert "The hub cannot be reached, and the model is not in the cache" in refusal(kind, "someone/some-model")


@pytest.mark.parametrize("kind", [DiffusionModel, LanguageModel])
def test_a_link_that_leads_nowhere(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to("moved")
    assert refusal(kind, "model") == "model is a link to moved, which does not exist"


def test_a_folder_that_is_not_a_pipeline(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    message = refusal(DiffusionModel, tmp_path)
    assert str(tmp_path) in message
    assert "model_index.json" in message


def test_a_file(tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"")
    message = refusal(DiffusionModel, file)
    assert str(file) in message
    assert "is a file" in message


def test_a_folder_that_is_not_there(tmp_path):
    assert str(tmp_path / "missing") in refusal(DiffusionModel, tmp_path / "missing")


@pytest.mark.parametrize("index", ["{", "{}", "[]", json.dumps({"_class_name": "NoSuchPipeline"})])
def test_a_folder_with_a_damaged_index(tmp_path, index):
    (tmp_path / "model_index.json").write_text(index)
    assert str(tmp_path) in refusal(DiffusionModel, tmp_path)


@pytest.mark.parametrize("entry", [None, "UNet2DConditionModel", {}, 3, [1, 2], ["diffusers"]])
@pytest.mark.parametrize("part", ["unet", "safety_checker", "_class_name"])
def test_a_wrong_entry_in_an_index(saved_pipeline, tmp_path, part, entry):
    if part == "_class_name" and isinstance(entry, str):
        return
    file = tmp_path / "model_index.json"
    file.write_text(json.dumps(json.loads((saved_pipeline / file.name).read_text()) | {part: entry}))
    if (part, entry) == ("_class_name", ["diffusers"]):
        assert str(tmp_path) in refusal(DiffusionModel, tmp_path)
    else:
        assert f"its index contains {entry!r} for {part!r}" in refusal(DiffusionModel, tmp_path)


def test_an_index_without_a_class(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert "its index has no '_class_name', which names the class" in refusal(DiffusionModel, tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert "names the class 'UNet2DConditionModel', which is not a pipeline" in refusal(DiffusionModel, tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": ["pipeline", "Mine"]}')
    told = "names the class 'Mine' in pipeline.py, and there is no such file"
    assert told in refusal(DiffusionModel, tmp_path)


@pytest.mark.parametrize("target", ["nowhere", "diffusion_pytorch_model.safetensors"], ids=["nowhere", "itself"])
def test_weights_that_are_a_broken_link(saved_pipeline, tmp_path, target):
    shutil.copytree(saved_pipeline, tmp_path / "pipe")
    file = tmp_path / "pipe/unet/diffusion_pytorch_model.safetensors"
    file.unlink()
    file.symlink_to(target)
    assert f"{file} is a broken link: it leads to {target}" in refusal(DiffusionModel, tmp_path / "pipe")


@pytest.mark.parametrize("missing", ["unet", "vae/diffusion_pytorch_model.safetensors", "text_encoder", "tokenizer"])
def test_a_folder_that_lacks_a_part(saved_pipeline, tmp_path, missing):
    folder = tmp_path / "pipe"
    shutil.copytree(saved_pipeline, folder)
    lacking = folder / missing
    shutil.rmtree(lacking) if lacking.is_dir() else lacking.unlink()
    assert str(folder) in refusal(DiffusionModel, folder)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_part_without_a_configuration(saved_pipeline, tmp_path, part):
    """transformers would build the text encoder from its default configuration."""
    shutil.copytree(saved_pipeline, tmp_path / "pipe")
    (tmp_path / "pipe" / part / "config.json").unlink()
    for options in ({}, {"dispatch": True}):
        told = refusal(DiffusionModel, tmp_path / "pipe", **options)
        assert f"there is no config.json in {tmp_path / 'pipe' / part}" in told


@pytest.mark.parametrize("source", [3, None, torch.nn.Linear(1, 1), diffusers.StableDiffusionPipeline])
def test_something_that_names_no_pipeline(source):
    assert f"not {type(source).__name__}" in refusal(DiffusionModel, source)


def test_a_live_pipeline_takes_no_arguments():
    assert "torch_dtype" in refusal(DiffusionModel, diffusion.ddpm(), torch_dtype=torch.float16)


def test_an_empty_name():
    assert "''" in refusal(DiffusionModel, "")


# What must not happen without a word


def without_layer(file, layer):
    weights = load_file(file)
    save_file({name: tensor for name, tensor in weights.items() if f".{layer}." not in name}, file, {"format": "pt"})


def test_weights_that_are_missing_are_listed(tmp_path):
    shutil.copytree(FOLDERS[CLIP], tmp_path / "pipe")
    without_layer(tmp_path / "pipe/text_encoder/model.safetensors", "layers.3")
    model = DiffusionModel(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"CLIPTextModel lacks the weights encoder\.layers\.3\.layer_norm1\.bias, "):
        model.generate("a red circle", seed=0, num_inference_steps=1).finish()


def test_weights_that_are_missing_from_a_model_of_diffusers_are_listed(saved_pipeline, tmp_path):
    shutil.copytree(saved_pipeline, tmp_path / "pipe")
    without_layer(tmp_path / "pipe/unet/diffusion_pytorch_model.safetensors", "resnets.1")
    with pytest.raises(InputError, match=r"UNet2DConditionModel lacks the weights .*resnets\.1\."):
        _ = DiffusionModel(tmp_path / "pipe").pipeline


def test_weights_that_are_missing_from_a_language_model_are_listed(tmp_path):
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    without_layer(tmp_path / "model.safetensors", "h.1")
    with pytest.raises(InputError, match=r"GPT2LMHeadModel lacks the weights transformer\.h\.1\.attn\.c_attn\.bias, "):
        LanguageModel(tmp_path, dispatch=True)


def change_configuration(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_weights_of_another_shape_are_named(tmp_path):
    shutil.copytree(FOLDERS[CLIP], tmp_path / "pipe")
    file = tmp_path / "pipe/text_encoder/config.json"
    size = json.loads(file.read_text())["vocab_size"]
    change_configuration(file, vocab_size=size + 1)
    told = rf"CLIPTextModel .* embeddings\.token_embedding\.weight has the shape \({size}, .* and \({size + 1}, "
    with pytest.raises(InputError, match=told):
        DiffusionModel(tmp_path / "pipe", dispatch=True)


def test_weights_of_another_shape_are_named_for_a_language_model(tmp_path):
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    change_configuration(tmp_path / "config.json", vocab_size=65)
    model = LanguageModel(tmp_path)
    told = r"transformer\.wte\.weight has the shape \(64, 32\) in the files and \(65, 32\) in the model"
    with pytest.raises(InputError, match=told):
        model.trace([1, 2]).finish()


def with_part(folder, entry):
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"safety_checker": entry}))


def test_a_module_that_a_folder_names_is_not_imported(tmp_path, monkeypatch):
    shutil.copytree(FOLDERS[CLIP], tmp_path / "pipe")
    with_part(tmp_path / "pipe", ["of_the_folder", "Checker"])
    (tmp_path / "pipe/of_the_folder.py").write_text("raise SystemExit('the code of the folder ran')")
    monkeypatch.syspath_prepend(tmp_path / "pipe")
    refused = r"'safety_checker' is a Checker of 'of_the_folder', .* trust_remote_code=True"
    with pytest.raises(InputError, match=refused):
        DiffusionModel(tmp_path / "pipe")
    assert "of_the_folder" not in sys.modules


def test_loading_shows_one_bar_at_most_and_no_notice(saved_pipeline):
    """In a process of its own, as the notice is given once."""
    code = (
        "import logging, sys; from diffsight import DiffusionModel; model = DiffusionModel(sys.argv[1])\n"
        "print('opened', file=sys.stderr); model.pipeline\n"
        "from diffusers.utils import logging as ours; from transformers.utils import logging as theirs\n"
        "assert ours.is_progress_bar_enabled() and theirs.is_progress_bar_enabled()\n"
        "assert not logging.getLogger('transformers.utils.import_utils').filters"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    words = [sys.executable, "-c", code, saved_pipeline]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    opening, loading = done.stderr.split("opened\n")
    assert "torchvision" not in done.stderr
    assert opening.strip() == ""
    assert "components" in loading
    assert "Loading weights" not in loading


def test_the_packaged_pipelines_load_without_a_bar(capfd):
    DiffusionModel("diffsight/shapes-clip").pipeline
    assert capfd.readouterr().err.strip() == ""
