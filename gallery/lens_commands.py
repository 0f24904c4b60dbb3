"""The commands that run a lens, such as `diffsight lens`, `attention` and `logit-lens`, and `diffsight generate`.

Each command first checks everything that can be checked without a model, then loads the model and calls the Python lens
with arguments of the same names. With `--prompts` or `--seeds`, a command makes a study (see `studies.py`).
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from diffsight.errors import InputError
from diffsight.gallery.command_options import (
    FACT,
    IMAGE_MODEL,
    LANGUAGE_MODEL,
    PROMPT,
    add_command,
    add_drawing,
    add_layers,
    add_model,
    add_prompts,
    check_prompt_text,
    device_of,
    print_paths,
)
from diffsight.gallery.model_opening import load_quietly
from diffsight.gallery.option_parsing import parse_path, parse_positive, parse_steps

Make = Callable[[str, int, Path], list[Path]]  # makes a result from a prompt and a seed, and writes it to a folder


def add_lens_commands(commands: Any) -> None:
    """Add these commands to the command line."""
    _add_lens(commands)
    _add_patch(commands)
    _add_attention(commands)
    _add_trajectory(commands)
    _add_fidelity(commands)
    _add_compare(commands)
    _add_logit_lens(commands)
    _add_generate(commands)


# ---- the options of each command


def _add_lens(commands: Any) -> None:
    lens = add_command(
        commands,
        "lens",
        _lens,
        help="draw a prompt from each layer of a text encoder",
        description="The diffusion lens: draw a prompt from each layer of a text encoder. Writes the images, a grid of "
        "them, a page, and a record of all settings.",
        example=f'"{PROMPT}" --layers embedding,0:12:3,-1 --seed 1 --out lens',
    )
    add_prompts(lens, "what to draw")
    add_model(lens, IMAGE_MODEL, "diffusion_lens")
    add_drawing(lens)
    add_layers(lens, "the embedding and all layers")
    _add_encoder(lens)


def _add_patch(commands: Any) -> None:
    patch = add_command(
        commands,
        "patch",
        _patch,
        help="put words of one prompt into the encoding of another",
        description="Cross-encoder patching: draw a target prompt with hidden states of a source prompt put into its "
        "text encoder, an image for each layer and word.",
        example='"a red circle" "a blue circle" --words red --layers 0,5,-1 --out patch',
    )
    patch.add_argument("source", metavar="SOURCE", help="the prompt that hidden states are taken from")
    patch.add_argument("target", metavar="TARGET", help="the prompt that they are put into")
    patch.add_argument(
        "--words", metavar="WORDS", help="words of the source, separated by commas (default: all tokens)"
    )
    patch.add_argument("--into", metavar="WORDS", help="words of the target that they replace (default: same places)")
    add_model(patch, IMAGE_MODEL, "encoder_patching")
    add_drawing(patch, several_seeds=False)
    add_layers(patch, "the embedding and all layers")
    _add_encoder(patch)


def _add_attention(commands: Any) -> None:
    attention = add_command(
        commands,
        "attention",
        _attention,
        help="show where in the image each word is attended to",
        description="Attention maps: draw a prompt, and show where in the image each of its words is attended to. "
        "Writes the image, an overlay for each word, a page, and a record of all settings.",
        example=f'"{PROMPT}" --words circle,square --steps 20 --out attention',
    )
    add_prompts(attention, "what to draw")
    add_model(attention, IMAGE_MODEL, "attention_maps")
    add_drawing(attention)
    attention.add_argument("--words", metavar="WORDS", help="words of the prompt, separated by commas (default: all)")
    attention.add_argument("--keep", choices=("steps", "layers", "heads"), help="also keep maps by step, layer or head")


def _add_trajectory(commands: Any) -> None:
    trajectory = add_command(
        commands,
        "trajectory",
        _trajectory,
        help="draw what the denoiser predicts at each step",
        description="The trajectory lens: draw the image that the denoiser predicts at each step. Writes the images, a "
        "grid of them, a page, and a record of all settings.",
        example=f'"{PROMPT}" --steps 20 --at 0:20:5 --show prediction,guidance',
    )
    add_prompts(trajectory, "what to draw")
    add_model(trajectory, IMAGE_MODEL, "trajectory_lens")
    add_drawing(trajectory)
    trajectory.add_argument(
        "--at", type=parse_steps, metavar="STEPS", help="steps to draw, such as 0,5,-1 or 0:20:5 (default: all)"
    )
    trajectory.add_argument(
        "--show",
        default="noisy,prediction",
        metavar="IMAGES",
        help='what to draw, separated by commas: noisy, prediction, cond, uncond, guidance, "guidance map" '
        "(default: %(default)s)",
    )
    trajectory.add_argument(
        "--batch-size", type=parse_positive, metavar="N", help="images to draw in one call (default: all)"
    )


def _add_fidelity(commands: Any) -> None:
    fidelity = add_command(
        commands,
        "fidelity",
        _fidelity,
        help="measure which parts of a scene each layer knows",
        description="Layer fidelity: draw scenes from each layer of a text encoder and read what is right in them. "
        "Works with pipelines that draw the scenes of diffsight's packaged pipelines.",
        example="--scenes 16 --steps 10 --out fidelity",
    )
    fidelity.add_argument("--scenes", type=parse_positive, default=64, help="number of scenes (default: %(default)s)")
    add_model(fidelity, IMAGE_MODEL, "layer_fidelity")
    add_drawing(fidelity, several_seeds=False)
    add_layers(fidelity, "the embedding and all layers")
    _add_encoder(fidelity)


def _add_compare(commands: Any) -> None:
    compare = add_command(
        commands,
        "compare",
        _compare,
        help="compare the text encoders of one or several pipelines",
        description="Compare text encoders over several prompts: how similar their layers are, which prompts are "
        "near to each other, and how tokens drift.",
        example="--prompts prompts.txt --models diffsight/shapes-clip,diffsight/shapes-t5",
    )
    compare.add_argument("prompt", nargs="*", metavar="PROMPT", help="two prompts or more")
    compare.add_argument(
        "--prompts", type=parse_path, metavar="FILE", help="a file with a prompt in each line, or a table"
    )
    compare.add_argument("--models", metavar="NAMES", help="several models, separated by commas, in place of --model")
    compare.add_argument("--images", type=int, default=1, help="prompts to draw with the lens (default: %(default)s)")
    add_model(compare, "diffsight/shapes-flux", "compare_encoders")
    add_drawing(compare, several_seeds=False)
    add_layers(compare, "the embedding and all layers")


def _add_logit_lens(commands: Any) -> None:
    logits = add_command(
        commands,
        "logit-lens",
        _logit_lens,
        help="show what a language model would predict at each layer",
        description="The logit lens: what a language model would predict if it stopped at each of its layers. Prints a "
        "table, and writes it with a page and a record of all settings.",
        example=f'"{FACT}" --layers=-4: --tokens " Paris"',
    )
    add_prompts(logits, "what to read")
    add_model(logits, LANGUAGE_MODEL, "logit_lens")
    add_layers(logits, "all layers")
    logits.add_argument("--tokens", metavar="TOKENS", help='tokens to follow, separated by commas, such as " Paris"')
    logits.add_argument(
        "--top-k", type=parse_positive, default=5, metavar="N", help="tokens to keep (default: %(default)s)"
    )


def _add_generate(commands: Any) -> None:
    generate = add_command(
        commands,
        "generate",
        _generate,
        help="draw a prompt",
        description="Draw a prompt. Writes the image and a record of all settings.",
        example=f'"{PROMPT}" --seed 7 --out images',
    )
    add_prompts(generate, "what to draw")
    add_model(generate, IMAGE_MODEL, "generate")
    add_drawing(generate)


def _add_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encoder", metavar="NAME", help="text encoder (default: the first whose tokens the pipeline uses)"
    )
    parser.add_argument(
        "--batch-size", type=parse_positive, metavar="N", help="rows to draw in one call (default: all)"
    )


# ---- the function of each command


def _lens(options: argparse.Namespace) -> None:
    def load() -> Make:
        from diffsight.lenses.diffusion_lens import diffusion_lens

        model, arguments = _pipeline(options)
        arguments |= _encoder_options(options)
        return lambda prompt, seed, out: diffusion_lens(model, prompt, seed=seed, **arguments).save(out)

    _one_or_study(options, load, PROMPT)


def _patch(options: argparse.Namespace) -> None:
    for prompt in (options.source, options.target):
        check_prompt_text(prompt, PROMPT)
    model, arguments = _pipeline(options)
    from diffsight.lenses.encoder_patching import encoder_patching

    words = {name: _listed(getattr(options, name)) for name in ("words", "into")}
    arguments |= {**_encoder_options(options), **words, "seed": options.seed}
    print_paths(encoder_patching(model, options.source, options.target, **arguments).save(options.out))


def _attention(options: argparse.Namespace) -> None:
    def load() -> Make:
        from diffsight.lenses.attention_maps import attention_maps

        model, arguments = _pipeline(options)
        arguments |= {"words": _listed(options.words), "keep": options.keep}
        return lambda prompt, seed, out: attention_maps(model, prompt, seed=seed, **arguments).save(out)

    _one_or_study(options, load, PROMPT)


def _trajectory(options: argparse.Namespace) -> None:
    def load() -> Make:
        from diffsight.lenses.trajectory_lens import trajectory_lens

        model, arguments = _pipeline(options)
        arguments |= {"steps": options.at, "show": _listed(options.show), "batch_size": options.batch_size}
        return lambda prompt, seed, out: trajectory_lens(model, prompt, seed=seed, **arguments).save(out)

    _one_or_study(options, load, PROMPT)


def _fidelity(options: argparse.Namespace) -> None:
    model, arguments = _pipeline(options)
    from diffsight.lenses.layer_fidelity import layer_fidelity

    result = layer_fidelity(model, options.scenes, seed=options.seed, **_encoder_options(options), **arguments)
    print(result)
    print_paths(result.save(options.out))


def _compare(options: argparse.Namespace) -> None:
    from diffsight.gallery.prompt_files import read_prompts

    if bool(options.prompt) == (options.prompts is not None):
        raise InputError("pass prompts, or a file with --prompts" + (", not both" if options.prompt else ""))
    prompts = list(dict.fromkeys(options.prompt or read_prompts(options.prompts)))
    for prompt in prompts:
        check_prompt_text(prompt, PROMPT)
    names = _listed(options.models) or [options.model]
    models = {}
    for name in names:
        models[name], arguments = _pipeline(argparse.Namespace(**{**vars(options), "model": name}))
    from diffsight.lenses.compare_encoders import compare_encoders

    result = compare_encoders(
        models, prompts, layers=options.layers, images=options.images, seed=options.seed, **arguments
    )
    print_paths(result.save(options.out))


def _logit_lens(options: argparse.Namespace) -> None:
    options.seeds, options.seed = None, 0

    def load() -> Make:
        from diffsight.lenses.logit_lens import logit_lens
        from diffsight.lenses.results.saved_results import check_place
        from diffsight.pipelines.language.model import LanguageModel

        check_place(options.out, options.lens)
        device = device_of(options)
        load_quietly()
        model = LanguageModel(options.model)
        if device:
            model.to(device)
        chosen = {"layers": options.layers, "tokens": _listed(options.tokens), "top_k": options.top_k}

        def make(prompt: str, seed: int, out: Path) -> list[Path]:
            result = logit_lens(model, prompt, **chosen)
            if options.prompts is None:
                print(result)
            return result.save(out)

        return make

    _one_or_study(options, load, FACT)


def _generate(options: argparse.Namespace) -> None:
    def load() -> Make:
        from diffsight.lenses.results.outputs import image_of
        from diffsight.lenses.results.record import write_record
        from diffsight.lenses.results.saved_results import check_replaces_own
        from diffsight.lenses.results.saving import names_a_file, save_files

        model, arguments = _pipeline(options)

        def make(prompt: str, seed: int, out: Path) -> list[Path]:
            out = out.expanduser()
            names = f"seed_{seed}.json", f"seed_{seed}.png"
            if not names_a_file(out):
                check_replaces_own(out, options.lens, names)
            image = image_of(model.generate(prompt, seed=seed, **arguments).images[0])
            if names_a_file(out):
                return save_files(out.parent, {out.name: image.save})
            record = {"lens": "generate", "model": options.model, "prompt": prompt, "seed": seed}
            record |= {"arguments": arguments, "files": [names[1]]}
            return save_files(out, dict(zip(names, (partial(write_record, record), image.save))))

        return make

    _one_or_study(options, load, PROMPT)


def _one_or_study(options: argparse.Namespace, load: Callable[[], Make], example: str) -> None:
    """Make one result, or a study if there is a file of prompts or more than one seed.

    Args:
        options: The options of the command.
        load: Loads the model, and returns the function that makes a result.
        example: A prompt for error messages.
    """
    if (options.prompt is None) == (options.prompts is None):
        raise InputError("pass a prompt, or a file with --prompts" + (", not both" if options.prompt else ""))
    if options.prompts is None:
        check_prompt_text(options.prompt, example)
    if options.prompts is None and not options.seeds:
        if options.dry_run:
            print(f"1 result in {options.out}")
            return
        print_paths(load()(options.prompt, options.seed, options.out))
        return
    from diffsight.gallery.prompt_files import read_prompts

    prompts = [options.prompt] if options.prompts is None else read_prompts(options.prompts)
    for prompt in prompts:
        check_prompt_text(prompt, example)
    from diffsight.gallery.studies import Study  # slow to import, so the prompts are checked before
    from diffsight.lenses.work_sharing import Processes

    left_out = ("command", "lens", "prompt", "prompts", "seed", "seeds", "out", "dry_run", "device")
    settings = {name: repr(value) for name, value in vars(options).items() if name not in left_out}
    settings["command"] = options.lens
    study = Study(options.out, prompts, options.seeds or [options.seed], settings)
    study.check()
    is_main = Processes().is_main
    if is_main:
        print(study)
    if not options.dry_run:
        page = study.run(load() if study.missing() else None)
        if is_main:
            print(page)


def _pipeline(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the model and the arguments of the pipeline. Options that need no model are checked before loading it."""
    from diffsight.lenses.results.saved_results import check_place
    from diffsight.pipelines.diffusion.model import DiffusionModel

    check_place(options.out, options.lens)
    device = device_of(options)
    load_quietly()
    model = DiffusionModel(options.model)
    if device:
        model.to(device)
    scheduler = getattr(model.pipeline, "scheduler", None)
    most = scheduler.config.get("num_train_timesteps") if scheduler else None
    if options.steps and most and options.steps > most:
        raise InputError(f"{options.steps} steps are too many: the scheduler has {most}")
    return model, {**({"num_inference_steps": options.steps} if options.steps else {}), **dict(options.settings)}


def _encoder_options(options: argparse.Namespace) -> dict[str, Any]:
    return {"encoder": options.encoder, "layers": options.layers, "batch_size": options.batch_size}


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else text.split(",")
