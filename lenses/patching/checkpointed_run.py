"""The gradient of a metric through all steps of a pipeline, in the memory of one step.

    run = CheckpointedRun(rows, plain, source, target)
    run.source, run.target                          # the last latents of both runs, the second with a graph
    for passed, gradients in run.backward(metric):  # from the last step to the first, then what is outside the denoiser
        ...                                         # values that both runs passed, and the gradients of the metric

First both prompts are denoised, and the target's denoiser computes without a graph: its outputs are leaves, and the
graph holds only what the pipeline and its scheduler do with them. Then the denoiser is run again in each step, with a
graph, from the inputs that it had. The gradient at its outputs is passed on to the sites in it and to its inputs. This
is gradient checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016) of the denoiser's calls.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from diffsight.lenses.patching.denoiser_sweep import DenoiserRows, Passage, PlainRun, is_in
from diffsight.lenses.patching.value_pairs import ValuePair, read_pairs
from diffsight.pipelines.diffusion.run import DiffusionRun


@dataclass(frozen=True)
class _Call:
    """A call of a denoiser.

    Attributes:
        denoiser: The name of the denoiser.
        number: The number of the call of this denoiser in the step.
        source: The output in the source's run.
        target: The output in the target's run.
        leaves: The tensors of this output, leaves of the graph.
        inputs: The inputs in the target's run, `(args, kwargs)`, with the graph.
    """

    denoiser: str
    number: int
    source: Any = field(repr=False)
    target: Any = field(repr=False)
    leaves: list[torch.Tensor] = field(repr=False)
    inputs: Any = field(repr=False)


@dataclass(frozen=True)
class _CallAgain:
    """A call of a denoiser with a graph.

    Attributes:
        passed: The values that both runs passed in it.
        outputs: The tensors that it returned.
        inputs: The tensors that it was given and that have a gradient: a leaf of the graph for each, and the original.
    """

    passed: list[ValuePair]
    outputs: list[torch.Tensor] = field(repr=False)
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = field(repr=False)


class CheckpointedRun:
    """Two prompts, denoised side by side.

    Args:
        rows: Opens the runs.
        plain: The run of both prompts without a change.
        prompts: The source's and the target's prompt.

    Attributes:
        source: The last latents of the source's run.
        target: The last latents of the target's run, with a graph.
        passes: The number of calls of the pipeline so far.

    Raises:
        InputError: A value has different shapes in the two runs.
    """

    def __init__(self, rows: DenoiserRows, plain: PlainRun, prompts: Sequence[str]) -> None:
        self.passes = 0
        self._rows, self._plain, self._prompts = rows, plain, prompts
        self._calls: list[list[_Call]] = []  # of each step
        self._outside: list[ValuePair] = []  # points outside the denoiser
        self._run()

    def backward(self, metric: torch.Tensor, first: int = 0) -> Iterator[tuple[list[ValuePair], list[torch.Tensor]]]:
        """Yield values that both runs passed, and the gradients of a metric of the target's latents at them.

        Args:
            metric: The metric.
            first: The first step whose values are needed.
        """
        ends, weights = [metric], [torch.ones_like(metric)]  # where the graph ends, and the gradients there
        for step in reversed(range(0 if self._outside else first, len(self._calls))):
            again = self._run_step(step)
            for call in reversed(self._calls[step]):
                now = again.pop()
                at_outputs = _gradients(ends, weights, call.leaves, keep=True)
                values = [one.target for one in now.passed]
                found = _gradients(now.outputs, at_outputs, [*values, *(leaf for leaf, _ in now.inputs)])
                yield now.passed, found[: len(values)]
                ends += [original for _, original in now.inputs]
                weights += found[len(values) :]
        yield self._outside, _gradients(ends, weights, [one.target for one in self._outside])

    @contextmanager
    def _open(self) -> Iterator[tuple[DiffusionRun, DiffusionRun]]:
        """Open the runs of both prompts."""
        source, target = self._prompts
        with torch.enable_grad(), self._rows.open([source]) as x, self._rows.open([target], grad=True) as y:
            yield x, y
        self.passes += 2

    def _branches(self, *runs: DiffusionRun) -> list[Any]:
        return [self._rows.branch_of(run.rows[0]) for run in runs]

    def _run(self) -> None:
        """Denoise both prompts, without a graph in the denoiser."""
        with self._open() as (x, y):
            branches = self._branches(x, y)
            self._outside += read_pairs(*branches, None, self._plain.early)
            for other, step in zip(x.steps, y.steps):
                called = self._plain.denoisers[step.index]
                self._calls.append([])
                for number, denoiser in enumerate(called):
                    outside = [one for one in self._passages(number) if not is_in(denoiser, one.point)]
                    self._outside += read_pairs(*branches, step.index, outside)
                    self._calls[-1].append(_call(x, y, denoiser, called[:number].count(denoiser)))
                self._outside += read_pairs(*branches, step.index, self._passages(len(called)))
                if step.index == self._plain.steps - 1:
                    self.source, self.target = other.latents, step.latents
                    x.stop()
                    y.stop()

    def _run_step(self, step: int) -> list[_CallAgain]:
        """Run the denoisers again in a step, with a graph."""
        again: list[_CallAgain] = []
        with self._open() as (x, y):
            branches = self._branches(x, y)
            for _, current in zip(x.steps, y.steps):
                for place, call in enumerate(self._calls[current.index]):
                    points = y[call.denoiser].calls[call.number]
                    if current.index < step:
                        x[call.denoiser].calls[call.number].skip(_copied(call.source))
                        points.skip(_copied(call.target))
                        continue
                    inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
                    points.inputs = tree_map_only(torch.Tensor, partial(_as_leaf, inputs), call.inputs)
                    inside = [one for one in self._passages(place) if is_in(call.denoiser, one.point)]
                    passed = read_pairs(*branches, step, inside)
                    again.append(_CallAgain(passed, _tensors(points.output), inputs))
                if current.index == step:
                    x.stop()
                    y.stop()
        return again

    def _passages(self, number: int) -> list[Passage]:
        """Return the calls of points after which one call of a denoiser ends, by its number in the step."""
        return [passage for passage in self._plain.calls if passage.denoiser_call == number]


def _call(x: DiffusionRun, y: DiffusionRun, denoiser: str, number: int) -> _Call:
    """Let a denoiser of the target's run compute without a graph, and return the call."""
    points = y[denoiser].calls[number]
    args, kwargs = points.inputs
    inputs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    with torch.no_grad():
        target = _copied(y[denoiser](*args, **kwargs))
    leaves: list[torch.Tensor] = []
    points.skip(tree_map_only(torch.Tensor, partial(_with_leaf, leaves), target))
    return _Call(denoiser, number, _copied(x[denoiser].calls[number].output), target, leaves, inputs)


