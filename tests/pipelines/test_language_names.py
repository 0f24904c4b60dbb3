"""Standard names and accessors: the same on every model, with the values of plain hooks."""

import warnings

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from diffsight import LanguageModel, OutOfOrderError
from diffsight.errors import AssignmentError, InputError, PointNotFoundError
from diffsight.pipelines.language.name_check import NamesWarning
from diffsight.pipelines.standard_names import layer_names, model_names, standard_names
from models import architectures, language_kinds

pytestmark = pytest.mark.usefixtures("no_gradients")

IDS = architectures.tokens()
KINDS = ["gpt2", "llama", "opt", "bloom", "falcon", "gpt_neox", "bert", "qwen3_moe", "phi3", "gemma2"]


@pytest.fixture(scope="module")
def nets():
    return {kind: architectures.build_causal(kind, _attn_implementation="eager") for kind in KINDS}


@pytest.fixture(params=KINDS)
def net(request, nets):
    return nets[request.param]


@pytest.fixture
def model(net):
    return LanguageModel(net)


@pytest.fixture
def gpt2(nets):
    return LanguageModel(nets["gpt2"])


def seen(net, path, ids=IDS, inputs=False, edit=None):
    """Return the output (or the input) of a module in a bare pass, and the logits of that pass."""
    values = []

    def note(module, args, output=None):
        value = args[0] if inputs else output[0] if isinstance(output, tuple) else output
        values.append(value)
        if edit is not None:
            new = edit(value)
            if inputs:
                return new, *args[1:]
            return (new, *output[1:]) if isinstance(output, tuple) else new
        return None

    module = net.get_submodule(path)
    hook = module.register_forward_pre_hook(note) if inputs else module.register_forward_hook(note)
    try:
        return values, net(ids).logits
    finally:
        hook.remove()


# Names


PATHS = {
    "gpt2": ("transformer.h.1", "transformer.h.1.attn", "transformer.h.1.mlp", "transformer.ln_f", "transformer.wte"),
    "llama": ("model.layers.1", "model.layers.1.self_attn", "model.layers.1.mlp", "model.norm", "model.embed_tokens"),
    "phi3": ("model.layers.1", "model.layers.1.self_attn", "model.layers.1.mlp", "model.norm", "model.embed_tokens"),
}


@pytest.mark.parametrize("kind", PATHS)
def test_a_name_and_the_original_are_the_same_point(kind, nets):
    net, model = nets[kind], LanguageModel(nets[kind])
    with model.trace(IDS) as run:
        by_name = [
            run.embed_tokens.output,
            run.layers[1].self_attn.output,
            run.layers[1].mlp.output,
            run.layers[1].output,
            run.ln_final.output,
            run.lm_head.output,
        ]
    layer, attention, mlp, norm, words = PATHS[kind]
    with model.trace(IDS) as run:
        by_path = [run[path].output for path in (words, attention, mlp, layer, norm, "lm_head")]
    for x, y in zip(by_name, by_path):
        assert torch.equal(x[0] if isinstance(x, tuple) else x, y[0] if isinstance(y, tuple) else y)
    assert torch.equal(by_name[-1], net(IDS).logits)


def test_the_tree_shows_the_names(gpt2):
    assert "standard names: layers = transformer.h, ln_final = transformer.ln_f" in repr(gpt2)
    assert {"layers", "ln_final", "embed_tokens", "transformer"} <= set(dir(gpt2))
    assert "self_attn" in dir(gpt2.layers[0])
    assert len(gpt2.layers) == 2


def test_layers_of_both_halves_by_any_path():
    sizes = {
        f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))
    }
    config = transformers.BartConfig(vocab_size=64, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, **sizes)
    model = LanguageModel(transformers.BartForConditionalGeneration(config).eval())
    with model.trace(IDS) as run:
        by_name = run.encoder.layers[0].mlp.output
    with model.trace(IDS) as run:
        assert torch.equal(run.model.encoder.layers[0].mlp.output, by_name)
        assert run.layers[0].mlp.output.shape == (1, 1, 32)


def test_a_compiled_model(nets):
    """`torch.compile` wraps a model, and the modules inside keep their names."""
    model = LanguageModel(torch.compile(nets["gpt2"]))
    with model.trace(IDS) as run:
        assert torch.equal(run.layers_output[1], seen(nets["gpt2"], "transformer.h.1")[0][0])
        assert torch.equal(run.lm_head.output, nets["gpt2"](IDS).logits)


