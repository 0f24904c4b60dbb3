"""LanguageModel: trace every part of a transformers language model, under names that are the same for all models.

model = LanguageModel("diffsight/smollm2")          # packaged; or a folder, a GGUF file, a hub id, (model, tokenizer)

with model.trace("The Eiffel Tower is in the city of") as run:
    hidden = run.layers[20].output
    run.layers[25].self_attn.output = …
    print(run.next_token_probs.topk(3))

with model.generate("Once upon a time", max_new_tokens=20, do_sample=True, seed=0) as run:
    for step in run.steps:                          # one iteration per generated token
        run.layers_output[5][:, -1] += direction
        print(step.text, end="")
run.text
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils import TransformersKwargs

from diffsight.errors import InputError, PointNotFoundError
from diffsight.extending import (
    FORWARD,
    Model,
    Row,
    Run,
    Selection,
    Target,
    flow_of,
    is_scanning,
    keeping_attribute_errors,
    owner_of,
    part_of,
    run_of,
    unwrapped,
    with_gradients,
)
from diffsight.pipelines.arguments import check_arguments, named_arguments
from diffsight.pipelines.language.accessors import Accessors, LanguageEnvoy
from diffsight.pipelines.language.early_exit import open_call
from diffsight.pipelines.language.generation import (
    GeneratedTokens,
    GenerationRun,
    decoded,
    generation_argument_names,
    inferred_mask,
    one_or_many,
    set_generated,
    setting,
    start_after,
)
from diffsight.pipelines.language.generation_numbers import check_generation_numbers
from diffsight.pipelines.language.inputs import OF_TOKENIZERS, PER_TOKEN, Inputs, prepare_inputs
from diffsight.pipelines.language.language_tree import LanguageTree
from diffsight.pipelines.language.loading import Source, open_language_model
from diffsight.pipelines.language.padding import cannot_ignore_padding, pads_left, reads_left_padded, sees_padding
from diffsight.pipelines.language.value_parts import Logits, NextLogits
from diffsight.pipelines.loading_arguments import UNTRUSTED
from diffsight.pipelines.seeds import check_seed
from diffsight.pipelines.standard_names import embeddings
from diffsight.pipelines.unread_runs import warn_if_unread
from diffsight.remote import ServedModel, is_on_server, put_on_server

_OF_PEFT = "special_peft_forward_args"  # on a model of PEFT: the arguments that it takes out of `**kwargs`
_FOR_ANY_MODEL = {"return_dict", "cache_position", *TransformersKwargs.__annotations__}


class LanguageRow(Row):
    """One input's part of a run."""

    @property
    def tokens(self) -> torch.Tensor | None:
        """The token ids of the input, `(1, tokens)`, with padding."""
        return self._part_of_input(run_of(self).tokens)

    @property
    def mask(self) -> torch.Tensor | None:
        """1 for real tokens of the input and 0 for padding, `(1, tokens)`, or None if the inputs have no mask."""
        return self._part_of_input(run_of(self).mask)

    def _part_of_input(self, inputs: torch.Tensor | None) -> torch.Tensor | None:
        return None if inputs is None else inputs[self.index : self.index + 1]


