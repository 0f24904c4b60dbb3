"""The notebooks of the gallery run from top to bottom, in a shortened form, and are stored with their outputs."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import transformers

NOTEBOOKS = sorted((Path(__file__).parents[2] / "gallery" / "notebooks").glob("*.ipynb"))
SHORT = {"PROMPTS": 2, "STEPS": 1}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


@pytest.fixture(autouse=True)
def settings_of_libraries():
    """Restore the log levels of libraries, which notebooks change."""
    libraries = [library.logging for library in (diffusers, transformers)]
    before = [library.get_verbosity() for library in libraries]
    yield
    for library, verbosity in zip(libraries, before):
        library.set_verbosity(verbosity)
        library.enable_progress_bar()


def code_cells(notebook):
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def run_cell(source, names):
    """Run a cell, and return the value of its last line, if that is an expression."""
    body = ast.parse(source).body
    last = ast.Expression(body.pop().value) if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
    return eval(compile(last, "<cell>", "eval"), names) if last else None


def test_it_runs_from_top_to_bottom(notebook):
    names, short = {"__name__": "__main__"}, {}
    for cell in code_cells(notebook):
        value = run_cell("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            short = {name: SHORT[name] for name in names if name.isupper()}
            names |= short
        shows_image = any("image/png" in output.get("data", {}) for output in cell["outputs"])
        assert hasattr(value, "_repr_png_") == shows_image
        assert not shows_image or value._repr_png_().startswith(b"\x89PNG")
    assert short


def test_it_was_run_from_top_to_bottom(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.get("name") != "stderr" for cell in cells for output in cell["outputs"])
    assert notebook.stat().st_size < 2e6


def test_there_is_a_notebook():
    assert NOTEBOOKS


def test_the_first_cells_are_a_title_and_the_installation(notebook, monkeypatch):
    """The second cell installs the clone that the notebook is in, if diffsight is not installed."""
    title, install = json.loads(notebook.read_text())["cells"][:2]
    assert (title["cell_type"], title["source"][0][:2]) == ("markdown", "# ")
    monkeypatch.chdir(notebook.parent)
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    run_cell("".join(install["source"]), {})
    assert commands == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run_cell("".join(install["source"]), {})
    root = str(notebook.parents[2])
    assert commands == [[sys.executable, "-m", "pip", "install", "-q", "-c", f"{root}/constraints.txt", root]]