def test_a_part_that_is_exchanged():
    net, other = architectures.build_causal("gpt2"), architectures.build_causal("gpt2")
    model = LanguageModel(net)
    assert model.layers[0].self_attn._owner is net.transformer.h[0].attn
    net.transformer.h[0] = other.transformer.h[1]
    net.transformer.ln_f = other.transformer.ln_f
    assert model.layers[0].self_attn._owner is other.transformer.h[1].attn
    assert model.ln_final._owner is other.transformer.ln_f
    with model.trace(IDS) as run:
        assert torch.equal(run.attentions_output[0], seen(net, "transformer.h.0.attn")[0][0])


def test_an_mlp_that_is_not_a_module(nets):
    """OPT's layers call fc1 and fc2 themselves."""
    net, model = nets["opt"], LanguageModel(nets["opt"])
    path = "model.decoder.layers.1"
    with model.trace(IDS) as run:
        before, after = run.layers[1].mlp.input, run.layers[1].mlp.output
    assert torch.equal(before, seen(net, f"{path}.fc1", inputs=True)[0][0])
    assert torch.equal(after, seen(net, f"{path}.fc2")[0][0])
    with model.trace(IDS) as run:
        run.layers[1].mlp.skip(torch.zeros_like(after))
    assert torch.equal(run.result.logits, seen(net, f"{path}.fc2", edit=torch.zeros_like)[1])
    with pytest.raises(InputError, match=r"layers\[1\]\.mlp cannot be called, because it is not a single module"):
        model.layers[1].mlp(after)


def test_an_attention_that_is_split(nets):
    """BERT's attention projects in a module of its own, which adds the residual."""
    net, model = nets["bert"], LanguageModel(nets["bert"])
    with model.trace(IDS) as run:
        given = run.attentions_output[0]
        run.attentions_output[0] = given * 2
    path = "bert.encoder.layer.0.attention.output.dense"
    assert torch.equal(given, seen(net, path)[0][0])
    assert torch.equal(run.result.logits, seen(net, path, edit=lambda x: x * 2)[1])


ENCODERS = {
    "clip text": (transformers.CLIPTextModel, {"vocab_size": 64}, "ln_final"),
    "siglip text": (transformers.SiglipTextModel, {"vocab_size": 64}, "ln_final"),
    "t5": (
        transformers.T5EncoderModel,
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3},
        "ln_final",
    ),
    "bert": (transformers.BertModel, {"vocab_size": 64}, None),
    "vit": (transformers.ViTModel, {"image_size": 16, "patch_size": 8}, "ln_final"),
    "dinov2": (transformers.Dinov2Model, {"image_size": 16, "patch_size": 8}, "ln_final"),
    "clip vision": (transformers.CLIPVisionModel, {"image_size": 16, "patch_size": 8}, None),
    "siglip vision": (transformers.SiglipVisionModel, {"image_size": 16, "patch_size": 8}, "ln_final"),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_of_text_and_images(kind):
    cls, sizes, norm = ENCODERS[kind]
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = cls.config_class(**(common if "d_model" not in sizes else {"num_heads": 4}) | sizes)
    torch.manual_seed(0)
    net = cls(config).eval()
    names = standard_names(net)
    given = {"pixel_values": torch.rand(1, 3, 16, 16)} if "image_size" in sizes else {"input_ids": IDS}
    states, outputs = [], []
    for layer in net.get_submodule(names["layers"]):
        layer.register_forward_hook(lambda m, args, output: states.append(output))
    if norm:
        net.get_submodule(names["ln_final"]).register_forward_hook(lambda m, args, output: outputs.append(output))
    result = net(**given, output_hidden_states=True)
    assert len(states) == 3
    for state, expected in list(zip(states, result.hidden_states[1:], strict=True))[:-1]:
        assert torch.equal(state if isinstance(state, torch.Tensor) else state[0], expected)
    if norm:
        assert torch.equal(outputs[0], result.last_hidden_state)
    assert all({"self_attn", "mlp"} <= set(layer_names(layer)) for layer in net.get_submodule(names["layers"]))


# The user's own, and the check


