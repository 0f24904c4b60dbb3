"""Cross-encoder patching: what a word's hidden state, taken from one prompt's encoding, does in another prompt's.

    result = encoder_patching(model, "a red circle above a green square", "a red square above a green square",
                              words="circle")
    result.grid().save("patching.png")

The hidden states of the source prompt's tokens at a layer take the place of those of the target prompt's tokens; the
layers behind, and all of the pipeline, go on with them. A picture for each layer and each word (or token) shows where
in the encoder the word is, and what of it has gone over to its neighbours by then. It is what two runs in lockstep do,

    with model.generate(source, seed=0) as x, model.generate(target, seed=0) as y:
        y.cond.text_encoder.layers[4].output[:, 3] = x.cond.text_encoder.layers[4].output[:, 3]
        x.stop()

for all layers and words in as few calls of the pipeline as can be: the source is encoded once.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import diffsight
from diffsight.errors import InputError
from diffsight.lenses.encoders.checks import check_call, check_model, check_prompt, check_seen, check_whole
from diffsight.lenses.encoders.drawing import Drawing, calls_in, places, with_state
from diffsight.lenses.encoders.isolating import isolated
from diffsight.lenses.encoders.pairing import choose_pairs, choose_source, known_to, words_read
from diffsight.lenses.linear_map import LinearMap
from diffsight.lenses.results.outputs import files_of, picture_of, rate_of
from diffsight.lenses.results.saving import save_files, write_record
from diffsight.pipelines.diffusion.encoder_calls import EncoderRecord, hidden_in
from diffsight.pipelines.diffusion.encoding import record_encoding
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.prompts import PromptWarning
from diffsight.pipelines.diffusion.run import DiffusionRun
from diffsight.pipelines.diffusion.text_encoders import Encoder, encoders_in
from diffsight.pipelines.words import PromptWords

Words = str | int | range
_ALIGN = ("each", "last", "mean")
_CELL, _ACROSS = 128, 7  # pixels of a picture in a grid, and pictures beside each other where there is one word


@dataclass(frozen=True)
class EncoderPatchingResult:
    """Pictures by layer and word. `images[i][j]` was drawn with the source's hidden states of `words[j]`, its tokens
    `source_tokens[j]`, at layer `source_layers[i]`, in the place of the target's tokens `tokens[j]` at layer
    `layers[i]`, where 0 is the embedding. `source_image` and `target_image` are drawn from the prompts as they are.

    `outputs` are what the pipeline made, as in `DiffusionLensResult`; `map_error` is the fit error of the linear map
    between the encoders, by source layer and layer, where there is one."""

    images: tuple[tuple[Image.Image, ...], ...] = field(repr=False)
    layers: tuple[int, ...]
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
    source_layers: tuple[int, ...] = field(repr=False)
    tokens: tuple[range, ...] = field(repr=False)
    source_tokens: tuple[range, ...] = field(repr=False)
    align: str = "each"
    isolate: bool = False
    map_error: Mapping[tuple[int, int], float] | None = field(default=None, repr=False)
    outputs: tuple[tuple[Any, ...], ...] = field(default=(), repr=False)
    rate: int | None = field(default=None, repr=False)

    def grid(self) -> Image.Image:
        """All pictures in one: a row a layer, a column a word; and those of both prompts as they are."""
        names = [
            f"layer {layer}" if layer == origin else f"layer {origin} → {layer}"
            for layer, origin in zip(self.layers, self.source_layers)
        ]
        title = f"“{self.source}” into “{self.target}” (seed {self.seed})"
        plain, captions = [self.target_image, self.source_image], ["target as it is", "source as it is"]
        if len(self.words) == 1:
            images, titles = [*plain, *(row[0] for row in self.images)], [*captions, *names]
            columns, title = min(len(images), _ACROSS), f"{title}: {self.words[0]}"
            return diffsight.image_grid(images, titles=titles, title=title, columns=columns, cell=_CELL)
        width = max(2, len(self.words))
        return diffsight.image_grid(
            [*self.images, plain],
            titles=[*([None] * len(row) for row in self.images), captions],
            row_titles=[*names, None],
            column_titles=[*self.words, *[None] * (width - len(self.words))],
            title=title,
            cell=_CELL,
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `grid.png`, `source.png`, `target.png`, a picture a cell (layer 4, second word: `layer_04_02.png`;
        with a video `.gif`, with a sound `.wav`) and `lens.json`, which records how they were made; gives the paths.
        All files are written or none."""
        files = {"grid.png": self.grid().save, "source.png": self.source_image.save}
        files["target.png"] = self.target_image.save
        for layer, images, outputs in zip(self.layers, self.images, self.outputs):
            for column, (image, output) in enumerate(zip(images, outputs), 1):
                name = f"layer_{layer:02}_{column:02}"
                files |= {f"{name}.png": image.save} | files_of(name, output, self.rate)
        kept = ("model", "source", "target", "seed", "encoder", "source_encoder", "source_model", "align", "isolate")
        record = {"lens": "encoder_patching"} | {name: getattr(self, name) for name in kept}
        record |= {name: list(getattr(self, name)) for name in ("layers", "source_layers", "words")}
        record |= {name: [list(span) for span in getattr(self, name)] for name in ("tokens", "source_tokens")}
        record["map_error"] = None if self.map_error is None else [[*k, v] for k, v in self.map_error.items()]
        record["arguments"] = dict(self.arguments)
        return save_files(folder, files | {"lens.json": partial(write_record, record)})

    def _repr_png_(self) -> bytes:
        return self.grid()._repr_png_()


