"""What wrappers of other kinds of models may override, and what they may ask of the engine."""

from diffsight.engine.coroutine import current_owner
from diffsight.engine.hooks import FORWARD, Override
from diffsight.engine.scan import HookTables, is_scanning
from diffsight.engine.steps import Clock
from diffsight.engine.taps import INPUTS, OUTPUT, Asked, Tap, Target, first_input, join
from diffsight.envoy import (
    Envoy,
    MethodEnvoy,
    Points,
    keeping_attribute_errors,
    model_of,
    narrowed,
    owner_of,
    raise_kept,
    target_of,
)
from diffsight.model import Model, innermost_run, named_target, open_run, with_gradients
from diffsight.rows import Part, Row, View, each
from diffsight.run import Run, Step, flow_of, part_of, run_of

__all__ = [
    "FORWARD",
    "INPUTS",
    "OUTPUT",
    "Asked",
    "Clock",
    "Envoy",
    "HookTables",
    "MethodEnvoy",
    "Model",
    "Override",
    "Part",
    "Points",
    "Row",
    "Run",
    "Step",
    "Tap",
    "Target",
    "View",
    "current_owner",
    "each",
    "first_input",
    "flow_of",
    "innermost_run",
    "is_scanning",
    "join",
    "keeping_attribute_errors",
    "model_of",
    "named_target",
    "narrowed",
    "open_run",
    "owner_of",
    "part_of",
    "raise_kept",
    "run_of",
    "target_of",
    "with_gradients",
]
