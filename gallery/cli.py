"""The command line: `diffsight models`, and the commands defined in the modules named `*commands.py`.

Libraries that are slow to import are imported by the commands that need them, so that help and bad input are quick.
"""

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from diffsight.errors import DiffsightError
from diffsight.gallery.command_hints import unknown_arguments, unknown_command
from diffsight.gallery.command_options import PROMPT, add_command
from diffsight.gallery.completion import script
from diffsight.gallery.lens_commands import add_lens_commands
from diffsight.gallery.other_commands import add_commands
from diffsight.gallery.patching_commands import add_patching_commands
from diffsight.gallery.serve.serve_command import add_serve_commands
from diffsight.pipelines.valid_text import check_text


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 if a check fails, or 2 if the input is invalid or a model fails.

    Args:
        argv: The arguments; by default, the arguments of the process.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no notices about optional packages
    warnings.showwarning = _show_warning
    try:
        check_text("an argument", words)
        options = _options(words)
        return options.command(options) or 0
    except (DiffsightError, argparse.ArgumentTypeError) as error:
        message = str(error)
    except OSError as error:  # such as a full disk
        message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    except Exception as error:  # an error in the model: the API raises it unchanged, a command prints type and place
        place = traceback.extract_tb(error.__traceback__)[-1]
        first = next(iter(str(error).strip().splitlines()), "")
        message = f"{type(error).__name__}: {first} ({place.filename}, line {place.lineno})"
    print(f"diffsight: {message}", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """A parser with one-line errors, and a hint if a value has probably been taken for an option."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.endswith("expected one argument"):
            option = message.removeprefix("argument ").partition(":")[0].split("/")[-1]
            hint = f". If the value starts with a minus sign, write {option}=-1"
        elif message.endswith("required: COMMAND"):
            hint = "; diffsight --help lists the commands"
        self.exit(2, f"{self.prog}: {message}{hint}\n")


def _options(words: list[str]) -> argparse.Namespace:
    """Return the options of the command in the words of a command line. Wrong words end the process with status 2."""
    parser, commands = _parser()
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    name = next((word for word in words if not word.startswith("-")), None)
    if name is not None and name not in commands:
        parser.error(unknown_command(name, commands))
    options, unknown = parser.parse_known_args(words)
    if unknown:
        commands[name].error(unknown_arguments(unknown, commands[name]))
    return options


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser of the command line, and those of the commands by name."""
    parser = Parser(
        prog="diffsight",
        description="Open diffusion pipelines and language models for interpretability research.",
        epilog=f'example: diffsight lens "{PROMPT}"',
    )
    parser.add_argument("-v", "--version", action="version", version=f"diffsight {version('diffsight')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_lens_commands(commands)
    add_patching_commands(commands)
    add_command(commands, "models", _models, help="list the packaged models")
    add_commands(commands)
    add_serve_commands(commands)
    completion = add_command(
        commands,
        "completion",
        lambda options: print(script(options.shell, commands.choices), end=""),
        help="print a script that completes commands in a shell",
        description="Print a script that makes a shell complete the commands of diffsight and their options.",
        example="bash",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish")
    return parser, commands.choices


def _models(options: argparse.Namespace) -> None:
    from diffsight.pipelines.language.smollm2 import to_install
    from diffsight.pipelines.packaged import LANGUAGE_MODELS, PIPELINES

    missing = to_install()
    width = max(map(len, PIPELINES | LANGUAGE_MODELS))
    for name, description in PIPELINES.items():
        print(f"{name:{width}}  {description}")
    for name, description in LANGUAGE_MODELS.items():
        print(f"{name:{width}}  {description}" + (f" (not installed: {missing})" if missing else ""))


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"diffsight: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
