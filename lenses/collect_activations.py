"""Collect the activations of many prompts in batches, in memory or in a folder of safetensors files.

states = collect_activations(model, prompts)            # of the last tokens: .values is (layers, prompts, features)
states = collect_activations(model, prompts, layers=[8, 16], positions=None)            # of all tokens
collect_activations(model, prompts, of="mlps_output", dtype=torch.float16, folder="states")
load_activations("states", layers=[8]).values

values = collect_activations(pipeline, prompts, layers="unet.**.attn2", sample=4, num_inference_steps=20)
values["unet.mid_block.attentions[0].transformer_blocks[0].attn2"]                      # (vectors, features)
collect_activations(pipeline, prompts, layers="unet.mid_block", folder="values")        # continued if interrupted
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import EllipsisType
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from diffsight.errors import InputError, suggest
from diffsight.lenses.collecting.image_collection import ImageCollection
from diffsight.lenses.collecting.point_activations import PointActivations
from diffsight.lenses.collecting.shards import INDEX, load_shards, write_shards
from diffsight.lenses.denoising.call_checks import Steps, check_steps
from diffsight.lenses.layers import EMBEDDING, Layer, Layers, find_layer
from diffsight.lenses.options import check_options
from diffsight.lenses.results.record import write_record
from diffsight.lenses.results.saving import check_writable
from diffsight.lenses.tokens.batches import Batch, Positions, open_batches
from diffsight.lenses.tokens.choosing import check_count, hidden_states, layers_to_read
from diffsight.lenses.visits.named_points import named_points
from diffsight.lenses.visits.visiting import BRANCHES, has_branches
from diffsight.lenses.where_models_are import where_the_model_is
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.local_paths import find_path, shortened
from diffsight.pipelines.numbers import as_integer, unpacked
from diffsight.pipelines.seeds import as_seed
from diffsight.pipelines.steering_arguments import check_positions

_POINTS = ("layers_output", "layers_input", "attentions_output", "mlps_output", "heads_output", "q", "k", "v")


@dataclass(frozen=True, eq=False)
class Activations:
    """What the layers of a model returned at the chosen tokens of many prompts: `activations[4]` is layer 4.

    Attributes:
        of: What was collected, such as "layers_output".
        model: The name of the model.
        layers: Non-negative integers, and "embedding" for the input of the first layer.
        num_layers: The number of layers of the model.
        values: The activations, (layers, tokens, ...), such as (layers, tokens, features).
        prompts: The number of the prompt of each token, (tokens,).
        positions: The position of each token in its prompt, (tokens,).
    """

    of: str
    model: str
    layers: tuple[Layer, ...]
    num_layers: int
    values: torch.Tensor = field(repr=False)
    prompts: torch.Tensor = field(repr=False)
    positions: torch.Tensor = field(repr=False)

    def __getitem__(self, layer: int | str) -> torch.Tensor:
        """Return the activations of one layer of the model, (tokens, ...). -1 is the last layer of the model."""
        return self.values[find_layer(layer, self.layers, self.num_layers)]

    def of_prompt(self, prompt: int) -> torch.Tensor:
        """Return the activations of one prompt, (layers, its tokens, ...). -1 is the last prompt.

        Raises InputError if there is no such prompt."""
        count = int(self.prompts.max()) + 1
        number = as_integer(prompt)
        if number is None or not -count <= number < count:
            raise InputError(f"there is no prompt {prompt!r}: there are {count} (0 to {count - 1})")
        return self.values[:, self.prompts == number % count]


@overload
def collect_activations(model: LanguageModel, prompts: Any, *, folder: None = None, **options: Any) -> Activations: ...


@overload
def collect_activations(
    model: DiffusionModel, prompts: Any, *, folder: None = None, **options: Any
) -> PointActivations: ...


@overload
def collect_activations(
    model: LanguageModel | DiffusionModel, prompts: Any, *, folder: str | Path, **options: Any
) -> Path: ...


@where_the_model_is
def collect_activations(
    model: LanguageModel | DiffusionModel,
    prompts: Any,
    *,
    layers: Layers = None,
    positions: Positions | EllipsisType = ...,
    of: str = "layers_output",
    steps: Steps = None,
    branch: str | None = None,
    sample: int | None = None,
    batch_size: int = 32,
    dtype: torch.dtype | None = None,
    folder: str | Path | None = None,
    seed: int | None = None,
    progress: bool = True,
    **inputs: Any,
) -> Activations | PointActivations | Path:
    """Collect the activations of `layers` at `positions` of the prompts, on the CPU.

    The model stops after the last chosen layer, or after the last chosen step.

    Args:
        model: The model.
        prompts: A string, several strings, or token ids.
        layers: In a language model, layer i is the output of `layers[i]`, -1 the last, and "embedding" the input of the
            first: an integer, a slice, or a list of them. Default: all layers, without the embedding. In a pipeline,
            paths or patterns of modules, such as "text_encoder.layers[4]" or "unet.**.attn2".
        positions: Positions in each prompt: 0 is its first token, -1 its last. In a pipeline, positions in the sequence
            or, row by row, in the feature map. None means all, and "image" the tokens of the images that a
            vision-language model reads. Default: -1, and in a pipeline all.
        of: What to collect from each layer of a language model: layers_output, layers_input, attentions_output,
            mlps_output, heads_output, q, k or v.
        steps: The denoising steps of a pipeline. Default: all.
        branch: The branch of guidance in a pipeline: "cond", "uncond" or "both". Default: "cond".
        sample: In a pipeline, the number of positions to take at random from each prompt in each step. Default: all.
        batch_size: The number of prompts in a batch.
        dtype: The type of the activations. Default: that of the model.
        folder: Write each batch into a file in this folder, so that no more than one batch is in memory. For a language
            model the folder appears when everything is written. For a pipeline the files appear one by one; the same
            call continues an interrupted one. Default: return the activations.
        seed: The seed of the first prompt of a pipeline; later prompts have later seeds. Default: 0.
        progress: Whether to show a progress bar.
        inputs: Further inputs of the language model, or arguments of the pipeline.

    Returns:
        The activations, or the path of the folder (see `load_activations`).

    Raises:
        InputError: Before anything runs, if a prompt, layer or position does not exist, or the folder is not empty.
    """
    if not isinstance(model, (LanguageModel, DiffusionModel)):
        raise InputError(f"collect_activations takes a LanguageModel or a DiffusionModel, not {type(model).__name__}")
    check_options(collect_activations, model, inputs)
    if of not in _POINTS:
        raise InputError(f"{of!r} cannot be collected{suggest(str(of), _POINTS)}: choose from {', '.join(_POINTS)}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype is a torch.dtype, such as torch.float32, not {dtype!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(f"activations are floating point numbers: dtype cannot be {dtype}")
    if isinstance(model, DiffusionModel):
        if of != "layers_output":
            raise InputError("of is for language models: in a pipeline, layers are paths such as 'unet.**.attn2.input'")
        points = named_points(model, layers)
        collection = ImageCollection(
            model,
            points,
            positions=None if positions is ... or positions is None else check_positions(positions),
            sample=None if sample is None else check_count("sample", sample),
            steps=None if steps is None else check_steps(steps),
            branch=branch or "cond",
            dtype=dtype,
            seed=as_seed(seed or 0),
            arguments=inputs,
        )
        return _collect_images(collection, prompts, batch_size, folder, progress, branch)
    given = {"steps": steps, "branch": branch, "sample": sample, "seed": seed}
    for name in (name for name, value in given.items() if value is not None):
        raise InputError(f"{name} is for pipelines: a language model reads each prompt in one pass")
    positions = -1 if positions is ... else positions
    chosen = layers_to_read(model, layers)
    if EMBEDDING in chosen and of != "layers_output":
        raise InputError(f'"embedding" is the input of the first layer, which has no {of}: use of="layers_output"')
    batches = open_batches(model, prompts, positions, batch_size, **inputs)
    shown = tqdm(batches, desc="activations", disable=not progress or len(batches) == 1)
    if folder is not None:
        return _write(model, of, chosen, shown, _check_free(folder), dtype)
    sizes = [int(batch.chosen.sum()) for batch in batches]
    values, done = None, 0
    for batch, size in zip(shown, sizes):
        for i, part in _read(batch, of, chosen):
            if values is None:
                values = torch.empty(len(chosen), sum(sizes), *part.shape[1:], dtype=dtype or part.dtype)
            values[i, done : done + size] = part
            del part
        done += size
    return Activations(of, model.label, chosen, len(model.layers_output), values, *_tokens(batches))


def _collect_images(
    collection: ImageCollection,
    prompts: Any,
    batch_size: int,
    folder: str | Path | None,
    progress: bool,
    branch: str | None,
) -> PointActivations | Path:
    """Collect the vectors of a pipeline in memory, or in a folder."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError("prompts must be a prompt, or a list of prompts")
    if branch is not None and branch not in BRANCHES:
        raise InputError(f"branch must be one of {', '.join(map(repr, BRANCHES))}, not {branch!r}")
    if branch is not None and not all(has_branches(collection.model, point) for point in collection.points):
        raise InputError("branches of guidance exist in text encoders and denoisers: omit branch for other modules")
    size = check_count("batch_size", batch_size)
    batches = [(start, texts[start : start + size]) for start in range(0, len(texts), size)]
    shown = tqdm(batches, desc="activations", disable=not progress or len(batches) == 1)
    if folder is not None:
        return write_shards(folder, _settings(collection, texts, size), shown, collection.read)
    found = [collection.read(some, start) for start, some in shown]
    joined = {name: tuple(map(torch.cat, zip(*(one[name] for one in found)))) for name in found[0]}
    values, origins = ({name: both[i] for name, both in joined.items()} for i in range(2))
    return PointActivations(collection.model.source, values, origins)


