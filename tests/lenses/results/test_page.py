"""The HTML page of a result: it has everything in it, escapes all texts, and asks for nothing."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from diffsight import diffusion_lens, logit_lens
from diffsight.errors import InputError
from diffsight.lenses.results.page import page_of
from diffsight.lenses.results.sections import (
    Cell,
    CurveSection,
    HeatMapSection,
    ImageSection,
    Media,
    OverlaySection,
    TableSection,
)
from models import lens_results

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"a' & {{ b }} <b>c</b>"
VOID = {"meta", "img", "input", "link", "br", "line", "circle", "polyline"}


class Page(HTMLParser):
    """The elements of a page, with their attributes and texts; tags must be balanced."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag):
        return [text for inside, text in self.texts if inside == tag]


def from_data(address):
    assert address.startswith("data:")
    return base64.b64decode(address.split("base64,")[1])


def image_in(address):
    return np.asarray(Image.open(io.BytesIO(from_data(address))).convert("RGB"))


def same_with_nan(a, b):
    return torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


def assert_asks_for_nothing(page):
    policy = next(one["content"] for one in page.all("meta") if "http-equiv" in one)
    assert policy.startswith("default-src 'none'")
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action"):
            assert name not in attributes or attributes[name].startswith("data:"), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not page.all("link")
    styles = "".join(page.text("style"))
    assert "url(" not in styles and "@import" not in styles
    assert not re.search(r"https?:|fetch\(|XMLHttp", "".join(page.text("script")))


@pytest.mark.parametrize("name", lens_results.MADE)
def test_every_lens_has_a_page(name, saved_models, tmp_path):
    result = lens_results.make(name, saved_models)
    assert result.to_html(tmp_path / "page.html") == tmp_path / "page.html"
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert_asks_for_nothing(page)
    assert len(page.all("section")) >= 3  # a section, the code, the record
    assert all("alt" in image for image in page.all("img"))
    sheet = [image for image in page.all("img") if "width" in image]
    assert all(image["alt"] for image in sheet)
    assert all(one.get("aria-label") for one in page.all("section"))
    labelled = sum(tag == "label" for tag, _ in page.elements)
    assert labelled >= len(page.all("input")) + len(page.all("select"))


def test_the_images_of_the_page_are_those_of_the_result(saved_models, tmp_path):
    result = lens_results.make("diffusion_lens", saved_models)
    page = Page(result.to_html(tmp_path / "p.html").read_text(encoding="utf-8"))
    shown = [image for image in page.all("img") if "width" in image]
    assert [image["alt"].split(",")[0] for image in shown] == ["embedding", "layer 0", "layer 1", "layer 2"]
    for image, want in zip(shown, result.images, strict=True):
        assert np.array_equal(image_in(image["src"]), want)


def test_save_writes_the_page_and_its_record(saved_models, tmp_path):
    result = lens_results.make("diffusion_lens", saved_models)
    paths = result.save(tmp_path)
    assert tmp_path / "page.html" in paths
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    (record,) = [one for one in page.all("a") if one["download"] == "record.json"]
    saved = json.loads((tmp_path / "lens.json").read_text(encoding="utf-8"))
    assert {"lens.json", *saved.pop("files")} == {path.name for path in paths}
    assert json.loads(from_data(record["href"])) == saved


def test_the_code_on_the_page_repeats_the_result(saved_models):
    result = lens_results.make("logit_lens", saved_models)
    page, names = Page(Page(result._repr_html_()).all("iframe")[0]["srcdoc"]), {}
    exec("".join(page.text("pre")[:1]), names)
    assert same_with_nan(names["result"].probabilities, result.probabilities)


