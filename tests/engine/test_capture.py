"""Blocks that run later: how they are found, the meaning of names in them, and what they leave behind."""

# ruff: noqa: E701, E702  (some of these tests are about blocks on one line)

import functools
import inspect
import linecache
import subprocess
import sys
import textwrap
import traceback
from contextlib import ExitStack, nullcontext

import pytest
import torch

from diffsight import Model
from diffsight.errors import InputError, SourceError
from helpers import outputs, replaced

FACTOR = 3
LATER = None


def edited_result(net, x, index, edit):
    """Return what the net returns when an ordinary hook replaces the output of a layer by `edit(output)`."""
    with replaced(net.layers[index], edit):
        return net(x)


@pytest.fixture
def model(net):
    return Model(net)


# ---- how a block is written


def test_block_does_not_run_where_it_is_written(model, x):
    ran = []
    with model.edit() as edited:
        ran.append(1)
        raise AssertionError("later")
    assert ran == []
    with pytest.raises(AssertionError, match="later"):
        edited.trace(x).result
    assert ran == [1]


# fmt: off
def test_block_on_one_line(model, net, x):
    with model.edit() as edited: edited.layers[1].output = edited.layers[1].output * 2
    assert torch.equal(edited.trace(x).result, edited_result(net, x, 1, lambda out: out * 2))


def test_two_statements_on_one_line(model, net, x):
    with model.edit() as edited: two = 2; edited.layers[1].output = edited.layers[1].output * two
    assert torch.equal(edited.trace(x).result, edited_result(net, x, 1, lambda out: out * 2))


def test_two_edits_in_one_statement(model, x):
    """The second item belongs to the block of the first."""
    with model.edit() as one, model.edit() as two: two.layers[0].output[:] = 1
    with pytest.raises(InputError, match="edits cannot be nested"):
        one.trace(x).result
# fmt: on


def test_empty_block(model, net, x):
    with model.edit() as first:
        pass
    with model.edit() as second:
        """Only a docstring."""
    with model.edit() as third:
        ...
    for edited in (first, second, third):
        assert len(edited.edits) == 1 and torch.equal(edited.trace(x).result, net(x))


def test_block_that_starts_with_statements_without_effect(model, net, x):
    with model.edit() as edited:
        """Double a layer."""
        pass
        edited.layers[1].output = edited.layers[1].output * 2
    assert torch.equal(edited.trace(x).result, edited_result(net, x, 1, lambda out: out * 2))


@pytest.mark.parametrize("first", ["", "global GLOBAL\n", "note: int\n", "'text'\n", "pass\n", "if True:\n"])
@pytest.mark.parametrize(
    "end", ["except Exception: seen.append(1)", "except: seen.append(1)", "finally: seen.append(1)"]
)
def test_block_that_starts_with_try(first, end, tmp_path, model, net, x):
    tries = f"try:\n    edited.layers[1].output[:] = 0\n{end}\n"
    block = textwrap.indent(first + (textwrap.indent(tries, "    ") if first.startswith("if") else tries), " " * 8)
    source = f"def make(model, seen):\n    with model.edit() as edited:\n{block}    return edited\n"
    seen = []
    edited = load(source, tmp_path)["make"](model, seen)
    assert seen == [] and sys.gettrace() is None
    assert torch.equal(edited.trace(x).result, edited_result(net, x, 1, torch.zeros_like))
    assert seen == ([1] if end.startswith("finally") else [])


# fmt: off
def test_try_on_one_line(model, net, x):
    seen = []
    with model.edit() as edited:
        try: edited.layers[1].output[:] = 0
        finally: seen.append(1)
    assert seen == []
    assert torch.equal(edited.trace(x).result, edited_result(net, x, 1, torch.zeros_like))
# fmt: on


def test_try_in_a_block_bound_to_a_global_or_to_nothing(tmp_path, model, net, x):
    source = """
def make(model):
    global edited
    with model.edit(inplace=True):
        try:
            model.layers[1].output[:] = 0
        finally:
            pass
    with model.edit() as edited:
        try:
            edited.layers[2].output *= 2
        finally:
            pass
"""
    names = load(source, tmp_path)
    names["make"](model)
    assert torch.equal(model.trace(x).result, edited_result(net, x, 1, torch.zeros_like))
    with replaced(net.layers[1], torch.zeros_like):
        assert torch.equal(names["edited"].trace(x).result, edited_result(net, x, 2, lambda out: out * 2))


