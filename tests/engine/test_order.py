"""A value asked for too late is an error at that line: never a hang, and never the value of a later call."""

import pytest
import torch

from diffsight import Model, OutOfOrderError
from diffsight.errors import NeverReachedError, PointNotFoundError
from helpers import outputs, replaced
from models.nets import Calling, Net, inputs, linear

# where the model stands, and what lies behind it
BEHIND = [
    ("layers[0].output", "first.output"),
    ("last.output", "layers[2].output"),
    ("last.input", "layers[2].output"),
    ("layers[1].out.output", "layers[1].leaf.output"),  # its parent is still running
    ("layers[1].out.output", "layers[1].leaf.lin.output"),
    ("layers[1].output", "layers[1].leaf.output"),  # its parent has returned
    ("layers[1].output", "layers[1].leaf.lin.input"),
    ("layers[2].input", "layers[1].leaf.output"),  # nothing in there was ever asked for
    ("layers[2].leaf.lin.output", "layers[1].leaf.lin.output"),
    ("last.output", "layers[0].leaf.lin.output"),
    ("last.output", "layers[0].leaf.lin.input"),
]


def read(run, point):
    path, _, part = point.rpartition(".")
    return getattr(run[path], part)


def assign(run, point):
    path, _, part = point.rpartition(".")
    setattr(run[path], part, torch.zeros(2, 4))


def skip(run, point):
    run[point.rpartition(".")[0]].skip(torch.zeros(2, 4))


@pytest.fixture(params=BEHIND, ids=lambda pair: " then ".join(pair))
def behind(request):
    return request.param


uses = pytest.mark.parametrize("use", [read, assign, skip], ids=lambda use: use.__name__)


@uses
def test_too_late(net, x, behind, use):
    here, asked = behind
    with Model(net).trace(x) as run:
        read(run, here)
        ran = list(net.log)
        with pytest.raises(OutOfOrderError) as caught:
            use(run, asked)
        assert (asked.rpartition(".")[0] if use is skip else asked) in str(caught.value)
        assert here in str(caught.value), "the message says where the model stands"
        assert net.log == ran, "the model did not have to move to know"
        run.output  # it goes on from there
    assert torch.equal(run.result, Net()(x))


@uses
def test_never_of_a_later_pass(net, x, behind, use):
    here, asked = behind
    with Model(net).generate(x) as run:
        read(run, here)
        with pytest.raises(OutOfOrderError):
            use(run, asked)
    assert torch.equal(run.result, Net().generate(x))


def test_never_the_value_of_a_later_step(net, x, behind):
    here, asked = behind
    values = []
    with Model(net).generate(x) as run:
        for step in run.steps:
            read(run, here)
            with pytest.raises(OutOfOrderError):
                read(run, asked)
            if step.index == 1:
                values.append(run.output)
    assert torch.equal(values[0], Net().generate(x, steps=2))
    assert torch.equal(run.result, Net().generate(x))


def test_asking_again_is_again_an_error(net, x):
    with Model(net).generate(x) as run:
        run.last.output
        for _ in range(3):
            with pytest.raises(OutOfOrderError):
                run.layers[0].leaf.lin.output
            with pytest.raises(OutOfOrderError):
                run.first.output
    assert torch.equal(run.result, Net().generate(x))


def test_gpt2(gpt2, ids, greedy):
    model = Model(gpt2)
    with model.generate(ids, **greedy) as run:
        run.lm_head.output
        for late in (
            lambda: run.transformer.output,
            lambda: run.transformer.h[2].output,
            lambda: run.transformer.h[0].mlp.output,
            lambda: run.transformer.h[0].attn.c_attn.output,
            lambda: run.transformer.wte.input,
        ):
            with pytest.raises(OutOfOrderError):
                late()
        run.output
    assert torch.equal(run.result, gpt2.generate(ids, **greedy))


def test_a_module_that_is_never_called(net, x):
    with Model(net).trace(x) as run:
        run.first.output
        with pytest.raises(NeverReachedError, match=r"unused\.output"):
            run.unused.output
    assert torch.equal(run.result, net(x))
    assert issubclass(NeverReachedError, OutOfOrderError)


