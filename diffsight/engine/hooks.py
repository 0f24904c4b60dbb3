"""The hooks that a run puts on a model so that calls go through the run's taps, and how they are removed.

For the duration of a run, every module that the run counts or taps has a `forward` of its own, which counts its calls
or sends them through a tap. Ordinary hooks would do the same at several times the cost: a module with any hook leaves
PyTorch's fast path. Among other people's hooks, this `forward` acts as the last hook before the call and the first hook
after it. That is where a run belongs: transformers captures hidden states in hooks, and these must contain the run's
edits. If several runs are open at once, the last one restores everything.
"""

import copy
import functools
import inspect
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from threading import RLock, get_ident, main_thread
from types import FrameType, FunctionType, MethodType
from typing import Any

from greenlet import getcurrent
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from diffsight.engine.tapped_methods import OWNER
from diffsight.engine.threads import calls_in_threads, note_call_in_thread, runs_beside_main

FORWARD = "forward"
COMPILED = "_compiled_call_impl"  # on a module after `module.compile()`: the function that its calls go to
REDUCE, _DEEPCOPY = "__reduce_ex__", "__deepcopy__"  # they make copies of an object; looked up on the instance too
NAMES_OF_HOOKS = frozenset({FORWARD, COMPILED, REDUCE, _DEEPCOPY, OWNER})  # what a run may put on a module

_lock = RLock()
_forward_of, _runs_of = operator.itemgetter(FORWARD), operator.itemgetter(3)
_class_forward_of, _dict_of = operator.attrgetter(FORWARD), operator.attrgetter("__dict__")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_pre_hooks_of, _hooks_of = map(operator.itemgetter, _HOOKS)
_has, _set, _delete = operator.contains, operator.setitem, operator.delitem  # quicker than `dict.__setitem__` and such
_run_all = deque(maxlen=0).extend  # runs an iterator to its end, in C
_FEW = 8  # modules; up to this many are hooked faster one by one than together

# Id of a module to: the override of its calls, its name, the value it replaced, the number of runs, the module, and its
# `__deepcopy__` during the runs if it has one.
_hooked: dict[int, list] = {}
# Ids of hooked modules whose forward pass may be called by something that is part of their call: by a forward pass that
# wraps another (`old = module.forward`), now or at some time during a run, or by a hook of others.
_wrapped: dict[int, None] = {}
# Signals and garbage collection can interrupt only at function calls. All bookkeeping is therefore updated without
# calling a function, so that an interrupt never finds a module half hooked.


