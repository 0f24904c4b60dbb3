"""Reads along while a pipeline encodes its prompt: what each text encoder is given, makes and returns.

    reading = read(model, "a red circle", {"guidance_scale": 5.0})
    call = reading.encoders["text_encoder"].prompt          # the call that encodes the prompt; others: the negative one
    call.states[4][call.rows[0]]                            # what layer 4 gives for it, (tokens, features)
    reading.parts["encode_prompt[0]"]                       # what becomes of it
    reading.parts["unet.encoder_hidden_states"]

The pipeline runs up to the first call of its denoiser, and is stopped there.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_map_only

from diffsight.errors import InputError
from diffsight.extending import INPUTS, OUTPUT, first_input, flow_of, model_of, open_run, owner_of, tree_of
from diffsight.pipelines.diffusion.guidance import COND
from diffsight.pipelines.diffusion.progress import progress_bar
from diffsight.pipelines.diffusion.prompts import PromptWarning
from diffsight.pipelines.language.standard_names import word_embeddings

if TYPE_CHECKING:
    from diffsight.pipelines.diffusion.model import DiffusionModel, DiffusionRun

_PLAIN_PROMPT = "a red circle above a blue square"


@dataclass(eq=False)
class Call:
    """One call of a text encoder. `states[0]` is the embedding and `states[k]` what layer k gives, (rows, tokens,
    features)."""

    ids: torch.Tensor  # (rows, tokens), as the word embedding is given them
    rows: list[int] = field(default_factory=list)  # those that hold the prompt, as far as can be told
    states: list[torch.Tensor] = field(default_factory=list, repr=False)
    returned: list[Any] = field(default_factory=list, repr=False)  # by the layers: tensors, or tuples with them
    norms: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list, repr=False)  # into it, out of it
    output: Any = field(default=None, repr=False)  # of the encoder as a whole
    pooled: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)  # vectors, (rows, features), by name


@dataclass(eq=False)
class EncoderReading:
    """The calls of one text encoder."""

    name: str
    words: str | None = None  # the path of the word embedding
    tokenizer: str | None = None
    calls: list[Call] = field(default_factory=list)

    @property
    def prompt(self) -> Call:
        """The first call that holds the prompt."""
        return next((call for call in self.calls if call.rows), self.calls[0])


@dataclass(eq=False)
class Reading:
    """What the text encoders of a pipeline do, by name; and by path the tensors that `encode_prompt` returned and that
    other components are given, up to the first call of the denoiser."""

    encoders: dict[str, EncoderReading] = field(default_factory=dict)
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


def read(model: "DiffusionModel", prompt: str | None, arguments: Mapping[str, Any], seed: int | None = None) -> Reading:
    """Runs `model` with `prompt` (None: one of our own, with what else the pipeline must be given) up to its denoiser;
    gives what the text encoders did."""
    reading = Reading()
    pipeline, gpus = model.pipeline, range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    with warnings.catch_warnings(), torch.random.fork_rng(gpus), progress_bar(pipeline, disable=True):
        warnings.simplefilter("ignore", PromptWarning)
        if prompt is None:
            _read_plain_prompt(model, reading)
        else:
            _follow(model.generate(prompt=prompt, seed=seed, **arguments), reading)
    encoders = reading.encoders.items()
    reading.encoders = {n: encoder for n, encoder in encoders if encoder.calls and encoder.prompt.returned}
    return reading


def candidates(model: "DiffusionModel") -> list[str]:
    """The components that may encode text: those with layers and a word embedding."""
    parts = {name: part for name, part in tree_of(model).parts().items() if isinstance(part, nn.Module)}
    return [n for n, m in parts.items() if "layers" in tree_of(model).names_of(m) and word_embeddings(m)]


def _read_plain_prompt(model: "DiffusionModel", reading: Reading) -> None:
    if not candidates(model):
        return
    try:
        _follow(model.generate(prompt=_PLAIN_PROMPT, **_needed(model.pipeline)), reading)
    except Exception as error:  # it needs more than a prompt: then what encode_prompt does must be enough
        reading.__dict__.update(vars(Reading()))
        try:
            _follow(_encoding(model), reading)
        except Exception:
            name = type(model.pipeline).__name__
            raise InputError(
                f"{name} cannot be called with a prompt and its defaults alone ({error}). Give what it needs, as in "
                'find_encoders(model, "a red circle", height=64)'
            ) from error


def _encoding(model: "DiffusionModel") -> "DiffusionRun":
    """A run of the pipeline's `encode_prompt`."""
    encode = model.pipeline.encode_prompt
    device = model.pipeline._execution_device
    parameters = inspect.signature(encode).parameters.values()
    needed = {p.name: None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    needed |= {name: 1 for name in needed if name.startswith("num_")}
    known = {"prompt": _PLAIN_PROMPT, "device": device, "do_classifier_free_guidance": False}
    given = needed | {p.name: known[p.name] for p in parameters if p.name in known}
    return open_run(model, lambda: torch.no_grad()(model.pipeline.encode_prompt)(**given))


def _needed(pipeline: Any) -> dict[str, Any]:
    """What stands in for the pictures that a pipeline must be given; and no sizes of pictures that it prefers."""
    known = dict.fromkeys(("image", "mask_image", "control_image"), Image.new("RGB", (64, 64), "gray"))
    known["use_resolution_binning"] = False
    names = inspect.signature(pipeline.__call__).parameters
    return {name: value for name, value in known.items() if name in names}


def _follow(run: "DiffusionRun", reading: Reading) -> None:
    """Lets `run` come to the first call of its denoiser, and writes down what passes on the way."""
    with run:
        _watch(run, reading)
        for step in run.steps:
            _add(reading, _arguments(step.component, owner_of(run[step.component]), run[step.component].inputs))
            run.stop()
            break


# ---- what is watched


def _watch(run: "DiffusionRun", reading: Reading) -> None:
    model, given = model_of(run), []
    names = candidates(model)
    for name in names:
        reading.encoders[name] = _watch_encoder(run, name, given)
    for name, part in tree_of(model).parts().items():
        if "tokenizer" in name or name == "processor":
            _keep(run, name, OUTPUT, lambda output, name=name: given.append((name, _listed_ids(output))))
        elif isinstance(part, nn.Module) and name not in names:
            _keep(run, name, INPUTS, lambda inputs, name=name, part=part: _add(reading, _arguments(name, part, inputs)))
    for name in tree_of(model).methods_of(owner_of(model)):
        count = iter(range(1000))
        _keep(run, name, OUTPUT, lambda output, name=name, c=count: _add(reading, _returned(name, next(c), output)))


def _watch_encoder(run: "DiffusionRun", name: str, given: list[tuple[str, list | None]]) -> EncoderReading:
    module, names = owner_of(model_of(run)[name]), tree_of(run).names_of(owner_of(model_of(run)[name]))
    encoder = EncoderReading(name)
    layouts = flow_of(run).observer

    def begin(inputs: tuple, words: str) -> None:
        ids = first_input(inputs, name)
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.ndim != 2:
            return
        encoder.words = words
        call = Call(ids.detach().clone())
        known = layouts.entries(module, COND) if layouts is not None else None
        call.rows = known if known is not None else [] if encoder.calls else list(range(len(ids)))
        encoder.calls.append(call)
        if encoder.tokenizer is None:
            encoder.tokenizer = next((tokenizer for tokenizer, rows in given if rows == ids.tolist()), None)

    def embedded(inputs: tuple) -> None:
        if encoder.calls:
            encoder.calls[-1].states.append(_own(first_input(inputs, name)))

    def layered(output: Any) -> None:
        if encoder.calls:
            encoder.calls[-1].returned.append(_own(output))
            encoder.calls[-1].states.append(hidden_in(encoder.calls[-1].returned[-1]))

    into: list[torch.Tensor] = []

    def normed(output: torch.Tensor) -> None:
        if encoder.calls:
            encoder.calls[-1].norms.append((into.pop(), _own(output)))

    def end(output: Any) -> None:
        if encoder.calls:
            encoder.calls[-1].output = _own(output)
            encoder.calls[-1].pooled = _vectors(output) | encoder.calls[-1].pooled

    def part_ended(output: Any, child: str) -> None:
        if encoder.calls:
            vectors = [v for v in _vectors(output).values() if len(v) == len(encoder.calls[-1].ids)]
            encoder.calls[-1].pooled |= {child: vectors[0]} if vectors else {}

    for words in word_embeddings(module):
        path = f"{name}.{words}"
        _keep(run, path, INPUTS, lambda inputs, path=path: begin(inputs, path))
    layers = run[name].layers
    _keep(run, f"{name}.{names['layers']}.0", INPUTS, embedded)
    for layer in layers:
        _keep(run, layer.path, OUTPUT, layered)
    if "ln_final" in names:
        _keep(run, f"{name}.ln_final", INPUTS, lambda inputs: into.append(_own(first_input(inputs, name))))
        _keep(run, f"{name}.ln_final", OUTPUT, normed)
    for child, part in module.named_children():
        if type(part).forward is not nn.Module.forward:
            _keep(run, f"{name}.{child}", OUTPUT, lambda output, child=child: part_ended(output, child))
    _keep(run, name, OUTPUT, end)
    return encoder


def _keep(run: "DiffusionRun", path: str, part: str, function: Callable[[Any], None]) -> None:
    """Lets `function` have every value that passes a point."""
    run.follow(f"{path}.{part}", function)


def _own(value: Any) -> Any:
    """A copy, since the model may go on to change its own in place."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), value)


def hidden_in(returned: Any) -> torch.Tensor:
    """The hidden state in what a layer returned."""
    return returned[0] if isinstance(returned, tuple) else returned


def _vectors(output: Any) -> dict[str, torch.Tensor]:
    """What a module returned of one vector a row, by name."""
    if isinstance(output, torch.Tensor):
        output = {"": output}
    named = output if isinstance(output, Mapping) else dict(enumerate(output if isinstance(output, tuple) else ()))
    vectors = {str(n): v for n, v in named.items() if isinstance(v, torch.Tensor) and v.ndim == 2}
    return {n: v.detach().clone() for n, v in vectors.items() if v.is_floating_point()}


def _listed_ids(output: Any) -> list | None:
    """The token ids that a tokenizer gave, as lists."""
    ids = output.get("input_ids") if isinstance(output, Mapping) else output
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    return [ids] if isinstance(ids, list) and ids and isinstance(ids[0], int) else ids


# ---- what becomes of the states


def _add(reading: Reading, found: dict[str, torch.Tensor]) -> None:
    for path, tensor in found.items():
        reading.parts.setdefault(path, tensor.detach().clone())


def _returned(name: str, call: int, output: Any) -> dict[str, torch.Tensor]:
    name = f"{name}.calls[{call}]" if call else name
    return _tensors(name, list(output) if isinstance(output, tuple) else output)


def _arguments(name: str, module: nn.Module, inputs: tuple) -> dict[str, torch.Tensor]:
    args, kwargs = inputs
    given = dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs
    found: dict[str, torch.Tensor] = {}
    for argument, value in given.items():
        found |= _tensors(f"{name}.{argument}", value)
    return found


def _tensors(path: str, value: Any) -> dict[str, torch.Tensor]:
    """The tensors of numbers in a value, by path."""
    if isinstance(value, torch.Tensor):
        return {path: value} if value.is_floating_point() and value.ndim else {}
    items = enumerate(value) if isinstance(value, (list, tuple)) else ()
    if isinstance(value, Mapping):
        items = value.items()
    found: dict[str, torch.Tensor] = {}
    for key, inner in items:
        found |= _tensors(f"{path}[{key!r}]", inner)
    return found