def test_a_call_that_is_never_made(net, x):
    with Model(net).trace(x) as run, pytest.raises(NeverReachedError, match=r"first\..*output"):
        run.first.calls[1].output
    assert torch.equal(run.result, net(x))


def test_a_module_that_this_step_does_not_call(x):
    net = Calling(lambda self, x, odd: self.odd(x) if odd else self.even(x), odd=linear(1), even=linear(2))

    def generate(x):
        for number in range(4):
            x = net(x, number % 2 == 1)
        return x

    net.generate = generate
    plain = outputs(net.odd, generate, x)
    got, missed = [], []
    with Model(net).generate(x) as run:
        for step in run.steps:
            try:
                got.append(run.odd.output)
            except OutOfOrderError as error:
                missed.append(step.index)
                assert "odd.output" in str(error) and f"step {step.index}" in str(error)
    assert missed == [0, 2] and len(got) == 2 and all(map(torch.equal, got, plain))


def test_a_module_list_has_no_values(net, x):
    with Model(net).trace(x) as run:
        with pytest.raises(PointNotFoundError, match=r"layers has no values.*ModuleList"):
            run.layers.output
        with pytest.raises(PointNotFoundError, match="layers has no values"):
            run.layers.input
        with pytest.raises(PointNotFoundError, match="layers has no values"):
            run.layers.output = x
        assert net.log == []
    assert torch.equal(run.result, net(x))


def test_inside_a_skipped_module(net, x):
    with Model(net).trace(x) as run:
        run.layers[1].skip(x)
        with pytest.raises(NeverReachedError, match=r"layers\[1\]\.leaf"):
            run.layers[1].leaf.output


class Sharing(torch.nn.Module):
    """One module at the top, used inside `block` between `before` and `after`; `times` calls of the block."""

    def __init__(self, times=1):
        super().__init__()
        self.times = times
        self.shared = linear(1)
        middle = Calling(
            lambda self, x: self.after(self.shared(self.before(x))),
            before=linear(2),
            shared=self.shared,
            after=linear(3),
        )
        self.block = Calling(lambda self, x: self.middle(x), middle=middle)

    def forward(self, x):
        for _ in range(self.times):
            x = self.block(x)
        return x


@pytest.mark.parametrize("times", [1, 3])
class TestInsideAModuleThatIsRunning:
    """The model stands in `block.middle`, reached through another name: nothing in there has been counted."""

    def test_what_lies_ahead_is_found(self, times, x):
        net = Sharing(times)
        with Model(net).trace(x) as run:
            run.shared.output
            after = run.block.middle.after.output
            assert torch.equal(after, outputs(net.block.middle.after, net, x)[0])
        assert torch.equal(run.result, net(x))

    def test_what_lies_behind_is_an_error(self, times, x):
        net = Sharing(times)
        with Model(net).trace(x) as run:
            run.shared.output
            with pytest.raises(OutOfOrderError, match=r"block\.middle\.before\.output"):
                run.block.middle.before.output
        assert torch.equal(run.result, net(x))

    def test_and_still_one_when_asked_again(self, times, x):
        with Model(Sharing(times)).trace(x) as run:
            run.shared.output
            for _ in range(2):
                with pytest.raises(OutOfOrderError):
                    run.block.middle.before.output

    def test_assigning_to_what_lies_behind_reaches_no_later_call(self, times, x):
        net = Sharing(times)
        run = Model(net).trace(x)
        run.shared.output
        with pytest.raises(OutOfOrderError, match=r"block\.middle\.before\.output"):
            run.block.middle.before.output = torch.zeros(2, 4)
            run.finish()
        assert torch.equal(run.result, net(x))

    def test_with_hooks_of_the_users_own_on_it(self, times, x):
        """Hooks make PyTorch look for hooks again after the call, so that one put on meanwhile fires at its end."""
        net = Sharing(times)
        for module in net.modules():
            module.register_forward_hook(lambda *_: None)
            module.register_forward_pre_hook(lambda *_: None)
        with Model(net).trace(x) as run:
            run.shared.output
            after = run.block.middle.after.output
            assert torch.equal(after, outputs(net.block.middle.after, net, x)[0])
        assert torch.equal(run.result, net(x))


