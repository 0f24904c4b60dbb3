"""The values of two runs of a pipeline at the same points: what attribution compares.

found = read_pairs(source, target, step.index, plain.calls)     # both runs advance through the points
found[0].source, found[0].target                                # the target has a graph
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.lenses.patching.denoiser_sweep import Passage
from diffsight.lenses.sites.site import Site


@dataclass(frozen=True)
class ValuePair:
    """A point that both runs have passed.

    Attributes:
        point: The path of the point.
        step: The number of the step; None before the first.
        source: The value in the source's run.
        target: The value in the target's run, with a graph.
    """

    point: str
    step: int | None
    source: torch.Tensor = field(repr=False)
    target: torch.Tensor = field(repr=False)


def read_pairs(source: Any, target: Any, step: int | None, calls: Iterable[Passage]) -> list[ValuePair]:
    """Advance both runs through some calls of points, in order, and return the values.

    Args:
        source: The source's run, or a branch of it.
        target: The target's run, or a branch of it.
        step: The number of the step; None before the first.
        calls: The calls.

    Raises:
        InputError: The values have different shapes.
    """
    found = []
    for passage in calls:
        site = Site(passage.point)
        given, own = site.read(source, passage.call).detach().clone(), site.track(target, passage.call)
        if given.shape != own.shape:
            raise InputError(
                f"{site.point} has the shape {tuple(given.shape)} for one prompt and {tuple(own.shape)} for the other: "
                "choose prompts with the same number of tokens"
            )
        found.append(ValuePair(site.point, step, given, own))
    return found
