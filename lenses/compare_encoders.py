"""Text encoders side by side: the same prompts through two or more of them.

    result = compare_encoders(sdxl, prompts)                            # all encoders of a pipeline
    result = compare_encoders({"CLIP": clip, "T5": t5}, prompts)        # or of several
    result.plot()                                                       # linear CKA of all pairs of layers
    result.cka("CLIP", "T5")                                            # (layers of the one, layers of the other)
    result.nearest("T5", prompt=0), result.drift("T5", prompt=0)
    result.grid()                                                       # the diffusion lens on each

A prompt is the mean of the hidden states of its own tokens: without padding, without the tokens that a tokenizer adds,
without a template around it. So encoders whose tokenizers cut it otherwise are compared over the same rows.

Linear CKA of X (n, p) and Y (n, q), their columns centred, is ||Y'X||² / (||X'X|| ||Y'Y||) with Frobenius norms
(Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, section 3): 1 for the same up to
rotation and scale. It is high for few rows and many features, whatever they are, and 1 for any two rows: take prompts
by the dozen.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional
from tqdm.auto import tqdm

import diffsight
from diffsight.errors import InputError, suggest
from diffsight.lenses.diffusion_lens import DiffusionLensResult, choose_layers, diffusion_lens
from diffsight.lenses.results import panels, plots
from diffsight.lenses.results.saving import save_files, write_record
from diffsight.pipelines.diffusion.components import text_encoder_names
from diffsight.pipelines.diffusion.encoding import (
    EncodingRecord,
    PromptEncoding,
    cut_off,
    encodings_in,
    record_encoding,
)
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.text_encoders import Encoder, encoders_in

_ENDS = ("first", "last")


@dataclass(frozen=True)
class EncodedPrompts:
    """What one encoder makes of the prompts: `layers`, by number; `vectors`, (layers, prompts, features), the mean of
    each prompt's own tokens; and by prompt its `words`, as texts of tokens, and their cosines with what they are at the
    first and at the last of the layers, `drifts`, (2, layers, tokens). `lens` has the pictures of the first prompts."""

    layers: tuple[int, ...]
    vectors: torch.Tensor = field(repr=False)
    words: tuple[tuple[str, ...], ...] = field(repr=False)
    drifts: tuple[torch.Tensor, ...] = field(repr=False)
    lens: tuple[DiffusionLensResult, ...] = field(repr=False)


@dataclass(frozen=True)
class EncoderComparison(Mapping):
    """The same prompts in several encoders: `result[name]` is what one makes of them, `list(result)` their names."""

    prompts: tuple[str, ...] = field(repr=False)
    encoders: Mapping[str, EncodedPrompts]
    seed: int
    arguments: Mapping[str, Any]

    def __getitem__(self, name: str) -> EncodedPrompts:
        if name not in self.encoders:
            raise InputError(f"there is no encoder {name!r}{suggest(str(name), self)}: compared are {', '.join(self)}")
        return self.encoders[name]

    def __iter__(self) -> Any:
        return iter(self.encoders)

    def __len__(self) -> int:
        return len(self.encoders)

    def cka(self, one: str, other: str) -> torch.Tensor:
        """Linear CKA of each layer of an encoder with each of another, (layers, layers), over the prompts. NaN where a
        layer gives the same for all prompts."""
        one, other = (torch.stack([_gram(x) for x in self[name].vectors]).flatten(1) for name in (one, other))
        return one @ other.T

    def nearest(self, name: str, prompt: int, count: int = 3) -> list[list[tuple[str, float]]]:
        """By layer the `count` prompts nearest to one, nearest first, each with the cosine of the two."""
        values, order = self._cosines(name, prompt).sort(descending=True, stable=True)
        rows = zip(order[:, :count].tolist(), values[:, :count].tolist())
        others = self._others(prompt)
        return [[(self.prompts[others[place]], value) for place, value in zip(*row)] for row in rows]

    def drift(self, name: str, prompt: int, to: str = "last") -> torch.Tensor:
        """The cosine of each token's hidden state with that at the last of the layers (or the "first"), (layers,
        tokens); the tokens are `result[name].words[prompt]`."""
        if to not in _ENDS:
            raise InputError(f'tokens drift from the "first" layer or to the "last", not {to!r}')
        return self[name].drifts[self._checked(prompt)][_ENDS.index(to)]

    def plot(self) -> Figure:
        """Linear CKA of all pairs of layers, those of one encoder after those of the other."""
        values = torch.cat([torch.cat([self.cka(one, other) for other in self], 1) for one in self])
        blocks = {name: [str(layer) for layer in encoded.layers] for name, encoded in self.encoders.items()}
        return panels.block_map(values.numpy(), blocks, f"{len(self.prompts)} prompts", "linear CKA")

    def plot_nearest(self, prompt: int) -> Figure:
        """How near the other prompts are to one, by layer; a point marks the nearest."""
        numbers = self._others(self._checked(prompt))
        shown = {}
        for name in self:
            values = self._cosines(name, prompt)
            layers = [str(layer) for layer in self[name].layers]
            marks = values.argmax(1).tolist()
            shown[name] = panels.Map(values.numpy(), layers, [str(n) for n in numbers], marks=marks)
        low = min(float(panel.values.min()) for panel in shown.values())
        return panels.map_panels(shown, self._title(prompt), "cosine", low, "prompt")

    def plot_drift(self, prompt: int, to: str = "last") -> Figure:
        """How near each token is to what it is at the last (or the "first") layer."""
        shown = {}
        for name in self:
            layers, words = [str(layer) for layer in self[name].layers], self[name].words[self._checked(prompt)]
            shown[name] = panels.Map(self.drift(name, prompt, to).numpy(), layers, [word.strip() for word in words])
        low = min(0.0, *(float(panel.values.min()) for panel in shown.values()))
        return panels.map_panels(shown, self._title(prompt), f"cosine with {to} layer", low, "")

    def grid(self, prompt: int = 0) -> Image.Image:
        """What the diffusion lens draws of a prompt from the layers of each encoder: a row an encoder."""
        drawn = min(len(encoded.lens) for encoded in self.encoders.values())
        if self._checked(prompt) >= drawn:
            of = f"of the first {drawn} prompts alone" if drawn else "of no prompt"
            raise InputError(f"the lens drew pictures {of}: compare_encoders(…, pictures={prompt + 1}) draws more")
        lenses = [encoded.lens[prompt] for encoded in self.encoders.values()]
        titles = [[f"layer {layer}" for layer in lens.layers] for lens in lenses]
        title = f"{self.prompts[prompt]} (seed {self.seed})"
        rows = [lens.images for lens in lenses]
        return diffsight.image_grid(rows, titles=titles, row_titles=list(self), title=title, cell=128)

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `comparison.json`, `comparison.safetensors` (vectors, drifts and CKA), `cka.png`, and of each prompt
        that the lens drew `grid_00.png`, `drift_00.png` and `nearest_00.png`; gives the paths."""
        record = {
            "lens": "compare_encoders",
            "prompts": list(self.prompts),
            "seed": self.seed,
            "arguments": dict(self.arguments),
            "encoders": {n: {"layers": list(e.layers), "words": e.words} for n, e in self.encoders.items()},
        }
        numbers = {f"{name}.vectors": encoded.vectors for name, encoded in self.encoders.items()}
        for name, encoded in self.encoders.items():
            numbers |= {f"{name}.drift.{i:02}": drift for i, drift in enumerate(encoded.drifts)}
        numbers |= {f"cka.{a}.{b}": self.cka(a, b) for a, b in itertools.combinations_with_replacement(self, 2)}
        numbers = {name: value.contiguous() for name, value in numbers.items()}
        files = {
            "comparison.json": partial(write_record, record),
            "comparison.safetensors": partial(save_file, numbers),
            "cka.png": partial(plots.write, self.plot),
        }
        for i in range(min(len(encoded.lens) for encoded in self.encoders.values())):
            files[f"grid_{i:02}.png"] = self.grid(i).save
            files[f"drift_{i:02}.png"] = partial(plots.write, partial(self.plot_drift, i))
            files[f"nearest_{i:02}.png"] = partial(plots.write, partial(self.plot_nearest, i))
        return save_files(folder, files)

    def _repr_png_(self) -> bytes:
        return self.plot()._repr_png_()

    def _cosines(self, name: str, prompt: int) -> torch.Tensor:
        """The cosines of a prompt's vector with those of all others, (layers, prompts - 1)."""
        vectors = functional.normalize(self[name].vectors, dim=-1)
        self._checked(prompt)
        return torch.einsum("lf,lpf->lp", vectors[:, prompt], vectors[:, self._others(prompt)])

    def _others(self, prompt: int) -> list[int]:
        return [number for number in range(len(self.prompts)) if number != prompt]

    def _checked(self, prompt: int) -> int:
        if not hasattr(prompt, "__index__") or isinstance(prompt, bool) or not 0 <= prompt < len(self.prompts):
            raise InputError(f"there is no prompt {prompt!r}: they are 0 to {len(self.prompts) - 1}")
        return prompt

    def _title(self, prompt: int) -> str:
        return f"{prompt}: {self.prompts[prompt]}"


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear CKA of two sets of as many vectors, (n, features), from 0 to 1: Kornblith et al. 2019, section 3.

    NaN where all vectors of one are the same. Raises InputError where they are not as many, or fewer than two."""
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise InputError(
            f"linear_cka compares as many vectors, (n, features) with n from 2 on, not {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    return float((_gram(x) * _gram(y)).sum())


def _gram(x: torch.Tensor) -> torch.Tensor:
    """The Gram matrix of centred vectors, (n, n), of norm 1: CKA is the product of two. Its sum is that of ||Y'X||²."""
    x = x.double() - x.double().mean(0)
    gram = x @ x.T
    return gram / gram.norm()


