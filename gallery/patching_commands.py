"""The commands that patch, trace, ablate and steer, such as `diffsight activation-patching` and `causal-tracing`.

Each command first checks everything that can be checked without a model, then loads the model and calls the Python lens
with arguments of the same names. If the lens takes both, the model may be a language model or a pipeline.
"""

import argparse
from collections.abc import Callable
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
    add_seed,
    check_prompt_text,
    device_of,
    print_paths,
)
from diffsight.gallery.model_opening import load_quietly, open_model
from diffsight.gallery.option_parsing import parse_numbers, parse_path, parse_positions, parse_positive, parse_windows


def add_patching_commands(commands: Any) -> None:
    """Add these commands to the command line."""
    _add_activation_patching(commands)
    _add_attribution_patching(commands)
    _add_causal_tracing(commands)
    _add_block_ablation(commands)
    _add_prompt_swap(commands)
    _add_steering_sweep(commands)
    _add_function_vector(commands)


# ---- the options of each command


def _add_activation_patching(commands: Any) -> None:
    patch = add_command(
        commands,
        "activation-patching",
        _activation_patching,
        help="put one run's values into another run",
        description="Activation patching: put the clean prompt's values into the run of the corrupted prompt, one site "
        "at a time, and measure the result. Prints the largest effects, and writes a figure and a page.",
        example='"The capital of France is" "The capital of Italy is" --tokens '
        '" Paris, Rome" --sites heads --out heads',
    )
    _add_pair(patch, "activation_patching")
    patch.add_argument("--batch-size", type=parse_positive, default=32, metavar="N", help="rows in a pass")


def _add_attribution_patching(commands: Any) -> None:
    patch = add_command(
        commands,
        "attribution-patching",
        _attribution_patching,
        help="estimate activation patching from gradients",
        description="Attribution patching: estimate for all sites at once what activation patching would find. Prints "
        "the largest effects, and writes a figure and a page.",
        example='"The capital of France is" "The capital of Italy is" --tokens '
        '" Paris, Rome" --sites heads --out heads',
    )
    _add_pair(patch, "attribution_patching")
    patch.add_argument("--through", choices=("run", "step"), help="what the gradient goes through, in a pipeline")


def _add_pair(parser: argparse.ArgumentParser, lens: str) -> None:
    """Add the options that both kinds of patching share."""
    parser.add_argument("clean", metavar="CLEAN", help="the prompt that values are taken from")
    parser.add_argument("corrupted", metavar="CORRUPTED", help="the prompt that they are put into")
    parser.add_argument(
        "--tokens",
        metavar="TOKENS",
        help="for a language model: the token of the clean prompt, whose probability is measured; or two, "
        '" Paris, Rome", whose logits are subtracted',
    )
    _add_metric(parser)
    parser.add_argument(
        "--sites", metavar="SITES", default="layers", help="layers, heads, mlps … or paths (default: %(default)s)"
    )
    parser.add_argument(
        "--positions",
        type=parse_positions,
        metavar="POSITIONS",
        help="each, words, all, or words and numbers of tokens, separated by commas; of a pipeline also left, right, "
        "top, bottom",
    )
    parser.add_argument("--into", default="corrupted", metavar="RUN", help="corrupted or clean (default: %(default)s)")
    _add_windows(parser)
    add_model(parser, LANGUAGE_MODEL, lens)
    add_layers(parser, "all layers")
    add_drawing(parser, several_seeds=False)


def _add_causal_tracing(commands: Any) -> None:
    trace = add_command(
        commands,
        "causal-tracing",
        _causal_tracing,
        help="hide a subject, and restore one place at a time",
        description="Causal tracing: noise the embeddings of the subject, restore one place at a time, and measure "
        "what comes back. Prints the largest effects, and writes a figure and a page.",
        example=f'"{FACT}" "Eiffel Tower" --answer " Paris" --samples 2',
    )
    trace.add_argument("prompt", metavar="PROMPT", help="the prompt")
    trace.add_argument("subject", metavar="SUBJECT", help="words of the prompt")
    trace.add_argument("--answer", metavar="TOKEN", help="for a language model: the token that is measured")
    _add_metric(trace)
    trace.add_argument(
        "--sites", metavar="SITES", default="layers", help="layers, attentions, mlps, or paths (default: %(default)s)"
    )
    trace.add_argument("--window", type=parse_positive, default=1, metavar="N", help="layers restored together")
    trace.add_argument("--samples", type=parse_positive, default=10, metavar="N", help="noise samples (default: 10)")
    add_model(trace, LANGUAGE_MODEL, "causal_tracing")
    add_layers(trace, "all layers")
    add_drawing(trace, several_seeds=False)


