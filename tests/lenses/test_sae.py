"""Sparse autoencoders: their features by hand, their files, training, and attached to models, compared with hooks."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsight import DiffusionModel, attach_sae, train_sae
from diffsight.errors import InputError, PointNotFoundError
from diffsight.lenses import SAE, SAESettings
from diffsight.lenses.features.sae_trainer import SAETrainer
from helpers import SEED, draw, drawn, module_at, outputs, refusal
from models import language

WIDTH, FEATURES, K = 32, 64, 4
KINDS = ("topk", "batch_topk", "jumprelu", "relu")
SD = {"prompt": "a red circle", "num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "pt"}


def an_sae(kind="topk", width=WIDTH, **facts):
    torch.manual_seed(1)
    sae = SAE(width, FEATURES, kind, K if "topk" in kind else None, **facts)
    with torch.no_grad():
        sae.encoder_bias.normal_(std=0.1)
        sae.decoder_bias.normal_(std=0.1)
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(0.5)
    return sae.eval().requires_grad_(False)


def by_hand(sae, x):
    values = (x - sae.decoder_bias) @ sae.encoder + sae.encoder_bias
    if sae.kind == "relu":
        return values.clamp(min=0)
    if sae.kind == "topk":
        least = values.sort(-1).values[..., -K, None]
        return values * (values >= least) * (values > 0)
    return values * (values > 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_reconstruction(kind):
    sae, x = an_sae(kind), torch.randn(3, 5, WIDTH)
    expected = by_hand(sae, x)
    torch.testing.assert_close(sae.encode(x), expected)
    torch.testing.assert_close(sae(x), expected @ sae.decoder + sae.decoder_bias)
    assert torch.allclose(sae.decoder.norm(dim=-1), torch.ones(FEATURES))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_as_saelens_does(kind, tmp_path):
    sae, x = an_sae(kind, point="unet.mid_block", of="difference"), torch.randn(7, WIDTH)
    sae.save(tmp_path)
    config, state = json.loads((tmp_path / "cfg.json").read_text()), load_file(tmp_path / "sae_weights.safetensors")
    assert config["architecture"] == {"relu": "standard", "batch_topk": "jumprelu"}.get(kind, kind)
    assert (config["d_in"], config["d_sae"], config["metadata"]["hook_name"]) == (WIDTH, FEATURES, "unet.mid_block")
    assert torch.equal(state["W_enc"], sae.encoder) and torch.equal(state["W_dec"], sae.decoder)
    loaded = SAE.load(tmp_path)
    assert (loaded.point, loaded.of) == ("unet.mid_block", "difference")
    assert torch.equal(loaded.encode(x), sae.encode(x))


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


ENCODER = {"encoder.weight": normal(FEATURES, WIDTH) / 5, "encoder.bias": normal(FEATURES) / 5}
DECODER = {"decoder.weight": torch.nn.functional.normalize(normal(WIDTH, FEATURES), dim=0)}
B_DEC = normal(WIDTH) / 5
JUMP = {"W_enc": normal(WIDTH, FEATURES) / 5, "b_enc": normal(FEATURES) / 5, "threshold": normal(FEATURES).abs() / 5}
JUMP |= {"W_dec": normal(FEATURES, WIDTH), "b_dec": B_DEC}  # not of length one


def largest(values, k=K):
    least = values.sort(-1).values[..., -k, None]
    return values * (values >= least)


def linear(x):
    return (x @ ENCODER["encoder.weight"].T + ENCODER["encoder.bias"]).relu()


def jumping(x):
    before = x @ JUMP["W_enc"] + JUMP["b_enc"]
    return (before * (before > JUMP["threshold"])).relu() * JUMP["W_dec"].norm(dim=1)


def learned(name, **trainer):
    return "config.json", {"trainer": {"dict_class": name, "submodule_name": "resid_post_layer_3", **trainer}}


# The files of other projects: what they hold, the features, and the reconstruction, from the code of their classes.
OF_OTHERS = {
    "dictionary_learning's AutoEncoder": (
        "ae.pt",
        {**ENCODER, **DECODER, "bias": B_DEC},
        learned("AutoEncoder"),
        lambda x: linear(x - B_DEC),
        lambda f: f @ DECODER["decoder.weight"].T + B_DEC,
    ),
    "dictionary_learning's AutoEncoderNew": (
        "ae.pt",
        {**ENCODER, "decoder.weight": normal(WIDTH, FEATURES), "decoder.bias": B_DEC},
        learned("AutoEncoderNew"),
        lambda x: linear(x) * normal(WIDTH, FEATURES).norm(dim=0),
        lambda f: (f / normal(WIDTH, FEATURES).norm(dim=0)) @ normal(WIDTH, FEATURES).T + B_DEC,
    ),
    "dictionary_learning's AutoEncoderTopK": (
        "ae.pt",
        {**ENCODER, **DECODER, "b_dec": B_DEC, "k": torch.tensor(K), "threshold": torch.tensor(0.3)},
        learned("AutoEncoderTopK"),
        lambda x: largest(linear(x - B_DEC)),
        lambda f: f @ DECODER["decoder.weight"].T + B_DEC,
    ),
    "dictionary_learning's BatchTopKSAE": (
        "ae.pt",
        {**ENCODER, **DECODER, "b_dec": B_DEC, "k": torch.tensor(K), "threshold": torch.tensor(0.3)},
        learned("BatchTopKSAE"),
        lambda x: linear(x - B_DEC) * (linear(x - B_DEC) > 0.3),
        lambda f: f @ DECODER["decoder.weight"].T + B_DEC,
    ),
    "dictionary_learning's JumpReluAutoEncoder": (
        "ae.pt",
        JUMP,
        learned("JumpReluAutoEncoder"),
        jumping,
        lambda f: (f / JUMP["W_dec"].norm(dim=1)) @ JUMP["W_dec"] + B_DEC,
    ),
    "sdxl-unbox": (
        "state_dict.pth",
        {
            "encoder.weight": ENCODER["encoder.weight"],
            **DECODER,
            "latent_bias": ENCODER["encoder.bias"],
            "pre_bias": B_DEC,
        },
        ("config.json", {"n_dirs_local": FEATURES, "d_model": WIDTH, "k": K, "auxk": 8, "dead_steps_threshold": 9}),
        lambda x: largest(linear(x - B_DEC)),
        lambda f: f @ DECODER["decoder.weight"].T + B_DEC,
    ),
    "SAeUron": (
        "sae.safetensors",
        {**ENCODER, "W_dec": DECODER["decoder.weight"].T.contiguous(), "b_dec": B_DEC},
        ("cfg.json", {"d_in": WIDTH, "k": K, "batch_topk": True, "sample_topk": False, "input_unit_norm": False}),
        lambda x: largest(linear(x - B_DEC)),
        lambda f: f @ DECODER["decoder.weight"].T + B_DEC,
    ),
}


def write_folder(folder, name):
    file, tensors, (config, facts) = OF_OTHERS[name][:3]
    folder.mkdir(parents=True)
    (save_file if file.endswith("safetensors") else torch.save)(tensors, folder / file)
    (folder / config).write_text(json.dumps(facts))


@pytest.mark.parametrize("name", OF_OTHERS)
def test_the_files_of_other_projects(name, tmp_path):
    write_folder(tmp_path / "sae", name)
    sae, x = SAE.load(tmp_path / "sae"), normal(7, WIDTH)
    *_, encode, decode = OF_OTHERS[name]
    torch.testing.assert_close(sae.encode(x), encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), decode(encode(x)), rtol=1e-5, atol=1e-5)
    assert torch.allclose(sae.decoder.norm(dim=1), torch.ones(FEATURES), atol=1e-5)
    assert sae.of == ("difference" if name == "sdxl-unbox" else "output")
    assert sae.point == ("layers[3]" if name.startswith("dictionary") else None)
    sae.save(tmp_path / "ours")
    torch.testing.assert_close(SAE.load(tmp_path / "ours").encode(x), encode(x), rtol=1e-5, atol=1e-5)


def test_a_state_within_a_checkpoint(tmp_path):
    """As sdxl-unbox has it for FLUX."""
    write_folder(tmp_path / "sae", "sdxl-unbox")
    torch.save({"state_dict": OF_OTHERS["sdxl-unbox"][1]}, tmp_path / "sae" / "state_dict.pth")
    assert SAE.load(tmp_path / "sae").count == FEATURES


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("SAeUron", {"input_unit_norm": True}, "SAEs with input_unit_norm=True are not supported"),
        ("SAeUron", {"activation": "groupmax"}, "SAEs with activation='groupmax' are not supported"),
        ("SAeUron", {"k": None}, "cannot be read"),
        (
            "dictionary_learning's AutoEncoder",
            {"trainer": {"dict_class": "GatedAutoEncoder"}},
            "GatedAutoEncoder of dictionary_learning are not supported: AutoEncoder, AutoEncoderNew",
        ),
        ("sdxl-unbox", {"k": 65}, "k must be from 1 to 64"),
    ],
)
def test_settings_of_other_projects_that_are_not_supported(name, change, words, tmp_path):
    write_folder(tmp_path / "sae", name)
    config, facts = OF_OTHERS[name][2]
    (tmp_path / "sae" / config).write_text(json.dumps(facts | change))
    assert words in refusal(SAE.load, tmp_path / "sae")


def test_the_packaged_ones():
    sae = SAE.load("diffsight/shapes-clip-unet")
    assert (sae.point, sae.width, sae.count, sae.k) == ("unet.up_blocks.0", 128, 1024, 16)
    assert sae.encode(torch.randn(3, 128)).count_nonzero(-1).tolist() == [16, 16, 16]
    assert SAE.load("diffsight/shapes-clip-text-encoder").point == "text_encoder.layers[6]"


def test_files_that_are_no_sae(tmp_path):
    assert "has no SAE" in refusal(SAE.load, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "ae.pt")
    message = refusal(SAE.load, tmp_path)
    assert "could execute code" in message and "Convert it where you trust it: torch.save(torch.load('ae.pt'" in message
    an_sae().save(tmp_path / "own")
    state = load_file(tmp_path / "own" / "sae_weights.safetensors")
    save_file({**state, "b_dec": torch.zeros(3)}, tmp_path / "own" / "sae_weights.safetensors")
    assert "decoder_bias has the shape (3,)" in refusal(SAE.load, tmp_path / "own")
    (tmp_path / "own" / "sae_weights.safetensors").write_bytes(b"none")
    assert "cannot be read" in refusal(SAE.load, tmp_path / "own")
    (tmp_path / "own" / "cfg.json").write_text("[]")
    assert "cannot be read" in refusal(SAE.load, tmp_path / "own")
    assert "no packaged SAE is called diffsight/none" in refusal(SAE.load, "diffsight/none")
    assert "loaded from a folder, a packaged name or a hub id, not 3" in refusal(SAE.load, 3)


# ---- training


def sparse_vectors(count=4096, directions=24):
    """Return vectors that are sums of few of some directions, and the directions."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.nn.functional.normalize(torch.randn(directions, WIDTH, generator=generator), dim=-1)
    active = (torch.rand(count, directions, generator=generator) < 0.1) * torch.rand(
        count, directions, generator=generator
    )
    return active @ basis, basis


