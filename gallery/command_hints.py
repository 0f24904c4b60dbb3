"""What to write in place of a command or an option that does not exist.

unknown_command("logit_lens", commands)         # "there is no command 'logit_lens' (did you mean 'logit-lens'?)…"
unknown_arguments(["--guidance-scale", "3"], parser)    # "… write --set guidance_scale=3"
"""

import argparse
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path

from diffsight.errors import suggest
from diffsight.gallery.completion import option_names
from diffsight.lenses.results.saving import HTML, IMAGES

_OTHER_NAMES = {  # what the Python API, or another program, calls a command
    "attention-maps": "attention",
    "compare-encoders": "compare",
    "diffusion-lens": "lens",
    "display": "gallery",
    "draw": "generate",
    "encoder-patching": "patch",
    "index": "gallery",
    "layer-fidelity": "fidelity",
    "html": "gallery",
    "list": "models",
    "open": "gallery",
    "run": "generate",
    "show": "gallery",
    "steer": "steering-sweep",
    "study": "lens --prompts",
    "sweep": "lens --prompts",
    "trajectory-lens": "trajectory",
    "version": "--version",
    "view": "gallery",
}
_OTHER_OPTIONS = {  # what other programs call an option; those of a pipeline are written with --set
    "--num-inference-steps": "--steps",
    "--num-steps": "--steps",
    "--output": "--out",
    "--output-dir": "--out",
    "--save": "--out",
}
# Options of other programs that are no arguments of a pipeline.
_OF_OTHERS = ("--debug", "--fp16", "--open", "--quiet", "--show", "--verbose")


def unknown_command(word: str, commands: Collection[str]) -> str:
    """Return the error message for a word that is not a command."""
    name = word.lower().replace("_", "-")
    hint = f" (did you mean {_OTHER_NAMES[name]!r}?)" if name in _OTHER_NAMES else suggest(name, commands)
    return f"there is no command {word!r}{hint}; diffsight --help lists the commands"


def unknown_arguments(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """Return the error message for arguments that a command does not have."""
    message = f"unrecognized arguments: {' '.join(words)}"
    known = option_names(parser)
    if not words[0].startswith("-"):
        if "--out" in known and Path(words[0]).suffix.lower() in (*IMAGES, HTML):
            return f"{message}. A file to write is named with --out {words[0]}"
        return f"{message}. A text of several words needs quotes"
    option, _, value = words[0].partition("=")
    value = value or next(iter(words[1:2]), "VALUE")
    option, name = option.replace("_", "-"), option.strip("-").replace("-", "_")
    if _OTHER_OPTIONS.get(option) in known:
        return f"{message}. Write {_OTHER_OPTIONS[option]} {value}"
    if option in ("-n", "--num-images") and "--seeds" in known:
        return f"{message}. Several images have a seed each: --seeds 0:{value}"
    if option in _OF_OTHERS:
        return message
    if near := get_close_matches(option, known, n=1, cutoff=0.8):
        return f"{message} (did you mean {near[0]}?)"
    if option.startswith("--") and "--set" in known:
        return f"{message}. An argument of the pipeline is written --set {name}={value}"
    if option.startswith("--") and "NAME=VALUE" in parser.format_usage():
        setting = f"num_inference_steps={value}" if name == "steps" else f"{name}={value}"
        return f"{message}. An argument of the pipeline is written {setting}"
    return message
