"""What the engine adds to a forward pass: reading, editing, a sweep of patched rows; against plain hooks and nnsight.

    pip install nnsight==0.8.1 && python tests/benchmarks/engine.py      # nnsight's columns are left out without it

On a 12-layer GPT-2 of width 64 and on `diffsight/shapes-clip`, in one process, interleaved: what each way adds to the
bare call in milliseconds, and what diffsight adds as a share of what nnsight adds. One thread, processor time, and the
lower quartile of the rounds: whatever else the machine does only ever adds to it.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from diffsight import DiffusionModel, Model
from diffsight.pipelines.packaged import FOLDERS

try:
    import nnsight
except ImportError:
    nnsight = None

ROWS, LAYER, STEPS = 64, 5, 20
PROMPT = "a red circle below a blue square"
IDS = torch.randint(0, 1000, (1, 10), generator=torch.Generator().manual_seed(0))
BATCH = IDS.expand(ROWS, -1).contiguous()


def build() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=12, n_embd=64, n_head=4, vocab_size=1000, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def plain(gpt2: GPT2LMHeadModel) -> dict[str, Callable[[], object]]:
    def hooked(layers: list[int], edit: Callable | None = None, ids: torch.Tensor = IDS) -> None:
        kept = []

        def hook(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            kept.append(output)
            if edit:
                edit(output)

        handles = [gpt2.transformer.h[layer].register_forward_hook(hook) for layer in layers]
        gpt2(ids)
        for handle in handles:
            handle.remove()

    return {
        "nothing": lambda: gpt2(IDS),
        "read 1 layer": lambda: hooked([LAYER]),
        "read 12 layers": lambda: hooked(list(range(12))),
        "edit 1 layer": lambda: hooked([LAYER], lambda output: output.zero_()),
        "patch 64 rows": lambda: hooked([LAYER], lambda output: output[:, -1].zero_(), BATCH),
    }


def live(gpt2: GPT2LMHeadModel) -> dict[str, Callable[[], object]]:
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

    return dict(zip(plain(gpt2), (nothing, read_one, read_all, edit, sweep), strict=True))


def peer(gpt2: GPT2LMHeadModel) -> dict[str, Callable[[], object]]:
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

    return dict(zip(plain(gpt2), (nothing, read_one, read_all, edit, sweep), strict=True))


def denoising(model: DiffusionModel) -> dict[str, Callable[[], object]]:
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


def compare(task: str, runs: dict[str, Callable[[], object]], rounds: int, sides: list[str]) -> None:
    """Prints a line: what each of `runs` takes longer than the one called bare."""
    times: dict[str, list[float]] = {side: [] for side in runs}
    for turn in range(rounds + 5):
        for side, function in runs.items():
            started = time.process_time()
            function()
            if turn >= 5:  # the first rounds warm up
                times[side].append(time.process_time() - started)
    quick = {side: statistics.quantiles(measured, n=4)[0] * 1e3 for side, measured in times.items()}
    added = {side: quick[side] - quick["bare"] for side in runs}
    cells = [f"{added[side]:12.3f}" if side in added else f"{'-':>12}" for side in sides]
    share = f"{added['diffsight'] / added['nnsight']:12.2f}" if "nnsight" in added else ""
    name = f"{task} (bare {quick['bare']:.2f})"
    print(f"{name:36}" + "".join(cells) + share, flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    gpt2 = build()
    sides = {"hook": plain(gpt2), "diffsight": live(gpt2)} | ({"nnsight": peer(build())} if nnsight else {})
    print(f"{'added to the bare call, ms':36}" + "".join(f"{side:>12}" for side in sides) + f"{'share':>12}")
    for task in plain(gpt2):
        ids = BATCH if task == "patch 64 rows" else IDS
        bare = {"bare": lambda ids=ids: gpt2(ids)}
        compare(task, bare | {side: tasks[task] for side, tasks in sides.items()}, rounds, list(sides))
    model = DiffusionModel("diffsight/shapes-clip")
    model.set_progress_bar_config(disable=True)
    compare(f"read in {STEPS} denoising steps", denoising(model), max(10, rounds // 10), list(sides))


if __name__ == "__main__":
    main()
