"""The attention modules of a pipeline's denoiser: which tokens and image positions attend to which.

    print(model.attentions)                     # everything that was found
    attention = model.attentions["unet.mid_block.attentions[0].transformer_blocks[0].attn2"]
    attention.kind, attention.heads             # "cross", 8
    attention.grid                              # (8, 8): rows and columns of the image positions among its queries
    attention.text["text_encoder"]              # the key of each token of this text encoder

Nothing is looked up by the name of a pipeline. For several images, different tokens and positions are changed in the
inputs of the denoiser and found again among its queries and keys, see `attention_search.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any
from weakref import WeakKeyDictionary

from PIL import Image
from torch import nn

from diffsight.errors import InputError, UnknownKeyError, suggest
from diffsight.extending import Model, Run, flow_of, join, model_of, owner_of
from diffsight.pipelines.attention.attention_modules import attentions_in, count_heads, why_hidden
from diffsight.pipelines.attention.attention_probabilities import AttentionProduct
from diffsight.pipelines.diffusion.attention_search import ImageSearch, as_range, text_keys
from diffsight.pipelines.diffusion.attention_tracing import AttentionTracer
from diffsight.pipelines.diffusion.batch_layouts import COND
from diffsight.pipelines.diffusion.cut_attention import Key, Trace
from diffsight.pipelines.diffusion.encoding import PLAIN_PROMPT, required_arguments
from diffsight.pipelines.diffusion.run import progress_bar


@dataclass(frozen=True)
class Attention:
    """An attention product in the denoiser.

    Attributes:
        name: The path of the module, followed by `.products[i]` if it makes several products in one call.
        kind: "self" (the image attends to itself), "cross" (the image attends to other things), "joint" (text and image
            in one product), "text" (none of its queries is a position of the image), "none" (it makes no product). With
            reference images, "the image" is the one that is drawn.
        heads: The number of heads.
        queries: The number of queries in the observed call.
        keys: The number of keys.
        image: Which queries are positions of the image; None if none are, or if their order was not found.
        image_keys: Which keys are positions of the image.
        references: Which queries are positions of reference images, which the denoiser sees beside the image that it
            draws; None if none are.
        grid: The numbers of rows and columns of image positions, preceded by the number of frames for a video.
        scale: How many rows of the latents one row of the grid covers.
        text: For each text encoder with tokens among the keys, the key of each token; None for tokens without a key.
        unplaced: What was not found, and why.
    """

    name: str
    kind: str
    heads: int
    queries: int
    keys: int
    image: range | None
    image_keys: range | None
    references: range | None
    grid: tuple[int, ...] | None
    scale: float | None
    text: Mapping[str, tuple[int | None, ...]] = field(repr=False)
    unplaced: str | None = None

    @property
    def path(self) -> str:
        """The path of the module."""
        return self.name.partition(".products[")[0]

    def __str__(self) -> str:
        parts = [f"{self.kind}, {self.heads} heads"]
        if self.grid is not None:
            parts.append("image " + " x ".join(map(str, self.grid)))
        if self.references is not None:
            parts.append(f"{len(self.references)} positions of reference images")
        parts += [f"{encoder}: {_shown(keys)}" for encoder, keys in self.text.items()]
        parts += [self.unplaced] if self.unplaced else []
        return f"{self.name}: " + "; ".join(parts)


class Attentions(Mapping[str, Attention]):
    """The attention products of a denoiser, by name, in the order in which they are made. `print` it to see them."""

    def __init__(self, pipeline: str, denoiser: str, attentions: Sequence[Attention]) -> None:
        self.denoiser = denoiser
        self._pipeline = pipeline
        self._attentions = {attention.name: attention for attention in attentions}

    def of_kind(self, *kinds: str) -> list[Attention]:
        """Return the products of the given kinds: "self", "cross", "joint", "text", "none"."""
        return [attention for attention in self.values() if attention.kind in kinds]

    def __getitem__(self, name: str) -> Attention:
        if name not in self._attentions:
            raise UnknownKeyError(f"{self._pipeline} has no attention {name!r}{suggest(str(name), self._attentions)}")
        return self._attentions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._attentions)

    def __len__(self) -> int:
        return len(self._attentions)

    def __repr__(self) -> str:
        return "\n".join([f"{self._pipeline}: {self.denoiser}", *(f"  {attention}" for attention in self.values())])


def find_attentions(model: Model, prompt: str | None = None, **arguments: Any) -> Attentions:
    """Return the attention products of the denoiser of a `DiffusionModel`.

    The pipeline draws about twenty images up to the first call of its denoiser, and a few for two steps. If they are
    small, it draws several in one run. The results for a pipeline are kept: later calls with inputs of the same length
    and size run up to the denoiser only once.

    Args:
        model: The model.
        prompt: The prompt. None stands for a plain prompt, if the pipeline takes one.
        arguments: Other arguments of the pipeline, such as a small `height` and `width`.

    Raises:
        InputError: The pipeline cannot be called with these arguments.
    """
    if prompt is not None or "prompt" in model.argument_names:
        arguments["prompt"] = PLAIN_PROMPT if prompt is None else prompt
    with progress_bar(model.pipeline, disable=True):
        return _found(model, arguments)


_known: WeakKeyDictionary = WeakKeyDictionary()  # for each pipeline: the results, by the inputs of its denoiser


def known_attentions(run: Run) -> Attentions | None:
    """Return the attention products of the denoiser in a run that has not begun, or None if `find_attentions` has not
    been called for such inputs. The run then stands at its denoiser."""
    model = model_of(run)
    return _known.get(model.pipeline, {}).get(AttentionTracer(model, {}).inputs_of(run))


def _found(model: Model, arguments: Mapping[str, Any]) -> Attentions:
    known = _known.setdefault(model.pipeline, {})
    required = required_arguments(model.pipeline)
    images = {name: value for name, value in required.items() if isinstance(value, Image.Image)}
    for stand_ins in (required.keys() - images.keys(), required.keys()):  # an image only if it is needed
        try:
            tracer = AttentionTracer(model, {name: required[name] for name in stand_ins} | arguments)
            inputs = tracer.inputs()
            if inputs in known:
                return known[inputs]
            plain = tracer.trace()
        except Exception as error:
            first = error
        else:
            known[inputs] = _searched(model, tracer, plain)
            return known[inputs]
    name = type(model.pipeline).__name__
    raise InputError(
        f"{name} cannot be called with these arguments and its defaults ({first}). Pass what it needs, as in "
        'find_attentions(model, "a red circle", height=64)'
    ) from first


def _searched(model: Model, tracer: AttentionTracer, plain: Mapping[Key, Trace]) -> Attentions:
    image = ImageSearch(tracer, plain)
    text = {name: text_keys(tracer, name, plain, image.keys) for name in tracer.tokens}
    several = {path for path, number in plain if number}
    found = [_attention(tracer.denoiser, key, plain[key], image, text, key[0] in several) for key in plain]
    paths = {path for path, _ in plain}
    others = attentions_in(owner_of(model[tracer.denoiser])).items()
    found += [_without_product(tracer.denoiser, path, module) for path, module in others if path not in paths]
    return Attentions(type(model.pipeline).__name__, tracer.denoiser, found)


def follow_products(
    run: Run, attentions: Sequence[Attention], function: Callable[[Attention, int, AttentionProduct], None]
) -> None:
    """Call `function` for every product that the model makes from now on.

    Its arguments are the attention, the number of the denoising step, and the conditional branch of the product."""
    flow = flow_of(run)
    denoiser = owner_of(model_of(run)[attentions[0].name.partition(".")[0]])  # once: this is slow

    def follow(attention: Attention, value: AttentionProduct) -> None:
        entries = flow.observer.entries(denoiser, COND)
        if entries is None or (entries and entries[-1] >= len(value.q)):
            raise InputError(f"{attention.name}: it is not known which part of the batch is the conditional branch")
        if not entries:
            return
        if value.shape[1:] != (attention.heads, attention.queries, attention.keys):
            raise InputError(
                f"{attention.name} makes another product in step {flow.clock.index} than in the first call, for which "
                f"tokens and positions were found: {_sizes(*value.shape[1:])}, not "
                f"{_sizes(attention.heads, attention.queries, attention.keys)}. Choose steps or layers without it"
            )
        function(attention, flow.clock.index, value.part(entries))

    for attention in attentions:
        run.follow(f"{attention.name}.attention_product", partial(follow, attention))


def _attention(
    denoiser: str, key: Key, trace: Trace, image: ImageSearch, text: Mapping[str, Mapping], is_one_of: bool
) -> Attention:
    queries, keys = image.queries[key], image.keys[key]
    found = {encoder: of[key] for encoder, of in text.items() if key in of}
    name = reduce(join, key[0].split("."), denoiser) + (f".products[{key[1]}]" if is_one_of else "")
    grid, reason = image.grid(key)
    kind = "text" if not len(queries) else "self" if len(keys) and not found else "joint" if len(keys) else "cross"
    if kind == "cross" and not found:
        reason = "; ".join(filter(None, (reason, "its keys are neither text nor the image")))
    heads, rows, columns = trace.shape[1:]
    is_placed = grid is not None
    return Attention(
        name,
        kind,
        heads,
        rows,
        columns,
        as_range(queries) if is_placed else None,
        as_range(keys),
        as_range(image.references[key]),
        grid,
        image.height / grid[-2] if is_placed else None,
        found,
        reason,
    )


def _without_product(denoiser: str, path: str, module: nn.Module) -> Attention:
    reason = why_hidden(module)
    reason = reason or f"{type(module).__name__} makes no product with a softmax in this call, such as linear attention"
    name, heads = reduce(join, path.split("."), denoiser), count_heads(module) or 0
    return Attention(name, "none", heads, 0, 0, None, None, None, None, None, {}, reason)


def _sizes(heads: int, queries: int, keys: int) -> str:
    return f"{heads} heads, {queries} queries and {keys} keys"


def _shown(keys: Sequence[int | None]) -> str:
    """Return the keys of tokens in words."""
    known = [(token, key) for token, key in enumerate(keys) if key is not None]
    (first, start), (last, stop) = known[0], known[-1]
    if last - first == stop - start == len(known) - 1:
        return f"tokens {first} to {last} at keys {start} to {stop}"
    return f"{len(known)} tokens from {first} to {last} at keys between {start} and {stop}"
