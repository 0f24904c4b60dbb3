"""Recorded values: keep the values of many points of a run.

    with model.generate("a red circle", seed=0) as run:
        kept = run.record(["text_encoder.layers[*]", "unet.**.attn2.output", "vae.decode.input"], device="cpu")
        for step in run.steps:
            pass
    kept["text_encoder.layers[3].output"]               # a tensor
    kept["unet.mid_block.attentions[0]...output"]       # passed more than once: a list
    kept                                                # <record of 31 points: 412 tensors, 6.3 MB on cpu>

In a pattern, `*` matches any name and `**` any number of names. A pattern that does not end with `.input`, `.inputs` or
`.output` means the output.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from diffsight.engine import order
from diffsight.engine.points import Asked, first_input
from diffsight.engine.tapped_call import Tap
from diffsight.engine.torch_state import unseen
from diffsight.engine.users_line import users_line
from diffsight.envoy import VALUES, Envoy, InRun, Points, child_of, flow_of, inside, root_of, target_of, tree_of
from diffsight.errors import InputError, OutOfOrderError, PointNotFoundError, UnknownKeyError, suggest


class Record(dict[str, Any]):
    """Maps the path of a point to the value that passed there, including all edits. It is filled as the model runs.

    A point that the model passes more than once has a list, one value per call, and a point that it has not reached is
    missing. If the body loops over `run.steps`, a point within the steps has a list with one value per step: the value
    of the first call in the step."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, list[torch.Tensor]] = {}  # by the id of the object that holds them, such as a cache

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors in the record, including those inside objects such as a cache of keys and values."""
        held, leaves = self._held, tree_leaves(dict(self))
        found = ([leaf] if isinstance(leaf, torch.Tensor) else held.get(id(leaf), ()) for leaf in leaves)
        return [tensor for tensors in found for tensor in tensors]

    @property
    def nbytes(self) -> int:
        """The size of its tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def __missing__(self, path: str) -> Any:
        if f"{path}.output" in self:
            return self[f"{path}.output"]
        raise UnknownKeyError(f"there is no {path!r} in the record{suggest(str(path), self)}")

    def __repr__(self) -> str:
        devices = ", ".join(sorted({str(tensor.device) for tensor in self.tensors}))
        size = f"{len(self.tensors)} tensors, {_human_size(self.nbytes)}" + (f" on {devices}" if devices else "")
        return f"<record of {len(self)} points: {size}>"


