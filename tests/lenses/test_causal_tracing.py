"""Causal tracing and prompt swapping, compared with loops of plain hooks."""

import pytest
import torch
from hook_patching import Block

from diffsight import DiffusionModel, LanguageModel, causal_tracing, prompt_swap
from diffsight.lenses import latent_distance, pixel_distance
from helpers import SEED, draw, module_at, refusal
from models import diffusion, language

OTHERS = language.neox, language.qwen3, language.mixtral, language.mamba
PROMPT, SUBJECT = "The Eiffel Tower is in the city of", "Eiffel Tower"


def blocks_of(net):
    if hasattr(net, "gpt_neox"):
        return net.gpt_neox.embed_in, net.gpt_neox.layers
    if hasattr(net, "backbone"):
        return net.backbone.embeddings, net.backbone.layers
    if hasattr(net, "transformer"):
        return net.transformer.wte, net.transformer.h
    return net.model.embed_tokens, net.model.layers


def part_of(block, kind):
    names = {"layers": "", "mlps": "mlp", "attentions": "attn" if hasattr(block, "attn") else "self_attn"}
    return block.get_submodule(names[kind])


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def with_first(output, value):
    return value if isinstance(output, torch.Tensor) else (value, *output[1:])


def noise_of(net, tokens, samples, width, seed=0):
    embeddings, _ = blocks_of(net)
    noise = torch.randn(samples, tokens, width, generator=torch.Generator().manual_seed(seed))
    return noise * 3.0 * embeddings.weight.std()


