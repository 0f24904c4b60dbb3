"""Settings of the documentation: `python -m sphinx -W docs docs/_build`."""

import os
import re
import shutil
from importlib import metadata
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

project = "diffsight"
author = copyright = "the diffsight authors"
release = metadata.version("diffsight")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "jupyter_execute"]  # the second is written by myst-nb
html_theme = "furo"
html_title = "diffsight"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["code.css"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
suppress_warnings = ["misc.highlighting_failure"]  # `…` stands for what is left out of an example

default_role = "code"  # docstrings write `name` for code, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Note|Example|Examples):$")


def copy_notebooks(app):
    """Put the gallery's notebooks where Sphinx finds them, as it reads sources of its own folder only."""
    folder = Path(app.srcdir, "notebooks")
    folder.mkdir(exist_ok=True)
    for notebook in Path(app.srcdir).parent.glob("gallery/notebooks/*.ipynb"):
        shutil.copy2(notebook, folder)  # keeps its time, so that an unchanged one is not read again


def mark_code(app, what, name, obj, options, lines):
    """Turn the examples of docstrings, which are indented and nothing more, into code blocks; escape what reads as
    markup elsewhere."""
    marked, in_section, in_code = [], False, False
    for i, line in enumerate(lines):
        is_indented = line.startswith("    ")
        if line and not is_indented:
            in_section, in_code = bool(_SECTION.match(line)), False
        starts = is_indented and not in_section and not in_code and not (lines[i - 1] if i else "")
        if starts:
            in_code = True
            marked += [".. code-block:: python", ""]
        marked.append(line if in_code else _escape(line))
    # Napoleon would take what stands before a colon in the first line of a property for its type: `..` is a comment.
    lines[:] = ["..", "", *marked] if what == "property" else marked


def _escape(line):
    """The line with stars, bars and trailing underscores outside of backticks taken literally."""
    parts = re.split(r"(``.*?``|`.*?`)", line)
    parts[::2] = (re.sub(r"[*|]|(?<=\w)_(?=\W|$)", r"\\\g<0>", part) for part in parts[::2])
    return "".join(parts)


def setup(app):
    app.connect("builder-inited", copy_notebooks)
    app.connect("autodoc-process-docstring", mark_code, priority=100)
