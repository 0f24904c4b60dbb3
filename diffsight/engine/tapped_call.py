"""The calls of one module or method in one run: counted, changed or skipped.

A `Tap` belongs to one run and one callable of the model: a module's forward pass, or a method that code calls directly
(`vae.decode`, `scheduler.step`). Every call of it goes through `Tap.call`. There the tap counts the call, and skips it
if a body has requested that. It hands the inputs and the output to the run (the `Host`) if a body waits for them or has
assigned them. Calls made outside the run's own coroutine (by another run, by the body itself, in another thread)
pass untouched. `hooks` routes the calls here.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from traceback import format_exception_only
from typing import Any, Protocol

from torch import Tensor, is_grad_enabled, nn
from torch._C import _is_fwd_grad_enabled, _len_torch_function_stack
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._functorch import get_dynamic_layer_stack_depth
from torch.nn import Parameter
from torch.nn.modules.module import _global_forward_hooks
from torch.utils._pytree import tree_leaves

from diffsight.engine.checkpointed_regions import end_checkpoints, is_computed_again
from diffsight.engine.coroutine import Coroutine, current_owner
from diffsight.engine.hooks import COMPILED, FORWARD, is_replaced, note_hooks, runs_hooks
from diffsight.engine.points import INPUTS, LEFT_OUT, OUTPUT, Asked, Assignment, Point, PointKey
from diffsight.engine.step_clock import Clock
from diffsight.engine.target import Target
from diffsight.engine.threads import calls_in_threads
from diffsight.engine.torch_state import TorchState, unseen
from diffsight.engine.users_hooks import Contents, has_forward_hooks, output_hooks
from diffsight.engine.users_line import UsersLine, set_line
from diffsight.errors import DiffsightError, warn_user

_known_compiled: weakref.WeakSet = weakref.WeakSet()  # compiled modules that have been warned about
_CHANGEABLE = frozenset({Tensor, Parameter, tuple, list, dict})
_NONE: dict = {}  # shared by taps without entries, which replace it with a dictionary of their own; never changed


class OtherTaps(Protocol):
    """All taps of a run, as a single tap sees them; see `diffsight.engine.taps.Taps`."""

    def note_call(self, target: Target) -> None:
        """Note a call of a module, to learn whether the model calls it outside the modules around it."""

    def is_in_method(self, around: "Tap") -> bool:
        """Whether a tapped method of a module is running."""


class Host(Protocol):
    """The run, as its taps see it; see `diffsight.engine.run_to_point.Flow`."""

    taps: OtherTaps
    is_scan: bool  # whether it computes only shapes
    clock: Clock
    thread: int
    coroutine: Coroutine | None  # the coroutine in which the model runs, once it has started
    parked: Point | None  # where the model stands, if it waits at a point
    state: TorchState  # the state in which the run was opened
    refused: list[Exception]  # errors at points, which the model itself may catch
    adds_gradients: bool  # whether the model computes gradients where it is, in a run that was opened without
    misshapen: dict[str, UsersLine]  # assigned values whose shape or type differs from the model's own, in words

    def arrive(self, point: Point, state: TorchState | None) -> None:
        """The model has reached a point that a body waits for or has assigned: give every body its turn. `state` is the
        current state, if it is known."""

    def begin_call(self, tap: "Tap", args: tuple, kwargs: dict) -> None:
        """A call that the run watches begins: one of a component, or one that begins or ends a step."""

    def end_call(self, tap: "Tap", output: Any) -> None:
        """A call that the run watches has ended; the model continues with `output`."""


@dataclass(eq=False, slots=True)
class Origin:
    """What was known of a module's calls when the run began to count them."""

    around: "Tap | None" = None  # the surrounding tap, if the model had moved by then
    step: int = -1  # the step that the model was in
    unseen: int = 0  # calls of the surrounding module that had begun: calls of this one may have been missed
    unseen_in_step: int = 0  # the same, within that step
    guard: "tuple[Tap, int] | None" = None  # a surrounding tap, and the number of its call that was running


