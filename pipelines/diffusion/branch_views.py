"""Rows and branches of diffusion runs: the parts of a batch that belong to one prompt, or to one side of guidance.

    with model.generate(["a red circle", "a blue square"], num_images_per_prompt=2, seed=0) as run:
        a, b = run.rows
        b.text_encoder.layers[1].output = a.text_encoder.layers[1].output
        for step in run.steps:
            run.uncond.unet.mid_block.output[:] = 0          # in its half of the batch, or in its own call
            print(run.cond.rows[0].unet.mid_block.output.shape)
    a.images                                                 # the two images of the first prompt

Under classifier-free guidance the denoiser may get both branches in one batch, in two calls, or only one of them. A
branch view hides the difference: its `.output` and `.calls[i]` count only the calls that contain the branch.
`batch_layouts.py` finds out what the batch of each call holds.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.extending import Part, Row, Run, Tap, View, each, flow_of, keeping_attribute_errors, raise_kept
from diffsight.pipelines.diffusion.batch_layouts import COND, UNCOND, VIDEO, BatchLayout, BatchLayouts
from diffsight.remote import sent_as

_WORDS = {COND: "conditional", UNCOND: "unconditional"}


@sent_as("guidance", "name", "prompt", "branch", layouts=lambda run: flow_of(run).observer)
class GuidancePart(Part):
    """The part of a batch that belongs to a prompt, to a branch, or to a branch of a prompt."""

    def __init__(self, layouts: BatchLayouts, name: str, prompt: int | None = None, branch: str | None = None) -> None:
        self.layouts, self.name, self.prompt, self.branch = layouts, name, prompt, branch

    @property
    def missing(self) -> str:
        if self.branch is None:
            return super().missing
        return (
            f"there is no {_WORDS[self.branch]} branch at that point: guidance is off, or the pipeline does not encode "
            "a negative prompt"
        )

    def of_prompt(self, prompt: int) -> "GuidancePart":
        """Return this part, narrowed to one prompt."""
        return GuidancePart(self.layouts, f"{self.name}.rows[{prompt}]", prompt, self.branch)

    def of_branch(self, branch: str) -> "GuidancePart":
        """Return this part, narrowed to one branch."""
        return GuidancePart(self.layouts, f"{self.name}.{branch}", self.prompt, branch)

    def call(self, tap: Tap, first: int, number: int, path: object) -> int:
        if self.branch is None:
            return first + number
        if not self.layouts.has_branches(tap):
            raise InputError(f"{path} {self.layouts.why_unknown(tap)}")
        for index in range(first, tap.entered):
            layout = self.layouts.layout(tap, index)
            if not self.layouts.is_certain(tap, index):
                raise InputError(f"{path} {self.layouts.why_unknown(tap)}")
            if self._entries(layout):
                if not number:
                    return index
                number -= 1
        return max(first, tap.entered) + number

    def at(self, tap: Tap, index: int, path: object) -> Part:
        if self.branch is None and self.layouts.prompts == 1:
            return WholeBatch(self.name)
        layout = self.layouts.layout(tap, index)
        if layout is None:
            latents = self.layouts.latent_dimensions if self.layouts.is_in_vae(tap) else 0
            return PromptPart(self.layouts, self.prompt, self.name, latents)
        if self.layouts.leaves_branches_out(tap):
            raise InputError(
                f"{path}: FasterCache skips the unconditional branch in some calls, so the rows of this value are not "
                "known. Read it on the run itself, or turn the cache off with disable_cache()"
            )
        entries = self._entries(layout)
        if len(entries) == len(layout):
            return WholeBatch(self.name)
        strides = {after - before for before, after in pairwise(entries)} or {1}
        if len(strides) > 1:
            raise InputError(
                f"{path} occupies several places in the batch, one for each branch, and no single view covers all of "
                f"them: write {self.name}.cond or {self.name}.uncond"
            )
        frames = max(1, len(layout) // (len(set(layout)) * self.layouts.images))
        return FramesPart(entries[0], entries[-1] + 1, len(layout), strides.pop(), self.name, frames)

    def _entries(self, layout: BatchLayout) -> list[int]:
        """Return the places in a batch that belong to this part."""
        return [
            place
            for place, (branch, prompt) in enumerate(layout)
            if self.branch in (None, branch) and self.prompt in (None, prompt)
        ]


class WholeBatch(Part):
    """The whole batch: everything in the run, or in the call, belongs to the same prompt or branch."""

    def __init__(self, name: str) -> None:
        self.name = name

    def take(self, value: Any, path: object) -> Any:
        return value

    def take_own(self, value: Any, path: object) -> tuple[Any, bool]:
        return value, False

    def _is_batch(self, tensor: torch.Tensor) -> bool:
        return True

    def _slice(self, tensor: torch.Tensor, path: object) -> Any:
        return ...


class FramesPart(Part):
    """Entries of a batch in a video model.

    Inside the model, a batch has one entry per frame; some tensors have one entry for all frames together."""

    def __init__(self, start: int, stop: int, total: int, stride: int, name: str, frames: int) -> None:
        super().__init__(start, stop, total, stride, name)
        self.frames = frames

    def _slice(self, tensor: torch.Tensor, path: object) -> slice:
        if tensor.ndim and len(tensor) * self.frames == self.total:
            return slice(self.start // self.frames, self.stop // self.frames, self.stride)
        return super()._slice(tensor, path)


class PromptPart(Part):
    """One prompt's part of a batch that holds every prompt or image once, in order, such as the scheduler's.

    `latents` is the number of dimensions of a VAE's latents. An image VAE receives the frames of a video in chunks,
    which have fewer dimensions."""

    def __init__(self, layouts: BatchLayouts, prompt: int, name: str, latents: int = 0) -> None:
        self.layouts, self.prompt, self.name, self.latents = layouts, prompt, name, latents
        self.total = layouts.prompts * layouts.images

    def _slice(self, tensor: torch.Tensor, path: object) -> slice:
        size = len(tensor) if tensor.ndim else 0
        if self.latents == VIDEO and tensor.ndim < VIDEO:
            raise InputError(
                f"{path} cannot be cut into rows: its shape is {tuple(tensor.shape)}, and its first dimension "
                "contains video frames. Read or assign it on the run itself"
            )
        if size not in (self.layouts.prompts, self.total):
            raise InputError(
                f"{path} cannot be cut into rows: its shape is {tuple(tensor.shape)}, and {self.layouts.prompts} "
                f"prompts make {self.total} images. Read or assign it on the run itself"
            )
        each = size // self.layouts.prompts
        return slice(self.prompt * each, (self.prompt + 1) * each)


class GeneratedOutputs:
    """The images or videos that a pipeline generates, for a run or one of its rows."""

    @property
    def images(self) -> Any:
        """The generated images. Runs the pipeline to its end first."""
        return self._of_result("images")

    @property
    def frames(self) -> Any:
        """The generated videos. Runs the pipeline to its end first."""
        return self._of_result("frames")


class DiffusionRow(GeneratedOutputs, Row):
    """One prompt's part of a run, with all of its images."""

    @property
    def cond(self) -> "DiffusionRow":
        """The prompt's part of the conditional branch."""
        return DiffusionRow(self._run, self.index, self._part.of_branch(COND))

    @property
    def uncond(self) -> "DiffusionRow":
        """The prompt's part of the unconditional branch."""
        return DiffusionRow(self._run, self.index, self._part.of_branch(UNCOND))

    def _of_result(self, name: str) -> Any:
        with keeping_attribute_errors(self):
            images = self._part.layouts.images
            return getattr(self._run, name)[self.index * images : (self.index + 1) * images]

    def __getattr__(self, name: str) -> Any:
        raise_kept(self)
        return super().__getattr__(name)


class BranchView(View):
    """A run narrowed to one branch of guidance: `run.cond`, `run.uncond`."""

    def __init__(self, run: Run, layouts: BatchLayouts, branch: str) -> None:
        super().__init__(run, GuidancePart(layouts, branch, branch=branch))

    @property
    def rows(self) -> tuple[DiffusionRow, ...]:
        """One view per prompt, of this branch."""
        return tuple(DiffusionRow(self._run, i, self._part.of_prompt(i)) for i in range(self._part.layouts.prompts))

    def each(self, functions: Callable[[Row], Any] | Sequence[Callable[[Row], Any]]) -> list[Any]:
        """Run a function for every row of this branch, each at its own place in the model, see `Run.each`."""
        return each(self.rows, functions)


def rows_of(run: Run, layouts: BatchLayouts) -> tuple[DiffusionRow, ...]:
    """Return one row for every prompt of a run."""
    return tuple(DiffusionRow(run, i, GuidancePart(layouts, f"rows[{i}]", prompt=i)) for i in range(layouts.prompts))
