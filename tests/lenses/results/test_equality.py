"""Results in comparisons, lists and sets: a result equals only itself, since it holds tensors."""

import copy
import inspect

import pytest
import torch

from diffsight.lenses import Activations, PointActivations
from models import lens_results


@pytest.mark.parametrize("name", lens_results.MADE)
def test_a_result_equals_only_itself(saved_models, name):
    result = lens_results.make(name, saved_models)
    other = copy.copy(result)
    assert result == result and result != other
    assert [other, result].index(result) == 1
    assert len({result, other, result}) == 2


@pytest.mark.parametrize("kind", [Activations, PointActivations])
def test_activations_equal_only_themselves(kind):
    values = {field: {"point": torch.ones(2)} for field in inspect.signature(kind).parameters}
    one, other = kind(**values), kind(**values)
    assert one == one and one != other and len({one, other}) == 2
