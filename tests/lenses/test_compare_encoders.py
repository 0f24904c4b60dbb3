"""The comparison of text encoders, against formulas and calls of the encoders by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional

from diffsight import DiffusionModel, compare_encoders, diffusion_lens
from diffsight.errors import InputError
from diffsight.lenses.compare_encoders import EncoderComparison
from diffsight.lenses.linear_cka import linear_cka
from models import diffusion, text_encoders
from models.text_encoders import TEXT_PIPELINES

PROMPTS = ["a red circle above a blue square", "a photo of a cat", "a blue cat", "a green square on a red circle"]
SD = {"num_inference_steps": 2, "guidance_scale": 4.0}
QUIET = {"progress": False, **SD}


@pytest.fixture(scope="module")
def sd():
    return DiffusionModel(diffusion.stable_diffusion())


@pytest.fixture(scope="module")
def if_():
    return DiffusionModel(diffusion.deepfloyd_if())


@pytest.fixture(scope="module")
def sdxl():
    return DiffusionModel(text_encoders.built("stable_diffusion_xl"))


@pytest.fixture(scope="module")
def both(sd, if_):
    return compare_encoders({"CLIP": sd, "T5": if_}, PROMPTS, images=2, seed=3, **QUIET)


def states_by_hand(model, prompt, name="", **settings):
    """Return the hidden states of a prompt's own tokens, (layers, tokens, features), and these tokens as text."""
    tokenizer, encoder = (getattr(model.pipeline, part + name) for part in ("tokenizer", "text_encoder"))
    given = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    settings = (
        {"attention_mask": given.attention_mask} if isinstance(encoder, diffusion.transformers.T5EncoderModel) else {}
    )
    with torch.no_grad():
        hidden = encoder(given.input_ids, output_hidden_states=True, **settings).hidden_states
    own = tokenizer(prompt, add_special_tokens=False).input_ids
    start = 0 if given.input_ids[0, 0] == own[0] else 1
    assert given.input_ids[0, start : start + len(own)].tolist() == own
    return torch.stack([state[0, start : start + len(own)] for state in hidden]), [tokenizer.decode([i]) for i in own]


