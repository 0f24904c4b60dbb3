"""Compare the trajectory lens with plain generation plus one batched decode.

    OMP_NUM_THREADS=1 python tests/benchmarks/denoiser.py --rounds 9

The lens and the plain calls take turns. The medians and their ratio are printed; the ratio should be at most 1.15.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from diffsight import DiffusionModel, trajectory_lens

PROMPT = "a red circle below a blue square on a gray background"
DRAWING = {"num_inference_steps": 20, "guidance_scale": 3.0}


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def trajectory(rounds: int) -> tuple[float, float]:
    """Return the median processor seconds of the lens, and of the bare pipeline with one decode of as many latents."""
    model = DiffusionModel("diffsight/shapes-clip", dispatch=True)
    pipe = model.pipeline
    pipe.set_progress_bar_config(disable=True)
    count = 2 * DRAWING["num_inference_steps"]  # noisy and predicted latents

    def lens() -> None:
        trajectory_lens(model, PROMPT, seed=0, progress=False, **DRAWING)

    @torch.no_grad()
    def plain() -> None:
        pipe(PROMPT, generator=torch.Generator().manual_seed(0), **DRAWING)
        decoded = pipe.vae.decode(torch.randn(count, 4, 8, 8), return_dict=False)[0]
        pipe.image_processor.postprocess(decoded)

    times = [(seconds(lens), seconds(plain)) for _ in range(rounds + 1)][1:]
    return statistics.median(a for a, _ in times), statistics.median(b for _, b in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    torch.set_num_threads(1)
    lens, plain = trajectory(parser.parse_args().rounds)
    print(f"trajectory_lens {lens:.3f} s, plain generation and one decode {plain:.3f} s: {lens / plain:.2f} times")


if __name__ == "__main__":
    main()
