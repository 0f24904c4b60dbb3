"""Train a sparse autoencoder (SAE) on the values at a point of a model, or on vectors that were collected before.

    sae = train_sae(model, "unet.up_blocks.0", captions, features=1024, k=16, folder="sae", num_inference_steps=20)
    sae = SAE.load("sae")

Prompts are run again and again. The vectors at the point go through a buffer that shuffles them. If the function is
called in all processes that `accelerate launch` or `torchrun` has started, each process reads its own part of the data.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.lenses.denoising.call_checks import Steps
from diffsight.lenses.features.activation_stream import (
    PointReader,
    ShuffledBuffer,
    check_finite,
    stored,
)
from diffsight.lenses.features.autoencoder import SAE, check_sizes
from diffsight.lenses.features.sae_checks import check_model
from diffsight.lenses.features.sae_trainer import CHECKPOINT, SAESettings, SAETrainer
from diffsight.lenses.options import check_options
from diffsight.lenses.results.denoising_plots import step_curves
from diffsight.lenses.results.record import write_record
from diffsight.lenses.results.saving import check_writable, save_files
from diffsight.lenses.tokens.choosing import check_count
from diffsight.lenses.work_sharing import Processes
from diffsight.pipelines.argument_types import check_types, fits
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.seeds import as_seed


def train_sae(
    model: DiffusionModel | LanguageModel | None,
    point: str,
    data: Sequence[str] | torch.Tensor,
    *,
    features: int,
    kind: str = "topk",
    k: int | None = 32,
    of: str = "output",
    steps: Steps = None,
    settings: SAESettings | None = None,
    buffer: int = 65536,
    prompts_per_run: int = 16,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> SAE:
    """Train a sparse autoencoder on the vectors at a point of a model: tokens, or positions of a feature map.

        train_sae(model, "text_encoder.layers[6]", captions, features=512, k=8, folder="sae")
        train_sae(model, "unet.mid_block", captions, features=1024, of="difference", num_inference_steps=20)
        train_sae(None, "layers[3]", vectors, features=4096, kind="jumprelu", k=None)

    The SAE is trained on the device of the model, or of the vectors.

    Args:
        model: The model. It may be None if `data` are vectors.
        point: The path of a module of the model.
        data: Prompts, which are run again and again, or vectors, (vectors, width). Pass all of them in every process.
        features: The number of features.
        kind: "topk", "batch_topk", "jumprelu" or "relu".
        k: The number of active features, for "topk" and "batch_topk".
        of: "output" of the point, or its "difference": output minus input.
        steps: The denoising steps to read, for a point in a denoiser, in the conditional branch. Default: all.
        settings: The number of updates, the batch size, and so on.
        buffer: The number of vectors that each process keeps in memory, in random order.
        prompts_per_run: How many prompts are run together.
        folder: Where to write checkpoints, every 20 seconds, and in the end the SAE, `training.json` with the record
            and the learning curve, and `curve.png`. If the folder has a checkpoint, the training continues from it.
        seed: The seed of the weights, the order, and the images.
        progress: Whether to show a progress bar.
        arguments: Further arguments of the model.

    Returns:
        The SAE.

    Raises:
        InputError: Before anything runs, if an argument is not valid or the folder has the checkpoint of another
            training.
        PointNotFoundError: The point does not exist.
    """
    check_types(train_sae, point=point, settings=settings, folder=folder)
    seed = as_seed(seed)
    check_sizes(features, kind, k, of)
    buffer = check_count("buffer", buffer)
    prompts_per_run = check_count("prompts_per_run", prompts_per_run)
    settings, processes = settings or SAESettings(), Processes()
    if settings.batch_size % processes.count:
        raise InputError(f"batch_size must be a multiple of {processes.count}, the number of processes")
    facts = {"seed": seed, "data": len(data) if hasattr(data, "__len__") else None, "processes": processes.count}
    data, arguments = _part_of(processes, data, arguments)
    refill = _refill(model, point, data, of, steps, prompts_per_run, arguments)
    folder = None if folder is None else check_writable(folder)
    generator = torch.Generator().manual_seed(seed)
    sample, _ = refill(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = SAE(sample.shape[-1], features, kind, k, point, of).to(sample.device)
    trainer, position = SAETrainer(sae, settings, processes, facts), 0
    if folder is not None and (folder / CHECKPOINT).is_file():
        position = trainer.resume(folder, generator)
    else:
        trainer.start(sample)
    source = ShuffledBuffer(refill, buffer, position, generator)
    trainer.train(source, folder, generator, progress)
    sae.facts |= {"model": None if model is None else getattr(model, "source", str(model)), "updates": trainer.done}
    sae.eval().requires_grad_(False)
    if folder is not None:
        if processes.is_main:
            record = {"point": point, "of": of, "kind": kind, "k": k, "seed": seed, "arguments": arguments}
            _finish(trainer, folder, record | {"processes": processes.count})
        processes.wait()
        sae.loaded_from = {"source": str(folder)}
    return sae


def _part_of(processes: Processes, data: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the part of the data, and of the images among the arguments, that this process reads.

    Raises:
        InputError: There is less data than there are processes.
    """
    if processes.count == 1 or not isinstance(data, (torch.Tensor, list, tuple)):
        return data, arguments
    if len(data) < processes.count:
        raise InputError(f"there are {processes.count} processes for {len(data)} prompts or vectors: start fewer")
    images = arguments.get("images")
    if isinstance(images, (list, tuple)) and len(images) == len(data):
        arguments = {**arguments, "images": processes.share(images)}
    return processes.share(data), arguments


def _refill(
    model: Any, point: str, data: Any, of: str, steps: Steps, prompts_per_run: int, arguments: dict[str, Any]
) -> Any:
    if model is not None or not isinstance(data, torch.Tensor):
        check_model(train_sae, model)
    check_options(train_sae, model, arguments)
    if isinstance(data, torch.Tensor):
        if data.ndim != 2 or not data.is_floating_point() or len(data) == 0:
            raise InputError(f"data must be a float tensor (vectors, width), not {data.dtype} {tuple(data.shape)}")
        check_finite(data, "the vectors")
        return stored(data)
    prompts = [data] if isinstance(data, str) else data
    if not fits(prompts, Sequence[str]) or not prompts:
        raise InputError("data must be a list of prompts (strings) or a tensor (vectors, width)")
    reader = PointReader(model, point, of, steps, arguments)
    reader.check()
    return reader.stream(list(prompts), prompts_per_run)


def _finish(trainer: SAETrainer, folder: Path, record: dict[str, Any]) -> None:
    """Write the SAE, the record and the learning curve, and remove the checkpoint."""
    curve, sae = trainer.curve, trainer.sae
    shares = {"explained variance": [one["explained_variance"] for one in curve]}
    shares["dead features"] = [one["dead"] for one in curve]
    updates = [one["update"] for one in curve]
    facts = {"lens": "train_sae", **record, "settings": vars(trainer.settings), "curve": curve}
    figure = step_curves(shares, updates, "share", f"{sae.point}, {sae.count} features", axis="update")
    sae.save(folder)
    save_files(
        folder,
        {
            "training.json": lambda path: write_record(facts, path),
            "curve.png": lambda path: figure.savefig(path, dpi=200),
        },
    )
    (folder / CHECKPOINT).unlink(missing_ok=True)
