"""Positions in a pipeline: regions of the image, and words of the prompt.

    parts = PipelinePositions(model, sites, "left", "each", arguments).parts("a red circle", "a blue circle")
    title, part = parts[0]
    part.taken(value, model, site)              # what is taken from the source's value at a site
    part.place(value, model, site)              # where it goes in the target's value

A region is a part of every value whose positions are image positions. A word is a part of the values in text
encoders, and of the keys and values of attention to the text.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.lenses.encoders.pairing import words_read
from diffsight.lenses.sites.position_pairs import ALIGN, pair_positions
from diffsight.lenses.sites.prompt_tokens import PromptTokens
from diffsight.lenses.sites.regions import NAMED, Box, choose_regions, is_box, region_index
from diffsight.lenses.sites.site import Site
from diffsight.pipelines.diffusion.attention import find_attentions
from diffsight.pipelines.diffusion.components import text_encoder_names
from diffsight.pipelines.diffusion.encoding import record_encoding
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.numbers import as_integer, unpacked

_OF_KEYS = ("k", "v")


class WholeValue:
    """All of a value."""

    def taken(self, value: torch.Tensor, model: DiffusionModel, site: Site) -> torch.Tensor:
        """Return what is taken from the source's value at a site."""
        return site.part(value)

    def place(self, value: torch.Tensor, model: DiffusionModel, site: Site) -> tuple[torch.Tensor, Any]:
        """Return the part of the target's value that belongs to the site, and the index of what is replaced in it."""
        return site.part(value), ...


@dataclass(frozen=True)
class ImageRegion(WholeValue):
    """A box of the image."""

    box: Box

    def taken(self, value: torch.Tensor, model: DiffusionModel, site: Site) -> torch.Tensor:
        part, index = self.place(value, model, site)
        return part[index]

    def place(self, value: torch.Tensor, model: DiffusionModel, site: Site) -> tuple[torch.Tensor, Any]:
        part = site.part(value)
        return part, region_index(part, self.box, model, site)


@dataclass(frozen=True)
class TextPart(WholeValue):
    """Words of the prompt.

    Attributes:
        tokens: The positions in the source's value and in the target's, by the path of a text encoder or an attention.
        counts: The total number of positions there, by the same path.
        is_mean: Whether the mean over the source's positions replaces each of the target's positions.
    """

    tokens: Mapping[str, tuple[list[int], list[int]]]
    counts: Mapping[str, int]
    is_mean: bool

    def taken(self, value: torch.Tensor, model: DiffusionModel, site: Site) -> torch.Tensor:
        part, index = self._part(value, site, 0)
        return part[index].mean(site.token_dim_of_part, keepdim=True) if self.is_mean else part[index]

    def place(self, value: torch.Tensor, model: DiffusionModel, site: Site) -> tuple[torch.Tensor, Any]:
        return self._part(value, site, 1)

    def _part(self, value: torch.Tensor, site: Site, side: int) -> tuple[torch.Tensor, Any]:
        part, dim, path = site.part(value), site.token_dim_of_part, _text_path(site)
        if part.ndim <= dim or part.shape[dim] != self.counts[path]:
            raise InputError(
                f"{site.point} has the shape {tuple(value.shape)}, without one value for each of the "
                f"{self.counts[path]} tokens of the text: omit `positions`"
            )
        return part, (*[slice(None)] * dim, torch.tensor(self.tokens[path][side], device=part.device))


TitledPart = tuple[str, WholeValue]


