"""Load weights on demand, and make sure that none are missing.

A model built without weights adopts those of a loaded one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock, get_ident
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from diffsight.errors import InputError

_FILES = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".pt", ".pth", ".safetensors")

_loading = RLock()


def check_weights(folder: Path, part: str = "") -> None:
    """Raise OSError if a part of a model folder has no weight files, before they are needed.

    If `folder` is not a folder but the name of a repository, nothing is checked."""
    if folder.is_dir() and not any(file.suffix in _FILES for file in (folder / part).iterdir()):
        raise OSError(f"there are no weights in {folder / part}")


class MissingWeightsError(OSError):
    """The files of a model do not hold all of its weights."""


@contextmanager
def requiring_all_weights() -> Iterator[None]:
    """Raise MissingWeightsError if a transformers model is loaded in the block whose files lack weights.

    transformers would draw them at random, and say so in a notice that is easily overlooked. What a model declares as
    optional, or ties to other weights, is not missing."""
    lacking: dict[str, list[str]] = {}
    thread = get_ident()
    with _loading:
        name = "_finalize_model_loading"
        finalize = vars(PreTrainedModel)[name]

        def recording(model: PreTrainedModel, load_config: Any, loading_info: Any) -> Any:
            found = finalize.__func__(model, load_config, loading_info)
            if found.missing_keys and get_ident() == thread:
                lacking[type(model).__name__] = sorted(found.missing_keys)
            return found

        setattr(PreTrainedModel, name, staticmethod(recording))
        try:
            yield
        finally:
            setattr(PreTrainedModel, name, finalize)
    if lacking:
        raise MissingWeightsError(
            "; ".join(f"{model} lacks the weights {_listed(keys)}" for model, keys in lacking.items())
        )


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:20]) + (f" and {len(keys) - 20} more" if len(keys) > 20 else "")


def adopt(module: nn.Module, loaded: nn.Module) -> None:
    """Turn `module`, built without weights, into `loaded`, and keep its module objects, so that every reference to them
    now refers to the loaded modules.

    From then on each module shares all its state with its counterpart and takes its place. Hooks and forward methods
    that a library installed (accelerate's, for example) keep working on both. A module that `module` lacks is taken
    over as it is."""
    own = dict(module._modules)
    object.__setattr__(module, "__class__", type(loaded))
    object.__setattr__(module, "__dict__", loaded.__dict__)
    for name, child in loaded._modules.items():
        if child is not None and own.get(name) is not None:
            adopt(own[name], child)
            loaded._modules[name] = own[name]


def find_path(name: str | Path) -> Path | None:
    """Return what a name stands for on this machine, or None: it may also be no path at all.

    Raises:
        InputError: It is a link that leads nowhere.
    """
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
        is_link = path.is_symlink()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, a home that is not known
        return None
    if is_link:
        raise InputError(f"{shortened(str(name))} is a link to {path.readlink()}, which does not exist")
    return None


def shortened(name: str) -> str:
    """Return a name as error messages show it."""
    return name if len(name) <= 200 else f"{name[:200]}…"
