"""The arguments shared by activation patching and attribution patching, whatever the model.

request = PatchingRequest(activation_patching, model, clean, corrupted, metric, "heads", None, None, "corrupted", {})
LanguagePairs.of(request, layers=None, align="each")
DenoiserPairs.of(request, steps="each", branch=None, align="each", seed=0)
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffsight.lenses.options import check_options
from diffsight.lenses.patching.sweep_checks import check_into, pair_prompts
from diffsight.lenses.sites.find_sites import Sites


@dataclass(frozen=True)
class PatchingRequest:
    """The arguments that both lenses take for both kinds of models. See `activation_patching`.

    Attributes:
        lens: The lens.
        model: The model.
        clean: The clean prompt or prompts.
        corrupted: The corrupted prompt or prompts.
        metric: The metric.
        sites: The sites.
        positions: The positions.
        heads: The heads.
        into: The run that values are put into.
        arguments: Further arguments of the model.
    """

    lens: Callable
    model: Any
    clean: Any
    corrupted: Any
    metric: Any
    sites: Sites
    positions: Any
    heads: int | Iterable[int] | None
    into: str
    arguments: Mapping[str, Any] = field(repr=False)

    def checked_pairs(self) -> list[tuple[Any, Any]]:
        """Return the pairs of prompts: the source, whose values are taken, and the target, into which they are put.

        Raises:
            InputError: An argument does not exist, or the numbers of clean and corrupted prompts differ.
        """
        check_options(self.lens, self.model, self.arguments)
        check_into(self.into)
        clean, corrupted = pair_prompts(self.clean, self.corrupted)
        return list(zip(clean, corrupted) if self.into == "corrupted" else zip(corrupted, clean))
