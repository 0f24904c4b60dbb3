"""Weights are loaded when they are needed: what works without them, what loads them, and that nothing is lost."""

import shutil

import diffusers
import pytest
import torch
from torch import nn

from diffsight import DiffusionModel
from diffsight.errors import InputError
from helpers import draw
from models import diffusion

CLIP = "diffsight/shapes-clip"
SD = diffusion.PIPELINES["stable_diffusion"]
MODULES = ("text_encoder", "unet", "vae")


@pytest.fixture
def model(saved_pipeline, loads):
    return DiffusionModel(saved_pipeline)


def without_progress_bar(model):
    model.set_progress_bar_config(disable=True)
    return model


def weights(pipe):
    return {f"{name}.{key}": value for name in MODULES for key, value in getattr(pipe, name).state_dict().items()}


# Without weights


def test_opening_a_pipeline_reads_no_weights(model, loads):
    assert loads == []
    assert all(parameter.is_meta for name in MODULES for parameter in model[name]._owner.parameters())


@pytest.mark.parametrize(
    "look",
    [
        print,
        dir,
        lambda model: model.unet.config.sample_size,
        lambda model: model.unet.dtype,
        lambda model: model.text_encoder.layers[1].self_attn,
        lambda model: len(model.text_encoder.layers),
        lambda model: model.tokenizer("a red circle"),
        lambda model: model.scheduler.set_timesteps(3),
        lambda model: model.vae_scale_factor,
        without_progress_bar,
        lambda model: model.scan(**SD.inputs(), seed=0).result,
        lambda model: model.generate(**SD.inputs(), seed=0),  # nothing runs before it is asked for
    ],
    ids=lambda look: getattr(look, "__name__", None),
)
def test_looking_needs_no_weights(model, loads, look):
    look(model)
    assert loads == []


def test_the_tree_is_that_of_the_loaded_pipeline(model):
    told = repr(model)
    assert "weights: not loaded yet" in told
    assert "not loaded" not in repr(DiffusionModel(diffusion.stable_diffusion()))
    live = repr(DiffusionModel(model.pipeline))
    assert told.replace("\nweights: not loaded yet, the first run loads them", "") == live == repr(model)


def test_opening_the_packaged_pipeline_reads_no_weights(loads):
    """None of its 6 million parameters is in memory."""
    model = DiffusionModel(CLIP)
    parameters = [parameter for name in MODULES for parameter in model[name]._owner.parameters()]
    assert loads == []
    assert sum(parameter.numel() for parameter in parameters) > 5_000_000
    assert all(parameter.is_meta for parameter in parameters)


def test_a_repository_of_the_hub(saved_pipeline, tmp_path, loads):
    """In the layout of the hub's cache on disk."""
    revision = "a" * 40
    repository = tmp_path / "models--owner--name"
    shutil.copytree(saved_pipeline, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    model = without_progress_bar(DiffusionModel("owner/name", cache_dir=str(tmp_path), local_files_only=True))
    assert model.scan(**SD.inputs(), seed=3).result.images.shape == (1, 3, diffusion.SIDE, diffusion.SIDE)
    assert loads == []
    assert torch.equal(model.generate(**SD.inputs(), seed=3).images, draw(diffusion.stable_diffusion(), SD.inputs()))
    assert len(loads) == 3


# What brings them


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.generate(**SD.inputs(), seed=0).images,
        lambda model: model.generate(**SD.inputs(), seed=0).unet.input,
        lambda model: model.generate(**SD.inputs(), seed=0).result,
        lambda model: model(**SD.inputs()),
        lambda model: model.pipeline,
        lambda model: model.to("cpu"),
        lambda model: model.text_encoder(torch.tensor([[0, 1]])),
        lambda model: model.text_encoder.layers[0].mlp(torch.zeros(1, 2, diffusion.WIDTH)),
        lambda model: model.encode_prompt("a red circle", "cpu", 1, False),
        lambda model: model.unet.conv_in.weight,
        lambda model: model.unet.state_dict(),
        lambda model: model.unet.device,
        lambda model: model.device,
        lambda model: model.components,
    ],
)
def test_using_the_model_loads_them(model, loads, use):
    use(without_progress_bar(model))
    assert sorted(loads) == ["AutoencoderKL", "CLIPTextModel", "UNet2DConditionModel"]
    use(model)
    assert len(loads) == 3, "they are loaded once"
    plain = weights(diffusion.stable_diffusion())
    assert plain.keys() == weights(model.pipeline).keys()
    assert all(torch.equal(value, plain[name]) for name, value in weights(model.pipeline).items())


def test_at_once(saved_pipeline, loads):
    model = DiffusionModel(saved_pipeline, dispatch=True)
    assert len(loads) == 3
    assert "not loaded" not in repr(model)


def test_a_live_pipeline_is_taken_as_it_is(loads):
    pipe = diffusion.stable_diffusion()
    for dispatch in (False, True):
        assert DiffusionModel(pipe, dispatch=dispatch).pipeline is pipe
    assert loads == []


def test_attributes_are_those_of_the_loaded_modules(model):
    assert model.device == model.unet.device == torch.device("cpu")
    plain = diffusion.stable_diffusion()
    assert torch.equal(model.unet.conv_in.weight, plain.unet.conv_in.weight)


