"""Attention modules: their probabilities, queries, keys and values, and the output of each head, in every wrapper.

    attn = run.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attn.attention_probs                    # (batch, heads, queries, keys)
    attn.q, attn.k, attn.v                  # (batch, tokens, heads, features), as they meet in the product
    attn.heads_output[:, :, 3] = 0          # (batch, tokens, heads, features): remove head 3
    attn.products[1].attention_probs        # of the second product, where a module makes several in one call

The values are watched by a function mode while the module computes, see `attention_mode.py`.
"""

import re
from collections.abc import Callable
from functools import reduce
from typing import Any

from diffsight.errors import InputError, PointNotFoundError, suggest
from diffsight.extending import FORWARD, Points, Tap, Target, Tree, assign, fetch, join, points_on, target_of
from diffsight.pipelines.attention.attention_mode import AttentionMode
from diffsight.pipelines.attention.attention_modules import attentions_in, can_attend, is_attention, why_hidden
from diffsight.pipelines.attention.watched_modules import VALUES
from diffsight.pipelines.numbers import as_integer

_PRODUCTS = "products"
_NAME = re.compile(rf"(?:{_PRODUCTS}\[(\d+)\]\.)?(.*)", re.DOTALL)  # the name of an `AttentionValue`


class _Watching:
    """Stops a mode from watching a module for a value."""

    def __init__(self, mode: AttentionMode, undo: Callable[[], None]) -> None:
        self.mode, self.remove = mode, undo


class AttentionValue(Target):
    """A value in a product of an attention module.

    Args:
        attention: The target of the module.
        value: One of `VALUES`.
        number: The number of the product in a call. None for the only product.
    """

    __slots__ = ("number", "value")
    is_value = True

    def __init__(self, attention: Target, value: str, number: int | None = None) -> None:
        name = value if number is None else f"{_PRODUCTS}[{number}].{value}"
        super().__init__(attention.owner, name, join(attention.path, name), attention)
        self.value, self.number = value, number

    def point(self, part: str, call: int) -> str:
        return join(join(self.outer.path, f"calls[{call}]") if call else self.outer.path, self.name)

    def attach(self, tap: Tap) -> _Watching:
        """Watch the module from now on."""
        flow, calls = tap.host, tap.host.taps[self.outer.key]
        tap.entered, tap.step_base = calls.entered - len(calls.active), calls.step_base
        values = (other for other in flow.taps.values() if isinstance(other.target, AttentionValue) and other.hooks)
        first = next(values, None)
        mode = AttentionMode() if first is None else first.hooks[0].mode
        return _Watching(mode, mode.add(tap, calls, (self.number, self.value)))

    def decided_by(self, tap: Tap) -> Tap | None:
        """Return the tap of the module if only the end of its call can confirm that a product is the only one."""
        if self.number is not None or not tap.hooks:
            return None
        calls = tap.host.taps[self.outer.key]
        return calls if tap.hooks[0].mode.watched(calls).has_taken(tap) else None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError(f"{self.path} is a value and cannot be called")

    @property
    def if_missing(self) -> str:
        return f"{type(self.outer.owner).__name__} computes no attention product that diffsight can see"


class AttentionTree(Tree):
    """A tree in which the products of attention modules have named values."""

    def named_value(self, points: Points, name: str) -> "Points | Products | None":
        target = target_of(points)
        if name not in (*VALUES, _PRODUCTS) or target.name != FORWARD:
            return None
        if not can_attend(target.owner) or hasattr(target.owner, name):
            return None
        if name == _PRODUCTS:
            _check_attention(target, name)
            return Products(points)
        return points_on(points, attention_value(target, name))

    def value_target(self, target: Target, name: str) -> Target | None:
        number, value = _NAME.fullmatch(name).groups()
        if value not in VALUES:
            return None
        return attention_value(target, value) if number is None else AttentionValue(target, value, int(number))

    def value_names(self, target: Target) -> tuple[str, ...]:
        return (*VALUES, _PRODUCTS) if is_attention(target.owner) else ()


def attention_value(attention: Target, name: str) -> AttentionValue:
    """Return the target of a value of an attention module, such as "attention_probs".

    Raises:
        InputError: The module makes no product itself, contains several attention modules, or computes with a kernel
            whose products cannot be seen.
    """
    _check_attention(attention, name)
    return AttentionValue(attention, name)


class Products:
    """The products that an attention module makes in one call, by number: `attn.products[1].attention_probs`."""

    __iter__ = None  # the number of products is not known in advance

    def __init__(self, points: Points) -> None:
        self._points = points

    def __getitem__(self, index: int) -> "Product":
        number = as_integer(index)
        if number is None or number < 0:
            raise IndexError(f".products takes the number of a product, 0 for the first, not {index!r}")
        return Product(self._points, number)

    def named(self, name: str) -> "Product | None":
        """Return the product with the number that a path contains."""
        return self[int(name)] if name.isdigit() else None

    def __repr__(self) -> str:
        return f"<products of {target_of(self._points).path}>"


class Product:
    """One product of an attention module: its values can be read and assigned."""

    def __init__(self, points: Points, number: int) -> None:
        self.__dict__.update(_points=points, _number=number)

    def named(self, name: str) -> Points | None:
        """Return the points of a value of the product."""
        if name not in VALUES:
            return None
        return points_on(self._points, AttentionValue(target_of(self._points), name, self._number))

    def __getattr__(self, name: str) -> Any:
        found = None if name.startswith("__") else self.named(name)
        if found is None:
            raise AttributeError(f"{self!r} has no {name!r}{suggest(name, VALUES)}")
        return fetch(found, "output")

    def __setattr__(self, name: str, value: Any) -> None:
        found = self.named(name)
        if found is None:
            raise PointNotFoundError(f"{self!r} has no {name!r}{suggest(name, VALUES)}")
        assign(found, "output", value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *VALUES})

    def __repr__(self) -> str:
        return f"<{target_of(self._points).path}.{_PRODUCTS}[{self._number}]>"


def _check_attention(target: Target, name: str) -> None:
    """Raise InputError if a module makes no product itself, contains several attention modules, or computes with a
    kernel whose products cannot be seen."""
    path = join(target.path, name)
    if not can_attend(target.owner):
        parts = ", ".join(part.path for part in target.children().values())
        kind = type(target.owner).__name__
        raise InputError(
            f"{path}: {target.path} is a {kind}, which computes no attention product itself"
            + (f". Use the value of a module inside it: {parts}" if parts else "")
        )
    inside = attentions_in(target.owner)
    if len(inside) > 1:
        paths = [reduce(join, inner.split("."), target.path) for inner in [*inside][:4]]
        shown = ", ".join(paths) + (" …" if len(inside) > 4 else "")
        raise InputError(
            f"{path} is ambiguous, because there are {len(inside)} attention modules in this module. Use the value of "
            f"one of them: {shown}"
        )
    for part in (target.owner, *inside.values()):
        reason = why_hidden(part)
        if reason is not None:
            raise InputError(f"{path} cannot be seen: {reason} before the run")
