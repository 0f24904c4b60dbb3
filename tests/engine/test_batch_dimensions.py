"""Rows where the layout of a value changes from call to call, or cannot be found out by trying larger batches."""

import functools
import gc
import queue
import random
import threading
import weakref
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from diffsight import Model
from diffsight.engine import batch_dimensions, larger_batches
from diffsight.errors import InputError, NeverReachedError
from diffsight.extending import flow_of
from models.nets import Noisy


class Flips(nn.Module):
    """Its middle has the time first if an argument, an attribute, the mode or the rank of the input says so."""

    def __init__(self):
        super().__init__()
        self.middle, self.is_flipped = nn.Identity(), False
        self.options, self.names = {"flip": False}, ["flip"]
        self.config = SimpleNamespace(middle=SimpleNamespace(flip=False), layers=[{"flip": False}])
        self.config.whole = self.config

    kind = "batch first"

    def forward(self, x, flip=False):
        by_attribute = self.is_flipped or self.options["flip"] or self.kind == "time first" or not self.names
        by_config = self.config.middle.flip or self.config.layers[0]["flip"]
        if flip or by_attribute or by_config or not self.training or x.ndim == 4:
            return self.middle(x.transpose(0, 1)).transpose(0, 1)
        return self.middle(x)


def row_of(net, x, path="middle", **kwargs):
    """Return row 1 of a value, and the whole value; the row is None if it cannot be cut."""
    with torch.no_grad(), Model(net).trace(x, **kwargs) as run:
        whole = run[path].output
        try:
            return run.rows[1][path].output, whole
        except InputError as error:
            assert "cannot be cut into rows" in str(error)
            return None, whole


@pytest.mark.parametrize(
    "flip",
    [
        lambda net: setattr(net, "is_flipped", True),
        lambda net: setattr(net, "kind", "time first"),
        lambda net: net.options.update(flip=True),
        lambda net: net.names.clear(),
        lambda net: setattr(net.config.middle, "flip", True),
        lambda net: net.config.layers[0].update(flip=True),
        lambda net: net.eval(),
        lambda net: setattr(net, "middle", nn.Identity()) or net.eval(),
    ],
)
def test_a_layout_that_a_setting_changes_is_found_again(flip):
    net, x = Flips(), torch.randn(2, 2, 4)
    assert torch.equal(row_of(net, x)[0], x[1:])
    flip(net)
    assert row_of(net, x)[0] is None
    net = Flips()
    assert row_of(net.eval(), x)[0] is None
    assert torch.equal(row_of(net.train(), x)[0], x[1:])


class Mixes(nn.Module):
    """Puts what a method of its part returns through its last part."""

    def __init__(self):
        super().__init__()
        self.part, self.last = Flips(), nn.Identity()

    def forward(self, x):
        return self.last(self.mix(self.part(x)))

    def mix(self, x):
        return x


def turned(x):
    return x.transpose(0, 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda net, patch: patch.setattr(Mixes, "mix", lambda self, x: turned(x)),
        lambda net, patch: setattr(net, "mix", turned),
        lambda net, patch: patch.setattr(Flips, "forward", lambda self, x: turned(x)),
        lambda net, patch: setattr(net.part, "forward", turned),
    ],
)
def test_a_layout_that_other_code_changes_is_found_again(change, monkeypatch):
    net, x = Mixes(), torch.randn(2, 2, 4)
    assert torch.equal(row_of(net, x, "last")[0], x[1:])
    change(net, monkeypatch)
    row, whole = row_of(net, x, "last")
    assert row is None and torch.equal(whole, turned(x))


def test_methods_that_a_module_holds_in_turn():
    net, x = Mixes(), torch.randn(2, 2, 4)
    net.mix = MethodType(lambda self, x: x, net)
    assert torch.equal(row_of(net, x, "last")[0], x[1:])
    net.mix = MethodType(lambda self, x: turned(x), net)
    assert row_of(net, x, "last")[0] is None


class WithMethods(dict):
    """Takes any name for a key, as the configurations of many repositories do."""

    __getattr__ = dict.__getitem__


def test_a_config_that_takes_any_name_for_a_key():
    net, x = Flips(), torch.randn(2, 2, 4)
    net.options = WithMethods(flip=False, inner=WithMethods(depth=2))
    assert torch.equal(row_of(net, x)[0], x[1:])
    net.options["flip"] = True
    assert row_of(net, x)[0] is None


