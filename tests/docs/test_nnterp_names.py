"""The tables of nnterp's names in the documentation: they hold every name, and every replacement exists."""

import builtins
import re
from pathlib import Path

import pytest
import torch

import diffsight
from diffsight import logit_lens
from diffsight.lenses.patch_object_attn_lens import patch_object_attn_lens
from diffsight.lenses.patchscope import TargetPrompt, repeat_prompt
from diffsight.lenses.target_probabilities import Prompt, first_tokens
from diffsight.pipelines.standard_names import model_names
from models import language

PAGE = (Path(__file__).parents[2] / "docs" / "coming_from_nnterp.md").read_text(encoding="utf-8")
LINES = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| nnterp |", "| ---"))]
ROWS = [tuple(cell.strip() for cell in line.strip("| ").split(" | ")) for line in LINES]

# The public surface of nnterp 1.3.0, read off its modules.
SURFACE = re.findall(
    r"\w+",
    """
    StandardizedTransformer layers self_attn mlp ln_final lm_head embed_tokens attentions mlps layers_input
    layers_output attentions_input attentions_output mlps_input mlps_output attention_probabilities
    attn_probs_available input_ids input_size attention_mask token_embeddings logits next_token_probs skip_layer
    skip_layers steer project_on_vocab probs_to_dict get_topk_closest_tokens num_layers num_heads hidden_size
    vocab_size add_prefix_false_tokenizer detect_layer_output_type logit_lens TargetPrompt repeat_prompt
    it_repeat_prompt TargetPromptBatch patchscope_lens patchscope_generate patch_object_attn_lens get_embed_tokens
    get_layers get_num_layers get_layer get_layer_input get_layer_output get_attention get_attention_output
    get_mlp get_mlp_output get_logits get_unembed_norm get_unembed get_next_token_probs set_layer_output
    ModuleAccessor get_token_activations collect_last_token_activations_session collect_token_activations_batched
    compute_next_token_probs TokenizationError get_first_tokens Prompt from_strings has_no_collisions
    get_target_probs run next_token_probs_unsqueeze run_prompts plot_topk_tokens prompts_to_df RenamingError
    AttnProbFunction RenameConfig expand_path_with_model get_rename_dict text_config get_num_attention_heads
    get_hidden_size get_vocab_size IOType LayerAccessor AttentionProbabilitiesAccessor get_ignores check_io
    check_model_renaming print_source check_source disable try_with_scan unpack_tuple dummy_inputs DummyCache
    ArchitectureNotFound is_notebook display_markdown display_source run_tests
    """,
)


@pytest.fixture(scope="module")
def known():
    """What the names on the right stand for."""
    model = language.model()
    prompt = Prompt.from_strings("A cat", "Paris", model)
    return {"model": model, "prompt": prompt, "result": logit_lens(model, "A cat"), "net": model.module}


def test_every_name_of_nnterp_is_in_it():
    left = " ".join(row[0] for row in ROWS)
    missing = [name for name in SURFACE if not re.search(rf"\b{name}\b", left)]
    assert missing == []
    assert all(suffix in left for suffix in ("*_attention_prob_source", "default_*_config_keys"))


def test_every_row_has_two_cells():
    assert all(len(row) == 2 for row in ROWS)
    assert len(ROWS) > 40


def test_every_name_on_the_right_exists(known):
    names = {**vars(builtins), **known, "model_names": model_names, "pandas": None, "pytest": None}
    names |= {
        value.__name__: value for value in (Prompt, first_tokens, TargetPrompt, repeat_prompt, patch_object_attn_lens)
    }
    names |= {name: getattr(diffsight, name) for name in diffsight.__all__}
    checked = 0
    for _, right in ROWS:
        for code in re.findall(r"`([^`]+)`", right):
            for word in re.findall(r"(?<![\w.\"'])([A-Za-z_]\w*)(?=[.(\[])", code):
                assert word == "run" or word in names or word == "diffsight", (word, code)
            for holder, path in re.findall(r"\b(model|run|prompt|result|net)((?:\.[A-Za-z_]\w*(?:\[\w+\])?)+)", code):
                check(known, holder, path, code)
                checked += 1
    assert checked > 40


def check(known, holder, path, code):
    if holder == "run":
        with known["model"].trace(language.PROMPTS[1]) as run:
            follow(run, path, code)
            run.stop()
    else:
        follow(known[holder], path, code)


def follow(value, path, code):
    for name, index in re.findall(r"\.([A-Za-z_]\w*)(\[\w+\])?", path):
        assert hasattr(value, name), f"{name} in {code}"
        value = getattr(value, name)
        value = value[1] if index else value
        if callable(value) and not hasattr(value, "_target"):
            return


def test_the_lines_of_the_table_do_what_they_say(known):
    model, net = known["model"], known["net"]
    with model.trace(language.PROMPTS[0]) as run:
        assert torch.equal(run.embed_tokens.output, net.transformer.wte(run.tokens))
        run.attentions_input[2][:, 0] = 0
        assert (run.attentions_input[2][:, 0] == 0).all()
    assert net.get_submodule(model_names(net)["layers"]) is net.transformer.h
    assert model.config.get_text_config().hidden_size == 32
    assert len(model.layers) == 4
    assert not known["prompt"].shared_tokens
    assert model.trace("A cat").next_token_probs.shape == (1, len(language.TOKENIZER))
