"""VisionLanguageModel: trace every part of a language model that takes images as input.

model = VisionLanguageModel("llava-hf/llava-1.5-7b-hf")     # or a folder, or a live (model, processor)

with model.trace("What is this?", images="cat.png") as run:
    patches = run.layers_output[20][0, run.image_grids[0][0]]       # (rows, columns, features), as on the image
    run.vision.layers[3].output[:] = 0                              # the vision tower, with the same names
run.image_tokens                                            # for each input, the positions of its image tokens

model.generate("What is this?", images=image, max_new_tokens=20, seed=0).text
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from diffsight.errors import InputError
from diffsight.extending import Row, Target, owner_of, part_of, run_of, tree_of
from diffsight.pipelines.language.inputs import Inputs
from diffsight.pipelines.language.language_tree import LanguageTree
from diffsight.pipelines.language.loading import Source, check_loading, hub_arguments, place_of
from diffsight.pipelines.language.model import LanguageModel, LanguageRun, loaded_from
from diffsight.pipelines.standard_names import path_of, standard_names
from diffsight.pipelines.vision_language.image_token_grids import image_grids
from diffsight.pipelines.vision_language.image_tokens import image_tokens
from diffsight.pipelines.vision_language.processors import (
    chats_in,
    checked_processor,
    load_processor,
    process,
    process_chats,
    texts_in,
)
from diffsight.pipelines.vision_language.vision_rows import ImageRowPart, vision_modules


class VisionLanguageRun(LanguageRun):
    """A run of a vision-language model."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """One view per input: `a, b = run.rows`. In the vision tower, a row is the part with its images."""
        rows, model = super().rows, self._model
        names, inputs = tree_of(self).names_of(owner_of(model)), self.model_inputs
        if inputs.tokens is None or "layers" not in names or "image_sizes" in inputs.values:
            return rows
        vision = vision_modules(owner_of(model), names["layers"], names.get("lm_head"))
        tokens = [len(own) for own in self.image_tokens]
        return tuple(Row(run_of(row), row.index, ImageRowPart(part_of(row), vision, tokens, row.index)) for row in rows)

    @property
    def image_tokens(self) -> list[torch.Tensor]:
        """For each input, the positions of its image tokens in the sequence, in order."""
        return image_tokens(owner_of(self._model).config, self._model.processor, self.tokens)

    @property
    def image_grids(self) -> list[list[torch.Tensor]]:
        """For each input and each of its images, the positions of the image's tokens, `(rows, columns)`.

        `hidden[0, run.image_grids[0][0]]` has the shape `(rows, columns, features)`. For an image cut into tiles
        (Idefics3, SmolVLM), the grid covers the assembled tiles.

        Raises:
            InputError: The tokens lie on no grid, because a resampler mixes them, or the grid is unknown.
        """
        positions, model = self.image_tokens, self._model
        return image_grids(owner_of(model), model.tokenizer, self.model_inputs.values, positions)


class VisionLanguageModel(LanguageModel):
    """Wraps a vision-language model.

    It is a `LanguageModel` with one more standard name: `vision` is the vision tower, with `layers` and, if it has one,
    `ln_final`.

    Args:
        source: A hub id, a folder, a live model or `(model, processor)`.
        processor: A processor, live or by name, that replaces the model's own.
        names: As for `LanguageModel`.
        arguments: As for `LanguageModel`.

    Raises:
        InputError: `source` does not name a model, an argument is unknown, or a standard name is wrong.
    """

    _run_class = VisionLanguageRun

    def __init__(
        self, source: Source, processor: Any = None, *, names: Mapping[str, str | None] | None = None, **arguments: Any
    ) -> None:
        if arguments.get("remote"):
            raise InputError("remote=: a VisionLanguageModel runs in this process only")
        if isinstance(source, tuple):
            if len(source) != 2 or processor is not None:
                raise InputError("pass a live model with one processor: (model, processor)")
            source, processor = source
        others = {name: value for name, value in arguments.items() if name not in _OF_LANGUAGE_MODEL}
        check_loading(source, others)
        given = processor
        processor, lacking = _processor(source, processor, arguments)
        super().__init__(source, getattr(processor, "tokenizer", None), names=names, **arguments)
        self.__dict__.update(processor=processor, _lacking=lacking)
        self.__dict__["loaded_from"] = loaded_from(source, processor=given, names=names, **arguments)

    def _make_tree(
        self, root: Target, load: Callable[[], None] | None, names: Mapping[str, str | None]
    ) -> "VisionLanguageTree":
        return VisionLanguageTree(root, load, names)

    @property
    def argument_names(self) -> set[str]:
        return super().argument_names | {"images"}

    def is_in_vision(self, path: str) -> bool:
        """Return whether a module belongs to the vision tower: `model.is_in_vision("vision.layers[3].mlp")`.

        Raises PointNotFoundError if there is no such module."""
        own, names = owner_of(self[path]), self._tree.names_of(self._owner)
        tower = self._owner.get_submodule(names["vision"]) if "vision" in names else None
        return tower is not None and any(own is module for module in tower.modules())

    def trace(self, inputs: Any = None, images: Any = None, *, grad: bool = False, **kwargs: Any) -> VisionLanguageRun:
        """Open a run of one forward pass: `with model.trace("What is this?", images=image) as run:`.

        Args:
            inputs: A string, a list of strings, chat messages (with or without images), or the dictionary that a
                processor returns for them.
            images: An image (a PIL image, a path, a tensor) or a list of images: all images of a single text, or one
                image or one list for each text. A text without placeholders gets its images at the beginning.
            grad: Whether gradients are enabled.
            kwargs: Passed to the model's forward pass.
        """
        if inputs is None and images is None:
            return super().trace(grad=grad, **kwargs)
        return super().trace(self._processed(inputs, images), grad=grad, **kwargs)

    def generate(
        self, inputs: Any = None, images: Any = None, *, seed: int | None = None, grad: bool = False, **kwargs: Any
    ) -> VisionLanguageRun:
        """Open a run that generates text: `model.generate("What is this?", images=image, max_new_tokens=20).text`.

        A step is one token. `inputs` and `images` are as for `trace`, and the other arguments as for
        `LanguageModel.generate`."""
        if inputs is None and images is None:
            return super().generate(seed=seed, grad=grad, **kwargs)
        return super().generate(self._processed(inputs, images), seed=seed, grad=grad, **kwargs)

    def check(
        self, inputs: Any = None, images: Any = None, *, seed: int | None = None, grad: bool = False, **kwargs: Any
    ) -> None:
        """Check the arguments of `trace` or `generate` without opening a run, loading weights or running anything.

        Raises:
            InputError: The arguments are not valid.
        """
        given = inputs if inputs is None and images is None else self._processed(inputs, images)
        super().check(given, seed=seed, grad=grad, **kwargs)

    # ---- inputs

    _left_out_of_generate = ("position_ids",)

    def _processed(self, inputs: Any, images: Any) -> Any:
        """Return the processor's output for texts and images. Other inputs are returned unchanged."""
        texts, chats = texts_in(inputs), chats_in(inputs)
        if texts is None and chats is None:
            if images is not None:
                what = "images go with a string, a list of strings or chat messages"
                given = "nothing" if inputs is None else type(inputs).__name__
                raise InputError(f"{what}, not with {given}: a dictionary already contains both")
            return inputs
        if self.processor is None:
            raise InputError(f"text needs a processor, and the model has none: {self._lacking}")
        if texts is not None:
            return process(self.processor, texts, images, self._pads_left())
        return process_chats(self.processor, chats, images, self._pads_left())

    @property
    def _names_of_inputs(self) -> set[str]:
        return super().argument_names.union(getattr(self.processor, "model_input_names", ()))

    def _encode(self, inputs: Any, kwargs: Mapping[str, Any], writes: bool = False) -> Inputs:
        encoded = super()._encode(inputs, kwargs, writes)
        given = inputs if isinstance(inputs, Mapping) else kwargs
        if "position_ids" not in given and _has_own_positions(self._owner):
            encoded.values.pop("position_ids", None)
        return encoded


