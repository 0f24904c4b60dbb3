"""The body and the model each keep their own grad mode, inference mode, autocast and context variables."""

import gc
from contextlib import ExitStack, nullcontext
from contextvars import ContextVar

import pytest
import torch

from diffsight import Model
from diffsight.errors import AssignmentError
from helpers import footprint
from models.nets import Calling, linear

CONTEXTS = {
    "nothing": nullcontext,
    "device": lambda: torch.device("meta"),
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "half": lambda: torch.autocast("cpu", dtype=torch.float16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
}


def modes():
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_autocast_dtype("cpu"),
        "cache": torch.is_autocast_cache_enabled(),
        "nesting": [torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()][1],
        "device": torch.get_default_device(),
    }


def switching(inside, log):
    """Return a net that runs `b` and `c` within its own context and logs its modes everywhere."""

    def forward(self, x):
        log.append(modes())
        x = self.a(x)
        log.append(modes())
        with inside():
            log.append(modes())
            x = self.b(x.float())
            log.append(modes())
            x = self.c(x.float())
            log.append(modes())
        log.append(modes())
        x = self.d(x.float().clone())  # a clone, as gradients cannot go on from a tensor of inference mode
        log.append(modes())
        return x

    return Calling(forward, a=linear(1), b=linear(2), c=linear(3), d=linear(4))


def bare_modes(net, log, around, x):
    """Return the modes that the net logs in the bare call, and its result."""
    with around():
        result = net(x)
    kept = log[:]
    log.clear()
    return kept, result


@pytest.fixture(params=CONTEXTS.values(), ids=CONTEXTS.keys())
def inside(request):
    return request.param


@pytest.fixture(params=CONTEXTS.values(), ids=CONTEXTS.keys())
def outside(request):
    return request.param


def test_a_context_of_the_model_does_not_reach_the_body(inside, outside, x):
    log = []
    net = switching(inside, log)
    expected, result = bare_modes(net, log, outside, x)
    before = modes()
    with outside():
        own = modes()
        with Model(net).trace(x) as run:
            for part in (run.a, run.b, run.c, run.d):
                part.input
                assert modes() == own
                part.output
                assert modes() == own
    assert modes() == before
    assert log == expected
    assert torch.equal(run.result, result) and run.result.requires_grad == result.requires_grad
    assert run.result.dtype == result.dtype and run.result.is_inference() == result.is_inference()


def test_a_context_of_the_body_does_not_reach_the_model(inside, outside, x):
    log = []
    net = switching(inside, log)
    expected, result = bare_modes(net, log, nullcontext, x)
    with Model(net).trace(x) as run:
        for name in "abcd":
            before = modes()
            with outside():
                own = modes()
                run[name].input
                assert modes() == own
                run[name].output
                assert modes() == own
            assert modes() == before
    assert log == expected
    assert torch.equal(run.result, result) and run.result.requires_grad == result.requires_grad
    assert run.result.dtype == result.dtype


def test_autocast_within_the_model_keeps_its_own_type(x):
    """`torch.autocast("cpu")` takes the type that is set; the body's is not the model's."""
    net = Calling(lambda self, x: self.lin(self.first(x)), first=linear(), lin=linear())
    types = []

    def forward(self, x):
        x = self.first(x)
        with torch.autocast("cpu"):
            types.append(self.lin(x).dtype)
        return x

    net.function = forward
    net(x)
    with Model(net).trace(x) as run, torch.autocast("cpu", dtype=torch.float16):
        run.first.output
        run.finish()
    assert types == [torch.bfloat16, torch.bfloat16]


def test_a_block_without_autocast_in_the_body_of_a_run_with_it(x):
    """Such a block counts too: where the outermost ends, the cache of cast weights is cleared."""
    net = Calling(lambda self, x: self.lin(self.first(x)), first=linear(), lin=linear())
    before = modes()
    with torch.autocast("cpu"):
        with Model(net).trace(x) as run:
            run.first.output
            with torch.autocast("cpu", enabled=False):
                assert run.lin.output.dtype == torch.bfloat16
    assert modes() == before


def test_the_type_of_a_block_without_autocast_stays_in_the_body(x):
    net = switching(CONTEXTS["autocast"], [])
    with Model(net).trace(x) as run:
        run.a.output
        with torch.autocast("cpu", torch.float16, enabled=False):
            values = [run[name].output for name in "bcd"]
    types = []
    hooks = [getattr(net, name).register_forward_hook(lambda *args: types.append(args[2].dtype)) for name in "bcd"]
    net(x)
    for hook in hooks:
        hook.remove()
    assert [value.dtype for value in values] == types


