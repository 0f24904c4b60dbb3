"""Values that a body changes in place after the model has passed them, which is an error: the model has used them.

edits = LateEdits()
edits.note(point)                   # the model has left a point, and may have changed values in place itself
edits.changed()                     # before it moves again: the points whose values a body has changed

PyTorch counts how often a tensor is changed in place: its version. Versions are compared before and after each turn of
the bodies, since at other times it is the model that changes its tensors. It takes time, so only the values read last
are watched, and of them only those that somebody still holds. Only outputs are: inputs, such as masks and embeddings,
are often used again. A value that a helper function has read is let go when the function returns, perhaps before the
model moves on. Then a `Remnant` is kept, which takes no memory.
"""

from dataclasses import fields
from functools import cache
from types import CodeType
from typing import Any
from weakref import ref

from torch import Tensor, empty, strided
from torch._C import DisableTorchFunctionSubclass, _DisableTorchDispatch, _len_torch_dispatch_stack
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from diffsight.engine.points import Point

_MOST_WATCHED = 4  # tensors
_EMPTY = empty(0)
_EXPRESSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<lambda>"}


class Moves:
    """How often the models of all runs have moved: another run's model may change a value that was assigned to it."""

    count = 0


moves = Moves()


class LateEdits:
    """The values that the bodies of a run have read, as long as somebody holds them.

    Call its methods where no function modes are active, see `unseen`: they would see how versions are looked up."""

    __slots__ = ("block", "noted", "watched")

    def __init__(self) -> None:
        self.noted = 0  # how many moves there had been when the versions were noted
        # For each tensor: a weak reference, its version, the point, and what is left once nobody holds the tensor.
        self.watched: list[list] = []
        self.block: CodeType | None = None  # the code with the block of the run, whose variables last until it ends

    def note(self, left: Point | None) -> None:
        """Note the versions of the tensors after the model has moved, and watch the point that it has `left`."""
        self.noted = moves.count
        watched = self.watched
        if watched:
            while watched and watched[0][0]() is None:
                del watched[0]
            for entry in watched:
                tensor = entry[0]()
                if tensor is None:
                    entry[3] = None  # from here on, the model may have changed a tensor with the same memory
                else:
                    entry[1] = tensor._version
        if left is not None and left.reader is not None:  # somebody has read it, and it is an output
            weak = left.weak
            if type(weak) is ref:  # the usual case: a tensor, which is quick to watch
                self.watch(left, weak())
            elif weak is not None:
                for leaf in left.held():
                    self.watch(left, leaf)

    def watch(self, point: Point, leaf: Any) -> None:
        """Watch a part of the value of a point that the model has passed, if it is a tensor."""
        if type(leaf) is Tensor:  # a parameter is changed by whoever trains it
            reader = point.reader
            try:
                is_held = reader is None or reader[0] is self.block or _lasts(reader[0], self.block)
                remnant = None if is_held else _remnant(leaf, point)
                self.watched.append([ref(leaf), leaf._version, point, remnant])
            except RuntimeError:  # an inference tensor: PyTorch does not count its changes
                return
        else:
            for tensor in _other_tensors(leaf):
                try:
                    self.watched.append([_AsPlain(tensor), tensor._version, point, None])
                except RuntimeError:  # as above
                    return
        if len(self.watched) > _MOST_WATCHED:
            del self.watched[:-_MOST_WATCHED]

    def forget(self, point: Point) -> None:
        """Stop watching the values of a point."""
        self.watched = [entry for entry in self.watched if entry[2] is not point]  # `remove` would compare tensors

    def changed(self) -> "list[tuple[Point, Tensor | Remnant]]":
        """Return the points whose values a body has changed in place since the model last moved, and the tensors.

        Another run's model may change them too, if a body has assigned them there. So there are none if it moved."""
        found = []
        if self.noted != moves.count:
            return found
        for weak, version, point, remnant in self.watched:
            tensor = weak()
            if tensor is None:
                tensor = remnant
            if tensor is not None and tensor._version != version:
                found.append((point, tensor))
        return found


