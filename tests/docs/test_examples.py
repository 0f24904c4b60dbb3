"""The examples of the README and of the documentation: every block of a page is run, in order and in one namespace.

Blocks in HTML comments (`<!-- invisible-code-block: python`) prepare and check what readers do not need to see. Models
that are not packaged are replaced by small ones with random weights (`STAND_INS`), and pipelines take few steps.
"""

import functools
import linecache
import shlex
from contextlib import ExitStack
from pathlib import Path

import diffusers
import matplotlib.pyplot
import pytest
import sybil
import transformers
from PIL import Image
from sybil.parsers.myst import CodeBlockParser, SkipParser

from diffsight import DiffusionModel
from diffsight.gallery.cli import main
from models import diffusion, language, text_encoders, vision_language

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]
ADDRESS = "http://127.0.0.1:8000"  # of the server in the examples
STEPS = 2  # of a pipeline that is called without `num_inference_steps`


def save_llama(folder):
    """Save a language model with as many layers as SmolLM2 has."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 30, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**language.SIZES, **sizes)
    language.build(transformers.LlamaForCausalLM, config).save_pretrained(folder)
    language.TOKENIZER.save_pretrained(folder)


def save_llava(folder):
    for part in vision_language.llava():
        part.save_pretrained(folder)


STAND_INS = {
    "diffsight/smollm2": save_llama,
    "stabilityai/stable-diffusion-xl-base-1.0": lambda folder: diffusion.stable_diffusion_xl().save_pretrained(folder),
    "llava-hf/llava-1.5-7b-hf": save_llava,
    "stabilityai/stable-audio-open-1.0": lambda folder: text_encoders.stable_audio().save_pretrained(folder),
}


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """Folders with small models, by the name of the model that each replaces; made when they are first asked for."""
    made = {}

    def folder_of(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("model")
            STAND_INS[name](made[name])
        return str(made[name])

    return folder_of


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A folder of its own with the image that examples open; pipelines of few steps and without progress bars."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "orange").save("cat.png")
    for kind in (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline):
        call = kind.__call__.__wrapped__
        monkeypatch.setattr(call, "__defaults__", tuple(STEPS if value == 50 else value for value in call.__defaults__))
    yield
    matplotlib.pyplot.close("all")
    for library in (diffusers.logging, transformers.logging):
        library.enable_progress_bar()


@pytest.fixture(scope="session")
def server():
    """Return a function that returns the address of a server of a packaged pipeline, started when first asked for."""
    started = ExitStack()

    @functools.cache
    def address():
        pytest.importorskip("websockets", reason="remote runs need the package websockets")
        from remote.serving import serving

        model = DiffusionModel("diffsight/shapes-clip")
        return started.enter_context(serving({"diffsight/shapes-clip": model}))

    with started:
        yield address


def run_python(example, folder_of, server):
    """Run a block. Its source can be read, as that of a file can: `with model.edit():` needs it."""
    source, name = example.parsed, f"{Path(example.path).name}:{example.line}"
    if ADDRESS in source:
        source = source.replace(ADDRESS, server())
    for model in STAND_INS:
        if f'"{model}"' in source:
            source = source.replace(f'"{model}"', repr(folder_of(model)))
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), example.namespace)


def run_shell(example):
    """Run the commands of a block that are diffsight's own."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        command, *arguments = shlex.split(line, comments=True) or [""]
        if command == "diffsight":
            assert main(arguments) == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_example_of_a_page_runs(page, stand_ins, server):
    parsers = [
        CodeBlockParser("python", lambda example: run_python(example, stand_ins, server)),
        CodeBlockParser("shell", run_shell),
        SkipParser(),
    ]
    for example in sybil.Sybil(parsers).parse(page):
        example.evaluate()


def test_the_pages_have_examples():
    assert len(PAGES) > 30
    assert sum(page.read_text(encoding="utf-8").count("```python") for page in PAGES) > 60
