"""Inside attention modules of diffusion pipelines: probabilities, queries, keys, values and heads.

The expected values are computed by hand, from what a plain function mode or a hand-written processor sees."""

import gc
import warnings

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.overrides import TorchFunctionMode
from transformers import GPT2Config, GPT2LMHeadModel

from diffsight import DiffusionModel, LanguageModel
from diffsight.errors import AssignmentError, InputError, OutOfOrderError, PointNotFoundError
from diffsight.pipelines.attention.attention_modules import attentions_in
from helpers import SEED, draw, footprint
from models import diffusion, text_encoders

PIPELINES = ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "deepfloyd_if", "pixart_sigma"]
PIPELINES += ["sana", "wan", "cogvideox", "ltx"]
MORE = ["qwen_image", "flux2", "z_image", "kandinsky5", "lumina"]
ATTN = "unet.mid_block.attentions[0].transformer_blocks[0].attn2"


class Seen(TorchFunctionMode):
    """Records what every attention module multiplies, by hand, with plain hooks that say which module is running."""

    def __init__(self, attentions):
        super().__init__()
        self.running, self.values = [], {}
        self._attentions = attentions

    def __enter__(self):
        self._handles = []
        for path, module in self._attentions.items():
            self._handles.append(module.register_forward_pre_hook(lambda *_, path=path: self.running.append(path)))
            self._handles.append(module.register_forward_hook(lambda *_: self.running.pop() and None))
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention and self.running:
            given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args)) | kwargs
            self._keep(probabilities(**given), given["query"], given["key"], output)
        return output

    def _keep(self, probs, q, k, output):
        by_token = (value.transpose(1, 2) for value in (q, k, output))
        self.values.setdefault(self.running[-1], []).append((probs, *by_token))


def probabilities(query, key, value, attn_mask=None, dropout_p=0, is_causal=False, scale=None, **_):
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    if attn_mask is not None:
        is_bool = attn_mask.dtype is torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
    return scores.softmax(-1).nan_to_num(0)


def small(name):
    """Return a small pipeline, what it is called with, and its denoiser's name."""
    if name in MORE:
        pipe = text_encoders.built(name)
        inputs = text_encoders.TEXT_PIPELINES[name].inputs(output_type="pt")
        denoiser = "transformer"
    else:
        pipe, inputs = diffusion.PIPELINES[name].build(), dict(diffusion.PIPELINES[name].inputs())
        denoiser = diffusion.PIPELINES[name].denoiser
    return pipe, inputs | {"num_inference_steps": 2}, denoiser


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "deepfloyd_if"] + MORE)
def test_values_in_every_attention_of_a_denoiser(name):
    pipe, inputs, denoiser = small(name)
    attentions = attentions_in(getattr(pipe, denoiser))
    with torch.no_grad(), Seen(attentions) as seen:
        bare = draw(pipe, inputs)
    parts = ("attention_probs", "q", "k", "heads_output")
    paths = {path: f"{denoiser}.{path}" for path in seen.values}
    with DiffusionModel(pipe).generate(**inputs, seed=SEED) as run:
        kept = run.record([f"{full}.products[0].{part}" for full in paths.values() for part in parts])
    kept = {path.replace("[", ".").replace("]", ""): value for path, value in kept.items()}
    assert seen.values
    for path, full in paths.items():
        for part, expected in zip(parts, seen.values[path][0], strict=True):
            value, *later = kept[f"{full}.products.0.{part}"]  # one for each step at least
            assert later and value.shape == expected.shape
            assert torch.allclose(value, expected, atol=1e-5), (full, part)
    assert torch.equal(torch.as_tensor(bare), torch.as_tensor(run.result[0]))


