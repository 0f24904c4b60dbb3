"""Patching, attribution, tracing, steering and function vectors on ten architectures, against plain hooks.

What is not compared here is in the file of the lens: see the table in docs/lenses/index.md.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hook_patching import Parts, patched_values

from diffsight import (
    LanguageModel,
    VisionLanguageModel,
    activation_patching,
    attribution_patching,
    causal_tracing,
    steer,
    steering_vector,
)
from diffsight.errors import InputError
from diffsight.lenses import logit_difference
from helpers import first, outputs, refusal, replaced, with_first
from models import architectures, diffusion, language_kinds, vision_language

LLAMA = Parts("model.layers", "self_attn", "mlp", "self_attn.o_proj", heads=4)
CLEAN, CORRUPTED, TOKENS = "a red circle", "a blue circle", (11, 23)


@dataclass
class Case:
    """A model, its parts, and further inputs."""

    net: Any
    model: LanguageModel
    parts: Parts
    embedding: str
    more: dict

    def inputs(self, prompt: str) -> dict[str, Any]:
        """Return the arguments of the bare network for a prompt."""
        run = self.model.trace(prompt, **self.more)
        values = dict(run.model_inputs.values)
        if self.model.is_encoder_decoder:
            values["decoder_input_ids"] = self.more.get("decoder_input_ids", run.decoder_tokens)
        return values

    @property
    def layers(self) -> list[torch.nn.Module]:
        return list(self.net.get_submodule(self.parts.layers))

    def logits(self, prompt: str = CORRUPTED) -> torch.Tensor:
        return self.net(**self.inputs(prompt)).logits

    def module(self, kind: str, layer: int) -> torch.nn.Module:
        return self.parts.modules(self.net, kind)[layer]


def text(net, parts, embedding):
    return Case(net, LanguageModel((net, language_kinds.TOKENIZER)), parts, embedding, {})


def reading(name):
    """Return a network with a vocabulary that the tokenizer fits in."""
    return architectures.build_causal(name, vocab_size=language_kinds.SIZE)


def llava():
    net, processor = vision_language.llava()
    parts = Parts("model.language_model.layers", "self_attn", "mlp", "self_attn.o_proj", heads=4)
    embedding = "model.language_model.embed_tokens"
    return Case(net, VisionLanguageModel((net, processor)), parts, embedding, {"images": diffusion.IMAGE})


def t5():
    parts = Parts(
        "decoder.block", "layer.0.SelfAttention", "layer.2.DenseReluDense", "layer.0.SelfAttention.o", heads=4
    )
    case = text(language_kinds.t5(), parts, "encoder.embed_tokens")
    case.more = {"decoder_input_ids": torch.tensor([[0, 8, 12]])}
    return case


BUILDERS = {
    "gpt2": lambda: text(
        language_kinds.gpt2(), Parts("transformer.h", "attn", "mlp", "attn.c_proj", heads=4), "transformer.wte"
    ),
    "llama": lambda: text(language_kinds.llama(), LLAMA, "model.embed_tokens"),
    "gpt_neox": lambda: text(
        reading("gpt_neox"),
        Parts("gpt_neox.layers", "attention", "mlp", "attention.dense", heads=4),
        "gpt_neox.embed_in",
    ),
    "gemma2": lambda: text(reading("gemma2"), LLAMA, "model.embed_tokens"),
    "qwen3": lambda: text(reading("qwen3"), LLAMA, "model.embed_tokens"),
    "qwen3_moe": lambda: text(reading("qwen3_moe"), LLAMA, "model.embed_tokens"),
    "mamba": lambda: text(language_kinds.mamba(), Parts("backbone.layers"), "backbone.embeddings"),
    "t5": t5,
    "bert": lambda: text(
        language_kinds.bert(),
        Parts("bert.encoder.layer", "attention", "", "attention.output.dense", heads=4),
        "bert.embeddings.word_embeddings",
    ),
    "llava": llava,
}


@pytest.fixture(scope="module")
def cases():
    return {}


@pytest.fixture(params=BUILDERS)
def case(request, cases):
    return cases.get(request.param) or cases.setdefault(request.param, BUILDERS[request.param]())


def difference(logits):
    return logits[0, -1, TOKENS[0]] - logits[0, -1, TOKENS[1]]


METRIC, QUIET = logit_difference(*TOKENS), {"progress": False}
BLUE = [2]  # the token in the corrupted prompt
INNER = ("attentions", "mlps", "heads")


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5", "llava"])
@pytest.mark.parametrize("sites", INNER)
def test_patching_inside_layers(cases, name, sites):
    case = cases.get(name) or cases.setdefault(name, BUILDERS[name]())
    result = activation_patching(case.model, CLEAN, CORRUPTED, METRIC, sites=sites, **case.more, **QUIET)
    sides = case.inputs(CLEAN), case.inputs(CORRUPTED)
    assert (result.clean, result.corrupted) == ((CLEAN,), (CORRUPTED,))
    expected = patched_values(case.net, case.parts, sites, *sides, difference)
    assert torch.allclose(result.values[0].reshape(expected.shape), expected, atol=2e-5)
    assert expected.std() > 1e-6


@torch.no_grad()
def test_attribution_equals_finite_differences(case):
    """At the last token after each layer."""
    with torch.enable_grad():
        result = attribution_patching(case.model, CLEAN, CORRUPTED, METRIC, positions=[-1], **case.more, **QUIET)
    clean, corrupted = case.inputs(CLEAN), case.inputs(CORRUPTED)
    for layer, module in enumerate(case.layers):
        values = [first(outputs(module, case.net, **inputs)[0])[:, -1] for inputs in (clean, corrupted)]
        ends, size = [], float(5e-4 * values[1].norm() / (values[0] - values[1]).norm())
        for factor in (-size, size):

            def change(output, factor=factor, values=values):
                changed = first(output).clone()
                changed[:, -1] += factor * (values[0] - values[1])
                return with_first(output, changed)

            with replaced(module, change):
                ends.append(float(difference(case.net(**corrupted).logits)))
        slope = (ends[1] - ends[0]) / (2 * size)
        assert float(result.values[0, layer, 0] - result.corrupted_metric) == pytest.approx(slope, rel=0.03, abs=2e-5)
    assert (result.values - result.corrupted_metric).abs().max() > 1e-4


@torch.no_grad()
def test_tracing_equals_a_loop_with_hooks(case):
    """Every layer is restored at every token, with the noise of one sample."""
    trace = causal_tracing(case.model, CORRUPTED, "blue", samples=1, batch_size=7, **case.more, **QUIET)
    subject = [i for i, name in enumerate(trace.columns) if name.endswith("*")]
    if case.model.is_encoder_decoder:
        assert not subject and len(trace.columns) == 3  # the decoder's tokens
        subject = BLUE
    check_trace(case, trace, case.layers, subject)


@torch.no_grad()
def test_tracing_an_encoder(cases):
    case = cases.get("t5") or cases.setdefault("t5", BUILDERS["t5"]())
    options = {"samples": 1, "batch_size": 2, **case.more, **QUIET}
    trace = causal_tracing(case.model, CORRUPTED, "blue", sites="encoder.block[*]", **options)
    assert trace.columns == ("<bos>", "a", " blue*", " circle")
    assert trace.sites[1] == "encoder.block[1]"
    check_trace(case, trace, case.net.encoder.block, BLUE)
    keys = "decoder.block[0].layer[1].EncDecAttention.k.output"  # one for each token of the encoder
    assert "without one value for each of the 3 tokens" in refusal(
        causal_tracing, case.model, CORRUPTED, "blue", sites=keys, **options
    )


@torch.no_grad()
def test_tracing_a_decoder_runs_the_encoder_twice(cases):
    """In the clean run and in that with noise: its output with noise is the same in all rows."""
    case = cases.get("t5") or cases.setdefault("t5", BUILDERS["t5"]())
    calls = outputs(case.net.encoder, causal_tracing, case.model, CORRUPTED, "blue", samples=1, **case.more, **QUIET)
    assert len(calls) == 2


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_needs_more_than_hidden_states(cases, dtype):
    """T5's layers need the position bias too. Leaving it out changes little here, which must be noticed all the same.
    What the last layer returns at the first token has no effect on the last one."""
    case = cases.get("t5") or cases.setdefault("t5", BUILDERS["t5"]())
    case.net.to(dtype)
    try:
        options = {"layers": -1, "samples": 1, "seed": 7, **case.more, **QUIET}
        trace = causal_tracing(case.model, "the square the", "square", **options)
        assert trace.values[0, 0] == pytest.approx(trace.corrupted, rel=1e-3)
        options = {"sites": "mlps", "layers": -1, "positions": 0, **case.more, **QUIET}
        result = activation_patching(case.model, CLEAN, CORRUPTED, METRIC, **options)
        assert torch.equal(result.values[0, 0], result.corrupted_metric)
    finally:
        case.net.float()


def check_trace(case, trace, modules, subject):
    """Compare a trace with one sample with runs in which hooks noise the subject and restore a module's output."""
    inputs, embedding = case.inputs(CORRUPTED), case.net.get_submodule(case.embedding)
    noise = torch.randn(1, len(subject), 32, generator=torch.Generator().manual_seed(0)) * 3 * embedding.weight.std()
    clean = []
    handles = [
        layer.register_forward_hook(lambda _, args, output: clean.append(first(output).clone())) for layer in modules
    ]
    probabilities = case.net(**inputs).logits[0, -1].softmax(-1)
    for handle in handles:
        handle.remove()
    answer = int(probabilities.argmax())

    def noised(output):
        changed = output.clone()
        changed[:, subject] += noise
        return changed

    for layer, module in enumerate(modules):
        for token in (subject[0], len(trace.columns) - 1):

            def restored(output, layer=layer, token=token):
                value = first(output).clone()
                value[:, token] = clean[layer][:, token]
                return with_first(output, value)

            with replaced(embedding, noised), replaced(module, restored):
                expected = float(case.net(**inputs).logits[0, -1].softmax(-1)[answer])
            assert float(trace.values[layer, token]) == pytest.approx(expected, abs=1e-6)
    with replaced(embedding, noised):
        assert trace.corrupted == pytest.approx(float(case.net(**inputs).logits[0, -1].softmax(-1)[answer]), abs=1e-6)
    assert trace.clean == pytest.approx(float(probabilities[answer]), abs=1e-6)
    assert subject and abs(trace.corrupted - trace.clean) > 1e-7


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"positions": -1}, {"mode": "remove", "factor": 1.0}, {"keep_norm": True}])
def test_steering_equals_a_hook(case, options):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    factor = options.get("factor", 2.0)

    def change(output):
        value = first(output)
        unit = vector / vector.norm()
        moved = value - (value @ unit)[..., None] * unit if "mode" in options else value + factor * vector
        if "keep_norm" in options:
            moved = moved * value.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
        if "positions" in options:
            moved = torch.cat([value[:, :-1], moved[:, -1:]], 1)
        return with_first(output, moved)

    steered = steer(case.model, 1, vector, **{"factor": factor, **options})
    with replaced(case.layers[1], change):
        expected = case.logits()
    assert torch.allclose(steered.trace(CORRUPTED, **case.more).result.logits, expected, atol=1e-4)
    assert not torch.allclose(expected, case.logits(), atol=1e-3)