def test_functions_that_a_module_holds_in_turn():
    """A new function may be at the address of one that is gone."""
    net, x = Mixes(), torch.randn(2, 2, 4)
    for turn in range(6):
        net.mix = (lambda x: turned(x)) if turn % 2 else (lambda x: x)
        assert (row_of(net, x, "last")[0] is None) == bool(turn % 2)


def test_a_layout_that_an_argument_changes_is_found_again():
    net, x = Flips(), torch.randn(2, 2, 4)
    assert torch.equal(row_of(net, x)[0], x[1:])
    assert row_of(net, x, flip=True)[0] is None
    assert row_of(net, torch.randn(2, 2, 4, 1))[0] is None
    assert torch.equal(row_of(net, x, flip=False)[0], x[1:])


class Twice(Flips):
    def generate(self, x):
        return self(x, flip=True) + self(x)


def test_rows_of_each_call_of_a_model_in_one_run():
    x = torch.randn(2, 2, 4)
    with Model(Twice()).generate(x) as run:
        with pytest.raises(InputError, match="its first dimension is not the batch"):
            run.rows[1].middle.output
        first, second = run.middle.output, run.middle.calls[1].output
        assert torch.equal(run.rows[1].middle.calls[1].output, second[1:])
        with pytest.raises(InputError, match="cannot be cut into rows"):
            run.rows[1].middle.output
    assert torch.equal(first, x.transpose(0, 1))


def test_a_row_of_a_value_that_the_model_has_passed():
    x = torch.randn(2, 2, 4)
    with torch.no_grad(), Model(WithTable()).trace(x) as run:
        whole = run.last.output
        run.output
        assert torch.equal(run.rows[1].last.output, whole[1:])
    with Model(Twice()).generate(x) as run:
        first = run.middle.output
        second = run.middle.calls[1].output
        with pytest.raises(InputError, match="when the call that it belongs to had returned"):
            run.rows[1].middle.output
    assert first is not second


class Routed(nn.Module):
    """The expert gets the tokens that are positive, wherever they are."""

    def __init__(self):
        super().__init__()
        self.expert = nn.Identity()

    def forward(self, x):
        tokens = x.flatten()
        chosen = (tokens > 0).nonzero()[:, 0]
        return tokens.index_put((chosen,), self.expert(tokens[chosen])).view_as(x)


def test_tokens_of_an_expert_are_rows_only_where_each_row_has_one():
    net = Routed()
    both, second, first = (
        torch.eye(2),
        torch.tensor([[0.0, 0], [1, 1]]),
        torch.tensor([[1.0, 2, 0], [0, 0, 0], [0, 0, 3]]),
    )
    assert torch.equal(row_of(net, both, "expert")[0], torch.ones(1))
    assert row_of(net, second, "expert")[0] is None and row_of(net, first, "expert")[0] is None
    assert torch.equal(row_of(net, both, "expert")[0], torch.ones(1))


class WithTable(nn.Module):
    """The table has an entry for each of two tokens."""

    def __init__(self, size=None):
        super().__init__()
        self.table, self.last, self.size = nn.Embedding(2, 4), nn.Linear(4, 4), size

    def forward(self, x):
        assert self.size in (None, len(x)), "another batch"
        return self.last(x + self.table(torch.arange(2)))


def replaced():
    net = WithTable()
    net.last.forward = lambda x: x * 2
    return net


def bound():
    net = WithTable()
    net.last.forward = functools.partial(nn.Linear.forward, net.last)
    return net


@pytest.mark.parametrize("build", [WithTable, bound])
def test_a_table_as_long_as_the_batch_is_no_batch(build):
    net, x = build(), torch.randn(2, 2, 4)
    assert row_of(net, x, "table")[0] is None
    row, whole = row_of(net, x, "last")
    assert torch.equal(row, whole[1:])


@pytest.mark.parametrize(
    "build, why",
    [
        (lambda: WithTable(2), "fails with a larger batch .*another batch"),
        (replaced, "a Linear has a `forward` of its own"),
    ],
)
def test_where_no_larger_batch_can_be_tried_no_row_is_cut(build, why):
    for path in ("table", "last"):
        refused = pytest.raises(InputError, match=f"cannot be cut into rows: .*{why}")
        with refused, Model(build()).trace(torch.randn(2, 2, 4)) as run:
            run.rows[1][path].output


