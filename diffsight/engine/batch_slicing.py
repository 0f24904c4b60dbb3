"""Selections: which part of a value is meant, such as the rows of a batch that belong to one input.

    hidden = part.take(output, path)                        # views of the tensors in `output`
    output = part.put(output, hidden * 2, path, {})         # the rest stays

When a point is accessed with a selection, a read takes only that part of the value, and an assignment replaces only
that part. The selection may also decide which call is meant: for example, a guidance branch may appear only in every
second call.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from diffsight.engine.batch_dimensions import batch_dimensions
from diffsight.engine.hooks import FORWARD
from diffsight.engine.opaque_values import CacheOfAllRows, holds_tensors, is_cache
from diffsight.engine.target import Target
from diffsight.errors import AssignmentError, InputError

_SPARSE = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
UNCHANGED = object()  # stands in an assigned container for an item that stays as it is


class Tapped(Protocol):
    """What a selection may see of the calls of a tapped target; see `diffsight.engine.tapped_call.Tap`."""

    target: Target
    host: Any  # the run
    entered: int  # calls begun so far
    step_base: int  # calls begun before the current step


class Assigned(Protocol):
    """What is assigned, as errors speak of it; its text also has the line. See `diffsight.engine.points.Assignment`."""

    name: str  # the path, as the user writes it

    def item(self, key: object) -> "Assigned":
        """Return what is assigned to an item of the value."""


class Selection:
    """A part of a value. This base class selects the same part in every call.

    `name` is the user's name for the selection, such as "rows[1]". `missing` completes the error message "… was asked
    for, but …" for a point at which no call has this part."""

    name = ""
    missing = "no call of it has that part"
    is_in_every_call = True  # False for subclasses that override `call`

    def __init_subclass__(cls) -> None:
        cls.is_in_every_call = cls.call is Selection.call

    def call(self, tap: Tapped, first: int, number: int, path: object) -> int:
        """Return the index of call `number` among the calls from `first` on that have this part.

        Whether a call has it is known once the call has begun. Until then, return the earliest call that may
        have it."""
        return first + number

    def at(self, tap: Tapped, index: int, path: object) -> "Selection":
        """Return the selection for call number `index`, which has begun and has this part."""
        return self

    def take(self, value: Any, path: object) -> Any:
        """Return this part of `value`."""
        raise NotImplementedError

    def take_own(self, value: Any, path: object) -> tuple[Any, bool]:
        """Return this part of `value`, and whether tensors in it are copies, since a change of them would change other
        parts too."""
        return self.take(value, path), False

    def put(self, whole: Any, value: Any, path: Assigned, copies: dict[int, torch.Tensor]) -> Any:
        """Return `whole` with `value` as this part of it.

        Tensors in `whole` are not changed in place, except those listed in `copies` (keyed by id): these are private
        copies that nobody has read. New copies are added to `copies`."""
        raise NotImplementedError


def _one_level(value: Any) -> tuple[list, Any]:
    """Return the direct contents of a container, and its structure."""
    return tree_flatten(value, is_leaf=lambda node: node is not value)


