"""Records of many points, compared with hand-written hooks."""

from collections import OrderedDict, UserDict
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from diffsight import Model, OutOfOrderError
from diffsight.errors import InputError, PointNotFoundError, RunClosedError, UnknownKeyError
from helpers import footprint, outputs
from models.nets import Calling, linear


def test_keeps_every_layer(net, x):
    expected = [outputs(layer, net, x)[0] for layer in net.layers]
    with Model(net).trace(x) as run:
        kept = run.record("layers[*]")
    assert list(kept) == [f"layers[{i}].output" for i in range(3)]
    for value, wanted in zip(kept.values(), expected, strict=True):
        assert torch.equal(value, wanted)


def test_patterns(net, x):
    with Model(net).trace(x) as run:
        kept = run.record(["**.lin", "layers[1].*.input", "last.inputs", "output"])
    assert set(kept) == {
        *(f"layers[{i}].leaf.lin.output" for i in range(3)),
        "layers[1].leaf.input",
        "layers[1].out.input",
        "last.inputs",
        "output",
    }
    assert torch.equal(kept["output"], net(x))
    args, kwargs = kept["last.inputs"]
    assert torch.equal(args[0], outputs(net.layers[2], net, x)[0]) and kwargs == {}


def test_items_counted_from_the_end(net, x):
    model = Model(net)
    assert model.find_points("layers[-1].*.input") == model.find_points("layers[2].*.input")
    assert model["layers[-3].leaf"].path == "layers[0].leaf"
    with pytest.raises(PointNotFoundError, match="layers has no '-4'"):
        model.find_points("layers[-4]")
    named = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), last=nn.Tanh()))
    assert Model(named).find_points("[0]") == ["first.output"] and Model(named).find_points("[-1]") == ["last.output"]


def test_values_are_those_the_model_goes_on_with(net, x):
    with Model(net).trace(x) as run:
        kept = run.record("layers[0]")
        run.layers[0].output[:] = 0
        run.layers[1].output = torch.ones_like(x)
        also = run.record("layers[2].input")
    assert not kept["layers[0].output"].any()
    assert torch.equal(also["layers[2].input"], torch.ones_like(x))


def test_values_are_copies(x):
    first = linear()
    net = Calling(lambda m, x: m.first(x).zero_(), first=first)
    with Model(net).trace(x) as run:
        kept = run.record("first")
    assert torch.equal(kept["first.output"], first(x)) and not run.result.any()
    assert not kept["first.output"].requires_grad


def test_attached_values_carry_gradients(net, x):
    with Model(net).trace(x) as run:
        kept = run.record("layers[1]", detach=False)
    (gradient,) = torch.autograd.grad(run.result.sum(), kept["layers[1].output"])
    assert gradient.any()


@pytest.mark.parametrize("end", [lambda run: run.finish(), lambda run: run.stop()])
def test_an_attached_value_that_the_model_changes_in_place_is_an_error(x, end):
    net = torch.nn.Sequential(linear(), torch.nn.ReLU(inplace=True), linear(1))
    with pytest.raises(OutOfOrderError, match=r"\[0\].output, recorded at .*:\d+ with detach=False, was changed"):
        with Model(net).trace(x) as run:
            run.record(["[0]", "[2]"], detach=False)
            run[1].output
            end(run)
    with torch.no_grad(), Model(net).trace(x) as run:  # there is no graph: it is a copy
        kept = run.record("[0]", detach=False)
    assert torch.equal(kept["[0]"], net[0](x)) and (kept["[0]"] < 0).any()
    with Model(net).trace(x) as run:
        kept = run.record(["[1]", "[2]"], detach=False)
    kept["[2]"].mul_(2)
    assert torch.equal(run.result, kept["[2]"])


def test_device_dtype_and_memory(net, x):
    with Model(net).trace(x) as run:
        kept = run.record("layers[*]", device="cpu", dtype=torch.float16)
    assert {value.dtype for value in kept.values()} == {torch.float16}
    assert kept.nbytes == 3 * x.numel() * 2
    assert repr(kept) == "<record of 3 points: 3 tensors, 48 bytes on cpu>"


def test_whole_numbers_keep_their_type(gpt2, ids):
    with Model(gpt2).trace(ids) as run:
        kept = run.record("transformer.wte.input", dtype=torch.float16)
    assert torch.equal(kept["transformer.wte.input"], ids)


