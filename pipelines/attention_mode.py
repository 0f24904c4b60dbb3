"""Watches attention modules while they compute, whatever they compute with.

A PyTorch function mode, active only in the coroutine of a run that asks for attention, sees
`F.scaled_dot_product_attention`, which transformers ("sdpa") and diffusers' dispatch call, and attention that is
written out: a product of queries and keys, a softmax, and a product with the values. No processor is replaced.

The values of a product pass in this order: `q`, `k`, `v`, `attention_product`, `attention_probs`, `heads_output`. What
nobody waits for is not computed. The fused kernel stays in place: probabilities are computed beside it, and multiplied
with the values by hand only where they were changed.
"""

import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from diffsight.errors import AssignmentError, InputError
from diffsight.extending import INPUTS, OUTPUT, Tap, current_owner
from diffsight.pipelines.attention_product import AttentionProduct, HeadsLayout, WithValueOf

VALUES = ("q", "k", "v", "attention_product", "attention_probs", "heads_output")

SCALED_DOT_PRODUCT = "scaled_dot_product_attention"
_PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum", "baddbmm"}
_KEEPS_PROBS = {"dropout", "to", "type", "type_as", "float", "half", "bfloat16", "clone", "contiguous", "__getitem__"}
_KEEPS_PROBS |= {"reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose", "permute", "expand"}
_KEEPS_PROBS |= {"masked_fill"}
WATCHED = {SCALED_DOT_PRODUCT, "softmax", "multi_head_attention_forward", *_PRODUCTS}


class Watched:
    """An attention module that a run has asked for values of.

    Args:
        calls: The tap of the module.
        handles: The hooks that make the mode active.
    """

    def __init__(self, calls: Tap, handles: list[Any]) -> None:
        self.calls, self.handles = calls, handles
        self.taps: dict[tuple[int | None, str], Tap] = {}  # number of the product (None: the only one) and value
        self._call, self._count = -1, 0  # the call in progress, and how many products it has made
        self._only: Tap | None = None  # a value that was taken as that of the only product of this call

    @property
    def is_running(self) -> bool:
        """Whether the module is being called."""
        return bool(self.calls.active)

    def wants(self, *values: str) -> bool:
        """Whether the run needs any of these values of the next product."""
        self._enter()
        return any(is_wanted(tap, self._call) for value in values for tap in self._taps(value))

    def through(self, value: str, current: Any) -> Any:
        """Let the run read and change a value of the next product; return what it has become."""
        self._enter()
        for tap in self._taps(value):
            if tap.target.number is None and is_wanted(tap, self._call):
                self._only = tap
            current = pass_value(tap, self._call, current)
        return current

    def pass_by(self) -> None:
        """The next product is made, and nobody wants any of its values."""
        for value in VALUES:
            self.through(value, None)
        self._count += 1

    def end_product(self) -> None:
        """A product has been made."""
        self._enter()
        self._count += 1

    def _taps(self, value: str) -> list[Tap]:
        keys = [(self._count, value)] if self._count else [(None, value), (0, value)]
        return [self.taps[key] for key in keys if key in self.taps]

    def _enter(self) -> None:
        call = self.calls.active[-1]
        if call != self._call:
            self._call, self._count, self._only = call, 0, None
        if self._count and self._only is not None:
            target = self._only.target
            raise InputError(
                f"{target.path} is ambiguous: {target.outer.path} makes several products in one call. Write "
                f"{target.outer.path}.products[0].{target.value} for the first, products[1] for the second"
            )


