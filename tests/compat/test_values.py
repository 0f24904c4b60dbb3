"""`.save()`, `.value` and `.stop()` on values."""

from enum import Enum

import numpy
import torch
from torch import nn

import diffsight.compat as nnsight


def test_save_on_values():
    values = [1, 1.5, "a", [1], (1,), {"a": 1}, {1}, True, torch.ones(2), numpy.ones(2), nn.Parameter(torch.ones(1))]
    values += [
        b"a",
        1j,
        frozenset([1]),
        range(2),
        numpy.float32(1),
        torch.float16,
        torch.device("cpu"),
        torch.Size([2]),
    ]
    assert all(value.save() is value for value in values) and torch.ones(1).value == 1
    anything = object()
    assert nnsight.save(anything) is anything and not hasattr(anything, "save")

    class Color(str, Enum):  # noqa: UP042  (strings have `save`, and enumerations have their own `value`)
        RED = "red"

    assert Color.RED.value == "red" and Color.RED.save() is Color.RED
    assert (nnsight.dict, nnsight.tuple, nnsight.bool) == (dict, tuple, bool)


def test_updating_values():
    """Walkthrough: Proxy Update; the sessions' `all_tokens.append(token).save()`."""
    text = nnsight.str("I am a ").save()
    text.update(text + "Transformer")
    total = nnsight.int(1)
    total.update(total + 2)
    assert str(text) == "I am a Transformer" and total == 3 and f"{total:02}" == "03" and [0, 1, 2, 3][total] == 3
    tokens = nnsight.list()
    assert tokens.append(5).save() is tokens == [5] and isinstance(tokens, list)


def test_images_are_still_saved_to_files(tmp_path):
    from PIL import Image

    image = Image.new("RGB", (2, 2), "red")
    image.save(tmp_path / "red.png")
    assert image.save() is image and Image.open(tmp_path / "red.png").getpixel((0, 0)) == (255, 0, 0)