# ---- the prompts in the encoders


@dataclass(frozen=True)
class _Chosen:
    """An encoder that takes part, and the layers of it."""

    name: str
    model: DiffusionModel
    encoder: Encoder
    layers: tuple[int, ...]


def compare_encoders(
    models: DiffusionModel | Mapping[str, DiffusionModel] | Sequence[DiffusionModel],
    prompts: Iterable[str],
    *,
    encoders: str | Iterable[str] | None = None,
    layers: int | slice | Iterable[int] | None = None,
    pictures: int = 1,
    seed: int = 0,
    lens: Mapping[str, Any] | None = None,
    progress: bool = True,
    **arguments: Any,
) -> EncoderComparison:
    """Compares the text encoders of one or several models over the same prompts.

        compare_encoders(sdxl, prompts, encoders=["text_encoder", "text_encoder_2"], layers=slice(None, None, 4))

    Args:
        models: One, several, or several by the names that they are to have in the result. There an encoder goes by
            its own name, that of its model, or both, as it takes to tell them apart.
        encoders: Names of text encoders, see `model.encoders`, in whichever of the models they are. None is all.
        layers: Of each encoder, as `diffusion_lens` counts them: 0 is the embedding. None is all that the pipeline
            makes use of.
        pictures: Of so many prompts, from the first on, the diffusion lens draws every encoder's layers; 0 is none.
        lens: Settings of the lens, such as {"isolate": True, "norm": True, "batch_size": 4}.
        arguments: Of the pipelines.

    Raises InputError, before any picture is made, for fewer than two prompts or encoders, an encoder or a layer that is
    not there, and a prompt that the tokenizer of one cuts (saying what is cut)."""
    named, prompts = _named(models), _prompts(prompts)
    if not hasattr(pictures, "__index__") or isinstance(pictures, bool) or not 0 <= pictures <= len(prompts):
        raise InputError(f"pictures is a number of prompts to draw, from 0 to {len(prompts)}, not {pictures!r}")
    chosen = _choose(named, prompts[0], encoders, layers, pictures > 0, arguments, seed)
    encoded: dict[str, list[tuple[PromptEncoding, list[int]]]] = {one.name: [] for one in chosen}
    for prompt in tqdm(prompts, desc="encoding", disable=not progress):
        for model in dict.fromkeys(one.model for one in chosen):
            reading = record_encoding(model, prompt, arguments, seed)
            made = encodings_in(model, prompt, reading)
            for one in (one for one in chosen if one.model is model):
                _check_length(one, reading, prompt)
                value = made[one.encoder.name]
                encoded[one.name].append((value, _own_tokens(one, value)))
    drawn: dict[str, list[DiffusionLensResult]] = {one.name: [] for one in chosen}
    for prompt, one in tqdm([*itertools.product(prompts[:pictures], chosen)], desc="lenses", disable=not progress):
        settings = {"encoder": one.encoder.name, "layers": one.layers, "seed": seed, "progress": False, **(lens or {})}
        drawn[one.name].append(diffusion_lens(one.model, prompt, **settings, **arguments))
    found = {one.name: _summary(one.layers, encoded[one.name], drawn[one.name]) for one in chosen}
    return EncoderComparison(tuple(prompts), found, seed, arguments)


