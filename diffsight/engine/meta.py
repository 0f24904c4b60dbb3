"""Shapes: a function mode under which PyTorch's functions compute shapes alone.

Three sides of a scan differ in it. Inside a component every tensor is meta, weights included. Between components (in
the pipeline's own code, schedulers, post-processing) tensors are real, and what a weight or a value of the inside has a
part in comes out as zeros. In the body values of the inside stay meta, and whatever meets them becomes so.
"""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from diffsight.engine.coroutine import current_owner
from diffsight.engine.hooks import FORWARD
from diffsight.engine.target import Target, join
from diffsight.errors import ScanError

CALL = nn.Module._call_impl.__code__


class Shapes(TorchFunctionMode):
    """What makes PyTorch's functions compute shapes alone, for one scan: on the model's side inside components and
    between them, and in the body."""

    def __init__(self, components: Sequence[Target], modules: Iterable[nn.Module]) -> None:
        self.components = components
        self._inside = 0  # calls of components under way
        self._twins: dict[int, torch.Tensor] = {}  # by the id of a weight, and by their own
        self.note_weights(modules)

    def note_weights(self, modules: Iterable[nn.Module]) -> None:
        """Says which tensors are weights."""
        tensors = chain.from_iterable(chain(m._parameters.values(), m._buffers.values()) for m in modules)
        self._weights = {id(tensor): tensor for tensor in tensors if tensor is not None}

    def _is_of(self, flow: Any) -> bool:
        return getattr(flow, "shapes", None) is self

    # ---- borders

    def call(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """One call of a component: of meta tensors, and giving zeros."""
        if self._inside:
            return function(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        given.sort(key=lambda tensor: tensor.is_meta)
        device = given[0].device if given else next(map(_home, self._weights.values()), torch.device("cpu"))
        meta_args, meta_kwargs = tree_map(_to_meta, (args, kwargs))
        self._inside += 1
        try:
            output = function(*meta_args, **meta_kwargs)
        finally:
            self._inside -= 1
        zeros = ToZeros(device)
        tree_map(zeros, (args, kwargs))  # what a component writes into: caches
        return zeros(output)

    # ---- functions

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _INDEXING:
            args = (args[0], _known_index(args[1]), *args[2:])
        owner = current_owner()
        if owner is not None and not self._is_of(owner):  # the model of another run, opened in this one's body
            return function(*args, **kwargs)
        if function == _DEVICE and not (owner and self._inside) and self._is_weight(args[0]):
            return _home(self._weights.get(id(args[0]), args[0]))
        between = owner is not None and not self._inside
        seen = _Seen()
        swapped = [_each(value, lambda tensor: seen(self._twin(tensor))) for value in (args, kwargs)]
        if not seen.meta:
            return _made_with_values(function, args, kwargs)
        if function is torch.Tensor.__setitem__ and seen.values:
            return _written(*swapped)
        if _writes(function, kwargs):
            _each((args[:1], kwargs.get("out")), lambda tensor: vars(tensor).pop(_VALUE, None))
        elif seen.values and function.__name__ != "__get__":
            return _with_values(function, *swapped)
        if between and function in _VALUES:
            return function(*_each(args, ToZeros(torch.device("cpu"))), **kwargs)
        args, kwargs = _each(swapped, _to_meta)
        if function in _MOVES:
            return args[0]
        if function in _GROUPED:
            return _grouped(function, args, kwargs)
        try:
            result = _call_on(torch.device("meta"), function, args, kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            if function in _VALUES or isinstance(error, NotImplementedError) or _ABOUT_META.search(str(error)):
                raise self._cannot_see(function) from error
            raise
        return ToZeros(seen.real)(result) if between and seen.real is not None else result

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """What stands for a weight; any other tensor as it is."""
        twin = self._twins.get(id(tensor))
        if twin is None and id(tensor) in self._weights:
            with torch.inference_mode(False), torch.no_grad():
                twin = torch.empty_like(tensor, device="meta")
                if isinstance(tensor, nn.Parameter):
                    twin = nn.Parameter(twin, tensor.requires_grad)
            self._twins[id(tensor)] = self._twins[id(twin)] = twin
        return tensor if twin is None else twin

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._weights or id(tensor) in self._twins

    # ---- errors

    def _cannot_see(self, function: Callable) -> ScanError:
        """The error for a function that needs the values of tensors."""
        frame = sys._getframe(2)
        module = self._innermost_module(frame)
        asks = module or ("the model" if self._is_of(current_owner()) else "the body")
        while frame.f_back is not None and frame.f_code.co_filename.startswith((_HERE, _TORCH)):
            frame = frame.f_back
        name = getattr(function, "__name__", str(function))
        instead = f", or leave this part out: `run.{module}.skip(value)`" if module else ""
        return ScanError(
            f"{asks} asks for the values of a tensor ({name}, at {frame.f_code.co_filename}:"
            f"{frame.f_lineno}), and a scan knows only its shape: scanning cannot see through this. Let the model run "
            f"for real{instead}"
        )

    def _innermost_module(self, frame: FrameType | None) -> str | None:
        """The path of the module in whose call a frame stands."""
        while frame is not None and frame.f_code is not CALL:
            frame = frame.f_back
        for component in self.components if frame is not None else ():
            if isinstance(component.owner, nn.Module):
                outer = component.path if component.name == FORWARD else component.path.rpartition(".")[0]
                for path, module in component.owner.named_modules():
                    if module is frame.f_locals.get("self"):
                        return _path_of(outer, path)
        return None


class ToZeros:
    """Puts zeros on a device in the place of meta tensors: in containers, which it makes anew, and in other objects
    (distributions, caches), which it changes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._made: dict[int, tuple[Any, Any]] = {}  # by id: what was seen, what became of it

    def __call__(self, value: Any) -> Any:
        return tree_map(self._leaf, value)

    def _leaf(self, leaf: Any) -> Any:
        if id(leaf) in self._made:
            return self._made[id(leaf)][1]
        if isinstance(leaf, torch.Tensor):
            zeros = _Border.apply(leaf, self.device) if leaf.is_meta else leaf
            self._made[id(leaf)] = leaf, zeros
            return zeros
        if hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, ModuleType)) and not callable(leaf):
            self._made[id(leaf)] = leaf, leaf
            for name, value in vars(leaf).items():
                changed = self(value)
                if any(a is not b for a, b in zip(tree_leaves(value), tree_leaves(changed))):
                    vars(leaf)[name] = changed
        return leaf


class _Border(torch.autograd.Function):
    """Zeros of a tensor's shape on another device; its gradient comes back as that."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        ctx.device = tensor.device
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.zeros(gradient.shape, dtype=gradient.dtype, device=ctx.device), None


class _Seen:
    """What was among the tensors seen: a meta tensor, a real one (on which device), only such of known values."""

    def __init__(self) -> None:
        self.meta = False
        self.real: torch.device | None = None
        self.values = True

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            self.meta = True
            self.values = self.values and _VALUE in vars(tensor)
        else:
            self.real = tensor.device if self.real is None or tensor.ndim else self.real
            self.values = self.values and _is_counted(tensor.dtype)
        return tensor


def _to_meta(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.is_meta:
        return value
    meta = _Border.apply(value, torch.device("meta"))
    if _is_counted(value.dtype):
        setattr(meta, _VALUE, value)
    return meta


def _is_counted(dtype: torch.dtype) -> bool:
    """Whether tensors of a type hold numbers of something, or truth values."""
    return not (dtype.is_floating_point or dtype.is_complex)


def _with_values(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Calls a function on the values that meta tensors carry; gives meta tensors that carry theirs."""
    args, kwargs = _each([args, kwargs], lambda tensor: getattr(tensor, _VALUE, tensor))
    device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
    return tree_map(_to_meta, _call_on(device, function, args, kwargs))


def _written(args: list, kwargs: dict[str, Any]) -> None:
    """`tensor[index] = value` where all are known: so is the tensor still."""
    tensor = args[0]
    if tensor.is_meta:  # its values may be those of a tensor of the user's
        setattr(tensor, _VALUE, getattr(tensor, _VALUE).clone())
    _with_values(torch.Tensor.__setitem__, args, kwargs)


def _known_index(index: Any) -> Any:
    """An index with numbers in the place of tensors that bound its slices, and with the places that a mask stands for,
    where their values are known."""
    parts = []
    for part in index if type(index) is tuple else (index,):
        value = getattr(part, _VALUE, None)
        if value is not None and value.dtype is torch.bool and value.ndim:
            parts += map(_to_meta, value.nonzero(as_tuple=True))
        elif type(part) is slice:
            parts.append(slice(*(getattr(bound, _VALUE, bound) for bound in (part.start, part.stop, part.step))))
        else:
            parts.append(part)
    return tuple(parts) if len(parts) > 1 or type(index) is tuple else parts[0]


def _made_with_values(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Calls a function that is given no meta tensors; what it makes on the meta device has values: integers, and small
    ones and zeros, which may become a mask."""
    made = function(*args, **kwargs)
    if function not in _MAKERS or not made.is_meta or not (_is_counted(made.dtype) or made.numel() <= _MASK):
        return made
    setattr(made, _VALUE, function(*args, **{**kwargs, "device": torch.device("cpu")}))
    return made


def _grouped(function: Callable, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """A product by groups, as mixtures of experts have it: its shape is known to PyTorch in bfloat16 alone."""
    dtype = next(value.dtype for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    floats = _each([args, kwargs], lambda t: t if _is_counted(t.dtype) else t.to(torch.bfloat16))
    return function(*floats[0], **floats[1]).to(kwargs.get("out_dtype") or dtype)


def _call_on(device: torch.device, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Calls a function for `device`, whatever device it is told."""
    if function == torch.Tensor.to:
        args = [device if _is_device(arg) else arg for arg in args]
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": device}
    return function(*args, **kwargs)


def _writes(function: Callable, kwargs: dict[str, Any]) -> bool:
    """Whether a function changes its first argument."""
    name = function.__name__
    in_place = name.endswith("_") and (not name.endswith("__") or name in _WRITING)
    return in_place or kwargs.get("out") is not None


def _each(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The arguments of a function with every tensor changed: quicker than `tree_map`, for it is done for all."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) is dict:
        return {name: _each(item, change) for name, item in value.items()}
    return type(value)(_each(item, change) for item in value) if type(value) in (list, tuple) else value


def _is_device(value: Any) -> bool:
    return isinstance(value, (str, int, torch.device)) and not isinstance(value, bool)


def _home(weight: torch.Tensor) -> torch.device:
    """Where a weight is, or will be."""
    return torch.device("cpu") if weight.is_meta else weight.device


def _path_of(outer: str, path: str) -> str:
    for name in path.split(".") if path else ():
        outer = join(outer, name)
    return outer


_DEVICE = torch.Tensor.device.__get__
_MAKERS = {torch.arange, torch.full, torch.ones, torch.tensor, torch.zeros}
_ARITHMETIC = ("add", "and", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor")
_WRITING = {"__set__", "__setitem__", *(f"__i{name}__" for name in _ARITHMETIC)}
_MASK = 2**16  # numbers in a mask that a model makes itself, one a token
_GROUPED = {getattr(torch, "_grouped_mm", None), getattr(nn.functional, "grouped_mm", None)} - {None}
_VALUE = "_diffsight_value"  # on a meta tensor: what it stands for, where that is known
_INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
_MOVES = {torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.pin_memory}
_ASKING = ("item", "tolist", "numpy", "equal", "nonzero", "__array__", "__bool__", "__complex__", "__float__")
_VALUES = {getattr(torch.Tensor, name) for name in (*_ASKING, "__format__", "__index__", "__int__")}
_ABOUT_META = re.compile(r"(?<![a-z])meta(?![a-z])", re.IGNORECASE)
_HERE, _TORCH = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)
