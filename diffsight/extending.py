"""The interface for wrappers of other models: methods that they may override, and functions of the engine to call.

A wrapper consists of a model, a tree, and usually a run of its own:

    class AudioTree(Tree):
        opens_with = "generate"

        def children_of(self, target):
            if target.owner is not self.root.owner:
                return target.named_children()
            return {name: Target(part, FORWARD, name) for name, part in self.root.owner.components.items()}

        def components(self):
            return list(self.children_of(self.root).values())

        def clock(self):
            return Clock([self.children_of(self.root)["decoder"]])

    class AudioRun(Run):
        @property
        def audio(self):
            with keeping_attribute_errors(self):
                return self.result.audio

    class AudioModel(Model):
        _run_class = AudioRun

        def __init__(self, pipeline):
            self._wrap(AudioTree(Target(pipeline, "__call__", "")))

        def generate(self, text, **arguments):
            return self._new_run(lambda: self._owner(text, **arguments))

**The tree** (`Tree`) says what can be tapped, and under which names. A `Target` is one thing that can be tapped: its
owner, the name of the method, and the path as users write it. Override:

- `children_of(target)`: the parts directly in a part, by name. They become envoys.
- `methods_of(owner)`: methods that code calls directly instead of `forward`.
- `meant_by(target, name)`: this model's own name for a part that has another name in other models.
- `names_of(owner)` and `target_named(outer, name)`: standard names, such as `layers` and `ln_final`.
- `named_value(points, name)`, `value_names(target)` and `value_target(target, name)`: values inside the calls of a
  module that are neither its inputs nor its output, such as attention probabilities.
- `components()`: the targets tapped from the start of every run. Targets inside them are tapped when asked for.
- `clock()`: a `Clock`, which determines when a step begins.
- `stand_ins()`: functions that a scan calls in place of components that look at values.
- `describe(owner)`, `note_on_values(path)`, `attribute(owner, name)`, `title`, `opens_with`: what `print` shows for
  a part and its values, how attributes are read, and what error messages call the model and the method that opens a
  run.
- `weights_loaded()`: called after the weights have been loaded, if they are loaded on first use. Pass the function that
  loads them to `Tree(root, load)`.

State that belongs to the model's structure is kept on the tree, where edited copies of the model share it.

**The run** (`Run`). Override `_make_step` to yield steps of your own class; add properties for parts of the result. In
a property, put `keeping_attribute_errors(self)` around code that may raise AttributeError. If there are several passes
(`run.invoke`), names refer to the run `self._pass`. `self._check_one_pass(name)` raises an error for a name that every
pass has, `self._check_no_scan(name)` for a result that a scan would make of zeros. `self._model` is the model.
`call_if_unread(run, function)` calls a function if the run is dropped before anything ran.
Override `_own_copy` if a run works on copies of parts of the model: attributes and methods of their handles are then
those of the copies.

**The model** (`Model`). Set `_run_class`, call `_wrap(tree)` in `__init__`, and open runs with `_new_run(function,
sizes, again, grad)`. Override `_bound(run, part)` if the handle on the whole model has a class of its own, and
`_handle(target)` if the handles on its parts do. `open_run(model, function)` does the same as `_new_run` from outside.

**A flow** (`flow_of(run)`) moves the model. A wrapper may set `flow.seed` (the model then draws random numbers from a
state of its own) and `flow.observer` (it sees the calls of the components: `called`, `returned`, `ended`), add a
function mode with `flow.add_mode(mode)`, and follow a point with the number of each call with `flow.keep(Asked(...),
function)`. To follow values alone, use the public `run.follow(path, function)`. `flow.outcome` is `STOPPED` after
`run.stop()`.

**Selections** narrow a point to a part of its value. Subclass `Selection` (`take`, `put`; `call` and `at` if the part
differs from call to call) and use it with `narrowed(points, selection)`, or in a `View` or `Row`, a run narrowed to it.
`Part` is a slice of a batch.

**Targets of another kind**, such as attention probabilities, subclass `Target` and define `attach(tap)`. It arranges
for `tap.enter(args, kwargs)` and `tap.leave(output)`, or `tap.call(function, args, kwargs)`, to be called every
time, and returns an object with `remove()`. A value inside the calls of a module has `is_value = True`, and a
`point(part, call)` that returns its path as users write it. If only the end of a call shows whether a value was the
intended one, `decided_by(tap)` returns the tap of that call, and `run.stop()` lets that call end first. Check
`current_owner() is tap.host`: calls from outside the run must pass untouched. To change a method for the duration of a
run, use `ChangedMethod(owner, name, change)`. The owner of a special method such as `__call__` is the class.

**Envoys.** An attribute of an envoy may be a part of the model, so use functions to ask about the envoy itself:
`tree_of`, `target_of`, `owner_of`, `run_of`, `part_of`, `child_of(envoy, name)`, `handle_on(envoy, target)`,
`narrowed(points, selection)`, `fetch(points, part)`, `assign(points, part, value)`, and `run_meant_by(points, what)`
for the run whose values `model.<path>` returns. In a run, the `__class__` of an envoy is that of its module;
`set_class(envoy, cls)` sets its own.

**Modules.** `unwrapped(module)`, `wrapped_path(module)`, `wrapped_targets(target)` and `children_in(target)` see
through modules that wrap another, such as those of `torch.compile`. `structural_copy(module)` returns a copy without
weights and hooks, for trial runs. Within `without_global_hooks()`, PyTorch does not call its hooks on all modules.
"""

