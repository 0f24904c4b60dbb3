"""Standard names: the same names for the parts of every transformer, whatever the architecture calls them.

    names = model_names(GPT2LMHeadModel(config))
    {"layers": "transformer.h", "ln_final": "transformer.ln_f", "lm_head": "lm_head", "embed_tokens": "transformer.wte"}

    layer_names(BartDecoderLayer(config))
    {"self_attn": "self_attn", "mlp": "fc1:fc2"}

The parts are found by structure, not in a table of architectures. The layers are the outermost and largest list of
modules next to the word embeddings. The final norm is the nearest norm beside that list, searching outwards from the
layers. The head is everything from the trunk to the output embeddings. Where no single module corresponds to a name,
its real path is a span, `first:last`: two modules that together are what the name means.

Layers are numbered as in `layers[i]`: layer *i* is the output of `layers[i]`, layer -1 that of the last layer, and the
input of the first layer is "embedding".
"""

import re
from itertools import islice
from typing import Literal

from torch import nn

from diffsight.extending import unwrapped, wrapped_path

EMBEDDING = "embedding"  # denotes the input of the first layer, wherever a layer can be passed
Layer = int | Literal["embedding"]

_ATTENTION = re.compile(r"(self_?)?(attn|attention|att)|rel_attn|multi_head_attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn?|densereludense|.*_moe|moe", re.IGNORECASE)
_MIXER_CLASS = re.compile(
    r"attention(?!residual|output)|attn|mixer|mamba|delta|conv|recurrent|lstmlayer", re.IGNORECASE
)
_MLP_CLASS = re.compile(r"mlp|feedforward|ffn|moe(?!del)|experts", re.IGNORECASE)
_NOT_SELF = re.compile(r"cross|encoder_attn|crossattention|EncDec|norm|hc$|_input$|_convolution$|sconv$", re.IGNORECASE)
_SPANS = (("fc1", "fc2"), ("linear1", "linear2"), ("lin1", "lin2"), ("intermediate", "output.dense"))
# Exceptions: names that mean the opposite of what they mean elsewhere.
_FINAL_NORMS_NAMED_EMBEDDING = {"embedding_norm", "emb_layer_norm_after"}  # LFM2, ESM: the final norm
_FINAL_NORM_OF = {"BigBirdPegasusDecoder": "layernorm_embedding"}  # elsewhere it normalizes the embeddings
_ATTENTIONS_NAMED_NORM = {"norm_attn_norm"}  # DBRX: contains the attention and the norms around it


def model_names(model: nn.Module) -> dict[str, str]:
    """Return the standard names of a whole model, name to real path: `layers`, `ln_final`, `embed_tokens`, `lm_head`.

    In an encoder-decoder model these names refer to the decoder, and `encoder` and `decoder` are included. Parts that
    are not found are left out."""
    if wrapped_path(model):
        return {name: _below(wrapped_path(model), real) for name, real in model_names(unwrapped(model)).items()}
    halves = {half: path for half in ("encoder", "decoder") if (path := _half(model, half))}
    trunk = halves.get("decoder", "") if len(halves) == 2 else ""
    found = standard_names(model.get_submodule(trunk))
    names = {name: _below(trunk, path) for name, path in found.items()}
    words = _words_of(model, names.get("layers", ""))
    if words is not None and not isinstance(words, nn.ModuleList):  # audio models have one per codebook
        names["embed_tokens"] = path_of(model, words)
    head = _head(model, names.get("layers", ""))
    if head:
        names["lm_head"] = head
        if _is_within(model, names.get("ln_final", ""), head):  # DistilBERT: a norm inside the head
            del names["ln_final"]
    return names | (halves if len(halves) == 2 else {})


def standard_names(encoder: nn.Module) -> dict[str, str]:
    """Return the standard names below `encoder`, name to real path.

    For example `{"layers": "encoder.layers", "ln_final": "final_layer_norm"}`. Parts that are not found are left
    out."""
    if wrapped_path(encoder):
        return {name: _below(wrapped_path(encoder), real) for name, real in standard_names(unwrapped(encoder)).items()}
    lists = {path: module for path, module in encoder.named_modules() if path and is_list(module)}
    if not lists:
        return {}
    lists = _beside_words(encoder, lists)
    lists = {path: module for path, module in lists.items() if are_layers(module)} or lists
    lists = {path: module for path, module in lists.items() if "cross" not in path.rpartition(".")[2]} or lists
    depth = min(path.count(".") for path in lists)
    outermost = [path for path in lists if path.count(".") == depth]
    size = lambda path: sum(weight.numel() for weight in lists[path].parameters())  # noqa: E731
    layers = max(outermost, key=size) if len(outermost) > 1 else outermost[0]
    norm = _norm_beside(encoder, layers)
    return {"layers": layers} | ({"ln_final": norm} if norm else {})