class PipelinePositions:
    """The positions that a user chooses in a pipeline.

    Args:
        model: The pipeline.
        sites: The sites.
        positions: Regions as in `choose_regions`; or "words", "each", words of the prompt, numbers of tokens, ranges of
            numbers, or pairs of these, as in `pair_positions`.
        align: What to do if a word has different numbers of tokens in the two prompts, as in `pair_positions`.
        arguments: Arguments of the pipeline.

    Raises:
        InputError: `positions` are neither regions nor words, or the sites do not have them.
    """

    def __init__(
        self, model: DiffusionModel, sites: Sequence[Site], positions: Any, align: str, arguments: Mapping[str, Any]
    ) -> None:
        positions = unpacked(positions)
        self._model, self._sites, self._positions = model, sites, positions
        self._align, self._arguments = align, dict(arguments)
        self.are_words = _are_words(positions)
        if align not in ALIGN:
            raise InputError(f"align must be one of {', '.join(map(repr, ALIGN))}, not {align!r}")
        if self.are_words:
            _check_words(model, sites, positions)
        elif align != "each":
            raise InputError("align is for positions that are words of the prompt: omit it")
        else:
            choose_regions(positions)

    def parts(self, source: str, target: str) -> list[TitledPart]:
        """Return the parts for a pair of prompts, with their titles.

        Raises:
            InputError: A word does not exist, or has no key in an attention.
        """
        if self.are_words:
            return self._of_words(source, target)
        regions = choose_regions(self._positions)
        return [(name, WholeValue() if box is None else ImageRegion(box)) for name, box in regions.items()]

    def _of_words(self, source: str, target: str) -> list[TitledPart]:
        sides = [self._tokens(prompt) for prompt in (source, target)]
        paths = {_text_path(site) for site in self._sites}
        inside = {path for path in paths if path not in sides[0]}  # attentions
        found = find_attentions(self._model, target, **self._arguments) if inside else {}
        parts: list[TitledPart] = []
        options = self._positions, self._align
        pairs = {name: pair_positions(sides[0][name], sides[1][name], *options) for name in sides[0]}
        first, *others = pairs.values()
        if any(len(other) != len(first) for other in others):
            raise InputError("the text encoders read different numbers of tokens: choose positions by words")
        for number, column in enumerate(first):
            tokens, counts = {}, {}
            both = {name: self._aligned(columns[number]) for name, columns in pairs.items()}
            for path in paths - inside:
                tokens[path], counts[path] = both[path], len(sides[1][path])
            for path in inside:
                tokens[path] = tuple(_keys(found[path], both, side, column.title) for side in (0, 1))
                counts[path] = found[path].keys
            uneven = next((path for path, (taken, place) in tokens.items() if len(taken) != len(place)), None)
            if uneven is not None and self._align != "mean":
                raise InputError(f'{column.title!r} has different numbers of keys in {uneven}: pass align="mean"')
            parts.append((column.title, TextPart(tokens, counts, self._align == "mean")))
        return parts

    def _aligned(self, column: Any) -> tuple[list[int], list[int]]:
        last = slice(-1, None) if self._align == "last" else slice(None)
        return list(column.source[last]), list(column.target[last])

    def _tokens(self, prompt: str) -> dict[str, PromptTokens]:
        """Return the tokens that each text encoder reads."""
        found = {}
        for name, reading in record_encoding(self._model, prompt, dict(self._arguments)).encoders.items():
            words = words_read(self._model, reading, prompt)
            found[name] = PromptTokens(prompt, words.pieces, words)
        return found


def _are_words(positions: Any) -> bool:
    """Return whether positions are words or tokens of the prompt rather than regions of the image."""
    if positions is None or isinstance(positions, Mapping) or positions in ("all", *NAMED):
        return False
    if isinstance(positions, (str, range)) or as_integer(positions) is not None:
        return True
    items = [positions] if is_box(positions) else list(positions) if isinstance(positions, Iterable) else []
    return bool(items) and not any(is_box(item) or (isinstance(item, str) and item in NAMED) for item in items)


def _check_words(model: DiffusionModel, sites: Sequence[Site], positions: Any) -> None:
    encoders = text_encoder_names(model.pipeline)
    for site in sites:
        if site.point.partition(".")[0] not in encoders and site.value not in _OF_KEYS:
            raise InputError(
                f"there is no region {_first(positions)!r}, and {site.point} has no words. Words can be positions in "
                f"text encoders, or of keys and values (k, v). The regions of the image are {', '.join(NAMED)}, or "
                "boxes (left, top, right, bottom)"
            )


def _first(positions: Any) -> Any:
    return next(iter(positions)) if isinstance(positions, (list, tuple)) else positions


def _text_path(site: Site) -> str:
    """Return the text encoder that a site is in, or the attention whose keys or values it holds."""
    return site.module if site.value in _OF_KEYS else site.point.partition(".")[0]


def _keys(attention: Any, tokens: Mapping[str, tuple[list[int], list[int]]], side: int, title: str) -> list[int]:
    """Return the keys in an attention that belong to tokens of the text encoders."""
    found = set()
    for encoder, keys in attention.text.items():
        found |= {keys[token] for token in tokens[encoder][side] if token < len(keys) and keys[token] is not None}
    if not found:
        raise InputError(f"{title!r} has no key in {attention.name}: the text read there does not contain its tokens")
    return sorted(found)
