"""Compare the trajectory lens with plain generation plus one batched decode, and an attached SAE with its products.

    OMP_NUM_THREADS=1 python tests/benchmarks/denoiser.py --rounds 9

Both sides take turns. The medians of processor time and their ratio are printed: the ratio should be at most 1.15 for
the lens, and 1.1 for the SAE.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from diffsight import DiffusionModel, trajectory_lens
from diffsight.lenses import SAE
from diffsight.lenses.attach_sae import FeatureTap

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


@torch.no_grad()
def attached(rounds: int) -> tuple[float, float]:
    """Return the median seconds of an attached SAE that is only read, and of its two matrix products."""
    sae = SAE(256, 4096, k=32, point="layers[0]").requires_grad_(False)
    tap, x, features = FeatureTap(sae, "layers[0]"), torch.randn(8, 64, 256), torch.randn(8 * 64, 4096)

    def plain() -> None:
        x.flatten(0, 1) @ sae.encoder
        features @ sae.decoder

    times = [(seconds(lambda: tap(x)), seconds(plain)) for _ in range(20 * rounds + 1)][1:]
    return statistics.median(a for a, _ in times), statistics.median(b for _, b in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    torch.set_num_threads(1)
    rounds = parser.parse_args().rounds
    tap, products = attached(rounds)
    print(f"attached SAE {1000 * tap:.2f} ms, two products {1000 * products:.2f} ms: {tap / products:.2f} times")
    lens, plain = trajectory(rounds)
    print(f"trajectory_lens {lens:.3f} s, plain generation and one decode {plain:.3f} s: {lens / plain:.2f} times")


if __name__ == "__main__":
    main()
