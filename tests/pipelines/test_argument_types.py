"""The types of arguments, checked before anything runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from diffsight import DiffusionModel
from diffsight.pipelines.argument_types import check_types, fits, is_number
from helpers import not_called, refusal


@pytest.mark.parametrize(
    ("value", "declared", "expected"),
    [
        (3, int, True),
        (np.int64(3), int, True),
        (True, int, False),
        (2.5, int, False),
        (torch.tensor(2), int, True),
        (torch.zeros(3), int, False),
        (2.5, float, True),
        (np.float32(1), float, True),
        ("2.5", float, False),
        (np.str_("2.5"), float, False),
        (np.complex64(1), float, False),
        (torch.tensor(1j), float, False),
        (torch.tensor(2.0), int, False),
        (torch.tensor(2.0), float, True),
        (np.bool_(True), int, False),
        (torch.tensor(True), int, False),
        (True, bool, True),
        (None, str | None, True),
        ("text", Sequence[str], False),
        (["a", "b"], Sequence[str], True),
        ([1], Sequence[str] | str, False),
        (range(3), Sequence[int], True),
        (torch.tensor([3]), Sequence[int], True),
        (torch.tensor(3), Sequence[int], False),
        ({"a": 2}, Mapping[str, float], True),
        ({"a": "b"}, Mapping[str, float], False),
        ((0.5, 1), tuple[float, float], True),
        ((0.5,), tuple[float, float], False),
        ([object()], Sequence[Any], True),
    ],
)
def test_what_fits(value, declared, expected):
    assert fits(value, declared) is expected


def test_the_message_names_the_function_the_argument_and_the_type():
    def lens(words: Sequence[str] | None = None) -> None: ...

    check_types(lens, words=["a"])
    message = refusal(check_types, lens, words=3)
    assert message.endswith("lens: words must be Sequence[str] | None, not 3")


def test_a_text_in_place_of_a_number_is_refused_before_a_pipeline_runs():
    model = DiffusionModel("diffsight/shapes-clip")
    with not_called(model.pipeline.text_encoder):
        for name in ("guidance_scale", "num_inference_steps", "height"):
            message = refusal(model.generate, "a red circle", **{name: "7"})
            assert message == f"StableDiffusionPipeline: {name} must be a number, not '7'"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale must be a number, not [1.0, 2.0]"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number, not 2.5"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be 1 or more, not 0"),
    ],
)
def test_numbers_that_a_pipeline_cannot_take(given, told):
    model = DiffusionModel("diffsight/shapes-clip")
    with not_called(model.pipeline.text_encoder):
        assert told in refusal(model.generate, "a red circle", **given)


def test_a_list_of_numbers_is_no_number():
    assert is_number(int) and is_number(float | None) and is_number(int | float)
    assert not is_number(list[int]) and not is_number(list[float] | None) and not is_number(float | list[float])