def test_try_in_a_block_bound_to_an_attribute(model):
    class Here:
        pass

    with pytest.raises(
        SourceError, match=r"starts with `try` and its value is bound to Here\.edited: bind it to a plain name"
    ):
        with model.edit() as Here.edited:
            try:
                pass
            finally:
                pass
    assert sys.gettrace() is None


def test_other_items_belong_to_the_block(model, net, x):
    entered = []

    class Around:
        def __enter__(self):
            entered.append("in")
            return 5

        def __exit__(self, *error):
            entered.append("out")

    with Around() as before, model.edit() as edited, Around() as factor:
        edited.layers[1].output = edited.layers[1].output * factor
    assert before == 5 and entered == ["in", "out"]
    assert torch.equal(edited.trace(x).result, edited_result(net, x, 1, lambda out: out * 5))
    assert entered == ["in", "out"] * 2


def test_over_several_lines(model, net, x):
    with (
        nullcontext(7) as factor,
        model.edit(
            inplace=False,
        ) as edited,
    ):
        edited.layers[1].output = (
            edited.layers[1].output
            * factor
        )  # fmt: skip
    assert torch.equal(edited.trace(x).result, edited_result(net, x, 1, lambda out: out * 7))


def test_without_a_name(model, net, x):
    with model.edit(inplace=True):
        model.layers[1].output = model.layers[1].output * 2
    assert torch.equal(model.trace(x).result, edited_result(net, x, 1, lambda out: out * 2))


def test_nested_statements(model, net, x):
    """Each statement is found at its own depth."""
    with nullcontext():
        for factor in (2, 3):
            if factor == 3:
                with model.edit() as edited:
                    with torch.no_grad():
                        with nullcontext(factor) as again:
                            edited.layers[1].output = edited.layers[1].output * again
    assert torch.equal(edited.trace(x).result, edited_result(net, x, 1, lambda out: out * 3))


def test_bound_to_an_attribute(model, net, x):
    class Study:
        __factor = 4

        def prepare(self):
            with model.edit() as self.edited:
                self.edited.layers[1].output = self.edited.layers[1].output * self.__factor
            return self

    study = Study().prepare()
    kept = study.edited
    assert torch.equal(kept.trace(x).result, edited_result(net, x, 1, lambda out: out * 4))
    assert study.edited is kept


def decorated(function):
    @functools.wraps(function)
    def inner(*args):
        return function(*args)

    return inner


@decorated
def make(model, *, pick=lambda value: value):
    with model.edit() as edited: edited.layers[1].output = pick(edited.layers[1].output * 2)  # fmt: skip
    return edited


def test_decorated_function_with_a_lambda(model, net, x):
    assert torch.equal(make(model).trace(x).result, edited_result(net, x, 1, lambda out: out * 2))


def test_generator_function(model, net, x):
    def editions():
        for factor in (2, 3):
            with model.edit() as edited:
                edited.layers[1].output = edited.layers[1].output * factor
            yield edited

    for factor, edited in zip((2, 3), editions()):
        assert torch.equal(edited.trace(x).result, edited_result(net, x, 1, lambda out, factor=factor: out * factor))


# ---- what names mean


def test_names_keep_the_value_they_have_where_the_block_is_written(model, net, x):
    factor, kept, editions = 2, [], []
    for index in range(3):
        with model.edit() as edited:
            edited.layers[index].output = edited.layers[index].output * factor
            kept.append(index)
        editions.append(edited)
    factor = 100
    for index, edited in enumerate(editions):
        assert torch.equal(edited.trace(x).result, edited_result(net, x, index, lambda out: out * 2))
    assert kept == [0, 1, 2] and factor == 100


def test_globals(model, net, x):
    global FACTOR, LATER
    with model.edit() as edited:
        edited.layers[1].output = LATER(edited.layers[1].output) * FACTOR
    FACTOR, LATER = 10, None
    try:
        with pytest.raises(TypeError, match="NoneType"):
            edited.trace(x).result
    finally:
        FACTOR = 3


def test_function_defined_later_in_the_module(model, x):
    with model.edit() as edited:
        defined_below(edited)
    with pytest.raises(KeyError, match="below"):
        edited.trace(x).result