def record(
    run: InRun,
    patterns: str | Iterable[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    detach: bool = True,
) -> Record:
    """Keep the values of the points that `patterns` match, see `Run.record`."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype must be a PyTorch type such as torch.float16, not {dtype!r}")
    try:
        device = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device: {error}") from None

    def own(path: str, tensor: torch.Tensor) -> torch.Tensor:
        detached = tensor.detach() if detach else tensor
        moved = detached.to(device=device, dtype=dtype if detached.is_floating_point() else None)
        if moved is detached and moved.requires_grad and not moved.is_inference():
            models_own.append((path, moved, unseen(_version, moved)))
            return moved
        return moved.clone() if moved is detached else moved  # the model may change its tensor in place afterwards

    def own_leaf(path: str, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return own(path, leaf)
        copied, held = _copied(leaf, partial(own, path))
        if held:
            kept._held[id(copied)] = held
        return copied

    def changed_in_place() -> OutOfOrderError | None:
        changed = (path for path, tensor, version in models_own if unseen(_version, tensor) != version)
        return next((order.recorded_and_changed(path, where) for path in changed), None)

    is_single = isinstance(patterns, (str, Points)) or not isinstance(patterns, Iterable)
    patterns = [patterns] if is_single else [*patterns]
    found = {path: place for pattern in patterns for path, place in find_points(root_of(run), pattern).items()}
    kept, flow = Record(), flow_of(run)
    scope, step = flow.scope, flow.clock.index if flow.scope.in_step else None
    values: dict[str, list[Any]] = {path: [] for path in found}
    in_steps: set[str] = set()  # paths with one value per step
    models_own: list[tuple[str, torch.Tensor, int]] = []  # path, tensor, and how often that had been changed in place
    where = users_line()

    def keep(path: str, part: str, tap: Tap, index: int, value: Any) -> None:
        has_loop = step is None and (scope.stop_at_steps or scope.step >= 0)
        if has_loop and flow.clock.is_in_step:
            if index != tap.step_base:
                return
            in_steps.add(path)
        elif path in in_steps or step not in (None, flow.clock.index):
            return
        values[path].append(tree_map(partial(own_leaf, path), first_input(value, path) if part == "input" else value))
        is_listed = path in in_steps or len(values[path]) > 1
        kept[path] = values[path] if is_listed else values[path][0]

    for path, (points, part) in found.items():
        flow.keep(Asked(target_of(points), part), lambda *call, path=path, part=part: keep(path, part, *call))
    if not detach:
        flow.end_checks = [*flow.end_checks, changed_in_place]
    return kept


def _version(tensor: torch.Tensor) -> int:
    return tensor._version


def _copied(thing: Any, own: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
    """Return a copy of an object, with its tensors copied by `own`, and these tensors: the model may keep writing to
    its own object, even if that is still empty. Modules, random generators, bare objects, and what cannot be copied are
    returned as they are."""
    if isinstance(thing, (torch.nn.Module, torch.Generator)) or type(thing) is object:
        return thing, []
    try:
        with _Copying(own) as copying:
            return deepcopy(thing), copying.made
    except Exception:
        return thing, []


class _Copying(TorchFunctionMode):
    """Makes `deepcopy` copy tensors with a function."""

    def __init__(self, own: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._own, self.made = own, []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is not torch.Tensor.__deepcopy__:
            return function(*args, **(kwargs or {}))
        tensor, memo = args
        self.made.append(self._own(tensor))
        memo[id(tensor)] = self.made[-1]
        return self.made[-1]


def find_points(root: Envoy, pattern: str) -> dict[str, tuple[Points, str]]:
    """Return the points that a path or pattern names: a dictionary of path to the envoy and the name of the value.

    Raises PointNotFoundError if there are none."""
    if not isinstance(pattern, str):
        path = pattern.path if isinstance(pattern, Points) else "layers[4].output"
        raise InputError(f"a point is named by its path, such as {path!r}, not by {type(pattern).__name__}")
    names = pattern.replace("[", ".").replace("]", "").removeprefix(".").split(".")
    part = names.pop() if names[-1] in VALUES else "output"
    if "*" not in pattern:
        envoys = [_at(root, names)]
    else:
        envoys = [root]
        for name in names:
            around, envoys = envoys, [inner for envoy in envoys for inner in _inside(envoy, name)]
            if not envoys:
                known = {known for one in around if isinstance(one, Envoy) for known in _names_in(one)}
                raise PointNotFoundError(
                    f"no part of the model matches {pattern!r}: there is no {name!r}{suggest(name, sorted(known))}"
                )
        envoys = [envoy for envoy in envoys if isinstance(envoy, Points) and target_of(envoy).is_seen]
    if not envoys:
        raise PointNotFoundError(
            f"no part of the model matches {pattern!r}: * matches one name, as in layers[*].mlp, and ** any number"
        )
    return {target_of(envoy).point(part, 0): (envoy, part) for envoy in envoys}


def find_point(root: Envoy, path: str, method: str) -> tuple[Points, str]:
    """Return the point that a path names: the envoy and the name of the value. `method` is the method of a run that
    takes the path."""
    if isinstance(path, str) and "*" in path:
        raise InputError(f"run.{method} takes the path of one point, not a pattern: {path!r}")
    (found,) = find_points(root, path).values()
    return found


def _names_in(envoy: Envoy) -> list[str]:
    return [*tree_of(envoy).names_in(target_of(envoy)), *VALUES]


def _at(root: Envoy, names: list[str]) -> Points:
    """Return the envoy, or the value inside the calls of a module, at a path."""
    found = root
    for name in names:
        found = inside(found, name)
        if found is None:
            break
    return found if isinstance(found, Points) else root[".".join(names)]


def _inside(envoy: Points, name: str) -> list[Points]:
    """Return the parts of an envoy that match one name of a pattern."""
    if not isinstance(envoy, Envoy):  # a method has no parts
        found = None if "*" in name else inside(envoy, name)
        return [] if found is None else [found]
    tree, target = tree_of(envoy), target_of(envoy)
    attached = {one: tree.attached.find(target.owner, one) for one in tree.attached.names_on(target.owner)}
    children = attached | dict(tree.children_of(target))
    if name == "**":
        around = (*target.around(), target)  # a module may be a child of a module inside it
        owners = [one.owner for one in around]
        below = [child for child, part in children.items() if not any(part.owner is owner for owner in owners)]
        return [envoy, *(inner for child in below for inner in _inside(child_of(envoy, child), "**"))]
    if "*" not in name:
        child = child_of(envoy, name)
        if child is None and name in tree.value_names(target):
            child = inside(envoy, name)
        return [] if child is None else [child]
    known = [*children, *tree.methods_of(target.owner)]
    return [child_of(envoy, child) for child in known if fnmatchcase(child, name)]


def _human_size(nbytes: int) -> str:
    """A size with its unit."""
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"