from diffsight.engine.batch_slicing import Part, Selection
from diffsight.engine.coroutine import current_owner
from diffsight.engine.hooks import FORWARD
from diffsight.engine.model_tree import Tree
from diffsight.engine.points import INPUTS, OUTPUT, Asked, first_input
from diffsight.engine.run_end import STOPPED, Observer
from diffsight.engine.scan import is_scanning
from diffsight.engine.scan_state import ModuleHooks
from diffsight.engine.step_clock import Clock
from diffsight.engine.structural_copy import structural_copy, without_global_hooks
from diffsight.engine.tapped_call import Tap
from diffsight.engine.tapped_methods import ChangedMethod
from diffsight.engine.target import Target, join, part_targets
from diffsight.engine.torch_state import with_gradients
from diffsight.engine.wrapped_modules import children_in, unwrapped, wrapped_path, wrapped_targets
from diffsight.envoy import (
    Envoy,
    MethodEnvoy,
    Points,
    assign,
    child_of,
    fetch,
    flow_of,
    handle_on,
    keeping_attribute_errors,
    model_of,
    narrowed,
    owner_of,
    points_on,
    raise_kept,
    run_meant_by,
    set_class,
    target_of,
    tree_of,
)
from diffsight.model import Model, open_run
from diffsight.rows import Row, View, each, part_of, run_of
from diffsight.run import Run, call_if_unread
from diffsight.steps import Step

__all__ = [
    "FORWARD",
    "INPUTS",
    "OUTPUT",
    "STOPPED",
    "Asked",
    "ChangedMethod",
    "Clock",
    "Envoy",
    "MethodEnvoy",
    "Model",
    "ModuleHooks",
    "Observer",
    "Part",
    "Points",
    "Row",
    "Run",
    "Selection",
    "Step",
    "Tap",
    "Target",
    "Tree",
    "View",
    "assign",
    "call_if_unread",
    "child_of",
    "children_in",
    "current_owner",
    "each",
    "fetch",
    "first_input",
    "flow_of",
    "handle_on",
    "is_scanning",
    "join",
    "keeping_attribute_errors",
    "model_of",
    "narrowed",
    "open_run",
    "owner_of",
    "part_of",
    "part_targets",
    "points_on",
    "raise_kept",
    "run_meant_by",
    "run_of",
    "set_class",
    "structural_copy",
    "target_of",
    "tree_of",
    "unwrapped",
    "with_gradients",
    "without_global_hooks",
    "wrapped_path",
    "wrapped_targets",
]