class AttentionMode(TorchFunctionMode):
    """Sends what happens in the watched modules through their taps."""

    def __init__(self) -> None:
        super().__init__()
        self._watched: dict[int, Watched] = {}
        self._written = WrittenOut()
        self._inside: list[nn.Module] = []  # the watched modules whose calls have made the mode active, outermost first
        self._is_always_active = False

    def add(self, tap: Tap, calls: Tap, key: tuple[int | None, str]) -> Callable[[], None]:
        """Watch the module that `calls` taps for one of its values; return what undoes it."""
        number = calls.target.key[0]
        if number not in self._watched:
            self._watched[number] = Watched(calls, self._active_in(calls))
        watched = self._watched[number]
        watched.taps[key] = tap

        def undo() -> None:
            watched.taps.pop(key, None)
            if not watched.taps and self._watched.pop(number, None) is not None:
                for handle in watched.handles:
                    handle.remove()

        return undo

    def _active_in(self, calls: Tap) -> list[Any]:
        """Make the mode active in the calls of a module, because it slows down every function that is called in it. If
        the module is being called already, the mode is active from now on."""
        host, module = calls.host, calls.target.owner
        if calls.active and not (self._is_always_active or self._inside):
            self._is_always_active = True
            host.add_mode(self)

        def is_ours(called: nn.Module) -> bool:  # a copy of the module has the hooks too
            return called is module and current_owner() is host and bool(host.taps)

        def before(called: nn.Module, args: tuple) -> None:
            if is_ours(called) and not self._is_always_active:
                if not self._inside:
                    self.__enter__()
                self._inside.append(module)

        def after(called: nn.Module, args: tuple, output: Any) -> None:
            if is_ours(called) and self._inside and self._inside[-1] is module:
                self._inside.pop()
                if not self._inside:
                    self.__exit__(None, None, None)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name not in WATCHED and self._written.is_empty:
            return func(*args, **kwargs)
        running = [watched for watched in self._watched.values() if watched.is_running]
        if not running:
            self._written.clear()
            return func(*args, **kwargs)
        if name == SCALED_DOT_PRODUCT:
            return FusedCall.of(running, args, kwargs).run(func)
        if name == "multi_head_attention_forward":
            with self:
                return _without_dispatch(func)(*args, **kwargs)
        return self._written.run(running, name, func, args, kwargs)


# ---- a fused kernel


