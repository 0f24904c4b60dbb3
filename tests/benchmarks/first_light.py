"""What a run costs: the bare pipeline against an unread run and a run that reads one UNet block in every step.

    python tests/benchmarks/first_light.py

On `diffsight/shapes-clip`, in one process, in shuffled rounds, as ratios to the bare pipeline. One thread, processor
time, and the lower quartile of the rounds. The noise is how far a second bare pipeline is from the first.
"""

import argparse
from collections.abc import Callable

import torch
from measuring import interleaved

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

    return {"bare": bare, "unread run": unread, "one UNet block a step": reading}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="at most (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = DiffusionModel("diffsight/shapes-clip")
    model.set_progress_bar_config(disable=True)
    seconds, noise = interleaved(contestants(model, options.steps), options.rounds, of="one UNet block a step")
    print(f"{'':24}{'ms':>10}{'ratio':>10}")
    for name, took in seconds.items():
        print(f"{name:24}{took * 1e3:10.1f}{took / seconds['bare']:10.3f}")
    print(f"{'noise':24}{noise * 1e3:10.1f}{noise / seconds['bare']:10.3f}")


if __name__ == "__main__":
    main()
