"""Methods that are called directly, past `forward`: `Model(vae, methods=["encode"])`."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from diffsight import Model, OutOfOrderError
from diffsight.errors import NeverReachedError, PointNotFoundError
from helpers import footprint
from models.nets import Calling, Net, inputs, linear


class Coder(nn.Module):
    """Encodes and decodes, by methods that call modules and each other."""

    def __init__(self):
        super().__init__()
        self.inner = linear(1)
        self.calls = 0

    def encode(self, x, scale: float = 1.0, *, shift: float = 0.0):
        """Doc of encode."""
        self.calls += 1
        return self.inner(x) * scale + shift

    def decode(self, z):
        return z - 1

    def both(self, x):
        return self.decode(self.encode(x))

    @staticmethod
    def double(x):
        return x * 2

    @classmethod
    def name(cls, x):
        return (cls, x)

    def forward(self, x):
        return self.both(x)


@pytest.fixture
def coder():
    return Coder()


@pytest.fixture
def net():
    """Return a net that uses its coder only through methods, twice."""
    return Calling(
        lambda self, x: self.coder.decode(self.last(self.coder.encode(self.coder.encode(x, 2.0), shift=1.0))),
        coder=Coder(),
        last=linear(2),
    )


METHODS = ["coder.encode", "coder.decode"]


def test_values(coder, x):
    with Model(coder, methods=["encode", "decode"]).trace(x) as run:
        assert run.encode.input is x and run.encode.inputs == ((x,), {})
        encoded = run.encode.output
        assert torch.equal(encoded, coder.inner(x) * 1.0 + 0.0)
        assert run.decode.input is encoded
        assert torch.equal(run.decode.output, encoded - 1)
    assert torch.equal(run.result, coder(x))


def test_values_of_a_childs_method(net, x):
    with Model(net, methods=METHODS).trace(x) as run:
        first = run.coder.encode.output
        assert torch.equal(first, net.coder.inner(x) * 2.0)
        assert run.coder.encode.calls[1].inputs == ((first,), {"shift": 1.0})
        assert torch.equal(run.coder.encode.calls[1].output, net.coder.inner(first) + 1.0)
        hidden = run.last.output
        assert run.coder.decode.input is hidden
    assert torch.equal(run.result, net(x))


def test_edits(net, x):
    with Model(net, methods=METHODS).trace(x) as run:
        run.coder.encode.output = inputs(1)
        run.coder.encode.calls[1].inputs = ((inputs(2), 3.0), {})
        run.coder.decode.input[:, 0] = 0
        run.coder.decode.output += 5
    hidden = net.last(net.coder.encode(inputs(2), 3.0)).detach()
    hidden[:, 0] = 0
    assert torch.equal(run.result, hidden - 1 + 5)


def test_an_output_can_be_none(coder, x):
    """A hook would take None for 'unchanged', but methods have no hooks."""
    net = Calling(lambda self, x: self.part.decode(x) is None, part=coder)
    with Model(net, methods=["part.decode"]).trace(x) as run:
        assert run.part.decode.output is not None
    assert run.result is False


def test_modules_within_a_method(net, x):
    with Model(net, methods=METHODS).trace(x) as run:
        assert run.coder.encode.input is x
        assert torch.equal(run.coder.inner.output, net.coder.inner(x))
        run.coder.inner.calls[1].output = inputs(1)
    assert torch.equal(run.result, net.last(inputs(1) + 1.0) - 1)


def test_skip(net, x):
    with Model(net, methods=METHODS).trace(x) as run:
        run.coder.encode.skip(inputs(1))
        run.coder.encode.calls[1].skip(run.coder.encode.calls[1].input)
    assert torch.equal(run.result, net.last(inputs(1)) - 1)
    assert net.coder.calls == 0


def test_order(net, x):
    with Model(net, methods=METHODS).trace(x) as run:
        run.last.output
        for late in (
            lambda: run.coder.encode.output,
            lambda: run.coder.encode.calls[1].output,
            lambda: run.coder.encode.calls[1].input,
            lambda: setattr(run.coder.encode, "output", x),
            lambda: run.coder.encode.skip(x),
        ):
            with pytest.raises(OutOfOrderError, match=r"coder\.encode"):
                late()
        assert torch.equal(run.coder.decode.output, net(x))
    with Model(net, methods=METHODS).trace(x) as run, pytest.raises(NeverReachedError, match=r"coder\.decode"):
        run.coder.decode.calls[1].output


def test_calls_from_the_body_do_not_fire(net, x):
    with Model(net, methods=METHODS).trace(x) as run:
        run.coder.encode.output = inputs(1)
        assert torch.equal(run.coder.encode(x, shift=2.0), net.coder.inner(x) + 2.0)
        assert torch.equal(net.coder.encode(x), net.coder.inner(x))
        run.last.output
    assert torch.equal(run.result, net.last(net.coder.encode(inputs(1), shift=1.0)) - 1)


def test_the_method_is_unchanged_after_a_run(net, x):
    coder, seen, forward = net.coder, [], net.function
    plain = inspect.signature(coder.encode)

    def looking(self, x):
        seen.append(inspect.signature(self.coder.encode))
        return forward(self, x)

    net.function = looking
    with Model(net, methods=METHODS).trace(x) as run:
        run.coder.encode.input
        assert inspect.signature(coder.encode) == plain
        assert coder.encode.__name__ == "encode" and coder.encode.__doc__ == "Doc of encode."
        assert isinstance(coder, Coder) and type(coder).__name__ == "Coder"
        assert repr(coder) == repr(Coder())
        run.coder.decode.output
        assert inspect.signature(coder.decode) == inspect.signature(Coder().decode)
    assert seen == [plain] and type(coder) is Coder


def test_the_forward_pass_is_unchanged_after_a_run(gpt2, ids):
    plain = inspect.signature(gpt2.forward)
    with Model(gpt2).trace(ids) as run:
        run.input, run.transformer.h[0].input
        assert inspect.signature(gpt2.forward) == plain
        assert inspect.signature(gpt2.transformer.h[0].forward) == inspect.signature(gpt2.transformer.h[1].forward)


def test_a_method_of_transformers(gpt2, ids, greedy):
    name = "prepare_inputs_for_generation"
    lengths = []
    with Model(gpt2, methods=[name]).generate(ids, **greedy) as run:
        for index in range(4):
            lengths.append(run[name].calls[index].output["input_ids"].shape[1])
    assert lengths == [3, 1, 1, 1]
    assert torch.equal(run.result, gpt2.generate(ids, **greedy))
    assert type(gpt2).__name__ == "GPT2LMHeadModel" and name not in vars(gpt2)


def test_the_methods_of_an_autoencoder():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=2, norm_num_groups=2, sample_size=8).eval()
    clean = footprint(vae)
    sample = torch.randn(1, 3, 8, 8)
    with torch.no_grad(), Model(vae, methods=["encode", "decode"]).trace(sample) as run:
        assert run.encode.input is sample
        latents = run.encode.output.latent_dist.mode()
        run.decode.input = latents * 0.5
        image = run.decode.output.sample
    with torch.no_grad():
        plain = vae.encode(sample).latent_dist.mode()
        assert torch.equal(latents, plain) and torch.equal(image, vae.decode(plain * 0.5).sample)
    assert torch.equal(run.result.sample, image)
    assert footprint(vae) == clean


@pytest.mark.parametrize("method", ["double", "name"], ids=["static", "of the class"])
def test_methods_without_self_are_rejected(method):
    net = Calling(lambda self, x: getattr(self.coder, method)(x), coder=Coder())
    with pytest.raises(PointNotFoundError, match=rf"coder\.{method}.*not called on a Coder"):
        Model(net, methods=[f"coder.{method}"])


# ---- copies


class Counter(nn.Module):
    """A scheduler of a pipeline that steps copies of it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def step(self, x):
        self.count += 1
        return x + self.count


