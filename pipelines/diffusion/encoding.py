"""Encode one prompt with the text encoders of a pipeline, and record what they do.

    encoding = encode_prompt(model, "a red circle")["text_encoder"]
    encoding.hidden(4)                      # the output of layers[4] for the prompt, (tokens, features)
    encoding.hidden("embedding")            # the input of the first layer
    encoding.ids, encoding.words            # (tokens,), and each token as text
    encoding.pooled                         # {"pooler_output": (features,)}

    record = record_encoding(model, "a red circle", {"guidance_scale": 5.0})
    record.encoders["text_encoder"].prompt  # the call that encodes the prompt, an `EncoderCall`
    record.tensors["encode_prompt[0]"]      # where its outputs end up
    record.tensors["unet.encoder_hidden_states"]

The pipeline runs up to the first call of its denoiser and is stopped there.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from diffusers import ModularPipeline
from PIL import Image
from torch import nn

from diffsight.errors import DiffsightError, InputError
from diffsight.extending import Model, model_of, open_run, owner_of, unwrapped
from diffsight.pipelines.diffusion.call_arguments import call_defaults, required_inputs
from diffsight.pipelines.diffusion.components import components, execution_device, text_encoder_names, traceable_methods
from diffsight.pipelines.diffusion.encoder_calls import EncoderRecord, follow_encoder, follow_tokens
from diffsight.pipelines.diffusion.prompts import PromptWarning, as_read, text_tokenizer
from diffsight.pipelines.diffusion.run import DiffusionRun, progress_bar
from diffsight.pipelines.standard_names import EMBEDDING, Layer

PLAIN_PROMPT = "a red circle above a blue square"


@dataclass(frozen=True)
class PromptEncoding:
    """The encoding of a prompt by one text encoder.

    Attributes:
        encoder: The name of the encoder.
        prompt: The prompt.
        ids: The token ids of the prompt, `(tokens,)`.
        words: Each token as text.
        hidden_states: The input of the first layer, then the output of each layer, `(tokens, features)`, numbered as in
            transformers. `hidden` takes layer numbers.
        normed: The output of the final norm for the last layer, or None.
        pooled: The pooled vectors that the encoder returns, `(features,)`, by name.
    """

    encoder: str
    prompt: str
    ids: torch.Tensor
    words: tuple[str, ...]
    hidden_states: tuple[torch.Tensor, ...] = field(repr=False)
    normed: torch.Tensor | None = field(repr=False)
    pooled: Mapping[str, torch.Tensor] = field(repr=False)

    def hidden(self, layer: Layer) -> torch.Tensor:
        """Return the output of `layers[layer]`, or for "embedding" the input of the first layer.

        The shape is `(tokens, features)`. Raises InputError if there is no such layer."""
        outputs = self.hidden_states[1:]
        if layer == EMBEDDING:
            return self.hidden_states[0]
        if isinstance(layer, bool) or not isinstance(layer, int) or not -len(outputs) <= layer < len(outputs):
            raise InputError(
                f"{self.encoder} has no layer {layer!r}: it has {len(outputs)} layers (0 to {len(outputs) - 1}) "
                'and "embedding"'
            )
        return outputs[layer]


@dataclass(eq=False)
class EncodingRecord:
    """A record of a pipeline up to the first call of its denoiser.

    Attributes:
        encoders: The calls of the text encoders, by name.
        tensors: The output of `encode_prompt` and the inputs of other components, by path.
    """

    encoders: dict[str, EncoderRecord] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def encode_prompt(model: Model, prompt: str, **arguments: Any) -> dict[str, PromptEncoding]:
    """Return the encoding of `prompt` by every text encoder of `model`, by the encoder's name.

    Args:
        model: A `DiffusionModel`. It runs up to its denoiser.
        prompt: The prompt.
        arguments: Other arguments of the pipeline.

    Raises:
        InputError: The prompt is not a single string, or is too long for every tokenizer.
    """
    if not isinstance(prompt, str):
        raise InputError(
            f"encode_prompt takes one prompt, a string, not {prompt!r}. For several prompts, write "
            "[encode_prompt(model, prompt) for prompt in prompts]"
        )
    return encodings_in(model, prompt, record_encoding(model, prompt, arguments))


def encodings_in(model: Model, prompt: str, record: EncodingRecord) -> dict[str, PromptEncoding]:
    """Return the encodings of a prompt in a record, by the encoder's name."""
    encodings = {}
    for name, encoder in record.encoders.items():
        call = encoder.prompt
        row, last = call.rows[0], call.hidden(-1)
        normed = next((out[row] for into, out in call.norms if is_same(into, last)), None)
        encodings[name] = PromptEncoding(
            name,
            prompt,
            call.ids[row],
            _words(model, encoder, call.ids[row]),
            tuple(state[row] for state in call.hidden_states),
            normed,
            {key: vectors[row] for key, vectors in call.pooled.items()},
        )
    return encodings


