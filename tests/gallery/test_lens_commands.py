"""Commands that run lenses: they write what the functions of Python return, one result or a study."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from command_line import refusal, run
from PIL import Image

from diffsight import compare_encoders, encoder_patching, logit_lens, trajectory_lens
from diffsight.errors import InputError
from diffsight.gallery import repeat
from diffsight.gallery.option_parsing import parse_seeds, parse_setting, parse_steps
from diffsight.gallery.prompt_files import read_prompts
from diffsight.lenses import attention_maps
from models import language, lens_results

RED, BLUE = "a red circle above a blue square", "a blue circle above a blue square"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# One result


def test_patch(saved_models):
    pipeline = saved_models / "pipeline"
    options = ("--words", "red,circle", "--layers=0,-1", "--steps", 1, "--model", pipeline, "--seed", 2, "--out", "out")
    assert run("patch", RED, BLUE, *options) == 0
    want = encoder_patching(
        lens_results.load(pipeline), RED, BLUE, words=["red", "circle"], layers=[0, -1], seed=2, **lens_results.FAST
    )
    assert np.array_equal(Image.open("out/layer_02_02.png"), want.images[1][1])
    assert repeat("out").is_identical


def test_trajectory(saved_models):
    pipeline = saved_models / "pipeline"
    options = ("--steps", 3, "--at", "0,-1", "--show", "prediction", "--model", pipeline, "--seed", 2, "--out", "out")
    assert run("trajectory", RED, *options) == 0
    want = trajectory_lens(
        lens_results.load(pipeline), RED, steps=[0, -1], show="prediction", seed=2, num_inference_steps=3
    )
    assert np.array_equal(Image.open("out/step_02_prediction.png"), want.images["prediction"][1])
    assert parse_steps("0:20:5") == slice(0, 20, 5)


def test_attention(saved_models):
    pipeline = saved_models / "pipeline"
    options = ("--words", "circle,square", "--steps", 1, "--model", pipeline, "--seed", 2, "--out", "out")
    assert run("attention", RED, *options) == 0
    want = attention_maps(lens_results.load(pipeline), RED, ["circle", "square"], seed=2, num_inference_steps=1)
    assert np.array_equal(Image.open("out/word_01.png"), want.overlay("square"))


def test_fidelity(capsys):
    assert run("fidelity", "--scenes", 2, "--layers", "0,-1", "--steps", 1, "--out", "out") == 0
    assert "2 simple" not in capsys.readouterr().out
    assert len(json.loads(Path("out/fidelity.json").read_text())["prompts"]) == 2


def test_compare(saved_models):
    Path("prompts.txt").write_text(f"{RED}\n\n{BLUE}\n{RED}\n")
    names = f"{saved_models / 'pipeline'},{saved_models / 'xl'}"
    options = ("--layers", "0,1", "--steps", 1, "--images", 1, "--out", "out")
    assert run("compare", "--prompts", "prompts.txt", "--models", names, *options) == 0
    record = json.loads(Path("out/comparison.json").read_text())
    assert record["prompts"] == [RED, BLUE]
    models = {name: lens_results.load(Path(name)) for name in names.split(",")}
    want = compare_encoders(models, [RED, BLUE], layers=[0, 1], **lens_results.FAST)
    assert list(record["encoders"]) == list(want)
    assert run("compare", RED, BLUE, "--models", names, *options[:-1], "again") == 0
    assert json.loads(Path("again/comparison.json").read_text())["nearest"] == record["nearest"]


def test_logit_lens(saved_models, capsys):
    model = saved_models / "language"
    options = ("--layers=-2:", "--tokens", " Paris", "--top-k", 2, "--model", model, "--out", "out")
    assert run("logit-lens", language.PROMPTS[0], *options) == 0
    want = logit_lens(lens_results.load(model), language.PROMPTS[0], layers=[2, 3], tokens=" Paris", top_k=2)
    out = capsys.readouterr().out
    assert out.startswith("logit_lens: The Eiffel Tower")
    assert "Paris" in out
    assert json.loads(Path("out/lens.json").read_text())["words"] == want.words
    assert repeat("out").is_identical


@pytest.mark.parametrize("command", ["lens", "generate"])
def test_an_output_with_an_image_suffix_is_one_image(saved_models, command):
    options = ("--model", saved_models / "pipeline", "--steps", 1, "--out", "a.png")
    for _ in range(2):
        assert run(command, RED, *options) == 0
    assert [path.name for path in Path().iterdir()] == ["a.png"]
    Image.open("a.png").load()


def test_settings_of_the_pipeline(saved_models):
    options = ("--model", saved_models / "pipeline", "--steps", 2, "--layers", 0)
    assert (
        run("lens", RED, *options, "--set", "guidance_scale=3", "--set", "negative_prompt=a cat", "--out", "out") == 0
    )
    arguments = json.loads(Path("out/lens.json").read_text())["arguments"]
    assert arguments == {"num_inference_steps": 2, "guidance_scale": 3, "negative_prompt": "a cat"}


def test_values_of_options():
    assert parse_seeds("0:3,7,1") == [0, 1, 2, 7]
    assert parse_setting("a=3") == ("a", 3)
    assert parse_setting("a=[1, 2.5]") == ("a", [1, 2.5])
    assert parse_setting("a=b=c") == ("a", "b=c")
    assert parse_setting("a=None") == ("a", None)


# Studies


@pytest.fixture
def study(saved_models):
    Path("prompts.txt").write_text(f"{RED}\n{BLUE}\n")
    options = ("--model", saved_models / "pipeline", "--steps", 1, "--layers", "0,2", "--out", "study")
    return "lens", "--prompts", "prompts.txt", "--seeds", "0:2", *options


def listed(folder):
    """Return the results that the gallery of a folder lists."""
    data = Path(folder, "gallery_data.js").read_text()
    return json.loads(data.removeprefix("galleryData(").removesuffix(");\n"))


def test_a_study_is_a_folder_for_each_prompt_and_seed(study, capsys):
    assert run(*study) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["2 prompts x 2 seeds: 4 results in study, 0 done, 4 to do", "study/index.html"]
    records = {path.parent: json.loads(path.read_text()) for path in Path("study").rglob("lens.json")}
    assert {(str(path), record["prompt"], record["seed"]) for path, record in records.items()} == {
        (f"study/{name}/seed_{seed}", prompt, seed)
        for name, prompt in [("000_" + RED.replace(" ", "_"), RED), ("001_" + BLUE.replace(" ", "_"), BLUE)]
        for seed in (0, 1)
    }
    assert all(repeat(path).is_identical for path in list(records)[:1])
    assert [one["folder"] for one in listed("study")] == [str(path)[len("study/") :] for path in sorted(records)]


def test_what_is_done_is_not_done_again(study, capsys):
    assert run(*study) == 0
    first, *others = sorted(Path("study").rglob("grid.png"))
    times = {path: path.stat().st_mtime_ns for path in others}
    for path in first.parent.iterdir():
        path.unlink()
    capsys.readouterr()
    assert run(*study) == 0
    assert "4 results in study, 3 done, 1 to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in others} == times
    assert first.is_file()


def test_a_dry_run_says_how_much_it_will_be(study, capsys):
    assert run(*study, "--dry-run") == 0
    assert capsys.readouterr().out == "2 prompts x 2 seeds: 4 results in study, 0 done, 4 to do\n"
    assert not Path("study").exists()


def test_seeds_alone_make_a_study_of_one_prompt(saved_models, capsys):
    options = ("--model", saved_models / "pipeline", "--steps", 1, "--out", "study")
    assert run("generate", RED, "--seeds", "3,5", *options) == 0
    names = sorted(str(path.relative_to("study")) for path in Path("study").rglob("*.png"))
    folder = "000_" + RED.replace(" ", "_")
    assert names == [f"{folder}/seed_3/seed_3.png", f"{folder}/seed_5/seed_5.png"]
    assert [one["cover"] for one in listed("study")] == names


def test_a_folder_never_mixes_two_studies(study, capsys):
    assert run(*study) == 0
    other = [word if word != "0,2" else "0" for word in study]
    capsys.readouterr()
    assert "study holds a study that differs in layers: choose another folder" in refusal(capsys, *other)
    Path("prompts.txt").write_text("a green ring\n")
    assert "differs in prompts" in refusal(capsys, *study)


def test_more_seeds_are_added_to_a_study(study, capsys):
    assert run(*study) == 0
    more = [word if word != "0:2" else "0:3" for word in study]
    capsys.readouterr()
    assert run(*more) == 0
    assert "6 results in study, 4 done, 2 to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (("lens",), "pass a prompt, or a file with --prompts"),
        (("lens", RED, "--prompts", "prompts.txt"), "not both"),
        (("lens", "--prompts", "nothing.txt"), "nothing.txt: No such file"),
        (("lens", "--prompts", "empty.txt"), "has no prompts"),
        (("lens", "--prompts", "latin.txt"), "is not UTF-8 text, from byte 3 on"),
        (("lens", "--prompts", "prompts.txt", "--out", "a.png"), "into a folder, but a.png is the name of a file"),
        (("lens", RED, "--seeds", "x"), "does not name seeds"),
        (("lens", RED, "--seeds", "0:99999999999"), "'0:99999999999' names more than 100000 seeds"),
        (("lens", RED, "--seeds", f"5,0:{10**30}"), "names more than 100000 seeds"),
        (("lens", RED, "--seed", "0:3"), "several: --seeds"),
        (("lens", RED, "--seeds", "0:2", "--seed", 3), "--seed: not allowed with argument --seeds"),
        (("generate", RED, "--seed", 0, "--seeds", "0:2"), "--seeds: not allowed with argument --seed"),
        (("lens", "--prompt", RED), "A prompt itself is written without an option"),
        (("lens", RED, "--out", ""), "the path is empty: name a folder or a file"),
        (("lens", RED, "--out", "mine"), "holds a file page.html that is not of a saved result"),
        (("generate", RED, "--seed", 3, "--out", "drawn"), "holds a file seed_3.png that is not of a saved result"),
        (("lens", "--prompts", "prompts.txt", "--out", "mine"), "index.html is not the page of a gallery"),
        (("lens", RED, "--device", "nothing"), "the device nothing cannot be used"),
        (("lens", RED, "--layers", "all"), "omit the option for all of them"),
        (("lens", RED, "--set", "guidance"), "NAME=VALUE"),
        (("generate", RED, "--set", "seed=4"), "'seed=4': write --seed 4"),
        (("generate", RED, "--steps", "2", "--set", "num_inference_steps=3"), "write --steps 3"),
        (("generate", RED, "--set", "output_type=np"), "omit it: the command always writes images"),
        (("generate", RED, "--set", "num_images_per_prompt=2"), "write --seeds 0:2 for several images"),
        (("patch", RED, BLUE, "--set", "num_images_per_prompt=2"), "omit it: the command draws one image"),
        (("patch", RED, BLUE, "--set", "prompt=a"), "write the prompt itself"),
        (("patch", RED, ""), "the prompt is empty"),
        (("logit-lens", "--prompts", "empty.txt"), "has no prompts"),
        (("compare",), "pass prompts, or a file with --prompts"),
        (("compare", RED, "--prompts", "prompts.txt"), "not both"),
    ],
    ids=str,
)
def test_invalid_commands(capsys, argv, message):
    Path("prompts.txt").write_text(RED)
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    Path("mine").mkdir()
    Path("drawn").mkdir()
    for name in ("mine/page.html", "mine/index.html", "drawn/seed_3.png"):
        Path(name).write_text("mine")
    assert message in refusal(capsys, *argv)


# Files of prompts


def test_prompts_in_lines_with_a_byte_order_mark_and_empty_lines(here):
    Path("p.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two  \r\n\xe4\xb8\x89\r\n")
    assert read_prompts(Path("p.txt")) == ["one", "two", "三"]


def test_prompts_of_benchmarks(here):
    Path("parti.tsv").write_text(
        'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\n"a ""b"""\tAbstract\t\t\n'
    )
    assert read_prompts(Path("parti.tsv")) == ["bond", 'a "b"']
    Path("geneval.jsonl").write_text('{"tag": "single", "prompt": "a photo of a bench"}\n{"prompt": "a cow"}\n')
    Path("plain.tsv").write_text('Prompt\tn\n"Autumn" on a sign\t1\n"open\t2\na cow\t3\n')  # not written as a table
    assert read_prompts(Path("plain.tsv")) == ['"Autumn" on a sign', '"open', "a cow"]
    assert read_prompts(Path("geneval.jsonl")) == ["a photo of a bench", "a cow"]
    Path("quoted.tsv").write_text('"prompt"\t"n"\n"Autumn" on a sign\t1\n')
    assert read_prompts(Path("quoted.tsv")) == ['"Autumn" on a sign']


