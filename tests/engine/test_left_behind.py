"""A run leaves nothing on the model or in memory, however it ends."""

import copy
import gc
import signal
import threading
import tracemalloc
import weakref

import pytest
import torch

from diffsight import Model, OutOfOrderError
from diffsight.errors import AssignmentError, NeverReachedError
from helpers import footprint
from models.nets import Calling, Net, inputs, linear


class Interrupted(Net):
    """Fails in its second layer with `error`, if one is set; `left` says that its `finally` block ran."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None

    def forward(self, x):
        try:
            x = self.layers[0](self.first(x))
            if self.error is not None:
                raise self.error
            return self.last(self.layers[1](x))
        finally:
            self.log.append("left")

    def helper(self, x):
        return x


def body_error(model, net, x):
    with pytest.raises(KeyError), model.trace(x) as run:
        run.layers[0].leaf.input
        raise KeyError("mine")


def body_interrupt(model, net, x):
    with pytest.raises(KeyboardInterrupt), model.trace(x) as run:
        run.layers[0].output
        raise KeyboardInterrupt


def body_exit(model, net, x):
    with pytest.raises(SystemExit), model.trace(x) as run:
        run.layers[0].output
        raise SystemExit(1)


def model_error(model, net, x):
    net.error = ValueError("the model's")
    with pytest.raises(ValueError, match="the model's"), model.trace(x) as run:
        run.layers[0].input
        run.last.output


def model_error_at_the_end_of_the_block(model, net, x):
    net.error = ValueError("the model's")
    with pytest.raises(ValueError, match="the model's"), model.trace(x) as run:
        run.layers[0].input


def model_interrupt(model, net, x):
    net.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), model.trace(x) as run:
        run.layers[0].input
        run.last.output


def model_interrupt_unread(model, net, x):
    net.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), model.trace(x):
        pass


def model_error_in_a_step(model, net, x):
    net.error = ValueError("the model's")
    with pytest.raises(ValueError, match="the model's"), model.generate(x) as run:
        for _ in run.steps:
            run.first.input


def model_error_caught_in_the_body(model, net, x):
    net.error = ValueError("the model's")
    with model.trace(x) as run, pytest.raises(ValueError, match="the model's"):
        run.last.output


def stopped(model, net, x):
    with model.trace(x) as run:
        run.layers[0].leaf.lin.input
        run.stop()


def stopped_in_a_step(model, net, x):
    with model.generate(x) as run:
        for _ in run.steps:
            run.stop()


def dropped(model, net, x):
    run = model.trace(x)
    run.layers[0].leaf.input
    del run
    gc.collect()


def dropped_in_a_step(model, net, x):
    run = model.generate(x)
    steps = iter(run.steps)
    next(steps)
    run.first.input
    del run, steps
    gc.collect()


def dropped_before_it_began(model, net, x):
    run = model.trace(x)
    run.last.output = x
    del run
    gc.collect()


def assignment_that_does_not_fit(model, net, x):
    with pytest.raises(AssignmentError), model.trace(x) as run:
        run.layers[0].input
        run.layers[1].output = torch.zeros(2, 5)


def assignment_never_reached(model, net, x):
    with pytest.raises(NeverReachedError), model.trace(x) as run:
        run.unused.input = x


def out_of_order(model, net, x):
    with pytest.raises(OutOfOrderError), model.trace(x) as run:
        run.layers[1].input
        run.layers[0].output


def read_everywhere(model, net, x):
    with model.trace(x) as run:
        run.first.inputs, run.layers[0].leaf.lin.inputs, run.last.inputs
        run.last.skip(x)


def left_by_return(model, net, x):
    def body():
        with model.trace(x) as run:
            return run.layers[0].input

    assert body().shape == (2, 4)


ENDS = [
    body_error,
    body_interrupt,
    body_exit,
    model_error,
    model_error_at_the_end_of_the_block,
    model_interrupt,
    model_interrupt_unread,
    model_error_in_a_step,
    model_error_caught_in_the_body,
    stopped,
    stopped_in_a_step,
    dropped,
    dropped_in_a_step,
    dropped_before_it_began,
    assignment_that_does_not_fit,
    assignment_never_reached,
    out_of_order,
    read_everywhere,
    left_by_return,
]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_nothing_is_left_behind(end, x):
    net = Interrupted()
    model = Model(net, methods=["helper"])
    expected, clean = net(x), footprint(net)
    net.log.clear()
    end(model, net, x)
    assert footprint(net) == clean
    assert type(net) is Interrupted
    began = end not in (dropped_before_it_began, stopped_in_a_step)
    assert net.log == (["left"] if began else []), "the model's `finally` blocks ran"
    net.error = None
    assert torch.equal(net(x), expected) and torch.equal(model(x), expected)
    assert torch.equal(model.trace(x).result, expected)
    with model.trace(x) as run:
        run.layers[0].output
    assert torch.equal(run.result, expected)


def test_an_interrupt_at_any_moment(net, x):
    def interrupt(*_):
        raise KeyboardInterrupt

    model, clean, run = Model(net), footprint(net), None
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for moment in range(1000):
            try:
                signal.setitimer(signal.ITIMER_REAL, (1 + moment % 500) * 1e-6)
                with model.trace(x) as run:
                    run.layers[1].leaf.output
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            run = None
            assert footprint(net) == clean
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    found = []

    def read():
        with model.trace(x) as run:
            found.append(run.layers[1].leaf.output)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(60)
    assert len(found) == 1  # nothing is left locked for other threads


def test_hooks_of_the_users_stay_in_their_order(net, x):
    handles = [net.first.register_forward_hook(lambda *_: None) for _ in range(3)]
    handles.append(net.first.register_forward_pre_hook(lambda *_: None))
    clean = footprint(net)
    with Model(net).trace(x) as run:
        run.first.input, run.first.output
        handles.append(net.first.register_forward_hook(lambda *_: None))
    clean["first"][1].append(next(reversed(net.first._forward_hooks.values())))
    assert footprint(net) == clean
    for handle in handles:
        handle.remove()


def test_a_forward_method_set_on_the_instance_is_restored(net, x):
    net.first.forward = own = lambda x: x * 3
    with Model(net).trace(x) as run:
        assert run.first.input is x
        assert torch.equal(run.first.output, x * 3)
    assert net.first.__dict__["forward"] is own
    with Model(net).trace(x) as run:
        run.first.skip(inputs(1))
    assert net.first.__dict__["forward"] is own
    assert torch.equal(run.result, net.last(net.layers[2](net.layers[1](net.layers[0](inputs(1))))))


def test_a_forward_pass_that_is_replaced_during_the_run(net, x):
    """accelerate, for example, puts forward passes on modules and removes them, also at the end of a pipeline call."""
    clean = footprint(net)
    with Model(net).trace(x) as run:
        run.first.input, run.layers[0].input
        net.first.forward = own = lambda x: x * 3
    assert net.first.__dict__.pop("forward") is own
    assert footprint(net) == clean
    assert torch.equal(run.result, net(x))


def test_hooks_of_accelerate_that_go_during_the_run(x):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    def forward(self, x):
        x = self.part(x)
        remove_hook_from_module(self.part)
        return x

    net = Calling(forward, part=linear())
    clean = footprint(net)
    add_hook_to_module(net.part, ModelHook())
    with Model(net).trace(x) as run:
        run.part.input
    assert torch.equal(run.result, net.part(x))
    left = footprint(net)
    assert [left[name][:3] for name in left] == [clean[name][:3] for name in clean]
    plain = Calling(forward, part=linear())
    add_hook_to_module(plain.part, ModelHook())
    plain(x)
    assert net.part.__dict__.keys() == plain.part.__dict__.keys()


@pytest.mark.parametrize("touch", ["input", "output"])
def test_a_copy_of_a_module_made_in_the_body_is_a_module_of_its_own(net, x, touch):
    with Model(net).trace(x) as run:
        getattr(run.layers[1], touch)
        clone = copy.deepcopy(net.layers[1])
        with torch.no_grad():
            for p in clone.parameters():
                p.zero_()
        assert torch.equal(clone(x), x), "its weights are zero, so what is left is the residual"
    assert torch.equal(clone(x), x)
    assert torch.equal(run.result, net(x))


def test_a_model_that_swallows_everything_on_its_way_out(x):
    def forward(self, x):
        try:
            return self.first(x)
        except BaseException:
            return self.second(x)

    net = Calling(forward, first=linear(1), second=linear(2))
    clean = footprint(net)
    with Model(net).trace(x) as run:
        run.first.output
        run.second.output = inputs(1)
        run.stop()
    assert footprint(net) == clean


def test_an_error_on_the_way_out_does_not_hide_the_bodys(x):
    def forward(self, x):
        try:
            return self.first(x)
        finally:
            raise RuntimeError("on the way out")

    net = Calling(forward, first=linear())
    clean = footprint(net)
    with pytest.raises(KeyError) as caught, Model(net).trace(x) as run:
        run.first.output
        raise KeyError("mine")
    assert caught.value.__context__ is None
    assert footprint(net) == clean


def test_values_go_with_the_run(net, x):
    """Values may be large, so they are freed at once, not in the next garbage collection."""
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), Model(net).trace(x) as run:
            values = [weakref.ref(run.layers[1].input), weakref.ref(run.layers[1].output)]
            run.layers[2].output
        assert [value() for value in values] == [None, None], "the run holds on to no values once it has ended"
        assert run.result.shape == (2, 4)
    finally:
        gc.enable()


def test_values_of_a_step_go_with_the_step(net, x):
    values = []
    with torch.no_grad(), Model(net).generate(x, steps=4) as run:
        for step in run.steps:
            assert all(value() is None for value in values[: max(0, step.index - 1)])
            values.append(weakref.ref(run.layers[1].output))
    assert len(values) == 4


def test_a_dropped_run_needs_no_garbage_collection(net, x):
    clean = footprint(net)
    gc.disable()
    try:
        run = Model(net).trace(x)
        run.layers[1].input
        gone = weakref.ref(run)
        del run
        assert gone() is None and footprint(net) == clean
    finally:
        gc.enable()


def test_300_runs_leave_neither_hooks_nor_memory(x):
    net = Interrupted()
    model = Model(net, methods=["helper"])
    clean = footprint(net)

    def runs(count):
        for number in range(count):
            match number % 6:
                case 0:
                    with model.trace(x) as run:
                        run.layers[0].input
                        run.last.output = x
                case 1:
                    with model.generate(x, steps=2) as run:
                        for _ in run.steps:
                            run.layers[0].leaf.lin.output
                case 2:
                    run = model.trace(x)
                    run.layers[0].output
                    del run
                case 3:
                    with model.trace(x) as run:
                        run.first.output
                        run.stop()
                case 4:
                    with pytest.raises(OutOfOrderError), model.trace(x) as run:
                        run.last.output
                        run.layers[0].leaf.output
                case 5:
                    model.trace(x).result
            net.log.clear()

    runs(30)
    gc.collect()
    tracemalloc.start()
    start, _ = tracemalloc.get_traced_memory()
    objects = len(gc.get_objects())
    runs(300)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - start
    more = len(gc.get_objects()) - objects
    tracemalloc.stop()
    assert footprint(net) == clean
    assert grown < 100_000, f"{grown} bytes"
    assert more < 300, f"{more} objects: less than one a run"
