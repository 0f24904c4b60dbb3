"""Sweeps: a folder for each item, resumed, and shared by processes with the same files, to the byte."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffsight.gallery import sweep
from helpers import refusal

STUDY = """
import sys, time
import torch
from diffsight import LanguageModel, logit_lens
from diffsight.gallery import sweep

torch.set_num_threads(1)
model = LanguageModel(sys.argv[1])

def read(prompt, layer):
    time.sleep(float(sys.argv[3]))
    return logit_lens(model, prompt, layers=layer)

sweep(read, [(prompt, layer) for prompt in ("a red circle", "a blue square") for layer in (0, 1, 2)], sys.argv[2])
"""
LAUNCH = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"),
)
ENVIRONMENT = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def start(*words, **options):
    return subprocess.Popen([sys.executable, *map(str, words)], env=ENVIRONMENT, start_new_session=True, **options)


def test_what_a_function_may_return(tmp_path):
    values = {"text": {"a": 1}, "image": Image.new("RGB", (2, 2)), "tensor": torch.arange(3)}
    page = sweep(values.get, ["text", "image"], tmp_path / "a")
    assert page == tmp_path / "a"  # no result of a lens, so no gallery
    assert sorted(files(tmp_path / "a")) == ["000_text/value.json", "001_image/image.png", "study.json"]
    sweep(lambda name, times: {name: values[name] * times}, [("tensor", 2)], tmp_path / "b")
    assert torch.equal(load_file(tmp_path / "b" / "000_tensor_2" / "values.safetensors")["tensor"], torch.arange(3) * 2)


def test_what_is_done_is_not_done_again(tmp_path):
    seen = []

    def measure(number, fails=False):
        seen.append(number)
        if fails and number == 2:
            raise ZeroDivisionError
        return number

    def failing(number):
        return measure(number, fails=True)

    failing.__qualname__ = measure.__qualname__  # the same function, mended
    with pytest.raises(ZeroDivisionError):
        sweep(failing, range(4), tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("0*"))] == ["000_0", "001_1"]
    sweep(measure, range(4), tmp_path)
    assert seen == [0, 1, 2, 2, 3]
    assert not list(tmp_path.glob(".*"))
    assert "differs in items" in refusal(sweep, measure, range(5), tmp_path)
    assert "differs in function" in refusal(sweep, len, range(4), tmp_path)
    for damaged in ("[]", "[" * 100_000):
        (tmp_path / "study.json").write_text(damaged)
        assert "study.json is damaged: remove it" in refusal(sweep, measure, range(4), tmp_path)


def test_bad_input(tmp_path):
    for items in ("letters", {"a": 1}, 3):
        assert refusal(sweep, len, items, tmp_path / "a").startswith("items must be a list")
    assert "no items" in refusal(sweep, len, [], tmp_path / "a")
    assert "'x' appears twice" in refusal(sweep, len, ["x", "y", "x"], tmp_path / "a")
    assert "item 1 is a Tensor" in refusal(sweep, len, ["x", torch.ones(1)], tmp_path / "a")
    assert "a function and then the items" in refusal(sweep, ["x"], len, tmp_path / "a")
    assert "the name of a file" in refusal(sweep, len, ["x"], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
    assert "cannot save" in refusal(sweep, lambda item: object(), ["x"], tmp_path / "b")
    assert not list((tmp_path / "b").glob("0*"))


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert "start them with torchrun" in refusal(sweep, len, ["x"], tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_processes_share_the_work_and_continue_after_one_was_killed(saved_models, tmp_path, monkeypatch):
    """Accelerate starts two processes with torchrun's launcher, of which one is killed half way. Another goes on."""
    (tmp_path / "study.py").write_text(STUDY)
    study = (tmp_path / "study.py", saved_models / "language")
    one, two = (tmp_path / name / "study" for name in ("one", "two"))
    launched = start(*LAUNCH, 20_000 + os.getpid() % 20_000, *study, two, 0.5, stderr=subprocess.DEVNULL)
    while len(list(two.glob("0*"))) < 2:
        assert launched.poll() is None
        time.sleep(0.05)
    workers = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert launched.wait() != 0
    done = {path: path.stat().st_mtime_ns for path in two.glob("0*/*.json")}
    assert 2 <= len(done) < 6 and not (two / "index.html").exists()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", ENVIRONMENT["SOURCE_DATE_EPOCH"])
    for folder in (two, one):
        monkeypatch.setattr(sys, "argv", [*map(str, study), str(folder), "0"])
        runpy.run_path(str(study[0]), run_name="__main__")
    assert done == {path: path.stat().st_mtime_ns for path in done}
    one, two = files(one), files(two)
    assert len([name for name in one if name.startswith("00") and name.endswith(".json")]) == 6
    assert one == two
