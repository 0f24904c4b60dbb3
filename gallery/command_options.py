"""The options that several commands share."""

import argparse
from pathlib import Path

from diffsight.errors import InputError
from diffsight.gallery.option_parsing import parse_layers, parse_positive, parse_seeds, parse_setting
from diffsight.pipelines.valid_text import check_text

IMAGE_MODEL, LANGUAGE_MODEL = "diffsight/shapes-clip", "diffsight/smollm2"
PROMPT = "a red circle below a blue square on a gray background"
FACT = "The Eiffel Tower is in the city of"


def add_prompts(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the options for a prompt or a file of prompts."""
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help=what)
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a study: a file with a prompt in each line, or a TSV or JSONL file with a column or key `prompt`",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what there is to do, and do nothing")


def add_model(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options for the model and the output folder."""
    parser.add_argument("--model", default=default, help="packaged name, folder or hub id (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("diffsight-out"),
        metavar="PATH",
        help="folder to write, or a file that ends with .png or .html (default: %(default)s)",
    )


def add_drawing(parser: argparse.ArgumentParser, several_seeds: bool = True) -> None:
    """Add the options for the arguments of a pipeline."""
    parser.add_argument("--seed", type=int, default=0, help="0 or more (default: %(default)s)")
    if several_seeds:
        parser.add_argument("--seeds", type=parse_seeds, metavar="SEEDS", help="a study: seeds such as 0:8 or 1,5,9")
    parser.add_argument("--steps", type=parse_positive, help="denoising steps (default: the pipeline's own number)")
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
    """Add the option for layers."""
    parser.add_argument(
        "--layers",
        type=parse_layers,
        metavar="LAYERS",
        help="layers, separated by commas: a number from 0 (-1 is the last layer), a range such as 0:12:3 (without its "
        'end), or "embedding", the input of the first layer. Write --layers=-2,0 if the value starts with a minus sign '
        f"(default: {default})",
    )


def check_prompt_text(prompt: str, example: str) -> None:
    """Raise InputError for a prompt that is empty or not text."""
    if not prompt.strip():
        raise InputError(f'the prompt is empty: write one, such as "{example}"')
    check_text("the prompt", prompt)


def check_seed(seed: int) -> None:
    """Raise InputError for a negative seed."""
    if seed < 0:
        raise InputError(f"--seed must be an integer, 0 or more, not {seed}")


def print_paths(paths: list[Path]) -> None:
    """Print the paths of the written files, one on each line."""
    for path in paths:
        print(path)
