"""Weights that are loaded when they are first needed."""

from collections.abc import Callable
from threading import RLock
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


class LateWeights:
    """Loads the weights of a model that was built without them, once.

    Args:
        load: Puts the weights into the model; None if they are already there.
        check: Called before the weights are loaded; raises an error if that is not possible now.
        done: Called after they have been loaded. If it raises an error, the next `load` calls it again.
    """

    def __init__(
        self,
        load: Callable[[], None] | None = None,
        check: Callable[[], None] = lambda: None,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        self._load, self._check, self._done = load, check, done
        self._lock = RLock()
        self.are_loaded = load is None
        self._is_settled = load is None

    def load(self) -> None:
        """Load the weights, unless they have been loaded."""
        if self._is_settled:
            return
        with self._lock:
            if not self.are_loaded:  # otherwise another thread was faster
                self._check()
                self._load()
                self._load, self.are_loaded = None, True
        self._done()
        self._is_settled = True


def needs_weights(value: Any) -> bool:
    """Whether an attribute of a module concerns its weights: a weight, a device, a module, a method."""
    meta = torch.device("meta")
    return any(
        callable(leaf) or leaf == meta if not isinstance(leaf, torch.Tensor) else leaf.is_meta
        for leaf in tree_leaves(value)
    )