class ModuleGroup:
    """Modules that are hooked together, such as the children of one module.

    Their hooks are made once, and put on and taken off with a few calls of C functions. These are not interrupted, and
    take little longer for thousands of modules. If a module has changed since the group was made, or is hooked
    already, the modules are hooked one by one.

    Args:
        modules: The modules, by id.
    """

    def __init__(self, modules: dict[int, nn.Module]) -> None:
        self.modules = modules
        self.held: list[dict] = []  # the `__dict__` of each module when they were hooked
        self.puts: list[Callable] = []
        self.entries: dict[int, list] = {}  # their entries in `_hooked`, as long as nobody has changed one
        self.user: HookedModules | None = None  # the user that has hooked them together
        self._kinds = [*map(type, modules.values())]
        forwards = {kind: getattr(kind, FORWARD, None) for kind in self._kinds}
        self._distinct, self._forwards = [*forwards], [*forwards.values()]
        functions = {kind: _hook_of(kind, forward) for kind, forward in forwards.items()}
        self._is_plain = len(modules) > _FEW and all(functions.values()) and not any(map(_copies_itself, functions))
        if self._is_plain:
            self.puts = [MethodType(functions[type(module)], module) for module in modules.values()]
            self._reduces = [MethodType(_reduce_without_hook, module) for module in modules.values()]

    def hook(self, user: "HookedModules") -> bool:
        """Hook the modules for `user`; return False if they must be hooked one by one."""
        is_as_it_was = (
            self._is_plain
            and _hooked.keys().isdisjoint(self.modules)
            and [*map(type, self.modules.values())] == self._kinds
            and [*map(_class_forward_of, self._distinct)] == self._forwards
        )
        if not is_as_it_was:
            return False
        held = [*map(_dict_of, self.modules.values())]
        if True in map(_has, held, repeat(FORWARD)) or True in map(_has, held, repeat(COMPILED)):
            return False
        try:
            if any(map(_pre_hooks_of, held)) or any(map(_hooks_of, held)) or _has_global_hooks():
                return False
        except KeyError:  # a module that passes on to another, say
            return False
        if not self.entries:
            entries = zip(self.modules.items(), self.puts)
            self.entries = {number: [put, FORWARD, None, 1, module, None] for (number, module), put in entries}
        self.held = held
        user.groups.append(self)
        self.user = user
        _hooked.update(self.entries)
        _run_all(map(_set, held, repeat(FORWARD), self.puts))
        _run_all(map(_set, held, repeat(REDUCE), self._reduces))
        return True

    def unhook(self) -> bool:
        """Unhook the modules; return False if they must be unhooked one by one."""
        runs = [*map(_runs_of, self.entries.values())]
        try:
            is_as_it_was = runs.count(1) == len(runs) and [*map(_forward_of, self.held)] == self.puts
        except KeyError:
            return False
        dicts = map(_dict_of, self.modules.values())
        if not (is_as_it_was and all(map(operator.is_, dicts, self.held))):
            return False
        _run_all(map(_delete, self.held, repeat(FORWARD)))
        _run_all(map(dict.pop, self.held, repeat(REDUCE), repeat(None)))
        _run_all(map(_hooked.pop, self.entries))
        if _wrapped:
            _run_all(map(_wrapped.pop, self.entries, repeat(None)))
        if calls_in_threads:
            _run_all(map(calls_in_threads.pop, self.entries, repeat(None)))
        return True


