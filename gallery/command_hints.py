"""What to write in place of a command or an option that does not exist.

unknown_command("logit_lens", commands)         # "there is no command 'logit_lens' (did you mean 'logit-lens'?)…"
unknown_arguments(["--guidance-scale", "3"], parser)    # "… write --set guidance_scale=3"
"""

import argparse
from collections.abc import Collection, Sequence
from difflib import get_close_matches

from diffsight.errors import suggest
from diffsight.gallery.completion import option_names

_OTHER_NAMES = {  # what the Python API, or another program, calls a command
    "attention-maps": "attention",
    "compare-encoders": "compare",
    "diffusion-lens": "lens",
    "draw": "generate",
    "encoder-patching": "patch",
    "index": "gallery",
    "layer-fidelity": "fidelity",
    "list": "models",
    "run": "generate",
    "show": "gallery",
    "steer": "steering-sweep",
    "trajectory-lens": "trajectory",
    "version": "--version",
}


def unknown_command(word: str, commands: Collection[str]) -> str:
    """Return the error message for a word that is not a command."""
    name = word.lower().replace("_", "-")
    hint = f" (did you mean {_OTHER_NAMES[name]!r}?)" if name in _OTHER_NAMES else suggest(name, commands)
    return f"there is no command {word!r}{hint}; diffsight --help lists the commands"


def unknown_arguments(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """Return the error message for arguments that a command does not have."""
    message = f"unrecognized arguments: {' '.join(words)}"
    if not words[0].startswith("-"):
        return f"{message}. A text of several words needs quotes"
    known = option_names(parser)
    option, _, value = words[0].partition("=")
    value = value or next(iter(words[1:2]), "VALUE")
    name = option.strip("-").replace("-", "_")
    if name in ("num_inference_steps", "num_steps") and "--steps" in known:
        return f"{message}. Write --steps {value}"
    if near := get_close_matches(option, known, n=1, cutoff=0.8):
        return f"{message} (did you mean {near[0]}?)"
    if option.startswith("--") and "--set" in known:
        return f"{message}. An argument of the pipeline is written --set {name}={value}"
    if option.startswith("--") and "NAME=VALUE" in parser.format_usage():
        setting = f"num_inference_steps={value}" if name == "steps" else f"{name}={value}"
        return f"{message}. An argument of the pipeline is written {setting}"
    return message
