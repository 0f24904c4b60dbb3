"""Compare text encoders: the same prompts through two or more of them.

    result = compare_encoders(sdxl, prompts)                            # all text encoders of a pipeline
    result = compare_encoders({"CLIP": clip, "T5": t5}, prompts)        # or of several pipelines
    result.plot()                                                       # linear CKA of all pairs of layers
    result.cka("CLIP", "T5")                                            # (CLIP layers, T5 layers)
    result.nearest("T5", prompt=0), result.drift("T5", prompt=0)
    result.grid()                                                       # the diffusion lens on each encoder

A prompt is represented by the mean of the hidden states of its own tokens, without padding, without the special tokens
of the tokenizer, and without a template around it. So encoders can be compared even if their tokenizers differ.

Linear CKA of X (n, p) and Y (n, q), with centred columns, is ||Y'X||² / (||X'X|| ||Y'Y||) with Frobenius norms
(Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, section 3). It is 1 if X and Y
are equal up to rotation and scale. It is always high if there are few rows and many features, and 1 for any two rows:
use dozens of prompts.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional
from tqdm.auto import tqdm

from diffsight.errors import InputError, UnknownKeyError, suggest
from diffsight.lenses.diffusion_lens import DiffusionLensResult, diffusion_lens
from diffsight.lenses.encoders.checks import check_prompt
from diffsight.lenses.encoders.own_states import OwnStates, read_alone, read_together
from diffsight.lenses.layers import Layer, Layers, choose_layers, layer_title
from diffsight.lenses.linear_cka import normed_gram
from diffsight.lenses.options import check_options
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.encoder_plots import Map, block_map, map_panels
from diffsight.lenses.results.figure import write_figure
from diffsight.lenses.results.image_grid import image_grid
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import Cell, HeatMapSection, ImageSection, Section, TableSection
from diffsight.lenses.results.token_plots import shorten
from diffsight.pipelines.diffusion.components import text_encoder_names
from diffsight.pipelines.diffusion.encoder_calls import EncoderRecord
from diffsight.pipelines.diffusion.encoding import cut_off, record_encoding
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.prompts import text_tokenizer
from diffsight.pipelines.diffusion.run import is_silenced
from diffsight.pipelines.diffusion.text_encoders import Encoder, Encoders, encoders_in
from diffsight.pipelines.numbers import as_integer

_ENDS = ("first", "last")
_MOST_PROMPTS, _BATCH_BYTES = 128, 2**28  # prompts in a batch, bytes of its hidden states
_NAMED, _LONGEST = 12, 24  # prompts that a figure names by their texts, characters of each


@dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """All prompts, as one text encoder encodes them.

    Attributes:
        layers: Non-negative integers, and "embedding" for the input of the first layer.
        vectors: The mean hidden state of each prompt's own tokens, (layers, prompts, features).
        words: For each prompt its own tokens as text.
        drifts: For each prompt the cosine similarity of each token's hidden state with its hidden state at the first
            and at the last of the layers, (2, layers, tokens).
        lens: For each of the first prompts the result of the diffusion lens.
    """

    layers: tuple[Layer, ...]
    vectors: torch.Tensor = field(repr=False)
    words: tuple[tuple[str, ...], ...] = field(repr=False)
    drifts: tuple[torch.Tensor, ...] = field(repr=False)
    lens: tuple[DiffusionLensResult, ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class EncoderComparison(LensResult, Mapping):
    """The same prompts in several text encoders: `result[name]` has those of one, `list(result)` the names.

    `save(folder)` writes `comparison.json`, `comparison.safetensors` (vectors, drifts and CKA), `cka.png`, and for each
    prompt that the diffusion lens drew, `grid_00.png`, `drift_00.png` and `nearest_00.png`. The record lists the
    nearest prompts of every prompt.

    Attributes:
        prompts: The prompts.
        encoders: Names to encoded prompts.
        seed: The seed of the diffusion lens.
        arguments: The arguments of the pipelines.
    """

    prompts: tuple[str, ...] = field(repr=False)
    encoders: Mapping[str, EncodedPrompts]
    seed: int
    arguments: Mapping[str, Any]
    record_file: ClassVar[str] = "comparison.json"

    def __getitem__(self, name: str) -> EncodedPrompts:
        if name not in self.encoders:
            raise UnknownKeyError(
                f"there is no encoder {name!r}{suggest(str(name), self)}: the result has {', '.join(self)}"
            )
        return self.encoders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.encoders)

    def __len__(self) -> int:
        return len(self.encoders)

    def cka(self, one: str, other: str) -> torch.Tensor:
        """Return the linear CKA of each layer of one encoder with each layer of the other, (layers, layers).

        It is NaN where a layer has the same vector for all prompts."""
        one, other = (torch.stack([normed_gram(x) for x in self[name].vectors]).flatten(1) for name in (one, other))
        return one @ other.T

    def nearest(self, name: str, prompt: int | str, count: int = 3) -> list[list[tuple[str, float]]]:
        """Return for each layer the `count` prompts nearest to a prompt, nearest first, with their cosine similarity.

        Args:
            name: The text encoder.
            prompt: The prompt: its number, counted from 0, or its text.
            count: The number of prompts to return.
        """
        prompt = self._number(prompt)
        values, order = self._cosines(name, prompt).sort(descending=True, stable=True)
        rows = zip(order[:, :count].tolist(), values[:, :count].tolist())
        others = self._others(prompt)
        return [[(self.prompts[others[place]], value) for place, value in zip(*row)] for row in rows]

    def drift(self, name: str, prompt: int | str, to: str = "last") -> torch.Tensor:
        """Return the cosine similarity of each token's hidden state with that token's at the last (or first) layer.

        Args:
            name: The text encoder.
            prompt: The prompt: its number, counted from 0, or its text.
            to: "last" or "first".

        Returns:
            (layers, tokens). The tokens are `result[name].words[prompt]`.
        """
        if to not in _ENDS:
            raise InputError(f'to must be "first" or "last", not {to!r}')
        return self[name].drifts[self._number(prompt)][_ENDS.index(to)]

    def plot(self) -> Figure:
        """Plot the linear CKA of all pairs of layers, the layers of one encoder after those of the other."""
        values = torch.cat([torch.cat([self.cka(one, other) for other in self], 1) for one in self])
        blocks = {name: [str(layer) for layer in encoded.layers] for name, encoded in self.encoders.items()}
        return block_map(values.numpy(), blocks, f"{len(self.prompts)} prompts", "linear CKA")

    def plot_nearest(self, prompt: int | str) -> Figure:
        """Plot how near the other prompts are to a prompt, by layer. A dot marks the nearest.

        The columns are the prompts: their texts if there are at most a dozen, else their numbers."""
        prompt = self._number(prompt)
        others = self._others(prompt)
        names = [shorten(self._title(n), _LONGEST) if len(others) <= _NAMED else str(n) for n in others]
        shown = {}
        for name in self:
            values = self._cosines(name, prompt)
            layers = [str(layer) for layer in self[name].layers]
            shown[name] = Map(values.numpy(), layers, names, marks=values.argmax(1).tolist())
        low = min(float(panel.values.min()) for panel in shown.values())
        return map_panels(shown, self._title(prompt), "cosine", low, "prompt")

    def plot_drift(self, prompt: int | str, to: str = "last") -> Figure:
        """Plot how near each token's hidden state is to its state at the last (or first) of the layers."""
        prompt = self._number(prompt)
        shown = {}
        for name in self:
            layers, words = [str(layer) for layer in self[name].layers], self[name].words[prompt]
            shown[name] = Map(self.drift(name, prompt, to).numpy(), layers, [word.strip() for word in words])
        low = min(0.0, *(float(panel.values.min()) for panel in shown.values()))
        return map_panels(shown, self._title(prompt), f"cosine with {to} layer", low, "")

    def grid(self, prompt: int | str = 0) -> Image.Image:
        """Return what the diffusion lens drew for a prompt: a row for each encoder, a column for each layer."""
        prompt, drawn = self._number(prompt), self._drawn()
        if prompt >= drawn:
            which = f"only the first {drawn} prompts" if drawn else "no prompt"
            raise InputError(f"compare_encoders drew {which}: pass images={prompt + 1} to draw more")
        lenses = [encoded.lens[prompt] for encoded in self.encoders.values()]
        titles = [[layer_title(layer) for layer in lens.layers] for lens in lenses]
        title = f"{self.prompts[prompt]} (seed {self.seed})"
        rows = [lens.images for lens in lenses]
        return image_grid(rows, titles=titles, row_titles=list(self), title=title, cell=128)

    def preview(self) -> Figure:
        return self.plot()

    def sections(self) -> list[Section]:
        found: list[Section] = []
        for first, second in itertools.combinations_with_replacement(self, 2):
            names = [[str(layer) for layer in self[name].layers] for name in (first, second)]
            title = f"Linear CKA of {first} and {second}, {len(self.prompts)} prompts"
            axes = f"{first}, layer", f"{second}, layer"
            found.append(HeatMapSection(title, *names, self.cka(first, second), "linear CKA", axes))
        for i in range(self._drawn()):
            rows = {n: dict(zip(map(layer_title, e.lens[i].layers), e.lens[i].images)) for n, e in self.items()}
            found.append(ImageSection(f"Drawn from each layer: {self.prompts[i]}", rows))
        for i, prompt in enumerate(self.prompts[: max(1, self._drawn())]):
            found += [self._nearest_table(name, i, prompt) for name in self]
            found += [self._drift_map(name, i, prompt) for name in self]
        return found

    def _nearest_table(self, name: str, number: int, prompt: str) -> TableSection:
        rows = {
            str(layer): [Cell(text, value, [(text, value)]) for text, value in nearest]
            for layer, nearest in zip(self[name].layers, self.nearest(name, number))
        }
        columns = [f"{i + 1}." for i in range(min(3, len(self.prompts) - 1))]
        return TableSection(f"Nearest to {prompt!r} in {name}", "layer", columns, rows, "cosine similarity")

    def _drift_map(self, name: str, number: int, prompt: str) -> HeatMapSection:
        words, layers = [word.strip() for word in self[name].words[number]], [str(one) for one in self[name].layers]
        title, values = f"Drift of {prompt!r} in {name}", self.drift(name, number)
        return HeatMapSection(title, layers, words, values, "cosine similarity with the last layer", ("layer", "token"))

    def files(self) -> dict[str, Callable[[Path], None]]:
        files: dict[str, Callable[[Path], None]] = {
            "comparison.safetensors": partial(save_file, self._tensors()),
            "cka.png": partial(write_figure, self.plot),
        }
        for i in range(self._drawn()):
            files[f"grid_{i:02}.png"] = self.grid(i).save
            files[f"drift_{i:02}.png"] = partial(write_figure, partial(self.plot_drift, i))
            files[f"nearest_{i:02}.png"] = partial(write_figure, partial(self.plot_nearest, i))
        return files

    def record(self) -> dict[str, Any]:
        return {
            "lens": "compare_encoders",
            "prompts": list(self.prompts),
            "seed": self.seed,
            "arguments": dict(self.arguments),
            "encoders": {n: {"layers": list(e.layers), "words": e.words} for n, e in self.encoders.items()},
            "nearest": {n: [self.nearest(n, i) for i in range(len(self.prompts))] for n in self},
        }

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {f"{name}.vectors": encoded.vectors for name, encoded in self.encoders.items()}
        for name, encoded in self.encoders.items():
            tensors |= {f"{name}.drift.{i:02}": drift for i, drift in enumerate(encoded.drifts)}
        tensors |= {f"cka.{a}.{b}": self.cka(a, b) for a, b in itertools.combinations_with_replacement(self, 2)}
        return {name: value.contiguous() for name, value in tensors.items()}

    def _drawn(self) -> int:
        """Return the number of prompts that the diffusion lens drew."""
        return min(len(encoded.lens) for encoded in self.encoders.values())

    def _cosines(self, name: str, prompt: int) -> torch.Tensor:
        """Return the cosine similarity of a prompt's vector with those of all others, (layers, prompts - 1)."""
        vectors = functional.normalize(self[name].vectors, dim=-1)
        return torch.einsum("lf,lpf->lp", vectors[:, prompt], vectors[:, self._others(prompt)])

    def _others(self, prompt: int) -> list[int]:
        return [number for number in range(len(self.prompts)) if number != prompt]

    def _number(self, prompt: int | str) -> int:
        """Return the number of a prompt that is named by its number or its text."""
        if isinstance(prompt, str):
            if prompt not in self.prompts:
                raise InputError(f"there is no prompt {prompt!r}{suggest(prompt, self.prompts)}")
            return self.prompts.index(prompt)
        number = as_integer(prompt)
        if number is None or not 0 <= number < len(self.prompts):
            raise InputError(
                f"there is no prompt {prompt!r}: choose from 0 to {len(self.prompts) - 1}, or pass the text of a prompt"
            )
        return number

    def _title(self, prompt: int) -> str:
        return f"{prompt}: {self.prompts[prompt]}"