def test_values_where_the_softmax_is_written_out():
    pipe, inputs, _ = small("deepfloyd_if")
    module = pipe.unet.mid_block.attentions[0]
    module.set_processor(diffusers.models.attention_processor.AttnAddedKVProcessor())
    seen = []

    def scores(q, k, mask=None):
        seen.append((q, k, type(module).get_attention_scores(module, q, k, mask)))
        return seen[-1][-1]

    with torch.no_grad():
        module.get_attention_scores = scores
        bare = draw(pipe, inputs)
        del module.get_attention_scores
    q, k, probs = (value.unflatten(0, (-1, module.heads)) for value in seen[0])
    with DiffusionModel(pipe).generate(**inputs, seed=SEED) as run:
        attn = run.unet.mid_block.attentions[0]
        assert torch.equal(attn.q, q.transpose(1, 2))
        assert torch.equal(attn.k, k.transpose(1, 2))
        assert torch.equal(attn.attention_probs, probs)
    assert torch.equal(bare, run.result[0])


class Edited(AttnProcessor):
    """A hand-written processor that changes the probabilities."""

    def __init__(self, edit):
        self.edit = edit

    def __call__(self, attn, *args, **kwargs):
        plain = attn.get_attention_scores
        attn.get_attention_scores = lambda *given: self.edit(plain(*given).unflatten(0, (-1, attn.heads))).flatten(0, 1)
        try:
            return super().__call__(attn, *args, **kwargs)
        finally:
            del attn.get_attention_scores


def more_of_token_3(probs):
    probs = probs.clone()
    probs[..., 3] *= 2
    return probs


def head_1_uniform(probs):
    probs = probs.clone()
    probs[:, 1] = 1 / probs.shape[-1]
    return probs


@pytest.mark.parametrize("edit", [more_of_token_3, head_1_uniform])
def test_edits_equal_those_of_a_processor(sd, edit):
    inputs = diffusion.PIPELINES["stable_diffusion"].inputs()
    with DiffusionModel(sd).generate(**inputs, seed=SEED) as run:
        for step in run.steps[1:]:
            attn = run.unet.mid_block.attentions[0].transformer_blocks[0].attn2
            if step.index == 1:
                attn.attention_probs = edit(attn.attention_probs)
            else:
                attn.attention_probs[:] = edit(attn.attention_probs)
    module, calls = sd.unet.mid_block.attentions[0].transformer_blocks[0].attn2, [0]
    processor = Edited(lambda probs: (calls.append(0), edit(probs) if len(calls) > 2 else probs)[1])
    module.set_processor(processor)
    expected = draw(sd, inputs)
    assert len(calls) == 4
    assert torch.allclose(run.images, expected, atol=1e-5)
    module.set_processor(AttnProcessor())
    assert not torch.allclose(run.images, draw(sd, inputs), atol=1e-5)


def test_a_written_out_attention_with_new_queries_and_keys(sd):
    """As with a fused kernel."""
    inputs = diffusion.PIPELINES["stable_diffusion"].inputs()
    images = []
    for processor in (AttnProcessor(), diffusers.models.attention_processor.AttnProcessor2_0()):
        sd.unet.set_attn_processor(processor)
        with DiffusionModel(sd).generate(**inputs, seed=SEED) as run:
            attn = run.unet.mid_block.attentions[0].transformer_blocks[0].attn2
            attn.q[:, :, 0] *= 3
            attn.k = attn.k.flip(1)
            attn.v[:, 5] = 0
            attn.heads_output[:, :, 1] *= 2
        images.append(run.images)
    assert torch.allclose(*images, atol=1e-5)
    assert not torch.allclose(images[0], draw(sd, inputs), atol=1e-4)


def test_probabilities_set_to_what_they_were(sd):
    inputs = diffusion.PIPELINES["stable_diffusion"].inputs()
    with DiffusionModel(sd).generate(**inputs, seed=SEED) as run:
        for _ in run.steps:
            attn = run.unet.mid_block.attentions[0].transformer_blocks[0].attn2
            attn.attention_probs = attn.attention_probs.clone()
    assert torch.allclose(run.images, draw(sd, inputs), atol=1e-5)