def test_names_assigned_in_the_block_are_local_to_it(model, net, x):
    count = 1
    with model.edit() as edited:
        count = count + 1
        edited.layers[1].output = edited.layers[1].output * count
    for _ in range(2):
        assert torch.equal(edited.trace(x).result, edited_result(net, x, 1, lambda out: out * 2))
    assert count == 1


def test_global_statement(model, x):
    global LATER
    with model.edit() as edited:
        LATER = edited.layers[0].output
    edited.trace(x).result
    assert torch.equal(LATER, outputs(model._owner.layers[0], model._owner, x)[0])
    LATER = None


def test_functions_and_comprehensions_in_the_block(model, net, x):
    weights = [1.0, 2.0]
    with model.edit() as edited:
        total = sum(weight * factor for weight in weights for factor in (1, 2))
        scale = lambda value: value * total  # noqa: E731

        def apply(layer):
            layer.output = scale(layer.output)

        apply(edited.layers[1])
    assert torch.equal(edited.trace(x).result, edited_result(net, x, 1, lambda out: out * 9))


@pytest.mark.parametrize(
    "line, word",
    [("return 5", "return"), ("break", "break"), ("continue", "continue"), ("yield 5", "yield")],
)
def test_statements_that_cannot_be_deferred(line, word, tmp_path, model):
    source = f"def make(model):\n    for _ in range(2):\n        with model.edit() as edited:\n            {line}\n"
    with pytest.raises(
        SourceError, match=f"script.py:3 does not run where it is written, so it cannot contain `{word}`"
    ):
        for _ in load(source, tmp_path)["make"](model) or ():
            pass


def test_super_without_arguments(tmp_path, model):
    source = """
class Study:
    def make(self, model):
        with model.edit() as edited:
            edited.layers[2].output = super().change(edited.layers[2].output)
"""
    with pytest.raises(
        SourceError, match=r"script.py:4 is compiled outside its method, so `super\(\)` needs arguments: write"
    ):
        load(source, tmp_path)["Study"]().make(model)


def test_body_of_a_class_in_a_function(model, net, x):
    factor = 3

    class Study:
        class Inner:
            offset = 1
            with model.edit() as edited:
                edited.layers[2].output = edited.layers[2].output * factor + offset

    edited = Study.Inner.edited
    assert torch.equal(edited.trace(x).result, edited_result(net, x, 2, lambda out: out * 3 + 1))


def test_break_of_a_loop_in_the_block(model, net, x):
    with model.edit() as edited:
        for layer in edited.layers:
            layer.output = layer.output * 2
            break
    assert torch.equal(edited.trace(x).result, edited_result(net, x, 0, lambda out: out * 2))


def test_nonlocal(model):
    count = 0

    def inner():
        with model.edit():
            nonlocal count
            count += 1

    with pytest.raises(SourceError, match="it cannot contain `nonlocal`"):
        inner()
    assert count == 0 and model.edits == []


# ---- where a block is written


def load(source, folder, name="script.py"):
    """Run a script from a file, and return its names."""
    file = folder / name
    file.write_text(textwrap.dedent(source))
    names = {}
    exec(compile(file.read_text(), str(file), "exec"), names)
    return names


def test_traceback_points_at_the_line(tmp_path, model, x):
    source = """
    def make(model):
        with model.edit() as edited:
            hidden = edited.layers[1].output
            hidden.nothing_like_that
        return edited
    """
    edited = load(source, tmp_path)["make"](model)
    with pytest.raises(AttributeError, match="nothing_like_that") as caught:
        edited.trace(x).result
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.filename, last.lineno, last.line) == (
        str(tmp_path / "script.py"),
        5,
        "hidden.nothing_like_that",
    )


SCRIPT = """
import torch
from torch import nn
from diffsight import Model
from diffsight.errors import SourceError

net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
x = torch.ones(2, 4)
model = Model(net)
try:
    with model.edit() as edited:
        edited[0].output[:] = 1
except SourceError as error:
    print(error)
    @model.edit
    def edited(run):
        run[0].output[:] = 1
assert torch.equal(edited.trace(x).result, net[2](torch.ones(2, 4)))
print("done")
"""


