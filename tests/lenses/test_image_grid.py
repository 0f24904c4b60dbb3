"""Image grids: where images and texts are placed, measured in the pixels of the grid."""

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from diffsight.lenses.results.image_grid import image_grid

RED, GREEN, BLUE, GOLD = (220, 0, 0), (0, 180, 0), (0, 0, 230), (230, 200, 0)
LONG = "a red circle above a blue square on a gray background, seen through every layer"


def plain_image(color, size=(64, 64)):
    return Image.new("RGB", size, color)


def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def extent(mask):
    """Return left, top, right and bottom of what is true in a mask, as in PIL."""
    (ys, xs) = np.nonzero(mask)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def place(grid, color):
    """Return where the pixels of a colour are."""
    return extent((np.asarray(grid) == color).all(-1))


def ink(grid):
    """Return the darkness of every pixel that is not part of a coloured image."""
    pixels = np.asarray(grid).astype(int)
    gray = np.ptp(pixels, axis=-1) == 0
    return np.where(gray, 255 - pixels[..., 0], 0)


def test_images_are_in_reading_order():
    grid = image_grid([plain_image(RED), plain_image(GREEN), plain_image(BLUE)], columns=2, cell=100, padding=10)
    assert grid.mode == "RGB"
    assert grid.size == (10 + 2 * 110, 10 + 2 * 110)
    assert place(grid, RED) == (10, 10, 110, 110)
    assert place(grid, GREEN) == (120, 10, 220, 110)
    assert place(grid, BLUE) == (10, 120, 110, 220)
    assert (np.asarray(grid)[110:, 110:] == 255).all()


@pytest.mark.parametrize("number, columns, rows", [(1, 1, 1), (2, 2, 1), (4, 2, 2), (5, 3, 2), (12, 4, 3), (13, 5, 3)])
def test_flat_images_are_laid_out_near_square(number, columns, rows):
    grid = image_grid([plain_image(RED)] * number, cell=20, padding=0)
    assert grid.size == (20 * columns, 20 * rows)


def test_columns_are_as_many_as_asked_for():
    assert image_grid([plain_image(RED)] * 3, columns=1, cell=20, padding=0).size == (20, 60)
    assert image_grid([plain_image(RED)] * 3, columns=5, cell=20, padding=0).size == (100, 20)


def test_rows_may_be_ragged_and_cells_empty():
    rows = [[plain_image(RED), None, plain_image(GREEN)], [], (None, plain_image(BLUE)), [None]]
    grid = image_grid(rows, cell=50, padding=10)
    assert grid.size == (10 + 3 * 60, 10 + 4 * 60)
    assert place(grid, RED) == (10, 10, 60, 60)
    assert place(grid, GREEN) == (130, 10, 180, 60)
    assert place(grid, BLUE) == (70, 130, 120, 180)
    white = (np.asarray(grid) == 255).all(-1).sum()
    assert white == grid.width * grid.height - 3 * 50 * 50


def test_flat_images_may_leave_cells_empty():
    grid = image_grid([None, plain_image(RED), plain_image(GREEN), None], cell=50, padding=0)
    assert place(grid, RED) == (50, 0, 100, 50)
    assert place(grid, GREEN) == (0, 50, 50, 100)


@pytest.mark.parametrize(
    "size, width, height",
    [
        ((600, 200), 120, 40),
        ((200, 600), 40, 120),
        ((30, 10), 120, 40),
        ((4, 3), 120, 90),
        ((100, 75), 120, 90),
        ((120, 120), 120, 120),
        ((3000, 1), 120, 1),
    ],
)
def test_images_keep_their_aspect_ratio_and_are_centred(size, width, height):
    grid = image_grid([plain_image(RED, size), plain_image(GREEN)], cell=120, padding=10)
    assert grid.size == (270, 140)
    left, top = 10 + (120 - width) // 2, 10 + (120 - height) // 2
    assert place(grid, RED) == (left, top, left + width, top + height)


