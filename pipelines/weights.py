"""Weights that come later: a model that was built without them takes over those of one that was loaded."""

from pathlib import Path

from torch import nn

_FILES = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".pt", ".pth", ".safetensors")


def check_weights(folder: Path, part: str = "") -> None:
    """Raises OSError where a part of what a folder holds has no file of weights, so that it is missed before it is
    needed; where `folder` is none, but the name of a repository, that is not known."""
    if folder.is_dir() and not any(file.suffix in _FILES for file in (folder / part).iterdir()):
        raise OSError(f"there are no weights in {folder / part}")


def adopt(module: nn.Module, loaded: nn.Module) -> None:
    """Makes `module`, built without weights, what `loaded` is; the module objects in it stay those they are, so that
    whatever names them names the loaded ones now.

    Each module shares all its state with its counterpart from here on, whose place it takes: hooks and forward passes
    that a library put there (accelerate's, for one) go on working on either. Where the loaded model has a module that
    `module` lacks, it is taken as it is."""
    own = dict(module._modules)
    object.__setattr__(module, "__class__", type(loaded))
    object.__setattr__(module, "__dict__", loaded.__dict__)
    for name, child in loaded._modules.items():
        if child is not None and own.get(name) is not None:
            adopt(own[name], child)
            loaded._modules[name] = own[name]
