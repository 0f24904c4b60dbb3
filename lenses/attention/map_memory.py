"""Check that maps fit into memory before any work is done.

check_memory("the maps", 4 * words * rows * columns, model.device, "choose fewer words")
"""

import os

import torch

from diffsight.errors import InputError


def check_memory(what: str, size: int, device: torch.device, advice: str) -> None:
    """Raise InputError if something is larger than the memory of a device.

    Args:
        what: The name of what would take the memory.
        size: Its size in bytes.
        device: The device.
        advice: What to do about it.
    """
    memory = memory_of(device)
    if memory is not None and size > memory:
        raise InputError(f"{what} would take {_shown(size)}, but {device} has {_shown(memory)} of memory: {advice}")


def memory_of(device: torch.device) -> int | None:
    """Return the memory of a device in bytes, or None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _shown(size: int) -> str:
    return f"{size / 2**30:,.1f} GB" if size >= 2**30 else f"{size / 2**20:,.1f} MB"
