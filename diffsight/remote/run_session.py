"""The server's side of a remote run: runs a model as a client requests.

RunSession(model, receive, send).serve()        # until the client has gone

It is independent of the network: `receive` returns the next frame or raises, `send` takes one. The session and its runs
share one thread. The model moves only while an operation is carried out, in the same coroutine as in any run. Bodies
other than the leading one (edits, functions of `run.each`) run on the client, and each has a stand-in here.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from diffsight.edits import Edit, start_edit
from diffsight.engine.points import Asked, first_input
from diffsight.engine.target import Target
from diffsight.engine.users_line import line_of, set_line
from diffsight.envoy import Envoy, Points, flow_of, inside, owner_of, part_in_run, root_of, target_of, tree_of
from diffsight.errors import InputError, PointNotFoundError
from diffsight.remote.copies import ServerCopies
from diffsight.remote.frames import Frame, pack, unpack
from diffsight.remote.protocol import LONGEST_JSON, Operation, check_opening, operations
from diffsight.remote.schedulers import is_scheduler
from diffsight.remote.selections import decode_selection
from diffsight.remote.wire_errors import RemoteError, described
from diffsight.remote.wire_values import ProtocolError, ValueDecoder, ValueEncoder
from diffsight.run import Run, make_step, own_target

_METHODS = ("generate", "trace")
_PART_METHODS = ("project_on_vocab",)  # methods that compute with the weights of a model
_REFUSED = ("trust_remote_code", "custom_generate", "streamer", "output", "callback_on_step_end")
_PLACES = ("url", "path", "image", "video", "audio")  # in the names of arguments whose text would be opened
_WITHOUT_RUN = ("call", "find", "lens")  # operations that need no run
_HALF = torch.float16
_GONE = "the client has gone"
_NO_RUN = {"index": -1, "in_step": False, "outcome": None, "has_result": False, "over": False, "moves": 0}


class RunEnded(BaseException):
    """Raised in the thread of a session from outside, when the client has gone or a limit was reached."""


class _Closed(BaseException):
    """The client has closed the run during the turn of another of its bodies."""


class _BodyFailed(Exception):
    """A body of the client has raised an error, which the client already has."""


class _Untouched(dict):
    """The record of points that an edit touches. It stays empty, since the client warns of edits that do nothing."""

    def __setitem__(self, path: str, value: Any) -> None:
        pass


class ClientsLine(str):
    """The line of the client's code that assigned a value, `file:line`. Its frames are not in this process."""

    __slots__ = ()

    def traceback(self) -> None:
        """Return no traceback, as `UsersLine` does once its function has returned."""


