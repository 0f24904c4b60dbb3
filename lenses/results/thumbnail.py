"""The thumbnail of a saved result, which the gallery shows: large grids take long to decode.

write_thumbnail(Path("lens/grid.png"), Path("lens/thumbnail.jpg"))
"""

from pathlib import Path

from PIL import Image

GRID, THUMBNAIL = "grid.png", "thumbnail.jpg"
_SIZE = (480, 360)  # maximum size, in pixels


def write_thumbnail(image: Path, path: Path) -> None:
    """Write a small version of an image file to a path, as JPEG."""
    with Image.open(image) as opened:
        opened.thumbnail(_SIZE, Image.Resampling.BILINEAR, reducing_gap=1.5)
        opened.convert("RGB").save(path, "jpeg", quality=85)
