"""The base class of the results of all lenses: files, the record, the HTML page, and display.

result = logit_lens(model, "The Eiffel Tower is in the city of")
print(result)                   # tables in a terminal
result                          # in a notebook: the page
result.show()                   # the page, in a web browser
result.save("lens")             # the record as JSON, the page, and the other files
result.save("lens.png")         # one image
result.to_html("lens.html")     # the page alone
"""

import io
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image
from safetensors.torch import save_file

from diffsight.errors import InputError, suggest
from diffsight.lenses.results.calls import Call
from diffsight.lenses.results.page import framed, page_of
from diffsight.lenses.results.record import with_call, write_record
from diffsight.lenses.results.saved_results import (
    ARGUMENTS,
    PAGE,
    RECORD,
    files_of_record,
    not_of_results,
    read_record,
)
from diffsight.lenses.results.saving import HTML, check_file, expanded, names_a_file, save_files
from diffsight.lenses.results.sections import ImageSection, Section
from diffsight.lenses.results.shown_settings import subject_of
from diffsight.lenses.results.terminal import lines_of, text_of
from diffsight.lenses.results.thumbnail import GRID, THUMBNAIL, write_thumbnail

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderableType

_OTHER_NAMES = {
    "animate": "save",
    "code": "call",
    "df": "record",
    "display": "show",
    "export": "save",
    "figure": "plot",
    "gif": "save",
    "heatmap": "plot",
    "html": "to_html",
    "open": "show",
    "predictions": "words",
    "probs": "probabilities",
    "table": "show",
    "text": "words",
    "to_csv": "to_html",
    "to_dataframe": "record",
    "to_dict": "record",
    "to_json": "record",
    "to_pandas": "record",
    "to_pil": "grid",
    "top": "words",
    "top_tokens": "words",
    "view": "show",
}


@dataclass(frozen=True, eq=False)
class LensResult:
    """The result of a lens. Subclasses define `record` and, if they have them, `sections`, `files` and `preview`.

    A result equals only itself: the tensors in two results cannot be compared with `==`.

    Attributes:
        call: The call that made the result.
    """

    record_file: ClassVar[str] = RECORD
    call: Call | None = field(default=None, kw_only=True, repr=False)

    __eq__, __hash__ = object.__eq__, object.__hash__  # of a subclass that is a mapping, too

    # ---- defined by each result

    def record(self) -> dict[str, Any]:
        """Return the record of how the result was made, as `save` writes it."""
        raise NotImplementedError

    def files(self) -> dict[str, Callable[[Path], None]]:
        """Return the files that `save` writes besides record and page: names to functions that write them to a path."""
        return {}

    def preview(self) -> "Image.Image | Figure | None":
        """Return the image or figure that stands for the result."""
        return None

    def sections(self) -> Sequence[Section]:
        """Return the sections of the page. Default: the preview."""
        preview = self.preview()
        if preview is None:
            return []
        image = preview if isinstance(preview, Image.Image) else Image.open(io.BytesIO(preview._repr_png_()))
        return [ImageSection("", {"": {"preview": image}})]

    # ---- the same for all results

    def save(self, path: str | Path) -> list[Path]:
        """Write all files of the result into a folder, or none of them, and return their paths.

        A result of the same lens that was saved there before is replaced. Other files stay, and the result is not
        saved if it would replace one of them by one with other contents.

            result.save("lens")             # a folder
            result.save("lens.png")         # one image: what `preview` returns
            result.save("lens.html")        # the page alone

        Args:
            path: A folder, or a file that ends with .png, .jpg, .jpeg, .webp, .pdf, .svg or .html.

        Raises:
            InputError: The folder cannot be written to, holds a result of another lens, or holds another file with the
                name of one of the result's files; or the result has no image.
        """
        path = expanded(path)
        if names_a_file(path):
            check_file(path)
            write = self._write_page if path.suffix.lower() == HTML else self._write_image
            return save_files(path.parent, {path.name: write})
        record = self.record()
        files = {PAGE: self._write_page, **self.files()}
        if self.call is not None and self.call.tensors:
            files[ARGUMENTS] = partial(save_file, dict(self.call.tensors))
        if GRID in files:
            files[THUMBNAIL] = lambda path: write_thumbnail(path.with_name(GRID), path)
        kept = not_of_results(path, record["lens"], (self.record_file, *files))
        record = {**with_call(record, self.call), "files": list(files)}
        replaced = files_of_record(read_record(path / self.record_file) or {})
        paths = save_files(path, {self.record_file: partial(write_record, record), **files}, kept)
        for name in replaced - set(files):
            (path / name).unlink(missing_ok=True)
        return paths

    def to_html(self, path: str | Path) -> Path:
        """Write the page, which needs no other file and no network, and return its path.

        Args:
            path: The file to write.

        Raises:
            InputError: The file cannot be written.
        """
        path = expanded(path)
        check_file(path)
        return save_files(path.parent, {path.name: self._write_page})[0]

    def show(self) -> None:
        """Show the page below the cell of a notebook, or else in a web browser. Without a browser, print the result."""
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        if hasattr(shell, "kernel"):
            from IPython.display import display

            display(self)
        elif not webbrowser.open(self.to_html(Path(tempfile.mkdtemp()) / PAGE).as_uri()):
            print(self)

    def __str__(self) -> str:
        return text_of(self._heading(), self.record(), self.sections())

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> Iterator["RenderableType"]:
        yield from lines_of(self._heading(), self.record(), self.sections(), options.max_width)

    def _repr_html_(self) -> str:
        return framed(self._page(), self._heading())

    def _repr_png_(self) -> bytes | None:
        preview = self.preview()
        return None if preview is None else preview._repr_png_()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        known = [one for one in dir(self) if not one.startswith("_")]
        hint = suggest(_OTHER_NAMES.get(name, name), known)
        raise AttributeError(f"{type(self).__name__} has no {name!r}{hint}; it has {', '.join(known)}")

    # ---- the record and the page

    def _heading(self) -> str:
        record = self.record()
        return f"{record['lens']}: {subject}" if (subject := subject_of(record)) else str(record["lens"])

    def _page(self) -> str:
        record = with_call(self.record(), self.call)
        code = "" if self.call is None else self.call.code()
        return page_of(self._heading(), self.sections(), record, code)

    def _write_page(self, path: Path) -> None:
        path.write_text(self._page(), encoding="utf-8")

    def _write_image(self, path: Path) -> None:
        preview = self.preview()
        if preview is None:
            raise InputError(f"{type(self).__name__} has no image: save(folder) writes its files")
        if not isinstance(preview, Image.Image):
            preview.savefig(path)
        elif path.suffix.lower() == ".svg":
            raise InputError(f"{path.name}: a pixel image cannot be an SVG file: write a .png file")
        else:
            preview.convert("RGB").save(path)
