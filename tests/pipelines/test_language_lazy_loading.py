"""A language model's weights are loaded when they are needed: what works without them, and that nothing is lost."""

import shutil
import warnings

import pytest
import torch
import transformers

from diffsight import LanguageModel
from diffsight.errors import InputError
from diffsight.extending import tree_of
from diffsight.pipelines.language.name_check import NamesWarning
from models import architectures
from models.language_kinds import TOKENIZER, gpt2

pytestmark = pytest.mark.usefixtures("no_gradients")

PROMPT = "a red circle"
IDS = TOKENIZER(PROMPT, return_tensors="pt")["input_ids"]


def is_empty(model):
    return all(parameter.is_meta for parameter in model._owner.parameters())


@pytest.fixture(scope="module")
def net():
    return gpt2()


@pytest.fixture
def model(saved_gpt2, loads):
    return LanguageModel(saved_gpt2)


# Without weights


@pytest.mark.parametrize(
    "look",
    [
        print,
        dir,
        lambda model: model.config.n_layer,
        lambda model: model.dtype,
        lambda model: model.transformer.h[1].mlp,
        lambda model: len(model.layers),
        lambda model: model.layers[1].self_attn,
        lambda model: model.token_id("red"),
        lambda model: model.scan(PROMPT).layers_output[1],
        lambda model: model.scan(["the", PROMPT]).logits,
        lambda model: model.trace(),
        lambda model: model.edit(lambda run: run.layers_output[1].mul_(0)),
    ],
    ids=lambda look: getattr(look, "__name__", None),
)
def test_looking_needs_no_weights(model, loads, look):
    look(model)
    assert loads == []
    assert is_empty(model)


def test_bad_input_is_refused_before_weights_are_read(model, loads):
    for wrong in ([], "a red " * 40, [PROMPT, [3, 4]]):
        with pytest.raises(InputError):
            model.trace(wrong)
        with pytest.raises(InputError):
            model.generate(wrong)
    with pytest.raises(InputError, match="a seed is an integer"):
        model.generate(PROMPT, seed=-1)
    assert loads == []


def test_a_scan_gives_the_shapes_of_the_run(model):
    with model.scan(["the", PROMPT]) as scanned:
        shapes = [scanned.layers_output[1].shape, scanned.logits.shape]
    assert is_empty(model)
    with model.trace(["the", PROMPT]) as run:
        assert shapes == [run.layers_output[1].shape, run.logits.shape]


def test_the_tree_is_that_of_the_loaded_model(model, net):
    told = repr(model)
    assert "weights: not loaded yet" in told
    live = repr(LanguageModel(net))
    assert told.replace("\nweights: not loaded yet, the first run loads them", "") == live
    assert repr(model.to("cpu")) == live


def test_opening_reads_no_weights(model, net, loads):
    assert loads == []
    assert is_empty(model)
    assert [p.shape for p in model._owner.parameters()] == [p.shape for p in net.parameters()]


def test_names_are_checked_at_once(saved_gpt2, loads):
    with pytest.raises(InputError, match=r"'ln_final' was taken to be 'transformer\.wpe'"):
        LanguageModel(saved_gpt2, names={"ln_final": "transformer.wpe"})
    assert loads == []


@pytest.mark.parametrize(
    "sign",
    [lambda hidden: hidden.sum().item(), lambda hidden: hidden.sum().tolist(), lambda hidden: hidden[hidden > 0].sum()],
)
def test_names_are_checked_with_the_weights_where_it_needs_them(tmp_path, monkeypatch, sign):
    """A choice that depends on the data cannot be made without it."""
    plain = transformers.models.gpt2.modeling_gpt2.GPT2MLP.forward

    def forward(self, hidden):
        return plain(self, hidden) if sign(hidden) > 0 else plain(self, -hidden)

    monkeypatch.setattr(transformers.models.gpt2.modeling_gpt2.GPT2MLP, "forward", forward)
    gpt2().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NamesWarning)
        wrong = LanguageModel(tmp_path, names={"ln_final": "transformer.wpe"})
        edited = wrong.edit(lambda run: None)
        for lazy in (wrong, edited):
            with pytest.raises(InputError, match=r"'ln_final' was taken to be 'transformer\.wpe'"):
                lazy.trace(IDS)
        assert LanguageModel(tmp_path).trace(IDS).result.logits.shape == (1, IDS.shape[1], len(TOKENIZER))


# What brings them


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.trace(PROMPT).result,
        lambda model: model.trace(PROMPT).layers_output[1],
        lambda model: model.generate(PROMPT, max_new_tokens=2).text,
        lambda model: model(IDS),
        lambda model: model.to("cpu"),
        lambda model: model.layers[0].mlp(torch.zeros(1, 2, 32)),
        lambda model: model.lm_head.weight,
        lambda model: model.project_on_vocab(torch.zeros(1, 2, 32)),
        lambda model: model.state_dict(),
        lambda model: model.device,
        lambda model: model.edit(lambda run: run.layers_output[1]).trace(PROMPT).result,
    ],
)
def test_using_the_model_loads_them(model, loads, net, use):
    use(model)
    assert loads == ["GPT2LMHeadModel"]
    use(model)
    assert loads == ["GPT2LMHeadModel"], "they are loaded once"
    state, plain = model.state_dict(), net.state_dict()
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], plain[name]) for name in plain)
    assert model.lm_head.weight is model.transformer.wte.weight  # tied, as they were


