"""Model: wraps any `nn.Module` so that you can look inside while it runs.

model = Model(net)
with model.trace(x) as run:
    run.encoder.layers[2].output[:, 0] = 0
run.result
"""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Self, overload

import torch
from torch import nn

from diffsight.edits import Edit, Editing, Edits, check_no_edit, start_edit
from diffsight.engine.hooks import FORWARD
from diffsight.engine.model_tree import Tree
from diffsight.engine.run_to_point import Flow
from diffsight.engine.scan import ScanFlow, is_scanning, scanning
from diffsight.engine.target import Target
from diffsight.engine.torch_state import with_gradients
from diffsight.engine.wrapped_modules import unwrapped
from diffsight.envoy import Envoy, owner_of
from diffsight.errors import InputError, PointNotFoundError
from diffsight.recorded_values import find_points
from diffsight.run import Run

_LIST = r"(^|['[|,]\s*)(\w+\.)*([lL]ist|Sequence|Iterable|Collection)\b"  # in the annotation of a list


class Model(Envoy):
    """Wraps a module. Its children are envoys (`model.layers[0]`), and it is an envoy itself (`model.output`).

    Wrapping changes nothing: `model(...)` simply calls the module, and hooks exist only while a run is open.

    Args:
        module: The module.
        methods: Methods that code calls directly instead of `forward`, and that you want to trace as well:
            `Model(vae, methods=["encode", "decoder.up"])`.
    """

    _run_class: type[Run] = Run
    __class__ = property(type)  # a model is no module, unlike its envoys

    def __init__(self, module: nn.Module, methods: Iterable[str] = ()) -> None:
        if not isinstance(module, nn.Module) or isinstance(module, Envoy):
            raise InputError(f"Model wraps a torch.nn.Module, not {type(module).__name__}")
        self._wrap(Tree(Target(module, FORWARD, "")))
        for path in methods:
            outer, _, name = path.rpartition(".")
            self._tree.add_method(owner_of(self[outer]) if outer else module, name, path)

    def _wrap(self, tree: Tree) -> None:
        """Wrap the model that a tree describes. Wrappers call this method instead of `super().__init__`."""
        self.__dict__["_edits"] = Edits(tree.attached)
        tree.look_for_private_names()
        super().__init__(tree, tree.root)

    @property
    def module(self) -> nn.Module:
        """The wrapped module itself. Weights that have not been loaded yet are loaded now."""
        self._tree.load_unless_scanning()
        return self._owner

    # ---- runs

    def trace(self, *args: Any, grad: bool = False, **kwargs: Any) -> Run:
        """Open a run of one forward pass: `with model.trace(x) as run:`.

        Args:
            *args: Arguments of the module. A list of tensors is a batch of inputs, each as you would pass it alone;
                `run.rows` are its parts. Further lists of as many tensors belong to the same inputs:
                `trace([a, b], [mask_a, mask_b])`. If the module itself takes a list, name the argument,
                `trace(views=[a, b])`, unless its annotation says so (`views: list[Tensor]`).
            grad: Whether to enable gradients. Otherwise the model runs in the grad mode in which the run is opened.
            **kwargs: Keyword arguments of the module. Lists are passed on as they are.
        """
        _check_grad(self._owner, grad)
        again = None if args else partial(self.trace, grad=grad, **kwargs)
        if not args and not kwargs and _requires_input(self._owner):
            return self._new_run(_no_input, again=again)
        args, sizes = _batch(self._owner, args, kwargs)
        return self._new_run(lambda: self._owner(*args, **kwargs), sizes, again, grad)

    def generate(self, *args: Any, grad: bool = False, **kwargs: Any) -> Run:
        """Open a run of the module's own `generate(...)`. A step is one forward pass. `grad=True` lifts its `no_grad`.

        Raises PointNotFoundError if the module has no such method."""
        function = self._generating()
        _check_grad(function, grad)
        again = None if args else partial(self.generate, grad=grad, **kwargs)
        args, sizes = _batch(function, args, kwargs)

        def call() -> Any:  # looked up when it is called, since it may be tapped by then
            return (with_gradients(function) if grad else self._owner.generate)(*args, **kwargs)

        return self._new_run(call, sizes, again, grad)

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Check the arguments of `trace` (of `generate` for a pipeline) without opening a run or running anything.

            model.check(prompt, seed=seed, **arguments)     # raises what model.generate would raise

        Raises InputError if they cannot be used."""
        _batch(self._owner, args, kwargs)

    def find_points(self, pattern: str) -> list[str]:
        """Return the paths of the points that a path or a pattern names, in the order of the tree.

            model.find_points("layers[*].mlp")          # ["layers[0].mlp.output", "layers[1].mlp.output", ...]
            model.find_points("unet.**.attn2.input")

        In a pattern, `*` matches any name and `**` any number of names. A path or pattern without `.input`, `.inputs`
        or `.output` at its end means the output.

        Raises PointNotFoundError if there are none."""
        return list(find_points(self, pattern))

    def scan(self, *args: Any, **kwargs: Any) -> Run:
        """Open a run on shapes alone: `with model.scan(x) as run: width = run.layers[2].output.shape[-1]`.

        It takes the same arguments as `trace` (as `generate` for a pipeline). Use it like any other run; it needs no
        weights and computes next to nothing.

        Values inside the model (in a pipeline, inside each of its modules) and what it returns are fake tensors. They
        have a shape, a dtype and a device. The modules of a pipeline return zeros to it, on the same device, so the
        pipeline's images are refused. Integer and boolean inputs stay real. In the body of the `with` statement,
        computing with such values, with weights or with other tensors returns fake tensors as well. Caches and
        random generators among the arguments stay as they are, since the model gets copies.

        Raises ScanError where the values themselves are needed: `.item()`, `if tensor:`, a boolean mask."""
        return scanning(getattr(self, self._tree.opens_with), *args, **kwargs)

    def _generating(self) -> Callable[..., Any]:
        function = getattr(self._owner, "generate", None)
        if function is None:
            raise PointNotFoundError(
                f"{type(self._owner).__name__} has no generate method; use trace() to run its forward pass"
            )
        return function

    def _new_run(
        self,
        function: Callable[[], Any],
        sizes: Sequence[int] = (),
        again: Callable[..., Run] | None = None,
        grad: bool = False,
    ) -> Run:
        """Open a run of `function`, which calls the model.

        `sizes` says how many entries of the batch each input takes; `again`, for a run without inputs, opens a run of
        the same kind with inputs; `grad` enables gradients."""
        kind = Flow
        if is_scanning():
            kind = partial(ScanFlow, stand_ins=self._tree.stand_ins())
            again = again and partial(scanning, again)
        flow = kind(function, self._tree)
        if grad:
            flow.state = flow.state.with_grad()
        run = self._run_class(self, flow, sizes, again)
        if self._edits:
            flow.bodies.edits = [start_edit(edit, run, number) for number, edit in enumerate(self._edits)]
        return run

    # ---- edits

    @overload
    def edit(self, function: None = None, *, inplace: bool = False) -> Editing: ...

    @overload
    def edit(self, function: Callable[..., Any], *, inplace: bool = False) -> Self: ...

    def edit(self, function: Callable[..., Any] | None = None, *, inplace: bool = False) -> Any:
        """Add code that runs in every later run, before the run's own body at each point.

            with model.edit() as edited:            # a copy of the model that shares its weights
                edited.layers[2].output[:] = 0
            edited.trace(x)

            @model.edit                             # the same; `edited` is the copy
            def edited(run):
                run.layers[2].output[:] = 0

        Edits stack: the edits of a copy run after those of the original. In the block, `edited` and `model` are the
        current run (`for step in edited.steps:`). All other names are looked up where the block is written, see
        `engine.capture`. A point that the run never reaches ends the edit silently.

        Args:
            function: The edit as a function of the run, in place of a block.
            inplace: Whether to edit the model itself instead of a copy.

        Raises SourceError if the source of the block cannot be read. A function always works."""
        check_no_edit()
        model = self if inplace else self._copy()
        editing = Editing(model, model._edits, is_copy=not inplace)
        return editing if function is None else editing(function)

    @property
    def edits(self) -> list[Edit]:
        """The active edits, in order."""
        return list(self._edits)

    def clear_edits(self) -> None:
        """Remove all edits and all attached modules."""
        self._edits.clear()

    def _copy(self) -> Self:
        """Return a model of the same modules that starts with the same edits. Both know of each other's runs: in a run
        of the copy, `model.<path>` is a value too."""
        copy = object.__new__(type(self))
        tree = self._tree.copy()
        copy.__dict__.update(self.__dict__, _tree=tree, _edits=Edits(tree.attached, self._edits))
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        name = type(self).__name__
        raise InputError(
            f"a {name} cannot be copied or pickled, since it has runs and edits: copy the module that it wraps, and "
            f"wrap the copy, {name}(copy.deepcopy(module)); or use model.edit(), which returns a copy that shares the "
            "weights and has edits of its own"
        )

    def _hidden_names(self) -> list[str]:
        """Also return the names of the model's own children that mean something else on the model or a run."""
        parts = self._tree.children_of(self._target)
        hidden = (name for name in parts if hasattr(type(self), name) or hasattr(self._run_class, name))
        return sorted({*super()._hidden_names(), *hidden})

    def __repr__(self) -> str:
        targets = self._tree.attached.targets.values()
        attached = [f"attached: {target.path} = {type(target.owner).__name__}()" for target in targets]
        return "\n".join([super().__repr__(), *attached, *map(repr, self._edits)])


