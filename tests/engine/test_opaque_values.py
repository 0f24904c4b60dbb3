"""Rows of values that hold tensors where rows do not look for them: never the whole batch, but an error."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from diffsight import Model
from diffsight.errors import AssignmentError, InputError


class Slots:
    __slots__ = ("__hidden", "empty")

    def __init__(self, hidden):
        self.__hidden = hidden


@dataclasses.dataclass
class Plain:
    hidden: torch.Tensor


class MyList(list):
    pass


class MyTuple(tuple):
    pass


class KeyCache:
    """A cache as transformers has them."""

    def __init__(self, keys):
        self.layers = [SimpleNamespace(keys=keys)]


class Made(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


def net_of(make):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.made = Made(make)

        def forward(self, x):
            self.made(x)
            return x

    return Net()


def x():
    return torch.ones(2, 4)


MADE = {
    "slots": Slots,
    "dataclass": Plain,
    "list": lambda y: MyList([y, y]),
    "tuple": lambda y: MyTuple([y, y]),
    "namespace": lambda y: SimpleNamespace(layers=[{"hidden": y}]),
    "set": lambda y: {y},
    "array": lambda y: y.numpy(),
    "iterator": iter,
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_what_holds_tensors_unseen_has_no_rows(make):
    kind = type(make(x())).__name__
    for whole in (make, lambda y: (y, make(y)), lambda y: {"made": make(y)}):
        refused = pytest.raises(InputError, match=rf"rows\[1\]\.made\.output holds a {kind}, which cannot be cut")
        with refused, Model(net_of(whole)).trace(x()) as run:
            run.rows[1].made.output
    refused = pytest.raises(AssignmentError, match=f"holds a {kind}, which cannot be cut into rows. Assign it on")
    with refused, Model(net_of(make)).trace(x()) as run:
        run.rows[1].made.output = make(x()[:1])


@pytest.mark.parametrize(
    "other", ["a name", None, {"a", "b"}, SimpleNamespace(size=(1, 2)), np.float32(2), MyList([1, 2]), nn.ReLU()]
)
def test_what_holds_no_tensors_is_that_of_all_rows(other):
    with Model(net_of(lambda y: (y, other))).trace(x()) as run:
        row, same = run.rows[1].made.output
        run.rows[1].made.output = (row * 0, same)
        assert run.made.output[0].tolist() == [[1.0] * 4, [0.0] * 4]
    assert row.shape == (1, 4) and same is other


def test_a_cache_in_an_output_is_refused_where_it_is_used():
    with Model(net_of(lambda y: {"hidden": y, "cache": KeyCache(y)})).trace(x()) as run:
        row, whole = run.rows[1].made.output, run.made.output
        assert row["hidden"].shape == (1, 4) and "KeyCache" in repr(copy.copy(row["cache"]))
        for use in (
            lambda cache: cache.layers,
            len,
            list,
            lambda cache: cache[0],
            lambda cache: setattr(cache, "a", 1),
        ):
            with pytest.raises(InputError, match=r"the KeyCache in rows\[1\]\.made\.output cannot be cut into rows"):
                use(row["cache"])
        run.rows[1].made.output = {"hidden": row["hidden"] * 0, "cache": row["cache"]}
        assert run.made.output["cache"] is whole["cache"]
        assert run.made.output["hidden"].tolist() == [[1.0] * 4, [0.0] * 4]
        with pytest.raises(AssignmentError, match="holds a KeyCache, which cannot be cut"):
            run.rows[1].made.output = {"hidden": row["hidden"], "cache": KeyCache(x())}


def test_a_single_row_is_the_whole_value():
    with Model(net_of(Plain)).trace(x()[:1]) as run:
        value = run.rows[0].made.output
        assert value is run.made.output and type(value) is Plain