@torch.no_grad()
@pytest.mark.parametrize(
    ("build_net", "kind"),
    [
        *((net, kind) for net in (language.gpt2, language.llama, language.gemma2) for kind in ("mlps", "attentions")),
        *((net, "layers") for net in (language.gpt2, language.gemma2, *OTHERS)),
    ],
)
def test_it_equals_a_loop_with_hooks(build_net, kind):
    net, window, samples = build_net(), 1 if kind == "layers" else 2, 2
    ids = language.ids(PROMPT)
    embeddings, blocks = blocks_of(net)
    part = {
        "layers": lambda b: b,
        "mlps": lambda b: b.mlp,
        "attentions": lambda b: getattr(b, "attn", None) or b.self_attn,
    }
    places = [part[kind](block) for block in blocks]
    pieces = [language.TOKENIZER.decode([token]) for token in ids[0]]
    inside = [i for i, piece in enumerate(pieces) if piece.strip() and piece.strip() in SUBJECT.replace(" ", " ")]
    subject = range(min(inside), max(inside) + 1)
    clean = []

    def keep(module, args, out):
        clean.append(first(out).clone())

    hooks = [place.register_forward_hook(keep) for place in places]
    probabilities = net(ids).logits[0, -1].softmax(-1)
    for hook in hooks:
        hook.remove()
    answer = int(probabilities.argmax())
    noise = noise_of(net, len(subject), samples, 32)

    def probability(sample, layers=(), token=None):
        def corrupt(module, args, out):
            out = out.clone()
            out[:, subject.start : subject.stop] += noise[sample]
            return out

        hooks = [embeddings.register_forward_hook(corrupt)]
        for layer in layers:

            def restore(module, args, out, layer=layer):
                value = first(out).clone()
                value[0, token] = clean[layer][0, token]
                return with_first(out, value)

            hooks.append(places[layer].register_forward_hook(restore))
        found = net(ids).logits[0, -1].softmax(-1)[answer]
        for hook in hooks:
            hook.remove()
        return float(found)

    corrupted = sum(probability(sample) for sample in range(samples)) / samples
    trace = causal_tracing(
        LanguageModel((net, language.TOKENIZER)), PROMPT, SUBJECT, sites=kind, window=window, samples=samples,
        batch_size=5, progress=False,
    )  # fmt: skip
    expected = torch.zeros(4, ids.shape[1])
    for layer in range(4):
        around = range(max(0, layer - window // 2), min(4, layer + (window + 1) // 2))
        for token in range(ids.shape[1]):
            expected[layer, token] = sum(probability(sample, around, token) for sample in range(samples)) / samples
    scale = abs(trace.clean - corrupted)
    assert trace.clean == pytest.approx(float(probabilities[answer]), abs=1e-6)
    assert trace.corrupted == pytest.approx(corrupted, abs=1e-6)
    assert [name.endswith("*") for name in trace.columns] == [i in subject for i in range(len(trace.columns))]
    assert torch.allclose((trace.values - corrupted) / scale, (expected - corrupted) / scale, atol=0.02)
    if kind == "layers":  # the last layer at the last token is all there is
        assert float(trace.values[-1, -1]) == pytest.approx(trace.clean, abs=1e-6)


@torch.no_grad()
def test_modules_are_restored_by_paths(model):
    """Also in an order other than the model's, and several together."""
    options = {"samples": 2, "window": 3, "progress": False}
    named = causal_tracing(model, PROMPT, SUBJECT, sites="mlps", **options)
    paths = causal_tracing(model, PROMPT, SUBJECT, sites="layers[*].mlp", **options)
    assert torch.allclose(named.values, paths.values, atol=1e-6)
    assert paths.sites[1] == "layers[1].mlp" and paths.columns == named.columns
    back = causal_tracing(model, PROMPT, SUBJECT, sites=[f"layers[{i}].mlp" for i in (3, 2, 1, 0)], **options)
    assert torch.allclose(back.values.flip(0), named.values, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("sites", "computed"),
    [
        ("mlps", (1, 2, 3, 4)),
        ("layers[*].mlp", (1, 2, 3, 4)),
        (["layers[3].mlp", "layers[1].mlp", "lm_head"], (1, 2, 2, 3)),
    ],
)
def test_layers_before_the_restored_one_are_not_computed_again(net, model, sites, computed):
    """Rows of a site start at its layer. The last site is in no layer, so its rows run in full."""
    rows = [0] * 4
    handles = [
        layer.mlp.register_forward_hook(lambda module, args, output, i=i: rows.__setitem__(i, rows[i] + len(output)))
        for i, layer in enumerate(net.transformer.h)
    ]
    trace = causal_tracing(model, PROMPT, SUBJECT, sites=sites, samples=1, progress=False)
    for handle in handles:
        handle.remove()
    plain = 2, 2, 2, 3  # the clean run, that with noise, and a trial of the last layer
    assert rows == [count * len(trace.columns) + once for count, once in zip(computed, plain)]


TEXT = "a red circle above a blue square"
CALL = {"num_inference_steps": 2, "guidance_scale": 5.0}
SIZES = {"height": 32, "width": 32, "max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False}


def pixels(image):
    return torch.tensor(list(image.convert("RGB").tobytes())).float() / 255


SITES = ["unet.mid_block", "text_encoder.layers[1]"]


@torch.no_grad()
def test_a_pipeline_equals_runs_with_hooks():
    pipe = diffusion.stable_diffusion()
    trace = causal_tracing(
        DiffusionModel(pipe), TEXT, "circle", sites=SITES, metric=pixel_distance(), samples=2, seed=SEED,
        progress=False, **CALL,
    )  # fmt: skip
    tokens = pipe.tokenizer(TEXT)["input_ids"]
    place = tokens.index(pipe.tokenizer("circle")["input_ids"][1])
    noise = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(SEED)) * 3
    noise *= pipe.text_encoder.get_input_embeddings().weight.std()
    layers, mid = pipe.text_encoder.encoder.layers, pipe.unet.mid_block

    def drawn(*hooks):
        image = draw(pipe, {"prompt": TEXT, **CALL})[0]
        for hook in hooks:
            hook.remove()
        return pixels(image)

    kept, states = [], []
    clean = drawn(
        mid.register_forward_hook(lambda module, args, out: kept.append(out[1].clone())),
        layers[1].register_forward_hook(lambda module, args, out: states.append(first(out).clone())),
    )
    measured = []
    for sample in range(2):
        calls = {"embedding": 0, "state": 0, "mid": 0}

        def corrupt(module, args, sample=sample, calls=calls):
            calls["embedding"] += 1
            hidden = args[0].clone()
            if calls["embedding"] == 1:  # the prompt; the second call encodes the negative prompt
                hidden[0, place] += noise[sample, 0]
            return (hidden, *args[1:])

        def restore_mid(module, args, out, calls=calls):
            out = out.clone()
            out[1] = kept[calls["mid"]]
            calls["mid"] += 1
            return out

        def restore_state(module, args, out, calls=calls):
            calls["state"] += 1
            return with_first(out, states[calls["state"] - 1])

        corrupted = drawn(layers[0].register_forward_pre_hook(corrupt))
        calls["embedding"] = 0
        mids = drawn(layers[0].register_forward_pre_hook(corrupt), mid.register_forward_hook(restore_mid))
        calls["embedding"] = 0
        encoded = drawn(layers[0].register_forward_pre_hook(corrupt), layers[1].register_forward_hook(restore_state))
        measured.append([float((image - clean).square().mean().sqrt()) for image in (corrupted, mids, encoded)])
    values = [sum(pair) / 2 for pair in zip(*measured)]
    assert trace.clean == 0
    assert trace.corrupted == pytest.approx(values[0], abs=1e-3)
    assert trace.values[:, 0].tolist() == pytest.approx(values[1:], abs=1e-3)
    assert values[0] > 0.005


FIRST_LAYERS = {  # the first layer of each text encoder
    "stable_diffusion_xl": {"text_encoder": "encoder.layers.0", "text_encoder_2": "text_model.encoder.layers.0"},
    "stable_diffusion_3": {
        "text_encoder": "text_model.encoder.layers.0",
        "text_encoder_2": "text_model.encoder.layers.0",
        "text_encoder_3": "encoder.block.0",
    },
    "flux": {"text_encoder": "encoder.layers.0", "text_encoder_2": "encoder.block.0"},
    "pixart_sigma": {"text_encoder": "encoder.block.0"},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", FIRST_LAYERS)
def test_other_pipelines_equal_runs_with_hooks(kind):
    """The subject is noised in every text encoder, and a block is restored in the conditional branch."""
    small = diffusion.PIPELINES[kind]
    pipe = small.build()
    block = Block.of(pipe, kind)
    call = {name: value for name, value in small.inputs().items() if name not in ("prompt", "output_type")}
    call["num_inference_steps"] = 2
    trace = causal_tracing(
        DiffusionModel(pipe), TEXT, "circle", sites=block.site, metric=latent_distance(), samples=1, noise=30,
        seed=SEED, progress=False, **call,
    )  # fmt: skip
    module, kept = block.module, []

    def latents(*hooks):
        found = draw(pipe, {"prompt": TEXT, **call, "output_type": "latent"})
        for hook in hooks:
            hook.remove()
        return found

    def noising():
        """Hooks that noise the subject in the first call of each text encoder, which encodes the prompt."""
        for name, path in FIRST_LAYERS[kind].items():
            tokenizer, encoder = getattr(pipe, name.replace("text_encoder", "tokenizer")), getattr(pipe, name)
            weights, calls = encoder.get_input_embeddings().weight, []
            circle = tokenizer("circle")["input_ids"]
            ids = tokenizer(TEXT)["input_ids"]
            ends = tokenizer("")["input_ids"]
            subject = [token for token in circle if token not in ends]
            place = next(i for i in range(len(ids)) if ids[i : i + len(subject)] == subject)
            noise = torch.randn(1, len(subject), weights.shape[1], generator=torch.Generator().manual_seed(SEED))
            noise *= 30 * weights.std()

            def corrupt(_, args, calls=calls, place=place, noise=noise):
                calls.append(1)
                hidden = args[0].clone()
                if len(calls) == 1:
                    hidden[:, place : place + noise.shape[1]] += noise
                return (hidden, *args[1:])

            yield encoder.get_submodule(path).register_forward_pre_hook(corrupt)

    clean = latents(module.register_forward_hook(lambda _, args, out: kept.append(block.image(out)[-1:].clone())))
    count = []

    def restore(_, args, out):
        value = block.image(out).clone()
        value[-1:] = kept[len(count)]
        count.append(1)
        return block.with_image(out, value)

    corrupted, restored = latents(*noising()), latents(*noising(), module.register_forward_hook(restore))
    expected = [float((found - clean).square().mean().sqrt()) for found in (corrupted, restored)]
    assert trace.clean == pytest.approx(0, abs=1e-5)
    assert [trace.corrupted, float(trace.values)] == pytest.approx(expected, rel=0.02, abs=1e-5)
    assert expected[0] > 1e-4 and expected[1] != expected[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_xl", "pixart_sigma"])
def test_a_prompt_swapped_in_windows_of_layers(kind):
    pipe, other = diffusion.PIPELINES[kind].build(), TEXT.replace("blue", "green")
    call = {**CALL, **SIZES} if kind == "pixart_sigma" else CALL
    model = DiffusionModel(pipe)
    found = prompt_swap(model, TEXT, other, pixel_distance(), window=2, seed=SEED, progress=False, **call)
    modules = [module_at(pipe, path.replace("[", ".").replace("]", "")) for path in found.layers]
    seen = []

    def keep(module, args, out):
        seen.append(args[0][1].clone())

    hooks = [part.register_forward_hook(keep) for module in modules for part in (module.to_k,)]
    assert (pixels(draw(pipe, {"prompt": other, **call})[0]) - pixels(found.other_image)).abs().max() <= 2 / 255
    for hook in hooks:
        hook.remove()
    encoding = seen[0]  # the same at every layer and step

    def swap(module, args):
        hidden = args[0].clone()
        hidden[1] = encoding
        return (hidden, *args[1:])

    assert [list(window) for window in found.windows] == [[i, i + 1] for i in range(len(modules) - 1)]
    for window, image in zip(found.windows, found.images):
        hooks = [part.register_forward_pre_hook(swap) for i in window for part in (modules[i].to_k, modules[i].to_v)]
        expected = draw(pipe, {"prompt": TEXT, **call})[0]
        for hook in hooks:
            hook.remove()
        assert (pixels(image) - pixels(expected)).abs().max() <= 2 / 255
    assert found.values.max() > 0


def test_a_denoiser_without_cross_attention_has_no_layers_to_swap():
    model = DiffusionModel(diffusion.PIPELINES["stable_diffusion_3"].build())
    assert "has no cross-attention" in refusal(prompt_swap, model, TEXT, "a ring", pixel_distance(), progress=False)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"subject": "Colosseum"}, "'Colosseum' does not occur in the prompt"),
        ({"sites": "heads"}, 'does not restore single heads: choose "layers", "attentions" or "mlps", or paths'),
        ({"sites": "lm_head.input", "layers": [0]}, "`layers` belongs to the sites"),
        ({"layers": "embedding"}, "the noise is added to the embedding"),
        ({"answer": [1, 2]}, "answer must be one token"),
        ({"metric": pixel_distance()}, "metric is for pipelines"),
        ({"noise": 0}, "noise must be a number above 0"),
        ({"samples": 0}, "samples must be a positive integer"),
    ],
)
def test_bad_input(model, given, words):
    call = {"prompt": PROMPT, "subject": SUBJECT, "progress": False} | given
    assert words in refusal(causal_tracing, model, **call)


