"""Edits: interventions that stay on a model. Expected values come from ordinary hooks on the bare module."""

import gc
import weakref

import pytest
import torch
from torch import nn

from diffsight import DiffusionModel, Model, OutOfOrderError
from diffsight.errors import InputError, NeverReachedError, RunClosedError
from diffsight.extending import owner_of, tree_of
from helpers import footprint, outputs, replaced
from models import diffusion
from models.nets import inputs, linear


class SAE(nn.Module):
    """An encoder and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = linear(11), linear(12)

    def forward(self, x):
        return self.decoder(self.encoder(x).relu())


@pytest.fixture
def model(net):
    return Model(net)


def double(net, x, *layers):
    """Return the result of the net with the outputs of these layers doubled, by ordinary hooks."""
    handles = [net.layers[index].register_forward_hook(lambda _, args, out: out * 2) for index in layers]
    try:
        return net(x)
    finally:
        for handle in handles:
            handle.remove()


# ---- a copy, or in place


def test_a_copy_that_shares_the_weights(model, net, x):
    before, bare = footprint(net), net(x)
    with model.edit() as edited:
        edited.layers[1].output = edited.layers[1].output * 2
    assert torch.equal(edited.trace(x).result, double(net, x, 1))
    assert torch.equal(model.trace(x).result, bare) and model.edits == [] and len(edited.edits) == 1
    assert edited.layers[1].leaf.lin.weight is net.layers[1].leaf.lin.weight
    assert type(edited) is Model and footprint(net) == before
    assert torch.equal(edited(x), bare), "a call is the bare call"


def test_in_place_and_cleared(model, net, x):
    with model.edit(inplace=True) as edited:
        model.layers[1].output = model.layers[1].output * 2
    assert edited is model
    assert torch.equal(model.trace(x).result, double(net, x, 1))
    model.clear_edits()
    assert model.edits == [] and torch.equal(model.trace(x).result, net(x))


def test_from_a_function(model, net, x):
    @model.edit
    def edited(run):
        run.layers[1].output = run.layers[1].output * 2

    def without_run():
        model.layers[1].output = model.layers[1].output * 2

    @model.edit(inplace=True)
    def same(run):
        run.layers[0].output = run.layers[0].output * 2

    assert same is model
    assert torch.equal(edited.trace(x).result, double(net, x, 1))
    assert torch.equal(model.trace(x).result, double(net, x, 0))
    model.clear_edits()
    assert torch.equal(model.edit(without_run).trace(x).result, double(net, x, 1))


async def later(run):
    run.layers[0].output[:] = 0


@pytest.mark.parametrize("wrong", [5, "layers[0]", lambda run, more: None, later, lambda run: (yield)])
def test_values_that_are_not_edits(model, wrong):
    with pytest.raises(InputError, match="takes"):
        model.edit(wrong)
    assert model.edits == []


def test_edits_can_be_read(model, x):
    with model.edit() as edited:
        edited.layers[1].output[:] = 0
        edited.last.input = edited.layers[1].output
    (edit,) = edited.edits
    assert edit.where.startswith(__file__) and repr(edit) == f"<edit at {edit.where}>"
    edited.trace(x).result
    assert repr(edit) == f"<edit at {edit.where}, touches layers[1].output, last.input>"
    assert repr(edit) in repr(edited) and "edit" not in repr(model)


# ---- several


def test_edits_stack_in_order(model, net, x):
    with model.edit() as first:
        first.layers[1].output = first.layers[1].output * 2
    with first.edit() as second:
        second.layers[1].output = second.layers[1].output + 1
    third = second.edit(lambda run: setattr(run.layers[1], "output", run.layers[1].output.tanh()))
    by_hand = (lambda out: out * 2, lambda out: out * 2 + 1, lambda out: (out * 2 + 1).tanh())
    for edited, edit in zip((first, second, third), by_hand):
        with replaced(net.layers[1], edit):
            expected = net(x)
        assert torch.equal(edited.trace(x).result, expected)
    assert [len(m.edits) for m in (model, first, second, third)] == [0, 1, 2, 3]
    third.clear_edits()
    assert torch.equal(third.trace(x).result, net(x)) and len(second.edits) == 2


@pytest.mark.parametrize("reads", [True, False])
def test_a_later_edit_comes_later_however_it_is_written(model, net, x, reads):
    """The first edit waits for the value, the second has assigned before the model moves."""
    with model.edit() as edited:
        edited.layers[1].output = edited.layers[1].output * 2
    with edited.edit(inplace=True):
        edited.layers[1].output = torch.ones(2, 4)
    with edited.edit(inplace=True):
        if reads:
            edited.layers[1].output = edited.layers[1].output + 3
    result = edited.trace(x).result
    with replaced(net.layers[1], lambda out: torch.full((2, 4), 4.0 if reads else 1.0)):
        assert torch.equal(result, net(x))


def test_the_body_comes_after_the_edits(model, net, x):
    with model.edit() as edited:
        edited.layers[0].output = edited.layers[0].output * 2
    layer = outputs(net.layers[0], net, x)[0]
    with edited.trace(x) as run:
        seen = run.layers[0].output
        run.layers[0].output = seen + 1
    with replaced(net.layers[0], lambda out: out * 2 + 1):
        assert torch.equal(run.result, net(x)) and torch.equal(seen, layer * 2)
    ahead = torch.ones(2, 4)
    with edited.trace(x) as run:
        run.layers[0].output = ahead  # written before the model moves, and still after the edit
    with replaced(net.layers[0], lambda out: ahead):
        assert torch.equal(run.result, net(x))


def test_an_assignment_far_ahead_comes_before_that_of_the_body(model, net, x):
    with model.edit() as edited:
        hidden = edited.layers[0].output
        edited.layers[2].output = hidden
    with edited.trace(x) as run:
        run.layers[2].output = torch.ones(2, 4)
        run.layers[1].output
        assert torch.equal(run.layers[2].output, torch.ones(2, 4))
    assert torch.equal(run.result, net.last(torch.ones(2, 4)))


def test_skip(model, net, x):
    with model.edit() as edited:
        edited.layers[1].skip(edited.layers[1].input)
    state = outputs(net.layers[0], net, x)[0]
    with replaced(net.layers[1], lambda out: state):
        expected = net(x)
    assert torch.equal(edited.trace(x).result, expected)
    with edited.trace(x) as run:
        run.layers[1].skip(torch.ones(2, 4))
    with replaced(net.layers[1], lambda out: torch.ones(2, 4)):
        assert torch.equal(run.result, net(x))


# ---- in every kind of run


def test_every_kind_of_run(model, net, x):
    with model.edit() as edited:
        edited.layers[1].output = edited.layers[1].output * 2
    expected, other = double(net, x, 1), inputs(1)
    for _ in range(2):
        assert torch.equal(edited.trace(x).result, expected)
    run = edited.trace(x)
    run.layers[2].input
    assert torch.equal(run.finish(), expected)
    with edited.trace(x):
        assert torch.equal(model.output, expected) and torch.equal(edited.output, expected)
    with edited.trace() as run:
        with run.invoke(x):
            late = edited.layers[1].output
        with run.invoke(other) as part:
            assert torch.equal(part.layers[1].output, 2 * outputs(net.layers[1], net, other)[0])
    assert torch.equal(run.result[0], expected) and torch.equal(late, 2 * outputs(net.layers[1], net, x)[0])
    with edited.trace(x) as run:
        kept = run.record("layers[1]")
    assert torch.equal(kept["layers[1].output"], late)


def test_rows_and_each(model, net, x):
    other = inputs(1)
    with model.edit() as edited:
        edited.layers[1].output = edited.layers[1].output * 2
    both = torch.cat([x, other])
    states = outputs(net.layers[1], net, both)[0] * 2
    with edited.trace([x, other]) as run:
        first, second = run.rows
        assert torch.equal(second.layers[1].output, states[2:])
        first.layers[1].output = torch.zeros(2, 4)
    assert torch.equal(run.result, net.last(net.layers[2](torch.cat([torch.zeros(2, 4), states[2:]]))))

    def body(row):
        row.layers[0].output
        return row.layers[1].output

    with edited.trace([x, other]) as run:
        seen = run.each(body)
    assert torch.equal(torch.cat(seen), states)


def test_rows_in_an_edit(model, net, x):
    @model.edit
    def edited(run):
        run.rows[1].layers[1].output = run.rows[0].layers[1].output

    states = outputs(net.layers[1], net, x)[0]
    assert torch.equal(edited.trace(x).result, net.last(net.layers[2](states[[0, 0]])))


def test_the_whole_run_is_the_scope(model, net, x):
    """Outside a loop over steps an edit is in the first call; every call has its number."""
    with model.edit() as once:
        once.layers[1].output = once.layers[1].output * 2
    with model.edit() as always:
        for call in range(1000):  # as many as come
            always.layers[1].calls[call].output = always.layers[1].calls[call].output * 2
    results = [edited.generate(x, steps=3).result for edited in (once, always)]
    for result, only in zip(results, (0, None)):
        with replaced(net.layers[1], lambda out: out * 2, only):
            assert torch.equal(result, net.generate(x, steps=3))


def test_steps(model, net, x):
    log = []
    with model.edit() as edited:
        for step in edited.steps:
            if step.index != 1:
                edited.layers[1].output = model.layers[1].output * 2
        log.append("behind the loop")
    count = 0

    def edit(out):
        nonlocal count
        count += 1
        return out if count == 2 else out * 2

    with replaced(net.layers[1], edit):
        expected = outputs(net.last, net.generate, x, steps=3)
    assert torch.equal(edited.generate(x, steps=3).result, expected[-1])
    with edited.generate(x, steps=3) as run:
        seen = [run.last.output for _ in run.steps]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected)) and len(seen) == 3
    assert log == ["behind the loop"] * 2


def test_edits_in_generated_text(gpt2, ids, greedy):
    with Model(gpt2).edit() as edited:
        for _ in edited.steps:
            edited.transformer.h[1].mlp.output[:] = 0
    with replaced(gpt2.transformer.h[1].mlp, torch.zeros_like):
        expected = gpt2.generate(ids, **greedy)
    assert torch.equal(edited.generate(ids, **greedy).result, expected)
    assert not torch.equal(expected, gpt2.generate(ids, **greedy))


def test_pipeline():
    pipe, call = diffusion.stable_diffusion(), diffusion.PIPELINES["stable_diffusion"].inputs()
    model = DiffusionModel(pipe)
    with model.edit() as once:
        once.unet.mid_block.output[:] = 0
    with model.edit() as always:
        for step in always.steps:
            assert step.timestep is not None
            always.unet.mid_block.output[:] = 0
    with always.edit(inplace=True):
        always.vae.decode.input[:] *= 0.5

    def expected(only, factor):
        decode = pipe.vae.decode
        pipe.vae.decode = lambda latents, *args, **kwargs: decode(latents * factor, *args, **kwargs)
        try:
            with replaced(pipe.unet.mid_block, torch.zeros_like, only):
                return pipe(**call, generator=torch.Generator().manual_seed(3)).images
        finally:
            del pipe.vae.decode

    assert torch.equal(torch.as_tensor(once.generate(**call, seed=3).images), torch.as_tensor(expected(0, 1)))
    with always.generate(**call, seed=3) as run:
        steps = [run.unet.mid_block.output.abs().max().item() for _ in run.steps]
    assert set(steps) == {0.0} and len(steps) > 1
    assert torch.equal(torch.as_tensor(run.images), torch.as_tensor(expected(None, 0.5)))


def test_branches_in_an_edit():
    pipe, call = diffusion.stable_diffusion(), diffusion.PIPELINES["stable_diffusion"].inputs()
    with DiffusionModel(pipe).edit() as edited:
        for _ in edited.steps:
            edited.uncond.unet.mid_block.output[:] = 0
    with edited.generate(**call, seed=3) as run:
        found = [(run.cond.unet.mid_block.output, run.uncond.unet.mid_block.output) for _ in run.steps]

    def without_uncond(out):
        out[0] = 0
        return out

    with replaced(pipe.unet.mid_block, without_uncond):
        expected = outputs(pipe.unet.mid_block, pipe, **call, generator=torch.Generator().manual_seed(3))
    assert len(found) == len(expected) > 1
    assert all(torch.equal(torch.cat([uncond, cond]), out) for (cond, uncond), out in zip(found, expected))


def test_pipeline_edit_behind_its_steps(monkeypatch):
    """What follows the loop in an edit can be read and edited: the latents that are decoded."""
    pipe, call = diffusion.stable_diffusion(), diffusion.PIPELINES["stable_diffusion"].inputs(output_type="pt")
    steps, seen = [], []
    with DiffusionModel(pipe).edit() as edited:
        for step in edited.steps:
            steps.append(step.index)
        seen.append(edited.vae.decode.input)
        edited.vae.decode.input = edited.vae.decode.input.flip(-1)
    images = edited.generate(**call, seed=3).images
    assert steps == [*range(diffusion.PIPELINES["stable_diffusion"].steps)]

    decode, latents = pipe.vae.decode, []

    def flipped(z, *args, **kwargs):
        latents.append(z)
        return decode(z.flip(-1), *args, **kwargs)

    monkeypatch.setattr(pipe.vae, "decode", flipped)
    expected = pipe(**call, generator=torch.Generator().manual_seed(3)).images
    assert torch.equal(images, expected)
    assert torch.equal(seen[0], latents[0])


def test_a_run_of_each_at_once(model, net, x):
    with model.edit() as edited:
        edited.layers[1].output = edited.layers[1].output * 2
    with model.trace(x) as plain, edited.trace(x) as changed:
        assert torch.equal(changed.layers[1].output, plain.layers[1].output * 2)
        assert torch.equal(model.layers[1].output, plain.layers[1].output), "the model's own run"
        assert torch.equal(edited.layers[1].output, changed.layers[1].output)


def test_a_run_of_the_plain_model_in_an_edit(model, net, x):
    other = inputs(5)
    with model.edit() as edited:
        with model.trace(other):
            hidden = model.layers[1].output
        edited.layers[1].output = hidden
    state = outputs(net.layers[1], net, other)[0]
    result = edited.trace(x).result
    with replaced(net.layers[1], lambda out: state):
        assert torch.equal(result, net(x))


def test_modes_are_those_of_the_run(model, net, x):
    modes = []

    @model.edit
    def edited(run):
        run.layers[1].output
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    with torch.no_grad():
        edited.trace(x).result
        edited.trace(x, grad=True).result
    with torch.inference_mode():
        edited.trace(x).result
    edited.trace(x).result
    assert modes == [(False, False), (True, False), (False, True), (True, False)]


# ---- modules attached


def test_attached_to_a_copy(model, net, x):
    before, sae = footprint(net), SAE()
    with model.edit() as edited:
        model.layers[1].output = model.layers[1].sae(model.layers[1].output, hook=True)
    edited.layers[1].sae = sae
    hidden = outputs(net.layers[1], net, x)[0]
    with edited.trace(x) as run:
        features = run.layers[1].sae.encoder.output
        out = run.layers[1].sae.output
        assert torch.equal(model.layers[1].output, out), "what the edit put there"
    assert torch.equal(features, sae.encoder(hidden)) and torch.equal(out, sae(hidden))
    with replaced(net.layers[1], sae):
        assert torch.equal(run.result, net(x))
    assert footprint(net) == before and not any("sae" in name for name in net.state_dict())
    for pattern in ("**", "layers[1].*", "layers[1].sae.*"):
        with edited.trace(x) as run:
            kept = run.record(pattern)
        assert any(name.startswith("layers[1].sae") for name in kept)
    assert not hasattr(model.layers[1], "sae") and "sae" in dir(edited.layers[1])
    assert "sae" in repr(edited)


def test_features_are_changed(model, net, x):
    sae = SAE()
    with model.edit() as edited:
        edited.layers[1].output = edited.layers[1].sae(edited.layers[1].output, hook=True)
    edited.layers[1].sae = sae
    with edited.trace(x) as run:
        run.layers[1].sae.encoder.output[:, 0] = 0

    def without_first(_, args, out):
        out[:, 0] = 0

    handle = sae.encoder.register_forward_hook(without_first)
    try:
        with replaced(net.layers[1], sae):
            assert torch.equal(run.result, net(x))
    finally:
        handle.remove()


def test_attached_in_place(model, net, x):
    sae, keys = SAE(), list(net.state_dict())
    model.layers[1].sae = sae
    with model.edit(inplace=True):
        model.layers[1].output = model.layers[1].sae(model.layers[1].output)
    assert net.layers[1].sae is sae and "layers.1.sae.encoder.weight" in net.state_dict()
    assert len(model.layers[1]) == 3
    result = model.trace(x).result
    with replaced(net.layers[1], sae):
        assert torch.equal(result, net(x))
    model.clear_edits()
    assert list(net.state_dict()) == keys and torch.equal(model.trace(x).result, net(x))


def test_attached_within_the_edit(model, net, x):
    """It is made once, in the first run."""
    with model.edit() as edited:
        edited.layers[1].sae = SAE()
        edited.layers[1].gain = linear(torch.randint(1000, ()).item())
        edited.layers[1].output = edited.layers[1].gain(model.layers[1].sae(model.layers[1].output, hook=True))
    first = edited.trace(x)
    features = first.layers[1].sae.encoder.output
    assert torch.equal(first.result, edited.trace(x).result)
    assert torch.equal(features, SAE().encoder(outputs(net.layers[1], net, x)[0]))
    assert not hasattr(net.layers[1], "sae") and not hasattr(model.layers[1], "sae")


def test_a_copy_of_a_copy_has_what_was_attached(model, net, x):
    with model.edit() as edited:
        edited.layers[0].output = edited.layers[0].sae(edited.layers[0].output)
    edited.layers[0].sae = SAE()
    with edited.edit() as second:
        second.layers[1].output = second.layers[0].sae(second.layers[1].output)
    assert owner_of(second.layers[0].sae) is owner_of(edited.layers[0].sae)
    result = second.trace(x).result
    with replaced(net.layers[0], SAE()), replaced(net.layers[1], SAE()):
        assert torch.equal(result, net(x))
    second.clear_edits()
    assert not hasattr(second.layers[0], "sae") and hasattr(edited.layers[0], "sae")


def test_an_attached_module_is_called_elsewhere(model, net, x):
    """Attached to the first layer, called behind the last one, and asked for before and after the model has moved."""
    with model.edit() as edited:
        edited.layers[2].output = edited.layers[0].sae(edited.layers[2].output, hook=True)
    edited.layers[0].sae = SAE()
    for early in (True, False):
        with edited.trace(x) as run:
            if not early:
                run.layers[1].output
            assert torch.equal(run.layers[0].sae.output, SAE()(outputs(net.layers[2], net, x)[0]))


def test_a_name_that_is_taken(model):
    with model.edit() as edited:
        edited.layers[0].output
    for name in ("leaf", "weight_of_nothing", "training"):
        if name == "weight_of_nothing":
            edited.layers[0].weight_of_nothing = linear()
        else:
            with pytest.raises(InputError, match=f"layers\\[0\\].{name} exists already"):
                setattr(edited.layers[0], name, linear())


def test_an_attached_module_learns(model, net, x):
    sae = SAE()
    with model.edit() as edited:
        edited.layers[1].output = edited.layers[1].sae(edited.layers[1].output)
    edited.layers[1].sae = sae
    edited.trace(x).result.square().sum().backward()
    found = sae.encoder.weight.grad.clone()
    sae.encoder.weight.grad = None
    with replaced(net.layers[1], sae):
        net(x).square().sum().backward()
    assert torch.equal(found, sae.encoder.weight.grad)


def test_on_a_pipeline():
    pipe, call = diffusion.stable_diffusion(), diffusion.PIPELINES["stable_diffusion"].inputs()
    model = DiffusionModel(pipe)
    names = list(pipe.unet.state_dict())
    with model.edit() as edited:
        for _ in edited.steps:
            edited.unet.mid_block.output = edited.unet.mid_block.scale(edited.unet.mid_block.output, hook=True)
    edited.unet.mid_block.scale = nn.Softsign()
    with edited.generate(**call, seed=0) as run:
        seen = [run.unet.mid_block.scale.output for _ in run.steps]
    states = []
    with replaced(pipe.unet.mid_block, lambda out: states.append(nn.functional.softsign(out)) or states[-1]):
        pipe(**call, generator=torch.Generator().manual_seed(0))
    assert len(seen) == len(states) > 1 and all(torch.equal(a, b) for a, b in zip(seen, states))
    assert list(pipe.unet.state_dict()) == names


# ---- errors, and how runs end


def fails_at_once(run):
    raise KeyError("mine")


def fails_on_its_way(run):
    run.layers[1].output
    raise KeyError("mine")


def fails_behind_its_steps(run):
    for _ in run.steps:
        pass
    raise KeyError("mine")


@pytest.mark.parametrize("edit", [fails_at_once, fails_on_its_way, fails_behind_its_steps])
@pytest.mark.parametrize("read", [None, "first", "last"])
def test_an_error_in_an_edit(model, net, x, edit, read):
    before, bare = footprint(net), net(x)
    edited = model.edit(edit)
    with pytest.raises(KeyError, match="mine") as caught:
        with edited.trace(x) as run:
            if read:
                run[read].output
    assert str(caught.traceback[-1].path) == __file__ and caught.traceback[-1].name == edit.__name__
    assert any(f"{__file__}:{edit.__code__.co_firstlineno}" in note for note in caught.value.__notes__)
    assert footprint(net) == before and torch.equal(model.trace(x).result, bare)


def test_order_holds_within_each_edit(model, net, x):
    def wrong(run):
        run.layers[1].output
        run.layers[0].output

    before = footprint(net)
    edited = model.edit(lambda run: run.layers[0].output).edit(wrong)
    with pytest.raises(OutOfOrderError, match=r"layers\[0\].output was asked for too late") as caught:
        with edited.trace(x) as run:
            run.last.output
    assert any(frame.name == "wrong" for frame in caught.traceback) and footprint(net) == before


def test_a_point_that_is_never_reached(model, net, x):
    with model.edit() as edited:
        edited.layers[0].output = edited.layers[0].output * 2
        edited.unused.output
        raise AssertionError("never")
    assert torch.equal(edited.trace(x).result, double(net, x, 0))


def test_an_edit_that_has_no_effect(model, net, x):
    for edit in (
        lambda run: setattr(run.unused, "output", x),
        lambda run: run.unused.output,
    ):
        with pytest.warns(UserWarning, match="did nothing in this run: the model never reached unused.output"):
            assert torch.equal(model.edit(edit).trace(x).result, net(x))


@pytest.mark.filterwarnings("error")
def test_no_warning_if_the_run_ends_early(model, net, x):
    with model.edit() as edited:
        edited.last.output[:] = 0
    with edited.trace(x) as run:
        run.layers[0].output
        run.stop()


def test_stop_in_an_edit(model, net, x):
    @model.edit
    def edited(run):
        kept.append(run.layers[1].output)
        run.stop()

    kept, before = [], footprint(net)
    with edited.trace(x) as run:
        first = run.layers[0].output
    net.log.clear()
    with pytest.raises(NeverReachedError, match="the run was stopped"), edited.trace(x) as run:
        run.last.output
    assert "last" not in net.log and footprint(net) == before
    with pytest.raises(RunClosedError, match="the run was stopped"):
        edited.trace(x).result
    states = [outputs(layer, net, x)[0] for layer in net.layers]
    assert torch.equal(first, states[0]) and all(torch.equal(state, states[1]) for state in kept)


def test_stop_before_the_model_moves(model, net, x):
    before = footprint(net)
    edited = model.edit(lambda run: run.stop())
    with edited.trace(x):
        pass
    with pytest.raises(RunClosedError):
        edited.trace(x).layers[0].output
    assert net.log == [] and footprint(net) == before


def test_an_edit_cannot_run_the_model(model, x):
    for edit in (lambda run: run.result, lambda run: run.each(lambda row: 0), lambda run: run.finish()):
        with pytest.raises(InputError, match="but cannot drive the run"):
            model.edit(edit).trace(x).result


def left_in_the_middle(log):
    def edit(run):
        try:
            run.layers[2].output
        finally:
            log.append("left")

    return edit


def test_an_error_in_the_body_ends_the_edits(model, net, x):
    log, before = [], footprint(net)
    with pytest.raises(KeyError), model.edit(left_in_the_middle(log)).trace(x) as run:
        run.layers[0].output
        raise KeyError("mine")
    assert log == ["left"] and footprint(net) == before


def test_an_error_after_the_end_leaves_no_other_edit(model, net, x):
    log, before = [], footprint(net)

    def waits_for_more(run):
        try:
            run.layers[0].calls[5].output
        finally:
            log.append("left")

    with pytest.raises(KeyError, match="mine"), pytest.warns(UserWarning, match=r"layers\[0\].calls\[5\].output"):
        model.edit(fails_behind_its_steps).edit(waits_for_more).trace(x).result
    assert log == ["left"] and footprint(net) == before


def test_an_interrupt_in_an_edit(model, net, x):
    def interrupted(run):
        run.layers[0].output
        raise KeyboardInterrupt

    log, before = [], footprint(net)
    edited = model.edit(left_in_the_middle(log)).edit(interrupted)
    with pytest.raises(KeyboardInterrupt):
        edited.trace(x).result
    assert log == ["left"] and footprint(net) == before


@pytest.mark.parametrize("bound", [True, False])
def test_a_run_that_is_dropped(model, net, x, bound):
    log, before = [], footprint(net)
    edited = model.edit(left_in_the_middle(log))
    run = edited.trace(x)
    hidden = run.layers[0].output if bound else model.layers[0].output
    known = weakref.ref(run)
    del run
    assert log == ["left"] and known() is None and footprint(net) == before and hidden.shape == x.shape


def test_many_runs_leave_nothing(model, net, x):
    with model.edit() as edited:
        for _ in edited.steps:
            edited.layers[1].output = edited.layers[1].sae(edited.layers[1].output, hook=True)
    edited.layers[1].sae = SAE()
    before = footprint(net)

    def objects():
        gc.collect()
        return len(gc.get_objects())

    for _ in range(5):
        edited.trace(x).result
    count = objects()
    for _ in range(200):
        edited.trace(x).result
    assert objects() - count < 50 and footprint(net) == before and len(tree_of(edited).open_runs) < 5


def test_hidden_state_is_patched_into_every_run(gpt2, ids):
    """The example of nnsight's guides: a state of one prompt, set in every later run."""
    model, other = Model(gpt2), torch.tensor([[3, 9, 27]])
    with model.trace(ids) as run:
        state = run.transformer.h[2].output[:, -1]
    with model.edit() as edited:
        model.transformer.h[2].output[:, -1] = state
    with edited.trace(other):
        token = model.lm_head.output[:, -1].argmax()
    assert token == gpt2(ids).logits[:, -1].argmax() and torch.equal(
        model.trace(other).result.logits, gpt2(other).logits
    )


def test_a_copy_without_a_name(model, x):
    with pytest.raises(InputError, match=r"would be lost: write `with model.edit\(\) as edited:`"):
        with model.edit():
            model.layers[0].output[:] = 0
    assert model.edits == [] and torch.equal(model.trace(x).result, model(x))