class VisionLanguageTree(LanguageTree):
    """The traceable parts of a vision-language model. `vision` is an additional standard name."""

    def __init__(self, root: Target, load: Callable[[], None] | None, given: Mapping[str, str | None]) -> None:
        self._vision: Mapping[str, str] = {}  # the standard name of the vision tower, once it is found
        super().__init__(root, load, {name: path for name, path in given.items() if name != "vision"})
        self._vision = _vision(root.owner, given)

    def names_of(self, owner: Any) -> Mapping[str, str]:
        names = super().names_of(owner)
        return {**names, **self._vision} if owner is self.root.owner else names

    def find_names(self, part: nn.Module) -> dict[str, str]:
        tower = self._vision.get("vision")
        if tower is not None and part is self.root.owner.get_submodule(tower):
            return standard_names(part)
        return super().find_names(part)


_OF_LANGUAGE_MODEL = ("dispatch", "remote", "api_key")  # arguments that are not passed to `from_pretrained`
_SEEN = ("pixel_values", "flattened_patches")  # the inputs of vision towers


def _processor(source: Any, given: Any, arguments: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the processor of a model, or None and advice for an error message."""
    if given is not None:
        return (load_processor(given) if isinstance(given, (str, Path)) else checked_processor(given)), ""
    if not isinstance(source, (str, Path)):
        return None, "VisionLanguageModel((model, processor))"
    try:
        return load_processor(place_of(source), **hub_arguments(arguments)), ""
    except InputError as error:
        return None, f"{error}. Pass one with the model: VisionLanguageModel(source, processor)"


def _vision(net: nn.Module, names: Mapping[str, str | None]) -> dict[str, str]:
    """Return the standard name of the vision tower and its path, set by the user or found, if there is one."""
    if "vision" in names:
        path = names["vision"]
        if path is not None and path not in dict(net.named_modules()):
            raise InputError(f"names: {type(net).__name__} has no module {path!r} for 'vision'")
        return {} if path is None else {"vision": path}
    tower = net.get_encoder(modality="image") if hasattr(net, "get_encoder") else net
    if tower is net or tower is None:
        inside = (module for module in net.modules() if isinstance(module, PreTrainedModel) and module is not net)
        tower = next((module for module in inside if module.main_input_name in _SEEN), net)
    return {} if tower is net else {"vision": path_of(net, tower)}


def _has_own_positions(net: nn.Module) -> bool:
    """Return whether the model computes positions itself, such as the rows and columns of patches in Qwen2-VL."""
    return any(hasattr(module, "get_rope_index") for module in net.modules())