def test_rows_of_a_model_on_which_accelerate_has_put_hooks():
    hooks = pytest.importorskip("accelerate.hooks")
    net, x = WithTable(), torch.randn(2, 2, 4)
    hooks.add_hook_to_module(net.last, hooks.AlignDevicesHook(execution_device="cpu"))
    row, whole = row_of(net, x, "last")
    assert torch.equal(row, whole[1:]) and row_of(net, x, "table")[0] is None
    hooks.add_hook_to_module(net.last, type("Own", (hooks.ModelHook,), {})(), append=True)
    assert row_of(net, x, "last")[0] is None  # it may do anything


def test_what_is_found_is_kept_for_calls_of_the_same_kind(monkeypatch):
    tried, really = [], batch_dimensions.try_larger_batches
    monkeypatch.setattr(batch_dimensions, "try_larger_batches", lambda *args: tried.append(1) or really(*args))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=30)).eval()
    model = Model(gpt2)
    for ids in (torch.arange(10).view(2, 5), torch.arange(12).view(2, 6)):
        with torch.no_grad(), model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) as run:
            for _ in run.steps:
                assert run.rows[1].transformer.h[0].output.shape[0] == 1
    assert len(tried) <= 3  # the first step, the second with a past of several tokens, and perhaps one more


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_caches_that_the_call_has_begun_to_fill(options):
    """Bloom refuses a cache that is longer than its mask, and a static one has no place for more tokens."""
    config = BloomConfig(n_layer=2, n_head=2, hidden_size=16, vocab_size=30, pad_token_id=0)
    bloom, ids = BloomForCausalLM(config).eval(), torch.arange(10).view(2, 5)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, **options}
    with torch.no_grad(), Model(bloom).generate(ids, attention_mask=torch.ones_like(ids), **options) as run:
        for _ in run.steps:
            whole = run.transformer.h[1].output
            assert torch.equal(run.rows[1].transformer.h[1].output[0], whole[0][1:])


@pytest.mark.parametrize("change", [lambda net: None, lambda net: setattr(net, "seen", [])])
def test_settings_that_are_made_anew_in_each_call(monkeypatch, change):
    tried, really = [], batch_dimensions.try_larger_batches
    monkeypatch.setattr(batch_dimensions, "try_larger_batches", lambda *args: tried.append(1) or really(*args))
    net = Flips()
    for _ in range(3):
        change(net)
        net.state = object()
        assert row_of(net, torch.randn(2, 3, 4))[0] is not None
    assert len(tried) == 1
    for _ in range(2):  # where several dimensions have the size of the batch, each run looks again
        assert row_of(net, torch.randn(2, 2, 4))[0] is not None
    assert len(tried) == 3


def test_neither_a_run_nor_a_model_is_kept_alive():
    net = Flips()
    run = Model(net).trace(torch.randn(2, 2, 4))
    assert run.rows[1].middle.output is not None
    kept = weakref.ref(flow_of(run)), weakref.ref(net)
    run.finish()
    del run, net
    gc.collect()
    assert [one() for one in kept] == [None, None]


class CodeBook(nn.Module):
    """Its codes are moving averages, as those of VQ-VAE."""

    def __init__(self):
        super().__init__()
        self.part, self.codes = nn.Linear(4, 4), nn.Embedding(3, 4)

    def forward(self, x):
        x = self.part(x)
        with torch.no_grad():
            self.codes.weight.mul_(0.9).add_(0.1 * x.mean(0))
        return self.codes(torch.cdist(x, self.codes.weight).argmin(1))


class Followed(nn.Module):
    """Its second layer, a part of which is tied, follows the first one."""

    def __init__(self):
        super().__init__()
        self.part, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.third.weight = self.second.weight

    def forward(self, x):
        for own, other in zip(self.second.parameters(), self.part.parameters()):
            own.data = own.data * 0.9 + other.data * 0.1
        assert self.third.weight is self.second.weight
        return self.third(self.part(x))


