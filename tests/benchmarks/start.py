"""What it costs to start: importing, opening a pipeline, the first image and the first lens, against bare diffusers.

    python tests/benchmarks/start.py

Each program is a process of its own, run in turn with its counterpart, on one thread. The figures are the processor
time of the process, the least of the rounds: whatever else the machine does only ever adds to it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from diffsight.pipelines.packaged import FOLDERS

PROMPT = "a red circle below a blue square on a gray background"
NAME, STEPS = "diffsight/shapes-clip", 20
FOLDER = FOLDERS[NAME]

OPEN = f"from diffusers import DiffusionPipeline\npipe = DiffusionPipeline.from_pretrained({str(FOLDER)!r})\n"
BARE_LENS = """
import torch
from PIL import Image

ids = pipe.tokenizer([PROMPT, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
with torch.no_grad():
    states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
    normed = [pipe.text_encoder.final_layer_norm(state) for state in states]
embeds = torch.stack([state[0] for state in normed])
images = pipe(
    prompt_embeds=embeds,
    negative_prompt_embeds=normed[-1][1:].expand_as(embeds),
    num_inference_steps=STEPS,
    generator=[torch.Generator().manual_seed(0) for _ in embeds],
).images
grid = Image.new("RGB", (64 * len(images), 64))
for number, image in enumerate(images):
    image.save(f"layer_{number}.png")
    grid.paste(image, (64 * number, 0))
grid.save("grid.png")
"""
CONSTANTS = f"PROMPT, STEPS = {PROMPT!r}, {STEPS}\n"
OURS = f"from diffsight import DiffusionModel\nmodel = DiffusionModel({NAME!r})\n"
PROGRAMS = {  # what: bare diffusers, diffsight
    "import": (["-c", "import diffusers"], ["-c", "import diffsight"]),
    "import of the pipeline's class": (
        ["-c", "from diffusers import StableDiffusionPipeline"],
        ["-c", "from diffsight import DiffusionModel"],
    ),
    "a pipeline with its weights": (["-c", OPEN], ["-c", f"{OURS}model.pipeline"]),
    "first image": (
        ["-c", f"{CONSTANTS}{OPEN}pipe(PROMPT, num_inference_steps=STEPS).images[0].save('image.png')"],
        ["-c", f"{CONSTANTS}{OURS}model.generate(PROMPT, num_inference_steps=STEPS).images[0].save('image.png')"],
    ),
    "diffsight lens": (
        ["-c", f"{CONSTANTS}{OPEN}{BARE_LENS}"],
        ["-m", "diffsight.gallery.cli", "lens", PROMPT, "--steps", str(STEPS), "--out", "lens"],
    ),
}


def seconds(arguments: list[str], folder: Path) -> float:
    """Return the processor time of a Python process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # both sides are compiled once, not at every start
    started = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(started.pid, 0)
    assert status == 0, arguments
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{'':32}{'diffusers':>12}{'diffsight':>12}{'ratio':>8}")
    for what, programs in PROGRAMS.items():
        times: tuple[list[float], list[float]] = ([], [])
        with tempfile.TemporaryDirectory() as folder:
            for turn in range(options.rounds):
                for side in (0, 1) if turn % 2 else (1, 0):
                    times[side].append(seconds(programs[side], Path(folder)))
        bare, ours = map(min, times)
        print(f"{what:32}{bare:10.2f} s{ours:10.2f} s{ours / bare:8.2f}", flush=True)


if __name__ == "__main__":
    main()