class Part(Selection):
    """The entries `start`, `start + stride`, … below `stop` of a batch of `total`."""

    missing = "no call of it holds that part of the batch"
    total = 1  # entries in the batch: the whole batch is one part, unless there are more

    def __init__(self, start: int, stop: int, total: int, stride: int = 1, name: str = "") -> None:
        self.start, self.stop, self.total, self.stride, self.name = start, stop, total, stride, name

    def at(self, tap: Tapped, index: int, path: object) -> Selection:
        return self if self.total == 1 or tap.target.name != FORWARD else TracedPart(self, tap, index, path)

    def take(self, value: Any, path: object) -> Any:
        """Return this part of `value`: a view of a tensor; containers element by element."""
        if isinstance(value, torch.Tensor):
            return value[self._slice_of(value, path)]
        return tree_map(lambda leaf: self._take(leaf, path), value)

    def take_own(self, value: Any, path: object) -> tuple[Any, bool]:
        taken = self.take(value, path)
        if self.total == 1 or (type(value) is torch.Tensor and value.is_contiguous()):  # the usual case
            return taken, False
        leaves = [value] if isinstance(value, torch.Tensor) else tree_leaves(value)
        shared = {id(leaf): leaf for leaf in leaves if _may_share_memory(leaf) and self._is_batch(leaf)}
        if not shared:
            return taken, False
        has_gradients = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(has_gradients):  # so that changes of them are counted
            own = {number: self._take(leaf, path).clone() for number, leaf in shared.items()}
        return tree_map(lambda leaf: own[id(leaf)] if id(leaf) in own else self._take(leaf, path), value), True

    def put(self, whole: Any, value: Any, path: Assigned, copies: dict[int, torch.Tensor]) -> Any:
        if isinstance(whole, torch.Tensor) != isinstance(value, torch.Tensor):
            raise wrong_type(path, whole, value)
        if isinstance(whole, torch.Tensor):
            return self._put_in_tensor(whole, value, path, copies)
        return self._put_in_container(whole, value, path, copies)

    def _put_in_container(self, whole: Any, value: Any, path: Assigned, copies: dict[int, torch.Tensor]) -> Any:
        if value is UNCHANGED:
            return whole
        wholes, tree = _one_level(whole)
        if tree.is_leaf():
            return self._put(whole, value, path, copies)
        if isinstance(whole, Mapping) and isinstance(value, Mapping):
            if set(whole) != set(value):
                raise AssignmentError(f"{path} holds {sorted(whole)}; it cannot take {sorted(value)}")
            value = {name: value[name] for name in whole}  # in the model's own order
        elif isinstance(value, Mapping) or (isinstance(whole, Mapping) and not hasattr(whole, "to_tuple")):
            raise wrong_type(path, whole, value)
        values, _ = _one_level(value)
        if len(wholes) != len(values):
            raise AssignmentError(
                f"{path} holds {len(wholes)} values; it cannot take a {type(value).__name__} of {len(values)}"
            )
        keys = whole if isinstance(whole, Mapping) else range(len(wholes))
        put = [self._put_in_container(w, v, path.item(key), copies) for key, w, v in zip(keys, wholes, values)]
        return tree_unflatten(put, tree)

    def _take(self, leaf: Any, path: object) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf[self._slice_of(leaf, path)] if self._is_batch(leaf) else leaf
        if self.total == 1 or not holds_tensors(leaf):
            return leaf
        if is_cache(leaf):
            return CacheOfAllRows(leaf, path)
        raise InputError(
            f"{path} holds a {type(leaf).__name__}, which cannot be cut into rows. Read or assign it on the run itself"
        )

    def _put(self, whole: Any, value: Any, path: object, copies: dict[int, torch.Tensor]) -> Any:
        if isinstance(whole, torch.Tensor) != isinstance(value, torch.Tensor):
            raise wrong_type(path, whole, value)
        if not isinstance(whole, torch.Tensor) or not self._is_batch(whole):
            if self.total == 1 and not isinstance(whole, torch.Tensor):
                return value
            _check_shared(whole, value, path)
            return whole
        return self._put_in_tensor(whole, value, path, copies)

    def _put_in_tensor(
        self, whole: torch.Tensor, value: torch.Tensor, path: object, copies: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        part = self._slice_of(whole, path)
        if value.shape != whole[part].shape:
            raise AssignmentError(f"{path} has the shape {tuple(whole[part].shape)}, not {tuple(value.shape)}")
        _check_kind(whole, value, path)
        # Gradients flow through the rest in any grad mode of the body.
        with torch.set_grad_enabled(whole.requires_grad or value.requires_grad):
            if copies.get(id(whole)) is not whole:
                whole = whole.clone()
                copies[id(whole)] = whole
            whole[part] = value
        return whole

    def _is_batch(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor inside a container has an entry per row; a number, or a value shared by all rows, does not.

        If the batch may be the second dimension, as in the states of an LSTM, the answer is yes, so that cutting it
        raises an error."""
        is_second = tensor.ndim == 3 and tensor.shape[1] == self.total
        return tensor.ndim > 0 and (tensor.shape[0] > 1 or self.total == 1 or is_second)

    def _slice_of(self, tensor: torch.Tensor, path: object) -> slice:
        if tensor.layout in _SPARSE:
            raise _uncuttable(path, "sparse")
        return self._slice(tensor, path)

    def _slice(self, tensor: torch.Tensor, path: object) -> slice:
        if tensor.ndim == 0 or tensor.shape[0] != self.total:
            raise InputError(
                f"{path} cannot be cut into rows: its shape is {tuple(tensor.shape)}, and its first dimension is not "
                f"the batch of {self.total}. Read or assign it on the run itself"
            )
        return slice(self.start, self.stop, self.stride)


class TracedPart(Part):
    """A part of a batch at one point. Calls with larger batches have shown which dimension is the batch."""

    def __init__(self, part: Part, tap: Tapped, index: int, path: Any) -> None:
        super().__init__(part.start, part.stop, part.total, part.stride, part.name)
        self._tap, self._index = tap, index
        self._part = path.part  # path is a point or an assignment to one
        self._found: dict[int, bool | None] | None = None  # by tensor id: whether its first dimension is the batch
        self._why_unknown = ""

    def take(self, value: Any, path: object) -> Any:
        self._look_at(value, path)
        return super().take(value, path)

    def put(self, whole: Any, value: Any, path: Assigned, copies: dict[int, torch.Tensor]) -> Any:
        self._look_at(whole, path)
        return super().put(whole, value, path, copies)

    def _look_at(self, value: Any, path: object) -> None:
        is_nested = value.is_nested if type(value) is torch.Tensor else any(map(_is_nested, tree_leaves(value)))
        if is_nested:
            raise _uncuttable(path, "nested")
        found, self._why_unknown = batch_dimensions(self._tap, self._index, self._part, value, self.total)
        if found is None:
            self._found = None
        elif type(value) is torch.Tensor:
            self._found = {id(value): found[0]}
        else:
            self._found = {id(leaf): is_it for leaf, is_it in zip(tree_leaves(value), found)}

    def _is_batch(self, tensor: torch.Tensor) -> bool:
        return super()._is_batch(tensor) if self._found is None else self._found[id(tensor)] is not False

    def _slice(self, tensor: torch.Tensor, path: object) -> slice:
        if self._found is None:
            raise InputError(
                f"{path} cannot be cut into rows: its shape is {tuple(tensor.shape)}, and which dimension is the batch "
                f"of {self.total} could not be determined, since {self._why_unknown}. Read or assign it on the run "
                "itself"
            )
        if not self._found[id(tensor)]:
            raise InputError(
                f"{path} cannot be cut into rows: its shape is {tuple(tensor.shape)}, and its first dimension is not "
                f"the batch of {self.total}. Read or assign it on the run itself"
            )
        return super()._slice(tensor, path)


def _may_share_memory(leaf: Any) -> bool:
    """Whether a leaf is a tensor whose rows may share memory with each other, as after `expand`."""
    if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided or leaf.is_nested:
        return False
    if leaf.is_contiguous() or leaf.ndim == 0 or leaf.shape[0] < 2:
        return False
    step = leaf.stride(0)
    others = sorted((stride, size) for stride, size in zip(leaf.stride()[1:], leaf.shape[1:]) if stride)
    reach = sum(stride * (size - 1) for stride, size in others if stride < step)
    if reach >= step:
        return True
    reach += step * (leaf.shape[0] - 1)
    for stride, size in others:
        if stride >= step and size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _is_nested(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_nested


def _uncuttable(path: object, kind: str) -> InputError:
    return InputError(f"{path} is a {kind} tensor, which cannot be cut into rows. Read or assign it on the run itself")


def _check_kind(whole: torch.Tensor, value: torch.Tensor, path: object) -> None:
    """Raise AssignmentError if a row cannot hold a value: if it is on another device, sparse, or of a type that would
    lose something, such as a fraction. Among floating-point types, a row takes any, as in PyTorch."""
    if value.device != whole.device and not whole.is_meta:
        raise AssignmentError(
            f"{path} is on {whole.device}; it cannot take a tensor on {value.device}. Move that with "
            f"value.to({str(whole.device)!r})"
        )
    if value.layout in _SPARSE:
        raise AssignmentError(f"{path} cannot take a sparse tensor. Convert that with value.to_dense()")
    if value.dtype is not whole.dtype and not _holds(whole.dtype, value.dtype):
        raise AssignmentError(
            f"{path} is a tensor of {whole.dtype}; it cannot take one of {value.dtype}. Convert that with "
            f"value.to({whole.dtype}), or assign the value of all rows on the run itself"
        )


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a tensor of `dtype` takes values of type `other` without losing more than precision."""
    if not torch.can_cast(other, dtype):
        return False
    if torch.bool in (dtype, other) or dtype.is_floating_point or dtype.is_complex:
        return True
    own, others = torch.iinfo(dtype), torch.iinfo(other)
    return own.min <= others.min and others.max <= own.max


def _check_shared(whole: Any, value: Any, path: object) -> None:
    """Raise AssignmentError if a row is assigned something else in place of what all rows share."""
    if whole is value or (isinstance(value, CacheOfAllRows) and is_cache(whole)):
        return
    if not isinstance(whole, torch.Tensor) and holds_tensors(whole):
        raise AssignmentError(
            f"{path} holds a {type(whole).__name__}, which cannot be cut into rows. Assign it on the run itself"
        )
    if isinstance(whole, torch.Tensor):
        is_alike = (whole.shape, whole.dtype, whole.device) == (value.shape, value.dtype, value.device)
        is_same = is_alike and (whole.is_meta or torch.equal(whole, value))
        shared = f"a tensor of shape {tuple(whole.shape)}"
    else:
        same = type(whole) is type(value) and whole == value
        is_same = bool(same.all()) if hasattr(same, "all") else bool(same)  # arrays compare element by element
        shared = f"a {type(whole).__name__}"
    if not is_same:
        raise AssignmentError(
            f"{path} holds {shared} that all rows share, and another one was assigned to it. Assign that on the run "
            "itself"
        )


def wrong_type(path: Assigned, before: Any, value: Any) -> AssignmentError:
    """Return the error for a value that cannot take the place of `before`; it says what to write instead."""
    if isinstance(before, torch.Tensor) and isinstance(value, (bool, int, float)):
        every = "[:]" if before.ndim else "[()]"
        return AssignmentError(
            f"{path} is a Tensor; it cannot take the number {value}. To fill it, write {path.name}{every} = {value}"
        )
    hint = ""
    if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
        hint = (
            ". If a layer returned it, its hidden state is value[0]; in language models and text encoders, read "
            "layers_output[i] in place of layers[i].output"
        )
    return AssignmentError(f"{path} is a {type(before).__name__}; it cannot take a {type(value).__name__}{hint}")


class Indexed(Selection):
    """The part of a tensor that an index such as `[:, -1]` selects, within the part that `of` selects, if given.

    Reading returns `tensor[index]`, which is a view of the tensor if the index allows it."""

    def __init__(self, index: Any, of: Any = None) -> None:
        self.index, self.of = index, of

    @property
    def name(self) -> str:
        return self.of.name if self.of is not None else ""

    @property
    def missing(self) -> str:
        return self.of.missing if self.of is not None else Selection.missing

    def call(self, tap: Tapped, first: int, number: int, path: object) -> int:
        return first + number if self.of is None else self.of.call(tap, first, number, path)

    def at(self, tap: Tapped, index: int, path: object) -> "Indexed":
        return self if self.of is None else Indexed(self.index, self.of.at(tap, index, path))

    def take_own(self, value: Any, path: object) -> tuple[Any, bool]:
        if self.of is not None and self.of.take_own(value, path)[1]:
            raise InputError(
                f"{path}: the rows share their memory, so run.at cannot change one of them. Assign the row"
            )
        return self.take(value, path), False

    def take(self, value: Any, path: object) -> Any:
        value = value if self.of is None else self.of.take(value, path)
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{path} is a {type(value).__name__}, and run.at takes a part of a tensor")
        try:
            return value[self.index]
        except (IndexError, TypeError) as error:
            raise InputError(
                f"{path} has the shape {tuple(value.shape)}, which the index does not fit: {error}"
            ) from None

    def put(self, whole: Any, value: Any, path: object, copies: dict[int, torch.Tensor]) -> Any:
        raise AssignmentError(f"{path}: change what run.at returns in place, run.at(...)[:] = value")
