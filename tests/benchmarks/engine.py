"""What the engine adds to a forward pass: reading, editing, a sweep of patched rows; against plain hooks and nnsight.

    pip install nnsight==0.8.1 && python tests/benchmarks/engine.py      # nnsight's columns are left out without it

On a GPT-2 of width 64 with 12 layers (48 in one row), on a list of 5,000 modules of which 50 are called, and on
`diffsight/shapes-clip`: what each way adds to the bare call in milliseconds, and what diffsight adds as a share of what
nnsight adds. See README.md for how to read it.
"""

import argparse
from collections.abc import Callable, Iterable

import diffusers
import torch
import transformers
from measuring import interleaved
from transformers import GPT2Config, GPT2LMHeadModel

from diffsight import DiffusionModel, Model
from diffsight.pipelines.packaged import FOLDERS

try:
    import nnsight
except ImportError:
    nnsight = None

ROWS, LAYER, STEPS = 64, 5, 20
WIDE, CALLED = 5000, 50  # modules in a list, and how many of them are called
Task = Callable[[], object]
PROMPT = "a red circle below a blue square"
IDS = torch.randint(0, 1000, (1, 10), generator=torch.Generator().manual_seed(0))
BATCH = IDS.expand(ROWS, -1).contiguous()


def build(layers: int = 12) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=64, n_head=4, vocab_size=1000, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def plain(gpt2: GPT2LMHeadModel) -> dict[str, Task]:
    def with_hooks(hooks: list[tuple[int, Callable]], ids: torch.Tensor = IDS) -> None:
        handles = [gpt2.transformer.h[layer].register_forward_hook(hook) for layer, hook in hooks]
        gpt2(ids)
        for handle in handles:
            handle.remove()

    def keeping(kept: list[torch.Tensor]) -> Callable:
        return lambda module, inputs, output: kept.append(output)

    def zero(rows: slice) -> Callable:
        def hook(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            output[rows, -1] = 0

        return hook

    def read(layers: Iterable[int]) -> None:
        kept: list[torch.Tensor] = []
        with_hooks([(layer, keeping(kept)) for layer in layers])

    return {
        "nothing read": lambda: gpt2(IDS),
        "1 layer read": lambda: read([LAYER]),
        "all layers read": lambda: read(range(len(gpt2.transformer.h))),
        "1 layer edited": lambda: with_hooks([(LAYER, zero(slice(None)))]),
        "64 rows patched": lambda: with_hooks([(LAYER, zero(slice(row, row + 1))) for row in range(ROWS)], BATCH),
        "64 rows patched in one operation": lambda: with_hooks([(LAYER, zero(slice(None)))], BATCH),
    }


def live(gpt2: GPT2LMHeadModel) -> dict[str, Task]:
    model = Model(gpt2)

    def nothing() -> None:
        with model.trace(IDS):
            pass

    def read_one() -> None:
        with model.trace(IDS) as run:
            run.transformer.h[LAYER].output

    def read_all() -> None:
        with model.trace(IDS) as run:
            for layer in run.transformer.h:
                layer.output

    def edit() -> None:
        with model.trace(IDS) as run:
            run.transformer.h[LAYER].output[:] = 0

    def patch(row: object) -> None:
        row.transformer.h[LAYER].output[:, -1] = 0

    def sweep() -> None:
        with model.trace(BATCH) as run:
            run.each(patch)

    return dict(zip(plain(gpt2), (nothing, read_one, read_all, edit, sweep)))


def sweeps(gpt2: GPT2LMHeadModel) -> dict[str, Task]:
    """Return sweeps over 64 rows whose bodies do less and less of what a patch does."""
    model = Model(gpt2)

    def sweep(body: Callable[[object], object]) -> Task:
        def task() -> None:
            with model.trace(BATCH) as run:
                run.each(body)

        return task

    return {
        "64 rows read": sweep(lambda row: row.transformer.h[LAYER].output),
        "64 rows that only name a layer": sweep(lambda row: row.transformer.h[LAYER]),
        "64 rows without a body": sweep(lambda row: None),
    }


def peer(gpt2: GPT2LMHeadModel) -> dict[str, Task]:
    class Batching(nnsight.NNsight):
        """What nnsight asks of a model whose invokes share a pass."""

        def _batch_size(self, *inputs: torch.Tensor) -> int:
            return len(inputs[0]) if inputs else 0

        def _batch(self, invokes: list, function: object) -> tuple:
            return (torch.cat([args[0] for args, _ in invokes]),), {}

    model = Batching(gpt2)

    def nothing() -> None:
        with model.trace(IDS):
            pass

    def read_one() -> None:
        with model.trace(IDS):
            model.transformer.h[LAYER].output.save()

    def read_all() -> None:
        with model.trace(IDS):
            for layer in model.transformer.h:
                layer.output.save()

    def edit() -> None:
        with model.trace(IDS):
            model.transformer.h[LAYER].output[:] = 0

    def sweep() -> None:
        with model.trace() as tracer:
            for _ in range(ROWS):
                with tracer.invoke(IDS):
                    model.transformer.h[LAYER].output[:, -1] = 0

    return dict(zip(plain(gpt2), (nothing, read_one, read_all, edit, sweep)))


class Wide(torch.nn.Module):
    """Calls a few of many modules in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList([torch.nn.Identity() for _ in range(WIDE)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(CALLED):
            x = self.parts[index](x)
        return x


def wide() -> dict[str, Task]:
    """Return runs that read the output of one module in a long list."""
    net, x = Wide(), torch.zeros(1)
    model = Model(net)

    def hooked() -> None:
        kept = []
        handle = net.parts[LAYER].register_forward_hook(lambda module, inputs, output: kept.append(output))
        net(x)
        handle.remove()

    def live() -> None:
        with model.trace(x) as run:
            run.parts[LAYER].output

    found = {"bare": lambda: net(x), "hook": hooked, "diffsight": live}
    if nnsight is None:
        return found
    other = nnsight.NNsight(Wide())

    def peer() -> None:
        with other.trace(x):
            other.parts[LAYER].output.save()

    return found | {"nnsight": peer}


def denoising(model: DiffusionModel) -> dict[str, Task]:
    """Return runs that read one UNet block in each denoising step of an image."""

    def bare() -> None:
        model.pipeline(PROMPT, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))

    def hooked() -> None:
        kept = []
        handle = model.pipeline.unet.mid_block.register_forward_hook(lambda module, inputs, output: kept.append(output))
        bare()
        handle.remove()

    def live() -> None:
        with model.generate(PROMPT, num_inference_steps=STEPS, seed=0) as run:
            for _ in run.steps:
                run.unet.mid_block.output

    if nnsight is None:
        return {"bare": bare, "hook": hooked, "diffsight": live}
    other = nnsight.DiffusionModel(str(FOLDERS["diffsight/shapes-clip"]), dispatch=True)
    other.pipeline.set_progress_bar_config(disable=True)

    def peer() -> None:
        with other.generate(PROMPT, num_inference_steps=STEPS, seed=0) as tracer:
            for _ in tracer.iter[:STEPS]:
                other.unet.mid_block.output.save()

    return {"bare": bare, "hook": hooked, "diffsight": live, "nnsight": peer}


def compare(task: str, runs: dict[str, Task], sides: list[str], most: int) -> None:
    """Print a line: what each of `runs` takes longer than the one called bare."""
    quick, noise = interleaved(runs, most, of="diffsight" if "diffsight" in runs else "hook")

    def cell(side: str) -> str:
        added = (quick[side] - quick["bare"]) * 1e3 if side in quick else None
        return "-" if added is None else f"{added:.3f}" if added > noise * 1e3 else "< noise"

    share = ""
    if "nnsight" in quick and min(quick["nnsight"], quick["diffsight"]) - quick["bare"] > noise:
        share = f"{(quick['diffsight'] - quick['bare']) / (quick['nnsight'] - quick['bare']):.2f}"
    name, figures = f"{task} (bare {quick['bare'] * 1e3:.2f})", [cell(side) for side in sides]
    print(f"{name:46}" + "".join(f"{text:>11}" for text in [*figures, share, f"{noise * 1e3:.3f}"]), flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1000, help="at most (default: %(default)s)")
    most = parser.parse_args().rounds
    torch.set_num_threads(1)
    diffusers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    small, large = build(), build(48)
    sides = ["hook", "diffsight", *(["nnsight"] if nnsight else [])]
    print(f"{'added to the bare call, ms':46}" + "".join(f"{side:>11}" for side in [*sides, "share", "noise"]))

    def ways(gpt2: GPT2LMHeadModel) -> dict[str, dict[str, Task]]:
        own = {"nnsight": peer(build(len(gpt2.transformer.h)))} if nnsight else {}  # it leaves hooks on what it wraps
        return {"hook": plain(gpt2), "diffsight": live(gpt2), **own}

    of_small, of_large = ways(small), ways(large)
    for task in plain(small):
        ids = BATCH if task.startswith("64 rows") else IDS
        own = {side: tasks[task] for side, tasks in of_small.items() if task in tasks}
        compare(task.replace("all", "12"), {"bare": lambda ids=ids: small(ids), **own}, sides, most)
    for task, sweep in sweeps(small).items():
        compare(task, {"bare": lambda: small(BATCH), "diffsight": sweep}, sides, most)
    own = {side: tasks["all layers read"] for side, tasks in of_large.items()}
    compare("48 layers read", {"bare": lambda: large(IDS), **own}, sides, most)
    compare(f"1 of {WIDE} in a list read", wide(), sides, most)
    model = DiffusionModel("diffsight/shapes-clip")
    model.set_progress_bar_config(disable=True)
    compare(f"read in {STEPS} denoising steps", denoising(model), sides, max(10, most // 10))


if __name__ == "__main__":
    main()
