"""Run random programs on random models, and compare every value with plain PyTorch hooks.

    python tests/fuzz.py --seconds 60               # a line for each finding, then the counts
    python tests/fuzz.py --seed 1234 --show         # one program, as code

A case is a small model (nested and shared modules, modules that are called several times, tuples, dictionaries, in-
place operations, several arguments) and a program: what a user may write in the body of a run. The oracle knows in
which order the model passes its points, so it knows which lines succeed; it performs the same operations in plain
forward hooks at the same moments. A finding is a value that differs, an error that is missing or unexpected, or
anything that is left behind on the model. Findings are shrunk: operations are removed for as long as the finding
stays.
"""

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

import diffsight
from diffsight import Model
from diffsight.errors import DiffsightError, OutOfOrderError
from diffsight.recorded_values import Record

WIDTH, ROWS, TIMES = 3, 2, 3
LAST = float("inf")
ENGINE = str(Path(diffsight.__file__).parent)


# ---- random models


class Affine(nn.Module):
    """One tensor to one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight)


class InPlace(nn.Module):
    """Changes a copy of its argument in place after another operation has used it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        y.mul_(0.5)
        return y


class Both(nn.Module):
    """Two arguments, the second by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        return x * self.weight if other is None else x * self.weight + other


class Pair(nn.Module):
    """Returns a tuple."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, x - 1


