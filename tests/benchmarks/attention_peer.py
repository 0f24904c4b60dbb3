"""Attention maps compared with those of attention-map-diffusers 1.0.0, on a small SD3 and a small FLUX.

    pip install attention-map-diffusers==1.0.0          # in an environment of its own
    python tests/benchmarks/attention_peer.py flux --side 128

It prints the largest difference between the maps of two words, processor times, and peaks of memory beside that of the
plain pipeline, each in a process of its own. Only the double blocks of FLUX are compared: the peer does not see others.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import diffusion

PROMPT, STEPS = "a red circle above a blue square", 4
PIPELINES = {"flux": diffusion.flux, "sd3": diffusion.stable_diffusion_3}
TOKENS = {"flux": [[2], [6]], "sd3": [[3, 77 + 2], [7, 77 + 6]]}  # of "circle" and "square" among the text keys


def arguments(side: int) -> dict[str, Any]:
    return {"height": side, "width": side, "max_sequence_length": 16, "num_inference_steps": STEPS}


def plain(name: str, side: int) -> None:
    pipe = PIPELINES[name]()
    start = time.process_time()
    pipe(PROMPT, generator=torch.Generator().manual_seed(0), **arguments(side))
    print(f"  plain: {time.process_time() - start:.2f} s")


def ours(name: str, side: int) -> torch.Tensor:
    from diffsight import DiffusionModel, attention_maps
    from diffsight.pipelines.diffusion.attention import find_attentions

    model = DiffusionModel(PIPELINES[name]())
    given = {"words": ["circle", "square"], "layers": range(2), **arguments(side)}
    find_attentions(model, PROMPT, **arguments(side))  # once for a pipeline and size
    start = time.process_time()
    result = attention_maps(model, PROMPT, **given)
    print(f"  diffsight, once the attentions are known: {time.process_time() - start:.2f} s")
    return result.maps.flatten(1)


def peer(name: str, side: int) -> torch.Tensor:
    from attention_map_diffusers import AttentionCapture

    pipe = PIPELINES[name]()
    start = time.process_time()
    with AttentionCapture(pipe, relations=["image->text"], timesteps="all") as capture:
        pipe([PROMPT], generator=torch.Generator().manual_seed(0), **arguments(side))
    records = [record for record in capture.compute().records if record.data is not None]
    maps = torch.stack([record.data.float()[-1].mean(0) for record in records]).mean(0)  # (positions, text keys)
    print(f"  attention-map-diffusers: {time.process_time() - start:.2f} s, {len(records)} records")
    return torch.stack([maps[:, tokens].mean(1) for tokens in TOKENS[name]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", choices=[*PIPELINES])
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--only", choices=["plain", "ours", "peer"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    name, side = options.pipeline, options.side
    if options.only:
        globals()[options.only](name, side)
        print(f"  {options.only}: peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
        return
    print(f"{name}, {side} pixels: largest difference {(ours(name, side) - peer(name, side)).abs().max():.2e}")
    for kind in ("plain", "ours", "peer"):
        subprocess.run([sys.executable, __file__, name, "--side", str(side), "--only", kind], check=True)


if __name__ == "__main__":
    main()