def open_run(model: Model, function: Callable[[], Any]) -> Run:
    """Open a run of any function that calls the model or a part of it: `open_run(model, lambda: net.encode(x))`."""
    return model._new_run(function)


def _requires_input(module: nn.Module) -> bool:
    needed = (p for p in _parameters(module) if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return any(parameter.default is parameter.empty for parameter in needed)


def _no_input() -> Any:
    raise InputError("the run was opened without input: pass an input, or open passes in it with run.invoke(x)")


def _batch(called: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, list[int]]:
    """Return the arguments of a module or function, with lists of tensors joined unless it takes a list, and the number
    of batch entries of each input."""
    first = args[0] if args else next(iter(kwargs.values()), None)
    if not args or not _is_list_of_rows(first):
        return args, [1] * first.shape[0] if _has_rows(first) else []
    parameters = _positional(called, len(args))
    if _takes_list(parameters[0]):
        return args, []
    joined, sizes = [_joined(first, parameters[0])], [len(x) for x in first]
    for place, (value, parameter) in enumerate(zip(args[1:], parameters[1:]), 2):
        if _is_list_of_rows(value) and len(value) == len(sizes) and not _takes_list(parameter):
            _check_goes_along(value, parameter, place, sizes)
            value = _joined(value, parameter)
        joined.append(value)
    return tuple(joined), sizes


def _joined(inputs: list[torch.Tensor], parameter: inspect.Parameter | None) -> torch.Tensor:
    try:
        return torch.cat(inputs)
    except RuntimeError as error:
        kinds = ("device", "layout", "dtype") if len({x.shape[1:] for x in inputs}) == 1 else ()
        kind = next((kind for kind in kinds if len({getattr(x, kind) for x in inputs}) > 1), "shape")
        values = ", ".join(str(tuple(x.shape) if kind == "shape" else getattr(x, kind)) for x in inputs)
        hint = f". If the module itself takes a list, {by_name}" if (by_name := _by_name(parameter)) else ""
        raise InputError(f"the inputs do not form a batch: their {kind}s are {values}{hint}") from error


def _check_goes_along(
    inputs: list[torch.Tensor], parameter: inspect.Parameter | None, place: int, sizes: list[int]
) -> None:
    """Raise InputError unless a further list of as many tensors certainly is one of the batch. A list of a single
    tensor, or for an argument that may be a tuple, could be meant for the module itself."""
    annotation = "" if parameter is None else str(parameter.annotation)
    may_be_tuple = "tuple" in annotation.lower()
    is_certain = not may_be_tuple and (len(sizes) > 1 or "Tensor" in annotation)
    if [len(x) for x in inputs] != sizes or not is_certain:
        instead = _by_name(parameter) or "write torch.cat([...]) in place of the first list"
        raise InputError(
            f"argument {place} is a list of tensors as well, and may or may not be part of the batch: if it is, join "
            f"it, torch.cat([...]); if the module itself takes a list, {instead}"
        )


def _by_name(parameter: inspect.Parameter | None) -> str:
    """Return a hint on how to pass an argument by name; "" if that is not possible."""
    has_name = parameter is not None and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    return f"pass it by name: {parameter.name}=[...]" if has_name else ""


def _takes_list(parameter: inspect.Parameter | None) -> bool:
    return parameter is not None and re.search(_LIST, str(parameter.annotation)) is not None


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_has_rows, value))


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and not value.is_nested


