"""Imports as in code written for nnsight."""

import pytest

import diffsight.compat as nnsight
from compat.notebooks.cells import run_cells


@pytest.mark.parametrize(
    "line",
    [
        "from diffsight.compat.util import WrapperModule",
        "from diffsight.compat.envoy import Envoy",
        "from diffsight.compat.models.LanguageModel import LanguageModel",
        "from diffsight.compat.modeling.language import LanguageModel",
        "from diffsight.compat.modeling.diffusion import DiffusionModel",
        "from diffsight.compat.tracing.graph import Proxy",
        "from diffsight.compat.logger import remote_logger; remote_logger.propagate = False",
        "import diffsight.compat.modeling.language as language; language.LanguageModel",
        "from diffsight.compat import util; util.WrapperModule()",
    ],
)
def test_imports(line):
    names = run_cells(line)
    assert all(found is getattr(nnsight, name) for name, found in names.items() if hasattr(nnsight, name))


@pytest.mark.parametrize(
    "line", ["from diffsight.compat.modeling.vllm import VLLM", "from diffsight.compat.util import X"]
)
def test_unknown_imports_fail(line):
    with pytest.raises(ImportError):
        run_cells(line)
