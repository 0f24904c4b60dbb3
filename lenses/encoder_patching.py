"""Cross-encoder patching: put a word's hidden state from one prompt into the encoding of another prompt.

    result = encoder_patching(model, "a red circle above a green square", "a red square above a green square",
                              words="circle")
    result.grid().save("patching.png")

At a layer, the hidden states of the source prompt's tokens replace those of the target prompt's tokens. The layers
after it and the rest of the pipeline continue with them. One image for each layer and each word (or token) shows in
which layers the word's hidden state carries its meaning, and when the meaning has moved on to other words. For one
layer and one token, this pair of runs in lockstep does the same:

    with model.generate(source, seed=0) as x, model.generate(target, seed=0) as y:
        y.cond.text_encoder.layers[4].output[:, 3] = x.cond.text_encoder.layers[4].output[:, 3]
        x.stop()

The lens does this for all layers and words, in as few calls of the pipeline as possible. The source is encoded once.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffsight.errors import InputError
from diffsight.lenses.denoising.inverted_images import takes_inverted
from diffsight.lenses.encoders.checks import check_call, check_diffusion_model, check_prompt, check_used, check_whole
from diffsight.lenses.encoders.columns import Column, WordOrTokens, find_columns
from diffsight.lenses.encoders.drawing import BatchMismatchError, Drawing, Rows, calls_in, with_state
from diffsight.lenses.encoders.isolating import isolated
from diffsight.lenses.encoders.joining import join_readings
from diffsight.lenses.encoders.pairing import choose_pairs, choose_source, known_to, words_read
from diffsight.lenses.layers import EMBEDDING, Layer, Layers, in_model_order, layer_file, layer_place, layer_title
from diffsight.lenses.linear_map import LinearMap
from diffsight.lenses.options import check_options
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.image_grid import image_grid
from diffsight.lenses.results.outputs import files_of, image_of, media_of, rate_of
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import ImageSection, Section, distinct
from diffsight.lenses.where_models_are import where_the_model_is
from diffsight.pipelines.diffusion.encoder_calls import EncoderRecord, hidden_in
from diffsight.pipelines.diffusion.encoding import EncodingRecord, record_encoding
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.prompts import PromptWarning
from diffsight.pipelines.diffusion.run import DiffusionRun
from diffsight.pipelines.diffusion.text_encoders import Encoder, encoders_in
from diffsight.pipelines.words import PromptWords

_ALIGN = ("each", "last", "mean")
_CELL = 128  # pixels of an image in a grid
_COLUMNS = 7  # images in a row of the grid if there is only one word


@dataclass(frozen=True, eq=False)
class EncoderPatchingResult(LensResult):
    """Images by layer and word.

    `save(folder)` writes `grid.png`, `source.png`, `target.png`, an image for each cell (layer 4, second word:
    `layer_04_02.png`; a video also as `.gif`, a sound as `.wav`) and `lens.json`.

    Attributes:
        images: `images[i][j]` was drawn with the source's hidden states of `words[j]` (tokens `source_tokens[j]`, layer
            `source_layers[i]`) in place of the target's (tokens `tokens[j]`, layer `layers[i]`).
        layers: Layers of the target's encoder: non-negative integers, and "embedding" for the input of the first layer.
        words: The columns.
        source: The source prompt.
        target: The target prompt.
        seed: The seed of every image.
        model: The name of the model.
        arguments: The arguments of the pipeline.
        source_image: The image of the source prompt, without patching.
        target_image: The image of the target prompt, without patching.
        encoder: The name of the text encoder that was patched.
        source_encoder: The name of the text encoder that hidden states came from.
        source_model: The name of the model of that text encoder.
        source_layers: Layers of the source's encoder.
        tokens: The target's tokens of each column.
        source_tokens: The source's tokens of each column.
        align: As in `encoder_patching`.
        isolate: As in `encoder_patching`.
        map_error: The error of the linear map between the encoders, by source layer and layer, if there is a map.
        outputs: What the pipeline returned, as in `DiffusionLensResult`.
        rate: The sampling rate of sounds in Hz.
    """

    images: tuple[tuple[Image.Image, ...], ...] = field(repr=False)
    layers: tuple[Layer, ...]
    words: tuple[str, ...]
    source: str
    target: str
    seed: int
    model: str
    arguments: Mapping[str, Any]
    source_image: Image.Image = field(repr=False)
    target_image: Image.Image = field(repr=False)
    encoder: str
    source_encoder: str
    source_model: str
    source_layers: tuple[Layer, ...] = field(repr=False)
    tokens: tuple[range, ...] = field(repr=False)
    source_tokens: tuple[range, ...] = field(repr=False)
    align: str = "each"
    isolate: bool = False
    map_error: Mapping[tuple[Layer, Layer], float] | None = field(default=None, repr=False)
    outputs: tuple[tuple[Any, ...], ...] = field(default=(), repr=False)
    rate: int | None = field(default=None, repr=False)

    @property
    def row_titles(self) -> list[str]:
        """The layers as titles: "layer 4", or "layer 2 → 4" if the source's layer is a different one."""
        return [
            layer_title(layer) if layer == origin else f"{layer_title(origin)} → {layer}"
            for layer, origin in zip(self.layers, self.source_layers)
        ]

    def grid(self) -> Image.Image:
        """Return all images in one: a row for each layer, a column for each word, and the images of both prompts."""
        names = self.row_titles
        title = f"“{self.source}” into “{self.target}” (seed {self.seed})"
        plain, captions = [self.target_image, self.source_image], ["target, unpatched", "source, unpatched"]
        if len(self.words) == 1:
            images, titles = [*plain, *(row[0] for row in self.images)], [*captions, *names]
            columns, title = min(len(images), _COLUMNS), f"{title}: {self.words[0]}"
            return image_grid(images, titles=titles, title=title, columns=columns, cell=_CELL)
        width = max(2, len(self.words))
        return image_grid(
            [*self.images, plain],
            titles=[*([None] * len(row) for row in self.images), captions],
            row_titles=[*names, None],
            column_titles=[*self.words, *[None] * (width - len(self.words))],
            title=title,
            cell=_CELL,
        )

    def preview(self) -> Image.Image:
        return self.grid()

    def sections(self) -> list[Section]:
        rows = {"unpatched": {"target": self.target_image, "source": self.source_image}}
        for title, images, outputs in zip(self.row_titles, self.images, self.outputs or self.images):
            shown = zip(distinct(self.words), images, outputs)
            rows[title] = {word: media_of(image, output, self.rate) for word, image, output in shown}
        return [ImageSection(f"“{self.source}” into “{self.target}”", rows)]

    def files(self) -> dict[str, Callable[[Path], None]]:
        files: dict[str, Callable[[Path], None]] = {"grid.png": self.grid().save}
        files |= {"source.png": self.source_image.save, "target.png": self.target_image.save}
        for layer, images, outputs in zip(self.layers, self.images, self.outputs):
            for column, (image, output) in enumerate(zip(images, outputs), 1):
                name = f"{layer_file(layer)}_{column:02}"
                files |= {f"{name}.png": image.save} | files_of(name, output, self.rate)
        return files

    def record(self) -> dict[str, Any]:
        kept = ("model", "source", "target", "seed", "encoder", "source_encoder", "source_model", "align", "isolate")
        record = {"lens": "encoder_patching"} | {name: getattr(self, name) for name in kept}
        record |= {name: list(getattr(self, name)) for name in ("layers", "source_layers", "words")}
        record |= {name: [list(span) for span in getattr(self, name)] for name in ("tokens", "source_tokens")}
        record["map_error"] = None if self.map_error is None else [[*k, v] for k, v in self.map_error.items()]
        record["arguments"] = dict(self.arguments)
        return record


