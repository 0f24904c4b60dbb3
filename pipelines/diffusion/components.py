"""The parts of a pipeline, as what can be tapped."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffsight.extending import FORWARD, Target


def part_targets(parts: Mapping[str, Any], known: dict[str, Target]) -> dict[str, Target]:
    """A target for each part, by name; `known` are those made before, which stay as long as the part is the same."""
    for name, part in parts.items():
        if name not in known or known[name].owner is not part:
            known[name] = Target(part, FORWARD if isinstance(part, nn.Module) else "__call__", name)
    return {name: known[name] for name in parts}
