"""The structure of the repository: contracts over the syntax trees, imports for annotations included."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "diffsight": "diffsight",
    "pipelines": "diffsight.pipelines",
    "lenses": "diffsight.lenses",
    "gallery": "diffsight.gallery",
}

# Within `diffsight/`, each line imports only from the lines above it.
ENGINE = [
    "errors",
    "key_hash",
    "notebook_tree",
    "engine",
    "engine.torch_state",
    "engine.function_code",
    "engine.random_generators",
    "engine.threads",
    "engine.users_line",
    "engine.coroutine",
    "engine.checkpointed_regions",
    "engine.tapped_pickles",
    "engine.tapped_methods",
    "engine.hooks",
    "engine.changes_in_place",
    "engine.returned_values",
    "engine.users_hooks",
    "engine.unseen_modules",
    "engine.target",
    "engine.wrapped_modules",
    "engine.structural_copy",
    "engine.opaque_values",
    "engine.trial_mode",
    "engine.larger_batches",
    "engine.call_settings",
    "engine.batch_dimensions",
    "engine.batch_slicing",
    "engine.weak_values",
    "engine.points",
    "engine.gradients_at_point",
    "engine.late_edits",
    "engine.innermost_run",
    "engine.late_weights",
    "engine.step_clock",
    "engine.attached_modules",
    "engine.module_places",
    "engine.model_tree",
    "engine.tapped_call",
    "engine.taps",
    "engine.order",
    "engine.part_containers",
    "engine.turns",
    "engine.run_end",
    "engine.run_to_point",
    "engine.scan_errors",
    "engine.scan_fakes",
    "engine.scan_state",
    "engine.scan_mode",
    "engine.scan",
    "engine.capture",
    "envoys_in_values",
    "envoy",
    "rows",
    "recorded_values",
    "edits",
    "steps",
    "run",
    "model",
    "extending",
    "remote.generation_config",
    "remote.wire_values",
    "remote.wire_errors",
    "remote.frames",
    "remote.chunks",
    "remote.protocol",
    "remote.copies",
    "remote.read_containers",
    "remote.connection",
    "remote.selections",
    "remote.schedulers",
    "remote.run_session",
    "remote.remote_flow",
    "remote.served_model",
    "remote.on_server",
    "remote",
    "compat",
]

# What a wrapper may import from `diffsight/`; lenses and the gallery use the public face instead of `extending`.
FOR_WRAPPERS = {"diffsight", "diffsight.errors", "diffsight.extending", "diffsight.key_hash", "diffsight.remote"}

# Attributes of other people's objects, whose names begin with an underscore.
THIRD_PARTY = {
    # torch
    *(
        "_modules",
        "_parameters",
        "_buffers",
        "_forward_hooks",
        "_global_forward_hooks",
        "_forward_pre_hooks",
        "_call_impl",
        "_wrapped_call_impl",
    ),
    *("_compiled_call_impl", "_apply", "_version", "_base", "_cdata", "_schema"),
    # diffusers
    *("_sanitize_parameters", "_is_stateful"),
    *("_blocks", "_identifier_key"),  # diffusers' modular pipelines and guiders
    *("_execution_device", "_progress_bar_config", "_pack_latents", "_unpack_latents", "_prepare_latent_image_ids"),
    # transformers
    *("_tqdm_active", "_num_workers", "_batch_size", "_pipeline_calls_generate", "_from_config", "_model_mapping"),
    *("_attn_implementation",),
    # Python's ast, IPython
    *("_attributes", "_repr_png_"),
}

# File names that mean the same thing for each domain.
SHARED_NAMES = {"__init__", "model", "loading", "attention", "run"}


@cache
def modules() -> dict[str, tuple[Path, ast.Module]]:
    """Return every module of the repository by its installed name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            found[name] = path, ast.parse(path.read_text())
    return found


@cache
def imported(name: str) -> frozenset[str]:
    """Return the modules of the repository that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(modules()[name][1]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & modules().keys() or {node.module}
    return frozenset(found & modules().keys()) - {name}


def folder_of(name: str) -> str:
    """Return the folder of a module, which is the engine's if it is in none of the others."""
    return next((folder for folder, package in list(FOLDERS.items())[1:] if name.startswith(package)), "diffsight")