@dataclass(frozen=True, eq=False)
class FusedCall:
    """One call of a fused kernel in watched modules.

    When a model of transformers writes one token at a time, its queries that share a key are passed as if they were
    several queries of one head. `layout` undoes that."""

    modules: list[Watched]
    product: AttentionProduct
    layout: HeadsLayout
    rest: dict[str, Any]  # the arguments besides queries, keys and values

    @classmethod
    def of(cls, modules: list[Watched], args: tuple, kwargs: dict[str, Any]) -> "FusedCall":
        """Return the call with these arguments."""
        q, k, v, rest = _sdpa_arguments(*args, **kwargs)
        owner = modules[-1].calls.target.owner
        groups = getattr(owner, "num_key_value_groups", 1)
        packed = q.ndim == 4 and groups > 1 and q.shape[2] == groups and q.shape[1] == k.shape[1]
        packed = packed and not rest["enable_gqa"] and count_heads(owner) == groups * k.shape[1]
        layout = HeadsLayout(packed=groups if packed else 1)
        mask = rest["attn_mask"]
        if packed and mask is not None and mask.ndim == 4 and mask.shape[2] == groups:
            mask = layout.view(mask)
        product = AttentionProduct(q, k, v, mask, rest["scale"], rest["is_causal"], rest["dropout_p"])
        return cls(modules, product, layout, rest)

    def run(self, func: Callable) -> torch.Tensor:
        """Make the call, with what the run changes in it."""
        product, plain = self.product, HeadsLayout()
        if not any(module.wants(*VALUES) for module in self.modules):
            for module in self.modules:
                module.pass_by()
            return func(product.q, product.k, product.v, **self.rest)
        if product.q.ndim not in (3, 4):
            path, shape = self.modules[-1].calls.target.path, tuple(product.q.shape)
            raise InputError(f"{path}: the queries have the shape {shape}, in which diffsight finds no heads")
        q = _changed(self.modules, "q", product.q, self.layout)
        k = _changed(self.modules, "k", product.k, plain)
        v = _changed(self.modules, "v", product.v, plain)
        product = replace(product, q=self.layout.view(q), k=plain.view(k), v=plain.view(v))
        for module in self.modules:
            module.through("attention_product", product)
        output = self._output(product, lambda: func(q, k, v, **self.rest))
        output = _changed(self.modules, "heads_output", output, self.layout)
        for module in self.modules:
            module.end_product()
        return output

    def _output(self, product: AttentionProduct, fused: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the output of the fused kernel, or with probabilities that the run has changed."""
        if not any(module.wants("attention_probs") for module in self.modules):
            for module in self.modules:
                module.through("attention_probs", None)
            return fused()
        probs = given = product.probabilities()
        state = state_of(probs)
        for module in self.modules:
            given = module.through("attention_probs", given)
        is_changed = given is not probs or not is_unchanged(probs, state)
        if not is_changed and not probs.requires_grad:
            return fused()
        if product.dropout and not is_changed:
            path = self.modules[-1].calls.target.path
            raise InputError(f"{path}.attention_probs has no gradient under dropout: call model.eval() before the run")
        output = self.layout.back(product.times_values(given.to(probs.dtype)), self.product.q)
        if is_changed:
            return output
        with torch.no_grad():
            value = fused()
        return WithValueOf.apply(output, value)


def _sdpa_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    rest = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
    return query, key, value, rest | {"scale": scale, "enable_gqa": enable_gqa}


@cache
def _without_dispatch(func: FunctionType) -> FunctionType:
    """Return a function of `torch.nn.functional` that calls other functions, without its own dispatch to modes: so that
    a mode sees what it calls."""
    return FunctionType(
        func.__code__,
        {**func.__globals__, "has_torch_function": lambda _: False},
        func.__name__,
        func.__defaults__,
        func.__closure__,
    )


# ---- attention that is written out


@dataclass(frozen=True, eq=False)
class _Operation:
    func: Callable
    args: tuple
    kwargs: dict[str, Any]
    output: torch.Tensor


class WrittenOut:
    """Follows an attention whose probabilities are visible, from the product of queries and keys to that with values.

    Queries and keys are known as such only once the softmax is reached. If the run changes them there, what was
    computed from them in between is computed again."""

    def __init__(self) -> None:
        self._operations: list[_Operation] = []  # products, and what was computed from these
        self._probs: list[torch.Tensor] = []  # outputs of a softmax, and what was computed from these alone
        self._scores: list[_Operation] = []  # the operations that have led to the probabilities

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to follow."""
        return not (self._operations or self._probs)

    def clear(self) -> None:
        """Forget everything."""
        self._operations.clear()
        self._probs.clear()
        self._scores = []

    def run(self, modules: list[Watched], name: str, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Make one call of a function, with what the run changes in it."""
        if name in _PRODUCTS:
            factors = Factors.of(name, args, kwargs, modules)
            if factors is not None and self._are_probs(factors.first):
                return self._values(modules, factors, func)
        if name == "softmax" and args and self._leads_to(args[0]):
            args = (self._with_new_scores(modules, args[0]), *args[1:])
        output = func(*args, **kwargs)
        if name == "softmax" or (name in _KEEPS_PROBS and args and self._are_probs(args[0])):
            self._probs.append(output)
        elif isinstance(output, torch.Tensor) and (
            name in _PRODUCTS or any(map(self._leads_to, _tensors(args, kwargs)))
        ):
            self._operations.append(_Operation(func, args, kwargs, output))
        return output

    def _are_probs(self, value: Any) -> bool:
        return any(known is value for known in self._probs)

    def _leads_to(self, value: Any) -> bool:
        return any(known.output is value for known in self._operations)

    def _with_new_scores(self, modules: list[Watched], scores: torch.Tensor) -> torch.Tensor:
        """Let the run read and change the queries and keys that scores were computed from; return the scores."""
        found, needed = [], {id(scores)}
        for operation in reversed(self._operations):
            if id(operation.output) in needed:
                found.append(operation)
                if operation.func.__name__ not in _PRODUCTS:
                    needed |= {id(tensor) for tensor in _tensors(operation.args, operation.kwargs)}
        found.reverse()
        self._scores = found
        products = [operation for operation in found if operation.func.__name__ in _PRODUCTS]
        first = products[0]
        factors = Factors.of(first.func.__name__, first.args, first.kwargs, modules)
        if factors is None or len(products) > 1:  # relative positions have a product of their own, for example
            self._scores = []
            return scores
        if not any(module.wants("q", "k") for module in modules):
            for module in modules:
                module.through("q", None)
                module.through("k", None)
            return scores
        before = [factors.first, factors.second]
        states = [state_of(tensor) for tensor in before]
        layouts = [factors.first_layout, factors.keys_layout]
        given = [_changed(modules, value, *pair) for value, *pair in zip(("q", "k"), before, layouts)]
        tracked = any(tensor.requires_grad for tensor in before)
        if not tracked and all(a is b and is_unchanged(a, state) for a, b, state in zip(before, given, states)):
            return scores
        return _computed_again(found, dict(zip(map(id, before), given)))

    def _values(self, modules: list[Watched], factors: "Factors", func: Callable) -> torch.Tensor:
        """Make the product with the values, with what the run changes in it."""
        v = _changed(modules, "v", factors.second, factors.second_layout)
        if any(module.wants("attention_product") for module in modules):
            product = self._product(modules, factors, v)
        else:
            product = None
        for module in modules:
            module.through("attention_product", product)
        probs = _changed(modules, "attention_probs", factors.first, factors.first_layout)
        output = func(*factors.with_factors(probs, v), **factors.kwargs)
        output = _changed(modules, "heads_output", output, factors.output_layout)
        for module in modules:
            module.end_product()
        self.clear()
        return output

    def _product(self, modules: list[Watched], factors: "Factors", v: torch.Tensor) -> AttentionProduct:
        first = self._scores[0] if self._scores else None
        score = first and Factors.of(first.func.__name__, first.args, first.kwargs, modules)
        if not score:
            path = modules[-1].calls.target.path
            raise InputError(f"{path}.attention_product: no product of queries and keys was seen before the softmax")
        return AttentionProduct(
            score.first_layout.view(score.first),
            score.keys_layout.view(score.second),
            factors.second_layout.view(v),
            computed=factors.first_layout.view(factors.first),
        )


def _computed_again(operations: list[_Operation], new: dict[int, torch.Tensor]) -> torch.Tensor:
    """Repeat operations with new tensors, by the id of the old ones; return the output of the last."""
    output = None
    for operation in operations:
        args, kwargs = torch.utils._pytree.tree_map(
            lambda value: new.get(id(value), value), (operation.args, operation.kwargs)
        )
        output = operation.func(*args, **kwargs)
        new[id(operation.output)] = output
    return output


@dataclass(frozen=True, eq=False)
class Factors:
    """The two factors of a product of matrices, and how they are laid out."""

    first: torch.Tensor
    second: torch.Tensor
    first_layout: HeadsLayout  # (batch, heads, rows, columns)
    second_layout: HeadsLayout  # (batch, heads, rows, columns)
    keys_layout: HeadsLayout  # (batch, heads, columns, rows) of the second factor
    output_layout: HeadsLayout
    args: tuple
    kwargs: dict[str, Any]
    places: tuple[int, int]  # of the factors among the arguments

    @classmethod
    def of(cls, name: str, args: tuple, kwargs: dict[str, Any], modules: list[Watched]) -> "Factors | None":
        """Return the factors of a product; None if it is not one of two tensors with heads."""
        if name == "einsum":
            return cls._of_einsum(args, kwargs)
        if name == "baddbmm" and "batch1" in kwargs:
            args = (*args, kwargs["batch1"], kwargs["batch2"])
            kwargs = {name: value for name, value in kwargs.items() if name not in ("batch1", "batch2")}
        places = (1, 2) if name == "baddbmm" else (0, 1)
        if len(args) <= places[1] or not all(isinstance(args[place], torch.Tensor) for place in places):
            return None
        first, second = (args[place] for place in places)
        if first.ndim not in (3, 4) or second.ndim != first.ndim:
            return None
        heads = count_heads(modules[-1].calls.target.owner) or 1
        layout = HeadsLayout(heads=heads if len(first) % heads == 0 else 1)
        keys = TransposedLayout(layout)
        return cls(first, second, layout, layout, keys, layout, args, kwargs, places)

    @classmethod
    def _of_einsum(cls, args: tuple, kwargs: dict[str, Any]) -> "Factors | None":
        equation, *rest = args
        factors = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
        if not isinstance(equation, str) or len(factors) != 2 or "->" not in equation or "." in equation:
            return None
        inputs, output = equation.replace(" ", "").split("->")
        a, b = inputs.split(",")
        rows, columns = [x for x in a if x not in b], [x for x in b if x not in a]
        summed = [x for x in a if x in b and x not in output]
        shared = [x for x in output if x in a and x in b]
        if not (len(rows) == len(columns) == len(summed) == 1 and len(shared) == 2):
            return None
        if any(len(letters) != 4 or set(letters) - set(string.ascii_letters) for letters in (a, b, output)):
            return None

        def layout(letters: str, *order: str) -> HeadsLayout:
            return HeadsLayout([letters.index(letter) for letter in (*shared, *order)])

        return cls(
            *factors,
            layout(a, rows[0], summed[0]),
            layout(b, summed[0], columns[0]),
            layout(b, columns[0], summed[0]),
            layout(output, rows[0], columns[0]),
            (equation, *factors),
            kwargs,
            (1, 2),
        )

    def with_factors(self, first: torch.Tensor, second: torch.Tensor) -> tuple:
        """Return the arguments with other factors."""
        args = list(self.args)
        args[self.places[0]], args[self.places[1]] = first, second
        return tuple(args)


class TransposedLayout(HeadsLayout):
    """The layout of a factor whose last two dimensions are the other way round."""

    def __init__(self, layout: HeadsLayout) -> None:
        super().__init__(layout.order, layout.heads)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        return super().view(tensor).transpose(-1, -2)

    def back(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return super().back(tensor.transpose(-1, -2), like)


# ---- values that pass


def _changed(modules: list[Watched], value: str, tensor: torch.Tensor, layout: HeadsLayout) -> torch.Tensor:
    """Let the run read and change a tensor; return it as it was, or what it has become.

    Queries, keys, values and outputs are handed out as (batch, tokens, heads, features), probabilities as (batch,
    heads, queries, keys). Where somebody reads it, the model goes on with what was handed out: it is on the graph."""
    if not any(module.wants(value) for module in modules):
        for module in modules:
            module.through(value, None)
        return tensor
    by_token = value != "attention_probs"
    shown = layout.view(tensor)
    shown = shown.transpose(1, 2) if by_token else shown
    given = shown
    for module in modules:
        given = module.through(value, given)
    if given is shown and not tensor.requires_grad:
        return tensor
    return layout.back(given.transpose(1, 2) if by_token else given, tensor)


def is_wanted(tap: Tap, call: int) -> bool:
    """Return whether the run needs what a tap is passed in a call of its module: a body waits for it or has assigned
    it, or it is followed."""
    if tap.keepers:
        return True
    return any((kind, call) in points for kind in (INPUTS, OUTPUT) for points in (tap.awaited, tap.pending))


def pass_value(tap: Tap, call: int, current: Any) -> Any:
    """Let the run read and change a value that is computed in a call of a module; return what it has become.

    Raises:
        AssignmentError: What was assigned has another shape.
    """
    tap.entered = call  # a value has the number of the call that it is computed in
    if not is_wanted(tap, call):
        tap.enter((), {})
        tap.leave(None)
        return current
    tap.enter((), {})
    given = tap.leave(current)
    if given is current:
        return current
    if not isinstance(current, torch.Tensor):
        raise AssignmentError(f"{tap.target.path} can only be read")
    if not isinstance(given, torch.Tensor) or given.shape != current.shape:
        shape = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise AssignmentError(f"{tap.target.path} has the shape {tuple(current.shape)}, not {shape}")
    return given


def state_of(tensor: torch.Tensor) -> Any:
    """Return what tells whether a tensor is changed in place: its version, or a copy in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def is_unchanged(tensor: torch.Tensor, state: Any) -> bool:
    return torch.equal(tensor, state) if isinstance(state, torch.Tensor) else tensor._version == state


def _tensors(args: tuple, kwargs: dict[str, Any]) -> Iterable[torch.Tensor]:
    return (value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor))


def count_heads(attention: nn.Module) -> int | None:
    """Return the number of heads of an attention module, or None if it is unknown."""
    for holder in (attention, getattr(attention, "config", None)):
        for name in ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads", "heads"):
            count = getattr(holder, name, None)
            if isinstance(count, int) and count > 0:
                return count
    return None
