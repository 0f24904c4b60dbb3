"""Sites and positions: what a user's names, patterns, words and numbers stand for."""

import pytest
import torch

from diffsight import LanguageModel
from diffsight.errors import InputError, PointNotFoundError
from diffsight.lenses.sites.find_sites import find_sites, for_each_head, layer_of
from diffsight.lenses.sites.position_pairs import pair_positions
from diffsight.lenses.sites.prompt_tokens import PromptTokens
from diffsight.lenses.sites.site import Site
from helpers import outputs, refusal, with_first
from models import language, language_kinds

CLEAN, CORRUPTED = "The capital of France is", "The capital of Paris is"


def tokens(model, text):
    return PromptTokens.of(model, language.TOKENIZER(text)["input_ids"])


# ---- sites


def test_named_sites(model):
    assert [site.point for site in find_sites(model, "mlps", layers=[-1, 0])] == [
        "layers[0].mlp.output",
        "layers[3].mlp.output",
    ]
    points = [site.point for site in find_sites(model, ["layers", "q"], layers=[0])]
    assert points == ["layers[0].output", "layers[0].self_attn.q"]
    assert find_sites(model, "layers", layers="embedding") == [Site("layers[0].input", "embedding")]


def test_patterns(model, sd):
    from diffsight import DiffusionModel

    assert len(find_sites(model, "layers[*].mlp.act")) == 4
    assert [site.point for site in find_sites(model, ["layers", "layers[*]"], layers=[1])][:1] == ["layers[1].output"]
    found = find_sites(DiffusionModel(sd), "unet.**.attn2")
    assert {site.value for site in found} == {"output"}
    assert all(site.module.endswith("attn2") for site in found)


@pytest.mark.parametrize(
    ("sites", "layers", "said"),
    [
        ("layer", None, "did you mean 'layers'"),
        ("layers[*].mpl", None, "did you mean 'mlp'"),
        ([], None, "no sites are chosen"),
        (7, None, "not 7"),
        ("heads", "embedding", "which has no heads"),
        ("heads", 9, "there is no layer 9"),
        ("layers[*].mlp", 1, "write the layers into the path"),
    ],
)
def test_refused_sites(model, sites, layers, said):
    with pytest.raises((InputError, PointNotFoundError)) as error:
        find_sites(model, sites, layers)
    assert said in str(error.value)


def test_names_belong_to_language_models(sd):
    from diffsight import DiffusionModel

    assert "write the paths" in refusal(find_sites, DiffusionModel(sd), "layers")


def test_the_layer_of_a_path(model):
    assert layer_of(model, find_sites(model, "transformer.h[2].mlp.act")[0]) == 2
    assert layer_of(model, find_sites(model, "layers[1].self_attn.q")[0]) == 1
    assert layer_of(model, find_sites(model, "ln_final")[0]) is None
    run = model.trace("Paris")  # while a run is open, names of the model belong to it
    assert layer_of(model, find_sites(model, "transformer.h[2].mlp.act")[0]) == 2
    del run


def test_heads(model):
    sites = find_sites(model, ["heads", "layers"], layers=[0])
    found = for_each_head(sites, {sites[0].point: 4}, heads=[-1, 1])
    assert [(site.value, site.head) for site in found] == [("heads_output", 3), ("heads_output", 1), ("output", None)]
    assert "there is no head 4" in refusal(for_each_head, sites, {sites[0].point: 4}, [4])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bart", "bert"])
def test_read_and_write(kind):
    """What is written is what the rest of the model sees; a tuple keeps its other items."""
    net = getattr(language_kinds, kind)()
    model, ids = LanguageModel((net, language_kinds.TOKENIZER)), language_kinds.ids("a red circle")
    site = find_sites(model, "layers", layers=1)[0]
    with torch.no_grad(), model.trace(ids) as run:
        wanted = torch.randn_like(site.read(run))
        site.write(run, wanted)
        assert torch.equal(site.read(run), wanted)
        changed = run.result.logits
    layer = next(model.layers[1].modules())
    handle = layer.register_forward_hook(lambda module, args, output: with_first(output, wanted))
    with torch.no_grad():
        plain = model.trace(ids).result.logits
    handle.remove()
    assert torch.equal(changed, plain)


