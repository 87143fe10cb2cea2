"""Small cases of the operators under pytest-benchmark: `python -m pytest -n0 benchmarks`."""

from typing import Any

import pytest
import torch

from exssnet.bench.ops import CASES
from exssnet.kernels.registry import OPERATORS


def test_every_operator_has_a_row() -> None:
    assert list(CASES) == list(OPERATORS)


@pytest.mark.parametrize("operator", CASES)
def test_speed(operator: str, benchmark: Any) -> None:
    case = next(CASES[operator](True))
    case.check()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    benchmark(case.ours)
    torch.set_num_threads(threads)
