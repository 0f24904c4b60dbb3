"""Gradients before `backward()`, and in the block of `with loss.backward():`."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

from diffsight.errors import DiffsightError, InputError, OutOfOrderError


def by_hand(gpt2, ids, changes=()):
    """Return the gradients of the sum of the logits with respect to the layers' outputs, changed by hooks."""
    kept = {}

    def hook(index):
        def forward_hook(module, args, out):
            out.retain_grad()
            kept[index] = out
            for layer, change in changes:
                if layer == index:
                    out.register_hook(change)

        return forward_hook

    handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(gpt2.transformer.h)]
    gpt2(ids).logits.sum().backward()
    for handle in handles:
        handle.remove()
    gpt2.zero_grad()
    return {index: out.grad for index, out in kept.items()}


def test_saved_before_backward(llm, gpt2, ids):
    with llm.trace(ids):
        llm.transformer.wpe.output.requires_grad = True  # already is; PyTorch alone refuses to be told again
        grads = [layer.output.grad.save() for layer in llm.transformer.h]
        norms = [grad.norm() for grad in grads]
        llm.output.logits.sum().backward()
    gpt2.zero_grad()
    expected = by_hand(gpt2, ids)
    for index, grad in enumerate(grads):
        assert torch.equal(grad, expected[index]) and torch.equal(norms[index].value, expected[index].norm())
        assert grad.shape == expected[index].shape and torch.equal(grad * 2, expected[index] * 2)
        assert grad.detach().tolist() == expected[index].tolist()
    assert torch.Tensor.__dict__.keys().isdisjoint({"grad", "requires_grad"})


def test_changed_before_backward(llm, gpt2, ids):
    def change(gradient):
        changed = gradient.clone()
        changed[:, 0] = 0
        return changed * 3

    with llm.trace(ids):
        first = llm.transformer.h[0].output.grad.save()
        middle = llm.transformer.h[1].output
        middle.grad[:, 0] = 0
        assert middle.grad.device == middle.device
        middle.grad = middle.grad * 3
        llm.output.logits.sum().backward()
    gpt2.zero_grad()
    assert torch.allclose(first.value, by_hand(gpt2, ids, [(1, change)])[0], rtol=1e-6)
    with llm.trace(ids):
        first = llm.transformer.h[0].output.grad.save()
        llm.transformer.h[1].output.grad *= 2
        llm.output.logits.sum().backward()
    gpt2.zero_grad()
    assert torch.allclose(first.value, by_hand(gpt2, ids, [(1, lambda gradient: gradient * 2)])[0], rtol=1e-6)


def test_gradients_that_never_come(llm, gpt2, ids):
    with llm.trace(ids):
        gradient = llm.transformer.h[0].output.grad.save()
        with pytest.raises(DiffsightError, match=r"Call backward\(\) after that line"):
            bool(gradient.sum() > 0)
    with pytest.raises(DiffsightError, match="does not exist yet"):
        gradient.tolist()
    assert "not computed yet" in repr(gradient)


def test_read_after_backward(llm, gpt2, ids):
    for has_block in (False, True):
        with pytest.raises(OutOfOrderError, match=r"Read `\.grad` before backward"), llm.trace(ids):
            hidden, loss = llm.transformer.h[0].output, llm.output.logits.sum()
            if has_block:
                with loss.backward():
                    pass
            else:
                loss.backward()
            hidden.grad
    with llm.trace(ids):
        hidden, logits = llm.transformer.h[0].output, llm.output.logits
        early, apart = logits.grad, (logits.detach().requires_grad_() * 2)
        logits.sum().backward(retain_graph=True)
        later, other = hidden.grad, apart.grad  # the graph is still there, or is another one
        logits.sum().backward()
        apart.sum().backward()
        known = early.shape
    gpt2.zero_grad()
    assert torch.equal(later.value, by_hand(gpt2, ids)[0]) and other.eq(1).all() and known == logits.shape
    with llm.trace(ids):
        hidden = llm.transformer.h[0].output
        hidden.retain_grad()
        llm.output.logits.sum().backward()
        kept = hidden.grad
    gpt2.zero_grad()
    assert torch.equal(kept, by_hand(gpt2, ids)[0])


def test_used_as_numbers(llm, gpt2, ids, tmp_path):
    with llm.trace(ids):
        gradient = llm.transformer.h[0].output.grad.save()
        size = gradient.norm()
        with pytest.raises(DiffsightError, match=r"since `\.grad` was read"):
            f"{size:.3f}"
        llm.output.logits.sum().backward()
    gpt2.zero_grad()
    expected = by_hand(gpt2, ids)[0]
    assert f"{size:.3f}" == f"{expected.norm():.3f}" and f"{size}" == f"{expected.norm()}"
    for as_array in (np.array, np.asarray, partial(np.asarray, dtype="float32"), partial(np.array, copy=True)):
        assert np.array_equal(as_array(gradient), expected.numpy())
    assert np.linalg.norm(size) == expected.norm().item() and complex(size) == complex(expected.norm())
    torch.save(gradient, tmp_path / "gradient.pt")
    for copied in (torch.load(tmp_path / "gradient.pt"), copy.deepcopy(gradient)):
        assert type(copied) is torch.Tensor and torch.equal(copied, expected)


def test_parameters_keep_their_own(llm, gpt2, ids):
    weight = gpt2.lm_head.weight
    with llm.trace(ids):
        before = weight.grad
        llm.output.logits.sum().backward()
        after = weight.grad
    assert before is None and torch.is_tensor(after)
    gpt2.zero_grad()


def test_backward_blocks(llm, gpt2, ids):
    with llm.trace(ids):
        states = [layer.output for layer in llm.transformer.h]
        with llm.output.logits.sum().backward():
            last = states[2].grad
            states[1].grad = states[1].grad * 3
            first = states[0].grad.save()
    gpt2.zero_grad()
    expected = by_hand(gpt2, ids, [(1, lambda gradient: gradient * 3)])
    assert torch.equal(last, expected[2]) and torch.equal(first, expected[0])


def test_backward_blocks_in_the_wrong_order(llm, gpt2, ids):
    with pytest.raises(OutOfOrderError, match="reverse order"), llm.trace(ids):
        states = [layer.output for layer in llm.transformer.h]
        with llm.output.logits.sum().backward():
            states[0].grad
            states[2].grad
    gpt2.zero_grad()
    with torch.no_grad(), llm.trace(ids), pytest.raises(InputError, match="no_grad"):
        with llm.output.logits.sum().backward():
            pass


def test_backward_without_a_block(gpt2, ids):
    weight = torch.ones(2, requires_grad=True)
    assert (weight * 3).sum().backward() is None and torch.equal(weight.grad, torch.full((2,), 3.0))
