"""Named generators: the same on every machine, independent of one another and of all else."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from core.seeding import derived_seed, generator, random_state_kept


@pytest.mark.parametrize(
    ("labels", "seed"),
    [
        # Written down once: plans on disk draw from these.
        ((), 8617225840456747541),
        (("normal", "fc.weight"), 3579162296370977841),
        (("twin",), 7117339087838331022),
    ],
)
def test_a_seed_is_the_one_that_files_were_made_with(
    labels: tuple[str | int, ...], seed: int
) -> None:
    assert derived_seed(5, *labels) == seed


def test_labels_are_told_apart_by_where_they_end_and_by_their_order() -> None:
    seeds = [
        derived_seed(0, *labels)
        for labels in (("ab", "c"), ("a", "bc"), ("abc",), ("c", "ab"), ("ab", "c", ""))
    ]

    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_neighbouring_seeds_share_no_stream() -> None:
    streams = [torch.rand(1000, generator=generator(seed, "noise")) for seed in (0, 1, 2)]

    correlations = torch.corrcoef(torch.stack(streams))

    # Of 1000 independent pairs |r| stays below 0.15 but for once in 300,000 draws.
    assert (correlations - torch.eye(3)).abs().max() < 0.15


def test_a_generator_neither_reads_nor_moves_the_global_state() -> None:
    torch.manual_seed(1)
    first = torch.rand(3, generator=generator(4, "a"))
    moved = torch.rand(3)
    torch.manual_seed(1)

    later = torch.rand(3)
    again = torch.rand(3, generator=generator(4, "a"))

    assert torch.equal(first, again)
    assert torch.equal(moved, later)


def test_a_block_without_a_seed_goes_on_from_the_state_it_finds() -> None:
    for draw in (random.random, lambda: float(np.random.random()), lambda: float(torch.rand(()))):
        with random_state_kept():
            inside = draw()

        assert draw() == inside
