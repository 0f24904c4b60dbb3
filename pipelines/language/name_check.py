"""Verify the standard names found in a model, by following values through a forward pass of a copy of it.

Every tensor is associated with the names of the parts that it was computed from. The output of a named part is
associated with that name only. The inputs of a part then show where they come from. Each layer must receive the output
of the layer before it, and the final norm the output of the last layer. The head must receive the output of the norm
and nothing that bypasses the norm. The logits must come from the head alone.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffsight.errors import InputError, warn_user
from diffsight.extending import structural_copy, without_global_hooks
from diffsight.pipelines.language.unembedding import HiddenLayout
from diffsight.pipelines.module_spans import module_at
from diffsight.pipelines.standard_names import layer_names

_SMALL = 150e6  # numbers in parameters and buffers
_READS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class NamesWarning(UserWarning):
    """The names found in a model could not be verified."""


@dataclass
class Structure:
    """The structure of a model, as a check found it.

    Attributes:
        tuples: The size of the tuple that each layer returns, 0 for a tensor.
        layout: The layout of the hidden states that layers return, or None if they have no token dimension.
        has_cycles: Whether a layer is called several times in a pass, so that it has several outputs.
        has_plain_tail: Whether there is nothing but the final norm and the head between the last layer and the logits.
        has_bypass: Whether anything else than the output of the last layer reaches the final norm (without one, the
            head), or layers of another list run in between.
    """

    tuples: list[int] = field(default_factory=list)
    layout: HiddenLayout | None = field(default_factory=HiddenLayout)
    has_cycles: bool = False
    has_plain_tail: bool = True
    has_bypass: bool = False


class Provenance(TorchDispatchMode):
    """Tracks, for every tensor, the names of the parts that it was computed from.

    Args:
        may_read_values: Whether the model may read the values of tensors. If not, an operation that depends on them is
            an error. On the meta device PyTorch raises one itself."""

    def __init__(self, may_read_values: bool) -> None:
        super().__init__()
        self._refused = set() if may_read_values else _READS_VALUES
        self._names: dict[int, frozenset[str]] = {}
        self._kept: list[torch.Tensor] = []  # so that no storage is freed and its address reused

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        is_index = func is torch.ops.aten.index.Tensor and not any(_is_mask(index) for index in args[1])
        if not (is_index or self._refused.isdisjoint(func.tags)):
            raise RuntimeError(f"{func} depends on the values of tensors, which mean nothing here")
        output = func(*args, **(kwargs or {}))
        found = self.of((args, kwargs))
        for tensor in _tensors(output):
            key = tensor.untyped_storage()._cdata
            self._kept.append(tensor)
            self._names[key] = self._names.get(key, frozenset()) | found
        for tensor in _tensors(args) if func._schema.is_mutable else ():
            key = tensor.untyped_storage()._cdata
            if tensor is args[0]:
                self._names[key] = self._names.get(key, frozenset()) | found
        return output

    def of(self, value: Any) -> frozenset[str]:
        """Return the names of the parts that the tensors in `value` come from."""
        keys = (tensor.untyped_storage()._cdata for tensor in _tensors(value))
        return frozenset().union(*(self._names.get(key, frozenset()) for key in keys))

    def name(self, value: Any, name: str, alone: bool = True) -> None:
        """Associate the tensors in `value` with the part `name`, and with no other if `alone`."""
        for tensor in _tensors(value):
            self._kept.append(tensor)
            before = frozenset() if alone else self.of(tensor)
            self._names[tensor.untyped_storage()._cdata] = before | {name}


class _UnreadTensors(TorchFunctionMode):
    """Raises an error where values become numbers of Python or NumPy, which no dispatch mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy):
            raise RuntimeError(f"{func} reads the values of tensors, which mean nothing here")
        return func(*args, **(kwargs or {}))


def check_names(
    model: nn.Module,
    names: Mapping[str, str],
    inputs: Mapping[str, torch.Tensor],
    parts: Callable[[nn.Module], Mapping[str, str]] = layer_names,
) -> Structure | None:
    """Verify standard names with a forward pass of a copy of the model. Warn if no pass succeeds.

    The copy has no weights, unless what the model does depends on the values of tensors.

    Args:
        model: The model. It is not called.
        names: Its standard names, as returned by `model_names`.
        inputs: The inputs of the pass.
        parts: A function that returns the standard names in a layer.

    Returns:
        The structure of the model, or None if the pass needs the weights and they are not loaded yet.

    Raises:
        InputError: A name refers to the wrong part. The message says which, and how to name the right one.
    """
    trace = None
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), without_global_hooks():
            is_small = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())) <= _SMALL
            for device in ("cpu", "meta") if is_small else ("meta",):
                zeros = {name: torch.zeros_like(ids, device=device) for name, ids in inputs.items()}
                try:
                    trace = _NameTrace(_without_weights(model, device), names, parts)
                    trace.run(zeros, may_read_values=device == "meta")
                    break
                except _Wrong:
                    if device == "meta":
                        raise
                except Exception:  # control flow that depends on data, such as choosing experts, needs real tensors
                    continue
            else:
                if any(parameter.is_meta for parameter in model.parameters()):
                    return None
                trace = _NameTrace(structural_copy(model, with_weights=True), names, parts)
                trace.run(inputs, may_read_values=True)
    except _Wrong as wrong:
        raise InputError(_explained(model, names, parts, *wrong.args)) from None
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        warn_user(
            f"the names found in {type(model).__name__} could not be verified, because a forward pass over three "
            f"tokens fails: {type(error).__name__}: {reason}",
            NamesWarning,
        )
    return trace.structure if trace is not None else Structure()