def _settings(collection: ImageCollection, prompts: list[str], batch_size: int) -> dict[str, Any]:
    """Return what the index of a folder records."""
    kept: Mapping[str, Any] = {name: getattr(collection, name) for name in ("positions", "sample", "branch", "seed")}
    return {
        "model": collection.model.source,
        "points": [str(point.name) for point in collection.points],
        "prompts": prompts,
        "batch_size": batch_size,
        "steps": repr(collection.steps),
        "dtype": str(collection.dtype),
        "arguments": dict(collection.arguments),
        **kept,
    }


def load_activations(
    folder: str | Path, layers: int | str | Sequence[int | str] | None = None
) -> Activations | PointActivations:
    """Load what `collect_activations` wrote into a folder.

    Args:
        folder: The folder.
        layers: The layers, or the points of a pipeline, to load. Default: all in the folder.

    Raises:
        InputError: The folder has no activations, or lacks a layer.
    """
    given, folder = folder, find_path(folder)
    if folder is None or not (folder / INDEX).is_file():
        raise InputError(f"the folder {shortened(str(given))} has no activations: there is no {INDEX} in it")
    try:
        return _loaded(folder, layers)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"the activations in {folder} are damaged: {type(error).__name__}: {error}") from error


def _loaded(folder: Path, layers: int | str | Sequence[int | str] | None) -> Activations | PointActivations:
    record = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    if "points" in record:
        points = record["points"] if layers is None else [layers] if isinstance(layers, str) else list(layers)
        unknown = next((point for point in points if point not in record["points"]), None)
        if unknown is not None:
            raise InputError(f"the folder has no activations of {unknown!r}: it has {', '.join(record['points'])}")
        return load_shards(folder, record, points)
    known, count = tuple(record["layers"]), record["num_layers"]
    layers = unpacked(layers)
    is_one = isinstance(layers, str) or not isinstance(layers, Iterable)
    wanted = known if layers is None else [layers] if is_one else layers
    chosen = tuple(known[find_layer(layer, known, count)] for layer in wanted)
    parts: dict[str, list[torch.Tensor]] = {}
    for file in record["files"]:
        with safe_open(folder / file, framework="pt") as stored:
            for name in ("prompts", "positions", *map(str, chosen)):
                parts.setdefault(name, []).append(stored.get_tensor(name))
    joined = {name: torch.cat(some) for name, some in parts.items()}
    values = torch.stack([joined[str(layer)] for layer in chosen])
    return Activations(record["of"], record["model"], chosen, count, values, joined["prompts"], joined["positions"])