def test_the_first_call_is_not_that_of_a_later_round(x):
    with Model(Sharing(3)).trace(x) as run:
        run.shared.calls[1].output
        with pytest.raises(OutOfOrderError):
            run.block.middle.after.output


def test_a_module_that_two_others_share(x):
    shared = linear(1)
    net = Calling(
        lambda self, x: self.one(self.two(x)),
        one=Calling(lambda self, x: self.inner(x), inner=shared),
        two=Calling(lambda self, x: self.inner(x), inner=shared),
    )
    with Model(net).trace(x) as run:
        assert torch.equal(run.one.inner.output, shared(x)), "its first call is in `two`, by whatever name"
    with Model(net).trace(x) as run:
        run.two.output
        with pytest.raises(OutOfOrderError):
            run.one.inner.output


def test_the_shared_embeddings_of_t5(t5, ids):
    decoder_ids = torch.tensor([[0, 7]])
    encoded, decoded = outputs(t5.shared, t5, input_ids=ids, decoder_input_ids=decoder_ids)

    model = Model(t5)
    with model.trace(input_ids=ids, decoder_input_ids=decoder_ids) as run:
        assert torch.equal(run.decoder.embed_tokens.output, encoded)
        run.encoder.output
        assert torch.equal(run.shared.calls[1].output, decoded)
    with model.trace(input_ids=ids, decoder_input_ids=decoder_ids) as run:
        run.encoder.output
        for late in (
            lambda: run.shared.output,
            lambda: run.encoder.embed_tokens.output,
            lambda: run.encoder.embed_tokens.input,
            lambda: run.decoder.embed_tokens.output,
            lambda: run.encoder.block[0].layer[0].output,
            lambda: run.encoder.block[0].layer[0].SelfAttention.q.output,
        ):
            with pytest.raises(OutOfOrderError):
                late()
        assert torch.equal(run.shared.calls[1].output, decoded)


def test_the_encoder_of_t5_runs_before_the_first_step(t5, ids, greedy):
    with Model(t5).generate(ids, **greedy) as run:
        (hidden,) = outputs(t5.encoder.block[0], t5.generate, ids, **greedy)
        assert torch.equal(run.encoder.block[0].output[0], hidden[0])
        for step in run.steps:
            with pytest.raises(OutOfOrderError):
                run.encoder.block[0].layer[1].output
            assert step.index < 4
    assert torch.equal(run.result, t5.generate(ids, **greedy))


class Tool(torch.nn.Module):
    """A module that is used by a method, past its forward pass."""

    def __init__(self):
        super().__init__()
        self.inner = linear(5)

    def use(self, x):
        return self.inner(x)

    def forward(self, x):
        raise AssertionError("not called")


def using(times):
    def forward(self, x):
        for _ in range(times):
            x = self.after(self.tool.use(x))
        return x

    return Calling(forward, tool=Tool(), after=linear(6))


@pytest.mark.parametrize("methods", [[], ["tool.use"]], ids=["modules", "methods"])
def test_in_a_module_that_is_used_past_its_forward_pass(methods, x):
    net = using(3)
    inner = outputs(net.tool.inner, net, x)
    with Model(net, methods=methods).trace(x) as run:
        assert torch.equal(run.tool.inner.output, inner[0])
        assert torch.equal(run.tool.inner.calls[2].output, inner[2])
    with Model(net, methods=methods).trace(x) as run:
        run.after.output
        with pytest.raises(OutOfOrderError, match=r"tool\.inner\.output"):
            run.tool.inner.output


def test_a_method_that_was_called_before_it_was_asked_for(x):
    net = using(3)
    with Model(net, methods=["tool.use"]).trace(x) as run:
        run.after.output
        with pytest.raises(OutOfOrderError, match=r"tool\.use\.output"):
            run.tool.use.output
    with Model(net, methods=["tool.use"]).trace(x) as run:
        run.after.output
        with pytest.raises(OutOfOrderError, match=r"tool\.use\.input"):
            run.tool.use.input = inputs(1)