def test_a_copy_is_stepped_not_the_original(x):
    made = []

    def forward(self, x):
        made.append(copy.deepcopy(self.counter))
        made.append(copy.copy(self.counter))
        x = made[0].step(x)
        x = made[0].step(x)
        return made[1].step(x)

    net = Calling(forward, counter=Counter())
    with Model(net, methods=["counter.step"]).trace(x) as run:
        assert torch.equal(run.counter.step.output, x + 1)
        assert torch.equal(run.counter.step.calls[1].output, x + 1 + 2)
        run.counter.step.calls[2].input = x
    assert torch.equal(run.result, x + 1)
    assert [made[0].count, made[1].count, net.counter.count] == [2, 1, 0]


def test_an_unread_copy(x):
    net = Calling(lambda self, x: copy.deepcopy(self.counter).step(x), counter=Counter())
    with Model(net, methods=["counter.step"]).trace(x) as run:
        run.inputs
    assert torch.equal(run.result, x + 1) and net.counter.count == 0


def test_a_copy_that_stays_is_an_ordinary_object(x):
    def forward(self, x):
        self.kept = copy.deepcopy(self.counter)
        return self.kept.step(x)

    plain, net = (Calling(forward, counter=Counter()) for _ in range(2))
    plain(x)
    with Model(net, methods=["counter.step"]).trace(x) as run:
        run.counter.step.output
    assert footprint(net) == footprint(plain)
    assert type(net.kept) is Counter
    assert pickle.loads(pickle.dumps(net.kept)).count == 1