def test_tables_that_have_no_prompts(here):
    Path("a.csv").write_text('"prompt"x,n\na,1\n')
    with pytest.raises(InputError, match="the table of prompts is damaged"):
        read_prompts(Path("a.csv"))
    Path("a.csv").write_text('prompt\n"never closed\na cow\n')
    with pytest.raises(InputError, match="the table of prompts is damaged"):
        read_prompts(Path("a.csv"))
    Path("a.csv").write_text("")
    with pytest.raises(InputError, match=r"a\.csv has no prompts"):
        read_prompts(Path("a.csv"))
    Path("a.tsv").write_text("id\tname\n1\tx\n")
    with pytest.raises(InputError, match="there is no column `prompt`, only id, name"):
        read_prompts(Path("a.tsv"))
    Path("a.tsv").write_text("prompt\tname\na\tx\n\ty\n")
    with pytest.raises(InputError, match=r"row 2 of a\.tsv has no prompt"):
        read_prompts(Path("a.tsv"))
    Path("a.jsonl").write_text('{"prompt": "a"}\n{"prompt": " "}\n')
    with pytest.raises(InputError, match=r"row 2 of a\.jsonl has no prompt"):
        read_prompts(Path("a.jsonl"))
    Path("a.jsonl").write_text('{"prompt": "a"}\n{"x": 1}\n')
    with pytest.raises(InputError, match="object 2 has no key `prompt`, only x"):
        read_prompts(Path("a.jsonl"))
    for value in ('{"prompt": null}', '{"prompt": ["a"]}', "3"):
        Path("a.jsonl").write_text(value)
        with pytest.raises(InputError, match="the prompt of object 1 is not a text"):
            read_prompts(Path("a.jsonl"))
    Path("a.jsonl").write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert read_prompts(Path("a.jsonl")) == ["a\u2028b"]  # the line separator of Unicode, as JSON has it
    Path("a.jsonl").write_text("{\n")
    with pytest.raises(InputError, match="object 1 of the prompts is not JSON"):
        read_prompts(Path("a.jsonl"))


# Completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_option(shell, capsys):
    assert run("completion", shell) == 0
    script = capsys.readouterr().out
    for word in ("logit-lens", "gallery", "check", "watch", "prompts", "set"):
        assert word in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    "words, found",
    [
        (["diffsight", "logit"], ["logit-lens"]),
        (["diffsight", "lens", "--see"], ["--seed", "--seeds"]),
        (["diffsight", "lens", "--ou"], ["--out"]),  # has a short form, -o
    ],
)
def test_bash_completes(words, found, capsys):
    run("completion", "bash")
    script = capsys.readouterr().out
    line = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _diffsight; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", f"{script}\n{line}"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == found
