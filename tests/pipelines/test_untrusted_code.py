"""A folder's own code does not run unless the user trusts it, and nothing asks for that at the terminal."""

import builtins
import json

import pytest
import transformers

from diffsight import HFPipeline, LanguageModel, VisionLanguageModel
from diffsight.compat import LanguageModel as CompatLanguageModel
from diffsight.errors import InputError
from models.language_kinds import TOKENIZER, gpt2
from models.vision_language import llava


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A language model whose code would stop the process. The user answers yes to every question."""
    gpt2().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text("raise SystemExit('the code of the folder ran')")
    monkeypatch.setattr(builtins, "input", lambda question: "y")
    return tmp_path


def add(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


OPENINGS = {
    "language": LanguageModel,
    "vision-language": VisionLanguageModel,
    "transformers": lambda folder: HFPipeline("text-generation", model=str(folder)),
    "compat": lambda folder: CompatLanguageModel(str(folder), automodel=transformers.AutoModelForCausalLM),
}


@pytest.mark.parametrize("name", OPENINGS)
def test_a_model_with_code_of_its_own(folder, name):
    add(
        folder / "config.json",
        auto_map={"AutoModelForCausalLM": "own.Net", "AutoConfig": "own.Config"},
        model_type="own",
    )
    with pytest.raises((InputError, ValueError), match="custom code") as raised:
        OPENINGS[name](folder)
    assert "trust_remote_code=True" in str(raised.value)


def test_a_tokenizer_with_code_of_its_own(folder):
    add(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Tokens"]}, tokenizer_class="Tokens")
    (folder / "config.json").unlink()  # with it, transformers takes its own tokenizer for the model
    with pytest.raises(InputError, match=r"there is no tokenizer .* Load it yourself, and pass the tokenizer"):
        LanguageModel(gpt2(), tokenizer=folder)


def test_a_processor_with_code_of_its_own(folder):
    llava()[1].save_pretrained(folder)
    add(folder / "processor_config.json", auto_map={"AutoProcessor": "own.Pieces"}, processor_class="Pieces")
    model = VisionLanguageModel(folder)
    with pytest.raises(InputError, match=r"has no processor .* custom code .* pass trust_remote_code=True"):
        model.trace("a red circle")
