"""Tools for results and models: galleries, repetitions, sweeps, checks of models, the command line and notebooks.

    from diffsight.gallery import check_model, repeat, sweep, write_gallery

Each name is imported when it is first used, so that the command line starts quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffsight.errors import suggest

if TYPE_CHECKING:
    from diffsight.gallery.checking import ModelCheck, check_model
    from diffsight.gallery.gallery_index import write_gallery
    from diffsight.gallery.repeating import Repetition, repeat
    from diffsight.gallery.sweeping import sweep

_MODULE_OF = {
    "ModelCheck": "checking",
    "Repetition": "repeating",
    "check_model": "checking",
    "explore": "explorer.explore",  # not in __all__: it needs the extra `app`
    "repeat": "repeating",
    "sweep": "sweeping",
    "write_gallery": "gallery_index",
}
__all__ = ["ModelCheck", "Repetition", "check_model", "repeat", "sweep", "write_gallery"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{suggest(name, _MODULE_OF)}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
