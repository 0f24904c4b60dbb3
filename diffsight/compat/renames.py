"""`rename=`: additional names for modules.

    model = LanguageModel("gpt2", rename={"transformer.h": "layers", "mlp": ["feedforward", "ffn"]})
    model.layers[0].ffn

A key is a class of modules, or a path from any module (`mlp` renames the `mlp` of each layer), in which `*` stands for
any one child. A dotted name, as in `{"attn.c_proj": "attn.o_proj"}`, renames a module inside the one named by its first
part.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches

from diffsight.errors import InputError, warn_user
from diffsight.extending import Target, Tree

Rename = Mapping[str | type, str | Sequence[str]]


class Renames:
    """The user's names for the modules of one model.

    Args:
        tree: The tree of the model.
        rename: Paths or classes of modules, and the names for them.
        taken: Names of an envoy's own attributes, such as `output`.

    Raises:
        InputError: A name is taken, or a key matches several modules inside the same module.
    """

    def __init__(self, tree: Tree, rename: Rename, taken: Sequence[str]) -> None:
        self._tree, self._taken = tree, taken
        self._paths: dict[str, dict[str, str]] = {}  # path of a module: {name: path from that module}
        unmatched = dict(rename)
        for outer in list(_walk(tree)):
            for key, names in rename.items():
                if self._bind(outer, key, [names] if isinstance(names, str) else names):
                    unmatched.pop(key, None)
        self._warn_of_misspelled(key for key in unmatched if isinstance(key, str))

    def names_in(self, outer: Target) -> Mapping[str, str]:
        """Return the user's names for modules inside a module, as a mapping of name to path from that module."""
        return self._paths.get(outer.path, {})

    def target_named(self, outer: Target, name: str) -> Target | None:
        """Return the target of one of the user's names inside a module; None if there is no such name."""
        path = self.names_in(outer).get(name)
        return None if path is None else self._at(outer, path)

    def _at(self, outer: Target, path: str) -> Target | None:
        for step in path.split("."):
            outer = self._tree.children_of(outer).get(step) or self.target_named(outer, step)
            if outer is None:
                return None
        return outer

    def _warn_of_misspelled(self, keys: Iterable[str]) -> None:
        """Warn about keys that match no module but nearly do. Others may be for another model, as in nnsight."""
        known = {step for outer in _walk(self._tree) for step, _ in self._inside(outer)}
        for key in keys:
            unknown = next((step for step in key.lstrip(".").split(".") if step not in ("*", *known)), "")
            near = get_close_matches(unknown, known, n=1, cutoff=0.85)
            if near:
                warn_user(
                    f"rename: no module is called {unknown!r}, so {key!r} names nothing (did you mean {near[0]!r}?)"
                )

    def _bind(self, outer: Target, key: str | type, names: Sequence[str]) -> bool:
        """Give the modules that a key matches inside a module their new names, and return whether there are any."""
        found = self._meant(outer, key)
        if len(found) > 1:
            what = key.__name__ if isinstance(key, type) else repr(key)
            raise InputError(
                f"rename: {what} matches {len(found)} modules in {_shown(outer)} ({', '.join(found)}), but a new name "
                "can stand for only one: use their paths"
            )
        for path, target in found.items():
            for name in names:
                self._add(outer, path, target, name)
        return bool(found)

    def _add(self, outer: Target, path: str, target: Target, name: str) -> None:
        prefix, _, name = name.rpartition(".")
        if prefix and not path.startswith(f"{prefix}."):
            raise InputError(f"rename: {path!r} is not inside {prefix!r}, so it cannot be {prefix + '.' + name!r}")
        host = self._at(outer, prefix) if prefix else outer
        own = path.removeprefix(f"{prefix}.") if prefix else path
        given = self._paths.setdefault(host.path, {})
        known = self._tree.children_of(host).get(name) or (name in given and self._at(host, given[name])) or None
        if known is not None and known.owner is target.owner:
            return
        if known is not None or name in self._taken or hasattr(host.owner, name):
            raise InputError(f"rename: {name!r} for {own!r} would shadow what {_shown(host)} already has by that name")
        given[name] = own

    def _meant(self, outer: Target, key: str | type) -> dict[str, Target]:
        """Return the targets inside a module that a key matches, by path."""
        if isinstance(key, type):
            found = [(name, child) for name, child in self._inside(outer) if isinstance(child.owner, key)]
        else:
            found = [("", outer)]
            for step in key.lstrip(".").split("."):
                found = [
                    (f"{path}.{name}".lstrip("."), child)
                    for path, target in found
                    for name, child in self._inside(target)
                    if step in ("*", name)
                ]
        modules = {id(target.owner): (path, target) for path, target in reversed(found)}
        return dict(reversed(modules.values()))

    def _inside(self, outer: Target) -> Iterator[tuple[str, Target]]:
        yield from self._tree.children_of(outer).items()
        for name, path in self.names_in(outer).items():
            yield name, self._at(outer, path)


def _walk(tree: Tree) -> Iterator[Target]:
    """Yield every module of a model, each before its children."""
    waiting, seen = [tree.root], set()
    for target in waiting:
        if id(target.owner) not in seen:
            seen.add(id(target.owner))
            yield target
            waiting += tree.children_of(target).values()


def _shown(target: Target) -> str:
    return target.path or type(target.owner).__name__


_STANDARD_NAMES = {
    "layers": ("*.h", "*.layers", "*.blocks", "*.decoder.layers"),
    "ln_final": ("*.ln_f", "*.norm", "*.final_layer_norm", "*.final_layernorm", "*.norm_f"),
    "embed_tokens": ("*.wte", "*.embed_tokens", "*.embed_in", "*.word_embeddings", "*.decoder.embed_tokens"),
    "lm_head": ("embed_out", "output_layer"),
    "self_attn": ("attn", "self_attention", "attention", "norm_attn_norm"),
    "mlp": ("block_sparse_moe", "feed_forward", "ffn"),
}


def get_rename_dict() -> dict[str, str]:
    """Return nnterp's names for `rename=`. They name the parts of common language models as `LanguageModel` does.

    model = NNsight(net, rename=get_rename_dict())
    model.layers[0].self_attn, model.layers[0].mlp, model.ln_final, model.lm_head, model.embed_tokens
    """
    return {path: name for name, paths in _STANDARD_NAMES.items() for path in paths}