def test_rows_and_branches(sd):
    inputs = diffusion.PIPELINES["stable_diffusion"].inputs() | {"prompt": ["a red circle", "a blue square"]}
    with DiffusionModel(sd).generate(**inputs, seed=SEED) as run:
        whole = run[ATTN].attention_probs
        assert torch.equal(run.uncond[ATTN].attention_probs, whole[:2])
        assert torch.equal(run.cond[ATTN].attention_probs, whole[2:])
        a, b = run.cond.rows
        assert torch.equal(b[ATTN].attention_probs, whole[3:])
        for _ in run.steps[1:]:
            b[ATTN].attention_probs = a[ATTN].attention_probs
            assert torch.equal(run[ATTN].attention_probs[3], run[ATTN].attention_probs[2])
            break
    plain = draw(sd, inputs)
    assert not torch.equal(run.images[1], plain[1])


def test_calls_and_steps(sd):
    inputs = diffusion.PIPELINES["stable_diffusion"].inputs()
    model = DiffusionModel(sd)
    with model.generate(**inputs, seed=SEED) as run:
        second = run[ATTN].calls[1].attention_probs
        assert torch.equal(run[ATTN].calls[2].attention_probs, run[ATTN].calls[2].attention_probs)
    with model.generate(**inputs, seed=SEED) as run:
        for step in run.steps:
            if step.index == 1:
                assert torch.equal(run[ATTN].attention_probs, second)
    with model.generate(**inputs, seed=SEED) as run:
        kept = run.record(f"{ATTN}.attention_probs")
        followed = []
        run.follow(f"{ATTN}.attention_probs", followed.append)
        for _ in run.steps:
            pass
    assert torch.equal(kept[f"{ATTN}.attention_probs"][1], second)
    assert len(kept[f"{ATTN}.attention_probs"]) == len(followed) == 3


def test_values_under_a_pattern(sd):
    inputs = diffusion.PIPELINES["stable_diffusion"].inputs()
    with DiffusionModel(sd).generate(**inputs, seed=SEED) as run:
        kept = run.record("unet.**.attn2.attention_probs")
    assert len(kept) == 4 and all(path.endswith(".attn2.attention_probs") for path in kept)
    assert all(torch.allclose(probs.sum(-1), torch.ones(()), atol=1e-5) for calls in kept.values() for probs in calls)


def test_gradients_through_the_pipeline(sd):
    """Against the change of the loss when the probabilities are moved a little."""
    inputs = diffusion.PIPELINES["stable_diffusion"].inputs() | {"num_inference_steps": 1}
    sd.to(dtype=torch.float64)
    model = DiffusionModel(sd)
    with model.generate(**inputs, seed=SEED, grad=True) as run:
        probs = run[ATTN].attention_probs
        probs.retain_grad()
        decoded = run.vae.decode.output[0]
        decoded.square().mean().backward()
    assert torch.equal(run.images.detach(), draw(sd, inputs))
    direction, losses = torch.randn_like(probs), []
    for size in (1e-4, -1e-4):
        with model.generate(**inputs, seed=SEED) as run:
            run[ATTN].attention_probs = probs.detach() + size * direction
            losses.append(run.vae.decode.output[0].square().mean())
    assert torch.allclose((losses[0] - losses[1]) / 2e-4, (probs.grad * direction).sum(), rtol=1e-4)


