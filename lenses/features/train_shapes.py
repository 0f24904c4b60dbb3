"""Train the SAEs that come with the package.

python -m diffsight.lenses.features.train_shapes unet                   # of a block of shapes-clip's UNet
python -m diffsight.lenses.features.train_shapes text-encoder           # of layer 6 of its text encoder
"""

import argparse
import random
from pathlib import Path

import torch
from tqdm.auto import tqdm

from diffsight.lenses.denoising.call_checks import Steps
from diffsight.lenses.features.activation_stream import PointReader
from diffsight.lenses.features.sae_trainer import SAESettings
from diffsight.lenses.train_sae import train_sae
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.shapes.scenes import sample_scene

FOLDER = Path(__file__).parent / "packaged"
DRAWING = {"num_inference_steps": 20, "guidance_scale": 3.0}
SAES = {
    "unet": {
        "point": "unet.up_blocks.0",
        "features": 1024,
        "k": 16,
        "steps": slice(0, None, 3),
        "prompts": 160,
        "updates": 900,
    },
    "text-encoder": {"point": "text_encoder.layers[6]", "features": 512, "k": 8, "prompts": 800, "updates": 2500},
}


def captions(count: int, seed: int) -> list[str]:
    """Return captions of scenes of two things, like the captions that shapes-clip was trained on."""
    rng = random.Random(seed)
    return [sample_scene(rng, two=1.0).caption() for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SAES)
    parser.add_argument("--out", type=Path, help="the folder (default: that of the package)")
    for option in ("prompts", "updates", "features", "k"):
        parser.add_argument(f"--{option}", type=int)
    given = vars(parser.parse_args())
    name, out = given.pop("name"), given.pop("out")
    torch.set_num_threads(1)
    own = SAES[name] | {option: value for option, value in given.items() if value is not None}
    point, model = own.pop("point"), DiffusionModel("diffsight/shapes-clip")
    vectors = read_vectors(model, point, own.pop("steps", None), own.pop("prompts"))
    settings = SAESettings(updates=own.pop("updates"))
    folder = out or FOLDER / f"shapes-clip-{name}"
    train_sae(model, point, vectors, settings=settings, buffer=len(vectors), folder=folder, **own)


def read_vectors(model: DiffusionModel, point: str, steps: Steps, count: int, seed: int = 11) -> torch.Tensor:
    """Return the vectors at a point for some captions, (vectors, width)."""
    arguments = DRAWING if point.startswith("unet") else {}
    reader, found = PointReader(model, point, "output", steps, arguments), []
    prompts = captions(count, seed)
    for start in tqdm(range(0, count, 32), desc="captions"):
        found.append(reader.read(prompts[start : start + 32], seed=start).vectors())
    return torch.cat(found)


if __name__ == "__main__":
    main()