def odd():
    """Return a GPT-2 whose parts have meaningless names, in another order."""
    net = architectures.build_causal("gpt2")
    decoy, net.transformer.ln_f.real = nn.LayerNorm(32), None
    net.transformer.add_module("norm_of_nothing", decoy)
    modules = net.transformer._modules
    modules["norm_of_nothing"], modules["ln_f"] = modules.pop("norm_of_nothing"), modules.pop("ln_f")
    return net


def test_a_wrong_name_is_found_and_can_be_given():
    net = odd()
    assert model_names(net)["ln_final"] == "transformer.norm_of_nothing"
    with pytest.raises(InputError, match="'ln_final' was taken to be"):
        LanguageModel(net)
    model = LanguageModel(net, names={"ln_final": "transformer.ln_f"})
    assert model.ln_final._owner is net.transformer.ln_f
    without = LanguageModel(net, names={"ln_final": None})
    assert not hasattr(without, "ln_final")


WRONG_NAMES = [
    ({"layers": "transformer.h.0"}, "'transformer.h.0' is a GPT2Block, not a list of layers"),
    ({"lm_head": "transformer.ln_f"}, "'lm_head' was taken to be 'transformer.ln_f'"),
    ({"ln_final": "transformer.h.1.ln_1"}, "'ln_final' was taken to be 'transformer.h.1.ln_1', but"),
    ({"embed_tokens": "transformer.nothing"}, "has no module 'transformer.nothing' for 'embed_tokens'"),
    ({"layer": "transformer.h"}, r"'layer' is not a standard name \(did you mean 'layers'"),
]


@pytest.mark.parametrize("names, words", WRONG_NAMES, ids=[next(iter(names)) for names, _ in WRONG_NAMES])
def test_wrong_names_of_the_user(names, words, nets):
    with pytest.raises(InputError, match=words):
        LanguageModel(nets["gpt2"], names=names)


def test_names_within_a_layer(nets):
    model = LanguageModel(nets["gpt2"], names={"mlp": "mlp.c_fc:mlp.c_proj", "self_attn": "attn.c_proj"})
    with model.trace(IDS) as run:
        assert torch.equal(run.attentions_output[1], seen(nets["gpt2"], "transformer.h.1.attn.c_proj")[0][0])
        assert torch.equal(run.mlps_output[1], seen(nets["gpt2"], "transformer.h.1.mlp.c_proj")[0][0])


def test_a_model_without_layers_says_how_to_name_them(nets):
    model = LanguageModel(nets["gpt2"], names={"layers": None})
    with pytest.raises(PointNotFoundError, match="no layers were found in GPT2LMHeadModel: name them"):
        with model.trace(IDS) as run:
            run.layers_output[0]


def test_lists_that_are_not_layers_are_rejected():
    """XLM has a list of attentions and a list of MLPs, each of which the residual goes past."""
    with pytest.raises(
        InputError, match=r"'layers' was taken to be 'transformer\.ffns', but .* without passing through"
    ):
        LanguageModel(architectures.build_causal("xlm"))