def test_a_row_and_a_column_are_no_larger_than_their_images():
    wide, tall = plain_image(RED, (100, 50)), plain_image(GREEN, (25, 50))
    assert image_grid([[wide, wide], [wide, wide]], cell=100, padding=10).size == (230, 130)
    assert image_grid([[wide], [tall]], cell=100, padding=10).size == (120, 180)
    assert image_grid([[tall, tall]], cell=100, padding=10).size == (130, 120)


def test_small_images_are_enlarged_to_sharp_squares():
    small = noise(64, 48)
    grid = image_grid([small], padding=0)
    assert grid.size == (192, 144)
    assert np.array_equal(grid, np.asarray(small).repeat(3, 0).repeat(3, 1))


def test_pixels_stay_sharp_where_the_scale_is_no_whole_number():
    small = noise(50, 50)
    grid = np.asarray(image_grid([small], padding=0))
    centres = ((np.arange(50) + 0.5) * 192 / 50).astype(int)
    assert np.array_equal(grid[centres][:, centres], small)


@pytest.mark.parametrize("side", [128, 500])
def test_larger_images_are_resampled_by_lanczos(side):
    large = noise(side, side)
    expected = large.resize((192, 192), Image.Resampling.LANCZOS)
    assert np.array_equal(image_grid([large], padding=0), expected)


