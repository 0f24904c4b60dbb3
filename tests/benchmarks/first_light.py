"""What a run costs: the bare pipeline against an unread run and a run that reads one UNet block in every step.

    python tests/benchmarks/first_light.py

On `diffsight/shapes-clip`, in one process, interleaved, as ratios to the bare pipeline. One thread, processor time, and
the lower quartile of the rounds: whatever else the machine does only ever adds to it.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from diffsight import DiffusionModel

PROMPT = "a red circle below a blue square on a gray background"


def contestants(model: DiffusionModel, steps: int) -> dict[str, Callable[[], object]]:
    def bare() -> object:
        return model.pipeline(PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))

    def unread() -> object:
        with model.generate(PROMPT, num_inference_steps=steps, seed=0) as run:
            pass
        return run.result

    def reading() -> object:
        with model.generate(PROMPT, num_inference_steps=steps, seed=0) as run:
            for _ in run.steps:
                run.unet.mid_block.output
        return run.result

    return {"bare pipeline": bare, "unread run": unread, "one UNet block a step": reading}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = DiffusionModel("diffsight/shapes-clip")
    model.set_progress_bar_config(disable=True)
    runs = contestants(model, options.steps)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.rounds + 1):
        order = list(runs) if turn % 2 else list(reversed(runs))
        for name in order:
            started = time.process_time()
            runs[name]()
            if turn:  # the first round warms up
                times[name].append(time.process_time() - started)
    quartiles = {name: statistics.quantiles(measured, n=4)[0] for name, measured in times.items()}
    bare = quartiles["bare pipeline"]
    for name, measured in times.items():
        pairs = [a / b for a, b in zip(measured, times["bare pipeline"], strict=True)]
        print(
            f"{name:24} {quartiles[name] * 1e3:8.1f} ms   ratio of lower quartiles {quartiles[name] / bare:.3f}   "
            f"median of ratios {statistics.median(pairs):.3f}"
        )


if __name__ == "__main__":
    main()