def _read(batch: Batch, of: str, layers: tuple[Layer, ...]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield, for each layer, its index in `layers` and its activations at the chosen tokens, (tokens, ...)."""
    with torch.no_grad(), batch.run as run:
        for i, layer in enumerate(layers):  # no name holds a layer's values while the next layer runs
            yield i, batch.pick(hidden_states(run, layer) if of == "layers_output" else getattr(run, of)[layer])
        run.stop()


def _tokens(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for each token, the number of its prompt and its position in that prompt, both (tokens,)."""
    rows = torch.cat([batch.indices[0] + batch.start for batch in batches])
    return rows, torch.cat([batch.positions[batch.chosen] for batch in batches])


def _write(
    model: LanguageModel,
    of: str,
    layers: tuple[Layer, ...],
    batches: Sequence[Batch],
    folder: Path,
    dtype: torch.dtype | None,
) -> Path:
    files = []
    with _unfinished(folder) as place:
        for number, batch in enumerate(batches):
            prompts, positions = _tokens([batch])
            found = {str(layers[i]): part.to("cpu", dtype, copy=True) for i, part in _read(batch, of, layers)}
            files.append(f"activations_{number:05}.safetensors")
            save_file({**found, "prompts": prompts, "positions": positions}, place / files[-1])
        record = {"of": of, "model": model.label, "layers": list(layers)}
        write_record(record | {"num_layers": len(model.layers_output), "files": files}, place / INDEX)
    return folder


def _check_free(folder: str | Path) -> Path:
    folder = check_writable(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} already exists: choose a new or an empty folder")
    return folder


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, whose files are moved to `folder` once they are complete. After an error nothing
    remains."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    with tempfile.TemporaryDirectory(dir=existing, prefix=".unfinished.") as temporary:
        yield Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(temporary).iterdir(), reverse=True):  # the index comes last: then all files exist
            path.replace(folder / path.name)