class LanguageRun(GenerationRun):
    """A run of a language model."""

    _inputs: Inputs | None = None
    _decoded: torch.Tensor | None = None  # the token ids that the decoder of an encoder-decoder model begins with
    _chunk: int | None = None  # how many tokens of the prompt a forward pass reads at most, if it was set
    _cached: int = 0  # how many tokens of the prompt are in a cache, so that no forward pass reads them

    @property
    def rows(self) -> tuple[LanguageRow, ...]:
        """One view per input: `x, y, z = run.rows`."""
        return tuple(LanguageRow(run_of(row), row.index, part_of(row)) for row in super().rows)

    @property
    def tokens(self) -> torch.Tensor | None:
        """The token ids of the inputs, `(rows, tokens)`."""
        inputs = self.model_inputs
        return inputs.tokens if inputs else None

    @property
    def mask(self) -> torch.Tensor | None:
        """1 for real tokens and 0 for padding, `(rows, tokens)`, or None if the inputs have no mask."""
        inputs = self.model_inputs
        return inputs.mask if inputs else None

    @property
    def last_tokens(self) -> torch.Tensor | None:
        """The position of the last real token of each row, `(rows,)`, or None if no row ends with padding or the model
        is an encoder-decoder model."""
        inputs = self.model_inputs
        return None if inputs is None or owner_of(self._model).config.is_encoder_decoder else inputs.last

    @property
    def model_inputs(self) -> Inputs | None:
        """The prepared inputs of the model: token ids, mask, pixels and so on."""
        return self._pass._inputs

    @property
    def decoder_tokens(self) -> torch.Tensor | None:
        """The token ids that the decoder begins with, `(rows, tokens)`.

        None if the model is not an encoder-decoder model, or derives them from labels."""
        return self._pass._decoded

    def check_one_pass_of_prompt(self, what: str) -> None:
        """Raise InputError if the body stands where `prefill_chunk_size` splits the prompt.

        `what` names something that would be about the first part of the prompt alone."""
        scope, tokens, size = flow_of(self).scope, self.decoder_tokens, self._pass._chunk
        tokens = self.tokens if tokens is None else tokens
        is_prompt = scope.step <= 0 or not scope.in_step
        if size is not None and is_prompt and isinstance(tokens, torch.Tensor) and tokens.shape[-1] > size:
            raise InputError(
                f"{what} needs the prompt in one pass, but with prefill_chunk_size={size} its {tokens.shape[-1]} "
                "tokens are read in several: omit prefill_chunk_size"
            )

    @property
    def cached_tokens(self) -> int:
        """How many tokens at the beginning of the prompt are in a cache, so that the pass where the body stands does
        not read them; 0 after the pass of the prompt."""
        scope = flow_of(self).scope
        return self._pass._cached if scope.step <= 0 or not scope.in_step else 0

    @property
    def logits(self) -> torch.Tensor:
        """The logits that the model returns, `(batch, tokens, vocabulary)`. Assignable.

        After a forward pass, these are the logits in `run.result`."""
        with keeping_attribute_errors(self):
            return Logits().take(self._pass.result, "logits") if self._has_passed else self._root().logits

    @property
    def next_token_probs(self) -> torch.Tensor:
        """The probabilities of the token after the last one, `(batch, vocabulary)`.

        In a row with padding at the end, the last token is the last one that is not padding. After a forward pass,
        the probabilities are computed from `run.result`."""
        with keeping_attribute_errors(self):
            if not self._has_passed:
                return self._root().next_token_probs
            logits = NextLogits(self.last_tokens).take(self._pass.result, "next_token_probs")
            return logits.float().softmax(-1)

    @property
    def text(self) -> str | list[str]:
        """The generated text without the prompt, or a list for several sequences. Runs the model to the end."""
        self._check_one_pass("text")
        with keeping_attribute_errors(self):
            self._check_generates("text")
            stopped = self._flow.outcome is not None and not self._flow.has_result
            if stopped:
                self._check_no_beams("run.text of a run that was stopped")
            stopped = stopped and self._generated.choices
            result = self._generated.choices[-1].ids if stopped else self.result
            ids = result["sequences"] if isinstance(result, Mapping) else result
            return one_or_many([decoded(self._model.tokenizer, row) for row in ids[:, self._start_of_text(ids) :]])

    def _start_of_text(self, ids: torch.Tensor) -> int:
        """The index at which the generated text begins in `ids`. A model may leave out a part of the prompt."""
        if owner_of(self._model).config.is_encoder_decoder:
            return start_after(self._generated.given, ids)
        if self._generated.choices:
            return self._generated.choices[0].start
        return 0 if self.tokens is None else self.tokens.shape[-1]

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(name for name in vars(Accessors) if not name.startswith("_"))})