class Named(nn.Module):
    """Returns a dictionary."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"key": x * 3, "value": x + 2}


class Block(nn.Module):
    """Calls its children by a plan: pairs of a way to call and the number of a child."""

    def __init__(self, children: list[nn.Module], plan: list[tuple[str, int]]) -> None:
        super().__init__()
        self.inner = nn.ModuleList(children)
        self.plan = plan

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x
        for way, number in self.plan:
            child = self.inner[number]
            if way == "residual":
                x = x + _tensor(child(x))
            elif way == "keyword":
                x = _tensor(child(x=x))
            elif way == "two" and isinstance(child, Both):
                x = child(x, other=first)
            elif way == "in place":
                x = _tensor(child(x))
                x.add_(0.25)
            elif way == "past" and isinstance(child, Block):  # a module inside the child, past the child itself
                x = _tensor(child.inner[0](x))
            else:
                x = _tensor(child(x))
        return x

    def generate(self, x: torch.Tensor, times: int) -> torch.Tensor:
        for _ in range(times):
            x = self(x)
        return x


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, tuple):
        return value[0] + value[1]
    return value["key"] - value["value"] if isinstance(value, dict) else value


WAYS = ("call", "call", "residual", "keyword", "two", "in place", "past")


def random_net(rng: random.Random, depth: int = 2, shared: list[nn.Module] | None = None) -> Block:
    shared = [] if shared is None else shared
    children: list[nn.Module] = []
    for _ in range(rng.randint(1, 3)):
        if shared and rng.random() < 0.15:
            children.append(rng.choice(shared))
        elif depth and rng.random() < 0.45:
            children.append(random_net(rng, depth - 1, shared))
        else:
            children.append(rng.choice((Affine, Affine, Both, InPlace, Pair, Named))())
        shared.append(children[-1])
    plan = [(rng.choice(WAYS), number) for number in range(len(children))]
    plan += [(rng.choice(WAYS), rng.randrange(len(children))) for _ in range(rng.choice((0, 0, 1, 2)))]
    return Block(children, plan)


# ---- points and programs


class Point(NamedTuple):
    """`part` ("input" or "output") of call `call` (in the run, or in the step) of the module at `path`."""

    path: str
    call: int
    part: str

    def __str__(self) -> str:
        name = "run" + "".join(f"[{s}]" if s.isdigit() else f".{s}" for s in self.path.split(".") if s)
        return f"{name}.calls[{self.call}].{self.part}" if self.call else f"{name}.{self.part}"


class Op(NamedTuple):
    """What one line of a program does: read, assign, edit (in place), set an item, skip, record, stop; wrap the forward
    of a module in a function that only calls it, or put back the one that it had before."""

    kind: str
    point: Point | None = None
    seed: int = 0
    row: int | None = None

    def __str__(self) -> str:
        if self.kind == "stop":
            return "run.stop()"
        if self.kind in ("wrap", "unwrap"):
            module = str(self.point).partition(".calls")[0].rpartition(f".{self.point.part}")[0] or str(self.point)
            value = f"Wrapper(kept := {module}.forward)" if self.kind == "wrap" else "kept"
            return f"{module.replace('run', 'net', 1)}.forward = {value.replace('run', 'net', 1)}"
        where = str(self.point) if self.row is None else str(self.point).replace("run", f"run.rows[{self.row}]", 1)
        if self.kind == "assign":
            return f"{where} = another({self.seed})"
        if self.kind == "edit":
            return f"edit_in_place({where}, {self.seed})"
        if self.kind == "item":
            return f"set_item({where}, {self.seed})"
        if self.kind == "skip":
            return f"{where.rpartition('.')[0]}.skip(another({self.seed}))"
        return f"kept = run.record({where!r})" if self.kind == "record" else where


@dataclass
class Case:
    """A model, its mode, and programs: of the body (one for each step, with steps), of edits, or one for each row."""

    seed: int
    mode: str  # "trace", "steps", "rows", "each", "edits", "grad"
    programs: list[list[Op]] = field(default_factory=list)

    def net(self) -> Block:
        torch.default_generator.manual_seed(self.seed)
        return random_net(random.Random(self.seed))

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, mode {self.mode}"]
        for number, program in enumerate(self.programs):
            lines += [f"  program {number}:", *(f"    {op}" for op in program)]
        return "\n".join(lines)


# ---- what an operation does to a value, the same on both sides


def leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return list(value) if isinstance(value, tuple) else list(value.values())


def mapped(function: Callable, *values: Any) -> Any:
    """`function` of the tensors of values of one structure."""
    first = values[0]
    if isinstance(first, tuple):
        return tuple(mapped(function, *items) for items in zip(*values))
    if isinstance(first, dict):
        return {name: mapped(function, *(value[name] for value in values)) for name in first}
    return function(*values)


def another(module: nn.Module, op: Op) -> Any:
    """What a line assigns: a value of the structure that the point has."""
    generator = torch.Generator().manual_seed(op.seed)
    new = [torch.randn(ROWS if op.row is None else 1, WIDTH, generator=generator) for _ in range(2)]
    if op.point.part == "output" and isinstance(module, Pair):
        return tuple(new)
    return {"key": new[0], "value": new[1]} if op.point.part == "output" and isinstance(module, Named) else new[0]


def edit_in_place(value: Any, seed: int) -> None:
    tensor = leaves(value)[seed % len(leaves(value))]
    if seed % 2:
        tensor[..., seed % WIDTH] = seed / 7
    else:
        tensor.mul_(0.5 + seed % 5)


def set_item(value: Any, seed: int) -> None:
    """Set an item of a dictionary; change anything else in place."""
    if isinstance(value, dict):
        name = list(value)[seed % len(value)]
        value[name] = value[name] * 2 + seed / 7
    else:
        edit_in_place(value, seed)


def copied(value: Any) -> Any:
    return mapped(lambda tensor: tensor.detach().clone(), value)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (tuple, list)) else a == b


def cut(value: Any, row: int | None) -> Any:
    return value if row is None else mapped(lambda tensor: tensor[row : row + 1], value)


def put(whole: Any, value: Any, row: int | None) -> Any:
    def one(tensor: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[row : row + 1] = part
        return tensor

    return value if row is None else mapped(one, whole, value)


# ---- the oracle: the same lines in plain hooks


class Refused(Exception):
    """A line asks for what the model has passed, or will not come to."""


class Stopped(Exception):
    """A line ends the model."""


class Undecided(Exception):
    """A line sets an item in what the model has passed, which a run does not notice."""


class Outcome(NamedTuple):
    values: list[list[Any]]  # what the lines of each program read
    error: str | None  # the kind of error that the run ends with
    result: Any = None
    gradients: Any = None
    note: str = ""


@dataclass(eq=False)
class Body:
    """A program in the oracle, as a generator that yields what it waits for."""

    lines: Iterator
    order: float  # edits have their turn first, by number
    step: int | None = None  # the step that it is in, where it loops over steps
    wait: Any = None
    done: bool = False

    @property
    def group(self) -> float:
        return self.order


class Oracle:
    """One forward pass with hooks, which resume the programs where the model comes to what they wait for."""

    def __init__(self, net: Block, case: Case) -> None:
        self.net, self.case = net, case
        self.names = dict(net.named_modules(remove_duplicate=False))
        self.begun: dict[int, int] = {}
        self.running: dict[int, list[int]] = {}
        self.base: dict[int, int] = {}  # calls before the current step
        self.step = -1
        self.ahead: dict[tuple, list[tuple[float, Op, int | None]]] = {}  # by point: order, line, step
        self.skips: dict[tuple[int, int], tuple[int, int | None, float]] = {}
        self.records: dict[tuple, list[tuple[int, int]]] = {}  # by module and part
        self.here: tuple | None = None  # the point at which the model stands
        self.value: Any = None
        self.missed = self.edited_late = False
        self.values: list[list[Any]] = [[] for _ in case.programs]
        self.given: dict[tuple[int, int], Any] = {}  # by module and call: its input
        self.held: dict[tuple, Any] = {}  # what was read: by program and point

    def key(self, point: Point, body: Body) -> tuple:
        number = id(self.names[point.path])
        return number, point.part, point.call + (self.base.get(number, 0) if body.step is not None else 0)

    def passed(self, key: tuple) -> bool:
        number, part, call = key
        begun = self.begun.get(number, 0)
        return call < begun and (part == "input" or call not in self.running.get(number, ()))

    def lines(self, program: int, ops: list[Op], body: Body) -> Iterator:
        for op in ops:
            if op.kind == "stop":
                raise Stopped
            if op.kind in ("wrap", "unwrap"):
                continue
            key = self.key(op.point, body)
            number, _, call = key
            if op.kind == "skip":
                if self.passed((number, "input", call)) and self.here != (number, "input", call):
                    raise Refused
                if call < self.begun.get(number, 0) and call not in self.running.get(number, ()):
                    raise Refused
                known = self.skips.get((number, call))
                if known is None or known[2] <= body.order:
                    self.skips[number, call] = (op.seed, self.step if body.step is not None else None, body.order)
                continue
            if op.kind == "record":
                if self.here != key and self.passed(key):
                    raise Refused
                self.values[program].append([])
                self.records.setdefault(key[:2], []).append((program, len(self.values[program]) - 1))
                continue
            if op.kind == "assign" and self.here != key:
                if self.passed(key):
                    raise Refused
                self.ahead.setdefault(key, []).append((body.order, op, body.step))
                continue
            if self.here != key:
                value = self.held.get((body.group, key))
                if value is None and op.point.part == "input" and self.here == (number, "output", call):
                    value = self.given[number, call]  # can still be read
                if value is not None:
                    if op.kind == "item":
                        raise Undecided
                    if op.kind == "edit":
                        self.edited_late = True
                        edit_in_place(cut(value, op.row), op.seed)
                    else:
                        self.values[program].append(copied(cut(value, op.row)))
                    continue
                if self.passed(key):
                    raise Refused
                yield key
            if op.kind == "assign":
                self.assign(op)
            elif op.kind == "edit":
                edit_in_place(cut(self.value, op.row), op.seed)
            elif op.kind == "item":
                part = cut(self.value, op.row)
                set_item(part, op.seed)
                self.value = put(self.value, part, op.row) if isinstance(part, dict) else self.value
            else:
                self.values[program].append(copied(cut(self.value, op.row)))
            self.held[body.group, key] = self.value
            self.hold(key)

    def hold(self, key: tuple) -> None:
        """What was read at a point is what the model goes on with, including later assignments."""
        for known in [known for known in self.held if known[1] == key]:
            self.held[known] = self.value

    def assign(self, op: Op) -> None:
        self.value = put(self.value, another(self.names[op.point.path], op), op.row)

    def at(self, key: tuple, value: Any) -> Any:
        """The model passes a point: lets the programs have it; the value that the model goes on with."""
        self.here, self.value = key, value
        waiting = self.ahead.pop(key, [])
        for order in sorted({body.order for body in self.bodies}):  # edits first, one after the other
            for assigned, op, _ in waiting:
                if assigned == order:
                    self.assign(op)
            for body in self.bodies:
                if body.order == order and not body.done and body.wait == key:
                    self.resume(body)
        self.hold(key)
        for program, place in self.records.get(key[:2], ()):
            self.values[program][place].append(copied(self.value))
        value, self.here, self.value = self.value, None, None
        return value

    def resume(self, body: Body) -> None:
        try:
            body.wait = next(body.lines)
        except StopIteration:
            body.done = True

    def body(self, program: int, order: float) -> Body:
        body = Body(iter(()), order)
        body.lines = self.lines(program, self.case.programs[program], body)
        return body

    def stepwise(self, body: Body) -> Iterator:
        for number, ops in enumerate(self.case.programs):
            yield ("step", number)
            body.step = number
            yield from self.lines(number, ops, body)
        # the loop goes on through the steps that are left

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if module is self.net:
            self.next_step()
        number = id(module)
        call = self.begun.get(number, 0)
        self.begun[number] = call + 1
        self.running.setdefault(number, []).append(call)
        key = (number, "input", call)
        first = args[0] if args else next(iter(kwargs.values()))
        new = self.given[number, call] = self.at(key, first)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): new})

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        number = id(module)
        call = self.running[number][-1]
        self.running[number].pop()
        return self.at((number, "output", call), output)

    def next_step(self) -> None:
        self.step += 1
        for key, waiting in list(self.ahead.items()):
            left = [item for item in waiting if item[2] is None]
            self.missed = self.missed or len(left) < len(waiting)
            self.ahead[key] = left
            if not left:
                del self.ahead[key]
        for key, (_, step, _) in list(self.skips.items()):
            if step is not None:
                self.missed = True
                del self.skips[key]
        self.base = dict(self.begun)
        for body in self.bodies:
            if body.done:
                continue
            if body.step is not None and body.wait is not None and body.wait[0] != "step":
                raise Refused
            if body.wait == ("step", self.step):
                self.resume(body)

    def wrapped(self, module: nn.Module) -> Callable:
        forward = module.forward

        def skipping(*args: Any, **kwargs: Any) -> Any:
            number = id(module)
            skip = self.skips.pop((number, self.running[number][-1]), None)
            if skip is None:
                return forward(*args, **kwargs)
            return another(module, Op("skip", Point("", 0, "output"), skip[0]))

        return skipping

    def run(self, x: torch.Tensor) -> Outcome:
        case, net = self.case, self.net
        modules = [module for module in net.modules() if not isinstance(module, nn.ModuleList)]
        handles = [module.register_forward_pre_hook(self.before, with_kwargs=True) for module in modules]
        handles += [module.register_forward_hook(self.after) for module in modules]
        for module in modules:
            module.forward = self.wrapped(module)
        try:
            last = len(case.programs) - 1
            if case.mode == "steps":
                body = Body(iter(()), LAST)
                body.lines = self.stepwise(body)
                self.bodies = [body]
            else:
                edits = last if case.mode == "edits" else 0
                self.bodies = [self.body(n, n if n < edits else LAST) for n in range(last + 1)]
            for body in self.bodies:
                self.resume(body)
            with torch.set_grad_enabled(case.mode == "grad"):
                result = net.generate(x, TIMES) if case.mode == "steps" else net(x)
        except Refused:
            return Outcome(self.values, "refused")
        except Stopped:
            return Outcome(self.values, None)
        finally:
            for handle in handles:
                handle.remove()
            for module in modules:
                del module.forward
        mains = self.bodies[-1:] if case.mode == "edits" else self.bodies
        if any(not body.done and body.wait[0] != "step" for body in mains):
            return Outcome(self.values, "refused")
        orders = [order for waiting in self.ahead.values() for order, *_ in waiting]
        orders += [order for *_, order in self.skips.values()]
        if self.missed or LAST in orders:
            return Outcome(self.values, "refused", result)
        return Outcome(self.values, None, result, gradients(net, result) if case.mode == "grad" else None)


def gradients(net: nn.Module, result: torch.Tensor) -> list[Any]:
    """The gradients of the weights, or the error that PyTorch has instead."""
    net.zero_grad()
    try:
        result.sum().backward()
    except RuntimeError as error:
        return [type(error).__name__]
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


# ---- the same lines in a run


class Wrapper:
    """The forward of a module, in another function; `kept` is what it replaces."""

    def __init__(self, kept: Callable) -> None:
        self.kept = kept

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.kept(*args, **kwargs)


def unwrap(net: nn.Module) -> None:
    """Remove the forwards that a program has given to modules."""
    for module in net.modules():
        forward = vars(module).get("forward")
        if type(forward) is Wrapper or getattr(forward, "__func__", None) is type(module).forward:
            del module.forward


def perform(run: Any, net: Block, ops: list[Op], values: list[Any]) -> None:
    """Perform a program's lines as a user writes them; `run` may be a row."""
    names = dict(net.named_modules(remove_duplicate=False))
    wrappers: dict[str, Wrapper] = {}
    for op in ops:
        if op.kind == "stop":
            run.stop()
            return
        if op.kind == "wrap":
            module = names[op.point.path]
            wrappers[op.point.path] = module.forward = Wrapper(module.forward)
            continue
        if op.kind == "unwrap":
            if op.point.path in wrappers:
                names[op.point.path].forward = wrappers.pop(op.point.path).kept
            continue
        if op.kind == "record":
            values.append(run.record(f"{op.point.path}.{op.point.part}".lstrip(".")))
            continue
        view = run if op.row is None or not hasattr(run, "each") else run.rows[op.row]
        point = view[op.point.path] if op.point.path else view
        point = point.calls[op.point.call] if op.point.call else point
        if op.kind == "skip":
            point.skip(another(names[op.point.path], op))
        elif op.kind == "assign":
            setattr(point, op.point.part, another(names[op.point.path], op))
        elif op.kind == "edit":
            edit_in_place(getattr(point, op.point.part), op.seed)
        elif op.kind == "item":
            set_item(getattr(point, op.point.part), op.seed)
        else:
            values.append(copied(getattr(point, op.point.part)))