def _summary(
    layers: tuple[int, ...], encoded: Sequence[tuple[PromptEncoding, list[int]]], drawn: Sequence[DiffusionLensResult]
) -> EncodedPrompts:
    vectors, words, drifts = [], [], []
    for one, places in encoded:
        states = torch.stack([one.states[layer][places].float().cpu() for layer in layers])
        vectors.append(states.mean(1))
        words.append(tuple(one.words[place] for place in places) or tuple(str(int(one.ids[place])) for place in places))
        drifts.append(torch.stack([functional.cosine_similarity(states, states[end], dim=-1) for end in (0, -1)]))
    return EncodedPrompts(layers, torch.stack(vectors, 1), tuple(words), tuple(drifts), tuple(drawn))


def _own_tokens(one: _Chosen, encoded: PromptEncoding) -> list[int]:
    """The places of the prompt's own tokens: where they follow each other, else all that are not the tokenizer's."""
    ids = encoded.ids.tolist()
    if one.encoder.tokenizer is None:
        return list(range(len(ids)))
    tokenizer = getattr(one.model.pipeline, one.encoder.tokenizer)
    for text in dict.fromkeys((encoded.prompt, encoded.prompt.lower().strip())):  # some pipelines clean it
        own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(len(ids) - len(own) + 1):
            if ids[start : start + len(own)] == own:
                return list(range(start, start + len(own)))
    special = set(tokenizer.all_special_ids)
    return [place for place, token in enumerate(ids) if token not in special]