def test_a_part_is_a_view(model, net):
    site = Site("layers[1].self_attn.attention_probs", 1, head=2)
    with torch.no_grad(), model.trace(CLEAN) as run:
        value = site.read(run)
    assert torch.equal(site.part(value, range(1, 3)), value[:, 2, 1:3])
    site.part(value, range(1, 3))[:] = 0
    assert value[:, 2, 1:3].abs().max() == 0
    site = Site("layers[1].self_attn.v", 1, head=2)
    with torch.no_grad(), model.trace(CLEAN) as run:
        value = site.read(run)
    assert torch.equal(site.part(value, range(1, 3)), value[:, 1:3, 2])
    assert torch.equal(site.part(value), value[:, :, 2])
    plain = outputs(net.transformer.h[1].attn.c_attn, net, language.ids(CLEAN))[0]
    assert torch.equal(value.flatten(2), plain[..., 64:])


def test_names():
    assert Site("layers[3].output", 3).name == "layers[3]"
    assert Site("layers[0].input", "embedding").name == "embedding"
    assert Site("layers[3].self_attn.q", 3, head=2).name == "layers[3].self_attn.q head 2"


# ---- positions


def pairs(source, target, positions, **more):
    return [(one.title, one.source, one.target) for one in pair_positions(source, target, positions, **more)]


def test_each_token_and_all(model):
    clean = tokens(model, CLEAN)
    each = pair_positions(clean, clean, "each")
    assert [column.source for column in each] == [range(i, i + 1) for i in range(len(clean))]
    assert pairs(clean, clean, "all") == [("all tokens", range(len(clean)), range(len(clean)))]


def test_words_of_prompts_with_different_tokens(model):
    clean, corrupted = tokens(model, "The cat is in Paris"), tokens(model, "The hello is in France")
    words = pair_positions(clean, corrupted, "words", align="last")
    assert [column.title for column in words] == ["The", "cat → hello", "is", "in", "Paris → France"]
    by_pair = pair_positions(clean, corrupted, [("Paris", "France")], align="last")[0]
    by_place = pair_positions(clean, corrupted, ["Paris"], align="last")[0]
    assert (
        (by_pair.source, by_pair.target) == (by_place.source, by_place.target) == (words[-1].source, words[-1].target)
    )
    assert clean.words["Paris"] == by_pair.source


def test_numbers_and_ranges(model):
    clean, longer = tokens(model, CLEAN), tokens(model, f"In {CLEAN}")
    assert pair_positions(clean, longer, -1)[0].target == range(len(longer) - 1, len(longer))
    found = pair_positions(clean, clean, [0, range(1, 3), ("France", 2)], align="last")
    assert [column.source for column in found[:2]] == [range(1), range(1, 3)]
    assert found[2].target == range(2, 3)


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        ("each", "' France'"),
        ("each", 'positions="words"'),
        ("all", "they have"),
        ("words", "5 and 6 words"),
        (["France"], "pass a pair, ('France', …)"),
        (["Rome"], "does not occur"),
        ([99], "there is no token 99"),
        ([range(3, 3)], "there are no tokens"),
        ([("France", "Paris", 1)], "has two items"),
        ([], "no positions are chosen"),
        ([1.5], "not 1.5"),
    ],
)
def test_refused_positions(model, positions, said):
    assert said in refusal(pair_positions, tokens(model, CLEAN), tokens(model, f"In {CLEAN}"), positions)


def test_different_numbers_of_tokens(model):
    clean, corrupted = tokens(model, "The cat is in Paris"), tokens(model, "The cat is in hexagon")
    assert 'align="last"' in refusal(pair_positions, clean, corrupted, ["Paris"])
    assert "must be one of" in refusal(pair_positions, clean, corrupted, ["Paris"], "first")


def test_no_tokenizer(net):
    plain = PromptTokens.of(LanguageModel(net), [4, 8, 15])
    assert plain.texts == ("4", "8", "15")
    assert len(pair_positions(plain, plain, "each")) == 3
    assert "need a tokenizer" in refusal(pair_positions, plain, plain, ["cat"])
