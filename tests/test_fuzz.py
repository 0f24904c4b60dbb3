"""Random programs on random models do what plain PyTorch hooks do, see `fuzz.py`."""

import random
from contextvars import copy_context

import fuzz
import pytest


@pytest.mark.parametrize("seed", range(200))
@pytest.mark.filterwarnings("ignore:the edit at")
def test_a_program_does_what_plain_hooks_do(seed):
    case = fuzz.random_case(seed)
    told = fuzz.finding(case)
    assert told is None or told.startswith("refused"), f"{told}\n{case}"  # loud where it could be more: no wrong value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(0, 2000, 20))
def test_an_interrupted_program_leaves_nothing(seed):
    case = fuzz.random_case(seed)
    assert copy_context().run(fuzz.interrupted, case, random.Random(seed)) is None, str(case)