# ---- what takes part


def _named(models: Any) -> dict[str, DiffusionModel]:
    """The models by name; without names, those that they were opened with, numbered where that is the same."""
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
            raise InputError(f"{type(model.pipeline).__name__} has no text encoder, so there is nothing to compare")
    return models


def _prompts(prompts: Any) -> tuple[str, ...]:
    found = [prompts] if isinstance(prompts, str) or not isinstance(prompts, Iterable) else list(prompts)
    wrong = next((prompt for prompt in found if not isinstance(prompt, str)), None)
    if wrong is not None:
        raise InputError(f"a prompt is a text, not {type(wrong).__name__}: {wrong!r}")
    if len(set(found)) < len(found):
        twice = next(prompt for prompt in found if found.count(prompt) > 1)
        raise InputError(f"the prompts are to differ, and {twice!r} is there twice")
    if len(found) < 2:
        raise InputError(f"encoders are compared over two prompts or more, by the dozen for CKA: there is {len(found)}")
    return tuple(found)


def _choose(
    models: Mapping[str, DiffusionModel],
    prompt: str,
    encoders: str | Iterable[str] | None,
    layers: Any,
    draws: bool,
    arguments: Mapping[str, Any],
    seed: int,
) -> list[_Chosen]:
    found = {
        name: encoders_in(model, record_encoding(model, prompt, arguments, seed)) for name, model in models.items()
    }
    there = "; ".join(f"{name} has {', '.join(of)}" for name, of in found.items())
    wanted = [encoders] if isinstance(encoders, str) else None if encoders is None else list(encoders)
    everywhere = {encoder for of in found.values() for encoder in of}
    for name in wanted or ():
        if name not in everywhere:
            raise InputError(f"there is no text encoder {name!r}{suggest(str(name), everywhere)}: {there}")
    pairs = [(name, e) for name, of in found.items() for e in of.values() if wanted is None or e.name in wanted]
    if len(pairs) < 2:
        raise InputError(f"two encoders or more are compared, and here is {len(pairs)}: {there}. Give another model")
    chosen = []
    for name, encoder in pairs:
        if draws and not encoder.uses:
            raise InputError(
                f"{name} takes nothing of {encoder.name} as it is, so its layers cannot be drawn: pictures=0 compares "
                "without pictures"
            )
        try:
            numbers = choose_layers(layers, encoder.last)
        except InputError as error:
            raise InputError(f"{name}, {encoder.name}: {error}") from None
        chosen.append(_Chosen(_label(name, encoder, pairs), models[name], encoder, numbers))
    return chosen


def _label(model: str, encoder: Encoder, pairs: Sequence[tuple[str, Encoder]]) -> str:
    """The name of the encoder, or of the model, or both, as it takes to tell it from the others."""
    names = [name for name, _ in pairs]
    if len(set(names)) == 1:
        return encoder.name
    return model if names.count(model) == 1 else f"{model} {encoder.name}"


def _check_length(one: _Chosen, reading: EncodingRecord, prompt: str) -> None:
    cut = cut_off(one.model, reading.encoders[one.encoder.name], prompt)
    if cut is not None:
        raise InputError(f"the prompt {prompt!r} is too long for {one.name}: these words would be dropped: {cut!r}")
