"""What a new user writes before reading anything works, or the error says what to write."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
import torch

import diffsight
from diffsight import DiffusionModel, LanguageModel, diffusion_lens, gallery, image_grid, logit_lens, trajectory_lens
from diffsight.errors import InputError, PointNotFoundError, RunClosedError, UnknownKeyError
from diffsight.gallery.cli import main
from helpers import refusal
from models import language, lens_results


def test_lenses_say_what_to_write(sd):
    model = DiffusionModel(sd)
    for given, told in (("some/model", "DiffusionModel('some/model')"), (sd, "DiffusionModel(pipeline)")):
        assert refusal(diffusion_lens, given, "a red circle").endswith(f"write {told}")
    for lens in (diffusion_lens, trajectory_lens, logit_lens):
        assert refusal(lens, "a red circle", model).endswith(f"write {lens.__name__}(model, 'a red circle')")
    assert refusal(logit_lens, "gpt2", "A cat").endswith("write LanguageModel('gpt2')")
    assert "omit the argument" in refusal(diffusion_lens, model, "a red circle", layers="all")
    assert "sweep" in refusal(diffusion_lens, model, ["a red circle", "a blue square"])
    assert "sweep" in refusal(diffusion_lens, model, "a red circle", seed=[0, 1])


def test_handles_say_where_hidden_states_and_layers_are(sd, gpt2):
    model = DiffusionModel(sd)
    with pytest.raises(PointNotFoundError, match=r"\.layers_output\[i\]"):
        model.text_encoder.hidden_states
    with pytest.raises(PointNotFoundError, match=r"it has 3 layers: len\(model.layers\)"):
        LanguageModel(gpt2).num_layers


def test_a_run_of_a_language_model_has_no_numbered_parts():
    model = language.model()  # in transformers, generate(...)[0] is the first text
    for run in (model.generate("A cat", max_new_tokens=1), model.trace("A cat")):
        with pytest.raises(InputError, match=r"a run has no part 0: read run\.text, run\.result, run\.rows"):
            run[0]
        assert run["lm_head"].path == "lm_head"
        run.stop()


def test_parts_are_listed_once(gpt2):
    with pytest.raises(PointNotFoundError) as caught:
        LanguageModel(gpt2).nothing_like_it
    assert str(caught.value).count("lm_head") == 1


def test_logits_can_be_read_after_a_forward_pass():
    model = language.model()
    texts = ["A cat", "The Eiffel Tower is in Paris"]  # the first is padded
    with model.trace(texts) as run:
        run.layers_output[0][:] *= 2
        logits, probabilities = run.logits, run.next_token_probs
    assert torch.equal(run.logits, logits)
    assert torch.equal(run.next_token_probs, probabilities)
    assert not torch.equal(probabilities, model.trace(texts).next_token_probs)
    with model.trace(texts) as run:
        run.stop()
    with pytest.raises(RunClosedError):
        run.next_token_probs
    with model.generate("A cat", max_new_tokens=2) as run:
        pass
    with pytest.raises(RunClosedError, match="after 2 tokens"):
        run.next_token_probs


def test_parts_of_results_by_name(saved_models):
    maps = lens_results.make("attention_maps", saved_models)
    assert torch.equal(maps[maps.words[1]], maps.maps[1])
    assert (list(maps), len(maps)) == ([*maps.words], len(maps.words))
    assert maps.words[0] in maps and "nothing" not in maps
    with pytest.raises(UnknownKeyError, match="there is no map of 'nothing'"):
        maps["nothing"]
    layers = lens_results.make("diffusion_lens", saved_models)
    assert [layers[layer] for layer in layers] == [*layers.images] and len(layers) == len(layers.images)


@pytest.mark.parametrize(
    "name, told",
    [
        ("to_dict", "did you mean 'record'"),
        ("display", "did you mean 'show'"),
        ("open", "did you mean 'show'"),
        ("to_pil", "did you mean 'grid'"),
        ("export", "did you mean 'save'"),
        ("image", "did you mean 'images'"),
    ],
)
def test_names_that_a_result_does_not_have(name, told, saved_models):
    result = lens_results.make("diffusion_lens", saved_models)
    with pytest.raises(AttributeError, match=rf"DiffusionLensResult has no '{name}' \({told}.* it has .*grid.*layers"):
        getattr(result, name)
    assert not hasattr(result, "_repr_svg_")


def test_an_image_grid_of_a_result(saved_models):
    with pytest.raises(TypeError, match=r"images has type DiffusionLensResult.*write result\.grid\(\)"):
        image_grid(lens_results.make("diffusion_lens", saved_models))


def test_names_that_a_pipeline_does_not_have(sd):
    model = DiffusionModel(sd)
    run = model.generate("a cat", num_inference_steps=1)
    for owner, name, told in (
        (run, "save", r'run\.images\[0\]\.save\("image\.png"\)'),
        (run, "show", r"run\.images\[0\]\.show\(\)"),
        (run, "latents", r"step\.latents"),
        (model, "sample", r"drawn with generate"),
        (model, "cuda", r'model\.to\("cuda"\)'),
        (model, "layers", r"layers are those of a text encoder: \.text_encoder\.layers"),
    ):
        with pytest.raises(PointNotFoundError, match=told):
            getattr(owner, name)


def test_a_run_has_no_parts_by_number(sd):
    run = DiffusionModel(sd).generate("a cat", num_inference_steps=1)
    with pytest.raises(InputError, match=r"its images are run\.images"):
        run[0]


def test_a_generation_is_printed():
    with pytest.raises(PointNotFoundError, match=r"print\(run\.text\)"):
        language.model().generate("A cat", max_new_tokens=1).show()


@pytest.mark.parametrize(
    "name, told",
    [
        ("load", 'DiffusionModel("diffsight/shapes-clip") opens a pipeline'),
        ("sweep", "it is in diffsight.gallery: from diffsight.gallery import sweep"),
        ("DiffusionLensResult", "it is in diffsight.lenses"),
        ("difusion_lens", "did you mean 'diffusion_lens'"),
        ("explore", "from diffsight.gallery import explore"),
        ("list_models", "the command `diffsight models` lists"),
    ],
)
def test_names_that_the_package_does_not_have(name, told):
    with pytest.raises(AttributeError, match=re.escape(told)):
        getattr(diffsight, name)


def test_the_packages_are_attributes():
    assert diffsight.gallery.sweep.__name__ == "sweep" and diffsight.lenses.logit_lens is logit_lens


@pytest.mark.parametrize(
    "words, told",
    [
        (["lens", "a cat", "--guidance-scale", "3"], "An argument of the pipeline is written --set guidance_scale=3"),
        (["lens", "a cat", "--num_inference_steps=3"], "Write --steps 3"),
        (["lens", "a cat", "--devise", "cpu"], "(did you mean --device?)"),
        (["check", "diffsight/shapes-clip", "--steps=2"], "is written num_inference_steps=2"),
        (["logit_lens", "a cat"], "(did you mean 'logit-lens'"),
        (["diffusion_lens", "a cat"], "(did you mean 'lens'?)"),
        (["list"], "(did you mean 'models'?)"),
        (["open", "lens"], "(did you mean 'gallery'?)"),
        (["lens", "a cat", "--output", "cat"], "Write --out cat"),
        (["lens", "a cat", "-n", "4"], "--seeds 0:4"),
        (["lens", "a cat", "--verbose"], "unrecognized arguments: --verbose\n"),
        (["lens", "a cat", "cat.png"], "named with --out cat.png"),
        (["lens", "a cat", "--out", "cat.gif"], "one file that ends with .png"),
        ([], "required: COMMAND; diffsight --help lists the commands"),
        (["check"], "required: SOURCE\n"),
        (["repeat", "nothing"], "there is no file or folder nothing"),
    ],
)
def test_commands_say_what_to_write(words, told, capsys):
    try:
        status = main(words)
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert told in capsys.readouterr().err


def test_results_where_a_folder_is_wanted(saved_models):
    result = lens_results.make("diffusion_lens", saved_models)
    with pytest.raises(InputError, match=r"the folder of a saved result: call result\.save\(folder\) first"):
        gallery.repeat(result)
    with pytest.raises(InputError, match="must be a string or a Path, not a list"):
        gallery.write_gallery([result])


def test_files_that_a_result_is_not_written_to(saved_models, tmp_path):
    for name in ("a.gif", "a.json", "a.csv"):
        with pytest.raises(InputError, match=rf"{name}: a result is written to a folder, or to one file that"):
            lens_results.make("diffusion_lens", saved_models).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_explorer_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "diffsight.gallery.explorer.explore", raising=False)
    with pytest.raises(InputError, match="the explorer needs Gradio: install the extra `app`"):
        from diffsight.gallery import explore  # noqa: F401


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "diffsight", "models"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "diffsight/shapes-clip" in done.stdout


def test_help_in_a_word(capsys):
    helped = []
    for words in (["help", "lens"], ["lens", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(words)
        helped.append(capsys.readouterr().out)
    assert helped[0] == helped[1] and "usage: diffsight lens" in helped[0]


@pytest.mark.parametrize("has_browser", [True, False])
def test_show_opens_the_page(has_browser, saved_models, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or has_browser)
    result = lens_results.make("diffusion_lens", saved_models)
    result.show()
    page = Path(url2pathname(urlsplit(opened[0]).path))
    assert page.read_text() == result.to_html(page.with_name("same.html")).read_text()
    assert capsys.readouterr().out == ("" if has_browser else f"{result}\n")


def test_show_in_a_notebook(saved_models, monkeypatch):
    pytest.importorskip("IPython", reason="IPython is not installed")
    shown = []
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=True))
    monkeypatch.setattr("IPython.display.display", shown.append)
    result = lens_results.make("diffusion_lens", saved_models)
    result.show()
    assert shown == [result]