class HookedModules:
    """The modules that a run has hooked: their calls go through the taps of the run that makes them.

    Hooks nest: a module stays hooked until every run that has hooked it has unhooked it."""

    def __init__(self) -> None:
        self.groups: list[ModuleGroup] = []  # the groups hooked together
        self._known: list[list] = []  # entries in `_hooked` of modules hooked one by one
        self._held: list[dict] = []  # the `__dict__` of each module; `_hooks` has the hook in it
        self._hooks: list[Callable] = []

    def hook(self, modules: Iterable[nn.Module]) -> None:
        """Hook more modules."""
        with _lock:  # no loop in here: Python 3.13 would keep the lock if an interrupt came between iterations
            self._hook(modules)

    def hook_together(self, group: ModuleGroup) -> None:
        """Hook the modules of a group."""
        with _lock:
            if not group.hook(self):
                self._hook(group.modules.values())
                return
            self._held += group.held
            self._hooks += group.puts

    def _hook(self, modules: Iterable[nn.Module]) -> None:
        kind = function = None
        for module in modules:
            number, held = id(module), module.__dict__
            known = _hooked.get(number)
            if known is not None:
                known[3] += 1
            else:
                if type(module) is not kind:
                    kind = type(module)
                    function = _hook_of(kind, getattr(kind, FORWARD, None))
                if function is not None and FORWARD not in held and held.get(COMPILED) is None:
                    put, name, own = MethodType(function, module), FORWARD, None
                else:
                    _drop_copied_hook(held)
                    put, name, own = _of_its_own(module)
                reduce = MethodType(_reduce_without_hook, module)
                deepcopy = None
                if _copies_itself(kind) and _DEEPCOPY not in held:
                    deepcopy = MethodType(_deepcopy_without_hook, module)
                is_wrapped = own is not None or any(map(held.get, _HOOKS)) or _has_global_hooks()
                known = _hooked[number] = [put, name, own, 1, module, deepcopy]
                if is_wrapped:
                    _wrapped[number] = None
                held[name] = put
                held[REDUCE] = reduce
                if deepcopy is not None:
                    held[_DEEPCOPY] = deepcopy
            self._known.append(known)
            self._held.append(held)
            self._hooks.append(known[0])

    def renew(self) -> None:
        """Before the model moves, hook modules again if the body has replaced their `forward`."""
        try:
            if [*map(_forward_of, self._held)] == self._hooks:
                return
        except KeyError:  # it has been deleted, or the module is compiled
            pass
        entries = [*self._known, *(known for group in self.groups for known in group.entries.values())]
        for known in entries:
            put, name, _, _, module, _ = known
            held = module.__dict__
            if held.get(name) is not put:
                with _lock:
                    _wrapped[id(module)] = None
                    known[:3] = _of_its_own(module)
                    held[known[1]] = known[0]
        self._held = [known[4].__dict__ for known in entries]
        self._hooks = [known[0] for known in entries]

    def unhook(self) -> None:
        """Unhook all modules. May be called again."""
        if self.groups or self._known:
            with _lock:  # as above
                self._unhook()

    def _unhook(self) -> None:
        while self.groups:
            group = self.groups[-1]
            if group.user is self and not group.unhook():
                self._known += [known for number, known in group.entries.items() if _hooked.get(number) is known]
                group.entries = {}  # some are shared with other runs, or changed
            group.user = None
            del self.groups[-1]
        while self._known:
            put, name, own, runs, module, deepcopy = known = self._known[-1]
            number, held = id(module), module.__dict__
            if runs == 1 and number in _wrapped:
                _take_back(module)
            is_ours = held.get(name) is put  # otherwise someone has replaced it meanwhile
            known[3] = runs - 1
            del self._known[-1]
            if runs == 1:
                del _hooked[number]
                if number in _wrapped:
                    del _wrapped[number]  # noqa: RUF051 - `pop` would be a call, see above
                if is_ours and own is None:
                    del held[name]
                elif is_ours:
                    held[name] = own
                if REDUCE in held:
                    del held[REDUCE]
                if deepcopy is not None and _DEEPCOPY in held:
                    del held[_DEEPCOPY]
                if calls_in_threads:
                    calls_in_threads.pop(number, None)  # last: see above
        self._held, self._hooks = [], []


def _has_global_hooks() -> bool:
    """Whether there are hooks for the calls of all modules."""
    return bool(_global_forward_pre_hooks or _global_forward_hooks)


@functools.cache
def _copies_itself(kind: type[nn.Module]) -> bool:
    """Whether a class copies its modules with a method of its own, such as those of `torch.nn.utils.parametrize`."""
    return hasattr(kind, _DEEPCOPY)


def _reduce_without_hook(module: nn.Module, protocol: int) -> Any:
    """Return what `copy.copy`, `copy.deepcopy` and `pickle` need for a copy of a hooked module, without the hook."""
    return _without_hook(module, lambda: module.__reduce_ex__(protocol))


def _deepcopy_without_hook(module: nn.Module, memo: dict) -> Any:
    """Return a deep copy of a hooked module whose class makes its own copies, without the hook."""
    return _without_hook(module, lambda: copy.deepcopy(module, memo))


def _without_hook(module: nn.Module, call: Callable[[], Any]) -> Any:
    """Call a function that copies the module's `__dict__`, or returns it, and gets one without the hook."""
    held = module.__dict__
    plain = dict(held)
    _drop_copied_hook(plain)
    before = dict(plain)
    try:
        object.__setattr__(module, "__dict__", plain)
        return call()
    finally:
        object.__setattr__(module, "__dict__", held)
        held.update({key: value for key, value in plain.items() if before.get(key, before) is not value})


