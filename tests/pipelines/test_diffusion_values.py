"""Values in diffusion runs: reading and editing, against hooks and patches written by hand."""

import copy
import functools

import pytest
import torch

from diffsight import DiffusionModel, OutOfOrderError
from helpers import SEED, bare_run, draw, drawn, first, hooked, module_at, patched, recorded, same, with_first
from models import diffusion

SD = diffusion.PIPELINES["stable_diffusion"].inputs
TEXT = [name for name, kind in diffusion.ALL_PIPELINES.items() if kind.text_encoder_layer]
LATENT = [name for name, kind in diffusion.ALL_PIPELINES.items() if kind.decode]


@functools.cache
def built(kind):
    return kind.build()


@pytest.fixture
def pipe(kind):
    """Return a pipeline that all tests share: a run leaves nothing behind."""
    return built(kind)


# Reading


def test_reading_a_block_in_every_step(kind, pipe):
    want, calls = bare_run(kind)
    inputs, outputs = [], []
    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        for _ in run.steps:
            block = run[kind.denoiser_block]
            inputs.append(copy.deepcopy(block.inputs))
            outputs.append(copy.deepcopy(block.output))
    assert torch.equal(drawn(run), want)
    first_calls = calls["block"][:: kind.calls_per_step]
    assert len(first_calls) == len(inputs) == kind.steps
    assert same(inputs, [call[0] for call in first_calls])
    assert same(outputs, [call[1] for call in first_calls])
    assert not same(outputs[0], outputs[1])


def test_reading_latents_between_the_steps(kind, pipe):
    want, calls = bare_run(kind)
    noise, latents = [], []
    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        for _ in run.steps:
            noise.append(run.scheduler.step.input.clone())
            latents.append(first(run.scheduler.step.output).clone())
    assert torch.equal(drawn(run), want)
    assert same(noise, [args[0] for (args, _), _ in calls["step"]])
    assert same(latents, [first(output) for _, output in calls["step"]])


@pytest.mark.parametrize("kind", TEXT, indirect=True)
def test_reading_a_layer_of_the_text_encoder(kind, pipe):
    want, calls = bare_run(kind)
    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        seen = copy.deepcopy(run[kind.text_encoder_layer].output)
    assert same(seen, calls["layer"][0][1])
    assert torch.equal(drawn(run), want)


@pytest.mark.parametrize("kind", LATENT, indirect=True)
def test_reading_at_the_vae(kind, pipe):
    want, calls = bare_run(kind)
    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        latents = run.vae.decode.input.clone()
        decoded = copy.deepcopy(run.vae.decode.output)
    ((args, _), output), *_ = calls["decode"]
    assert same((latents, decoded), (args[0], output))
    assert torch.equal(drawn(run), want)


@pytest.mark.parametrize("kind", ["img2img", "inpaint"], indirect=True)
def test_reading_what_the_vae_encodes(kind, pipe):
    with recorded(pipe.vae, "encode") as calls:
        draw(pipe, kind.inputs())
    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        for call, ((args, _), output) in enumerate(calls):
            assert torch.equal(run.vae.encode.calls[call].input, args[0])
            assert torch.equal(run.vae.encode.calls[call].output.latent_dist.mean, output.latent_dist.mean)