@pytest.mark.parametrize(
    "image, color",
    [
        (Image.new("L", (8, 8), 90), (90, 90, 90)),
        (Image.new("1", (8, 8), 0), (0, 0, 0)),
        (plain_image(RED).quantize(4), RED),
        (Image.new("RGBA", (8, 8), (*RED, 255)), RED),
        (Image.new("RGBA", (8, 8), (*RED, 0)), (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("LA", (8, 8), (0, 51)), (204, 204, 204)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_is_shown_on_white(image, color):
    assert image_grid([image], cell=16, padding=0).getcolors() == [(256, color)]


def test_a_caption_is_centred_below_its_image():
    images = [plain_image(RED), plain_image(GREEN)]
    grid = image_grid(images, titles=["layer 0", None])
    left, top, right, bottom = extent(ink(grid))
    red = place(grid, RED)
    assert red[3] < top and bottom < grid.height
    assert red[0] < left and right < red[2]
    assert abs((left + right) - (red[0] + red[2])) <= 2
    assert place(grid, GREEN)[1] == red[1]


def test_captions_follow_the_rows_of_the_images():
    rows = [[plain_image(RED), plain_image(GREEN)], [plain_image(BLUE)]]
    grid = image_grid(rows, titles=[None, ["layer 7"]])
    left, top, right, _ = extent(ink(grid))
    blue = place(grid, BLUE)
    assert blue[3] < top and blue[0] < left and right < blue[2]
    assert blue[1] - place(grid, RED)[3] == 16, "no room for captions that are not there"


def test_titles_stand_left_of_rows_and_above_columns():
    rows = [[plain_image(RED), plain_image(GREEN)], [plain_image(BLUE), plain_image(GOLD)]]
    bare = image_grid(rows)
    red, blue = place(bare, RED), place(bare, BLUE)

    grid = image_grid(rows, row_titles=[None, "seed 17"])
    left, top, right, bottom = extent(ink(grid))
    moved = place(grid, BLUE)
    assert left > 0 and right < moved[0]
    assert abs((top + bottom) - (moved[1] + moved[3])) <= 6, "half way down its row"
    assert grid.height == bare.height
    assert grid.width - bare.width == moved[0] - blue[0]

    grid = image_grid(rows, column_titles=["step 4", None])
    left, top, right, bottom = extent(ink(grid))
    moved = place(grid, RED)
    assert top > 0 and bottom < moved[1]
    assert abs((left + right) - (moved[0] + moved[2])) <= 2
    assert grid.width == bare.width
    assert grid.height - bare.height == moved[1] - red[1]


def test_a_caption_is_nearer_to_its_own_image_than_to_the_next():
    grid = image_grid([plain_image(RED), plain_image(BLUE)], columns=1, titles=["layer 0", None])
    _, top, _, bottom = extent(ink(grid))
    assert top - place(grid, RED)[3] < 0.7 * (place(grid, BLUE)[1] - bottom)


def test_titles_of_different_length_all_end_at_their_images():
    rows = [[plain_image(RED), plain_image(GREEN)], [plain_image(BLUE), plain_image(GOLD)]]
    grid = image_grid(rows, row_titles=["one", "four\nand\nmore words"])
    red, blue = place(grid, RED), place(grid, BLUE)
    for image in (red, blue):
        *_, right, _ = extent(ink(grid)[image[1] : image[3]])
        assert image[0] - 20 < right < image[0]

    grid = image_grid(rows, column_titles=["one", "four\nand\nmore words"])
    red, green = place(grid, RED), place(grid, GREEN)
    for image in (red, green):
        *_, bottom = extent(ink(grid)[:, image[0] : image[2]])
        assert image[1] - 20 < bottom < image[1]


@pytest.mark.parametrize("kind, share", [("row_titles", 1.0), ("titles", 0.5)])
def test_lines_of_row_titles_end_together_and_those_of_captions_are_centred(kind, share):
    dark = ink(image_grid([plain_image(RED)], **{kind: ["m\nmmmmmmmm"]}))
    left, top, right, bottom = extent(dark)
    start, _, end, _ = extent(dark[: (top + bottom) // 2])
    assert start - left == pytest.approx(share * (right - left - end + start), abs=1)


def test_the_heading_is_above_everything():
    images = [plain_image(RED), plain_image(GREEN)]
    grid = image_grid(images, title="Diffusion lens", column_titles=["a", "b"])
    rows = np.nonzero(ink(grid).any(1))[0]
    gap = np.nonzero(np.diff(rows) > 8)[0]
    assert len(gap) == 1, "the heading, then the column titles"
    heading = extent(ink(grid)[: rows[gap[0]] + 1])
    assert abs((heading[0] + heading[2]) - grid.width) <= 2
    assert rows[-1] < place(grid, RED)[1]


@pytest.mark.parametrize("text", [LONG, "m" * 99], ids=["words", "one word"])
@pytest.mark.parametrize("kind", ["titles", "column_titles"])
def test_long_titles_make_the_grid_taller_and_stay_in_their_column(kind, text):
    images = [plain_image(RED), plain_image(GREEN), plain_image(BLUE)]
    short = image_grid(images, columns=3, **{kind: ["a", "a", "a"]})
    grid = image_grid(images, columns=3, **{kind: [None, text, None]})
    assert grid.width == short.width
    assert grid.height > short.height + 3 * 14
    left, top, right, bottom = extent(ink(grid))
    green = place(grid, GREEN)
    assert green[0] <= left and right <= green[2]
    assert top > 0 and bottom < grid.height
    assert bottom < green[1] or green[3] < top


def test_a_long_heading_makes_the_grid_taller_and_not_wider():
    short = image_grid([plain_image(RED)], title="a")
    grid = image_grid([plain_image(RED)], title=LONG)
    assert grid.width == short.width
    left, top, right, bottom = extent(ink(grid))
    assert left >= 16 and right <= grid.width - 16
    assert top > 0 and bottom < place(grid, RED)[1]


def test_a_long_row_title_is_wrapped_and_makes_its_row_taller():
    rows = [[plain_image(RED)], [plain_image(BLUE)]]
    grid = image_grid(rows, row_titles=[LONG * 3, "short"])
    left, top, right, bottom = extent(ink(grid)[: place(grid, BLUE)[1]])
    red, blue = place(grid, RED), place(grid, BLUE)
    assert red[0] - left <= 192 + 16 and left >= 16 and right <= red[0] - 16
    assert 0 < top < red[1] and red[3] < bottom
    assert abs((top + bottom) - (red[1] + red[3])) <= 6
    assert blue[3] == grid.height - 16, "the other row is as high as its image"


@pytest.mark.parametrize("kind", ["titles", "row_titles", "column_titles", "title"])
@pytest.mark.parametrize("word", ["prompt ", "W"])
def test_no_letter_of_a_long_text_is_lost(kind, word):
    def darkness(text):
        return ink(image_grid([plain_image(RED)], **{kind: text if kind == "title" else [text]})).sum()

    assert darkness(word * 60) == 60 * darkness(word) > 0


@pytest.mark.parametrize("letter", ["Ẳ", "ې", "j", "T", "W", "→"])
def test_letters_that_reach_far_are_whole_without_padding(letter):
    file = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    font = ImageFont.truetype(file, 31, layout_engine=ImageFont.Layout.BASIC)
    free = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(free).text((100, 100), letter, "#202020", font)
    grid = image_grid([plain_image(RED)], titles=[letter], cell=400, padding=0)
    assert ink(grid).sum() == ink(free).sum()


def test_lines_of_letters_that_reach_far_do_not_overlap():
    def darkness(text):
        return ink(image_grid([plain_image(RED)], titles=[text])).sum()

    assert darkness("ې\nẲ\nې") == 2 * darkness("ې") + darkness("Ẳ")


def test_words_are_wrapped_whole_and_line_breaks_kept():
    def captioned(text):
        return image_grid([plain_image(RED)], titles=[text])

    word = "m" * 8
    assert captioned(f"{word} {word}") == captioned(f"{word}\n{word}")
    assert captioned("a a") != captioned("a\na")
    assert captioned(" a \n") == captioned("a")


def test_a_module_path_is_broken_after_a_dot():
    def captioned(text):
        return image_grid([plain_image(RED)], titles=[text])

    word = "m" * 8
    assert captioned(f"{word}.{word}") == captioned(f"{word}.\n{word}")


def test_texts_have_room_beside_narrow_images():
    narrow = plain_image(RED, (2, 64))
    grid = image_grid([narrow, narrow], columns=2, titles=["narrow"] * 2, cell=32, padding=4)
    red = place(grid, RED)
    assert red[3] - red[1] == 32
    assert grid.height < red[3] + 2 * 20, "a caption of one line"


def test_the_font_grows_with_the_cell():
    def height(cell):
        _, top, _, bottom = extent(ink(image_grid([plain_image(RED)], titles=["H"], cell=cell)))
        return bottom - top

    assert height(384) == pytest.approx(2 * height(192), abs=1)
    assert height(16) >= 8, "and stays readable"


def test_texts_may_be_empty():
    images = [plain_image(RED), plain_image(GREEN)]
    bare = image_grid(images)
    assert bare == image_grid(images, titles=["", None], row_titles=[" "], title="\n")


def test_each_of_many_images_is_in_its_row_and_column():
    colors = [[(255 - 9 * row, 9 * column, 128) for column in range(8)] for row in range(13)]
    rows = [[plain_image(color) for color in line] for line in colors]
    layers = [f"layer {row}" for row in range(13)]
    grid = image_grid(rows, row_titles=layers, column_titles=[LONG] * 8, title=LONG, cell=96)
    left, top, _, _ = place(grid, colors[0][0])
    pixels = np.array(grid)
    for row, line in enumerate(colors):
        for column, color in enumerate(line):
            x, y = left + column * (96 + 16), top + row * (96 + 16)
            cell = pixels[y : y + 96, x : x + 96]
            assert (cell == color).all()
            cell[:] = 255
    assert (np.ptp(pixels, axis=-1) == 0).all()  # nothing but text is left


def test_inputs_stay_as_they_are_and_the_same_grid_comes_back():
    images = [noise(64, 48), Image.new("RGBA", (70, 9), (*RED, 90)), Image.new("1", (9, 9))]
    before = [image.copy() for image in images]
    given, titles = list(images), ["a", None, LONG]
    first = image_grid(given, titles=titles, title=LONG)
    assert all(a is b for a, b in zip(given, images, strict=True))
    assert images == before
    assert titles == ["a", None, LONG]
    assert image_grid(given, titles=titles, title=LONG) == first


def test_the_grid_is_an_image_of_its_own():
    image = plain_image(RED, (192, 192))
    image_grid([image], padding=0).putpixel((0, 0), (0, 0, 0))
    assert image.getcolors() == [(192 * 192, RED)]


A = plain_image(RED)


@pytest.mark.parametrize(
    "images, options, error, message",
    [
        ([], {}, ValueError, "at least one"),
        ([[], []], {}, ValueError, "at least one"),
        ([None, None], {}, ValueError, "at least one"),
        (A, {}, TypeError, "images has type Image: write a list"),
        (7, {}, TypeError, "images has type int: write a list"),
        ([A, "b.png"], {}, TypeError, r"images\[1\] has type str: pass a PIL image"),
        ([A, np.zeros((4, 4))], {}, TypeError, r"images\[1\] has type ndarray: .*fromarray"),
        ([[A], [A, 3]], {}, TypeError, r"images\[1\]\[1\] has type int"),
        ([[A], A], {}, TypeError, r"images\[1\] has type Image: write a list"),
        ([[A], None], {}, TypeError, r"images\[1\] has type NoneType: write a list"),
        ([A, Image.new("L", (0, 4))], {}, ValueError, r"images\[1\] has no pixels"),
        ([Image.new("F", (4, 4))], {}, ValueError, r"images\[0\] has mode F.* mode L"),
        ([Image.new("I;16", (4, 4))], {}, ValueError, r"images\[0\] has mode I;16"),
        ([A] * 4, {"titles": ["a"] * 3}, ValueError, "titles has 3 items, but needs 4"),
        ([[A], [A]], {"titles": ["a"]}, ValueError, "titles has 1 item, but needs 2"),
        ([[A], [A]], {"titles": [["a"], []]}, ValueError, r"titles\[1\] has 0 .* needs 1"),
        (
            [[A], [A]],
            {"titles": ["a", "b"]},
            TypeError,
            r"titles\[0\] has type str: write a list",
        ),
        ([A] * 3, {"titles": "abc"}, TypeError, "titles has type str: write a list"),
        ([A] * 2, {"titles": ["a", 1]}, TypeError, r"titles\[1\] has type int: write a string"),
        ([A] * 4, {"row_titles": ["a"]}, ValueError, "row_titles has 1 .* needs 2.* each row"),
        ([A] * 4, {"column_titles": ["a"]}, ValueError, "column_titles has 1 .* needs 2.* column"),
        ([[A], [A, A]], {"column_titles": ["a"] * 3}, ValueError, "has 3 items, but needs 2"),
        ([A], {"title": 5}, TypeError, "title has type int: write a string"),
        ([A], {"columns": 0}, ValueError, "columns is 0: write 1 or more"),
        ([A], {"columns": 1.5}, TypeError, "columns is 1.5: write an integer"),
        ([[A]], {"columns": 1}, ValueError, "given in rows: omit columns"),
        ([A], {"cell": 0}, ValueError, "cell is 0: write 1 or more"),
        ([A], {"cell": "big"}, TypeError, "cell is 'big': write an integer"),
        ([A], {"padding": -1}, ValueError, "padding is -1: write 0 or more"),
        ([A], {"cell": 10**6, "titles": ["a"]}, ValueError, "1 x 1 cells with cell=1000000 and .* is too large"),
        ([A], {"padding": 10**5}, ValueError, "and padding=100000 is too large: .* up to 200192 x"),
        ([A], {"columns": 10**12}, ValueError, "1 x 1000000000000 cells .* is too large"),
    ],
)
def test_bad_input_is_named(images, options, error, message):
    with pytest.raises(error, match=message):
        image_grid(images, **options)
