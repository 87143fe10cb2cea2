"""The tiers of the tests: which cases of a large grid stand for it in the default tier; the limit of tests on a GPU."""

import faulthandler
import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

WHOLE = ("-m", "", "-n0")
"""Options of a pytest process that a test starts: both tiers, in that process."""
LARGEST, LARGEST_PROOF = 32, 16
"""Grids with at most this many cases are run whole; those of tests that are proofs themselves are slower."""
GPU_SECONDS = 300.0
"""Time limit of a test that needs a GPU. The first calls of a shape compile and tune kernels for a minute or more."""


@contextmanager
def time_limit(seconds: float, stderr: int) -> Iterator[None]:
    """After this time the process prints where it is, and ends; pytest-xdist reports the test and goes on.

    A kernel that hangs cannot be interrupted: Python waits in a call that never returns.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


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
