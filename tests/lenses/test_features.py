"""What features of an SAE mean, compared with hooks on the bare pipeline."""

import json

import numpy as np
import pytest
import torch

from diffsight import DiffusionModel, concept_features, evaluate_sae, feature_effect, top_examples
from diffsight.lenses import SAE
from helpers import SEED, close_image, draw, outputs, refusal
from models import language

POINT, WIDTH, FEATURES, K, FEATURE = "unet.mid_block", 32, 64, 4, 7
PROMPTS = ["a red circle", "a blue square", "a green circle"]
CALL = {"num_inference_steps": 2, "guidance_scale": 5.0}


@pytest.fixture
def sae():
    torch.manual_seed(1)
    return SAE(WIDTH, FEATURES, k=K, point=POINT).eval().requires_grad_(False)


def conditional_features(sd, sae, prompt, seed):
    """Return the features of the conditional branch at each step, (steps, height, width, features)."""
    values = outputs(sd.unet.mid_block, draw, sd, {"prompt": prompt, **CALL}, seed)
    return torch.stack([sae.encode(value[1].movedim(0, -1)) for value in values])


def test_top_examples_of_a_denoiser(sd, sae, tmp_path):
    result = top_examples(
        DiffusionModel(sd), sae, PROMPTS, [FEATURE, 9], count=2, batch_size=2, seed=SEED, progress=False, **CALL
    )
    maps = {p: conditional_features(sd, sae, p, SEED + i)[..., FEATURE] for i, p in enumerate(PROMPTS)}
    ranked = sorted(PROMPTS, key=lambda prompt: -maps[prompt].max())
    examples = result.examples[FEATURE]
    assert [one.prompt for one in examples] == ranked[:2]
    for one in examples:
        step = maps[one.prompt].flatten(1).amax(1).argmax()
        torch.testing.assert_close(one.activations, maps[one.prompt][step], rtol=1e-3, atol=1e-3)
        expected = draw(sd, {"prompt": one.prompt, **CALL}, SEED + PROMPTS.index(one.prompt))[0]
        assert close_image(one.image, expected)
    mean = torch.stack(list(maps.values())).mean((0, 2, 3))
    torch.testing.assert_close(result.by_step[FEATURE], mean, rtol=1e-3, atol=1e-4)
    assert {path.name for path in result.save(tmp_path)} >= {"lens.json", "examples.txt", "grid.png", "steps.png"}


def test_top_examples_of_a_text_encoder_and_a_language_model(sd, sae):
    states = outputs(sd.text_encoder.encoder.layers[1], sd.encode_prompt, PROMPTS[1], "cpu", 1, False)[0]
    expected = sae.encode(states if isinstance(states, torch.Tensor) else states[0])[0]
    feature = expected[3].argmax().item()
    result = top_examples(DiffusionModel(sd), sae, PROMPTS, feature, point="text_encoder.layers[1]", progress=False)
    (found,) = (one for one in result.examples[feature] if one.prompt == PROMPTS[1])
    torch.testing.assert_close(found.activations, expected[:, feature], rtol=1e-4, atol=1e-4)
    assert found.tokens[:4] == ("<|startoftext|>", "a</w>", "blue</w>", "square</w>")
    assert f"[square</w> {expected[3, feature]:.1f}]" in str(result)
    net = language.gpt2()
    result = top_examples(language.model(net), sae, language.PROMPTS, 7, point="layers[1]", progress=False)
    for one in result.examples[7]:
        hidden = outputs(net.transformer.h[1], net, language.ids(one.prompt))[0]
        hidden = hidden if isinstance(hidden, torch.Tensor) else hidden[0]
        torch.testing.assert_close(one.activations, sae.encode(hidden)[0, :, 7], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("change", "amount"), [("scale", 3.0), ("set", 20.0), ("add", 30.0)])
def test_the_effect_of_features(sd, sae, change, amount):
    result = feature_effect(
        DiffusionModel(sd), sae, PROMPTS[0], [FEATURE, 9], change=change, amounts=[amount], steps=iter([0]), seed=SEED,
        progress=False, **CALL,
    )  # fmt: skip
    calls = 0

    def hook(module, args, output):
        nonlocal calls
        calls += 1
        if calls == 1:
            features = sae.encode(output[1].movedim(0, -1))
            after = features.clone()
            part = features[..., [FEATURE, 9]]
            after[..., [FEATURE, 9]] = {"scale": part * amount, "set": part * 0 + amount, "add": part + amount}[change]
            changed = output.clone()
            changed[1] += ((after - features) @ sae.decoder).movedim(-1, 0)
            return changed

    plain = draw(sd, {"prompt": PROMPTS[0], **CALL})[0]
    handle = sd.unet.mid_block.register_forward_hook(hook)
    expected = draw(sd, {"prompt": PROMPTS[0], **CALL})[0]
    handle.remove()
    assert close_image(result.images[0], plain)
    assert close_image(result.images[1], expected)
    assert change == "scale" or not close_image(plain, expected)


