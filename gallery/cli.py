"""The command line: `diffsight lens`, `diffsight generate`, `diffsight models`."""

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
    """Runs one command; gives the exit status: 0, or 2 where the input is bad."""
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
        description="Opens up diffusion pipelines.",
        epilog=f'example: diffsight lens "{_PROMPT}"',
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    lens = commands.add_parser(
        "lens",
        help="draw a prompt from each layer of the text encoder",
        description="The diffusion lens: draws a prompt from each layer of the text encoder, and writes the pictures, "
        "a grid of them and a record of all settings.",
        epilog=f'example: diffsight lens "{_PROMPT}" --layers 0:13:3 --seed 1 --out lens',
    )
    _add_common(lens)
    lens.add_argument(
        "--layers",
        type=parse_layers,
        metavar="0:8:2|1,3,7",
        help="layers from 0, the embedding: a range with its end left out, or a list (default: all)",
    )
    lens.add_argument(
        "--encoder", metavar="NAME", help="text encoder (default: the first whose tokens the pipeline takes)"
    )
    lens.add_argument("--batch-size", type=_positive, metavar="N", help="layers drawn in one call (default: all)")
    lens.set_defaults(command=_lens)
    generate = commands.add_parser(
        "generate",
        help="draw a prompt",
        description="Draws a prompt and writes the picture.",
        epilog=f'example: diffsight generate "{_PROMPT}" --seed 7 --out pictures',
    )
    _add_common(generate)
    generate.set_defaults(command=_generate)
    models = commands.add_parser("models", help="list the packaged models", epilog="example: diffsight models")
    models.set_defaults(command=_models)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw")
    parser.add_argument("--model", default=_MODEL, help="packaged name, folder or hub id (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="from 0 on (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, help="denoising steps (default: the pipeline's own)")
    parser.add_argument("--out", type=Path, default=Path("diffsight-out"), metavar="DIR", help="(default: %(default)s)")


def parse_layers(text: str) -> slice | list[int]:
    """`0:8:2` as a slice, `1,3,7` as a list."""
    try:
        if ":" in text:
            return slice(*(int(part) if part.strip() else None for part in text.split(":")))
        return [int(part) for part in text.split(",")]
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(f"{text!r} are no layers: write 0:8:2 or 1,3,7") from None


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _lens(options: argparse.Namespace) -> None:
    model, arguments = _prepare(options)
    from diffsight.lenses.diffusion_lens import diffusion_lens

    chosen = {"encoder": options.encoder, "layers": options.layers, "batch_size": options.batch_size}
    result = diffusion_lens(model, options.prompt, seed=options.seed, **chosen, **arguments)
    for path in result.save(options.out):
        print(path)


def _generate(options: argparse.Namespace) -> None:
    model, arguments = _prepare(options)
    from diffsight.lenses.results.saving import save_files

    image = model.generate(options.prompt, seed=options.seed, **arguments).images[0]
    for path in save_files(options.out, {f"seed_{options.seed}.png": image.save}):
        print(path)


def _models(options: argparse.Namespace) -> None:
    from diffsight.pipelines.diffusion.loading import DESCRIPTIONS
    from diffsight.pipelines.language.smollm2 import PACKAGED, to_install

    missing = to_install()
    for name, description in DESCRIPTIONS.items():
        print(f"{name}  {description}")
    for name, description in PACKAGED.items():
        print(f"{name}  {description}" + (f" (not installed: {missing})" if missing else ""))


def _prepare(options: argparse.Namespace) -> tuple[Any, dict[str, int]]:
    """The model and the pipeline's arguments; whatever can be wrong without the model is found before it is loaded."""
    if not options.prompt.strip():
        raise InputError(f'the prompt is empty: say what to draw, such as "{_PROMPT}"')
    if options.seed < 0:
        raise InputError(f"a seed is a whole number from 0 on, not {options.seed}")
    import diffusers
    import transformers

    from diffsight.lenses.results.saving import check_writable
    from diffsight.pipelines.diffusion.model import DiffusionModel

    check_writable(options.out)
    diffusers.logging.disable_progress_bar()  # those of loading; what is drawn has one
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
