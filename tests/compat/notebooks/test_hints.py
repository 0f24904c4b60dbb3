"""Errors in a cell say what to write instead."""

import pytest

import diffsight.compat as nnsight
from compat.notebooks.cells import EIFFEL, TOKENS, cell_error
from diffsight.errors import InputError, OutOfOrderError, SourceError

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize("line", ["hidden.grad.save()", "hidden.grad[:] = 0", "hidden.grad.clone()"])
def test_a_value_without_a_gradient(model, line):
    cell = f"""
with model.trace({EIFFEL!r}):
    hidden = model.transformer.h[3].output[0]
    {line}
"""
    told = cell_error(model, cell, (AttributeError, TypeError))
    assert "Leave out torch.no_grad(), or open the run with grad=True" in told


@pytest.mark.parametrize(
    "body, kind, words",
    [
        ("model.past.save()", AttributeError, "has no 'past'"),
        ("object().save()", AttributeError, "Write nnsight.save(x)"),
        ("model.output.past_key_values.save()", AttributeError, "Write nnsight.save(x)"),
        ("count = 0; count.update(count + 1)", AttributeError, "write x = ... instead of x.update(...)"),
        ("model.lm_head.output; tracer.cache()", InputError, "before reading or modifying"),
        ("model.transformer.h[0].output[:, -1]", InputError, "CONFIG.APP.BLOCKS_GIVE_TUPLES = False"),
        ("model.transformer.h[0].output.shape", InputError, "Write `.output[0].shape`"),
        ("model.transformer.h[0].output[:] = 0", InputError, "Write `.output[0][...] = `"),
        ("model.transformer.h[0].source", Exception, "Model(net, methods=[...])"),
        (
            "model.lm_head.output; model.transformer.h[0].output",
            OutOfOrderError,
            "Ask for values in the order in which the model",
        ),
    ],
)
def test_errors_say_what_to_write(model, body, kind, words):
    assert words in cell_error(model, f"with model.trace({EIFFEL!r}) as tracer:\n    {body}\n", kind)
    # the same in the block of a session
    if "tracer" not in body:
        nested = f"with model.session() as session:\n    with model.trace({EIFFEL!r}):\n        {body}\n"
        assert cell_error(model, nested, kind).count(words) == 1


def test_all_statement_without_source(model):
    with pytest.raises(SourceError, match=r"Write a loop: `for step in tracer\.iter\[:\]:`"):
        with model.generate(EIFFEL, **TOKENS) as tracer:
            exec("tracer.all()\nmodel.lm_head.output", {"tracer": tracer, "model": model})


def test_remote(model):
    told = cell_error(model, f"with model.trace({EIFFEL!r}, remote=True):\n    pass\n", InputError)
    assert "the model is in this process" in told
    told = cell_error(model, "with model.session(remote=True):\n    pass\n", InputError)
    assert "leave" in told.lower()


def test_saving_anything(model):
    """`nnsight.save` also takes objects without `.save()`."""
    with model.trace(EIFFEL, use_cache=True):
        cache = nnsight.save(model.output.past_key_values)
        thing = nnsight.save(object())
    assert cache.get_seq_length() == len(model.tokenizer(EIFFEL)["input_ids"])
    assert thing is not None
