"""Make the coverage page: what `check_model` finds on the small pipelines and language models of the tests.

    python docs/make_coverage.py

It takes about ten minutes on one processor core. The tests' models have the structure of the full-size ones, and random
weights.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import diffusers
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from diffsight import DiffusionModel, LanguageModel, VisionLanguageModel  # noqa: E402
from diffsight.gallery import ModelCheck, check_model  # noqa: E402
from models import architectures, diffusion, vision_language  # noqa: E402

PAGE = Path(__file__).parent / "coverage.md"
SIGNS = {"ok": "✓", "failed": "✗", "none": "·"}
NAMES = {"blt": {"layers": "model.global_transformer.layers"}}  # three models: the layers over patches
VISION = ("llava", "llava_next", "qwen2_vl", "idefics2", "idefics3", "paligemma", "gemma3")
INTRODUCTION = """# Coverage

What [`check_model`](guide/checking_models.md) finds on small models with random weights that have the structure of the
full-size ones. This page is written by `docs/make_coverage.py`.

✓ verified, to the bit where a run is compared with the bare model; · the model has nothing of the kind; ✗ failed

`blt`, which is three models in one, was opened with `names={"layers": "model.global_transformer.layers"}`.
"""


def pipelines() -> Iterator[tuple[str, ModelCheck | str]]:
    for name, small in diffusion.ALL_PIPELINES.items():
        yield name, checked(lambda small=small: check_model(DiffusionModel(small.build()), **small.inputs()))


def language_models() -> Iterator[tuple[str, ModelCheck | str]]:
    for name in architectures.causal_types():
        yield name, checked(partial(check_language, name))


def check_language(name: str) -> ModelCheck:
    net = architectures.build_causal(name)
    return check_model(LanguageModel(net, names=NAMES.get(name)), prompt=architectures.inputs_of(net))


def vision_language_models() -> Iterator[tuple[str, ModelCheck | str]]:
    for name in VISION:
        yield name, checked(partial(check_images, getattr(vision_language, name)))


def check_images(build: Callable) -> ModelCheck:
    return check_model(VisionLanguageModel(build()), prompt="what is this", images=diffusion.IMAGE)


def checked(check: Callable[[], ModelCheck]) -> ModelCheck | str:
    """Return the check, or why the small model cannot be built or wrapped."""
    try:
        return check()
    except Exception as error:  # of any library: it is what the page says of the model
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1].strip()}"


def table(title: str, found: dict[str, ModelCheck | str]) -> str:
    checks = {name: check for name, check in found.items() if not isinstance(check, str)}
    states = {name: {row.name: row.status for row in check.rows} for name, check in checks.items()}
    names = dict.fromkeys(name for of_model in states.values() for name in of_model)
    columns = [name for name in names if any(of_model[name] != "none" for of_model in states.values())]
    lines = [f"## {title}", "", sums(columns, states), ""]
    lines += ["| | " + " | ".join(columns) + " |", "| --- |" + " :-: |" * len(columns)]
    for name, of_model in states.items():
        lines.append(f"| `{name}` | " + " | ".join(SIGNS[of_model[column]] for column in columns) + " |")
    failed = reasons(checks, "failed", columns)
    failed += [f"- `{name}`: {check}" for name, check in found.items() if isinstance(check, str)]
    for heading, listed in (("Does not apply", reasons(checks, "none", columns)), ("Not checked, or failed", failed)):
        lines += ["", f"{heading}:", "", *listed] if listed else []
    return "\n".join(lines) + "\n"


def reasons(checks: dict[str, ModelCheck], status: str, columns: list[str]) -> list[str]:
    rows = ((name, row) for name, check in checks.items() for row in check.rows if row.name in columns)
    return [f"- `{name}`, {row.name}: {row.detail}" for name, row in rows if row.status == status]


def sums(columns: list[str], states: dict[str, dict[str, str]]) -> str:
    parts = []
    for column in columns:
        found = [of_model[column] for of_model in states.values()]
        parts.append(f"{column} {found.count('ok')} of {len(found) - found.count('none')}")
    return f"{len(states)} models: " + ", ".join(parts) + "."


def main() -> None:
    warnings.simplefilter("ignore")
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    parts = {
        "Pipelines": pipelines,
        "Language models": language_models,
        "Vision-language models": vision_language_models,
    }
    tables = []
    for title, found in parts.items():
        results = {}
        for name, check in found():
            print(name, check if isinstance(check, str) else check.is_ok, flush=True)
            results[name] = check
        tables.append(table(title, results))
    PAGE.write_text("\n".join([INTRODUCTION, *tables]), encoding="utf-8")


if __name__ == "__main__":
    main()
