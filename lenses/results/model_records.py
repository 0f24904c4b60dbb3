"""Records of models and SAEs, so that a result can be made again and a different model is noticed.

Weights are recorded as a fingerprint: a hash over the name, shape and dtype of every weight, and over up to 1024 of its
values at equal distances. It takes no time even for large models, and differs between checkpoints and fine-tunes.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from diffsight.lenses.features.autoencoder import SAE
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.language.model import LanguageModel

Model = DiffusionModel | LanguageModel

_VALUES = 1024  # values of each weight in its hash
_known: WeakKeyDictionary[nn.Module, tuple[tuple, str]] = WeakKeyDictionary()  # versions of weights, and their hash


@dataclass(frozen=True)
class ModelRecord:
    """A model or an SAE, as a record describes it.

    Attributes:
        kind: The class, such as "LanguageModel".
        source: What it was loaded from: a name or a folder. None for a live model, and for an SAE that was
            not loaded from a folder.
        options: The other arguments it was loaded with, as JSON stores them (see `call_values.py`).
        revision: The commit that a model hub named, if any.
        weights: The fingerprint of the weights.
        edits: The edits on the model: where each was written, and its source.
    """

    kind: str
    source: str | None
    options: Mapping[str, Any]
    revision: str | None
    weights: str
    edits: tuple[Mapping[str, str | None], ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, model: Model | SAE, encode: Callable[[str, Any], Any]) -> "ModelRecord":
        """Return the record of a model. `encode(name, value)` returns an option as JSON stores it."""
        loaded = getattr(model, "loaded_from", None) or {}
        options = {name: encode(name, value) for name, value in loaded.items() if name != "source"}
        source = None if "source" not in loaded else str(loaded["source"])
        if isinstance(model, SAE):
            return cls("SAE", source, options, None, fingerprint(model))
        return cls(
            type(model).__name__, source, options, _revision(model), fingerprint(model), tuple(map(_edit, model.edits))
        )

    def record(self) -> dict[str, Any]:
        """Return the record as JSON stores it."""
        return asdict(self)


def fingerprint(model: Model | SAE) -> str:
    """Return the fingerprint of the weights of a model or an SAE, see above."""
    digest = hashlib.sha256()
    for name, module in _modules(model):
        digest.update(f"{name} {_hash(module)}".encode())
    return digest.hexdigest()[:16]


def _modules(model: Model | SAE) -> Iterator[tuple[str, nn.Module]]:
    root = model if isinstance(model, SAE) else model.module
    parts = {"": root} if isinstance(root, nn.Module) else root.components
    return ((name, part) for name, part in parts.items() if isinstance(part, nn.Module))


def _hash(module: nn.Module) -> str:
    weights = dict(module.named_parameters())  # not state_dict(), whose hooks may gather weights from other machines
    versions = tuple(map(_state, weights.values()))
    known = _known.get(module)
    if known is None or known[0] != versions:
        digest = hashlib.sha256()
        for name, value in weights.items():
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(_sample(value.detach()))
        known = _known[module] = versions, digest.hexdigest()
    return known[1]


def _state(value: torch.Tensor) -> tuple[int, int]:
    """Return two values that change when a weight is changed or replaced."""
    try:
        return value.data_ptr(), value._version
    except RuntimeError:  # it has no storage of its own, or was made in inference mode
        return id(value), 0


def _sample(value: torch.Tensor) -> bytes:
    """Return some values of a weight as bytes, or no bytes if it has no plain values, for example if it is sparse."""
    if value.is_meta:
        return b""
    try:
        flat = value.flatten()
        few = flat[:: max(1, len(flat) // _VALUES)]
        return few.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    except (RuntimeError, TypeError, NotImplementedError):
        return b""


def _revision(model: Model) -> str | None:
    config = getattr(model.module, "config", None)
    found = getattr(config, "_commit_hash", None)
    return found if isinstance(found, str) else None


def _edit(edit: Any) -> dict[str, str | None]:
    return {"where": edit.where, "source": edit.source}
