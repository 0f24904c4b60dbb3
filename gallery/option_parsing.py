"""Parsers for the values of command-line options: layers, steps, seeds, settings.

parse_layers("embedding,0:4,-1")            # ["embedding", slice(0, 4), -1]
"""

import argparse
import ast
from itertools import chain, islice
from pathlib import Path
from typing import Any

from diffsight.pipelines.diffusion.input_counts import PER_INPUT

_INSTEAD = {  # what to write in place of an argument of a pipeline
    "num_inference_steps": "write --steps {}",
    "output_type": "omit it: the command always writes images",
    "prompt": "write the prompt itself, in quotes",
    "seed": "write --seed {}",
}

_MOST_SEEDS = 100_000


def parse_path(text: str) -> Path:
    """Parse a path, which must not be empty: `Path("")` is the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty: name a folder or a file, or write . for this folder")
    return Path(text)


def parse_layers(text: str) -> list[int | str | slice]:
    """Parse layers: `embedding,0:4,-1` becomes `["embedding", slice(0, 4), -1]`."""
    try:
        return [_parse_layer(part.strip()) for part in text.split(",")]
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r} does not name layers: omit the option for all of them, or write numbers (-1 is the last layer), "
            'ranges such as 0:8:2, and "embedding", separated by commas'
        ) from None


def parse_steps(text: str) -> list[int] | slice:
    """Parse steps: `0,5,-1` becomes `[0, 5, -1]`, and `0:20:5` becomes a slice."""
    try:
        found = [_parse_layer(part.strip()) for part in text.split(",")]
    except (ValueError, TypeError):
        found = []
    if len(found) == 1 and isinstance(found[0], slice):
        return found[0]
    if not found or not all(isinstance(step, int) for step in found):
        raise argparse.ArgumentTypeError(
            f"{text!r} does not name steps: omit the option for all of them, or write numbers such as 0,5,-1 (-1 is "
            "the last step), or a range 0:20:5"
        )
    return found


def parse_windows(text: str) -> str | list[int | slice]:
    """Parse windows of steps: `0:4,5` becomes `[slice(0, 4), 5]`; `each` is returned unchanged."""
    if text in ("each", "all"):
        return text
    try:
        found = [_parse_layer(part.strip()) for part in text.split(",")]
    except (ValueError, TypeError):
        found = [""]
    if any(isinstance(item, str) for item in found):
        raise argparse.ArgumentTypeError(
            f"{text!r} does not name steps: write each, or numbers and ranges such as 0:10,10:20"
        )
    return found


def parse_positions(text: str) -> str | list[int | str]:
    """Parse positions: `red circle,-1` becomes `["red circle", -1]`; `each` is returned unchanged."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty position: write words or numbers, such as circle,-1")
    if parts in (["each"], ["words"], ["all"]):
        return parts[0]
    return [int(part) if part.removeprefix("-").isdigit() else part for part in parts]


def parse_numbers(text: str) -> list[float]:
    """Parse numbers: `0,2.5` becomes `[0.0, 2.5]`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers: write numbers such as 0,2.5,10") from None


def parse_seed(text: str) -> int:
    """Parse a seed, an integer from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a seed: write a number from 0 on. Commands that make a study take several: --seeds 0:8"
        )
    return int(text)


def parse_seeds(text: str) -> list[int]:
    """Parse seeds: `0:3,7` becomes `[0, 1, 2, 7]`."""
    try:
        parts = [[int(bound) for bound in part.strip().split(":")] for part in text.split(",")]
        seeds = chain.from_iterable(range(*part) if len(part) > 1 else part for part in parts)
        found = list(islice(seeds, _MOST_SEEDS + 1))
    except (ValueError, TypeError):
        found = []
    if not found or min(found) < 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} does not name seeds: write numbers from 0 on, or a range such as 0:8"
        )
    if len(found) > _MOST_SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r} names more than {_MOST_SEEDS} seeds: write fewer")
    return list(dict.fromkeys(found))


def parse_setting(text: str) -> tuple[str, Any]:
    """Parse a setting: `guidance_scale=3` becomes `("guidance_scale", 3)`."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not a setting: write NAME=VALUE, such as guidance_scale=3")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def parse_pipeline_setting(text: str, takes_seeds: bool) -> tuple[str, Any]:
    """Parse a setting of a command that draws. Arguments that the command determines itself are refused.

    Args:
        text: The setting.
        takes_seeds: Whether the command has the option `--seeds`.
    """
    name, value = parse_setting(text)
    instead = _INSTEAD.get(name)
    if name in PER_INPUT:
        instead = "write --seeds 0:{} for several images" if takes_seeds else "omit it: the command draws one image"
    if instead is not None:
        raise argparse.ArgumentTypeError(f"{text!r}: {instead.format(value)}")
    return name, value


def parse_positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _parse_layer(text: str) -> int | str | slice:
    if text == "embedding":
        return text
    if ":" in text:
        return slice(*(int(part) if part.strip() else None for part in text.split(":")))
    return int(text)
