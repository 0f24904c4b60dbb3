"""Run source code as the cells of a notebook."""

import linecache

import pytest
import torch

import diffsight.compat as nnsight

EIFFEL = "The Eiffel Tower is in the city of"
GARDEN = "Madison Square Garden is in the city of"
TOKENS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
LAYERS = 12


def run_cells(*cells, **names):
    """Run cells in one namespace, each with its own source, as a notebook does."""
    for number, cell in enumerate(cells):
        place = f"<cell {number} of {hash(cells)}>"
        linecache.cache[place] = (len(cell), None, cell.splitlines(keepends=True), place)
        exec(compile(cell, place, "exec"), names)
    return names


def cell_error(model, cell, kind):
    with pytest.raises(kind) as caught:
        run_cells(cell, model=model, torch=torch, nnsight=nnsight)
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
