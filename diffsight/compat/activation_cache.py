"""`tracer.cache()`: the outputs, and optionally the inputs, of many modules.

with model.trace(prompt) as tracer:
    cache = tracer.cache()
cache["model.transformer.h.0"].output       # by path
cache.transformer.h[0].output               # or by attribute, as on the model
for path, part in cache.items():            # or all of them, as in a dictionary
    part.output
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from diffsight.compat.layer_tuples import LayerOutput, gives_tuple
from diffsight.errors import PointNotFoundError, suggest
from diffsight.extending import INPUTS, OUTPUT, Asked, Envoy, Run, flow_of, owner_of, target_of, tree_of

Conversion = tuple[torch.device | str | None, torch.dtype | None, bool]
Visit = dict[str, Any]  # "output" and "inputs" of one call


class ActivationCache:
    """Values by module path: a single value, or a list with one value per call.

    The whole cache is also a dictionary of paths and parts of the cache, as in older releases of nnsight.

    It can be pickled, without the model: a cache that is loaded from a file knows modules by their paths alone.

    Args:
        model: The model; None for a cache that was loaded from a file.
        visits: For each path, the values kept from each call.
        path: The module path of this part of the cache; None for the whole cache.
    """

    def __init__(self, model: Envoy | None, visits: dict[str, list[Visit]], path: str | None = None) -> None:
        self._model, self._visits, self._path = model, visits, path

    @property
    def output(self) -> Any:
        """The output of the module; a list if it was called several times."""
        return self._values("output")

    @property
    def inputs(self) -> Any:
        """The arguments of the module, `(args, kwargs)`; a list if it was called several times. None if not kept."""
        return self._values("inputs")

    @property
    def input(self) -> Any:
        """The first argument of the module; a list if it was called several times."""
        firsts = [None if one.get("inputs") is None else _first(*one["inputs"]) for one in self._of_module()]
        return firsts[0] if len(firsts) == 1 else firsts

    def save(self) -> "ActivationCache":
        """Return the cache itself: a name bound in a run stays bound after it."""
        return self

    def keys(self) -> list[str]:
        """Return the paths of the modules whose values were kept here."""
        inside = (None,) if self._path is None else (self._path, f"{self._path}.")
        return [path for path in self._visits if self._path is None or path == inside[0] or path.startswith(inside[1])]

    def values(self) -> list["ActivationCache"]:
        """Return the part of the cache for each of `keys()`."""
        return [self[path] for path in self.keys()]

    def items(self) -> list[tuple[str, "ActivationCache"]]:
        """Return `keys()` with the part of the cache for each."""
        return [(path, self[path]) for path in self.keys()]

    def get(self, key: str, default: Any = None) -> Any:
        """Return the part of the cache at a path, or `default` if nothing was kept there."""
        is_kept = key in self
        return self[key] if is_kept else default

    def __iter__(self) -> Iterator[str]:
        if self._path is not None:
            raise TypeError(
                f"the cache of {self._path} cannot be looped over: write .keys() for the paths in it, or .output, "
                "which is a list if the module was called several times"
            )
        return iter(self.keys())

    def __getitem__(self, key: str | int) -> "ActivationCache":
        if key in self._visits:
            return self._part(key)
        if isinstance(key, int):
            return self._inside(str(key)) if self._model is None else self._part(self._envoy()[key].path)
        try:
            found = self
            for name in key.split("."):
                found = found[int(name)] if name.isdigit() else getattr(found, name)
            return found
        except AttributeError as error:
            raise KeyError(f"{key!r} was not kept, or does not exist") from error

    def __getattr__(self, name: str) -> "ActivationCache":
        if name.startswith("_"):
            raise AttributeError(name)
        if self._path is None and name == "model":
            return self._part("model")
        if self._model is None:
            return self._inside(name)
        found = getattr(self._envoy(), name)
        if not isinstance(found, Envoy):
            raise AttributeError(f"{name!r} is not a module")
        return self._part(found.path)

    def __contains__(self, key: str) -> bool:
        try:
            return self[key]._path in self._visits
        except (KeyError, IndexError, PointNotFoundError):
            return False

    def __len__(self) -> int:
        """Return the number of calls of the module; for the whole cache, of modules."""
        return len(self._visits if self._path is None else self._of_module())

    def __bool__(self) -> bool:
        return True

    def __reduce__(self) -> tuple[type, tuple]:
        return ActivationCache, (None, self._visits, self._path)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ActivationCache":
        return ActivationCache(self._model, deepcopy(self._visits, memo), self._path)

    def __repr__(self) -> str:
        return f"<cache of {', '.join(self.keys()) or 'nothing yet'}>"

    def _part(self, path: str) -> "ActivationCache":
        return ActivationCache(self._model, self._visits, path)

    def _inside(self, name: str) -> "ActivationCache":
        """Return the part of a cache that was loaded from a file, by the name of a module in this one."""
        found = self._part(f"{self._path or 'model'}.{name}")
        if not found.keys():
            raise PointNotFoundError(f"nothing was kept in {found._path}{suggest(found._path, self._visits)}")
        return found

    def _envoy(self) -> Any:
        path = (self._path or "model").removeprefix("model").lstrip(".")
        return self._model.get(path) if path else self._model

    def _of_module(self) -> list[Visit]:
        if self._path is None:
            raise KeyError("the cache as a whole has no value: choose a module, as in cache['model.layers.0'].output")
        if self._path not in self._visits:
            raise KeyError(f"{self._path} has no value: it was not kept, or never called")
        return self._visits[self._path]

    def _values(self, part: str) -> Any:
        values = [visit.get(part) for visit in self._of_module()]
        return values[0] if len(values) == 1 else values


def cache_of(
    run: Run, model: Any, modules: Sequence[Any] | None, to: Conversion, include_output: bool, include_inputs: bool
) -> ActivationCache:
    """Keep the values of a run's modules from now on; see `Tracer.cache`."""
    visits: dict[str, list[Visit]] = {}
    chosen = (
        model.modules()
        if modules is None
        else [model.get(m.removeprefix("model.")) if isinstance(m, str) else m for m in modules]
    )
    for envoy in chosen:
        if not target_of(envoy).is_seen:
            continue
        kinds = [INPUTS] * include_inputs + [OUTPUT] * include_output
        for kind in kinds:
            _keep(run, envoy, kind, visits, to)
    return ActivationCache(model, visits)


def _keep(run: Run, envoy: Any, kind: str, visits: dict[str, list[Visit]], to: Conversion) -> None:
    part, path = ("inputs" if kind == INPUTS else "output"), envoy.path
    is_tuple = kind == OUTPUT and gives_tuple(tree_of(envoy), owner_of(envoy))

    def keep(tap: Any, call: int, value: Any) -> None:
        kept = visits.setdefault(path, [])
        kept += [{} for _ in range(call + 1 - len(kept))]
        value = tree_map_only(torch.Tensor, lambda tensor: _converted(tensor, *to), value)
        kept[call][part] = LayerOutput((value,)) if is_tuple and isinstance(value, torch.Tensor) else value

    flow_of(run).keep(Asked(target_of(envoy), part), keep)


def _converted(tensor: torch.Tensor, device: Any, dtype: torch.dtype | None, detach: bool) -> torch.Tensor:
    own = tensor.detach().clone() if detach else tensor
    return own.to(device=device, dtype=dtype if own.is_floating_point() else None)


def _first(args: tuple, kwargs: dict[str, Any]) -> Any:
    return next(iter((*args, *kwargs.values())), None)