class Adapts(nn.Module):
    """It takes a step of training in each call."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(4, 4)
        self.part.bias.requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.part.parameters(), 0.1)

    def forward(self, x):
        with torch.enable_grad():
            self.part(x).pow(2).sum().backward()
        self.optimizer.step()
        return self.part(x)


@pytest.mark.parametrize("kind", [CodeBook, Followed, Adapts])
def test_a_model_that_trains_in_its_forward_pass(kind):
    bare, x = kind(), torch.randn(2, 4)
    net = kind()
    net.load_state_dict(bare.state_dict())
    bare(x)
    with Model(net).trace(x) as run:
        assert len(run.rows[1].part.output) == 1
    for own, other in zip(net.parameters(), bare.parameters()):
        assert torch.allclose(own, other) and (own.grad is None) == (other.grad is None)
        assert own.grad is None or torch.allclose(own.grad, other.grad)


class Large(nn.Module):
    """A model that is too large to be copied and needs values, so that its weights are used."""

    def __init__(self, train):
        super().__init__()
        self.table, self.part, self.train_on = nn.Embedding(2**22, 3), nn.Linear(3, 3), train
        self.table.weight.requires_grad_(False)

    def forward(self, x):
        if x[0, 0].item() == 1:
            with torch.enable_grad():
                self.train_on(self.part, x)
        return self.part(x)


@pytest.mark.parametrize(
    "train",
    [
        lambda part, x: part.weight.data[0].mul_(0.5),
        lambda part, x: torch._foreach_mul_([part.bias.data], 0.5),
        lambda part, x: part.weight.data.__imul__(0.5),
        lambda part, x: part(x).sum().backward(),
        lambda part, x: setattr(part.weight, "data", part.weight.data * 0.5),
        lambda part, x: torch.mul(part.bias.data, 0.5, out=part.bias.data),
    ],
)
def test_weights_that_are_too_large_to_be_copied(train):
    net, bare, x = Large(train), nn.Linear(3, 3), torch.ones(2, 3)
    bare.load_state_dict(net.part.state_dict())
    train(bare, x)
    with Model(net).trace(x) as run, pytest.raises(InputError, match="it trains weights that are too large"):
        run.rows[1].part.output
    for own, other in zip(net.part.parameters(), bare.parameters()):
        assert torch.equal(own, other) and (own.grad is None) == (other.grad is None)
        assert own.grad is None or torch.equal(own.grad, other.grad)
    row, whole = row_of(Large(train), torch.zeros(2, 3), "part")
    assert torch.equal(row, whole[1:])


def test_reading_a_row_draws_no_random_numbers():
    x, results = torch.randn(2, 4), []
    for reads in (False, True):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        net = Noisy()
        with torch.no_grad(), Model(net).trace(x) as run:
            if reads:
                assert len(run.rows[1].part.output) == 1
        results.append(run.result)
    assert torch.equal(*results)


def tiny_t5():
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()


def test_rows_of_an_encoder_that_is_called_before_the_forward_pass():
    ids = torch.randint(1, 50, (2, 6))
    with torch.no_grad(), Model(tiny_t5()).generate(ids, max_new_tokens=3, min_new_tokens=3) as run:
        whole = run.encoder.block[0].layer[0].output[0]
        assert torch.equal(run.rows[1].encoder.block[0].layer[0].output[0], whole[1:])
        assert torch.equal(run.rows[0].encoder.output[0], run.encoder.output[0][:1])
        for _ in run.steps:
            whole = run.decoder.block[1].output[0]
            assert torch.equal(run.rows[1].decoder.block[1].output[0], whole[1:])


def test_a_step_with_several_beams_for_each_row():
    ids = torch.randint(1, 50, (2, 6))
    refused = pytest.raises(InputError, match="no tensor that the model is called with has a first dimension of 2")
    with refused, torch.no_grad(), Model(tiny_t5()).generate(ids, max_new_tokens=3, num_beams=2) as run:
        run.rows[1].decoder.block[0].output


class InChunks(nn.Module):
    """Decodes videos in as many chunks as they have frames."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(4, 4)

    def forward(self, x):
        return torch.cat([self.part(frames) for frames in x.flatten(0, 1).chunk(x.shape[1])]).view_as(x)