def test_a_list_per_step_in_a_loop(net, x):
    expected = outputs(net.layers[1], net.generate, x)
    with Model(net).generate(x) as run:
        kept = run.record("layers[1]")
        for _ in run.steps:
            pass
    assert len(kept["layers[1].output"]) == 3
    for value, wanted in zip(kept["layers[1].output"], expected, strict=True):
        assert torch.equal(value, wanted)


def test_what_the_model_passes_before_the_loop_begins(net, x):
    with Model(net).generate(x, steps=3) as run:
        kept = run.record("first")
        run.layers[0].output
        for _ in run.steps:
            pass
    expected = outputs(net.first, net.generate, x, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(kept["first.output"], expected)) and len(expected) == 3


def test_every_call_without_a_loop(net, x):
    """A point that is passed more than once has a list; one that is passed once has its value."""
    expected = outputs(net.layers[1], net.generate, x)
    with Model(net).generate(x) as run:
        kept = run.record("layers[1]")
    assert len(kept["layers[1].output"]) == len(expected) == 3
    assert all(torch.equal(a, b) for a, b in zip(kept["layers[1].output"], expected))
    shared = linear()
    with Model(Calling(lambda m, x: m.last(m.shared(m.shared(x))), shared=shared, last=linear())).trace(x) as run:
        kept = run.record(["shared", "last.input"])
    first, second = kept["shared.output"]
    assert torch.equal(first, shared(x)) and torch.equal(second, shared(shared(x)))
    assert torch.equal(kept["last.input"], second)


def test_one_value_per_step_before_and_after_a_loop(net, x):
    expected = outputs(net.layers[1], net.generate, x)
    with Model(net).generate(x) as run:
        kept = run.record(["layers[1]", "first"])
        run.first.output
        for _ in run.steps[:2]:
            pass
    assert len(kept["layers[1].output"]) == len(kept["first.output"]) == 3
    assert all(torch.equal(a, b) for a, b in zip(kept["layers[1].output"], expected))


def test_of_one_step(net, x):
    expected = outputs(net.layers[1], net.generate, x)
    each = []
    with Model(net).generate(x) as run:
        for step in run.steps:
            if step.index != 1:
                each.append(run.record("layers[1]"))
    assert torch.equal(each[0]["layers[1].output"], expected[0])
    assert torch.equal(each[1]["layers[1].output"], expected[2])


def test_changes_nothing(net, x):
    expected, before = net(x), footprint(net)
    with Model(net).trace(x) as run:
        run.record("**")
    assert torch.equal(run.result, expected) and footprint(net) == before


def test_what_matches_nothing_is_an_error(net, x):
    model = Model(net)
    for pattern, told in (("layer", "layers"), ("layers[7]", "layers"), ("layers[*].nothing", r"layers\[\*\].nothing")):
        with pytest.raises(PointNotFoundError, match=told), model.trace(x) as run:
            run.record(pattern)
    with pytest.raises(InputError, match="dtype"), model.trace(x) as run:
        run.record("last", dtype="half")
    with pytest.raises(InputError, match="device"), model.trace(x) as run:
        run.record("last", device="nowhere")


def test_what_lies_behind_is_an_error(net, x):
    model = Model(net)
    with pytest.raises(OutOfOrderError, match=r"layers\[0\].output"), model.trace(x) as run:
        run.layers[1].output
        run.record("layers[*]")
    with model.trace(x) as run:
        pass
    with pytest.raises(RunClosedError):
        run.record("last")


def test_a_point_where_the_model_stands(net, x):
    with Model(net).trace(x) as run:
        run.layers[0].output[:] = 1
        kept = run.record("layers[*]")
        run.layers[0].output = torch.zeros_like(x)
    assert list(kept) == [f"layers[{i}].output" for i in range(3)]
    assert torch.equal(kept["layers[0].output"], torch.zeros_like(x))
    assert torch.equal(kept["layers[1].output"], net.layers[1](torch.zeros_like(x)))


