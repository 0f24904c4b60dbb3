"""Time and peak memory of a call, and the times of several calls against each other."""

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_LEAST, _BLOCK = 20, 20  # rounds
_CLAIM = 0.1  # the noise that is sought, as a share of what is added


def interleaved(calls: Mapping[str, Callable[[], Any]], most: int, of: str) -> tuple[dict[str, float], float]:
    """Return the processor time of each call in seconds, and the noise of these figures.

    All are called once in each round, in an order that is shuffled, and the one called "bare" twice. The figures are
    lower quartiles: whatever else the machine does only ever adds to a time. The noise is how far the second bare call
    is from the first. Rounds are added until it is a tenth of what `of` adds to the bare call, `most` at most.
    """
    ways = {**calls, "bare again": calls["bare"]}
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for call in ways.values():  # warm up
        call()
    for turn in range(1, most + 1):
        random.shuffle(order)
        for name in order:
            started = time.process_time()
            ways[name]()
            times[name].append(time.process_time() - started)
        if turn >= _LEAST and turn % _BLOCK == 0:
            quick, noise = _figures(times)
            if noise <= _CLAIM * (quick[of] - quick["bare"]):
                break
    return _figures(times)


def _figures(times: Mapping[str, list[float]]) -> tuple[dict[str, float], float]:
    quick = {name: statistics.quantiles(measured, n=4)[0] for name, measured in times.items()}
    return quick, abs(quick.pop("bare again") - quick["bare"])


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