def _as_leaf(inputs: list[tuple[torch.Tensor, torch.Tensor]], tensor: torch.Tensor) -> torch.Tensor:
    """Return a leaf of a new graph in place of a tensor with a gradient, and note both."""
    if not tensor.requires_grad:
        return tensor
    inputs.append((tensor.detach().requires_grad_(), tensor))
    return inputs[-1][0]


def _with_leaf(leaves: list[torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor whose graph begins with a leaf, and note the leaf."""
    if not tensor.is_floating_point():
        return tensor
    leaves.append(tensor.clone().requires_grad_())
    return leaves[-1].clone()  # the pipeline may change its own tensor in place


def _copied(output: Any) -> Any:
    """Return copies of the tensors in an output."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), output)


def _tensors(output: Any) -> list[torch.Tensor]:
    """Return the tensors in an output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _gradients(
    outputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    keep: bool = False,
) -> list[torch.Tensor]:
    """Return the gradients of the weighted sum of some outputs. `keep` says whether the graph is used again."""
    ends = [(output, weight) for output, weight in zip(outputs, weights) if output.requires_grad]
    if not ends or not inputs:
        return [torch.zeros_like(tensor) for tensor in inputs]
    kept, given = zip(*ends)
    found = torch.autograd.grad(kept, inputs, given, retain_graph=keep, allow_unused=True)
    return [torch.zeros_like(to) if gradient is None else gradient for to, gradient in zip(inputs, found)]