def test_a_table_has_the_words_and_their_details(saved_models, tmp_path):
    result = lens_results.make("logit_lens", saved_models)
    page = Page(result.to_html(tmp_path / "p.html").read_text(encoding="utf-8"))
    cells = [one for one in page.all("td") if "data-details" in one]
    assert len(cells) == sum(len(result.layers) * len(inputs) for inputs in result.inputs)
    last = json.loads(cells[0]["data-details"])  # the last layer is on top
    assert [value for _, value in last] == pytest.approx(result.probabilities[0, -1, 0].tolist())
    assert float(cells[0]["style"].split(":")[1]) == pytest.approx(last[0][1], abs=1e-3)


def test_markup_in_a_prompt_is_shown_as_text(saved_models, tmp_path):
    model = lens_results.load(saved_models / "pipeline")
    prompt = NASTY.replace("alert", "a")  # short enough for the tokenizer
    result = diffusion_lens(model, prompt, layers=0, **lens_results.FAST)
    text = result.to_html(tmp_path / f"{NASTY.replace('/', '')[:40]}.html").read_text(encoding="utf-8")
    page = Page(text)
    assert_asks_for_nothing(page)
    assert len(page.all("script")) == 1
    assert not page.all("b")
    assert page.text("title") == page.text("h1") == [f"diffusion_lens: {prompt}"]
    assert_asks_for_nothing(Page(Page(result._repr_html_()).all("iframe")[0]["srcdoc"]))


def test_markup_is_escaped_in_every_kind_of_section():
    image, values = Image.new("RGB", (4, 4)), torch.tensor([[0.5, torch.nan]])
    sections = [
        ImageSection(NASTY, {NASTY: {NASTY: image, "sound": Media(image, "audio/wav", b"RIFF")}}),
        TableSection(NASTY, NASTY, [NASTY], {NASTY: [Cell(NASTY, torch.nan, [(NASTY, 0.5)])]}, NASTY),
        CurveSection(NASTY, NASTY, [NASTY], {NASTY: [torch.nan]}, NASTY),
        HeatMapSection(NASTY, [NASTY], [NASTY, "b"], values, NASTY, (NASTY, NASTY)),
        OverlaySection(NASTY, image, {NASTY: values}, {NASTY: [[NASTY, "b"]]}, NASTY),
    ]
    page = Page(page_of(NASTY, sections, {"lens": "x", "prompt": NASTY, NASTY: NASTY}, NASTY))
    assert_asks_for_nothing(page)
    assert len(page.all("script")) == 1
    assert not page.all("b")
    for _, attributes in page.elements:
        for name in ("data-details", "data-rows", "data-columns", "data-values", "data-places", "data-maps"):
            if name in attributes:
                json.loads(attributes[name], parse_constant=lambda constant: pytest.fail(constant))
    assert from_data(next(one["data-sound"] for one in page.all("img") if "data-sound" in one)) == b"RIFF"


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(saved_models):
    result = lens_results.make("run_prompts", saved_models)
    (frame,) = Page(result._repr_html_()).all("iframe")
    assert "allow-same-origin" not in frame["sandbox"]
    assert Page(frame["srcdoc"]).all("table")
    assert result._repr_png_().startswith(b"\x89PNG")


def test_a_folder_that_does_not_exist_is_created(saved_models, tmp_path):
    result = lens_results.make("run_prompts", saved_models)
    assert result.to_html(tmp_path / "a" / "b.html").is_file()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot be written"):
        result.to_html(tmp_path / "file" / "page.html")


def test_numbers_can_be_downloaded(saved_models, tmp_path):
    model = lens_results.load(saved_models / "language")
    result = logit_lens(model, "A cat sat on the", tokens=" Paris", layers=[0, -1])
    page = Page(result.to_html(tmp_path / "p.html").read_text(encoding="utf-8"))
    (curves,) = [one for one in page.all("a") if one["download"] == "curves.csv"]
    lines = from_data(curves["href"]).decode().splitlines()
    assert lines[0] == "layer,␣Paris"
    shown = [float(line.split(",")[1]) for line in lines[1:]]
    assert shown == pytest.approx(result.token_probabilities[0, :, -1, 0].tolist(), rel=1e-3)
