"""Compare the trajectory lens with plain generation plus one batched decode, and an attached SAE with its products.

    python tests/benchmarks/denoiser.py

In shuffled rounds, on one thread. The ratio should be at most 1.15 for the lens, and 1.1 for the SAE.
"""

import argparse
from collections.abc import Callable

import torch
from measuring import interleaved

from diffsight import DiffusionModel, trajectory_lens
from diffsight.lenses import SAE
from diffsight.lenses.attach_sae import FeatureTap

PROMPT = "a red circle below a blue square on a gray background"
DRAWING = {"num_inference_steps": 20, "guidance_scale": 3.0}


def trajectory() -> dict[str, Callable[[], None]]:
    """Return the lens, and the bare pipeline with one decode of as many latents."""
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

    return {"bare": plain, "diffsight": lens}


def attached() -> dict[str, Callable[[], None]]:
    """Return an attached SAE that is only read, and its two matrix products."""
    sae = SAE(256, 4096, k=32, point="layers[0]").requires_grad_(False)
    tap, x, features = FeatureTap(sae, "layers[0]"), torch.randn(8, 64, 256), torch.randn(8 * 64, 4096)

    def plain() -> None:
        x.flatten(0, 1) @ sae.encoder
        features @ sae.decoder

    return {"bare": plain, "diffsight": lambda: tap(x)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    torch.set_num_threads(1)
    rounds = parser.parse_args().rounds
    print("| | by hand | diffsight | ratio | noise |\n| --- | --- | --- | --- | --- |")
    for name, ways, most in (
        ("an attached SAE and its two products", attached(), 20 * rounds),
        ("`trajectory_lens`, and generation with one decode", trajectory(), rounds),
    ):
        seconds, noise = interleaved(ways, most, of="diffsight")
        hand, ours = seconds["bare"] * 1e3, seconds["diffsight"] * 1e3
        print(f"| {name} | {hand:.1f} ms | {ours:.1f} ms | {ours / hand:.2f} | {noise * 1e3:.1f} ms |", flush=True)


if __name__ == "__main__":
    main()
