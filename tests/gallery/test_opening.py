"""`open_model` finds the kind of a model by its files, in a folder or on the hub."""

import shutil

import pytest

from diffsight import DiffusionModel, LanguageModel, VisionLanguageModel
from diffsight.gallery.model_opening import open_model
from helpers import refusal

KINDS = {"pipeline": DiffusionModel, "language": LanguageModel, "vision": VisionLanguageModel}


@pytest.fixture
def cache(saved_models, tmp_path, monkeypatch):
    """The hub's cache, with a model of each kind."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in KINDS:
        repository = tmp_path / f"models--someone--{name}"
        shutil.copytree(saved_models / name, repository / "snapshots" / "1")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("1")
    return tmp_path


@pytest.mark.parametrize("name", KINDS)
def test_models_of_the_hub(cache, name):
    assert type(open_model(f"someone/{name}", cache_dir=cache)) is KINDS[name]


@pytest.mark.parametrize("name", ["pipeline", "language"])
def test_a_wrong_option_of_a_model_of_the_hub(cache, name):
    message = refusal(open_model, f"someone/{name}", cache_dir=cache, revison="main")
    assert "from_pretrained has no argument 'revison' (did you mean 'revision'" in message


@pytest.mark.parametrize(
    "source, told",
    [
        ("shapes-clip", "there is no model 'shapes-clip' (did you mean 'diffsight/shapes-clip'?)"),
        ("diffsight/smolm2", "(did you mean 'diffsight/smollm2'?)"),
        ("nowhere/at-all", "there is no model 'nowhere/at-all'"),
        ("no such thing", "or a hub id such as 'owner/name'"),
    ],
)
def test_a_model_that_does_not_exist(cache, source, told):
    assert told in refusal(open_model, source)


def test_a_folder_without_a_model(tmp_path):
    assert "neither model_index.json nor config.json" in refusal(open_model, str(tmp_path))
