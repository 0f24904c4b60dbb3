"""`.save()`, `.value` and `.stop()` on values, which are plain tensors, tuples and numbers here.

nnsight returns proxies that have these methods. In a live run a value is the real object, so the methods are added to
the types of the values themselves."""

import ctypes
import gc
from functools import wraps
from typing import Any

import numpy
import torch
from PIL.Image import Image

from diffsight.compat.block_stopped import stop_at

_BUILTIN = (list, tuple, dict, set, frozenset, range, int, float, complex, str, bytes, bytearray)
_SAVED = (*_BUILTIN, numpy.ndarray, numpy.generic, torch.dtype, torch.device)


def save(value: Any) -> Any:
    """Return `value`: a name bound in a run stays bound after it."""
    return value


def add_methods() -> None:
    """Add `save` to the types of values, `stop` to the types that a module returns, and `value` to tensors.

    `object` is left alone, since every class would inherit from it."""
    for cls in _SAVED:
        # Python refuses to set attributes on built-in types. `__dict__` is a read-only view, whose only referent is the
        # actual dictionary. After a change, the cache of attribute look-ups must be invalidated.
        namespace = gc.get_referents(cls.__dict__)[0]
        if "save" not in namespace:
            namespace |= {"save": save} | ({"stop": stop_at} if cls in (tuple, dict) else {})
            ctypes.pythonapi.PyType_Modified(ctypes.py_object(cls))
    torch.Tensor.save, torch.Tensor.value, torch.Tensor.stop = save, property(save), stop_at
    _add_save_to_images()


def _add_save_to_images() -> None:
    """Make `image.save()` return the image. Called with a file, `save` writes the image as before."""
    original = Image.save

    @wraps(original)
    def save_image(image: Image, *args: Any, **kwargs: Any) -> Any:
        return original(image, *args, **kwargs) if args or kwargs else image

    Image.save = save_image
