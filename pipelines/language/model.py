"""LanguageModel: a language model of transformers, every part of it traceable, under the same names on all of them.

model = LanguageModel("diffsight/smollm2")          # packaged; or a folder, a GGUF file, a hub id, (model, tokenizer)

with model.trace("The Eiffel Tower is in the city of") as run:
    hidden = run.layers[20].output
    run.layers[25].self_attn.output = …
    print(run.next_token_probs.topk(3))

with model.generate("Once upon a time", max_new_tokens=20, do_sample=True, seed=0) as run:
    for step in run.steps:                          # one turn per generated token
        run.layers_output[5][:, -1] += direction
        print(step.text, end="")
run.text
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from diffsight.errors import InputError, PointNotFoundError, suggest
from diffsight.extending import (
    FORWARD,
    Model,
    Run,
    Selection,
    Target,
    flow_of,
    is_scanning,
    keeping_attribute_errors,
    owner_of,
    with_gradients,
)
from diffsight.pipelines.diffusion.seeds import check_seed
from diffsight.pipelines.language.accessors import Accessors, LanguageEnvoy
from diffsight.pipelines.language.generation import Chosen, WritingRun, decoded, one_or_many
from diffsight.pipelines.language.inputs import Inputs, encode, picks_tokens, sees_padding
from diffsight.pipelines.language.loading import Source, open_language_model
from diffsight.pipelines.language.name_check import Structure, check_names
from diffsight.pipelines.language.named import NamedTree
from diffsight.pipelines.language.spans import module_at
from diffsight.pipelines.language.standard_names import (
    are_layers,
    embeddings,
    is_list,
    layer_names,
    model_names,
    standard_names,
)


class LanguageRun(WritingRun):
    """A run of a language model."""

    _inputs: Inputs | None = None
    _decoded: torch.Tensor | None = None  # the token ids that a decoder behind an encoder begins with

    @property
    def tokens(self) -> torch.Tensor | None:
        """The token ids of the inputs, (rows, tokens)."""
        inputs = self._pass._inputs
        return inputs.tokens if inputs else None

    @property
    def mask(self) -> torch.Tensor | None:
        """1 for real tokens, 0 for padding, (rows, tokens); None where the inputs have none."""
        inputs = self._pass._inputs
        return inputs.mask if inputs else None

    @property
    def decoder_tokens(self) -> torch.Tensor | None:
        """The token ids that the decoder begins with, (rows, tokens); None without an encoder before it, or where they
        are made of labels."""
        return self._pass._decoded

    @property
    def text(self) -> str | list[str]:
        """The text that was generated, without the prompt; of several sequences a list. Runs the model to its end."""
        self._check_one_pass("text")
        with keeping_attribute_errors(self):
            self._check_generates("text")
            stopped = self._flow.outcome is not None and not self._flow.has_result and self._chosen.steps
            result = self._chosen.steps[-1] if stopped else self.result
            ids = result["sequences"] if isinstance(result, Mapping) else result
            has_prompt = self.tokens is not None and not owner_of(self._model).config.is_encoder_decoder
            start = self.tokens.shape[-1] if has_prompt else 0
            return one_or_many([decoded(self._model.tokenizer, row) for row in ids[:, start:]])

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(name for name in vars(Accessors) if not name.startswith("_"))})


class LanguageModel(Accessors, Model):
    """Wraps a language model: `source` is a packaged name (`diffsight/smollm2`), a folder, a GGUF file, a hub id, a
    live model, or `(model, tokenizer)`. `arguments` go to the model's `from_pretrained`.

    Weights are loaded when they are first needed: by a run, a call, `.to(...)`; with `dispatch=True` at once. Until
    then the model is there without them: it can be printed, looked through and scanned.

    It answers to the standard names `layers[i]`, `layers[i].self_attn`, `layers[i].mlp`, `ln_final`, `lm_head` and
    `embed_tokens`, whatever the architecture calls them; its own names work as well. `names` says where a part is that
    is not found, or found wrongly: `names={"ln_final": "model.norm"}`, for the parts of a layer the path within it,
    None to leave a name out. What was found is checked at once, by a forward pass on fake tensors.

    Raises InputError where `source` names no model, and where a name turns out to be wrong."""

    _run_class = LanguageRun

    def __init__(
        self,
        source: Source,
        tokenizer: Any = None,
        *,
        names: Mapping[str, str | None] | None = None,
        dispatch: bool = False,
        **arguments: Any,
    ) -> None:
        net, tokenizer, loader = open_language_model(source, tokenizer, **arguments)
        self._wrap(self._make_tree(Target(net, FORWARD, ""), loader, names or {}))
        self.__dict__["tokenizer"] = tokenizer
        self._tree.check_names()
        if dispatch:
            self._tree.weights.load()

    def _make_tree(
        self, root: Target, load: Callable[[], None] | None, names: Mapping[str, str | None]
    ) -> "LanguageTree":
        return LanguageTree(root, load, names)

    def trace(self, inputs: Any = None, *, grad: bool = False, **kwargs: Any) -> LanguageRun:
        """A run of one forward pass: `with model.trace("The Eiffel Tower is in") as run:`.

        `inputs` are a text, a list of texts, token ids, a tensor of them, a dictionary (as tokenizers give it), or chat
        messages; `kwargs` go to the model's forward pass. Several inputs are one batch, and `run.rows` are its parts:
        shorter ones are padded, and computed as they would be alone. A model with an encoder and a decoder starts to
        write unless `decoder_input_ids` or `labels` are given."""
        if inputs is None and not self._has_input(kwargs):
            return self._new_run(_no_input, again=partial(self.trace, grad=grad, **kwargs))
        encoded = self._on_device(self._encode(inputs, kwargs))
        given = encoded.values | (kwargs if inputs is not None else {})
        config = self._owner.config
        if config.is_encoder_decoder and not given.keys() & {"decoder_input_ids", "decoder_inputs_embeds", "labels"}:
            given["decoder_input_ids"] = self._first_token(encoded)
        run = self._run_of(encoded, lambda: self._owner(**given), [1] * (encoded.rows or 0), grad)
        run._decoded = given.get("decoder_input_ids")
        return run

    def generate(
        self, inputs: Any = None, *, seed: int | None = None, grad: bool = False, **kwargs: Any
    ) -> LanguageRun:
        """A run in which the model writes: `with model.generate("Once upon a time", max_new_tokens=20) as run:`, or
        right away `model.generate(...).text`. A step is one token.

        `inputs` are those of `trace`; `kwargs` go to transformers' `generate` (`do_sample=True`, `num_beams=4`,
        `streamer=...`), and `run.result` is what it returns. With `seed`, the model draws from a random stream of its
        own: the same text each time, and the global random state is left as it is."""
        function = getattr(self._owner, "generate", None)
        if function is None or not self._owner.can_generate():
            raise PointNotFoundError(f"{type(self._owner).__name__} does not generate; trace() runs its forward pass")
        if inputs is None and not self._has_input(kwargs):
            return self._new_run(_no_input, again=partial(self.generate, seed=seed, grad=grad, **kwargs))
        if seed is not None:
            check_seed(seed)
        encoded = self._on_device(self._encode(inputs, kwargs, writes=True))
        left_out = self._left_out_of_generate
        given = {n: v for n, v in encoded.values.items() if n not in left_out or n in kwargs}
        if "attention_mask" not in given and encoded.tokens is not None:
            given["attention_mask"] = torch.ones_like(encoded.tokens)
        chosen = Chosen(self.tokenizer)
        given |= kwargs if inputs is not None else {}
        given["stopping_criteria"] = chosen.along_with(kwargs.get("stopping_criteria"))
        function = with_gradients(function) if grad else function
        sizes = [_sequences(self._owner, kwargs)] * (encoded.rows or 0)
        run = self._run_of(encoded, lambda: function(**given), sizes, grad)
        run._chosen = chosen
        flow_of(run).seed = seed
        if self._owner.config.is_encoder_decoder:
            run._decoded = given.get("decoder_input_ids", self._first_token(encoded))
        return run

    def check(self, inputs: Any = None, *, seed: int | None = None, grad: bool = False, **kwargs: Any) -> None:
        """Check the arguments of `trace` or `generate` without opening a run, loading weights or running anything.

        Raises InputError if they cannot be used."""
        if seed is not None:
            check_seed(seed)
        if inputs is not None or self._has_input(kwargs):
            self._encode(inputs, kwargs)

    def token_id(self, text: str) -> int:
        """The id of a text that is one token, such as " Paris". Raises InputError where it is not one."""
        if self.tokenizer is None:
            raise InputError("the model has no tokenizer: LanguageModel((model, tokenizer))")
        if not isinstance(text, str):
            raise InputError(f"a token is looked up by its text, such as ' Paris', not by {text!r}")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = ", ".join(repr(self.tokenizer.decode([i])) for i in ids)
            raise InputError(f"{text!r} is not one token but {len(ids)}: {pieces or 'none'}")
        return ids[0]

    def to(self, *args: Any, **kwargs: Any) -> "LanguageModel":
        """Moves or casts the model, as `module.to(...)` does; gives the model."""
        self._tree.weights.load()
        self._owner.to(*args, **kwargs)
        return self

    # ---- inputs and texts

    _left_out_of_generate = ("position_ids", "token_type_ids")  # which `generate` sees to itself, or cannot take

    def _has_input(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the arguments of a forward pass hold what the model reads: token ids, embeddings, or pixels."""
        return not kwargs.keys().isdisjoint({"input_ids", "inputs_embeds", getattr(self._owner, "main_input_name", "")})

    def _encode(self, inputs: Any, kwargs: Mapping[str, Any], writes: bool = False) -> Inputs:
        owner = self._owner
        left = self._pads_left() and (writes or self._reads_left_padded)
        encoded = encode(owner, self.tokenizer, dict(kwargs) if inputs is None else inputs, left)
        if left and isinstance(inputs, (list, tuple)) and encoded.is_padded and self._sees_padding:
            raise InputError(
                f"{type(owner).__name__} cannot leave padding out, so it does not write to texts of several lengths at "
                "once: take [model.generate(text) for text in texts]"
            )
        return encoded

    def _on_device(self, inputs: Inputs) -> Inputs:
        """The inputs on the device of the model, whose weights are loaded for that."""
        if not is_scanning():
            self._tree.weights.load()
        return inputs.to(getattr(self._owner, "device", None))

    def _pads_left(self) -> bool:
        """Whether shorter inputs are padded on the left: where the model goes on writing."""
        owner = self._owner
        return not owner.config.is_encoder_decoder and getattr(owner, "can_generate", lambda: False)()

    @cached_property
    def _sees_padding(self) -> bool:
        return sees_padding(self._owner, self._tree.names_of(self._owner).get("layers", ""))

    @cached_property
    def _reads_left_padded(self) -> bool:
        return not (self._sees_padding or picks_tokens(self._owner))

    def _first_token(self, inputs: Inputs) -> torch.Tensor:
        config = self._owner.config
        names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
        start = next((token for name in names if (token := getattr(config, name, None)) is not None), 0)
        return torch.full((inputs.rows or 1, 1), start, device=inputs.device)

    def _run_of(self, inputs: Inputs, function: Callable[[], Any], sizes: list[int], grad: bool) -> LanguageRun:
        run = self._new_run(function, sizes, None, grad)
        run._inputs = inputs
        return run

    def _bound(self, run: Run, part: Selection | None = None) -> LanguageEnvoy:
        return LanguageEnvoy(self._tree, self._target, run, part=part)


