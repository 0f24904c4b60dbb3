"""The options that several commands share, and how the command line writes their values."""

import argparse
import ast
from pathlib import Path
from typing import Any

from diffsight.errors import InputError
from diffsight.pipelines.valid_text import check_text

IMAGE_MODEL, LANGUAGE_MODEL = "diffsight/shapes-clip", "diffsight/smollm2"
PROMPT = "a red circle below a blue square on a gray background"
FACT = "The Eiffel Tower is in the city of"


def add_prompts(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the prompt, or a file of prompts."""
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help=what)
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a study: a file with a prompt in each line, or a TSV or JSONL file with a column or key `prompt`",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what there is to do, and do nothing")


def add_model(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the model and the output folder."""
    parser.add_argument("--model", default=default, help="packaged name, folder or hub id (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("diffsight-out"),
        metavar="PATH",
        help="folder to write, or a file that ends with .png or .html (default: %(default)s)",
    )


def add_drawing(parser: argparse.ArgumentParser, several_seeds: bool = True) -> None:
    """Add what a pipeline is called with."""
    parser.add_argument("--seed", type=int, default=0, help="0 or more (default: %(default)s)")
    if several_seeds:
        parser.add_argument("--seeds", type=parse_seeds, metavar="SEEDS", help="a study: seeds such as 0:8 or 1,5,9")
    parser.add_argument("--steps", type=positive, help="denoising steps (default: the pipeline's own number)")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        type=parse_setting,
        metavar="NAME=VALUE",
        help="another argument of the pipeline, such as guidance_scale=3; may be repeated",
    )


def add_layers(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the layers."""
    parser.add_argument(
        "--layers",
        type=parse_layers,
        metavar="LAYERS",
        help="layers, separated by commas: a number from 0 (-1 is the last layer), a range such as 0:12:3 (without its "
        'end), or "embedding", the input of the first layer. Write --layers=-2,0 if the value starts with a minus sign '
        f"(default: {default})",
    )


def parse_layers(text: str) -> list[int | str | slice]:
    """Parse layers as the command line writes them: `embedding,0:4,-1` becomes `["embedding", slice(0, 4), -1]`."""
    try:
        return [_parse_layer(part.strip()) for part in text.split(",")]
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(
            f'{text!r} does not name layers: write numbers, ranges such as 0:8:2, and "embedding", separated by commas'
        ) from None


def parse_steps(text: str) -> list[int] | slice:
    """Parse steps as the command line writes them: `0,5,-1` becomes `[0, 5, -1]`, and `0:20:5` a slice."""
    try:
        found = [_parse_layer(part.strip()) for part in text.split(",")]
    except (ValueError, TypeError):
        found = []
    if len(found) == 1 and isinstance(found[0], slice):
        return found[0]
    if not found or not all(isinstance(step, int) for step in found):
        raise argparse.ArgumentTypeError(
            f"{text!r} does not name steps: write numbers such as 0,5,-1, or a range 0:20:5"
        )
    return found


def parse_seeds(text: str) -> list[int]:
    """Parse seeds as the command line writes them: `0:3,7` becomes `[0, 1, 2, 7]`."""
    try:
        parts = [part.strip().split(":") for part in text.split(",")]
        found = [seed for part in parts for seed in (range(*map(int, part)) if len(part) > 1 else [int(part[0])])]
    except (ValueError, TypeError):
        found = []
    if not found or min(found) < 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} does not name seeds: write numbers from 0 on, or a range such as 0:8"
        )
    return list(dict.fromkeys(found))


def parse_setting(text: str) -> tuple[str, Any]:
    """Parse a setting as the command line writes it: `guidance_scale=3` becomes `("guidance_scale", 3)`."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not a setting: write NAME=VALUE, such as guidance_scale=3")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def check_prompt_text(prompt: str, example: str) -> None:
    """Raise InputError for a prompt that is empty or no text."""
    if not prompt.strip():
        raise InputError(f'the prompt is empty: write one, such as "{example}"')
    check_text("the prompt", prompt)


def _parse_layer(text: str) -> int | str | slice:
    if text == "embedding":
        return text
    if ":" in text:
        return slice(*(int(part) if part.strip() else None for part in text.split(":")))
    return int(text)
