"""The explorer in Chromium, on small models: every view shows what its lens returns, and its code makes the same.

Needs the extras `app` and `browser`.
"""

import json
import socket
import time
import zipfile
from contextlib import contextmanager
from urllib.request import urlopen

import pytest

from diffsight import LanguageModel, diffusion_lens, logit_lens
from diffsight.gallery.cli import main
from models import lens_results

PROMPT = "a red circle above a blue square"
LONG = "900"  # steps, which no test waits for


@pytest.fixture(scope="module")
def opened():
    """Return the models that the explorer has loaded, by name."""
    return {}


@pytest.fixture(scope="module")
def address(browser, saved_models, opened):
    pytest.importorskip("gradio", reason="Gradio is not installed (the extra `app`)")
    from diffsight.gallery.explorer import shared_models
    from diffsight.gallery.explorer.explore import build_app, start_app

    def open_model(name):
        assert name not in opened  # once, for all visitors
        opened[name] = lens_results.load(saved_models / name.rpartition("/")[2])
        return opened[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_models, "open_model", open_model)
        app = build_app(str(saved_models / "pipeline"), str(saved_models / "language"))
        start_app(app, "127.0.0.1")
        yield app.local_url
        app.close()


@pytest.fixture
def visit(address, browser):
    """Return a context with the page of a new visitor; nothing may fail in it or be asked of another machine."""

    @contextmanager
    def visitor(steps="1", seed="0"):
        wrong = []
        context = browser.new_context(viewport={"width": 900, "height": 800})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if address not in request.url + "/" else None)
        page.goto(address)
        page.get_by_label("Steps").fill(steps)
        page.get_by_label("Seed").fill(seed)
        yield page
        context.close()
        assert [one for one in wrong if not one.startswith(("data:", "blob:"))] == []

    return visitor


@pytest.fixture
def page(visit):
    with visit() as page:
        yield page


def press(page, name):
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def choose(page, tab):
    page.get_by_role("tab", name=tab, exact=True).locator("visible=true").click()


def fill(page, **texts):
    for label, text in texts.items():
        page.get_by_label(label.replace("_", " ")).locator("visible=true").fill(text)


def pictures(page):
    return page.locator(".thumbnail-item img").locator("visible=true")


def saved(page, folder):
    """Return a folder with the files that "Save" downloads."""
    with page.expect_download() as download:
        press(page, "Save")
    download.value.save_as(folder / "saved.zip")
    with zipfile.ZipFile(folder / "saved.zip") as archive:
        archive.extractall(folder / "saved")
    return folder / "saved"


def run_code(page, capsys):
    """Run the code that the button "Copy as code" copies. Return its names, and what it prints."""
    page.get_by_text("As code").locator("visible=true").click()
    code = page.locator(".block").filter(has=page.locator(".cm-editor")).locator("visible=true")
    code.get_by_role("button", name="Copy").click()  # not that of a table
    names = {}
    capsys.readouterr()
    exec(page.evaluate("navigator.clipboard.readText()"), names)
    return names, capsys.readouterr().out


def assert_same_files(result, folder, other):
    """Assert that a result saves the files that are in a folder, apart from the page and the time of the call."""
    result.save(other)
    left_out = {"page.html", "lens.json"}
    names = {path.name for path in folder.iterdir()} - left_out
    assert names == {path.name for path in other.iterdir()} - left_out and names
    assert all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_layers(page, saved_models, tmp_path, capsys):
    press(page, "Draw")
    pictures(page).first.wait_for()
    assert page.locator(".caption-label").locator("visible=true").all_inner_texts() == ["layer 2"]
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert pictures(page).first.bounding_box()["width"] > 120
    page.get_by_role("slider").locator("visible=true").fill("0")
    page.get_by_text("embedding").locator("visible=true").first.wait_for()
    folder = saved(page, tmp_path)
    want = diffusion_lens(lens_results.load(saved_models / "pipeline"), PROMPT, seed=0, **lens_results.FAST)
    assert_same_files(want, folder, tmp_path / "want")
    assert_same_files(run_code(page, capsys)[0]["result"], folder, tmp_path / "code")


@pytest.mark.parametrize("tab, count", [("Attention", 2), ("Trajectory", 2), ("Patching", 3)])
def test_other_views_of_images(page, tab, count, tmp_path, capsys):
    choose(page, tab)
    press(page, "Draw")
    pictures(page).first.wait_for()
    assert pictures(page).count() == count
    if tab == "Attention":
        before = pictures(page).last.get_attribute("src")
        page.get_by_label("circle").click()
        page.wait_for_function("src => ![...document.images].some(i => i.getAttribute('src') === src)", arg=before)
    folder = saved(page, tmp_path)
    assert_same_files(run_code(page, capsys)[0]["result"], folder, tmp_path / "code")