@pytest.mark.parametrize(("kind", "penalty"), [("topk", 0), ("batch_topk", 0), ("jumprelu", 1e-3), ("relu", 1e-2)])
def test_training_finds_the_directions(kind, penalty):
    vectors, basis = sparse_vectors()
    settings = SAESettings(updates=120, batch_size=512, learning_rate=1e-2, penalty=penalty, dead_after=20_000)
    k = K if "topk" in kind else None
    sae = train_sae(None, "layers[0]", vectors, features=FEATURES, kind=kind, k=k, settings=settings, progress=False)
    explained = 1 - (sae(vectors) - vectors).square().sum() / (vectors - vectors.mean(0)).square().sum()
    assert explained > 0.8
    assert torch.allclose(sae.decoder.norm(dim=-1), torch.ones(FEATURES), atol=1e-5)
    assert (basis @ sae.decoder.T).amax(1).median() > 0.8  # a feature for most directions


@pytest.mark.parametrize("kind", KINDS)
def test_updates_by_hand(kind):
    """With gradients through all features, where the trainer computes those of the active ones alone."""
    vectors, _ = sparse_vectors(3 * 256)
    settings = SAESettings(updates=3, batch_size=256, penalty=1e-2, dead_after=256, learning_rate=1e-2)
    torch.manual_seed(2)
    sae, other = SAE(WIDTH, FEATURES, kind, K if "topk" in kind else None), SAE(WIDTH, FEATURES, kind, K)
    other.load_state_dict(sae.state_dict())
    trainer, adam = SAETrainer(sae, settings), torch.optim.Adam(other.parameters(), lr=1e-2)
    unused, dead_once = torch.zeros(FEATURES), False
    for done, x in enumerate(vectors.split(256)):
        adam.param_groups[0]["lr"] = 1e-2 * min(1, 5 * (3 - done) / 3)
        before = (x - other.decoder_bias) @ other.encoder + other.encoder_bias
        features, penalty = before.relu(), 0
        if kind == "topk":
            features = features * (before >= before.topk(K).values[:, -1:])
        elif kind == "batch_topk":
            least = before.flatten().topk(K * 256).values[-1]
            features = features * (before >= least)
            other.threshold = least.detach() if done == 0 else 0.99 * other.threshold + 0.01 * least.detach()
        elif kind == "relu":
            penalty = features.sum(-1).mean()
        else:
            threshold = other.threshold.detach()
            near = ((before.detach() - threshold).abs() < 0.025) * (other.threshold - threshold) / -0.05
            features = before * (before > threshold) + threshold * near
            penalty = ((before > threshold) + near).sum(-1).mean()
        left, variance = x - features @ other.decoder - other.decoder_bias, x.var(0, correction=0).sum() * 256
        loss = left.square().sum() / variance + 1e-2 * penalty
        unused = (unused + 256) * ~(features > 0).any(0)
        dead = unused >= 256
        if "topk" in kind and dead.any():
            dead_once, own = True, before[:, dead].relu()
            own = own * (own >= own.topk(min(WIDTH // 2, int(dead.sum()))).values[:, -1:])
            left = left.detach()
            error = (own @ other.decoder[dead] - left).square().sum()
            loss = loss + error / (left.var(0, correction=0).sum() * 256) / 32
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            other.decoder.grad -= (other.decoder.grad * other.decoder).sum(-1, keepdim=True) * other.decoder
            adam.step()
            other.decoder /= other.decoder.norm(dim=-1, keepdim=True)
            if kind == "jumprelu":
                other.threshold.clamp_(min=0)
        found = trainer.update(x)
        assert found["active"].item() == (features > 0).sum().item() / 256
        assert found["dead"].item() == pytest.approx(dead.float().mean().item())
    assert dead_once or "topk" not in kind
    for name, value in other.state_dict().items():
        torch.testing.assert_close(sae.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_training_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("diffsight.lenses.features.sae_trainer._CHECKPOINT_SECONDS", 0)
    vectors, _ = sparse_vectors(1024)
    settings = SAESettings(updates=20, batch_size=128)
    call = {"features": FEATURES, "k": K, "settings": settings, "progress": False, "folder": tmp_path / "sae"}
    from diffsight.lenses.features import sae_trainer

    update, made = sae_trainer.SAETrainer.update, []

    def interrupted(self, x):
        made.append(self.done)
        if len(made) == 12:
            raise KeyboardInterrupt
        return update(self, x)

    monkeypatch.setattr(sae_trainer.SAETrainer, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_sae(None, "layers[0]", vectors, **call)
    assert [path.name for path in (tmp_path / "sae").iterdir()] == ["checkpoint.safetensors"]
    changes = {
        "updates": {"settings": SAESettings(updates=21, batch_size=128)},
        "k": {"k": K + 1},
        "kind": {"kind": "batch_topk"},
        "seed": {"seed": 1},
        "sizes": {"features": FEATURES + 1},
    }
    for name, change in changes.items():
        message = refusal(train_sae, None, "layers[0]", vectors, **call | change)
        assert f"a training that differs in {name}: use the same" in message
    assert "differs in point" in refusal(train_sae, None, "layers[1]", vectors, **call)
    assert "differs in data" in refusal(train_sae, None, "layers[0]", vectors[1:], **call)
    train_sae(None, "layers[0]", vectors, **call)
    assert made == [*range(12), *range(11, 20)]
    names = {path.name for path in (tmp_path / "sae").iterdir()}
    assert names == {"cfg.json", "sae_weights.safetensors", "training.json", "curve.png"}
    assert len(json.loads((tmp_path / "sae" / "training.json").read_text())["curve"]) == 20
    (tmp_path / "sae" / "checkpoint.safetensors").write_bytes(b"half")
    assert "is not a checkpoint, or is damaged" in refusal(train_sae, None, "layers[0]", vectors, **call)


def test_an_interrupted_training_ends_as_one_that_was_not(tmp_path, monkeypatch):
    """With a buffer that is filled again for each batch, the checkpoint holds all of the state."""
    from diffsight.lenses.features import sae_trainer

    vectors, _ = sparse_vectors(512)
    call = {"features": FEATURES, "k": K, "settings": SAESettings(updates=8, batch_size=512), "progress": False}
    whole = train_sae(None, "layers[0]", vectors, buffer=1, **call)
    monkeypatch.setattr(sae_trainer, "_CHECKPOINT_SECONDS", 0)
    update = sae_trainer.SAETrainer.update

    def interrupted(self, x):
        if self.done == 5:
            raise KeyboardInterrupt
        return update(self, x)

    monkeypatch.setattr(sae_trainer.SAETrainer, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_sae(None, "layers[0]", vectors, buffer=1, folder=tmp_path / "sae", **call)
    monkeypatch.setattr(sae_trainer.SAETrainer, "update", update)
    resumed = train_sae(None, "layers[0]", vectors, buffer=1, folder=tmp_path / "sae", **call)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value)


@pytest.mark.parametrize("point", ["unet.mid_block", "text_encoder.layers[1]"])
def test_training_from_prompts(sd, point):
    settings = SAESettings(updates=3, batch_size=64)
    call = {"num_inference_steps": 2} if "unet" in point else {}
    sae = train_sae(
        DiffusionModel(sd), point, ["a red circle", "a blue square"], features=FEATURES, k=K, settings=settings,
        buffer=128, prompts_per_run=2, progress=False, **call,
    )  # fmt: skip
    assert (sae.point, sae.width, sae.count) == (point, 32, FEATURES)


def test_values_that_are_not_finite():
    net = language.gpt2()
    torch.nn.init.constant_(net.transformer.h[1].mlp.c_proj.bias, torch.inf)
    call = {"features": FEATURES, "k": K, "progress": False}
    message = refusal(train_sae, language.model(net), "layers[1]", language.PROMPTS, **call)
    assert "the values at layers[1] contain nan or infinity" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": []}, "data must be a list of prompts"),
        ({"data": torch.zeros(3)}, "data must be a float tensor"),
        ({"data": torch.full((3, 4), torch.nan)}, "the vectors contain nan or infinity"),
        ({"kind": "top"}, "'top' is not a kind of SAE"),
        ({"k": 65}, "k must be from 1 to 64"),
        ({"of": "input"}, '"output" or "difference"'),
        ({"model": None}, "takes a DiffusionModel or a LanguageModel, not NoneType"),
    ],
)
def test_bad_input(sd, change, words):
    given = {"model": DiffusionModel(sd), "point": "text_encoder.layers[0]", "data": ["a red circle"], "k": K, **change}
    call = (given.pop("model"), given.pop("point"), given.pop("data"))
    assert words in refusal(train_sae, *call, features=FEATURES, progress=False, **given)


# ---- attached


POINTS = ("unet.mid_block", "unet.up_blocks.0", "text_encoder.layers[1]")


@pytest.mark.parametrize("point", POINTS)
def test_an_untouched_sae_changes_no_bit(sd, point):
    opened, seen = attach_sae(DiffusionModel(sd), an_sae(point=point)), []
    block = module_at(sd, point.replace("[", ".").replace("]", "").replace("encoder.layers", "encoder.encoder.layers"))
    values = outputs(block, draw, sd, SD)
    with opened.generate(**SD, seed=SEED) as run:
        if point.startswith("unet"):
            for _ in run.steps:
                seen.append(run[point].sae.features.output.clone())
        else:
            seen.append(run[point].sae.features.output.clone())
    assert torch.equal(drawn(run), draw(sd, SD))
    for features, value in zip(seen, values):
        value = value if isinstance(value, torch.Tensor) else value[0]
        vectors = value.movedim(1, -1) if value.ndim == 4 else value
        torch.testing.assert_close(features, an_sae().encode(vectors))


@pytest.mark.parametrize("how", ["in place", "through data", "assigned"])
def test_a_changed_feature_is_added_to_the_value(sd, how):
    sae = an_sae(point="unet.mid_block", of="difference")
    opened = attach_sae(DiffusionModel(sd), sae)
    with opened.generate(**SD, seed=SEED) as run:
        for _ in run.steps:
            features = run.unet.mid_block.sae.features
            if how == "in place":
                features.output[..., 7] += 3
            elif how == "through data":
                features.output.data[..., 7] += 3
            else:
                changed = features.output.clone()
                changed[..., 7] += 3
                features.output = changed

    hook = sd.unet.mid_block.register_forward_hook(lambda m, args, out: out + 3 * sae.decoder[7][:, None, None])
    expected = draw(sd, SD)
    hook.remove()
    torch.testing.assert_close(drawn(run), expected, rtol=1e-3, atol=1e-4)
    assert not torch.equal(expected, draw(sd, SD))


def test_a_language_model():
    net = language.gpt2()
    model, sae = language.model(net), an_sae(point="layers[1]")
    plain = model.trace(language.PROMPTS[0]).result.logits
    opened = attach_sae(model, sae)
    with torch.no_grad():
        with opened.trace(language.PROMPTS[0]) as run:
            assert run.layers[1].sae.features.output.shape[-1] == FEATURES
        assert torch.equal(run.result.logits, plain)
        with opened.trace(language.PROMPTS[0]) as run:
            run.layers[1].sae.features.output = torch.zeros_like(run.layers[1].sae.features.output)
        hook = net.transformer.h[1].register_forward_hook(lambda m, args, out: out - sae.encode(out) @ sae.decoder)
        expected = net(language.ids(language.PROMPTS[0])).logits
        hook.remove()
    torch.testing.assert_close(run.result.logits, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_attached(sd):
    model = DiffusionModel(sd)
    assert "does not say at which point" in refusal(attach_sae, model, an_sae())
    with pytest.raises(PointNotFoundError):
        attach_sae(model, an_sae(), "unet.middle_block")
    opened = attach_sae(model, an_sae(width=16), "unet.mid_block")
    with pytest.raises(InputError, match=r"vectors of width 16, but unet.mid_block has width 32"):
        opened.generate(**SD, seed=0).images
    assert "sae must be an SAE, not Linear" in refusal(attach_sae, model, torch.nn.Linear(2, 2), "unet.mid_block")


def test_a_difference_where_there_is_none(sd):
    opened = attach_sae(DiffusionModel(sd), an_sae(width=16, of="difference"), "unet.conv_in")
    with pytest.raises(InputError, match=r"difference of output and input cannot be computed at unet\.conv_in"):
        opened.generate(**SD, seed=0).images
