"""Check on this machine that diffsight works correctly with a model.

    check = check_model(DiffusionModel("my/pipeline"), num_inference_steps=4)
    print(check)                    # a table
    check.save("check.json")
    check.is_ok

Each row compares a run with the bare model, bit for bit. A row is "ok", "failed", or "none" if the model has nothing to
check; its detail describes the finding.
"""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffsight.errors import InputError
from diffsight.gallery.check_does_not_apply import CheckDoesNotApply
from diffsight.gallery.diffusion_checks import diffusion_checks
from diffsight.gallery.language_checks import language_checks
from diffsight.gallery.model_opening import open_model
from diffsight.lenses.results.record import versions
from diffsight.lenses.results.saving import check_file, expanded, save_files
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.language.model import LanguageModel

_STYLES = {"ok": "green", "failed": "bold red", "none": "dim"}


@dataclass(frozen=True)
class CheckRow:
    """The outcome of one check: "ok", "failed" or "none", and the finding."""

    name: str
    status: str
    detail: str


@dataclass(frozen=True)
class ModelCheck:
    """The checks of a model.

    Attributes:
        model: The name of the model.
        kind: The class of the pipeline or the module.
        rows: One row for each check.
    """

    model: str
    kind: str
    rows: tuple[CheckRow, ...]

    @property
    def is_ok(self) -> bool:
        """Whether no check failed."""
        return all(row.status != "failed" for row in self.rows)

    def record(self) -> dict[str, Any]:
        """Return the check in a form that JSON can store."""
        return {"check": self.model, "kind": self.kind, "ok": self.is_ok, "rows": [asdict(row) for row in self.rows]}

    def save(self, path: str | Path) -> Path:
        """Write the check as JSON, with the versions of all libraries, and return the path.

        Raises:
            InputError: The file cannot be written.
        """
        path = expanded(path)
        check_file(path)
        text = json.dumps(self.record() | {"versions": versions()}, indent=2, ensure_ascii=False) + "\n"
        return save_files(path.parent, {path.name: partial(_write, text)})[0]

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None)
        console.print(self)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, title=f"{self.model} ({self.kind})", title_justify="left")
        table.add_column("checked", no_wrap=True)
        table.add_column("")
        table.add_column("found", overflow="fold")
        for row in self.rows:
            table.add_row(row.name, Text(row.status, style=_STYLES[row.status]), Text(row.detail))
        return table


def check_model(model: DiffusionModel | LanguageModel | str, **arguments: Any) -> ModelCheck:
    """Check that diffsight works correctly with a model.

        check_model(model, prompt="a cat", num_inference_steps=4)
        check_model(language_model, prompt="Once upon a time")

    Args:
        model: A pipeline, a language model or a vision-language model, or the name of one, which is opened.
        arguments: Arguments of the pipeline; `prompt` for a language model, `prompt` and `images` for a vision-language
            model. Omitted arguments have defaults that keep the check short. A check calls the model about ten times,
            so choose few steps for a large pipeline.

    Returns:
        A row for each check.

    Raises:
        InputError: The model is of another kind, or there is no model with this name.
    """
    if isinstance(model, str):
        model = open_model(model)
    if isinstance(model, DiffusionModel):
        checks, name, kind = diffusion_checks(model, arguments), model.source, type(model.pipeline).__name__
    elif isinstance(model, LanguageModel):
        checks, name, kind = language_checks(model, arguments), model.label, type(model.module).__name__
    else:
        raise InputError(f"check_model takes a DiffusionModel or a LanguageModel, not {type(model).__name__}")
    return ModelCheck(name, kind, tuple(_row(check, function) for check, function in checks.items()))


def _row(name: str, check: Callable[[], str]) -> CheckRow:
    try:
        return CheckRow(name, "ok", check())
    except CheckDoesNotApply as reason:
        return CheckRow(name, "none", str(reason))
    except Exception as error:  # any error in a user's model is the finding of the check
        first = next(iter(str(error).strip().splitlines()), "")
        detail = first if isinstance(error, AssertionError) else f"{type(error).__name__}: {first}"
        return CheckRow(name, "failed", detail)


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