class _Wrong(Exception):
    """A name is wrong. The arguments are the name and the reason."""


class _NameTrace:
    """Follows the named parts of a model through a forward pass. The model is a copy that cannot be used afterwards."""

    def __init__(self, model: nn.Module, names: Mapping[str, str], parts: Callable) -> None:
        for module in model.modules():
            module.training = False  # some models leave out random layers in training; `eval()` may change weights
        self.model, self.names, self.parts = model, names, parts
        self.layers = _separate(model.get_submodule(names["layers"])) if "layers" in names else []
        self.structure = Structure([0] * len(self.layers))
        self.has_several_streams = False  # the layers return several hidden states, each with a name
        self.watch_parts()

    def run(self, inputs: Mapping[str, torch.Tensor], may_read_values: bool) -> None:
        self.seen: set[str] = set()
        self.into_norm: frozenset[str] = frozenset()
        self.passed: dict[tuple[str, str], _Passed] = {}  # the inputs and outputs of parts
        self.shape = inputs.get("decoder_input_ids", inputs["input_ids"]).shape
        with Provenance(may_read_values) as self.origin, nullcontext() if may_read_values else _UnreadTensors():
            self.finish(self.model(**inputs))

    def watch_parts(self) -> None:
        names = self.names
        if "embed_tokens" in names:
            self.watch("embed_tokens", self.model, names["embed_tokens"])
        for index, layer in enumerate(self.layers):
            for part, real in self.parts(layer).items():
                self.watch(f"layers[{index}].{part}", layer, real)
            self.watch(f"layers[{index}]", self.model, f"{names['layers']}.{index}", self.enter_layer, self.leave_layer)
        if "ln_final" in names:
            self.watch("ln_final", self.model, names["ln_final"], self.enter_norm)
        if "lm_head" in names:
            self.watch("lm_head", self.model, names["lm_head"], self.enter_head)
        inside = set(self.layers).union(*(layer.modules() for layer in self.layers))
        for module in self.model.modules():
            for layer in module if isinstance(module, nn.ModuleList) else ():
                if layer not in inside and "self_attn" in layer_names(layer):
                    layer.register_forward_pre_hook(self.enter_other_layer)

    def watch(
        self, name: str, outer: nn.Module, real: str, enter: Callable | None = None, leave: Callable | None = None
    ) -> None:
        first, last = module_at(outer, real)

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.passed[name, "in"] = _Passed.of(_hidden(args, kwargs))
            if enter is not None:
                enter(name, self.origin.of(_hidden(args, kwargs)))

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            if leave is not None:
                leave(name, output)
            self.passed[name, "out"] = _Passed.of(_first(output))
            self.seen.add(name)
            self.origin.name(output, name, alone="." not in name)  # a part of a layer may also return the residual

        first.register_forward_pre_hook(before, with_kwargs=True)
        last.register_forward_hook(after)

    # ---- checks

    def enter_layer(self, name: str, origin: frozenset[str]) -> None:
        self.structure.has_cycles |= name in self.seen
        index = int(name[len("layers[") : -1])
        before = f"layers[{index - 1}]"
        if index and before not in origin:
            raise _Wrong("layers", f"{name} does not receive the output of {before}")
        if index and origin != {before}:
            past = sorted(origin - {before})[-1]
            raise _Wrong("layers", f"{past} reaches {name} without passing through {before}")

    def leave_layer(self, name: str, output: Any) -> None:
        index = int(name[len("layers[") : -1])
        self.structure.tuples[index] = len(output) if isinstance(output, (tuple, list)) else 0
        self.has_several_streams |= hasattr(output, "_fields")
        if not isinstance(_first(output), torch.Tensor):
            raise _Wrong(
                "layers",
                f"the output of {name} does not begin with a tensor, but with a {type(_first(output)).__name__}",
            )
        origin = self.origin.of(_first(output))
        for part in self.parts(self.layers[index]):
            inner = f"{name}.{part}"
            if inner in self.seen and inner not in origin:
                raise _Wrong(inner, f"the output of {inner} does not reach the output of {name}")

    def enter_other_layer(self, *_: Any) -> None:
        is_after = f"layers[{len(self.layers) - 1}]" in self.seen
        self.structure.has_bypass |= is_after and "lm_head" not in self.seen

    def enter_norm(self, name: str, origin: frozenset[str]) -> None:
        self.into_norm = origin  # in the last call: some models normalize the embeddings with the same module

    def enter_head(self, name: str, origin: frozenset[str]) -> None:
        last = f"layers[{len(self.layers) - 1}]"
        self.into_norm = self.into_norm if "ln_final" in self.names else origin
        if "ln_final" in self.names and self.layers and last not in self.into_norm:
            raise _Wrong("ln_final", f"it does not receive the output of {last}")
        before = "ln_final" if "ln_final" in self.names else f"layers[{len(self.layers) - 1}]"
        if (self.layers or before == "ln_final") and before not in origin:
            raise _Wrong("lm_head", f"it does not receive the output of {before}")
        past = sorted(o for o in origin if o.startswith("layers[")) if before == "ln_final" else []
        if past:
            raise _Wrong("ln_final", f"{past[-1]} reaches lm_head without passing through it")

    def finish(self, output: Any) -> None:
        missing = [f"layers[{i}]" for i in range(len(self.layers)) if f"layers[{i}]" not in self.seen]
        missing += [
            name for name in ("ln_final", "lm_head", "embed_tokens") if name in self.names and name not in self.seen
        ]
        if missing:
            raise _Wrong(missing[0].split("[")[0], f"the model does not call {missing[0]}")
        logits = output.get("logits") if isinstance(output, Mapping) else None
        self.look_at_tail(logits)
        if "lm_head" in self.names and isinstance(logits, torch.Tensor):
            origin = self.origin.of(logits)
            past = sorted(origin & (self.seen - {"lm_head"}))
            if "lm_head" not in origin:
                raise _Wrong("lm_head", "the logits do not come from it")
            if past:
                raise _Wrong("lm_head", f"{past[-1]} reaches the logits without passing through it")

    def look_at_tail(self, logits: Any) -> None:
        """Check whether the final norm receives exactly the output of the last layer, and the head exactly the
        output of the norm."""
        if not self.layers or not isinstance(logits, torch.Tensor):
            return
        last = f"layers[{len(self.layers) - 1}]"
        parts = [last, *(name for name in ("ln_final", "lm_head") if name in self.names)]
        into = [self.passed[part, "in"] for part in parts[1:]] + [_Passed.of(logits)]
        is_module = ":" not in self.names.get("lm_head", "")  # anything may happen between the modules of a span
        passes_on = all(self.passed[a, "out"].is_same(b) for a, b in zip(parts, into))
        self.structure.has_plain_tail = is_module and passes_on
        self.structure.has_bypass |= bool(self.into_norm - {last})
        hidden = self.passed[last, "out"].tensor
        self.structure.layout = None if self.has_several_streams else HiddenLayout.of(hidden.shape, *self.shape)