def test_the_logit_lens(page, saved_models, tmp_path, capsys):
    want = logit_lens(LanguageModel(saved_models / "language"), "a red circle")
    choose(page, "Language")
    fill(page, Prompt="a red circle")
    press(page, "Read")
    page.get_by_test_id("cell-0-1").locator("visible=true").first.click()
    share = page.locator(".confidence-set").first
    share.wait_for()
    assert repr(want.texts[int(want.ids[0, -1, 0, 0])]) in share.inner_text()
    assert_same_files(run_code(page, capsys)[0]["result"], saved(page, tmp_path), tmp_path / "code")


def test_steering(page, saved_models, tmp_path, capsys):
    choose(page, "Language")
    choose(page, "Steering")
    fill(page, Layer="1", Tokens="2", Prompt="a red", Towards="a circle", Away_from="a square")
    press(page, "Write")
    page.wait_for_function("[...document.querySelectorAll('textarea')].filter(area => area.value).length > 4")
    record = json.loads((saved(page, tmp_path) / "steering.json").read_text())
    assert record["without"] == LanguageModel(saved_models / "language").generate("a red", max_new_tokens=2).text
    assert record["steered"] != record["without"]
    assert run_code(page, capsys)[1] == record["steered"] + "\n"


def test_stop_ends_the_work_and_the_next_visitor_begins(visit, opened, saved_models, tmp_path):
    with visit(LONG) as one, visit(seed="5") as other:
        unet = lens_results.load(saved_models / "pipeline").pipeline.unet
        press(one, "Draw")
        wait_until(one, lambda: unet._forward_pre_hooks)  # with which Stop ends the work
        press(other, "Draw")
        other.wait_for_timeout(300)
        assert pictures(other).count() == 0  # waits for its turn
        press(one, "Stop")
        pictures(other).first.wait_for()
        assert pictures(one).count() == 0
        assert not unet._forward_pre_hooks
        want = diffusion_lens(lens_results.load(saved_models / "pipeline"), PROMPT, seed=5, **lens_results.FAST)
        assert_same_files(want, saved(other, tmp_path), tmp_path / "want")
        fill(one, Steps="1")
        press(one, "Draw")
        pictures(one).first.wait_for()


def test_a_visitor_who_stops_waiting_does_not_stop_the_other(visit, saved_models, tmp_path):
    unet = lens_results.load(saved_models / "pipeline").pipeline.unet
    with visit("60") as one, visit() as other:
        press(one, "Draw")
        wait_until(one, lambda: unet._forward_pre_hooks)
        press(other, "Draw")
        press(other, "Stop")
        pictures(one).first.wait_for()
        assert pictures(other).count() == 0
        press(other, "Draw")
        pictures(other).first.wait_for()


def wait_until(page, condition):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + 30
        page.wait_for_timeout(10)


def test_bad_input_is_told(page):
    choose(page, "Patching")
    fill(page, Its_word="<b>missing</b>")
    press(page, "Draw")
    page.get_by_text("<b>missing</b>").first.wait_for()


def test_an_error_of_the_pipeline_is_told(page, saved_models):
    def fail(*_):
        raise ZeroDivisionError("<b>in the denoiser</b>")

    unet = lens_results.load(saved_models / "pipeline").pipeline.unet
    with unet.register_forward_pre_hook(fail):
        press(page, "Draw")
        page.get_by_text("ZeroDivisionError: <b>in the denoiser</b>").first.wait_for()


@pytest.mark.parametrize("label", ["Steps", "Seed"])
def test_an_empty_number_is_told(page, label):
    fill(page, **{label: ""})
    press(page, "Draw")
    page.get_by_text(f"{label} is empty").first.wait_for()


def test_the_command_names_the_address_once_it_answers(address, saved_models, monkeypatch, capsys):
    import gradio

    def look(app):
        answers.append(urlopen(capsys.readouterr().out.strip()).status)
        app.close()

    answers = []
    monkeypatch.setattr(gradio.Blocks, "block_thread", look)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert main(["explore", "--model", str(saved_models / "pipeline"), "--port", str(port)]) == 0
    assert answers == [200]


def test_it_is_imported_from_the_gallery(address):
    from diffsight.gallery import explore
    from diffsight.gallery.explorer import explore as module

    assert explore is module.explore


def test_a_port_in_use(address, capsys):
    port = address.rstrip("/").rpartition(":")[2]
    assert main(["explore", "--port", port]) == 2
    assert f"port {port} of 127.0.0.1" in capsys.readouterr().err