def _check_grad(called: Callable, grad: bool) -> None:
    """Raise InputError if `grad=True` may be meant for the module or function, which has an argument of that name."""
    parameters = [] if grad is False else _parameters(called)
    for place, parameter in enumerate(parameters, 1):
        if parameter.name == "grad":
            instead = f"pass that by position, as argument {place}"
            if parameter.kind is parameter.KEYWORD_ONLY:
                instead = "bind that: module.forward = functools.partial(module.forward, grad=...)"
            raise InputError(
                f"grad= enables gradients in the run, but the module has an argument of that name too: {instead}. To "
                "enable gradients in the run, open it under torch.enable_grad()"
            )


def _positional(called: Callable, count: int) -> list[inspect.Parameter | None]:
    """Return the parameters that take the first `count` positional arguments; None for those that are unknown."""
    found: list[inspect.Parameter | None] = []
    for parameter in _parameters(called):
        if parameter.kind is parameter.VAR_POSITIONAL:
            found += [parameter] * (count - len(found))
        elif parameter.kind is not parameter.KEYWORD_ONLY and parameter.kind is not parameter.VAR_KEYWORD:
            found.append(parameter)
    return [*found[:count], *[None] * (count - len(found))]


def _parameters(called: Callable) -> list[inspect.Parameter]:
    function = unwrapped(called).forward if isinstance(called, nn.Module) else called
    try:
        return [*inspect.signature(function).parameters.values()]
    except ValueError:  # it has no signature
        return []