def _drop_copied_hook(held: dict[str, Any]) -> None:
    """Remove the hook from a copy of the `__dict__` of a hooked module, and restore what it replaced."""
    reduce, deepcopy = held.get(REDUCE), held.get(_DEEPCOPY)
    if getattr(reduce, "__func__", None) is not _reduce_without_hook:
        return
    del held[REDUCE]
    if getattr(deepcopy, "__func__", None) is _deepcopy_without_hook:
        del held[_DEEPCOPY]
    for name in (FORWARD, COMPILED):
        if _module_of(held.get(name)) is reduce.__self__:
            _put_back(held, name)


def _hook_of(kind: type[nn.Module], forward: Any) -> Callable | None:
    """Return the hook for modules of a class whose forward pass is `forward`; None if each needs a hook of its own."""
    return _through_taps(kind, forward) if type(forward) is FunctionType else None


@functools.cache
def _through_taps(kind: type[nn.Module], forward: FunctionType) -> Callable | None:
    """Return a class's forward pass, sent through the taps; None if it is not a plain method (but static, say)."""
    if inspect.getattr_static(kind, FORWARD) is not forward:
        return None
    hook = functools.wraps(forward)(_through(forward, forward))
    hook.__signature__ = inspect.signature(forward)  # for code that does not look for `__wrapped__`
    return hook


def _of_its_own(module: nn.Module) -> tuple[Callable, str, Any]:
    """Return the replacement of a module's forward pass, the name to store it under, and the value there now. Compiled
    code is called through the taps and otherwise left alone."""
    held = module.__dict__
    if FORWARD in held:
        _take_back(module)
    name = FORWARD if held.get(COMPILED) is None else COMPILED
    own = held.get(name)
    function = _hook_of(type(module), getattr(type(module), FORWARD, None))
    if function is not None and own is None and name == FORWARD:
        return MethodType(function, module), name, None
    target = module.forward if own is None else own  # a TorchScript module looks up its own on access
    function = _through(lambda module, /, *args, **kwargs: target(*args, **kwargs))
    if own is None:
        return MethodType(function, module), name, None
    return functools.update_wrapper(functools.partial(function, module), own), name, own


def _take_back(module: nn.Module) -> None:
    """Remove an earlier hook that somebody has put back as the forward pass of a module, as `mock.patch` does at the
    end of its block."""
    held = module.__dict__
    while _module_of(held.get(FORWARD)) is module:
        _put_back(held, FORWARD)


def _put_back(held: dict[str, Any], name: str) -> None:
    """Put what a hook replaced in its place, see `_of_its_own`."""
    hook = held[name]
    if type(hook) is MethodType:
        del held[name]
    else:
        held[name] = hook.__wrapped__


def _module_of(hook: Any) -> nn.Module | None:
    """Return the module whose calls go through a hook of a run; None for any other value."""
    module = function = None
    if type(hook) is MethodType:
        module, function = hook.__self__, hook.__func__
    elif type(hook) is functools.partial and hook.args:
        module, function = hook.args[0], hook.func
    return module if type(function) is FunctionType and function.__code__ is _CODE else None


def _through(original: Callable, of_class: Callable | None = None) -> Callable:
    """Return `original`, a function of a module and arguments, sent through the taps of the run that calls it.

    If `original` is the forward pass of the module's class, pass it as `of_class` too. Like PyTorch, every call then
    looks it up again, since the user may replace it at any time."""

    def forward(*args: Any, **kwargs: Any) -> Any:  # the module first: `args` is then passed on as it is
        module, function = args[0], original
        if of_class is not None and type(module).forward is not of_class:
            function = _as_looked_up(type(module))
        host = getattr(getcurrent(), "owner", None)
        if host is None:
            if runs_beside_main or get_ident() != _MAIN_THREAD:
                note_call_in_thread(module, _CODE)
            return function(*args, **kwargs)
        counted, number = host.taps.calls, id(module)
        calls = counted.get(number)
        if _wrapped and number in _wrapped and _is_part_of_call(module, original):
            calls = None
        if type(calls) is int:
            counted[number] = calls + 1
            output = function(*args, **kwargs)
            calls = counted.get(number)  # a tap if it was asked for while it was running
            return output if type(calls) is int or calls is None else calls.leave(output, (args[1:], kwargs))
        if calls is None:
            return function(*args, **kwargs)
        return calls.call(MethodType(function, module), args[1:], kwargs)

    return forward


