"""Layers, as every lens numbers and names them.

    diffusion_lens(model, prompt, layers=4)                         # the output of layers[4]
    diffusion_lens(model, prompt, layers=-1)                        # the output of the last layer
    diffusion_lens(model, prompt, layers=["embedding", 0, -1])      # "embedding": the input of the first layer
    diffusion_lens(model, prompt, layers=slice(None, None, 3))      # every third layer

A lens accepts an integer, "embedding", a slice, or a list that mixes them. Results hold non-negative integers and
"embedding".
"""

from collections.abc import Iterable, Sequence
from typing import Any

from diffsight.errors import InputError
from diffsight.pipelines.numbers import as_integer, as_slice, unpacked
from diffsight.pipelines.standard_names import EMBEDDING, Layer

Layers = int | str | slice | Iterable[int | str | slice] | None


def choose_layers(
    layers: Layers, count: int, used: int | None = None, with_embedding: bool = True
) -> tuple[Layer, ...]:
    """Return the chosen layers in the order given, each of them once.

        choose_layers(["embedding", slice(0, 4, 2), -1], count=12)      # ("embedding", 0, 2, 11)

    Args:
        layers: What the user passed. None means the embedding and all layers.
        count: The number of layers of the model. Negative numbers and slices refer to all of them.
        used: The number of layers up to the last one that has any effect. Layers after it cannot be chosen, and slices
            leave them out. Default: all layers.
        with_embedding: Whether "embedding" can be chosen.

    Raises:
        InputError: A layer does not exist or has no effect, or no layer is chosen.
    """
    used, layers = count if used is None else used, unpacked(layers)
    if layers is None:
        items: list[Any] = [EMBEDDING, slice(None)] if with_embedding else [slice(None)]
    elif isinstance(layers, str | slice) or not isinstance(layers, Iterable):
        items = [layers]
    else:
        items = list(layers)
    chosen: list[Layer] = []
    for item in items:
        if isinstance(item, slice):
            chosen += _sliced(item, count, used, with_embedding)
        else:
            chosen.append(choose_layer(item, count, used, with_embedding))
    if not chosen:
        raise InputError(f"no layers are chosen: {_known(used, with_embedding)}")
    return tuple(dict.fromkeys(chosen))


def choose_layer(layer: Any, count: int, used: int | None = None, with_embedding: bool = True) -> Layer:
    """Return one layer as a non-negative integer, or "embedding". See `choose_layers` for the arguments.

    Raises:
        InputError: The layer does not exist or has no effect.
    """
    used = count if used is None else used
    if isinstance(layer, str) and layer == EMBEDDING and with_embedding:
        return EMBEDDING
    number = as_integer(layer)
    if number is None or not -count <= number < count:
        hint = ". To choose all layers, omit the argument" if layer == "all" else ""
        raise InputError(f"there is no layer {layer!r}: {_known(used, with_embedding)}{hint}")
    number %= count
    if number >= used:
        why = "since the pipeline does not use its output"
        raise InputError(f"layer {layer} has no effect, {why}: {_known(used, with_embedding)}")
    return number


def find_layer(layer: Any, layers: Sequence[Layer], count: int) -> int:
    """Return the position of a layer among the `layers` of a result.

    Args:
        layer: What the user passed; -1 is the last layer of the model.
        layers: The layers of the result.
        count: The number of layers of the model.

    Raises:
        InputError: The result does not have this layer.
    """
    number = as_integer(layer)
    name = number + count if number is not None and number < 0 else number
    name = layer if isinstance(layer, str) else name
    if name not in layers:
        raise InputError(f"the result does not have layer {layer!r}: it has {', '.join(map(str, layers))}")
    return layers.index(name)


def in_model_order(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Return the layers in the order in which the model runs them."""
    return tuple(sorted(layers, key=state_of))


def state_of(layer: Layer) -> int:
    """Return the index of a layer among the hidden states of transformers, where 0 is the embedding."""
    return 0 if layer == EMBEDDING else layer + 1


def layer_place(layer: Layer) -> tuple[int, str]:
    """Return the place of a layer: the index of a module in `layers`, and "output", or "input" for the embedding."""
    return (0, "input") if layer == EMBEDDING else (layer, "output")


def layer_title(layer: Layer) -> str:
    """Return the name of a layer in titles: "layer 4", or "embedding"."""
    return EMBEDDING if layer == EMBEDDING else f"layer {layer}"


def layer_file(layer: Layer) -> str:
    """Return the name of a layer in file names, without a suffix: "layer_04", or "embedding"."""
    return EMBEDDING if layer == EMBEDDING else f"layer_{layer:02}"


def _sliced(layers: slice, count: int, used: int, with_embedding: bool) -> list[int]:
    if layers.step == 0:
        raise InputError("the step of a slice of layers cannot be 0: write 1 or more")
    if as_slice(layers) is None:
        raise InputError(f"a slice of layers goes from one integer to another, unlike {layers!r}")
    beyond = [bound for bound in (layers.start, layers.stop) if bound is not None and bound > used]
    if beyond:
        raise InputError(f"the slice goes past the last layer, up to {beyond[-1]}: {_known(used, with_embedding)}")
    return [layer for layer in range(count)[layers] if layer < used]


def _known(used: int, with_embedding: bool) -> str:
    known = [f'"{EMBEDDING}"'] if with_embedding else []
    known += [f"0 to {used - 1}" if used > 1 else "0"] if used else []
    return f"choose from {' and '.join(known)}"
