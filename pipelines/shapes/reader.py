"""Read the scene, and so the caption, from an image of coloured shapes.

    scene = read_scene(image)
    scene.caption()                      # "a red circle above a blue square on a gray background"

Nothing is learned. The background is the colour of the border, and things are the connected regions that differ from
it. A thing's colour is the palette colour nearest to the median of the region's pixels. Its shape is the shape
whose drawing in the region's bounding box overlaps the region most. The relation follows the axis along which the
centres are further apart.
"""

import numpy as np
from PIL import Image, ImageDraw

from diffsight.pipelines.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, Scene, Thing, draw_shape

_CONTRAST = 70.0  # RGB distance from the background above which a pixel belongs to a thing
_SMALLEST = 25  # pixels; a smaller region is a speck


def read_scene(image: Image.Image) -> Scene | None:
    """Return the scene in `image`, or None if it does not show one or two things.

    The image may have any size and is read at its own resolution. The relation is always "above" or "left of", as in
    `Scene.canonical`."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    ground = _ground(pixels)
    found = find_things(image)
    if not 1 <= len(found) <= 2:
        return None
    things, regions = ([*one] for one in zip(*found))
    background = _nearest(ground, BACKGROUNDS)
    if len(things) == 1:
        return Scene(tuple(things), None, background)
    (y0, x0), (y1, x1) = (np.argwhere(region).mean(0) for region in regions)
    vertical = abs(y0 - y1) > abs(x0 - x1)
    if (y0 > y1) if vertical else (x0 > x1):
        things.reverse()
    return Scene(tuple(things), "above" if vertical else "left of", background)


def find_things(image: Image.Image) -> list[tuple[Thing, np.ndarray]]:
    """Return the things in an image, each with a mask of its region, bool `(height, width)`."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    regions = _regions(np.linalg.norm(pixels - _ground(pixels), axis=-1) > _CONTRAST)
    return [(Thing(_color(pixels[region]), _shape(region)), region) for region in regions]


def _ground(pixels: np.ndarray) -> np.ndarray:
    """Return the colour of the background."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(border, axis=0)


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """Return the 4-connected regions of `mask`, bool `(height, width)`, as masks, without specks."""
    left, regions = mask.copy(), []
    while left.any():
        seed = tuple(np.argwhere(left)[0])
        stack, region = [seed], np.zeros_like(mask)
        left[seed] = False
        while stack:
            y, x = stack.pop()
            region[y, x] = True
            for point in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= point[0] < mask.shape[0] and 0 <= point[1] < mask.shape[1] and left[point]:
                    left[point] = False
                    stack.append(point)
        if region.sum() >= _SMALLEST * mask.size / 64**2:
            regions.append(region)
    return regions


def _color(pixels: np.ndarray) -> str:
    return _nearest(np.median(pixels, axis=0), COLORS)


def _nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(color - np.array(palette[name]))))


def _shape(region: np.ndarray) -> str:
    """Return the shape whose drawing in the region's bounding box has the largest intersection over union."""
    ys, xs = np.where(region)
    crop = region[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    height, width = crop.shape

    def overlap(shape: str) -> float:
        image = Image.new("L", (width * 4, height * 4))
        draw_shape(ImageDraw.Draw(image), shape, (0, 0, width * 4 - 1, height * 4 - 1), 255, 0)
        drawn = np.asarray(image.resize((width, height), Image.Resampling.BOX)) > 127
        return (drawn & crop).sum() / (drawn | crop).sum()

    return max(SHAPES, key=overlap)
