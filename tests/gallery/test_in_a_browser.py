"""The pages in Chromium: sliders, keys, comparisons, no request, no error. Needs Playwright and Chromium."""

import json

import pytest

from diffsight import diffusion_lens
from diffsight.gallery import write_gallery
from models import lens_results


@pytest.fixture
def visit(browser):
    """Return a function that opens a file; no page may cause an error or ask for anything but files and data."""
    context = browser.new_context(viewport={"width": 900, "height": 800})
    wrong = []

    def open_page(path):
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    context.close()
    assert wrong == []


@pytest.fixture
def page_of(saved_models, tmp_path, visit):
    return lambda name: visit(lens_results.make(name, saved_models).to_html(tmp_path / "page.html"))


@pytest.mark.parametrize("name", ["encoder_patching", "compare_encoders", "image_token_lens", "patchscope_generate"])
def test_pages_have_no_errors_and_fit_a_phone(page_of, name):
    page = page_of(name)
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_images_are_chosen_with_slider_keys_and_clicks(page_of):
    page = page_of("diffusion_lens")
    caption, sheet = page.locator(".one figcaption"), page.locator(".sheet button")
    assert caption.inner_text() == "embedding"
    page.locator(".which").focus()
    page.keyboard.press("ArrowRight")
    assert caption.inner_text() == "layer 0"
    sheet.nth(2).click()
    page.keyboard.press("ArrowRight")
    assert caption.inner_text() == "layer 2"
    assert page.locator(".one img").first.get_attribute("src") == sheet.nth(3).locator("img").get_attribute("src")


def test_an_image_is_shown_at_full_size(page_of):
    page = page_of("diffusion_lens")
    page.locator(".one .picture").click()
    viewer = page.locator("#viewer")
    assert viewer.is_visible()
    page.keyboard.press("ArrowRight")
    assert viewer.locator("p").inner_text() == "layer 0"
    page.keyboard.press("Escape")
    assert not viewer.is_visible()


def test_two_images_are_compared(page_of):
    page = page_of("diffusion_lens")
    page.locator(".with").select_option(label="layer 2")
    assert page.locator(".other figcaption").inner_text() == "layer 2"
    page.locator(".mode select").select_option("blend")
    page.locator(".amount input").fill("25")
    assert page.locator(".one .over").evaluate("element => element.style.opacity") == "0.25"
    assert not page.locator(".other").is_visible()


def test_a_cell_of_a_table_shows_its_likeliest_tokens(page_of, saved_models):
    result = lens_results.make("logit_lens", saved_models)
    page = page_of("logit_lens")
    page.locator("td").first.focus()
    readout = page.locator(".table .readout").first
    assert f"{result.probabilities[0, -1, 0, 1]:.3f}" in readout.inner_text()
    page.keyboard.press("ArrowDown")
    assert f"{result.probabilities[0, -2, 0, 1]:.3f}" in readout.inner_text()


def test_values_of_curves_and_maps_are_read_with_keys(page_of, saved_models):
    page = page_of("compare_encoders")
    page.locator(".cells").first.focus()
    page.keyboard.press("ArrowRight")
    want = lens_results.make("compare_encoders", saved_models).cka("SD", "SD")[0, 1]
    assert page.locator(".heat_map .readout").first.inner_text().endswith(f"{want:.3f}")
    page = page_of("run_prompts by layer")
    page.locator(".curves > svg").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".curves .readout").first.inner_text().startswith("0: right 0.0")


def test_a_script_in_a_prompt_does_not_run(saved_models, tmp_path, visit):
    model = lens_results.load(saved_models / "pipeline")
    prompt = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    result = diffusion_lens(model, prompt, layers=0, **lens_results.FAST)
    result.save(tmp_path / "study" / "a")
    for path in (tmp_path / "study" / "a" / "page.html", write_gallery(tmp_path / "study")):
        assert prompt in visit(path).locator("h1, h2").first.inner_text() + visit(path).inner_text("main")


def test_the_gallery_filters_compares_and_sees_new_results(saved_models, tmp_path, visit):
    folder, model = tmp_path / "study", lens_results.load(saved_models / "pipeline")
    for seed in (0, 1):
        diffusion_lens(
            model, f"a {'red' if seed else 'blue'} circle", layers=[0, 1], seed=seed, **lens_results.FAST
        ).save(folder / str(seed))
    lens_results.make("run_prompts", saved_models).save(folder / "words")
    page = visit(write_gallery(folder))
    count = page.locator("#count")
    assert count.inner_text() == "3 of 3 results"
    page.locator("[name=prompt]").fill("RED circle")
    assert count.inner_text() == "1 of 3 results"
    page.locator("[type=reset]").click()
    page.locator("[name=lens]").select_option("diffusion_lens")
    assert count.inner_text() == "2 of 3 results"
    page.locator("[name=view]").select_option("sheet")
    assert page.locator("thead th").all_inner_texts()[:3] == ["result", "layer_00", "layer_01"]
    for box in page.locator("input[data-key]").all():
        box.check()
    page.locator(".compare").click()
    assert [row.inner_text().split("\t")[0] for row in page.locator("tr.differs").all()] == ["prompt", "seed"]
    page.keyboard.press("Escape")
    entries = (folder / "gallery_data.js").read_text()
    (folder / "gallery_data.js").write_text(entries.replace("galleryData([", f"galleryData([{json.dumps(more())}, "))
    page.wait_for_function("document.querySelector('#count').textContent.includes('3 of 4')", timeout=9000)


def more():
    """Return an entry of the gallery, as a result that was added has."""
    names = ("folder", "model", "prompt", "base", "record", "page", "cover")
    return {
        **dict.fromkeys(names, "new"),
        "lens": "diffusion_lens",
        "seed": 9,
        "date": "2026-01-01",
        "settings": {},
    } | {"images": {}}
