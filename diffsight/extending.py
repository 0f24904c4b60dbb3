"""The interface for wrappers: what a wrapper of another kind of model may override, and what it may ask of the engine.

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
- `meant_by(target, name)`: what a part is called here that has another name in other models.
- `names_of(owner)` and `target_named(outer, name)`: standard names, such as `layers` and `ln_final`.
- `named_value(points, name)` and `value_names(target)`: values inside the calls of a module that are neither its inputs
  nor its output, such as attention probabilities.
- `components()`: what is tapped from the start of every run. What lies in a component is tapped when it is asked for.
- `clock()`: when a step begins, a `Clock`.
- `stand_ins()`: what a scan calls in place of components that look at values.
- `describe(owner)`, `note_on_values(path)`, `attribute(owner, name)`, `title`, `opens_with`: what `print` shows of a
  part and of its values, how attributes are read, and what error messages call the model and the method that opens a
  run.
- `weights_loaded()`: called after weights that are loaded later have been loaded. Pass the function that loads them to
  `Tree(root, load)`.

State that belongs to the model's structure is kept on the tree, where edited copies of the model share it.

**The run** (`Run`). Override `_make_step` to yield steps of your own class; add properties for parts of the result. In
a property, put `keeping_attribute_errors(self)` around code that may raise AttributeError. `self._pass` is the run that
a name refers to when there are several passes (`run.invoke`); `self._check_one_pass(name)` refuses names that refer to
no single one, and `self._check_no_scan(name)` refuses results that a scan would make of zeros. `self._model` is the
model.

**The model** (`Model`). Set `_run_class`, call `_wrap(tree)` in `__init__`, and open runs with `_new_run(function,
sizes, again, grad)`. Override `_bound(run, part)` if the handle on the whole model has a class of its own, and
`_handle(target)` if those on its parts have. `open_run(model, function)` does the same as `_new_run` from outside.

**A flow** (`flow_of(run)`) moves the model. A wrapper may set `flow.seed` (the model then draws random numbers from a
state of its own) and `flow.observer` (it sees the calls of the components: `called`, `returned`, `ended`), add a
function mode with `flow.add_mode(mode)`, and follow a point with the number of each call with `flow.keep(Asked(...),
function)`. To follow values alone, use the public `run.follow(path, function)`.

**Selections** narrow a point to a part of its value. Subclass `Selection` (`take`, `put`; `call` and `at` if the part
differs from call to call) and use it with `narrowed(points, selection)`, or in a `View` or `Row`, a run narrowed to it.
`Part` is a slice of a batch.

**Targets of another kind**, such as attention probabilities, subclass `Target` and define `attach(tap)`. It arranges
for `tap.enter(args, kwargs)` and `tap.leave(output)`, or `tap.call(function, args, kwargs)`, to be called on every
passage, and returns an object with `remove()`. A value inside the calls of a module has `is_value = True`, and a
`point(part, call)` that says how users write it. If it is known only at the end of a call whether a value was meant,
`decided_by(tap)` returns the tap of that call: `run.stop()` runs the model so far. Check `current_owner() is tap.host`:
calls from outside the run must pass untouched. To change a method for the duration of a run, use
`ChangedMethod(owner, name, change)`.

**Envoys.** An attribute of an envoy may be a part of the model, so everything about the envoy itself is asked with a
function: `tree_of`, `target_of`, `owner_of`, `run_of`, `part_of`, `child_of(envoy, name)`, `handle_on(envoy, target)`,
`narrowed(points, selection)`, `fetch(points, part)`, `assign(points, part, value)`, and `run_meant_by(points, what)`
for the run whose values `model.<path>` has.

**Modules.** `unwrapped(module)`, `wrapped_path(module)`, `wrapped_targets(target)` and `children_in(target)` see
through what wraps a module, such as `torch.compile`. `structural_copy(module)` is a copy without weights and hooks, to
try something on; PyTorch's hooks on all modules are not called within `without_global_hooks()`.
"""

from diffsight.engine.batch_slicing import Part, Selection
from diffsight.engine.coroutine import current_owner
from diffsight.engine.gradients import with_gradients
from diffsight.engine.hooks import FORWARD, ChangedMethod
from diffsight.engine.points import INPUTS, OUTPUT, Asked, first_input
from diffsight.engine.run_end import Observer
from diffsight.engine.scan import is_scanning
from diffsight.engine.scan_state import ModuleHooks
from diffsight.engine.step_clock import Clock
from diffsight.engine.structural_copy import structural_copy, without_global_hooks
from diffsight.engine.tapped_call import Tap
from diffsight.engine.target import Target, join, part_targets
from diffsight.engine.tree import Tree
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
    target_of,
    tree_of,
)
from diffsight.model import Model, open_run
from diffsight.rows import Row, View, each, part_of, run_of
from diffsight.run import Run
from diffsight.steps import Step

__all__ = [
    "FORWARD",
    "INPUTS",
    "OUTPUT",
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
    "structural_copy",
    "target_of",
    "tree_of",
    "unwrapped",
    "with_gradients",
    "without_global_hooks",
    "wrapped_path",
    "wrapped_targets",
]
