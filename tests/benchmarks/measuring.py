"""Time and peak memory of a call."""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def measured(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return the result of a call, its seconds (`wall`, `cpu`) and the peak memory that it added in MiB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, wall, cpu = _memory("VmRSS"), time.perf_counter(), time.process_time()
    result = function()
    figures = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return result, figures | {"peak": _memory("VmHWM") - before}


def _memory(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024