def circles() -> Iterator[list[str]]:
    """Yield the groups of modules that import each other, directly or not (Tarjan's strongly connected components)."""
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> Iterator[list[str]]:
        numbers[name] = lowest[name] = len(numbers)
        stack.append(name)
        for other in imported(name):
            if other not in numbers:
                yield from visit(other)
            if other in stack:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == numbers[name]:
            group = [stack.pop()]
            while group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                yield sorted(group)

    for name in modules():
        if name not in numbers:
            yield from visit(name)


def test_no_circles():
    assert list(circles()) == []


def test_imports_run_downwards():
    """Gallery, lenses, pipelines, engine; the face at the top of each folder imports from everywhere."""
    order, found = list(FOLDERS), set()
    for name in modules().keys() - FOLDERS.keys() - {"diffsight"}:
        for other in imported(name):
            if order.index(folder_of(other)) > order.index(folder_of(name)):
                found.add(f"{name} -> {other}")
    assert sorted(found) == []


def test_the_order_of_the_engine():
    """Within `diffsight/`, imports follow the order written above."""

    def rank(module: str) -> int:
        line = module.removeprefix("diffsight.")
        line = "compat" if line.startswith("compat.") else line
        assert line in ENGINE, f"{module} has no place in the order: write it into ENGINE"
        return ENGINE.index(line)

    inside = [name for name in modules() if folder_of(name) == "diffsight" and name != "diffsight"]
    pairs = [(name, other) for name in inside for other in imported(name) & set(inside)]
    is_in_compat = ENGINE.index("compat")
    found = {f"{name} -> {other}" for name, other in pairs if rank(other) >= rank(name) != is_in_compat}
    assert sorted(found) == []


def test_wrappers_and_lenses_use_the_interface():
    """Pipelines import engine names from `diffsight.extending`; lenses and the gallery only what is public."""
    found = set()
    for name in modules():
        if folder_of(name) == "diffsight":
            continue
        allowed = FOR_WRAPPERS if folder_of(name) == "pipelines" else FOR_WRAPPERS - {"diffsight.extending"}
        engine = {other for other in imported(name) if folder_of(other) == "diffsight"}
        found |= {f"{name} -> {other}" for other in engine - allowed}
    assert sorted(found) == []


# ---- attributes with an underscore


def defined_in(tree: ast.Module) -> set[str]:
    """Return the private names that a module defines: functions, classes, class attributes, slots, and those that it
    sets on `self`, directly or through `__dict__`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and "__dict__" in ast.unparse(node.func):
            found |= {keyword.arg for keyword in node.keywords if keyword.arg}
        elif isinstance(node, ast.Subscript) and "__dict__" in ast.unparse(node.value):
            found |= {inner.value for inner in ast.walk(node.slice) if isinstance(inner, ast.Constant)}
        elif isinstance(node, ast.Assign) and any(ast.unparse(target) == "__slots__" for target in node.targets):
            found |= {inner.value for inner in ast.walk(node.value) if isinstance(inner, ast.Constant)}
    return found


def is_own(value: ast.expr) -> bool:
    """Return whether an attribute belongs to `self`, `cls` or `super()`."""
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def of_third_party(value: ast.expr, tree: ast.Module) -> bool:
    """Return whether an attribute belongs to a module of Python or of another package: `torch._C`, `sys._getframe`."""
    others = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if not alias.name.startswith("diffsight")
    }
    while isinstance(value, ast.Attribute):
        value = value.value
    return isinstance(value, ast.Name) and value.id in others


def test_no_reach_into_private_attributes():
    """An attribute with an underscore is used only in the module that defines it, and none is imported."""
    found = set()
    for name, (_, tree) in modules().items():
        own = defined_in(tree) | THIRD_PARTY
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
                if not (is_own(node.value) or node.attr in own or of_third_party(node.value, tree)):
                    found.add(f"{name}: {ast.unparse(node)}")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffsight"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                found |= {f"{name}: from {node.module} import {alias}" for alias in private}
    assert sorted(found) == []


# ---- names


def test_no_file_shares_its_name():
    folders = defaultdict(set)
    for name, (path, _) in modules().items():
        folders[path.stem].add(name.rpartition(".")[0])
    twice = {stem for stem, found in folders.items() if len(found) > 1} - SHARED_NAMES
    assert sorted(twice) == []


def test_no_class_shares_its_name():
    places = defaultdict(set)
    for name, (_, tree) in modules().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places[node.name].add(name)
    found = {f"{cls}: {' '.join(sorted(names))}" for cls, names in places.items() if len(names) > 1}
    assert sorted(found) == []
