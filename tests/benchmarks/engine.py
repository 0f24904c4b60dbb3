"""What the engine adds to a forward pass: reading, editing, a sweep of patched rows; against plain hooks and nnsight.

    pip install nnsight==0.8.1 && python tests/benchmarks/engine.py      # nnsight's columns are left out without it

On a 12-layer GPT-2 of width 64, in one process, interleaved; added milliseconds over the bare pass, medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from diffsight import Model

try:
    from nnsight import NNsight
except ImportError:
    NNsight = None

ROWS, LAYER = 64, 5
IDS = torch.randint(0, 1000, (1, 10), generator=torch.Generator().manual_seed(0))
BATCH = IDS.expand(ROWS, -1).contiguous()


def build() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=12, n_embd=64, n_head=4, vocab_size=1000, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def plain(gpt2: GPT2LMHeadModel) -> dict[str, Callable[[], object]]:
    def hooked(layers: list[int], edit: Callable | None = None, ids: torch.Tensor = IDS) -> None:
        kept = []

        def hook(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            kept.append(output)
            if edit:
                edit(output)

        handles = [gpt2.transformer.h[layer].register_forward_hook(hook) for layer in layers]
        gpt2(ids)
        for handle in handles:
            handle.remove()

    return {
        "nothing": lambda: gpt2(IDS),
        "read 1 layer": lambda: hooked([LAYER]),
        "read 12 layers": lambda: hooked(list(range(12))),
        "edit 1 layer": lambda: hooked([LAYER], lambda output: output.zero_()),
        "patch 64 rows": lambda: hooked([LAYER], lambda output: output[:, -1].zero_(), BATCH),
    }


def live(gpt2: GPT2LMHeadModel) -> dict[str, Callable[[], object]]:
    model = Model(gpt2)

    def nothing() -> None:
        with model.trace(IDS):
            pass

    def read_one() -> None:
        with model.trace(IDS) as run:
            run.transformer.h[LAYER].output

    def read_all() -> None:
        with model.trace(IDS) as run:
            for layer in run.transformer.h:
                layer.output

    def edit() -> None:
        with model.trace(IDS) as run:
            run.transformer.h[LAYER].output[:] = 0

    def patch(row: object) -> None:
        row.transformer.h[LAYER].output[:, -1] = 0

    def sweep() -> None:
        with model.trace(BATCH) as run:
            run.each(patch)

    return dict(zip(plain(gpt2), (nothing, read_one, read_all, edit, sweep), strict=True))


def peer(gpt2: GPT2LMHeadModel) -> dict[str, Callable[[], object]]:
    model = NNsight(gpt2)

    def nothing() -> None:
        with model.trace(IDS):
            pass

    def read_one() -> None:
        with model.trace(IDS):
            model.transformer.h[LAYER].output.save()

    def read_all() -> None:
        with model.trace(IDS):
            for layer in model.transformer.h:
                layer.output.save()

    def edit() -> None:
        with model.trace(IDS):
            model.transformer.h[LAYER].output[:] = 0

    return dict(zip(list(plain(gpt2))[:4], (nothing, read_one, read_all, edit), strict=True))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    gpt2 = build()
    sides = {"hook": plain(gpt2), "diffsight": live(gpt2)} | ({"nnsight": peer(build())} if NNsight else {})
    bare = {"patch 64 rows": lambda: gpt2(BATCH)}
    print(f"{'added to the bare pass, ms':28}" + "".join(f"{side:>12}" for side in sides))
    for task in plain(gpt2):
        runs = {"bare": bare.get(task, lambda: gpt2(IDS))} | {s: fs[task] for s, fs in sides.items() if task in fs}
        times: dict[str, list[float]] = {side: [] for side in runs}
        for turn in range(rounds + 5):
            for side, function in runs.items():
                started = time.perf_counter()
                function()
                if turn >= 5:  # the first rounds warm up
                    times[side].append(time.perf_counter() - started)
        middle = {side: statistics.median(measured) * 1e3 for side, measured in times.items()}
        cells = [f"{middle[s] - middle['bare']:12.3f}" if s in middle else f"{'-':>12}" for s in sides]
        name = f"{task} (bare {middle['bare']:.2f})"
        print(f"{name:28}" + "".join(cells))


if __name__ == "__main__":
    main()