def encoder_patching(
    model: DiffusionModel,
    source: str,
    target: str,
    *,
    words: Words | Sequence[Words] | None = None,
    into: Words | Sequence[Words] | None = None,
    layers: int | slice | Iterable[int] | None = None,
    source_layers: int | Sequence[int] | None = None,
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
    """Draws `target` with hidden states of `source` put into its text encoder: a picture for each layer and word.

        encoder_patching(model, "a red circle", "a blue square", words=["red", "circle"], layers=range(0, 13, 3))
        encoder_patching(model, "a red circle", "a big blue square", words="circle", into="square")
        encoder_patching(sdxl, p, q, words="cat", encoder="text_encoder", source_encoder="text_encoder_2",
                         mapping=LinearMap().fit(sdxl, prompts, encoder=…, source_encoder=…))
        encoder_patching(base, p, p, words="cat", source_model=finetuned)

    The pictures, and that of `target` as it is, are rows of one call of the pipeline, or of as many as `batch_size`
    (rows a call) makes of them; where a pipeline cannot do that, each has a call of its own, and a LensWarning says so.
    A row's picture is that of its own call within rounding, 2 of 255 a pixel; with `batch_size=1` bit for bit.

    Args:
        words: What is taken from the source, each a column: a word, or several that follow each other; or a token's
            number, or a range of them, as the encoder is given them. None: every token of the prompt.
        into: What they take the place of in the target, one for each of `words`. None: the words with the same place
            among the prompt's words, for tokens the same numbers.
        layers: Of the target's encoder, numbered as transformers numbers hidden states: 0 is the embedding, k what
            layer k gives. None is all of them up to the last that the pipeline makes use of.
        source_layers: Of the source's encoder, one for each of `layers`, or one for all. None: the same numbers.
        encoder: Name of the text encoder that is patched. None: the first whose tokens the pipeline takes.
        source_encoder: Name of the one that the states come from. None: the same name.
        source_model: The pipeline that the source is encoded by, such as another fine-tune. None: `model`.
        mapping: Takes the states of the source's encoder to those of the target's; needed where their widths differ.
        align: Where words have more tokens in one prompt than in the other. "each": token by token, and an error where
            they differ; "last": the last token alone; "mean": the mean of the source's tokens in each of the target's.
        isolate: Gives the other encoders an empty prompt; else they read the target.
        batch_size: Rows a call; None is all in one.
        arguments: Of the pipeline, and of the source's, as far as it takes them.

    Raises InputError, before any picture is made, for what diffusion_lens does, words that do not occur in their prompt
    (saying which do) or occur several times, prompts of which something is cut, words of different length, encoders of
    different width without a map, and a map that was not fitted for these layers."""
    origin = model if source_model is None else source_model
    check_call("encoder_patching", model, target, seed, batch_size, arguments)
    check_model("encoder_patching", origin)
    check_prompt("encoder_patching", source)
    if align not in _ALIGN:
        raise InputError(f"align is {', '.join(map(repr, _ALIGN))}, not {align!r}")
    if not isinstance(mapping, LinearMap | None):
        raise InputError(f"mapping is a LinearMap, or None, not {type(mapping).__name__}")
    other = next((name for name in arguments if re.fullmatch(r"prompt_\d+", name)), None)
    if other is not None:
        raise InputError(f"encoder_patching gives all encoders the same prompt: leave {other} out")
    given = arguments if origin is model else known_to(origin, arguments)
    model.generate(prompt=target, seed=seed, **arguments)  # checks everything, and warns once, before anything runs
    origin.generate(prompt=source, seed=seed, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        reading, origin_reading = (
            record_encoding(model, target, arguments, seed),
            record_encoding(origin, source, given, seed),
        )
        found = encoders_in(model, reading).choose(encoder)
        taken = choose_source(origin, origin_reading, found, source_encoder)
        pairs = choose_pairs(layers, source_layers, found, taken)
        check_seen(model, found)
        if mapping is None:
            _check_widths(taken, found)
        else:
            ends = (origin.source, taken.name), (model.source, found.name)
            mapping.check(*ends, [(source_layer, layer) for layer, source_layer in pairs])
        read_in, read_out = reading.encoders[found.name], origin_reading.encoders[taken.name]
        check_whole(model, read_in, target)
        check_whole(origin, read_out, source)
        columns = _columns(words_read(origin, read_out, source), words_read(model, read_in, target), words, into, align)
        cells = [_Cell("target")]
        for layer, source_layer in pairs:
            state = read_out.prompt.states[source_layer][read_out.prompt.rows[0]]
            state = state if mapping is None else mapping(state, source_layer, layer)
            cells += [_Cell(f"{c.title} at {layer}", layer, *_aligned(c, state, align)) for c in columns]
        if isolate:
            model, reading = isolated(model, found, reading, target, arguments, seed)
            origin, origin_reading = isolated(origin, taken, origin_reading, source, given, seed)
        kept = {"noun": "pictures", "progress": progress}
        drawing = Drawing(model, reading, found.name, target, seed, arguments, **kept)
        plain, *made = drawing.draw(partial(_put, read_in), cells, batch_size)
        drawing = Drawing(origin, origin_reading, taken.name, source, seed, given, **kept)
        source_plain = drawing.draw(lambda run, items: None, ["source"])[0]
    width = len(columns)
    outputs = tuple(tuple(made[start : start + width]) for start in range(0, len(made), width))
    return EncoderPatchingResult(
        tuple(tuple(map(picture_of, row)) for row in outputs),
        tuple(layer for layer, _ in pairs),
        tuple(column.title for column in columns),
        source,
        target,
        int(seed),
        model.source,
        arguments,
        picture_of(source_plain),
        picture_of(plain),
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


def _check_widths(source: Encoder, target: Encoder) -> None:
    """Whether states of the source's encoder fit into the target's as they are."""
    if source.width != target.width:
        raise InputError(
            f"{source.name} has {source.width} features and {target.name} {target.width}: between them mapping= is "
            "needed, LinearMap().fit(model, prompts, encoder=…, source_encoder=…)"
        )


# ---- what is put where


@dataclass(frozen=True)
class _Cell:
    """A row of the call: `state`, (tokens, features), in the place of `tokens` at `layer`; None is as it is."""

    title: str
    layer: int = 0
    tokens: range = range(0)
    state: torch.Tensor | None = None

    def __str__(self) -> str:
        return self.title


def _put(reading: EncoderRecord, run: DiffusionRun, cells: Sequence[_Cell]) -> None:
    """Puts the cells' states into the rows of a batch, wherever the encoder reads the prompt."""
    part, ids = run[reading.name], reading.prompt.ids[reading.prompt.rows[0]]
    for number, call in calls_in(run, reading, len(cells)):
        rows = [(place, cell) for place, row, cell in places(call, cells) if torch.equal(call.ids[row], ids)]
        for layer in sorted({cell.layer for _, cell in rows if cell.state is not None}):
            point = part.layers[max(layer - 1, 0)].calls[number]
            value = point.output if layer else point.input
            state = hidden_in(value).clone()
            for place, cell in rows:
                if cell.state is not None and cell.layer == layer:
                    state[place, cell.tokens.start : cell.tokens.stop] = cell.state.to(state)
            if layer:
                point.output = with_state(value, state)
            else:
                point.input = state


@dataclass(frozen=True)
class _Column:
    """Tokens of the source that go into the place of tokens of the target."""

    title: str
    source: range
    target: range


def _aligned(column: _Column, state: torch.Tensor, align: str) -> tuple[range, torch.Tensor]:
    """The tokens of the target, and what goes there of the source's `state`, (tokens, features)."""
    taken, tokens = state[column.source.start : column.source.stop], column.target
    if align == "last":
        return tokens[-1:], taken[-1:]
    return tokens, taken.mean(0, keepdim=True) if align == "mean" else taken


def _columns(source: PromptWords, target: PromptWords, words: Any, into: Any, align: str) -> list[_Column]:
    pairs = list(_pairs(source, target, words, into))
    for item, taken, place in pairs:
        if align == "each" and len(taken) != len(place):
            raise InputError(
                f"{_shown(item)} is {len(taken)} tokens of the source, in the place of {len(place)} of the target, "
                f'{target.text(place)!r}: take align="last" or "mean", or words of as many tokens'
            )
    return [_Column(_title(source.text(taken), target.text(place)), taken, place) for _, taken, place in pairs]


def _pairs(source: PromptWords, target: PromptWords, words: Any, into: Any) -> Iterable[tuple[Words, range, range]]:
    """What is taken, its tokens in the source, and those that it takes the place of in the target."""
    if words is None:
        if into is not None:
            raise InputError("into says where words go: say which with words=")
        sizes = len(source.tokens), len(target.tokens)
        if sizes[0] != sizes[1]:
            raise InputError(
                f"the prompts are {sizes[0]} and {sizes[1]} tokens long, so that they do not go into each other's "
                "places: say what goes where with words= and into="
            )
        for a, b in zip(source.tokens, target.tokens):
            yield a, range(a, a + 1), range(b, b + 1)
        return
    words, into = _listed("words", words), None if into is None else _listed("into", into)
    if into is not None and len(into) != len(words):
        raise InputError(f"into has {len(into)} items for {len(words)} words: give one for each")
    for i, item in enumerate(words):
        yield item, _tokens(source, item), _tokens(target, into[i]) if into else _same_place(source, target, item)


def _same_place(source: PromptWords, target: PromptWords, item: Words) -> range:
    """Where in the target something lies that is at this place in the source."""
    if not isinstance(item, str):
        return _tokens(target, item)
    if len(source.words) != len(target.words):
        raise InputError(
            f"the prompts have {len(source.words)} and {len(target.words)} words (marks among them), so it cannot be "
            f"told where {item!r} goes: say it with into="
        )
    return target.span(*source.place(item))


def _tokens(prompt: PromptWords, item: Words) -> range:
    if isinstance(item, str):
        return prompt[item]
    tokens = range(int(item), int(item) + 1) if not isinstance(item, range) else item
    if not tokens or tokens.step != 1 or tokens.start < 0 or tokens.stop > len(prompt.ids):
        raise InputError(
            f"there are no tokens {item!r}: {prompt.prompt!r} is read as tokens 0 to {len(prompt.ids) - 1}"
        )
    return tokens


def _listed(name: str, items: Any) -> list[Words]:
    listed = list(items) if isinstance(items, (list, tuple)) else [items]
    for item in listed:
        is_number = hasattr(item, "__index__") and not isinstance(item, bool)
        if not (isinstance(item, (str, range)) or is_number):
            raise InputError(f"{name} are words, token numbers or ranges of them, not {item!r}")
    if not listed:
        raise InputError(f"{name} is empty: give at least one")
    return listed


def _title(taken: str, place: str) -> str:
    return taken if taken == place else f"{taken} → {place}"


def _shown(item: Words) -> str:
    return repr(item) if isinstance(item, (str, range)) else f"token {item}"