class LanguageTree(NamedTree):
    """What can be tapped in a language model, and the standard names of its parts.

    `stacks` are its lists of layers. `structure` is what the check of the names has seen; None until it was made."""

    def __init__(self, root: Target, load: Callable[[], None] | None, given: Mapping[str, str | None]) -> None:
        super().__init__(root, load)
        net = root.owner
        self._given = _checked(net, given)
        found = model_names(net) | {name: path for name, path in self._given.items() if name in _OF_MODEL}
        found = {name: path for name, path in found.items() if path is not None}
        self.stacks = [module for module in net.modules() if is_list(module) and are_layers(module)]
        self.stacks += [net.get_submodule(found["layers"])] if "layers" in found else []
        self.known_names[net] = found
        self._checks: list[Structure] = []  # shared by edited copies of the model

    @property
    def structure(self) -> Structure | None:
        return self._checks[0] if self._checks else None

    def weights_loaded(self) -> None:
        self.check_names()

    def check_names(self) -> None:
        """Checks the names that were found; again with the weights, where it cannot be done without."""
        net = self.root.owner
        inputs = _trial(net)
        if inputs and not self._checks:
            structure = check_names(net, self.names_of(net), inputs, self.names_of)
            self._checks += [] if structure is None else [structure]

    def find_names(self, part: nn.Module) -> dict[str, str]:
        """Of a layer of any stack of them; of an encoder, or whatever else is a model in the model."""
        if any(part is layer for layers in self.stacks for layer in layers):
            return self._of_layer(part)
        return standard_names(part) if isinstance(part, PreTrainedModel) else {}

    def _of_layer(self, layer: nn.Module) -> dict[str, str]:
        found = layer_names(layer) | {name: path for name, path in self._given.items() if name in _OF_LAYER}
        return {name: path for name, path in found.items() if path is not None and _is_there(layer, path)}

    def describe(self, owner: Any) -> str:
        names = ", ".join(f"{name} = {real}" for name, real in self.names_of(owner).items() if name != real)
        return super().describe(owner) + (f"\nstandard names: {names}" if names else "")