def layer_names(layer: nn.Module) -> dict[str, str]:
    """Return the standard names within a layer, name to real path: `self_attn` and `mlp`.

    `self_attn` is whatever mixes the positions: an attention module, or Mamba or a convolution in its place."""
    if wrapped_path(layer):
        return {name: _below(wrapped_path(layer), real) for name, real in layer_names(unwrapped(layer)).items()}
    names = {}
    attention = _part(layer, _ATTENTION, _MIXER_CLASS)
    if attention:
        names["self_attn"] = attention
    mlp = _part(layer, _MLP, _MLP_CLASS)
    if mlp and mlp != attention:
        names["mlp"] = mlp
    else:
        span = next((span for span in _SPANS if all(_has(layer, path) for path in span)), None)
        names |= {"mlp": ":".join(span)} if span else {}
    return names


# ---- in a model


def _below(outer: str, real: str) -> str:
    """Prefix a real path or span, relative to the module at `outer`, with `outer`."""
    return ":".join(f"{outer}.{path}" if outer else path for path in real.split(":"))


def is_list(module: nn.Module) -> bool:
    """Return whether a module is a non-empty list of modules."""
    return isinstance(module, nn.ModuleList) and len(module) > 0


def are_layers(modules: nn.ModuleList) -> bool:
    """Return whether each module contains an attention module (or a replacement for one) and is not one itself."""
    inner = (islice(layer.modules(), 1, None) for layer in modules)
    return all(any(_MIXER_CLASS.search(type(module).__name__) for module in layer) for layer in inner)


def _half(model: nn.Module, half: str) -> str | None:
    """Return the path of the encoder or decoder, if the model has both."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    module = getattr(model, f"get_{half}")() if hasattr(model, f"get_{half}") else None
    return path_of(model, module) if module is not model else None


def embeddings(model: nn.Module) -> nn.Module | None:
    """Return the module that turns token ids into vectors, or None."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def word_embeddings(module: nn.Module) -> list[str]:
    """Return the paths of the modules that may receive token ids.

    T5 has a copy of the word embedding in its encoder and calls this copy."""
    tables = {path: part for path, part in module.named_modules() if isinstance(part, nn.Embedding)}
    sizes = [part.num_embeddings for path, part in tables.items() if "position" not in path]
    size = getattr(embeddings(module), "num_embeddings", max(sizes, default=0))
    return [path for path, part in tables.items() if part.num_embeddings == size]


def path_of(model: nn.Module, module: nn.Module | None) -> str:
    """Return the path of a module in a model, or an empty string if the model does not contain it."""
    return next((path for path, known in model.named_modules(remove_duplicate=False) if known is module), "")


def _words_of(model: nn.Module, layers: str) -> nn.Module | None:
    """Return the word embeddings nearest to the layers. T5 has another table around its encoder that it never calls."""
    outer = layers
    while outer:
        outer = outer.rpartition(".")[0]
        words = embeddings(model.get_submodule(outer))
        if words is not None:
            return words
    return embeddings(model)


def _head(model: nn.Module, layers: str) -> str | None:
    """Return the path of the head: everything after the trunk, up to the output embeddings.

    Without output embeddings the head is the only module after the trunk. If the trunk is a whole language model with
    output embeddings, the head is the trunk's head."""
    children = [name for name, _ in model.named_children()]
    trunk, _, inner = layers.partition(".")
    if trunk not in children or not inner:
        return None
    says = hasattr(model, "get_output_embeddings")
    output = model.get_output_embeddings() if says else None
    if isinstance(output, nn.ModuleList):  # audio models have one per codebook
        return None
    behind = [
        name
        for name in children[children.index(trunk) + 1 :]
        if (output is not None or not says)  # otherwise a pooler, norm or classifier follows
        and not isinstance(model.get_submodule(name), nn.ModuleList)
        and any(True for _ in model.get_submodule(name).parameters())
    ]
    holder = path_of(model, output).split(".")[0] if output is not None else ""
    if holder == trunk or not (holder or behind):
        found = _head(model.get_submodule(trunk), inner)
        return _below(trunk, found) if found else None
    if not holder:
        return behind[0] if len(behind) == 1 else None
    first = behind[0] if holder in behind else holder
    return holder if first == holder else f"{first}:{holder}"


