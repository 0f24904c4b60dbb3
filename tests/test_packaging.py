"""What is installed: one top-level package, with the packaged pipelines in it, and a face that is quick to import."""

import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CARRIED = ("diffsight", "pipelines", "lenses", "gallery", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for name in CARRIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source]
    subprocess.run(command, check=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def is_data(path):
    """Whether a file belongs to the package, other than its modules. The notebooks are documentation."""
    left_out = {"__pycache__", "notebooks"}
    return path.is_file() and path.suffix != ".py" and not left_out & set(path.parts)


def test_the_wheel_installs_diffsight_alone(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"diffsight"}


def test_the_wheel_carries_every_module_and_data_file(wheel):
    modules = [path for folder in CARRIED[:4] for path in (ROOT / folder).rglob("*.py")]
    parts = [path for name in ("clip", "t5") for path in (ROOT / "pipelines/shapes" / name).rglob("*.*")]
    assert len([path for path in parts if path.suffix == ".safetensors"]) == 6
    data = [path for folder in CARRIED[:4] for path in (ROOT / folder).rglob("*.*") if is_data(path)]
    assert {path.parent.name for path in data} >= {"gallery_parts", "page_parts", "shapes-clip-unet", "flux"}
    for path in [*modules, *parts, *data]:
        place = path.relative_to(ROOT).as_posix()
        assert (place if place.startswith("diffsight/") else f"diffsight/{place}") in wheel.namelist()
    assert Path(wheel.filename).stat().st_size < 40 * 2**20


def test_the_console_script(wheel):
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "diffsight = diffsight.gallery.cli:main" in wheel.read(entry).decode()


def test_the_engine_imports_neither_diffusers_nor_transformers():
    code = (
        "import sys, diffsight, diffsight.pipelines, diffsight.lenses, diffsight.extending; diffsight.Model; "
        "print({'diffusers', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("face", ["diffsight", "diffsight.pipelines", "diffsight.lenses"])
def test_everything_public_can_be_had(face):
    package = importlib.import_module(face)
    assert all(getattr(package, name) is not None for name in package.__all__)
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=f"module '{face}' has no attribute 'nothing'"):
        package.nothing


def test_the_face_holds_what_its_packages_hold():
    import diffsight
    from diffsight import lenses, pipelines

    for name in diffsight.__all__:
        inner = next((face for face in (lenses, pipelines) if name in face.__all__), diffsight)
        assert getattr(diffsight, name) is getattr(inner, name)
    classes = {name for name in diffsight.__all__ if isinstance(getattr(diffsight, name), type)}
    wrappers = {"DiffusionModel", "HFPipeline", "LanguageModel", "Model", "VisionLanguageModel"}
    errors = {"DiffsightError", "OutOfOrderError", "WrongThreadError"}
    assert classes == wrappers | errors | {"Edit", "Run", "Step"}


IMPORTS = [
    "from diffsight.lenses import logit_lens as first; import diffsight.lenses.logit_lens; "
    "from diffsight.lenses import logit_lens; assert first is logit_lens",
    "from diffsight.lenses.logit_lens import logit_lens as first; from diffsight.lenses import logit_lens; "
    "assert first is logit_lens",
    "import diffsight.lenses.logit_lens; logit_lens = diffsight.logit_lens",
    "import diffsight.lenses.diffusion_lens, diffsight.lenses; logit_lens = diffsight.lenses.diffusion_lens",
]
_EACH_ANEW = """
import sys
from types import FunctionType

for imports in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] == "diffsight"]:
        del sys.modules[name]
    names = {}
    exec(imports, names)
    assert type(names["logit_lens"]) is FunctionType, imports
"""


def test_a_lens_is_not_hidden_by_its_file():
    subprocess.run([sys.executable, "-c", _EACH_ANEW, *IMPORTS], check=True)