def test_a_module_whose_call_failed_and_was_caught(x):
    """A model that falls back: the call that failed has inputs, but no output."""

    def forward(self, x):
        try:
            y = self.fast(x)
        except RuntimeError:
            y = self.slow(x)
        return y

    fast = Calling(lambda self, x: self.inner(x), inner=torch.nn.Linear(3, 3))
    net = Calling(forward, fast=fast, slow=linear())
    with Model(net).trace(x) as run:
        assert run.fast.inner.input is x
        assert torch.equal(run.slow.output, net.slow(x))
    with Model(net).trace(x) as run, pytest.raises(OutOfOrderError, match=r"fast\.output"):
        run.fast.output
    assert torch.equal(run.result, net.slow(x))
    told = (
        r"fast\.inner\.output was asked for, but that call raised an error, which the model caught: RuntimeError: mat1"
    )
    with Model(net).trace(x) as run, pytest.raises(NeverReachedError, match=told):
        run.fast.inner.output


def test_a_module_that_is_called_again_after_its_call_failed(x):
    def forward(self, x):
        try:
            return self.inner(x[:, :3])
        except RuntimeError:
            return self.inner(x)

    net = Calling(forward, inner=linear())
    with Model(net).trace(x) as run:
        assert torch.equal(run.inner.calls[1].output, net.inner(x))
    told = r"inner\.output \(.*\): the call raised RuntimeError: mat1 .*\n.*assign to that call with `\.calls\[i\]`"
    with pytest.raises(NeverReachedError, match=told), Model(net).trace(x) as run:
        run.inner.output = torch.zeros(2, 4)
    with pytest.raises(NeverReachedError, match=r"(?s)the call raised .*at least as often"), Model(net).trace(x) as run:
        run.inner.output = torch.zeros(2, 4)
        run.inner.calls[2].output = torch.zeros(2, 4)
    with Model(net).trace(x) as run:
        run.inner.calls[1].output = torch.ones(2, 4)
    assert torch.equal(run.result, torch.ones(2, 4))


def test_inputs_that_the_call_has_changed_in_place():
    class InPlace(torch.nn.Module):
        def forward(self, x):
            return x.add_(1) * 2

    model = Model(torch.nn.Sequential(torch.nn.Identity(), InPlace()))
    with model.trace(torch.zeros(1, 3)) as run:
        run[1].output
        for _ in range(2):
            with pytest.raises(OutOfOrderError, match=r"\[1\].input was changed in place by the call whose output"):
                run[1].input
    with model.trace(torch.zeros(1, 3)) as run:
        given = run[1].input.clone()
        assert torch.equal(run[1].output, 2 * (given + 1))


@pytest.mark.parametrize("change", [lambda held: held["x"][0].add_(1), lambda held: held.update(y=1)])
def test_inputs_in_containers_that_the_call_has_changed(change):
    def forward(self, held):
        first = held["x"][0].clone()
        change(held)
        return first

    net = Calling(lambda self, x: self.inner({"x": [x]}), inner=Calling(forward))
    with Model(net).trace(torch.zeros(1, 3)) as run:
        run.inner.output
        with pytest.raises(OutOfOrderError, match=r"inner.input was changed in place by the call whose output"):
            run.inner.input


def test_the_inputs_of_the_call_at_whose_output_the_model_stands(net, x):
    lora = linear(7)
    with torch.no_grad(), Model(net).trace(x) as run:
        layer = run.layers[1]
        given = (layer.output, layer.input)[1]
        assert layer.inputs[0][0] is layer.input is given
        layer.output = layer.output + lora(layer.input)
    assert torch.equal(given, outputs(net.layers[0], net, x)[0])
    with replaced(net.layers[1], lambda output: output + lora(given)):
        assert torch.equal(run.result, net(x))


@pytest.mark.parametrize("use", [assign, skip], ids=lambda use: use.__name__)
def test_those_inputs_can_no_longer_be_changed(net, x, use):
    with Model(net).trace(x) as run:
        run.layers[1].output
        with pytest.raises(OutOfOrderError, match=r"layers\[1\].* was a.* too late"):
            use(run, "layers[1].input")
        run.layers[2].output
        with pytest.raises(OutOfOrderError, match=r"layers\[1\].input was asked for too late"):
            run.layers[1].input