def _lasts(code: CodeType, block: CodeType | None) -> bool:
    """Whether what code has read lasts until the block of the run ends: code of a module, and expressions such as
    comprehensions in the block. Others are parts of a helper function."""
    if code.co_name[0] != "<":
        return False
    return code.co_name not in _EXPRESSIONS or block is None or any(code is one for one in _expressions_in(block))


@cache
def _expressions_in(code: CodeType) -> list[CodeType]:
    """Return the code of the comprehensions and lambdas in a function, apart from those in the functions inside it."""
    inner = [one for one in code.co_consts if isinstance(one, CodeType) and one.co_name in _EXPRESSIONS]
    return [*inner, *(deeper for one in inner for deeper in _expressions_in(one))]


def _remnant(tensor: Tensor, point: Point) -> "Remnant | None":
    """Return the remnant of a tensor that a helper function has read, whose variables are gone when it returns."""
    if _len_torch_dispatch_stack():  # a mode would see how a remnant is made
        return None
    try:
        return Remnant(tensor, point.changed)
    except RuntimeError:  # a sparse tensor, or one on the meta device
        return None


class Remnant:
    """What is left of a tensor that nobody holds any more. It tells whether the tensor was changed."""

    __slots__ = ("_same", "is_trained", "place")

    def __init__(self, tensor: Tensor, is_assigned: bool) -> None:
        self.is_trained, self.place = is_trained(tensor, is_assigned), _place(tensor)
        self._same = tensor.detach()
        self._same.data = _EMPTY  # it has no memory, but still the same version

    @property
    def _version(self) -> int:
        return self._same._version


class _AsPlain:
    """A weak reference to a tensor of a subclass. It returns a plain tensor with the same memory and version, so that
    looking at it runs no code of the subclass."""

    __slots__ = ("_weak",)

    def __init__(self, tensor: Tensor) -> None:
        self._weak = ref(tensor)

    def __call__(self) -> Tensor | None:
        tensor = self._weak()
        if tensor is None:
            return None
        with DisableTorchFunctionSubclass(), _DisableTorchDispatch():
            return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


def _other_tensors(leaf: Any) -> list[Tensor]:
    """Return the tensors in a leaf that is not a plain tensor: itself, if it is a tensor of a subclass that has memory
    of its own, or those that a dataclass holds."""
    if hasattr(type(leaf), "__dataclass_fields__"):
        parts = tree_leaves([getattr(leaf, field.name, None) for field in fields(leaf)])
        return [tensor for part in parts for tensor in ([part] if type(part) is Tensor else _other_tensors(part))]
    has_memory = isinstance(leaf, Tensor) and type(leaf).__torch_dispatch__ is Tensor.__torch_dispatch__
    return [leaf] if has_memory and not isinstance(leaf, Parameter) else []


def is_trained(tensor: Tensor | Remnant, is_assigned: bool) -> bool:
    """Whether a tensor is one that the user trains, and so changes at any time: a parameter, a view of one, or, if a
    body has assigned it, any other leaf of the graph."""
    if isinstance(tensor, Remnant):
        return tensor.is_trained
    base = tensor if tensor._base is None else tensor._base
    return type(base) is Parameter or (is_assigned and base.is_leaf and base.requires_grad)


def shares_memory(tensor: Tensor | Remnant, values: list[Any]) -> bool:
    """Whether a tensor has the memory of one of the tensors in `values`."""
    found = [
        leaf
        for value in tree_leaves(values)
        for leaf in ([value] if type(value) in (Tensor, Parameter) else _other_tensors(value))
    ]
    dense = [leaf for leaf in found if leaf.layout is strided]
    if isinstance(tensor, Remnant):
        return tensor.place in map(_place, dense)
    return tensor.layout is strided and _place(tensor) in map(_place, dense)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