class Tap:
    """The calls of one module or method in one run."""

    __slots__ = (
        "active",  # numbers of the calls in progress, outermost first
        "awaited",  # the points that bodies wait for; for each body, whether it waits within a step
        "begun",  # whether a hook has already counted the call that is now reaching the forward pass
        "border",  # in a scan, for a component: the function that makes its calls
        "children_counted",
        "entered",  # number of calls begun so far, as far as the run has seen
        "failures",  # number of a call to the error that it raised
        "given",  # the inputs of the call at whose output the model stands
        "given_versions",  # how often each input had been changed in place when the call began, if asked for
        "hooks",  # other hooks that the run has put on the module
        "host",
        "inside",  # whether a compiled module runs uncompiled
        "is_module",  # whether the target is the forward pass of a module
        "keepers",  # kind of point to the functions that are shown every value
        "origin",
        "pending",  # point to the assignments to it
        "points",  # point to the value read there
        "skips",  # number of a call to what it returns without running
        "step_base",  # calls begun before the current step
        "takes_inputs",  # whether inputs are taken in a hook
        "target",
        "unseen",
        "unseen_in_step",
        "watched",  # whether the run wants to know when its calls begin and end
        "wrapped",  # number of the last call that a new forward pass of the module has made; the model has set that
    )

    def __init__(self, host: Host, target: Target, origin: Origin, entered: int = 0, step_base: int = 0) -> None:
        """`entered` calls were counted before, `step_base` of them before the current step."""
        self.host, self.target, self.origin = host, target, origin
        self.entered, self.step_base = entered, step_base
        self.unseen, self.unseen_in_step = origin.unseen, origin.unseen_in_step
        self.active: list[int] = []
        self.awaited: dict[PointKey, list[bool]] = {}
        self.points: dict[PointKey, Point] = {}
        self.keepers: dict[str, list[Callable[[Tap, int, Any], None]]] = _NONE
        self.pending: dict[PointKey, list[Assignment]] = _NONE
        self.skips: dict[int, Assignment] = _NONE
        self.failures: dict[int, str] = _NONE
        self.border: Callable[[Callable, tuple, dict], Any] | None = None
        self.given: tuple[tuple, dict] | None = None
        self.given_versions: list[int] | None = None
        self.is_module = target.name == FORWARD
        self.wrapped = -1
        self.begun = self.children_counted = self.inside = self.takes_inputs = False
        self.watched = target.outer is None or target.key in host.clock.watched
        self.hooks: tuple[Any, ...] = ()  # replaced without a call: see `diffsight.engine.hooks`

    # ---- from the model's side

    def call(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Make one call of the target, `function`."""
        if self.begun:
            self.begun = False
        elif (new := self.enter(args, kwargs)) is not None:
            args, kwargs = new
        index, has_hooks = self.active[-1], False
        if self.is_module:
            owner = self.target.owner
            if is_replaced(owner):
                self.wrapped = index
            # Like PyTorch, look for hooks before the call.
            if has_hooks := bool(owner._forward_hooks or _global_forward_hooks):
                note_hooks(owner)
        skip = self.skips.pop(index, None) if self.skips else None
        if skip is not None:
            self._check_wrapped((INPUTS, index), skip)
            self._check_region((INPUTS, index), skip)
            is_watched = not skip.has_gradients and self.host.adds_gradients
            if is_watched and unseen(_ends_gradients, (args, kwargs), skip.value):
                self._refuse((INPUTS, index), skip, LEFT_OUT)
            return self.leave(skip.value, (args, kwargs))
        if self.inside:
            function = self.target.uncompiled()
        versions = None
        if (OUTPUT, index) in self.awaited:
            versions = unseen(_versions, args, kwargs) if _len_torch_function_stack() else _versions(args, kwargs)
        try:
            output = function(*args, **kwargs) if self.border is None else self.border(function, args, kwargs)
        except BaseException as error:
            self.active.remove(index)
            self._note_failure(index, error)
            raise
        self.given_versions = versions
        return self.leave(output, (args, kwargs), has_hooks)

    def _note_failure(self, index: int, error: BaseException) -> None:
        """Note the error of a call. If the model catches it, the call has no output."""
        if isinstance(error, Exception):
            failure = format_exception_only(error)[0].strip()
            self.failures = self.failures or {}
            self.failures[index] = failure
            for assignment in self.pending.get((OUTPUT, index), ()):
                assignment.failure = failure

    def enter(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Begin a call. Return new inputs, or None if they stay as they are."""
        if self.watched:
            self.host.begin_call(self, args, kwargs)
        around, index = self.origin.around, self.entered
        if not index and around is not None and not around.active and not self.host.taps.is_in_method(around):
            self.unseen = self.unseen_in_step = 1  # called directly: earlier calls may have been missed
        self.entered = index + 1
        self.active.append(index)
        key = (INPUTS, index)
        if not (key in self.awaited or (self.pending and key in self.pending) or INPUTS in self.keepers):
            return None
        inputs, changed = self._pass(key, (args, kwargs))
        return inputs if changed else None

    def leave(self, output: Any, given: tuple[tuple, dict] | None = None, has_hooks: bool = True) -> Any:
        """End a call. Return the output, replaced or unchanged.

        `given` are its inputs. If hooks of others may still replace the output (never if `has_hooks` is False), the
        call ends after them."""
        if not self.active or (has_hooks and self._leave_after_hooks(given)):  # inactive: it began before the tap
            return output
        index = self.active.pop()
        key = (OUTPUT, index)
        watch = self._watch_hooks(key, []) if has_hooks and self._has_hooks() else None
        if key in self.awaited or key in self.pending or OUTPUT in self.keepers:
            self.given = given
            try:
                output, _ = self._pass(key, output)
            finally:
                self.given = None
        if self.watched:
            self.host.end_call(self, output)
        if watch is not None:
            watch(output)
        return output

    def has_changed_given(self) -> bool:
        """Whether the call at whose output the model stands has changed one of its inputs in place."""
        if self.given_versions is not None and self.given_versions != unseen(_versions, *self.given):
            return True
        self.given_versions = None  # from here on, only the body changes them
        return False

    def _has_hooks(self) -> bool:
        """Whether others have put forward hooks on the module that run outside `call`."""
        owner = self.target.owner
        return self.is_module and has_forward_hooks(owner) and vars(owner).get(COMPILED) is None

    def _leave_after_hooks(self, given: tuple[tuple, dict] | None) -> bool:
        """Let the call end in a hook of its own, after those that may change the output; return False if none may."""
        owner, index = self.target.owner, self.active[-1]
        before = output_hooks(owner) if self._has_hooks() else []
        if not (before and runs_hooks(owner)):
            return False
        watch = self._watch_hooks((OUTPUT, index), before)

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            if module is not owner or current_owner() is not self.host or self.active[-1:] != [index]:
                return None
            self._remove_hook(hook)
            output = self.leave(output, given, has_hooks=False)
            if watch is not None:
                watch(output)
            return output

        hook = owner.register_forward_hook(after)
        self.hooks = (*self.hooks, hook)
        for number in [number for number in owner._forward_hooks if number not in (*before, hook.id)]:
            owner._forward_hooks.move_to_end(number)
        return True

    def _remove_hook(self, hook: Any) -> None:
        hook.remove()
        self.hooks = tuple(other for other in self.hooks if other is not hook)

    def _watch_hooks(self, key: PointKey, before: list[int]) -> Callable[[Any], None] | None:
        """Refuse a point that is read or assigned if a hook that runs after it changes the output in place. Return the
        function to call with the output when it has passed the point; None if there is no such hook."""
        owner, watched = self.target.owner, []
        is_touched = key in self.awaited or key in self.pending or OUTPUT in self.keepers
        if not is_touched or (owner._forward_hooks.keys() <= {*before} and not _global_forward_hooks):
            return None
        if not runs_hooks(owner):
            return None

        def last(module: nn.Module, args: tuple, output: Any) -> None:
            if module is not owner or current_owner() is not self.host:
                return
            self._remove_hook(hook)
            if watched and watched[0] is output and not unseen(watched[1].is_current):
                self._refuse(
                    key,
                    None,
                    "is changed in place by a hook on the module, after the run has read or assigned it. Let the hook "
                    "return the output that it has changed",
                )

        hook = owner.register_forward_hook(last)
        self.hooks = (*self.hooks, hook)
        return lambda output: watched.extend((output, unseen(Contents, output)))

    def _pass(self, key: PointKey, value: Any) -> tuple[Any, bool]:
        """Let a value pass a point. Return the value that the model continues with, and whether it was replaced."""
        point, waiting = None, self.awaited.get(key)
        host = self.host
        state: TorchState | None = host.coroutine.state.now()
        # An autograd function runs without forward-mode gradients too, unlike `no_grad()`.
        hides_calls = not (state.grad or state.inference or _is_fwd_grad_enabled())
        if calls_in_threads or not state.is_plain or hides_calls:  # rarely
            self._check_region(key)
            state = None  # it may have changed
        if key[1] == self.wrapped and key[0] == OUTPUT:
            self._check_wrapped(key)
        if waiting is not None or key in self.pending:
            point = Point(self, key, value, not waiting or False not in waiting)
            host.arrive(point, state)
            value = point.value
        if self.keepers:
            self._show(key, value)
        if point is None:
            return value, False
        if key in self.points and not point.is_unread:
            point.let_go()
        return value, point.changed

    def _show(self, key: PointKey, value: Any) -> None:
        """Show a value that passes a point to those who keep such values."""
        for keep in self.keepers.get(key[0], ()):
            try:
                keep(self, key[1], value)
            except Exception as error:
                self.host.refused.append(error)  # the model may have an `except` of its own
                raise

    def _check_wrapped(self, key: PointKey, skip: Assignment | None = None) -> None:
        """Refuse a point of a call that only a part of the module's call has made."""
        if key[1] == self.wrapped:
            self._refuse(
                key,
                skip,
                "is not known: the model has replaced the `forward` of that module by a function that calls the "
                "earlier one. Ask for the value where the model uses it next",
            )

    def _check_region(self, key: PointKey, skip: Assignment | None = None) -> None:
        """Refuse a point whose value would be misleading. In a checkpointed region, keep what autograd saves from now
        on, so that `backward()` uses the run's changes there."""
        if calls_in_threads and self.host.taps.is_called_in_thread(self.target):
            self._refuse(
                key,
                skip,
                "cannot be distinguished from other calls: another thread calls the module too, and a run does not see "
                "what the model calls in a thread of its own. Ask for a value of a module that is called in the run's "
                "thread alone",
            )
        if get_dynamic_layer_stack_depth() > len(self.host.state.levels):
            self._refuse(
                key,
                skip,
                "is inside torch.func (vmap, grad, jvp …), so its value is valid only during that call. "
                "Ask for a value outside of it, such as the output of a module around it",
            )
        if is_grad_enabled():
            if _top_saved_tensors_default_hooks(True):
                end_checkpoints()
        elif is_computed_again():
            self._refuse(
                key,
                skip,
                "lies in a region that backward() recomputes without the run's reads and changes. Use "
                'checkpointing with use_reentrant=False (gradient_checkpointing_enable({"use_reentrant": False}) in '
                "transformers), turn it off for this run, or open the run under torch.no_grad() if you need no "
                "gradients",
            )

    def _refuse(self, key: PointKey, skip: Assignment | None, why: str) -> None:
        kind, index = key
        assigned = ", ".join(map(str, self.pending.get(key, ()) if skip is None else [skip]))
        point = assigned or str(Asked(self.target, "output" if kind == OUTPUT else "input", index))
        error = DiffsightError(f"{point} {why}")
        self.host.refused.append(error)  # the model may have an `except` of its own
        raise error

    # ---- from the run's side

    def take_inputs(self) -> None:
        """From now on, take the inputs of a module in a hook, the last one before its forward pass.

        Hooks after the call then also see the body's replacements, among them the hooks with which transformers
        captures hidden states."""
        module = self.target.owner
        if self.takes_inputs or not self.is_module or vars(module).get(COMPILED) is not None:
            return
        self.takes_inputs = True

        def before(called: nn.Module, args: tuple, kwargs: dict | None = None) -> Any:
            # A copy of the module has the hook too. And a hook that another one has removed is called without kwargs.
            if called is not module or kwargs is None or current_owner() is not self.host or not self.host.taps:
                return None
            if next(reversed(module._forward_pre_hooks)) != hook.id and not _moved_last(module, hook.id):
                return None
            new = self.enter(args, kwargs)
            self.begun = True
            return new

        hook = module.register_forward_pre_hook(before, with_kwargs=True)
        self.hooks = (*self.hooks, hook)

    def look_inside(self, is_compiled: bool) -> None:
        """Run a compiled module uncompiled, and PyTorch's transformer layer unfused, so that its parts can be seen."""
        self.inside = is_compiled
        if is_compiled and self.target.owner not in _known_compiled:
            _known_compiled.add(self.target.owner)
            path = self.target.path or type(self.target.owner).__name__
            warn_user(f"{path} is compiled: a run that reads or changes values inside it runs it uncompiled, slower")
        if isinstance(self.target.owner, nn.TransformerEncoderLayer):  # it is not fused if it has any hook
            self.hooks = (*self.hooks, self.target.owner.register_forward_pre_hook(lambda *_: None))

    def await_point(self, key: PointKey, in_step: bool) -> None:
        """A body waits for a point from now on, perhaps within a step only."""
        waiting = self.awaited.get(key)
        if waiting is None:
            self.awaited[key] = [in_step]
        else:
            waiting.append(in_step)

    def stop_awaiting(self, key: PointKey, in_step: bool) -> None:
        """The wait is over."""
        waiting = self.awaited.get(key, ())  # an interrupt may have left nothing
        if len(waiting) > 1:
            waiting.remove(in_step)
        elif waiting:
            del self.awaited[key]

    def add_keeper(self, kind: str, keep: "Callable[[Tap, int, Any], None]") -> None:
        """Show every value that passes a kind of point to `keep`."""
        self.keepers = self.keepers or {}
        self.keepers.setdefault(kind, []).append(keep)

    def add_pending(self, key: PointKey, assignment: Assignment) -> None:
        """Let an assignment wait for a point."""
        self.pending = self.pending or {}
        self.pending.setdefault(key, []).append(assignment)

    def add_skip(self, index: int, skip: Assignment) -> None:
        """Skip a call, replacing any earlier request to skip it."""
        self.skips = self.skips or {}
        self.skips[index] = skip

    def assign_pending(self, point: Point) -> bool:
        """Apply the assignments to a point by the bodies whose turn it is; return whether there were any."""
        waiting, assigned = self.pending.pop(point.key, ()), False
        for assignment in waiting:
            kind, index = point.key
            call = index
            if assignment.order <= point.turn:
                call = assignment.call_of(self)
                if call == index:
                    try:
                        difference = assignment.apply_to(point)
                    except Exception as error:
                        set_line(error, assignment.where)
                        self.host.refused.append(error)  # the model may have an `except` of its own
                        raise
                    if difference is not None:
                        self.host.misshapen[difference] = assignment.where
                    assigned = True
                    continue
                # This call turned out not to have the selected part; it is not looked at again.
                assignment.first = assignment.first if assignment.asked.call else call
            self.pending.setdefault((kind, call), []).append(assignment)
        return assigned

    def waiting(self) -> list[Assignment]:
        """Return the assignments that were not reached."""
        return [a for waiting in self.pending.values() for a in waiting] + list(self.skips.values())

    def drop_step(self) -> list[Assignment]:
        """End a step: drop the values read within it, and return the assignments within it that were not reached."""
        self.step_base = self.entered
        missed: list[Assignment] = []
        if self.points:
            self.points = {key: point for key, point in self.points.items() if not point.in_step}
        for key, waiting in list(self.pending.items()):
            missed += [a for a in waiting if a.in_step]
            self.pending[key] = [a for a in waiting if not a.in_step]
            if not self.pending[key]:
                del self.pending[key]
        for index in [i for i, skip in self.skips.items() if skip.in_step]:
            missed.append(self.skips.pop(index))
        return missed

    def remove(self) -> None:
        """Remove the hooks that the run has put on the module, except those of `HookedModules`."""
        for hook in self.hooks:
            hook.remove()


class LearningTap(Tap):
    """A tap in the first run of a model, which notes direct calls of the module that bypass the modules around it."""

    __slots__ = ()

    def enter(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.host.taps.note_call(self.target)
        return super().enter(args, kwargs)


def _moved_last(module: nn.Module, number: int) -> bool:
    """Return whether a run's hook still comes last before the forward pass in this call: only hooks of other runs
    follow. Otherwise others were registered since, and it comes after them from the next call on."""
    hooks = module._forward_pre_hooks
    following = [*hooks.values()][[*hooks].index(number) + 1 :]
    if all(getattr(hook, "__code__", None) is hooks[number].__code__ for hook in following):
        return True
    hooks.move_to_end(number)
    return False


def _ends_gradients(given: Any, output: Any) -> bool:
    """Whether a call is given tensors with gradients, and nothing that it returns has any."""
    given, output = ([leaf for leaf in tree_leaves(one) if isinstance(leaf, Tensor)] for one in (given, output))
    return any(leaf.requires_grad for leaf in given) and not any(leaf.requires_grad for leaf in output)


def _versions(args: Sequence, kwargs: dict) -> list[int]:
    """Return how often each of the tensors among the arguments of a call was changed in place, and how many items each
    container among them has."""
    versions = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        kind = type(value)
        if kind not in _CHANGEABLE:  # most arguments of many calls
            continue
        if kind is Tensor or kind is Parameter:
            try:
                versions.append(value._version)
            except RuntimeError:  # an inference tensor: PyTorch does not count its changes
                continue
        else:
            versions += [len(value), *(_versions((), value) if kind is dict else _versions(value, _NONE))]
    return versions
