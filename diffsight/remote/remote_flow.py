"""The flow of a run whose model is on a server.

It replaces `diffsight.engine.run_to_point.Flow`; everything above it (envoys, rows, steps, edits, records) is the same.
Requests of a body are sent, and the answer is a plain tensor. Assignments, and tensors that were changed in place, need
no answer, so they are sent with the next request, before the model moves on.

Edits and the functions of `run.each` run here, in coroutines as in a local run. The server says whose turn it is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from diffsight.engine.model_tree import Tree
from diffsight.engine.points import LAST, Asked, check_value, first_input
from diffsight.engine.run_end import ENDED, STOPPED
from diffsight.engine.run_to_point import Flow
from diffsight.engine.target import Target
from diffsight.engine.threads import THIS_THREAD
from diffsight.engine.torch_state import TorchState, call_in
from diffsight.engine.turns import Body
from diffsight.engine.users_line import UsersLine, users_line
from diffsight.errors import InputError
from diffsight.remote.copies import ClientCopies
from diffsight.remote.read_containers import ReadContainers
from diffsight.remote.selections import encode_selection
from diffsight.remote.wire_errors import error_of
from diffsight.remote.wire_values import ValueDecoder, ValueEncoder

_BROKEN = "the connection to the server was closed"


class _Accumulation:
    """Decides whether autograd may accumulate gradients in the values of a run, where `loss.backward()` would stop."""

    is_allowed = False

    def check(self, tensor: torch.Tensor) -> None:
        """Raise InputError unless the run itself computes gradients."""
        if not self.is_allowed:
            raise InputError(
                "loss.backward() cannot reach the model, which is on a server: call run.backward(loss), in the block"
            )


class RemoteFlow(Flow):
    """One run on a server.

    Args:
        tree: The tree of the model, without weights.
        link: The model on the server; see `ServedModel`.
        method: The method of the model that opens the run there.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """

    def __init__(self, tree: Tree, link: Any, method: str | None, args: tuple, kwargs: dict[str, Any]) -> None:
        super().__init__(lambda: None, tree)
        self._link, self._call = link, (method, args, kwargs)
        self._connection: Any = None
        self._lines: dict[str, UsersLine] = {}  # lines that have assigned values, by their text
        self._waiting: list[dict[str, Any]] = []  # operations that need no answer, sent with the next one that does
        self._copies, self._containers, self._moves = ClientCopies(), ReadContainers(), 0
        self._followed: list[tuple[Asked, Callable[..., None]]] = []
        self._is_passing = False  # whether a function gets a followed value
        self._mirrored: list[tuple[Asked, Callable[..., None]]] = []
        self._functions: list[Body] = []
        self._answers: dict[Body, tuple] = {}
        self._body_error: BaseException | None = None
        self._missed: Exception | None = None
        self._accumulates = _Accumulation()
        self._leaves: list[tuple[int, torch.Tensor]] = []  # received tensors with gradients, with their numbers
        self._assigned: dict[int, torch.Tensor] = {}  # sent tensors with gradients, by number

    @property
    def has_begun(self) -> bool:
        return self._connection is not None or bool(self._waiting)

    @property
    def where(self) -> str:
        is_in_step = self.clock.has_steps or self.scope.in_step
        step = f", in step {self.clock.index}" if is_in_step else ""
        return f"on the server at {self._link.address}{step}"

    # ---- requests of a body

    def fetch(self, asked: Asked) -> Any:
        self._check_open(asked)
        self._touch(asked)
        value = self._ask({"op": "ask", **self._point(asked)}, asked)
        self._containers.add(asked, value)
        return value

    def assign(self, asked: Asked, value: Any, where: str | None = None) -> None:
        self._check_open(asked)
        self._touch(asked)
        if asked.selection is None:
            check_value(asked, value)
        self._note({"op": "assign", **self._point(asked), "value": value, "where": self._line(where)})

    def skip(self, asked: Asked, value: Any, where: str | None = None) -> None:
        self._check_open(asked)
        self._touch(asked)
        op = {"op": "skip", "path": asked.target.path, "call": asked.call, "value": value}
        self._note(op | {"where": self._line(where)})

    def keep(self, asked: Asked, function: Callable[[Any, int, Any], None]) -> None:
        self._check_open(asked)
        self._ask(self._following(asked, function), asked)

    def mirror(self, asked: Asked, function: Callable[[Any], None]) -> None:
        self._mirrored.append((asked, lambda tap, call, value: function(first_input(value, asked))))

    def _following(self, asked: Asked, function: Callable[..., None]) -> dict[str, Any]:
        self._followed.append((asked, function))
        return {"op": "follow", **self._point(asked), "number": len(self._followed) - 1}

    def next_step(self) -> bool:
        self.check_thread("run.steps")
        if self.outcome is not None:
            return False
        scope = self.scope
        scope.stop_at_steps = True
        answer = self._ask({"op": "step"}, "run.steps")
        if not answer["more"]:
            return False
        scope.step, scope.in_step = self.clock.index, True
        target = self.tree.children_of(self.tree.root).get(answer["component"], self.tree.root)
        self.clock.call = (target, (), {})
        self.known_of_step = {"timestep": answer["timestep"]}
        return True

    def leave_steps(self) -> None:
        super().leave_steps()
        if self.outcome is None and self._connection is not None:
            self._waiting.append({"op": "leave_steps"})

    def run_on(self) -> None:
        self.check_thread("run.result")
        self.check_leads("run.result")
        self._scope.stop_at_steps = False
        if self.outcome is None:
            answer = self._ask({"op": "finish"}, "run.result")
            self._missed = answer["missed"] and error_of(answer["missed"], self._lines)
            self.unreached = [SimpleNamespace(order=LAST)] if self._missed else []
            self.result, self.has_result = answer["result"], answer["has_result"]
            for edit, met in zip(self.bodies.edits, answer["met"]):
                edit.met = met
            self._end_here(answer["outcome"])

    def check_assignments(self) -> None:
        error, self._missed, self.unreached = self._missed, None, []
        if error is not None:
            raise error

    def each(self, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        self._check_open("run.each")
        self.check_leads("run.each")
        state = TorchState.capture()
        bodies = self._functions = self.bodies.functions = [Body(function, self, state) for function in functions]
        try:
            self._ask({"op": "each", "count": len(bodies)}, "run.each")
        finally:
            self._functions = self.bodies.functions = []
            for body in bodies:
                if not body.dead:
                    body.unwind()
        return [body.result for body in bodies]

    def call(self, function: Callable[[], Any], target: Target) -> Any:
        raise InputError(f"{target.path} is attached here, and its server does not have it: call it without hook=True")

    @property
    def can_ask(self) -> bool:
        """Whether the run is open, here and on the server, and belongs to this thread."""
        is_connected = self._connection is not None and self._connection.is_open
        return self.outcome is None and is_connected and THIS_THREAD.number == self.thread

    def call_there(self, op: Mapping[str, Any]) -> Any:
        """Call a part of the model, or a lens, on the server, at the model's current position."""
        what = op.get("path", op.get("name"))
        self._check_open(what)
        return self._ask(dict(op), what)

    def backward(self, loss: torch.Tensor) -> None:
        self._check_open("run.backward")
        if not self._call[2].get("grad"):
            raise InputError("run.backward needs a run that was opened with grad=True")
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise InputError("run.backward takes a tensor with one element that depends on values read in the run")
        outputs, gradients = [loss], [torch.ones_like(loss)]
        while outputs:
            given = self._backward_here(outputs, gradients)
            if not given:
                return
            op = {"op": "backward", "numbers": [*given], "gradients": [*given.values()]}
            answer = self._ask(op, "run.backward")
            leaves = dict(self._leaves)
            for number, gradient in answer["handed"]:
                leaf = leaves[number]
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
            outputs = [self._assigned[number] for number, _ in answer["assigned"]]
            gradients = [gradient for _, gradient in answer["assigned"]]

    def _backward_here(self, outputs: list[torch.Tensor], gradients: list[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Compute gradients in the client's part of the graph. Return the gradients of received tensors by number."""
        before = [leaf.grad for _, leaf in self._leaves]
        for _, leaf in self._leaves:
            leaf.grad = None
        self._accumulates.is_allowed = True
        try:
            torch.autograd.backward(outputs, gradients, retain_graph=True)
        finally:
            self._accumulates.is_allowed = False
        found = {number: leaf.grad for number, leaf in self._leaves if leaf.grad is not None}
        for (_, leaf), known in zip(self._leaves, before):
            if known is not None:
                leaf.grad = known if leaf.grad is None else known + leaf.grad
        return found

    def start_edits(self) -> bool:
        return False  # the server says when it is their turn

    def add_mode(self, mode: Any) -> None:
        raise InputError("a function mode cannot be sent to a server: use a local model, or a lens by name")

    def finish_undecided(self) -> None:
        if self.outcome is None and self._connection is not None:
            self._ask({"op": "stop"}, "run.stop")

    def close(self, outcome: str) -> None:
        if self.outcome is None:
            self._end_here(outcome)

    # ---- messages

    def _point(self, asked: Asked) -> dict[str, Any]:
        attached = self.tree.attached.targets
        if attached and any(asked.target.path.startswith(one.path) for one in attached.values()):
            raise InputError(f"{asked} is attached here, and its server does not have it: it has no values in a run")
        target = asked.target
        path = f"{target.path.removesuffix(f'.{target.name}')}::{target.name}" if target.is_value else target.path
        return {"path": path, "part": asked.part, "call": asked.call, "selection": asked.selection}

    def _line(self, where: Any) -> str:
        """Return the text of a line that assigns a value. Errors about the line refer to it by this text."""
        line = where or users_line()
        if isinstance(line, UsersLine):
            self._lines[str(line)] = line
        return str(line)

    def _note(self, op: dict[str, Any]) -> None:
        """Send an operation with the next request."""
        self._waiting.append(op)

    def _ask(self, op: dict[str, Any], asked: object) -> Any:
        """Send an operation, together with the waiting ones, and return the answer.

        Messages are built and read outside the blocks of the body, such as `torch.device(...)` or inference mode."""
        state = TorchState.capture()
        if state.is_plain and not state.inference:
            return self._ask_plainly(op, asked)
        return call_in(replace(state.bare(), inference=False), None, lambda: self._ask_plainly(op, asked))

    def _ask_plainly(self, op: dict[str, Any], asked: object) -> Any:
        if self._is_passing:
            raise InputError(
                f"{asked} cannot be asked for in a function of run.follow, since the server does not wait for it. "
                "Keep the value, and ask in the body"
            )
        body = self._beside()
        is_bare = op["op"] == "finish" and self._connection is None
        if self._mirrored and not is_bare:
            mirrored, self._mirrored = self._mirrored, []
            self._waiting += [self._following(*one) for one in mirrored]
        if body is None and self._connection is None:
            self._open()
        reply, tensors = self._exchange(self._message(self._body_number(body), op), body)
        decoder = ValueDecoder(tensors, None, lambda tensor, data: self._receive(tensor, data, asked))
        self._take_state(reply["state"])
        if body is None and self.outcome is not None:  # another body has stopped the run
            self._release()
        if reply["say"] == "error":
            self._raise(reply)
        return decoder.decode(reply["value"])

    def _raise(self, reply: Mapping[str, Any]) -> None:
        error, self._body_error = self._body_error, None
        state = reply["state"]
        if state["outcome"] is not None and not state["has_result"]:
            self._end_here(state["outcome"])
        raise error or error_of(reply["error"], self._lines)

    def _message(self, body: int | None, op: dict[str, Any] | None) -> tuple[dict, dict]:
        """Return a message with all waiting operations, and its tensors."""
        ops = [*self._changes(), *self._waiting, *([op] if op else [])]
        self._waiting, path = [], None
        encoder = ValueEncoder(None, lambda tensor: self._sending(tensor, path), self._link.dtype)
        encoded = []
        for one in ops:
            path = one.get("path", "").replace("::", ".")
            encoded.append(self._encoded(one, encoder))
        return {"body": body, "do": encoded}, encoder.tensors

    def _encoded(self, op: dict[str, Any], encoder: ValueEncoder) -> dict[str, Any]:
        if op["op"] == "write":  # the tensor already has a number
            return op | {"value": encoder.encode_data(op["value"])}
        encoded = {}
        for name, value in op.items():
            if name == "selection":
                encoded[name] = encode_selection(value, encoder.encode)
            else:
                encoded[name] = encoder.encode(value)
        return encoded

    def _sending(self, tensor: torch.Tensor, path: object) -> dict[str, Any]:
        """Return the number of a tensor that is sent, and whether gradients flow through it."""
        number = self._copies.number_of(tensor)
        if number is not None:
            return {"$shared": number}
        number = self._copies.sent(tensor, path)
        if not (tensor.requires_grad and self._call[2].get("grad")):
            return {"number": number}
        self._assigned[number] = tensor
        return {"number": number, "grad": True}

    def _changes(self) -> Iterator[dict[str, Any]]:
        """Yield operations for changes since the last message: of tensors, of containers, and released tensors."""
        for number, path, tensor in self._copies.changed():
            yield {"op": "write", "number": number, "path": str(path), "value": tensor}
        for asked, value in self._containers.changed(self.where):
            yield {"op": "assign", **self._point(asked), "value": value, "where": self._line(None)}
        gone = self._copies.let_go()
        if gone:
            yield {"op": "let_go", "numbers": gone}

    def _receive(self, tensor: torch.Tensor, data: Mapping[str, Any], asked: object) -> torch.Tensor:
        number = data.get("number")
        if number is None:
            return tensor
        found = self._copies.received(number, tensor, asked)
        if found is tensor and data.get("grad"):
            tensor.requires_grad_()
            tensor.register_post_accumulate_grad_hook(self._accumulates.check)
            self._leaves.append((number, tensor))
        return found

    def _exchange(self, message: tuple[dict, dict], body: Body | None) -> tuple[dict, dict]:
        """Send a message and return its answer. Other bodies may run in the meantime."""
        if body is not None:
            body.park(message)
            return self._answers.pop(body)
        try:
            self._connection.send(*message)
            while True:
                reply, tensors = self._connection.receive()
                if reply["say"] == "passed":
                    self._passed(reply, tensors)
                elif reply["body"] is None:
                    return reply, tensors
                else:
                    self._connection.send(*self._continue(reply, tensors))
        except BaseException:  # including an interrupt: it is unknown which messages were answered
            self._end_here(_BROKEN)
            raise

    def _open(self) -> None:
        """Connect, and send the message that opens the run."""
        message = self._opening()
        try:
            self._connection = self._link.open(self)
            self._connection.send(*message)
        except BaseException:
            self._end_here(_BROKEN)
            raise

    def submit(self) -> Any:
        """Start the run as a job on the server, and return the job. The run itself cannot be used afterwards."""
        if self.bodies.edits:
            raise InputError("blocking=False: the edits of the model run on the client, so such a run cannot be a job")
        if self._call[2].get("grad"):
            raise InputError("blocking=False: gradients need a run with a body, so leave out grad=True")
        job = self._link.submit_run(*self._opening())
        self._end_here(STOPPED)
        return job

    def _opening(self) -> tuple[dict, dict]:
        """Return the message that opens the run, and its tensors."""
        method, args, kwargs = self._call
        encoder = ValueEncoder(None, lambda tensor: self._sending(tensor, "the input"), self._link.dtype)
        message = {
            "version": self._link.version,
            "method": method,
            "args": encoder.encode(list(args)),
            "kwargs": encoder.encode(dict(kwargs)),
            "edits": [edit.where for edit in self.bodies.edits],
            "half": self._link.dtype is not None,
            "grad": bool(kwargs.get("grad", False)),
        }
        return message, encoder.tensors

    def _passed(self, reply: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Pass a value to the function that follows it."""
        self._take_state(reply["state"])
        tap = SimpleNamespace(step_base=reply["base"], host=self)
        asked, function = self._followed[reply["number"]]
        value = ValueDecoder(tensors).decode(reply["value"])
        versions = [tensor._version for tensor in tensors.values()]
        self._is_passing = True
        try:
            function(tap, reply["call"], ((value,), {}) if asked.part == "input" else value)
        finally:
            self._is_passing = False
        if versions != [tensor._version for tensor in tensors.values()]:
            raise InputError(
                f"{asked}: a function of run.follow changed it in place, but the server does not get that change"
            )

    def _take_state(self, state: Mapping[str, Any]) -> None:
        self.clock.set(state["index"], state["in_step"], state["over"])
        if state["moves"] != self._moves:
            self._moves = state["moves"]
            self._containers.move_on()

    # ---- bodies

    def _body_number(self, body: Body | None) -> int | None:
        if body is None:
            return None
        bodies = [*self.bodies.edits, *self._functions]
        return next(number for number, one in enumerate(bodies) if one is body)

    def _continue(self, reply: dict[str, Any], tensors: dict[str, Any]) -> tuple[dict, dict]:
        """Start a body, or continue it with an answer; return the next message that it sends."""
        number = reply["body"]
        body = [*self.bodies.edits, *self._functions][number]
        self._take_state(reply["state"])
        self._answers[body] = reply, tensors
        failed = False
        try:
            message = body.go()
        except Exception as error:
            if self.outcome is not None:  # an error in an edit, which ends the run
                raise
            self._body_error, failed = error, True
        if not failed and not body.dead:
            return message
        return self._message(number, {"op": "end_body", "failed": failed})

    # ---- how it ends

    def _end_here(self, outcome: str) -> None:
        if self.outcome is None:
            self._waiting.clear()
            self._copies, self._containers = ClientCopies(), ReadContainers()
            edits, self.bodies.edits = self.bodies.edits, []
            self._end(outcome)
            with ExitStack() as ends:  # end every edit, even if another one raises
                for edit in reversed(edits):
                    ends.callback(edit.end, False)
        if self._beside() is None:  # else the server waits for the next message of that body
            self._release()

    def _release(self) -> None:
        """Return the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            is_over = self.outcome in (ENDED, STOPPED)  # also on the server
            self._link.release(connection, is_broken=self.outcome == _BROKEN, is_over=is_over)
