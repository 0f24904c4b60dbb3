"""The commands that work on results and models: `diffsight gallery`, `repeat`, `check` and `explore`.

Libraries that are slow to import are imported by the commands themselves.
"""

import argparse
import time
from typing import Any

from diffsight.gallery.command_options import LANGUAGE_MODEL, add_command, add_saved
from diffsight.gallery.option_parsing import parse_path, parse_positive, parse_setting

_SECONDS = 2.0  # between two searches for new results


def add_commands(commands: Any) -> None:
    """Add these commands to the command line."""
    gallery = add_command(
        commands,
        "gallery",
        _gallery,
        help="show all results in a folder on one page",
        description="Write an index of all results in a folder, with filters, a contact sheet and comparisons.",
        example="diffsight-out",
    )
    add_saved(gallery, "folder", "a folder with results, in folders of any depth")
    gallery.add_argument("--watch", action="store_true", help="keep running, and add results as they are saved")
    repeat = add_command(
        commands,
        "repeat",
        _repeat,
        help="make a result again from its record, and compare",
        description="Make a result again from its record, and say whether it is identical or how far off it is. "
        "The exit status is 0 if it is identical, and 1 if it is not.",
        example="diffsight-out/lens",
    )
    add_saved(repeat, "record", "the record, or the folder of the result")
    check = add_command(
        commands,
        "check",
        _check,
        help="verify that diffsight works with a model",
        description="Compare runs of a model with the bare model, and print a table. The exit status is 0 if nothing "
        "failed, and 1 if something did.",
        example="diffsight/shapes-clip num_inference_steps=2",
    )
    check.add_argument("source", metavar="SOURCE", help="packaged name, folder, hub id or GGUF file")
    check.add_argument(
        "arguments", nargs="*", default=[], type=parse_setting, metavar="NAME=VALUE", help="arguments of the pipeline"
    )
    check.add_argument("--out", type=parse_path, metavar="FILE", help="write the table as JSON as well")
    explore = add_command(
        commands,
        "explore",
        _explore,
        help="open the lenses in a browser",
        description="Serve an app with the lenses for a browser, until it is interrupted. Needs the extra `app`.",
        example="--model diffsight/shapes-flux --port 8000",
    )
    explore.add_argument("--model", help="a pipeline to choose besides the packaged ones: a folder or hub id")
    explore.add_argument("--language-model", default=LANGUAGE_MODEL, help="language model (default: %(default)s)")
    explore.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; others than the default can be reached from outside"
    )
    explore.add_argument("--port", type=parse_positive, default=7860, help="port to listen on (default: %(default)s)")


def _explore(options: argparse.Namespace) -> int:
    from diffsight.gallery.explorer.explore import explore

    explore(options.model, options.language_model, host=options.host, port=options.port)
    return 0


def _gallery(options: argparse.Namespace) -> int:
    from diffsight.gallery.gallery_index import write_gallery

    print(write_gallery(options.folder), flush=True)
    try:
        while options.watch:
            time.sleep(_SECONDS)
            write_gallery(options.folder)
    except KeyboardInterrupt:
        pass
    return 0


def _repeat(options: argparse.Namespace) -> int:
    from diffsight.gallery.repeating import repeat

    repetition = repeat(options.record)
    print(repetition)
    return 0 if repetition.is_identical else 1


def _check(options: argparse.Namespace) -> int:
    from diffsight.gallery.checking import check_model
    from diffsight.lenses.results.saving import check_file

    if options.out:
        check_file(options.out)
    check = check_model(options.source, **dict(options.arguments))
    print(check)
    if options.out:
        print(check.save(options.out))
    return 0 if check.is_ok else 1
