"""Models whose weights are on a server: their runs are sent there."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any, NoReturn

from torch._C import _is_any_autocast_enabled

from diffsight.edits import start_edit
from diffsight.engine.scan import ScanFlow, is_scanning
from diffsight.engine.target import join
from diffsight.envoy import Points, flow_of, run_meant_by, set_class, target_of, tree_of
from diffsight.errors import InputError, NoRunError
from diffsight.model import Model
from diffsight.remote.remote_flow import RemoteFlow
from diffsight.remote.schedulers import is_scheduler
from diffsight.remote.served_model import Job, ServedModel
from diffsight.run import Run

# Methods of modules, pipelines and schedulers that change them.
_CHANGES = (
    "apply",
    "bfloat16",
    "compile",
    "cpu",
    "cuda",
    "double",
    "float",
    "half",
    "resize_token_embeddings",
    "to_empty",
    "train",
    "type",
    "zero_grad",
)
_CHANGES_LIKE = ("add_", "delete_", "disable_", "enable_", "fuse_", "load_", "register_", "set_", "unfuse_", "unload_")
_HARMLESS = ("add_noise", "load_config", "set_progress_bar_config")
# The call that opens the run being created: the method, its arguments and keyword arguments.
_opening: ContextVar[tuple[str, tuple, dict] | None] = ContextVar("diffsight_opening", default=None)


class OnServer:
    """Mixin for the class of a model that is on a server; see `put_on_server`.

    Attributes:
        server: The server; see `ServedModel`.
    """

    server: ServedModel

    def trace(self, *args: Any, **kwargs: Any) -> Run | Job:
        return self._opened(super().trace, "trace", args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Run | Job:
        return self._opened(super().generate, "generate", args, kwargs)

    def _opened(self, method: Callable[..., Run], name: str, args: tuple, kwargs: dict[str, Any]) -> Run | Job:
        """Open a run by a method of the model, and store the call for `_new_run`. `blocking=False` makes it a job."""
        blocking = kwargs.pop("blocking", True)
        no_jobs = getattr(type(self), "_no_jobs", "")  # why no run of this class can be a job
        if not blocking and no_jobs:
            raise InputError(no_jobs)
        not_sent = getattr(type(self), "_not_sent", ())  # arguments that have no meaning for a server
        before = _opening.set((name, args, {key: value for key, value in kwargs.items() if key not in not_sent}))
        try:
            run = method(*args, **kwargs)
        finally:
            _opening.reset(before)
        return run if blocking or is_scanning() else flow_of(run).submit()

    def _new_run(
        self,
        function: Callable[[], Any],
        sizes: Sequence[int] = (),
        again: Callable[..., Run] | None = None,
        grad: bool = False,
    ) -> Run:
        if is_scanning():
            return super()._new_run(function, sizes, again, grad)
        call = _opening.get()
        if call is None:
            raise InputError(
                "a server runs model.generate(...), model.trace(...) and lenses by name, and no other function"
            )
        if _is_any_autocast_enabled():
            raise InputError("autocast does not reach a server: open the run outside torch.autocast(...)")
        flow = RemoteFlow(self._tree, self.server, *call)
        run = self._run_class(self, flow, sizes, again)
        flow.bodies.edits = [start_edit(edit, run, number) for number, edit in enumerate(self._edits)]
        return run

    def to(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError("the weights are on the server: their device and dtype are chosen when the server is started")


class Elsewhere:
    """Calls parts of a model on its server. For `Tree.elsewhere`."""

    def __init__(self, server: ServedModel) -> None:
        self._server = server

    def is_meant_by(self, points: Points) -> bool:
        """Return whether a call is made on the server, which is the case except in a scan."""
        return not isinstance(self._flow(points), ScanFlow)

    def call(self, points: Points, args: tuple, kwargs: dict[str, Any], hook: bool = False, method: str = "") -> Any:
        """Call a part of the model, or a method of it, on the server and return the result."""
        path = target_of(points).path
        op = {"op": "call", "path": path, "method": method, "args": list(args), "kwargs": kwargs, "hook": hook}
        flow = self._flow(points)
        if isinstance(flow, RemoteFlow) and flow.outcome is None:
            return flow.call_there(op)
        return self._server.ask(op)

    def attribute(self, points: Points, name: str, value: Any) -> Any:
        """Return an attribute of a part of the model: from the server, if a run changes it there.

        In place of a method that would change the part, return one that raises an error: the part here has no weights,
        and runs do not use it."""
        is_sent = is_scheduler(target_of(points).owner) and name != "config" and not name.startswith("_")
        if is_sent and not callable(value):
            flow = self._flow(points)
            if isinstance(flow, RemoteFlow) and flow.has_begun and flow.outcome is None:
                return flow.call_there({"op": "attribute", "path": target_of(points).path, "name": name})
        if not callable(value) or not (name in _CHANGES or name.startswith(_CHANGES_LIKE)) or name in _HARMLESS:
            return value

        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            raise InputError(
                f"{join(target_of(points).path, name)} would not reach the model on the server at "
                f"{self._server.address}, where it is set up before it is served. Change values in runs instead"
            )

        return refuse

    def _flow(self, points: Points) -> Any:
        """Return the flow of the run in which a call is made; None outside any run."""
        try:
            return flow_of(run_meant_by(points, target_of(points).path))
        except NoRunError:
            return None


@cache
def _class_on_server(cls: type) -> type:
    return type(cls.__name__, (OnServer, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def put_on_server(model: Model, server: ServedModel) -> None:
    """Make a model without weights send its runs to a server."""
    tree_of(model).elsewhere = Elsewhere(server)
    model.__dict__["server"] = server
    set_class(model, _class_on_server(type(model)))


def is_on_server(model: Any) -> bool:
    """Return whether the weights of a model are on a server."""
    return isinstance(model, OnServer)
