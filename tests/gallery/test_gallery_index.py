"""The gallery of a folder: what it lists, what it writes, and what it refuses."""

import errno
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffsight.errors import InputError
from diffsight.gallery import repeat, sweep, write_gallery
from diffsight.gallery.cli import main
from models import lens_results

NASTY = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def study(saved_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery") / "study"
    for name in ("diffusion_lens", "logit_lens", "run_prompts", "layer_fidelity"):
        lens_results.make(name, saved_models).save(folder / "deep" / name)
    return folder


def data_of(folder):
    text = (folder / "gallery_data.js").read_text(encoding="utf-8")
    return json.loads(text.removeprefix("galleryData(").removesuffix(");\n"))


def test_every_result_is_listed_with_files_that_exist(study):
    assert write_gallery(study) == study / "index.html"
    found = data_of(study)
    assert [one["folder"] for one in found] == [
        f"deep/{name}" for name in ("diffusion_lens", "layer_fidelity", "logit_lens", "run_prompts")
    ]
    for one in found:
        for name in (one["record"], one["page"], *one["images"].values()):
            assert (study / (one["base"] + name)).is_file()
        assert (study / one["cover"]).is_file()
    lens = found[0]
    assert (lens["lens"], lens["prompt"], lens["seed"]) == ("diffusion_lens", lens_results.PROMPT, 3)
    assert list(lens["images"]) == ["embedding", "layer_00", "layer_01", "layer_02"]
    assert lens["date"] == json.loads((study / lens["base"] / "lens.json").read_text())["call"]["date"][:19]


def test_the_command_prints_the_page(study, capsys):
    assert main(["gallery", str(study)]) == 0
    assert capsys.readouterr().out == f"{study / 'index.html'}\n"


def test_new_results_are_added(study, tmp_path, saved_models):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    write_gallery(folder)
    before = data_of(folder)
    lens_results.make("patchscope_generate", saved_models).save(folder / "new")
    write_gallery(folder)
    assert [one for one in data_of(folder) if one["folder"] != "new"] == before
    assert {one["folder"] for one in data_of(folder)} - {one["folder"] for one in before} == {"new"}
    shutil.rmtree(folder / "new")
    write_gallery(folder)
    assert data_of(folder) == before


def test_large_images_have_thumbnails_that_are_made_once(study, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(study / "deep" / "diffusion_lens", folder / "a b#c")
    noise = np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a b#c" / "grid.png")
    write_gallery(folder)
    (one,) = data_of(folder)
    assert (one["base"], one["cover"]) == ("a%20b%23c/", "a%20b%23c/thumbnail.jpg")
    assert "thumbnail" not in one["images"]
    assert not (folder / "thumbnails").exists()
    (folder / "a b#c" / "thumbnail.jpg").unlink()  # as in results of older versions
    write_gallery(folder)
    (one,) = data_of(folder)
    (thumbnail,) = (folder / "thumbnails").iterdir()
    assert one["cover"] == f"thumbnails/{thumbnail.name}"
    assert max(Image.open(thumbnail).size) == 480
    made = thumbnail.stat().st_mtime_ns
    write_gallery(folder)
    assert thumbnail.stat().st_mtime_ns == made


def test_texts_of_records_cannot_become_markup(tmp_path):
    place = tmp_path / "<b>x"
    place.mkdir()
    (place / "lens.json").write_text(json.dumps({"lens": NASTY, "prompt": NASTY, "model": NASTY, "seed": NASTY}))
    write_gallery(tmp_path)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert NASTY not in page
    assert "innerHTML" not in page
    (one,) = data_of(tmp_path)
    assert (one["prompt"], one["base"], one["page"]) == (NASTY, "%3Cb%3Ex/", "")
    assert one["date"]  # from the file


def test_a_result_saved_over_another_replaces_it(tmp_path, saved_models):
    result = lens_results.make("diffusion_lens", saved_models)
    result.save(tmp_path / "lens")
    (tmp_path / "lens" / "mine.png").write_bytes((tmp_path / "lens" / "layer_01.png").read_bytes())
    other = replace(result, layers=result.layers[-1:], images=result.images[-1:], outputs=())
    paths = other.save(tmp_path / "lens")
    assert {path.name for path in (tmp_path / "lens").iterdir()} == {"mine.png", *(path.name for path in paths)}
    write_gallery(tmp_path)
    (found,) = data_of(tmp_path)
    assert list(found["images"]) == ["layer_02"]


def test_what_is_no_result_is_left_out(study, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(study / "deep" / "run_prompts", folder / "good")
    (folder / "good" / "other.json").write_text('{"a": 1}')
    (folder / "damaged").mkdir()
    (folder / "damaged" / "lens.json").write_text('{"lens": ')
    (folder / ".hidden").mkdir()
    shutil.copy(folder / "good" / "targets.json", folder / ".hidden")
    write_gallery(folder)
    assert [one["folder"] for one in data_of(folder)] == ["good"]


DEEP = "[" * 100_000


def test_json_that_is_nested_too_deeply_is_no_result(study, tmp_path):
    shutil.copytree(study / "deep" / "run_prompts", tmp_path / "good")
    (tmp_path / "good" / "other.json").write_text(DEEP)
    write_gallery(tmp_path)
    assert [one["folder"] for one in data_of(tmp_path)] == ["good"]
    with pytest.raises(InputError, match=r"other\.json is not the record of a result"):
        repeat(tmp_path / "good" / "other.json")


@pytest.mark.parametrize("changed", [{"call": None}, {"call": []}, {"prompts": 3}])
def test_damaged_records_are_named_and_left_out(study, tmp_path, changed):
    for name in ("good", "bad"):
        shutil.copytree(study / "deep" / "diffusion_lens", tmp_path / name)
    path = tmp_path / "bad" / "lens.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.warns(RuntimeWarning, match=rf"{path} is damaged, and the gallery leaves it out: ") as caught:
        write_gallery(tmp_path)
    assert [one["folder"] for one in data_of(tmp_path)] == ["good"]
    assert [one.filename for one in caught] == [__file__]
    shutil.rmtree(tmp_path / "good")
    with pytest.warns(RuntimeWarning), pytest.raises(InputError, match="there are no results in"):
        write_gallery(tmp_path)


def test_values_of_other_types_are_shown_as_text(tmp_path):
    (tmp_path / "lens.json").write_text(json.dumps({"lens": "lens", "prompt": ["a", "b"], "call": {"date": [1, 2]}}))
    write_gallery(tmp_path)
    (one,) = data_of(tmp_path)
    assert (one["prompt"], one["date"]) == ("['a', 'b']", "[1, 2]")


def test_a_damaged_image_is_its_own_cover(study, tmp_path):
    shutil.copytree(study / "deep" / "diffusion_lens", tmp_path / "one")
    (tmp_path / "one" / "thumbnail.jpg").unlink()
    (tmp_path / "one" / "grid.png").write_bytes(bytes(300_000))
    write_gallery(tmp_path)
    (one,) = data_of(tmp_path)
    assert one["cover"] == "one/grid.png"


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="names are always Unicode there")
def test_names_that_are_not_utf_8(study, tmp_path, capsys):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(study / "deep" / "diffusion_lens", folder / folder.name)
    (folder / folder.name / "thumbnail.jpg").unlink()
    noise = np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / folder.name / "grid.png")
    page = write_gallery(folder)
    assert "caf\ufffd" in page.read_text(encoding="utf-8")
    (one,) = data_of(folder)
    assert (one["base"], one["record"]) == ("caf%E9/", "lens.json")
    assert (folder / one["cover"]).is_file()
    assert main(["repeat", str(tmp_path)]) == 1  # the grid is noise
    assert "caf\ufffd" in capsys.readouterr().out


def test_a_result_in_the_folder_itself(study, tmp_path):
    shutil.copytree(study / "deep" / "run_prompts", tmp_path / "one")
    write_gallery(tmp_path / "one")
    (one,) = data_of(tmp_path / "one")
    assert (one["base"], one["page"]) == ("", "page.html")


def test_folders_that_cannot_be_shown(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for folder, message in [
        (tmp_path, "no results in"),
        (tmp_path / "no", "not a folder"),
        (tmp_path / "file", "not a"),
    ]:
        with pytest.raises(InputError, match=message):
            write_gallery(folder)
        assert main(["gallery", str(folder)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["index.html", "gallery_data.js"])
def test_a_page_that_is_not_a_gallery_is_kept(study, tmp_path, name):
    shutil.copytree(study / "deep" / "run_prompts", tmp_path / "one")
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name} is not the page of a gallery"):
        write_gallery(tmp_path)
    with pytest.raises(InputError, match=f"{name} is not the page of a gallery"):
        sweep(lambda x: x, [1], tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).unlink()
    write_gallery(tmp_path)
    write_gallery(tmp_path)


def test_a_disk_that_is_full_leaves_nothing_half_written(study, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "study"
    shutil.copytree(study / "deep" / "run_prompts", folder / "one")
    before = sorted(folder.rglob("*"))

    def full(path, text, **settings):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["gallery", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("diffsight: No space left on device")
    assert sorted(folder.rglob("*")) == before