@dataclass(frozen=True)
class _Passed:
    """A tensor and its version at the time when it passed, since it may be changed in place afterwards."""

    tensor: Any
    version: int

    @classmethod
    def of(cls, value: Any) -> "_Passed":
        return cls(value, value._version if isinstance(value, torch.Tensor) else 0)

    def is_same(self, later: "_Passed") -> bool:
        a, b = self.tensor, later.tensor
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            return False
        places = [(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()) for t in (a, b)]
        return places[0] == places[1] and self.version == later.version


def _explained(model: nn.Module, names: Mapping[str, str], parts: Callable, name: str, reason: str) -> str:
    real, part = names.get(name), name
    if real is None:  # in a layer: layers[3].mlp
        layer, _, part = name.partition(".")
        index = int(layer[len("layers[") : -1])
        real = parts(model.get_submodule(names["layers"])[index])[part]
    return (
        f"{type(model).__name__}: {name!r} was taken to be {real!r}, but {reason}. Name it yourself, as in "
        f"LanguageModel(source, names={{{part!r}: 'path.of.the.module'}}), or leave it out with {{{part!r}: None}}"
    )


def _without_weights(model: nn.Module, device: str) -> nn.Module:
    """Return a copy of a model on the meta device; for the CPU, one with weights of zeros.

    With zeros a pass is five times quicker, since many operations on meta tensors are written in Python."""
    empty = structural_copy(model)
    _avoid_reading_values(empty)
    if device == "cpu":
        empty.to_empty(device=device)
        for tensor in (*empty.parameters(), *empty.buffers()):
            tensor.zero_()
    return empty


def _avoid_reading_values(model: nn.Module) -> None:
    """Make a copy of a transformers model avoid reading values where possible.

    Experts are called in a way that does not depend on the number of tokens that each expert gets, and a
    warning that reads the token ids is removed."""
    warns, experts = "warn_if_padding_and_no_attention_mask", "_experts_implementation"
    for module in model.modules():
        if hasattr(module, warns):
            setattr(module, warns, lambda *args, **kwargs: None)
        if hasattr(getattr(module, "config", None), experts):
            setattr(module.config, experts, "batched_mm")


def _separate(layers: nn.ModuleList) -> list[nn.Module]:
    """Copy layers that appear several times in a list, so that each index has its own module. Return the modules."""
    for index, layer in enumerate(layers):
        if any(layer is earlier for earlier in layers[:index]):
            layers[index] = structural_copy(layer, with_weights=True)
    return list(layers)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) and value else value


def _hidden(args: tuple, kwargs: dict) -> Any:
    """Return the hidden states among the arguments of a layer."""
    return args[0] if args else kwargs.get("hidden_states", tuple(kwargs.values())[:1])


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
