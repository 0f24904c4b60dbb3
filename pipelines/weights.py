"""Load weights later: a model built without weights adopts those of a loaded one."""

from pathlib import Path

from torch import nn

_FILES = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".pt", ".pth", ".safetensors")


def check_weights(folder: Path, part: str = "") -> None:
    """Raise OSError if a part of a model folder has no weight files, so that they are missed before they are needed.

    If `folder` is not a folder but the name of a repository, nothing is checked."""
    if folder.is_dir() and not any(file.suffix in _FILES for file in (folder / part).iterdir()):
        raise OSError(f"there are no weights in {folder / part}")


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