def recorded(record: Record) -> list[Any]:
    """Return every value of the only point of a record."""
    value = next(iter(record.values()), [])
    return value if isinstance(value, list) else [value]


def in_a_run(net: Block, case: Case, x: torch.Tensor) -> Outcome:
    values: list[list[Any]] = [[] for _ in case.programs]
    model: Any = Model(net)
    error = result = None
    note = ""
    if case.seed % 2:  # the first run of a model learns what later ones know
        with torch.no_grad():
            opened = model.generate(x.clone(), TIMES) if case.mode == "steps" else model.trace(x.clone())
            with opened as run:
                run.output
    try:
        with torch.set_grad_enabled(case.mode == "grad"):
            if case.mode == "edits":
                for ops, kept in zip(case.programs[:-1], values):
                    model = model.edit(lambda run, ops=ops, kept=kept: perform(run, net, ops, kept))
            if case.mode == "steps":
                opened = model.generate(x, TIMES)
            else:
                opened = model.trace([x[row : row + 1] for row in range(ROWS)])
            with opened as run:
                if case.mode == "steps":
                    for step in run.steps:
                        if step.index < len(case.programs):
                            perform(run, net, case.programs[step.index], values[step.index])
                elif case.mode == "each":
                    run.each([lambda row, n=n: perform(row, net, case.programs[n], values[n]) for n in range(ROWS)])
                else:
                    perform(run, net, case.programs[-1], values[-1])
            if not any(op.kind == "stop" for ops in case.programs for op in ops):
                result = run.result
    except OutOfOrderError as raised:
        error, note = "refused", str(raised)
    except DiffsightError as raised:
        error, note = type(raised).__name__, str(raised)
    finally:
        unwrap(net)
    for kept in values:
        kept[:] = [recorded(value) if isinstance(value, Record) else value for value in kept]
    if error is None and result is not None and case.mode == "grad":
        return Outcome(values, None, result, gradients(net, result))
    return Outcome(values, error, result, None, note)


