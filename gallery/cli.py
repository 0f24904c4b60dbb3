"""The command line: `diffsight lens`, `diffsight attention`, `diffsight generate`, `diffsight models`.

Libraries that are slow to import are imported by the commands that need them, so that help and bad input are quick.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffsight.errors import DiffsightError, InputError

_MODEL = "diffsight/shapes-clip"
_PROMPT = "a red circle below a blue square on a gray background"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 2 if the input is invalid.

    Args:
        argv: The arguments. Default: those of the process.
    """
    options = _parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no notices about packages that are not needed
    warnings.showwarning = _show_warning
    try:
        options.command(options)
    except (DiffsightError, argparse.ArgumentTypeError) as error:
        print(f"diffsight: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffsight",
        description="Open diffusion pipelines and language models for interpretability research.",
        epilog=f'example: diffsight lens "{_PROMPT}"',
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    lens = commands.add_parser(
        "lens",
        help="draw a prompt from each layer of a text encoder",
        description="The diffusion lens: draw a prompt from each layer of a text encoder. Writes the images, a grid of "
        "them, and a record of all settings.",
        epilog=f'example: diffsight lens "{_PROMPT}" --layers embedding,0:12:3,-1 --seed 1 --out lens',
    )
    _add_common(lens)
    lens.add_argument(
        "--layers",
        type=parse_layers,
        metavar="LAYERS",
        help="layers of the text encoder, separated by commas: a number from 0 (-1 is the last layer), a range such as "
        '0:12:3 (without its end), or "embedding", the input of the first layer. Write --layers=-2,0 if the value '
        "starts with a minus sign (default: the embedding and all layers)",
    )
    lens.add_argument(
        "--encoder", metavar="NAME", help="text encoder (default: the first whose tokens the pipeline uses)"
    )
    lens.add_argument("--batch-size", type=_positive, metavar="N", help="layers to draw in one call (default: all)")
    lens.set_defaults(command=_lens)
    attention = commands.add_parser(
        "attention",
        help="show where in the image each word is attended to",
        description="Draw a prompt, and show where in the image each word is attended to. Writes the image, an overlay "
        "for each word, a grid of them, the maps, and a record of all settings.",
        epilog=f'example: diffsight attention "{_PROMPT}" --words circle "blue square" --out attention',
    )
    _add_common(attention)
    attention.add_argument(
        "--words",
        nargs="+",
        metavar="WORD",
        help="words of the prompt, in quotes where several belong together (default: all words)",
    )
    attention.set_defaults(command=_attention)
    generate = commands.add_parser(
        "generate",
        help="draw a prompt",
        description="Draw a prompt and write the image.",
        epilog=f'example: diffsight generate "{_PROMPT}" --seed 7 --out images',
    )
    _add_common(generate)
    generate.set_defaults(command=_generate)
    models = commands.add_parser("models", help="list the packaged models", epilog="example: diffsight models")
    models.set_defaults(command=_models)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw")
    parser.add_argument("--model", default=_MODEL, help="packaged name, folder or hub id (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="0 or more (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, help="denoising steps (default: the pipeline's own number)")
    parser.add_argument(
        "--out", type=Path, default=Path("diffsight-out"), metavar="DIR", help="folder to write (default: %(default)s)"
    )


def parse_layers(text: str) -> list[int | str | slice]:
    """Parse layers as the command line writes them: `embedding,0:4,-1` becomes `["embedding", slice(0, 4), -1]`."""
    try:
        return [_parse_layer(part.strip()) for part in text.split(",")]
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(
            f'{text!r} does not name layers: write numbers, ranges such as 0:8:2, and "embedding", separated by commas'
        ) from None


def _parse_layer(text: str) -> int | str | slice:
    if text == "embedding":
        return text
    if ":" in text:
        return slice(*(int(part) if part.strip() else None for part in text.split(":")))
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _lens(options: argparse.Namespace) -> None:
    model, arguments = _prepare(options)
    from diffsight.lenses.diffusion_lens import diffusion_lens

    chosen = {"encoder": options.encoder, "layers": options.layers, "batch_size": options.batch_size}
    result = diffusion_lens(model, options.prompt, seed=options.seed, **chosen, **arguments)
    for path in result.save(options.out):
        print(path)


def _attention(options: argparse.Namespace) -> None:
    model, arguments = _prepare(options)
    from diffsight.lenses.attention_maps import attention_maps

    result = attention_maps(model, options.prompt, options.words, seed=options.seed, **arguments)
    for path in result.save(options.out):
        print(path)


def _generate(options: argparse.Namespace) -> None:
    model, arguments = _prepare(options)
    from diffsight.lenses.results.saving import save_files

    image = model.generate(options.prompt, seed=options.seed, **arguments).images[0]
    for path in save_files(options.out, {f"seed_{options.seed}.png": image.save}):
        print(path)


def _models(options: argparse.Namespace) -> None:
    from diffsight.pipelines.language.smollm2 import to_install
    from diffsight.pipelines.packaged import LANGUAGE_MODELS, PIPELINES

    missing = to_install()
    for name, description in PIPELINES.items():
        print(f"{name}  {description}")
    for name, description in LANGUAGE_MODELS.items():
        print(f"{name}  {description}" + (f" (not installed: {missing})" if missing else ""))


def _prepare(options: argparse.Namespace) -> tuple[Any, dict[str, int]]:
    """Return the model and the arguments of the pipeline. Whatever needs no model is checked before it is loaded."""
    if not options.prompt.strip():
        raise InputError(f'the prompt is empty: say what to draw, such as "{_PROMPT}"')
    try:
        options.prompt.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt has a character that is not valid Unicode text") from None
    if options.seed < 0:
        raise InputError(f"a seed is an integer from 0 on, not {options.seed}")
    import diffusers
    import transformers

    from diffsight.lenses.results.saving import check_writable
    from diffsight.pipelines.diffusion.model import DiffusionModel

    check_writable(options.out)
    diffusers.logging.disable_progress_bar()  # that of loading: drawing has its own
    transformers.logging.disable_progress_bar()
    model = DiffusionModel(options.model)
    scheduler = getattr(model.pipeline, "scheduler", None)
    most = scheduler.config.get("num_train_timesteps") if scheduler else None
    if options.steps and most and options.steps > most:
        raise InputError(f"{options.steps} steps are too many: the scheduler has {most}")
    return model, {"num_inference_steps": options.steps} if options.steps else {}


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"diffsight: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