# Nothing is lost


def test_a_run_gives_the_bits_of_the_plain_pipeline(model):
    assert torch.equal(
        without_progress_bar(model).generate(**SD.inputs(), seed=3).images,
        draw(diffusion.stable_diffusion(), SD.inputs()),
    )


@pytest.mark.parametrize("name", ["stable_diffusion_3", "pixart_sigma", "sana", "wan", "cogvideox", "ltx", "flux"])
def test_other_pipelines(tmp_path, name):
    """T5 with tied embeddings, tables of rotations that are in no file, types of weights that stay float32."""
    kind = diffusion.PIPELINES[name]
    kind.build().save_pretrained(tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    model = without_progress_bar(DiffusionModel(tmp_path))
    scanned = model.scan(**kind.inputs(), seed=3)
    result = model.generate(**kind.inputs(), seed=3)
    plain = pipe(**kind.inputs(), generator=torch.Generator().manual_seed(3))
    assert torch.equal(result.frames if kind.video else result.images, plain[0])
    assert scanned.result[0].shape == plain[0].shape
    for part in model.pipeline.components.values():
        if isinstance(part, nn.Module):
            assert not any(tensor.is_meta for tensor in (*part.parameters(), *part.buffers()))
            assert not part.training


def test_handles_taken_before_name_the_loaded_modules(model):
    block, layers, decode = model.unet.mid_block, list(model.text_encoder.layers), model.vae.decode
    modules = dict(model.unet._owner.named_modules())
    with without_progress_bar(model).generate(**SD.inputs(), seed=3) as run:
        seen = [layers[1].output.clone(), block.output.clone(), decode.input.clone()]
    assert all(module is modules[path] for path, module in model.pipeline.unet.named_modules())
    assert block._owner is model.pipeline.unet.mid_block
    with DiffusionModel(diffusion.stable_diffusion()).generate(**SD.inputs(), seed=3) as run:
        plain = [run.text_encoder.layers[1].output, run.unet.mid_block.output, run.vae.decode.input]
        assert all(torch.equal(a, b) for a, b in zip(seen, plain))


def test_a_component_exchanged_before_is_kept(model, loads, saved_pipeline):
    scheduler = diffusers.EulerDiscreteScheduler.from_config(model.scheduler.config)
    model.scheduler = scheduler
    other = diffusion.vae(seed=9)
    model.vae = other
    images = without_progress_bar(model).generate(**SD.inputs(), seed=3).images
    assert model.pipeline.scheduler is scheduler and model.pipeline.vae is other
    assert "AutoencoderKL" not in loads
    plain = diffusers.DiffusionPipeline.from_pretrained(saved_pipeline)
    plain.scheduler = diffusers.EulerDiscreteScheduler.from_config(plain.scheduler.config)
    plain.vae = other
    assert torch.equal(images, draw(plain, SD.inputs()))


def test_the_objects_that_are_loaded_at_once_stay(model):
    tokenizer, scheduler = model.tokenizer._owner, model.scheduler._owner
    without_progress_bar(model)
    pipe = model.pipeline
    assert pipe.tokenizer is tokenizer and pipe.scheduler is scheduler
    assert pipe._progress_bar_config == {"disable": True}


@pytest.mark.parametrize("arguments", [{}, {"torch_dtype": torch.float16}, {"torch_dtype": {"unet": torch.float16}}])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_types_are_known_beforehand(tmp_path, arguments, stored):
    diffusion.stable_diffusion().to(stored).save_pretrained(tmp_path)
    model = DiffusionModel(tmp_path, **arguments)
    before = {name: model[name].dtype for name in MODULES}
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **arguments)
    assert before == {name: getattr(plain, name).dtype for name in MODULES}
    assert before == {name: getattr(model.pipeline, name).dtype for name in MODULES}


def test_arguments_that_only_loading_needs(saved_pipeline):
    model = DiffusionModel(saved_pipeline, low_cpu_mem_usage=False, safety_checker=None, variant=None)
    assert torch.equal(
        without_progress_bar(model).generate(**SD.inputs(), seed=3).images,
        draw(diffusion.stable_diffusion(), SD.inputs()),
    )


# Errors


def test_missing_files_are_reported_at_once(saved_pipeline, tmp_path, loads):
    for missing in ("unet/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        folder = tmp_path / missing.replace("/", "_")
        shutil.copytree(saved_pipeline, folder)
        (folder / missing).unlink()
        with pytest.raises(InputError, match=str(folder)):
            DiffusionModel(folder)
    assert loads == []


def test_weights_that_cannot_be_read(saved_pipeline, tmp_path):
    shutil.copytree(saved_pipeline, tmp_path / "pipe")
    file = tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    model = without_progress_bar(DiffusionModel(tmp_path / "pipe"))
    for _ in range(2):
        with pytest.raises(Exception, match=r"(?i)header|safetensors|incomplete"):
            model.generate(**SD.inputs(), seed=3).result
    file.write_bytes(whole)
    assert torch.equal(model.generate(**SD.inputs(), seed=3).images, draw(diffusion.stable_diffusion(), SD.inputs()))