class RunSession:
    """Carries out the runs of one client, one after the other.

    Args:
        model: The model.
        receive: Returns the next frame from the client. Raises RunEnded when there will be none.
        send: Sends a frame.
        services: Functions, by name, that a client may call besides runs: lenses, and facts about the model.
        opened: Called when a run begins (True) and ends (False).
    """

    def __init__(
        self,
        model: Any,
        receive: Callable[[], Frame],
        send: Callable[[Frame], None],
        services: Mapping[str, Callable[..., Any]] | None = None,
        opened: Callable[[bool], None] = lambda begins: None,
    ) -> None:
        self._model, self._receive, self._send = model, receive, send
        self._services, self._opened = services or {}, opened
        self._run: Run | None = None
        self._clear({})

    def _clear(self, opening: Mapping[str, Any]) -> None:
        self._opening = opening
        self._fault: Exception | None = None  # why the run could not be opened
        self._edits: list[Any] = []  # bodies that stand in for the client's edits
        self._held: list[Any] = []  # objects that stay here
        self._targets: dict[str, Any] = {}  # by the path that the client sends
        self._copies = ServerCopies()
        self._memory_of_weights: set[int] | None = None
        self._sources: dict[int, torch.Tensor] = {}  # tensors from the client through which gradients flow
        self._moves, self._stand = 0, None  # how often the model has moved, and its position

    def serve(self) -> None:
        """Serve the client until it disconnects or violates the protocol."""
        try:
            while True:
                message, tensors = unpack(self._receive(), LONGEST_JSON)
                if "do" not in message:
                    self._open(message, tensors)
                    continue
                body, ops = operations(message)
                if ops[-1].op == "close":
                    self.close()
                    self._say("closed", None)
                    continue
                if body is not None or not self._opening:
                    raise ProtocolError("a run is opened before anything is asked of it, by its leading body")
                try:
                    self._answer(None, ops, tensors)
                except _Closed:
                    self.close()
                    self._say("closed", None)
        except ProtocolError as error:
            self._send(error_frame(error))
        finally:
            self.close()

    # ---- the run

    def _open(self, message: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        check_opening(message)
        self.close()
        self._clear(message)
        torch.set_grad_enabled(message["grad"])
        self._opened(True)
        if message["method"] is None:
            return
        try:
            method = message["method"]
            if method not in _METHODS or not hasattr(self._model, method):
                raise InputError(f"a server runs {' and '.join(_METHODS)}, not {method!r}")
            decode = ValueDecoder(tensors, received=self._note).decode
            args, kwargs = decode(message["args"]), decode(message["kwargs"])
            check_harmless(args, kwargs)
            self._run = getattr(self._model, method)(*args, **kwargs)
            edits = [
                Edit(partial(self._stand_in, number), str(where), _Untouched())
                for number, where in enumerate(message["edits"])
            ]
            self._edits = [start_edit(edit, self._run, number) for number, edit in enumerate(edits)]
            flow_of(self._run).bodies.edits = [*self._edits]
        except ProtocolError:
            raise
        except Exception as error:
            self._fault = error

    def close(self) -> None:
        """End the run that is open. May be called again."""
        run, self._run = self._run, None
        if run is not None:
            flow_of(run).close(_GONE)
        if self._opening:
            self._opened(False)
        self._clear({})

    # ---- messages

    def _answer(self, body: int | None, ops: list[Operation], tensors: Mapping[str, torch.Tensor]) -> None:
        """Carry out operations, and answer the last one."""
        decoder = self._decoder(tensors)
        try:
            if self._fault is not None:
                raise self._fault
            value = self._carry_out(ops, decoder.decode)
            self._say("value", body, value=value)
        except ProtocolError:
            raise
        except Exception as error:
            self._say("error", body, error=described(error))

    def _decoder(self, tensors: Mapping[str, torch.Tensor]) -> ValueDecoder:
        return ValueDecoder(tensors, self._held.__getitem__, self._take_in, self._copies.__getitem__)

    def _say(self, what: str, body: int | None, value: Any = None, **fields: Any) -> None:
        dtype = _HALF if self._opening.get("half") else None
        encoder = ValueEncoder(self._hold, self._hand_out, dtype)
        message = {"say": what, "body": body, **fields, "state": self._state()}
        if what in ("value", "passed"):
            message["value"] = encoder.encode(value)
        self._send(pack(message, encoder.tensors))

    def _state(self) -> dict[str, Any]:
        """Return the state of the run, which is part of every answer."""
        if self._run is None:
            return _NO_RUN
        flow = flow_of(self._run)
        if flow.parked is not self._stand:
            self._moves, self._stand = self._moves + 1, flow.parked
        return {
            "moves": self._moves,
            "index": flow.clock.index,
            "in_step": flow.clock.is_in_step,
            "outcome": flow.outcome,
            "has_result": flow.has_result,
            "over": flow.clock.is_over,
        }

    def _hold(self, thing: Any) -> int:
        known = next((number for number, held in enumerate(self._held) if held is thing), None)
        if known is None:
            self._held.append(thing)
        return len(self._held) - 1 if known is None else known

    def _hand_out(self, tensor: torch.Tensor) -> dict[str, Any]:
        """Assign a number to a tensor of which the client gets a copy."""
        if self._run is None or self._run_is_over():
            return {}
        has_gradient = self._opening["grad"] and tensor.requires_grad
        return {"number": self._copies.sent(tensor)} | ({"grad": True} if has_gradient else {})

    def _take_in(self, tensor: torch.Tensor, data: Mapping[str, Any]) -> torch.Tensor:
        """Return a tensor from the client on the model's device."""
        return self._note(self._on_device(tensor), data)

    def _note(self, tensor: torch.Tensor, data: Mapping[str, Any]) -> torch.Tensor:
        """Note a tensor from the client, and whether gradients flow through it."""
        if "number" in data and (self._run is not None or self._opening["method"] is not None):
            number = data["number"]
            if data.get("grad") and self._opening["grad"]:
                self._sources[number] = tensor.requires_grad_()
            self._copies.received(number, tensor)
        return tensor

    def _run_is_over(self) -> bool:
        return flow_of(self._run).outcome is not None

    # ---- operations

    def _points(self, path: str) -> Points:
        """Return the points at a path in the run, or in the model if there is no run."""
        root = self._model if self._run is None else root_of(self._run)
        return points_at(root, path)

    def _asked(self, op: Operation, decode: Callable[[Any], Any], part: str) -> Asked:
        target = self._targets.get(op.path)
        if target is None:
            self._targets[op.path] = target = own_target(self._run, op.path) or self._target_at(op.path)
        if op.call < 0 or part not in ("input", "inputs", "output", "skip"):
            raise ProtocolError(f"{op.path} has no {part} of call {op.call}")
        selection = decode_selection(op.fields.get("selection"), decode, self._run)
        return Asked(target, part, op.call, selection)

    def _target_at(self, path: str) -> Target:
        holder, is_value, name = path.partition("::")
        target = target_of(self._points(holder))
        if not is_value:
            return target
        value = tree_of(self._model).value_target(target, name)
        if value is None:
            raise PointNotFoundError(f"{holder} has no {name!r}")
        return value

    def _do_ask(self, op: Operation, decode: Callable[[Any], Any]) -> Any:
        return flow_of(self._run).fetch(self._asked(op, decode, op.part))

    def _do_assign(self, op: Operation, decode: Callable[[Any], Any]) -> None:
        asked = self._asked(op, decode, op.part)
        flow_of(self._run).assign(asked, decode(op.value), ClientsLine(op.where))

    def _do_skip(self, op: Operation, decode: Callable[[Any], Any]) -> None:
        asked = self._asked(op, decode, "skip")
        flow_of(self._run).skip(asked, decode(op.value), ClientsLine(op.where))

    def _do_write(self, op: Operation, decode: Callable[[Any], Any]) -> None:
        """Change a tensor in place, as the client has changed its copy.

        Some values are views of the model's buffers, such as position ids. Changing one would change the model."""
        if self._memory_of_weights is None:
            self._memory_of_weights = set(map(_memory, _weights(self._model)))
        if _memory(self._copies[op.number]) in self._memory_of_weights:
            raise InputError(
                f"{op.path} shares its memory with a weight or buffer of the model, which a run on a server cannot "
                "change in place. Assign a changed copy instead"
            )
        self._copies.write(op.number, decode(op.value), op.path)

    def _do_let_go(self, op: Operation, decode: Callable[[Any], Any]) -> None:
        self._copies.let_go(op.numbers)

    def _do_follow(self, op: Operation, decode: Callable[[Any], Any]) -> None:
        asked = self._asked(op, decode, op.part)
        flow, number = flow_of(self._run), op.number

        def passed(tap: Any, index: int, value: Any) -> None:
            value = first_input(value, asked) if asked.part == "input" else value
            self._say("passed", None, value=value, number=number, call=index, base=tap.step_base)

        flow.keep(asked, passed)

    def _do_step(self, op: Operation, decode: Callable[[Any], Any]) -> dict[str, Any]:
        flow = flow_of(self._run)
        if not flow.next_step():
            return {"more": False}
        target, args, kwargs = flow.clock.call
        step = make_step(self._run, flow.scope.step, target.path, (args, kwargs))
        return {"more": True, "component": target.path, "timestep": getattr(step, "timestep", None)}

    def _do_leave_steps(self, op: Operation, decode: Callable[[Any], Any]) -> None:
        flow_of(self._run).leave_steps()

    def _do_call(self, op: Operation, decode: Callable[[Any], Any]) -> Any:
        """Call a named part of the model, outside the run or through its points."""
        args, kwargs = decode(op.args), decode(op.kwargs)
        check_harmless(args, kwargs)
        part = self._points(op.path)
        if op.method:
            if op.method not in _PART_METHODS:
                raise ProtocolError(f"{op.method} is not called by a server")
            part = getattr(part, op.method)
        return part(*args, **kwargs, **({"hook": True} if op.hook else {}))

    def _do_attribute(self, op: Operation, decode: Callable[[Any], Any]) -> Any:
        """Return an attribute of a scheduler, such as its timesteps. Other parts are as the client knows them."""
        scheduler = part_in_run(self._points(op.path))
        if not is_scheduler(scheduler) or op.name.startswith("_"):
            raise ProtocolError(f"{op.path} has no attribute {op.name!r} that a server sends")
        value = getattr(scheduler, op.name, None)  # not of its points, of which some move the model
        if not hasattr(scheduler, op.name) or callable(value):
            raise InputError(f"{op.path} has no attribute {op.name!r} on the server")
        return value

    def _do_each(self, op: Operation, decode: Callable[[Any], Any]) -> None:
        if not 0 < op.count <= len(self._run.rows):
            raise ProtocolError(f"run.each has one function for each of the {len(self._run.rows)} rows, not {op.count}")
        first = len(self._opening["edits"])
        flow_of(self._run).each([partial(self._stand_in, first + i) for i in range(op.count)])

    def _do_backward(self, op: Operation, decode: Callable[[Any], Any]) -> dict[str, Any]:
        """Return the gradients of sent and received tensors, given the client's gradients of the sent tensors."""
        given = {number: decode(one) for number, one in zip(op.numbers, op.gradients)}
        outputs = [self._copies[number] for number in given]
        handed = {number: self._copies[number] for number in self._copies.numbers() if number >= 0}
        handed = {number: tensor for number, tensor in handed.items() if tensor.requires_grad}
        inputs = [*handed.values(), *self._sources.values()]
        found = torch.autograd.grad(outputs, inputs, [*given.values()], retain_graph=True, allow_unused=True)
        own = [
            [number, grad - given[number] if number in given else grad]  # the client already has its own part
            for number, grad in zip(handed, found)
            if grad is not None
        ]
        sources = zip(self._sources, found[len(handed) :])
        return {"handed": own, "assigned": [[number, grad] for number, grad in sources if grad is not None]}

    def _do_stop(self, op: Operation, decode: Callable[[Any], Any]) -> None:
        self._run.stop()

    def _do_finish(self, op: Operation, decode: Callable[[Any], Any]) -> dict[str, Any]:
        """Run the model to its end. Return its result, and the error for assignments that it did not reach."""
        flow, missed = flow_of(self._run), None
        flow.run_on()
        result = flow.run_to_end() if flow.has_result else None  # an edit may have stopped the run
        try:
            flow.check_assignments()
        except Exception as error:
            missed = described(error)
        met = [edit.met for edit in self._edits]
        return {
            "result": result,
            "has_result": flow.has_result,
            "outcome": flow.outcome,
            "missed": missed,
            "met": met,
        }

    def _do_find(self, op: Operation, decode: Callable[[Any], Any]) -> Any:
        return self._service(op.name)()

    def _do_lens(self, op: Operation, decode: Callable[[Any], Any]) -> Any:
        args, kwargs = decode(op.args), decode(op.kwargs)
        check_harmless(args, kwargs)
        return self._service(op.name)(*args, **kwargs)

    def _service(self, name: str) -> Callable[..., Any]:
        if name not in self._services:
            raise RemoteError(f"the server does not run {name!r}; it runs {', '.join(self._services) or 'no lenses'}")
        return self._services[name]

    def _stand_in(self, number: int, *_: Any) -> None:
        """Stand in for an edit or a function of `run.each` of the client: carry out its operations until it ends."""
        self._say("turn", number)
        while True:
            message, tensors = unpack(self._receive(), LONGEST_JSON)
            body, ops = operations(message)
            if ops[-1].op == "close":
                raise _Closed
            if body != number:
                raise ProtocolError(f"it is the turn of body {number}, not of {body}")
            last = ops.pop() if ops[-1].op == "end_body" else None
            if ops:
                if last is None:
                    self._answer(number, ops, tensors)
                else:
                    self._carry_out(ops, self._decoder(tensors).decode)
            if last is not None:
                if last.failed:
                    raise _BodyFailed(number)
                return

    def _carry_out(self, ops: list[Operation], decode: Callable[[Any], Any]) -> Any:
        """Carry out operations, and return the result of the last one."""
        value = None
        for op in ops:
            carry_out = getattr(self, f"_do_{op.op}", None)
            if carry_out is None or (self._run is None and op.op not in _WITHOUT_RUN):
                raise ProtocolError(f"{op.op} cannot be asked for here")
            try:
                value = carry_out(op, decode)
            except Exception as error:
                where = op.fields.get("where")  # the line of an assignment, which the client has already left
                if where and line_of(error) is None:
                    set_line(error, ClientsLine(where))
                    error.add_note(f"(assigned at {where})")
                raise
        return value

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the device of the model."""
        device = getattr(owner_of(self._model), "device", None)
        return tensor.to(device) if isinstance(device, torch.device) and device.type != "meta" else tensor


def _weights(model: Any) -> Iterator[torch.Tensor]:
    """Yield the weights and buffers of a model."""
    tree = tree_of(model)
    for part in [owner_of(model), *(target.owner for target in tree.children_of(tree.root).values())]:
        if isinstance(part, torch.nn.Module):
            yield from (tensor for tensor in [*part.parameters(), *part.buffers()] if tensor.numel())


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def error_frame(error: Exception) -> Frame:
    """Return the frame that reports to a client an error that ends the connection."""
    return pack({"say": "error", "body": None, "error": described(error), "state": _NO_RUN}, {})


def points_at(root: Envoy, path: str) -> Points:
    """Return the points at a path from the model, such as "unet.mid_block" or "layers[4]". See `Target.path`.

    Raises PointNotFoundError if there are none."""
    found: Any = root
    for name in filter(None, path.replace("[", ".").replace("]", "").split(".")):
        outer, found = found, inside(found, name)
        if found is None:
            where = outer.path if isinstance(outer, Points) else path
            raise PointNotFoundError(f"{where or 'the model'} has no {name!r}")
    if not isinstance(found, Points):
        raise PointNotFoundError(f"{path} is not a point")
    return found


def check_harmless(args: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise InputError for arguments that could run code, or open files or addresses, on the server."""
    for name in kwargs:
        if name in _REFUSED:
            raise InputError(f"a server does not accept the argument {name}")
    waiting = [args, kwargs]
    for value in waiting:
        if isinstance(value, (list, tuple)):
            waiting += [one for one in value if isinstance(one, (list, tuple, dict))]
        elif isinstance(value, dict):
            waiting += [one for one in value.values() if isinstance(one, (list, tuple, dict))]
            for name, given in value.items():
                texts = given if isinstance(given, (list, tuple)) else [given]
                is_place = any(place in str(name) for place in _PLACES)
                if is_place and any(isinstance(text, str) for text in texts):
                    raise InputError(f"{name}: a server opens no files or addresses. Pass the image itself")