def test_reading_the_prompt_embeddings(sd):
    want = sd.encode_prompt("a red circle", "cpu", 1, True)
    ids = sd.tokenizer("a red circle", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with DiffusionModel(sd).generate("a red circle", num_inference_steps=1, seed=SEED) as run:
        tokens = run.tokenizer.output.input_ids.clone()
        encoded = run.encode_prompt.output
    assert torch.equal(tokens, ids)
    assert same(encoded, want)


# Editing: each equals a hook, or a patch, written by hand


@pytest.mark.parametrize("kind", TEXT, indirect=True)
def test_editing_a_layer_of_the_text_encoder(kind, pipe):
    (plain, _), calls = bare_run(kind), []

    def double(module, args, output):
        calls.append(None)
        return with_first(output, first(output) * 2) if len(calls) == 1 else output  # the prompt comes first

    with hooked(module_at(pipe, kind.text_encoder_layer), double):
        want = draw(pipe, kind.inputs())
    assert not torch.equal(want, plain)

    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        output = run[kind.text_encoder_layer].output
        run[kind.text_encoder_layer].output = with_first(output, first(output) * 2)
    assert torch.equal(drawn(run), want)


def test_editing_a_block_in_step_1_alone(kind, pipe):
    (plain, _), calls = bare_run(kind), []

    def negate(module, args, output):
        calls.append(None)
        chosen = len(calls) == 1 + kind.calls_per_step
        return with_first(output, -first(output)) if chosen else output

    with hooked(module_at(pipe, kind.denoiser_block), negate):
        want = draw(pipe, kind.inputs())
    assert not torch.equal(want, plain)

    def replace(block):
        block.output = with_first(block.output, -first(block.output))

    def edit_in_place(block):
        first(block.output).neg_()

    for edit in (replace, edit_in_place):
        with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
            for step in run.steps:
                if step.index == 1:
                    edit(run[kind.denoiser_block])
        assert torch.equal(drawn(run), want), edit.__name__


def test_editing_the_inputs_of_a_block_in_step_1(kind, pipe):
    (plain, _), calls = bare_run(kind), []

    def halve(original, *args, **kwargs):
        calls.append(None)
        if len(calls) == 1 + kind.calls_per_step:
            if args:
                args = (args[0] / 2, *args[1:])
            else:
                kwargs = {**kwargs, next(iter(kwargs)): next(iter(kwargs.values())) / 2}
        return original(*args, **kwargs)

    with patched(module_at(pipe, kind.denoiser_block), "forward", halve):
        want = draw(pipe, kind.inputs())
    assert not torch.equal(want, plain)

    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        for step in run.steps:
            if step.index == 1:
                run[kind.denoiser_block].input = run[kind.denoiser_block].input / 2
    assert torch.equal(drawn(run), want)


@pytest.mark.parametrize("point", ["input", "output"])
def test_editing_a_step_of_the_scheduler(kind, pipe, point):
    (plain, _), calls = bare_run(kind), []

    def scale(original, noise, *args, **kwargs):
        calls.append(None)
        if len(calls) != 2:
            return original(noise, *args, **kwargs)
        if point == "input":
            return original(noise * 0.5, *args, **kwargs)
        output = original(noise, *args, **kwargs)
        return with_first(output, first(output) * 0.5)

    with patched(pipe.scheduler, "step", scale):
        want = draw(pipe, kind.inputs())
    assert not torch.equal(want, plain)

    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        for step in run.steps:
            if step.index == 1 and point == "input":
                run.scheduler.step.input = run.scheduler.step.input * 0.5
            elif step.index == 1:
                output = run.scheduler.step.output
                run.scheduler.step.output = with_first(output, first(output) * 0.5)
    assert torch.equal(drawn(run), want)


@pytest.mark.parametrize("kind", LATENT, indirect=True)
def test_editing_what_the_vae_decodes(kind, pipe):
    (plain, _), seen = bare_run(kind), []

    def flip(original, latents, *args, **kwargs):
        seen.append(latents.flip(-1))
        return original(seen[0], *args, **kwargs)

    with patched(pipe.vae, "decode", flip):
        want = draw(pipe, kind.inputs())
    assert not torch.equal(want, plain)

    for ahead in (False, True):
        with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
            run.vae.decode.input = seen[0] if ahead else run.vae.decode.input.flip(-1)
        assert torch.equal(drawn(run), want), f"{ahead=}"


@pytest.mark.parametrize("kind", LATENT, indirect=True)
def test_skipping_the_vae(kind, pipe):
    want, calls = bare_run(kind)
    ((_, decoded),) = calls["decode"]
    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED + 1) as run:
        run.vae.decode.skip(decoded)
    assert torch.equal(drawn(run), want)  # decoded in another run


def test_editing_the_prompt_embeddings(sd):
    inputs = SD()
    other = {**inputs, "prompt": "a green square"}
    want, encoded = draw(sd, other), sd.encode_prompt(other["prompt"], "cpu", 1, True)
    assert not torch.equal(want, draw(sd, inputs))
    with DiffusionModel(sd).generate(**inputs, seed=SEED) as run:
        run.encode_prompt.output = encoded
    assert torch.equal(run.images, want)


def test_editing_the_tokens(sd):
    red, green = (sd.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("red", "green"))
    want = draw(sd, {**SD(), "prompt": SD()["prompt"].replace("red", "green")})
    with DiffusionModel(sd).generate(**SD(), seed=SEED) as run:
        ids = run.tokenizer.output.input_ids
        ids[ids == red] = green
    assert torch.equal(run.images, want)


def test_a_value_of_a_step_that_has_ended_is_too_late(sd):
    with DiffusionModel(sd).generate(**SD(), seed=SEED) as run:
        for step in run.steps:
            if step.index == 1:
                _ = run.scheduler.step.output
                with pytest.raises(OutOfOrderError, match=r"unet\.mid_block\.output"):
                    _ = run.unet.mid_block.output
                with pytest.raises(OutOfOrderError, match=r"text_encoder"):
                    _ = run.text_encoder.layers[0].output