def _add_block_ablation(commands: Any) -> None:
    ablate = add_command(
        commands,
        "block-ablation",
        _block_ablation,
        help="leave parts of a denoiser out, one at a time",
        description="Block ablation: leave one part of the denoiser out at a time, and measure how much the image "
        "changes. Prints the largest effects, and writes a figure and a page.",
        example=f'"{PROMPT}" --sites "unet.**.attn2" --mode zero --at 0:10,10:20',
    )
    ablate.add_argument("prompt", metavar="PROMPT", help="the prompt")
    ablate.add_argument("--sites", metavar="SITES", required=True, help="paths and patterns, separated by commas")
    ablate.add_argument("--mode", choices=("skip", "zero", "mean"), default="skip", help="(default: %(default)s)")
    _add_metric(ablate)
    _add_windows(ablate)
    add_model(ablate, IMAGE_MODEL, "block_ablation")
    add_drawing(ablate, several_seeds=False)


def _add_prompt_swap(commands: Any) -> None:
    swap = add_command(
        commands,
        "prompt-swap",
        _prompt_swap,
        help="let some cross-attention layers read another prompt",
        description="Draw a prompt while a window of cross-attention layers reads another one, and measure each image.",
        example='"a red circle" "a blue circle" --metric "blue circle" --window 3',
    )
    swap.add_argument("prompt", metavar="PROMPT", help="the prompt")
    swap.add_argument("other", metavar="OTHER", help="the prompt that layers of a window read")
    swap.add_argument("--window", type=parse_positive, default=1, metavar="N", help="layers swapped together")
    _add_metric(swap)
    add_model(swap, IMAGE_MODEL, "prompt_swap")
    add_drawing(swap, several_seeds=False)


def _add_steering_sweep(commands: Any) -> None:
    sweep = add_command(
        commands,
        "steering-sweep",
        _steering_sweep,
        help="steer a model towards some prompts, with several strengths",
        description="Find the direction from some prompts to others, and draw or continue a prompt with several "
        "strengths of steering along it.",
        example='"a circle" --positive red.txt --negative other.txt --layers '
        '"unet.**.attn2" --factors 0,5,10 --model diffsight/shapes-clip',
    )
    sweep.add_argument("prompt", metavar="PROMPT", help="what to draw or to continue")
    for side, what in (("positive", "with a concept"), ("negative", "without it")):
        sweep.add_argument(
            f"--{side}", type=parse_path, required=True, metavar="FILE", help=f"prompts {what}, one a line"
        )
    sweep.add_argument("--factors", type=parse_numbers, required=True, metavar="NUMBERS", help="such as 0,5,10")
    sweep.add_argument("--sites", metavar="SITES", help="paths and patterns, separated by commas")
    add_model(sweep, LANGUAGE_MODEL, "steering_sweep")
    add_layers(sweep, "all layers of a language model")
    add_drawing(sweep, several_seeds=False)


def _add_function_vector(commands: Any) -> None:
    vector = add_command(
        commands,
        "function-vector",
        _function_vector,
        help="find the heads that carry a task shown by examples",
        description="Function vectors: find the heads that carry a task, and the vector that they write. Prints the "
        "strongest heads, and writes a figure and a page.",
        example="antonyms.tsv --shots 4 --heads 10 --out antonyms",
    )
    vector.add_argument("pairs", type=parse_path, metavar="FILE", help="a question, a tab and its answer in each line")
    vector.add_argument("--shots", type=parse_positive, default=5, metavar="N", help="examples (default: %(default)s)")
    vector.add_argument("--heads", type=parse_positive, default=10, metavar="N", help="heads (default: %(default)s)")
    add_seed(vector)
    add_model(vector, LANGUAGE_MODEL, "function_vector")


def _add_metric(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metric",
        metavar="METRIC",
        help='for a pipeline: latents, pixels, or what the reader of the shapes pipelines should see, such as "red '
        'circle" (default: pixels)',
    )


def _add_windows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--at",
        type=parse_windows,
        metavar="STEPS",
        help="each, or steps and ranges of steps that belong together, such as 0:10,10:20 (default: all together)",
    )


# ---- the function of each command


def _activation_patching(options: argparse.Namespace) -> None:
    from diffsight.lenses import activation_patching

    _patch(options, activation_patching, batch_size=options.batch_size)


def _attribution_patching(options: argparse.Namespace) -> None:
    from diffsight.lenses import attribution_patching

    _patch(options, attribution_patching, **({} if options.through is None else {"through": options.through}))


def _patch(options: argparse.Namespace, lens: Callable, **more: Any) -> None:
    """Call a lens on a clean and a corrupted prompt."""
    if options.tokens and len(options.tokens.split(",")) > 2:
        raise InputError(f"--tokens takes one token or two, not {len(options.tokens.split(','))}")
    if options.tokens and options.metric:
        raise InputError("--tokens is for language models and --metric for pipelines: pass one of them")
    for prompt in (options.clean, options.corrupted):
        check_prompt_text(prompt, FACT)
    model, arguments = _opened(options)
    given = {"layers": options.layers, "positions": options.positions, "steps": options.at}
    arguments |= {name: value for name, value in given.items() if value is not None}
    metric = _metric(options, model, tokens=True)
    result = lens(
        model,
        options.clean,
        options.corrupted,
        metric,
        sites=options.sites.split(","),
        into=options.into,
        **more,
        **arguments,
    )
    _show(result, options)


