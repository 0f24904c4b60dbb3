"""Results in a terminal: tables with the words, cut into blocks that fit."""

import io

import pytest
import rich.console

from diffsight import logit_lens
from models import language, lens_results


@pytest.fixture
def lines(saved_models, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def of(name):
        return str(lens_results.make(name, saved_models)).splitlines()

    return of


@pytest.mark.parametrize("name", lens_results.MADE)
def test_every_result_prints_what_it_is(lines, name):
    shown = lines(name)
    assert len(shown) > 2
    assert not any(line.startswith(("LensPredictions(", "<")) for line in shown)
    assert max(map(len, shown)) <= 80 or name == "layer_fidelity"


def test_a_logit_lens_prints_its_words(lines):
    shown = lines("logit_lens")
    assert shown[0] == "logit_lens"
    assert "GPT2LMHeadModel" in shown[1]
    head = next(line for line in shown if line.startswith("layer"))
    assert head.split() == ["layer", "The", "␣E", "i", "f", "f", "el", "␣T", "ow", "er"] or "␣is" in " ".join(shown)
    rows = [line.split()[0] for line in shown[shown.index(head) + 1 :][:2]]
    assert rows == ["2", "0"]  # the last layer is on top


def test_every_word_is_there_whatever_the_width(monkeypatch):
    result = logit_lens(language.model(), language.PROMPTS[0])
    for width in ("60", "90", "300"):
        monkeypatch.setenv("COLUMNS", width)
        shown = str(result)
        tables = shown.split("\nlayer ")[1:]
        heads = [word for table in tables for word in table.splitlines()[0].split()]
        assert len(heads) == len(result.inputs[0])
    assert len(tables) == 1


def test_target_probabilities_print_their_values(lines, saved_models):
    result = lens_results.make("run_prompts", saved_models)
    shown = "\n".join(lines("run_prompts"))
    for name, values in result.items():
        assert name in shown
        assert all(f"{value:.3f}" in shown for value in values.tolist())


def test_rich_prints_it_in_colour(saved_models):
    result = lens_results.make("logit_lens", saved_models)
    file = io.StringIO()
    rich.console.Console(file=file, force_terminal=True, width=80, color_system="truecolor").print(result)
    assert "\x1b[" in file.getvalue()
    assert "\x1b[" not in str(result)


def test_square_brackets_are_not_markup(monkeypatch):
    result = logit_lens(language.model(), "[bold]A cat[/bold] [link=x]sat", positions=[0, 1], layers=0)
    assert "[bold]A cat[/bold] [link=x]sat" in str(result)
