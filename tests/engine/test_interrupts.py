"""An interrupt at any place of the engine leaves the model, the thread and its weights as they were."""

import gc
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import diffsight
from diffsight import Model
from diffsight.engine.scan_state import HeldState
from diffsight.engine.torch_state import saved_tensor_hooks

ENGINE = str(Path(diffsight.__file__).parent)


def interrupt_at(place, function):
    """Call a function with a KeyboardInterrupt at the place with this number; return whether it came so far."""
    count = 0

    # Python looks for signals where a function begins and where one that is written in C has returned.
    def interrupt(frame, event, argument):
        nonlocal count
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(ENGINE):
            # An error in __del__ is only reported, so nothing can be done about one at its first line.
            count += frame.f_code.co_name != "__del__"
            if count == place:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(interrupt)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return count >= place


def state():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch._C._len_torch_function_stack(),
        torch.get_rng_state().tolist(),
        len(HeldState._open),
    )


class Moody(nn.Module):
    """Enters modes of its own while it runs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.steps, self.seen = 0, [torch.zeros(1)]

    def forward(self, x):
        self.steps += 1
        with torch.inference_mode(), torch.device("cpu"), torch.autocast("cpu"):
            y = self.a(x)
            return self.helper(y.tanh())

    def helper(self, x):
        return self.b(x)


def traced(net, x):
    with torch.inference_mode():
        run = Model(net).trace(x)
    with torch.no_grad(), run:
        run.a.output
        run.b.input = torch.zeros(2, 4)


def plain(net, x):
    with Model(net, methods=["helper"]).trace(x) as run:
        run.helper.input
        run.b.output


def scanned(net, x):
    with Model(net).scan(x) as run:
        run.a.output


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("program", [traced, plain, scanned])
def test_an_interrupt_at_any_place_leaves_everything_as_it_was(program):
    net, x = Moody(), torch.randn(2, 4)
    program(net, x)  # whatever is made once
    with torch.no_grad():
        right = net(x)
    names = [set(vars(module)) for module in net.modules()]
    before, kind = state(), type(net)
    stride = 7 if program is scanned else 1
    place, reached = 1, True
    while reached:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reached = interrupt_at(place, lambda: program(net, x))
        gc.collect(0)
        assert state() == before, place
        assert type(net) is kind
        assert [set(vars(module)) for module in net.modules()] == names, place
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
        with torch.no_grad():
            assert torch.equal(net(x), right), place
            with Model(net).trace(x) as run:
                read = run.output
        assert torch.equal(read, right), place
        place += stride
    assert place > 50


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return checkpoint(lambda x: self.b(torch.tanh(self.a(x))), x, use_reentrant=False)


def test_an_interrupt_in_a_checkpointed_region():
    """The model's own `with` statement finds the hooks that it has set, and the interrupt is what is raised."""
    model, x = Model(Checkpointed()), torch.randn(3, 4)

    def read():
        with model.trace(x, grad=True) as run:
            run.a.output

    read()  # whatever is made once
    place = 1
    while interrupt_at(place, read):
        assert not saved_tensor_hooks(), place
        place += 3
    assert place > 50
