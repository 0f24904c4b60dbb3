"""Activations of many prompts, in batches: in memory, or in a folder of safetensors files.

states = collect_activations(model, prompts)            # of the last tokens: .values is (layers, prompts, features)
states = collect_activations(model, prompts, layers=[8, 16], positions=None)            # of all tokens
collect_activations(model, prompts, of="mlps_output", dtype=torch.float16, folder="states")
load_activations("states", layers=[8]).values
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from diffsight.errors import InputError, suggest
from diffsight.lenses.results.saving import check_writable, write_record
from diffsight.lenses.tokens.batches import Batch, Layers, Positions, choose_layers, open_batches
from diffsight.lenses.tokens.reader import name_of
from diffsight.pipelines.language.model import LanguageModel

_POINTS = ("layers_output", "layers_input", "attentions_output", "mlps_output", "heads_output", "q", "k", "v")
_RECORD = "activations.json"


@dataclass(frozen=True)
class Activations:
    """What the layers of a model gave at the chosen tokens of many prompts: `values`, (layers, tokens, features).
    Token t is number `positions[t]` of prompt number `prompts[t]`, both (tokens,)."""

    of: str
    model: str
    layers: tuple[int, ...]
    values: torch.Tensor = field(repr=False)
    prompts: torch.Tensor = field(repr=False)
    positions: torch.Tensor = field(repr=False)

    def __getitem__(self, layer: int) -> torch.Tensor:
        """Of one layer, by its number in the model: (tokens, features)."""
        if layer not in self.layers:
            raise InputError(f"layer {layer!r} was not collected: there are {', '.join(map(str, self.layers))}")
        return self.values[self.layers.index(layer)]

    def of_prompt(self, prompt: int) -> torch.Tensor:
        """Of one prompt, (layers, its tokens, features)."""
        return self.values[:, self.prompts == prompt]


@overload
def collect_activations(model: LanguageModel, prompts: Any, *, folder: None = None, **options: Any) -> Activations: ...


@overload
def collect_activations(model: LanguageModel, prompts: Any, *, folder: str | Path, **options: Any) -> Path: ...


def collect_activations(
    model: LanguageModel,
    prompts: Any,
    *,
    layers: Layers = None,
    positions: Positions = -1,
    of: str = "layers_output",
    batch_size: int = 32,
    dtype: torch.dtype | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    **inputs: Any,
) -> Activations | Path:
    """Collects what `layers` give at `positions` of the prompts (their last token; None is all), on the CPU.

    `of` names the accessor: layers_output, layers_input, attentions_output, mlps_output, heads_output, q, k or v.
    `dtype` is that of the result, else the model's own. The model goes no further than the last of the layers.

    With `folder`, each batch is written to a file of its own, so that no more than one is in memory, and the folder is
    there when all of it is written; gives its path (see `load_activations`).

    Raises InputError, before anything runs, for what is not there, and for a folder that is."""
    if not isinstance(model, LanguageModel):
        raise InputError(f"collect_activations takes a LanguageModel, not {type(model).__name__}")
    if of not in _POINTS:
        raise InputError(f"there is no {of!r} to collect{suggest(of, _POINTS)}; there are {', '.join(_POINTS)}")
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(f"activations are collected as floating point numbers, not {dtype}")
    chosen = choose_layers(model, layers)
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
        done += size
    return Activations(of, name_of(model), chosen, values, *_tokens(batches))


def load_activations(folder: str | Path, layers: int | Sequence[int] | None = None) -> Activations:
    """What `collect_activations` has written into a folder, or of it a few layers."""
    folder = Path(folder).expanduser()
    if not (folder / _RECORD).is_file():
        raise InputError(f"the folder {folder} holds no activations: it has no {_RECORD}")
    record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    chosen = record["layers"] if layers is None else [layers] if isinstance(layers, int) else list(layers)
    for layer in chosen:
        if layer not in record["layers"]:
            raise InputError(f"layer {layer!r} was not collected: there are {', '.join(map(str, record['layers']))}")
    parts: dict[str, list[torch.Tensor]] = {}
    for file in record["files"]:
        with safe_open(folder / file, framework="pt") as stored:
            for name in ("prompts", "positions", *map(str, chosen)):
                parts.setdefault(name, []).append(stored.get_tensor(name))
    joined = {name: torch.cat(some) for name, some in parts.items()}
    values = torch.stack([joined[str(layer)] for layer in chosen])
    return Activations(record["of"], record["model"], tuple(chosen), values, joined["prompts"], joined["positions"])


def _read(batch: Batch, of: str, layers: tuple[int, ...]) -> Iterator[tuple[int, torch.Tensor]]:
    """What each layer gives at the chosen tokens, (tokens, features), one after the other."""
    with torch.no_grad(), batch.run as run:
        for i, layer in enumerate(layers):
            yield i, batch.pick(getattr(run, of)[layer])
        run.stop()


def _tokens(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of the prompt of each token, and its position in it."""
    rows = torch.cat([batch.places[0] + batch.start for batch in batches])
    return rows, torch.cat([batch.positions[batch.chosen] for batch in batches])


def _write(
    model: LanguageModel,
    of: str,
    layers: tuple[int, ...],
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
        record = {"of": of, "model": name_of(model), "layers": list(layers), "files": files}
        write_record(record, place / _RECORD)
    return folder


def _check_free(folder: str | Path) -> Path:
    folder = check_writable(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already: take the name of a folder that is not, or is empty")
    return folder


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A folder under another name, which gets its own when all of it is written; else nothing stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
        place = Path(beside) / folder.name
        place.mkdir()
        yield place
        place.replace(folder)
