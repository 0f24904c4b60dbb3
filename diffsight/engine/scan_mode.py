"""The function mode of a scan: it puts fake tensors in place of weights and inputs.

PyTorch's fake tensors do the work: a fake tensor has a shape, a dtype and a device, and an operation that takes one
returns another. This mode decides what is fake, depending on where the code runs:

- Inside a component, weights and floating-point inputs are fake. Integer and boolean inputs, such as token ids and
  masks, stay real, and so does everything computed from them alone, so models can look at their values.
- Between components, in the pipeline's own code, schedulers and post-processing, tensors are real. Only weights are
  fake there, and results computed from a weight and a real tensor are zeros.
- In the body of the `with` statement, tensors are real except for weights and the values inside components. A copy of
  a weight, as `copy.deepcopy(net)` and `torch.save(net, file)` make it, is real too.

Running the model inside `FakeTensorMode(allow_non_fake_inputs=True)` is not enough (PyTorch 2.13). The tests named here
are in tests/engine/test_scan*.py:

- It is a dispatch mode, below autograd, so operations are recorded with the real parameters: `backward()` fills their
  `.grad` with fake tensors (test_gradients), and with no fake tensor taking part, `weight.zero_()` in the body changes
  the real weight (test_weights_are_not_changed_by_the_body).
- It makes every tensor fake and does not keep the values of masks and token ids: `mask.all()` raises
  (test_numbers_and_masks_that_come_in_are_known), and so does `x[mask]`
  (test_masks_that_a_model_makes_itself_are_known).
- Writing a fake tensor to a real one changes a fake copy, and the real one keeps its outdated values
  (test_values_that_are_written_over_are_not_known).
- It puts fake parameters into modules that are cast (test_casting_a_module_leaves_its_parameters_in_place).
- PyTorch keeps the stack of dispatch modes per thread, so the mode stays on in the body while the model is parked there
  (test_what_has_nothing_to_do_with_the_model_is_real).
- It cannot infer the shape of a grouped matrix product in float32 (test_products_by_groups).

So this function mode, which sees calls above autograd and is exchanged along with the coroutine, replaces the tensors.
A fake tensor enters the `FakeTensorMode` by itself, for one operation.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from diffsight.engine.coroutine import current_owner
from diffsight.engine.scan_errors import Unreported, is_about_values, values_needed
from diffsight.engine.scan_fakes import Fakes, Zeros
from diffsight.engine.target import Target


class ScanMode(TorchFunctionMode):
    """The function mode of one scan, entered by the model and by the body of the `with` statement.

    Args:
        components: the parts of the model that compute on shapes alone.
        modules: all modules inside the components.
    """

    def __init__(self, components: Sequence[Target], modules: Iterable[nn.Module]) -> None:
        self._components = components
        self._fakes = Fakes()
        self._depth = 0  # calls of components under way
        self._unknown: dict[int, torch.Tensor] = {}  # by id: tensors that a fake one replaces wherever they are used
        self._twins: dict[int, FakeTensor] = {}  # by id of such a tensor
        self.note_weights(modules)

    def note_weights(self, modules: Iterable[nn.Module], others: Iterable[torch.Tensor] = ()) -> None:
        """Note which tensors are weights: those of the modules, and others that are to be treated alike."""
        tensors = chain.from_iterable(chain(m._parameters.values(), m._buffers.values()) for m in modules)
        self._twins.clear()
        self._unknown = {id(tensor): tensor for tensor in (*tensors, *others) if tensor is not None}
        loaded = (tensor.device for tensor in self._unknown.values() if not tensor.is_meta)
        self._fakes.device = next(loaded, self._fakes.device)

    def call_on_shapes(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Call a component with fake tensors, and return the fake tensors that it returns."""
        if self._depth:
            return function(*args, **kwargs)
        fake_args, fake_kwargs = tree_map(self._enter, (args, kwargs))
        self._depth += 1
        try:
            return function(*fake_args, **fake_kwargs)
        finally:
            self._depth -= 1

    def call_between(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Call a component of a pipeline, and return zeros in place of the fake tensors that it returns."""
        if self._depth:
            return function(*args, **kwargs)
        output = self.call_on_shapes(function, args, kwargs)
        zeros = Zeros(self._fakes)
        zeros((args, kwargs))  # in objects that the component has written to, such as caches
        return zeros(output)

    def without_values(self, result: Any) -> Any:
        """Return a result that a pipeline has computed from zeros, with fake tensors in place of its tensors."""
        if not isinstance(result, dict):
            return _each(result, self._fake_if_float)
        for name, value in list(result.items()):  # in place: not every output object can be made from its items
            result[name] = _each(value, self._fake_if_float)
        return result

    def _enter(self, value: Any) -> Any:
        """Return a value as a component gets it. Integer tensors are copied, since the component may write to them."""
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        entered = self._fake_if_float(value)
        return value.clone() if entered is value else entered

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        owner = current_owner()
        if owner is not None and getattr(owner, "body_mode", None) is not self:  # the model of another run, in the body
            return function(*args, **kwargs)
        if owner is None and _is_in_copy() and not any(isinstance(value, FakeTensor) for value in args):
            return function(*args, **kwargs)
        found = _Arguments(args, kwargs, self._twin)
        if not found.has_fake:
            is_inside = owner is not None and self._depth
            return self._create(function, args, kwargs) if is_inside else function(*args, **kwargs)
        if owner is not None and not self._depth:
            return self._call_between(function, found)
        if function in _READING:
            raise values_needed(function, self._components)
        if found.has_real and _is_write(function, kwargs):
            self._forget_values(args[:1], kwargs.get("out"))
            found = _Arguments(args, kwargs, self._twin)
        return self._call(function, found)

    # ---- calls

    def _call(self, function: Callable, found: "_Arguments") -> Any:
        """Call a function with fake tensors in place of weights and floating-point tensors."""
        args, kwargs = found.args, found.kwargs
        if function in _INDEXING:
            args = [args[0], _without_masks(args[1]), *args[2:]]
        if found.has_real:
            args, kwargs = _each([args, kwargs], self._fake_if_float)
        try:
            result = (_grouped_product if function in _GROUPED else function)(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            if is_about_values(error):
                raise values_needed(function, self._components, error) from error
            raise
        is_cast = isinstance(result, FakeTensor) and id(found.first) in self._unknown and _is_in_apply()
        return self._cast(found.first, result) if is_cast else result

    def _fake_if_float(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a fake tensor, linked to the real one by autograd. Integers stay real even beside fake tensors, since
        functions such as `repeat_interleave` look at their values."""
        if is_functorch_wrapped_tensor(tensor):  # inside `vmap` and the like: it may hold a fake tensor itself
            return tensor
        return self._fakes.of(tensor) if tensor.is_meta or _is_float(tensor) else tensor

    def _call_between(self, function: Callable, found: "_Arguments") -> Any:
        """Call a function of the pipeline's own code that takes a weight."""
        zeros = Zeros(self._fakes)
        if function in _READING:
            return function(*zeros(found.args), **found.kwargs)
        result = self._call(function, found)
        return zeros(result) if found.has_real else result

    def _create(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a function that takes no fake tensor. What it creates is real, since it may become a mask, unless it is
        larger than any mask."""
        if function in _CREATING:
            created = self._fakes.created_by(function, args, kwargs)
            if created.numel() > _LARGEST_MASK:
                return created
        return function(*args, **kwargs)

    # ---- tensors that fake ones replace

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the fake tensor in place of a weight, and any other tensor as it is."""
        twin = self._twins.get(id(tensor))
        if twin is None and id(tensor) in self._unknown:
            twin = self._fakes.of_weight(tensor)
            if not tensor.is_leaf:
                twin = twin.clone()  # with gradients, a leaf cannot be changed in place
            self._twins[id(tensor)] = twin
        return tensor if twin is None else twin

    def _forget_values(self, *written: Any) -> None:
        """Note that a fake tensor is written to these. Their values are now unknown, like the values of weights."""
        for tensor in tree_leaves(written):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, FakeTensor):
                self._unknown[id(tensor)] = tensor

    def _cast(self, weight: torch.Tensor, result: FakeTensor) -> torch.Tensor:
        """Change the dtype or device of a weight for `module.to(...)`. Return the weight, which `to` then stores."""
        self._twins[id(weight)] = result.detach().requires_grad_(weight.requires_grad)
        return weight


class _Arguments:
    """The arguments of a function, with fake tensors in place of weights. `first` is the first one, unchanged."""

    def __init__(self, args: tuple, kwargs: dict[str, Any], twin: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.has_fake = self.has_real = False
        self.first = args[0] if args else None
        self._twin = twin
        self.args, self.kwargs = _each(args, self._replace), _each(kwargs, self._replace)

    def _replace(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = self._twin(tensor)
        if isinstance(tensor, FakeTensor):
            self.has_fake = True
        else:
            self.has_real = True
        return tensor


def _each(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Change every tensor among the arguments of a function. This runs for each call: `tree_map` would be slower."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) is dict:
        return {name: _each(item, change) for name, item in value.items()}
    return type(value)(_each(item, change) for item in value) if type(value) in (list, tuple) else value


def _without_masks(index: Any) -> Any:
    """Return an index with positions in place of each mask whose values are known, so that the result has a shape."""
    parts = []
    for part in index if type(index) is tuple else (index,):
        is_tensor = isinstance(part, torch.Tensor) and not isinstance(part, FakeTensor)
        is_mask = is_tensor and part.dtype is torch.bool and part.ndim and not part.is_meta
        parts += part.nonzero(as_tuple=True) if is_mask else [part]
    return tuple(parts) if len(parts) > 1 or type(index) is tuple else parts[0]


def _grouped_product(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Multiply by groups, as mixtures of experts do. PyTorch knows the shape of the product only for bfloat16."""
    dtype = next(value.dtype for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    args, kwargs = _each([args, kwargs], lambda tensor: tensor.to(torch.bfloat16) if _is_float(tensor) else tensor)
    return torch._grouped_mm(*args, **kwargs).to(kwargs.get("out_dtype") or dtype)


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def _is_write(function: Callable, kwargs: dict[str, Any]) -> bool:
    """Return whether a function changes its first argument, or `out`."""
    name = function.__name__
    in_place = name.endswith("_") and (not name.endswith("__") or name in _WRITING)
    return in_place or kwargs.get("out") is not None


def _is_in_apply() -> bool:
    """Return whether the call comes from the function that `module.to(...)` applies to each weight."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame is not None and frame.f_back is not None and frame.f_back.f_code is _APPLY


def _is_in_copy() -> bool:
    """Return whether the call comes from a method of PyTorch that copies a tensor, or prepares it for `pickle`."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in _FILES_OF_COPIES:
        if frame.f_code in _COPIES:
            return True
        frame = frame.f_back
    return False


_COPIES = {
    getattr(kind, name).__code__
    for kind in (torch.Tensor, nn.Parameter)
    for name in ("__deepcopy__", "__reduce_ex__", "_reduce_ex_internal")
}
_FILES_OF_COPIES = {__file__, torch.overrides.__file__, *(code.co_filename for code in _COPIES)}
_APPLY = nn.Module._apply.__code__
_ARITHMETIC = ("add", "and", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor")
_WRITING = {"__set__", "__setitem__", *(f"__i{name}__" for name in _ARITHMETIC)}
_CREATING = {torch.empty, torch.full, torch.ones, torch.rand, torch.randn, torch.zeros}
_LARGEST_MASK = 2**22  # elements
_GROUPED = {getattr(torch, "_grouped_mm", None), getattr(nn.functional, "grouped_mm", None)} - {None}
_INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
_ASKING = ("item", "tolist", "numpy", "equal", "nonzero", "__array__", "__bool__", "__complex__", "__float__")
_READING = {getattr(torch.Tensor, name) for name in (*_ASKING, "__format__", "__index__", "__int__", "__reduce_ex__")}

logging.getLogger("torch._subclasses.fake_tensor").addFilter(Unreported(ScanMode.__torch_function__))
