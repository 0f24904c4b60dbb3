"""The types of arguments, checked before anything runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from diffsight import DiffusionModel
from diffsight.pipelines.argument_types import check_types, fits
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