def test_autocast_that_the_body_sets_without_a_block(x):
    net = switching(nullcontext, [])
    with Model(net).trace(x) as run:
        run.a.output
        torch.set_autocast_enabled("cpu", True)
        try:
            assert run.c.output.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
        finally:
            torch.set_autocast_enabled("cpu", False)
    assert run.result.dtype == torch.float32


def test_an_edit_in_inference_mode_that_ends_where_the_body_is_in_it(x):
    """What exchanges the modes must not do so once more when it is freed."""

    @torch.inference_mode()
    def edit(run):
        run.a.output
        run.c.output

    net = switching(nullcontext, [])
    with Model(net).edit(edit).trace(x) as run, torch.inference_mode():
        run.c.output
    del run
    gc.collect()
    with torch.no_grad():
        before = modes()
        gc.collect()
        assert modes() == before


def test_autocast_within_the_body_keeps_its_own_type(x):
    net = switching(CONTEXTS["half"], [])
    with Model(net).trace(x) as run:
        run.b.output
        with torch.autocast("cpu"):
            assert net.a(x).dtype == torch.bfloat16


def test_contexts_that_cross(inside, outside, x):
    """The body enters before the model does, and leaves while the model is still within."""
    log = []
    net = switching(inside, log)
    expected, result = bare_modes(net, log, nullcontext, x)
    before = modes()
    with Model(net).trace(x) as run:
        context = outside()
        context.__enter__()
        own = modes()
        run.b.output
        assert modes() == own
        context.__exit__(None, None, None)
        assert modes() == before
        run.d.output
        assert modes() == before
    assert modes() == before and log == expected and torch.equal(run.result, result)


def test_a_run_keeps_the_modes_it_was_opened_in(outside, x):
    log = []
    net = switching(nullcontext, log)
    expected, result = bare_modes(net, log, outside, x)
    with outside():
        unread, read = Model(net).trace(x), Model(net).trace(x)
    before = modes()
    assert torch.equal(unread.result, result) and unread.result.requires_grad == result.requires_grad
    assert log == expected and modes() == before
    log.clear()
    with read:
        read.c.output
    assert torch.equal(read.result, result) and log == expected and modes() == before


@pytest.mark.parametrize("way", ["error in the body", "error in the model", "stop", "drop"])
def test_the_bodys_modes_come_back_however_the_run_ends(inside, way, x):
    net = switching(inside, [])
    clean = footprint(net)
    before = modes()
    run = Model(net).trace(x)
    if way == "stop":
        run.b.output
        run.stop()
    elif way == "drop":
        run.b.output
        del run
    elif way == "error in the body":
        with pytest.raises(KeyError), run:
            run.b.output
            raise KeyError
    else:
        with pytest.raises(AssignmentError), run:
            run.c.input = torch.zeros(2, 7)
    assert modes() == before and footprint(net) == clean


def test_a_loss_under_no_grad_in_the_body(net, x):
    with Model(net).trace(x) as run, torch.no_grad():
        hidden = run.layers[0].output
        assert not (hidden * 2).requires_grad
    assert hidden.requires_grad and run.result.requires_grad


def test_values_of_an_inference_model_in_a_body_with_gradients(net, x):
    with Model(net).generate(x) as run:
        pass
    assert run.result.requires_grad
    guarded = Calling(torch.inference_mode()(lambda self, x: self.net(x)), net=net)
    with Model(guarded).trace(x) as run:
        hidden = run.net.first.output
        assert hidden.is_inference()
        probe = torch.ones(4, requires_grad=True)
        assert (probe * 2).requires_grad and not (probe * 2).is_inference()


def test_gpt2_generates_without_gradients_and_the_body_has_them(gpt2, ids, greedy):
    with Model(gpt2).generate(ids, **greedy) as run:
        hidden = run.transformer.h[0].output
        assert not hidden.requires_grad
        assert gpt2.lm_head(hidden).requires_grad


variable = ContextVar("variable", default="unset")


def test_context_variables_are_visible_in_the_model(x):
    seen = []

    def forward(self, x):
        seen.append(variable.get())
        x = self.lin(x)
        seen.append(variable.get())
        variable.set("the model's")
        return self.lin(x)

    net = Calling(forward, lin=linear())
    token = variable.set("the body's")
    try:
        with Model(net).trace(x) as run:
            run.lin.output
            run.lin.calls[1].output
            assert variable.get() == "the body's"
        with ExitStack() as stack:
            run = stack.enter_context(Model(net).trace(x))
            run.lin.output
    finally:
        variable.reset(token)
    assert seen == ["the body's"] * 4
    assert variable.get() == "unset"