def test_the_check_changes_nothing(net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    logits = net(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", NamesWarning)
        LanguageModel(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(tensor.device.type == "cpu" for tensor in (*net.parameters(), *net.buffers()))
    assert torch.equal(net(IDS).logits, logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_model_that_cannot_run_on_tokens_alone_gives_a_warning():
    class Needy(transformers.GPT2LMHeadModel):
        def forward(self, input_ids=None, *, image, **kwargs):
            return super().forward(input_ids, **kwargs)

    net = Needy(architectures.small_config("gpt2"))
    with pytest.warns(NamesWarning, match="the names found in Needy could not be verified"):
        LanguageModel(net)


# Hidden states


def test_setting_the_output_of_a_layer(model, net):
    path = f"{model_names(net)['layers']}.0"
    new = torch.randn(1, IDS.shape[1], 32)
    with model.trace(IDS) as run:
        run.layers_output[0] = new
        after = run.layers_output[0]
    assert after is new
    assert torch.equal(run.result.logits, seen(net, path, edit=lambda x: new)[1])


def test_editing_in_place(model, net):
    path = f"{model_names(net)['layers']}.1"

    def edit(x):
        x = x.clone()
        x[:, 2] = 0
        return x

    with model.trace(IDS) as run:
        run.layers_output[1][:, 2] = 0
    assert torch.equal(run.result.logits, seen(net, path, edit=edit)[1])


def test_setting_the_input_of_a_layer(model, net):
    path = f"{model_names(net)['layers']}.1"
    with model.trace(IDS) as run:
        given = run.layers_input[1]
        run.layers_input[1] = given * 2
    assert torch.equal(given, seen(net, path, inputs=True)[0][0])
    assert torch.equal(run.result.logits, seen(net, path, inputs=True, edit=lambda x: x * 2)[1])


def test_parts_of_a_layer(model, net):
    layers = model_names(net)["layers"]
    names = layer_names(net.get_submodule(layers)[1])
    for accessor, part in (("attentions_output", "self_attn"), ("mlps_output", "mlp")):
        path = f"{layers}.1.{names[part].rpartition(':')[2]}"
        with model.trace(IDS) as run:
            values = getattr(run, accessor)
            values[1] = torch.zeros_like(values[1])
        assert torch.equal(run.result.logits, seen(net, path, edit=torch.zeros_like)[1])


@pytest.mark.parametrize("accessor, part", [("attentions_input", "self_attn"), ("mlps_input", "mlp")])
def test_inputs_of_parts_of_a_layer(model, net, accessor, part):
    """Read and assigned, whether the layer passes it by position or by name."""
    layers = model_names(net)["layers"]
    first = layer_names(net.get_submodule(layers)[1])[part].partition(":")[0]
    given = []

    def clear(module, args, kwargs):
        name = next(iter(kwargs), None) if not args else None
        given.append(args[0] if args else kwargs[name])
        cleared = torch.zeros_like(given[0])
        return ((cleared, *args[1:]), kwargs) if args else (args, {**kwargs, name: cleared})

    hook = net.get_submodule(f"{layers}.1.{first}").register_forward_pre_hook(clear, with_kwargs=True)
    logits = net(IDS).logits
    hook.remove()
    with model.trace(IDS) as run:
        values = getattr(run, accessor)
        assert torch.equal(values[1], given[0])
        values[1] = torch.zeros_like(given[0])
    assert torch.equal(run.result.logits, logits)


def test_all_layers_at_once(gpt2):
    with gpt2.trace(IDS) as run:
        every = list(run.layers_output)
        with pytest.raises(OutOfOrderError):
            run.layers_input[0:1]
    assert len(every) == len(run.layers_output) == 2


def test_logits(model, net):
    with model.trace(IDS) as run:
        logits = run.logits
        probs = run.next_token_probs
        run.logits = logits + 1
        assert torch.equal(run.logits, logits + 1)
    assert torch.equal(run.result.logits, net(IDS).logits + 1)
    assert torch.equal(probs, net(IDS).logits[:, -1].softmax(-1))


def test_final_norm_and_head_by_hand(model, net):
    with model.trace(IDS) as run:
        last = run.layers_output[-1]
        logits = run.logits
    assert torch.equal(model.project_on_vocab(last), logits)


def test_a_head_of_two_modules():
    net = architectures.build_causal("electra")
    model = LanguageModel(net)
    with model.trace(IDS) as run:
        last = run.layers_output[-1]
    assert torch.equal(model.project_on_vocab(last), net(IDS).logits)
    with model.trace(IDS) as run:
        assert torch.equal(run.lm_head.output, net(IDS).logits)


def test_skipping_layers(model, net):
    path = f"{model_names(net)['layers']}.0"
    before = seen(net, path, inputs=True)[0][0]
    with model.trace(IDS) as run:
        run.skip_layers(0)
    expected = seen(net, path, edit=lambda x: before)[1]
    assert torch.equal(run.result.logits, expected)
    value = torch.randn(1, IDS.shape[1], 32)
    with model.trace(IDS) as run:
        run.skip_layers(0, 1, value)
    assert torch.equal(run.result.logits, seen(net, f"{model_names(net)['layers']}.1", edit=lambda x: value)[1])


@pytest.mark.parametrize("positions, at", [(None, slice(None)), (-1, [-1]), ([0, 2], [0, 2])])
def test_steering(model, net, positions, at):
    vector = torch.randn(32)

    def edit(x):
        x = x.clone()
        x[:, at] += 2 * vector
        return x

    with model.trace(IDS) as run:
        run.steer(1, vector, factor=2, positions=positions)
    assert torch.equal(run.result.logits, seen(net, f"{model_names(net)['layers']}.1", edit=edit)[1])


def test_steering_several_layers_ahead(gpt2, nets):
    with gpt2.trace(IDS) as run:
        run.steer([1, 0], torch.ones(32))  # in any order
    with gpt2.trace(IDS) as other:
        other.layers_output[0] += 1
        other.layers_output[1] += 1
    assert torch.equal(run.result.logits, other.result.logits)


def test_steering_a_layer_or_position_that_is_listed_twice(gpt2):
    found = []
    for layers, positions in ((1, 0), ([1, -1, 1], 0), (1, [0, 0, -6]), (torch.tensor([1, 1]), np.array([0, 0]))):
        with gpt2.trace(IDS) as run:
            run.steer(layers, torch.ones(32), positions=positions)
        found.append(run.logits)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_rows(model):
    ids = architectures.tokens(2)
    with model.trace(ids) as run:
        x, y = run.rows
        assert torch.equal(y.layers_output[0], run.layers_output[0][1:])
        y.layers_output[0] = x.layers_output[0]
        y.steer(1, torch.ones(32), positions=-1)
        changed = run.layers_output[1]
    with model.trace(ids[:1]) as alone:
        alone.steer(1, torch.ones(32), positions=-1)
        expected = alone.layers_output[1]
    with model.trace(ids[:1]) as plain:
        untouched = plain.layers_output[1]
    assert torch.allclose(changed[:1], untouched, atol=1e-5)
    assert torch.allclose(changed[1:], expected, atol=1e-5)


def test_rows_of_heads_and_logits(gpt2):
    ids = architectures.tokens(2)
    with gpt2.trace(ids) as run:
        x, y = run.rows
        x.heads_output[0] = y.heads_output[0]
        x.attention_probs[1] = y.attention_probs[1]
        x.logits = y.logits
    assert torch.equal(run.result.logits[0], run.result.logits[1])


# Inside an attention


def test_attention_probabilities(model, net):
    given = net(IDS, output_attentions=True).attentions
    with model.trace(IDS) as run:
        probs = [run.attention_probs[i] for i in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(probs, given, strict=True))
    assert torch.equal(run.result.logits, net(IDS).logits)


def test_attention_to_the_first_token_alone(gpt2, nets):
    """With all weight on one token, each head returns that token's value."""
    with gpt2.trace(IDS) as run:
        values = run.v[1]
        probs = torch.zeros_like(run.attention_probs[1])
        probs[..., 0] = 1
        run.attention_probs[1] = probs
        heads = run.heads_output[1]
    assert torch.allclose(heads, values[:, :1].expand_as(heads))


def test_probabilities_edited_in_place(model):
    with model.trace(IDS) as run:
        run.attention_probs[0][:, 1] = 0
    with model.trace(IDS) as other:
        probs = other.attention_probs[0].clone()
        probs[:, 1] = 0
        other.attention_probs[0] = probs
    assert torch.equal(run.result.logits, other.result.logits)
    assert not torch.equal(run.result.logits, model.trace(IDS).result.logits)


def test_probabilities_asked_for_inside_their_attention(gpt2):
    with gpt2.trace(IDS) as run:
        run.layers[0].self_attn.input
        run.q[0]
        inside = run.attention_probs[0]
        with pytest.raises(OutOfOrderError):
            run.layers[1].output
            run.attention_probs[1]
    with gpt2.trace(IDS) as run:
        assert torch.equal(run.attention_probs[0], inside)


def test_probabilities_in_two_runs_at_once(nets):
    a, b = LanguageModel(nets["gpt2"]), LanguageModel(nets["llama"])
    ids = architectures.tokens(1, 5)
    with a.trace(IDS) as x, b.trace(ids) as y:
        first = x.attention_probs[0], y.attention_probs[0]
        second = x.attention_probs[1], y.attention_probs[1]
        assert torch.overrides._get_current_function_mode_stack() == []
    for run, net, given, probs in ((x, nets["gpt2"], IDS, 0), (y, nets["llama"], ids, 1)):
        expected = net(given, output_attentions=True)
        assert torch.equal(first[probs], expected.attentions[0])
        assert torch.equal(second[probs], expected.attentions[1])
        assert torch.equal(run.result.logits, expected.logits)


def test_probabilities_of_every_step(gpt2):
    with gpt2.generate(IDS, max_new_tokens=3) as run:
        shapes = [run.attention_probs[1].shape for _ in run.steps]
    length = IDS.shape[1]
    assert shapes == [(1, 4, length, length), (1, 4, 1, length + 1), (1, 4, 1, length + 2)]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "phi3", "bert"])
def test_probabilities_beside_a_fused_kernel(kind):
    net = architectures.build_causal(kind, _attn_implementation="sdpa")
    with LanguageModel(net).trace(IDS) as run:
        probs = [run.attention_probs[i] for i in range(2)]
    assert torch.equal(run.result.logits, net(IDS).logits)
    net.set_attn_implementation("eager")
    expected = net(IDS, output_attentions=True).attentions
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(probs, expected, strict=True))


def test_values_of_a_model_that_shares_keys_among_heads():
    """When it writes one token at a time, transformers passes the heads that share a key as if they were queries."""
    net = architectures.build_causal("llama", _attn_implementation="sdpa", num_key_value_heads=2)
    given = {"max_new_tokens": 3, "do_sample": False}
    with LanguageModel(net).generate(IDS, **given) as run:
        steps = [(run.q[1], run.k[1], run.attention_probs[1], run.heads_output[1]) for _ in run.steps]
    net.set_attn_implementation("eager")
    with LanguageModel(net).generate(IDS, **given) as run:
        expected = [(run.q[1], run.k[1], run.attention_probs[1], run.heads_output[1]) for _ in run.steps]
    for values, others in zip(steps, expected, strict=True):
        for name, value, other in zip("qkpo", values, others, strict=True):
            if name == "k" and value.shape != other.shape:
                value = value.repeat_interleave(2, 2)
            assert torch.allclose(value, other, atol=1e-5), name


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_editing_a_head_while_a_model_writes(backend):
    net = architectures.build_causal("llama", _attn_implementation=backend, num_key_value_heads=2)
    given = {"max_new_tokens": 4, "do_sample": False}

    def without_head(module, args):
        heads = args[0].unflatten(-1, (4, -1)).clone()
        heads[:, :, 2] = 0
        return heads.flatten(-2)

    handle = net.model.layers[0].self_attn.o_proj.register_forward_pre_hook(without_head)
    expected = net.generate(IDS, **given)
    handle.remove()
    assert not torch.equal(net.generate(IDS, **given), expected)
    with LanguageModel(net).generate(IDS, **given) as run:
        for _ in run.steps:
            run.heads_output[0][:, :, 2] = 0
            assert run.attention_probs[1].shape[:2] == (1, 4)
    assert torch.equal(run.result, expected)
    with LanguageModel(net).generate(IDS, **given) as run:
        for _ in run.steps:
            run.attention_probs[0][:, 2] = 0
    assert torch.equal(run.result, expected)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["q", "k", "v", "attention_probs", "heads_output", "heads_result"])