class LanguageModel(Accessors, Model):
    """Wraps a language model.

    It has the standard names `layers[i]`, `layers[i].self_attn`, `layers[i].mlp`, `ln_final`, `lm_head` and
    `embed_tokens`, whatever the architecture calls these parts. The architecture's own names work as well. The names
    are verified immediately, with a forward pass on the meta device.

    Weights are loaded when they are first needed: by a run, a call or `.to(...)`. Until then the model can be printed,
    browsed and scanned.

    Args:
        source: A packaged name (`diffsight/smollm2`), a folder, a GGUF file, a hub id, a live model, or
            `(model, tokenizer)`.
        tokenizer: A tokenizer, live or by name, that replaces the model's own.
        names: Paths of parts that are not found automatically, or are found in the wrong place:
            `names={"ln_final": "model.norm"}`. The path of a part of a layer starts at the layer. None leaves a name
            out.
        dispatch: Whether to load the weights immediately.
        remote: The address of a server that has the weights, such as "http://127.0.0.1:8000"; True takes it from the
            environment variable DIFFSIGHT_REMOTE. `source` is then the name of the model on the server, and
            runs are sent to the server, see [remote runs](../remote.md).
        api_key: The key for the server. Default: the environment variable DIFFSIGHT_API_KEY.
        arguments: Passed to the model's `from_pretrained`.

    Raises:
        InputError: `source` does not name a model, an argument is unknown, or a standard name is wrong.
        RemoteError: The server cannot be reached, or refuses the request.
    """

    _run_class = LanguageRun

    def __init__(
        self,
        source: Source,
        tokenizer: Any = None,
        *,
        names: Mapping[str, str | None] | None = None,
        dispatch: bool = False,
        remote: str | bool | None = None,
        api_key: str | None = None,
        **arguments: Any,
    ) -> None:
        if remote:
            given = {"tokenizer": tokenizer, "names": names, **arguments}
            self._open_remote(ServedModel.of(self, source, remote, api_key, dispatch, given))
            return
        given = tokenizer
        net, tokenizer, loader = open_language_model(source, tokenizer, **arguments)
        self._wrap(self._make_tree(Target(net, FORWARD, ""), loader, names or {}))
        self.__dict__["tokenizer"] = tokenizer
        self.__dict__["loaded_from"] = loaded_from(source, tokenizer=given, names=names, **arguments)
        self._tree.check_names()
        if dispatch:
            self._tree.weights.load()

    def _open_remote(self, server: ServedModel) -> None:
        with server.configuration() as folder:
            net, tokenizer, _ = open_language_model(folder, weights=False)
            if (folder / "generation_config.json").is_file():  # it determines, for example, what the rows of a run are
                net.generation_config = GenerationConfig.from_pretrained(folder)
        net.config.name_or_path = server.name  # in place of the folder, which no longer exists
        self._wrap(self._make_tree(Target(net, FORWARD, ""), None, server.description["names"]))
        loaded = {"source": server.name, "remote": str(server.address)}
        self.__dict__.update(tokenizer=tokenizer, loaded_from=loaded)
        self._tree.check_names()
        put_on_server(self, server)

    def _make_tree(
        self, root: Target, load: Callable[[], None] | None, names: Mapping[str, str | None]
    ) -> LanguageTree:
        return LanguageTree(root, load, names)

    def trace(self, inputs: Any = None, *, grad: bool = False, **kwargs: Any) -> LanguageRun:
        """Open a run of one forward pass: `with model.trace("The Eiffel Tower is in") as run:`.

        Several inputs form one batch, and `run.rows` are its rows. Shorter inputs are padded, and their results are
        the same as for the input alone. An encoder-decoder model begins a new text unless it is passed
        `decoder_input_ids` or `labels`.

        Args:
            inputs: A string, a list of strings, token ids, a tensor of them, a dictionary from a tokenizer, or chat
                messages.
            grad: Whether gradients are enabled.
            kwargs: Passed to the model's forward pass.
        """
        if inputs is None:  # all that a tokenizer returns may be passed, as in a dictionary
            kwargs = {name: v for name, v in kwargs.items() if name in self.argument_names or name not in OF_TOKENIZERS}
        self._check_trace_arguments(kwargs)
        if inputs is None and not self._has_input(kwargs):
            return self._new_run(_no_input, again=partial(self.trace, grad=grad, **kwargs))
        encoded = self._on_device(self._encode(inputs, kwargs))
        given = encoded.values | ({} if inputs is None else _beside(encoded, kwargs))
        config = self._owner.config
        if config.is_encoder_decoder and not given.keys() & {"decoder_input_ids", "decoder_inputs_embeds", "labels"}:
            given["decoder_input_ids"] = self._first_token(encoded)
        run = self._run_of(encoded, lambda: self._owner(**given), [1] * (encoded.rows or 0), grad)
        run._decoded = given.get("decoder_input_ids")
        return run

    def generate(
        self, inputs: Any = None, *, seed: int | None = None, grad: bool = False, **kwargs: Any
    ) -> LanguageRun:
        """Open a run that generates text. `run.result` is what `generate` returns.

        A step is one token per sequence, from one choice of tokens to the next. In assisted decoding, one forward pass
        may yield several tokens. The pass belongs to the step of the first token, and nothing is computed in the steps
        of the others.

            with model.generate("Once upon a time", max_new_tokens=20) as run:
                ...
            model.generate("Once upon a time", max_new_tokens=20).text

        Args:
            inputs: As for `trace`.
            seed: A random seed for this run alone, so that the text is the same each time. The global random state does
                not change.
            grad: Whether gradients are enabled.
            kwargs: Passed to `generate`: `do_sample=True`, `num_beams=4`, `streamer=...`
        """
        function = getattr(self._owner, "generate", None)
        if function is None or not self._owner.can_generate():
            raise PointNotFoundError(
                f"{type(self._owner).__name__} does not generate; use trace() to run its forward pass"
            )
        kind = type(unwrapped(self._owner))
        is_usual = getattr(kind, "generate", None) is GenerationMixin.generate
        if is_usual:  # another `generate` may take any argument
            near, known, own = {"inputs", "seed", "grad"}, self.generation_argument_names, kwargs.get("custom_generate")
            known = known | named_arguments(own) if callable(own) else known
            if not isinstance(own, str):  # code from the hub may take anything
                check_arguments(f"{kind.__name__}.generate", kwargs, known, near)
                check_generation_numbers(f"{kind.__name__}.generate", kwargs)
        if inputs is None and not self._has_input(kwargs):
            return self._new_run(_no_input, again=partial(self.generate, seed=seed, grad=grad, **kwargs))
        if seed is not None:
            check_seed(seed)
        encoded = self._on_device(self._encode(inputs, kwargs, writes=True))
        left_out = self._left_out_of_generate
        given = {n: v for n, v in encoded.values.items() if n not in left_out or n in kwargs}
        generated = GeneratedTokens(self.tokenizer)
        given |= {} if inputs is None else _beside(encoded, kwargs)
        infers = is_usual and self.takes_argument("attention_mask")
        if infers and encoded.tokens is not None and given.get("attention_mask") is None:
            encoded = encoded.with_mask(inferred_mask(self._owner, encoded.tokens, given))
        given["stopping_criteria"] = generated.along_with(self._owner, given)
        if is_usual and self.tokenizer is not None and setting(self._owner, given, "stop_strings") is not None:
            given.setdefault("tokenizer", self.tokenizer)  # `generate` needs it to find them
        if isinstance(kwargs.get("custom_generate"), str):
            given = UNTRUSTED | given
        function = with_gradients(function) if grad else function
        sizes = [_sequences(self._owner, kwargs)] * (encoded.rows or 0)
        exits_early = setting(self._owner, given, "assistant_early_exit") is not None
        run = self._run_of(encoded, lambda: function(**given), sizes, grad, exits_early)
        set_generated(run, generated, self._target)
        warn_if_unread(run, kwargs)
        run._chunk = setting(self._owner, given, "prefill_chunk_size")
        cache = given.get("past_key_values")
        if hasattr(cache, "get_seq_length") and not self.is_encoder_decoder:  # a decoder reads all of its tokens
            run._cached = int(cache.get_seq_length())
        if is_usual and "custom_generate" not in kwargs:
            most = setting(self._owner, given, "max_new_tokens")
            flow_of(run).clock.count = lambda: most
        flow_of(run).seed = seed
        if self._owner.config.is_encoder_decoder:
            run._decoded = given.get("decoder_input_ids", self._first_token(encoded))
        return run

    def check(self, inputs: Any = None, *, seed: int | None = None, grad: bool = False, **kwargs: Any) -> None:
        """Check the arguments of `trace` or `generate` without opening a run, loading weights or running anything.

        Raises:
            InputError: The arguments are not valid.
        """
        if seed is not None:
            check_seed(seed)
        known = self.argument_names | (self.generation_argument_names if self._generates() else set())
        check_arguments(type(self._owner).__name__, kwargs, known, near={"inputs", "seed", "grad"})
        if inputs is not None or self._has_input(kwargs):
            self._encode(inputs, kwargs)

    # ---- properties that need no weights

    @property
    def vocabulary_size(self) -> int | None:
        """The number of token ids in the word embeddings, or None if there are none."""
        return getattr(embeddings(self._owner), "num_embeddings", None)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model consists of an encoder and a decoder."""
        return bool(self._owner.config.is_encoder_decoder)

    @property
    def label(self) -> str:
        """The class of the model and the name it was loaded from, such as "LlamaForCausalLM (smollm2-0.1.2)"."""
        source = getattr(self._owner.config, "name_or_path", "")
        return type(self._owner).__name__ + (f" ({Path(source).name})" if source else "")

    @cached_property
    def argument_names(self) -> set[str]:
        """The names of the arguments of the forward pass, including the arguments of models inside the model."""
        forward = unwrapped(self._owner).forward
        named = named_arguments(forward).union(getattr(self._owner, _OF_PEFT, ()))
        if all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values()):
            return named
        inner = (module for module in self._owner.modules() if isinstance(module, PreTrainedModel))
        return named.union(_FOR_ANY_MODEL, *(named_arguments(module.forward) for module in inner))

    @cached_property
    def generation_argument_names(self) -> set[str]:
        """The names of the arguments of the model's `generate`, including the arguments of its forward pass."""
        return generation_argument_names(self._owner) | self.argument_names

    def takes_argument(self, name: str) -> bool:
        """Return whether the model's forward pass has an argument, such as "use_cache"."""
        return name in inspect.signature(unwrapped(self._owner).forward).parameters

    def layer_of(self, path: str) -> int | None:
        """Return the number of the layer that a module is in, such as 2 for "layers[2].mlp"; None for no layer."""
        module = owner_of(self[path])
        layers = map(owner_of, self.layers)  # the modules themselves: in an open run, these names lead to envoys
        return next((i for i, layer in enumerate(layers) if any(part is module for part in layer.modules())), None)

    def token_id(self, text: str) -> int:
        """Return the id of a text that is a single token, such as " Paris". Raise InputError if it is not, or if the
        tokenizer does not know it."""
        if self.tokenizer is None:
            raise InputError("the model has no tokenizer: pass one, as in LanguageModel((model, tokenizer))")
        if not isinstance(text, str):
            raise InputError(f"a token is looked up by its text, such as ' Paris', not by {text!r}")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = ", ".join(repr(self.tokenizer.decode([i])) for i in ids)
            raise InputError(f"{text!r} is not one token but {len(ids)}: {pieces or 'none'}")
        unknown = getattr(self.tokenizer, "unk_token", None)
        if unknown is not None and ids[0] == self.tokenizer.unk_token_id and text.strip() != unknown:
            raise InputError(f"{text!r} is not in the vocabulary: the tokenizer replaces it with {unknown!r}")
        return ids[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model itself, with token ids. For a text, use `trace` or `generate`."""
        texts = args[0] if args and isinstance(args[0], (list, tuple)) else args[:1]
        if any(isinstance(text, str) for text in texts):
            raise InputError("calling the model takes token ids: for a text, use model.trace(text).result")
        return super().__call__(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> "LanguageModel":
        """Move or cast the model, as `module.to(...)` does, and return it."""
        self._tree.weights.load()
        self._owner.to(*args, **kwargs)
        return self

    # ---- inputs

    def _generates(self) -> bool:
        return getattr(self._owner, "can_generate", bool)()

    def _check_trace_arguments(self, kwargs: Mapping[str, Any]) -> None:
        unknown = next((name for name in kwargs if name not in self.argument_names), None)
        if unknown is None:
            return
        if self._generates() and unknown in self.generation_argument_names - OF_TOKENIZERS:
            raise InputError(
                f"trace runs one forward pass and does not take {unknown!r}: use model.generate(..., {unknown}=...)"
            )
        check_arguments(type(self._owner).__name__, kwargs, self.argument_names, near={"inputs", "grad"})

    @property
    def _names_of_inputs(self) -> set[str]:
        """The names that a dictionary of inputs may have."""
        return self.argument_names

    _left_out_of_generate = ("position_ids", "token_type_ids")  # computed by `generate`, or not accepted

    def _has_input(self, kwargs: Mapping[str, Any]) -> bool:
        """Return whether the arguments of a forward pass contain token ids, embeddings, or pixels."""
        return not kwargs.keys().isdisjoint({"input_ids", "inputs_embeds", getattr(self._owner, "main_input_name", "")})

    def _encode(self, inputs: Any, kwargs: Mapping[str, Any], writes: bool = False) -> Inputs:
        owner = self._owner
        left = self._pads_left() and (writes or self._reads_left_padded)
        if inputs is None:  # the names of these arguments have been checked
            encoded = prepare_inputs(owner, self.tokenizer, dict(kwargs), left, {*kwargs})
        else:
            known = self._names_of_inputs | (self.generation_argument_names if writes else set())
            encoded = prepare_inputs(owner, self.tokenizer, inputs, left, known, kwargs, writes)
        if left and isinstance(inputs, (list, tuple)) and encoded.is_padded and self._sees_padding:
            raise cannot_ignore_padding(owner)
        return encoded

    def _on_device(self, inputs: Inputs) -> Inputs:
        """Load the weights, and return the inputs on the device of the model."""
        if is_on_server(self):
            return inputs
        if not is_scanning():
            self._tree.weights.load()
        return inputs.to(getattr(self._owner, "device", None))

    def _pads_left(self) -> bool:
        return pads_left(self._owner)

    @cached_property
    def _sees_padding(self) -> bool:
        return sees_padding(self._owner, self._tree.names_of(self._owner).get("layers", ""))

    @cached_property
    def _reads_left_padded(self) -> bool:
        return reads_left_padded(self._owner, self._tree.names_of(self._owner).get("layers", ""))

    def _first_token(self, inputs: Inputs) -> torch.Tensor:
        config = self._owner.config
        names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
        start = next((token for name in names if (token := getattr(config, name, None)) is not None), 0)
        return torch.full((inputs.rows or 1, 1), start, device=inputs.device)

    def _run_of(
        self, inputs: Inputs, function: Callable[[], Any], sizes: list[int], grad: bool, exits_early: bool = False
    ) -> LanguageRun:
        def call() -> Any:
            with open_call(self._owner, exits_early):
                return function()

        run = self._new_run(call, sizes, None, grad)
        run._inputs = inputs
        return run

    def _bound(self, run: Run, part: Selection | None = None) -> LanguageEnvoy:
        return LanguageEnvoy(self._tree, self._target, run, part=part)


def _beside(encoded: Inputs, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments beside an input that are not part of it."""
    return {name: value for name, value in kwargs.items() if name not in PER_TOKEN or name not in encoded.values}


def _sequences(net: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """Return how many sequences are generated for each input."""
    return max(setting(net, kwargs, name) or 1 for name in ("num_beams", "num_return_sequences"))


def _no_input() -> Any:
    raise InputError("the run was opened without input: pass an input, or open passes in it with run.invoke(text)")


def loaded_from(source: Source, **options: Any) -> dict[str, Any] | None:
    """Return the arguments that a model was loaded with, for records; None for a live model."""
    if not isinstance(source, (str, Path)):
        return None
    return {"source": str(source)} | {name: value for name, value in options.items() if value is not None}
