"""Random numbers that depend on a seed and on counters alone, not on what was drawn before."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

# What the numbers are for; the first counter, so that uses with equal further counters differ.
SAMPLE, STEP, VALIDATION = 0, 1, 2


def seed_from(seed: int, *counters: int) -> None:
    """Seed Python's, numpy's and torch's generators of this process, on all devices.

    Args:
        seed: of the run, at least 0.
        counters: for example :data:`STEP`, the iteration and the process; each combination gives other numbers.
    """
    torch.manual_seed(_seed_cpu(seed, counters))


@contextlib.contextmanager
def seeded(seed: int, *counters: int) -> Iterator[None]:
    """Seed the CPU's generators as :func:`seed_from` does, and put back their states afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(_seed_cpu(seed, counters))
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed_cpu(seed: int, counters: tuple[int, ...]) -> int:
    """Seed Python's and numpy's generators, and return the seed for torch's."""
    words = np.random.SeedSequence((seed, *counters)).generate_state(4, np.uint32)
    random.seed(words.tobytes())
    np.random.seed(words)
    return int(words[0]) << 32 | int(words[1])