def test_gradients_inside_an_attention(name, backend):
    """Against the change of the loss when the value is moved a little."""
    net = architectures.build_causal("gpt2", _attn_implementation=backend).double()
    model = LanguageModel(net)
    with torch.enable_grad(), model.trace(IDS, grad=True) as run:
        value = getattr(run, name)[1]
        value.retain_grad()
        run.logits.square().mean().backward()
    assert torch.equal(run.result.logits, net(IDS).logits)
    direction = torch.randn_like(value)
    losses = []
    for step in (1e-5, -1e-5):
        with model.trace(IDS) as run:
            getattr(run, name)[1] = value.detach() + step * direction
        losses.append(run.result.logits.square().mean())
    assert torch.allclose((losses[0] - losses[1]) / 2e-5, (value.grad * direction).sum(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_results_of_the_heads(kind, nets):
    model, net = LanguageModel(nets[kind]), nets[kind]
    with model.trace(IDS) as run:
        results = run.heads_result[1]
        attention = run.attentions_output[1]
    block = net.get_submodule(model_names(net)["layers"])[1]
    bias = getattr(block.attn.c_proj if kind == "gpt2" else block.self_attn.o_proj, "bias", None)
    assert results.shape == (1, IDS.shape[1], 4, 32)
    assert torch.allclose(results.sum(2) + (0 if bias is None else bias), attention, atol=1e-6)
    assert torch.equal(run.result.logits, net(IDS).logits)
    with model.trace(IDS) as run:
        run.heads_result[1][:, :, 2] = 0
    with model.trace(IDS) as other:
        other.heads_output[1][:, :, 2] = 0
    assert torch.allclose(run.result.logits, other.result.logits, atol=1e-5)
    assert not torch.equal(run.result.logits, net(IDS).logits)


def test_a_kernel_that_shows_nothing():
    model = LanguageModel(architectures.build_causal("gpt2"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
        with pytest.raises(InputError, match=r"flash_attention_2'.*set_attn_implementation\(\"sdpa\"\)"):
            with model.trace(IDS) as run:
                run.attention_probs[0]


def queries_keys_values(net, layer):
    """Return the queries, keys and values of each head that transformers passes to its attention function."""
    block = net.get_submodule(model_names(net)["layers"])[layer]
    module = block.get_submodule(layer_names(block)["self_attn"].partition(":")[0])
    found = {}
    real = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watch(of, query, key, value, *args, **kwargs):
        if of is module:
            found.update(q=query, k=key, v=value)
        return real(of, query, key, value, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS, "watched", watch)
        masks = transformers.masking_utils
        patch.setitem(masks.ALL_MASK_ATTENTION_FUNCTIONS, "watched", masks.sdpa_mask)
        patch.setattr(net.config, "_attn_implementation_internal", "watched")
        net(IDS)
    return {name: value.transpose(1, 2) for name, value in found.items()}


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bert", "llama", "gpt_neox", "phi3"])
def test_queries_keys_and_values(kind, nets):
    """Those that meet in the attention, after rotary positions."""
    model = LanguageModel(nets[kind])
    expected = queries_keys_values(nets[kind], 0)
    with model.trace(IDS) as run:
        found = {name: getattr(run, name)[0] for name in "qkv"}
    assert torch.equal(found["q"], expected["q"])
    groups = found["k"].shape[2] // expected["k"].shape[2]  # of heads that share a key
    for name in "kv":
        assert torch.equal(found[name], expected[name].repeat_interleave(groups, 2))


def test_setting_the_values_of_one_head(model):
    with model.trace(IDS) as run:
        values = run.v[1].clone()
        values[:, :, 0] = 0
        run.v[1] = values
        heads = run.heads_output[1]
    share = heads.shape[2] // values.shape[2]  # heads that use the same values
    silent = (heads == 0).flatten(-1).all(-1).all(1)[0]
    assert silent.tolist() == [head < share for head in range(4)]


def test_a_head_whose_values_are_zero(model, net):
    with model.trace(IDS) as run:
        heads = run.heads_output[1]
        run.heads_output[1][:, :, 2] = 0
    assert heads.shape[:3] == (1, IDS.shape[1], 4)
    with model.trace(IDS) as other:
        other.heads_output[1] = torch.where(torch.arange(4)[:, None] == 2, 0.0, heads)
    assert torch.equal(run.result.logits, other.result.logits)
    assert not torch.equal(run.result.logits, net(IDS).logits)


# What is asked for wrongly


@pytest.mark.parametrize("index", [2, -3, "1", 1.0, True])
def test_a_layer_that_does_not_exist(gpt2, index):
    with pytest.raises(InputError, match=r"there is no layer .*, the model has 2"):
        with gpt2.trace(IDS) as run:
            run.layers_output[index]
    with pytest.raises(InputError, match="there is no layer"):
        with gpt2.trace(IDS) as run:
            run.steer(index, torch.ones(32))


def test_wrong_steering(gpt2):
    for call, words in (
        (lambda run: run.steer(0, [1.0]), "steer takes a tensor of real numbers, .*, not list"),
        (lambda run: run.steer(0, torch.ones(3)), "has 32 features per token, but the vector has 3"),
        (
            lambda run: run.steer(0, torch.ones(32), positions=6),
            "there is no position 6, because the sequence has 6 tokens",
        ),
        (lambda run: run.skip_layers(1, 0), "the last layer comes before the first"),
    ):
        with pytest.raises((InputError, AssignmentError), match=words):
            with gpt2.trace(IDS) as run:
                call(run)


def test_wrong_values(gpt2):
    for call, words in (
        (lambda run: setattr(run, "logits", [1]), "takes a tensor, not list"),
        (lambda run: run.heads_output.__setitem__(0, torch.ones(1)), r"has the shape \(1, 6, 4, 8\), but \(1,\)"),
        (lambda run: run.attention_probs.__setitem__(0, torch.ones(1, 4, 6, 5)), "shape"),
    ):
        with pytest.raises(AssignmentError, match=words):
            with gpt2.trace(IDS) as run:
                call(run)


def test_a_layer_without_such_a_part():
    model = LanguageModel(architectures.build_causal("mamba"))
    with pytest.raises(PointNotFoundError, match=r"layers\[0\] has no mlp; it has norm, mixer"):
        with model.trace(IDS) as run:
            run.mlps_output[0]
    with pytest.raises(OutOfOrderError, match="MambaMixer computes no attention product"):
        with model.trace(IDS) as run:
            run.q[0]


def test_only_values_can_be_assigned(gpt2):
    with gpt2.trace(IDS) as run:
        with pytest.raises(PointNotFoundError):
            run.layers_output = 1


def test_an_error_names_the_users_line(gpt2):
    with pytest.raises(AssignmentError, match=r"layers\[0\]\.output \(.*test_language_names\.py:\d+\)"):
        with gpt2.trace(IDS) as run:
            run.layers_output[0] = torch.ones(3)


FUSED = ["gpt2", "gpt_neox", "bloom", "falcon", "mpt", "codegen", "phi3", "gpt_bigcode"]


@pytest.mark.parametrize("kind", FUSED)
def test_fused_projections_are_told_apart(kind):
    """Without values the heads say nothing; queries and keys have no part in that. A head's values are its own."""
    model = LanguageModel(architectures.build_causal(kind))
    for layer in range(len(model.layers)):
        said = {}
        for name in "qkv":
            with model.trace(IDS) as run:
                values = getattr(run, name)
                values[layer] = torch.zeros_like(values[layer])
                said[name] = run.heads_output[layer].abs().amax()
        assert said["v"] < 1e-6
        assert min(said["q"], said["k"]) > 1e-3
        with model.trace(IDS) as run:
            plain = run.heads_output[layer].clone()
        with model.trace(IDS) as run:
            values = run.v[layer]
            values[:, :, -1] *= 2
            changed = (run.heads_output[layer] - plain).abs().amax((0, 1, 3)) > 1e-6
        assert changed[-1] and (values.shape[2] == 1 or not changed[0])


def test_what_is_not_the_number_of_a_layer():
    run = LanguageModel((language_kinds.gpt2(), language_kinds.TOKENIZER)).trace("a red circle")
    with pytest.raises(InputError, match=r"the input of the first layer is layers_input\[0\]"):
        run.steer("embedding", torch.zeros(4))
    with pytest.raises(InputError, match=r"skip_layers takes the number of a layer, not \[1, 2\]"):
        run.skip_layers([1, 2])
    with pytest.raises(InputError, match=r"takes the number of a layer, not array\(\[0, 1\]\)"):
        run.layers_output[np.array([0, 1])]
    with pytest.raises(InputError, match="there is no layer"):
        run.layers_output[np.True_]


def test_a_value_after_the_text_of_a_step():
    with pytest.raises(OutOfOrderError, match=r"the end of the step, to which step.text and step.tokens run the model"):
        with LanguageModel((language_kinds.gpt2(), language_kinds.TOKENIZER)).generate(
            "a red circle", max_new_tokens=2
        ) as run:
            for step in run.steps:
                step.text
                run.layers_output[0]


class Merging(nn.Linear):
    """Adds to its weight in evaluation, as layers of loralib do."""

    is_merged = False

    def train(self, mode=True):
        if self.is_merged is mode:
            self.weight.data += -1.0 if mode else 1.0
            self.is_merged = not mode
        return super().train(mode)


def test_the_check_of_a_model_in_training_leaves_its_weights_alone(monkeypatch):
    net = language_kinds.gpt2()
    net.transformer.h[1].mlp = Merging(32, 32)
    layer = net.transformer.h[1].mlp
    monkeypatch.setattr(Merging, "forward", lambda self, x: nn.Linear.forward(self, x) * (x.sum().item() > 0))
    net.train()
    before = layer.weight.detach().clone()
    LanguageModel(net)
    assert torch.equal(layer.weight, before) and net.training
