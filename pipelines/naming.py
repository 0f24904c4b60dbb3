"""Standard names for what every encoder has: its `layers` and its final norm, `ln_final`.

They are found by structure, not by a table of architectures: the layers are the longest list of modules of one class,
the final norm is the first norm behind them, looked for from the layers outwards.
"""

from torch import nn


def standard_names(encoder: nn.Module) -> dict[str, str]:
    """Name to real path from `encoder`: `{"layers": "encoder.layers", "ln_final": "final_layer_norm"}`. What is not
    found is left out."""
    lists = {
        path: module
        for path, module in encoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1
    }
    if not lists:
        return {}
    lists = _beside_words(encoder, lists)
    longest = max(len(module) for module in lists.values())
    layers = min((path for path in lists if len(lists[path]) == longest), key=lambda path: path.count("."))
    names = {"layers": layers}
    norm = _norm_behind(encoder, layers)
    return names | ({"ln_final": norm} if norm else {})


def _beside_words(encoder: nn.Module, lists: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """Of `lists`, those next to the word embeddings: in a vision-language encoder not the vision tower's."""
    words = encoder.get_input_embeddings() if hasattr(encoder, "get_input_embeddings") else None
    near = next((path for path, module in encoder.named_modules() if module is words), "").rpartition(".")[0]
    while near and not any(path.startswith(f"{near}.") for path in lists):
        near = near.rpartition(".")[0]
    return {path: module for path, module in lists.items() if not near or path.startswith(f"{near}.")}


def _norm_behind(encoder: nn.Module, path: str) -> str | None:
    """The first norm that is declared behind the module at `path`, among its siblings, its parent's siblings …"""
    parent, _, name = path.rpartition(".")
    children = list(encoder.get_submodule(parent).named_children())
    position = [child for child, _ in children].index(name)
    for child, module in children[position + 1 :]:
        if "norm" in type(module).__name__.lower():
            return f"{parent}.{child}" if parent else child
    return _norm_behind(encoder, parent) if parent else None
