"""What lenses need to know about a language model."""

from pathlib import Path
from typing import Any

from diffsight.errors import InputError
from diffsight.pipelines.language.model import LanguageModel


def check_language_model(lens: str, model: Any) -> None:
    """Check that `model` has a head, and layers with one hidden state for each token.

    Raises:
        InputError: It does not, or is not a LanguageModel.
    """
    if not isinstance(model, LanguageModel):
        raise InputError(f"{lens} takes a LanguageModel, not {type(model).__name__}")
    if not hasattr(model, "lm_head"):
        name = type(model.module).__name__
        raise InputError(f"{lens}: no lm_head was found in {name}, so layers cannot be read as tokens")
    if model.hidden_layout is None:
        name = type(model.module).__name__
        raise InputError(f"{lens}: the layers of {name} do not return one hidden state for each token")


def vocabulary_size(model: LanguageModel) -> int | None:
    """Return the number of tokens that the model knows, or None if its embedding does not say."""
    return getattr(getattr(model, "embed_tokens", None), "num_embeddings", None)


def name_of(model: LanguageModel) -> str:
    """Return the name of a model for records: its class, and where it was loaded from."""
    source = getattr(model.config, "name_or_path", "")
    return f"{type(model.module).__name__}{f' ({Path(source).name})' if source else ''}"
