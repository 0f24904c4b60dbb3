"""Seeds: integers that select the random stream a model draws from."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import index
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.pipelines.numbers import as_integer

_BLOCK_SIZE = 624  # of a Mersenne Twister
_MOST_BLOCKS = 2**20  # a generator that has drawn more, or was set to another state, is not compared
# In the bytes of a generator's state: how many numbers of the block are left, whether a normal one is kept; the block.
_PLACE, _BLOCK = [*range(8, 24), *range(5040, 5044)], slice(24, 24 + 8 * _BLOCK_SIZE)


def check_seed(seed: Any) -> None:
    """Raise InputError unless `seed` is an integer from 0 to 2**64 - 1."""
    number = None if isinstance(seed, torch.Tensor) else as_integer(seed)
    if number is None or not 0 <= number < 2**64:
        raise InputError(f"a seed is an integer from 0 to 2**64 - 1, not {seed!r}")


def as_seed(seed: Any) -> int:
    """Return a seed as an `int`.

    Raises:
        InputError: It is not an integer from 0 to 2**64 - 1.
    """
    check_seed(seed)
    return index(seed)


def seeds_of_images(seed: int | Sequence[int], count: int) -> list[int]:
    """Return one seed for each of `count` images: `seed + i` for image *i*, or the given list.

    Raises:
        InputError: A seed is not valid, or the list does not hold one seed per image.
    """
    several = isinstance(seed, Iterable) and not isinstance(seed, (str, torch.Tensor)) and getattr(seed, "ndim", 1) > 0
    seed = [*seed] if several else seed
    for one in seed if several else [seed]:
        check_seed(one)
    seeds = [int(one) for one in seed] if several else [int(seed) + i for i in range(count)]
    if len(seeds) != count:
        images = "image" if count == 1 else "images"
        raise InputError(f"{len(seeds)} seeds for {count} {images}: pass one seed per image, or a single number")
    return seeds


def generators(seeds: Sequence[int]) -> torch.Generator | list[torch.Generator]:
    """Return the generators for a call of a pipeline: a list with one per seed, or a single generator for one seed.

    They live on the CPU, so that a seed gives the same image on every device."""
    made = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return made if len(made) > 1 else made[0]


def have_drawn_alike(generators: Sequence[torch.Generator]) -> bool:
    """Return whether generators on the CPU have drawn equally many numbers since they were seeded.

    Each makes its numbers in blocks. Its state holds the current block, and how many numbers of it are left, but not
    how many blocks it has made: these are counted by making them again."""
    states = [generator.get_state() for generator in generators]
    if len({bytes(state[_PLACE].tolist()) for state in states}) > 1:
        return False
    replayed = [torch.Generator("cpu").manual_seed(generator.initial_seed()) for generator in generators]
    numbers = torch.empty(_BLOCK_SIZE, dtype=torch.int32, device="cpu")
    for _ in range(_MOST_BLOCKS):
        if torch.equal(replayed[0].get_state()[_BLOCK], states[0][_BLOCK]):
            return all(torch.equal(drawn.get_state()[_BLOCK], state[_BLOCK]) for drawn, state in zip(replayed, states))
        for one in replayed:
            numbers.random_(generator=one)
    return True


@contextmanager
def seeded_noise(parts: Iterable[Any], seeds: Sequence[int]) -> Iterator[None]:
    """Seed the noise of the schedulers in `parts` that take no generator, such as DPMSolverSDEScheduler.

    `seeds` has one seed per image."""
    unseeded = [part for part in parts if getattr(part, "noise_sampler_seed", 0) is None]
    for part in unseeded:
        part.noise_sampler_seed = list(seeds) if len(seeds) > 1 else seeds[0]
    try:
        yield
    finally:
        for part in unseeded:
            part.noise_sampler_seed = None