class TakesBest(nn.Module):
    """The part gets the tokens that it likes best, one for each input on average."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(4, 4)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        best = tokens[:, 0].topk(len(x)).indices
        return tokens.index_add(0, best, self.part(tokens[best])).view_as(x)


@pytest.mark.parametrize("kind", [InChunks, TakesBest])
def test_entries_that_grow_with_the_batch_and_are_not_its_rows(kind):
    row, whole = row_of(kind(), torch.arange(24.0).view(2, 3, 4), "part")
    assert row is None and len(whole) == 2


class Similar(nn.Module):
    """Compares every input with the others."""

    def __init__(self):
        super().__init__()
        self.noise, self.part = nn.Dropout(), nn.Identity()

    def forward(self, x):
        x = self.noise(x)
        return self.part((x @ x.T).fill_diagonal_(-1e9))


@pytest.mark.parametrize("is_training", [False, True])
def test_rows_that_differ_by_their_place_or_by_chance(is_training):
    row, whole = row_of(Similar().train(is_training), torch.randn(3, 8), "part")
    assert torch.equal(row, whole[1:2])


@dataclass(slots=True)
class InSlots:
    flip: bool = False


class OfClass:
    flip = False


FLIP = False


class Asks(nn.Module):
    """Its middle has the time first if a function finds a setting."""

    def __init__(self, options, ask):
        super().__init__()
        self.middle, self.options, self.ask = nn.Identity(), options, ask

    def forward(self, x):
        return turned(self.middle(turned(x))) if self.ask(self.options) else self.middle(x)


@pytest.mark.parametrize(
    ("options", "ask", "flip"),
    [
        (InSlots(), lambda own: own.flip, lambda net, patch: setattr(net.options, "flip", True)),
        (OfClass(), lambda own: own.flip, lambda net, patch: patch.setattr(OfClass, "flip", True)),
        ({"plain": 0}, lambda own: "plain" not in own, lambda net, patch: setattr(net, "options", {"flip": 0})),
        ({"plain"}, lambda own: not own, lambda net, patch: net.options.clear()),
        (np.bool_(False), bool, lambda net, patch: setattr(net, "options", np.bool_(True))),
        (None, lambda own: FLIP, lambda net, patch: patch.setitem(globals(), "FLIP", True)),
    ],
)
def test_a_layout_that_an_unusual_setting_changes_is_found_again(options, ask, flip, monkeypatch):
    net, x = Asks(options, ask), torch.randn(2, 2, 4)
    assert torch.equal(row_of(net, x)[0], x[1:])
    flip(net, monkeypatch)
    assert row_of(net, x)[0] is None


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_may_change_the_layout(register):
    net, x = nn.Sequential(nn.Identity(), nn.Identity()), torch.randn(2, 2, 4)
    getattr(net[0], register)(lambda module, args, output=None: (args[0].transpose(0, 1),))
    net[1].register_forward_pre_hook(lambda module, args: args[0] if isinstance(args[0], tuple) else None)
    assert row_of(net, x, "1")[0] is None
    batch = torch.randn(2, 3, 4)
    net[0]._forward_hooks.clear()
    net[0]._forward_pre_hooks.clear()
    net[0].register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(row_of(net, batch, "1")[0], batch[1:] + 1)


GLOBAL = torch.Generator()


def draws(generator):
    return lambda x: x + torch.rand(x.shape, generator=generator)


class Helper:
    def __init__(self, generator):
        self.generator = generator

    def __call__(self, x):
        return x + torch.rand(x.shape, generator=self.generator)


@pytest.mark.parametrize("ask", [draws(GLOBAL), Helper(GLOBAL), lambda x: x + torch.rand(x.shape, generator=GLOBAL)])
def test_generators_of_functions_and_helpers_stay_as_they_are(ask):
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.ask = nn.Identity(), ask

        def forward(self, x):
            return self.part(self.ask(x))

    net, x = Draws(), torch.randn(2, 4)
    GLOBAL.manual_seed(1)
    expected, state = net(x), GLOBAL.get_state()
    GLOBAL.manual_seed(1)
    row, whole = row_of(net, x, "part")
    assert torch.equal(whole, expected) and torch.equal(row, expected[1:])
    assert torch.equal(GLOBAL.get_state(), state)


class Counts:
    def __init__(self):
        self.lock, self.calls = threading.Lock(), 0


class Guarded(nn.Module):
    """Counts its calls in an object with a lock, which cannot be copied as a whole."""

    def __init__(self, counts):
        super().__init__()
        self.part, self.counts = nn.Identity(), counts

    def forward(self, x):
        x = self.part(x)
        with self.counts.lock:
            self.counts.calls += 1
        return x * self.counts.calls


def test_objects_that_cannot_be_copied_as_a_whole():
    counts, x = Counts(), torch.randn(2, 4)
    net = nn.Sequential(Guarded(counts), Guarded(counts))
    assert torch.equal(row_of(net, x, "0.part")[0], x[1:])
    assert counts.calls == 2


def test_generators_of_python_are_not_run():
    net, x = nn.Sequential(nn.Identity(), nn.Identity()), torch.randn(2, 4)
    net.scales = (scale for scale in range(9))
    assert row_of(net, x, "0")[0] is None and next(net.scales) == 0


def test_weights_that_the_first_call_creates():
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(4))
    with pytest.raises(InputError, match="it has weights that its first call creates: call the model once"):
        with torch.no_grad(), Model(net).trace(torch.randn(2, 4)) as run:
            run.rows[0][0].output


@pytest.mark.parametrize("path", ["0", "1", "1.0"])
def test_rows_beside_a_compiled_part(path):
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())), torch.randn(3, 4)
    net[1] = torch.compile(net[1], backend="eager")
    row, whole = row_of(net, x, path)
    assert torch.equal(row, whole[1:2])


def test_rows_beside_a_scripted_part():
    net = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    assert row_of(net, torch.randn(3, 4), "0")[0] is None


@pytest.mark.parametrize(
    "hook",
    [
        lambda module, args, output: print(end=""),
        lambda module, args, output: {}.setdefault("seen", []).append(output.detach()),
        lambda module, args, output: output * 1 if module.training else None,
        functools.partial(lambda name, module, args, output: None, "a"),
    ],
)
def test_hooks_that_only_look_leave_the_rows(hook):
    net, x = nn.Sequential(nn.Identity(), nn.Identity()), torch.randn(2, 2, 4)
    net[1].register_forward_hook(hook)
    assert torch.equal(row_of(net, x, "0")[0], x[1:])


RNG = np.random.default_rng(0)


def noise():
    return RNG.normal()


class OfHelper(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Identity()

    def draw(self):
        return noise()

    def forward(self, x):
        return self.part(x) + self.draw()


class OfStaticMethod(OfHelper):
    @staticmethod
    def draw():
        return RNG.normal()


class OfClassAttribute(OfHelper):
    rng = RNG

    def draw(self):
        return self.rng.normal()


class OfDefault(OfHelper):
    def draw(self, rng=RNG):
        return rng.normal()


SETTINGS = SimpleNamespace(rng=RNG)


class OfSettings(OfHelper):
    def draw(self):
        return SETTINGS.rng.normal()


class OfProperty(OfHelper):
    @property
    def draw(self):
        return RNG.normal


@pytest.mark.parametrize("kind", [OfHelper, OfStaticMethod, OfClassAttribute, OfDefault, OfSettings, OfProperty])
def test_generators_that_methods_reach_stay_as_they_are(kind):
    net, state = kind(), RNG.bit_generator.state
    assert row_of(net, torch.randn(2, 4), "part")[0] is not None
    RNG.normal()
    after, RNG.bit_generator.state = RNG.bit_generator.state, state
    RNG.normal()
    RNG.normal()
    assert after == RNG.bit_generator.state


class InContainers(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Identity()
        self.held = {"lock": threading.Lock(), "calls": 0}
        self.others = [Counts(), Slotted()]

    def forward(self, x):
        self.held["calls"] += 1
        for one in self.others:
            one.calls += 1
        return self.part(x) * self.held["calls"] * self.others[0].calls


class Slotted:
    __slots__ = ("calls", "lock")

    def __init__(self):
        self.lock, self.calls = threading.Lock(), 0


def test_containers_with_something_that_cannot_be_copied():
    net, x = InContainers(), torch.randn(2, 4)
    assert torch.equal(row_of(net, x, "part")[0], x[1:])
    assert (net.held["calls"], net.others[0].calls, net.others[1].calls) == (1, 1, 1)


class Freed:
    count = 0

    def __del__(self):
        Freed.count += 1


def test_what_does_something_when_it_is_freed_is_not_copied():
    net = nn.Sequential(nn.Identity(), nn.Identity())
    net.held = Freed()
    assert row_of(net, torch.randn(2, 4), "0")[0] is None
    net.held = [net.held]
    assert row_of(net, torch.randn(2, 4), "0")[0] is None
    gc.collect()
    assert Freed.count == 0


class Locks(nn.Module):
    """Holds its lock while it calls its part, and counts in a container that cannot be copied as a whole."""

    def __init__(self):
        super().__init__()
        self.part, self.lock = nn.Identity(), threading.Lock()
        self.held = OrderedDict(lock=threading.RLock(), calls=0)

    def forward(self, x):
        with self.lock:
            self.held["calls"] += 1
            return self.part(x) * self.held["calls"]


def test_locks_that_the_running_call_holds():
    net, x = Locks(), torch.randn(2, 4)
    assert torch.equal(row_of(net, x, "part")[0], x[1:])
    assert net.held["calls"] == 1 and not net.lock.locked()


class Threaded(nn.Module):
    """Uses what threads share: a queue as a log, an event, a semaphore, a lock with its condition, a pool."""

    def __init__(self):
        super().__init__()
        self.part, self.log, self.ready, self.slots = nn.Identity(), queue.Queue(), threading.Event(), [None]
        self.slots[0], self.lock, self.pool = threading.Semaphore(1), threading.Lock(), ThreadPoolExecutor(1)
        self.conditions = [threading.Condition(self.lock), threading.Condition(threading.RLock())]

    def forward(self, x):
        self.log.put(len(x))
        self.ready.set()
        with self.slots[0], self.lock:
            self.conditions[0].notify()
        with self.conditions[0], self.conditions[1]:
            self.conditions[1].notify_all()
        return self.part(x) + self.pool.submit(torch.ones_like, x).result() * self.ready.wait() * self.log.get()


def test_what_threads_share():
    net, x = Threaded(), torch.randn(2, 4)
    net.log.put(1)
    assert torch.equal(row_of(net, x, "part")[0], x[1:])
    assert net.log.queue == deque([2]) and not net.lock.locked()


def test_a_copy_waits_for_no_other_thread():
    class Waiting(Threaded):
        def forward(self, x):
            return self.part(x * self.log.get())

    net = Waiting()
    net.log.put(1)
    with Model(net).trace(torch.randn(2, 4)) as run:
        with pytest.raises(InputError, match="a copy of the model would wait for another thread"):
            run.rows[1].part.output
    assert net.log.empty()


class Sorts(nn.Module):
    """Sorts its batch, perhaps at random, around a layer."""

    def __init__(self, order=lambda lengths: lengths.argsort(stable=True)):
        super().__init__()
        self.middle, self.drop, self.order = nn.Linear(4, 4), nn.Dropout(0.1), order

    def forward(self, x, lengths):
        order = self.order(lengths)
        return self.drop(self.middle(x[order]))[order.argsort()]


class Chunks(nn.Module):
    """Computes its frames in as many chunks, each as long as the batch."""

    def __init__(self):
        super().__init__()
        self.middle, self.drop = nn.Linear(4, 4), nn.Dropout(0.1)

    def forward(self, x, lengths):
        chunks = self.drop(x).flatten(0, 1).chunk(x.shape[1])
        return torch.cat([self.middle(chunk) for chunk in chunks])


class Swaps(nn.Module):
    """Exchanges the halves of its batch."""

    def __init__(self):
        super().__init__()
        self.middle, self.drop = nn.Linear(4, 4), nn.Dropout(0.1)

    def forward(self, x, lengths):
        return self.middle(torch.cat(self.drop(x).chunk(2)[::-1]))


@pytest.mark.parametrize("kind", [Sorts, Chunks, Swaps])
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("is_large", [False, True])
def test_rows_in_another_order(monkeypatch, kind, is_training, is_large):
    monkeypatch.setattr(larger_batches, "_SMALL", 0 if is_large else 10**7)
    net, x = kind().train(is_training), torch.randn(2, 6, 4)
    for lengths in ([3, 3], [3, 1]):
        row, whole = row_of(net, x, lengths=torch.tensor(lengths))
        stays = kind is Sorts and lengths == [3, 3]
        assert torch.equal(row, whole[1:]) if stays else row is None


@pytest.mark.parametrize("shuffle", [torch.randperm, np.random.permutation, lambda n: random.sample(range(n), n)])
def test_rows_in_an_order_drawn_at_random(shuffle):
    net, x = Sorts(lambda lengths: torch.as_tensor(shuffle(len(lengths)))), torch.randn(3, 4)
    for _ in range(8):
        assert row_of(net, x, lengths=torch.ones(3))[0] is None


@pytest.mark.parametrize("is_large", [False, True])
def test_rows_chosen_by_their_numbers_stay_in_order(monkeypatch, is_large):
    class LastTokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.middle = nn.Linear(4, 4)

        def forward(self, x, lengths):
            return self.middle(x[torch.arange(len(x)), lengths])

    monkeypatch.setattr(larger_batches, "_SMALL", 0 if is_large else 10**7)
    row, whole = row_of(LastTokens(), torch.randn(3, 6, 4), lengths=torch.tensor([3, 5, 1]))
    assert torch.equal(row, whole[1:2])


@pytest.mark.parametrize(
    "draw",
    [
        torch.randn_like,
        lambda x: torch.empty_like(x).bernoulli_(0.5),
        nn.Dropout(),
        lambda x: torch.distributions.Normal(0.0, 1.0).sample(x.shape),
        lambda x: torch.randint(0, 9, x.shape),
        lambda x: torch.as_tensor(np.random.standard_normal(x.shape), dtype=x.dtype),
        lambda x: nn.functional.gumbel_softmax(x, dim=-1),
        lambda x: nn.utils.rnn.pad_packed_sequence(
            nn.utils.rnn.pack_padded_sequence(
                torch.randn_like(x), [5] * len(x), batch_first=True, enforce_sorted=False
            ),
            batch_first=True,
        )[0],
    ],
)
def test_rows_of_a_model_that_draws_random_numbers(draw):
    class Noises(nn.Module):
        def __init__(self):
            super().__init__()
            self.middle = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

        def forward(self, x):
            x = x * draw(x)
            return self.middle(x, x, x)[0]

    with torch.no_grad(), Model(Noises()).trace(torch.randn(3, 5, 4)) as run:
        rows = [row.middle.output[0] for row in run.rows]
        assert torch.equal(torch.cat(rows), run.middle.output[0])


def test_rows_of_layers_that_are_left_out_at_random():
    class LayerDrop(nn.Module):
        def __init__(self):
            super().__init__()
            self.middle = nn.Linear(4, 4)

        def forward(self, x):
            return self.middle(x) if torch.rand([]) > 0.5 else x

    for seed in range(8):
        torch.manual_seed(seed)
        with torch.no_grad(), Model(LayerDrop()).trace(torch.randn(3, 4)) as run:
            try:
                whole = run.middle.output
            except NeverReachedError:
                continue
            try:
                assert torch.equal(run.rows[1].middle.output, whole[1:2])
            except InputError as error:
                assert "with a larger batch, the model does not call it" in str(error)


@pytest.mark.parametrize(
    "reorder",
    [
        lambda x: x[torch.arange(len(x) - 1, -1, -1)],
        lambda x: torch.concat([x[1:], x[:1]]),
        lambda x: torch.vstack([x[1:], x[:1]]),
        lambda x: torch.stack([*x][::-1]),
        lambda x: torch.index_select(input=x, dim=0, index=torch.tensor([1, 2, 0])),
        torch.flipud,
        lambda x: torch.rot90(x, 2),
        lambda x: torch.vstack([*x][::-1]),
        lambda x: x[None, torch.tensor([1, 2, 0])][0],
        lambda x: nn.functional.embedding(torch.tensor([1, 2, 0]), x),
        lambda x: x[torch.arange(len(x)).mul_(2).remainder_(len(x))],
    ],
)
def test_large_models_that_reorder_their_batch(monkeypatch, reorder):
    class Reorders(nn.Module):
        def __init__(self):
            super().__init__()
            self.middle = nn.Linear(4, 4)

        def forward(self, x):
            return self.middle(reorder(x))

    monkeypatch.setattr(larger_batches, "_SMALL", 0)
    assert row_of(Reorders(), torch.randn(3, 4))[0] is None