def test_passes_of_their_own(model, loads, net):
    with model.trace() as run:
        assert loads == []
        with run.invoke(IDS):
            hidden = model.layers_output[0]
    assert torch.equal(run.result[0].logits, net(IDS).logits)
    assert torch.equal(net.lm_head(net.transformer.ln_f(hidden)), model.project_on_vocab(hidden))


def test_at_once(saved_gpt2, loads):
    model = LanguageModel(saved_gpt2, dispatch=True)
    assert loads == ["GPT2LMHeadModel"]
    assert "not loaded" not in repr(model)


def test_a_live_model_is_taken_as_it_is(net, loads):
    for dispatch in (False, True):
        assert LanguageModel((net, TOKENIZER), dispatch=dispatch)._owner is net
    assert loads == []


# Nothing is lost


def test_runs_give_the_bits_of_the_plain_model(model, net):
    assert torch.equal(model.trace(PROMPT).result.logits, net(IDS).logits)
    expected = net.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=4).result, expected)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "mamba", "bloom", "qwen3_moe", "gemma3_text", "gpt_oss"])
def test_other_architectures(tmp_path, kind):
    """Rotations in no file, experts, states, tied heads."""
    plain = architectures.build_causal(kind)
    plain.save_pretrained(tmp_path)
    ids = architectures.inputs_of(plain)
    model = LanguageModel(tmp_path)
    assert tree_of(model).structure is not None, "its names could be checked without weights"
    if kind not in ("qwen3_moe", "gpt_oss"):  # in float32 PyTorch knows no shapes of their way to call experts
        assert model.scan(ids).logits.shape == (*ids.shape, plain.config.vocab_size)
    assert is_empty(model)
    with model.trace(ids) as run:
        hidden = run.layers_output[0]
    assert torch.equal(run.result.logits, plain(ids).logits)
    assert hidden.shape[:2] == ids.shape
    assert not any(tensor.is_meta for tensor in (*model._owner.parameters(), *model._owner.buffers()))
    assert not any(module.training for module in model._owner.modules())


def test_handles_taken_before_name_the_loaded_modules(model, net):
    block, layers, head = model.transformer.h[0], list(model.layers), model.lm_head
    with model.trace(PROMPT) as run:
        seen = [block.output, layers[1].output, head.output]
    with LanguageModel(net).trace(IDS) as run:
        expected = [run.layers_output[0], run.layers_output[1], run.logits]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected))


def test_edits_made_before(model, net):
    edited = model.edit(lambda run: run.layers_output[1].zero_())
    assert is_empty(model)
    with LanguageModel(net).trace(IDS) as run:
        run.layers_output[1].zero_()
    assert torch.equal(edited.trace(PROMPT).result.logits, run.result.logits)
    assert torch.equal(model.trace(PROMPT).result.logits, net(IDS).logits)


@pytest.mark.parametrize("arguments", [{}, {"dtype": torch.float16}, {"dtype": "float16"}, {"torch_dtype": "auto"}])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_types_are_known_beforehand(tmp_path, arguments, stored):
    gpt2().to(stored).save_pretrained(tmp_path)
    model = LanguageModel(tmp_path, **arguments)
    before = model.dtype
    assert is_empty(model)
    plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, **arguments)
    assert before == plain.dtype == model.to("cpu").dtype


def test_arguments_go_to_from_pretrained(saved_gpt2):
    model = LanguageModel(saved_gpt2, attn_implementation="eager", device_map="cpu", resid_pdrop=0.25)
    assert (model.config._attn_implementation, model.config.resid_pdrop) == ("eager", 0.25)
    with model.trace(PROMPT) as run:
        assert run.attention_probs[0].shape == (1, 4, IDS.shape[1], IDS.shape[1])
    assert (model.config._attn_implementation, model.config.resid_pdrop) == ("eager", 0.25)
    config = transformers.GPT2Config.from_pretrained(saved_gpt2, resid_pdrop=0.5)
    assert LanguageModel(saved_gpt2, config=config, dispatch=True).config.resid_pdrop == 0.5


def test_the_generation_settings_of_the_folder(saved_gpt2, tmp_path):
    shutil.copytree(saved_gpt2, tmp_path / "beams")
    transformers.GenerationConfig(num_beams=3, max_new_tokens=4, pad_token_id=0).save_pretrained(tmp_path / "beams")
    with LanguageModel(tmp_path / "beams").generate(PROMPT) as run:
        assert run.rows[0].layers_output[0].shape[0] == 3


def test_a_repository_of_the_hub(saved_gpt2, tmp_path, loads, net):
    """In the layout of the hub's cache on disk."""
    revision = "a" * 40
    repository = tmp_path / "models--owner--name"
    shutil.copytree(saved_gpt2, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    model = LanguageModel("owner/name", cache_dir=str(tmp_path), local_files_only=True)
    assert loads == []
    assert torch.equal(model.trace(PROMPT).result.logits, net(IDS).logits)


# Errors


def test_missing_files_are_reported_at_once(saved_gpt2, tmp_path):
    shutil.copytree(saved_gpt2, tmp_path / "gpt2")
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="there are no weights in"):
        LanguageModel(tmp_path / "gpt2")


def test_weights_that_cannot_be_read(saved_gpt2, tmp_path, net):
    shutil.copytree(saved_gpt2, tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    model = LanguageModel(tmp_path / "gpt2")
    for _ in range(2):
        with pytest.raises(Exception, match=r"(?i)header|incomplete"):
            model.trace(PROMPT)
    file.write_bytes(whole)
    assert torch.equal(model.trace(PROMPT).result.logits, net(IDS).logits)