def plain_cka(x, y):
    """Return the CKA as Kornblith et al. write it in section 3: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    n = len(x)
    center = np.eye(n) - np.ones((n, n)) / n

    def hsic(k, m):
        return np.trace(k @ center @ m @ center) / (n - 1) ** 2

    k, m = (np.asarray(one, dtype=np.float64) @ np.asarray(one, dtype=np.float64).T for one in (x, y))
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def vectors(n, features, seed=0):
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 2


# CKA


@pytest.mark.parametrize("n, p, q", [(10, 4, 7), (5, 30, 12), (40, 8, 8)])
def test_cka_is_the_plain_formula(n, p, q):
    x, y = vectors(n, p), vectors(n, q, seed=1)
    y[:, :3] += 2 * x[:, :3]
    assert linear_cka(x, y) == pytest.approx(plain_cka(x, y), abs=1e-12)
    cross = torch.linalg.matrix_norm((y - y.mean(0)).T @ (x - x.mean(0))) ** 2
    alone = [torch.linalg.matrix_norm((one - one.mean(0)).T @ (one - one.mean(0))) for one in (x, y)]
    assert linear_cka(x, y) == pytest.approx(float(cross / (alone[0] * alone[1])), abs=1e-12)
    assert 0 < linear_cka(x, y) < 1


def test_cka_does_not_see_rotation_scale_and_shift():
    x, y = vectors(12, 6), vectors(12, 9, seed=1)
    turn = torch.linalg.qr(vectors(6, 6, seed=2)).Q
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1)
    assert linear_cka(x @ turn * -0.1, y) == pytest.approx(linear_cka(x, y))
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x))
    assert (
        abs(linear_cka(x * torch.arange(1, 7), y) - linear_cka(x, y)) > 1e-3
    )  # but the scale of single features matters


def test_cka_of_equal_vectors_is_nan():
    assert np.isnan(linear_cka(torch.ones(4, 3), vectors(4, 3)))


@pytest.mark.parametrize("x, y", [((4, 3), (5, 3)), ((1, 3), (1, 3)), ((4,), (4,))])
def test_cka_of_sets_that_cannot_be_compared(x, y):
    with pytest.raises(InputError, match="the same number of vectors on both sides"):
        linear_cka(torch.ones(x), torch.ones(y))


# Two encoders


def test_vectors_are_the_means_of_the_prompts_own_tokens(both, sd, if_):
    for name, model in (("CLIP", sd), ("T5", if_)):
        found = both[name]
        assert found.layers == ("embedding", 0, 1, 2)
        for i, prompt in enumerate(PROMPTS):
            states, words = states_by_hand(model, prompt)
            if name == "T5":
                states = states[:-1]  # transformers applies the norm to the last
            assert list(found.words[i]) == words
            for vectors, state in zip(found.vectors, states):
                assert torch.allclose(vectors[i], state.mean(0), atol=1e-5)


def test_cka_of_all_pairs_of_layers(both):
    assert list(both) == ["CLIP", "T5"]
    between = both.cka("CLIP", "T5")
    assert between.shape == (4, 4)
    for i, j in ((0, 0), (2, 1), (3, 3)):
        wanted = plain_cka(both["CLIP"].vectors[i], both["T5"].vectors[j])
        assert between[i, j].item() == pytest.approx(wanted, abs=1e-9)
    assert torch.allclose(both.cka("T5", "CLIP"), between.T)
    assert torch.allclose(both.cka("T5", "T5").diagonal(), torch.ones(4).double())
    assert both.cka("CLIP", "CLIP")[0, 3] < 0.9999


def test_nearest_prompts(both):
    found = both.nearest("T5", prompt=1, count=2)
    assert [len(layer) for layer in found] == [2] * 4
    for layer, near in enumerate(found):
        cosines = {
            PROMPTS[i]: functional.cosine_similarity(*both["T5"].vectors[layer, [1, i]], dim=0).item()
            for i in (0, 2, 3)
        }
        wanted = sorted(cosines, key=cosines.get, reverse=True)[:2]
        assert [prompt for prompt, _ in near] == wanted
        assert [value for _, value in near] == pytest.approx([cosines[prompt] for prompt in wanted], abs=1e-5)


def test_drift_of_tokens(both, sd):
    states, words = states_by_hand(sd, PROMPTS[0])
    for to, end in (("last", -1), ("first", 0)):
        drift = both.drift("CLIP", prompt=0, to=to)
        assert drift.shape == (4, len(words))
        wanted = functional.cosine_similarity(states, states[end], dim=-1)
        assert torch.allclose(drift, wanted, atol=1e-5)
        assert torch.allclose(drift[end], torch.ones(len(words)))
    assert both.drift("CLIP", prompt=0).min() < 0.99


def test_the_lens_of_each(both, sd, if_):
    for name, model in (("CLIP", sd), ("T5", if_)):
        assert [lens.prompt for lens in both[name].lens] == PROMPTS[:2]
        wanted = diffusion_lens(model, PROMPTS[1], seed=3, **QUIET)
        for image, other in zip(both[name].lens[1].images, wanted.images, strict=True):
            assert image.tobytes() == other.tobytes()
    grid = both.grid(1)
    assert grid.width > 4 * 128
    assert grid.height > 2 * 128
    with pytest.raises(InputError, match=r"drew only the first 2 prompts.*images=3"):
        both.grid(2)


def test_the_encoders_of_one_pipeline(sdxl):
    result = compare_encoders(sdxl, PROMPTS, images=0, **QUIET)
    assert list(result) == ["text_encoder", "text_encoder_2"]
    for name, suffix in (("text_encoder", ""), ("text_encoder_2", "_2")):
        states, words = states_by_hand(sdxl, PROMPTS[2], suffix)
        layers = result[name].layers
        assert layers == ("embedding", *range(sdxl.encoders[name].used_count))
        assert list(result[name].words[2]) == words
        for vectors, state in zip(result[name].vectors, states):
            assert torch.allclose(vectors[2], state.mean(0), atol=1e-5)
    assert result["text_encoder"].vectors.shape[-1] != result["text_encoder_2"].vectors.shape[-1]
    with pytest.raises(InputError, match="drew no prompt"):
        result.grid()


def test_settings_of_the_lens_and_layers(sdxl):
    settings = {"isolate": True, "norm": True}
    result = compare_encoders(sdxl, PROMPTS, layers=[1, "embedding"], lens=settings, seed=1, **QUIET)
    for name in result:
        assert result[name].layers == result[name].lens[0].layers == (1, "embedding")
        wanted = diffusion_lens(sdxl, PROMPTS[0], encoder=name, layers=[1, "embedding"], seed=1, **settings, **QUIET)
        assert [i.tobytes() for i in result[name].lens[0].images] == [i.tobytes() for i in wanted.images]
    assert torch.allclose(result.drift("text_encoder", 0)[1], torch.ones(1))  # the last of the given layers


def test_own_tokens_after_a_template():
    """Qwen-Image puts an instruction before its prompts."""
    model = DiffusionModel(text_encoders.built("qwen_image"))
    inputs = TEXT_PIPELINES["qwen_image"].inputs()
    del inputs["prompt"]
    result = compare_encoders([model, model], PROMPTS[:3], images=0, progress=False, **inputs)
    for i, prompt in enumerate(PROMPTS[:3]):
        assert "".join(next(iter(result.values())).words[i]) == prompt


def test_names_tell_encoders_apart(sd, sdxl):
    two = compare_encoders(
        [sd, DiffusionModel(diffusion.stable_diffusion())],
        PROMPTS,
        images=0,
        layers=["embedding", 0],
        **QUIET,
    )
    assert list(two) == ["StableDiffusionPipeline (1)", "StableDiffusionPipeline (2)"]
    mixed = compare_encoders({"XL": sdxl, "SD": sd}, PROMPTS, images=0, layers=0, **QUIET)
    assert list(mixed) == ["XL text_encoder", "XL text_encoder_2", "SD"]
    chosen = compare_encoders({"XL": sdxl, "SD": sd}, PROMPTS, encoders="text_encoder", images=0, layers=0, **QUIET)
    assert list(chosen) == ["XL", "SD"]


# To look at and to keep


def test_plots_show_all_layers_and_tokens(both):
    axes = both.plot().axes[0]
    image = axes.images[0].get_array()
    assert image.shape == (8, 8)
    assert np.allclose(image[:4, 4:], both.cka("CLIP", "T5").numpy())
    drift, t5 = both.plot_drift(0).axes[:2]
    assert (drift.get_title(), t5.get_title()) == ("CLIP", "T5")
    assert np.allclose(drift.images[0].get_array(), both.drift("CLIP", 0).numpy())
    assert [tick.get_text() for tick in drift.get_xticklabels()] == [word.strip() for word in both["CLIP"].words[0]]
    near = both.plot_nearest(1).axes[0]
    assert near.images[0].get_array().shape == (4, 3)
    assert [tick.get_text() for tick in near.get_xticklabels()] == [
        "0: a red circle above a…",
        "2: a blue cat",
        "3: a green square on a …",
    ]


def test_save_writes_everything(both, tmp_path):
    paths = both.save(tmp_path / "study")
    names = {path.name for path in paths}
    assert {"comparison.json", "comparison.safetensors", "cka.png", "grid_01.png", "drift_00.png"} <= names
    record = json.loads((tmp_path / "study" / "comparison.json").read_text())
    assert record["prompts"] == PROMPTS
    assert record["encoders"]["T5"]["layers"] == ["embedding", 0, 1, 2]
    numbers = load_file(tmp_path / "study" / "comparison.safetensors")
    assert torch.equal(numbers["CLIP.vectors"], both["CLIP"].vectors)
    assert torch.equal(numbers["cka.CLIP.T5"], both.cka("CLIP", "T5"))
    assert torch.equal(numbers["T5.drift.02"][1], both.drift("T5", 2))
    for path in paths:
        if path.suffix == ".png":
            Image.open(path).verify()
    assert both._repr_png_().startswith(b"\x89PNG")
    assert isinstance(both, EncoderComparison)


# Bad input


@pytest.fixture
def drawing(sdxl, monkeypatch):
    """Check that no module that draws runs."""
    ran = []
    handles = [m.register_forward_hook(lambda *_: ran.append(1)) for m in (sdxl.pipeline.unet, sdxl.pipeline.vae)]
    yield ran
    for handle in handles:
        handle.remove()
    assert not ran


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": PROMPTS[:1]}, "two prompts or more"),
        ({"prompts": PROMPTS[0]}, "two prompts or more"),
        ({"prompts": []}, "two prompts or more"),
        ({"prompts": [PROMPTS[0], PROMPTS[0]]}, "must be unique, but .* appears twice"),
        ({"prompts": [PROMPTS[0], 7]}, "a prompt must be a string, not int"),
        ({"prompts": [PROMPTS[0], " "]}, "the prompt is empty"),
        ({"prompts": [PROMPTS[0], "a red circle " * 40]}, "would be dropped.*circle"),
        ({"encoders": "text_encoder_3"}, "no text encoder 'text_encoder_3'.*has text_encoder, text_encoder_2"),
        ({"encoders": ["text_encoder"]}, "two encoders or more"),
        ({"encoders": []}, "two encoders or more"),
        ({"layers": 9}, 'text_encoder: there is no layer 9: choose from "embedding" and 0 to'),
        ({"layers": -9}, "there is no layer -9"),
        ({"images": 5}, "from 0 to 4, not 5"),
        ({"images": -1}, "from 0 to 4, not -1"),
        ({"lens": {"pooled": "none"}}, "pooled must be"),
        ({"seed": "7"}, "seed"),
        ({"guidance_scal": 1}, "no argument"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_images(sdxl, drawing, changes, message):
    given = {"prompts": PROMPTS, **QUIET, **changes}
    with pytest.raises(InputError, match=message):
        compare_encoders(sdxl, **given)


def test_invalid_models_and_models_without_text_encoder():
    with pytest.raises(InputError, match="DiffusionModels, not str"):
        compare_encoders("diffsight/shapes-clip", PROMPTS)
    with pytest.raises(InputError, match="no text encoder"):
        compare_encoders(DiffusionModel(diffusion.ddpm()), PROMPTS)


def test_questions_that_have_no_answer(both):
    with pytest.raises(InputError, match="no encoder 'GPT': the result has CLIP, T5"):
        both.cka("CLIP", "GPT")
    with pytest.raises(InputError, match="no prompt 4: choose from 0 to 3"):
        both.nearest("CLIP", prompt=4)
    with pytest.raises(InputError, match='to must be "first" or "last", not'):
        both.drift("CLIP", prompt=0, to="middle")


def test_prompts_are_named_by_number_or_text(both):
    for i, prompt in enumerate(PROMPTS):
        assert both.nearest("T5", prompt) == both.nearest("T5", i)
        assert torch.equal(both.drift("CLIP", prompt), both.drift("CLIP", i))
    with pytest.raises(InputError, match="there is no prompt 'a violet circle'"):
        both.nearest("T5", "a violet circle")


def test_the_record_has_the_nearest_of_every_prompt(both, tmp_path):
    both.save(tmp_path)
    record = json.loads((tmp_path / "comparison.json").read_text())
    for name in both:
        for i in range(len(PROMPTS)):
            nearest = [[list(pair) for pair in layer] for layer in both.nearest(name, i)]
            assert record["nearest"][name][i] == nearest


def test_a_progress_bar_that_is_turned_off_stays_off(capfd):
    pipes = {"one": diffusion.stable_diffusion(), "two": diffusion.stable_diffusion()}
    models = {name: DiffusionModel(pipe) for name, pipe in pipes.items()}
    for model in models.values():
        model.set_progress_bar_config(disable=False)
    compare_encoders(models, PROMPTS[:2], num_inference_steps=1)
    assert "%" in capfd.readouterr().err
    for model in models.values():
        model.set_progress_bar_config(disable=True)
    compare_encoders(models, PROMPTS[:2], num_inference_steps=1)
    assert "%" not in capfd.readouterr().err


# Batches


def test_prompts_are_encoded_in_batches(sd, if_):
    calls = []
    hooks = [model.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1)) for model in (sd, if_)]
    prompts = [f"a {color} {shape}" for color in ("red", "green", "blue") for shape in ("circle", "square", "cat")]
    try:
        result = compare_encoders({"CLIP": sd, "T5": if_}, prompts, images=0, **QUIET)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(calls) <= 2 * 2 * 2, "for each encoder one prompt and one batch, with their negative prompts"
    for number, prompt in enumerate(prompts):
        states, words = states_by_hand(sd, prompt)
        assert torch.allclose(
            result["CLIP"].vectors[:, number], states.mean(1)[: len(result["CLIP"].layers)], atol=1e-5
        )
        assert result["CLIP"].words[number] == tuple(words)


def test_each_prompt_is_encoded_once():
    """Once the encoders of a pipeline are known, which it remembers."""
    models = {name: DiffusionModel(diffusion.stable_diffusion()) for name in ("one", "two")}
    assert all(model.encoders for model in models.values())
    rows = []
    for model in models.values():
        model.pipeline.text_encoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    result = compare_encoders(models, PROMPTS, images=0, progress=False)
    assert rows == [len(PROMPTS)] * 2
    for number, prompt in enumerate(PROMPTS):
        states, _ = states_by_hand(models["one"], prompt)
        assert torch.allclose(result["one"].vectors[:, number], states.mean(1), atol=1e-5)


def test_layers_removed_in_place_are_not_looked_for():
    models = {name: DiffusionModel(diffusion.stable_diffusion()) for name in ("one", "two")}
    encoder = models["one"].pipeline.text_encoder
    assert models["one"].encoders["text_encoder"].count == 3
    (holder,) = (part for part in encoder.modules() if isinstance(getattr(part, "layers", None), torch.nn.ModuleList))
    holder.layers = holder.layers[:2]
    result = compare_encoders(models, PROMPTS, images=0, progress=False)
    assert result["one"].layers == ("embedding", 0, 1)
    assert result["two"].layers == ("embedding", 0, 1, 2)
    states, _ = states_by_hand(models["one"], PROMPTS[1])
    assert torch.allclose(result["one"].vectors[:, 1], states.mean(1), atol=1e-5)