def record_encoding(
    model: Model, prompt: str | Sequence[str] | None, arguments: Mapping[str, Any], seed: int | None = None
) -> EncodingRecord:
    """Run `model` up to its denoiser and return a record of its text encoders.

    Args:
        model: A `DiffusionModel`.
        prompt: The prompt, or several. None stands for a plain prompt and the other inputs that the pipeline needs.
        arguments: Other arguments of the pipeline.
        seed: The seed of the run.
    """
    record = EncodingRecord()
    pipeline, gpus = model.pipeline, range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    with warnings.catch_warnings(), torch.random.fork_rng(gpus), progress_bar(pipeline, disable=True):
        warnings.simplefilter("ignore", PromptWarning)
        if prompt is None:
            _record_plain_prompt(model, record)
        else:
            run = model.generate(prompt=prompt, seed=seed, **arguments)
            try:
                _record_run(run, pipeline, record)
            except (AttributeError, TypeError, ValueError) as error:
                if isinstance(error, DiffsightError):
                    raise
                given = ", ".join(f"{name}={value!r}" for name, value in arguments.items()) or "its defaults"
                raise InputError(f"{type(pipeline).__name__} cannot be called with {given}: {error}") from error
    encoders = record.encoders.items()
    record.encoders = {name: encoder for name, encoder in encoders if encoder.calls and encoder.prompt.returned}
    return record


def record_tokens(run: DiffusionRun) -> dict[str, EncoderRecord]:
    """Record the tokens of every text encoder in a run that has not begun; return the records by the encoder's name.

    They are filled while the run encodes its prompt, and hold no hidden states."""
    pipeline, tokenized = model_of(run).pipeline, []
    _follow_tokenizers(run, pipeline, tokenized)
    return {name: follow_tokens(run, name, tokenized) for name in text_encoder_names(pipeline)}