@pytest.mark.parametrize(("change", "amount"), [("scale", 3.0), ("set", 20.0), ("add", 30.0)])
def test_the_effect_of_features_on_a_text(sae, change, amount, tmp_path):
    net, prompt, tokens = language.gpt2(), language.PROMPTS[0], 4
    model = language.model(net)
    result = feature_effect(
        model, sae, prompt, [7, 9], change=change, amounts=[1.5, amount], point="layers[1]", max_new_tokens=tokens,
        progress=False,
    )  # fmt: skip

    def hook(module, args, output):
        features = sae.encode(output)
        after = features.clone()
        part = features[..., [7, 9]]
        after[..., [7, 9]] = {"scale": part * amount, "set": part * 0 + amount, "add": part + amount}[change]
        return output + (after - features) @ sae.decoder

    def written():
        ids = language.ids(prompt)
        found = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        return model.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)

    plain = written()
    handle = net.transformer.h[1].register_forward_hook(hook)
    expected = written()
    handle.remove()
    assert (result.texts[0], result.texts[2]) == (plain, expected) and result.images is None
    assert change == "scale" or plain != expected
    result.save(tmp_path)
    assert json.loads((tmp_path / "lens.json").read_text())["texts"] == list(result.texts)
    assert "are texts, not images" in refusal(result.grid)


def test_features_of_a_concept(sd, sae):
    found = concept_features(DiffusionModel(sd), sae, PROMPTS[:1], PROMPTS[1:2], seed=SEED, **CALL)
    sums = [conditional_features(sd, sae, prompt, SEED).double().flatten(0, -2).sum(0) for prompt in PROMPTS[:2]]
    expected = sums[0] / sums[0].sum() - sums[1] / sums[1].sum()
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-5)


def test_an_evaluation(sd, sae, tmp_path):
    result = evaluate_sae(DiffusionModel(sd), sae, PROMPTS[:2], seed=SEED, **CALL)
    values = [outputs(sd.unet.mid_block, draw, sd, {"prompt": p, **CALL}, SEED + i) for i, p in enumerate(PROMPTS[:2])]
    x = torch.cat([value[1].movedim(0, -1).flatten(0, 1) for some in values for value in some])
    explained = 1 - (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert result.explained_variance == pytest.approx(explained.item(), abs=1e-3)
    assert result.active == pytest.approx((sae.encode(x) > 0).sum().item() / len(x), abs=1e-3)

    def hook(module, args, output):
        changed = output.clone()
        changed[1] = sae(output[1].movedim(0, -1)).movedim(-1, 0)
        return changed

    drawn = []
    for put in (None, hook):
        handle = sd.unet.mid_block.register_forward_hook(put) if put else None
        images = [draw(sd, {"prompt": p, **CALL}, SEED + i)[0] for i, p in enumerate(PROMPTS[:2])]
        drawn += [np.asarray(image, dtype=float) for image in images]
        if handle:
            handle.remove()
    distance = np.sqrt(np.mean((np.stack(drawn[:2]) - np.stack(drawn[2:])) ** 2))
    assert result.effect["image distance"] == pytest.approx(distance, abs=0.5)
    result.save(tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text())["features"] == FEATURES


def test_the_evaluation_of_a_language_model(sae):
    net = language.gpt2()
    result = evaluate_sae(language.model(net), sae, language.PROMPTS[:1], point="layers[1]")
    ids = language.ids(language.PROMPTS[0])
    losses = []
    for put in (None, lambda module, args, output: sae(output)):
        handle = net.transformer.h[1].register_forward_hook(put) if put else None
        with torch.no_grad():
            losses.append(net(ids, labels=ids).loss.item())
        if handle:
            handle.remove()
    assert list(result.effect.values()) == pytest.approx(losses, abs=1e-3)


NARROW, MID = SAE(16, 64), {**CALL, "point": "unet.mid_block"}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model, sae: feature_effect(model, sae, "a", 64, **CALL), "there is no feature 64: the SAE has 64"),
        (lambda model, sae: feature_effect(model, sae, "a", 1, change="times", **CALL), "change must be one of scale"),
        (lambda model, sae: feature_effect(model, sae, "a", 1, amounts=[], **CALL), "amounts is empty"),
        (lambda model, sae: top_examples(model, sae, [], 1), "there is no prompt"),
        (lambda model, sae: top_examples(model, NARROW, ["a"], 1, **MID), "of width 16, but these have 32"),
        (lambda model, sae: concept_features(model, NARROW, ["a"], ["b"], **MID), "of width 16, but these have 32"),
        (lambda model, sae: evaluate_sae(model, NARROW, ["a"], **MID), "of width 16, but these have 32"),
        (lambda model, sae: feature_effect(model, NARROW, "a", 1, **MID), "of width 16, but these have 32"),
        (lambda model, sae: concept_features(model, sae, "a red", ["b"]), "prompts must be Sequence[str], not 'a red'"),
        (lambda model, sae: evaluate_sae(model, sae, []), "a list of strings, or a list of scenes"),
        (lambda model, sae: evaluate_sae(model, None, ["a"]), "sae must be an SAE, not NoneType"),
    ],
)
def test_bad_input(sd, sae, call, words):
    assert words in refusal(call, DiffusionModel(sd), sae)