def _as_looked_up(kind: type[nn.Module]) -> Callable:
    """Return the forward pass that the modules of a class have now, as a function of a module and arguments."""
    found = inspect.getattr_static(kind, FORWARD)

    def forward(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        bound = found.__get__(module, kind) if hasattr(type(found), "__get__") else found
        return bound(*args, **kwargs)

    return forward


_CODE = _through(nn.Module.forward).__code__
_MAIN_THREAD = main_thread().ident


def _is_part_of_call(module: nn.Module, original: Callable) -> bool:
    """Whether the hook that asks, of the forward pass `original`, was called within a call of the module: by another
    hook of a run, which has counted the call, or by a hook of others (`module.forward(...)`)."""
    frame = sys._getframe(2)
    if _is_of_pytorch(frame):
        return False
    while frame is not None:
        if _is_call(frame, module):
            return frame.f_locals["original"] is not original
        if _is_of_pytorch(frame) and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def _is_of_pytorch(frame: FrameType) -> bool:
    """Whether a frame is part of the way in which PyTorch calls modules."""
    return frame.f_globals.get("__name__") == nn.Module.__module__


def count_running(frame: FrameType | None, module: nn.Module) -> int:
    """Return how many counted calls of a hooked module are in progress on the stack that ends with `frame`."""
    return sum(1 for _ in _calls_of(module, frame))


def running_call(frame: FrameType | None, module: nn.Module) -> tuple[tuple, dict] | None:
    """Return the arguments of the innermost call of a hooked module on the stack that ends with `frame`."""
    call = next(_calls_of(module, frame), None)
    return None if call is None else (call.f_locals["args"][1:], call.f_locals["kwargs"])


def runs_hooks(module: nn.Module) -> bool:
    """Whether PyTorch makes the innermost call of a hooked module, with the hooks on the module. Otherwise other code
    calls `module.forward(...)`, without them."""
    call = next(_calls_of(module, sys._getframe(1)), None)
    return call is not None and _is_of_pytorch(call.f_back)


def note_hooks(module: nn.Module) -> None:
    """Note that a hooked module has hooks of others, perhaps since the run has hooked it."""
    if id(module) in _hooked:
        _wrapped[id(module)] = None


def is_replaced(module: nn.Module) -> bool:
    """Whether the hook of a hooked module has been replaced since the model last moved."""
    known = _hooked.get(id(module))
    return known is not None and module.__dict__.get(known[1]) is not known[0]


def _calls_of(module: nn.Module, frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the counted calls of a hooked module on the stack that ends with `frame`, innermost first."""
    while frame is not None:
        if _is_call(frame, module):
            yield frame
        frame = frame.f_back


def _is_call(frame: FrameType, module: nn.Module) -> bool:
    if frame.f_code is not _CODE:
        return False
    known = frame.f_locals
    return known.get("module") is module and known.get("calls") is not None


def has_forward_of_its_own(module: nn.Module) -> bool:
    """Whether a module has a forward pass other than the one of its class, bound to it in whatever way."""
    known = _hooked.get(id(module))
    own = module.__dict__.get(FORWARD) if known is None else known[2] if known[1] == FORWARD else None
    if own is None:
        return False
    hook = getattr(module, "_hf_hook", None)
    hooks = [hook, *getattr(hook, "hooks", ())]  # accelerate puts several into one
    if all(type(one).__module__.startswith("accelerate.") for one in hooks):
        own = module.__dict__.get("_old_forward")  # accelerate only moves tensors between devices
    function, bound = (own.func, own.args) if isinstance(own, functools.partial) else (own, ())
    if isinstance(own, MethodType):
        function, bound = own.__func__, (own.__self__,)
    return own is not None and not (function is getattr(type(module), FORWARD, None) and bound == (module,))
