"""Functions that a client may call on a server besides runs: lenses by name, and queries about a model."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from diffsight import DiffusionModel, lenses
from diffsight.errors import InputError
from diffsight.remote import check_harmless

# The lenses that take one model and data, and write no files.
LENSES = (
    "attention_from",
    "attention_maps",
    "collect_activations",
    "diffusion_lens",
    "encoder_patching",
    "image_token_lens",
    "invert",
    "layer_fidelity",
    "logit_lens",
    "patchscope_generate",
    "patchscope_lens",
    "prompt_to_prompt",
    "run_prompts",
    "trajectory_lens",
)
_FILES = ("folder", "cache", "out", "output")  # arguments that name files of the server


def services_of(model: Any) -> dict[str, Callable[..., Any]]:
    """Return the functions that a client may call, by name. They do not take the model as an argument."""
    found: dict[str, Callable[..., Any]] = {name: partial(run_lens, name, model) for name in LENSES}
    if isinstance(model, DiffusionModel):
        found["encoders"] = lambda: list(model.encoders.values())
        found["attentions"] = lambda: [model.attentions.denoiser, list(model.attentions.values())]
    return found


def run_lens(name: str, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a lens on a model, without a progress bar."""
    lens = getattr(lenses, name)
    signature = inspect.signature(lens)
    given = signature.bind(model, *args, **kwargs).arguments  # by name, also those without a keyword
    check_harmless((), given)
    for argument in _FILES:
        if given.get(argument) is not None:
            raise InputError(f"{argument}: a server writes no files for its clients. Leave it out, and save the result")
    if "progress" in signature.parameters:
        kwargs["progress"] = False
    return lens(model, *args, **kwargs)