@pytest.mark.parametrize("read", [(), ("attention_probs",), ("q", "v"), ("q", "k", "v", "attention_probs")])
def test_changes_in_place_where_gradients_are_on(read):
    """Queries, keys and values are halves of tensors here, which PyTorch lets nobody change in place."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, bos_token_id=None, eos_token_id=None)
    net, ids = GPT2LMHeadModel(config).eval(), torch.arange(12).reshape(2, 6)
    attn, edited = net.transformer.h[1].attn, {"q", "v"} & {*read}

    def scale(module, args, output):
        q, k, v = output.split(16, -1)
        return torch.cat([q * 3 if "q" in edited else q, k, v * 3 if "v" in edited else v], -1)

    hooks = [attn.c_attn.register_forward_hook(scale)]
    hooks += [attn.c_proj.register_forward_pre_hook(lambda _, args: args[0] * (torch.arange(16) >= 8))]
    expected = net(ids).logits
    expected.square().sum().backward()
    gradient = attn.c_attn.weight.grad
    net.zero_grad()
    for hook in hooks:
        hook.remove()
    with LanguageModel(net).trace(ids, grad=True) as run:
        for name in read:
            value = getattr(run, name)[1]
            if name in edited:
                value *= 3
        run.heads_output[1][:, :, 0] = 0
        run.logits.square().sum().backward()
    assert torch.allclose(run.logits, expected, atol=1e-6)
    assert torch.allclose(attn.c_attn.weight.grad, gradient, atol=1e-5)


def test_a_module_with_several_products(sd):
    inputs = diffusion.PIPELINES["stable_diffusion"].inputs()
    inputs |= diffusion.add_image_prompt(sd)
    model = DiffusionModel(sd)
    with model.generate(**inputs, seed=SEED) as run:
        products = run[ATTN].products
        assert products[0].attention_probs.shape == (2, 2, 64, 77)
        assert products[1].attention_probs.shape == (2, 2, 64, 4)
    assert torch.equal(run.images, draw(sd, inputs))
    with pytest.raises(InputError, match=r"attn2 makes several products in one call\. Write .*\.products\[0\]"):
        with model.generate(**inputs, seed=SEED) as run:
            run[ATTN].attention_probs
    with model.generate(**inputs, seed=SEED) as run:
        for _ in run.steps:
            run[ATTN].products[1].heads_output[:] = 0
    module = sd.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    module.processor.scale = [0.0]
    assert torch.allclose(run.images, draw(sd, inputs), atol=1e-5)


def test_what_has_no_attention(sd):
    inputs = diffusion.PIPELINES["stable_diffusion"].inputs()
    model = DiffusionModel(sd)
    block = "unet.mid_block.attentions[0].transformer_blocks[0]"
    for path, kind, words in (
        ("unet", InputError, "8 attention modules in this module. Use the value of one of them: unet.down_blocks"),
        (block, InputError, r"one of them: .*blocks\[0\]\.attn1, .*blocks\[0\]\.attn2"),
        ("unet.conv_in", PointNotFoundError, "unet.conv_in has no 'attention_probs'"),
        (f"{block}.ff", OutOfOrderError, "FeedForward computes no attention product"),
    ):
        with pytest.raises(kind, match=words):
            with model.generate(**inputs, seed=SEED) as run:
                run[path].attention_probs
    with pytest.raises(OutOfOrderError):
        with model.generate(**inputs, seed=SEED) as run:
            run[ATTN].attention_probs
            run[ATTN].q
    with pytest.raises(AssignmentError, match=r"attention_probs.*shape"):
        with model.generate(**inputs, seed=SEED) as run:
            run[ATTN].attention_probs = torch.zeros(2, 2, 64, 76)
    with pytest.raises(AssignmentError, match="can only be read"):
        with model.generate(**inputs, seed=SEED) as run:
            run[ATTN].attention_product = 1


def test_a_backend_that_shows_nothing():
    pipe, inputs, _ = small("flux")
    pipe.transformer.transformer_blocks[0].attn.processor._attention_backend = "flash"
    with pytest.raises(InputError, match=r"blocks\[0\]\.attn\.q cannot be seen: FluxAttention .*'flash'.*\(.native.\)"):
        with DiffusionModel(pipe).generate(**inputs, seed=SEED) as run:
            run.transformer.transformer_blocks[0].attn.q


def test_a_module_that_names_its_own_parts_so():
    """T5 has layers `q`, `k` and `v`: those are meant, and the values are in `products`."""
    pipe, inputs, _ = small("flux")
    model = DiffusionModel(pipe)
    with model.generate(**inputs, seed=SEED) as run:
        attn = run.text_encoder_2.encoder.block[0].layer[0].SelfAttention
        projected = attn.q.output
        q = attn.products[0].q
    assert torch.equal(q.flatten(2), projected)
    with pytest.raises(PointNotFoundError, match="q cannot be assigned"):
        with model.generate(**inputs, seed=SEED) as run:
            run.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q = q


def test_nothing_is_left_behind(sd):
    inputs = diffusion.PIPELINES["stable_diffusion"].inputs()
    before = {name: footprint(module) for name, module in sd.unet.named_modules()}
    with DiffusionModel(sd).generate(**inputs, seed=SEED) as run:
        run[ATTN].attention_probs
        run.stop()
    assert {name: footprint(module) for name, module in sd.unet.named_modules()} == before
    assert torch.overrides._get_current_function_mode_stack() == []


def test_low_precision(sd):
    inputs = diffusion.PIPELINES["stable_diffusion"].inputs()
    sd.to(dtype=torch.bfloat16)
    with DiffusionModel(sd).generate(**inputs, seed=SEED) as run:
        attn = run[ATTN]
        q, k, probs = attn.q, attn.k, attn.attention_probs
    expected = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / 4, -1)
    assert probs.dtype == torch.bfloat16
    assert torch.allclose(probs.float(), expected, atol=1e-2)
    assert torch.equal(run.images, draw(sd, inputs))


def test_a_scan(sd):
    inputs = diffusion.PIPELINES["stable_diffusion"].inputs()
    with DiffusionModel(sd).scan(**inputs) as run:
        assert run[ATTN].attention_probs.shape == (2, 2, 64, 77)


def with_image_prompt(sd):
    inputs = diffusion.PIPELINES["stable_diffusion"].inputs()
    return inputs | diffusion.add_image_prompt(sd)


@pytest.mark.parametrize("value", ["q", "attention_probs", "heads_output"])
def test_a_run_that_is_stopped_does_not_take_the_first_of_several_products(sd, value):
    inputs = with_image_prompt(sd)
    with pytest.raises(InputError, match=r"attn2 makes several products in one call\. Write .*\.products\[0\]"):
        with DiffusionModel(sd).generate(**inputs, seed=SEED) as run:
            getattr(run[ATTN], value)
            run.stop()
    with DiffusionModel(sd).generate(**inputs, seed=SEED) as run:
        getattr(run[ATTN].products[0], value)
        run.stop()


def test_a_run_that_is_dropped_tells_that_there_may_be_several_products(sd):
    inputs = with_image_prompt(sd)
    run = DiffusionModel(sd).generate(**inputs, seed=SEED)
    run[ATTN].attention_probs
    with pytest.warns(UserWarning, match=r"dropped during the call of .*attn2 in which .*attention_probs was read"):
        del run
        gc.collect()
    run = DiffusionModel(sd).generate(**inputs, seed=SEED)
    run[ATTN].products[0].attention_probs
    with warnings.catch_warnings(record=True) as warned:
        del run
        gc.collect()
    assert not warned


def test_a_value_asked_for_between_two_products(sd):
    """The image prompt's keys are projected after the product with those of the text."""
    inputs = with_image_prompt(sd)
    model = DiffusionModel(sd)
    for ask in (lambda attn: attn.attention_probs, lambda attn: attn.products[0].attention_probs):
        with pytest.raises(InputError, match=r"in the middle of a call of .*attn2, which may make several products"):
            with model.generate(**inputs, seed=SEED) as run:
                run[ATTN].processor.to_k_ip[0].output
                ask(run[ATTN])
    with model.generate(**inputs, seed=SEED) as run:
        run[ATTN].input
        assert run[ATTN].products[0].attention_probs.shape == (2, 2, 64, 77)


def test_a_value_asked_for_inside_a_module_with_one_product(sd):
    inputs = diffusion.PIPELINES["stable_diffusion"].inputs()
    model = DiffusionModel(sd)
    with model.generate(**inputs, seed=SEED) as run:
        expected = run[ATTN].attention_probs
    with model.generate(**inputs, seed=SEED) as run:
        run[ATTN].to_k.output
        assert torch.equal(run[ATTN].attention_probs, expected)
        run.stop()