def test_objects_that_hold_tensors_are_copied_and_counted(gpt2, ids, greedy):
    """A cache of keys and values, which the model goes on filling."""
    with Model(gpt2).generate(ids, **greedy) as run:
        kept = run.record("output", dtype=torch.float64)
        for _ in run.steps:
            pass
    caches = [output.past_key_values for output in kept["output"]]
    assert [cache.get_seq_length() for cache in caches] == [3, 4, 5, 6]
    expected = gpt2(run.result[:, :5]).past_key_values
    for layer, other in zip(caches[2].layers, expected.layers):
        assert layer.keys.dtype == torch.float64
        assert torch.allclose(layer.keys, other.keys.double(), atol=1e-5)
        assert torch.allclose(layer.values, other.values.double(), atol=1e-5)
    inside = [tensor for cache in caches for layer in cache.layers for tensor in (layer.keys, layer.values)]
    logits = [output.logits for output in kept["output"]]
    assert kept.nbytes == sum(tensor.nbytes for tensor in (*inside, *logits))
    assert len(kept.tensors) == len(inside) + len(logits)


def test_objects_that_are_changed_later_are_copied_as_well(gpt2, ids, greedy):
    """Arrays, and a cache that is still empty."""
    with Model(gpt2).generate(ids, **greedy) as run:
        kept = run.record("transformer.h[0].attn.inputs")
    caches = [kwargs["past_key_values"] for _, kwargs in kept["transformer.h[0].attn.inputs"]]
    assert [cache.get_seq_length() for cache in caches] == [0, 3, 4, 5]
    seen = UserDict(count=np.zeros(1), names=set())

    def add(module, seen):
        seen["count"] += 1
        seen["names"].add(len(seen["names"]))
        return seen["count"]

    net = Calling(lambda m, x: x * float(m.add(seen)[0]) * float(m.add(seen)[0]), add=Calling(add))
    with Model(net).trace(torch.ones(1)) as run:
        kept = run.record(["add", "add.input"])
    assert [float(count[0]) for count in kept["add.output"]] == [1, 2] and run.result == 2
    assert [(float(given["count"][0]), given["names"]) for given in kept["add.input"]] == [(0, set()), (1, {0})]


def test_objects_without_tensors_are_kept_as_they_are(net, x):
    thing, generator = object(), torch.Generator()

    class Takes(torch.nn.Module):
        def forward(self, x, *others):
            return x

    with Model(Takes()).trace(x, thing, generator, net) as run:
        kept = run.record("inputs")
    (_, *others), _ = kept["inputs"]
    assert others[0] is thing and others[1] is generator and others[2] is net
    assert len(kept.tensors) == 1


def test_a_path_in_the_record_that_is_a_pattern(net, x):
    with Model(net).trace(x) as run:
        kept = run.record("layers[*]")
    assert torch.equal(kept["layers[1]"], kept["layers[1].output"])
    assert "layers[7]" not in kept and kept.get("layers[7]") is None
    with pytest.raises(UnknownKeyError, match=r"there is no 'layers\[2\].input' in the record \(did you mean"):
        kept["layers[2].input"]


def test_paths_that_are_no_paths(net, x):
    model = Model(net)
    with model.trace(x) as run:
        for pattern in (run.layers[0], [run.layers[0]]):
            with pytest.raises(InputError, match=r"named by its path, such as 'layers\[0\]'"):
                run.record(pattern)
        with pytest.raises(InputError, match=r"named by its path, such as 'layers\[0\]'"):
            run.follow(run.layers[0], print)
        for call in (run.record, partial(run.follow, function=print), partial(run.at, index=0)):
            for path in (3, None, 1.5):
                with pytest.raises(InputError, match=rf"named by its path.* not by {type(path).__name__}"):
                    call(path)
        with pytest.raises(PointNotFoundError, match=r"there is no 'outptu' \(did you mean 'output'"):
            run.record("layers[*].outptu")
        with pytest.raises(PointNotFoundError, match=r"there is no 'layer' \(did you mean 'layers'"):
            run.record("layer[*]")


def test_paths_that_begin_with_an_index():
    net, x = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()), torch.randn(2, 3)
    with torch.no_grad(), Model(net).trace(x) as run:
        kept = run.record(["[0].output", "[*].input"])
        followed = []
        run.follow("[1]", followed.append)
        assert torch.equal(run.at("[0].output", 0), net[0](x)[0])
    assert set(kept) == {"[0].output", "[0].input", "[1].input"}
    assert torch.equal(kept["[1].input"], net[0](x)) and torch.equal(followed[0], net(x))
