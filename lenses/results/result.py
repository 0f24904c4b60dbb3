"""What the results of all lenses have in common: saving, the record, and the preview in a notebook.

result = logit_lens(model, "The Eiffel Tower is in the city of")
result                          # in a notebook: the preview
result.save("lens")             # the record as JSON, and the other files
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.figure import Figure
from PIL import Image

from diffsight.lenses.results.saving import save_files, write_record


class LensResult:
    """The result of a lens. A result defines `record`, and `files` and `preview` where it has any."""

    record_file: ClassVar[str] = "lens.json"

    def record(self) -> dict[str, Any]:
        """Return what the result was made from, as `save` records it."""
        raise NotImplementedError

    def files(self) -> dict[str, Callable[[Path], None]]:
        """Return the files that `save` writes besides the record: names to functions that write them to a path."""
        return {}

    def preview(self) -> Image.Image | Figure | None:
        """Return the image or figure that a notebook shows."""
        return None

    def save(self, folder: str | Path) -> list[Path]:
        """Write all files of the result into `folder`, or none of them, and return their paths.

        Raises:
            InputError: The folder cannot be written.
        """
        return save_files(folder, {self.record_file: partial(write_record, self.record()), **self.files()})

    def _repr_png_(self) -> bytes | None:
        preview = self.preview()
        return None if preview is None else preview._repr_png_()
