"""Random state: named generators, and a block after which everything is as it was."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_state_kept(seed: int | None = None) -> Iterator[None]:
    """Run a block and put every global random state back, also after an exception.

    Covers Python's `random`, NumPy's legacy generator, torch on the CPU and, where CUDA has
    been initialised, on every device. With `seed`, the block starts from that seed.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def derived_seed(seed: int, *labels: str | int) -> int:
    """Return a 63-bit seed for one named purpose, the same on every machine.

    Adding `seed + i` instead would make neighbouring seeds share streams.
    """
    text = "\x1f".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *labels: str | int) -> torch.Generator:
    """Return a CPU generator for one named purpose, independent of the global state."""
    return torch.Generator().manual_seed(derived_seed(seed, *labels))