# ---- encoding the prompts


@dataclass(frozen=True)
class _Chosen:
    """A text encoder to compare, and its layers."""

    name: str
    model: DiffusionModel
    encoder: Encoder
    layers: tuple[Layer, ...]

    @cached_property
    def spell(self) -> Callable[[int], str]:
        """The function that returns a token as text."""
        name = self.encoder.tokenizer
        tokenizer = None if name is None else text_tokenizer(getattr(self.model.pipeline, name))
        return cache(str if tokenizer is None else lambda token: tokenizer.decode([token]))


@repeatable
def compare_encoders(
    models: DiffusionModel | Mapping[str, DiffusionModel] | Sequence[DiffusionModel],
    prompts: Iterable[str],
    *,
    encoders: str | Iterable[str] | None = None,
    layers: Layers = None,
    images: int = 1,
    seed: int = 0,
    lens: Mapping[str, Any] | None = None,
    progress: bool = True,
    **arguments: Any,
) -> EncoderComparison:
    """Compare the text encoders of one or several pipelines over the same prompts.

        compare_encoders(sdxl, prompts, encoders=["text_encoder", "text_encoder_2"], layers=slice(None, None, 4))

    Args:
        models: One pipeline, several, or a mapping from names to pipelines. The result names a text encoder after
            itself, its pipeline, or both, as needed to tell them apart.
        prompts: Two or more prompts, all different.
        encoders: Names of text encoders, see `model.encoders`, in any of the pipelines. Default: all.
        layers: Layers of each encoder. Layer i is the output of `layers[i]`, -1 the last, and "embedding" the input of
            the first. Default: the embedding and all layers up to the last that the pipeline uses.
        images: The number of prompts, from the first, that the diffusion lens draws from each encoder's layers.
        seed: The seed of the diffusion lens.
        lens: Settings of the diffusion lens, such as {"isolate": True, "norm": True, "batch_size": 4}.
        progress: Whether to show a progress bar.
        arguments: Arguments of the pipelines.

    Returns:
        The prompts as each text encoder encodes them.

    Raises:
        InputError: Before anything is drawn, if there are fewer than two prompts or encoders, an encoder or a layer
            does not exist, or a tokenizer truncates a prompt.
    """
    named, prompts = _named(models), _checked_prompts(prompts)
    count = as_integer(images)
    if count is None or not 0 <= count <= len(prompts):
        raise InputError(f"images is the number of prompts to draw, from 0 to {len(prompts)}, not {images!r}")
    for prompt in prompts:
        check_prompt("compare_encoders", prompt)
    for model in named.values():
        check_options(compare_encoders, model, arguments)
    chosen = _choose(named, prompts[0], encoders, layers, count > 0, arguments, seed)
    is_quiet = not progress or any(is_silenced(model.pipeline) for model in named.values())
    encoded = _encode(chosen, prompts, arguments, seed, not is_quiet)
    drawn: dict[str, list[DiffusionLensResult]] = {one.name: [] for one in chosen}
    for prompt, one in tqdm([*itertools.product(prompts[:count], chosen)], desc="lenses", disable=is_quiet):
        settings = {"encoder": one.encoder.name, "layers": one.layers, "seed": seed, "progress": False, **(lens or {})}
        drawn[one.name].append(diffusion_lens(one.model, prompt, **settings, **arguments))
    found = {one.name: _summary(one, encoded[one.name], drawn[one.name]) for one in chosen}
    return EncoderComparison(tuple(prompts), found, int(seed), arguments)


