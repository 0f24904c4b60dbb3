"""The sites that a user's names and patterns stand for.

find_sites(model, "heads", layers=[0, 5])           # heads_output of layers 0 and 5
find_sites(model, ["attentions", "mlps"])           # of all layers of a language model
find_sites(model, "unet.**.attn2")                  # the outputs of modules of any model
find_sites(model, "layers[*].self_attn.q")          # a value of an attention
find_sites(model, "transformer.transformer_blocks[*].output[1]")        # one of several tensors
for_each_head(sites, {"layers[0].self_attn.heads_output": 12})
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffsight.errors import InputError, PointNotFoundError, suggest
from diffsight.lenses.layers import EMBEDDING, Layer, Layers, choose_layers, in_model_order, layer_place
from diffsight.lenses.sites.site import Site
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.numbers import as_integer, unpacked

Sites = str | Sequence[str]
NAMED = {  # the point of a layer that a name stands for
    "layers": "layers[{}].output",
    "attentions": "layers[{}].self_attn.output",
    "mlps": "layers[{}].mlp.output",
    "heads": "layers[{}].self_attn.heads_output",
    "q": "layers[{}].self_attn.q",
    "k": "layers[{}].self_attn.k",
    "v": "layers[{}].self_attn.v",
    "attention_probs": "layers[{}].self_attn.attention_probs",
}
_ITEM = re.compile(r"(?<=\.output)\[\d+\]$")  # the number of a tensor in a tuple
BY_HEAD = ("heads", "q", "k", "v", "attention_probs")
BY_TOKEN = ("layers", "attentions", "mlps")


def find_sites(model: Any, sites: Sites, layers: Layers = None) -> list[Site]:
    """Return the sites that names and patterns stand for, each once.

    Args:
        model: The model.
        sites: One or several of "layers", "attentions", "mlps", "heads", "q", "k", "v", "attention_probs" of a language
            model, or paths and patterns of points of any model.
        layers: The layers that the names refer to. Default: all. "embedding" is for "layers" only.

    Raises:
        InputError: A name does not exist or does not fit the model, or a layer does not exist.
        PointNotFoundError: A pattern matches nothing.
    """
    items = [sites] if isinstance(sites, str) or not isinstance(sites, Iterable) else list(sites)
    if not items:
        raise InputError(f"no sites are chosen: pass one of {', '.join(NAMED)}, or the path of a point")
    wrong = next((item for item in items if not isinstance(item, str)), None)
    if wrong is not None:
        raise InputError(f"a site is a name such as 'layers', or the path of a point, not {wrong!r}")
    if layers is not None and not any(item in NAMED for item in items):
        raise InputError(f"`layers` belongs to the sites {', '.join(NAMED)}: write the layers into the path instead")
    found: dict[Site, None] = {}
    for item in items:
        found |= dict.fromkeys(_named(model, item, layers) if item in NAMED else _matching(model, item))
    return list(found)


def for_each_head(
    sites: Iterable[Site], counts: Mapping[str, int], heads: int | Iterable[int] | None = None
) -> list[Site]:
    """Return the sites, with one site for each head at the points that have heads.

    Args:
        sites: The sites.
        counts: The number of heads at a point, by its path.
        heads: The heads. Default: all.

    Raises:
        InputError: A head does not exist.
    """
    heads = unpacked(heads)
    chosen = None if heads is None else list(heads) if isinstance(heads, Iterable) else [heads]
    if chosen is not None and not counts:
        raise InputError("none of the sites has heads: omit `heads`")
    found = []
    for site in sites:
        if site.point not in counts:
            found.append(site)
            continue
        count = counts[site.point]
        for head in range(count) if chosen is None else chosen:
            number = as_integer(head)
            if number is None or not -count <= number < count:
                raise InputError(f"there is no head {head!r} at {site.point}, which has {count} (0 to {count - 1})")
            found.append(replace(site, head=number % count))
    return list(dict.fromkeys(found))


def layer_of(model: LanguageModel, site: Site) -> Layer | None:
    """Return the number of the layer that a point of a language model is in, or None if it is outside the layers."""
    return model.layer_of(site.module) if site.layer is None else site.layer


def _named(model: Any, name: str, layers: Layers) -> list[Site]:
    if not isinstance(model, LanguageModel):
        raise InputError(
            f"sites: {name!r} names points of a language model, and this is a {type(model).__name__}: write the paths "
            'of points, such as "unet.**.attn2"'
        )
    chosen = choose_layers(slice(None) if layers is None else layers, len(model.layers_output))
    if EMBEDDING in chosen and name != "layers":
        raise InputError(f'sites: "embedding" is the input of the first layer, which has no {name}')
    return [_of_layer(name, layer) for layer in in_model_order(chosen)]


def _of_layer(name: str, layer: Layer) -> Site:
    index, part = layer_place(layer)
    return Site(f"layers[{index}].input" if part == "input" else NAMED[name].format(index), layer)


def _matching(model: Any, pattern: str) -> list[Site]:
    try:
        item = _ITEM.search(pattern)
        points = model.find_points(pattern.removesuffix(item[0]) if item else pattern)
        return [Site(point + (item[0] if item else "")) for point in points]
    except PointNotFoundError as error:
        hint = suggest(pattern, NAMED)
        raise PointNotFoundError(f"sites: {error}{'' if 'did you mean' in str(error) else hint}") from None
