"""What a component does in a call with a larger batch that decides what can be learned from it, see `larger_batches`.

    with TrialMode(component, copied, total=3, more=1) as trial:
        copied(*args, **kwargs)
    trial.reads_values                      # whether shapes may depend on the values of tensors
    trial.moves_rows, trial.cuts_rows       # whether entries of the batch may have changed places

In the mode, the copy draws the same random numbers for the entries that were added as for those that they repeat.
"""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from diffsight.engine.changes_in_place import is_in_place

_READING = {"item", "tolist", "numpy", "__int__", "__index__"}  # functions that return numbers of a tensor
_SETTING = {"__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}  # those that change one
_CHOOSING = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "repeat_interleave"}
_DRAWING = {"rand", "rand_like", "randn", "randn_like", "normal_", "uniform_", "bernoulli_", "exponential_"}  # afresh
_DROPPING = {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
_ATTENTION, _ITS_DROPOUT = "scaled_dot_product_attention", 4  # the function and the place of its argument `dropout_p`
# Functions that may put entries in another order, as other values say: where the dimension stands, and its default.
_MOVING = {
    "index_select": (1, 0),
    "index_copy": (1, 0),
    "index_copy_": (1, 0),
    "gather": (1, 0),
    "scatter": (1, 0),
    "scatter_": (1, 0),
    "take_along_dim": (2, 0),
    "sort": (1, -1),
    "topk": (2, -1),
}
# Functions that do so in the same way in every call, or that take a tensor apart or put its parts together.
_CUTTING = {
    "flip": (1, None),
    "flipud": (1, 0),
    "roll": (2, 0),
    "rot90": (2, 0),
    "chunk": (2, 0),
    "split": (2, 0),
    "tensor_split": (2, 0),
}
_JOINING = {
    "cat": (1, 0),
    "concat": (1, 0),
    "concatenate": (1, 0),
    "vstack": (1, 0),
    "row_stack": (1, 0),
    "stack": (1, 0),
}
_CHOOSING_NUMBERS = {"randperm", "randint", "randint_like", "multinomial", "random_"}  # perhaps those of entries


class NeedsValues(Exception):
    """The shapes alone do not show what becomes of the rows."""


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch off the dropout within those modules of a model that PyTorch computes as a whole; return the model."""
    for module in model.modules():
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and isinstance(module.dropout, float):
            module.dropout = 0.0
    return model


class TrialMode(TorchFunctionMode):
    """Watches one call of a copy of a component, with `more` entries added to the `total` of the batch.

    It also keeps the copy from training the weights that it shares with the component.

    Raises NeedsValues on the meta device if entries of the batch may change places."""

    def __init__(self, component: nn.Module, copied: nn.Module, total: int, more: int) -> None:
        super().__init__()
        own = {id(parameter) for parameter in component.parameters()}
        self._shared = {_memory_of(parameter) for parameter in copied.parameters() if id(parameter) in own}
        self._total, self._size = total, total + more
        self._ranges: list[torch.Tensor] = []  # made by `arange`: as indices, they leave everything in its place
        self.reads_values = self.moves_rows = self.cuts_rows = self.draws_numbers = False

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        changed = _changed(name, args, kwargs)
        if self._shared and (name == "backward" or not self._shared.isdisjoint(changed)):
            raise RuntimeError("it trains weights that are too large to be copied")
        moves, cuts = self._moves_rows(name, args, kwargs), self._cuts_rows(name, args, kwargs)
        if (moves or cuts) and _is_meta((args, kwargs)):
            raise NeedsValues("it may put the batch in another order")
        self.moves_rows |= moves
        self.cuts_rows |= cuts
        self.draws_numbers |= name in _CHOOSING_NUMBERS
        self.reads_values |= moves or _reads_values(name, args, kwargs)
        if name in _DROPPING:
            return args[0] if args else kwargs["input"]
        if name == _ATTENTION and len(args) > _ITS_DROPOUT:
            args = (*args[:_ITS_DROPOUT], 0.0, *args[_ITS_DROPOUT + 1 :])
        elif name == _ATTENTION:
            kwargs = kwargs | {"dropout_p": 0.0}
        result = function(*args, **kwargs)
        if name == "arange" and len(args) == 1 and "step" not in kwargs:
            self._ranges.append(result)
        elif changed:
            self._ranges = [one for one in self._ranges if _memory_of(one) not in changed]
        if name in _DRAWING and self._is_batch(result) and not result.is_meta:
            result[self._total :] = torch.stack([result[self._total - 1], result[0]])[: self._size - self._total]
        return result

    def _is_batch(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and not value.is_nested and value.shape[:1] == (self._size,)

    def _moves_rows(self, name: str, args: tuple, kwargs: dict) -> bool:
        """Whether a function may put the entries of the batch in another order."""
        value = args[0] if args else kwargs.get("input")
        if name == "embedding":
            return self._is_batch(args[1] if len(args) > 1 else kwargs.get("weight"))
        if not self._is_batch(value):
            return False
        if name in ("__getitem__", "__setitem__"):
            items = args[1] if type(args[1]) is tuple else (args[1],)
            first = next((item for item in items if item is not None), None)
            return _is_of_numbers(first) and not self._is_range(first)
        return name in _MOVING and 0 in _dimensions(args, kwargs, value.ndim, *_MOVING[name])

    def _is_range(self, index: Any) -> bool:
        if isinstance(index, torch.Tensor):
            return _memory_of(index) in map(_memory_of, self._ranges)
        return isinstance(index, range) and index == range(len(index))

    def _cuts_rows(self, name: str, args: tuple, kwargs: dict) -> bool:
        """Whether a function always puts entries in another order, or takes tensors apart or together."""
        place = _CUTTING.get(name) or _JOINING.get(name)
        if place is None:
            return False
        values = tree_leaves(args[0] if args else kwargs.get("input", kwargs.get("tensors")))
        parts = [part for part in values if isinstance(part, torch.Tensor) and not part.is_nested]
        ndim = max((part.ndim for part in parts), default=0)  # an empty one may have fewer
        is_stack = name == "stack" or (name in ("vstack", "row_stack") and ndim < 2)
        if not ndim + is_stack or 0 not in _dimensions(args, kwargs, ndim + is_stack, *place):
            return False
        count = len(parts) if is_stack else sum(part.shape[0] for part in parts if part.ndim)
        return count == self._size if name in _JOINING else count % self._size == 0


def _changed(name: str, args: tuple, kwargs: dict) -> set[int]:
    """Return the memory of the tensors that a function changes in place, see `_memory_of`."""
    if not (is_in_place(name) or name in _SETTING or "out" in kwargs):
        return set()
    changed = tree_leaves((args[:1], kwargs.get("out")))
    return {_memory_of(leaf) for leaf in changed if isinstance(leaf, torch.Tensor)}


def _reads_values(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether the shapes of what a function returns depend on the values of tensors, or the model may branch on it.

    A condition (`if mask.all()`) is not counted: it is common, and hardly ever decides about a layout."""
    if name == "__getitem__":
        return any(map(_is_mask, args[1] if type(args[1]) is tuple else args[1:]))
    return name in _READING or name in _CHOOSING or (name == "where" and len(args) == 1 and not kwargs)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype is torch.bool


def _is_of_numbers(index: Any) -> bool:
    """Whether an index is a list, array or tensor of the numbers of entries."""
    return isinstance(index, (list, range)) or (getattr(index, "ndim", 0) > 0 and "bool" not in str(index.dtype))


def _dimensions(args: tuple, kwargs: dict, ndim: int, place: int, default: int | None) -> set[int]:
    """Return the dimensions of a tensor of `ndim` along which a function works. Its argument for them stands at
    `place`; without a `default`, so may more of them after it."""
    given = next((kwargs[name] for name in ("dim", "dims", "axis") if name in kwargs), default)
    if place < len(args):
        given = args[place:] if default is None else args[place]
    return {dim % ndim for dim in tree_leaves(given) if type(dim) is int}


def _is_meta(arguments: Any) -> bool:
    return any(leaf.is_meta for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor))


def _memory_of(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # it is sparse, say
        return id(tensor)