_OF_MODEL = ("layers", "ln_final", "lm_head", "embed_tokens", "encoder", "decoder")
_OF_LAYER = ("self_attn", "mlp")


def _checked(net: nn.Module, names: Mapping[str, str | None]) -> Mapping[str, str | None]:
    """The user's own names, if they can be."""
    for name, path in names.items():
        if name not in _OF_MODEL + _OF_LAYER:
            known = ", ".join(_OF_MODEL + _OF_LAYER)
            raise InputError(
                f"names: {name!r} is no standard name{suggest(name, _OF_MODEL + _OF_LAYER)}; they are {known}"
            )
        if name in _OF_MODEL and path is not None and not _is_there(net, path):
            raise InputError(f"names: {type(net).__name__} has no module {path!r} to be {name!r}")
        if name == "layers" and path is not None and not hasattr(net.get_submodule(path), "__getitem__"):
            raise InputError(f"names: {path!r} is a {type(net.get_submodule(path)).__name__}, no list of layers")
    return names


def _is_there(module: nn.Module, real: str) -> bool:
    try:
        module_at(module, real)
    except AttributeError:
        return False
    return True


def _trial(net: nn.Module) -> dict[str, torch.Tensor]:
    """The inputs of the pass that checks the names: three tokens."""
    parameters = inspect.signature(net.forward).parameters
    words = getattr(embeddings(net), "num_embeddings", None)
    if "input_ids" not in parameters or not words:
        return {}
    rows = getattr(net, "num_codebooks", 1)  # where sound is written, one for each codebook
    ids = torch.arange(2, 5, device=getattr(net, "device", None)).expand(rows, 3) % words
    halves = getattr(net.config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if halves else {})


def _sequences(net: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """How many sequences are written for each input."""
    config = kwargs.get("generation_config") or getattr(net, "generation_config", None)
    counts = (kwargs.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences"))
    return max(count or 1 for count in counts)


def _no_input() -> Any:
    raise InputError("the run was opened without input: give a text, or open passes in it with run.invoke(text)")
