"""Early exit: a model drafts tokens with its own first layers (`assistant_early_exit`).

    with open_call(net, exits_early=True):
        net.generate(input_ids, assistant_early_exit=2)

For each draft, transformers changes the number of layers in the configuration of the model. It resets the number after
the draft, but not if the run is stopped in a draft, or its body raises an error there. While the run waits in a draft,
other runs of the model would leave out layers as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from diffsight.errors import InputError

_open_calls: WeakKeyDictionary[nn.Module, list[bool]] = WeakKeyDictionary()  # for each call, whether it exits early


@contextmanager
def open_call(net: nn.Module, exits_early: bool) -> Iterator[None]:
    """Within the block, a run calls a model. After a call that exits early, the model has as many layers as before.

    Raises:
        InputError: Another call of the model is in progress, and one of the two exits early.
    """
    others = _open_calls.setdefault(net, [])
    if others and (exits_early or any(others)):
        raise InputError(
            f"a run with assistant_early_exit changes the number of layers of {type(net).__name__} while it drafts, so "
            "no other run of the model can be open at the same time: finish one before the other"
        )
    layers = getattr(net.config, "num_hidden_layers", None)
    others.append(exits_early)
    try:
        yield
    finally:
        others.remove(exits_early)
        if exits_early and layers is not None:
            net.config.num_hidden_layers = layers