def _causal_tracing(options: argparse.Namespace) -> None:
    from diffsight.lenses import causal_tracing
    from diffsight.pipelines.language.model import LanguageModel

    check_prompt_text(options.prompt, FACT)
    model, arguments = _opened(options)
    given = {"layers": options.layers, "answer": options.answer, "sites": options.sites, "window": options.window}
    arguments |= {name: value for name, value in given.items() if value is not None}
    if isinstance(model, LanguageModel):
        if options.metric:
            raise InputError("--metric is for pipelines: a language model is measured by --answer")
        arguments["seed"] = options.seed
    else:
        arguments |= {"metric": _metric(options, model), "sites": options.sites.split(",")}
    _show(causal_tracing(model, options.prompt, options.subject, samples=options.samples, **arguments), options)


def _block_ablation(options: argparse.Namespace) -> None:
    from diffsight.lenses import block_ablation

    check_prompt_text(options.prompt, PROMPT)
    model, arguments = _opened(options)
    chosen = {"sites": options.sites.split(","), "mode": options.mode, "steps": options.at}
    _show(block_ablation(model, options.prompt, _metric(options, model), **chosen, **arguments), options)


def _prompt_swap(options: argparse.Namespace) -> None:
    from diffsight.lenses import prompt_swap

    for prompt in (options.prompt, options.other):
        check_prompt_text(prompt, PROMPT)
    model, arguments = _opened(options)
    result = prompt_swap(
        model, options.prompt, options.other, _metric(options, model), window=options.window, **arguments
    )
    print_paths(result.save(options.out))


def _steering_sweep(options: argparse.Namespace) -> None:
    from diffsight.gallery.prompt_files import read_prompts
    from diffsight.lenses import steering_sweep, steering_vector

    check_prompt_text(options.prompt, PROMPT)
    if options.sites and options.layers:
        raise InputError("--sites are paths and --layers are numbers: pass one of them")
    sides = [read_prompts(path) for path in (options.positive, options.negative)]
    model, arguments = _opened(options)
    layers = options.sites.split(",") if options.sites else options.layers
    reading = {name: value for name, value in arguments.items() if name in (*model.argument_names, "seed")}
    vector = steering_vector(model, *sides, layers=layers, **reading)
    arguments |= {"vector": vector, "factors": options.factors, "seed": options.seed}
    result = steering_sweep(model, options.prompt, **arguments)
    print_paths(result.save(options.out))


def _function_vector(options: argparse.Namespace) -> None:
    from diffsight.gallery.prompt_files import read_pairs
    from diffsight.lenses import function_vector

    pairs = read_pairs(options.pairs)
    options.steps, options.settings = None, []
    model, _ = _opened(options)
    result = function_vector(model, pairs, shots=options.shots, heads=options.heads, seed=options.seed)
    for (layer, head), effect in result.top(options.heads):
        print(f"{effect:8.3f}  layer {layer} head {head}")
    print_paths(result.save(options.out))


def _opened(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the model and the arguments of its runs. Options that need no model are checked before loading it."""
    from diffsight.lenses.results.saved_results import check_place
    from diffsight.pipelines.diffusion.model import DiffusionModel

    check_place(options.out, options.lens)
    device = device_of(options)
    load_quietly()
    model, arguments = open_model(options.model), dict(options.settings)
    if device:
        model.to(device)
    if isinstance(model, DiffusionModel):
        arguments |= {"seed": options.seed} | ({"num_inference_steps": options.steps} if options.steps else {})
    elif options.steps:
        raise InputError("--steps are denoising steps, which a language model does not have")
    return model, arguments


def _metric(options: argparse.Namespace, model: Any, tokens: bool = False) -> Any:
    """Return the metric specified by the options."""
    from diffsight.lenses import latent_distance, logit_difference, pixel_distance, shapes_verdict, token_probability
    from diffsight.pipelines.diffusion.model import DiffusionModel

    if isinstance(model, DiffusionModel):
        if tokens and options.tokens:
            raise InputError("--tokens is for language models: pass --metric for a pipeline")
        known = {None: pixel_distance, "pixels": pixel_distance, "latents": latent_distance}
        return known[options.metric]() if options.metric in known else shapes_verdict(options.metric)
    if not (tokens and options.tokens):
        raise InputError('pass --tokens for a language model, such as --tokens " Paris, Rome"')
    words = options.tokens.split(",")
    return logit_difference(*words) if len(words) == 2 else token_probability(*words)


def _show(result: Any, options: argparse.Namespace) -> None:
    """Print the largest effects, write the result and print the paths."""
    for site, column, effect in result.top():
        print(f"{effect:8.3f}  {site}  {column}")
    print_paths(result.save(options.out))
