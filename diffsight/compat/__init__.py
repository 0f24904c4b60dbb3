"""nnsight's API on top of diffsight, so that code written for nnsight runs.

    import diffsight.compat as nnsight
    from diffsight.compat import CONFIG, LanguageModel, NNsight

    with model.trace(prompt) as tracer:
        hidden = model.transformer.h[-1].output.save()

Runs are live here: a value is the real object as soon as the line that reads it has run. So `.save()` returns its
object, `nnsight.apply` calls a function, `nnsight.log` prints, and `scan=True` and `validate=True` have no effect.
Values must be read in the order in which the model computes them. Features that cannot work in a live run (`.source`,
`envoys=`, `remote=True`) raise an error that says what to write instead.

Importing this package adds `save` to tensors, arrays, lists, tuples, dicts, sets, numbers, strings, bytes and images,
`stop` to tensors, tuples and dicts, and `value` to tensors.
"""

import builtins
from importlib import import_module
from typing import Any

from diffsight.compat.backward_blocks import add_backward_blocks
from diffsight.compat.block_stopped import stop
from diffsight.compat.compat_envoy import CompatEnvoy as Envoy
from diffsight.compat.conditions import Cond, cond
from diffsight.compat.config import CONFIG, remote_logger
from diffsight.compat.functions import apply, local, log, trace
from diffsight.compat.import_paths import Proxy, WrapperModule, add_places
from diffsight.compat.iterations import Iterations
from diffsight.compat.proxy_types import List, literal_of
from diffsight.compat.renames import get_rename_dict
from diffsight.compat.sessions import Session
from diffsight.compat.tracer import Tracer
from diffsight.compat.values import add_methods, save
from diffsight.compat.wrappers import NNsight, wrapper_named
from diffsight.errors import OutOfOrderError

_WRAPPERS = ("DiffusionModel", "LanguageModel", "StandardizedTransformer", "TransformersModel", "VisionLanguageModel")

__all__ = [
    "CONFIG",
    "Cond",
    "Envoy",
    "Iterations",
    "NNsight",
    "NNsightDeprecationWarning",
    "OutOfOrderError",
    "Proxy",
    "Session",
    "Tracer",
    "WrapperModule",
    "apply",
    "bool",
    "bytearray",
    "bytes",
    "complex",
    "cond",
    "dict",
    "float",
    "get_rename_dict",
    "int",
    "list",
    "local",
    "log",
    "remote_logger",
    "save",
    "set",
    "stop",
    "str",
    "trace",
    "tuple",
]


class NNsightDeprecationWarning(FutureWarning):
    """nnsight's category for warnings about old names, for code that filters them. diffsight never issues one."""


# nnsight.list() and similar
list, tuple, dict, set = List, builtins.tuple, builtins.dict, builtins.set
bool, bytearray = builtins.bool, builtins.bytearray
int, float, complex = literal_of(builtins.int), literal_of(builtins.float), literal_of(builtins.complex)
str, bytes = literal_of(builtins.str), literal_of(builtins.bytes)


def __getattr__(name: builtins.str) -> Any:
    if name in _WRAPPERS:
        return wrapper_named(name)
    if name == "__version__":
        return import_module("diffsight").__version__
    raise AttributeError(f"module 'diffsight.compat' has no attribute {name!r}")


add_places()
add_methods()
add_backward_blocks()