def test_as_a_script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("way", ["-c", "-"])
def test_without_source(way):
    given = {"input": SCRIPT} if way == "-" else {}
    command = [sys.executable, way, *([SCRIPT] if way == "-c" else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **given)
    *told, last = done.stdout.splitlines()
    assert last == "done", done.stderr
    if way == "-" or sys.version_info < (3, 13):  # later versions keep the source of `-c`
        assert told[0].startswith("the source at <stdin>:11 " if way == "-" else "the source at <string>:11 ")
        assert told[0].endswith(
            "Write the block as a function that takes the run, and pass that: `edited = model.edit(function)`"
        )


def test_exec_beside_other_source(model, monkeypatch):
    """From Python 3.13 on, linecache has the source of `-c` under the same file name that `exec` uses."""
    other = ["with model.edit() as edited:\n", "    edited.layers\n"]
    monkeypatch.setitem(linecache.cache, "<string>", (60, None, other, "<string>"))
    exec("".join(other), {"model": model})
    with pytest.raises(SourceError, match="<string>:1 cannot be read"):
        exec("with model.edit() as edited: edited.ln", {"model": model})
    with pytest.raises(SourceError, match="<string>:2 cannot be read"):
        exec("\n" + "".join(other), {"model": model})


def test_exec(model):
    with pytest.raises(SourceError, match="<cell>:2 cannot be read"):
        exec(compile("\nwith model.edit() as edited: edited.layers", "<cell>", "exec"), {"model": model})


def test_notebook_cell(model, net, x):
    """Notebooks add the source of each cell to linecache."""
    cell = "with model.edit() as edited:\n    edited.layers[1].output = edited.layers[1].output * 2\n"
    name = "<ipython-input-1-0a1b2c>"
    linecache.cache[name] = (len(cell), None, cell.splitlines(True), name)
    names = {"model": model}
    try:
        exec(compile(cell, name, "exec"), names)
    finally:
        del linecache.cache[name]
    assert torch.equal(names["edited"].trace(x).result, edited_result(net, x, 1, lambda out: out * 2))


def test_file_that_has_changed(tmp_path, model):
    source = "def make(model):\n    with model.edit() as edited:\n        edited.layers[0].output = 1\n"
    make = load(source, tmp_path)["make"]
    (tmp_path / "script.py").write_text(source.replace("edited.layers[0]", "edited.first.lin"))
    with pytest.raises(SourceError, match="has changed since it was loaded"):
        make(model)


def test_entered_in_another_way(model):
    with pytest.raises(SourceError, match="entered in another way"), ExitStack() as stack:
        stack.enter_context(model.edit())


# ---- what blocks leave behind


def test_trace_functions_are_put_back(model, net, x):
    seen = []

    def tracer(frame, event, argument):
        seen.append(event)
        return tracer

    def make():
        with model.edit() as edited:
            edited.layers[1].output = edited.layers[1].output * 2
        before = inspect.currentframe().f_trace
        return edited, before

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        edited, local = make()
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after is tracer and local is tracer and seen.count("line") >= 3
    assert torch.equal(edited.trace(x).result, edited_result(net, x, 1, lambda out: out * 2))


def test_no_trace_function_stays(model):
    frame, before = inspect.currentframe(), sys.gettrace()
    local = frame.f_trace, frame.f_trace_opcodes
    with model.edit(inplace=True):
        model.layers[0].output[:] = 0
    assert sys.gettrace() is before and (frame.f_trace, frame.f_trace_opcodes) == local


def test_error_in_the_head(model):
    """If the statement itself fails, nothing is edited."""
    before = sys.gettrace()
    with pytest.raises(TypeError, match="item assignment"):
        with model.edit(inplace=True) as ()[0]:
            model.layers[0].output[:] = 0
    assert model.edits == [] and sys.gettrace() is before


def test_within_a_trace_function(model):
    """Python calls no trace function while one is running, so the block cannot be skipped."""
    caught = []

    def tracer(frame, event, argument):
        try:
            with model.edit(inplace=True):
                caught.append("block")
        except SourceError as error:
            caught.append(error)

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        (lambda: None)()
    finally:
        sys.settrace(before)
    assert caught[0] == "block" and "could not be skipped" in str(caught[1]) and model.edits == []


def defined_below(run):
    run.layers[0].output
    raise KeyError("below")
