"""The points that a lens visits, as the user names them: layers by number, modules of any model by path or pattern.

    named_points(model, [4, -1])                            # the outputs of layers of a language model
    named_points(model, "layers[*].mlp")
    named_points(pipeline, ["unet.**.attn2", "unet.mid_block.input"])
    named_points(pipeline, "transformer.transformer_blocks[*].output[1]")       # one of several tensors

In a pattern, `*` matches any name and `**` any number of names. A path means the output of the module, unless it ends
with `.input`.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from diffsight.errors import InputError
from diffsight.lenses.layers import EMBEDDING, Layer, Layers, choose_layers, layer_place
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.numbers import unpacked

PointName = Layer | str

_ENDING = re.compile(r"\.(input|output)(?:\[(\d+)\])?$")


@dataclass(frozen=True)
class NamedPoint:
    """A point, and its name in results.

    Attributes:
        name: The number of a layer, "embedding", or a path.
        path: The path of the module.
        is_input: Whether the point is the input of the module.
        item: Which item of the value, if it is a tuple. Default: its only tensor.
    """

    name: PointName
    path: str
    is_input: bool = False
    item: int | None = None

    @property
    def component(self) -> str:
        """The name of the component that the module is in."""
        return re.split(r"[.\[]", self.path, maxsplit=1)[0]


def named_points(model: Any, layers: Layers) -> tuple[NamedPoint, ...]:
    """Return the points that `layers` names, each once.

    Args:
        model: The model.
        layers: Numbers of layers of a language model, "embedding", slices, paths, patterns, or a list of them. None
            means all layers of a language model.

    Raises:
        InputError: A layer does not exist, or the model has no numbered layers.
        PointNotFoundError: A path does not exist, or a pattern matches nothing.
    """
    layers = unpacked(layers)
    is_one = layers is None or isinstance(layers, (str, slice)) or not isinstance(layers, Iterable)
    found: dict[PointName, NamedPoint] = {}
    for item in [layers] if is_one else layers:
        is_path = isinstance(item, str) and item != EMBEDDING
        for point in _matching(model, item) if is_path else _numbered(model, item):
            found.setdefault(point.name, point)
    if not found:
        raise InputError("no layers are chosen: pass the number of a layer, or the path of a module")
    return tuple(found.values())


def _numbered(model: Any, layers: Layers) -> Iterator[NamedPoint]:
    if not isinstance(model, LanguageModel):
        raise InputError(
            f"layers of a {type(model).__name__} are chosen by path, such as 'text_encoder.layers[4]' or "
            f"'unet.**.attn2', not by {layers!r}"
        )
    for layer in choose_layers(slice(None) if layers is None else layers, len(model.layers_output)):
        index, part = layer_place(layer)
        yield NamedPoint(layer, f"layers[{index}]", part == "input")


def _matching(model: Any, pattern: str) -> Iterator[NamedPoint]:
    ending = _ENDING.search(pattern)
    path = pattern[: ending.start()] if ending else pattern
    is_input = ending is not None and ending[1] == "input"
    item = int(ending[2]) if ending and ending[2] else None
    for found in model.find_points(path):
        own = re.sub(r"^\[(\d+)\]", r"\1", found.removesuffix(".output"))
        yield NamedPoint(own + (ending[0] if ending else ""), own, is_input, item)