def finding(case: Case) -> str | None:
    """What is wrong with a case, in words; None where a run does what plain hooks do."""
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(case.seed))
    net = case.net()
    with torch.no_grad():
        clean = net(x.clone())
    oracle = Oracle(case.net(), case)
    try:
        expected = oracle.run(x.clone())
    except Undecided:
        return None
    try:
        got = in_a_run(net, case, x.clone())
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}"
    left = [name for name, m in net.named_modules() if "forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks]
    if left:
        return f"left behind on {left}"
    with torch.no_grad():
        if not same(net(x.clone()), clean):
            return "the bare model computes something else afterwards"
    if got.error == "refused" and expected.error is None:
        return None if oracle.edited_late else f"refused: {got.note}"
    if got.error != expected.error:
        return f"ends with {got.error} ({got.note}), should with {expected.error}"
    if expected.error is not None:
        return None
    for program, (mine, theirs) in enumerate(zip(got.values, expected.values)):
        if not same(mine, theirs):
            return f"program {program} read other values: {mine} instead of {theirs}"
    if got.result is not None and expected.result is not None and not same(got.result, expected.result):
        return "another result"
    if expected.gradients is not None and not same(got.gradients, expected.gradients):
        return "other gradients"
    return None


# ---- random programs


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    case = Case(seed, rng.choice(("trace", "trace", "trace", "rows", "rows", "each", "steps", "edits", "grad")))
    net = case.net()
    points = points_of(net)
    programs = {"each": ROWS, "steps": rng.randint(1, TIMES), "edits": rng.randint(2, 3)}.get(case.mode, 1)
    for number in range(programs):
        count = rng.randint(1, 5)
        chosen = [rng.randrange(len(points)) for _ in range(count)]
        if rng.random() < 0.75:
            chosen.sort()
        ops = [random_op(rng, case.mode, points[place], number) for place in chosen]
        if rng.random() < 0.05 and case.mode not in ("each", "edits"):
            ops.append(Op("stop"))
        if rng.random() < 0.15 and case.mode not in ("rows", "each"):  # which are refused where a forward is replaced
            place = rng.randint(0, len(ops))
            ops.insert(place, Op("wrap", rng.choice(points)))
            if rng.random() < 0.5:
                ops.insert(rng.randint(place + 1, len(ops)), ops[place]._replace(kind="unwrap"))
        case.programs.append(ops)
    return case


def random_op(rng: random.Random, mode: str, point: Point, program: int) -> Op:
    kinds = ["read", "read", "read", "assign", "assign", "edit", "item"]
    if mode in ("trace", "steps", "edits") and point.part == "output" and point.path:
        kinds.append("skip")
    if mode in ("trace", "rows") and not point.call:
        kinds.append("record")
    kind = rng.choice(kinds)
    row = program if mode == "each" else rng.choice((None, 0, 1)) if mode == "rows" else None
    return Op(kind, point, rng.randrange(1000), row if kind in ("read", "assign", "edit", "item") else None)


def points_of(net: Block) -> list[Point]:
    """The points in the order in which the model passes them, under one of their names, and some that never come."""
    found: list[Point] = []
    paths: dict[int, str] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        paths[id(module)] = path
    counts: dict[tuple[int, str], int] = {}

    def passing(part: str) -> Callable:
        def note(module: nn.Module, *_: Any) -> None:
            call = counts.get((id(module), part), 0)
            counts[id(module), part] = call + 1
            found.append(Point(paths[id(module)], call, part))

        return note

    handles = []
    for module in net.modules():
        if not isinstance(module, nn.ModuleList):
            handles.append(module.register_forward_pre_hook(passing("input")))
            handles.append(module.register_forward_hook(passing("output")))
    with torch.no_grad():
        net(torch.zeros(ROWS, WIDTH))
    for handle in handles:
        handle.remove()
    return [*found, found[len(found) // 2]._replace(call=9)]


# ---- interrupts


def interrupted(case: Case, rng: random.Random) -> str | None:
    """What is wrong after Ctrl-C somewhere in the engine; None where the model and the thread are as before."""
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(case.seed))
    net = case.net()
    with torch.no_grad():
        clean = net(x.clone())
    before = thread_state()
    count, place = 0, int(2 ** rng.uniform(0, 10))
    where = ""

    def interrupt(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count, where
        # Python looks for signals where a function begins and where one that is written in C has returned.
        if event not in ("call", "c_return") or not frame.f_code.co_filename.startswith(ENGINE):
            return
        count += 1
        if count == place:
            sys.setprofile(None)
            where = f"{event} at {frame.f_code.co_filename.removeprefix(ENGINE)}:{frame.f_lineno}"
            raise KeyboardInterrupt

    ignored: list[Any] = []  # interrupts that Python prints and drops: of generators that are closed, for example
    run = in_a_run if rng.random() < 0.8 else in_a_scan
    hook, sys.unraisablehook = sys.unraisablehook, ignored.append
    sys.setprofile(interrupt)
    try:
        run(net, case, x.clone())
    except KeyboardInterrupt:
        pass
    except Exception as error:
        if where and not ignored:  # otherwise it is the program's own error, as without an interrupt
            return f"after an interrupt ({where}) {type(error).__name__}: {error}"
    finally:
        sys.setprofile(None)
        sys.unraisablehook = hook
    if not where:
        return None
    gc.collect(0)
    unwrap(net)  # again, since a run that was open until now has put back what it found
    if thread_state() != before:
        return f"an interrupt ({where}) leaves {thread_state()}, it was {before}"
    left = [name for name, m in net.named_modules() if "forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks]
    if left:
        return f"an interrupt ({where}) leaves something on {left}"
    with torch.no_grad():
        if not same(net(x.clone()), clean):
            return f"after an interrupt ({where}) the bare model computes something else"
        with Model(net).trace(x) as run:
            read = run.output
        if not same(read, clean):
            return f"after an interrupt ({where}) a run computes something else"
    return None


def in_a_scan(net: Block, case: Case, x: torch.Tensor) -> None:
    with Model(net).scan(x) as run:
        run.inner[0].output
        run.output


def thread_state() -> tuple:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch._C._len_torch_function_stack(),
    )


def shrunk(case: Case) -> Case:
    """The case with as few lines as show that something is wrong."""
    smaller = True
    while smaller:
        smaller = False
        for number, ops in enumerate(case.programs):
            for place in range(len(ops)):
                programs = [*case.programs]
                programs[number] = ops[:place] + ops[place + 1 :]
                without = Case(case.seed, case.mode, programs)
                if finding(without) is not None:
                    case, smaller = without, True
                    break
            if smaller:
                break
    return case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--show", action="store_true", help="print this case alone")
    parser.add_argument("--interrupts", action="store_true", help="interrupt each program somewhere instead")
    parser.add_argument("--refused", action="store_true", help="show refusals of what lies ahead too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.show:
        case = random_case(options.seed)
        print(case, finding(case), shrunk(case), case.net(), sep="\n\n")
        return 0
    end, seed, found = time.monotonic() + options.seconds, options.seed, 0
    refused = 0
    while time.monotonic() < end:
        case = random_case(seed)
        if options.interrupts:
            told = copy_context().run(interrupted, case, random.Random(seed))
            if told is not None:
                found += 1
                print(f"{told}\n{case}\n", flush=True)
            seed += 1
            continue
        told = finding(case)
        if told is not None:
            case = shrunk(case)
            told = finding(case)
            if told.startswith("refused"):
                refused += 1
            else:
                found += 1
            if options.refused or not told.startswith("refused"):
                print(f"{told}\n{case}\n", flush=True)
        seed += 1
    print(f"{seed - options.seed} programs, {found} findings, {refused} refused that lie ahead")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
