"""What a new user writes before reading anything works, or the error says what to write."""

import pytest

from diffsight import DiffusionModel, LanguageModel, diffusion_lens
from diffsight.errors import PointNotFoundError
from helpers import refusal


def test_lenses_say_what_to_write(sd):
    model = DiffusionModel(sd)
    for given, told in (("some/model", "DiffusionModel('some/model')"), (sd, "DiffusionModel(pipeline)")):
        assert refusal(diffusion_lens, given, "a red circle").endswith(f"write {told}")
    assert "omitted" in refusal(diffusion_lens, model, "a red circle", layers="all")
    assert "sweep" in refusal(diffusion_lens, model, ["a red circle", "a blue square"])
    assert "sweep" in refusal(diffusion_lens, model, "a red circle", seed=[0, 1])


def test_handles_say_where_hidden_states_and_layers_are(sd, gpt2):
    model = DiffusionModel(sd)
    with pytest.raises(PointNotFoundError, match=r"\.layers_output\[i\]"):
        model.text_encoder.hidden_states
    with pytest.raises(PointNotFoundError, match=r"it has 3 layers: len\(model.layers\)"):
        LanguageModel(gpt2).num_layers


def test_parts_are_listed_once(gpt2):
    with pytest.raises(PointNotFoundError) as caught:
        LanguageModel(gpt2).nothing_like_it
    assert str(caught.value).count("lm_head") == 1
