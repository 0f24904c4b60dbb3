"""The factors of a product of matrices, `matmul`, `bmm`, `baddbmm` or `einsum`, as tensors with heads."""

import string
from dataclasses import dataclass
from typing import Any

import torch

from diffsight.pipelines.attention.attention_modules import count_heads
from diffsight.pipelines.attention.heads_layout import HeadsLayout, TransposedLayout
from diffsight.pipelines.attention.watched_modules import Watched

MATRIX_PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum", "baddbmm"}


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
    places: tuple[int, int]  # the positions of the factors in the arguments

    @classmethod
    def of(cls, name: str, args: tuple, kwargs: dict[str, Any], modules: list[Watched]) -> "Factors | None":
        """Return the factors of a product, or None if it is not a product of two tensors with heads."""
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
        """Return the arguments with the factors replaced."""
        args = list(self.args)
        args[self.places[0]], args[self.places[1]] = first, second
        return tuple(args)