class Made(Counter):
    """A counter that is made with arguments, and pickled with them."""

    def __new__(cls, *, title):
        made = super().__new__(cls)
        object.__setattr__(made, "title", title)
        return made

    def __init__(self, *, title):
        super().__init__()

    def __getnewargs_ex__(self):
        return (), {"title": self.title}


class Remade(Counter):
    """A counter that is pickled in its own way."""

    def __reduce__(self):
        return type(self), (), {"count": self.count}

    def __setstate__(self, state):
        self.count = state["count"]


@pytest.mark.parametrize("make", [Counter, lambda: Made(title="a"), Remade], ids=["usual", "arguments", "own"])
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickles_are_of_the_original_class(x, make, protocol):
    net = Calling(lambda self, x: self.counter.step(x), counter=make())
    kind, plain = type(net.counter), pickle.loads(pickle.dumps(net.counter, protocol))
    with Model(net, methods=["counter.step"]).trace(x) as run:
        run.counter.step.input
        assert type(net.counter) is not kind
        again = pickle.loads(pickle.dumps({"counter": net.counter}, protocol))["counter"]
        assert type(copy.deepcopy(net.counter)) is type(net.counter)  # the model may step it instead
    assert type(again) is type(net.counter) is kind and vars(again).keys() == vars(plain).keys()
    assert torch.equal(again.step(x), run.result)


# ---- how they are shown and named


def test_unknown_methods(coder):
    with pytest.raises(PointNotFoundError, match="encoed"):
        Model(coder, methods=["encoed"])
    with pytest.raises(PointNotFoundError, match="calls"):
        Model(coder, methods=["calls"])
    with pytest.raises(PointNotFoundError, match="nowhere"):
        Model(coder, methods=["nowhere.encode"])


def test_print_shows_the_methods(net):
    model = Model(net, methods=METHODS)
    assert "coder.encode()" in repr(model) and "coder.decode()" in repr(model)
    assert "coder.encode()" in repr(model.coder) and "coder.encode" not in repr(model.last)
    assert "encode" in dir(model.coder)
    assert model.coder.encode.path == "coder.encode" and "coder.encode" in repr(model.coder.encode)


def test_two_runs_tap_the_same_method(net):
    model = Model(net, methods=METHODS)
    with model.trace(inputs(1)) as x, model.trace(inputs(2)) as y:
        y.coder.encode.output = x.coder.encode.output
        y.coder.decode.input
        y.stop()
        assert torch.equal(
            x.coder.decode.input, net.last(net.coder.encode(net.coder.encode(inputs(1), 2.0), shift=1.0))
        )
    assert torch.equal(x.result, net(inputs(1)))
    assert type(net.coder) is Coder


def test_the_models_own_generate():
    net, x = Net(), inputs(1)
    model = Model(net, methods=["generate"])
    with model.generate(x, steps=2) as run:
        assert run.generate.inputs == ((x,), {"steps": 2})
        assert torch.equal(run.generate.output, net.generate(x, steps=2))
        run.generate.output = torch.ones_like(x)
    assert torch.equal(run.result, torch.ones_like(x))
    assert type(net) is Net and "generate" not in vars(net)