@takes_inverted
@repeatable
@where_the_model_is
def encoder_patching(
    model: DiffusionModel,
    source: str,
    target: str,
    *,
    words: WordOrTokens | Sequence[WordOrTokens] | None = None,
    into: WordOrTokens | Sequence[WordOrTokens] | None = None,
    layers: Layers = None,
    source_layers: int | str | Sequence[int | str] | None = None,
    encoder: str | None = None,
    source_encoder: str | None = None,
    source_model: DiffusionModel | None = None,
    mapping: LinearMap | None = None,
    align: str = "each",
    isolate: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> EncoderPatchingResult:
    """Draw `target` with hidden states of `source` put into its text encoder: an image for each layer and word.

        encoder_patching(model, "a red circle", "a blue square", words=["red", "circle"], layers=range(0, 12, 3))
        encoder_patching(model, "a red circle", "a big blue square", words="circle", into="square")
        encoder_patching(sdxl, p, q, words="cat", encoder="text_encoder", source_encoder="text_encoder_2",
                         mapping=LinearMap().fit(sdxl, prompts, encoder=…, source_encoder=…))
        encoder_patching(base, p, p, words="cat", source_model=finetuned)

    The images, and those of both prompts without patching, are rows of one call of the pipeline, or of several calls
    with `batch_size` rows each. If a pipeline cannot draw them together, each image gets a call of its own, with a
    LensWarning. An image from a batch equals the same image drawn alone up to rounding, at most 2 of 255 per pixel. It
    is equal bit for bit only with `batch_size=1`.

    Args:
        model: The pipeline.
        source: The prompt that hidden states are taken from.
        target: The prompt that they are put into.
        words: The words to take from the source, a column for each: a word, or several consecutive ones; or the number
            of a token, or a range of numbers, among the tokens the encoder reads. Default: every token of the prompt.
        into: The words or tokens to replace in the target, one for each of `words`. Default: the words at the same
            position among the words of the prompt, or the tokens with the same numbers.
        layers: Layers of the target's encoder. Layer i is the output of `layers[i]`, -1 the last, and "embedding" the
            input of the first. Default: the embedding and all layers up to the last that the pipeline uses.
        source_layers: Layers of the source's encoder, one for each of `layers`, or one for all. Default: the same.
        encoder: The name of the text encoder to patch. Default: the first whose tokens the pipeline uses.
        source_encoder: The name of the text encoder that hidden states come from. Default: the same name.
        source_model: The pipeline that encodes the source, such as another fine-tune. Default: `model`.
        mapping: Maps the states of the source's encoder to those of the target's. Needed if their widths differ.
        align: What to do if words have different numbers of tokens in the two prompts. "each": patch token by token,
            and raise an error if the numbers differ; "last": patch the last token only; "mean": put the mean of the
            source's tokens into each of the target's.
        isolate: Give the other text encoders an empty prompt. Otherwise they read the target.
        batch_size: The number of rows in a call. Default: all.
        seed: The seed of every image.
        progress: Whether to show a progress bar.
        inverted: The result of `invert` for an image, to apply the lens to that image. Omit the seed and the number
            of steps, see [inversion](../lenses/inversion.md).
        arguments: Arguments of the pipeline, and of the source's pipeline as far as it accepts them.

    Returns:
        The images by layer and word.

    Raises:
        InputError: Before anything is drawn, in all cases in which `diffusion_lens` raises it; also if words do not
            occur in their prompt or occur several times, a prompt is truncated, words have different numbers of tokens,
            the encoders have different widths and there is no map, or the map was not fitted for these layers.
    """
    origin = model if source_model is None else source_model
    _check_arguments(model, origin, source, target, seed, batch_size, align, mapping, arguments)
    check_options(encoder_patching, model, arguments)
    given = arguments if origin is model else known_to(origin, arguments)
    model.check(prompt=target, seed=seed, **arguments)  # before anything runs, and warns once
    origin.check(prompt=source, seed=seed, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        reading = record_encoding(model, target, arguments, seed)
        origin_reading = record_encoding(origin, source, given, seed)
        found = encoders_in(model, reading).choose(encoder)
        taken = choose_source(origin, origin_reading, found, source_encoder)
        pairs = choose_pairs(layers, source_layers, found, taken)
        check_used(model, found)
        into_side = _Side(model, found, reading, target, arguments, seed)
        from_side = _Side(origin, taken, origin_reading, source, given, seed)
        _check_states_fit(from_side, into_side, mapping, pairs)
        columns = find_columns(from_side.words(), into_side.words(), words, into, align)
        cells = [*_cells(from_side, pairs, columns, mapping, align)]
        if isolate:
            into_side, from_side = into_side.isolated(), from_side.isolated()
        plain, source_plain, *drawn = _draw(into_side, from_side, cells, batch_size, progress)
    width = len(columns)
    outputs = tuple(tuple(drawn[start : start + width]) for start in range(0, len(drawn), width))
    return EncoderPatchingResult(
        images=tuple(tuple(map(image_of, row)) for row in outputs),
        layers=tuple(layer for layer, _ in pairs),
        words=tuple(column.title for column in columns),
        source=source,
        target=target,
        seed=int(seed),
        model=model.source,
        arguments=arguments,
        source_image=image_of(source_plain),
        target_image=image_of(plain),
        encoder=found.name,
        source_encoder=taken.name,
        source_model=origin.source,
        source_layers=tuple(layer for _, layer in pairs),
        tokens=tuple(column.target for column in columns),
        source_tokens=tuple(column.source for column in columns),
        align=align,
        isolate=isolate,
        map_error=None if mapping is None else {(s, t): mapping.error[s, t] for t, s in pairs},
        outputs=outputs,
        rate=rate_of(model),
    )


def _check_arguments(
    model: Any,
    origin: Any,
    source: Any,
    target: Any,
    seed: Any,
    batch_size: int | None,
    align: str,
    mapping: Any,
    arguments: Mapping[str, Any],
) -> None:
    """Check whatever can be checked before the text encoders run."""
    check_call("encoder_patching", model, target, seed, batch_size, arguments)
    check_diffusion_model("encoder_patching", origin)
    check_prompt("encoder_patching", source)
    if align not in _ALIGN:
        raise InputError(f"align must be one of {', '.join(map(repr, _ALIGN))}, not {align!r}")
    if not isinstance(mapping, LinearMap | None):
        raise InputError(f"mapping must be a LinearMap or None, not {type(mapping).__name__}")
    other = next((name for name in arguments if re.fullmatch(r"prompt_\d+", name)), None)
    if other is not None:
        raise InputError(f"encoder_patching gives all encoders the same prompt: omit {other}")


@dataclass(frozen=True)
class _Side:
    """The source or the target: a text encoder, and its record for the prompt."""

    model: DiffusionModel
    encoder: Encoder
    reading: EncodingRecord
    prompt: str
    arguments: Mapping[str, Any]
    seed: int

    @property
    def encoding(self) -> EncoderRecord:
        return self.reading.encoders[self.encoder.name]

    @property
    def name(self) -> tuple[str, str]:
        return self.model.source, self.encoder.name

    def words(self) -> PromptWords:
        """Return the words of the prompt, after checking that the tokenizer does not truncate it."""
        check_whole(self.model, self.encoding, self.prompt)
        return words_read(self.model, self.encoding, self.prompt)

    def isolated(self) -> "_Side":
        """Return the side with an empty prompt for all other text encoders."""
        model, reading = isolated(self.model, self.encoder, self.reading, self.prompt, self.arguments, self.seed)
        return replace(self, model=model, reading=reading)

    def drawing(self, progress: bool, *others: "_Side") -> Drawing:
        """Return a drawing of the images of this side, together with those of other sides in the same calls.

        Raises BatchMismatchError if they cannot be drawn together."""
        sides = (self, *others)
        if any(side.model is not self.model or side.arguments is not self.arguments for side in sides):
            raise BatchMismatchError("the prompts are drawn by different pipelines")
        record, prompts = join_readings([side.reading for side in sides]), [side.prompt for side in sides]
        seeds = [self.seed] * len(sides)
        return Drawing(
            self.model, record, self.encoder.name, prompts, seeds, self.arguments, noun="images", progress=progress
        )


def _draw(
    target: _Side, source: _Side, cells: Sequence["_PatchedWord"], batch_size: int | None, progress: bool
) -> tuple[Any, ...]:
    """Return the images of the target, the source and the cells, drawn in the same calls if possible."""
    plain = _PatchedWord("target"), _PatchedWord("source")
    try:
        drawing = target.drawing(progress, source)
    except BatchMismatchError:
        drawing = target.drawing(progress)
        first, *drawn = drawing.draw(partial(_put, target.encoding), [plain[0], *cells], batch_size)
        return first, *source.drawing(progress).draw(lambda run, rows: None, plain[1:]), *drawn
    change = partial(_put, drawing.reading.encoders[target.encoder.name])
    return drawing.draw(change, [*plain, *cells], batch_size, [0, 1, *([0] * len(cells))])


def _check_states_fit(
    source: _Side, target: _Side, mapping: LinearMap | None, pairs: Iterable[tuple[Layer, Layer]]
) -> None:
    """Check that hidden states of the source fit into the target, through the map if there is one."""
    if mapping is not None:
        mapping.check(source.name, target.name, [(source_layer, layer) for layer, source_layer in pairs])
    elif source.encoder.width != target.encoder.width:
        raise InputError(
            f"{source.encoder.name} has {source.encoder.width} features and {target.encoder.name} "
            f"{target.encoder.width}: pass a map between them, "
            "mapping=LinearMap().fit(model, prompts, encoder=…, source_encoder=…)"
        )


@dataclass(frozen=True)
class _PatchedWord:
    """A row of the call: `state`, (tokens, features), replaces `tokens` at `layer`. None leaves the row unpatched."""

    title: str
    layer: Layer = EMBEDDING
    tokens: range = range(0)
    state: torch.Tensor | None = None

    def __str__(self) -> str:
        return self.title


def _cells(
    source: _Side,
    pairs: Iterable[tuple[Layer, Layer]],
    columns: Sequence[Column],
    mapping: LinearMap | None,
    align: str,
) -> Iterator[_PatchedWord]:
    """Yield a cell for each pair of layers and each column."""
    call = source.encoding.prompt
    for layer, source_layer in pairs:
        state = call.hidden(source_layer)[call.rows[0]]
        state = state if mapping is None else mapping(state, source_layer, layer)
        for column in columns:
            yield _PatchedWord(f"{column.title} at {layer}", layer, *column.aligned(state, align))


def _put(reading: EncoderRecord, run: DiffusionRun, cells: Rows[_PatchedWord]) -> None:
    """Put the cells' states into the rows of a batch, wherever the encoder reads the prompt."""
    part, ids = run[reading.name], reading.prompt.ids[reading.prompt.rows[0]]
    for number, call in calls_in(run, reading, cells):
        rows = [(place, cell) for place, row, cell in cells.of_call(call) if torch.equal(call.ids[row], ids)]
        for layer in in_model_order({cell.layer for _, cell in rows if cell.state is not None}):
            index, kind = layer_place(layer)
            point = part.layers[index].calls[number]
            value = getattr(point, kind)
            state = hidden_in(value).clone()
            for place, cell in rows:
                if cell.state is not None and cell.layer == layer:
                    state[place, cell.tokens.start : cell.tokens.stop] = cell.state.to(state)
            setattr(point, kind, state if kind == "input" else with_state(value, state))