def _is_within(model: nn.Module, path: str, span: str) -> bool:
    """Return whether the module at a path lies inside a span of the model's children."""
    children = [name for name, _ in model.named_children()]
    first, _, last = span.partition(":")
    if not last or path not in children or first not in children or last not in children:
        return False
    return children.index(first) < children.index(path) < children.index(last)


def _beside_words(encoder: nn.Module, lists: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """Return the lists next to the word embeddings. This excludes lists in the vision tower of a vision-language
    encoder."""
    words = embeddings(encoder)
    path = path_of(encoder, words) if words is not None else next(iter(word_embeddings(encoder)), "")
    near = path.rpartition(".")[0]
    while near and not any(path.startswith(f"{near}.") for path in lists):
        near = near.rpartition(".")[0]
    return {path: module for path, module in lists.items() if not near or path.startswith(f"{near}.")}


def _norm_beside(encoder: nn.Module, path: str) -> str | None:
    """Return the path of the norm nearest to the module at `path`: the first one declared after it, or else before it.

    The search goes through its siblings, then its parent's siblings, and so on. Norms of embeddings do not count."""
    parent, _, name = path.rpartition(".")
    if type(encoder.get_submodule(parent)).__name__ in _FINAL_NORM_OF:
        return ".".join(filter(None, (parent, _FINAL_NORM_OF[type(encoder.get_submodule(parent)).__name__])))
    children = list(encoder.get_submodule(parent).named_children())
    position = [child for child, _ in children].index(name)
    for child, module in children[position + 1 :] + children[:position]:
        if "norm" in type(module).__name__.lower() and (
            ("emb" not in child.lower() and "per_layer" not in child) or child in _FINAL_NORMS_NAMED_EMBEDDING
        ):
            return f"{parent}.{child}" if parent else child
    return _norm_beside(encoder, parent) if parent else None


# ---- in a layer


def _part(layer: nn.Module, name: re.Pattern, cls: re.Pattern) -> str | None:
    """Return the path of the child whose name matches `name`, or else whose class matches `cls`. Wrappers around it
    are skipped."""
    children = [(child, module) for child, module in layer.named_children() if _may_be_meant(child)]
    fitting = [child for child, _ in children if name.fullmatch(child)]
    fitting += [child for child, module in children if child not in fitting and cls.search(type(module).__name__)]
    fitting = fitting or [
        f"{child}.{inner}"
        for child, module in children
        if is_list(module)
        for inner, part in _inside(module)
        if cls.search(type(part).__name__) or name.fullmatch(inner.rpartition(".")[2])
    ]
    return _innermost(layer, fitting[0], name) if fitting else None


def _may_be_meant(child: str) -> bool:
    return child in _ATTENTIONS_NAMED_NORM or not _NOT_SELF.search(child)


def _inside(modules: nn.ModuleList) -> list[tuple[str, nn.Module]]:
    """Return the children of the modules in a list, such as T5's `layer[0].SelfAttention`."""
    return [
        (f"{index}.{child}", part)
        for index, module in enumerate(modules)
        for child, part in module.named_children()
        if _may_be_meant(child)
    ]


def _innermost(layer: nn.Module, path: str, name: re.Pattern) -> str:
    """Return the path of the part itself: below a wrapper with a norm and the residual, or as a span if its output
    projection is in a sibling."""
    module = layer.get_submodule(path)
    children = dict(module.named_children())
    if "self" in children and _has(module, "output.dense"):
        return f"{path}.self:{path}.output.dense"
    inner = next((child for child in children if name.fullmatch(child)), None)
    wraps = len(children) == 1 or any("norm" in child.lower() for child in children)
    return f"{path}.{inner}" if inner and wraps else path


def _has(module: nn.Module, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
        if not isinstance(module, nn.Module):
            return False
    return True
