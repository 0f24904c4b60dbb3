"""Rows and branches of diffusion runs, against hand-written hooks on the bare pipeline that know where each is."""

import functools
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import diffusers
import pytest
import torch

from diffsight import DiffusionModel, OutOfOrderError
from diffsight.errors import AssignmentError, InputError, NeverReachedError
from helpers import drawn, first
from models import diffusion, text_encoders

PROMPTS = ["a red circle", "a green square below"]
NEGATIVE = ["a photo", "the blue"]
SEED = 5


@dataclass(frozen=True, eq=False)
class Case:
    """A pipeline and the places of its branches: in one batch ("uncond cond", "cond uncond") or in two "calls"."""

    build: object
    order: str
    block: str
    layer: str
    call: dict
    several: str = "num_images_per_prompt"

    def inputs(self, images=1, steps=2, **changes):
        prompts = {"prompt": PROMPTS, "negative_prompt": NEGATIVE, self.several: images}
        return {**self.call, **prompts, "num_inference_steps": steps, **changes}

    def places(self, branch, prompt, images, call):
        """Return the places of the entries in the batch of call number `call` of a step."""
        mine = [i for i in range(2 * images) if prompt in (None, i // images)]
        if self.order == "calls":
            return mine if branch in (None, ("cond", "uncond")[call]) else []
        starts = {name: 2 * images * i for i, name in enumerate(self.order.split())}
        return [start + i for name, start in starts.items() if branch in (None, name) for i in mine]


def case(name, order="uncond cond", **changes):
    kind = diffusion.PIPELINES[name]
    return Case(kind.build, order, kind.denoiser_block, kind.text_encoder_layer, kind.inputs(), **changes)


CASES = {name: case(name) for name in ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "pixart_sigma")}
CASES["flux"] = case("two_call_guidance", "calls")
CASES["wan"] = case("wan", "calls", several="num_videos_per_prompt")
_LUMINA = {"height": 32, "width": 32, "output_type": "pt", "guidance_scale": 4.0, "clean_caption": False}
CASES["lumina"] = Case(text_encoders.lumina, "cond uncond", "transformer.layers.0", "text_encoder.layers.1", _LUMINA)

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
_SIZES = [(name, 2) for name in CASES] + [("stable_diffusion", 1), ("flux", 1)]
each_size = pytest.mark.parametrize(("case", "images"), [(CASES[name], n) for name, n in _SIZES], ids=map(str, _SIZES))
branches = pytest.mark.parametrize("branch", ["cond", "uncond"])


@functools.cache
def built(case):
    """Return the pipeline of a case, which all tests share: a run leaves nothing behind."""
    return case.build()


# By hand


def halve(value, places):
    tensor = first(value)
    tensor[places] = tensor[places] * 0.5


@contextmanager
def changed_at(pipe, path, change):
    """Call `change(output, n)` at the n-th call of a module in the block."""
    component, _, rest = path.partition(".")
    count = iter(range(1000))
    module = getattr(pipe, component).get_submodule(rest)
    handle = module.register_forward_hook(lambda m, a, output: change(output, next(count)), prepend=True)
    try:
        yield
    finally:
        handle.remove()


def draw_changed(case, images=1, **changes):
    """Return what the bare pipeline draws. `changes` maps paths, with __ for dots, to functions that change outputs."""
    pipe = built(case)
    with ExitStack() as stack:
        for path, change in changes.items():
            stack.enter_context(changed_at(pipe, path.replace("__", "."), change))
        return pipe(**case.inputs(images), generator=generators(2 * images))[0]


def generators(count):
    return [torch.Generator().manual_seed(SEED + i) for i in range(count)]


@functools.cache
def drawn_plainly(case, images=1):
    return draw_changed(case, images)


@functools.cache
def outputs_at(case, path, images=1):
    """Return the outputs of a module in all its calls."""
    seen = []
    draw_changed(case, images, **{path.replace(".", "__"): lambda output, n: seen.append(first(output).clone())})
    return seen


def generate(case, images=1, **changes):
    return DiffusionModel(built(case)).generate(**case.inputs(images, **changes), seed=SEED)


# Denoisers


@branches
@each_size
def test_a_branch_reads_its_part(case, branch, images):
    calls = 2 if case.order == "calls" else 1
    seen = outputs_at(case, case.block, images)
    expected = [
        seen[calls * step + call][places]
        for step in range(2)
        for call in range(calls)
        if (places := case.places(branch, None, images, call))
    ]
    with generate(case, images) as run:
        read = [first(getattr(run, branch)[case.block].output).clone() for _ in run.steps]
    assert len(read) == len(expected) and all(map(torch.equal, read, expected))


@branches
@each_size
def test_a_branch_of_a_row_is_edited_in_place(case, branch, images):
    calls = 2 if case.order == "calls" else 1

    def change(output, n):
        halve(output, case.places(branch, 1, images, n % calls))

    with generate(case, images) as run:
        row = getattr(run, branch).rows[1]
        for _ in run.steps:
            first(row[case.block].output)[:] *= 0.5
    expected = draw_changed(case, images, **{case.block.replace(".", "__"): change})
    plain = drawn_plainly(case, images)
    assert torch.equal(drawn(run), expected)
    assert torch.equal(drawn(run)[:images], plain[:images])  # the other prompt's
    assert not torch.equal(drawn(run)[images:], plain[images:])


@pytest.mark.parametrize("name", ["stable_diffusion", "wan", "lumina"])
def test_a_branch_is_assigned_ahead(name):
    """The assignments are written before anything runs, the later one first."""
    case = CASES[name]
    calls = 2 if case.order == "calls" else 1

    def change(output, n):
        for branch, value in values.items() if n < calls else ():
            places = case.places(branch, None, 1, n)
            output[places] = value[: len(places)]

    shape = outputs_at(case, case.block)[0][case.places("cond", None, 1, 0)].shape
    values = {"uncond": torch.full(shape, 0.5), "cond": torch.full(shape, 0.25)}
    with generate(case) as run:
        for branch, value in values.items():
            getattr(run, branch)[case.block].output = value
    assert torch.equal(drawn(run), draw_changed(case, **{case.block.replace(".", "__"): change}))


@pytest.mark.parametrize("name", ["stable_diffusion", "lumina"])
def test_parts_are_views_of_the_batch(name):
    with generate(CASES[name]) as run:
        block = CASES[name].block
        for part in (run.cond, run.uncond, run.rows[1], run.rows[0].uncond):
            assert first(part[block].output)._base is not None
            first(part[block].output)[:] = 7
        assert bool((first(run[block].output) == 7).all())
        run.stop()


@pytest.mark.parametrize("name", ["stable_diffusion", "flux", "lumina"])
def test_a_row_reaches_both_branches(name):
    case = CASES[name]
    calls = 2 if case.order == "calls" else 1
    with generate(case) as run:
        a, b = run.rows
        for _ in run.steps:
            for call in range(calls):
                first(b[case.block].calls[call].output)[:] = first(a[case.block].calls[call].output)

    def change(output, n):
        source, sink = (case.places(None, prompt, 1, n % calls) for prompt in (0, 1))
        first(output)[sink] = first(output)[source]

    assert torch.equal(drawn(run), draw_changed(case, **{case.block.replace(".", "__"): change}))


def test_a_row_of_several_images_and_both_branches_is_no_view():
    with pytest.raises(InputError, match=r"rows\[1\]\.unet\.mid_block\.output occupies several places"):
        with generate(CASES["stable_diffusion"], images=2) as run:
            run.rows[1].unet.mid_block.output
    with generate(CASES["stable_diffusion"], images=2) as run:
        assert torch.equal(run.rows[1].cond.unet.mid_block.output, run.cond.rows[1].unet.mid_block.output)
        run.stop()


def test_the_untouched_branch_keeps_its_bits():
    case = CASES["stable_diffusion"]
    (clean, *_) = outputs_at(case, "unet")
    with generate(case) as run:
        for _ in run.steps[:1]:
            run.uncond.unet.mid_block.output[:] = 0
            assert torch.equal(run.cond.unet.output[0], clean[2:])
            assert not torch.equal(run.uncond.unet.output[0], clean[:2])
        run.stop()


def test_branches_feed_each_other():
    case = CASES["stable_diffusion"]
    with generate(case) as run:
        for _ in run.steps:
            run.uncond.unet.mid_block.output = run.cond.unet.mid_block.output

    def change(output, n):
        output[:2] = output[2:]

    assert torch.equal(run.images, draw_changed(case, unet__mid_block=change))


def test_inputs_and_output_objects_are_narrowed():
    case = CASES["stable_diffusion"]
    with generate(case) as run:
        args, kwargs = run.uncond.unet.inputs
        both, _ = run.unet.inputs[0][0], run.unet.inputs[1]
        assert torch.equal(args[0], both[:2]) and args[1].ndim == 0
        assert torch.equal(kwargs["encoder_hidden_states"], run.unet.inputs[1]["encoder_hidden_states"][:2])
        run.stop()


@pytest.mark.parametrize("name", ["stable_diffusion", "wan"])
def test_an_argument_that_is_set_reaches_the_branch(name):
    case = CASES[name]
    denoiser = case.block.partition(".")[0]
    with generate(case) as run:
        for _ in run.steps:
            text = run.cond[denoiser].inputs[1]["encoder_hidden_states"]
            run.uncond[denoiser].inputs[1]["encoder_hidden_states"] = text.clone()
    with generate(case) as same:
        for _ in same.steps:
            same.uncond[denoiser].output = (same.cond[denoiser].output[0].clone(),)
    assert torch.allclose(drawn(run), drawn(same), atol=1e-4)
    assert not torch.allclose(drawn(run), drawn_plainly(case), atol=1e-2)


@pytest.mark.parametrize("name", ["stable_diffusion", "wan"])
def test_a_negative_prompt_that_is_the_prompt(name):
    case = CASES[name]
    for branch in ("cond", "uncond"):
        with generate(case, negative_prompt=PROMPTS) as run:
            for _ in run.steps[:1]:
                with pytest.raises(InputError, match="was given the same text for the prompt and the negative prompt"):
                    getattr(run, branch)[case.block].output
            run.stop()


@pytest.mark.parametrize("name", ["flux2", "kandinsky5"])
def test_a_negative_prompt_of_the_pipeline_itself(name):
    """The pipeline encodes an empty text for the unconditional branch, in a call of its own, and calls it second."""
    pipe, calls = text_encoders.built(name), []
    inputs = {**text_encoders.TEXT_PIPELINES[name].inputs(), "num_inference_steps": 2}
    hook = pipe.transformer.register_forward_hook(lambda module, args, output: calls.append(output[0].clone()))
    with DiffusionModel(pipe).generate(**inputs, seed=SEED) as run:
        pairs = [(run.cond.transformer.output[0], run.uncond.transformer.output[0]) for _ in run.steps]
    hook.remove()
    assert len(calls) == 4 and all(map(torch.equal, sum(pairs, ()), calls))
    assert len(run.images) == 1


def test_edited_text_is_recognised():
    """The branches are found by comparison with the text as the body has edited it."""
    case = CASES["stable_diffusion"]
    with generate(case) as run:
        cond, uncond = run.encode_prompt.output
        run.encode_prompt.output = (torch.zeros_like(cond), uncond)
        text = run.cond.unet.inputs[1]["encoder_hidden_states"]
        assert bool((text == 0).all()) and len(text) == 2
        run.unet.inputs[1]["encoder_hidden_states"][:] = 1
        for _ in run.steps[1:2]:
            assert torch.equal(run.cond.unet.input, run.unet.input[2:])
        run.stop()


# Guidance that is off, or comes and goes


@pytest.mark.parametrize("name", ["stable_diffusion", "wan"])
def test_without_guidance_the_conditional_branch_is_all(name):
    case = CASES[name]
    with generate(case, guidance_scale=1.0) as run:
        layer = run.cond[case.layer].output
        assert first(layer) is first(run[case.layer].output)
        for _ in run.steps:
            assert first(run.cond[case.block].output) is first(run[case.block].output)
            assert torch.equal(first(run.cond.rows[1][case.block].output), first(run[case.block].output)[1:])


@pytest.mark.parametrize("path", ["block", "layer"])
@pytest.mark.parametrize("name", ["stable_diffusion", "wan", "latent_consistency"])
def test_without_guidance_there_is_no_unconditional_branch(name, path):
    if name == "latent_consistency":
        tested = case(name)
        changes = {"negative_prompt": None}
        inputs = {k: v for k, v in tested.inputs().items() if k != "negative_prompt"}
    else:
        tested, changes = CASES[name], {"guidance_scale": 1.0}
        inputs = {**tested.inputs(), **changes}
    model, point = DiffusionModel(tested.build()), getattr(tested, path)
    with pytest.raises(NeverReachedError, match=r"uncond\..*there is no unconditional branch at that point"):
        with model.generate(**inputs, seed=SEED) as run:
            run.uncond[point].output
    assert run._flow.clock.index <= 1  # it did not have to run to its end
    with pytest.raises(NeverReachedError, match="there is no unconditional branch at that point"):
        with model.generate(**inputs, seed=SEED) as run:
            run.cond[point].output
            run.uncond[point].output
    assert run._flow.clock.index <= 1
    with pytest.raises(NeverReachedError, match=r"uncond\..*output \(.*test_branches.py:\d+\)"):
        with model.generate(**inputs, seed=SEED) as run:
            run.uncond[point].output = torch.zeros(1)
    with model.generate(**inputs, seed=SEED) as run:
        assert first(run.cond[point].output) is first(run[point].output)
        run.stop()


def test_guidance_that_ends_half_way():
    """As diffusers' documentation does it, in a callback."""

    def end_guidance(pipe, step, timestep, kwargs):
        if step == 0:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    callback = {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with generate(CASES["stable_diffusion"], **callback) as run:
        sizes = [(len(run.unet.mid_block.output), len(run.cond.unet.mid_block.output)) for _ in run.steps]
    assert sizes == [(4, 2), (2, 2)]
    with pytest.raises(NeverReachedError, match="there is no unconditional branch at that point"):
        with generate(CASES["stable_diffusion"], **callback, steps=3) as run:
            for _ in run.steps:
                assert len(run.uncond.unet.mid_block.output) == 2


def test_calls_count_those_of_the_branch():
    case = CASES["wan"]
    seen = outputs_at(case, case.block)
    with generate(case) as run:
        later = run.uncond[case.block].calls[1].output
        assert torch.equal(later, seen[3])
    with generate(case) as run:
        run.uncond[case.block].calls[1].output = later * 0.5
        run.cond[case.block].calls[1].output = later * 0.25

    def change(output, n):
        output[:] = {2: later * 0.25, 3: later * 0.5}.get(n, output)

    assert torch.equal(drawn(run), draw_changed(case, transformer__blocks__0=change))


def test_a_branch_that_lies_behind():
    """The same point can be read in either order, whatever the mode."""
    with generate(CASES["wan"]) as run:
        for _ in run.steps:
            uncond, cond = run.uncond.transformer.blocks[1].output, run.cond.transformer.blocks[1].output
            assert uncond is run.transformer.blocks[1].calls[1].output and cond is run.transformer.blocks[1].output
    for change in (False, True):
        with pytest.raises(OutOfOrderError, match=r"cond\.transformer\.blocks\[0\]\.output was .* too late"):
            with generate(CASES["wan"]) as run:
                for _ in run.steps:
                    run.uncond.transformer.blocks[1].output
                    if change:
                        run.cond.transformer.blocks[0].output = uncond
                    run.cond.transformer.blocks[0].output


# Text encoders


@each_case
def test_a_branch_of_the_text_encoder(case):
    """The first prompt is changed in the one branch, the second in the other."""

    def change(output, n):
        halve(output, [n])

    with generate(case) as run:
        first(run.cond.rows[0][case.layer].output)[:] *= 0.5
        first(run.uncond.rows[1][case.layer].output)[:] *= 0.5
    expected = draw_changed(case, **{case.layer.replace(".", "__"): change})
    assert torch.equal(drawn(run), expected)
    assert not torch.equal(drawn(run), drawn_plainly(case))


def test_an_empty_negative_prompt():
    case = CASES["stable_diffusion"]
    with generate(case, negative_prompt=None) as run:
        negative = run.uncond.text_encoder.input
        assert negative is run.text_encoder.calls[1].input and len(negative) == 2
        run.stop()


def test_prompts_that_hold_each_other():
    case = CASES["stable_diffusion"]
    for prompts, negative in ((["a red", "a"], ["a red circle", "a photo"]), (["a red circle", "a photo"], ["a", ""])):
        with generate(case, prompt=prompts, negative_prompt=negative) as run:
            cond, uncond = run.cond.text_encoder.input, run.uncond.text_encoder.input
            assert cond is run.text_encoder.input and uncond is run.text_encoder.calls[1].input
            run.stop()


def test_the_second_encoder_and_its_own_prompt():
    case = CASES["stable_diffusion_xl"]
    with generate(case, prompt_2=["the blue square"] * 2, negative_prompt_2=["of", "the"]) as run:
        uncond = run.uncond.text_encoder_2.input
        assert uncond is run.text_encoder_2.calls[1].input
        run.stop()


def test_words_that_are_not_the_prompts():
    with pytest.raises(InputError, match=r"uncond\.text_encoder\.input belongs to an unknown branch: text_encoder"):
        with generate(CASES["stable_diffusion"]) as run:
            run.tokenizer.output.input_ids[0, 1:3] = 17
            run.uncond.text_encoder.input


def test_embeddings_given_as_lists():
    """Z-Image gives its transformer lists of tensors, one an image, each as long as its prompt."""
    sizes = {"in_channels": 16, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    ropes = {"axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32], "cap_feat_dim": diffusion.WIDTH}
    tokenizer = diffusion.gemma_tokenizer()
    pipe = diffusion.quiet_pipeline(
        diffusers.ZImagePipeline,
        tokenizer=tokenizer,
        text_encoder=diffusion.gemma_encoder(tokenizer),
        vae=diffusion.vae(latent_channels=16, shift_factor=0.1, seed=1),
        transformer=diffusion.model(diffusers.ZImageTransformer2DModel, **sizes, **ropes, seed=2),
        scheduler=diffusion.flow_scheduler(),
    )
    texts = {
        name: [torch.randn(n, diffusion.WIDTH) for n in (5, 6)] for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    inputs = {**_LUMINA, **texts, "num_inference_steps": 1, "num_images_per_prompt": 2}
    del inputs["clean_caption"]
    with DiffusionModel(pipe).generate(**inputs, seed=0) as run:
        uncond, row = run.uncond.transformer.layers[0].output, run.cond.rows[1].transformer.layers[0].output
        whole = run.transformer.layers[0].output
        assert len(whole) == 8 and torch.equal(uncond, whole[4:]) and torch.equal(row, whole[2:4])


def test_videos_with_an_entry_a_frame():
    """AnimateDiff's UNet folds the frames into the batch."""
    motion = {"motion_layers_per_block": 1, "motion_norm_num_groups": 4, "motion_num_attention_heads": 2}
    adapter = diffusion.model(diffusers.MotionAdapter, block_out_channels=(16, 32), **motion, seed=3)
    pipe = diffusion.quiet_pipeline(
        diffusers.AnimateDiffPipeline,
        vae=diffusion.vae(seed=1),
        unet=diffusers.UNetMotionModel.from_unet2d(diffusion.unet(seed=2), adapter).eval(),
        motion_adapter=adapter,
        scheduler=diffusers.DDIMScheduler(**diffusion.DDIM),
        **diffusion.text_parts(diffusion.clip_encoder, diffusion.clip_tokenizer()),
    )
    inputs = {**CASES["stable_diffusion"].inputs(steps=1), "num_frames": 3}
    del inputs["num_images_per_prompt"]
    with DiffusionModel(pipe).generate(**inputs, seed=0) as run:
        latents, row = run.cond.unet.input, run.cond.rows[1]
        inside, part, output = run.uncond.unet.mid_block.output, row.unet.mid_block.output, row.unet.output[0]
        whole = run.unet.mid_block.output
        assert len(whole) == 12 and torch.equal(inside, whole[:6]) and torch.equal(part, whole[9:])
        assert torch.equal(latents, run.unet.input[2:]) and torch.equal(output, run.unet.output[0][3:])
        assert len(run.rows[1].scheduler.step.output[0]) == 1
    chunks = {**inputs, "decode_chunk_size": 2}  # as many frames as there are prompts
    with pytest.raises(InputError, match=r"rows\[1\].vae.decode.input cannot be cut .* contains video frames"):
        with DiffusionModel(pipe).generate(**chunks, seed=0) as run:
            run.rows[1].vae.decode.input


def test_a_prompt_given_as_embeddings():
    case = CASES["stable_diffusion"]
    pipe = case.build()
    embeds = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    inputs = {**case.inputs(), "prompt": None, "prompt_embeds": embeds}
    with DiffusionModel(pipe).generate(**inputs, seed=0) as run:
        assert run.uncond.text_encoder.input is run.text_encoder.input
        assert torch.equal(run.cond.unet.input, run.unet.input[2:])  # embeddings are compared, wherever they are from
        run.stop()


# Scheduler and VAE: the branches are joined


@each_size
def test_rows_after_guidance(case, images):
    with generate(case, images) as run:
        for _ in run.steps[:1]:
            kept = [row.scheduler.step.output[0] for row in run.rows]
            whole = run.scheduler.step.output[0]
            assert torch.equal(torch.cat(kept), whole) and len(kept[1]) == images
        a, b = run.rows
        b.vae.decode.input = a.vae.decode.input
        latents = run.vae.decode.input
        assert torch.equal(latents[:images], latents[images:])
    assert torch.equal(drawn(run)[:images], drawn(run)[images:])
    assert torch.equal(drawn(run)[:images], drawn_plainly(case, images)[:images])


@pytest.mark.parametrize(
    "path", ["scheduler.step.output", "vae.decode.input", "vae.decoder.output", "encode_prompt.output"]
)
def test_branches_are_only_where_they_part(path):
    owner, _, part = path.rpartition(".")
    with pytest.raises(InputError, match=rf"uncond\.{path} belongs to no branch"):
        with generate(CASES["stable_diffusion"]) as run:
            getattr(run.uncond[owner], part)
    assert run._flow.clock.index < 0  # nothing ran for it
    with pytest.raises(InputError, match=rf"cond\.{path} belongs to no branch"):
        with generate(CASES["stable_diffusion"]) as run:
            setattr(run.cond[owner], part, torch.zeros(1))


# Rows


def test_rows_of_one_prompt_and_of_several():
    model = DiffusionModel(diffusion.stable_diffusion())
    one = {**diffusion.PIPELINES["stable_diffusion"].inputs(), "num_images_per_prompt": 3, "seed": 0}
    with model.generate(**one) as run:
        (row,) = run.rows
        assert row.unet.mid_block.output is run.unet.mid_block.output
        assert len(row.cond.unet.mid_block.output) == 3
    assert torch.equal(row.images, run.images) and len(row.images) == 3
    run = generate(CASES["stable_diffusion"], images=2)
    assert [row.index for row in run.rows] == [row.index for row in run.cond.rows] == [0, 1]
    assert torch.equal(run.rows[1].images, run.images[2:])


def test_row_images_are_those_of_the_prompt_alone():
    case = CASES["stable_diffusion"]
    run = generate(case)
    alone = DiffusionModel(case.build()).generate(
        **{**case.inputs(), "prompt": PROMPTS[1], "negative_prompt": NEGATIVE[1]}, seed=SEED + 1
    )
    assert torch.allclose(run.rows[1].images, alone.images, atol=1e-5)


def test_each_over_rows_and_over_those_of_a_branch():
    case = CASES["flux"]

    def norms(row):
        return [first(row[case.block].output).norm() for _ in row.steps]

    seen = outputs_at(case, case.block)
    with generate(case) as run:
        read = run.each(norms)
    assert torch.equal(torch.tensor(read), torch.tensor([[seen[n][i].norm() for n in (0, 2)] for i in (0, 1)]))
    with generate(case) as run:
        read = run.uncond.each(norms)
    assert torch.equal(torch.tensor(read), torch.tensor([[seen[n][i].norm() for n in (1, 3)] for i in (0, 1)]))


def test_bodies_in_different_branches():
    case = CASES["wan"]
    kept = {}

    def source(row):
        for step in row.steps:
            kept[step.index] = row.cond[case.block].output

    def sink(row):
        for step in row.steps:
            row.uncond[case.block].output = kept[step.index] if row.uncond[case.block].output is not None else None

    with generate(case) as run:
        run.each([source, sink])

    def change(output, n):
        if n % 2:
            output[1] = held[0]
        else:
            held[:] = [output[0].clone()]

    held = []
    assert torch.equal(drawn(run), draw_changed(case, transformer__blocks__0=change))


def test_gradients_reach_a_branch_of_a_row():
    case = CASES["stable_diffusion"]
    with DiffusionModel(case.build()).generate(**case.inputs(), seed=0, grad=True) as run:
        whole = run.unet.mid_block.output
        whole.retain_grad()
        run.rows[1].vae.decode.output[0].sum().backward()
        run.stop()
    assert not whole.grad[[0, 2]].any() and whole.grad[[1, 3]].any(dim=-1).any()


def test_unconditional_pipelines_have_rows_and_no_branches():
    tested = diffusion.PIPELINES["ddpm"]
    inputs = {**tested.inputs(), "batch_size": 3}
    with DiffusionModel(tested.build()).generate(**inputs, seed=SEED) as run:
        for _ in run.steps:
            run.rows[1].unet.mid_block.output[:] *= 0.5
            assert torch.equal(run.rows[2].scheduler.step.output[0], run.scheduler.step.output[0][2:])
    pipe = tested.build()
    with changed_at(pipe, "unet.mid_block", lambda output, n: halve(output, [1])):
        expected = pipe(**inputs, generator=generators(3))[0]
    assert torch.equal(run.images, expected) and len(run.rows[1].images) == 1
    for branch in ("cond", "uncond"):
        with pytest.raises(InputError, match=rf"{branch}\.unet\.mid_block\.output belongs to an unknown branch"):
            with DiffusionModel(tested.build()).generate(**inputs, seed=0) as run:
                getattr(run, branch).unet.mid_block.output


# What is ambiguous


@pytest.mark.parametrize("guidance_scale", [5.0, 0.0])
def test_a_perturbed_copy_belongs_to_no_branch(guidance_scale):
    """Perturbed-attention guidance puts it behind the conditional branch, with the same text."""
    pipe = diffusion.stable_diffusion_family(diffusers.StableDiffusionPAGPipeline, pag_applied_layers=["mid"])
    inputs = {**CASES["stable_diffusion"].inputs(), "pag_scale": 2.0, "guidance_scale": guidance_scale}
    inputs |= {"num_images_per_prompt": 2}
    before = 4 if guidance_scale else 0
    with DiffusionModel(pipe).generate(**inputs, seed=SEED) as run:
        for _ in run.steps:
            whole = run.unet.mid_block.output
            assert len(whole) == before + 8
            assert torch.equal(run.cond.unet.mid_block.output, whole[before : before + 4])
            assert torch.equal(run.cond.rows[1].unet.mid_block.output, whole[before + 2 : before + 4])
            assert not guidance_scale or torch.equal(run.uncond.unet.mid_block.output, whole[:4])
            run.cond.unet.mid_block.output[:] *= 0.5
    with changed_at(pipe, "unet.mid_block", lambda output, n: halve(output, [*range(before, before + 4)])):
        expected = pipe(**inputs, generator=generators(4))[0]
    assert torch.equal(run.images, expected)


def test_a_batch_with_other_branches_is_an_error():
    """The pipeline takes the prompt, and the negative prompt twice: with and without the given image."""
    pipe = diffusion.stable_diffusion_family(
        diffusers.StableDiffusionInstructPix2PixPipeline, unet=diffusion.unet(seed=2, in_channels=8)
    )
    inputs = {"prompt": "a red circle", "image": diffusion.IMAGE, "num_inference_steps": 1}
    for branch in ("cond", "uncond"):
        reason = (
            "unet was given a batch without known texts, because StableDiffusionInstructPix2PixPipeline has no encode"
        )
        with pytest.raises(InputError, match=reason):
            with DiffusionModel(pipe).generate(**inputs, seed=0) as run:
                getattr(run, branch).unet.mid_block.output
    with pytest.raises(
        InputError, match=r"cond\.unet\.conv_in\.output \(.*test_branches.py:\d+\) belongs to an unknown"
    ):
        with DiffusionModel(pipe).generate(**inputs, seed=0) as run:
            run.cond.unet.conv_in.output = torch.zeros(1)


def test_a_perturbed_half_of_the_same_text():
    """Without classifier-free guidance, the batch is the prompts and then the same prompts, perturbed."""
    pipe = diffusion.stable_diffusion_family(diffusers.StableDiffusionPAGPipeline, pag_applied_layers=["mid"])
    inputs = {**CASES["stable_diffusion"].inputs(steps=1), "pag_scale": 2.0, "guidance_scale": 0.0}
    del inputs["num_images_per_prompt"], inputs["negative_prompt"]
    with DiffusionModel(pipe).generate(**inputs | {"prompt": ["a red circle"] * 2}, seed=0) as run:
        whole = run.unet.mid_block.output
        assert torch.equal(run.cond.unet.mid_block.output, whole[:2])
        assert torch.equal(run.rows[1].unet.mid_block.output, whole[1::2])


def test_a_tensor_without_a_batch_cannot_be_cut():
    with pytest.raises(InputError, match=r"rows\[0\]\.transformer\.pos_embed\.output cannot be cut .*\(80, 16\)"):
        with generate(CASES["flux"]) as run:
            run.rows[0].transformer.pos_embed.output
    with pytest.raises(InputError, match=r"rows\[1\]\.vae\.encode\.output holds a DiagonalGaussian.*cannot be cut"):
        tested = case("img2img")
        with DiffusionModel(tested.build()).generate(**tested.inputs(steps=4), seed=0) as run:
            run.rows[1].vae.encode.output


def test_wrong_shapes_and_skips():
    case = CASES["stable_diffusion"]
    with pytest.raises(
        AssignmentError, match=r"uncond\.unet\.mid_block\.output .*\(2, 32, 8, 8\), not \(4, 32, 8, 8\)"
    ):
        with generate(case) as run:
            run.uncond.unet.mid_block.output = torch.zeros(4, 32, 8, 8)
    with pytest.raises(InputError, match="for all rows"):
        with generate(case) as run:
            run.cond.unet.mid_block.skip(torch.zeros(2, 32, 8, 8))


def test_rows_and_branches_of_the_last_pass():
    given = {**diffusion.PIPELINES["stable_diffusion"].inputs(), "num_inference_steps": 2, "seed": SEED}
    del given["prompt"]
    model = DiffusionModel(diffusion.stable_diffusion())
    with model.generate(**given) as run:
        with run.invoke(PROMPTS):
            shapes = [run.cond.rows[1].unet.mid_block.output.shape for _ in run.steps]
            b = run.rows[1]
        with run.invoke(PROMPTS[0]) as last:
            (row,) = run.rows
            assert len(run.uncond.unet.mid_block.output) == 1
    assert [len(shape) for shape in shapes] == [4, 4] and {shape[0] for shape in shapes} == {1}
    assert torch.equal(b.images, run.result[0].images[1:])
    assert torch.equal(row.images, last.images)
    with pytest.raises(InputError, match="each pass of this run has its own"):
        run.images
