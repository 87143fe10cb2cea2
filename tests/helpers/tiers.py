"""The tiers of the tests: which cases of a large grid of parameters stand for the grid in the default tier."""

import itertools
import random
from collections.abc import Sequence

WHOLE = ("-m", "", "-n0")
"""Options of a pytest process that a test starts: both tiers, in that process."""
LARGEST, LARGEST_PROOF = 32, 16
"""Grids with at most this many cases are run whole; those of tests that are proofs themselves are slower."""


def representatives(rows: Sequence[Sequence[object]], seed: str) -> set[int]:
    """Positions of rows in which each pair of values of any two parameters occurs, and with two parameters each value.

    A row has one value for each parameter. Greedy, in an order that follows from the seed.
    """
    columns = [column for column in zip(*rows, strict=True) if len(set(column)) > 1]
    together = list(itertools.combinations(columns, 2 if len(columns) > 2 else 1))
    held = [{(i, *(column[row] for column in c)) for i, c in enumerate(together)} for row in range(len(rows))]
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    missing, chosen = set().union(*held), set()
    while missing:
        best = max(order, key=lambda row: len(held[row] & missing))
        chosen.add(best)
        missing -= held[best]
    return chosen
