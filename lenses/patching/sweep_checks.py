"""Checks of patching and ablation, made before anything runs. Every function raises InputError."""

from typing import Any

from diffsight.errors import InputError
from diffsight.lenses.metrics.metric import IMAGES, Metric
from diffsight.lenses.tokens.batches import as_prompts


def check_omitted(kind: str, **given: Any) -> None:
    """Check that arguments for another kind of model are omitted."""
    name = next((name for name, value in given.items() if value is not None), None)
    if name is not None:
        raise InputError(f"{name} is an argument for {kind}: omit it")


def check_into(into: Any) -> None:
    """Check the name of the run that values are put into."""
    if into not in ("corrupted", "clean"):
        raise InputError(f"into must be 'corrupted' or 'clean', not {into!r}")


def check_branch(branch: Any) -> None:
    """Check that the branch of guidance exists."""
    if branch not in (None, "cond", "uncond"):
        raise InputError(f"branch must be 'cond', 'uncond', or None for both, not {branch!r}")


def check_differentiable(metric: Metric) -> None:
    """Check that a metric of a pipeline does not need images, through which no gradient goes."""
    if metric.reads == (IMAGES,):
        raise InputError(
            f"the metric {metric.name} has no gradient, because it reads images: pass latent_distance(), or a function "
            "of result.latents"
        )


def check_rows(rows: int, most: int, has_heads: bool = False) -> None:
    """Check that a sweep does not have too many rows. With `has_heads`, the heads of its sites are not counted yet."""
    if rows > most:
        count, more = (f"at least {rows}", "a larger max_rows") if has_heads else (str(rows), f"max_rows={rows}")
        raise InputError(
            f"the sweep has {count} rows, one for each site and column, and max_rows is {most}: choose fewer sites, "
            f"positions or steps, or pass {more}"
        )


def pair_prompts(clean: Any, corrupted: Any) -> tuple[list[Any], list[Any]]:
    """Return the clean and the corrupted prompts, in equal numbers."""
    prompts = as_prompts(clean), as_prompts(corrupted)
    if len(prompts[0]) != len(prompts[1]):
        raise InputError(f"there are {len(prompts[0])} clean and {len(prompts[1])} corrupted prompts: pass pairs")
    return prompts
