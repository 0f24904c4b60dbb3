"""Completion of commands and options in a shell: `diffsight completion bash`."""

import argparse
import re
from collections.abc import Mapping, Sequence

_BASH = """\
_diffsight() {
    local word="${COMP_WORDS[COMP_CWORD]}" words
    case "${COMP_WORDS[1]}" in
%(cases)s
        *) words="%(commands)s" ;;
    esac
    if [[ $COMP_CWORD -eq 1 ]]; then words="%(commands)s --help"; fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _diffsight diffsight
"""
_OPTION = re.compile(r"^  (?:-\w(?: [A-Z]+)?, )?(--[a-z][a-z-]*)", re.MULTILINE)  # as help lists an option
_FISH = "complete -c diffsight -n '%(condition)s' %(what)s\n"


def script(shell: str, commands: Mapping[str, argparse.ArgumentParser]) -> str:
    """Return the script that makes a shell complete commands and their options.

    Args:
        shell: "bash", "zsh" or "fish".
        commands: The parsers of the commands, by name.
    """
    options = {name: option_names(parser) for name, parser in commands.items()}
    if shell == "fish":
        return _fish(options)
    cases = "\n".join(f'        {name}) words="{" ".join(words)}" ;;' for name, words in options.items())
    bash = _BASH % {"cases": cases, "commands": " ".join(options)}
    return bash if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{bash}"


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of a command."""
    return list(dict.fromkeys(_OPTION.findall(parser.format_help())))


def _fish(options: Mapping[str, Sequence[str]]) -> str:
    lines = [_FISH % {"condition": "__fish_use_subcommand", "what": f"-a {name}"} for name in options]
    for name, words in options.items():
        condition = f"__fish_seen_subcommand_from {name}"
        lines += [_FISH % {"condition": condition, "what": f"-l {word.removeprefix('--')}"} for word in words]
    return "".join(lines)
