"""What a new user writes before reading anything works, or the error says what to write."""

from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
import torch

from diffsight import DiffusionModel, LanguageModel, diffusion_lens
from diffsight.errors import PointNotFoundError, RunClosedError
from helpers import refusal
from models import language, lens_results


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


def test_logits_can_be_read_after_a_forward_pass():
    model = language.model()
    texts = ["A cat", "The Eiffel Tower is in Paris"]  # the first is padded
    with model.trace(texts) as run:
        run.layers_output[0][:] *= 2
        logits, probabilities = run.logits, run.next_token_probs
    assert torch.equal(run.logits, logits)
    assert torch.equal(run.next_token_probs, probabilities)
    assert not torch.equal(probabilities, model.trace(texts).next_token_probs)
    with model.trace(texts) as run:
        run.stop()
    with pytest.raises(RunClosedError):
        run.next_token_probs
    with model.generate("A cat", max_new_tokens=2) as run:
        pass
    with pytest.raises(RunClosedError, match="after 2 tokens"):
        run.next_token_probs


def test_the_map_of_a_word(saved_models):
    result = lens_results.make("attention_maps", saved_models)
    assert torch.equal(result[result.words[1]], result.maps[1])
    assert refusal(lambda: result["nothing"]).startswith("there is no map of 'nothing'")


@pytest.mark.parametrize("has_browser", [True, False])
def test_show_opens_the_page(has_browser, saved_models, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or has_browser)
    result = lens_results.make("diffusion_lens", saved_models)
    result.show()
    page = Path(url2pathname(urlsplit(opened[0]).path))
    assert page.read_text() == result.to_html(page.with_name("same.html")).read_text()
    assert capsys.readouterr().out == ("" if has_browser else f"{result}\n")


def test_show_in_a_notebook(saved_models, monkeypatch):
    pytest.importorskip("IPython", reason="IPython is not installed")
    shown = []
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=True))
    monkeypatch.setattr("IPython.display.display", shown.append)
    result = lens_results.make("diffusion_lens", saved_models)
    result.show()
    assert shown == [result]