@torch.no_grad()
def test_a_steering_vector_is_the_difference_of_means(case):
    sides = [["a red circle", "the green square"], ["a blue circle above the square", "a photo"]]
    found = steering_vector(case.model, *sides, layers=[1], **case.more, **QUIET)
    means = []
    for side in sides:
        states = []
        handle = case.layers[1].register_forward_hook(
            lambda _, args, output, states=states: states.append(first(output)[0, -1].clone())
        )
        for prompt in side:
            case.net(**case.inputs(prompt))
        handle.remove()
        means.append(torch.stack(states).mean(0))
    assert torch.allclose(found[1], means[0] - means[1], atol=2e-5)
    assert found[1].norm() > 1e-4


@torch.no_grad()
def test_heads_sum_to_what_the_attention_adds(case):
    """What the heads add, and the bias of the output projection."""
    if not case.parts.heads:
        pytest.skip("a state space has no heads")
    projection = case.module("heads", 1)
    if case.model.label.startswith("Bert"):  # its output projection is in another module than the heads
        with pytest.raises(InputError, match="no output projection"), case.model.trace(CLEAN) as run:
            run.heads_result[1]
        return
    expected = first(outputs(projection, case.net, **case.inputs(CLEAN))[0])
    with case.model.trace(CLEAN, **case.more) as run:
        heads = run.heads_result[1].clone()
        run.stop()
    assert heads.shape[2] == case.parts.heads
    bias = 0 if projection.bias is None else projection.bias
    assert torch.allclose(heads.sum(2) + bias, expected, atol=1e-5)
    assert heads.norm(dim=-1).std() > 1e-5