def test_bad_input_for_a_pipeline():
    model = DiffusionModel(diffusion.stable_diffusion())
    call = {"sites": "unet.mid_block", "metric": pixel_distance(), **CALL}
    assert "pass metric=" in refusal(causal_tracing, model, TEXT, "circle", **{**call, "metric": None})
    assert "answer is for language models" in refusal(causal_tracing, model, TEXT, "circle", answer=1, **call)
    assert "not in a text encoder or denoiser" in refusal(
        causal_tracing, model, TEXT, "circle", **{**call, "sites": "vae.decoder"}
    )
    assert "'ring' does not occur" in refusal(causal_tracing, model, TEXT, "ring", **call)
    assert "window must be an integer from 1 to 4" in refusal(
        prompt_swap, model, TEXT, TEXT, pixel_distance(), window=5, **CALL
    )
    assert "batch_size must be 3 or more" in refusal(prompt_swap, model, TEXT, TEXT, pixel_distance(), batch_size=2)


def test_a_metric_that_is_not_finite():
    model = DiffusionModel(diffusion.stable_diffusion())
    numbers = iter([1.0, float("nan"), 1.0, 1.0, 1.0, float("inf")])
    call = {"metric": lambda result: next(numbers, 1.0), **CALL}
    said = refusal(causal_tracing, model, TEXT, "circle", sites="unet.mid_block", samples=1, **call)
    assert "sample 0, and nothing restored" in said
    assert "in the cross-attentions [0]" in refusal(prompt_swap, model, TEXT, TEXT, **call)


def test_passes_are_counted(model, net):
    calls = []
    handle = net.register_forward_hook(lambda *_: calls.append(1))
    trace = causal_tracing(model, PROMPT, SUBJECT, samples=2, layers=[0, 2], batch_size=8, progress=False)
    handle.remove()
    assert trace.passes == len(calls)
    pipe = diffusion.stable_diffusion()
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    calls.clear()
    call = {"num_inference_steps": 1, "progress": False}
    swap = prompt_swap(DiffusionModel(pipe), TEXT, "a ring", pixel_distance(), batch_size=4, **call)
    handle.remove()
    assert swap.passes == len(calls) == 2
