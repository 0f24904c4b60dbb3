"""Load weights on demand, and make sure that none are missing.

A model built without weights adopts those of a loaded model.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import RLock, get_ident
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.integrations import PeftAdapterMixin

_FILES = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".pt", ".pth", ".safetensors")

_DRAWS = ((PreTrainedModel, "initialize_weights"), (nn.Linear, "reset_parameters"), (_ConvNd, "reset_parameters"))

_loading = RLock()


def check_weights(folder: Path, part: str = "") -> None:
    """Raise OSError if a part of a model folder has no weight files, or links in their place that lead nowhere, before
    they are needed.

    If `folder` is not a folder but the name of a repository, nothing is checked."""
    if not folder.is_dir():
        return
    files = [file for file in (folder / part).iterdir() if file.suffix in _FILES]
    if not files:
        raise OSError(f"there are no weights in {folder / part}")
    present = {file.suffix for file in files if os.path.exists(file)}  # False for a link to itself
    broken = next((file for file in files if file.suffix not in present and not os.path.exists(file)), None)
    if broken is not None:
        raise OSError(f"{broken} is a broken link: it leads to {os.readlink(broken)}")


@contextmanager
def without_weights() -> Iterator[None]:
    """Build modules on the meta device in the block.

    accelerate changes a method of all modules for this, so only one thread at a time can be in the block, and no other
    thread can load weights meanwhile. No initial values are drawn, which would take half of the time and which modules
    on the meta device cannot hold."""
    with _loading, init_empty_weights(), ExitStack() as replaced:
        for kind, name in _DRAWS:
            replaced.enter_context(_replaced(kind, name, lambda module: None))
        yield


class MissingWeightsError(OSError):
    """The files of a model do not hold all of its weights."""


@contextmanager
def requiring_all_weights() -> Iterator[None]:
    """Raise MissingWeightsError if the files of a model that is loaded in the block lack weights, and RuntimeError,
    naming them, if weights do not fit a model of transformers, whose own error refers to a report in the log.

    transformers and diffusers would initialize them randomly, or leave them on the meta device, and print a notice
    that is easily overlooked. The same holds for an adapter that transformers loads with a model. Weights that a model
    declares as optional or ties to other weights do not count as missing."""
    lacking: dict[str, list[str]] = {}
    misfits: dict[str, list[str]] = {}
    thread = get_ident()

    def note(name: str, missing_keys: Iterable[str]) -> None:
        if missing_keys and get_ident() == thread:
            lacking[name] = sorted(missing_keys)

    with _loading:
        finalize = vars(PreTrainedModel)["_finalize_model_loading"].__func__
        load_adapter = vars(PeftAdapterMixin)["load_adapter"]

        def recording(model: PreTrainedModel, load_config: Any, loading_info: Any) -> Any:
            try:
                found = finalize(model, load_config, loading_info)
            except RuntimeError:
                if get_ident() == thread:
                    misfits[type(model).__name__] = _misfits(loading_info)
                raise
            note(type(model).__name__, found.missing_keys)
            return found

        def recording_adapters(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            found = load_adapter(model, *args, **kwargs)
            note(f"the adapter of {type(model).__name__}", getattr(found, "missing_keys", ()))  # not in every version
            return found

        with ExitStack() as replaced:
            replaced.enter_context(_replaced(PreTrainedModel, "_finalize_model_loading", staticmethod(recording)))
            replaced.enter_context(_replaced(PeftAdapterMixin, "load_adapter", recording_adapters))
            modeling = sys.modules.get("diffusers.models.modeling_utils")  # language models do not need it
            if modeling is not None:
                load = vars(modeling.ModelMixin)["_load_pretrained_model"].__func__

                def recording_diffusers(cls: type, *args: Any, **kwargs: Any) -> tuple:
                    model, missing_keys, *found = load(cls, *args, **kwargs)
                    note(type(model).__name__, missing_keys)
                    return model, missing_keys, *found

                method = classmethod(recording_diffusers)
                replaced.enter_context(_replaced(modeling.ModelMixin, "_load_pretrained_model", method))
            try:
                yield
            except Exception as error:
                if not any(misfits.values()):
                    raise
                raise RuntimeError(_told(misfits, "does not fit its files:")) from error
    if lacking:
        raise MissingWeightsError(_told(lacking, "lacks the weights"))


def _misfits(loading_info: Any) -> list[str]:
    """Return which weights of a model's files do not fit the model: those of another shape, and those that cannot be
    converted to its form."""
    shapes = (
        f"{key} has the shape {tuple(saved)} in the files and {tuple(built)} in the model"
        for key, saved, built in sorted(loading_info.mismatched_keys)
    )
    failed = sorted(loading_info.conversion_errors.items())
    return [*shapes, *(f"{key} cannot be converted ({text.splitlines()[-1]})" for key, text in failed)]


@contextmanager
def _replaced(kind: type, name: str, method: Any) -> Iterator[None]:
    """Replace a method of all models of a library in the block."""
    own = vars(kind)[name]
    setattr(kind, name, method)
    try:
        yield
    finally:
        setattr(kind, name, own)


def _told(found: dict[str, list[str]], what: str) -> str:
    return "; ".join(f"{model} {what} {_listed(keys)}" for model, keys in found.items() if keys)


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:20]) + (f" and {len(keys) - 20} more" if len(keys) > 20 else "")


def adopt(module: nn.Module, loaded: nn.Module) -> None:
    """Turn `module`, built without weights, into `loaded`. Its module objects are kept, so existing references to them
    now refer to loaded modules.

    From then on each module shares all its state with its counterpart and takes its place. Hooks and forward methods
    that a library installed (accelerate's, for example) keep working on both. A module that `module` lacks is added
    unchanged."""
    own = dict(module._modules)
    object.__setattr__(module, "__class__", type(loaded))
    object.__setattr__(module, "__dict__", loaded.__dict__)
    for name, child in loaded._modules.items():
        if child is not None and own.get(name) is not None:
            adopt(own[name], child)
            loaded._modules[name] = own[name]