@dataclass(frozen=True)
class _Encoded:
    """Some prompts in one text encoder.

    Attributes:
        vectors: For each prompt the mean hidden state of its own tokens, (layers, features).
        words: For each prompt these tokens as text.
        drifts: As in EncodedPrompts.
    """

    vectors: list[torch.Tensor] = field(default_factory=list)
    words: list[tuple[str, ...]] = field(default_factory=list)
    drifts: list[torch.Tensor] = field(default_factory=list)

    def add(self, one: _Chosen, read: OwnStates) -> None:
        """Add the prompts of a batch."""
        states, lengths = read.states, [len(ids) for ids in read.ids]
        self.vectors.extend(part.mean(1) for part in states.split(lengths, 1))
        drifts = torch.stack([functional.cosine_similarity(states, states[end], dim=-1) for end in (0, -1)])
        self.drifts.extend(drifts.split(lengths, 2))
        self.words.extend(tuple(map(one.spell, ids)) for ids in read.ids)


def _encode(
    chosen: Sequence[_Chosen], prompts: Sequence[str], arguments: Mapping[str, Any], seed: int, progress: bool
) -> dict[str, _Encoded]:
    """Encode the prompts in batches, and return them by the name of the text encoder."""
    encoded = {one.name: _Encoded() for one in chosen}
    groups = {one.model: [other for other in chosen if other.model is one.model] for one in chosen}
    with tqdm(total=len(prompts) * len(groups), desc="encoding", disable=not progress) as shown:
        for model, group in groups.items():
            size = max(1, min(_MOST_PROMPTS, _BATCH_BYTES // max(1, sum(_size_of(one.encoder) for one in group))))
            for start in range(0, len(prompts), size):
                some = prompts[start : start + size]
                for read in _read(model, group, some, arguments, seed):
                    for one in group:
                        encoded[one.name].add(one, read[one.encoder.name])
                shown.update(len(some))
    return encoded


def _read(
    model: DiffusionModel,
    group: Sequence[_Chosen],
    prompts: Sequence[str],
    arguments: Mapping[str, Any],
    seed: int,
) -> Iterator[dict[str, OwnStates]]:
    """Yield the hidden states by the name of the text encoder: of all prompts together if possible, else one by one."""
    if len(prompts) > 1:
        read = read_together(model, {one.encoder: one.layers for one in group}, prompts, arguments, seed)
        if read is not None:
            yield read
            return
    for prompt in prompts:
        record = record_encoding(model, prompt, arguments, seed).encoders
        for one in group:
            _check_length(one, record[one.encoder.name], prompt)
        names = {one.encoder.name: one.layers for one in group}
        yield {name: read_alone(model, record[name], layers, prompt) for name, layers in names.items()}


def _size_of(encoder: Encoder) -> int:
    """Return the size of the hidden states of one prompt in single precision, in bytes."""
    tokens = prod(encoder.prompt_call.shape) if encoder.prompt_call is not None else 1
    return 4 * (encoder.count + 1) * tokens * encoder.width


def _summary(one: _Chosen, encoded: _Encoded, drawn: Sequence[DiffusionLensResult]) -> EncodedPrompts:
    vectors = torch.stack(encoded.vectors, 1)
    return EncodedPrompts(one.layers, vectors, tuple(encoded.words), tuple(encoded.drifts), tuple(drawn))


# ---- models, prompts and text encoders


def _named(models: Any) -> dict[str, DiffusionModel]:
    """Return the models by name. A model without a name gets the name it was opened with, numbered if that repeats."""
    if isinstance(models, DiffusionModel):
        models = [models]
    if not isinstance(models, Mapping):
        models = list(models) if isinstance(models, Iterable) and not isinstance(models, str) else [models]
        sources = [getattr(model, "source", "") for model in models]
        names = [f"{s} ({i})" if sources.count(s) > 1 else s for i, s in enumerate(sources, 1)]
        models = list(zip(names, models))
    models = dict(models)
    for model in models.values():
        if not isinstance(model, DiffusionModel):
            raise InputError(f"compare_encoders takes DiffusionModels, not {type(model).__name__}")
        if not text_encoder_names(model.pipeline):
            raise InputError(f"{type(model.pipeline).__name__} has no text encoder to compare")
    return models


def _checked_prompts(prompts: Any) -> tuple[str, ...]:
    found = [prompts] if isinstance(prompts, str) or not isinstance(prompts, Iterable) else list(prompts)
    wrong = next((prompt for prompt in found if not isinstance(prompt, str)), None)
    if wrong is not None:
        raise InputError(f"a prompt must be a string, not {type(wrong).__name__}: {wrong!r}")
    if len(set(found)) < len(found):
        twice = next(prompt for prompt in found if found.count(prompt) > 1)
        raise InputError(f"prompts must be unique, but {twice!r} appears twice")
    if len(found) < 2:
        raise InputError(f"compare_encoders needs two prompts or more (for CKA, dozens), not {len(found)}")
    return tuple(found)


def _choose(
    models: Mapping[str, DiffusionModel],
    prompt: str,
    encoders: str | Iterable[str] | None,
    layers: Layers,
    draws: bool,
    arguments: Mapping[str, Any],
    seed: int,
) -> list[_Chosen]:
    found = {name: _encoders_of(model, prompt, arguments, seed) for name, model in models.items()}
    known = "; ".join(f"{name} has {', '.join(of)}" for name, of in found.items())
    if encoders is not None and not isinstance(encoders, Iterable):
        raise InputError(f"encoders are names of text encoders, not {encoders!r}: {known}")
    wanted = [encoders] if isinstance(encoders, str) else None if encoders is None else list(encoders)
    everywhere = {encoder for of in found.values() for encoder in of}
    for name in wanted or ():
        if name not in everywhere:
            raise InputError(f"there is no text encoder {name!r}{suggest(str(name), everywhere)}: {known}")
    pairs = [(name, e) for name, of in found.items() for e in of.values() if wanted is None or e.name in wanted]
    if len(pairs) < 2:
        raise InputError(f"compare_encoders needs two encoders or more, not {len(pairs)}: {known}. Pass another model")
    chosen = []
    for name, encoder in pairs:
        if draws and not encoder.uses:
            raise InputError(
                f"{name} does not seem to use any output of {encoder.name} unchanged, so the layers of this encoder "
                "cannot be drawn: images=0 compares without images"
            )
        try:
            numbers = choose_layers(layers, encoder.count, encoder.used_count)
        except InputError as error:
            raise InputError(f"{name}, {encoder.name}: {error}") from None
        chosen.append(_Chosen(_label(name, encoder, pairs), models[name], encoder, numbers))
    return chosen


def _encoders_of(model: DiffusionModel, prompt: str, arguments: Mapping[str, Any], seed: int) -> Encoders:
    """Return the text encoders of a pipeline, as it uses them with these arguments."""
    if not arguments:
        return model.encoders
    return encoders_in(model, record_encoding(model, prompt, arguments, seed))


def _label(model: str, encoder: Encoder, pairs: Sequence[tuple[str, Encoder]]) -> str:
    """Return the name of the encoder, of the model, or both, as needed to tell it from the others."""
    names = [name for name, _ in pairs]
    if len(set(names)) == 1:
        return encoder.name
    return model if names.count(model) == 1 else f"{model} {encoder.name}"


def _check_length(one: _Chosen, encoder: EncoderRecord, prompt: str) -> None:
    cut = cut_off(one.model, encoder, prompt)
    if cut is not None:
        raise InputError(f"the prompt {prompt!r} is too long for {one.name}: these words would be dropped: {cut!r}")