def cut_off(model: Model, encoder: EncoderRecord, prompt: str, number: int = 0) -> str | None:
    """Return the end of the prompt that the encoder's tokenizer cuts off, as text, or None if it cuts nothing.

    `number` is the index of the prompt in the record, if there are several prompts."""
    if encoder.tokenizer is None:
        return None
    tokenizer = text_tokenizer(getattr(model.pipeline, encoder.tokenizer))
    ids = encoder.prompt.ids[encoder.prompt.rows[number]].tolist()
    (prompt,) = as_read(model.pipeline, [prompt], tokenizer)
    texts = dict.fromkeys((prompt, prompt.lower().strip()))  # some pipelines clean the prompt
    contents = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    if any(ids[at : at + len(content)] == content for content in contents for at in range(len(ids))):
        return None
    # If the prompt was cut, the ids end with its first tokens, followed by at most two special tokens.
    # A few tokens may match by chance.
    special, enough = set(tokenizer.all_special_ids), min(8, len(ids) // 2)
    for content in contents:
        for end in (len(ids), len(ids) - 1, len(ids) - 2):
            for taken in range(min(len(content), end), enough - 1, -1):
                if ids[end - taken : end] == content[:taken] and special.issuperset(ids[end:]):
                    return tokenizer.decode(content[taken:])
    return None


def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors have the same shape and the same values."""
    return a.shape == b.shape and torch.equal(a, b)


def _words(model: Model, encoder: EncoderRecord, ids: torch.Tensor) -> tuple[str, ...]:
    """Return each token as text."""
    if encoder.tokenizer is None:
        return ()
    tokenizer = text_tokenizer(getattr(model.pipeline, encoder.tokenizer))
    return tuple(tokenizer.decode([i]) for i in ids.tolist())


# ---- the recorded run


def _record_plain_prompt(model: Model, record: EncodingRecord) -> None:
    pipeline = model.pipeline
    if not text_encoder_names(pipeline):
        return
    try:
        _record_run(model.generate(prompt=PLAIN_PROMPT, **required_arguments(pipeline)), pipeline, record)
    except Exception as error:  # it needs more than a prompt: record only encode_prompt
        record.__dict__.update(vars(EncodingRecord()))
        try:
            _record_run(_open_encode_prompt(model), pipeline, record)
        except Exception:
            name = type(pipeline).__name__
            raise InputError(
                f"{name} cannot be called with a prompt and its defaults alone ({error}). Pass what it needs, as in "
                'find_encoders(model, "a red circle", height=64)'
            ) from error


def _open_encode_prompt(model: Model) -> DiffusionRun:
    """Open a run of the pipeline's `encode_prompt`."""
    encode = model.pipeline.encode_prompt
    parameters = inspect.signature(encode).parameters.values()
    required = {p.name: None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    required |= {name: 1 for name in required if name.startswith("num_")}
    known = {"prompt": PLAIN_PROMPT, "device": execution_device(model.pipeline), "do_classifier_free_guidance": False}
    given = required | {p.name: known[p.name] for p in parameters if p.name in known}
    return open_run(model, lambda: torch.no_grad()(model.pipeline.encode_prompt)(**given))


def required_arguments(pipeline: Any) -> dict[str, Any]:
    """Return stand-ins for the images that a pipeline requires, and turn off its preference for certain image sizes.

    The mask is white: nothing of the image is kept."""
    known: dict[str, Any] = dict.fromkeys(("image", "control_image"), Image.new("RGB", (64, 64), "gray"))
    known |= {"mask_image": Image.new("RGB", (64, 64), "white"), "use_resolution_binning": False}
    names = required_inputs(pipeline) if isinstance(pipeline, ModularPipeline) else call_defaults(pipeline)
    return {name: value for name, value in known.items() if name in names}


def images_beside_prompt(pipeline: Any) -> dict[str, Any]:
    """Return stand-ins for the images that a pipeline requires, unless it encodes them together with the prompt."""
    if any(name.startswith("image") for name in inspect.signature(pipeline.encode_prompt).parameters):
        return {}
    return {name: value for name, value in required_arguments(pipeline).items() if isinstance(value, Image.Image)}


def _record_run(run: DiffusionRun, pipeline: Any, record: EncodingRecord) -> None:
    """Run up to the first call of the denoiser, and record the calls on the way."""
    with run:
        _follow_components(run, pipeline, record)
        for step in run.steps:
            denoiser = run[step.component]
            _add_arguments(record, step.component, owner_of(denoiser), denoiser.inputs)
            run.stop()
            break


def _follow_components(run: DiffusionRun, pipeline: Any, record: EncodingRecord) -> None:
    tokenized: list[tuple[str, list | None]] = []
    names = text_encoder_names(pipeline)
    for name in names:
        record.encoders[name] = follow_encoder(run, name, tokenized)
    _follow_tokenizers(run, pipeline, tokenized)
    for name, part in components(pipeline).items():
        if isinstance(part, nn.Module) and name not in names and not _tokenizes(name):
            run.follow(f"{name}.inputs", partial(_add_arguments, record, name, part))
    for name in traceable_methods(pipeline, pipeline):
        run.follow(f"{name}.output", partial(_add_returned, record, name, count()))


def _follow_tokenizers(run: DiffusionRun, pipeline: Any, tokenized: list[tuple[str, list | None]]) -> None:
    for name in filter(_tokenizes, components(pipeline)):
        run.follow(f"{name}.output", partial(_add_ids, tokenized, name))


def _tokenizes(name: str) -> bool:
    return "tokenizer" in name or name == "processor"


def _add_ids(tokenized: list[tuple[str, list | None]], name: str, output: Any) -> None:
    tokenized.append((name, _listed_ids(output)))


def _listed_ids(output: Any) -> list | None:
    """Return the token ids that a tokenizer returned, as lists."""
    ids = output.get("input_ids") if isinstance(output, Mapping) else output
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    return [ids] if isinstance(ids, list) and ids and isinstance(ids[0], int) else ids


# ---- where the outputs of the encoders end up


def _add(record: EncodingRecord, found: dict[str, torch.Tensor]) -> None:
    for path, tensor in found.items():
        record.tensors.setdefault(path, tensor.detach().clone())


def _add_returned(record: EncodingRecord, name: str, calls: Iterator[int], output: Any) -> None:
    call = next(calls)
    name = f"{name}.calls[{call}]" if call else name
    _add(record, _tensors(name, list(output) if isinstance(output, tuple) else output))


def _add_arguments(record: EncodingRecord, name: str, module: nn.Module, inputs: tuple) -> None:
    args, kwargs = inputs
    given = dict(zip(inspect.signature(unwrapped(module).forward).parameters, args)) | kwargs
    for argument, value in given.items():
        _add(record, _tensors(f"{name}.{argument}", value))


def _tensors(path: str, value: Any) -> dict[str, torch.Tensor]:
    """Return the floating-point tensors in a value, by path."""
    if isinstance(value, torch.Tensor):
        return {path: value} if value.is_floating_point() and value.ndim else {}
    items = enumerate(value) if isinstance(value, (list, tuple)) else ()
    if isinstance(value, Mapping):
        items = value.items()
    found: dict[str, torch.Tensor] = {}
    for key, inner in items:
        found |= _tensors(f"{path}[{key!r}]", inner)
    return found
