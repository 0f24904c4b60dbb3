"""The options that several commands share."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsight.errors import InputError
from diffsight.gallery.option_parsing import (
    parse_layers,
    parse_path,
    parse_pipeline_setting,
    parse_positive,
    parse_seed,
    parse_seeds,
)
from diffsight.pipelines.valid_text import check_text

if TYPE_CHECKING:
    import torch

IMAGE_MODEL, LANGUAGE_MODEL = "diffsight/shapes-clip", "diffsight/smollm2"
PROMPT = "a red circle below a blue square on a gray background"
OUT = Path("diffsight-out")
FACT = "The Eiffel Tower is in the city of"


def add_command(
    commands: Any, name: str, run: Callable, *, help: str, description: str | None = None, example: str = ""
) -> argparse.ArgumentParser:
    """Add a command, and return its parser.

    Args:
        commands: The commands of the command line.
        name: The name of the command.
        run: Runs the command with its options, and returns the exit status; None is 0.
        help: What the command does, for the list of commands.
        description: What it does, for its own help.
        example: Arguments that the command accepts.
    """
    epilog = f"example: diffsight {name} {example}".rstrip()
    parser = commands.add_parser(name, help=help, description=description, epilog=epilog)
    parser.set_defaults(command=run)
    return parser


def add_prompts(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the options for a prompt or a file of prompts."""
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help=what)
    parser.add_argument(
        "--prompts",
        type=parse_path,
        metavar="FILE",
        help="a study: a file with a prompt in each line, or a TSV or JSONL file with a column or key `prompt`",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what there is to do, and do nothing")


def add_model(parser: argparse.ArgumentParser, default: str, lens: str) -> None:
    """Add the options for the model and the output folder.

    Args:
        parser: The parser of the command.
        default: The model that is used by default.
        lens: The lens whose result is written to the output folder.
    """
    parser.set_defaults(lens=lens)
    parser.add_argument("--model", default=default, help="packaged name, folder or hub id (default: %(default)s)")
    parser.add_argument("--device", metavar="DEVICE", help="where the model runs, such as cuda:1 (default: the CPU)")
    parser.add_argument(
        "-o",
        "--out",
        type=parse_path,
        default=OUT / parser.prog.split()[-1],
        metavar="PATH",
        help="folder to write, or a file that ends with .png or .html (default: %(default)s)",
    )


def add_saved(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    """Add the argument for saved results; by default, the folder that commands write to."""
    parser.add_argument(
        name, metavar=name.upper(), type=parse_path, nargs="?", default=OUT, help=f"{what} (default: %(default)s)"
    )


def add_seed(parser: argparse._ActionsContainer) -> None:
    """Add the option for a seed."""
    # The default is a text, which is parsed too: argparse would take a given 0 for the default 0.
    parser.add_argument("--seed", type=parse_seed, default="0", help="0 or more (default: %(default)s)")


def add_drawing(parser: argparse.ArgumentParser, several_seeds: bool = True) -> None:
    """Add the options for the arguments of a pipeline."""
    seeds = parser.add_mutually_exclusive_group()
    add_seed(seeds)
    if several_seeds:
        seeds.add_argument("--seeds", type=parse_seeds, metavar="SEEDS", help="a study: seeds such as 0:8 or 1,5,9")
    parser.add_argument("--steps", type=parse_positive, help="denoising steps (default: the pipeline's own number)")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        type=partial(parse_pipeline_setting, takes_seeds=several_seeds),
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


def device_of(options: argparse.Namespace) -> "str | torch.device | None":
    """Return the device for the model: that of the options, or of this process under `accelerate launch`.

    Raises InputError if it cannot be used."""
    from diffsight.lenses.work_sharing import Processes

    if not options.device:
        return Processes().device
    import torch

    try:
        torch.empty(0, device=options.device)
    except (AssertionError, RuntimeError) as error:  # torch without CUDA, and no such device
        reason = str(error).splitlines()[0]
        raise InputError(f"the device {options.device} cannot be used: {reason}") from None
    return options.device


def print_paths(paths: list[Path]) -> None:
    """Print the paths of the written files, one on each line."""
    for path in paths:
        print(path)
