"""The state of modules at the start of a scan, so that it can be restored at the end."""

from collections.abc import Callable
from typing import Any

from torch import nn


class ModuleState:
    """The weights, attributes and hooks of one module at the time this was made.

    Attributes count because models keep things for later calls, such as tables of positions. Submodules and callable
    attributes are left out: the run itself changes the latter.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._hooks = ModuleHooks(module)
        self._attributes = self._read()
        containers = {name: value for name, value in self._attributes.items() if type(value) in (dict, list)}
        self._contents = {name: value.copy() for name, value in containers.items()}

    def _read(self) -> dict[str, Any]:
        held = vars(self._module).items()
        return {n: v for n, v in held if n != "_modules" and not n.startswith("_diffsight") and not callable(v)}

    def restore(self) -> None:
        """Put everything back, and remove what was added."""
        self._hooks.restore()
        held = vars(self._module)
        for name in self._read().keys() - self._attributes.keys():
            del held[name]
        held.update({name: value for name, value in self._attributes.items() if held.get(name) is not value})
        for name, content in self._contents.items():
            _refill(held[name], content)


def _refill(container: dict | list, content: dict | list) -> None:
    """Restore the content of a container. No original entry is missing meanwhile, except when the order is restored."""
    if isinstance(container, list):
        container[:] = content
        return
    container.update(content)
    for name in container.keys() - content.keys():
        del container[name]
    if list(container) != list(content):  # the order counts too: parameters are listed in it
        container.clear()
        container.update(content)


class ModuleHooks:
    """The forward hooks on one module at the time this was made."""

    def __init__(self, module: nn.Module) -> None:
        self._tables = [(table, set(table)) for table in (module._forward_hooks, module._forward_pre_hooks)]

    def restore(self) -> None:
        """Remove the hooks that were added, except those of runs.

        Models of transformers, for example, register hooks on their layers in their first call, and remember that they
        did."""
        for table, known in self._tables:
            for key in [key for key in table if key not in known and not _belongs_to_a_run(table[key])]:
                del table[key]


def _belongs_to_a_run(hook: Callable) -> bool:
    return (getattr(hook, "__module__", None) or "").split(".")[0] == "diffsight"
