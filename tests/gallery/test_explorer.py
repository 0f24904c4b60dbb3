"""The explorer in Chromium, on small models: every view shows what its lens returns. Needs the extra `app`."""

import json
import shutil
import zipfile

import pytest

from diffsight import LanguageModel, diffusion_lens, logit_lens
from diffsight.gallery.cli import main
from models import lens_results

gr = pytest.importorskip("gradio", reason="Gradio is not installed (the extra `app`)")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (the extra `browser`)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("Chromium is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def address(saved_models):
    from diffsight.gallery.explorer import build_app

    app = build_app(str(saved_models / "pipeline"), str(saved_models / "language"))
    _, address, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, footer_links=[])
    yield address
    app.close()


@pytest.fixture
def page(address):
    wrong = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 900, "height": 800}).new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if address not in request.url + "/" else None)
        page.goto(address)
        page.get_by_label("Steps").fill("1")
        yield page
        browser.close()
    assert [one for one in wrong if not one.startswith(("data:", "blob:"))] == []


def press(page, name):
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def choose(page, tab):
    page.get_by_role("tab", name=tab, exact=True).locator("visible=true").click()


def pictures(page):
    return page.locator(".thumbnail-item img").locator("visible=true")


def saved(page, tmp_path):
    """Return the files that "Save" downloads."""
    with page.expect_download() as download:
        press(page, "Save")
    download.value.save_as(tmp_path / "saved.zip")
    with zipfile.ZipFile(tmp_path / "saved.zip") as archive:
        archive.extractall(tmp_path / "saved")
    return tmp_path / "saved"


def test_layers(page, saved_models, tmp_path):
    press(page, "Draw")
    pictures(page).first.wait_for()
    assert page.locator(".caption-label").locator("visible=true").all_inner_texts() == ["layer 2"]
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("slider").locator("visible=true").fill("0")
    page.get_by_text("embedding").locator("visible=true").first.wait_for()
    folder = saved(page, tmp_path)
    model = lens_results.load(saved_models / "pipeline")
    want = diffusion_lens(model, "a red circle above a blue square", seed=0, **lens_results.FAST)
    want.save(tmp_path / "want")
    assert (folder / "grid.png").read_bytes() == (tmp_path / "want" / "grid.png").read_bytes()
    page.get_by_text("As code").locator("visible=true").click()
    assert "diffusion_lens(" in page.locator(".cm-content").locator("visible=true").inner_text()


@pytest.mark.parametrize("tab, count", [("Attention", 2), ("Trajectory", 2), ("Patching", 3)])
def test_other_views_of_images(page, tab, count):
    choose(page, tab)
    press(page, "Draw")
    pictures(page).first.wait_for()
    assert pictures(page).count() == count
    if tab == "Attention":
        before = pictures(page).last.get_attribute("src")
        page.get_by_label("circle").click()
        page.wait_for_function("src => ![...document.images].some(i => i.getAttribute('src') === src)", arg=before)


def test_the_logit_lens(page, saved_models, tmp_path):
    want = logit_lens(LanguageModel(saved_models / "language"), "a red circle")
    choose(page, "Language")
    page.get_by_label("Prompt").locator("visible=true").fill("a red circle")
    press(page, "Read")
    page.get_by_test_id("cell-0-1").locator("visible=true").first.click()
    share = page.locator(".confidence-set").first
    share.wait_for()
    assert repr(want.texts[int(want.ids[0, -1, 0, 0])]) in share.inner_text()
    assert (saved(page, tmp_path) / "lens.json").is_file()


def test_steering(page, saved_models, tmp_path):
    choose(page, "Language")
    choose(page, "Steering")
    page.get_by_label("Layer").locator("visible=true").fill("1")
    page.get_by_label("Tokens").fill("2")
    for label, text in (("Prompt", "a red"), ("Towards", "a circle"), ("Away from", "a square")):
        page.get_by_label(label).locator("visible=true").fill(text)
    press(page, "Write")
    playwright.expect(page.get_by_label("Without")).not_to_have_value("", timeout=60_000)
    record = json.loads((saved(page, tmp_path) / "steering.json").read_text())
    assert record["without"] == LanguageModel(saved_models / "language").generate("a red", max_new_tokens=2).text


def test_bad_input_is_told(page):
    choose(page, "Patching")
    page.get_by_label("Its word").fill("<b>missing</b>")
    press(page, "Draw")
    page.get_by_text("<b>missing</b>").first.wait_for()


def test_a_port_in_use(address, capsys):
    port = address.rstrip("/").rpartition(":")[2]
    assert main(["explore", "--port", port]) == 2
    assert f"port {port} of 127.0.0.1" in capsys.readouterr().err
