"""Make the screenshots of the documentation: of a page, of a gallery and of every view of the explorer, or those named.

    python docs/make_screenshots.py
    python docs/make_screenshots.py page explorer-layers

Each shows a desktop and a phone, light and dark. It needs the extras `app`, `browser` and `smollm2`, and Chromium, and
takes about five minutes.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from diffsight import DiffusionModel, diffusion_lens, trajectory_lens
from diffsight.gallery import write_gallery

FOLDER = Path(__file__).parent / "images"
PORT = 7861
DESKTOP, PHONE = {"width": 1100, "height": 900}, {"width": 390, "height": 844}
GAP, WIDTH = 20, 1400  # of the image, in pixels
PROMPTS = ["a red circle above a blue square", "a green ring below a white triangle"]

Draw = Callable[[Page], None]


def shot(browser: Browser, address: str, draw: Draw) -> Image.Image:
    """Return an image of a page: desktops at the left, phones beside them, light and dark."""
    with tempfile.TemporaryDirectory() as folder:
        columns: list[list[Path]] = [[], [], []]
        for scheme, phones in (("light", 1), ("dark", 2)):
            page = browser.new_page(color_scheme=scheme, viewport=DESKTOP)
            page.set_default_timeout(300_000)
            page.goto(address)
            draw(page)
            for size, column in ((DESKTOP, 0), (PHONE, phones)):
                page.set_viewport_size(size)
                page.wait_for_timeout(1000)  # until everything has its place
                columns[column].append(Path(folder) / f"{scheme}-{column}.png")
                page.screenshot(path=columns[column][-1], full_page=True)
            page.close()
        return arranged([[Image.open(path).convert("RGB") for path in column] for column in columns])


def arranged(columns: list[list[Image.Image]]) -> Image.Image:
    """Return one image of several, in columns."""
    widths = [max(image.width for image in column) for column in columns]
    height = max(sum(image.height + GAP for image in column) for column in columns) + GAP
    sheet = Image.new("RGB", (sum(widths) + GAP * (len(columns) + 1), height), "gray")
    for number, column in enumerate(columns):
        top = GAP
        for image in column:
            sheet.paste(image, (GAP * (number + 1) + sum(widths[:number]), top))
            top += image.height + GAP
    return sheet.resize((WIDTH, round(height * WIDTH / sheet.width)), Image.Resampling.LANCZOS)


# ---- pages of results


def make_study(folder: Path) -> None:
    model = DiffusionModel("diffsight/shapes-clip")
    for number, prompt in enumerate(PROMPTS):
        lens = diffusion_lens(model, prompt, layers=["embedding", 0, 5, 8, -1], seed=1, progress=False)
        lens.save(folder / f"layers_{number}")
        steps = {"num_inference_steps": 20, "steps": slice(None, None, 5)}
        trajectory_lens(model, prompt, seed=1, progress=False, **steps).save(folder / f"steps_{number}")


def page_of_a_result(page: Page) -> None:
    page.locator(".which").fill("3")
    page.locator(".with").select_option(label="layer 11")


def gallery(page: Page) -> None:
    page.locator("#count").wait_for()


# ---- views of the explorer


def visible(found: Locator) -> Locator:
    return found.locator("visible=true")


def choose(page: Page, *tabs: str) -> None:
    for tab in tabs:
        visible(page.get_by_role("tab", name=tab, exact=True)).click()


def press(page: Page, name: str) -> None:
    visible(page.get_by_role("button", name=name, exact=True)).click()


def drawn(tab: str) -> Draw:
    """Return a function that draws a view of a pipeline."""

    def draw(page: Page) -> None:
        choose(page, tab)
        press(page, "Draw")
        visible(page.locator(".thumbnail-item img")).first.wait_for()
        if tab == "Attention":
            page.get_by_label("circle").click()
        visible(page.get_by_text("As code")).click()

    return draw


def logit_lens(page: Page) -> None:
    choose(page, "Language")
    press(page, "Read")
    visible(page.get_by_test_id("cell-0-1")).first.click()
    page.locator(".confidence-set").first.wait_for()


def steering(page: Page) -> None:
    choose(page, "Language", "Steering")
    press(page, "Write")
    page.wait_for_function("[...document.querySelectorAll('textarea')].filter(area => area.value).length > 4")


PAGES: dict[str, tuple[str, Draw]] = {
    "page": ("layers_0/page.html", page_of_a_result),
    "gallery": ("index.html", gallery),
}
VIEWS: dict[str, Draw] = {
    "explorer-layers": drawn("Layers"),
    "explorer-attention": drawn("Attention"),
    "explorer-trajectory": drawn("Trajectory"),
    "explorer-patching": drawn("Patching"),
    "explorer-logit-lens": logit_lens,
    "explorer-steering": steering,
}


@contextmanager
def explorer() -> Iterator[str]:
    """Start the explorer, yield its address, and end it."""
    words = [sys.executable, "-m", "diffsight.gallery.cli", "explore", "--port", str(PORT)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def shots(names: list[str], browser: Browser) -> Iterator[tuple[str, Image.Image]]:
    pages, views = ({name: of[name] for name in names if name in of} for of in (PAGES, VIEWS))
    if pages:
        with tempfile.TemporaryDirectory() as folder:
            study = Path(folder) / "study"
            make_study(study)
            write_gallery(study)
            for name, (file, draw) in pages.items():
                yield name, shot(browser, (study / file).as_uri(), draw)
    if views:
        with explorer() as address:
            for name, draw in views.items():
                yield name, shot(browser, address, draw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    all_names = [*PAGES, *VIEWS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(all_names)} (default: all)")
    names = parser.parse_args().names or all_names
    if unknown := set(names) - set(all_names):
        parser.error(f"no screenshot is called {', '.join(sorted(unknown))}; there are {', '.join(all_names)}")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        parser.error("Chromium is not installed")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, image in shots(names, browser):
            image.quantize(256, kmeans=1, dither=Image.Dither.NONE).save(FOLDER / f"{name}.png", optimize=True)
            print(FOLDER / f"{name}.png", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
