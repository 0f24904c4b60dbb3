"""Where a result is saved: a folder, or one file, as its path says."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from diffsight.errors import InputError
from diffsight.lenses.layers import layer_file
from diffsight.lenses.results.saved_results import check_place
from models import lens_results


@pytest.fixture
def images(saved_models):
    return lens_results.make("diffusion_lens", saved_models)


@pytest.fixture
def figure(saved_models):
    return lens_results.make("run_prompts", saved_models)


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".webp", ".pdf"])
@pytest.mark.parametrize("name", ["images", "figure"])
def test_a_path_with_an_image_suffix_is_one_image(request, tmp_path, name, suffix):
    path = tmp_path / "deep" / f"lens{suffix}"
    assert request.getfixturevalue(name).save(path) == [path]
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    if suffix == ".pdf":
        assert path.read_bytes().startswith(b"%PDF")
    else:
        Image.open(path).load()


def test_the_image_is_the_grid(images, tmp_path):
    images.save(str(tmp_path / "lens.png"))
    assert np.array_equal(Image.open(tmp_path / "lens.png"), images.grid())


def test_svg_is_for_figures(images, figure, tmp_path):
    assert "<svg" in figure.save(tmp_path / "a.svg")[0].read_text()
    with pytest.raises(InputError, match=r"b\.svg.*cannot be an SVG file: write a \.png file"):
        images.save(tmp_path / "b.svg")
    assert not (tmp_path / "b.svg").exists()


def test_a_path_that_ends_with_html_is_the_page(images, tmp_path):
    assert images.save(tmp_path / "lens.html") == [tmp_path / "lens.html"]
    images.to_html(tmp_path / "same.html")
    assert (tmp_path / "lens.html").read_text() == (tmp_path / "same.html").read_text()


@pytest.mark.parametrize("name", ["lens", "v1.2", "lens.png.d"])
def test_any_other_path_is_a_folder(figure, tmp_path, name):
    assert {path.parent for path in figure.save(tmp_path / name)} == {tmp_path / name}


def test_a_folder_with_the_name_of_an_image_stays_a_folder(figure, tmp_path):
    (tmp_path / "old.png").mkdir()
    assert tmp_path / "old.png" / "targets.json" in figure.save(tmp_path / "old.png")


def test_a_result_without_an_image(saved_models, tmp_path):
    texts = lens_results.make("patchscope_generate", saved_models)
    with pytest.raises(InputError, match="PatchscopeTexts has no image"):
        texts.save(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_are_tensors_are_saved_with_the_record(saved_models, tmp_path):
    result = lens_results.make("patchscope_lens of hidden states", saved_models)
    assert tmp_path / "arguments.safetensors" in result.save(tmp_path)
    record = json.loads((tmp_path / "lens.json").read_text())
    assert record["call"]["arguments"]["prompts"] == {"$tensor": "prompts"}
    assert record["call"]["models"]["model"]["source"] == str(saved_models / "language")


def test_a_result_of_another_lens_in_the_folder_is_kept(images, figure, saved_models, tmp_path):
    images.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for other in (figure, lens_results.make("logit_lens", saved_models)):  # with a record of another name, and the same
        with pytest.raises(InputError, match=r"holds a result of diffusion_lens \(lens.json\): save the result of"):
            other.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    images.save(tmp_path)
    assert figure.save(tmp_path / "figure.png")  # one image is no folder


@pytest.mark.parametrize("name", ["grid.png", "page.html", "lens.json", "layer_00.png"])
def test_a_file_that_is_not_of_a_saved_result_is_kept(images, tmp_path, name):
    own = tmp_path / {"layer_00.png": f"{layer_file(images.layers[0])}.png"}.get(name, name)
    own.write_text("mine")
    with pytest.raises(InputError, match=rf"a file {own.name} that is not of a saved result, .* another folder"):
        images.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [own.name] and own.read_text() == "mine"
    own.rename(tmp_path / "notes.txt")
    images.save(tmp_path)
    images.save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_files_of_the_same_contents_can_be_replaced(images, figure, tmp_path):
    images.save(tmp_path / "grid.png")
    images.to_html(tmp_path / "page.html")
    assert tmp_path / "lens.json" in images.save(tmp_path)
    figure.save(tmp_path / "other" / "grid.png")
    drawn = (tmp_path / "other" / "grid.png").read_bytes()
    with pytest.raises(InputError, match=r"a file grid\.png that is not of a saved result"):
        images.save(tmp_path / "other")
    assert [path.read_bytes() for path in (tmp_path / "other").iterdir()] == [drawn]


@pytest.mark.parametrize("renamed", [1, 3])
def test_an_interrupt_leaves_no_new_file(images, tmp_path, monkeypatch, renamed):
    calls = []

    def replace(source, target, rename=os.replace):
        rename(source, target)
        calls.append(target)
        if len(calls) == renamed:
            raise KeyboardInterrupt

    (tmp_path / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        images.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    images.save(tmp_path)


def test_a_place_is_refused_for_the_files_of_every_result_alone(tmp_path):
    (tmp_path / "grid.png").write_text("mine")
    check_place(tmp_path, "logit_lens")
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(InputError, match=r"a file page\.html that is not of a saved result"):
        check_place(tmp_path, "logit_lens")


def test_a_name_that_is_too_long(images, tmp_path):
    for write in (images.save, images.to_html):
        with pytest.raises(InputError, match="cannot be written to: File name too long"):
            write(tmp_path / ("a" * 300))


def test_a_grid_is_saved_with_a_thumbnail(images, figure, tmp_path):
    assert tmp_path / "a" / "thumbnail.jpg" in images.save(tmp_path / "a")
    width, height = Image.open(tmp_path / "a" / "thumbnail.jpg").size
    assert width <= 480 and height <= 360
    want = images.grid().resize((width, height))
    off = np.abs(np.asarray(Image.open(tmp_path / "a" / "thumbnail.jpg"), int) - np.asarray(want, int))
    assert off.mean() < 6
    assert "thumbnail.jpg" not in {path.name for path in figure.save(tmp_path / "b")}
